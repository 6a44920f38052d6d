import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from cases import LAYOUTS, TYPES, with_threads
from cctorch.ops import apply_mask, block_masks, channel_masks, magnitude_masks, magnitude_prune, nm_masks
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


def bits(x: Tensor) -> Tensor:
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(-1).view(kinds[x.element_size()])


@pytest.mark.parametrize("sparsity", ["0", "0.3", "0.8", "0.999", "1"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pruned_weights_are_those_of_the_brute_force_masks(sparsity: str, dtype: torch.dtype, layout: str) -> None:
    weights = [LAYOUTS[layout](torch.randn(6, 5, 4, 9)).to(dtype), *tied_weights(dtype), torch.randn(70).to(dtype)]
    masks = expected_masks(weights, sparsity)
    for weight, mask, ours in zip(weights, masks, magnitude_prune(weights, float(sparsity)), strict=True):
        assert torch.equal(bits(ours), bits(torch.where(mask, weight, torch.zeros_like(weight))))
        assert ours.stride() == torch.empty_like(weight).stride()


def ranks(weights: list[Tensor], sparsity: float) -> list[Tensor]:
    """The same masks by PyTorch's stable sort, for more weights than brute force can take."""
    magnitudes = torch.cat([weight.reshape(-1) for weight in weights]).double().abs()
    kept = torch.zeros(magnitudes.numel(), dtype=torch.bool)
    count = math.floor((1 - Fraction(str(sparsity))) * magnitudes.numel())
    kept[magnitudes.sort(stable=True, descending=True).indices[:count]] = True
    parts = kept.split([weight.numel() for weight in weights])
    return [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]


MANY: dict[str, Callable[[], list[Tensor]]] = {
    "normal": lambda: [torch.randn(300, 301), torch.randn(7), torch.randn(40, 500, 3)],
    "pruned": lambda: [w * (w.abs() > 1.3) for w in (torch.randn(250_000), torch.randn(90, 80))],
    "sorted": lambda: [torch.linspace(-1, 1, 200_001), torch.linspace(2, 0, 50_000)],
    "three values": lambda: [torch.randint(-1, 2, (64, 50, 50)).float(), torch.randint(-2, 3, (70_000,)).float()],
    "equal": lambda: [torch.full((90_000,), -0.5), torch.full((300, 300), 0.5)],
    "two scales": lambda: [torch.randn(100_000), 1e-30 * torch.randn(100_000), torch.zeros(50_000)],
    "infinities": lambda: [torch.randn(100_000).exp() * 1e38, torch.full((20_000,), math.inf)],
    "channels_last": lambda: [
        torch.randint(-3, 4, (64, 32, 5, 5)).float().contiguous(memory_format=torch.channels_last),
        torch.randn(64, 64, 3, 3).contiguous(memory_format=torch.channels_last),
    ],
}


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("dtype", TYPES)
def test_many_weights_equal_a_stable_sort(name: str, dtype: torch.dtype) -> None:
    weights = [weight.to(dtype) for weight in MANY[name]()]
    for sparsity in (0.0, 0.001, 0.3, 0.8, 0.99999, 1.0):
        expected = ranks(weights, sparsity)
        for threads in (1, 2):
            masks, pruned = with_threads(
                threads,
                lambda: (magnitude_masks(weights, sparsity), magnitude_prune(weights, sparsity)),  # noqa: B023
            )
            for weight, mask, kept, right in zip(weights, masks, pruned, expected, strict=True):
                assert torch.equal(mask, right)
                assert torch.equal(bits(kept), bits(torch.where(right, weight, torch.zeros_like(weight))))


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
    functions: tuple[Callable[[list[Tensor]], list[Tensor]], ...] = (
        lambda w: magnitude_masks(w, 0.5),
        lambda w: nm_masks(w, 2, 4),
        lambda w: nm_masks(w, 1, 2, 0),
        lambda w: channel_masks(w, 0.5, 1),
        lambda w: block_masks(w, 0.5, 2, 5),
    )
    for function in functions:
        (mask,) = function([x])
        assert torch.equal(mask, function([x.contiguous()])[0])
        assert mask.stride() == torch.empty_like(x).stride()


def test_no_weights() -> None:
    assert magnitude_masks([], 0.5) == magnitude_prune([], 0.5) == nm_masks([], 2, 4) == []
    assert channel_masks([], 0.5) == block_masks([], 0.5, 2, 2) == []
    assert magnitude_masks([torch.empty(0)], 0.5)[0].numel() == 0


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 2), (2, 4), (4, 8), (3, 8), (4, 4)])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("dtype", TYPES)
def test_nm_masks_equal_brute_force(n: int, m: int, axis: int, dtype: torch.dtype) -> None:
    weights = [(torch.randint(-3, 4, shape) / 4).to(dtype) for shape in ((16, 8, 24), (0, 8, 8), (8, 16), (8, 8, 1, 8))]
    for weight, mask in zip(weights, nm_masks(weights, n, m, axis), strict=True):
        groups, kept = (t.movedim(axis, -1).reshape(-1, m) for t in (weight.abs(), mask))
        expected = [largest(group, n) for group in groups.tolist()]
        assert kept.tolist() == expected


