"""Batch normalization by the statistics of all ranks together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cctorch import distributed

_REDUCED = (0, 2, 3)


class _Synchronized(torch.autograd.Function):
    """Of ATen operators, so that it is one for every device; nothing waits for what is on the device."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance, count = _statistics(x)
        inverse = (variance + eps).rsqrt()
        mean, inverse = mean.to(weight.dtype), inverse.to(weight.dtype)
        scale = weight * inverse
        y = torch.addcmul(_spread(bias - mean * scale), x, _spread(scale)).to(x.dtype)
        ctx.save_for_backward(x, weight, mean, inverse, count)
        unbiased = (variance * count / (count - 1).clamp(min=1)).to(weight.dtype)
        ctx.mark_non_differentiable(mean, unbiased)
        return y, mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, inverse, count = ctx.saved_tensors
        grad = grad.to(weight.dtype)
        grad_bias = grad.sum(_REDUCED)
        grad_weight = (grad * (x - _spread(mean))).sum(_REDUCED) * inverse
        # The parameters' gradients stay this rank's own: like all others, they are averaged after the backward pass.
        sums = distributed.sum_(torch.cat([grad_bias, grad_weight]))
        mean_grad, mean_product = (sums / count).to(weight.dtype).chunk(2)
        scale = weight * inverse
        slope = -scale * inverse * mean_product
        shift = -scale * mean_grad - slope * mean
        grad_x = torch.addcmul(_spread(shift), x, _spread(slope)).addcmul_(grad, _spread(scale))
        return grad_x.to(x.dtype), grad_weight, grad_bias, None


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
        variance, mean = torch.var_mean(x if x.dtype == torch.float64 else x.float(), _REDUCED, correction=0)
        own[:channels], own[channels:-1] = mean, variance
        own[-1].fill_(values)
    everyone = distributed.gather(own)
    means, variances, counts = everyone[:, :channels], everyone[:, channels:-1], everyone[:, -1:]
    count = counts.sum()
    mean = (means * counts).sum(0) / count
    return mean, ((variances + (means - mean).square()) * counts).sum(0) / count, count


def _spread(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)
