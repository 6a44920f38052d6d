"""Batch normalization by the statistics of all ranks together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cctorch import distributed

_passes = torch.ops.cctorch


class _Synchronized(torch.autograd.Function):
    """The passes over x are operators of ours; between them, per channel and in float64, is what all ranks share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance, count = _statistics(x)
        inverse = (variance + eps).rsqrt()
        y = _passes.batch_norm_affine(x, mean, weight * inverse, bias.double())
        ctx.save_for_backward(x, weight, mean, inverse, count)
        own_mean, unbiased = mean.to(weight.dtype), (variance * count / (count - 1).clamp(min=1)).to(weight.dtype)
        ctx.mark_non_differentiable(own_mean, unbiased)
        return y, own_mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, inverse, count = ctx.saved_tensors
        grad_bias, grad_weight = _passes.batch_norm_grad_sums(grad, x, mean)
        grad_weight = grad_weight * inverse
        # The parameters' gradients stay this rank's own: like all others, they are averaged after the backward pass.
        mean_grad, mean_product = (distributed.sum_(torch.cat([grad_bias, grad_weight])) / count).chunk(2)
        scale = weight * inverse
        grad_x = _passes.batch_norm_grad_input(grad, x, mean, mean_grad, scale, scale * inverse * mean_product)
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None


def synchronized_batch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    r"""Normalizes x by the mean and variance that each channel has in the x of all ranks, N x C x H x W; a rank's N may
    be 0. Every rank has to call it, and its backward.

    Returns:
        y, and without gradients the mean and the unbiased variance of each channel.
    """
    return _Synchronized.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call,no-any-return]


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count over all ranks, in float64: their moments add up, around the common mean."""
    channels = x.size(1)
    values = x.numel() // channels
    own = torch.zeros(2 * channels + 1, dtype=torch.float64, device=x.device)
    if values:
        own[:channels], own[channels:-1] = _passes.batch_norm_moments(x)
        own[-1].fill_(values)
    everyone = distributed.gather(own)
    means, variances, counts = everyone[:, :channels], everyone[:, channels:-1], everyone[:, -1:]
    count = counts.sum()
    mean = (means * counts).sum(0) / count
    return mean, ((variances + (means - mean).square()) * counts).sum(0) / count, count
