import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from cases import LAYOUTS, TYPES, scale_type, with_threads
from cctorch import ops
from cctorch.ops import (
    binary_code_quant,
    binary_quant,
    codebook_indices,
    codebook_quant,
    codebook_update,
    ternary_quant,
)
from cctorch.regularize import BinaryCodeQuantization
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

GRIDS: dict[str, Callable[..., Tensor]] = {
    "binary": binary_quant,
    "ternary": ternary_quant,
    "greedy": lambda x, axis=None: binary_code_quant(x, 3, "greedy", axis),
    "alternating 1": lambda x, axis=None: binary_code_quant(x, 1, axis=axis),
    "alternating 2": lambda x, axis=None: binary_code_quant(x, 2, axis=axis),
    "alternating 4": lambda x, axis=None: binary_code_quant(x, 4, axis=axis),
}
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())


@every_grid
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("dtype", TYPES)
def test_an_axis_means_every_slice_on_its_own(grid: Callable[..., Tensor], axis: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = grid(x, axis)
    assert y.dtype == dtype
    for whole, part in zip(y.unbind(axis), x.unbind(axis), strict=True):
        # Sums of several rows may round differently, and a least-squares solution in float64 loses a few digits.
        torch.testing.assert_close(whole, grid(part), rtol=max(2 * torch.finfo(dtype).eps, 1e-12), atol=0.0)


@every_grid
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(grid: Callable[..., Tensor], layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(6, 5, 4, 3, generator=torch.Generator().manual_seed(0)))
    for axis in (None, 0, 1):
        y = grid(x, axis)
        assert torch.equal(y, grid(x.contiguous(), axis))
        assert y.stride() == torch.empty_like(x).stride()


@every_grid
def test_extremes(grid: Callable[..., Tensor]) -> None:
    assert grid(torch.empty(0, 3), 1).shape == (0, 3)
    assert grid(torch.empty(0)).shape == (0,)
    assert grid(torch.tensor(-2.0)).item() == -2
    assert torch.equal(grid(torch.zeros(4)), torch.zeros(4))
    assert torch.equal(grid(torch.full((5,), 3.0)), torch.full((5,), 3.0))
    assert grid(torch.tensor([3e38, -3e38, 1e-45, 0.0])).isfinite().all()


@every_grid
def test_results_do_not_depend_on_threads(grid: Callable[..., Tensor]) -> None:
    x = torch.randn(3, 70000, generator=torch.Generator().manual_seed(0))
    for axis in (None, 0):
        one, two = (with_threads(n, lambda: grid(x, axis)) for n in (1, 2))  # noqa: B023
        assert torch.equal(one, two)


def error(x: Tensor, y: Tensor) -> float:
    return (x.double() - y.double()).square().sum().item()


small = st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=7)


@settings(max_examples=60, deadline=None)
@given(values=small)
def test_ternary_is_optimal(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    best = math.inf
    for code in itertools.product((-1.0, 0.0, 1.0), repeat=len(values)):
        c = torch.tensor(code, dtype=torch.float64)
        scale = ((x * c).sum() / c.square().sum().clamp(min=1)).clamp(min=0)
        best = min(best, error(x, scale * c))
    y = ternary_quant(x)
    assert error(x, y) <= best + 1e-12 * x.square().sum().item()
    assert len(y.abs().unique()) <= 2


@settings(max_examples=60, deadline=None)
@given(values=small, bits=st.integers(1, 2))
def test_one_and_two_codes_are_optimal(values: list[float], bits: int) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    codes = [torch.tensor(c, dtype=torch.float64) for c in itertools.product((-1.0, 1.0), repeat=len(values))]
    best = math.inf
    for chosen in itertools.combinations_with_replacement(codes, bits):
        basis = torch.stack(chosen, 1)
        best = min(best, error(x, basis @ (torch.linalg.pinv(basis) @ x)))
    assert error(x, binary_code_quant(x, bits)) <= best + 1e-9 * x.square().sum().item() + 1e-30


def test_binary_is_the_mean_magnitude_with_the_sign() -> None:
    x = torch.tensor([0.5, -1.5, 0.0, -2.0])
    assert binary_quant(x).tolist() == [1, -1, 1, -1]
    assert torch.equal(binary_quant(x), binary_code_quant(x, 1))


def test_greedy_codes_follow_the_residual() -> None:
    x = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, y = x.clone(), torch.zeros_like(x)
    for bits in range(1, 6):
        code = left.abs().mean() * torch.where(left < 0, -1.0, 1.0).double()
        left, y = left - code, y + code
        torch.testing.assert_close(binary_code_quant(x, bits, "greedy"), y, rtol=1e-13, atol=1e-13)


def test_more_codes_are_better_and_alternating_beats_greedy() -> None:
    x = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = {m: [error(x, binary_code_quant(x, b, m)) for b in range(1, 7)] for m in ("alternating", "greedy")}
    assert all(b < a for series in errors.values() for a, b in itertools.pairwise(series))
    assert all(a < g for a, g in zip(errors["alternating"][1:], errors["greedy"][1:], strict=True))
    for bits in range(1, 7):
        assert len(binary_code_quant(x, bits).unique()) <= 2**bits


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_the_regularizer_finds_the_same_codes(bits: int) -> None:
    x = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    (projected,) = BinaryCodeQuantization(bits, per_channel=True).project([("w", x)]).values
    assert torch.equal(projected, binary_code_quant(x, bits, axis=0))


def test_straight_through_gradients() -> None:
    x = torch.tensor([-1.5, -1.0, 0.25, 1.0, 1.0001], requires_grad=True)
    grad = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert torch.autograd.grad(binary_quant(x), x, grad)[0].tolist() == [0, 2, 3, 4, 0]
    for name in ("ternary", "greedy", "alternating 2"):
        assert torch.equal(torch.autograd.grad(GRIDS[name](x), x, grad)[0], grad)


def books(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, 6, generator=generator).to(dtype)
    return x, torch.randn(7, generator=generator).to(scale_type(dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_codebook_takes_the_nearest_and_sums_its_gradient_over_members(dtype: torch.dtype) -> None:
    x, codebook = books(dtype)
    indices = (x.double().unsqueeze(-1) - codebook.double()).abs().argmin(-1)
    assert torch.equal(codebook_indices(x, codebook), indices)
    x.requires_grad_()
    codebook.requires_grad_()
    y = codebook_quant(x, codebook)
    assert torch.equal(y, codebook[indices].to(dtype))
    grad = torch.randn(x.shape).to(dtype)
    grad_x, grad_codebook = torch.autograd.grad(y, (x, codebook), grad)
    assert torch.equal(grad_x, grad)
    expected = torch.stack([grad.double()[indices == k].sum() for k in range(7)])
    torch.testing.assert_close(grad_codebook.double(), expected, rtol=1e-6, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20),
    codebook=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9),
)
def test_codebook_value_is_the_nearest(values: list[float], codebook: list[float]) -> None:
    x, book = torch.tensor(values), torch.tensor(codebook)
    between = ((book.double() + book.double().flip(0)) / 2).float()
    x = torch.cat([x, between])
    for value, found in zip(x.tolist(), codebook_quant(x, book).tolist(), strict=True):
        exact = Fraction(value)
        assert found == min(book.tolist(), key=lambda center: (abs(Fraction(center) - exact), center))


def test_codebook_extremes() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.5])
    y = codebook_quant(x, torch.tensor([1.0, 0.0]))
    assert y[0].isnan()
    assert y[1:].tolist() == [1, 0, 0]
    assert codebook_quant(torch.empty(0, 2), torch.ones(1)).shape == (0, 2)
    assert codebook_quant(torch.randn(3), torch.tensor([2.0])).tolist() == [2, 2, 2]


