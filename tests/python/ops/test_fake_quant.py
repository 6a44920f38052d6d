import math
from typing import Any

import pytest
import torch
from cases import HALF_TYPES, LAYOUTS, TYPES, scale_type, with_threads
from cctorch.ops import fake_quant
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


def reference(
    x: Tensor, log_scale: Tensor, qmin: int, qmax: int, axis: int | None = None, grad_scale: float = 1.0
) -> Tensor:
    """LSQ as a straight-through expression of torch operators."""
    log_scale = log_scale.view([-1 if axis is not None and d == axis % x.dim() else 1 for d in range(x.dim())])
    scale = log_scale.exp()
    scale = scale * grad_scale + (scale - scale * grad_scale).detach()
    clamped = (x / scale).clamp(qmin, qmax)
    return scale * (clamped + (clamped.round() - clamped).detach())


def gradients(function: Any, x: Tensor, log_scale: Tensor, grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    x, log_scale = x.detach().requires_grad_(), log_scale.detach().requires_grad_()
    y = function(x, log_scale, *arguments)
    return (y.detach(), *torch.autograd.grad(y, (x, log_scale), grad))


def inputs(shape: tuple[int, ...], axis: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    count = 1 if axis is None else shape[axis]
    log_scale = (torch.randn(count, generator=generator, dtype=torch.float64) / 4 - 2).to(scale_type(dtype))
    return x, log_scale, torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


SHAPES: list[tuple[tuple[int, ...], int | None]] = [
    ((5, 7, 3, 3), None),
    ((5, 7, 3, 3), 0),
    ((5, 7, 3, 3), 1),
    ((2, 3, 9, 9), 1),
    ((700, 33), 1),
    ((40, 1100), -1),
    ((3, 40000), 0),
    ((50000,), None),
    ((1, 1, 1, 1), 1),
    ((), None),
]


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("grad_scale", [1.0, 0.125])
def test_float64_equals_the_straight_through_expression(
    shape: tuple[int, ...], axis: int | None, grad_scale: float
) -> None:
    arguments = (*inputs(shape, axis, torch.float64), -4, 3, axis, grad_scale)
    for ours, theirs in zip(gradients(fake_quant, *arguments), gradients(reference, *arguments), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES])
def test_lower_precision_agrees_with_float64(shape: tuple[int, ...], axis: int | None, dtype: torch.dtype) -> None:
    x, _, grad = inputs(shape, axis, dtype)
    # Kept away from the jumps of rounding and clamping, which float32 may see on the other side.
    log_scale = torch.full((1 if axis is None else shape[axis],), math.log(0.3), dtype=torch.float32)
    half_steps = x.double() / 0.15
    x = torch.where((half_steps - half_steps.round()).abs() < 1e-3, torch.zeros_like(x), x)
    y, grad_x, grad_scale = gradients(fake_quant, x, log_scale, grad, -4, 3, axis)
    exact = gradients(reference, x.double(), log_scale.double(), grad.double(), -4, 3, axis)
    torch.testing.assert_close(y, exact[0].to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
    assert torch.equal(grad_x, exact[1].to(dtype))
    # Sums in float32 or better of up to numel terms
    magnitude = (grad.double().abs() * 4 * 0.3).sum()
    assert (grad_scale.double() - exact[2]).abs().max() <= 1e-6 * magnitude
    assert grad_scale.dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", [None, 0, 1, 2, 3, -1])
@pytest.mark.parametrize("dtype", TYPES)
def test_layouts(layout: str, axis: int | None, dtype: torch.dtype) -> None:
    x, log_scale, grad = inputs((6, 5, 4, 70), axis, dtype)
    x = LAYOUTS[layout](x)
    results = gradients(fake_quant, x, log_scale, grad, -8, 7, axis)
    expected = gradients(fake_quant, x.contiguous(), log_scale, grad, -8, 7, axis)
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[1], expected[1])
    torch.testing.assert_close(results[2], expected[2], rtol=1e-5, atol=1e-4)
    assert results[0].stride() == torch.empty_like(x).stride()


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20),
    log_scale=st.floats(-1e4, 1e4, width=32),
    bits=st.integers(2, 8),
)
def test_result_is_on_the_grid(values: list[float], log_scale: float, bits: int) -> None:
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    finfo = torch.finfo(torch.float32)
    logarithm = torch.tensor(log_scale)
    scale = fake_quant(torch.tensor([finfo.max]), logarithm, 0, 1)
    exact = logarithm.double().exp().clamp(finfo.tiny, finfo.max)
    torch.testing.assert_close(scale[0].double(), exact, rtol=2 * finfo.eps, atol=0)
    y = fake_quant(torch.tensor(values), logarithm, qmin, qmax)
    assert torch.isin(y, torch.arange(qmin, qmax + 1) * scale).all()


