"""Masks of the weights to keep. All are boolean, of the shape and dense layout of their weight, and exact.

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


def nm_mask(weight: Tensor, n: int, m: int, axis: int = 1) -> Tensor:
    """Keeps the ``n`` largest magnitudes of every ``m`` consecutive weights along ``axis``.

    Args:
        weight: any shape whose size along ``axis`` is a multiple of ``m``.
        n: weights kept in a group, from 1 to ``m``.
        m: weights in a group.
        axis: the dimension of the groups; 1 is the input channels of a linear layer or a convolution.

    Returns:
        Boolean mask of the shape of ``weight``. Ties go to the lower index.

    Raises:
        RuntimeError: for an ``n``, ``m`` or ``axis`` that does not fit the weight, or NaN on CPU.

    Example:
        >>> nm_mask(torch.tensor([[1.0, -4.0, 2.0, 3.0]]), n=2, m=4)
        tensor([[False,  True, False,  True]])
    """
    mask: Tensor = torch.ops.cctorch.nm_mask(weight, n, m, axis)
    return mask


def channel_mask(weight: Tensor, sparsity: float, axis: int = 0) -> Tensor:
    r"""Keeps the :math:`\lfloor (1 - \text{sparsity}) \cdot C \rfloor` slices along ``axis`` with the largest L2 norm.

    At least one slice is kept. Norms are computed in float64.

    Args:
        weight: any shape with at least one dimension; ``C`` is its size along ``axis``.
        sparsity: fraction of the slices to drop, from 0 to 1.
        axis: the dimension of the slices; 0 is the filters of a convolution, 1 its input channels.

    Returns:
        Boolean mask of the shape of ``weight``, constant within a slice. Ties go to the lower index.

    Raises:
        RuntimeError: for a sparsity or ``axis`` out of range, or NaN on CPU.

    Example:
        >>> channel_mask(torch.tensor([[3.0, 4.0], [1.0, 1.0]]), sparsity=0.5)
        tensor([[ True,  True],
                [False, False]])
    """
    mask: Tensor = torch.ops.cctorch.channel_mask(weight, sparsity, axis)
    return mask


def apply_mask(weight: Tensor, mask: Tensor) -> Tensor:
    r"""``weight`` where ``mask`` is True, else 0, with a straight-through gradient.

    .. math::

        y = \begin{cases} w & \text{mask} \\ 0 & \text{otherwise} \end{cases}, \qquad
        \frac{\partial}{\partial w} = g

    The gradient reaches every weight, also the dropped ones, so that one can come back when the masks are made again.

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
