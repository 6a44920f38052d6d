"""Which period is best? Accuracy right after the last event, over period and strength of Q, on CIFAR-10.

    CCTORCH_DATA=... CCTORCH_WEIGHTS=... python benchmarks/regularization_sweep.py OUT [--steps 400] [--batch 32]

Every run starts from the published weights, trains for the same number of steps at one cycle of the learning rate (the
first images of an epoch, or as many whole epochs as it takes), ends on an event, and is measured once on the test set.
OUT/runs.jsonl gets a line for each finished run; runs that are in it are not repeated, so the same command goes on
where it stopped, and draws OUT/sweep.svg and OUT/sweep.md anew. Several processes share the work with --part 0/4 to
--part 3/4 and one OUT; the same command without --part then draws.

Schedules are compared at an equal budget: "inverse" has as many events as a constant period, by the mean of the
learning rate, and "adaptive" holds the update per mini-batch that the constant period's runs had on average. "early" is
the constant period with one event more, after the first step, where "adaptive" has its first too.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cctorch import _C, data, datasets, measure, models
from cctorch import regularize as r
from cctorch.config import Data, Training, expand
from cctorch.regularize_stage import located, select
from cctorch.step import make_step
from cctorch.train import learning_rate, make_criterion, make_optimizer, train_epoch
from matplotlib.figure import Figure

WEIGHTS = {"resnet20": "resnet20-12fca82f.th", "resnet32": "resnet32-d509ac18.th"}
# By rising strength.
QUANTITIES: dict[str, dict[str, r.Regularizer]] = {
    "magnitude pruning": {f"{sparsity:.0%}": r.MagnitudePruning(sparsity) for sparsity in (0.6, 0.8, 0.9)},
    "uniform quantization": {f"{bits} bits": r.UniformQuantization(bits) for bits in (4, 3, 2)},
    "SVD": {f"{ratio:g} to 1": r.SVD(ratio=ratio) for ratio in (1.5, 2.0, 4.0)},
    "Tucker-2": {f"{ratio:g} to 1": r.Tucker2(ratio=ratio) for ratio in (1.6, 2.8, 4.3)},
}
SETTING = ("model", "batch", "steps", "lr", "q", "strength", "schedule", "period", "seed")
SCHEDULES = ("constant", "early", "inverse", "adaptive")
Run = dict[str, Any]


def settings(arguments: argparse.Namespace) -> list[Run]:
    """All runs, one seed after the other, so that a sweep that is stopped has seen every setting equally often."""
    every = [
        (arguments.model, batch, arguments.steps, arguments.lr, q, strength, schedule, period, seed)
        for batch in arguments.batches
        for seed in arguments.seeds
        for schedule in arguments.schedules
        for q in arguments.only
        for strength in list(QUANTITIES[q])[-arguments.strengths :]
        for period in arguments.periods
        if period <= arguments.steps
    ]
    return [dict(zip(SETTING, values, strict=True)) for values in every]


def same(run: Run, setting: Run, *but: str) -> bool:
    return all(run[key] == setting[key] for key in SETTING if key not in but)


def make_schedule(setting: Run, training: Training, runs: list[Run]) -> r.FrequencySchedule:
    period, steps = setting["period"], setting["steps"]
    if setting["schedule"] == "constant":
        return r.ConstantPeriod(period)
    if setting["schedule"] == "inverse":
        return r.InverseLearningRate(period * statistics.mean(learning_rate(training, i, steps) for i in range(steps)))
    if setting["schedule"] == "early":
        return r.StepwisePeriod([(0, 1), (2, period)])
    constant = {**setting, "schedule": "constant"}
    updates = [run["update"] for run in runs if same(run, constant, "seed")]
    if not updates:
        raise SystemExit(f"adaptive: the constant period {period} has to run first: --schedules constant adaptive")
    return r.AdaptivePeriod(statistics.mean(updates) / period)


def divided(steps: int, longest: int) -> tuple[int, int]:
    """The fewest epochs of at most `longest` steps that have `steps` together, and the steps of each."""
    epochs = -(-steps // longest)
    if steps % epochs:
        raise SystemExit(f"--steps {steps}: expected a multiple of {epochs}, the epochs that so many steps take")
    return epochs, steps // epochs


def train(setting: Run, images: data.Dataset, runs: list[Run]) -> Run:
    torch.manual_seed(setting["seed"])
    model = models.create(setting["model"])
    models.load_weights(model, expand("${CCTORCH_WEIGHTS}/" + WEIGHTS[setting["model"]]))
    device = images.train.labels.device
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    epochs, steps = divided(setting["steps"], len(images.train) // setting["batch"])
    training = Training(epochs=epochs, batch_size=setting["batch"], lr=setting["lr"], cuda_graphs=device.type == "cuda")
    optimizer = make_optimizer(model, training)
    quantity = QUANTITIES[setting["q"]][setting["strength"]]
    schedule = make_schedule(setting, training, runs)
    events = r.Events(located(model, select(model, None)), quantity, schedule, optimizer)
    updates = []

    def after_step() -> None:
        if event := events.step():
            updates.append(event.relative_update)

    count = steps * setting["batch"]
    batches = data.Batches(images.train, setting["batch"], images.mean, images.std, channels_last=True)
    batches = batches.head(count, setting["seed"])
    step = make_step(model, optimizer, training, make_criterion(training))
    start = time.perf_counter()
    for epoch in range(epochs):
        train_epoch(
            model,
            batches.epoch(setting["seed"], epoch, augment=True),
            optimizer,
            training,
            epoch=epoch,
            steps=steps,
            images=count,
            train_step=step,
            after_step=after_step,
        )
    seconds = time.perf_counter() - start
    if event := events.finish():
        updates.append(event.relative_update)
    test = data.Batches(images.test, 500, images.mean, images.std, channels_last=True)
    top1 = measure.accuracy(model, test)
    return {
        **setting,
        "top1": top1,
        "events": len(updates),
        "update": statistics.mean(updates),
        "seconds": round(seconds, 1),
    }


def read(file: Path) -> list[Run]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def groups(runs: list[Run], schedule: str = "constant") -> Iterator[tuple[int, str, str, dict[int, list[float]]]]:
    """Accuracies by period, of each strength of each Q at each batch size."""
    for batch in sorted({run["batch"] for run in runs}):
        for q, strengths in QUANTITIES.items():
            for strength in strengths:
                by_period: dict[int, list[float]] = defaultdict(list)
                for run in runs:
                    if (run["batch"], run["q"], run["strength"], run["schedule"]) == (batch, q, strength, schedule):
                        by_period[run["period"]].append(run["top1"])
                if by_period:
                    yield batch, q, strength, dict(sorted(by_period.items()))


def draw(runs: list[Run], target: Path) -> None:
    batches = sorted({run["batch"] for run in runs})
    shown = [q for q in QUANTITIES if any(run["q"] == q for run in runs)]
    figure = Figure(figsize=(3.4 * len(shown), 3.2 * len(batches)), layout="constrained")
    panels = figure.subplots(len(batches), len(shown), squeeze=False)
    for batch, q, strength, by_period in groups(runs):
        axes = panels[batches.index(batch)][shown.index(q)]
        means = [statistics.mean(values) for values in by_period.values()]
        spread = [(max(values) - min(values)) / 2 for values in by_period.values()]
        axes.errorbar(list(by_period), means, spread, marker=".", capsize=2, label=strength)
        axes.set_xscale("log")
        axes.set_title(f"{q}, batch {batch}", loc="left", fontsize=10)
        axes.set_xlabel("period pNR")
        axes.set_ylabel("top-1 after the last event, %")
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(target, format="svg", metadata={"Date": None})


def cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def events_of(runs: list[Run], schedule: str, batch: int, q: str, strength: str, period: int) -> str:
    wanted = (schedule, batch, q, strength, period)
    counts = [
        run["events"]
        for run in runs
        if (run["schedule"], run["batch"], run["q"], run["strength"], run["period"]) == wanted
    ]
    return f"{statistics.mean(counts):.3g}"


def table(runs: list[Run]) -> str:
    """Mean and standard deviation over the seeds; in the second table at equal budgets, only where all were run."""
    periods = sorted({run["period"] for run in runs if run["schedule"] == "constant"})
    lines = ["| batch | Q | strength | " + " | ".join(f"pNR {period}" for period in periods) + " | best |"]
    lines.append("|---" * (len(periods) + 4) + "|")
    for batch, q, strength, by_period in groups(runs):
        best = max(by_period, key=lambda period: statistics.mean(by_period[period]))
        cells = " | ".join(cell(by_period.get(period, [])) for period in periods)
        lines.append(f"| {batch} | {q} | {strength} | {cells} | {best} |")
    modulated = [schedule for schedule in SCHEDULES[1:] if any(run["schedule"] == schedule for run in runs)]
    if modulated:
        compared = ["constant", *modulated]
        heads = [f"{schedule} | events" for schedule in compared]
        lines += ["", "| batch | Q | strength | pNR | " + " | ".join(heads) + " |"]
        lines.append("|---" * (2 * len(compared) + 4) + "|")
        others = [{group[:3]: group[3] for group in groups(runs, schedule)} for schedule in modulated]
        for batch, q, strength, by_period in groups(runs):
            for period, values in by_period.items():
                found = [other.get((batch, q, strength), {}).get(period, []) for other in others]
                if all(found):
                    cells = " | ".join(
                        f"{cell(accuracies)} | {events_of(runs, schedule, batch, q, strength, period)}"
                        for schedule, accuracies in zip(compared, [values, *found], strict=True)
                    )
                    lines.append(f"| {batch} | {q} | {strength} | {period} | {cells} |")
    return "\n".join(lines) + "\n"


def part(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not 0 <= int(number) < int(count):
        raise ValueError(text)
    return int(number), int(count)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=WEIGHTS, default="resnet20")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batches", type=int, nargs="+", default=[32], help="batch sizes")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--periods", type=int, nargs="+", default=[1, 10, 50, 200, 1000])
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=["constant"])
    parser.add_argument("--only", nargs="+", choices=QUANTITIES, default=list(QUANTITIES), help="these Q")
    parser.add_argument("--strengths", type=int, default=3, help="how many, from the strongest")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--part", type=part, default=(0, 1), metavar="I/N", help="every N-th run, from number I on")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    _C.keep_freed_memory()
    arguments.out.mkdir(parents=True, exist_ok=True)
    images = datasets.load(Data(kind="cifar10", validation=0), 0, arguments.device)
    file = arguments.out / "runs.jsonl"
    runs = read(file)
    number, count = arguments.part
    wanted = settings(arguments)[number::count]
    missing = [setting for setting in wanted if not any(same(run, setting) for run in runs)]
    for done, setting in enumerate(missing, start=1):
        runs.append(run := train(setting, images, runs))
        with file.open("a") as stream:
            stream.write(json.dumps(run) + "\n")
        about = f"{run['q']} {run['strength']}, {run['schedule']} pNR {run['period']}, batch {run['batch']}"
        print(f"{done}/{len(missing)}  {about}: {run['top1']:.2f} %", flush=True)
    if count > 1:
        return
    comparable = [run for run in runs if all(run[key] == getattr(arguments, key) for key in ("model", "steps", "lr"))]
    draw(comparable, arguments.out / "sweep.svg")
    (arguments.out / "sweep.md").write_text(table(comparable))
    print(table(comparable))


if __name__ == "__main__":
    main()
