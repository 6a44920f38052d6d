"""Kept sets that all readers of a stream share: what no reader keeps, its writers do not make, and nothing is gathered.

The readers of a residual stream choose their inputs alone, each at the cost of a gather, while the stream itself stays
as wide as before, with its sums and normalizations. Where they keep the same channels instead, all of it is narrower.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import torch

from cctorch import _C
from cctorch.graph import ModelGraph
from cctorch.latency import LayerShape

__all__ = ["Narrowed", "Stream", "streams"]

_WIDTHS = 8
# No stream becomes narrower than this share of it.
_NARROWEST = 0.25


@dataclass(frozen=True)
class Stream:
    """Channels that at least two layers read, and nothing else.

    Args:
        readers: names of the layers.
        order: the channels, from the one that the readers need most.
        widths: how many of them may be left, rising.
    """

    readers: list[str]
    order: list[int]
    widths: list[int]

    def kept(self, width: int) -> list[int]:
        return sorted(self.order[:width])


def streams(
    graph: ModelGraph, layers: Sequence[_C.SolverLayer], bounded: Set[str], multiples: Mapping[str, int]
) -> list[Stream]:
    """The streams of which every reader is searched and none has a bound.

    Channels are ranked by the share of (E1) that each reader loses without them, weighed by what the reader weighs
    in the objective: over columns of the weights (E1) adds up.

    Args:
        multiples: by layer, of which its number of inputs should be.
    """
    known = {layer.spec.name: layer for layer in layers}
    found = []
    for readers in graph.channels.streams():
        if not known.keys() >= set(readers) or not bounded.isdisjoint(readers):
            continue
        need = torch.zeros(known[readers[0]].spec.in_channels, dtype=torch.float64)
        for name in readers:
            layer, columns = known[name], _columns(known[name])
            weight = layer.importance or layer.table.pruned[-1]
            need += weight * columns / columns.sum().clamp_min(1e-300)
        count, multiple = len(need), max(multiples[name] for name in readers)
        step = multiple * -(-count // (_WIDTHS * multiple))
        widths = [width for width in range(step, count, step) if width >= _NARROWEST * count]
        found.append(Stream(readers, need.argsort(descending=True, stable=True).tolist(), widths))
    return found


class Narrowed:
    """A network whose streams have lost channels: what is left of each of its layers.

    Args:
        kept: for each reader of a narrowed stream, the channels that it keeps.
    """

    def __init__(self, graph: ModelGraph, kept: Mapping[str, list[int]]) -> None:
        self.graph, self.plan, self.readers = graph, _C.CompressionPlan(), list(kept)
        layers = [graph.channels.unchanged(name) for name in kept]
        for layer in layers:
            layer.kept_in = kept[layer.name]
        self.plan.layers = layers
        graph.channels.resolve(self.plan)
        self._left = {layer.name: layer for layer in self.plan.layers}

    def shapes(self, shapes: Mapping[str, LayerShape]) -> dict[str, LayerShape]:
        return {name: shape.under(self._left[name]) if name in self._left else shape for name, shape in shapes.items()}

    def layers(self, layers: Sequence[_C.SolverLayer]) -> list[_C.SolverLayer]:
        """What is left to search; a layer's loss has what its dropped inputs lose in it."""
        return list(self._layers(layers))

    def _layers(self, layers: Sequence[_C.SolverLayer]) -> Iterator[_C.SolverLayer]:
        for layer in layers:
            left = self._left.get(layer.spec.name)
            if left is None:
                yield layer
                continue
            spec = _C.LayerSpec(
                layer.spec.name,
                layer.spec.kind,
                len(left.kept_in),
                len(left.kept_out),
                layer.spec.kernel_height,
                layer.spec.kernel_width,
                layer.spec.positions,
                layer.spec.groups,
                layer.spec.bits,
                layer.spec.stride_height,
                layer.spec.stride_width,
            )
            weight, gradient = (
                whole[left.kept_out][:, left.kept_in].contiguous() for whole in (layer.weight, layer.gradient)
            )
            yield _C.SolverLayer(
                spec,
                weight,
                gradient,
                max_rate=layer.max_rate,
                importance=layer.importance,
                lost=self.lost(layer),
                cost_before=layer.table.pruned[-1],
            )

    def lost(self, layer: _C.SolverLayer) -> float:
        """(E1) of the inputs that a narrowed layer has lost, for the filters that are left of it."""
        left = self._left[layer.spec.name]
        dropped = torch.ones(layer.spec.in_channels, dtype=torch.bool)
        dropped[left.kept_in] = False
        return float(_columns(layer, left.kept_out)[dropped].sum())

    def widen(self, plan: _C.CompressionPlan) -> None:
        """Makes of a plan of the narrowed network one of the whole network; it is to be resolved afterwards."""
        layers = []
        for narrow in plan.layers:
            layer = self.graph.channels.unchanged(narrow.name)
            left = self._left.get(narrow.name, layer)
            layer.kept_in = [left.kept_in[i] for i in narrow.kept_in]
            layer.rank, layer.layout = narrow.rank, narrow.layout
            layers.append(layer)
        plan.layers = layers


def _columns(layer: _C.SolverLayer, rows: Sequence[int] | slice = slice(None)) -> torch.Tensor:
    """(E1) of each input channel, of these filters: what the loss changes by without it, to first order."""
    product = layer.weight[rows].double() * layer.gradient[rows].double()
    return product.transpose(0, 1).flatten(1).square().sum(1).cpu()
