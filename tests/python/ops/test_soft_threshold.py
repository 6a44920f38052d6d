import math
from typing import Any

import pytest
import torch
from cases import LAYOUTS, TYPES, scale_type, with_threads
from cctorch.ops import soft_threshold
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


def spread(threshold: Tensor, x: Tensor, axis: int | None) -> Tensor:
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = -1
    return threshold.reshape(shape)


def reference(x: Tensor, threshold: Tensor, axis: int | None) -> Tensor:
    return x.sign() * (x.abs() - spread(threshold, x, axis)).relu()


def gradients(function: Any, x: Tensor, threshold: Tensor, axis: int | None, grad: Tensor) -> tuple[Tensor, ...]:
    x, threshold = x.detach().requires_grad_(), threshold.detach().requires_grad_()
    y = function(x, threshold, axis)
    return (y.detach(), *torch.autograd.grad(y, (x, threshold), grad))


def inputs(shape: tuple[int, ...], axis: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    threshold = torch.rand(1 if axis is None else shape[axis], dtype=scale_type(dtype))
    return x, threshold, grad


SHAPES = [(3, 5), (2000, 3), (2, 5, 7, 7), (2, 3, 30, 30), (1, 1, 1, 1), (0, 3, 2), (2, 700), (7,)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", [None, 0, -1])
@pytest.mark.parametrize("dtype", TYPES)
def test_agrees_with_float64(shape: tuple[int, ...], axis: int | None, dtype: torch.dtype) -> None:
    x, threshold, grad = inputs(shape, axis, dtype)
    y, grad_x, grad_threshold = gradients(soft_threshold, x, threshold, axis, grad)
    right = gradients(reference, x.double(), threshold.double(), axis, grad.double())
    eps = torch.finfo(dtype).eps
    # The difference |x| - t is rounded once to the type of the arithmetic, once to that of x.
    step = torch.finfo(scale_type(dtype)).eps
    torch.testing.assert_close(y.double(), right[0], rtol=eps, atol=step)
    assert torch.equal(grad_x.double(), right[1])
    bound = (1e-14 if dtype == torch.float64 else 1e-6) * max(1.0, grad.double().abs().sum().item())
    torch.testing.assert_close(grad_threshold.double(), right[2], rtol=step, atol=bound)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", [None, 0, 1, 3])
def test_layouts(layout: str, axis: int | None) -> None:
    x, threshold, grad = inputs((6, 5, 4, 70), axis, torch.float64)
    x = LAYOUTS[layout](x)
    results = gradients(soft_threshold, x, threshold, axis, grad)
    for ours, theirs in zip(results, gradients(reference, x, threshold, axis, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert results[0].stride() == torch.empty_like(x).stride()


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40),
    threshold=st.floats(min_value=0, width=32, allow_infinity=False),
)
def test_any_values(values: list[float], threshold: float) -> None:
    """Denormals, infinities and signed zeros included."""
    x, t = torch.tensor(values), torch.tensor([threshold])
    ours = gradients(soft_threshold, x, t, None, torch.ones_like(x))
    theirs = gradients(reference, x, t, None, torch.ones_like(x))
    # The reference's own gradient has a factor sign(x)^2, which is exact.
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert ours[2].item() == -sum(math.copysign(1, v) for v in values if abs(v) > threshold)


def test_nan_passes_through_and_ties_are_zero() -> None:
    x = torch.tensor([math.nan, 0.5, -0.5, math.inf, -math.inf, 0.0])
    y, grad_x, grad_threshold = gradients(soft_threshold, x, torch.tensor([0.5]), None, torch.ones(6))
    assert y[0].isnan()
    assert y[1:].tolist() == [0, 0, math.inf, -math.inf, 0]
    assert grad_x[1:].tolist() == [0, 0, 1, 1, 0]
    assert grad_threshold.shape == (1,)


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_gradcheck_away_from_the_corners(axis: int | None) -> None:
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    threshold = torch.rand(1 if axis is None else x.size(axis), dtype=torch.float64) + 0.1
    gap = x.abs() - spread(threshold, x, axis)
    x = torch.where(gap.abs() < 1e-3, 2 * x, x).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, t: soft_threshold(x, t, axis), (x, threshold.requires_grad_()))


def test_learned_thresholds_get_their_gradient_through_the_sigmoid() -> None:
    weight, s = torch.randn(6, 10, dtype=torch.float64), torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: soft_threshold(weight, torch.sigmoid(s), 0), (s,))


