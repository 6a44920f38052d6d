"""A layer and the BatchNorm behind it as one affine function of the layer's unfolded input."""

from __future__ import annotations

import torch
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


class Affine:
    """y = weight x + constant for norm(layer(x)), in float64; N x P and N. `set` makes the modules compute another one.

    The norm's statistics become those of the samples, its scale and shift what gives the wanted function with them: a
    training step, which normalizes by the batch's own statistics, goes on from the function that was fitted.
    """

    def __init__(self, layer: Layer, norm: _BatchNorm | None) -> None:
        self.layer, self.norm = layer, norm
        weight = _weight(layer).double()
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.double()
        self.scale = torch.ones_like(bias)
        self.weight, self.constant = weight, bias
        if norm is not None:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            slope = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            self.weight = slope.unsqueeze(1) * weight
            self.constant = slope * (bias - norm.running_mean.double()) + norm.bias.double()
            # A channel that the norm had silenced is written with a scale of its own.
            self.scale = torch.where(slope.abs() > 1e-6 * slope.abs().max(), slope, self.scale)

    @property
    def has_intercept(self) -> bool:
        return self.norm is not None or self.layer.bias is not None

    @property
    def rank(self) -> int | None:
        return self.layer.first.shape[0] if isinstance(self.layer, LowRankConv2d | LowRankLinear) else None

    def fit(self, moments: _C.Moments, ridge: float) -> _C.Fit:
        if self.rank is None:
            return _C.least_squares(moments, self.weight, self.constant, ridge, self.has_intercept)
        return _C.reduced_rank(moments, self.weight, self.constant, self.rank, ridge, self.has_intercept)

    def set(self, fit: _C.Fit, moments: _C.Moments) -> None:
        weight = fit.weight / self.scale.unsqueeze(1)
        if self.norm is None:
            _write_weight(self.layer, weight)
            if self.layer.bias is not None:
                self.layer.bias.copy_(fit.intercept)
            return
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        mean = weight @ moments.input_mean
        variance = ((weight @ moments.input_moment) * weight).sum(1).clamp_(min=0) / moments.samples
        deviation = (variance + self.norm.eps).sqrt()
        _write_weight(self.layer, weight)
        bias = 0.0 if self.layer.bias is None else self.layer.bias.double()
        self.norm.running_mean.copy_(mean + bias)
        self.norm.running_var.copy_(variance)
        self.norm.weight.copy_(self.scale * deviation)
        self.norm.bias.copy_(self.scale * mean + fit.intercept)


def _weight(layer: Layer) -> Tensor:
    if isinstance(layer, LowRankConv2d | LowRankLinear):
        return layer.second.flatten(1).double() @ layer.first.flatten(1).double()
    return layer.weight.flatten(1)


def _write_weight(layer: Layer, weight: Tensor) -> None:
    if not isinstance(layer, LowRankConv2d | LowRankLinear):
        layer.weight.copy_(weight.view_as(layer.weight))
        return
    rank = min(layer.first.shape[0], *weight.shape)
    channels = layer.first.shape[1]
    shaped = weight.view(len(weight), channels, *layer.first.shape[2:])
    first, second = _C.factorize(shaped, list(range(channels)), rank)
    # A plan may give a layer more rank than it has filters left: the rest contributes nothing.
    layer.first.zero_()[:rank].copy_(first)
    layer.second[:, :rank].copy_(second)
