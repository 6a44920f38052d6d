import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from cases import LAYOUTS, TYPES, with_threads
from cctorch.ops import apply_mask, channel_mask, magnitude_masks, nm_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


def largest(magnitudes: list[float], count: int) -> list[bool]:
    """Brute force: sort by magnitude, then by index."""
    order = sorted(range(len(magnitudes)), key=lambda i: (-magnitudes[i], i))
    kept = set(order[:count])
    return [i in kept for i in range(len(magnitudes))]


def expected_masks(weights: list[Tensor], sparsity: str) -> list[Tensor]:
    magnitudes = [abs(v) for weight in weights for v in weight.reshape(-1).tolist()]
    count = math.floor((1 - Fraction(sparsity)) * len(magnitudes))
    flat = torch.tensor(largest(magnitudes, count), dtype=torch.bool)
    parts = flat.split([weight.numel() for weight in weights])
    return [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]


def tied_weights(dtype: torch.dtype) -> list[Tensor]:
    """Few distinct magnitudes, so that most decisions are ties."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 8, 3, 3), (7,), (), (0, 3), (1, 1), (12, 20)]
    return [(torch.randint(-4, 5, shape, generator=generator) / 4).to(dtype) for shape in shapes]


@pytest.mark.parametrize("sparsity", ["0", "0.1", "0.3", "0.5", "0.7", "0.9", "0.999", "1"])
@pytest.mark.parametrize("dtype", TYPES)
def test_magnitude_masks_equal_brute_force(sparsity: str, dtype: torch.dtype) -> None:
    distinct = [torch.randn(300).to(dtype), torch.randn(7, 30).to(dtype)]
    for weights in (tied_weights(dtype), distinct):
        masks = magnitude_masks(weights, float(sparsity))
        for ours, theirs in zip(masks, expected_masks(weights, sparsity), strict=True):
            assert torch.equal(ours, theirs)


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40),
    percent=st.integers(0, 100),
    double=st.booleans(),
)
def test_any_values(values: list[float], percent: int, double: bool) -> None:
    """Denormals, infinities and signed zeros included."""
    weights = [torch.tensor(values, dtype=torch.float64 if double else torch.float32)]
    sparsity = str(Fraction(percent, 100))
    (mask,) = magnitude_masks(weights, percent / 100)
    assert torch.equal(mask, expected_masks(weights, sparsity)[0])


@pytest.mark.parametrize("total", [10, 100, 1000, 12345, 10**6])
def test_counts_are_those_of_the_decimal_fraction(total: int) -> None:
    weight = torch.zeros(total)
    for percent in range(0, 101, 7 if total > 1000 else 1):
        (mask,) = magnitude_masks([weight], percent / 100)
        assert int(mask.sum()) == (100 - percent) * total // 100
        assert mask[: int(mask.sum())].all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ties_are_decided_by_index_in_every_layout(layout: str) -> None:
    x = LAYOUTS[layout](torch.randint(-2, 3, (4, 8, 3, 5)).float())
    functions = (lambda w: magnitude_masks([w], 0.5)[0], lambda w: nm_mask(w, 2, 4), lambda w: channel_mask(w, 0.5, 1))
    for function in functions:
        mask = function(x)
        assert torch.equal(mask, function(x.contiguous()))
        assert mask.stride() == torch.empty_like(x).stride()


def test_many_weights_and_threads() -> None:
    weight = torch.randn(400_000)
    weight[100_000:300_000] = 0.5
    one, two = (with_threads(n, lambda: magnitude_masks([weight, weight], 0.6)) for n in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    both = torch.cat([weight, weight]).abs()
    order = both.double().sort(stable=True, descending=True).indices[: 8 * both.numel() // 20]
    expected = torch.zeros(both.numel(), dtype=torch.bool)
    expected[order] = True
    assert torch.equal(torch.cat(one), expected)


def test_no_weights() -> None:
    assert magnitude_masks([], 0.5) == []
    assert magnitude_masks([torch.empty(0)], 0.5)[0].numel() == 0


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 2), (2, 4), (4, 8), (3, 8), (4, 4)])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("dtype", TYPES)
def test_nm_mask_equals_brute_force(n: int, m: int, axis: int, dtype: torch.dtype) -> None:
    weight = (torch.randint(-3, 4, (16, 8, 24)) / 4).to(dtype)
    mask = nm_mask(weight, n, m, axis)
    groups, kept = (t.movedim(axis, -1).reshape(-1, m) for t in (weight.abs(), mask))
    expected = [largest(group, n) for group in groups.tolist()]
    assert kept.tolist() == expected


@pytest.mark.parametrize("sparsity", ["0", "0.3", "0.5", "0.9", "1"])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("dtype", TYPES)
def test_channel_mask_equals_brute_force(sparsity: str, axis: int, dtype: torch.dtype) -> None:
    weight = torch.randn(10, 8, 3).to(dtype)
    weight.movedim(axis, 0)[1] = -weight.movedim(axis, 0)[0]
    mask = channel_mask(weight, float(sparsity), axis)
    slices = weight.movedim(axis, 0).reshape(weight.size(axis), -1).tolist()
    norms = [math.fsum(v * v for v in s) for s in slices]
    norms[1] = norms[0]
    count = max(1, math.floor((1 - Fraction(sparsity)) * len(slices)))
    kept = mask.movedim(axis, 0).reshape(len(slices), -1)
    assert mask.shape == weight.shape
    assert kept.all(1).tolist() == kept.any(1).tolist() == largest(norms, count)


def test_channel_mask_of_large_and_equal_values() -> None:
    weight = torch.tensor([[1e30, 1e30], [3e38, 0.0], [1e30, 1e30]])
    assert channel_mask(weight, 0.5).tolist() == [[False, False], [True, True], [False, False]]
    assert channel_mask(torch.ones(4, 3), 0.5)[:, 0].tolist() == [True, True, False, False]
    assert channel_mask(torch.ones(1, 3), 0.9).all()


def test_nan_is_refused_by_name() -> None:
    weight = torch.ones(4, 4)
    weight[3, 3] = math.nan
    with pytest.raises(RuntimeError, match=r"weights\[1\] has NaN"):
        magnitude_masks([torch.ones(3), weight], 0.5)
    with pytest.raises(RuntimeError, match="nm_mask: weight has NaN"):
        nm_mask(weight, 2, 4)
    with pytest.raises(RuntimeError, match="channel_mask: weight has NaN"):
        channel_mask(weight, 0.5)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_apply_mask(dtype: torch.dtype, layout: str) -> None:
    weight = LAYOUTS[layout](torch.randn(4, 5, 3, 3).to(dtype)).detach().requires_grad_()
    mask = torch.rand(4, 5, 3, 3) < 0.5
    y = apply_mask(weight, mask)
    assert torch.equal(y, weight * mask)
    assert y.stride() == torch.empty_like(weight).stride()
    grad = torch.randn(4, 5, 3, 3).to(dtype)
    assert torch.equal(torch.autograd.grad(y, weight, grad)[0], grad)


def test_apply_mask_removes_nan() -> None:
    y = apply_mask(torch.tensor([math.nan, math.inf, 1.0]), torch.tensor([False, False, True]))
    assert y.tolist() == [0, 0, 1]


def test_masks_carry_no_gradient() -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    masks = [*magnitude_masks([weight], 0.5), nm_mask(weight, 2, 4), channel_mask(weight, 0.5)]
    assert not any(mask.requires_grad for mask in masks)


@pytest.mark.parametrize("dtype", TYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    ops = torch.ops.cctorch
    weight = torch.randn(4, 8, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(ops.apply_mask.default, (weight, torch.rand(weight.shape) < 0.5))
    torch.library.opcheck(ops.magnitude_masks.default, ([weight, weight[0]], 0.5))
    torch.library.opcheck(ops.nm_mask.default, (weight, 2, 4, 1))
    torch.library.opcheck(ops.channel_mask.default, (weight, 0.5, 0))


def test_compile_and_export() -> None:
    class Masked(torch.nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return apply_mask(weight, magnitude_masks([weight], 0.5)[0] & nm_mask(weight, 2, 4))

    weight = torch.randn(6, 8, requires_grad=True)
    expected = Masked()(weight)
    y = torch.compile(Masked(), fullgraph=True, backend="aot_eager", dynamic=True)(weight)
    assert torch.equal(y, expected)
    assert torch.equal(torch.autograd.grad(y.sum(), weight)[0], torch.ones(6, 8))
    assert torch.equal(torch.export.export(Masked(), (weight,)).module()(weight), expected)


def test_autocast() -> None:
    weight = torch.randn(6, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.nn.functional.linear(torch.randn(2, 8), apply_mask(weight, nm_mask(weight, 2, 4)))
    y.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.ne(0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: magnitude_masks([torch.ones(2)], 1.5), r"sparsity must be in \[0, 1\], got 1.5"),
        (lambda: magnitude_masks([torch.ones(2)], math.nan), "sparsity must be in"),
        (
            lambda: magnitude_masks([torch.ones(2), torch.ones(2).half()], 0.5),
            r"Float in weights\[0\] and Half in weig",
        ),
        (lambda: magnitude_masks([torch.ones(2).int()], 0.5), r"weights\[0\] must be float32"),
        (lambda: nm_mask(torch.ones(2, 6), 2, 4), "axis 1 of weight must be a multiple of m = 4, got size 6"),
        (lambda: nm_mask(torch.ones(2, 8), 5, 4), "expected 1 <= n <= m, got n = 5 and m = 4"),
        (lambda: nm_mask(torch.ones(8), 2, 4), r"axis must be in \[-1, 0\].*got 1"),
        (lambda: channel_mask(torch.ones(2, 2), -0.1), "sparsity must be in"),
        (lambda: channel_mask(torch.ones(()), 0.5), "axis must be in"),
        (lambda: apply_mask(torch.ones(2), torch.ones(2)), "mask must be bool, got Float"),
        (lambda: apply_mask(torch.ones(2), torch.ones(3).bool()), r"shape of weight, \[2\], got \[3\]"),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
