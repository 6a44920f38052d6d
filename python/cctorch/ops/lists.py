"""What operators on a sequence of tensors share."""

from collections.abc import Sequence

from torch import Tensor


def for_each(x: Sequence[Tensor], number: float | Sequence[float]) -> list[float]:
    """One number for each tensor of ``x``."""
    return [float(number)] * len(x) if isinstance(number, int | float) else [*map(float, number)]
