"""What is left of a removed residual branch: its mean."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from cctorch import distributed
from cctorch.nn import Constant
from cctorch.repair.layer_fit import LayerFit


def fit_constant(
    name: str, constant: Constant, norm: _BatchNorm | None, target: Tensor, across_ranks: bool
) -> LayerFit:
    """Makes the bias, behind the norm if there is one, the mean of the targets (outputs x samples)."""
    samples = target.shape[1]
    sums = torch.cat([target.double().sum(1), target.double().square().sum(1), target.new_full((1,), samples).double()])
    if across_ranks:
        distributed.sum_(sums)
    mean, square = (sums[:-1] / sums[-1]).chunk(2)
    if not torch.isfinite(square).all():
        raise ValueError(f"repair: layer '{name}': the wanted outputs are NaN or infinite")
    assert constant.bias is not None
    now = constant.bias.double().clone()
    if norm is not None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        slope = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        now = slope * (now - norm.running_mean.double()) + norm.bias.double()
        norm.running_mean.copy_(constant.bias)
        norm.bias.copy_(mean)
    else:
        constant.bias.copy_(mean)
    spread = float((square - mean.square()).clamp_min(0).sum())
    before = float((mean - now).square().sum())
    return LayerFit(name, int(sums[-1]), 0, (spread + before) / spread if spread > 0 else 1.0, 1.0)
