"""Rules by which ``torch.vmap`` runs an operator once for a whole batch, instead of once for each of its elements.

Gradients go through ``torch.vmap`` by ``backward`` and ``torch.autograd.grad``, batched ones included.
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


def _argument(name: str, argument: str) -> int:
    """The position of an operator's argument."""
    schema = getattr(torch.ops.cctorch, name).default._schema
    return [each.name for each in schema.arguments].index(argument)


def _with_axis(name: str, arguments: tuple[Any, ...]) -> tuple[list[Any], int | None, int]:
    """An operator's arguments, with ``axis`` where it was left out; its value, and its position."""
    position = _argument(name, "axis")
    given = [*arguments, None][: position + 1] + list(arguments[position + 1 :])
    return given, given[position], position


def _per_slice(name: str, parameters: int) -> Callable[..., Any]:
    """The rule of an operator on x with so many parameters, each one element or one for each index of ``axis``."""

    def rule(info: Any, dims: _Dims, *arguments: Any) -> tuple[Tensor, int]:
        op = getattr(torch.ops.cctorch, name)
        given, axis, position = _with_axis(name, arguments)
        x = _batched(given[0], dims[0], info.batch_size)
        if all(dim is None for dim in dims[1 : 1 + parameters]):
            given[position] = None if axis is None else axis % (x.dim() - 1) + 1
            return op(x, *given[1:]), 0
        for i in range(1, 1 + parameters):
            given[i] = _batched(given[i], dims[i], info.batch_size).flatten()
        given[0], given[position] = _axis_first(x, axis), 0
        return _axis_back(op(*given), axis, info.batch_size), 0

    return rule


def _per_slice_backward(name: str, parameters: int) -> Callable[..., Any]:
    """That of its gradient's operator: grad and x, the parameters, the rest."""

    def rule(info: Any, dims: _Dims, *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        given, axis, position = _with_axis(name, arguments)
        size = info.batch_size
        tensors = [_batched(given[i], dims[i], size) for i in range(2 + parameters)]
        grad, x = (_axis_first(t, axis) for t in tensors[:2])
        flat = [t.flatten() for t in tensors[2:]]
        given[position] = 0
        grad_x, *grads = getattr(torch.ops.cctorch, name)(grad, x, *flat, *given[2 + parameters :])
        shaped = [g.view(t.shape) for g, t in zip(grads, tensors[2:], strict=True)]
        return (_axis_back(grad_x, axis, size), *shaped), (0,) * (1 + parameters)

    return rule


def _with_dim(name: str) -> Callable[..., Any]:
    """The rule of an operator on a tensor, an index that is the same for all samples, and a dimension."""

    def rule(info: Any, dims: _Dims, x: Tensor, index: Tensor, dim: int = 1, *rest: Any) -> tuple[Tensor, int]:
        if dims[1] is not None:
            raise ValueError(
                f"{name}: torch.vmap over index, expected in_dims of None for it: one index for all samples"
            )
        x = _batched(x, dims[0], info.batch_size)
        return getattr(torch.ops.cctorch, name)(x, index, dim % (x.dim() - 1) + 1, *rest), 0

    return rule


_PARAMETERS = {"fake_quant": 1, "fake_quant_offset": 2, "pact": 1, "fp8_quant": 1, "soft_threshold": 1}
_RULES: dict[str, Callable[..., Any]] = {
    "apply_mask": _apply_mask,
    "channel_gate": _channel_gate,
    "channel_gate_backward": _channel_gate_backward,
    **{name: _with_dim(name) for name in ("gather_channels", "scatter_channels")},
    **{name: _per_slice(name, count) for name, count in _PARAMETERS.items()},
    **{f"{name}_backward": _per_slice_backward(f"{name}_backward", count) for name, count in _PARAMETERS.items()},
}
for _name, _rule in _RULES.items():
    torch.library.register_vmap(f"cctorch::{_name}", _rule)
