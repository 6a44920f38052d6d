"""The closed forms against an independent brute force: numpy, float64, every W_k rebuilt, one SVD each."""

import numpy as np
import pytest
import torch
from cctorch import _C

SHAPES = {
    "1x1": (12, 8, 1, 1),
    "1x1 with more inputs": (6, 14, 1, 1),
    "3x3": (8, 6, 3, 3),
    "N > C k^2": (40, 3, 3, 3),
    "N = C k^2": (27, 3, 3, 3),
    "1x3": (7, 5, 1, 3),
    "one input channel": (8, 1, 3, 3),
    "one filter": (1, 6, 3, 3),
    "linear": (10, 7),
    "wide linear": (5, 30),
}
GAMMA = 0.9


def layer(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))


class BruteForce:
    """A layer as plain matrices: which channels are left, which rank, and what each next step would cost."""

    def __init__(self, weight: np.ndarray, gradient: np.ndarray, running: np.ndarray, kept: set[int], rank: int):
        self.n, self.c = weight.shape[:2]
        self.w, self.g, self.x = (m.reshape(self.n, -1) for m in (weight, gradient, running))
        self.k = self.w.shape[1] // self.c
        self.kept, self.rank = kept, rank

    def information_loss(self, x: np.ndarray) -> float:
        return float(((self.g * (x - self.w)) ** 2).sum())

    def without_channel(self, x: np.ndarray, channel: int) -> np.ndarray:
        x = x.copy()
        x[:, channel * self.k : (channel + 1) * self.k] = 0
        return x

    def without_value(self, x: np.ndarray, index: int) -> np.ndarray:
        u, s, vh = np.linalg.svd(x, full_matrices=False)
        return x - s[index] * np.outer(u[:, index], vh[index])

    def successors(self, x: np.ndarray, kept: set[int], values: int) -> list[np.ndarray]:
        return [self.without_channel(x, c) for c in sorted(kept)] + [self.without_value(x, i) for i in range(values)]

    def score(self, x: np.ndarray, kept: set[int], values: int) -> float:
        """Loss now plus gamma times the mean loss over every possible next removal, each rebuilt."""
        losses = [self.information_loss(y) for y in self.successors(x, kept, values)]
        return self.information_loss(x) + GAMMA * float(np.mean(losses))

    def scores(self) -> list[float]:
        channels = [
            self.score(self.without_channel(self.x, c), self.kept - {c}, self.rank)
            if c in self.kept and len(self.kept) > 1
            else np.inf
            for c in range(self.c)
        ]
        values = [
            self.score(self.without_value(self.x, i), self.kept, self.rank - 1) if self.rank > 1 else np.inf
            for i in range(self.rank)
        ]
        return channels + values


