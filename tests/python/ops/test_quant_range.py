from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import LAYOUTS, TYPES, scale_type, with_threads
from cctorch.ops import fake_quant, fake_quant_offset, observe_range_, quant_range, quant_range_offset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

GRIDS = [(-8, 7), (0, 15), (-2, 1), (-7, 0), (3, 9)]


def slices(x: Tensor, axis: int | None) -> list[Tensor]:
    return [x] if axis is None else list(x.unbind(axis))


def smallest_scale(x: Tensor, qmin: int, qmax: int) -> float:
    high, low = max(x.max().item(), 0.0), min(x.min().item(), 0.0)
    scale = max(high / qmax if qmax > 0 else 0.0, low / qmin if qmin < 0 else 0.0)
    return scale if scale > 0 else 1.0


def lsq(x: Tensor, scale: float, offset: float, qmin: int, qmax: int) -> Tensor:
    return scale * ((x.double() - offset) / scale).clamp(qmin, qmax).round() + offset


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize(("qmin", "qmax"), GRIDS)
@pytest.mark.parametrize("dtype", TYPES)
def test_minmax(axis: int | None, qmin: int, qmax: int, dtype: torch.dtype) -> None:
    x = (torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)) + 0.3).to(dtype)
    parts = [part.double() for part in slices(x, axis)]
    log_scale = quant_range(x, qmin, qmax, axis)
    assert log_scale.dtype == scale_type(dtype)
    expected = torch.tensor([smallest_scale(part, qmin, qmax) for part in parts], dtype=torch.float64)
    torch.testing.assert_close(log_scale.double().exp(), expected, rtol=1e-6, atol=0.0)
    log_scale, offset = quant_range_offset(x, qmin, qmax, axis)
    for part, s, o in zip(parts, log_scale.double().exp(), offset.double(), strict=True):
        torch.testing.assert_close(o + s * qmin, part.min(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(o + s * qmax, part.max(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", [None, 0, 2])
@pytest.mark.parametrize(("qmin", "qmax"), GRIDS[:3])
def test_mse_is_the_best_of_the_stated_scales(axis: int | None, qmin: int, qmax: int) -> None:
    x = torch.randn(3, 40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 3
    found = quant_range(x, qmin, qmax, axis, "mse").exp()
    for part, scale in zip(slices(x, axis), found, strict=True):
        whole = smallest_scale(part, qmin, qmax)
        candidates = [whole * (1 - k / 100) for k in range(100)]
        errors = [(lsq(part, s, 0.0, qmin, qmax) - part).square().sum().item() for s in candidates]
        assert scale.item() == pytest.approx(candidates[errors.index(min(errors))], rel=1e-9)
        # What is clipped costs more than finer steps gain where negative values lie off the grid or steps are fine.
        assert min(errors) < errors[0] or (qmin, qmax) != (-2, 1)


@pytest.mark.parametrize("axis", [None, 0])
def test_mse_with_offset_is_the_search_that_is_stated(axis: int | None) -> None:
    x = torch.randn(3, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).exp()
    log_scale, offset = quant_range_offset(x, 0, 7, axis, "mse")

    def best(part: Tensor, ends: list[tuple[float, float]]) -> tuple[float, float]:
        errors = []
        for low, high in ends:
            errors.append((lsq(part, (high - low) / 7, low, 0, 7) - part).square().sum().item())
        return ends[errors.index(min(errors))]

    for part, s, o in zip(slices(x, axis), log_scale.exp(), offset, strict=True):
        low, high = part.min().item(), part.max().item()
        low, high = best(part, [(low, high - (high - low) * k / 100) for k in range(100)])
        low, high = best(part, [(low + (high - low) * k / 100, high) for k in range(100)])
        assert o.item() == pytest.approx(low, rel=1e-9)
        assert s.item() == pytest.approx((high - low) / 7, rel=1e-9)
        plain = quant_range_offset(part, 0, 7)
        ours, theirs = (fake_quant_offset(part, *p, 0, 7) for p in ((s.log().view(1), o.view(1)), plain))
        assert (ours - part).square().sum() < (theirs - part).square().sum()


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=12),
    method=st.sampled_from(["minmax", "mse"]),
    grid=st.sampled_from(GRIDS),
)
def test_every_scale_is_finite_and_positive(values: list[float], method: str, grid: tuple[int, int]) -> None:
    x = torch.tensor(values)
    log_scale = quant_range(x, *grid, method=method)
    assert log_scale.isfinite().all()
    scale = fake_quant(torch.tensor([torch.inf]), log_scale, 0, 1)
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert quant_range_offset(x, *grid, method=method)[0].isfinite().all()


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_zeros_constants_and_nothing(method: str) -> None:
    assert torch.equal(quant_range(torch.zeros(2, 3), -8, 7, 0, method), torch.zeros(2))
    assert torch.equal(quant_range(torch.empty(3, 0), -8, 7, 0, method), torch.zeros(3))
    assert torch.equal(quant_range_offset(torch.empty(3, 0), -8, 7, 0, method)[1], torch.zeros(3))
    for grid in GRIDS:
        x = torch.tensor([[0.3, 0.3], [-7.1, -7.1]])
        y = fake_quant_offset(x, *quant_range_offset(x, *grid, 0, method), *grid, 0)
        torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_layouts_and_threads(layout: str, method: str) -> None:
    x = LAYOUTS[layout](torch.randn(6, 5, 4, 300, generator=torch.Generator().manual_seed(0)))
    for axis in (None, 0, 1):
        one, two = (with_threads(n, lambda: quant_range(x, -8, 7, axis, method)) for n in (1, 2))  # noqa: B023
        assert torch.equal(one, two)
        assert torch.equal(one, quant_range(x.contiguous(), -8, 7, axis, method))


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("dtype", TYPES)
def test_moving_averages(axis: int | None, dtype: torch.dtype) -> None:
    count = 1 if axis is None else 3
    low, high = (torch.full((count,), v, dtype=scale_type(dtype)) for v in (torch.inf, -torch.inf))
    lows, highs = [], []
    for seed in range(4):
        x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()
        observe_range_(low, high, x, 0.25, axis)
        parts = [part.detach().double() for part in slices(x, axis)]
        for history, value in (
            (lows, torch.stack([p.min() for p in parts])),
            (highs, torch.stack([p.max() for p in parts])),
        ):
            history.append(value if not history else history[-1] + 0.25 * (value - history[-1]))
    assert not low.requires_grad
    torch.testing.assert_close(low.double(), lows[-1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(high.double(), highs[-1], rtol=1e-6, atol=1e-6)
    before = low.clone()
    observe_range_(low, high, torch.empty(0, 3, dtype=dtype), 0.25, axis)
    assert torch.equal(low, before)
    log_scale = quant_range(torch.stack([low, high]), -8, 7, axis=1)
    expected = torch.maximum(highs[-1].clamp(min=0) / 7, lows[-1] / -8)
    torch.testing.assert_close(log_scale.double().exp(), expected, rtol=1e-6, atol=0.0)


def test_a_quantized_tensor_uses_its_whole_range() -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    y = fake_quant(x, quant_range(x, -8, 7), -8, 7)
    assert (y - x).abs().max() <= quant_range(x, -8, 7).exp().item() / 2 * 1.0001


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("axis", [None, 1])
def test_opcheck(dtype: torch.dtype, axis: int | None) -> None:
    x = torch.randn(4, 3, 5, 5).to(dtype).contiguous(memory_format=torch.channels_last)
    for method in ("minmax", "mse"):
        torch.library.opcheck(torch.ops.cctorch.quant_range.default, (x, -8, 7, axis, method))
        torch.library.opcheck(torch.ops.cctorch.quant_range_offset.default, (x, -8, 7, axis, method))
    low, high = (torch.zeros(1 if axis is None else 3, dtype=scale_type(dtype)) for _ in range(2))
    torch.library.opcheck(torch.ops.cctorch.observe_range_.default, (low, high, x, 0.1, axis))


def test_compile_and_export() -> None:
    def ranges(x: Tensor) -> tuple[Tensor, ...]:
        return quant_range(x, -8, 7, 1), *quant_range_offset(x, 0, 15, 0, "mse")

    def observing(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        observe_range_(low, high, x)
        return fake_quant(x, quant_range(torch.stack([low, high]), -8, 7, 1), -8, 7)

    x = torch.randn(4, 3, 5)
    compiled = torch.compile(ranges, fullgraph=True, backend="aot_eager", dynamic=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(x), ranges(x), strict=True))
    states = [[torch.full((1,), v) for v in (torch.inf, -torch.inf)] for _ in range(2)]
    compiled = torch.compile(observing, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, *states[0]), observing(x, *states[1]))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return ranges(x)

    program = torch.export.export(Module(), (x,))
    assert all(torch.equal(a, b) for a, b in zip(program.module()(x), ranges(x), strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quant_range(torch.ones(3).int(), -8, 7), "quant_range: x must be float32"),
        (lambda: quant_range(torch.ones(3), 7, 7), "quant_range: expected qmin < qmax"),
        (lambda: quant_range(torch.ones(3), -8, 7, 1), r"axis must be in \[-1, 0\].*got 1"),
        (lambda: quant_range_offset(torch.ones(3), 0, 7, method="best"), "method must be minmax or mse, got best"),
        (lambda: observe_range_(torch.ones(1), torch.ones(2), torch.ones(3)), "high must have one element where"),
        (lambda: observe_range_(torch.ones(1), torch.ones(1), torch.ones(3), 1.5), r"momentum must be in \[0, 1\]"),
    ],
)
def test_bad_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
