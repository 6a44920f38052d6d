import torch
from torch import Tensor, nn

from cctorch import ops


class ChannelGate(nn.Module):
    """Scales each channel by a learned gate that starts at 1: ``y[n, c, ...] = x[n, c, ...] * gate[c]``.

    The gradient of ``gate`` at 1 is the first-order Taylor importance of the channels (Molchanov et al. 2019).

    Args:
        channels: size of dimension 1 of the input.
    """

    def __init__(
        self, channels: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"ChannelGate: channels = {channels}, expected at least 1")
        self.gate = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return ops.channel_gate(x, self.gate)

    def extra_repr(self) -> str:
        return f"channels={self.gate.numel()}"
