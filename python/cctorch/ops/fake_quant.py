"""Learned-scale fake-quantization."""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from cctorch.ops.lists import for_each

# An overload, looked up once: what a small tensor costs is mostly the call.
_fake_quant = torch.ops.cctorch.fake_quant.default
_fake_quant_offset = torch.ops.cctorch.fake_quant_offset.default
_fake_quant_list = torch.ops.cctorch.fake_quant.list
_fake_quant_offset_list = torch.ops.cctorch.fake_quant_offset.list
_fake_quant_groups = torch.ops.cctorch.fake_quant_groups.default
_pact = torch.ops.cctorch.pact.default


@overload
def fake_quant(
    x: Tensor, log_scale: Tensor, qmin: int, qmax: int, axis: int | None = None, grad_scale: float = 1.0
) -> Tensor: ...


@overload
def fake_quant(
    x: Sequence[Tensor],
    log_scale: Sequence[Tensor],
    qmin: int,
    qmax: int,
    axis: int | None = None,
    grad_scale: float | Sequence[float] = 1.0,
) -> list[Tensor]: ...


def fake_quant(
    x: Tensor | Sequence[Tensor],
    log_scale: Tensor | Sequence[Tensor],
    qmin: int,
    qmax: int,
    axis: int | None = None,
    grad_scale: float | Sequence[float] = 1.0,
) -> Tensor | list[Tensor]:
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
    be differentiated again. ``torch.vmap`` has a rule for it, where ``x`` is one tensor.

    A sequence of tensors, a model's weights for example, is quantized at once: in a few launches on CUDA, in one
    parallel region on CPU, and so are all gradients. Tensor i has the scales ``log_scale[i]``.

    Args:
        x: any shape; float32, float64, float16 or bfloat16. NaN stays NaN, infinities become the ends of the grid.
            Or a sequence of such tensors, of one type and on one device.
        log_scale: one element where ``axis`` is None, else shape ``(x.size(axis),)``. float64 for float64 ``x``,
            float32 for the other types: half precision is computed in float32. One for each tensor of a sequence.
        qmin: lowest integer of the grid.
        qmax: highest integer of the grid, above ``qmin``; both within ±2**24.
        axis: the dimension with one scale per index, or None for a single scale.
        grad_scale: factor on the gradient of ``log_scale``; for a sequence also one for each tensor.

    Returns:
        Tensor of the shape, type and dense layout of ``x``, or a list of them.

    Raises:
        RuntimeError: for a wrong type, shape, device, axis or range; the message names the argument.

    Example:
        >>> x = torch.tensor([-3.0, -0.4, 0.6, 1.5])
        >>> fake_quant(x, torch.zeros(1), qmin=-2, qmax=1)
        tensor([-2., -0.,  1.,  1.])
        >>> fake_quant([x, x[:2]], [torch.zeros(1), torch.ones(1)], qmin=-2, qmax=1)
        [tensor([-2., -0.,  1.,  1.]), tensor([-2.7183, -0.0000])]
    """
    if isinstance(x, Tensor):
        y: Tensor = _fake_quant(x, log_scale, qmin, qmax, axis, grad_scale)
        return y
    ys: list[Tensor] = _fake_quant_list(x, log_scale, qmin, qmax, axis, for_each(x, grad_scale))
    return ys


@overload
def fake_quant_offset(
    x: Tensor,
    log_scale: Tensor,
    offset: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    grad_scale: float = 1.0,
) -> Tensor: ...


@overload
def fake_quant_offset(
    x: Sequence[Tensor],
    log_scale: Sequence[Tensor],
    offset: Sequence[Tensor],
    qmin: int,
    qmax: int,
    axis: int | None = None,
    grad_scale: float | Sequence[float] = 1.0,
) -> list[Tensor]: ...


def fake_quant_offset(
    x: Tensor | Sequence[Tensor],
    log_scale: Tensor | Sequence[Tensor],
    offset: Tensor | Sequence[Tensor],
    qmin: int,
    qmax: int,
    axis: int | None = None,
    grad_scale: float | Sequence[float] = 1.0,
) -> Tensor | list[Tensor]:
    r"""The same around a learned offset :math:`\beta` (LSQ+, Bhalgat et al. 2020, eq. 3 to 6).

    .. math:: v = (x - \beta) / s, \quad y = s \cdot \text{round}(\text{clamp}(v, q_{min}, q_{max})) + \beta

    The gradients of ``x`` and ``log_scale`` are those of :func:`fake_quant` with this :math:`v`, and

    .. math::

        \frac{\partial}{\partial \beta} = \text{grad\_scale} \sum g \cdot [v < q_{min} \text{ or } v > q_{max}]

    Args:
        x: any shape; float32, float64, float16 or bfloat16. Or a sequence of tensors, as for :func:`fake_quant`.
        log_scale: as for :func:`fake_quant`.
        offset: of the shape and type of ``log_scale``, in the unit of ``x``.
        qmin: lowest integer of the grid.
        qmax: highest integer of the grid.
        axis: the dimension with one scale and one offset per index, or None for one of each.
        grad_scale: factor on the gradients of ``log_scale`` and ``offset``; for a sequence also one for each tensor.

    Returns:
        Tensor of the shape, type and dense layout of ``x``, or a list of them.

    Raises:
        RuntimeError: for a wrong type, shape, device, axis or range; the message names the argument.

    Example:
        >>> x = torch.tensor([-1.0, 0.1, 0.6, 2.0])
        >>> fake_quant_offset(x, torch.zeros(1), torch.tensor([-0.25]), qmin=0, qmax=1)
        tensor([-0.2500, -0.2500,  0.7500,  0.7500])
    """
    if isinstance(x, Tensor):
        y: Tensor = _fake_quant_offset(x, log_scale, offset, qmin, qmax, axis, grad_scale)
        return y
    ys: list[Tensor] = _fake_quant_offset_list(x, log_scale, offset, qmin, qmax, axis, for_each(x, grad_scale))
    return ys


def fake_quant_groups(
    x: Tensor,
    log_scale: Tensor,
    qmin: int,
    qmax: int,
    group_size: int,
    grad_scale: float = 1.0,
    offset: Tensor | None = None,
) -> Tensor:
    r"""One scale for every ``group_size`` consecutive elements of each index of dimension 0.

    An index of dimension 0 (an output channel) is flattened in row-major order, whatever the memory format, and cut
    into groups. Formula and gradients are those of :func:`fake_quant`, or of :func:`fake_quant_offset` where there is
    an ``offset``.

    Args:
        x: ``rows`` x ...; float32, float64, float16 or bfloat16.
        log_scale: ``rows`` x ``groups``.
        qmin: lowest integer of the grid.
        qmax: highest integer of the grid.
        group_size: elements of a group; divides those of a row.
        grad_scale: factor on the gradients of ``log_scale`` and ``offset``.
        offset: ``rows`` x ``groups``, or None.

    Returns:
        Tensor of the shape, type and memory format of ``x``.

    Raises:
        RuntimeError: for a wrong type, shape, device, group size or range; the message names the argument.

    Example:
        >>> x = torch.tensor([[1.2, 2.6, 10.0, 30.0]])
        >>> fake_quant_groups(x, torch.tensor([[1.0, 10.0]]).log(), qmin=-4, qmax=3, group_size=2)
        tensor([[ 1.,  3., 10., 30.]])
    """
    y: Tensor = _fake_quant_groups(x, log_scale, qmin, qmax, group_size, grad_scale, offset)
    return y


def pact(x: Tensor, log_alpha: Tensor, bits: int, axis: int | None = None) -> Tensor:
    r"""Clips activations to a learned range and rounds them (PACT, Choi et al. 2018, eq. 1 to 3).

    .. math::

        \alpha = \exp(\text{log\_alpha}), \quad n = 2^{\text{bits}} - 1, \quad
        y = \frac{\alpha}{n} \, \text{round}\left( \text{clip}(x, 0, \alpha) \, \frac{n}{\alpha} \right)

    It is :func:`fake_quant` from 0 to :math:`n` with the gradient of the clipping alone:

    .. math::

        \frac{\partial}{\partial x} = g \cdot [0 \le x < \alpha], \qquad
        \frac{\partial}{\partial\,\text{log\_alpha}} = \alpha \sum g \cdot [x \ge \alpha]

    Args:
        x: any shape; float32, float64, float16 or bfloat16.
        log_alpha: one element where ``axis`` is None, else shape ``(x.size(axis),)``; the type as for
            :func:`fake_quant`. The clipping level is positive and finite for every finite logarithm.
        bits: 1 to 16.
        axis: the dimension with one level per index, or None for a single one.

    Returns:
        Tensor of the shape, type and dense layout of ``x``.

    Raises:
        RuntimeError: for a wrong type, shape, device, axis or number of bits; the message names the argument.

    Example:
        >>> pact(torch.tensor([-1.0, 0.4, 1.4, 5.0]), torch.tensor([3.0]).log(), bits=2)
        tensor([0., 0., 1., 3.])
    """
    y: Tensor = _pact(x, log_alpha, bits, axis)
    return y
