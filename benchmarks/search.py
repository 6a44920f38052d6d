"""How long the search takes, gradients apart, and how far the fixed basis's choices are from the exact mode's.

    python benchmarks/search.py --output docs/results/search                       # the networks below
    python benchmarks/search.py --output /tmp/search resnet50 --exact              # one of them, the exact mode too
    python benchmarks/search.py --output /tmp/search resnet50 --device cuda        # wide layers on the GPU
    python benchmarks/search.py --output /tmp/search resnet50 --layout spatial     # one-dimensional kernels

CIFAR networks have their published weights and the mean gradient over IMAGES training images, if CCTORCH_WEIGHTS and
CCTORCH_DATA say where both are; torchvision's have random weights and the gradient of four random images: the time does
not depend on the values, the choices do. OUTPUT/<model>.json (<model>_spatial.json) is written as each ends, and all
of them to OUTPUT/search.md. Exact mode decomposes the weight once for every channel and step, which only the small
networks can afford; --exact asks for it.

    Jaccard    kept channels of both modes over the channels that either keeps, the mean over layers
    rank       mean and largest difference of the ranks where both factor, in units; layers factored by one mode only
"""

import argparse
import json
import math
import os
import platform
import statistics
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from cctorch import _C, collaborative, data
from cctorch.config import load_config
from cctorch.gradients import mean_gradients
from cctorch.graph import trace
from latency_budget import load
from torch import Tensor, nn

CIFAR = ("resnet20", "resnet32", "resnet56")
NETWORKS = (*CIFAR, "resnet18", "resnet50", "mobilenet_v2", "densenet121", "vgg16_features", "vgg16_bn", "vit_b_16")


def cifar(name: str, images: int) -> tuple[nn.Module, Tensor, data.Batches]:
    config = load_config(Path(__file__).parents[1] / "configs" / f"{name}_cifar10.yaml")
    model, loaded = load(config, torch.device("cpu"))
    batches = data.Batches(loaded.train, 250, loaded.mean, loaded.std, True).head(images, 0)
    return model.eval(), next(iter(batches))[0][:1], batches


def torchvision_model(name: str) -> tuple[nn.Module, Tensor, list[tuple[Tensor, Tensor]]]:
    side = 224 if name.startswith("vit") else 96
    if name == "vgg16_features":  # without the classifier of ImageNet, as on CIFAR: one layer there has 103 M weights
        vgg = torchvision.models.vgg16_bn(weights=None)
        model: nn.Module = nn.Sequential(vgg.features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    else:
        model = torchvision.models.get_model(name, weights=None)
        if name.startswith("vit"):  # its head starts with zeros, whatever comes before it
            nn.init.normal_(model.get_submodule("heads.head").weight, std=0.02)
    images = torch.randn(4, 3, side, side)
    return model.eval(), images[:1], [(images, torch.arange(4))]


def differences(fixed: _C.CompressionPlan, exact: _C.CompressionPlan, searched: set[str]) -> dict[str, float]:
    overlaps, ranks, one_sided = [], [], 0
    for ours, reference in zip(fixed.layers, exact.layers, strict=True):
        if ours.name not in searched:
            continue
        kept, expected = set(ours.kept_in), set(reference.kept_in)
        overlaps.append(len(kept & expected) / len(kept | expected))
        if (ours.rank is None) != (reference.rank is None):
            one_sided += 1
        elif ours.rank is not None and reference.rank is not None:
            ranks.append(abs(ours.rank - reference.rank))
    return {
        "jaccard": statistics.mean(overlaps),
        "rank_mean": statistics.mean(ranks) if ranks else 0.0,
        "rank_largest": max(ranks, default=0),
        "factored_by_one": one_sided,
    }


def examine(
    name: str, target: float, images: int, exact: bool, device: torch.device, layout: Literal["channel", "spatial"]
) -> dict[str, Any]:
    torch.manual_seed(0)
    model, example, found_batches = cifar(name, images) if name in CIFAR else torchvision_model(name)
    model, example = model.to(device), example.to(device)
    batches = [(x.to(device), y.to(device)) for x, y in found_batches]
    graph = trace(model, example)
    searched = [spec.name for spec in _C.participants(graph.specs) if spec.name not in graph.left_alone]
    gradients = mean_gradients(model, batches, searched)

    def solve(basis: Literal["exact", "fixed"]) -> collaborative.Compression:
        options = _C.SolverOptions(target=target, basis=basis, layout=layout)
        return collaborative.solve(model, trace(model, example), gradients, options)

    if device.type == "cuda":
        solve("fixed")  # the libraries' start is not the search's time
    found = solve("fixed")
    row: dict[str, Any] = {
        "model": name if layout == "channel" else f"{name}, {layout}",
        "layers": len(gradients),
        "largest": max((list(gradient.shape) for gradient in gradients.values()), key=math.prod),
        "target": target,
        "rate_seconds": found.curve_seconds,
        "heuristic_seconds": found.heuristic_seconds,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    if exact:
        reference = solve("exact")
        row["exact_seconds"] = reference.curve_seconds + reference.heuristic_seconds
        row |= differences(found.plan, reference.plan, set(searched))
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| network | layers | largest | rate s | heuristic s | exact s | Jaccard | rank mean (max) | factored by one |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["model"], row["layers"], "x".join(map(str, row["largest"]))]
        cells += [f"{row['rate_seconds']:.2f}", f"{row['heuristic_seconds']:.2f}"]
        if "jaccard" in row:
            cells += [f"{row['exact_seconds']:.1f}", f"{row['jaccard']:.3f}"]
            cells += [f"{row['rank_mean']:.2f} ({row['rank_largest']})", row["factored_by_one"]]
        else:
            cells += [""] * 4
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS, help=", ".join(NETWORKS))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--target", type=float, default=0.5)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--exact", action="store_true", help="also search in exact mode, and compare")
    parser.add_argument("--layout", choices=("channel", "spatial"), default="channel")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if os.environ.get("MALLOC_TRIM_THRESHOLD_") is None:
        _C.keep_freed_memory()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.networks:
        row = examine(name, arguments.target, arguments.images, arguments.exact, arguments.device, arguments.layout)
        file = row["model"].replace(", ", "_") + ".json"
        (arguments.output / file).write_text(json.dumps(row, indent=1) + "\n")
        print(table([row]).splitlines()[-1], flush=True)
    rows = [json.loads(path.read_text()) for path in sorted(arguments.output.glob("*.json"))]
    (arguments.output / "search.md").write_text(table(rows))


if __name__ == "__main__":
    main()
