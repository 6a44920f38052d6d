"""Layers whose weight is a product of two factors."""

from collections.abc import Sequence

import torch
from torch import Tensor


def low_rank_linear(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""A linear layer of weight ``second @ first``: :math:`y = (x\,\text{first}^T)\,\text{second}^T + \text{bias}`.

    The factors are multiplied out first where that takes fewer multiplications for the rows of ``x``:
    :math:`N r C + \text{rows} \cdot C N < \text{rows} \cdot r (C + N)`. With symbolic shapes
    (``torch.compile(dynamic=True)``) they are always applied in turn, so that no program is tied to a number of rows.

    Args:
        x: shape ``(..., C)``.
        first: shape ``(rank, C)``.
        second: shape ``(N, rank)``.
        bias: shape ``(N,)``, or None.

    Returns:
        Tensor of shape ``(..., N)``; types, autocast and derivatives as in :func:`torch.nn.functional.linear`.

    Raises:
        RuntimeError: for shapes that do not fit; the message names the argument.

    Example:
        >>> low_rank_linear(torch.ones(1, 3), torch.ones(1, 3), torch.tensor([[1.0], [2.0]])).tolist()
        [[3.0, 6.0]]
    """
    y: Tensor = torch.ops.cctorch.low_rank_linear(x, first, second, bias)
    return y


def low_rank_conv2d(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """A convolution with ``first``, then a 1 x 1 convolution with ``second`` and the bias.

    Equals the convolution with the weight ``einsum("nr,rchw->nchw", second, first)``.

    Args:
        x: shape ``(batch, C, height, width)``, or without the batch.
        first: shape ``(rank, C, kernel_height, kernel_width)``; ``stride``, ``padding`` and ``dilation`` apply here.
        second: shape ``(N, rank, 1, 1)``.
        bias: shape ``(N,)``, or None.
        stride: one integer, or one for each of height and width.
        padding: zeros added on each side, as ``stride``.
        dilation: distance between kernel elements, as ``stride``.

    Returns:
        Tensor of shape ``(batch, N, out_height, out_width)``; types, memory format, autocast and derivatives as in
        :func:`torch.nn.functional.conv2d`.

    Raises:
        RuntimeError: for shapes that do not fit; the message names the argument.

    Example:
        >>> low_rank_conv2d(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3), torch.ones(4, 1, 1, 1)).shape
        torch.Size([1, 4, 1, 1])
    """
    y: Tensor = torch.ops.cctorch.low_rank_conv2d(x, first, second, bias, stride, padding, dilation)
    return y
