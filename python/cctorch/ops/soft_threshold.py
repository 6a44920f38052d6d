"""Soft thresholds."""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

_soft_threshold = torch.ops.cctorch.soft_threshold.default
_soft_threshold_list = torch.ops.cctorch.soft_threshold.list


@overload
def soft_threshold(x: Tensor, threshold: Tensor, axis: int | None = None) -> Tensor: ...


@overload
def soft_threshold(x: Sequence[Tensor], threshold: Sequence[Tensor], axis: int | None = None) -> list[Tensor]: ...


def soft_threshold(
    x: Tensor | Sequence[Tensor], threshold: Tensor | Sequence[Tensor], axis: int | None = None
) -> Tensor | list[Tensor]:
    r"""Shrinks every magnitude by a threshold, and what is below it to 0 (STR, Kusupati et al. 2020, eq. 3).

    .. math::

        y = \text{sign}(x) \cdot \text{relu}(|x| - t), \qquad
        \frac{\partial}{\partial x} = g \cdot [|x| > t], \qquad
        \frac{\partial}{\partial t} = -\sum g \cdot \text{sign}(x) \cdot [|x| > t]

    STR learns :math:`t = \sigma(s)`: ``soft_threshold(weight, torch.sigmoid(s), axis)``, as
    :class:`cctorch.nn.SoftThreshold` does. The gradient cannot be differentiated again. ``torch.vmap`` has a rule for
    it, where ``x`` is one tensor. A sequence of tensors is treated at once, as by :func:`fake_quant`.

    Args:
        x: any shape; float32, float64, float16 or bfloat16. NaN stays NaN. Or a sequence of such tensors, of one type
            and on one device.
        threshold: one element where ``axis`` is None, else shape ``(x.size(axis),)``. float64 for float64 ``x``,
            float32 for the other types: half precision is computed in float32. Not negative. One for each tensor of a
            sequence.
        axis: the dimension with one threshold per index, or None for a single one.

    Returns:
        Tensor of the shape, type and dense layout of ``x``, or a list of them.

    Raises:
        RuntimeError: for a wrong type, shape, device or axis; the message names the argument.

    Example:
        >>> soft_threshold(torch.tensor([-3.0, 0.5, 2.0]), torch.tensor([1.0]))
        tensor([-2.,  0.,  1.])
        >>> soft_threshold([torch.ones(2), torch.ones(1)], [torch.tensor([0.5]), torch.tensor([2.0])])
        [tensor([0.5000, 0.5000]), tensor([0.])]
    """
    if isinstance(x, Tensor):
        y: Tensor = _soft_threshold(x, threshold, axis)
        return y
    ys: list[Tensor] = _soft_threshold_list(x, threshold, axis)
    return ys
