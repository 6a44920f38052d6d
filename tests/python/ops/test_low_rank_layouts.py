"""The layouts of a factored convolution against the convolution with the multiplied-out weight."""

from typing import Any

import pytest
import torch
from cctorch.ops import low_rank_conv2d, tucker2_conv2d
from torch import Tensor
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

WINDOWS = [(1, 0, 1), (2, 1, 1), ([1, 2], [2, 0], [2, 1]), ([2], [1], [1])]


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def spatial(rank: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, second, bias = random(rank, 5, 1, 2), random(4, rank, 3, 1), random(4)
    weight = torch.einsum("nri,rcj->ncij", second[..., 0], first[:, :, 0])
    return tuple(t.to(dtype) for t in (first, second, bias, weight))  # type: ignore[return-value]


def tucker(rank_out: int, rank_in: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    first, core, second = random(rank_in, 5, 1, 1), random(rank_out, rank_in, 3, 2), random(4, rank_out, 1, 1)
    weight = torch.einsum("no,oikl,ic->nckl", second[:, :, 0, 0], core, first[:, :, 0, 0])
    return first, core, second, random(4), weight


@pytest.mark.parametrize(("stride", "padding", "dilation"), WINDOWS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rank", [1, 12])
def test_equal_the_merged_weight(stride: Any, padding: Any, dilation: Any, with_bias: bool, rank: int) -> None:
    """Also where the factors are multiplied out."""
    for shape in ((2, 5, 9, 8), (5, 9, 8), (0, 5, 9, 8), (40, 5, 9, 8)):
        x = random(*shape)
        first, second, bias, weight = spatial(rank)
        b = bias if with_bias else None
        y = low_rank_conv2d(x, first, second, b, stride, padding, dilation)
        torch.testing.assert_close(y, conv2d(x, weight, b, stride, padding, dilation), rtol=1e-10, atol=1e-10)
        first, core, second, bias, weight = tucker(rank, rank)
        b = bias if with_bias else None
        y = tucker2_conv2d(x, first, core, second, b, stride, padding, dilation)
        torch.testing.assert_close(y, conv2d(x, weight, b, stride, padding, dilation), rtol=1e-10, atol=1e-10)


def flops(function: Any, *args: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*args)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("batch", [1, 2, 50])
@pytest.mark.parametrize("rank", [1, 4, 9, 20])
def test_the_cheaper_order_is_taken(batch: int, rank: int) -> None:
    x = random(batch, 5, 9, 8)
    positions, columns = batch * 7 * 7, batch * 9 * 7
    first, second, bias, _ = spatial(rank)
    factored = columns * rank * 10 + positions * rank * 12
    merged = rank * 4 * 5 * 6 + positions * 4 * 5 * 6
    assert flops(low_rank_conv2d, x, first, second, bias) == 2 * min(factored, merged)
    first, core, second, bias, _ = tucker(rank, rank)
    factored = batch * 72 * rank * 5 + positions * (rank * rank * 6 + 4 * rank)
    merged = rank * rank * 6 * 5 + rank * 5 * 6 * 4 + positions * 4 * 5 * 6
    assert flops(tucker2_conv2d, x, first, core, second, bias) == 2 * min(factored, merged)
    # k x k, then 1 x 1
    first, second = random(rank, 5, 3, 2), random(4, rank, 1, 1)
    factored, merged = positions * rank * 34, rank * 120 + positions * 120
    assert flops(low_rank_conv2d, x, first, second) == 2 * min(factored, merged)


@pytest.mark.parametrize("rank", [2, 12])
def test_derivatives(rank: int) -> None:
    x = random(2, 5, 5, 5).requires_grad_()
    factors = [t.requires_grad_() for t in spatial(rank)[:3]]
    assert torch.autograd.gradcheck(low_rank_conv2d, (x, *factors, 2, 1), fast_mode=True)
    factors = [t.requires_grad_() for t in tucker(rank, rank)[:4]]
    assert torch.autograd.gradcheck(tucker2_conv2d, (x, *factors, 2, 1), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types_and_memory_format(dtype: torch.dtype) -> None:
    x = random(2, 5, 9, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
    for tensors, op in ((spatial(2), low_rank_conv2d), (tucker(2, 2), tucker2_conv2d)):
        factors = [t.to(dtype) for t in tensors[:-1]]
        y = op(x, *factors)  # type: ignore[operator]
        exact = op(x.double(), *(t.double() for t in factors))  # type: ignore[operator]
        magnitude = op(x.double().abs(), *(t.double().abs() for t in factors))  # type: ignore[operator]
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert ((y.double() - exact).abs() <= 8 * torch.finfo(dtype).eps * magnitude).all()


def test_autocast() -> None:
    x = random(2, 5, 9, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert low_rank_conv2d(x, *(t.float() for t in spatial(12)[:3])).dtype == torch.bfloat16
        assert tucker2_conv2d(x, *(t.float() for t in tucker(12, 12)[:4])).dtype == torch.bfloat16


def test_opcheck() -> None:
    x = random(1, 5, 5, 5).requires_grad_()
    factors = [t.requires_grad_() for t in spatial(2)[:3]]
    window = ([2, 2], [1, 1], [1, 1])
    torch.library.opcheck(torch.ops.cctorch.low_rank_conv2d.default, (x, *factors, *window))
    factors = [t.requires_grad_() for t in tucker(2, 2)[:4]]
    torch.library.opcheck(torch.ops.cctorch.tucker2_conv2d.default, (x, *factors, *window))


def test_compile_and_export_for_every_batch() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return tucker2_conv2d(low_rank_conv2d(x, *pair, None, 1, 1), *triple)

    first, core, second, _, _ = tucker(2, 2)
    pair, triple = (random(2, 5, 1, 3), random(5, 2, 3, 1)), (first, core, second)
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager", dynamic=True)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(Module(), (random(3, 5, 6, 6),), dynamic_shapes=(batch,))
    for size in (2, 7):
        x = random(size, 5, 6, 6)
        torch.testing.assert_close(compiled(x), Module()(x))
        torch.testing.assert_close(program.module()(x), Module()(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: low_rank_conv2d(random(1, 4, 4, 4), random(2, 4, 3, 1), random(5, 2, 3, 1)),
            "second must be a 1 x 1 convolution, or extend in a dimension that first",
        ),
        (
            lambda: low_rank_conv2d(random(1, 4, 4, 4), random(2, 4, 1, 1), random(5, 2, 1, 1), None, [1, 1, 1]),
            "stride|3",
        ),
        (
            lambda: tucker2_conv2d(random(1, 4, 4, 4), random(2, 4, 3, 3), random(3, 2, 3, 3), random(5, 3, 1, 1)),
            "first must be a 1 x 1",
        ),
        (
            lambda: tucker2_conv2d(random(1, 4, 4, 4), random(2, 4, 1, 1), random(3, 3, 3, 3), random(5, 3, 1, 1)),
            "core must have the rank of first, 2",
        ),
        (
            lambda: tucker2_conv2d(random(1, 3, 4, 4), random(2, 4, 1, 1), random(3, 2, 3, 3), random(5, 3, 1, 1)),
            "x must have the 4 input channels",
        ),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
