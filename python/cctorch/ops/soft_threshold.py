"""Soft thresholds."""

import torch
from torch import Tensor


def soft_threshold(x: Tensor, threshold: Tensor, axis: int | None = None) -> Tensor:
    r"""Shrinks every magnitude by a threshold, and what is below it to 0 (STR, Kusupati et al. 2020, eq. 3).

    .. math::

        y = \text{sign}(x) \cdot \text{relu}(|x| - t), \qquad
        \frac{\partial}{\partial x} = g \cdot [|x| > t], \qquad
        \frac{\partial}{\partial t} = -\sum g \cdot \text{sign}(x) \cdot [|x| > t]

    STR learns :math:`t = \sigma(s)`: ``soft_threshold(weight, torch.sigmoid(s), axis)``, as
    :class:`cctorch.nn.SoftThreshold` does. The gradient cannot be differentiated again. ``torch.vmap`` has a rule for
    it.

    Args:
        x: any shape; float32, float64, float16 or bfloat16. NaN stays NaN.
        threshold: one element where ``axis`` is None, else shape ``(x.size(axis),)``. float64 for float64 ``x``,
            float32 for the other types: half precision is computed in float32. Not negative.
        axis: the dimension with one threshold per index, or None for a single one.

    Returns:
        Tensor of the shape, type and dense layout of ``x``.

    Raises:
        RuntimeError: for a wrong type, shape, device or axis; the message names the argument.

    Example:
        >>> soft_threshold(torch.tensor([-3.0, 0.5, 2.0]), torch.tensor([1.0]))
        tensor([-2.,  0.,  1.])
    """
    y: Tensor = torch.ops.cctorch.soft_threshold(x, threshold, axis)
    return y
