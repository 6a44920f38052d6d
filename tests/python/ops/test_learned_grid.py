"""What the relatives of fake_quant share: straight-through gradients to x and to one or two parameters per channel."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import (
    HALF_TYPES,
    LAYOUTS,
    TYPES,
    along,
    scale_type,
    scaled_gradient,
    straight_through,
    with_threads,
)
from cctorch import ops
from torch import Tensor


def offset_reference(x: Tensor, log_scale: Tensor, offset: Tensor, axis: int | None, factor: float) -> Tensor:
    scale = along(x, scaled_gradient(log_scale, factor), axis).exp()
    offset = along(x, scaled_gradient(offset, factor), axis)
    clamped = ((x - offset) / scale).clamp(-4, 3)
    return scale * straight_through(clamped, clamped.round()) + offset


def pact_reference(x: Tensor, log_alpha: Tensor, axis: int | None, factor: float) -> Tensor:
    alpha = along(x, log_alpha, axis).exp().expand_as(x)
    clipped = torch.where(x < 0, torch.zeros_like(x), torch.where(x >= alpha, alpha, x))
    return straight_through(clipped, (clipped * 7 / alpha).round() * alpha / 7)


def nearest_fp8(v: Tensor, dtype: torch.dtype) -> Tensor:
    """By search among all numbers of the format; a tie to the even code."""
    codes = torch.arange(128, dtype=torch.uint8)
    values = codes.view(dtype).double()
    codes, values = codes[values.isfinite()], values[values.isfinite()]
    upper = torch.searchsorted(values, v.abs().contiguous()).clamp(max=len(values) - 1)
    lower = (upper - 1).clamp(min=0)
    up, down = (values[upper] - v.abs()).abs(), (v.abs() - values[lower]).abs()
    chosen = torch.where((up < down) | ((up == down) & (codes[upper] % 2 == 0)), upper, lower)
    return values[chosen].copysign(v)


def fp8_reference(dtype: torch.dtype) -> Callable[..., Tensor]:
    def reference(x: Tensor, log_scale: Tensor, axis: int | None, factor: float) -> Tensor:
        scale = along(x, scaled_gradient(log_scale, factor), axis).exp()
        largest = torch.finfo(dtype).max
        clamped = (x / scale).clamp(-largest, largest)
        return scale * straight_through(clamped, nearest_fp8(clamped.detach(), dtype))

    return reference


@dataclass
class Case:
    op: Callable[..., Tensor]  # (x, *parameters, axis, grad_scale)
    reference: Callable[..., Tensor]  # the same, in float64
    overload: Any
    before: tuple[Any, ...]  # the arguments between parameters and axis
    start: tuple[float, ...]  # of each parameter
    factor: bool = True  # whether there is a grad_scale

    def arguments(self, parameters: list[Tensor], axis: int | None, factor: float) -> tuple[Any, ...]:
        return (*parameters, *self.before, axis, *([factor] if self.factor else []))


def case(name: str, reference: Callable[..., Tensor], before: tuple[Any, ...], start: tuple[float, ...]) -> Case:
    function = getattr(ops, name)
    factor = name != "pact"

    def op(x: Tensor, *rest: Any) -> Tensor:
        *parameters, axis, grad_scale = rest
        return function(x, *parameters, *before, axis, *([grad_scale] if factor else []))

    return Case(op, reference, getattr(torch.ops.cctorch, name).default, before, start, factor)


CASES = {
    "fake_quant_offset": case("fake_quant_offset", offset_reference, (-4, 3), (-1.1, 0.4)),
    "pact": case("pact", pact_reference, (3,), (0.3,)),
    "fp8 e4m3": case("fp8_quant", fp8_reference(torch.float8_e4m3fn), (torch.float8_e4m3fn,), (-5.5,)),
    "fp8 e5m2": case("fp8_quant", fp8_reference(torch.float8_e5m2), (torch.float8_e5m2,), (-10.5,)),
}
every_case = pytest.mark.parametrize("c", CASES.values(), ids=CASES.keys())


def inputs(
    c: Case, shape: tuple[int, ...], axis: int | None, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    count = 1 if axis is None else shape[axis]
    parameters = [s + torch.randn(count, generator=generator, dtype=torch.float64) / 4 for s in c.start]
    return x.to(dtype), [p.to(scale_type(dtype)) for p in parameters], grad.to(dtype)


def gradients(function: Any, x: Tensor, parameters: list[Tensor], grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (x, *parameters)]
    y = function(*leaves, *rest)
    return (y.detach(), *torch.autograd.grad(y, leaves, grad))


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


@every_case
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("grad_scale", [1.0, 0.125])
def test_float64_equals_the_straight_through_expression(
    c: Case, shape: tuple[int, ...], axis: int | None, grad_scale: float
) -> None:
    x, parameters, grad = inputs(c, shape, axis, torch.float64)
    ours = gradients(c.op, x, parameters, grad, axis, grad_scale)
    theirs = gradients(c.reference, x, parameters, grad, axis, grad_scale)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-11)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES])
@pytest.mark.parametrize(("shape", "axis"), [((5, 7, 3, 3), 1), ((3, 4000), 0), ((700, 33), 1), ((300,), None)])
def test_lower_precision_agrees_with_float64(
    c: Case, dtype: torch.dtype, shape: tuple[int, ...], axis: int | None
) -> None:
    x, parameters, grad = inputs(c, shape, axis, dtype)
    parameters = [p.double() for p in parameters]

    # Kept away from the jumps of rounding and clamping, which float32 may see on the other side.
    def steady(x: Tensor) -> Tensor:
        around = [c.reference(x.double() + d, *parameters, axis, 1.0) for d in (-1e-5, 1e-5)]
        inside = [
            gradients(c.reference, x.double() + d, parameters, grad.double(), axis, 1.0)[1] for d in (-1e-5, 1e-5)
        ]
        return (around[0] == around[1]) & (inside[0] == inside[1])

    x = torch.where(steady(x), x, torch.full_like(x, 0.3))
    assert steady(x).all()
    ours = gradients(c.op, x, [p.to(torch.float32) for p in parameters], grad, axis, 1.0)
    exact = gradients(c.reference, x.double(), parameters, grad.double(), axis, 1.0)
    torch.testing.assert_close(ours[0], exact[0].to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(ours[1], exact[1].to(dtype))
    # Sums in float32 or better of up to numel terms
    magnitude = (grad.double().abs() * (x.double().abs() + 4)).sum()
    for a, b in zip(ours[2:], exact[2:], strict=True):
        assert a.dtype == torch.float32
        assert (a.double() - b).abs().max() <= 1e-6 * magnitude


@every_case
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", [None, 0, 1, 2, 3, -1])
@pytest.mark.parametrize("dtype", TYPES)
def test_layouts(c: Case, layout: str, axis: int | None, dtype: torch.dtype) -> None:
    x, parameters, grad = inputs(c, (6, 5, 4, 70), axis, dtype)
    x = LAYOUTS[layout](x)
    results = gradients(c.op, x, parameters, grad, axis, 1.0)
    expected = gradients(c.op, x.contiguous(), parameters, grad, axis, 1.0)
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[1], expected[1])
    for a, b in zip(results[2:], expected[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    assert results[0].stride() == torch.empty_like(x).stride()


@every_case
def test_empty_and_non_finite(c: Case) -> None:
    parameters = [torch.full((3,), s) for s in c.start]
    y, grad_x, *rest = gradients(c.op, torch.empty(0, 3), parameters, torch.empty(0, 3), 1, 1.0)
    assert y.shape == grad_x.shape == (0, 3)
    assert all(torch.equal(g, torch.zeros(3)) for g in rest)
    x = torch.tensor([torch.nan, torch.inf, -torch.inf])
    y = c.op(x, *[p[:1] for p in parameters], None, 1.0)
    assert y[0].isnan()
    assert torch.equal(y[1:], c.op(torch.tensor([1e30, -1e30]), *[p[:1] for p in parameters], None, 1.0))
    for extreme in (-1e4, -200.0, 200.0, 1e4):
        x, grad = torch.tensor([1.0, -1.0, 0.0]), torch.full((3,), 1e3)
        first = [torch.tensor([extreme]), *[p[:1] for p in parameters[1:]]]
        assert all(t.isfinite().all() for t in gradients(c.op, x, first, grad, None, 1.0))


@every_case
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_results_do_not_depend_on_threads(c: Case, axis: int | None) -> None:
    for shape in ((3, 60000), (30000, 3), (64, 9, 130)):
        arguments = (*inputs(c, shape, axis, torch.float32), axis, 1.0)
        one, two = (with_threads(n, lambda: gradients(c.op, *arguments)) for n in (1, 2))  # noqa: B023
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@every_case
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("axis", [None, 1])
def test_opcheck(c: Case, dtype: torch.dtype, axis: int | None) -> None:
    x, parameters, grad = inputs(c, (4, 3, 5, 5), axis, dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
    torch.library.opcheck(c.overload, (leaves[0], *c.arguments(leaves[1:], axis, 0.5)))
    backward = getattr(torch.ops.cctorch, c.overload._schema.name.split("::")[1] + "_backward").default
    torch.library.opcheck(backward, (grad, x, *c.arguments(parameters, axis, 0.5)))


@every_case
def test_compile_and_export(c: Case) -> None:
    compiled = torch.compile(c.op, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (4, 6):
        arguments = (*inputs(c, (batch, 3, 5), 1, torch.float32), 1, 0.5)
        for ours, theirs in zip(gradients(compiled, *arguments), gradients(c.op, *arguments), strict=True):
            assert torch.equal(ours, theirs)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, *parameters: Tensor) -> Tensor:
            return c.op(x, *parameters, 1, 1.0)

    x, parameters, _ = inputs(c, (4, 3, 5), 1, torch.float32)
    batch = ({0: torch.export.Dim("batch")}, tuple(None for _ in parameters))
    program = torch.export.export(Module(), (x, *parameters), dynamic_shapes=batch)
    x = torch.cat([x, x])
    assert torch.equal(program.module()(x, *parameters), c.op(x, *parameters, 1, 1.0))


@every_case
def test_compiled_autograd(c: Case) -> None:
    x, parameters, grad = inputs(c, (4, 3, 5), 1, torch.float32)
    expected = gradients(c.op, x, parameters, grad, 1, 0.5)
    with torch._dynamo.compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
        results = gradients(c.op, x, parameters, grad, 1, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@every_case
def test_second_derivative_is_refused(c: Case) -> None:
    x, parameters, _ = inputs(c, (4,), None, torch.float32)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(c.op(x, *parameters, None, 1.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative for cctorch::\w+_backward"):
        grad.sum().backward()


ONE, TWO = torch.zeros(1), torch.zeros(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.fake_quant_offset(torch.ones(3), ONE, TWO, 0, 3), "offset must have one element where axis is"),
        (lambda: ops.fake_quant_offset(torch.ones(2, 3), TWO, ONE, 0, 3, 0), "offset must have one element for each"),
        (lambda: ops.fake_quant_offset(torch.ones(3), ONE, ONE.double(), 0, 3), "offset must be Float for Float x"),
        (lambda: ops.fake_quant_offset(torch.ones(3), ONE, ONE, 3, 3), "fake_quant_offset: expected qmin < qmax"),
        (lambda: ops.fake_quant_offset(torch.ones(3), TWO, ONE, 0, 3), "log_scale must have one element where"),
        (lambda: ops.pact(torch.ones(3), ONE, 0), r"pact: bits must be in \[1, 16\], got 0"),
        (lambda: ops.pact(torch.ones(3), TWO, 4), "log_alpha must have one element where axis is not given"),
        (lambda: ops.pact(torch.ones(3).long(), ONE, 4), "pact: x must be float32"),
        (lambda: ops.fp8_quant(torch.ones(3), ONE, torch.float16), "dtype must be float8_e4m3fn or float8_e5m2"),
        (lambda: ops.fp8_quant(torch.ones(3), ONE, axis=1), r"fp8_quant: axis must be in \[-1, 0\].*got 1"),
        (lambda: ops.fp8_quant(torch.ones(2, device="meta"), ONE), "x is on meta but log_scale is on cpu"),
    ],
)
def test_bad_arguments(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
