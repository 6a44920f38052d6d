from __future__ import annotations

import torch
from torch import Tensor, nn

from cctorch.nn.transforms import within_transform


class Constant(nn.Module):
    """The bias of a layer that reads nothing any more, at every position of the output that the layer had.

    Stands where `cctorch.apply` removes a residual branch: its last layer gives the constant, those before it tensors
    of no channels.

    Args:
        layer: a ``nn.Conv2d``, ``nn.Linear`` or ``nn.BatchNorm2d``, whose geometry it takes over.
        bias: of each channel; None: there are no channels.
        channels_last: layout of the output; later that of ``to(memory_format=...)``. The input can't tell: activations
            of tensors without channels are in the layout of PyTorch's default.
    """

    bias: nn.Parameter | None
    layout: Tensor

    def __init__(
        self,
        layer: nn.Conv2d | nn.Linear | nn.BatchNorm2d,
        bias: nn.Parameter | None,
        *,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.register_parameter("bias", bias)
        format = torch.channels_last if channels_last else torch.contiguous_format
        like = next(layer.parameters(), torch.empty(0))
        self.register_buffer("layout", like.new_zeros(1, 2, 2, 2).contiguous(memory_format=format), persistent=False)
        self.dim = -1 if isinstance(layer, nn.Linear) else -3
        self.windows: list[tuple[int, int, int]] = []
        """Of height and width: padding on both sides together, reach of the kernel, stride."""
        if isinstance(layer, nn.Conv2d):
            left, right, top, bottom = layer._reversed_padding_repeated_twice
            for axis, padding in enumerate((top + bottom, left + right)):
                reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
                self.windows.append((padding, reach, layer.stride[axis]))
        self.training = layer.training

    def forward(self, input: Tensor) -> Tensor:
        sizes = list(input.shape)
        for axis, (padding, reach, stride) in enumerate(self.windows, start=-2):
            sizes[axis] = (sizes[axis] + padding - reach) // stride + 1
        if self.bias is None:
            sizes[self.dim] = 0
            return input.new_empty(sizes)
        sizes[self.dim] = len(self.bias)
        constant = self.bias.to(input.dtype).view(-1, *[1] * (-1 - self.dim)).expand(sizes)
        if within_transform():
            # Under vmap input and bias may each have examples of their own, and there is one layout.
            return constant + input.new_zeros(sizes)
        channels_last = self.dim == -3 and len(sizes) == 4 and self.layout.stride(1) == 1
        # Networks change what a layer gives in place, and a view of the bias can't be.
        return constant.clone(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def extra_repr(self) -> str:
        return f"channels={0 if self.bias is None else len(self.bias)}"
