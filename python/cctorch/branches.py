"""Removes whole residual branches: in a plan, and as a trial whether a model's function is then what it should be."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cctorch._C import CompressionPlan
from cctorch.apply import apply
from cctorch.graph import Branch, ModelGraph
from cctorch.modes import evaluating

__all__ = ["removable", "remove", "replaced", "within"]


def remove(plan: CompressionPlan, branches: Sequence[Branch], graph: ModelGraph) -> None:
    """Leaves of each branch nothing but the bias of its end. The plan is to be resolved afterwards."""
    gone = {name for branch in branches for name in branch.layers}
    layers = [layer for layer in plan.layers if layer.name not in gone]
    for branch in branches:
        for name in branch.layers:
            layer = graph.channels.unchanged(name)
            layer.kept_in, layer.kept_out = [], layer.kept_out if name == branch.end else []
            layers.append(layer)
    plan.layers = layers


def within(graph: ModelGraph, searched: Set[str], bounded: Set[str]) -> list[Branch]:
    """Without a bounded layer, and with all convolutions and linear layers, but for grouped ones, searched."""
    searchable = {spec.name for spec in graph.specs if spec.groups == 1}
    return [
        branch
        for branch in graph.branches
        if searched >= searchable.intersection(branch.layers) and bounded.isdisjoint(branch.layers)
    ]


def removable(model: nn.Module, graph: ModelGraph, branches: Sequence[Branch], example: Tensor) -> list[Branch]:
    """Those of the branches without which the model, rebuilt, gives what it gives with a constant at their ends."""
    if not branches or _works_without(model, graph, branches, example):
        return list(branches)
    return [branch for branch in branches if _works_without(model, graph, [branch], example)]


def _works_without(model: nn.Module, graph: ModelGraph, branches: Sequence[Branch], example: Tensor) -> bool:
    plan = CompressionPlan()
    remove(plan, branches, graph)
    graph.channels.resolve(plan)
    smaller = apply(copy.deepcopy(model), plan)
    with evaluating(model):
        with replaced(model, {branch.end: _bias for branch in branches}):
            expected = model(example)
        try:
            with evaluating(smaller):
                found = smaller(example)
        except Exception:  # An operator that has no use for a tensor without channels, as pooling.
            return False
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    return torch.allclose(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()) + 1e-12)


def _bias(layer: nn.Module, y: Tensor) -> Tensor:
    channels = -1 if isinstance(layer, nn.Linear) else 1
    shape = [1] * y.dim()
    shape[channels] = -1
    bias = layer.bias
    return torch.zeros_like(y) if not isinstance(bias, Tensor) else bias.to(y.dtype).view(shape).expand_as(y)


@contextmanager
def replaced(model: nn.Module, outputs: dict[str, Callable[[nn.Module, Tensor], Tensor]]) -> Iterator[None]:
    """While it lasts, layers give what a function makes of the layer and its output."""

    def hook(function: Callable[[nn.Module, Tensor], Tensor]) -> Callable[..., Tensor]:
        # A copy, as they may give views, and a network may change what a layer gives in place.
        return lambda layer, _, y: function(layer, y).clone()

    handles = [model.get_submodule(name).register_forward_hook(hook(f)) for name, f in outputs.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
