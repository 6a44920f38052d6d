import torch
from torch import Tensor, nn

from cctorch import ops


class HardConcreteGate(nn.Module):
    """Multiplies each channel by a random gate that learns to be 0 or 1 (L0 regularization, Louizos et al. 2018).

    In training the gates are drawn anew at every call, with beta = 2/3, gamma = -0.1 and zeta = 1.1; in evaluation they
    are certain. Add ``strength * gate.expected_l0()`` to the loss.

    Args:
        channels: size of dimension 1 of the input.
        open: probability that a gate is not 0 at the start, between 0 and 1.
    """

    def __init__(
        self,
        channels: int,
        open: float = 0.9,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"HardConcreteGate: channels = {channels}, expected at least 1")
        if not 0 < open < 1:
            raise ValueError(f"HardConcreteGate: open = {open}, expected a probability between 0 and 1")
        self.log_alpha = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        certain = ops.hard_concrete_open(torch.zeros(1, dtype=torch.float64)).logit()
        nn.init.constant_(self.log_alpha, (torch.tensor([open], dtype=torch.float64).logit() - certain).item())

    def forward(self, x: Tensor) -> Tensor:
        return ops.channel_gate(x, ops.hard_concrete(self.log_alpha, self.training))

    def expected_l0(self) -> Tensor:
        """The expected number of gates that are not 0, differentiable."""
        return ops.hard_concrete_open(self.log_alpha).sum()

    def extra_repr(self) -> str:
        return f"channels={self.log_alpha.numel()}"
