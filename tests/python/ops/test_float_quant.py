"""The grids of fp8_quant and power_of_two_quant; gradients and layouts of the former are in test_learned_grid."""

import math

import pytest
import torch
from cases import LAYOUTS, TYPES
from cctorch.ops import fp8_quant, power_of_two_quant
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

FORMATS = [torch.float8_e4m3fn, torch.float8_e5m2]


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """PyTorch's own conversion, of values within the format's range."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype).to(x.dtype)


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_half_precision_number_is_converted_as_by_pytorch(dtype: torch.dtype) -> None:
    for kind in (torch.float16, torch.bfloat16):
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(kind)
        x = x[~x.isnan()]
        for values in (x, x.float()):
            ours, theirs = fp8_quant(values, torch.zeros(1), dtype), saturated(values, dtype)
            assert torch.equal(ours, theirs)
            assert torch.equal(ours.signbit(), theirs.signbit())


@pytest.mark.parametrize("dtype", FORMATS)
@settings(max_examples=200, deadline=None)
@given(values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40), exponent=st.integers(-20, 20))
def test_float32_is_converted_as_by_pytorch(dtype: torch.dtype, values: list[float], exponent: int) -> None:
    x = torch.tensor(values)
    assert torch.equal(fp8_quant(x, torch.zeros(1), dtype), saturated(x, dtype))
    # Numbers around a tie between neighbours of the format.
    codes = torch.arange(126, dtype=torch.uint8)
    numbers = codes.view(dtype).float()
    numbers = numbers[numbers.isfinite()]
    ties = (numbers[1:] + numbers[:-1]) / 2
    for x in (ties, ties.nextafter(torch.tensor(math.inf)), ties.nextafter(torch.tensor(0.0)), -ties):
        assert torch.equal(fp8_quant(x, torch.zeros(1), dtype), saturated(x, dtype))
    scale = torch.tensor([2.0**exponent])
    quantized = fp8_quant(torch.tensor(values), scale.log(), dtype)
    torch.testing.assert_close(
        quantized[quantized.isfinite()],
        (saturated(torch.tensor(values) / scale.log().exp(), dtype) * scale.log().exp())[quantized.isfinite()],
        rtol=1e-6,
        atol=0.0,
    )


def powers(x: Tensor, bits: int) -> Tensor:
    """By search among all levels, in float64."""
    x = x.double()
    top = math.floor(math.log2(4 / 3 * x.abs().max().item())) if x.any() else 0
    levels = torch.tensor([0.0] + [2.0 ** (top - i) for i in reversed(range(2 ** (bits - 1) - 1))], dtype=torch.float64)
    distance = (x.abs().unsqueeze(-1) - levels).abs()
    # Of two as near the larger, but 0 rather than the smallest power.
    last = distance.shape[-1] - 1 - distance.flip(-1).argmin(-1)
    tie_with_zero = (last == 1) & (distance[..., 0] == distance[..., 1])
    return levels[torch.where(tie_with_zero, 0, last)].copysign(x)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("dtype", TYPES)
def test_powers_of_two_are_the_nearest(bits: int, axis: int | None, dtype: torch.dtype) -> None:
    x = (torch.randn(6, 5, 70, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    slices = [x] if axis is None else list(x.unbind(axis))
    expected = [powers(part, bits) for part in slices]
    y = power_of_two_quant(x, bits, axis)
    assert torch.equal(y.double(), expected[0] if axis is None else torch.stack(expected, axis))
    for transform in LAYOUTS.values():
        other = transform(x.unsqueeze(-1))
        assert torch.equal(
            power_of_two_quant(other, bits, axis if axis != -1 else 2),
            power_of_two_quant(other.contiguous(), bits, axis if axis != -1 else 2),
        )
        assert power_of_two_quant(other, bits).stride() == torch.empty_like(other).stride()


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.integers(-64, 64), min_size=1, max_size=20),
    exponent=st.integers(-60, 60),
    bits=st.integers(2, 7),
)
def test_powers_of_two_with_ties(values: list[int], exponent: int, bits: int) -> None:
    x = torch.tensor(values).float() * 2.0**exponent
    assert torch.equal(power_of_two_quant(x, bits).double(), powers(x, bits))


def test_extremes_of_powers_of_two() -> None:
    largest = torch.finfo(torch.float32).max
    assert power_of_two_quant(torch.tensor([largest, 1e-45]), 4).tolist() == [2.0**127, 0]
    assert torch.equal(power_of_two_quant(torch.zeros(3), 4), torch.zeros(3))
    y = power_of_two_quant(torch.tensor([math.nan, math.inf, -math.inf, 0.3]), 4)
    assert y[0].isnan()
    assert y[1:].tolist() == [1, -1, 0.25]
    assert power_of_two_quant(torch.empty(0, 3), 4, 1).shape == (0, 3)
    assert power_of_two_quant(torch.tensor(-0.7), 4).item() == -0.5


def test_power_of_two_passes_the_gradient_on() -> None:
    x = torch.randn(4, 5, requires_grad=True)
    grad = torch.randn(4, 5)
    assert torch.equal(torch.autograd.grad(power_of_two_quant(x, 3, 0), x, grad)[0], grad)
    for dtype in TYPES:
        arguments = (torch.randn(4, 3, 5, 5).to(dtype).contiguous(memory_format=torch.channels_last), 4, 1)
        torch.library.opcheck(torch.ops.cctorch.power_of_two_quant.default, (arguments[0].requires_grad_(), 4, 1))
    compiled = torch.compile(power_of_two_quant, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(x, 3, 0), power_of_two_quant(x, 3, 0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3), 1), r"bits must be in \[2, 7\], got 1"),
        ((torch.ones(3), 8), r"bits must be in \[2, 7\], got 8"),
        ((torch.ones(3), 4, 1), r"axis must be in \[-1, 0\].*got 1"),
        ((torch.ones(3).int(), 4), "x must be float32, float64, float16 or bfloat16"),
    ],
)
def test_bad_arguments(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        power_of_two_quant(*arguments)  # type: ignore[arg-type]
