from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cctorch.nn.low_rank import LowRankLinear
from cctorch.nn.transforms import within_transform
from cctorch.ops import gather_channels


class GatherChannels(nn.Module):
    """Picks the input channels that a layer reads, then runs the layer.

    Args:
        index: positions of the channels in the tensor that arrives.
        layer: reads ``len(index)`` channels, in dimension 1 for a convolution and the last one for a linear layer.
    """

    index: Tensor

    def __init__(self, index: Sequence[int] | Tensor, layer: nn.Module) -> None:
        super().__init__()
        first = next(layer.parameters(), None)
        device = None if first is None else first.device
        self.register_buffer("index", torch.as_tensor(index, dtype=torch.int64, device=device))
        self.layer = layer
        self.dim = -1 if isinstance(layer, nn.Linear | LowRankLinear) else 1
        self.training = layer.training

    def forward(self, input: Tensor) -> Tensor:
        # A compiler does without the copy; an exported program runs without cctorch.
        plain = torch.compiler.is_compiling() or within_transform()
        pick = torch.index_select if plain else _gather
        y: Tensor = self.layer(pick(input, self.dim, self.index))
        return y

    def extra_repr(self) -> str:
        return f"channels={self.index.numel()}"


def _gather(x: Tensor, dim: int, index: Tensor) -> Tensor:
    return gather_channels(x, index, dim)


def unwrapped(model: nn.Module, path: str) -> nn.Module:
    """The layer at a dense model's path, behind the gather that may have come before it."""
    module = model.get_submodule(path)
    if not isinstance(module, GatherChannels):
        return module
    return module.layer
