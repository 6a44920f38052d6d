import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cctorch import ops

# Added to the logarithm of a scale that comes from a range: the largest value is the end of the grid then, and would be
# clipped or not by its last bit, in which ranks of a run, or devices, may differ.
_INSIDE = 1e-6


def _kind(x: Tensor) -> torch.dtype:
    """The type of the scales of `x`."""
    return torch.promote_types(x.dtype, torch.float32)


class NoScaleError(ValueError):
    """An export of a module that has yet to see the data that its scale starts from."""


class FakeQuant(nn.Module):
    r"""Learned-scale fake-quantization of weights or activations (LSQ, Esser et al. 2020; LSQ+, Bhalgat et al. 2020).

    .. math::

        y = s \cdot \mathrm{clamp}(\mathrm{round}((x - \beta) / s), q_{min}, q_{max}) + \beta,
        \quad s = e^{\mathrm{log\_scale}}

    The scale starts, with the first input or the one given to :meth:`initialize`, after ``init``: ``"lsq"`` at
    :math:`2 \langle |x| \rangle / \sqrt{q_{max}}` with :math:`\beta = 0`; ``"minmax"`` and ``"mse"`` as
    :func:`cctorch.ops.quant_range` and :func:`cctorch.ops.quant_range_offset` find it. Gradients of scales and offsets
    are multiplied by :math:`1 / \sqrt{n\,q_{max}}` for n values that share a scale.

    Args:
        bits: 2 to 16.
        signed: range :math:`[-2^{b-1}, 2^{b-1} - 1]`, else :math:`[0, 2^b - 1]`.
        axis: dimension with one scale for each index. None: one scale for the whole tensor.
        channels: size of that dimension; required with ``axis``.
        offset: learn the offset :math:`\beta` too; else it is 0.
        groups: scales for each index of axis 0, over equal parts of it: the group size is the elements of an index
            (row-major) divided by this. Needs ``axis=0``.
        init: ``"lsq"``, ``"minmax"`` or ``"mse"``.

    Half precision is quantized with float32 scales, which stay float32 when the module is converted to half precision:
    steps of training are too small for the logarithms that it has.

    In data parallel training run the model once before DistributedDataParallel is made, which gives all ranks those of
    rank 0. Ranks that start from inputs of their own keep scales of their own.
    """

    offset: nn.Parameter | None

    def __init__(
        self,
        bits: int,
        signed: bool = True,
        axis: int | None = None,
        channels: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        offset: bool = False,
        groups: int = 1,
        init: str = "lsq",
    ) -> None:
        super().__init__()
        if not 2 <= bits <= 16:
            raise ValueError(f"FakeQuant: bits = {bits}, expected 2 to 16")
        if (axis is None) != (channels is None):
            raise ValueError(f"FakeQuant: axis = {axis} with channels = {channels}, expected both or neither")
        if channels is not None and channels < 1:
            raise ValueError(f"FakeQuant: channels = {channels}, expected at least 1")
        if groups < 1 or (groups > 1 and axis != 0):
            raise ValueError(f"FakeQuant: groups = {groups} with axis = {axis}, expected 1, or more with axis 0")
        if init not in ("lsq", "minmax", "mse"):
            raise ValueError(f"FakeQuant: init = {init!r}, expected 'lsq', 'minmax' or 'mse'")
        self.bits, self.signed, self.axis, self.groups, self.init = bits, signed, axis, groups, init
        self.qmin = -(2 ** (bits - 1)) if signed else 0
        self.qmax = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        shape = (channels or 1,) if groups == 1 else (channels or 1, groups)
        self.log_scale = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self.register_parameter("offset", nn.Parameter(torch.zeros_like(self.log_scale)) if offset else None)
        self.initialized = False

    @torch.no_grad()
    def initialize(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Sets scales and offsets from ``x``; with a boolean ``mask`` of its shape, from the values where it is True.

        Values that are not finite, as of a first batch that overflows in float16, do not count either. ``"minmax"`` and
        ``"mse"`` take what does not count for zeros.
        """
        x, axis = x.detach().to(_kind(self.log_scale)), self.axis
        finite = x.isfinite() if mask is None else mask & x.isfinite()
        x, counted = torch.where(finite, x, 0), finite.to(x.dtype)
        if self.groups > 1:
            x, counted, axis = self._grouped(x), self._grouped(counted), 0
        if self.init == "lsq":
            log_scale, offset = self._lsq(x, counted, axis), torch.zeros_like(self.log_scale, dtype=x.dtype)
        elif self.offset is None:
            log_scale = offset = ops.quant_range(x, self.qmin, self.qmax, axis, self.init) + _INSIDE
        else:
            log_scale, offset = ops.quant_range_offset(x, self.qmin, self.qmax, axis, self.init)
            log_scale = log_scale + _INSIDE
        self.log_scale.copy_(log_scale.view_as(self.log_scale))
        if self.offset is not None:
            self.offset.copy_(offset.view_as(self.offset))
        self.initialized = True

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        """From the first input, unless scales are there already: an average of models has them, but copies no flag."""
        if torch.compiler.is_exporting():
            raise NoScaleError("FakeQuant: no scale yet, to export or trace; run the model on a batch of data first")
        given = [parameter.detach().clone() for parameter in self.parameters()]
        untouched = torch.stack([(value == 0).all() for value in given]).all()
        self.initialize(x)
        for parameter, value in zip(self.parameters(), given, strict=True):
            parameter.copy_(torch.where(untouched, parameter, value))

    def _lsq(self, x: Tensor, counted: Tensor, axis: int | None) -> Tensor:
        magnitude = x.abs()
        if axis is None:
            total, count = magnitude.sum().view(1), counted.sum().view(1)
        else:
            others = [dim for dim in range(x.dim()) if dim != axis % x.dim()]
            # An empty list of dimensions would be all of them.
            total, count = (values.sum(others) if others else values for values in (magnitude, counted))
        scale = 2 * total / count.clamp(min=1) / math.sqrt(self.qmax)
        # A tensor of zeros gives no scale; any finite one quantizes it exactly.
        return torch.where(scale > 0, scale, torch.ones_like(scale)).log()

    def _grouped(self, x: Tensor) -> Tensor:
        """Values that share a scale as rows."""
        if x.shape[:1] != self.log_scale.shape[:1] or x.numel() % self.log_scale.numel():
            raise ValueError(
                f"FakeQuant: x of shape {tuple(x.shape)}, expected {self.log_scale.shape[0]} indices of dimension 0, "
                f"each of {self.groups} equal groups"
            )
        return x.reshape(self.log_scale.numel(), -1)

    def forward(self, x: Tensor) -> Tensor:
        # An empty input, as of a detector that finds nothing, says nothing about the range.
        if not self.initialized and x.numel() > 0:
            self._start(x)
        grad_scale = 1.0
        if self.training:
            grad_scale = 1 / math.sqrt(max(x.numel() // self.log_scale.numel(), 1) * self.qmax)
        log_scale = self.log_scale.to(_kind(x))
        offset = None if self.offset is None else self.offset.to(_kind(x))
        if self.groups > 1:
            size = x.numel() // log_scale.numel()
            return ops.fake_quant_groups(x, log_scale, self.qmin, self.qmax, size, grad_scale, offset)
        if offset is not None:
            return ops.fake_quant_offset(x, log_scale, offset, self.qmin, self.qmax, self.axis, grad_scale)
        return ops.fake_quant(x, log_scale, self.qmin, self.qmax, axis=self.axis, grad_scale=grad_scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FakeQuant":
        def converted(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == _kind(result) else tensor.to(result.device, _kind(result))

        super()._apply(converted, recurse)  # type: ignore[no-untyped-call]
        return self

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.initialized)

    def set_extra_state(self, state: Tensor) -> None:
        self.initialized = bool(state)

    def extra_repr(self) -> str:
        text = f"bits={self.bits}, signed={self.signed}, axis={self.axis}"
        if self.groups > 1:
            text += f", groups={self.groups}"
        if self.offset is not None:
            text += ", offset=True"
        return text if self.init == "lsq" else f"{text}, init={self.init!r}"
