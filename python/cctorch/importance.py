"""How much a network needs a layer: what its loss does without it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import length_hint

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cctorch import distributed
from cctorch.branches import replaced
from cctorch.gradients import LossFunction, Progress
from cctorch.modes import evaluating
from cctorch.pairs import pairs

__all__ = ["IMAGES", "Head", "importances"]

IMAGES = 256
# Removals that seem to do no harm are told apart by as little as this share of the greatest.
_LEAST = 1e-3

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
    ends: Mapping[str, str],
    *,
    loss: LossFunction = F.cross_entropy,
    progress: Progress | None = None,
    across_ranks: bool = False,
) -> dict[str, float]:
    """By how much the mean loss rises where the mean of an output, over batch and positions, stands for the output.

    Each layer alone, the model in evaluation mode. What does no harm counts as a thousandth of what does the most; all
    are 1 where nothing does harm, as in a network that is not trained.

    Args:
        batches: pairs (inputs, labels) on the model's device; weighted by their number of examples.
        ends: for each layer, whose output that is: `ModelGraph.ends`. Its channels are in dimension 1, or in the last
            one for ``nn.Linear``.
        loss: mean loss of a batch.
        across_ranks: `batches` are this rank's share, and every rank calls.

    Raises:
        ValueError: there is no batch.
    """
    distinct = list(dict.fromkeys(ends.values()))
    losses = []
    with evaluating(model):
        for done, end in enumerate([None, *distinct]):
            with replaced(model, {} if end is None else {end: _mean}):
                losses.append(sum(len(labels) * float(loss(model(inputs), labels)) for inputs, labels in batches))
            if progress and done:
                progress("importance", done, len(distinct))
    sums = torch.tensor([*losses, sum(len(labels) for _, labels in batches)], dtype=torch.float64)
    if across_ranks:
        distributed.sum_(sums)
    dense, *removed, images = sums.tolist()
    if not images:
        raise ValueError(
            "compress: `batches` is empty, expected training images to tell how much each layer matters: with a budget "
            "of latency they are needed beside gradients too, unless residual_branches=False"
        )
    rises = [(total - dense) / images for total in removed]
    most = max((rise for rise in rises if math.isfinite(rise)), default=0.0)
    if not most > 0:
        return dict.fromkeys(ends, 1.0)
    found = {
        end: max(rise, _LEAST * most) if math.isfinite(rise) else most
        for end, rise in zip(distinct, rises, strict=True)
    }
    return {name: found[end] for name, end in ends.items()}


def _mean(layer: nn.Module, y: Tensor) -> Tensor:
    channels = y.dim() - 1 if isinstance(layer, nn.Linear) else 1
    over = [dim for dim in range(y.dim()) if dim != channels]
    return y.mean(over, keepdim=True).expand_as(y)
