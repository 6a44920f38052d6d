"""What a configuration's `compress` section asks for, for the driver's stage and for a sweep."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cctorch import _C, batch_norm, collaborative, data, distributed, layer_choice
from cctorch.apply import apply
from cctorch.config import Compress, ConfigError
from cctorch.gradients import Progress
from cctorch.graph import trace
from cctorch.log import Log
from cctorch.network import Network
from cctorch.repair_stage import repair_network
from cctorch.store import Events, Folder
from cctorch.summary import search_results


def search(
    model: nn.Module,
    images: data.Batches,
    seed: int,
    settings: Compress,
    *,
    target: float | None = None,
    bits: Mapping[str, int] | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> collaborative.Compression:
    """`target` and `gradients` replace those of `settings` and of `images`, the training images.

    Every rank calls it with all the images, and takes its share.
    """
    if settings.gradient_images is not None:
        images = images.head(settings.gradient_images, seed)
    return collaborative.compress(
        model,
        images.block(distributed.rank(), distributed.world_size()),
        next(iter(images))[0][:2],
        target=settings.target if target is None else target,
        units=settings.units,
        layout=settings.layout,
        basis=settings.basis,
        gamma=settings.gamma,
        step_fraction=settings.step_fraction,
        max_rate=settings.max_rate,
        budget=settings.budget,
        count=settings.count,
        multiple=settings.multiple,
        latency_batch=settings.latency_batch,
        residual_branches=settings.residual_branches,
        bits=bits,
        exclude=settings.exclude,
        bounds=settings.bounds,
        gradients=gradients,
        progress=progress,
        across_ranks=True,
    )


@dataclass(frozen=True)
class CompressStage:
    """Search, surgery, BatchNorm statistics and repair of a run's `network`, which is whole on every rank.

    `images` are batches of the training images of `dataset`.
    """

    settings: Compress
    seed: int
    network: Network
    dataset: data.Dataset
    images: data.Batches

    def execute(
        self,
        folder: Folder,
        bits: Mapping[str, int],
        events: Events,
        log: Log,
        results: dict[str, Any],
        dense: Callable[[], nn.Module],
    ) -> _C.CompressionPlan:
        """Adds to `results`; `dense` makes the model that the repair looks up to."""
        model = self.network.model
        with log.stages() as progress:
            found = search(model, self.images, self.seed, self.settings, bits=bits, progress=progress)
        for warning in found.warnings:
            log.warning(warning)
        distributed.on_main(lambda: save(found, folder))
        log.line(
            f"search: gradients {found.gradient_seconds:.1f} s, rate curves {found.curve_seconds:.1f} s, heuristic "
            f"{found.heuristic_seconds:.1f} s; MACs {found.dense_macs / 1e6:.2f} M -> {found.final_macs / 1e6:.2f} M"
        )
        results |= search_results(found)
        self.network.model = self.network.place(apply(model, found.plan, self.network.optimizer))
        self.network.assert_identical("the compressed layers")
        self._reestimate(events, log, results)
        if self.settings.repair:
            images = self.images.head(self.settings.repair_images, self.seed)
            repair_network(self.network, found.plan, dense(), images, self.dataset, "compress", events, log, results)
        return found.plan

    def _reestimate(self, events: Events, log: Log, results: dict[str, Any]) -> None:
        top1 = self.network.accuracy(self.dataset.test)
        events.add("compressed", "compress", accuracy=top1)
        log.line(f"right after compression: test top-1 {top1:.2f} %")
        results |= {"top1_compressed": top1, "top1_reestimated": None}
        if self.settings.bn_reestimate_images:
            images = self.images.head(self.settings.bn_reestimate_images, self.seed)
            slices = images.sliced(distributed.rank(), distributed.world_size())
            batch_norm.reestimate(self.network.model, slices, across_ranks=True)
            top1 = self.network.accuracy(self.dataset.test)
            events.add("reestimated", "compress", accuracy=top1)
            log.line(f"BatchNorm statistics re-estimated: test top-1 {top1:.2f} %")
            results["top1_reestimated"] = top1


def check_names(model: nn.Module, example: Tensor, settings: Compress) -> None:
    """Raises ConfigError where a pattern of ``exclude`` or ``bounds`` fits no layer: before hours of training."""
    graph = trace(model, example)
    try:
        layer_choice.bounds_of(graph, settings.bounds)
        layer_choice.candidates(graph, settings.exclude)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def save(found: collaborative.Compression, folder: Folder) -> None:
    """Plan, gradients and rate curves."""
    folder.write("plan.json", found.plan.to_json())
    folder.save_gradients(found.gradients)
    curves = [
        {key: getattr(curve, key) for key in ("name", "rate", "loss", "a", "b", "allocated")} for curve in found.curves
    ]
    folder.write("curves.json", json.dumps(curves))
