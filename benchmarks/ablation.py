"""What each ingredient of Collaborative Compression gives before any fine-tuning, and torch-pruning at the same MACs.

    pip install torch-pruning==1.6.1
    python benchmarks/ablation.py configs/resnet56_cifar10.yaml --target 0.5 --output docs/results/ablation

Needs CCTORCH_DATA and CCTORCH_WEIGHTS. Every row is the published network, compressed once; top-1 on the test images
right after compression, with BatchNorm re-estimated and repaired, each of both on 4,000 training images. Rows:

    collaborative       the method: rates by the fitted curves, channels and singular values, gamma = 0.9
    exact basis         the same with an eigenproblem for each candidate channel
    gamma = 0           units ranked by their own loss only
    uniform rates       the same share of every layer, instead of the fitted curves
    channels only, singular values only
    spatial             factored convolutions as 1 x k and k x 1 instead of k x k and 1 x 1
    spatial, singular values only
    torch-pruning       global magnitude (group norm) and Taylor (one pass over as many images), at the ratio that
                        brings it closest to the first row's MACs; torch_pruning_peer.py says what it may prune

A row is written to OUTPUT/<network>.json as it comes. Rows that are there are not computed again.
"""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cctorch import _C, apply, batch_norm, collaborative, data, measure, repair
from cctorch.config import load_config
from cctorch.graph import trace
from latency_budget import gradients_of, load
from torch import nn
from torch_pruning_peer import IMPORTANCES, TorchPruning

SEARCHES: dict[str, dict[str, Any]] = {
    "collaborative": {},
    "exact basis": {"basis": "exact"},
    "gamma = 0": {"gamma": 0.0},
    "channels only": {"units": "channels"},
    "singular values only": {"units": "singular_values"},
    "spatial": {"layout": "spatial"},
    "spatial, singular values only": {"layout": "spatial", "units": "singular_values"},
}
PEERS = {f"torch-pruning, {importance}": importance for importance in IMPORTANCES}
ROWS = (*SEARCHES, "uniform rates", *PEERS)


class Ablation:
    def __init__(self, arguments: argparse.Namespace) -> None:
        config = load_config(arguments.config)
        self.model, images = load(config, torch.device("cpu"))
        self.model.eval()
        self.training = data.Batches(images.train, 250, images.mean, images.std, True)
        self.test = data.Batches(images.test, 500, images.mean, images.std, True)
        self.example = next(iter(self.training))[0][:2]
        self.seed, self.target, self.count = config.seed, arguments.target, arguments.count
        self.gradient_images = self.training.head(arguments.images, self.seed)
        graph = trace(self.model, self.example)
        self.macs = _C.dense_macs(graph.specs)
        self.gradients = gradients_of(self.model, graph, self.gradient_images, arguments.gradients)
        self.peer = TorchPruning(self.model, self.example, self.gradient_images)

    def row(self, name: str, macs: float | None) -> dict[str, Any]:
        if name in PEERS:
            assert macs is not None
            model, ratio = self.peer.closest(PEERS[name], self.counted, macs)
            return {"name": name, "ratio": ratio, **self.figures(model, None, self.counted(model))}
        if name == "uniform rates":
            plan, final = self.uniform()
        else:
            found = collaborative.solve(
                self.model,
                trace(self.model, self.example),
                self.gradients,
                _C.SolverOptions(target=self.target, **SEARCHES[name]),
                count=self.count,
            )
            plan, final = found.plan, found.final_macs
        return {"name": name, **self.figures(apply(copy.deepcopy(self.model), plan), plan, final)}

    def figures(self, model: nn.Module, plan: _C.CompressionPlan | None, macs: float) -> dict[str, Any]:
        """Of our plans and of torch-pruning's models, by the same code as far as both go."""
        row: dict[str, Any] = {"macs": macs, "macs_left": macs / self.macs, "parameters": measure.parameters(model)}
        row["top1_compressed"] = measure.accuracy(model, self.test)
        repaired = copy.deepcopy(model)
        batch_norm.reestimate(model, self.some())
        row["top1_reestimated"] = measure.accuracy(model, self.test)
        if plan is not None:
            row["repair_seconds"] = repair(repaired, self.model, plan, self.some()).seconds
            row["top1_repaired"] = measure.accuracy(repaired, self.test)
        return row

    def some(self) -> data.Batches:
        return self.training.head(4000, self.seed)

    def uniform(self) -> tuple[_C.CompressionPlan, int]:
        searched = sum(spec.macs for spec in trace(self.model, self.example).specs if spec.name in self.gradients)
        rate = self.target * self.macs / searched
        if self.count == "nominal":
            return self.at_rate(rate)
        low, high = 0.0, rate  # dead filters only add to what is removed
        for _ in range(9):
            rate = (low + high) / 2
            plan, final = self.at_rate(rate)
            low, high = (low, rate) if final < (1 - self.target) * self.macs else (rate, high)
        return plan, final

    def at_rate(self, rate: float) -> tuple[_C.CompressionPlan, int]:
        graph = trace(self.model, self.example)
        weights = dict(self.model.named_parameters())
        plan = _C.CompressionPlan()
        plan.method, plan.target = "uniform", self.target
        layers = []
        for spec in graph.specs:
            if spec.name in self.gradients:
                layer = _C.SolverLayer(spec, weights[f"{spec.name}.weight"].detach(), self.gradients[spec.name])
                layers += _C.solve([layer], spec.macs, _C.SolverOptions(target=rate), None).plan.layers
        plan.layers = layers
        graph.channels.resolve(plan)
        _C.drop_idle_ranks(graph.specs, plan)
        return plan, _C.final_macs(graph.specs, plan)

    def counted(self, model: nn.Module) -> int:
        return _C.dense_macs(trace(model, self.example).specs)


def table(rows: list[dict[str, Any]]) -> str:
    text = "| | MACs left | parameters | right after | BatchNorm re-estimated | repaired |\n|---|---|---|---|---|---|\n"
    percent: Callable[[float | None], str] = lambda top1: "" if top1 is None else f"{top1:.2f} %"  # noqa: E731
    for row in rows:
        top1 = [percent(row.get(f"top1_{kind}")) for kind in ("compressed", "reestimated", "repaired")]
        cells = [row["name"], f"{row['macs_left']:.1%}", f"{row['parameters'] / 1e6:.3f} M", *top1]
        text += f"| {' | '.join(cells)} |\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--target", type=float, default=0.5)
    parser.add_argument("--count", choices=("final", "nominal"), default="final", help="MACs that the target counts")
    parser.add_argument("--images", type=int, default=10_000, help="training images for the gradients")
    parser.add_argument("--gradients", type=Path, help="read them from this file, or write them to it")
    parser.add_argument("--rows", nargs="+", default=ROWS, help=f"default: {', '.join(ROWS)}")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / f"{Path(arguments.config).stem}.json"
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": []}
    record |= {"target": arguments.target, "count": arguments.count, "gradient_images": arguments.images}
    record["threads"] = torch.get_num_threads()
    ablation = Ablation(arguments)
    for name in arguments.rows:
        rows = {row["name"]: row for row in record["rows"]}
        if name not in rows:
            record["rows"].append(ablation.row(name, rows.get("collaborative", {}).get("macs")))
            file.write_text(json.dumps(record, indent=1) + "\n")
            print(table(record["rows"][-1:]).splitlines()[-1], flush=True)
    print(table(record["rows"]))


if __name__ == "__main__":
    main()
