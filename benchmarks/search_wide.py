"""What wide layers lose by being ranked less often: the search with its default effort against one without limit.

    python benchmarks/search_wide.py --output docs/results/search

Layers are made up. "trained": singular values that fall as a power, input channels of uneven size, the gradient a mean
of 64 outer products of rectified inputs and uneven outputs. "random", of the first shape only: weight and gradient are
normal. Both searches are asked for the same share; loss is (E1) of the truncated SVD that each plan leaves, over that
of the search without limit, whose last step of a hundredth of the units may go further than asked. Written to
OUTPUT/wide/wide.json and wide.md.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from cctorch import _C, atomic
from torch import Tensor

SHAPES = {"1024 x 1024": (1024, 1024), "512 x 512 x 3 x 3": (512, 512, 3, 3), "768 x 3072": (768, 3072)}
TARGETS = (0.3, 0.5, 0.65, 0.8)


def trained(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    outputs, channels, kernel = shape[0], shape[1], math.prod(shape[2:])
    inputs, examples = channels * kernel, 64
    u, s, v = torch.linalg.svd(torch.randn(outputs, inputs), full_matrices=False)
    uneven = torch.randn(channels, 1).mul(0.5).exp().expand(-1, kernel).flatten()
    weight = (u * (1 + 20 * torch.arange(len(s)) / len(s)) ** -0.7) @ v * uneven
    seen = torch.randn(examples, inputs).relu() * torch.randn(inputs).mul(0.5).exp()
    errors = torch.randn(examples, outputs) * torch.randn(outputs).mul(0.7).exp() * torch.randn(examples, 1).exp()
    return weight.view(shape), (errors.T @ seen / examples).view(shape)


def random(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return torch.randn(shape), torch.randn(shape)


def loss(weight: Tensor, gradient: Tensor, plan: _C.LayerPlan) -> float:
    remaining = torch.zeros_like(weight)
    remaining[:, plan.kept_in] = weight[:, plan.kept_in]
    if plan.rank is not None:
        first, second = _C.factorize(weight, plan.kept_in, plan.rank)
        remaining[:, plan.kept_in] = (second.flatten(1) @ first.flatten(1)).view(len(weight), -1, *weight.shape[2:])
    return (gradient * (remaining - weight)).square().sum().item()


def compare(kind: str, name: str) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    shape = SHAPES[name]
    weight, gradient = {"trained": trained, "random": random}[kind](shape)
    spec = _C.LayerSpec("layer", "conv2d" if len(shape) == 4 else "linear", shape[1], shape[0], *(shape[2:] or (1, 1)))
    layer = _C.SolverLayer(spec, weight, gradient)
    efforts = (_C.SolverOptions().effort, math.inf)
    searches = [_C.Search([layer], spec.macs, _C.SolverOptions(target=max(TARGETS), effort=e)) for e in efforts]
    rows = []
    for target in TARGETS:
        plans = [search.at(target).plan.layers[0] for search in searches]
        kept = [set(plan.kept_in) for plan in plans]
        losses = [loss(weight.double(), gradient.double(), plan) for plan in plans]
        rows.append(
            {
                "layer": f"{name}, {kind}",
                "target": target,
                "channels": [len(channels) for channels in kept],
                "ranks": [plan.rank for plan in plans],
                "removed": [1 - _C.layer_macs(spec, plan, False) / spec.macs for plan in plans],
                "jaccard": len(kept[0] & kept[1]) / len(kept[0] | kept[1]),
                "loss": losses[0] / losses[1],
                "curve": [(curve.a, curve.b) for curve in (search.at(target).curves[0] for search in searches)],
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| layer | target | channels | rank | removed | Jaccard | loss, ratio | b of the curve |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def pair(values: list[Any], form: str) -> str:
        return " / ".join("" if value is None else format(value, form) for value in values)

    for row in rows:
        cells = [row["layer"], row["target"], pair(row["channels"], "d"), pair(row["ranks"], "d")]
        cells += [pair(row["removed"], ".2%"), f"{row['jaccard']:.3f}", f"{row['loss']:.3f}"]
        cells.append(pair([b for _, b in row["curve"]], ".2f"))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for kind, name in [*(("trained", name) for name in SHAPES), ("random", next(iter(SHAPES)))]:
        rows += compare(kind, name)
        print(table(rows[-len(TARGETS) :]), flush=True)
    folder = arguments.output / "wide"
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write(folder / "wide.json", json.dumps(rows, indent=1).encode())
    atomic.write(folder / "wide.md", table(rows).encode())


if __name__ == "__main__":
    main()
