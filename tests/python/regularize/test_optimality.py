"""Each Q against a brute force or against numpy, in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from cctorch import regularize as r
from torch import Tensor


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(q: r.Regularizer, weight: Tensor) -> float:
    """Squared, of Q(w)."""
    return float((q.project([("w", weight)]).values[0].double() - weight.double()).square().sum())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_magnitude_pruning_is_the_best_subset(seed: int, scope: str) -> None:
    weight = random(2, 5, seed=seed)
    values = weight.flatten().double().tolist()
    best = min(sum(values[i] ** 2 for i in dropped) for dropped in itertools.combinations(range(10), 7))
    assert error(r.MagnitudePruning(0.7, scope), weight) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_structured_pruning_is_the_best_subset(seed: int) -> None:
    weight = random(6, 8, seed=seed)
    squares = weight.double().square()
    groups = squares.view(-1, 4)
    best = sum(min(float(g[list(c)].sum()) for c in itertools.combinations(range(4), 2)) for g in groups)
    assert error(r.NMPruning(2, 4), weight) == pytest.approx(best, rel=1e-12)
    rows = squares.sum(1)
    best = min(float(rows[list(c)].sum()) for c in itertools.combinations(range(6), 3))
    assert error(r.ChannelPruning(0.5), weight) == pytest.approx(best, rel=1e-12)


def least_squares(weight: np.ndarray, codes: np.ndarray) -> float:
    """Squared error of the best sum of scaled codes (count x n)."""
    scales = np.linalg.lstsq(codes.T, weight, rcond=None)[0]
    return float(((scales @ codes - weight) ** 2).sum())


@pytest.mark.parametrize("seed", range(5))
def test_two_bits_are_the_best_ternary_code(seed: int) -> None:
    weight = random(1, 7, seed=seed)
    w = weight.flatten().double().numpy()
    codes = (np.array([code]) for code in itertools.product((-1, 0, 1), repeat=7))
    best = min(least_squares(w, code) for code in codes)
    assert error(r.UniformQuantization(2), weight) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bits", [1, 2])
def test_binary_codes_are_the_best(seed: int, bits: int) -> None:
    weight = random(1, 6, seed=seed)
    w = weight.flatten().double().numpy()
    signs = [np.array(code) for code in itertools.product((-1, 1), repeat=6)]
    best = min(least_squares(w, np.stack(codes)) for codes in itertools.combinations_with_replacement(signs, bits))
    assert error(r.BinaryCodeQuantization(bits), weight) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("per_channel", [True, False])
def test_three_binary_codes_are_codes_and_not_worse_than_two(per_channel: bool) -> None:
    weight = random(6, 60)
    q = r.BinaryCodeQuantization(3, per_channel)
    (value,) = q.project([("w", weight)]).values
    for row in value.double() if per_channel else value.double().view(1, -1):
        levels = sorted(set(row.abs().tolist()), reverse=True)
        assert len(levels) <= 4
        a, b, c, d = levels
        assert d == pytest.approx(abs(b + c - a), abs=1e-6 * a)
    assert error(q, weight) < error(r.BinaryCodeQuantization(2, per_channel), weight)


def test_three_binary_codes_cannot_be_improved_by_one_step() -> None:
    """Neither by other scales for the same codes nor by other codes for the same scales."""
    weight = random(1, 40).double()
    (value,) = r.BinaryCodeQuantization(3).project([("w", weight)]).values
    a, b, c, _ = sorted(set(value.abs().flatten().tolist()), reverse=True)
    scales = np.array([(b + c) / 2, (a - c) / 2, (a - b) / 2])
    codes = np.array(list(itertools.product((-1, 1), repeat=3)))
    levels = codes @ scales
    w = weight.flatten().numpy()
    nearest = np.abs(w[:, None] - levels[None]).argmin(1)
    reached = error(r.BinaryCodeQuantization(3), weight)
    assert reached == pytest.approx(float(((levels[nearest] - w) ** 2).sum()), rel=1e-9)
    assert reached == pytest.approx(least_squares(w, codes[nearest].T.astype(float)), rel=1e-9)


def on_grid(w: np.ndarray, reach: float, bits: int) -> np.ndarray:
    q = 2 ** (bits - 1) - 1
    return reach / q * np.clip(np.round(w / reach * q), -q, q)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_uniform_quantization_against_numpy(bits: int) -> None:
    weight = random(5, 70)
    largest = [float(row.abs().max()) for row in weight]
    plain = np.stack([on_grid(row.double().numpy(), m, bits) for row, m in zip(weight, largest, strict=True)])
    (value,) = r.UniformQuantization(bits, range="absmax").project([("w", weight)]).values
    np.testing.assert_allclose(value.numpy(), plain, rtol=1e-6, atol=1e-7)
    clipped = sum(
        min(float(((on_grid(w, m * 0.9**k, bits) - w) ** 2).sum()) for k in range(31))
        for w, m in zip(weight.double().numpy(), largest, strict=True)
    )
    assert error(r.UniformQuantization(bits), weight) <= clipped * (1 + 1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_codebook_is_a_fixed_point_of_lloyd(bits: int) -> None:
    weight = random(12, 13).double()
    (value,) = r.CodebookQuantization(bits).project([("w", weight)]).values
    w, v = weight.flatten().numpy(), value.flatten().numpy()
    centers = np.unique(v)
    assert 1 < len(centers) <= 2**bits
    for center in centers:
        assert center == pytest.approx(w[v == center].mean(), abs=1e-9)
    nearest = centers[np.abs(w[:, None] - centers[None]).argmin(1)]
    np.testing.assert_array_equal(nearest, v)
    # Not worse than 2^bits even cells over the range.
    low, width = w.min(), (w.max() - w.min()) / 2**bits
    even = low + width * (np.clip(np.floor((w - low) / width), 0, 2**bits - 1) + 0.5)
    assert ((v - w) ** 2).sum() <= ((even - w) ** 2).sum()


def test_codebook_finds_separated_clusters() -> None:
    """Of very unequal sizes, where quantiles alone would miss the small ones."""
    centers = torch.tensor([-3.0, -1.0, 0.5, 4.0]).repeat_interleave(torch.tensor([2, 40, 3, 55]))
    noise = random(100) * 0.01
    weight = (centers + noise).view(10, 10)
    (value,) = r.CodebookQuantization(2).project([("w", weight)]).values
    means = torch.stack([(weight.flatten()[centers == c]).mean() for c in (-3.0, -1.0, 0.5, 4.0)])
    torch.testing.assert_close(value.unique(), means)


def eckart_young(matrix: np.ndarray, rank: int) -> float:
    return float((np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum())


@pytest.mark.parametrize(
    "shape", [(16, 8, 3, 3), (8, 16, 3, 3), (30, 20), (20, 30), (96, 24), (12, 5, 3), (16, 8, 3, 1)]
)
def test_svd_is_eckart_young(shape: tuple[int, ...]) -> None:
    weight = random(*shape)
    best = eckart_young(weight.flatten(1).double().numpy(), 3)
    assert math.sqrt(error(r.SVD(rank=3), weight)) == pytest.approx(math.sqrt(best), rel=1e-6)
    if weight.dim() == 4:
        spatial = weight.double().numpy().transpose(0, 2, 1, 3).reshape(shape[0] * shape[2], shape[1] * shape[3])
        best = eckart_young(spatial, 4)
        assert math.sqrt(error(r.SVD(rank=4, view="spatial"), weight)) == pytest.approx(math.sqrt(best), rel=1e-6)


def test_svd_of_an_ill_conditioned_matrix() -> None:
    """Singular values from 1 to 1e-6: their squares span twelve decades in the Gram matrix."""
    u = np.linalg.qr(random(40, 40, seed=1).double().numpy())[0]
    v = np.linalg.qr(random(60, 40, seed=2).double().numpy())[0]
    weight = torch.from_numpy(u * np.logspace(0, -6, 40) @ v.T).float()
    for rank in (2, 8, 16):
        best = eckart_young(weight.double().numpy(), rank)
        # The result is rounded to float32, which adds up to half an ulp for each element.
        rounding = float((weight.double() * torch.finfo(torch.float32).eps).square().sum())
        assert error(r.SVD(rank=rank), weight) <= best * (1 + 1e-6) + rounding


def test_tiled_svd_is_eckart_young_of_every_tile() -> None:
    weight = random(20, 3, 3, 3)
    matrix = weight.flatten(1).double().numpy()
    best = 0.0
    for i, j in itertools.product(range(0, 20, 8), range(0, 27, 8)):
        tile = matrix[i : i + 8, j : j + 8]
        if 2 * sum(tile.shape) < tile.size:
            best += eckart_young(tile, 2)
    assert math.sqrt(error(r.TiledSVD(8, 2), weight)) == pytest.approx(math.sqrt(best), rel=1e-6)


def hosvd(w: np.ndarray, ranks: tuple[int, int]) -> tuple[np.ndarray, float]:
    """Truncated higher-order SVD, and the lower bound that each unfolding's own truncation error is."""
    bound = 0.0
    result = w
    for mode, rank in enumerate(ranks):
        unfolded = np.moveaxis(w, mode, 0).reshape(w.shape[mode], -1)
        basis = np.linalg.svd(unfolded, full_matrices=False)[0][:, :rank]
        bound = max(bound, eckart_young(unfolded, rank))
        result = np.moveaxis(np.tensordot(basis @ basis.T, result, (1, mode)), 0, mode)
    return result, bound