@pytest.mark.parametrize("dtype", TYPES)
def test_update_is_a_step_of_k_means(dtype: torch.dtype) -> None:
    x, codebook = books(dtype)
    codebook[2] = 100
    indices = codebook_indices(x, codebook)
    means = [x.double()[indices == k].mean() if (indices == k).any() else codebook[k].double() for k in range(7)]
    updated = codebook_update(x, codebook)
    torch.testing.assert_close(updated.double(), torch.stack(means), rtol=1e-6, atol=1e-7)
    assert error(x, codebook_quant(x, updated)) < error(x, codebook_quant(x, codebook))
    assert torch.equal(codebook_update(torch.empty(0, dtype=dtype), codebook), codebook)


@pytest.mark.parametrize("dtype", TYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    x, codebook = books(dtype)
    x = x.unsqueeze(-1).contiguous(memory_format=torch.channels_last).requires_grad_()
    codebook.requires_grad_()
    library = torch.ops.cctorch
    for axis in (None, 1):
        torch.library.opcheck(library.binary_quant.default, (x, axis))
        torch.library.opcheck(library.ternary_quant.default, (x, axis))
        torch.library.opcheck(library.binary_code_quant.default, (x, 3, "alternating", axis))
    torch.library.opcheck(library.codebook_quant.default, (x, codebook))
    torch.library.opcheck(library.codebook_indices.default, (x.detach(), codebook.detach()))
    torch.library.opcheck(library.codebook_update.default, (x.detach(), codebook.detach()))


def test_compile_and_export() -> None:
    x, codebook = books(torch.float32)

    def everything(x: Tensor, codebook: Tensor) -> Tensor:
        codes = binary_code_quant(x, 3, "greedy", 0) + binary_code_quant(x, 2)
        return binary_quant(x, 0) + ternary_quant(x, 1) + codes + codebook_quant(x, codebook)

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x, codebook), everything(x, codebook))

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, codebook: Tensor) -> Tensor:
            return everything(x, codebook)

    program = torch.export.export(Module(), (x, codebook), dynamic_shapes=({0: torch.export.Dim("batch")}, None))
    twice = torch.cat([x, x])
    torch.testing.assert_close(program.module()(twice, codebook), everything(twice, codebook))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: binary_quant(torch.ones(3).int()), "binary_quant: x must be float32"),
        (lambda: ternary_quant(torch.ones(3), 1), r"ternary_quant: axis must be in \[-1, 0\].*got 1"),
        (lambda: binary_code_quant(torch.ones(3), 0), r"bits must be in \[1, 8\], got 0"),
        (lambda: binary_code_quant(torch.ones(3), 2, "fast"), "method must be greedy or alternating, got fast"),
        (lambda: codebook_quant(torch.ones(3), torch.ones(2, 1)), r"codebook must be one-dimensional, got shape"),
        (lambda: codebook_quant(torch.ones(3), torch.ones(0)), "codebook must have at least one value"),
        (lambda: codebook_quant(torch.ones(3), torch.ones(2).double()), "codebook must be Float for Float x"),
        (lambda: codebook_update(torch.ones(2, device="meta"), torch.ones(2)), "x is on meta but codebook is on cpu"),
    ],
)
def test_bad_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


def test_all_are_exported() -> None:
    assert all(hasattr(ops, name) for name in ops.__all__)
