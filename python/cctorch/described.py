"""Layers in the words of a plan: kind and sizes, for comparison and for error messages."""

from __future__ import annotations

from torch import nn

from cctorch._C import LayerPlan


def describe_plan(layer: LayerPlan) -> str:
    return f"{layer.kind} of {layer.in_channels} -> {layer.out_channels} channels"


def fits(module: nn.Module, layer: LayerPlan) -> bool:
    """Whether the module is of the kind and sizes that a plan expects; of an LSTM, the weight that it names."""
    if layer.kind == "lstm":
        weight = getattr(module, layer.name.rpartition(".")[2], None) if isinstance(module, nn.LSTM) else None
        return weight is not None and tuple(weight.shape) == (layer.out_channels, layer.in_channels)
    found = describe(module)
    # The groups of a layer that goes as a whole don't matter.
    return (found if layer.kept_in else found.partition(" in ")[0]) == describe_plan(layer)


def describe(module: nn.Module) -> str:
    if isinstance(module, nn.Conv2d):
        sizes = f"{module.in_channels} -> {module.out_channels} channels"
        if module.groups == 1:
            return f"conv2d of {sizes}"
        depthwise = module.groups == module.in_channels == module.out_channels
        return f"depthwise_conv2d of {sizes}" if depthwise else f"conv2d of {sizes} in {module.groups} groups"
    if isinstance(module, nn.Linear):
        return f"linear of {module.in_features} -> {module.out_features} channels"
    if isinstance(module, nn.BatchNorm2d):
        return f"batch_norm2d of {module.num_features} -> {module.num_features} channels"
    return type(module).__name__
