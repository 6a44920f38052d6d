"""The closed-form repair of a run's network, after what has made its layers smaller."""

from __future__ import annotations

from typing import Any

from torch import nn

from cctorch import _C, data, distributed
from cctorch.log import Log
from cctorch.network import Network
from cctorch.repair import repair
from cctorch.store import Events


def repair_network(
    network: Network,
    plan: _C.CompressionPlan,
    dense: nn.Module,
    images: data.Batches,
    dataset: data.Dataset,
    stage: str,
    events: Events,
    log: Log,
    results: dict[str, Any],
) -> float:
    """Fits the network, whole on every rank, to `dense` on its share of `images`. Returns top-1."""
    batches = images.block(distributed.rank(), distributed.world_size())
    with log.stages() as progress:
        done = repair(network.model, dense, plan, batches, progress=progress, across_ranks=True)
    for warning in done.warnings:
        log.warning(warning)
    top1 = network.accuracy(dataset.test)
    events.add("repaired", stage, accuracy=top1, seconds=done.seconds)
    log.line(f"weights fitted to the dense model's outputs in {done.seconds:.1f} s: test top-1 {top1:.2f} %")
    results |= {"top1_repaired": top1, "repair_seconds": done.seconds}
    return top1
