"""The same model under a budget of multiply-accumulates and under one of measured latency: time and accuracy.

    pip install torch-pruning==1.6.1
    python benchmarks/latency_budget.py configs/resnet56_cifar10.yaml [--target 0.4] [--batch 1 128] [--json FILE]
    python benchmarks/latency_budget.py --random resnet50 [--batch 1 32] [--device cuda]

For each batch the dense model, both plans and torch-pruning's models of the ratios that bring them closest to the time
asked for take turns in one process, and the ratio is the median over their turns. Top-1 on the test images right after
compression, with BatchNorm statistics re-estimated, and (plans) repaired, each on 4,000 training images. Nothing is
fine-tuned. A network of torchvision's with random weights has times only. Freed memory is kept, as `cctorch run` does.
--layout spatial: what both plans factor becomes one-dimensional kernels.
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
import torchvision
from cctorch import _C, apply, batch_norm, collaborative, data, datasets, measure, models, repair
from cctorch.config import Config, expand, load_config
from cctorch.gradients import mean_gradients
from cctorch.graph import ModelGraph, trace
from cctorch.importance import Head, importances
from cctorch.latency_budget import table_for
from cctorch.store import Architecture, build
from torch import Tensor, nn
from torch_pruning_peer import IMPORTANCES, TorchPruning

Row = dict[str, Any]


def load(config: Config, device: torch.device) -> tuple[nn.Module, data.Dataset]:
    images = datasets.load(config.data, config.seed, device)
    model = build(Architecture(config.model.name, images.classes, images.shape, images.mean, images.std), None)
    assert config.model.weights, "the configuration must name weights: nothing is trained here"
    models.load_weights(model, expand(config.model.weights))
    return model.to(device, memory_format=torch.channels_last), images  # type: ignore[call-overload]


def gradients_of(model: nn.Module, graph: ModelGraph, images: data.Batches, file: Path | None) -> dict[str, Tensor]:
    if file is not None and file.exists():
        saved: dict[str, Tensor] = torch.load(file, weights_only=True)
        return saved
    layers = [spec.name for spec in _C.participants(graph.specs) if spec.name not in graph.left_alone]
    gradients = mean_gradients(model, images, layers)
    if file is not None:
        torch.save(gradients, file)
    return gradients


def ratios(
    models: list[nn.Module], example: Tensor, rounds: int, limit: float = 60.0
) -> tuple[list[float], list[float]]:
    """Median seconds of each model, and the median of its time over the first one's in the same turn. A round ends
    after `limit` seconds, once each model had 5 turns."""
    runs: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for total, some in zip(runs, measure.interleaved(models, example, repeats=20, seconds=limit), strict=True):
            total += some
    over_first = [statistics.median(a / b for a, b in zip(own, runs[0], strict=True)) for own in runs]
    return [statistics.median(own) for own in runs], over_first


class Budgets:
    """One model with published weights and its images, or a random one of torchvision's, of which only times count."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.target, self.layout = arguments.target, arguments.layout
        self.peers = () if arguments.no_peer else IMPORTANCES
        self.test: data.Batches | None = None
        largest = max(arguments.batch)
        if arguments.random:
            self.model, self.seed = random_model(arguments.random).to(arguments.device), 0
            self.examples = torch.randn(largest, 3, arguments.side, arguments.side, device=arguments.device)
            training: Any = [(self.examples[:4], torch.arange(4, device=arguments.device)[:largest])]
        else:
            config = load_config(arguments.config)
            self.model, images = load(config, arguments.device)
            self.seed = config.seed
            self.batches = data.Batches(images.train, 250, images.mean, images.std, True)
            self.test = data.Batches(images.test, 500, images.mean, images.std, True)
            self.examples = next(iter(data.Batches(images.test, largest, images.mean, images.std, True)))[0]
            training = self.batches.head(arguments.images, config.seed)
        self.model.eval()
        self.gradients = gradients_of(self.model, self.graph(), training, arguments.gradients)
        self.importance = None
        if not arguments.keep_branches:
            head = Head(training).read()
            self.importance = importances(self.model, head, self.graph().ends(self.gradients))
        self.peer = TorchPruning(self.model, self.examples[:2], training)
        found = collaborative.solve(self.model, self.graph(), self.gradients, self.options())
        self.by_macs = self.carried_out(found)

    def options(self) -> _C.SolverOptions:
        return _C.SolverOptions(target=self.target, layout=self.layout)

    def graph(self) -> ModelGraph:
        return trace(self.model, self.examples[:2])

    def top1(self, model: nn.Module) -> float | None:
        return measure.accuracy(model, self.test) if self.test else None

    def carried_out(self, found: collaborative.Compression) -> tuple[nn.Module, Row]:
        model = apply(copy.deepcopy(self.model), found.plan)
        row: Row = {"final_reduction": found.final_reduction, **self.reestimated(model)}
        row["constants"] = sum(not layer.kept_in and bool(layer.kept_out) for layer in found.plan.layers)
        row["factored"] = sum(layer.rank is not None for layer in found.plan.layers)
        row["gathers"] = sum(bool(layer.gather) for layer in found.plan.layers)
        if self.test:
            repair(model, self.model, found.plan, self.batches.head(4000, self.seed))
            row["top1_repaired"] = self.top1(model)
        return model, row

    def reestimated(self, model: nn.Module) -> Row:
        row: Row = {"top1_compressed": self.top1(model)}
        if self.test:
            batch_norm.reestimate(model, self.batches.head(4000, self.seed))
        return row | {"top1_reestimated": self.top1(model)}

    def by_latency(self, example: Tensor) -> tuple[nn.Module | None, Row]:
        try:
            found = collaborative.solve_latency(
                self.model,
                self.graph(),
                self.gradients,
                self.options(),
                example,
                table_for(self.model, example, len(example)),
                importance=self.importance,
            )
        except ValueError as error:
            return None, {"error": str(error)}
        assert found.latency is not None
        model, row = self.carried_out(found)
        return model, row | {"search": asdict(found.latency), "warnings": found.warnings}

    def by_peer(self, importance: str, example: Tensor) -> tuple[nn.Module, Row]:
        def time_of(model: nn.Module) -> float:
            return ratios([self.model, model], example, rounds=1, limit=5.0)[1][1]

        model, ratio = self.peer.closest(importance, time_of, 1 - self.target, steps=7)
        macs = _C.dense_macs(trace(model, self.examples[:2]).specs) / _C.dense_macs(self.graph().specs)
        return model, {"ratio": ratio, "final_reduction": 1 - macs, **self.reestimated(model)}

    def rows(self, batch: int, rounds: int) -> list[Row]:
        example = self.examples[:batch].contiguous(memory_format=torch.channels_last)
        start = time.perf_counter()
        fast, by_latency = self.by_latency(example)
        by_latency["search_seconds"] = time.perf_counter() - start
        rows: list[Row] = [{"plan": "dense", "top1_compressed": self.top1(self.model)}]
        rows.append({"plan": "MACs", **self.by_macs[1]})
        timed = [self.model, self.by_macs[0]]
        if fast is not None:
            rows.append({"plan": "latency", **by_latency})
            timed.append(fast)
        for importance in self.peers:
            model, row = self.by_peer(importance, example)
            rows.append({"plan": f"torch-pruning, {importance}", **row})
            timed.append(model)
        for row, seconds, ratio in zip(rows, *ratios(timed, example, rounds), strict=True):
            row |= {"batch": batch, "seconds": seconds, "ratio_to_dense": ratio, "load": os.getloadavg()[0]}
        return rows if fast is not None else [*rows, {"plan": "latency", "batch": batch, **by_latency}]


