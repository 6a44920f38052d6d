"""Where the scales of fake-quantization start. Results have no gradients."""

import torch
from torch import Tensor


def quant_range(x: Tensor, qmin: int, qmax: int, axis: int | None = None, method: str = "minmax") -> Tensor:
    r"""The logarithm of a scale for :func:`fake_quant` of ``x``.

    ``"minmax"`` is the smallest scale :math:`s_0` with all of ``x`` in :math:`[s_0 q_{min}, s_0 q_{max}]`; of an
    unsigned grid only positive values count. ``"mse"`` tries :math:`s = r s_0` for r = 1, 0.99, ..., 0.01 and takes the
    one with the smallest squared error, the largest of several:

    .. math:: \min_r \sum (\text{fake\_quant}(x, \log(r s_0), q_{min}, q_{max}) - x)^2

    Args:
        x: any shape; float32, float64, float16 or bfloat16. Where it is all zeros the scale is 1.
        qmin: lowest integer of the grid.
        qmax: highest integer of the grid.
        axis: the dimension with one scale per index, or None for a single scale.
        method: ``"minmax"`` or ``"mse"``.

    Returns:
        One element without ``axis``, else shape ``(x.size(axis),)``; float64 for float64 ``x``, else float32.

    Raises:
        RuntimeError: for a wrong type, axis, range or method; the message names the argument.

    Example:
        >>> quant_range(torch.tensor([0.5, -4.0, 3.5]), qmin=-8, qmax=7).exp()
        tensor([0.5000])
    """
    log_scale: Tensor = torch.ops.cctorch.quant_range(x, qmin, qmax, axis, method)
    return log_scale


def quant_range_offset(
    x: Tensor, qmin: int, qmax: int, axis: int | None = None, method: str = "minmax"
) -> tuple[Tensor, Tensor]:
    r"""The logarithm of a scale and an offset for :func:`fake_quant_offset` of ``x``.

    ``"minmax"``: the range is :math:`[l, h] = [\min x, \max x]`,

    .. math:: s = (h - l) / (q_{max} - q_{min}), \quad \beta = l - s \, q_{min}

    ``"mse"``: the upper end moves to :math:`h - p (h - l)`, with the p of 0, 0.01, ..., 0.99 that has the smallest
    squared error of :func:`fake_quant_offset`; then the lower end to :math:`l + p (h - l)` in the same way.

    Args:
        x: any shape; float32, float64, float16 or bfloat16. Where all values are equal they come back exactly.
        qmin: lowest integer of the grid.
        qmax: highest integer of the grid.
        axis: the dimension with a scale and an offset per index, or None for one of each.
        method: ``"minmax"`` or ``"mse"``.

    Returns:
        ``log_scale`` and ``offset``, each as from :func:`quant_range`.

    Raises:
        RuntimeError: for a wrong type, axis, range or method; the message names the argument.

    Example:
        >>> log_scale, offset = quant_range_offset(torch.tensor([1.0, 2.0, 4.0]), qmin=0, qmax=3)
        >>> log_scale.exp(), offset
        (tensor([1.]), tensor([1.]))
    """
    log_scale, offset = torch.ops.cctorch.quant_range_offset(x, qmin, qmax, axis, method)
    return log_scale, offset


def observe_range_(low: Tensor, high: Tensor, x: Tensor, momentum: float = 0.1, axis: int | None = None) -> None:
    r"""Moving averages of the smallest and the largest value, in place.

    .. math::

        \text{low} \leftarrow \text{low} + \text{momentum} (\min x - \text{low}), \qquad
        \text{high} \leftarrow \text{high} + \text{momentum} (\max x - \text{high})

    An end that is infinite has seen nothing yet and takes the first value. Nothing waits for the device.

    Args:
        low: one element where ``axis`` is None, else shape ``(x.size(axis),)``; float64 for float64 ``x``, else
            float32.
        high: of the same shape and type.
        x: any shape. Empty: nothing happens.
        momentum: weight of the new value, from 0 to 1.
        axis: the dimension with one range per index, or None for a single range.

    Raises:
        RuntimeError: for a wrong type, shape, device, axis or momentum; the message names the argument.

    Example:
        >>> low, high = torch.full((1,), torch.inf), torch.full((1,), -torch.inf)
        >>> for x in (torch.tensor([0.0, 4.0]), torch.tensor([-2.0, 8.0])):
        ...     observe_range_(low, high, x, momentum=0.5)
        >>> quant_range(torch.stack([low, high]), qmin=-2, qmax=3, axis=1).exp()
        tensor([2.])
    """
    torch.ops.cctorch.observe_range_(low, high, x, momentum, axis)
