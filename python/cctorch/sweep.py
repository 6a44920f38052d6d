"""The trade-off curve of a network: a run's dense model, compressed to several targets from one search.

    points = sweep(Path("runs/demo"), [0.3, 0.5, 0.7])

Nothing is fine-tuned. The points land in the run's sweep.json, and in its report.
"""

from __future__ import annotations

import copy
import json
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import nn

from cctorch import batch_norm, compress_stage, data, datasets, measure, quantize_stage, report
from cctorch.apply import apply
from cctorch.collaborative import Compression
from cctorch.config import Compress, Config, ConfigError, load_config
from cctorch.device import describe, set_up
from cctorch.log import Log
from cctorch.repair import repair
from cctorch.store import Folder, load_model
from cctorch.summary import Point


def sweep(folder: Path, targets: Sequence[float], *, console: Console | None = None) -> list[Point]:
    """Adds a point for each of `targets` to those that the run in `folder` has, and returns them all by target.

    Accuracy is that on the validation images, since a target is chosen by it, or on the test images where no image was
    held out. Point 0 is the dense model.

    Raises ValueError where `folder` holds no finished run of Collaborative Compression, or for a target that is not
    between 0 and 1 or cannot be reached: the points before it are kept and shown.
    """
    for target in targets:
        if not 0 < target < 1:
            raise ConfigError(f"sweep: target = {target:g}, expected above 0 and below 1")
    report.read(folder)
    config = load_config(folder / "config.yaml")
    if config.compress is None:
        raise ConfigError(f"sweep: {folder} has compress: null, expected a run of Collaborative Compression")
    store = Folder(folder)
    with store.locked(), Log(folder / "run.log", console) as log, warnings.catch_warnings():
        warnings.showwarning = log.show_warning
        try:
            _Sweep(config, config.compress, store, log).extend(sorted(set(targets)))
        finally:
            points = report.read(folder).sweep
            if points:
                log.table(_table(points))
                report.write(folder)
    return points


class _Sweep:
    def __init__(self, config: Config, settings: Compress, folder: Folder, log: Log) -> None:
        self.config, self.settings, self.folder, self.log = config, settings, folder, log
        device = set_up(config)
        self.device = describe(device)
        self.data = datasets.load(config.data, config.seed, device)
        self.feed = data.Feed(self.data, config.train.channels_last)
        self.dense = self.feed.place(load_model(folder.dense)[0], device)
        self.bits: dict[str, int] = {}
        if config.quantize:
            plan, _ = quantize_stage.planned(self.dense, self.feed.example(2).to(device), config.quantize)
            self.bits = quantize_stage.bits_of(plan)
        self.images = "validation" if len(self.data.validation) else "test"
        self.gradients, damaged = folder.load_gradients()
        if damaged:
            log.warning(f"{damaged}; computing the gradients again")

    def extend(self, targets: Sequence[float]) -> None:
        """Adds the points that are missing, in ascending order."""
        points = {point.target: point for point in report.read(self.folder.path).sweep}

        def add(point: Point) -> None:
            points[point.target] = point
            ordered = [points[key] for key in sorted(points)]
            self.folder.write("sweep.json", json.dumps([asdict(point) for point in ordered], indent=1))

        if 0.0 not in points:
            add(self._dense())
        missing = [target for target in targets if target not in points]
        if self.settings.budget == "latency":
            for target in missing:
                add(self._point(target, self._search(target)))
            return
        highest, failure = self._highest(missing)
        for target in missing:
            if highest is not None and target <= highest.plan.target:
                add(self._point(target, highest.at(target)))
        if failure is not None:
            raise failure

    def _highest(self, targets: Sequence[float]) -> tuple[Compression | None, ValueError | None]:
        """One search for all targets within reach; and why the lowest of the others is out of reach."""
        failure = None
        for target in reversed(targets):
            try:
                return self._search(target), failure
            except ValueError as error:
                failure = error
        return None, failure

    def _search(self, target: float) -> Compression:
        images = self.feed.batches(self.data.train, self.config.train.batch_size)
        with self.log.stages() as progress:
            found = compress_stage.search(
                self.dense,
                images,
                self.config.seed,
                self.settings,
                target=target,
                bits=self.bits,
                gradients=self.gradients,
                progress=progress,
            )
        if self.gradients is None:
            self.folder.save_gradients(found.gradients)
            self.gradients = found.gradients
        return found

    def _training(self, count: int) -> data.Batches:
        return self.feed.batches(self.data.train, self.config.train.batch_size).head(count, self.config.seed)

    def _accuracy(self, model: nn.Module) -> float:
        held_out = self.data.validation if self.images == "validation" else self.data.test
        return measure.accuracy(model, self.feed.batches(held_out, 500))

    def _latency(self, model: nn.Module) -> dict[str, tuple[float, float]]:
        settings = self.config.measure
        times = {}
        for size in settings.batch_sizes:
            both = [model.eval(), self.dense.eval()]
            own, dense = measure.interleaved(both, self.feed.example(size), repeats=settings.repeats)
            times[str(size)] = (statistics.median(own), statistics.median(dense))
        return times

    def _dense(self) -> Point:
        macs = report.read(self.folder.path).summary["before"]["macs"]
        top1 = self._accuracy(self.dense)
        return Point(
            0.0,
            macs,
            measure.parameters(self.dense),
            self._latency(self.dense),
            top1,
            top1 if self.settings.bn_reestimate_images else None,
            top1 if self.settings.repair else None,
            self.images,
            self.device,
        )

    def _point(self, target: float, found: Compression) -> Point:
        for warning in found.warnings:
            self.log.warning(warning)
        model = apply(copy.deepcopy(self.dense), found.plan)
        compressed = self._accuracy(model)
        # Repair rewrites the statistics: it does not depend on whether they were re-estimated before.
        repaired = copy.deepcopy(model)
        reestimated = top1 = None
        if self.settings.bn_reestimate_images:
            batch_norm.reestimate(model, self._training(self.settings.bn_reestimate_images))
            reestimated = self._accuracy(model)
        if self.settings.repair:
            with self.log.stages() as progress:
                repair(repaired, self.dense, found.plan, self._training(self.settings.repair_images), progress=progress)
            top1 = self._accuracy(repaired)
        point = Point(
            target,
            found.final_macs,
            measure.parameters(model),
            self._latency(model),
            compressed,
            reestimated,
            top1,
            self.images,
            self.device,
        )
        best = next(value for value in (top1, reestimated, compressed) if value is not None)
        self.log.line(f"target {target:g}: {found.final_reduction:.1%} of the MACs removed, top-1 {best:.2f} %")
        return point


def _table(points: Sequence[Point]) -> Table:
    table = Table(
        title=f"trade-off, top-1 on the {points[0].images} images, not fine-tuned; times over the dense model's",
        title_justify="left",
    )
    batches = list(points[0].latency)
    for heading in ("target", "MACs", "parameters", *(f"batch {batch}" for batch in batches)):
        table.add_column(heading, justify="right")
    for heading in ("compressed", "re-estimated", "repaired"):
        table.add_column(heading, justify="right")
    for point in points:
        top1 = (point.top1_compressed, point.top1_reestimated, point.top1_repaired)
        table.add_row(
            f"{point.target:g}",
            f"{point.macs / 1e6:.2f} M",
            f"{point.parameters / 1e6:.3f} M",
            *(f"{own / dense:.3f}" for own, dense in point.latency.values()),
            *("" if value is None else f"{value:.2f} %" for value in top1),
        )
    return table