@pytest.mark.parametrize("shape", [(16, 8, 3, 3), (8, 16, 3, 3), (10, 12, 5)])
def test_tucker_lies_between_the_bound_and_hosvd(shape: tuple[int, ...]) -> None:
    weight = random(*shape)
    w = weight.double().numpy()
    start, bound = hosvd(w, (4, 3))
    by_hosvd = float(((start - w) ** 2).sum())
    assert error(r.Tucker2(ranks=(4, 3), iterations=0), weight) == pytest.approx(by_hosvd, rel=1e-6)
    reached = error(r.Tucker2(ranks=(4, 3)), weight)
    assert bound * (1 - 1e-6) <= reached < by_hosvd
    assert error(r.Tucker2(ranks=(4, 3), iterations=30), weight) <= reached * (1 + 1e-6)


def test_tucker_recovers_what_has_these_ranks_and_equals_svd_for_matrices() -> None:
    core = random(4, 3, 3, 3)
    weight = torch.einsum("rskl,nr,cs->nckl", core, random(16, 4, seed=1), random(8, 3, seed=2))
    (value,) = r.Tucker2(ranks=(4, 3)).project([("w", weight)]).values
    torch.testing.assert_close(value, weight, rtol=1e-5, atol=1e-5)
    matrix = random(30, 24)
    best = eckart_young(matrix.double().numpy(), 5)
    assert error(r.Tucker2(ranks=(5, 7)), matrix) == pytest.approx(best, rel=1e-6)
    assert error(r.Tucker2(ranks=(6, 5)), matrix.view(30, 24, 1, 1)) == pytest.approx(best, rel=1e-6)
    assert error(r.Tucker2(ratio=2.4), matrix) == pytest.approx(best, rel=1e-6)  # 5 (30 + 24) <= 30 * 24 / 2.4
