"""Which period is best? Accuracy right after the last event, over period and strength of Q, on CIFAR-10.

    CCTORCH_DATA=... CCTORCH_WEIGHTS=... python benchmarks/regularization_sweep.py OUT [--steps 400] [--batch 32]

Every run starts from the published weights, trains for the same number of steps at one cycle of the learning rate, ends
on an event, and is measured once on the test set. OUT/runs.jsonl gets a line for each finished run; runs that are in it
are not repeated, so the same command goes on where it stopped, and redraws OUT/sweep.svg and OUT/sweep.md.
"""

import argparse
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cctorch import _C, data, measure, models
from cctorch import regularize as r
from cctorch.config import Data, Training, expand
from cctorch.regularize_stage import located, select
from cctorch.train import make_optimizer, train_epoch
from matplotlib.figure import Figure

WEIGHTS = {"resnet20": "resnet20-12fca82f.th", "resnet32": "resnet32-d509ac18.th"}
# By rising strength.
QUANTITIES: dict[str, dict[str, r.Regularizer]] = {
    "magnitude pruning": {f"{sparsity:.0%}": r.MagnitudePruning(sparsity) for sparsity in (0.6, 0.8, 0.9)},
    "uniform quantization": {f"{bits} bits": r.UniformQuantization(bits) for bits in (4, 3, 2)},
    "SVD": {f"{ratio:g} to 1": r.SVD(ratio=ratio) for ratio in (1.5, 2.0, 4.0)},
    "Tucker-2": {f"{ratio:g} to 1": r.Tucker2(ratio=ratio) for ratio in (1.6, 2.8, 4.3)},
}


def settings(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs, one seed after the other, so that a sweep that is stopped has seen every setting equally often."""
    return [
        {
            "q": q,
            "strength": strength,
            "period": period,
            "seed": seed,
            "batch": arguments.batch,
            "steps": arguments.steps,
            "lr": arguments.lr,
            "model": arguments.model,
        }
        for seed in range(arguments.seeds)
        for q, strengths in QUANTITIES.items()
        for strength in strengths
        for period in arguments.periods
        if period <= arguments.steps
    ]


def train(setting: dict[str, Any], images: data.Dataset) -> dict[str, Any]:
    torch.manual_seed(setting["seed"])
    model = models.create(setting["model"])
    models.load_weights(model, expand("${CCTORCH_WEIGHTS}/" + WEIGHTS[setting["model"]]))
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    training = Training(epochs=1, batch_size=setting["batch"], lr=setting["lr"])
    optimizer = make_optimizer(model, training)
    quantity = QUANTITIES[setting["q"]][setting["strength"]]
    events = r.Events(located(model, select(model, None)), quantity, setting["period"], optimizer)
    trace = []

    def after_step() -> None:
        if event := events.step():
            trace.append(event.relative_update)

    count = setting["steps"] * setting["batch"]
    batches = data.Batches(images.train, setting["batch"], images.mean, images.std, channels_last=True)
    start = time.perf_counter()
    train_epoch(
        model,
        batches.head(count, setting["seed"]).epoch(setting["seed"], 0, augment=True),
        optimizer,
        training,
        epoch=0,
        steps=setting["steps"],
        images=count,
        after_step=after_step,
    )
    seconds = time.perf_counter() - start
    if event := events.finish():
        trace.append(event.relative_update)
    top1 = measure.accuracy(model, data.Batches(images.test, 500, images.mean, images.std, channels_last=True))
    update = statistics.mean(trace)
    return {**setting, "top1": top1, "events": len(trace), "update": update, "seconds": round(seconds, 1)}


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def groups(runs: list[dict[str, Any]]) -> Iterator[tuple[str, str, dict[int, list[float]]]]:
    """Accuracies by period, of each strength of each Q."""
    for q, strengths in QUANTITIES.items():
        for strength in strengths:
            by_period: dict[int, list[float]] = defaultdict(list)
            for run in runs:
                if (run["q"], run["strength"]) == (q, strength):
                    by_period[run["period"]].append(run["top1"])
            if by_period:
                yield q, strength, dict(sorted(by_period.items()))


def draw(runs: list[dict[str, Any]], target: Path) -> None:
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    for axes, q in zip(figure.subplots(2, 2).flat, QUANTITIES, strict=True):
        for name, strength, by_period in groups(runs):
            if name == q:
                means = [statistics.mean(values) for values in by_period.values()]
                spread = [max(values) - min(values) for values in by_period.values()]
                axes.errorbar(list(by_period), means, [s / 2 for s in spread], marker=".", capsize=2, label=strength)
        axes.set_xscale("log")
        axes.set_title(q, loc="left", fontsize=10)
        axes.set_xlabel("period pNR")
        axes.set_ylabel("top-1 after the last event, %")
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(target, format="svg", metadata={"Date": None})


def table(runs: list[dict[str, Any]]) -> str:
    periods = sorted({run["period"] for run in runs})
    lines = ["| Q | strength | " + " | ".join(f"pNR {period}" for period in periods) + " | best |"]
    lines.append("|---" * (len(periods) + 3) + "|")
    for q, strength, by_period in groups(runs):
        means = {period: statistics.mean(values) for period, values in by_period.items()}
        cells = []
        for period in periods:
            values = by_period.get(period, [])
            deviation = statistics.stdev(values) if len(values) > 1 else math.nan
            spread = "" if math.isnan(deviation) else f" ± {deviation:.2f}"
            cells.append(f"{means[period]:.2f}{spread}" if values else "")
        lines.append(f"| {q} | {strength} | {' | '.join(cells)} | {max(means, key=lambda p: means[p])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=WEIGHTS, default="resnet20")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--periods", type=int, nargs="+", default=[1, 10, 50, 200, 1000])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    _C.keep_freed_memory()
    arguments.out.mkdir(parents=True, exist_ok=True)
    images = data.load(Data(kind="cifar10", validation=0), seed=0)
    file = arguments.out / "runs.jsonl"
    keys = ("q", "strength", "period", "seed", "batch", "steps", "lr", "model")
    done = {tuple(run[key] for key in keys) for run in read(file)}
    open_settings = [s for s in settings(arguments) if tuple(s[key] for key in keys) not in done]
    for number, setting in enumerate(open_settings, start=1):
        run = train(setting, images)
        with file.open("a") as stream:
            stream.write(json.dumps(run) + "\n")
        print(f"{number}/{len(open_settings)}  {run['q']} {run['strength']}, pNR {run['period']}: {run['top1']:.2f} %")
    runs = [run for run in read(file) if (run["batch"], run["steps"]) == (arguments.batch, arguments.steps)]
    draw(runs, arguments.out / "sweep.svg")
    (arguments.out / "sweep.md").write_text(table(runs))
    print(table(runs))


if __name__ == "__main__":
    main()
