import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cctorch import _C, ops


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _check_sizes(name: str, **sizes: int) -> None:
    for argument, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: {argument} = {value}, expected at least 1")


def _reset(first: nn.Parameter, second: nn.Parameter, bias: nn.Parameter | None) -> None:
    # The product then has the variance of nn.Linear's and nn.Conv2d's default.
    fan_in, rank = first[0].numel(), first.shape[0]
    bound = math.sqrt(1 / fan_in)
    nn.init.uniform_(first, -bound, bound)
    bound = math.sqrt(3 / rank)
    nn.init.uniform_(second, -bound, bound)
    if bias is not None:
        nn.init.uniform_(bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))


class LowRankLinear(nn.Module):
    """A linear layer through ``rank`` features: ``y = (x first^T) second^T + bias``.

    Shapes: ``first`` rank x in_features, ``second`` out_features x rank, ``bias`` out_features or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes("LowRankLinear", in_features=in_features, out_features=out_features, rank=rank)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.first = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.second = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _reset(self.first, self.second, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return ops.low_rank_linear(x, self.first, self.second, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


class LowRankConv2d(nn.Module):
    """A k x k convolution to ``rank`` channels, then a 1 x 1 convolution. Takes nn.Conv2d's arguments, except groups.

    Shapes: ``first`` rank x in_channels x kh x kw, ``second`` out_channels x rank x 1 x 1, ``bias`` out_channels.
    Stride, padding and dilation apply to ``first``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        rank: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes("LowRankConv2d", in_channels=in_channels, out_channels=out_channels, rank=rank)
        if padding_mode not in ("zeros", "reflect", "replicate", "circular"):
            raise ValueError(
                f"LowRankConv2d: padding_mode = {padding_mode!r}, expected one of zeros, reflect, replicate, circular"
            )
        self.in_channels, self.out_channels, self.rank = in_channels, out_channels, rank
        self.kernel_size, self.stride, self.dilation = _pair(kernel_size), _pair(stride), _pair(dilation)
        self.padding = padding if isinstance(padding, str) else _pair(padding)
        self.padding_mode = padding_mode
        self._sides = self._padding_of_sides()
        self.first = nn.Parameter(torch.empty(rank, in_channels, *self.kernel_size, device=device, dtype=dtype))
        self.second = nn.Parameter(torch.empty(out_channels, rank, 1, 1, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def _padding_of_sides(self) -> tuple[int, int, int, int]:
        """Left, right, top, bottom, as F.pad takes them."""
        if isinstance(self.padding, tuple):
            high, wide = self.padding
            return wide, wide, high, high
        if self.padding == "valid":
            return 0, 0, 0, 0
        if self.padding != "same":
            raise ValueError(f"LowRankConv2d: padding = {self.padding!r}, expected numbers, 'same' or 'valid'")
        if self.stride != (1, 1):
            raise ValueError(f"LowRankConv2d: padding = 'same' needs stride 1, but stride = {self.stride}")
        high, wide = (d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True))
        return wide // 2, wide - wide // 2, high // 2, high - high // 2

    def reset_parameters(self) -> None:
        _reset(self.first, self.second, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        left, right, top, bottom = self._sides
        padding = (top, left)
        if self.padding_mode != "zeros" or left != right or top != bottom:
            x = F.pad(x, self._sides, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
            padding = (0, 0)
        return ops.low_rank_conv2d(x, self.first, self.second, self.bias, self.stride, padding, self.dilation)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, rank={self.rank}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, bias={self.bias is not None}"
        )


class LowRankWeight(nn.Module):
    """Parametrization that keeps the weight of a linear or convolution layer at rank ``rank`` during training.

    Unfolded to a matrix, ``weight = second first``. Registering it replaces the weight by its truncated SVD::

        parametrize.register_parametrization(layer, "weight", LowRankWeight(rank=8))
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        _check_sizes("LowRankWeight", rank=rank)
        self.rank = rank

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        product = second.flatten(1) @ first.flatten(1)
        return product.view(second.shape[0], *first.shape[1:])

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        largest = min(weight.shape[0], weight[0].numel())
        if self.rank > largest:
            raise ValueError(
                f"LowRankWeight: rank = {self.rank}, expected at most {largest} for a weight of {tuple(weight.shape)}"
            )
        return _C.factorize(weight.detach(), list(range(weight.shape[1])), self.rank)

    def extra_repr(self) -> str:
        return f"rank={self.rank}"
