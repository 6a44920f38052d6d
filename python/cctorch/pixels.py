"""Image files of any mode, as colours."""

from __future__ import annotations

from typing import BinaryIO

from PIL import Image


def as_rgb(file: str | BinaryIO) -> Image.Image:
    """The image with 8 bits for each colour. Raises ValueError where it can't be read."""
    try:
        with Image.open(file) as image:
            # PIL's conversion clips 16 bits to 8.
            eight_bits = image.point(lambda value: value * (1 / 256)) if image.mode.startswith("I;16") else image
            pixels: Image.Image = eight_bits.convert("RGB")
            return pixels
    except Exception as error:  # Of any type: PIL lets through what damaged bytes lead to.
        raise ValueError(f"is no readable image ({error}): copy it again, or delete it") from error
