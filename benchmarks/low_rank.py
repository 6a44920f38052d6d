"""Times low-rank projections of all weights of a network, and says how far from the best they are.

    python benchmarks/low_rank.py [--model resnet50] [--seconds 10] [--threads N] [--json FILE]

Every weight of two or more dimensions, as out x (in k k), to a quarter of its smaller side: `truncated_svd` from
nothing and from the last event's factors (the weights then are the product of these and noise of a tenth of its norm),
the products of the factors, and the peers. The limit is the multiplications for the lower halves of the Gram matrices
and for the factors, at the rate of a large product. All take turns; medians. Then Tucker-2 of 512 x 512 x 3 x 3 at
half ranks, with tensorly's partial_tucker beside it if that is installed (pip install tensorly): the same iterations
and no more. Freed memory is kept, as cctorch's launcher does it.
"""

import argparse
import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from cctorch import _C, atomic
from cctorch.ops import truncated_svd, tucker2
from timing import in_turns, machine
from torch import Tensor

Factors = tuple[list[Tensor], list[Tensor]]


def by_svd(matrices: list[Tensor], ranks: list[int]) -> Factors:
    parts = [torch.linalg.svd(m, full_matrices=False) for m in matrices]
    left = [u[:, :r] * s[:r] for (u, s, _), r in zip(parts, ranks, strict=True)]
    return left, [vh[:r] for (_, _, vh), r in zip(parts, ranks, strict=True)]


def by_gram(matrices: list[Tensor], ranks: list[int]) -> Factors:
    left, right = [], []
    for m, rank in zip(matrices, ranks, strict=True):
        wide = m if m.shape[0] <= m.shape[1] else m.T
        basis = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -rank:]
        pair = (basis, basis.T @ wide) if wide is m else (m @ basis, basis.T)
        left.append(pair[0])
        right.append(pair[1])
    return left, right


def by_lowrank(matrices: list[Tensor], ranks: list[int]) -> Factors:
    parts = [torch.svd_lowrank(m, rank) for m, rank in zip(matrices, ranks, strict=True)]
    return [u * s for u, s, _ in parts], [v.T for _, _, v in parts]


def excess(matrices: list[Tensor], ranks: list[int], factors: Factors) -> float:
    """The largest of the relative distances from the least error."""
    worst = 0.0
    for m, rank, left, right in zip(matrices, ranks, *factors, strict=True):
        least = torch.linalg.svdvals(m.double())[rank:].norm()
        worst = max(worst, float((left.double() @ right.double() - m.double()).norm() / least - 1))
    return worst


def weights_of(name: str) -> list[Tensor]:
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    return [p.detach().flatten(1) for p in model.parameters() if p.dim() > 1]


def tensorly_tucker(weight: Tensor, ranks: tuple[int, int], iterations: int) -> Callable[[], Tensor] | None:
    """The approximation, after HOSVD and so many iterations; None without tensorly."""
    with contextlib.suppress(ImportError):
        import tensorly
        from tensorly.decomposition import partial_tucker

        tensorly.set_backend("pytorch")

        def projected() -> Tensor:
            (core, factors), _ = partial_tucker(weight, rank=ranks, modes=[0, 1], n_iter_max=iterations, tol=0)
            approximation: Tensor = tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
            return approximation

        return projected
    return None


def tucker(seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds for 512 x 512 x 3 x 3 at half ranks, and errors relative to the weight's norm."""
    weight, ranks = torch.randn(512, 512, 3, 3), (256, 256)
    _, out, inner = tucker2([weight], [ranks])
    pairs = list(zip(out, inner, strict=True))

    def product(factors: tuple[list[Tensor], list[Tensor], list[Tensor]]) -> Tensor:
        (core,), (out,), (inner,) = factors
        return torch.einsum("oi...,po,qi->pq...", core, out, inner)

    contenders: dict[str, Callable[[], object]] = {
        "tucker2": lambda: tucker2([weight], [ranks]),
        "tucker2, started": lambda: tucker2([weight], [ranks], 2, pairs),
    }
    results = {name: product(contender()) for name, contender in contenders.items()}  # type: ignore[arg-type]
    for iterations in (1, 10):
        theirs = tensorly_tucker(weight, ranks, iterations)
        if theirs is not None:
            name = f"tensorly, {iterations} iteration{'s' if iterations > 1 else ''}"
            contenders[name], results[name] = theirs, theirs()
    errors = {name: float((result - weight).norm() / weight.norm()) for name, result in results.items()}
    return in_turns(contenders, seconds), errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--seconds", type=float, default=10.0, help="of turns")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    _C.keep_freed_memory()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    matrices = weights_of(arguments.model)
    ranks = [max(1, min(m.shape) // 4) for m in matrices]
    cold = truncated_svd(matrices, ranks)
    bases = [a if m.shape[0] <= m.shape[1] else b for m, a, b in zip(matrices, *cold, strict=True)]
    projected = [a @ b for a, b in zip(*cold, strict=True)]
    trained = [p + 0.1 * p.norm() / p.numel() ** 0.5 * torch.randn_like(p) for p in projected]
    square = torch.randn(1024, 1024)
    multiply_adds = sum(min(m.shape) * m.numel() * 0.5 + r * m.numel() for m, r in zip(matrices, ranks, strict=True))
    milliseconds = in_turns(
        {
            "a product of 1024 x 1024": lambda: square @ square,
            "truncated_svd": lambda: truncated_svd(matrices, ranks),
            "truncated_svd, started": lambda: truncated_svd(trained, ranks, bases),
            "products of the factors": lambda: [a @ b for a, b in zip(*cold, strict=True)],
            "torch.linalg.svd": lambda: by_svd(matrices, ranks),
            "Gram + eigh": lambda: by_gram(matrices, ranks),
            "torch.svd_lowrank": lambda: by_lowrank(matrices, ranks),
        },
        arguments.seconds,
    )
    limit = multiply_adds / 1024**3 * milliseconds["a product of 1024 x 1024"]
    errors = {
        "truncated_svd": excess(matrices, ranks, cold),
        "truncated_svd, started": excess(trained, ranks, truncated_svd(trained, ranks, bases)),
        "Gram + eigh": excess(matrices, ranks, by_gram(matrices, ranks)),
        "torch.svd_lowrank": excess(matrices, ranks, by_lowrank(matrices, ranks)),
    }
    tucker_milliseconds, tucker_errors = tucker(arguments.seconds)
    milliseconds |= tucker_milliseconds
    print(f"{arguments.model}, {torch.get_num_threads()} threads; limit {limit:.1f} ms")
    for name, value in milliseconds.items():
        if name in tucker_errors:
            print(f"{name:28} {value:9.1f} ms, relative error {tucker_errors[name]:.5f}")
            continue
        far = f"{100 * errors[name]:8.3f} % above the least error" if name in errors else ""
        print(f"{name:28} {value:9.1f} ms{far}")
    if arguments.json:
        result = {**machine(), "limit": limit, "milliseconds": milliseconds, "excess": errors}
        result["tucker_errors"] = tucker_errors
        atomic.write(arguments.json, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
