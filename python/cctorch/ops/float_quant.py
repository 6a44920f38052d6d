"""Quantization to floating-point numbers of few bits."""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from cctorch.ops.lists import for_each

_fp8_quant = torch.ops.cctorch.fp8_quant.default
_fp8_quant_list = torch.ops.cctorch.fp8_quant.list
_power_of_two_quant = torch.ops.cctorch.power_of_two_quant.default
_power_of_two_quant_list = torch.ops.cctorch.power_of_two_quant.list


@overload
def fp8_quant(
    x: Tensor,
    log_scale: Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    axis: int | None = None,
    grad_scale: float = 1.0,
) -> Tensor: ...


@overload
def fp8_quant(
    x: Sequence[Tensor],
    log_scale: Sequence[Tensor],
    dtype: torch.dtype = torch.float8_e4m3fn,
    axis: int | None = None,
    grad_scale: float | Sequence[float] = 1.0,
) -> list[Tensor]: ...


def fp8_quant(
    x: Tensor | Sequence[Tensor],
    log_scale: Tensor | Sequence[Tensor],
    dtype: torch.dtype = torch.float8_e4m3fn,
    axis: int | None = None,
    grad_scale: float | Sequence[float] = 1.0,
) -> Tensor | list[Tensor]:
    r"""Rounds ``x`` to 8-bit floating point times a scale.

    .. math:: s = \exp(\text{log\_scale}), \quad v = x / s, \quad y = s \cdot \text{fp8}(\text{clamp}(v, -m, m))

    with :math:`m` = 448 for ``float8_e4m3fn`` and 57344 for ``float8_e5m2`` (Micikevicius et al. 2022). Rounding is to
    the nearest number, a tie to the even mantissa, as PyTorch's conversion does it; what is larger than :math:`m`
    saturates, where PyTorch's becomes NaN or infinite.

    Backward: straight-through where :math:`|v| \le m`, 0 elsewhere. The scale may be learned, by the gradient of
    :func:`fake_quant` with this rounding.

    Args:
        x: any shape; float32, float64, float16 or bfloat16. Or a sequence of tensors, as for :func:`fake_quant`.
        log_scale: one element where ``axis`` is None, else shape ``(x.size(axis),)``; the type as for
            :func:`fake_quant`.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        axis: the dimension with one scale per index, or None for a single scale.
        grad_scale: factor on the gradient of ``log_scale``; for a sequence also one for each tensor.

    Returns:
        Tensor of the shape, type and dense layout of ``x``, or a list of them.

    Raises:
        RuntimeError: for a wrong type, shape, device, axis or format; the message names the argument.

    Example:
        >>> fp8_quant(torch.tensor([0.3, 1.7, 9.4]), torch.zeros(1))
        tensor([0.3125, 1.7500, 9.0000])
    """
    if isinstance(x, Tensor):
        y: Tensor = _fp8_quant(x, log_scale, dtype, axis, grad_scale)
        return y
    ys: list[Tensor] = _fp8_quant_list(x, log_scale, dtype, axis, for_each(x, grad_scale))
    return ys


@overload
def power_of_two_quant(x: Tensor, bits: int, axis: int | None = None) -> Tensor: ...


@overload
def power_of_two_quant(x: Sequence[Tensor], bits: int, axis: int | None = None) -> list[Tensor]: ...


def power_of_two_quant(x: Tensor | Sequence[Tensor], bits: int, axis: int | None = None) -> Tensor | list[Tensor]:
    r"""Rounds ``x`` to signed powers of two, whose products are shifts (INQ, Zhou et al. 2017, eq. 2 to 4).

    .. math::

        y \in \{0, \pm 2^{t}, \pm 2^{t-1}, \dots, \pm 2^{t-n+1}\}, \quad n = 2^{\text{bits}-1} - 1, \quad
        t = \lfloor \log_2 \tfrac{4}{3} \max |x| \rfloor

    ``y`` is the nearest of these values; of two as near the larger, but 0 rather than the smallest power. All
    :math:`2^{\text{bits}} - 1` of them have a code of that many bits. Backward: straight-through.

    Args:
        x: any shape; float32, float64, float16 or bfloat16. Where a value is not finite, :math:`t` is 0.
            Or a sequence of such tensors, of one type and on one device.
        bits: 2 to 7.
        axis: the dimension with one :math:`t` per index, or None for a single one.

    Returns:
        Tensor of the shape, type and dense layout of ``x``, or a list of them.

    Raises:
        RuntimeError: for a wrong type, axis or number of bits; the message names the argument.

    Example:
        >>> power_of_two_quant(torch.tensor([1.0, -0.7, 0.3, 0.05]), bits=3)
        tensor([ 1.0000, -0.5000,  0.2500,  0.0000])
    """
    if isinstance(x, Tensor):
        y: Tensor = _power_of_two_quant(x, bits, axis)
        return y
    ys: list[Tensor] = _power_of_two_quant_list(x, bits, axis)
    return ys
