"""Channels picked by position."""

import torch
from torch import Tensor


def gather_channels(x: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    r"""Picks channels: :math:`y_{n,j,\dots} = x_{n,\text{index}_j,\dots}`.

    What a compressed layer reads of a stream that others read too. ``torch.index_select`` makes a channels-last tensor
    contiguous, and the convolution behind it turns that back; here the memory format stays. The derivative adds each
    gradient up where its channel came from, and is 0 elsewhere. Differentiable any number of times. ``torch.vmap`` has
    a rule for it.

    Args:
        x: shape ``(N, C, ...)``, or any other with the channels in dimension ``dim``; float32, float64, float16 or
            bfloat16.
        index: int64 positions from 0 to ``C - 1``, shape ``(K,)``.
        dim: the dimension of the channels.

    Returns:
        Tensor of shape ``(N, K, ...)``, in channels-last where x is and ``dim`` is 1, else contiguous.

    Raises:
        IndexError: a position that is no channel, on CPU. On CUDA torch's own assertion of ``index_select`` fails.
        RuntimeError: for a wrong type, shape or device; the message names the argument.

    Example:
        >>> gather_channels(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([2, 0])).tolist()
        [[3.0, 1.0]]
    """
    y: Tensor = torch.ops.cctorch.gather_channels(x, index, dim)
    return y
