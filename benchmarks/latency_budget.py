"""The same model under a budget of multiply-accumulates and under one of measured latency: time and accuracy.

    python benchmarks/latency_budget.py configs/resnet56_cifar10.yaml [--target 0.4] [--batch 1 128] [--json FILE]

For each batch: the dense model and both plans take turns in one process, and the ratio is the median over their turns.
Top-1 on the test images as published or trained, right after compression, with BatchNorm statistics re-estimated, and
repaired, each on 4,000 training images.
Nothing is fine-tuned.
"""

import argparse
import copy
import json
import os
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cctorch import _C, apply, batch_norm, collaborative, data, measure, models, repair
from cctorch.config import Config, expand, load_config
from cctorch.graph import ModelGraph, trace
from cctorch.latency_budget import table_for
from cctorch.store import Architecture, build
from torch import Tensor, nn


def load(config: Config) -> tuple[nn.Module, data.Data]:
    images = data.load(config.data, config.seed, torch.device("cpu"))
    model = build(Architecture(config.model.name, images.classes, images.shape, images.mean, images.std), None)
    assert config.model.weights, "the configuration must name weights: nothing is trained here"
    models.load_weights(model, expand(config.model.weights))
    return model.to(memory_format=torch.channels_last), images  # type: ignore[call-overload]


def gradients_of(model: nn.Module, graph: ModelGraph, images: data.Batches, file: Path | None) -> dict[str, Tensor]:
    if file is not None and file.exists():
        saved: dict[str, Tensor] = torch.load(file, weights_only=True)
        return saved
    layers = [spec.name for spec in _C.participants(graph.specs) if spec.name not in graph.left_alone]
    gradients = collaborative.mean_gradients(model, images, layers)
    if file is not None:
        torch.save(gradients, file)
    return gradients


def ratios(models: list[nn.Module], example: Tensor, rounds: int) -> tuple[list[float], list[float]]:
    """Median seconds of each model, and the median of its time over the first one's in the same turn."""
    runs: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for total, some in zip(runs, measure.interleaved(models, example, repeats=20, seconds=60), strict=True):
            total += some
    over_first = [statistics.median(a / b for a, b in zip(own, runs[0], strict=True)) for own in runs]
    return [statistics.median(own) for own in runs], over_first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--target", type=float, default=0.4, help="share of the budget to remove")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--images", type=int, default=10_000, help="training images for the mean gradient")
    parser.add_argument("--gradients", type=Path, help="read them from this file, or write them to it")
    parser.add_argument("--rounds", type=int, default=5, help="of 20 turns each")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    config = load_config(arguments.config)
    model, images = load(config)
    batches = data.Batches(images.train, 250, images.mean, images.std, True)
    test = data.Batches(images.test, 500, images.mean, images.std, True)
    examples = next(iter(data.Batches(images.test, max(arguments.batch), images.mean, images.std, True)))[0]
    graph = trace(model, examples[:2])
    gradients = gradients_of(model, graph, batches.head(arguments.images, config.seed), arguments.gradients)

    def compressed(plan: _C.CompressionPlan) -> tuple[nn.Module, float, float, float]:
        smaller = apply(copy.deepcopy(model), plan)
        before = measure.accuracy(smaller, test)
        batch_norm.reestimate(smaller, batches.head(4000, config.seed))
        reestimated = measure.accuracy(smaller, test)
        repair(smaller, model, plan, batches.head(4000, config.seed))
        return smaller, before, reestimated, measure.accuracy(smaller, test)

    rows: list[dict[str, Any]] = [{"plan": "dense", "top1": measure.accuracy(model, test)}]
    print(json.dumps(rows[0]), flush=True)
    options = {"target": arguments.target}
    by_macs = collaborative.solve(model, trace(model, examples[:2]), gradients, _C.SolverOptions(**options))
    macs_model, *macs_top1 = compressed(by_macs.plan)
    for batch in arguments.batch:
        start = time.perf_counter()
        example = examples[:batch].contiguous(memory_format=torch.channels_last)
        row: dict[str, Any] = {"batch": batch, "target": arguments.target, "macs_plan": {"top1": macs_top1}}
        row["macs_plan"]["final_reduction"] = by_macs.final_reduction
        fast: list[nn.Module] = []
        try:
            found = collaborative.solve_latency(
                model,
                trace(model, examples[:2]),
                gradients,
                _C.SolverOptions(**options),
                example,
                table_for(model, example, batch),
            )
        except ValueError as error:
            row["latency_plan"] = {"error": str(error)}
        else:
            assert found.latency is not None
            smaller, *top1 = compressed(found.plan)
            fast.append(smaller)
            counts = {"factored": sum(layer.rank is not None for layer in found.plan.layers)}
            counts["gathers"] = sum(bool(layer.gather) for layer in found.plan.layers)
            row["latency_plan"] = {"top1": top1, "final_reduction": found.final_reduction, **counts}
            row["latency_plan"] |= {"search": asdict(found.latency), "warnings": found.warnings}
        row["search_seconds"] = time.perf_counter() - start
        seconds, over_dense = ratios([model, macs_model, *fast], example, arguments.rounds)
        row |= {"seconds": seconds, "ratio_to_dense": over_dense, "load": os.getloadavg()[0]}
        rows.append(row)
        print(json.dumps(row), flush=True)
    if arguments.json:
        machine = {"threads": torch.get_num_threads(), "torch": torch.__version__}
        arguments.json.write_text(json.dumps({**machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
