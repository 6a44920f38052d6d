"""Fake-quantization of a whole model's weights at once, on grids taken from the weights."""

from collections.abc import Sequence

import torch
from torch import Tensor


def fake_quant_weights(weights: Sequence[Tensor], bits: int, axis: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    r"""Rounds every slice of the weights to a symmetric grid that just holds it.

    .. math::

        q = 2^{\text{bits} - 1} - 1, \quad s = \max |w| / q, \quad y = s \cdot \text{round}(w / s)

    with one scale :math:`s` for each index of ``axis`` (symmetric uniform quantization with the full range of the
    weights, Krishnamoorthi 2018, section 2.2). Ranges and rounding of all weights are found in one pass over memory,
    and in one kernel launch for every hundred weights on a GPU. Rounding is to the nearest integer, a half to the even
    one. A slice of zeros has the smallest normal scale.

    Nothing is clipped, so backward is straight-through for every weight; the scales are constants:

    .. math::

        \frac{\partial}{\partial w} = g

    Args:
        weights: tensors of any shapes, of one floating-point type and on one device.
        bits: width of the grid, from 2 to 16; 4 is the integers from -7 to 7.
        axis: the dimension with one scale per index; 0 is the filters of a convolution or the outputs of a linear
            layer. It must exist in every weight.

    Returns:
        ``(quantized, scales)``: tensors of the shape, type and dense layout of their weight, and the scales of shape
        ``(weight.size(axis),)`` in float64 for float64 weights, float32 for the other types. NaN stays NaN and has no
        say in the scale of its slice; an infinity becomes the end of the largest grid that its type holds.

    Raises:
        RuntimeError: for bits or an axis out of range, or mixed types or devices; the message names the weight.

    Example:
        >>> quantized, scales = fake_quant_weights([torch.tensor([[3.0, -0.4], [0.5, 1.5]])], bits=3)
        >>> quantized[0].tolist(), scales[0].tolist()
        ([[3.0, -0.0], [0.5, 1.5]], [1.0, 0.5])
    """
    quantized, scales = torch.ops.cctorch.fake_quant_weights(weights, bits, axis)
    return quantized, scales
