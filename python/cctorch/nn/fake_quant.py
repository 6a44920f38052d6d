import math

import torch
from torch import Tensor, nn

from cctorch import ops


class FakeQuant(nn.Module):
    r"""Learned-scale fake-quantization of weights or activations (LSQ, Esser et al. 2020).

    .. math:: y = s \cdot \mathrm{clamp}(\mathrm{round}(x / s), q_{min}, q_{max}), \quad s = e^{\mathrm{log\_scale}}

    The scale starts at :math:`2 \langle |x| \rangle / \sqrt{q_{max}}` of the first input, or of the one given to
    :meth:`initialize`. Its gradient is multiplied by :math:`1 / \sqrt{n\,q_{max}}` for n values that share a scale.

    Args:
        bits: 2 to 16.
        signed: range :math:`[-2^{b-1}, 2^{b-1} - 1]`, else :math:`[0, 2^b - 1]`.
        axis: dimension with one scale for each index. None: one scale for the whole tensor.
        channels: size of that dimension; required with ``axis``.
    """

    def __init__(
        self,
        bits: int,
        signed: bool = True,
        axis: int | None = None,
        channels: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 2 <= bits <= 16:
            raise ValueError(f"FakeQuant: bits = {bits}, expected 2 to 16")
        if (axis is None) != (channels is None):
            raise ValueError(f"FakeQuant: axis = {axis} with channels = {channels}, expected both or neither")
        if channels is not None and channels < 1:
            raise ValueError(f"FakeQuant: channels = {channels}, expected at least 1")
        self.bits, self.signed, self.axis = bits, signed, axis
        self.qmin = -(2 ** (bits - 1)) if signed else 0
        self.qmax = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        self.log_scale = nn.Parameter(torch.zeros(channels or 1, device=device, dtype=dtype))
        self.initialized = False

    @torch.no_grad()
    def initialize(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Sets the scales from ``x``; with a boolean ``mask`` of its shape, from the values where the mask is True."""
        magnitude = x.detach().to(self.log_scale.dtype).abs()
        counted = torch.ones_like(magnitude) if mask is None else mask.to(magnitude.dtype)
        magnitude = magnitude * counted
        if self.axis is None:
            total, count = magnitude.sum().view(1), counted.sum().view(1)
        else:
            others = [dim for dim in range(x.dim()) if dim != self.axis % x.dim()]
            total, count = magnitude.sum(others), counted.sum(others)
        scale = 2 * total / count.clamp(min=1) / math.sqrt(self.qmax)
        # A tensor of zeros gives no scale; any finite one quantizes it exactly.
        self.log_scale.copy_(torch.where(scale > 0, scale, torch.ones_like(scale)).log())
        self.initialized = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.initialized:
            self.initialize(x)
        grad_scale = 1.0
        if self.training:
            grad_scale = 1 / math.sqrt(max(x.numel() // self.log_scale.numel(), 1) * self.qmax)
        return ops.fake_quant(x, self.log_scale, self.qmin, self.qmax, axis=self.axis, grad_scale=grad_scale)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.initialized)

    def set_extra_state(self, state: Tensor) -> None:
        self.initialized = bool(state)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}, axis={self.axis}"