def random_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name, weights=None)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def table(rows: list[Row]) -> str:
    text = "| batch | plan | time, of dense | ms | MACs removed | right after | BatchNorm re-estimated | repaired |\n"
    text += "|---|---|---|---|---|---|---|---|\n"
    for row in rows:
        if "error" in row:
            text += f"| {row['batch']} | {row['plan']} | {row['error']} | | | | | |\n"
            continue
        top1 = [row.get(f"top1_{kind}") for kind in ("compressed", "reestimated", "repaired")]
        cells = [f"{row['batch']} | {row['plan']} | {row['ratio_to_dense']:.3f} | {row['seconds'] * 1e3:.2f}"]
        cells += [f"{row['final_reduction']:.1%}" if "final_reduction" in row else ""]
        cells += ["" if percent is None else f"{percent:.2f} %" for percent in top1]
        text += f"| {' | '.join(cells)} |\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?")
    parser.add_argument("--random", metavar="NAME", help="a network of torchvision's instead of a configuration")
    parser.add_argument("--side", type=int, default=224, help="of its images")
    parser.add_argument("--target", type=float, default=0.4, help="share of the budget to remove")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--images", type=int, default=10_000, help="training images for the mean gradient")
    parser.add_argument("--keep-branches", action="store_true", help="no whole residual branch is removed")
    parser.add_argument("--layout", choices=("channel", "spatial"), default="channel", help="of our factors")
    parser.add_argument("--no-peer", action="store_true", help="without torch-pruning")
    parser.add_argument("--gradients", type=Path, help="read them from this file, or write them to it")
    parser.add_argument("--rounds", type=int, default=5, help="of 20 turns each")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if bool(arguments.config) == bool(arguments.random):
        parser.error("expected a configuration or --random, one of both")
    _C.keep_freed_memory()
    budgets = Budgets(arguments)
    rows: list[Row] = []
    for batch in arguments.batch:
        rows += budgets.rows(batch, arguments.rounds)
        print(table(rows), flush=True)
        if arguments.json:
            machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "target": arguments.target}
            machine["device"] = torch.cuda.get_device_name() if arguments.device.type == "cuda" else "cpu"
            arguments.json.write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
