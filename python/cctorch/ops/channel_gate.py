"""Channel gates."""

import torch
from torch import Tensor


def channel_gate(x: Tensor, gate: Tensor) -> Tensor:
    r"""Multiplies every channel by its gate: :math:`y_{n,c,\dots} = x_{n,c,\dots} \cdot \text{gate}_c`.

    The gradient of ``gate[c]`` is the sum of ``grad * x`` over channel ``c``, accumulated in float32 or float64. At
    ``gate = 1`` it is the first-order Taylor importance of the channel (Molchanov et al. 2019, eq. 8, before squaring).
    Differentiable any number of times, in both arguments. ``torch.vmap`` has a rule for it.

    Args:
        x: shape ``(N, C, ...)``; float32, float64, float16 or bfloat16.
        gate: shape ``(C,)``, of the type of ``x`` or, where that is half precision, float32.

    Returns:
        Tensor of the shape, type and dense layout (channels-last included) of ``x``.

    Raises:
        RuntimeError: for a wrong type, shape or device; the message names the argument.

    Example:
        >>> x = torch.ones(1, 3, 2)
        >>> channel_gate(x, torch.tensor([0.0, 1.0, 2.0])).tolist()
        [[[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]]
    """
    y: Tensor = torch.ops.cctorch.channel_gate(x, gate)
    return y
