"""torch.vmap over the operators with learned parameters: one call for the batch, equal to a loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cctorch.ops import fake_quant, fake_quant_groups, fake_quant_offset, fp8_quant, pact
from torch import Tensor

Function = Callable[..., Tensor]
OPS: dict[str, tuple[Callable[[int | None], Function], int]] = {
    "fake_quant": (lambda axis: lambda x, a: fake_quant(x, a, -4, 3, axis, 0.5), 1),
    "fake_quant_offset": (lambda axis: lambda x, a, b: fake_quant_offset(x, a, b, -4, 3, axis), 2),
    "pact": (lambda axis: lambda x, a: pact(x, a, 3, axis), 1),
    "fp8_quant": (lambda axis: lambda x, a: fp8_quant(x, a, torch.float8_e4m3fn, axis), 1),
}


def looped(function: Function, dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> Tensor:
    each = [t if dim is not None else [t] * 3 for t, dim in zip(tensors, dims, strict=True)]
    return torch.stack([function(*arguments) for arguments in zip(*each, strict=True)])


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shared", ["nothing", "parameters", "x", "the first parameter"])
def test_vmap_equals_a_loop(name: str, axis: int | None, shared: str) -> None:
    make, parameters = OPS[name]
    function = make(axis)
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    count = 1 if axis is None else x[0].size(axis)
    values = [0.3 * torch.randn(3, count, dtype=torch.float64) for _ in range(parameters)]
    alone = {"nothing": (), "parameters": range(1, 1 + parameters), "x": (0,), "the first parameter": (1,)}[shared]
    tensors = tuple(t[0] if i in alone else t for i, t in enumerate((x, *values)))
    dims = tuple(None if i in alone else 0 for i in range(1 + parameters))
    assert torch.equal(torch.vmap(function, dims)(*tensors), looped(function, dims, tensors))

    def gradients(run: Function) -> tuple[Tensor, ...]:
        leaves = tuple(t.clone().requires_grad_() for t in tensors)
        return torch.autograd.grad(run(*leaves).square().sum(), leaves)

    theirs = gradients(lambda *leaves: looped(function, dims, leaves))
    for ours, expected in zip(gradients(torch.vmap(function, dims)), theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", [None, 0, -1])
@pytest.mark.parametrize("name", OPS)
def test_many_gradients_at_once(name: str, axis: int | None) -> None:
    make, parameters = OPS[name]
    torch.manual_seed(0)
    x = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    count = 1 if axis is None else x.size(axis)
    values = [(0.3 * torch.randn(count, dtype=torch.float64)).requires_grad_() for _ in range(parameters)]
    y, many = make(axis)(x, *values), torch.randn(3, 4, 5, 6, dtype=torch.float64)
    together = torch.autograd.grad(y, (x, *values), many, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        alone = torch.autograd.grad(y, (x, *values), many[i], retain_graph=True)
        for ours, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[i], expected, rtol=1e-12, atol=1e-12)


def test_other_dimensions_and_groups() -> None:
    x, scale = torch.randn(4, 8, 3), torch.randn(4, 2).mul(0.3)

    def function(x: Tensor, scale: Tensor) -> Tensor:
        return fake_quant_groups(x, scale, -4, 3, 4)

    expected = torch.stack([function(x[..., i], scale) for i in range(3)], 2)
    assert torch.equal(torch.vmap(function, (2, None), 2)(x, scale), expected)
