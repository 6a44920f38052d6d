"""Against higher-order orthogonal iteration in float64, written with torch's singular value decomposition."""

from collections.abc import Callable

import pytest
import torch
from cctorch.ops import tucker2
from torch import Tensor


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def unfolded(w: Tensor, mode: int) -> Tensor:
    return w.movedim(mode, 0).flatten(1)


def project(w: Tensor, basis: Tensor, mode: int) -> Tensor:
    return torch.tensordot(basis, w, ([0], [mode])).movedim(0, mode)


def hooi(weight: Tensor, ranks: tuple[int, int], iterations: int) -> float:
    """The error of what tensorly.decomposition.partial_tucker does: the same start and the same alternation."""
    w = weight.double()
    bases = [torch.linalg.svd(unfolded(w, mode), full_matrices=False)[0][:, : ranks[mode]] for mode in (0, 1)]
    for _ in range(iterations):
        for mode in (0, 1):
            narrow = project(w, bases[1 - mode], 1 - mode)
            bases[mode] = torch.linalg.svd(unfolded(narrow, mode), full_matrices=False)[0][:, : ranks[mode]]
    core = project(project(w, bases[0], 0), bases[1], 1)
    return float((w.square().sum() - core.square().sum()).clamp_min(0).sqrt())


def merged(core: Tensor, out: Tensor, inner: Tensor) -> Tensor:
    return torch.einsum("no,oi...,ci->nc...", out.double(), core.double(), inner.double())


def error(weight: Tensor, core: Tensor, out: Tensor, inner: Tensor) -> float:
    return float((merged(core, out, inner) - weight.double()).norm())


SHAPES = [((16, 8, 3, 3), (4, 3)), ((8, 16, 3), (8, 5)), ((30, 24), (5, 5)), ((128, 96, 3, 3), (64, 48))]
LARGE = [((100, 20, 3, 3), (20, 10)), ((96, 128, 3, 3), (20, 30)), ((128, 3, 3, 3), (20, 3))]
# More outputs than the inputs and the kernel span, of a weight that has fewer inputs than outputs, and matrices.
TALL = [((200, 10, 3, 3), (60, 4)), ((200, 10, 3, 3), (30, 4)), ((300, 90), (100, 40)), ((90, 300, 1, 1), (20, 150))]


@pytest.mark.parametrize(("shape", "ranks"), SHAPES + LARGE + TALL)
def test_no_farther_than_hooi(shape: tuple[int, ...], ranks: tuple[int, int]) -> None:
    weight = random(*shape)
    (core,), (out,), (inner,) = tucker2([weight], [ranks], iterations=2)
    assert core.shape == (*ranks, *shape[2:])
    assert error(weight, core, out, inner) <= 1.001 * hooi(weight, ranks, 2)
    for basis, rank in ((out, ranks[0]), (inner, ranks[1])):
        torch.testing.assert_close(basis.T @ basis, torch.eye(rank), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("shape", "ranks"), SHAPES + TALL)
@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_exactly_hooi_in_float64(shape: tuple[int, ...], ranks: tuple[int, int], iterations: int) -> None:
    weight = random(*shape, dtype=torch.float64)
    (core,), (out,), (inner,) = tucker2([weight], [ranks], iterations)
    assert error(weight, core, out, inner) == pytest.approx(hooi(weight, ranks, iterations), rel=1e-7)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
@pytest.mark.parametrize("started", [False, True])
def test_any_size_of_numbers(scale: float, started: bool) -> None:
    weight = random(96, 80, 3, 3)
    _, out, inner = tucker2([weight], [(40, 30)])
    scaled = (weight.double() * scale).float()
    bases = [(out[0], inner[0])] if started else []
    (core,), (out,), (inner,) = tucker2([scaled], [(40, 30)], 2, bases)
    assert error(scaled, core, out, inner) <= 1.001 * hooi(scaled, (40, 30), 2)


