"""Quantization to few values that are computed from the weights themselves.

They are those of the whole tensor, or with ``axis`` of each index of that dimension. Sums and searches run in float64.
Of a sequence of tensors, what is equally long is searched together on CUDA, whichever of the tensors it is of.
"""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor


@overload
def binary_quant(x: Tensor, axis: int | None = None) -> Tensor: ...


@overload
def binary_quant(x: Sequence[Tensor], axis: int | None = None) -> list[Tensor]: ...


def binary_quant(x: Tensor | Sequence[Tensor], axis: int | None = None) -> Tensor | list[Tensor]:
    r"""The best scaled signs (XNOR-Net, Rastegari et al. 2016, eq. 6).

    .. math:: y = a \, \text{sign}(x), \quad a = \text{mean} |x|

    Zero counts as positive. Backward: straight-through where :math:`|x| \le 1`, 0 elsewhere.

    Args:
        x: any shape; float32, float64, float16 or bfloat16. Or a sequence of such tensors, of one type and on one
            device.
        axis: the dimension with one :math:`a` per index, or None for a single one.

    Returns:
        Tensor of the shape, type and dense layout of ``x``, or a list of them.

    Raises:
        RuntimeError: for a wrong type or axis.

    Example:
        >>> binary_quant(torch.tensor([[1.0, -3.0], [0.0, 4.0]]), axis=0)
        tensor([[ 2., -2.],
                [ 2.,  2.]])
    """
    if isinstance(x, Tensor):
        y: Tensor = torch.ops.cctorch.binary_quant.default(x, axis)
        return y
    ys: list[Tensor] = torch.ops.cctorch.binary_quant.list(x, axis)
    return ys


@overload
def ternary_quant(x: Tensor, axis: int | None = None) -> Tensor: ...


@overload
def ternary_quant(x: Sequence[Tensor], axis: int | None = None) -> list[Tensor]: ...


def ternary_quant(x: Tensor | Sequence[Tensor], axis: int | None = None) -> Tensor | list[Tensor]:
    r"""The scaled ternary values of the smallest squared error (TWN, Li et al. 2016, eq. 3), found exactly.

    .. math:: y \in \{-a, 0, a\}: \quad \min_{a, y} \|x - y\|^2

    The largest :math:`k` magnitudes become :math:`\pm a`, their mean, for the :math:`k` that maximizes
    :math:`(\text{sum of them})^2 / k`. Backward: straight-through.

    Args:
        x: any shape; float32, float64, float16 or bfloat16. Or a sequence of such tensors, of one type and on one
            device. A row with NaN or infinity becomes NaN.
        axis: the dimension with one :math:`a` per index, or None for a single one.

    Returns:
        Tensor of the shape, type and dense layout of ``x``, or a list of them.

    Raises:
        RuntimeError: for a wrong type or axis.

    Example:
        >>> ternary_quant(torch.tensor([4.0, -2.0, 0.5, -0.25]))
        tensor([ 3., -3.,  0.,  0.])
    """
    if isinstance(x, Tensor):
        y: Tensor = torch.ops.cctorch.ternary_quant.default(x, axis)
        return y
    ys: list[Tensor] = torch.ops.cctorch.ternary_quant.list(x, axis)
    return ys


@overload
def binary_code_quant(x: Tensor, bits: int, method: str = "alternating", axis: int | None = None) -> Tensor: ...


@overload
def binary_code_quant(
    x: Sequence[Tensor], bits: int, method: str = "alternating", axis: int | None = None
) -> list[Tensor]: ...


