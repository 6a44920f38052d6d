"""Times the operators against PyTorch's own and against the bandwidth of a copy.

    python benchmarks/ops.py [--device cuda] [--json FILE]

Medians, in milliseconds, of forward and of forward plus backward; GB/s count what has to be read and written.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cctorch import _C, ops
from torch import Tensor

SHAPE = (64, 64, 56, 56)


def composed_fake_quant(x: Tensor, log_scale: Tensor) -> Tensor:
    scale = log_scale.exp().view(1, -1, 1, 1)
    clamped = (x / scale).clamp(-128, 127)
    return scale * (clamped + (clamped.round() - clamped).detach())


def learnable_fake_quant(x: Tensor, scale: Tensor) -> Tensor:
    zero_point = torch.zeros_like(scale)
    return torch._fake_quantize_learnable_per_channel_affine(x, scale, zero_point, 1, -128, 127, 1.0)


def composed_gate(x: Tensor, gate: Tensor) -> Tensor:
    return x * gate.view(1, -1, 1, 1)


CASES: list[tuple[str, str, Callable[[Tensor, Tensor], Tensor]]] = [
    ("fake_quant", "cctorch", lambda x, p: ops.fake_quant(x, p, -128, 127, 1)),
    ("fake_quant", "torch learnable", learnable_fake_quant),
    ("fake_quant", "composed", composed_fake_quant),
    ("channel_gate", "cctorch", ops.channel_gate),
    ("channel_gate", "composed", composed_gate),
]


def median_ms(function: Callable[[], Any], device: str, repeats: int) -> float:
    times = []
    for i in range(repeats + 2):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= 2:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(function: Callable[[Tensor, Tensor], Tensor], device: str, repeats: int) -> tuple[float, float]:
    x = torch.randn(SHAPE, device=device, requires_grad=True)
    parameter = torch.ones(SHAPE[1], device=device, requires_grad=True)
    grad = torch.randn(SHAPE, device=device)
    with torch.no_grad():
        forward = median_ms(lambda: function(x, parameter), device, repeats)
    both = median_ms(lambda: torch.autograd.grad(function(x, parameter), (x, parameter), grad), device, repeats)
    return forward, both


def mask_rows(device: str, repeats: int) -> list[dict[str, Any]]:
    """The exact global top 20 % of ResNet-50's weights, and the weights pruned by it; the limit is a copy of them."""
    import torchvision

    weights = [p.detach().to(device) for p in torchvision.models.resnet50().parameters() if p.dim() > 1]
    magnitudes = torch.cat([weight.abs().view(-1) for weight in weights])
    count = magnitudes.numel() // 5
    functions: list[tuple[str, str, Callable[[], Any], int]] = [
        ("copy of weights", "torch", lambda: [weight.clone() for weight in weights], repeats),
        ("magnitude_masks", "cctorch", lambda: ops.magnitude_masks(weights, 0.8), repeats),
        ("magnitude_prune", "cctorch", lambda: ops.magnitude_prune(weights, 0.8), repeats),
        ("top-k alone", "torch topk", lambda: magnitudes.topk(count, sorted=False), 1),
        ("top-k alone", "torch sort", lambda: magnitudes.sort(), 1),
    ]
    return [{"op": op, "by": by, "forward_ms": median_ms(f, device, times)} for op, by, f, times in functions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    _C.keep_freed_memory()
    x = torch.randn(SHAPE, device=arguments.device)
    gigabytes = x.numel() * x.element_size() / 1e9
    copy = median_ms(x.clone, arguments.device, arguments.repeats)
    rows: list[dict[str, Any]] = [{"op": "copy", "by": "torch", "forward_ms": copy, "GB/s": 2e3 * gigabytes / copy}]
    for op, by, function in CASES:
        forward, both = measure(function, arguments.device, arguments.repeats)
        bandwidth = 2e3 * gigabytes / forward
        rows.append({"op": op, "by": by, "forward_ms": forward, "both_ms": both, "GB/s": bandwidth})
    rows += mask_rows(arguments.device, arguments.repeats)
    print(f"{'op':16} {'by':16} {'forward ms':>11} {'+ backward':>11} {'GB/s':>7}")
    for row in rows:
        cells = (f"{row[key]:.2f}" if key in row else "" for key in ("forward_ms", "both_ms", "GB/s"))
        print("{:16} {:16} {:>11} {:>11} {:>7}".format(row["op"], row["by"], *cells))
    if arguments.json:
        name = torch.cuda.get_device_name() if arguments.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
        arguments.json.write_text(json.dumps({"device": name, "shape": SHAPE, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
