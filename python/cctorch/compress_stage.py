"""What a configuration's `compress` section asks for, for the driver's stage and for a sweep."""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch import Tensor, nn

from cctorch import collaborative, data, distributed, layer_choice
from cctorch.config import Compress, ConfigError
from cctorch.gradients import Progress
from cctorch.graph import trace
from cctorch.store import Folder


def search(
    model: nn.Module,
    images: data.Batches,
    seed: int,
    settings: Compress,
    *,
    target: float | None = None,
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
        basis=settings.basis,
        gamma=settings.gamma,
        step_fraction=settings.step_fraction,
        max_rate=settings.max_rate,
        budget=settings.budget,
        count=settings.count,
        multiple=settings.multiple,
        latency_batch=settings.latency_batch,
        residual_branches=settings.residual_branches,
        exclude=settings.exclude,
        bounds=settings.bounds,
        gradients=gradients,
        progress=progress,
        across_ranks=True,
    )


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
