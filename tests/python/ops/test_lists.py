"""The forms of operators that take a list of tensors, a model's weights, at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import LAYOUTS, TYPES, along, scale_type, scaled_gradient, straight_through, with_threads
from cctorch import ops
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

Shapes = Sequence[tuple[int, ...]]

# Some of one size and some of many, rows of all lengths, more elements than a thread takes at once, none at all.
SHAPES: Shapes = [(4, 3), (2, 5, 3, 3), (1, 1, 1, 1), (3, 0), (0, 2), (2, 700), (6, 2, 7, 5), (40, 3, 300), (4, 3)]


def rounded(v: Tensor) -> Tensor:
    clamped = v.clamp(-4, 3)
    return straight_through(clamped, clamped.round())


def lsq(x: Tensor, log_scale: Tensor, axis: int | None, factor: float) -> Tensor:
    scale = along(x, scaled_gradient(log_scale, factor), axis).exp()
    return scale * rounded(x / scale)


def lsq_offset(x: Tensor, log_scale: Tensor, offset: Tensor, axis: int | None, factor: float) -> Tensor:
    scale, zero = (
        along(x, scaled_gradient(log_scale, factor), axis).exp(),
        along(x, scaled_gradient(offset, factor), axis),
    )
    return scale * rounded((x - zero) / scale) + zero


def nearest_float(v: Tensor) -> Tensor:
    """By search among all numbers of float8_e4m3fn, in float64: a conversion by way of float32 rounds twice."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    upper = torch.searchsorted(values, v.abs().contiguous()).clamp(max=126)
    lower = (upper - 1).clamp(min=0)
    return values[torch.where(values[upper] - v.abs() < v.abs() - values[lower], upper, lower)].copysign(v)


def eight_bit_floats(x: Tensor, log_scale: Tensor, axis: int | None, factor: float) -> Tensor:
    scale = along(x, scaled_gradient(log_scale, factor), axis).exp()
    clamped = (x / scale).clamp(-448, 448)
    return scale * straight_through(clamped, nearest_float(clamped.detach()))


def soft(x: Tensor, threshold: Tensor, axis: int | None, factor: float) -> Tensor:
    return x.sign() * (x.abs() - along(x, threshold, axis)).relu()


@dataclass(frozen=True)
class Learned:
    """An operator whose grids are parameters: `call(xs, *lists of parameters, axis, factors)`, for one tensor too."""

    call: Callable[..., Any]
    reference: Callable[..., Tensor]
    parameters: int = 1
    has_factor: bool = True


LEARNED = {
    "fake_quant": Learned(lambda x, s, axis, f: ops.fake_quant(x, s, -4, 3, axis, f), lsq),
    "fake_quant_offset": Learned(
        lambda x, s, o, axis, f: ops.fake_quant_offset(x, s, o, -4, 3, axis, f), lsq_offset, parameters=2
    ),
    "fp8_quant": Learned(lambda x, s, axis, f: ops.fp8_quant(x, s, torch.float8_e4m3fn, axis, f), eight_bit_floats),
    "soft_threshold": Learned(lambda x, t, axis, f: ops.soft_threshold(x, t, axis), soft, has_factor=False),
}


@dataclass
class Lists:
    xs: list[Tensor]
    parameters: list[list[Tensor]]
    grads: list[Tensor]
    factors: list[float]

    @property
    def all(self) -> list[Tensor]:
        return [*self.xs, *(t for each in self.parameters for t in each)]


