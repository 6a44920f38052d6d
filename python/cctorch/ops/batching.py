"""Rules by which ``torch.vmap`` runs an operator once for a whole batch, instead of once for each of its elements.

Gradients go through ``torch.vmap`` by ``backward`` and ``torch.autograd.grad``, batched ones included;
``torch.func.grad`` and its kin refuse operators whose autograd is C++.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_Dims = tuple[int | None, ...]


def _batched(x: Tensor, dim: int | None, size: int) -> Tensor:
    """``x`` with the batch as dimension 0."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _rows_of(x: Tensor, batch: int) -> Tensor:
    """(B N) x ... as B x N x ..."""
    return x.reshape(batch, x.shape[0] // batch, *x.shape[1:])


def _apply_mask(info: Any, dims: _Dims, weight: Tensor, mask: Tensor) -> tuple[Tensor, int]:
    weight, mask = _batched(weight, dims[0], info.batch_size), _batched(mask, dims[1], info.batch_size)
    return torch.ops.cctorch.apply_mask(weight, mask), 0


def _into_channels(x: Tensor) -> Tensor:
    """B x N x C x ... as N x (B C) x ..."""
    return x.movedim(0, 1).flatten(1, 2)


def _out_of_channels(x: Tensor, batch: int) -> Tensor:
    return x.reshape(x.shape[0], batch, x.shape[1] // batch, *x.shape[2:]).movedim(1, 0)


def _channel_gate(info: Any, dims: _Dims, x: Tensor, gate: Tensor) -> tuple[Tensor, int]:
    x = _batched(x, dims[0], info.batch_size)
    if dims[1] is None:
        y = torch.ops.cctorch.channel_gate(x.flatten(0, 1), gate)
        return _rows_of(y, info.batch_size), 0
    gates = gate.movedim(dims[1], 0).flatten()
    return _out_of_channels(torch.ops.cctorch.channel_gate(_into_channels(x), gates), info.batch_size), 0


def _channel_gate_backward(
    info: Any, dims: _Dims, grad: Tensor, x: Tensor, gate: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    size = info.batch_size
    grad, x, gate = (_batched(t, dim, size) for t, dim in zip((grad, x, gate), dims, strict=True))
    grad_x, grad_gate = torch.ops.cctorch.channel_gate_backward(_into_channels(grad), _into_channels(x), gate.flatten())
    return (_out_of_channels(grad_x, size), grad_gate.view(size, -1)), (0, 0)


def _axis_first(x: Tensor, axis: int | None) -> Tensor:
    """B x ... with one parameter for each index of the sample's ``axis`` as (B C) x ..."""
    return x if axis is None else x.movedim(axis % (x.dim() - 1) + 1, 1).flatten(0, 1)


def _axis_back(x: Tensor, axis: int | None, batch: int) -> Tensor:
    return x if axis is None else _rows_of(x, batch).movedim(1, axis % x.dim() + 1)


def _soft_threshold(
    info: Any, dims: _Dims, x: Tensor, threshold: Tensor, axis: int | None = None
) -> tuple[Tensor, int]:
    x = _batched(x, dims[0], info.batch_size)
    if dims[1] is None:
        shifted = None if axis is None else axis % (x.dim() - 1) + 1
        return torch.ops.cctorch.soft_threshold(x, threshold, shifted), 0
    thresholds = threshold.movedim(dims[1], 0).flatten()
    y = torch.ops.cctorch.soft_threshold(_axis_first(x, axis), thresholds, 0)
    return _axis_back(y, axis, info.batch_size), 0


def _soft_threshold_backward(
    info: Any, dims: _Dims, grad: Tensor, x: Tensor, threshold: Tensor, axis: int | None
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    size = info.batch_size
    grad, x, threshold = (_batched(t, dim, size) for t, dim in zip((grad, x, threshold), dims[:3], strict=True))
    grad_x, grad_threshold = torch.ops.cctorch.soft_threshold_backward(
        _axis_first(grad, axis), _axis_first(x, axis), threshold.flatten(), 0
    )
    return (_axis_back(grad_x, axis, size), grad_threshold.view(threshold.shape)), (0, 0)


_RULES: dict[str, Callable[..., Any]] = {
    "apply_mask": _apply_mask,
    "channel_gate": _channel_gate,
    "channel_gate_backward": _channel_gate_backward,
    "soft_threshold": _soft_threshold,
    "soft_threshold_backward": _soft_threshold_backward,
}
for _name, _rule in _RULES.items():
    torch.library.register_vmap(f"cctorch::{_name}", _rule)