def test_extremes() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 3e38, 1e-45, -0.0, 0.5, 1.5, 2.5, -0.5])
    y = fake_quant(x, torch.zeros(()), -128, 127)
    expected = torch.tensor([math.nan, 127, -128, 127, 0, -0.0, 0, 2, 2, -0.0])
    assert torch.equal(y.nan_to_num(99), expected.nan_to_num(99))
    for log_scale in (-1e4, -200.0, 200.0, 1e4):
        y, grad_x, grad_scale = gradients(
            fake_quant, torch.tensor([1.0, -1.0, 0.0]), torch.tensor([log_scale]), torch.ones(3), -128, 127
        )
        assert y.isfinite().all()
        assert grad_x.isfinite().all()
        assert grad_scale.isfinite().all()
    assert gradients(fake_quant, x, torch.zeros(1), torch.ones(10), -128, 127)[2].isnan()


def test_a_huge_scale_does_not_make_small_gradients_infinite() -> None:
    x, log_scale, grad = torch.tensor([0.3, -2.0, 0.0]), torch.tensor([88.0]), torch.tensor([1e3, 10.0, 1e3])
    _, _, grad_scale = gradients(fake_quant, x, log_scale, grad, -8, 7)
    # Everything rounds to 0, so the error is -x.
    torch.testing.assert_close(grad_scale, -(grad * x).sum().view(1), rtol=1e-6, atol=0.0)


def test_gradient_at_and_beyond_the_ends() -> None:
    x = torch.tensor([-2.25, -2.0, 0.25, 1.0, 1.25])
    _, grad_x, grad_scale = gradients(fake_quant, x, torch.zeros(1), torch.ones(5), -2, 1)
    assert grad_x.tolist() == [0, 1, 1, 1, 0]
    assert grad_scale.tolist() == [-2 + 0 - 0.25 + 0 + 1]


def test_scale_gradient_is_the_derivative_of_the_error_between_grid_points() -> None:
    """d/dlog_scale of sum(grad * y) by finite differences, where no rounding decision changes."""
    x = torch.tensor([0.3, -0.7, 5.0, -9.0], dtype=torch.float64)
    grad = torch.tensor([1.0, 2.0, 3.0, -4.0], dtype=torch.float64)
    log_scale = torch.tensor([-1.1], dtype=torch.float64)
    outside = torch.tensor([False, False, True, True])
    _, _, analytic = gradients(fake_quant, x[outside], log_scale, grad[outside], -4, 3)
    step = 1e-6
    high, low = (fake_quant(x[outside], log_scale + s, -4, 3) for s in (step, -step))
    numeric = ((high - low) / (2 * step) * grad[outside]).sum()
    torch.testing.assert_close(analytic[0], numeric, rtol=1e-8, atol=0)