@pytest.mark.parametrize("rows", [12, 100])
@pytest.mark.parametrize("beyond", [0, 8])
def test_what_has_these_ranks_is_found(rows: int, beyond: int) -> None:
    """With more ranks too, whose bases have directions in which there is nothing."""
    weight = merged(random(4, 3, 3, 3), random(rows, 4, seed=1), random(rows, 3, seed=2)).float()
    (core,), (out,), (inner,) = tucker2([weight], [(4 + beyond, 3 + beyond)])
    assert error(weight, core, out, inner) <= 1e-6 * float(weight.norm())
    for basis in (out, inner):
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(70, 80), (80, 70, 1, 1), (100, 200)])
@pytest.mark.parametrize("iterations", [1, 2, 10])
def test_all_directions_of_nearly_singular_matrices(shape: tuple[int, ...], iterations: int) -> None:
    """Their smallest singular values are a hundredth of the largest, whose squares' squares float32 cannot tell."""
    rank = min(shape[:2])
    for seed in range(5):
        weight = random(*shape, seed=seed)
        (core,), (out,), (inner,) = tucker2([weight], [(rank, rank)], iterations)
        assert error(weight, core, out, inner) <= 1e-6 * float(weight.norm())
        for basis in (out, inner):
            torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", [0.0, 0.05, 1.0, 100.0])
@pytest.mark.parametrize("size", [(96, 80), (64, 32), (30, 16)])
def test_started_from_the_bases_of_an_event(change: float, size: tuple[int, int]) -> None:
    weight, ranks = random(*size, 3, 3), (size[0] // 4, size[1] // 4)
    (core,), (out,), (inner,) = tucker2([weight], [ranks])
    moved = merged(core, out, inner).float()
    noise = random(*weight.shape, seed=5)
    moved = moved + change * moved.norm() / noise.norm() * noise
    (core,), out_list, inner_list = tucker2([moved], [ranks], 2, [(out, inner)])
    best = hooi(moved, ranks, 2)
    assert error(moved, core, out_list[0], inner_list[0]) <= 1.001 * best + 1e-6 * float(moved.norm())


def test_many_at_once_and_empty() -> None:
    weights = [random(8, 6, 3, 3), random(90, 70, 3, 3), random(20, 30), random(4, 4, 0)]
    ranks = [(2, 2), (20, 20), (4, 5), (2, 2)]
    many = tucker2(weights, ranks)
    for i, (weight, rank) in enumerate(zip(weights, ranks, strict=True)):
        alone = tucker2([weight], [rank])
        together = merged(*(part[i] for part in many))
        torch.testing.assert_close(together, merged(*(part[0] for part in alone)), rtol=1e-4, atol=1e-4)
    assert tucker2([], []) == ([], [], [])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [12, 80])
def test_half_precision(dtype: torch.dtype, rows: int) -> None:
    weight = random(rows, 10, 3, 3, dtype=dtype)
    (core,), (out,), (inner,) = tucker2([weight], [(6, 5)])
    assert core.dtype == out.dtype == inner.dtype == dtype
    rounding = 2 * torch.finfo(dtype).eps * float(weight.double().norm())
    assert error(weight, core, out, inner) <= 1.001 * hooi(weight, (6, 5), 2) + rounding


def test_channels_last() -> None:
    weight = random(16, 8, 3, 3)
    strided = tucker2([weight.contiguous(memory_format=torch.channels_last)], [(4, 3)])
    plain = tucker2([weight], [(4, 3)])
    torch.testing.assert_close(merged(*(t[0] for t in strided)), merged(*(t[0] for t in plain)))


