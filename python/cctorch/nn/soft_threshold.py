import math

import torch
from torch import Tensor, nn

from cctorch import ops


class SoftThreshold(nn.Module):
    r"""Prunes a weight by a learned threshold (STR, Kusupati et al. 2020): training finds each layer's sparsity.

    .. math:: \text{sign}(w) \cdot \text{relu}(|w| - \sigma(s))

    Weight decay on ``s`` and on the weights drives the sparsity; nothing else asks for one.

    Args:
        axis: dimension with one threshold for each index. None: one for the whole weight.
        channels: size of that dimension; required with ``axis``.
        threshold: :math:`\sigma(s)` at the start, between 0 and 1.

    Meant as a parametrization: ``parametrize.register_parametrization(layer, "weight", SoftThreshold())``.
    """

    def __init__(
        self,
        axis: int | None = None,
        channels: int | None = None,
        threshold: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if (axis is None) != (channels is None):
            raise ValueError(f"SoftThreshold: axis = {axis} with channels = {channels}, expected both or neither")
        if channels is not None and channels < 1:
            raise ValueError(f"SoftThreshold: channels = {channels}, expected at least 1")
        if not 0 < threshold < 1:
            raise ValueError(f"SoftThreshold: threshold = {threshold}, expected a number between 0 and 1")
        self.axis = axis
        start = math.log(threshold / (1 - threshold))
        self.s = nn.Parameter(torch.full((channels or 1,), start, device=device, dtype=dtype))

    def forward(self, weight: Tensor) -> Tensor:
        kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return ops.soft_threshold(weight, torch.sigmoid(self.s.to(kind)), self.axis)

    def extra_repr(self) -> str:
        return f"axis={self.axis}, thresholds={self.s.numel()}"
