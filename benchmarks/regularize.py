"""Times regularization events: each Q against the same projection composed of PyTorch operators, and their share of a
training step at several periods.

    python benchmarks/regularize.py [--model resnet56] [--batch 128] [--device cuda] [--json FILE]

Medians of runs taken in turns. Before each, the weights are set to what an event of a period of 1 finds: the last
event's result and a drift of a hundredth of its norm, at random, another one each time. "first" is an event on weights
that no event has seen. The share at period p is (event + (p - 1) steps without one) / (p training steps). Freed memory
is kept, as cctorch's launcher does it.
"""

import argparse
import json
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
from cctorch import _C, atomic, models
from cctorch import regularize as r
from timing import in_turns, machine
from torch import Tensor, nn

PERIODS = (1, 10, 100, 1000)
Weights = list[Tensor]
Named = list[tuple[str, nn.Parameter]]


def global_topk(weights: Weights) -> None:
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights])
    threshold = magnitudes.kthvalue(int(0.9 * magnitudes.numel())).values
    for weight in weights:
        weight.mul_(weight.abs() > threshold)


def two_of_four(weights: Weights) -> None:
    for weight in weights:
        groups = weight.movedim(1, -1).reshape(-1, 4)
        mask = torch.zeros_like(groups).scatter_(1, groups.abs().topk(2, dim=1).indices, 1)
        weight.copy_((groups * mask).view(weight.movedim(1, -1).shape).movedim(-1, 1))


