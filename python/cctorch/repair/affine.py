"""A layer and the BatchNorm behind it as one affine function of the layer's unfolded input."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cctorch import _C
from cctorch.nn import Constant, LowRankConv2d, LowRankLinear
from cctorch.repair.places import Layer


def as_map(layer: nn.Module, y: Tensor) -> Tensor:
    """What a convolution (B x N x H x W) or a linear layer (B x N, B x ... x N) reads or gives, as B x N x H x W."""
    features_last = isinstance(layer, nn.Linear | LowRankLinear) or (isinstance(layer, Constant) and layer.dim == -1)
    if not features_last:
        return y
    return y.flatten(1, -2).transpose(1, 2).unsqueeze(3) if y.dim() > 2 else y[:, :, None, None]


def as_image(layer: Layer, x: Tensor) -> tuple[Tensor, _C.Window]:
    """The layer's input as B x C x H x W, padded where the window can't do it, and how the layer reads it."""
    if isinstance(layer, nn.Linear | LowRankLinear):
        return as_map(layer, x), _C.Window()
    kernel, stride = _pair(layer.kernel_size), _pair(layer.stride)
    dilation = _pair(layer.dilation)
    sides = layer._sides if isinstance(layer, LowRankConv2d) else layer._reversed_padding_repeated_twice
    left, right, top, bottom = sides
    if layer.padding_mode == "zeros" and left == right and top == bottom:
        return x, _C.Window(kernel, stride, (top, left), dilation)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, sides, mode=mode), _C.Window(kernel, stride, (0, 0), dilation)


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    return values[0], values[1]


def affine_of(layer: Layer | Constant, norm: _BatchNorm | None) -> _C.Affine:
    """The layer and the BatchNorm behind it as one affine function of the layer's unfolded input, on their tensors."""
    behind = None
    if norm is not None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        behind = _C.Norm(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
    if isinstance(layer, Constant):
        return _C.Affine(bias=layer.bias, norm=behind)
    if isinstance(layer, LowRankConv2d | LowRankLinear):
        core = getattr(layer, "core", None)
        return _C.Affine(first=layer.first, core=core, second=layer.second, bias=layer.bias, norm=behind)
    return _C.Affine(weight=layer.weight, bias=layer.bias, norm=behind)
