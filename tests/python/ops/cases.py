"""Layouts and types that every operator is tried on, and what references are made of."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HALF_TYPES = [torch.float16, torch.bfloat16]
TYPES = [torch.float32, torch.float64, *HALF_TYPES]


def _expanded(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


# Each takes a contiguous N x C x H x W tensor and returns one of the same shape in another layout.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "strided": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "expanded": _expanded,
}


def scale_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def with_threads(count: int, function: Callable[[], Any]) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


def along(x: Tensor, parameter: Tensor, axis: int | None) -> Tensor:
    """One of the parameter for every index of the axis, to go with x."""
    return parameter.view([-1 if axis is not None and d == axis % x.dim() else 1 for d in range(x.dim())])


def scaled_gradient(parameter: Tensor, factor: float) -> Tensor:
    """The same with `factor` times the gradient."""
    return parameter * factor + (parameter - parameter * factor).detach()


def straight_through(exact: Tensor, value: Tensor) -> Tensor:
    """The value, with the gradient of what is exact."""
    return exact + (value - exact).detach()