def test_nm_masks_of_large_weights_do_not_depend_on_threads() -> None:
    # No two of one magnitude: topk decides ties in its own way.
    shapes = [(300, 200, 3), (40, 40_000), (8, 8)]
    weights = [torch.randperm(math.prod(s)).reshape(s) - math.prod(s) / 2 + 0.25 for s in shapes]
    for axis in (0, 1):
        one, two = (with_threads(n, lambda: nm_masks(weights, 2, 4, axis)) for n in (1, 2))  # noqa: B023
        for weight, mask, other in zip(weights, one, two, strict=True):
            assert torch.equal(mask, other)
            groups = weight.movedim(axis, -1).unflatten(-1, (-1, 4)).abs()
            expected = torch.zeros(groups.shape, dtype=torch.bool).scatter_(-1, groups.topk(2).indices, True)
            assert torch.equal(mask, expected.flatten(-2).movedim(-1, axis))


def expected_channels(weights: list[Tensor], sparsity: str, axis: int) -> list[list[bool]]:
    """Brute force: the best slice of every weight first, then by mean square, then by position."""
    slices = [w.movedim(axis, 0).reshape(w.size(axis), -1).tolist() for w in weights]
    squares = [[math.fsum(v * v for v in s) / len(s) for s in rows] for rows in slices]
    ranked = []
    for i, values in enumerate(squares):
        best = values.index(max(values))
        ranked += [(j != best, -value, i, j) for j, value in enumerate(values)]
    count = max(len(weights), math.floor((1 - Fraction(sparsity)) * len(ranked)))
    kept = {(i, j) for _, _, i, j in sorted(ranked)[:count]}
    return [[(i, j) in kept for j in range(len(values))] for i, values in enumerate(squares)]


@pytest.mark.parametrize("sparsity", ["0", "0.3", "0.5", "0.9", "1"])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("dtype", TYPES)
def test_channel_masks_equal_brute_force(sparsity: str, axis: int, dtype: torch.dtype) -> None:
    first = torch.randn(10, 8, 4).to(dtype)
    first.movedim(axis, 0)[1] = -first.movedim(axis, 0)[0]
    for weights in ([first], [first, torch.randn(6, 5).to(dtype), (2 * torch.randn(3, 4, 5)).to(dtype), -first]):
        expected = expected_channels(weights, sparsity, axis)
        for weight, mask, right in zip(weights, channel_masks(weights, float(sparsity), axis), expected, strict=True):
            kept = mask.movedim(axis, 0).reshape(weight.size(axis), -1)
            assert mask.shape == weight.shape
            assert kept.all(1).tolist() == kept.any(1).tolist() == right


def test_channel_masks_of_extreme_values() -> None:
    weight = torch.tensor([[1e30, 1e30], [3e38, 0.0], [1e30, 1e30]])
    assert channel_masks([weight], 0.5)[0].tolist() == [[False, False], [True, True], [False, False]]
    assert channel_masks([torch.ones(4, 3)], 0.5)[0][:, 0].tolist() == [True, True, False, False]
    assert channel_masks([torch.ones(1, 3)], 0.9)[0].all()
    # Infinite slices do not take the place of another weight's best one.
    first, second, third = channel_masks([torch.full((3, 1), math.inf), torch.ones(2, 1), torch.empty(0, 2)], 0.6)
    assert first.tolist() == [[True], [False], [False]]
    assert second.tolist() == [[True], [False]]
    assert third.shape == (0, 2)


