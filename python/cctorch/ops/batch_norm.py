"""Batch normalization, for training and for evaluation."""

import torch
from torch import Tensor


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    r"""Batch normalization by the batch's own statistics (Ioffe & Szegedy 2015):

    .. math:: y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \text{weight} + \text{bias},

    with the mean and the biased variance of each channel over all other dimensions.

    PyTorch's CPU kernel for channels_last takes several times longer where the channels don't fill vectors, as after
    channel pruning; this one does not (``benchmarks/batch_norm.py``). For other layouts, devices and types it calls
    PyTorch's. Differentiable twice.

    Args:
        x: shape ``(N, C, H, W)``; float32, float64, float16 or bfloat16.
        weight: shape ``(C,)``, of the type of ``x``.
        bias: likewise.
        eps: added to the variance.

    Returns:
        ``y``, like ``x``; the mean and :math:`1 / \sqrt{\sigma^2 + \epsilon}` of each channel,
        shape ``(C,)``, without gradients.

    Raises:
        RuntimeError: for a wrong type, shape or device, or an empty ``x``; the message names the argument.

    Example:
        >>> y, mean, _ = batch_norm(torch.tensor([[[[1.0, 3.0]]]]), torch.ones(1), torch.zeros(1))
        >>> mean.tolist(), y.round(decimals=3).tolist()
        ([2.0], [[[[-1.0, 1.0]]]])
    """
    y, mean, inverse_deviation = torch.ops.cctorch.batch_norm(x, weight, bias, eps)
    return y, mean, inverse_deviation


def batch_norm_inference(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float = 1e-5
) -> Tensor:
    r"""Batch normalization by given statistics: :math:`y = (x - \mu) / \sqrt{\sigma^2 + \epsilon} \cdot \text{weight} +
    \text{bias}`.

    Args, types and errors are those of :func:`batch_norm`; ``mean`` and ``var`` have shape ``(C,)``, and ``x`` may be
    empty. Differentiable, in all but ``mean`` and ``var``.

    Returns:
        Tensor of the shape, type and layout of ``x``.

    Example:
        >>> one = torch.ones(1)
        >>> batch_norm_inference(torch.full((1, 1, 1, 1), 5.0), one, one, 3 * one, 4 * one, eps=0.0).item()
        2.0
    """
    y: Tensor = torch.ops.cctorch.batch_norm_inference(x, weight, bias, mean, var, eps)
    return y
