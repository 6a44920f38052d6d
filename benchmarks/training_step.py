"""Seconds of a training step and of a forward pass: the dense network and compressed ones, taken in turns.

    python benchmarks/training_step.py configs/resnet56_cifar10.yaml [--target 0.5] [--multiples 1 8 16] [--json FILE]

Needs CCTORCH_WEIGHTS and CCTORCH_DATA (the published weights; gradients are those of 1,000 training images). Each
network is there with PyTorch's batch normalization and with cctorch.nn.BatchNorm2d, channels_last, float32. Medians;
ratios are medians over the turns of the time over that of the dense network with PyTorch's.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ablation import Ablation
from cctorch import _C, apply, collaborative
from cctorch.graph import trace
from cctorch.nn import BatchNorm2d
from torch import Tensor, nn


def with_torchs_batch_norm(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            module.__class__ = nn.BatchNorm2d
    return model


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    start = time.perf_counter()
    optimizer.zero_grad()
    F.cross_entropy(model.train()(images), labels).backward()
    optimizer.step()
    return time.perf_counter() - start


def forward(model: nn.Module, images: Tensor) -> float:
    model.eval()
    start = time.perf_counter()
    with torch.inference_mode():
        model(images)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--target", type=float, default=0.5)
    parser.add_argument("--multiples", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--gradients", type=Path, help="read them from this file, or write them to it")
    parser.add_argument("--json", type=Path)
    parser.set_defaults(images=1000, count="final")
    arguments = parser.parse_args()
    _C.keep_freed_memory()
    prepared = Ablation(arguments)
    networks = {"dense": (prepared.model, prepared.macs)}
    for multiple in arguments.multiples:
        found = collaborative.solve(
            prepared.model,
            trace(prepared.model, prepared.example),
            prepared.gradients,
            _C.SolverOptions(target=arguments.target, multiple=multiple),
            count="nominal",
        )
        networks[f"multiples of {multiple}"] = (apply(copy.deepcopy(prepared.model), found.plan), found.final_macs)
    contestants = [
        (name, kind, network, macs)
        for name, (model, macs) in networks.items()
        for kind, network in (("PyTorch", with_torchs_batch_norm(model)), ("cctorch", model))
    ]
    optimizers = [torch.optim.SGD(network.parameters(), 1e-4, 0.9) for _, _, network, _ in contestants]
    images = torch.randn(arguments.batch, *prepared.example.shape[1:]).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (arguments.batch,))
    times: dict[str, list[list[float]]] = {"step": [], "forward": []}
    for turn in range(arguments.turns + 2):
        steps = [training_step(c[2], o, images, labels) for c, o in zip(contestants, optimizers, strict=True)]
        passes = [forward(c[2], images) for c in contestants]
        if turn >= 2:
            times["step"].append(steps)
            times["forward"].append(passes)

    rows: list[dict[str, Any]] = []
    print("| | MACs left | batch norm | step, ms | of dense | forward, ms | of dense |\n|---|---|---|---|---|---|---|")
    for index, (name, kind, _, macs) in enumerate(contestants):
        row: dict[str, Any] = {"network": name, "batch_norm": kind, "macs_left": macs / prepared.macs}
        for what, turns in times.items():
            row[what] = statistics.median(turn[index] for turn in turns)
            row[f"{what}_of_dense"] = statistics.median(turn[index] / turn[0] for turn in turns)
        rows.append(row)
        print(
            f"| {name} | {row['macs_left']:.1%} | {kind} | {row['step'] * 1e3:.0f} | {row['step_of_dense']:.3f} | "
            f"{row['forward'] * 1e3:.0f} | {row['forward_of_dense']:.3f} |"
        )
    if arguments.json:
        machine = {"threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()}
        arguments.json.write_text(json.dumps({"batch": arguments.batch, **machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