@pytest.mark.parametrize("sparsity", ["0", "0.3", "0.5", "0.9", "1"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 3), (4, 2), (1, 12), (8, 6)])
@pytest.mark.parametrize("dtype", TYPES)
def test_block_masks_equal_brute_force(sparsity: str, rows: int, columns: int, dtype: torch.dtype) -> None:
    weights = [torch.randn(8, 12).to(dtype), (torch.randint(-1, 2, (16, 4, 3, 3)) / 2).to(dtype), torch.zeros(0, 12)]
    weights[2] = weights[2].to(dtype)
    places, squares = [], []
    for k, weight in enumerate(weights):
        matrix = weight.double().reshape(weight.size(0), -1) if weight.numel() else weight
        for i in range(0, matrix.size(0), rows):
            for j in range(0, matrix.size(1), columns):
                places.append((k, i, j))
                squares.append(math.fsum(v * v for v in matrix[i : i + rows, j : j + columns].flatten().tolist()))
    count = math.floor((1 - Fraction(sparsity)) * len(places))
    expected = [torch.zeros(w.size(0), w[:1].numel() or 12, dtype=torch.bool) for w in weights]
    for kept, (k, i, j) in zip(largest(squares, count), places, strict=True):
        expected[k][i : i + rows, j : j + columns] = kept
    for weight, mask, right in zip(
        weights, block_masks(weights, float(sparsity), rows, columns), expected, strict=True
    ):
        assert torch.equal(mask, right.view(weight.shape))


def test_nan_is_refused_by_name() -> None:
    weight = torch.ones(4, 4)
    weight[3, 3] = math.nan
    with pytest.raises(RuntimeError, match=r"weights\[1\] has NaN"):
        magnitude_masks([torch.ones(3), weight], 0.5)
    for sparsity in (0.0, 0.5, 1.0):
        with pytest.raises(RuntimeError, match=r"magnitude_prune: weights\[2\] has NaN"):
            magnitude_prune([torch.randn(50_000), torch.zeros(0), weight.half().float()], sparsity)
    with pytest.raises(RuntimeError, match=r"nm_masks: weights\[1\] has NaN"):
        nm_masks([torch.ones(4, 4), weight], 2, 4)
    with pytest.raises(RuntimeError, match=r"channel_masks: weights\[1\] has NaN"):
        channel_masks([torch.ones(4, 4), weight], 0.5)
    with pytest.raises(RuntimeError, match=r"block_masks: weights\[0\] has NaN"):
        block_masks([weight], 0.5, 2, 2)


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


def test_pruning_is_straight_through() -> None:
    weights = [torch.randn(4, 3, requires_grad=True), torch.randn(5), torch.randn(2, 2, 2, requires_grad=True)]
    pruned = magnitude_prune(weights, 0.5)
    assert [p.requires_grad for p in pruned] == [True, True, True]
    grads = torch.autograd.grad(sum(3 * p.sum() for p in pruned[:2]), (weights[0], weights[2]), allow_unused=True)
    assert torch.equal(grads[0], torch.full((4, 3), 3.0))
    assert grads[1] is None
    assert not magnitude_prune([weights[1]], 0.5)[0].requires_grad
    with torch.no_grad():
        assert not magnitude_prune(weights, 0.5)[0].requires_grad


def test_apply_mask_removes_nan() -> None:
    y = apply_mask(torch.tensor([math.nan, math.inf, 1.0]), torch.tensor([False, False, True]))
    assert y.tolist() == [0, 0, 1]


def test_masks_carry_no_gradient() -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    masks = [*magnitude_masks([weight], 0.5), *nm_masks([weight], 2, 4), *channel_masks([weight], 0.5)]
    masks += block_masks([weight], 0.5, 2, 2)
    assert not any(mask.requires_grad for mask in masks)


