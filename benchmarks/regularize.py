"""Times regularization events: each Q against the same projection composed of PyTorch operators, and their share of a
training step at several periods.

    python benchmarks/regularize.py [--model resnet20] [--device cuda] [--json FILE]

Medians. The overhead at period p is (event + (p - 1) steps without one) / (p training steps).
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cctorch import _C, models
from cctorch import regularize as r
from torch import Tensor, nn

PERIODS = (1, 10, 100, 1000)
Weights = list[Tensor]


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


def greedy_binary(weights: Weights) -> None:
    """The greedy two-bit code, without the search for the optimum that ours makes."""
    for weight in weights:
        rest = weight.flatten(1).clone()
        for _ in range(2):
            rest -= rest.sign() * rest.abs().mean(1, keepdim=True)
        weight.sub_(rest.view(weight.shape))


def svd(weights: Weights) -> None:
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
    """Truncated higher-order SVD at half of both channel counts, without the iterations that ours adds."""
    for weight in weights:
        result = weight
        for mode in (0, 1):
            unfolded = weight.movedim(mode, 0).flatten(1)
            u = torch.linalg.svd(unfolded, full_matrices=False)[0][:, : max(1, weight.shape[mode] // 2)]
            result = torch.tensordot(u @ u.T, result, ([1], [mode])).movedim(0, mode)
        weight.copy_(result)


CASES: list[tuple[str, r.Regularizer, Callable[[Weights], None] | None]] = [
    ("weight decay", r.WeightDecay(0.01), lambda weights: torch._foreach_mul_(weights, 0.99)),
    ("noise", r.UniformNoise(0.01), lambda weights: [w.add_(torch.rand_like(w) * 0.01 * w.norm()) for w in weights]),
    ("magnitude 0.9", r.MagnitudePruning(0.9), global_topk),
    ("2:4", r.NMPruning(2, 4), two_of_four),
    ("channels 0.5", r.ChannelPruning(0.5), ln_structured),
    ("uniform 4 absmax", r.UniformQuantization(4, range="absmax"), absmax),
    ("uniform 4 mse", r.UniformQuantization(4), None),
    ("codebook 4", r.CodebookQuantization(4), dense_lloyd),
    ("binary 2", r.BinaryCodeQuantization(2), greedy_binary),
    ("binary 3", r.BinaryCodeQuantization(3), None),
    ("svd 2x", r.SVD(ratio=2.0), svd),
    ("tiled svd 2x", r.TiledSVD(16, 4), tiled_svd),
    ("tucker 2x", r.Tucker2(ratio=2.0), tucker),
]


def median_ms(function: Callable[[], Any], device: str, repeats: int, reset: Callable[[], None]) -> float:
    times = []
    for i in range(repeats + 1):
        reset()
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        if i > 0:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def training_step(model: nn.Module, batch: int, device: str) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    x = torch.randn(batch, 3, 32, 32, device=device)
    y = torch.arange(batch, device=device) % 10

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def microseconds_between_events(named: list[tuple[str, nn.Parameter]]) -> float:
    events = r.Events(named, r.WeightDecay(0.0), 10**9)
    steps = 20_000
    start = time.perf_counter()
    for _ in range(steps):
        events.step()
    return 1e6 * (time.perf_counter() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    _C.keep_freed_memory()
    torch.manual_seed(0)
    device, repeats = arguments.device, arguments.repeats
    model = models.create(arguments.model).to(device)
    # Without the first convolution, whose 3 input channels 2:4 does not fit.
    named = [(name, w) for name, w in model.named_parameters() if w.dim() == 4 and w.shape[1] % 4 == 0]
    values = [weight.detach() for _, weight in named]
    originals = [value.clone() for value in values]

    def reset() -> None:
        torch._foreach_copy_(values, originals)

    step_ms = median_ms(training_step(model, arguments.batch, device), device, repeats, reset)
    between_us = microseconds_between_events(named)
    print(f"{arguments.model}, batch {arguments.batch}, {device}: training step {step_ms:.1f} ms, ", end="")
    print(f"events.step() between events {between_us:.2f} us, load {os.getloadavg()[0]:.1f}")
    print(f"{'Q':18} {'event ms':>9} {'composed ms':>12}   share of a step at period {PERIODS}")
    rows = []
    for name, q, composed in CASES:
        event_ms = median_ms(r.Events(named, q, 1).step, device, repeats, reset)
        theirs = median_ms(lambda composed=composed: composed(values), device, repeats, reset) if composed else None
        share = {p: (event_ms + (p - 1) * 1e-3 * between_us) / (p * step_ms) for p in PERIODS}
        rows.append({"q": name, "event_ms": event_ms, "composed_ms": theirs, "share": share})
        cells = "  ".join(f"{100 * share[p]:.3f} %" for p in PERIODS)
        print(f"{name:18} {event_ms:9.2f} {f'{theirs:12.2f}' if theirs is not None else 12 * ' '}   {cells}")
    if arguments.json:
        where = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
        head = {"device": where, "model": arguments.model, "batch": arguments.batch, "load": os.getloadavg()[0]}
        measured = {"step_ms": step_ms, "between_us": between_us, "rows": rows}
        arguments.json.write_text(json.dumps(head | measured, indent=2))


if __name__ == "__main__":
    main()
