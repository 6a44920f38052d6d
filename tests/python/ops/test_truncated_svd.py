"""Against numpy's singular value decomposition in float64 (Eckart-Young)."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cctorch.ops import truncated_svd
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_values(rows: int, columns: int, values: np.ndarray, seed: int = 0) -> Tensor:
    size = min(rows, columns)
    u = np.linalg.qr(random(rows, size, seed=seed + 1).double().numpy())[0]
    v = np.linalg.qr(random(columns, size, seed=seed + 2).double().numpy())[0]
    return torch.from_numpy((u * values) @ v.T)


def least(matrix: Tensor, rank: int) -> float:
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    return float(np.sqrt((values[rank:] ** 2).sum()))


def error(matrix: Tensor, left: Tensor, right: Tensor) -> float:
    return float((left.double() @ right.double() - matrix.double()).norm())


def one(matrix: Tensor, rank: int, *basis: Tensor) -> tuple[Tensor, Tensor]:
    (left,), (right,) = truncated_svd([matrix], [rank], basis)
    assert left.shape == (*matrix.shape[:-1], rank)
    assert right.shape == (*matrix.shape[:-2], rank, matrix.shape[-1])
    assert left.dtype == right.dtype == matrix.dtype
    return left, right


def resolved(matrix: Tensor) -> float:
    """Rounding of the factors to float32."""
    return 2 * torch.finfo(torch.float32).eps * float(matrix.double().norm())


# Below and above 64 rows; ranks below and above a third of the smaller side; wide, tall and square.
SIZES = [(1, 1, 1), (1, 9, 1), (20, 30, 3), (64, 576, 16), (96, 200, 90), (300, 65, 10), (160, 160, 40), (200, 900, 50)]


@pytest.mark.parametrize(("rows", "columns", "rank"), SIZES)
def test_no_farther_than_a_thousandth_from_the_best(rows: int, columns: int, rank: int) -> None:
    matrix = random(rows, columns)
    assert error(matrix, *one(matrix, rank)) <= 1.001 * least(matrix, rank) + resolved(matrix)


SPECTRA: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "flat": np.ones_like,
    "linear": lambda i: 1 + i / len(i),
    "slow": lambda i: (1 + i) ** -0.5,
    "fast": lambda i: (1 + i) ** -1.5,
    "faster": lambda i: np.exp(-i / 4.0),
    "step": lambda i: np.where(i < len(i) // 5, 100.0, 1.0),
    "step in the rank": lambda i: np.where(i < len(i) // 10, 1e3, 1.0) * (1 + i) ** -0.1,
    "of low rank": lambda i: (i < 10).astype(float),
    "zero": np.zeros_like,
}


@pytest.mark.parametrize("rank", [1, 20, 60, 140])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spectra(spectrum: str, rank: int, dtype: torch.dtype) -> None:
    matrix = with_values(150, 400, SPECTRA[spectrum](np.arange(150.0))).to(dtype)
    eps = torch.finfo(dtype).eps
    slack = 1.001 if dtype == torch.float32 else 1 + 1e-9
    for m in (matrix, matrix.T):
        assert error(m, *one(m, rank)) <= slack * least(m, rank) + 8 * eps * float(m.double().norm())


FLAT = {
    "a tenth": lambda n: with_values(n, 2 * n, np.linspace(1.1, 1, n)).float(),
    "three tenths": lambda n: with_values(n, 2 * n, np.linspace(1.3, 1, n)).float(),
    "above a step": lambda n: with_values(
        n, 2 * n, np.r_[np.full(n // 5, 30), np.linspace(1.3, 1, n - n // 5)]
    ).float(),
    "each row its own direction": lambda n: torch.diag(torch.linspace(1, 0, n)[random(n).argsort()]),
    "half of the rows zero": lambda n: random(n, 4 * n) * (random(n, 1, seed=1) > 0),
    "many columns": lambda n: random(n, 18 * n),
}


@pytest.mark.parametrize("part", [0.01, 0.12, 0.25, 0.33])
@pytest.mark.parametrize("case", FLAT)
def test_spectra_without_a_gap(case: str, part: float) -> None:
    matrix = FLAT[case](256)
    rank = int(256 * part)
    assert error(matrix, *one(matrix, rank)) <= 1.001 * least(matrix, rank)


def trained() -> list[Tensor]:
    folder = Path(os.environ.get("CCTORCH_WEIGHTS", ""))
    files = sorted(folder.glob("resnet20*.th")) if os.environ.get("CCTORCH_WEIGHTS") else []
    if not files:
        pytest.skip("CCTORCH_WEIGHTS names no folder with a trained ResNet-20")
    state = torch.load(files[0], map_location="cpu", weights_only=True)["state_dict"]
    return [w for w in state.values() if w.dim() == 4]


def test_trained_weights_in_both_unfoldings() -> None:
    matrices = []
    for w in trained():
        matrices += [w.flatten(1), w.transpose(1, 2).flatten(2).flatten(0, 1)]
    ranks = [max(1, min(m.shape) // 4) for m in matrices]
    for m, rank, left, right in zip(matrices, ranks, *truncated_svd(matrices, ranks), strict=True):
        assert error(m, left, right) <= 1.001 * least(m, rank) + resolved(m)


def basis_of(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return left if matrix.shape[-2] <= matrix.shape[-1] else right


@pytest.mark.parametrize("change", [0.0, 1e-3, 0.1, 0.3, 1.0, 100.0])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("rows", "rank"), [(160, 40), (48, 12), (25, 24), (32, 1)])
def test_started_from_the_bases_of_an_event(change: float, transpose: bool, rows: int, rank: int) -> None:
    """Near or far: a basis that does not help is not believed."""
    matrix = random(400, rows) if transpose else random(rows, 400)
    left, right = one(matrix, rank)
    projected = left @ right
    noise = random(*matrix.shape, seed=5)
    moved = projected + change * projected.norm() / noise.norm() * noise
    basis = basis_of(matrix, left, right)
    assert error(moved, *one(moved, rank, basis)) <= 1.001 * least(moved, rank) + resolved(moved)


@pytest.mark.parametrize("shape", [(5, 30, 40), (2, 3, 60, 30), (4, 16, 20)])
def test_a_batch_started_from_its_bases(shape: tuple[int, ...]) -> None:
    matrices = random(*shape)
    left, right = one(matrices, 8)
    moved = left @ right + 0.02 * random(*shape, seed=5)
    started = one(moved, 8, basis_of(matrices, left, right))
    for m, a, b in zip(*(t.flatten(0, -3) for t in (moved, *started)), strict=True):
        assert error(m, a, b) <= 1.001 * least(m, 8) + resolved(m)


# Of 100 x 150 at rank 20.
BAD_STARTS: dict[str, Callable[[], Tensor]] = {
    "zero": lambda: torch.zeros(100, 20),
    "dependent": lambda: random(100, 1).expand(100, 20),
    "random": lambda: random(100, 20, seed=3),
    "huge": lambda: 1e15 * random(100, 20, seed=3),
    "nan": lambda: torch.full((100, 20), math.nan),
    "empty": lambda: torch.empty(0),
}


@pytest.mark.parametrize("basis", BAD_STARTS)
def test_any_basis_will_do(basis: str) -> None:
    matrix = random(100, 150)
    assert error(matrix, *one(matrix, 20, BAD_STARTS[basis]())) <= 1.001 * least(matrix, 20)


def test_a_good_basis_changes_the_way_but_not_the_result() -> None:
    matrix = random(100, 20) @ random(20, 150, seed=1) + 0.5 * random(100, 150, seed=2)
    cold = one(matrix, 20)
    warm = one(matrix, 20, cold[0])
    assert not torch.equal(warm[0], cold[0])
    torch.testing.assert_close(warm[0] @ warm[1], cold[0] @ cold[1], rtol=0, atol=0.05)


@pytest.mark.parametrize("shape", [(5, 8, 6), (2, 3, 7, 7), (700, 16, 16), (3, 80, 100), (0, 4, 5)])
def test_batches(shape: tuple[int, ...]) -> None:
    matrices = random(*shape)
    left, right = one(matrices, 3)
    for m, a, b in zip(*(t.flatten(0, -3) for t in (matrices, left, right)), strict=True):
        assert error(m, a, b) <= 1.001 * least(m, 3) + resolved(m)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [30, 100])
def test_half_precision(dtype: torch.dtype, rows: int) -> None:
    matrix = random(rows, 150, dtype=dtype)
    rounding = 2 * torch.finfo(dtype).eps * float(matrix.double().norm())
    assert error(matrix, *one(matrix, 10)) <= 1.001 * least(matrix, 10) + rounding


def test_the_basis_is_orthonormal() -> None:
    for rows, columns in ((40, 50), (100, 150), (150, 100)):
        for rank in (10, 39):
            matrix = random(rows, columns)
            left, right = one(matrix, rank)
            basis = left if rows <= columns else right.T
            torch.testing.assert_close(basis.T @ basis, torch.eye(rank), rtol=0, atol=1e-5)


def test_non_contiguous() -> None:
    matrix = random(300, 200)[::2, 1::2]
    for m in (matrix, matrix.T):
        left, right = one(m, 20)
        same = one(m.contiguous(), 20)
        torch.testing.assert_close(left @ right, same[0] @ same[1], rtol=1e-4, atol=1e-4)


def test_many_at_once_are_what_each_alone_is() -> None:
    """On any number of threads, to rounding."""
    matrices = [random(*shape, seed=i) for i, shape in enumerate([(100, 120), (8, 200), (150, 90), (70, 70)] * 3)]
    ranks = [20, 3, 15, 10] * 3
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [one(m, r) for m, r in zip(matrices, ranks, strict=True)]
        torch.set_num_threads(3)
        left, right = truncated_svd(matrices, ranks)
    finally:
        torch.set_num_threads(threads)
    for (a, b), c, d in zip(alone, left, right, strict=True):
        torch.testing.assert_close(c @ d, a @ b, rtol=1e-4, atol=1e-4)
    assert truncated_svd([], []) == ([], [])


@pytest.mark.parametrize("noise", [3e-2, 3e-3, 3e-4])
def test_nearly_low_rank_matrices_cold_and_started(noise: float) -> None:
    """What a regularization event meets: the last event's result, and small steps since."""
    before = random(200, 40) @ random(40, 300, seed=1)
    left, _ = one(before, 40)
    step = random(200, 300, seed=2)
    matrix = before + noise * before.norm() / step.norm() * step
    for basis in ((), (left,)):
        assert error(matrix, *one(matrix, 40, *basis)) <= 1.001 * least(matrix, 40) + resolved(matrix)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 90), st.integers(1, 90), st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e15]))