def test_empty() -> None:
    y, grad_x, grad_scale = gradients(fake_quant, torch.empty(0, 3), torch.zeros(3), torch.empty(0, 3), -8, 7, 1)
    assert y.shape == grad_x.shape == (0, 3)
    assert torch.equal(grad_scale, torch.zeros(3))


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_results_do_not_depend_on_threads(axis: int | None) -> None:
    for shape in ((3, 60000), (30000, 3), (64, 9, 130)):
        arguments = (*inputs(shape, axis, torch.float32), -8, 7, axis)
        one, two = (with_threads(n, lambda: gradients(fake_quant, *arguments)) for n in (1, 2))  # noqa: B023
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("axis", [None, 1])
def test_opcheck(dtype: torch.dtype, axis: int | None) -> None:
    x, log_scale, grad = inputs((4, 3, 5, 5), axis, dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    arguments = (x, log_scale.requires_grad_(), -8, 7, axis, 0.5)
    torch.library.opcheck(torch.ops.cctorch.fake_quant.default, arguments)
    backward = torch.ops.cctorch.fake_quant_backward.default
    torch.library.opcheck(backward, (grad, x.detach(), log_scale.detach(), -8, 7, axis, 0.5))


def test_second_derivative_is_refused() -> None:
    x = torch.randn(4, requires_grad=True)
    (grad,) = torch.autograd.grad(fake_quant(x, torch.zeros(1), -8, 7).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative for cctorch::fake_quant_backward"):
        grad.sum().backward()


def test_compile_with_dynamic_shapes_and_gradients() -> None:
    compiled = torch.compile(fake_quant, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (4, 6):
        arguments = (*inputs((batch, 3, 5), 1, torch.float32), -8, 7, 1, 0.5)
        for ours, theirs in zip(gradients(compiled, *arguments), gradients(fake_quant, *arguments), strict=True):
            assert torch.equal(ours, theirs)


def test_export() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, log_scale: Tensor) -> Tensor:
            return fake_quant(x, log_scale, -8, 7, 1)

    x, log_scale, _ = inputs((4, 3, 5), 1, torch.float32)
    program = torch.export.export(Module(), (x, log_scale), dynamic_shapes=({0: torch.export.Dim("batch")}, None))
    x = torch.cat([x, x])
    assert torch.equal(program.module()(x, log_scale), fake_quant(x, log_scale, -8, 7, 1))


def test_autocast_trains_a_layer() -> None:
    weight, log_scale = torch.randn(8, 16, requires_grad=True), torch.full((8,), -2.0, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.nn.functional.linear(torch.randn(4, 16), fake_quant(weight, log_scale, -8, 7, 0))
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert weight.grad is not None
    assert log_scale.grad is not None
    assert log_scale.grad.ne(0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3, dtype=torch.int64), torch.zeros(1), -8, 7), "x must be float32, float64, float16 or bfloat16"),
        (
            (torch.ones(3), torch.zeros(1, dtype=torch.float64), -8, 7),
            "log_scale must be Float for Float x, got Double",
        ),
        ((torch.ones(3).half(), torch.zeros(1).half(), -8, 7), "log_scale must be Float for Half x, got Half"),
        ((torch.ones(3), torch.zeros(1), 7, 7), "expected qmin < qmax.*qmin = 7 and qmax = 7"),
        ((torch.ones(3), torch.zeros(1), 0, 2**24 + 1), "both within -2\\^24 to 2\\^24"),
        ((torch.ones(3), torch.zeros(3), -8, 7), "log_scale must have one element where axis is not given"),
        ((torch.ones(2, 3), torch.zeros(2), -8, 7, 1), "one element for each of the 3 indices of axis 1, got 2"),
        ((torch.ones(2, 3), torch.zeros(3, 1), -8, 7, 1), "log_scale must be one-dimensional"),
        ((torch.ones(2, 3), torch.zeros(2), -8, 7, 2), r"axis must be in \[-2, 1\].*got 2"),
        ((torch.ones(2, device="meta"), torch.zeros(1), -8, 7), "x is on meta but log_scale is on cpu"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        fake_quant(*arguments)
