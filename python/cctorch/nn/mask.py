from torch import Tensor, nn

from cctorch import ops


class Mask(nn.Module):
    """Zeroes the weights that a boolean mask leaves out; the gradient reaches all of them, so that one can come back.

    Args:
        mask: boolean, True where the weight is kept. Same shape as the weight.

    Meant as a parametrization: ``parametrize.register_parametrization(layer, "weight", Mask(mask))``.

    ``torch.optim.swa_utils.AveragedModel`` copies buffers, so masks too, unless ``use_buffers`` is True: then it
    averages them, which PyTorch refuses for booleans (its moving averages keep what any mask kept). Give it a function
    that takes a mask as it is, as of the model last seen:

        >>> import torch
        >>> from torch.nn.utils import parametrize
        >>> from torch.optim.swa_utils import AveragedModel
        >>> def averaged(average, value, count):
        ...     return average + (value - average) / (count + 1) if value.is_floating_point() else value
        >>> layer = torch.nn.Linear(2, 2)
        >>> mask = torch.tensor([[True, False], [False, True]])
        >>> layer = parametrize.register_parametrization(layer, "weight", Mask(mask))
        >>> average = AveragedModel(layer, avg_fn=averaged, use_buffers=True)
        >>> for _ in range(3):
        ...     _ = mask.logical_not_()
        ...     average.update_parameters(layer)
        >>> average.module.weight == 0
        tensor([[ True, False],
                [False,  True]])
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return ops.apply_mask(weight, self.mask)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.mask.shape)}"