def solver_scores(weight, gradient, running, rank, basis="exact"):
    return _C.unit_scores(weight, gradient, running, rank, _C.SolverOptions(gamma=GAMMA, basis=basis))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_exact_scores_equal_brute_force_on_the_dense_layer(shape):
    weight, gradient = layer(shape)
    n, c = shape[:2]
    rank = min(n, weight[0].numel())
    brute = BruteForce(weight.numpy(), gradient.numpy(), weight.numpy(), set(range(c)), rank)
    np.testing.assert_allclose(solver_scores(weight, gradient, weight, rank), brute.scores(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", [(8, 6, 3, 3), (12, 8, 1, 1), (40, 3, 3, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_exact_scores_with_the_gradient_of_a_strided_convolution(shape, stride):
    weight, _ = layer(shape)
    images = torch.randn(4, shape[1], 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    weight.requires_grad_()
    torch.nn.functional.conv2d(images, weight, stride=stride, padding=shape[2] // 2).square().mean().backward()
    gradient, weight = weight.grad, weight.detach()
    rank = min(shape[0], weight[0].numel())
    brute = BruteForce(weight.numpy(), gradient.numpy(), weight.numpy(), set(range(shape[1])), rank)
    np.testing.assert_allclose(solver_scores(weight, gradient, weight, rank), brute.scores(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", [(8, 6, 3, 3), (40, 3, 3, 3), (12, 8, 1, 1), (6, 14, 1, 1), (10, 7)])
@pytest.mark.parametrize("seed", [1, 2])
def test_exact_scores_equal_brute_force_half_way(shape, seed):
    weight, gradient = layer(shape, seed)
    n, c = shape[:2]
    kept = set(range(c)) - {0, 2} if c > 3 else set(range(c)) - {0}
    running = weight.clone()
    running[:, sorted(set(range(c)) - kept)] = 0
    rank = min(n, len(kept) * (weight[0].numel() // c)) - 1
    u, s, vh = torch.linalg.svd(running.reshape(n, -1), full_matrices=False)
    running = ((u[:, :rank] * s[:rank]) @ vh[:rank]).reshape(shape)
    running[:, sorted(set(range(c)) - kept)] = 0
    brute = BruteForce(weight.numpy(), gradient.numpy(), running.numpy(), kept, rank)
    np.testing.assert_allclose(solver_scores(weight, gradient, running, rank), brute.scores(), rtol=1e-9, atol=0)


def test_fixed_basis_differs_only_in_the_channels_last_term():
    weight, gradient = layer((8, 6, 3, 3))
    exact, fixed = (solver_scores(weight, gradient, weight, 8, basis) for basis in ("exact", "fixed"))
    np.testing.assert_allclose(fixed[6:], exact[6:], rtol=1e-6)  # float32
    np.testing.assert_allclose(fixed[:6], exact[:6], rtol=0.05)
    # float32 alone makes a difference of 1e-7.
    assert np.max(np.abs(np.array(fixed[:6]) / exact[:6] - 1)) > 1e-3


@pytest.mark.parametrize(("units", "finite"), [("both", 14), ("channels", 6), ("singular_values", 8)])
def test_units_switch(units, finite):
    weight, gradient = layer((8, 6, 3, 3))
    scores = _C.unit_scores(weight, gradient, weight, 8, _C.SolverOptions(units=units))
    assert np.isfinite(scores).sum() == finite


def test_last_channel_and_last_value_are_never_offered():
    weight, gradient = layer((8, 1, 3, 3))
    assert np.isinf(solver_scores(weight, gradient, weight, 8)[0])
    running = torch.linalg.svd(weight.reshape(8, 9), full_matrices=False)
    rank_one = (running.S[0] * torch.outer(running.U[:, 0], running.Vh[0])).reshape(weight.shape)
    assert np.isinf(solver_scores(weight, gradient, rank_one, 1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_floating_dtype_is_read_as_its_value(dtype):
    weight, gradient = (t.to(dtype) for t in layer((8, 6, 3, 3)))
    for basis in ("exact", "fixed"):
        low = solver_scores(weight, gradient, weight, 8, basis)
        high = solver_scores(weight.double(), gradient.double(), weight.double(), 8, basis)
        np.testing.assert_allclose(low, high, rtol=1e-12 if basis == "exact" else 1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("what", ["weight", "gradient"])
def test_squares_that_float32_cannot_hold(what, scale):
    weight, gradient = layer((8, 6, 3, 3))
    scores = np.array(solver_scores(weight, gradient, weight, 8, "fixed"))
    scaled = scale * weight if what == "weight" else weight
    got = solver_scores(scaled, scale * gradient if what == "gradient" else gradient, scaled, 8, "fixed")
    np.testing.assert_allclose(np.array(got) / scale / scale, scores, rtol=1e-5)


def test_more_channels_than_one_block_holds():
    """Sums are taken over blocks of 65,536 elements: six channels of 1,200 x 3 x 3, of which there are eight."""
    weight, gradient = layer((1200, 8, 3, 3), 7)
    u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    running = ((u[:, :5] * s[:5]) @ vh[:5]).view(weight.shape)
    brute = BruteForce(weight.numpy(), gradient.numpy(), running.numpy(), set(range(8)), 5)
    np.testing.assert_allclose(solver_scores(weight, gradient, running, 5), brute.scores(), rtol=1e-9, atol=0)


def test_a_layer_without_channels_offers_nothing_and_an_impossible_rank_is_refused():
    weight, gradient = layer((8, 6, 3, 3))
    assert np.isinf(solver_scores(weight, gradient, torch.zeros_like(weight), 8)).all()
    for rank in (-1, 9):
        with pytest.raises(ValueError, match=r"rank = .*, expected 0 to 8"):
            solver_scores(weight, gradient, weight, rank)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_factorize_is_the_optimal_truncation(shape):
    weight, _ = layer(shape)
    n, c = shape[:2]
    kept = list(range(0, c, 2))
    matrix = weight[:, kept].reshape(n, -1)
    singular = np.linalg.svd(matrix.numpy(), compute_uv=False)
    for rank in {1, max(1, len(singular) // 2), len(singular)}:
        first, second = _C.factorize(weight, kept, rank)
        error = torch.linalg.norm(second.reshape(n, rank) @ first.reshape(rank, -1) - matrix).item()
        assert error == pytest.approx(np.sqrt((singular[rank:] ** 2).sum()), abs=1e-12 * singular[0])


def test_factorize_keeps_non_contiguous_weights_right():
    weight, _ = layer((8, 6, 3, 3))
    strided = weight.to(memory_format=torch.channels_last)
    for expected, got in zip(_C.factorize(weight, [0, 3], 2), _C.factorize(strided, [0, 3], 2), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("rank", [0, -1, 9])
def test_factorize_refuses_an_impossible_rank(rank):
    with pytest.raises(ValueError, match="rank = "):
        _C.factorize(layer((8, 6, 3, 3))[0], [0, 1, 2], rank)


@pytest.mark.parametrize("shape", [(8, 6, 3, 3), (1, 6, 3, 3), (8, 1, 1, 1)])
def test_scores_leave_their_arguments_alone(shape):
    weight, gradient = layer(shape)
    before = weight.clone(), gradient.clone()
    solver_scores(weight, gradient, weight, min(shape[0], weight[0].numel()))
    assert torch.equal(weight, before[0])
    assert torch.equal(gradient, before[1])
