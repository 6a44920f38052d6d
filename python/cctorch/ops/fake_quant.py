"""Learned-scale fake-quantization."""

import torch
from torch import Tensor


def fake_quant(
    x: Tensor, log_scale: Tensor, qmin: int, qmax: int, axis: int | None = None, grad_scale: float = 1.0
) -> Tensor:
    r"""Rounds ``x`` to a grid of integers times a learned scale (LSQ, Esser et al. 2020, eq. 1 to 3).

    .. math::

        s = \exp(\text{log\_scale}), \quad v = x / s, \quad y = s \cdot \text{round}(\text{clamp}(v, q_{min}, q_{max}))

    Rounding is to the nearest integer, a half to the even one. The scale is positive and finite for every finite
    logarithm: it is kept within the normal range of its type.

    Backward, for an incoming gradient :math:`g`:

    .. math::

        \frac{\partial}{\partial x} = g \cdot [q_{min} \le v \le q_{max}], \qquad
        \frac{\partial}{\partial\,\text{log\_scale}} = \text{grad\_scale} \sum g \, s \begin{cases}
            \text{round}(v) - v & q_{min} \le v \le q_{max} \\
            \text{clamp}(v, q_{min}, q_{max}) & \text{otherwise} \end{cases}

    LSQ recommends ``grad_scale = 1 / sqrt(numel * qmax)``, with the elements of one scale counted. The gradient cannot
    be differentiated again.

    Args:
        x: any shape; float32, float64, float16 or bfloat16. NaN stays NaN, infinities become the ends of the grid.
        log_scale: one element where ``axis`` is None, else shape ``(x.size(axis),)``. float64 for float64 ``x``,
            float32 for the other types: half precision is computed in float32.
        qmin: lowest integer of the grid.
        qmax: highest integer of the grid, above ``qmin``; both within ±2**24.
        axis: the dimension with one scale per index, or None for a single scale.
        grad_scale: factor on the gradient of ``log_scale``.

    Returns:
        Tensor of the shape, type and dense layout of ``x``.

    Raises:
        RuntimeError: for a wrong type, shape, device, axis or range; the message names the argument.

    Example:
        >>> x = torch.tensor([-3.0, -0.4, 0.6, 1.5])
        >>> fake_quant(x, torch.zeros(1), qmin=-2, qmax=1)
        tensor([-2., -0.,  1.,  1.])
    """
    y: Tensor = torch.ops.cctorch.fake_quant(x, log_scale, qmin, qmax, axis, grad_scale)
    return y