@pytest.mark.parametrize("dtype", TYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    ops = torch.ops.cctorch
    weight = torch.randn(4, 8, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(ops.apply_mask.default, (weight, torch.rand(weight.shape) < 0.5))
    torch.library.opcheck(ops.magnitude_masks.default, ([weight, weight[0]], 0.5))
    torch.library.opcheck(ops.magnitude_prune.default, ([weight, weight[0].detach()], 0.5))
    torch.library.opcheck(ops.nm_masks.default, ([weight, weight[:2]], 2, 4, 1))
    torch.library.opcheck(ops.channel_masks.default, ([weight, weight[0]], 0.5, 0))
    torch.library.opcheck(ops.block_masks.default, ([weight, weight[0]], 0.5, 2, 3))


def test_compile_and_export() -> None:
    class Masked(torch.nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            pruned = magnitude_prune([weight], 0.25)[0]
            return apply_mask(pruned, magnitude_masks([weight], 0.5)[0] & nm_masks([weight], 2, 4)[0])

    weight = torch.randn(6, 8, requires_grad=True)
    expected = Masked()(weight)
    y = torch.compile(Masked(), fullgraph=True, backend="aot_eager", dynamic=True)(weight)
    assert torch.equal(y, expected)
    assert torch.equal(torch.autograd.grad(y.sum(), weight)[0], torch.ones(6, 8))
    assert torch.equal(torch.export.export(Masked(), (weight,)).module()(weight), expected)


def test_autocast() -> None:
    weight = torch.randn(6, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.nn.functional.linear(torch.randn(2, 8), apply_mask(weight, nm_masks([weight], 2, 4)[0]))
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
        (lambda: nm_masks([torch.ones(2, 6)], 2, 4), r"axis 1 of weights\[0\] must be a multiple of m = 4, got size 6"),
        (lambda: nm_masks([torch.ones(2, 8)], 5, 4), "expected 1 <= n <= m, got n = 5 and m = 4"),
        (lambda: nm_masks([torch.ones(8)], 2, 4), r"axis must be in \[-1, 0\].*got 1"),
        (lambda: nm_masks([torch.ones(8, 4), torch.ones(8, 4).double()], 2, 4), r"Double in weights\[1\]"),
        (lambda: channel_masks([torch.ones(2, 2)], -0.1), "sparsity must be in"),
        (lambda: channel_masks([torch.ones(2), torch.ones(())], 0.5), r"axis must be in .*weights\[1\]"),
        (lambda: block_masks([torch.ones(2)], 0.5, 1, 1), r"weights\[0\] must have two dimensions at least"),
        (lambda: block_masks([torch.ones(4, 4)], 0.5, 0, 1), "rows and columns must be at least 1, got 0 and 1"),
        (lambda: block_masks([torch.ones(4, 4)], 2.0, 1, 1), "sparsity must be in"),
        (
            lambda: block_masks([torch.ones(4, 4)], 0.5, 3, 1),
            r"0 of weights\[0\] must be a multiple of rows = 3, got size 4",
        ),
        (lambda: block_masks([torch.ones(4, 2, 3)], 0.5, 2, 4), "must be a multiple of columns = 4, got size 6"),
        (lambda: apply_mask(torch.ones(2), torch.ones(2)), "mask must be bool, got Float"),
        (lambda: apply_mask(torch.ones(2), torch.ones(3).bool()), r"shape of weight, \[2\], got \[3\]"),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


def test_vmap() -> None:
    weights, masks = torch.randn(4, 3, 5, requires_grad=True), torch.rand(4, 3, 5) < 0.5
    expected = torch.stack([apply_mask(w, m) for w, m in zip(weights, masks, strict=True)])
    y = torch.vmap(apply_mask)(weights, masks)
    assert torch.equal(y, expected)
    assert torch.equal(torch.autograd.grad(y.sum(), weights)[0], torch.ones_like(weights))
    assert torch.equal(torch.vmap(apply_mask, (0, None))(weights, masks[0]), weights * masks[0])
    assert torch.equal(
        torch.vmap(apply_mask, (None, 2), 1)(weights[0], masks[0].expand(2, 3, 5).permute(1, 2, 0)),
        (weights[0] * masks[0]).expand(2, 3, 5).movedim(0, 1),
    )
