"""The optima of ternary_quant and binary_code_quant with two bits, beside a search over the sorted row in float64."""

from collections.abc import Callable

import pytest
import torch
from cases import TYPES, with_threads
from cctorch.ops import binary_code_quant, binary_quant, ternary_quant
from torch import Tensor

QUANTIZERS: dict[str, Callable[..., Tensor]] = {
    "ternary": ternary_quant,
    "two codes": lambda x, axis=None: binary_code_quant(x, 2, axis=axis),
}
SIZES = [1, 2, 3, 63, 64, 65, 200, 1000, 5000]


def _spread(n: int) -> Tensor:
    return torch.randn(n, dtype=torch.float64) * (3 * torch.randn(n, dtype=torch.float64)).exp()


ROWS: dict[str, Callable[[int], Tensor]] = {
    "normal": lambda n: torch.randn(n, dtype=torch.float64),
    "uniform": lambda n: torch.rand(n, dtype=torch.float64) * 2 - 1,
    "over many powers of two": _spread,
    "with ties": lambda n: torch.randn(n, dtype=torch.float64).mul_(2).round_().div_(2),
    "two clusters": lambda n: torch.where(torch.rand(n) < 0.5, 3.0, 0.25).double() * (1 + 1e-3 * torch.randn(n)),
    "one large": lambda n: torch.cat([torch.randn(n - 1, dtype=torch.float64), torch.tensor([1e4]).double()]),
    "mostly zeros": lambda n: torch.randn(n, dtype=torch.float64) * (torch.rand(n) < 0.05),
    "all equal": lambda n: torch.full((n,), -0.3, dtype=torch.float64),
    "zeros": lambda n: torch.zeros(n, dtype=torch.float64),
}


def least_error(x: Tensor, name: str) -> float:
    """Of all numbers of magnitudes that may be set apart, of a row in float64."""
    ordered = x.abs().sort(descending=True).values
    counts = torch.arange(1, len(x) + 1, dtype=torch.float64)
    above = ordered.cumsum(0)
    kept = above.square() / counts
    if name == "two codes":
        below = ordered.flip(0).cumsum(0).flip(0).roll(-1)
        below[-1] = 0
        kept += below.square() / (len(x) - counts).clamp(min=1)
    return (x.square().sum() - kept.max()).item()


def check(x: Tensor, y: Tensor, name: str) -> None:
    wide, levels = x.double(), y.double()
    error = (wide - levels).square().sum().item()
    # A level that rounds to the type of x is off by half a step of it, and the means of a cluster are its optimum.
    rounding = levels.square().sum().item() * torch.finfo(x.dtype).eps ** 2
    denormal = len(x) * torch.finfo(x.dtype).smallest_normal ** 2
    assert error <= least_error(wide, name) + rounding + denormal + 1e-12 * wide.square().sum().item()
    assert len(y.abs().unique()) <= 2
    assert ((y == 0) | (y.sign() == torch.where(x < 0, -1, 1))).all()
    if name == "ternary":
        assert not torch.signbit(y[y == 0]).any()


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("of", ROWS)
@pytest.mark.parametrize("dtype", TYPES)
def test_no_other_levels_are_better(name: str, of: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for n in SIZES:
        x = torch.stack([ROWS[of](n).clamp(-6e4, 6e4).to(dtype) for _ in range(4)])
        for row, quantized in zip(x, QUANTIZERS[name](x, 0), strict=True):
            check(row, quantized, name)


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("of", ROWS)
def test_rows_that_threads_share(name: str, of: str) -> None:
    torch.manual_seed(0)
    x = ROWS[of](400000).float()
    one, two = (with_threads(n, lambda: QUANTIZERS[name](x)) for n in (1, 2))
    assert torch.equal(one, two)
    check(x, one, name)
    assert torch.equal(QUANTIZERS[name]([x], None)[0], one)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_scales_at_the_ends_of_the_type(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 500)
    for exponent in (-126, -140, 124):
        scaled = x * 2.0**exponent
        y = QUANTIZERS[name](scaled, 0)
        assert y.isfinite().all()
        for row, quantized in zip(scaled.double(), y.double(), strict=True):
            # In float64, where neither squares nor levels are denormal.
            rounding = len(row) * (2.0 ** max(exponent - 23, -149)) ** 2
            assert (row - quantized).square().sum().item() <= least_error(row, name) * (1 + 1e-9) + rounding


@pytest.mark.parametrize("name", QUANTIZERS)
def test_what_has_such_levels_stays(name: str) -> None:
    x = torch.tensor([0.0, 1.5, -1.5]).repeat(100)
    assert torch.equal(QUANTIZERS[name](x), x)
    assert torch.equal(QUANTIZERS[name](x.view(3, 100).t(), 0), x.view(3, 100).t())
    if name == "two codes":
        y = torch.tensor([0.125, 3.0, -3.0, -0.125]).repeat(50)
        assert torch.equal(binary_code_quant(y, 2), y)


@pytest.mark.parametrize("dtype", TYPES)
def test_scaled_signs_of_long_and_short_rows(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for shape in [(5, 1), (7, 300), (2, 70001), (1, 300000)]:
        x = torch.randn(shape).to(dtype)
        mean = x.double().abs().mean(1, keepdim=True)
        y = binary_quant(x, 0)
        torch.testing.assert_close(y.double(), torch.where(x < 0, -mean, mean), rtol=torch.finfo(dtype).eps, atol=0)
        assert torch.equal(y, with_threads(1, lambda: binary_quant(x, 0)))  # noqa: B023
    x = torch.tensor([[1.0, float("nan")], [-2.0, 0.0]]).to(dtype)
    assert binary_quant(x, 0)[0].isnan().all()
    assert binary_quant(x, 0)[1].tolist() == [-1, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("size", [2, 50, 3000])
@pytest.mark.parametrize("name", [*QUANTIZERS, "three codes", "greedy"])
def test_a_row_that_is_not_finite_becomes_nan_and_leaves_the_others_alone(name: str, size: int, bad: float) -> None:
    others = {
        "three codes": lambda x, axis: binary_code_quant(x, 3, axis=axis),
        "greedy": lambda x, axis: binary_code_quant(x, 2, "greedy", axis),
    }
    quantize = (QUANTIZERS | others)[name]
    torch.manual_seed(0)
    x = torch.randn(3, size)
    expected = quantize(x, 0)
    x[1, size // 2] = bad
    y = quantize(x, 0)
    assert y[1].isnan().all()
    assert torch.equal(y[::2], expected[::2])
