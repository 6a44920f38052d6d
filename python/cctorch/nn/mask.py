from torch import Tensor, nn

from cctorch import ops


class Mask(nn.Module):
    """Zeroes the weights that a boolean mask leaves out; the gradient reaches all of them, so that one can come back.

    Args:
        mask: boolean, True where the weight is kept. Same shape as the weight.

    Meant as a parametrization: ``parametrize.register_parametrization(layer, "weight", Mask(mask))``.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return ops.apply_mask(weight, self.mask)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.mask.shape)}"