def elsewhere(
    weights: list[Tensor], ranks: list[tuple[int, int]], bases: list[tuple[Tensor, Tensor]] | None = None
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What CUDA runs, run here: the kernel that every device but the CPU has."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    op = torch.ops.cctorch.tucker2.default
    out, inner = ([b[side] for b in bases or []] for side in (0, 1))
    factors: tuple[list[Tensor], list[Tensor], list[Tensor]] = op.redispatch(
        keys, weights, [r[0] for r in ranks], [r[1] for r in ranks], 2, out, inner
    )
    return factors


def test_other_devices() -> None:
    """In groups of one shape, ranks and type."""
    weights = [random(80, 12, 3, 3, seed=seed) for seed in range(3)]
    weights += [random(12, 80, 1), random(80, 12, 3, 3, dtype=torch.float64), random(6, 9), random(4, 4, 0)]
    ranks = [(20, 6), (20, 6), (19, 6), (5, 20), (20, 6), (3, 3), (2, 2)]
    for weight, rank, *factors in zip(weights[:-1], ranks, *elsewhere(weights, ranks), strict=False):
        assert [f.dtype for f in factors] == [weight.dtype] * 3
        assert all(f.is_contiguous() for f in factors)
        assert error(weight, *factors) == pytest.approx(hooi(weight, rank, 2), rel=1e-6)


@pytest.mark.parametrize("change", [0.0, 0.05, 1.0, 100.0])
@pytest.mark.parametrize("size", [(96, 80), (64, 32), (30, 6), (200, 4)])
def test_other_devices_started_from_the_bases_of_an_event(change: float, size: tuple[int, int]) -> None:
    """Of weights that moved little and one that moved far, which only the exact way helps."""
    ranks = [(size[0] // 3, size[1] // 2)] * 3
    starts, moved = [], []
    for seed in range(3):
        weight = random(*size, 3, 3, seed=seed)
        (core,), (out,), (inner,) = elsewhere([weight], ranks[:1])
        starts.append((out, inner))
        noise = random(*weight.shape, seed=5 + seed)
        merged_ = merged(core, out, inner).float()
        moved.append(merged_ + (1000 if seed == 1 else change) * merged_.norm() / noise.norm() * noise)
    for weight, *factors in zip(moved, *elsewhere(moved, ranks, starts), strict=True):
        assert error(weight, *factors) <= 1.001 * hooi(weight, ranks[0], 2) + 1e-6 * float(weight.norm())
        for basis in factors[1:]:
            torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=0, atol=1e-5)


def test_other_devices_see_that_weights_are_near() -> None:
    """Nearly of these ranks, the iteration has not ended where it begins: its error shows that it began there."""
    weight = merged(random(6, 5, 3, 3), random(40, 6, seed=1), random(30, 5, seed=2)).float()
    weight += 0.02 * random(*weight.shape, seed=3)
    ranks = [(6, 5)]
    (_,), (out,), (inner,) = elsewhere([weight], ranks)
    moved = weight + 0.02 * random(*weight.shape, seed=4)
    started, cold = elsewhere([moved], ranks, [(out, inner)]), elsewhere([moved], ranks)
    errors = [error(moved, *(part[0] for part in factors)) for factors in (started, cold)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)
    assert not torch.equal(started[1][0].abs(), cold[1][0].abs())


@pytest.mark.parametrize("basis", ["zero", "dependent", "nan", "empty"])
def test_any_basis_will_do_elsewhere(basis: str) -> None:
    weight = random(40, 30, 3, 3)
    start = {
        "zero": (torch.zeros(40, 6), torch.zeros(30, 5)),
        "dependent": (random(40, 1).expand(40, 6), random(30, 1).expand(30, 5)),
        "nan": (torch.full((40, 6), torch.nan), random(30, 5)),
        "empty": (torch.empty(0), torch.empty(0)),
    }[basis]
    factors = elsewhere([weight, weight], [(6, 5)] * 2, [start, start])
    for core, out, inner in zip(*factors, strict=True):
        assert error(weight, core, out, inner) <= 1.001 * hooi(weight, (6, 5), 2)


def test_opcheck_and_compile() -> None:
    weights = [random(12, 6, 3, 3), random(80, 10)]
    torch.library.opcheck(torch.ops.cctorch.tucker2.default, (weights, [3, 20], [2, 5], 1, [], []))

    def approximate(weight: Tensor) -> Tensor:
        (core,), (out,), (inner,) = tucker2([weight], [(3, 2)])
        return torch.einsum("no,oi...,ci->nc...", out, core, inner)

    class Module(torch.nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return approximate(weight)

    compiled = torch.compile(approximate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weights[0]), approximate(weights[0]))
    program = torch.export.export(Module(), (weights[0],))
    torch.testing.assert_close(program.module()(weights[0]), approximate(weights[0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tucker2([torch.ones(4, 4)], []), "one rank of outputs and of inputs for each of the 1"),
        (lambda: tucker2([torch.ones(4, 4)], [(5, 1)]), r"the ranks of weights\[0\], of shape \[4, 4\]"),
        (lambda: tucker2([torch.ones(4)], [(1, 1)]), r"weights\[0\] must have at least two dimensions"),
        (lambda: tucker2([torch.ones(4, 4)], [(1, 1)], -1), "iterations must be at least 0, got -1"),
        (
            lambda: tucker2([torch.ones(4, 4)], [(1, 1)], 1, [(torch.ones(4, 2), torch.ones(4, 1))]),
            r"bases_out\[0\] must be 4 x 1",
        ),
    ],
)
def test_bad_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
