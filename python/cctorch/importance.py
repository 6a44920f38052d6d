"""How much a network needs a layer: what its loss does without it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import length_hint

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cctorch import distributed
from cctorch.branches import replaced
from cctorch.graph import ModelGraph
from cctorch.modes import evaluating
from cctorch.pairs import pairs

__all__ = ["IMAGES", "Head", "importances", "layer_importances"]

IMAGES = 256
# Removals that seem to do no harm are told apart by as little as this share of the greatest.
_LEAST = 1e-3

Progress = Callable[[str, int, int], None]
LossFunction = Callable[[Tensor, Tensor], Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]


class Head:
    """Batches that are read once, of which the first `IMAGES` examples are remembered."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.first: list[tuple[Tensor, Tensor]] = []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.first, missing = [], IMAGES
        for inputs, labels in pairs(self.batches, "compress"):
            if missing > 0:
                self.first.append((inputs[:missing], labels[:missing]))
                missing -= len(inputs)
            yield inputs, labels

    def __length_hint__(self) -> int:
        return length_hint(self.batches)

    def read(self) -> Sequence[tuple[Tensor, Tensor]]:
        """The first examples, read now if nobody has read them."""
        if not self.first:
            for _ in self:
                if sum(len(labels) for _, labels in self.first) >= IMAGES:
                    break
        return self.first


def importances(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    layers: Sequence[str],
    *,
    loss: LossFunction = F.cross_entropy,
    progress: Progress | None = None,
    across_ranks: bool = False,
) -> dict[str, float]:
    """By how much the mean loss rises when a layer gives the mean of its output over batch and positions instead.

    Each layer alone, the model in evaluation mode. What does no harm counts as a thousandth of what does the most; all
    are 1 where nothing does harm, as in a network that is not trained.

    Args:
        batches: pairs (inputs, labels) on the model's device; weighted by their number of examples.
        layers: paths of layers whose output has channels in dimension 1, or in the last one for ``nn.Linear``.
        loss: mean loss of a batch.
        across_ranks: `batches` are this rank's share, and every rank calls.
    """
    sums = torch.zeros(len(layers) + 2, dtype=torch.float64)
    with evaluating(model):
        for inputs, labels in batches:
            sums[-1] += len(labels)
            sums[-2] += len(labels) * float(loss(model(inputs), labels))
        for place, name in enumerate(layers):
            with replaced(model, {name: _mean}):
                for inputs, labels in batches:
                    sums[place] += len(labels) * float(loss(model(inputs), labels))
            if progress:
                progress("importance", place + 1, len(layers))
    if across_ranks:
        distributed.sum_(sums)
    *losses, dense, images = sums.tolist()
    rises = [(value - dense) / images if images else 0.0 for value in losses]
    finite = [rise for rise in rises if math.isfinite(rise)]
    most = max(finite, default=0.0)
    if not most > 0:
        return dict.fromkeys(layers, 1.0)
    return {
        name: max(rise, _LEAST * most) if math.isfinite(rise) else most
        for name, rise in zip(layers, rises, strict=True)
    }


def layer_importances(
    model: nn.Module,
    graph: ModelGraph,
    batches: Sequence[tuple[Tensor, Tensor]],
    layers: Sequence[str],
    *,
    loss: LossFunction = F.cross_entropy,
    progress: Progress | None = None,
    across_ranks: bool = False,
) -> dict[str, float]:
    """The importance of each of `layers`: that of the end of its residual branch, if it is in one."""
    ends = {name: branch.end for branch in graph.branches for name in branch.layers}
    removed = [ends.get(name, name) for name in layers]
    distinct = list(dict.fromkeys(removed))
    found = importances(model, batches, distinct, loss=loss, progress=progress, across_ranks=across_ranks)
    return {name: found[end] for name, end in zip(layers, removed, strict=True)}


def _mean(layer: nn.Module, y: Tensor) -> Tensor:
    channels = y.dim() - 1 if isinstance(layer, nn.Linear) else 1
    over = [dim for dim in range(y.dim()) if dim != channels]
    return y.mean(over, keepdim=True).expand_as(y)
