import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cctorch import _C, ops
from cctorch._C import LayerPlan


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _check_sizes(name: str, **sizes: int) -> None:
    for argument, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: {argument} = {value}, expected at least 1")


def _reset(first: nn.Parameter, second: nn.Parameter, bias: nn.Parameter | None) -> None:
    # The product then has the variance of nn.Linear's and nn.Conv2d's default.
    fan_in = first[0].numel()
    bound = math.sqrt(1 / fan_in)
    nn.init.uniform_(first, -bound, bound)
    bound = math.sqrt(3 / second[0].numel())
    nn.init.uniform_(second, -bound, bound)
    if bias is not None:
        nn.init.uniform_(bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))


def _check_rank(name: str, rank: int, rows: int, columns: int) -> None:
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(
            f"{name}: rank = {rank}, expected 1 to {min(rows, columns)} for a weight of {rows} x {columns}"
        )


def _assign(layer: nn.Module, dense: nn.Linear | nn.Conv2d, **factors: Tensor) -> None:
    """Gives ``layer`` the factors of ``dense`` and its bias; they are trained if those of ``dense`` are."""
    with torch.no_grad():
        for name, value in factors.items():
            parameter = layer.get_parameter(name)
            parameter.copy_(value).requires_grad_(dense.weight.requires_grad)
        if dense.bias is not None:
            layer.get_parameter("bias").copy_(dense.bias).requires_grad_(dense.bias.requires_grad)


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

    @classmethod
    def from_dense(cls, layer: nn.Linear, rank: int) -> "LowRankLinear":
        """The truncated SVD of ``layer``'s weight, with its bias, type and device.

        >>> LowRankLinear.from_dense(nn.Linear(6, 4), rank=2)
        LowRankLinear(6, 4, rank=2, bias=True)
        """
        weight = layer.weight.detach()
        _check_rank("LowRankLinear", rank, *weight.shape)
        out_features, in_features = weight.shape
        new = cls(in_features, out_features, rank, layer.bias is not None, device=weight.device, dtype=weight.dtype)
        first, second = _C.factorize(weight, list(range(weight.shape[1])), rank)
        _assign(new, layer, first=first, second=second)
        return new

    def reset_parameters(self) -> None:
        _reset(self.first, self.second, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return ops.low_rank_linear(input, self.first, self.second, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


class LowRankConv2d(nn.Module):
    """A factored convolution. Takes nn.Conv2d's arguments, except groups.

    ``layout`` is one of

    - ``"channel"``: ``first``, rank x in_channels x kh x kw, then ``second``, out_channels x rank x 1 x 1;
    - ``"spatial"``: ``first``, rank x in_channels x 1 x kw, then ``second``, out_channels x rank x kh x 1;
    - ``"tucker"``, where ``rank`` is a pair, of outputs and of inputs: ``first``, rank_in x in_channels x 1 x 1, then
      ``core``, rank_out x rank_in x kh x kw, then ``second``, out_channels x rank_out x 1 x 1.

    The last one adds ``bias``. Stride, padding and dilation apply where the kernel extends.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        rank: int | tuple[int, int],
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        layout: Literal["channel", "spatial", "tucker"] = "channel",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if layout not in ("channel", "spatial", "tucker"):
            raise ValueError(f"LowRankConv2d: layout = {layout!r}, expected one of channel, spatial, tucker")
        if isinstance(rank, int) == (layout == "tucker"):
            expected = "the ranks of outputs and inputs" if layout == "tucker" else "one number"
            raise ValueError(f"LowRankConv2d: rank = {rank}, expected {expected} for layout = {layout!r}")
        outer, inner = (rank, rank) if isinstance(rank, int) else rank
        _check_sizes("LowRankConv2d", in_channels=in_channels, out_channels=out_channels, rank=min(outer, inner))
        if padding_mode not in ("zeros", "reflect", "replicate", "circular"):
            raise ValueError(
                f"LowRankConv2d: padding_mode = {padding_mode!r}, expected one of zeros, reflect, replicate, circular"
            )
        self.in_channels, self.out_channels, self.rank = in_channels, out_channels, rank
        self.kernel_size, self.stride, self.dilation = _pair(kernel_size), _pair(stride), _pair(dilation)
        self.padding = padding if isinstance(padding, str) else _pair(padding)
        self.padding_mode, self.layout = padding_mode, layout
        self._sides = self._padding_of_sides()
        high, wide = self.kernel_size
        of_first = {"channel": (high, wide), "spatial": (1, wide), "tucker": (1, 1)}[layout]
        self.first = nn.Parameter(torch.empty(inner, in_channels, *of_first, device=device, dtype=dtype))
        if layout == "tucker":
            self.core = nn.Parameter(torch.empty(outer, inner, high, wide, device=device, dtype=dtype))
        of_second = (high if layout == "spatial" else 1, 1)
        self.second = nn.Parameter(torch.empty(out_channels, outer, *of_second, device=device, dtype=dtype))
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

    @classmethod
    def from_dense(
        cls,
        layer: nn.Conv2d,
        rank: int | tuple[int, int],
        layout: Literal["channel", "spatial", "tucker"] = "channel",
    ) -> "LowRankConv2d":
        """The truncated SVD (or Tucker-2) of ``layer``'s weight, with its bias, type and device.

        >>> LowRankConv2d.from_dense(nn.Conv2d(4, 8, 3, padding=1), rank=(4, 2), layout="tucker").core.shape
        torch.Size([4, 2, 3, 3])
        """
        if layer.groups != 1:
            raise ValueError(f"LowRankConv2d: a convolution of groups = {layer.groups}, expected 1")
        weight = layer.weight.detach()
        out, channels, high, wide = weight.shape
        new = cls(
            channels,
            out,
            rank,
            (high, wide),
            (layer.stride[0], layer.stride[1]),
            layer.padding if isinstance(layer.padding, str) else (layer.padding[0], layer.padding[1]),
            (layer.dilation[0], layer.dilation[1]),
            layer.bias is not None,
            layer.padding_mode,
            layout,
            device=weight.device,
            dtype=weight.dtype,
        )
        if not isinstance(rank, int):
            for name, one, size in (("outputs", rank[0], out), ("inputs", rank[1], channels)):
                if one > size:
                    raise ValueError(f"LowRankConv2d: rank of {name} = {one}, expected at most {size}")
        elif layout == "spatial":
            _check_rank("LowRankConv2d", rank, out * high, channels * wide)
        else:
            _check_rank("LowRankConv2d", rank, out, channels * high * wide)
        one, rank_in = (rank, None) if isinstance(rank, int) else rank
        form = LayerPlan("LowRankConv2d", "conv2d", channels, out, rank=one, layout=layout, rank_in=rank_in)
        factors = zip(("first", "core", "second"), _C.factors(weight, form), strict=True)
        _assign(new, layer, **{name: value for name, value in factors if value is not None})
        return new

    def reset_parameters(self) -> None:
        _reset(self.first, self.second, self.bias)
        if self.layout == "tucker":
            bound = math.sqrt(3 / self.core[0].numel())
            nn.init.uniform_(self.core, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        x = input
        left, right, top, bottom = self._sides
        padding = (top, left)
        if self.padding_mode != "zeros" or left != right or top != bottom:
            x = F.pad(x, self._sides, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
            padding = (0, 0)
        if self.layout == "tucker":
            args = (self.core, self.second, self.bias, self.stride, padding, self.dilation)
            return ops.tucker2_conv2d(x, self.first, *args)
        return ops.low_rank_conv2d(x, self.first, self.second, self.bias, self.stride, padding, self.dilation)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, rank={self.rank}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, bias={self.bias is not None}"
            + ("" if self.layout == "channel" else f", layout={self.layout!r}")
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
