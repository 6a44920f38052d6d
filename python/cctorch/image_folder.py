"""Images of any size in ImageNet's folder layout, as tensors of one size: ROOT/{train,val or test}/<class>/<file>.

Only the images that are asked for are decoded, all of them into memory: 150 kB each at 224 x 224 pixels.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional

from cctorch.pixels import as_rgb


def parts(root: Path) -> tuple[ImageFolder, ImageFolder]:
    """The training and test images. Raises ValueError where a folder is missing or empty, or the classes differ."""
    test = root / "val" if (root / "val").is_dir() else root / "test"
    for folder in (root / "train", test):
        if not folder.is_dir():
            raise ValueError(f"{root} has no folder {folder.name}: expected train/<class>/ and val/<class>/, or test/")
    try:
        found = ImageFolder(str(root / "train")), ImageFolder(str(test))
    except FileNotFoundError as error:
        raise ValueError(f"{error}; expected <class>/<image files> below it") from error
    differing = sorted(set(found[0].classes) ^ set(found[1].classes))
    if differing:
        raise ValueError(
            f"{root}: class {differing[0]!r} is in only one of train and {test.name}; expected the same classes"
        )
    if len(found[0].classes) < 2:
        raise ValueError(f"{root} has one class, {found[0].classes[0]!r}: expected two or more")
    return found


def wanted(limit: int | None, validation: int | float) -> int | None:
    """How many training images there must be for `limit` to be left, once those for validation are held out."""
    if limit is None or isinstance(validation, int):
        return None if limit is None else limit + int(validation)
    return math.ceil(limit / (1 - validation))


def read(folder: ImageFolder, size: int, count: int | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` images chosen at random, in the folder's order: uint8, N x 3 x size x size, and int64 labels."""
    chosen = torch.randperm(len(folder.samples), generator=generator)[:count].sort().values.tolist()
    images = torch.empty(len(chosen), 3, size, size, dtype=torch.uint8)
    for row, index in enumerate(chosen):
        images[row] = _decoded(folder.samples[index][0], size)
    return images, torch.tensor([folder.samples[index][1] for index in chosen])


def _decoded(path: str, size: int) -> Tensor:
    try:
        pixels = as_rgb(path)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    shorter = max(size, round(size * 8 / 7))
    square: Tensor = functional.pil_to_tensor(functional.center_crop(functional.resize(pixels, [shorter]), [size]))
    return square