def binary_code_quant(
    x: Tensor | Sequence[Tensor], bits: int, method: str = "alternating", axis: int | None = None
) -> Tensor | list[Tensor]:
    r"""A sum of scaled binary codes.

    .. math:: y = \sum_{i=1}^{\text{bits}} a_i b_i, \quad b_i \in \{-1, 1\}^n

    ``"greedy"`` fits each code to what the ones before leave (Guo et al. 2017, eq. 4). ``"alternating"`` is the optimum
    for 1 and 2 bits; every further code starts greedily, then 20 turns alternate between the nearest codes and least
    squares for all scales (Xu et al. 2018, algorithm 2). Backward: straight-through.

    Args:
        x: any shape; float32, float64, float16 or bfloat16. Or a sequence of such tensors, of one type and on one
            device. A row with NaN or infinity becomes NaN.
        bits: 1 to 8.
        method: ``"alternating"`` or ``"greedy"``.
        axis: the dimension with scales of its own for each index, or None for one set of scales.

    Returns:
        Tensor of the shape, type and dense layout of ``x``, or a list of them.

    Raises:
        RuntimeError: for a wrong type, axis, method or number of bits; the message names the argument.

    Example:
        >>> binary_code_quant(torch.tensor([1.0, 1.2, -3.0, 3.0]), bits=2)
        tensor([ 1.1000,  1.1000, -3.0000,  3.0000])
    """
    if isinstance(x, Tensor):
        y: Tensor = torch.ops.cctorch.binary_code_quant.default(x, bits, method, axis)
        return y
    ys: list[Tensor] = torch.ops.cctorch.binary_code_quant.list(x, bits, method, axis)
    return ys


@overload
def codebook_quant(x: Tensor, codebook: Tensor) -> Tensor: ...


@overload
def codebook_quant(x: Sequence[Tensor], codebook: Sequence[Tensor]) -> list[Tensor]: ...


def codebook_quant(x: Tensor | Sequence[Tensor], codebook: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    r"""Replaces each value by the nearest of a codebook :math:`c`, the lower of two as near.

    .. math:: y = c_{k}, \quad k = \arg\min_j |x - c_j|

    A NaN in the codebook is the nearest for all of ``x``, as for ``torch.argmin``: a codebook that went wrong shows.

    Backward: straight-through to ``x``; :math:`\partial / \partial c_j` is the sum of the gradients of the members of
    :math:`j`, in no fixed order on CUDA unless ``torch.use_deterministic_algorithms`` asks for one.

    Args:
        x: any shape; float32, float64, float16 or bfloat16. NaN stays NaN. Or a sequence of such tensors, of one type
            and on one device.
        codebook: one-dimensional, in any order; float64 for float64 ``x``, float32 for the other types. Of a sequence
            one for each.

    Returns:
        Tensor of the shape, type and dense layout of ``x``, or a list of them.

    Raises:
        RuntimeError: for a wrong type, shape or device; the message names the argument.

    Example:
        >>> codebook_quant(torch.tensor([-2.0, 0.4, 0.6]), torch.tensor([0.0, 1.0, -1.0]))
        tensor([-1.,  0.,  1.])
    """
    if isinstance(x, Tensor):
        y: Tensor = torch.ops.cctorch.codebook_quant.default(x, codebook)
        return y
    ys: list[Tensor] = torch.ops.cctorch.codebook_quant.list(x, codebook)
    return ys


def codebook_indices(x: Tensor, codebook: Tensor) -> Tensor:
    """Which value of the codebook is the nearest: what is stored of a weight that :func:`codebook_quant` quantized.

    Args:
        x: any shape, without NaN.
        codebook: as for :func:`codebook_quant`.

    Returns:
        int64, contiguous, of the shape of ``x``.

    Example:
        >>> codebook_indices(torch.tensor([-2.0, 0.4, 0.6]), torch.tensor([0.0, 1.0, -1.0]))
        tensor([2, 0, 1])
    """
    indices: Tensor = torch.ops.cctorch.codebook_indices(x, codebook)
    return indices


@overload
def codebook_update(x: Tensor, codebook: Tensor) -> Tensor: ...


@overload
def codebook_update(x: Sequence[Tensor], codebook: Sequence[Tensor]) -> list[Tensor]: ...


def codebook_update(x: Tensor | Sequence[Tensor], codebook: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    """One step of K-means (Lloyd): each value becomes the mean of its members, one without members stays.

    Args:
        x: any shape, finite. Or a sequence, as for :func:`codebook_quant`.
        codebook: as for :func:`codebook_quant`.

    Returns:
        A new codebook, in the order of the old one, or a list of them. It has no gradient.

    Example:
        >>> codebook_update(torch.tensor([0.0, 2.0, 9.0, 11.0]), torch.tensor([8.0, 3.0, 90.0]))
        tensor([10.,  1., 90.])
    """
    if isinstance(x, Tensor):
        updated: Tensor = torch.ops.cctorch.codebook_update.default(x, codebook)
        return updated
    all_updated: list[Tensor] = torch.ops.cctorch.codebook_update.list(x, codebook)
    return all_updated
