"""Seconds of a model under a plan, from the table of its layers' times."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from cctorch import _C, branches
from cctorch.graph import Branch, ModelGraph
from cctorch.latency import LatencyTable, LayerShape
from cctorch.modes import evaluating
from cctorch.streams import Narrowed

__all__ = ["Predictor", "shapes_of"]


class Predictor:
    """Seconds of a model under a plan: those of its layers at their final sizes, and the rest, which stays.

    Args:
        shapes: of the dense model's layers, by path.
        narrowed: streams that have lost channels before; the plans to complete are of what is left.
    """

    def __init__(
        self, graph: ModelGraph, shapes: Mapping[str, LayerShape], table: LatencyTable, narrowed: Narrowed | None = None
    ) -> None:
        self.graph, self.table, self.narrowed = graph, table, narrowed
        self.shapes = narrowed.shapes(shapes) if narrowed else dict(shapes)
        self.rest = 0.0
        """What the model takes besides its layers: activations, sums, pooling."""

    def producers(self, layer: str) -> list[LayerShape]:
        return [self.shapes[name] for name in self.graph.channels.producers(layer) if name in self.shapes]

    def beside(self, branch: Branch) -> list[LayerShape]:
        """What else goes with a branch than its key and the layers that make the key's inputs."""
        counted = {branch.key, *self.graph.channels.producers(branch.key)}
        return [self.shapes[name] for name in branch.layers if name not in counted]

    def removed(self, branch: Branch) -> list[LayerShape]:
        """What is left of a branch."""
        plan = _C.CompressionPlan()
        branches.remove(plan, [branch], self.graph)
        left = [(self.shapes[layer.name], layer.kept_out) for layer in plan.layers]
        return [dataclasses.replace(shape, inputs=0, outputs=shape.outputs if kept else 0) for shape, kept in left]

    def complete(self, plan: _C.CompressionPlan, removable: Sequence[Branch]) -> None:
        """Makes of the chosen forms a plan to carry out: branches go, dead filters, and ranks that are idle then."""
        if self.narrowed:
            self.narrowed.widen(plan)
        emptied = {layer.name for layer in plan.layers if not layer.kept_in}
        branches.remove(plan, [branch for branch in removable if branch.key in emptied], self.graph)
        self.graph.channels.resolve(plan)
        self.drop_idle_ranks(plan)

    def seconds(self, plan: _C.CompressionPlan) -> float:
        """Of the model under a resolved plan."""
        return self.rest + self.layers(plan)

    def drop_idle_ranks(self, plan: _C.CompressionPlan) -> None:
        """Where a factored layer is no faster than its exact weight, once filters that nobody reads are gone."""
        layers = plan.layers
        for layer in layers:
            if layer.rank is not None:
                factored = self.shapes[layer.name].under(layer)
                exact = dataclasses.replace(factored, rank=None, layout="channel")
                if self.table.seconds(exact) <= self.table.seconds(factored):
                    layer.rank, layer.layout = None, "channel"
        plan.layers = layers

    def layers(self, plan: _C.CompressionPlan) -> float:
        planned = {layer.name: layer for layer in plan.layers}
        shapes = [shape.under(planned[name]) if name in planned else shape for name, shape in self.shapes.items()]
        self.table.time(shapes)
        return sum(self.table.seconds(shape) for shape in shapes)


def shapes_of(model: nn.Module, example: Tensor) -> dict[str, LayerShape]:
    """Shapes of the model's layers at one forward pass, by path."""
    shapes: dict[str, LayerShape] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):

            def record(layer: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                assert isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d)
                shapes[name] = LayerShape.of(layer, inputs[0].shape)

            hooks.append(module.register_forward_pre_hook(record))
    try:
        with evaluating(model):
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return shapes
