"""A small network as it is trained: plain, masked, or quantized."""

from __future__ import annotations

import copy

import torch
from cctorch import apply, prepare
from cctorch._C import CompressionPlan, LayerPlan, MaskPlan
from cctorch.graph import trace
from cctorch.models import create
from cctorch.nn import FakeQuant
from networks import PaddedResNet, random_plan, randomized
from torch import Tensor, nn


def resnet8(kind: str) -> nn.Module:
    """With fresh weights of seed 0, channels_last; `kind`: plain, masked (half of all weights) or quantized."""
    torch.manual_seed(0)
    model = create("resnet8")
    if kind == "plain":
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
    specs = [spec for spec in trace(model, torch.randn(2, 3, 12, 12)).specs if spec.kind in ("conv2d", "linear")]
    mask, bits = (MaskPlan("magnitude", 0.5), None) if kind == "masked" else (None, 4)
    layers = [LayerPlan(s.name, s.kind, s.in_channels, s.out_channels, mask=mask, bits=bits) for s in specs]
    prepare(model, CompressionPlan(layers=layers))
    if kind == "quantized":
        for spec in specs:
            layer = model.get_submodule(spec.name)
            layer.add_module("input_quant", FakeQuant(8, signed=spec.name == "conv1"))
            layer.register_forward_pre_hook(_quantized)
        model(torch.randn(4, 3, 12, 12))  # the scales start from a first batch
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def rebuilt(bits: int) -> tuple[nn.Module, CompressionPlan, nn.Module]:
    """A dense network, a random plan for it in which its layers have `bits`, and the network rebuilt and prepared by
    it, on 3 x 16 x 16."""
    torch.manual_seed(0)
    dense = randomized(PaddedResNet()).float()
    plan = random_plan(trace(dense, torch.randn(2, 3, 16, 16)))
    layers = plan.layers
    for layer in layers:
        if layer.kind in ("conv2d", "linear") and layer.kept_in:
            layer.bits = bits
    plan.layers = layers
    return dense, plan, prepare(apply(copy.deepcopy(dense), plan), plan)


def _quantized(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    quant = layer.get_submodule("input_quant")
    return (quant(inputs[0]), *inputs[1:])