def lists(name: str, shapes: Shapes, axis: int | None, dtype: torch.dtype) -> Lists:
    generator = torch.Generator().manual_seed(len(shapes))

    def normal(shape: Sequence[int], kind: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(kind)

    xs = [normal(shape, dtype) for shape in shapes]
    count = [1 if axis is None else x.shape[axis] for x in xs]
    kind = scale_type(dtype)
    if name == "soft_threshold":
        parameters = [[normal([n], kind).abs() for n in count]]
    elif name == "fp8_quant":
        parameters = [[(normal([n], torch.float64) - 6).to(kind) for n in count]]
    else:
        parameters = [[(0.3 * normal([n], torch.float64) - 1).to(kind) for n in count]]
    if name == "fake_quant_offset":
        parameters.append([normal([n], kind) for n in count])
    return Lists(xs, parameters, [normal(x.shape, dtype) for x in xs], [0.5 + i / 4 for i in range(len(xs))])


def results(op: Learned, given: Lists, axis: int | None) -> tuple[list[Tensor], list[Tensor]]:
    """The list form's outputs and all its gradients."""
    xs = [x.detach().requires_grad_() for x in given.xs]
    parameters = [[p.detach().requires_grad_() for p in each] for each in given.parameters]
    ys = op.call(xs, *parameters, axis, given.factors)
    assert isinstance(ys, list)
    leaves = [*xs, *(p for each in parameters for p in each)]
    return ys, list(torch.autograd.grad(ys, leaves, given.grads))


def one_by_one(
    function: Callable[..., Tensor], given: Lists, axis: int | None, kind: torch.dtype | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The same of `function`, of one tensor after the other."""
    ys, grads = [], []
    for x, parameters, grad, factor in zip(
        given.xs, zip(*given.parameters, strict=True), given.grads, given.factors, strict=True
    ):
        leaves = [t.detach().to(kind or t.dtype).requires_grad_() for t in (x, *parameters)]
        ys.append(function(*leaves, axis, factor))
        grads.append(torch.autograd.grad(ys[-1], leaves, grad.to(kind or grad.dtype)))
    return ys, [t for each in zip(*grads, strict=True) for t in each]


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_learned_agrees_with_float64(name: str, axis: int | None) -> None:
    op, data = LEARNED[name], lists(name, SHAPES, axis, torch.float64)
    ours, theirs = results(op, data, axis), one_by_one(op.reference, data, axis)
    for mine, wanted in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("axis", [None, 0, -1])
@pytest.mark.parametrize("dtype", TYPES)
def test_learned_is_the_operator_on_each(name: str, axis: int | None, dtype: torch.dtype) -> None:
    """Which the tests of that operator compare with float64, in all types."""
    op, data = LEARNED[name], lists(name, SHAPES, axis, dtype)
    ours, theirs = results(op, data, axis), one_by_one(op.call, data, axis)
    for mine, wanted in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        assert mine.dtype == wanted.dtype
        assert mine.shape == wanted.shape
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("axis", [None, 0, 1, 3])
def test_learned_takes_every_layout(name: str, axis: int | None) -> None:
    op, data = LEARNED[name], lists(name, [(6, 5, 4, 70)] * len(LAYOUTS), axis, torch.float64)
    data.xs = [transform(x) for transform, x in zip(LAYOUTS.values(), data.xs, strict=True)]
    data.grads = [transform(x) for transform, x in zip(reversed(LAYOUTS.values()), data.grads, strict=True)]
    ours, theirs = results(op, data, axis), one_by_one(op.reference, data, axis)
    for mine, wanted in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-11, atol=1e-11)
    assert [y.stride() for y in ours[0]] == [torch.empty_like(x).stride() for x in data.xs]


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(sorted(LEARNED)),
    shapes=st.lists(st.lists(st.integers(0, 70), min_size=2, max_size=3).map(tuple), min_size=1, max_size=6),
    axis=st.sampled_from([None, 0, 1, -1]),
)
def test_learned_of_any_shapes(name: str, shapes: Shapes, axis: int | None) -> None:
    op, data = LEARNED[name], lists(name, shapes, axis, torch.float64)
    ours, theirs = results(op, data, axis), one_by_one(op.reference, data, axis)
    for mine, wanted in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", LEARNED)
def test_one_factor_serves_all(name: str) -> None:
    op, data = LEARNED[name], lists(name, SHAPES, 0, torch.float64)
    parameters = [[p.requires_grad_() for p in each] for each in data.parameters]
    each = torch.autograd.grad(op.call(data.xs, *parameters, 0, [0.5] * len(SHAPES)), parameters[0], data.grads)
    same = torch.autograd.grad(op.call(data.xs, *parameters, 0, 0.5), parameters[0], data.grads)
    assert all(torch.equal(a, b) for a, b in zip(each, same, strict=True))


def test_factors_are_one_by_default() -> None:
    x, log_scale = torch.tensor([0.3, 0.9]), torch.zeros(1, requires_grad=True)
    (y,) = torch.ops.cctorch.fake_quant.list([x], [log_scale], -4, 3)
    assert torch.autograd.grad(y.sum(), log_scale)[0].item() == pytest.approx((0 - 0.3) + (1 - 0.9))


@pytest.mark.parametrize("name", LEARNED)
def test_learned_gives_nothing_to_what_is_not_used(name: str) -> None:
    op, data = LEARNED[name], lists(name, [(4, 3), (2, 5), (3, 3, 3, 3)], 0, torch.float64)
    for tensor in data.all:
        tensor.requires_grad_()
    data.xs[2].requires_grad_(False)
    ys = op.call(data.xs, *data.parameters, 0, data.factors)
    torch.autograd.backward([ys[0], ys[2]], [data.grads[0], data.grads[2]])
    expected = one_by_one(op.reference, data, 0)[1]
    for i, tensor in enumerate(data.all):
        if i % 3 == 1 or i == 2:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, expected[i], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", LEARNED)
def test_learned_does_not_depend_on_threads(name: str) -> None:
    op, data = LEARNED[name], lists(name, [(64, 900), (30000, 3), (3, 3), (64, 9, 130)], 1, torch.float32)
    one, two = (with_threads(n, lambda: results(op, data, 1)) for n in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one[0] + one[1], two[0] + two[1], strict=True))


def test_soft_threshold_passes_gradcheck_away_from_the_corners() -> None:
    xs = [torch.randn(4, 3, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)]
    thresholds = [torch.rand(len(x), dtype=torch.float64) + 0.1 for x in xs]
    gaps = [x.abs() - t.view(-1, 1) for x, t in zip(xs, thresholds, strict=True)]
    xs = [torch.where(gap.abs() < 1e-3, 2 * x, x) for x, gap in zip(xs, gaps, strict=True)]
    leaves = [t.requires_grad_() for t in (*xs, *thresholds)]
    assert torch.autograd.gradcheck(lambda *t: tuple(ops.soft_threshold(t[:2], t[2:], 0)), leaves)


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("dtype", TYPES)
def test_learned_passes_opcheck(name: str, dtype: torch.dtype) -> None:
    data = lists(name, [(4, 3), (2, 5, 3, 3)], 1, dtype)
    data.xs[1] = data.xs[1].contiguous(memory_format=torch.channels_last)
    middle: tuple[Any, ...] = {"fp8_quant": (torch.float8_e4m3fn,), "soft_threshold": ()}.get(name, (-4, 3))
    last = (data.factors,) if LEARNED[name].has_factor else ()
    backward = getattr(torch.ops.cctorch, f"{name}_backward").list
    torch.library.opcheck(backward, (data.grads, data.xs, *data.parameters, *middle, 1, *last))
    for tensor in data.all:
        tensor.requires_grad_()
    torch.library.opcheck(getattr(torch.ops.cctorch, name).list, (data.xs, *data.parameters, *middle, 1, *last))


# Grids that are computed from the weights.
COMPUTED: dict[str, Callable[..., Any]] = {
    "power_of_two_quant": lambda x, axis: ops.power_of_two_quant(x, 4, axis),
    "binary_quant": ops.binary_quant,
    "ternary_quant": ops.ternary_quant,
    "binary_code_quant": lambda x, axis: ops.binary_code_quant(x, 3, axis=axis),
    "binary_code_quant, greedy": lambda x, axis: ops.binary_code_quant(x, 2, "greedy", axis),
}


def powers(row: Tensor) -> Tensor:
    """The nearest of 7 powers of two and 0; ties aside."""
    top = 2 ** torch.floor(torch.log2(row.abs().max() * 4 / 3))
    levels = torch.cat([torch.zeros(1), top * 0.5 ** torch.arange(7.0)]).to(row.dtype)
    return levels[(row.abs().unsqueeze(-1) - levels).abs().argmin(-1)].copysign(row)


def scaled_signs(row: Tensor) -> Tensor:
    return torch.where(row < 0, -row.abs().mean(), row.abs().mean())


def best_ternary(row: Tensor) -> Tensor:
    """Of all numbers of values that are not 0 the one of the smallest error."""
    order = row.abs().argsort(descending=True)
    best = torch.zeros_like(row)
    for k in range(1, len(row) + 1):
        candidate = torch.zeros_like(row)
        candidate[order[:k]] = row[order[:k]].abs().mean() * row[order[:k]].sign()
        if (row - candidate).square().sum() < (row - best).square().sum():
            best = candidate
    return best


@pytest.mark.parametrize(
    ("name", "of_row"),
    [("power_of_two_quant", powers), ("binary_quant", scaled_signs), ("ternary_quant", best_ternary)],
)
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_computed_agrees_with_a_search_row_by_row(
    name: str, of_row: Callable[[Tensor], Tensor], axis: int | None
) -> None:
    # Several tensors have rows of the same length, of one axis or another.
    xs = [torch.randn(shape, dtype=torch.float64) for shape in [(4, 6), (6, 4), (2, 3, 2), (5, 6), (1, 1), (2, 1, 4)]]
    for x, y in zip(xs, COMPUTED[name](xs, axis), strict=True):
        rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)
        expected = torch.stack([of_row(row) for row in rows])
        expected = expected.view(x.shape) if axis is None else expected.view(x.movedim(axis, 0).shape).movedim(0, axis)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("dtype", TYPES)
def test_computed_is_the_operator_on_each(name: str, axis: int | None, dtype: torch.dtype) -> None:
    xs = [transform(torch.randn(6, 5, 4, 7).to(dtype)) for transform in LAYOUTS.values()]
    xs += [torch.randn(shape).to(dtype) for shape in [(6, 5), (1, 1), (3, 0), (0, 3), (2, 140), (140, 2)]]
    ys = COMPUTED[name](xs, axis)
    assert isinstance(ys, list)
    step = torch.finfo(dtype).eps
    for x, y in zip(xs, ys, strict=True):
        # Sums of a row, in float64, may be added up in another order; the result rounds to the type of x once.
        error = x.numel() * torch.finfo(torch.float64).eps * (x.abs().max().item() if x.numel() else 0.0)
        torch.testing.assert_close(y, COMPUTED[name](x, axis), rtol=step, atol=error)
        assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("name", COMPUTED)
def test_gradients_of_computed_grids(name: str) -> None:
    xs = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in [(4, 3), (2, 5), (2, 6)]]
    grads = [torch.randn_like(x) for x in xs]
    ys = COMPUTED[name](xs, 0)
    torch.autograd.backward([ys[0], ys[2]], [grads[0], grads[2]])
    assert xs[1].grad is None
    for i in (0, 2):
        inside = xs[i].abs() <= 1 if name == "binary_quant" else torch.ones_like(xs[i], dtype=torch.bool)
        assert torch.equal(xs[i].grad, torch.where(inside, grads[i], 0.0))


@pytest.mark.parametrize("dtype", TYPES)
def test_computed_passes_opcheck(dtype: torch.dtype) -> None:
    xs = [torch.randn(4, 3), torch.randn(2, 5, 3, 3).contiguous(memory_format=torch.channels_last), torch.randn(3, 3)]
    xs = [x.to(dtype).requires_grad_() for x in xs]
    overloads = torch.ops.cctorch
    torch.library.opcheck(overloads.power_of_two_quant.list, (xs, 4, 1))
    torch.library.opcheck(overloads.binary_quant.list, (xs, 1))
    torch.library.opcheck(overloads.ternary_quant.list, (xs, 1))
    torch.library.opcheck(overloads.binary_code_quant.list, (xs, 2, "alternating", 1))


ALL: dict[str, Callable[[list[Tensor], list[Tensor]], list[Tensor]]] = {
    **{
        name: (lambda xs, ps, op=op: op.call(xs, *[ps] * op.parameters, None, 0.5))  # type: ignore[misc]
        for name, op in LEARNED.items()
    },
    **{name: (lambda xs, ps, call=call: call(xs, None)) for name, call in COMPUTED.items()},  # type: ignore[misc]
}


@pytest.mark.parametrize("name", ALL)
def test_empty_list(name: str) -> None:
    assert ALL[name]([], []) == []


@pytest.mark.parametrize("name", ALL)
def test_compile_and_export(name: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor, p: Tensor) -> Tensor:
            first, second = ALL[name]([a, b], [p, p])
            return first.sum() + second.square().sum()

    torch._dynamo.reset()  # every name is another graph
    inputs = (torch.randn(4, 3), torch.randn(2, 5), torch.tensor([0.25]))
    expected = Module()(*inputs)
    program = torch.export.export(Module(), inputs)
    assert torch.equal(program.module()(*inputs), expected)
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    leaves, again = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
    Module()(*leaves).backward()
    compiled(*again).backward()
    for a, b in zip(leaves, again, strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)


ONE, TWO = torch.ones(1), torch.ones(2, 3)


@pytest.mark.parametrize("name", ALL)
def test_lists_of_several_types_or_devices_are_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"all x must be of one type, got Float in x\[0\] and Double in x\[1\]"):
        ALL[name]([TWO, TWO.double()], [ONE, ONE.double()])
    with pytest.raises(RuntimeError, match=r"x\[1\] is on meta but x\[0\] is on cpu"):
        ALL[name]([TWO, TWO.to("meta")], [ONE, ONE])
    with pytest.raises(RuntimeError, match=r"x\[0\] must be float32, float64, float16 or bfloat16, got Int"):
        ALL[name]([TWO.int()], [ONE])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.fake_quant([TWO], [ONE, ONE], -4, 3),
            "log_scale must have one for each of the 1 tensors of x, got 2",
        ),
        (
            lambda: ops.fake_quant([TWO], [ONE], -4, 3, None, [1.0, 2.0]),
            "grad_scale must have one for each of the 1 tens",
        ),
        (lambda: ops.fake_quant([TWO], [ONE], 3, 3), "expected qmin < qmax"),
        (lambda: ops.fake_quant([TWO, TWO], [ONE, torch.ones(2)], -4, 3), r"log_scale\[1\] must have one element"),
        (
            lambda: ops.fake_quant([TWO, TWO], [torch.ones(3), ONE], -4, 3, 1),
            r"log_scale\[1\] must have one element for",
        ),
        (lambda: ops.fake_quant([TWO, TWO[0]], [ONE, ONE], -4, 3, 1), r"1-dimensional x\[1\]|log_scale\[0\]"),
        (lambda: ops.fake_quant_offset([TWO], [ONE], [ONE, ONE], -4, 3), "offset must have one for each of the 1"),
        (lambda: ops.fp8_quant([TWO], [ONE], torch.float16), "dtype must be float8_e4m3fn or float8_e5m2"),
        (
            lambda: ops.soft_threshold([TWO], [ONE.double()]),
            r"threshold\[0\] must be Float for Float x\[0\], got Double",
        ),
        (lambda: ops.power_of_two_quant([TWO], 1), r"bits must be in \[2, 7\], got 1"),
        (
            lambda: ops.power_of_two_quant([TWO, ONE], 4, 1),
            r"axis must be in \[-1, 0\] for a 1-dimensional x\[1\], got 1",
        ),
        (lambda: ops.binary_code_quant([TWO], 9), r"bits must be in \[1, 8\], got 9"),
        (lambda: ops.binary_code_quant([TWO], 2, "best"), "method must be greedy or alternating, got best"),
        (lambda: ops.binary_quant([ONE], 1), r"axis must be in \[-1, 0\] for a 1-dimensional x\[0\], got 1"),
    ],
)
def test_bad_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
