"""Masks of the weights to keep. All are boolean, of the shape and dense layout of their weight, and exact.

Masks are made for a list of weights, a whole model's; of one weight: ``(mask,) = nm_masks([weight], 2, 4)``.

Equal magnitudes are kept in index order (row-major, whatever the memory format), so counts are met to the element.
A NaN has no place in an order: on CPU it is an error; on other devices, where looking would wait for the device, it
counts as the largest magnitude.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def magnitude_masks(weights: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    r"""Keeps the largest magnitudes of all weights together.

    Of ``total`` weights :math:`\lfloor (1 - \text{sparsity}) \cdot \text{total} \rfloor` are kept, and
    the count is that of the decimal fraction written: a sparsity of 0.9 of 10 weights keeps 1.

    Args:
        weights: tensors of any shapes, of one floating-point type and on one device.
        sparsity: fraction to drop, from 0 to 1.

    Returns:
        One boolean mask for each weight, True where it is kept. Ties go to the earlier weight, then to the lower index.

    Raises:
        RuntimeError: for a sparsity out of range, mixed types or devices, or NaN on CPU; the message names the weight.

    Example:
        >>> magnitude_masks([torch.tensor([1.0, -4.0]), torch.tensor([2.0, 3.0])], sparsity=0.5)
        [tensor([False,  True]), tensor([False,  True])]
    """
    masks: list[Tensor] = torch.ops.cctorch.magnitude_masks(weights, sparsity)
    return masks


def magnitude_prune(weights: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """The weights where :func:`magnitude_masks` keeps them, else 0, with a straight-through gradient.

    The same as :func:`apply_mask` with each mask, in two passes over the memory of all weights instead of three.

    Args:
        weights: as for :func:`magnitude_masks`.
        sparsity: fraction to drop, from 0 to 1.

    Returns:
        One tensor for each weight, of its shape, type and dense layout. The gradient reaches every weight.

    Raises:
        RuntimeError: as :func:`magnitude_masks`.

    Example:
        >>> magnitude_prune([torch.tensor([1.0, -4.0]), torch.tensor([2.0, 3.0])], sparsity=0.5)
        [tensor([ 0., -4.]), tensor([0., 3.])]
    """
    pruned: list[Tensor] = torch.ops.cctorch.magnitude_prune(weights, sparsity)
    return pruned


def nm_masks(weights: Sequence[Tensor], n: int, m: int, axis: int = 1) -> list[Tensor]:
    """Keeps the ``n`` largest magnitudes of every ``m`` consecutive weights along ``axis``.

    Args:
        weights: tensors whose size along ``axis`` is a multiple of ``m``, of one type and on one device.
        n: weights kept in a group, from 1 to ``m``.
        m: weights in a group.
        axis: the dimension of the groups; 1 is the input channels of a linear layer or a convolution.

    Returns:
        One boolean mask for each weight. Ties go to the lower index.

    Raises:
        RuntimeError: for an ``n``, ``m`` or ``axis`` that does not fit a weight, mixed types or devices, or NaN on CPU.

    Example:
        >>> nm_masks([torch.tensor([[1.0, -4.0, 2.0, 3.0]])], n=2, m=4)
        [tensor([[False,  True, False,  True]])]
    """
    masks: list[Tensor] = torch.ops.cctorch.nm_masks(weights, n, m, axis)
    return masks


def channel_masks(weights: Sequence[Tensor], sparsity: float, axis: int = 0) -> list[Tensor]:
    r"""Keeps the slices along ``axis`` with the largest root mean square, ranked over all weights together.

    Of ``total`` slices :math:`\lfloor (1 - \text{sparsity}) \cdot \text{total} \rfloor` are kept, but of each weight at
    least its best one, which is then counted first. Slices of one weight are in the order of their L2 norms; the mean
    makes those of weights with different sizes comparable. To rank each weight's slices alone, pass a list of one.
    Computed in float64.

    Args:
        weights: tensors that have the dimension ``axis``, of one type and on one device.
        sparsity: fraction of the slices to drop, from 0 to 1.
        axis: the dimension of the slices: 0 is the filters of a convolution or the rows of a matrix, 1 the input
            channels or the columns.

    Returns:
        One boolean mask for each weight, constant within a slice. Ties go to the earlier weight, then to the lower
        index.

    Raises:
        RuntimeError: for a sparsity or ``axis`` out of range, mixed types or devices, or NaN on CPU.

    Example:
        >>> channel_masks([torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.tensor([[0.5], [2.0]])], sparsity=0.5)
        [tensor([[ True,  True],
                [False, False]]), tensor([[False],
                [ True]])]
    """
    masks: list[Tensor] = torch.ops.cctorch.channel_masks(weights, sparsity, axis)
    return masks


def block_masks(weights: Sequence[Tensor], sparsity: float, rows: int, columns: int) -> list[Tensor]:
    r"""Keeps the blocks of ``rows`` x ``columns`` weights with the largest L2 norm, ranked over all weights together.

    A weight is taken as a matrix, its first dimension by all others: the filters of a convolution are rows of
    ``in_channels * kernel_height * kernel_width`` columns. Of ``total`` blocks
    :math:`\lfloor (1 - \text{sparsity}) \cdot \text{total} \rfloor` are kept. Norms are computed in float64.

    Args:
        weights: tensors of two dimensions or more, of one type and on one device.
        sparsity: fraction of the blocks to drop, from 0 to 1.
        rows: height of a block; divides the first dimension of every weight.
        columns: width of a block; divides the product of the other dimensions.

    Returns:
        One boolean mask for each weight, constant within a block. Ties go to the earlier weight, then to the block that
        comes first in row-major order.

    Raises:
        RuntimeError: for a sparsity out of range, blocks that don't fit, mixed types or devices, or NaN on CPU.

    Example:
        >>> block_masks([torch.tensor([[3.0, 4.0, 1.0, 0.0], [0.0, 0.0, 6.0, 1.0]])], sparsity=0.5, rows=1, columns=2)
        [tensor([[ True,  True, False, False],
                [False, False,  True,  True]])]
    """
    masks: list[Tensor] = torch.ops.cctorch.block_masks(weights, sparsity, rows, columns)
    return masks


def apply_mask(weight: Tensor, mask: Tensor) -> Tensor:
    r"""``weight`` where ``mask`` is True, else 0, with a straight-through gradient.

    .. math::

        y = \begin{cases} w & \text{mask} \\ 0 & \text{otherwise} \end{cases}, \qquad
        \frac{\partial}{\partial w} = g

    The gradient reaches every weight, also the dropped ones, so that one can come back when the masks are made again.
    ``torch.vmap`` has a rule for it.

    Args:
        weight: any shape; float32, float64, float16 or bfloat16. A NaN or infinity under the mask becomes 0 too.
        mask: boolean, of the shape of ``weight``.

    Returns:
        Tensor of the shape, type and dense layout of ``weight``.

    Raises:
        RuntimeError: for a mask of another shape, device or type.

    Example:
        >>> apply_mask(torch.tensor([1.0, 2.0]), torch.tensor([True, False]))
        tensor([1., 0.])
    """
    y: Tensor = torch.ops.cctorch.apply_mask(weight, mask)
    return y