def test_any_values(data: Any, rows: int, columns: int, scale: float) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    matrix = scale * random(rows, columns, seed=data.draw(st.integers(0, 99)))
    matrix[data.draw(st.integers(0, rows - 1))] = 0
    assert error(matrix, *one(matrix, rank)) <= 1.001 * least(matrix, rank) + resolved(matrix)


def elsewhere(
    matrices: list[Tensor], rank: int, bases: list[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """What CUDA runs, run here: the kernel that every device but the CPU has."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    op = torch.ops.cctorch.truncated_svd.default
    factors: tuple[list[Tensor], list[Tensor]] = op.redispatch(keys, matrices, [rank] * len(matrices), bases or [])
    return factors


@pytest.mark.parametrize("rows", [20, 80])
def test_other_devices_take_the_exact_route(rows: int) -> None:
    matrices = [
        random(rows, 100),
        random(rows, 100, seed=1),
        random(100, rows),
        random(100, rows, dtype=torch.bfloat16),
    ]
    left, right = elsewhere(matrices, 5)
    for m, a, b in zip(matrices, left, right, strict=True):
        rounding = 2 * torch.finfo(m.dtype).eps * float(m.double().norm())
        assert error(m, a, b) <= (1 + 1e-6) * least(m, 5) + rounding
        assert a.dtype == b.dtype == m.dtype
        assert a.is_contiguous()
        assert b.is_contiguous()


@pytest.mark.parametrize("change", [0.0, 1e-3, 0.1, 0.3, 1.0, 100.0])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("rows", "rank"), [(160, 40), (48, 12), (25, 24), (32, 1), (30, 30)])
def test_other_devices_started_from_the_bases_of_an_event(change: float, transpose: bool, rows: int, rank: int) -> None:
    """Two of one shape moved as far, one between them much farther."""
    moved, starts = [], []
    for seed in range(3):
        matrix = random(400, rows, seed=seed) if transpose else random(rows, 400, seed=seed)
        (left,), (right,) = elsewhere([matrix], rank)
        starts.append(basis_of(matrix, left, right))
        noise = random(*matrix.shape, seed=5 + seed)
        projected = left @ right
        moved.append(projected + (1000 if seed == 1 else change) * projected.norm() / noise.norm() * noise)
    for m, a, b in zip(moved, *elsewhere(moved, rank, starts), strict=True):
        assert error(m, a, b) <= 1.001 * least(m, rank) + resolved(m)


@pytest.mark.parametrize("basis", BAD_STARTS)
def test_any_basis_will_do_elsewhere(basis: str) -> None:
    matrix = random(100, 150)
    (left,), (right,) = elsewhere([matrix], 20, [BAD_STARTS[basis]()])
    assert error(matrix, left, right) <= 1.001 * least(matrix, 20)


@pytest.mark.parametrize("shape", [(5, 30, 40), (2, 3, 60, 30), (4, 16, 20), (0, 30, 40)])
def test_a_batch_elsewhere_started_from_its_bases(shape: tuple[int, ...]) -> None:
    matrices = random(*shape)
    (left,), (right,) = elsewhere([matrices], 8)
    moved = left @ right + 0.02 * random(*shape, seed=5)
    (lefts,), (rights,) = elsewhere([moved], 8, [basis_of(matrices, left, right)])
    assert lefts.shape == left.shape
    assert rights.shape == right.shape
    for m, a, b in zip(*(t.flatten(0, -3) for t in (moved, lefts, rights)), strict=True):
        assert error(m, a, b) <= 1.001 * least(m, 8) + resolved(m)


def test_opcheck() -> None:
    matrices = [random(6, 8), random(80, 70), random(3, 5, 4)]
    op = torch.ops.cctorch.truncated_svd.default
    torch.library.opcheck(op, (matrices, [2, 10, 1], []))
    left, right = truncated_svd(matrices, [2, 10, 1])
    bases = [basis_of(m, a, b) for m, a, b in zip(matrices, left, right, strict=True)]
    torch.library.opcheck(op, (matrices, [2, 10, 1], bases))


def test_no_gradient() -> None:
    left, right = one(random(5, 6).requires_grad_(), 2)
    assert not left.requires_grad
    assert not right.requires_grad


def test_compile_and_export() -> None:
    def projected(matrix: Tensor) -> Tensor:
        (left,), (right,) = truncated_svd([matrix], [4])
        return left @ right

    class Module(torch.nn.Module):
        def forward(self, matrix: Tensor) -> Tensor:
            return projected(matrix)

    matrix = random(20, 30)
    compiled = torch.compile(projected, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(matrix), projected(matrix))
    columns = {1: torch.export.Dim("columns", min=21)}
    program = torch.export.export(Module(), (matrix,), dynamic_shapes=(columns,))
    other = random(20, 44)
    torch.testing.assert_close(program.module()(other), projected(other))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: truncated_svd([torch.ones(2, 3)], []), "one rank for each of the 1 matrices, got 0"),
        (lambda: truncated_svd([torch.ones(2, 3)], [0]), r"ranks\[0\] must be at least 1, got 0"),
        (lambda: truncated_svd([torch.ones(2, 3)], [3]), r"ranks\[0\] = 3 is more than a matrix of 2 x 3"),
        (lambda: truncated_svd([torch.ones(3)], [1]), r"matrices\[0\] must have at least two dimensions"),
        (lambda: truncated_svd([torch.ones(2, 3, dtype=torch.int64)], [1]), r"matrices\[0\] must be float32"),
        (lambda: truncated_svd([torch.ones(2, 3)] * 2, [1, 1], [torch.ones(2, 1)]), "one for each of the 2 matrices"),
        (
            lambda: truncated_svd([torch.ones(3, 2)], [1], [torch.ones(3, 1)]),
            r"bases\[0\] must be the factor at",
        ),
        (lambda: truncated_svd([torch.ones(2, 3)], [1], [torch.ones(2, 1).double()]), "Double"),
    ],
)
def test_bad_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