def test_results_do_not_depend_on_threads() -> None:
    for shape, axis in (((30000, 3), 1), ((64, 9, 130), 1), ((300_000,), None)):
        x, threshold, grad = inputs(shape, axis, torch.float32)
        one, two = (
            with_threads(n, lambda: gradients(soft_threshold, x, threshold, axis, grad))  # noqa: B023
            for n in (1, 2)
        )
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("dtype", TYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    ops = torch.ops.cctorch
    for axis in (None, 1):
        x, threshold, grad = inputs((4, 3, 5, 5), axis, dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        torch.library.opcheck(ops.soft_threshold.default, (x.requires_grad_(), threshold.requires_grad_(), axis))
        torch.library.opcheck(ops.soft_threshold_backward.default, (grad, x.detach(), threshold.detach(), axis))


def test_compile_and_export_with_dynamic_shapes() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, threshold: Tensor) -> Tensor:
            return soft_threshold(x, threshold, 1)

    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager", dynamic=True)
    x, threshold, _ = inputs((4, 3, 5), 1, torch.float32)
    program = torch.export.export(Module(), (x, threshold), dynamic_shapes=({0: torch.export.Dim("batch")}, None))
    for batch in (4, 6):
        x, threshold, grad = inputs((batch, 3, 5), 1, torch.float32)
        assert torch.equal(program.module()(x, threshold), soft_threshold(x, threshold, 1))
        expected = gradients(soft_threshold, x, threshold, 1, grad)
        leaves = (x.requires_grad_(), threshold.requires_grad_())
        grads = torch.autograd.grad(compiled(*leaves), leaves, grad)
        assert all(torch.equal(a, b) for a, b in zip(grads, expected[1:], strict=True))


def test_autocast() -> None:
    weight = torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.nn.functional.linear(torch.randn(2, 6), soft_threshold(weight, torch.tensor([0.1])))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_vmap_equals_a_loop(axis: int | None) -> None:
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    count = 1 if axis is None else x[0].size(axis)
    many, one = torch.rand(3, count, dtype=torch.float64), torch.rand(count, dtype=torch.float64)

    def function(x: Tensor, threshold: Tensor) -> Tensor:
        return soft_threshold(x, threshold, axis)

    for thresholds, dims in ((many, (0, 0)), (one, (0, None))):
        each = thresholds if dims[1] == 0 else [thresholds] * 3
        expected = torch.stack([function(a, b) for a, b in zip(x, each, strict=True)])
        assert torch.equal(torch.vmap(function, dims)(x, thresholds), expected)
        leaves = (x.clone().requires_grad_(), thresholds.clone().requires_grad_())
        grads = torch.autograd.grad(torch.vmap(function, dims)(*leaves).square().sum(), leaves)
        loop = [function(leaves[0][i], leaves[1][i] if dims[1] == 0 else leaves[1]).square().sum() for i in range(3)]
        for ours, theirs in zip(grads, torch.autograd.grad(sum(loop), leaves), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    unbatched = torch.vmap(function, (None, 0))(x[0], many)
    assert torch.equal(unbatched, torch.stack([function(x[0], t) for t in many]))


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_many_gradients_at_once(axis: int | None) -> None:
    x, threshold, _ = inputs((4, 5, 6), axis, torch.float64)
    many = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    leaves = (x.requires_grad_(), threshold.requires_grad_())
    grads = torch.autograd.grad(soft_threshold(*leaves, axis), leaves, many, is_grads_batched=True)
    for i in range(3):
        expected = torch.autograd.grad(reference(*leaves, axis), leaves, many[i])
        for ours, theirs in zip(grads, expected, strict=True):
            torch.testing.assert_close(ours[i], theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: soft_threshold(torch.ones(2).int(), torch.ones(1)), "x must be float32"),
        (lambda: soft_threshold(torch.ones(2).half(), torch.ones(1).half()), "threshold must be Float for Half x"),
        (lambda: soft_threshold(torch.ones(2).double(), torch.ones(1)), "threshold must be Double for Double x"),
        (lambda: soft_threshold(torch.ones(2), torch.ones(2)), "one element where axis is not given"),
        (lambda: soft_threshold(torch.ones(2, 3), torch.ones(2), 1), "each of the 3 indices of axis 1, got 2"),
        (lambda: soft_threshold(torch.ones(2, 3), torch.ones(3, 1), 1), "must be one-dimensional"),
        (lambda: soft_threshold(torch.ones(2, 3), torch.ones(3), 2), "axis must be in"),
        (lambda: soft_threshold(torch.ones(2, device="meta"), torch.ones(1)), "x is on meta but threshold is on cpu"),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