def ln_structured(weights: Weights) -> None:
    for weight in weights:
        norms = weight.flatten(1).norm(dim=1)
        dropped = norms.topk(len(norms) // 2, largest=False).indices
        weight[dropped] = 0


def absmax(weights: Weights) -> None:
    for weight in weights:
        scale = (weight.flatten(1).abs().amax(1) / 7).view(-1, *[1] * (weight.dim() - 1))
        weight.copy_(torch.round(weight / scale).clamp(-7, 7) * scale)


def dense_lloyd(weights: Weights) -> None:
    """Lloyd's algorithm with all distances, as many iterations as ours."""
    for weight in weights:
        flat = weight.flatten()
        centers = torch.quantile(flat[:: max(1, flat.numel() // 100_000)], (torch.arange(16.0) + 0.5).to(flat) / 16)
        for _ in range(50):
            nearest = (flat[:, None] - centers).abs().argmin(1)
            counts = torch.bincount(nearest, minlength=16)
            centers = torch.where(counts > 0, torch.bincount(nearest, flat, 16) / counts.clamp_min(1), centers).float()
        weight.copy_(centers[nearest].view(weight.shape))


def two_binary_codes(weights: Weights) -> None:
    """The best two bits: two magnitudes, at the split of the sorted magnitudes that leaves the least error."""
    for weight in weights:
        flat = weight.flatten(1).double()
        magnitudes = flat.abs()
        upper = magnitudes.sort(dim=1, descending=True).values.cumsum(1)
        lower, columns = upper[:, -1:] - upper, flat.shape[1]
        count = torch.arange(1.0, columns + 1, device=flat.device, dtype=flat.dtype)
        rest = (columns - count).clamp_min(1)
        split = (upper.square() / count + lower.square() / rest).argmax(1, keepdim=True)
        high, low = upper.gather(1, split) / (split + 1), lower.gather(1, split) / rest[split]
        levels = torch.where(magnitudes > (high + low) / 2, high, low)
        weight.copy_(torch.where(flat < 0, -levels, levels).view(weight.shape))


def leading(matrix: Tensor, rank: int) -> Tensor:
    """The first left singular vectors, by eigenvectors of the Gram matrix: several times faster than linalg.svd."""
    return torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:]


def svd(weights: Weights) -> None:
    for weight in weights:
        matrix = weight.flatten(1)
        rank = max(1, int(matrix.numel() / (2 * sum(matrix.shape))))
        if matrix.shape[0] <= matrix.shape[1]:
            u = leading(matrix, rank)
            weight.copy_((u @ (u.T @ matrix)).view(weight.shape))
        else:
            v = leading(matrix.T, rank)
            weight.copy_(((matrix @ v) @ v.T).view(weight.shape))


def svd_in_full(weights: Weights) -> None:
    for weight in weights:
        matrix = weight.flatten(1)
        rank = max(1, int(matrix.numel() / (2 * sum(matrix.shape))))
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        weight.copy_(((u[:, :rank] * s[:rank]) @ v[:rank]).view(weight.shape))


def tiled_svd(weights: Weights) -> None:
    for weight in weights:
        matrix = weight.flatten(1)
        for rows in matrix.split(16):
            for tile in rows.split(16, dim=1):
                u, s, v = torch.linalg.svd(tile, full_matrices=False)
                tile.copy_((u[:, :4] * s[:4]) @ v[:4])


def tucker(weights: Weights) -> None:
    """Three rounds of orthogonal iteration from the inputs of higher-order SVD, at the same ranks as ours."""
    for weight in weights:
        (rows, columns), kernel = weight.shape[:2], weight[0, 0].numel()
        if kernel == 1:
            svd([weight])
            continue
        factors, core = rows**2 + columns**2, rows * columns * kernel
        fraction = core / (factors + (factors**2 + 2 * core**2) ** 0.5)
        ranks = int(fraction * rows), int(fraction * columns)
        narrow = [weight, weight]
        for mode in (1, 0, 1, 0, 1, 0, 1):
            u = leading(narrow[1 - mode].movedim(mode, 0).flatten(1), ranks[mode])
            narrow[mode] = torch.tensordot(u @ u.T, weight, ([1], [mode])).movedim(0, mode)
        weight.copy_(torch.tensordot(u @ u.T, narrow[0], ([1], [1])).movedim(0, 1))


def least_squares_range(weights: Weights) -> None:
    """The best of 31 clip ratios by squared error."""
    for weight in weights:
        flat = weight.flatten(1)
        largest = flat.abs().amax(1, keepdim=True)
        best, smallest = torch.empty_like(flat), torch.full_like(largest, torch.inf)
        for k in range(31):
            scale = largest * 0.9**k / 7
            levels = torch.round(flat / scale).clamp_(-7, 7).mul_(scale)
            error = (levels - flat).square_().sum(1, keepdim=True)
            best, smallest = torch.where(error < smallest, levels, best), torch.minimum(error, smallest)
        weight.copy_(best.view(weight.shape))


CASES: list[tuple[str, r.Regularizer, Callable[[Weights], None] | None]] = [
    ("weight decay", r.WeightDecay(0.01), lambda weights: torch._foreach_mul_(weights, 0.99)),
    ("noise", r.UniformNoise(0.01), lambda weights: [w.add_(torch.rand_like(w) * 0.01 * w.norm()) for w in weights]),
    ("magnitude 0.9", r.MagnitudePruning(0.9), global_topk),
    ("2:4", r.NMPruning(2, 4), two_of_four),
    ("channels 0.5", r.ChannelPruning(0.5), ln_structured),
    ("uniform 4 absmax", r.UniformQuantization(4, range="absmax"), absmax),
    ("uniform 4 mse", r.UniformQuantization(4), least_squares_range),
    ("codebook 4", r.CodebookQuantization(4), dense_lloyd),
    ("binary 2", r.BinaryCodeQuantization(2), two_binary_codes),
    ("binary 3", r.BinaryCodeQuantization(3), None),
    ("svd 2x", r.SVD(ratio=2.0), svd),
    ("svd 2x beside linalg.svd", r.SVD(ratio=2.0), svd_in_full),
    ("tiled svd 2x", r.TiledSVD(16, 4), tiled_svd),
    ("tucker 2x", r.Tucker2(ratio=2.0), tucker),
]


def training_step(model: nn.Module, batch: int, side: int, device: str) -> Callable[[], None]:
    """A step in channels_last, on CPU the faster layout."""
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    x = torch.randn(batch, 3, side, side, device=device).to(memory_format=torch.channels_last)
    y = torch.arange(batch, device=device) % 10

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def microseconds_between_events(named: Named) -> float:
    events = r.Events(named, r.WeightDecay(0.0), 10**9)
    steps = 20_000
    start = time.perf_counter()
    for _ in range(steps):
        events.step()
    return 1e6 * (time.perf_counter() - start) / steps


def create(name: str) -> tuple[nn.Module, int]:
    """A model, and the side of its images."""
    if name in {"resnet20", "resnet32", "resnet56"}:
        return models.create(name), 32
    import torchvision

    return torchvision.models.get_model(name, weights=None), 224


def measure(
    q: r.Regularizer, composed: Callable[[Weights], object] | None, named: Named, seconds: float, device: str
) -> dict[str, float]:
    """Milliseconds of an event at a period of 1, of the first event, and of the composed projection."""
    weights = [weight.detach() for _, weight in named]
    originals = [weight.clone() for weight in weights]
    first = r.Events(named, q, 1)
    fresh = first.state_dict()
    following = r.Events(named, q, 1)
    following.step()
    projected = [weight.clone() for weight in weights]
    moved = cycle([[w + 0.01 * torch.randn_like(w) * w.norm() / w.numel() ** 0.5 for w in projected] for _ in "ab"])

    def first_event() -> None:
        first.load_state_dict(fresh)
        first.step()

    functions: dict[str, Callable[[], object]] = {"event": following.step, "first": first_event}
    if composed:
        functions["composed"] = lambda: composed(weights)

    def before(name: str) -> None:
        torch._foreach_copy_(weights, originals if name == "first" else next(moved))

    taken = in_turns(functions, seconds, device, before=before)
    torch._foreach_copy_(weights, originals)
    return taken


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet56", help="a model of cctorch or torchvision")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=3.0, help="of turns for each Q")
    parser.add_argument("--only", nargs="+", choices=[name for name, _, _ in CASES], help="these Q")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    _C.keep_freed_memory()
    torch.manual_seed(0)
    device = arguments.device
    model, side = create(arguments.model)
    model = model.to(device)
    # Without the first convolution, whose 3 input channels 2:4 does not fit.
    named = [(name, w) for name, w in model.named_parameters() if w.dim() == 4 and w.shape[1] % 4 == 0]
    rows = []
    between_us = microseconds_between_events(named)
    for name, q, composed in CASES:
        if arguments.only and name not in arguments.only:
            continue
        rows.append({"q": name, **measure(q, composed, named, arguments.seconds, device)})
        print(json.dumps(rows[-1]), flush=True)
    step = training_step(model, arguments.batch, side, device)
    step_ms = in_turns({"step": step}, arguments.seconds, device)["step"]
    title = f"{arguments.model}, batch {arguments.batch}: a training step takes {step_ms:.1f} ms"
    print(f"{title}, events.step() between events {between_us:.2f} us")
    print("| Q | event, ms | first, ms | composed, ms | composed / event |", end="")
    print(*[f" share at pNR {p} |" for p in PERIODS], sep="")
    print("|---" * (5 + len(PERIODS)) + "|")
    for row in rows:
        row["share"] = {p: (row["event"] + (p - 1) * 1e-3 * between_us) / (p * step_ms) for p in PERIODS}
        theirs = (f"{row['composed']:.2f}", f"{row['composed'] / row['event']:.1f}") if "composed" in row else ("", "")
        shares = " | ".join(f"{100 * row['share'][p]:.3g} %" for p in PERIODS)
        print(f"| {row['q']} | {row['event']:.2f} | {row['first']:.2f} | {' | '.join(theirs)} | {shares} |")
    if arguments.json:
        head = {**machine(device), "model": arguments.model, "batch": arguments.batch}
        result = {**head, "step_ms": step_ms, "between_us": between_us, "rows": rows}
        atomic.write(arguments.json, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
