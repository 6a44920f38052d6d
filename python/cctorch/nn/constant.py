from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class Constant(nn.Module):
    """The bias of a layer that reads nothing any more, at every position of the output that the layer had.

    Stands where `cctorch.apply` removes a residual branch: its last layer gives the constant, those before it tensors
    of no channels.

    Args:
        layer: a ``nn.Conv2d``, ``nn.Linear`` or ``nn.BatchNorm2d``, whose geometry it takes over.
        bias: of each channel; None: there are no channels.
        statistics: buffers of a normalization, by name. They are not used; they are in the state because a module of
            LibTorch cannot give its buffers up.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        layer: nn.Conv2d | nn.Linear | nn.BatchNorm2d,
        bias: nn.Parameter | None,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.register_parameter("bias", bias)
        for name, statistic in (statistics or {}).items():
            self.register_buffer(name, statistic)
        self.dim = -1 if isinstance(layer, nn.Linear) else 1
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
        for axis, (padding, reach, stride) in enumerate(self.windows, start=2):
            sizes[axis] = (sizes[axis] + padding - reach) // stride + 1
        if self.bias is None:
            sizes[self.dim] = 0
            return input.new_empty(sizes)
        sizes[self.dim] = len(self.bias)
        shape = [1] * len(sizes)
        shape[self.dim] = -1
        return self.bias.view(shape).expand(sizes)

    def extra_repr(self) -> str:
        return f"channels={0 if self.bias is None else len(self.bias)}"
