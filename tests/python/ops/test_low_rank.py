from typing import Any

import pytest
import torch
from cctorch.nn import LowRankConv2d
from cctorch.ops import low_rank_conv2d, low_rank_linear
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import conv2d, linear
from torch.utils.flop_counter import FlopCounterMode


def factors(*shape: int, rank: int, out: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    second = (out, rank) if len(shape) == 1 else (out, rank, 1, 1)
    tensors = (torch.randn(s, dtype=dtype).requires_grad_() for s in ((rank, *shape), second, (out,)))
    return tuple(tensors)  # type: ignore[return-value]


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (0, 6), (500, 6)])
@pytest.mark.parametrize("rank", [1, 2, 6])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_equals_the_merged_weight(shape: tuple[int, ...], rank: int, with_bias: bool) -> None:
    first, second, bias = factors(6, rank=rank, out=4)
    x = torch.randn(shape, dtype=torch.float64)
    y = low_rank_linear(x, first, second, bias if with_bias else None)
    torch.testing.assert_close(y, linear(x, second @ first, bias if with_bias else None), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), ([1, 2], [2, 0], [2, 1])])
@pytest.mark.parametrize("with_bias", [True, False])
def test_conv2d_equals_the_merged_weight(stride: Any, padding: Any, dilation: Any, with_bias: bool) -> None:
    first, second, bias = factors(5, 3, 2, rank=3, out=4)
    merged = torch.einsum("nr,rchw->nchw", second[:, :, 0, 0], first)
    for x in (torch.randn(2, 5, 9, 8, dtype=torch.float64), torch.randn(5, 9, 8, dtype=torch.float64)):
        b = bias if with_bias else None
        y = low_rank_conv2d(x, first, second, b, stride, padding, dilation)
        torch.testing.assert_close(y, conv2d(x, merged, b, stride, padding, dilation), rtol=1e-11, atol=1e-11)


def test_derivatives() -> None:
    for rows in (1, 30):
        x = torch.randn(rows, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(low_rank_linear, (x, *factors(4, rank=3, out=5)))
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    arguments = (x, *factors(2, 3, 3, rank=2, out=3), 2, 1)
    assert torch.autograd.gradcheck(low_rank_conv2d, arguments, fast_mode=True)


@pytest.mark.parametrize(("rows", "rank"), [(1, 2), (1000, 2), (1, 14), (10, 14), (1000, 14), (1000, 16)])
def test_the_cheaper_order_is_taken(rows: int, rank: int) -> None:
    channels, out = 16, 24
    first, second, _ = factors(channels, rank=rank, out=out)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        low_rank_linear(torch.randn(rows, channels, dtype=torch.float64), first, second)
    factored = rows * rank * (channels + out)
    merged = out * rank * channels + rows * channels * out
    assert counter.get_total_flops() == 2 * min(factored, merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types(dtype: torch.dtype) -> None:
    x = torch.randn(3, 6).to(dtype)
    first, second, bias = (t.to(dtype) for t in factors(6, rank=2, out=4))
    y = low_rank_linear(x, first, second, bias)
    exact = linear(x.double(), second.double() @ first.double(), bias.double())
    eps = torch.finfo(dtype).eps
    magnitude = x.double().abs() @ first.double().abs().T @ second.double().abs().T + bias.double().abs()
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= 8 * eps * magnitude).all()


def test_channels_last_is_kept() -> None:
    first, second, bias = factors(8, 3, 3, rank=4, out=16, dtype=torch.float32)
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    assert low_rank_conv2d(x, first, second, bias).is_contiguous(memory_format=torch.channels_last)


def test_autocast() -> None:
    first, second, bias = factors(8, rank=4, out=16, dtype=torch.float32)
    for rows in (2, 400):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert low_rank_linear(torch.randn(rows, 8), first, second, bias).dtype == torch.bfloat16


def test_opcheck() -> None:
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.cctorch.low_rank_linear.default, (x, *factors(6, rank=2, out=4)))
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    arguments = (x, *factors(2, 3, 3, rank=2, out=3), [2, 2], [1, 1], [1, 1])
    torch.library.opcheck(torch.ops.cctorch.low_rank_conv2d.default, arguments)


def test_one_program_for_every_number_of_rows() -> None:
    first, second, bias = (t.detach() for t in factors(16, rank=14, out=24))
    programs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(low_rank_linear, fullgraph=True, backend=programs, dynamic=True)
    for rows in (3, 1000):
        x = torch.randn(rows, 16, dtype=torch.float64)
        torch.testing.assert_close(compiled(x, first, second, bias), low_rank_linear(x, first, second, bias))
    assert programs.frame_count == 1


def test_export() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
            return low_rank_conv2d(x, first, second, None, 2, 1)

    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    first, second, _ = (t.detach() for t in factors(2, 3, 3, rank=2, out=3))
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(Module(), (x, first, second), dynamic_shapes=(batch, None, None))
    x = torch.cat([x, x])
    torch.testing.assert_close(program.module()(x, first, second), low_rank_conv2d(x, first, second, None, 2, 1))


def test_decomposed_convolutions_state_both_dimensions() -> None:
    """ONNX Runtime refuses a model in which a two-dimensional convolution has a stride or a dilation for one."""
    model = LowRankConv2d(2, 3, 2, kernel_size=3, stride=2)
    program = torch.export.export(model, (torch.randn(3, 2, 5, 5),)).run_decompositions()
    convolutions = [node for node in program.graph.nodes if "conv" in str(node.target)]
    assert len(convolutions) == 2
    for node in convolutions:
        lists = [argument for argument in node.args if isinstance(argument, list | tuple)]
        assert lists
        assert all(len(numbers) == 2 for numbers in lists if numbers), node.format_node()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: low_rank_linear(torch.ones(2, 3), torch.ones(2, 4), torch.ones(5, 2)), "must be the 4 input channels"),
        (lambda: low_rank_linear(torch.ones(()), torch.ones(2, 4), torch.ones(5, 2)), "x must have at least one dim"),
        (lambda: low_rank_linear(torch.ones(2, 4), torch.ones(2, 4), torch.ones(5, 3)), "the rank of first, 2, in"),
        (lambda: low_rank_linear(torch.ones(2, 4), torch.ones(2), torch.ones(5, 2)), "first must have 2 dimensions"),
        (
            lambda: low_rank_linear(torch.ones(2, 4), torch.ones(2, 4), torch.ones(5, 2), torch.ones(4)),
            "bias must have one element for each of the 5 outputs, got 4",
        ),
        (
            lambda: low_rank_conv2d(torch.ones(1, 3, 4, 4), torch.ones(2, 4, 1, 1), torch.ones(5, 2, 1, 1)),
            "x must have the 4 input channels",
        ),
        (
            lambda: low_rank_conv2d(torch.ones(1, 4, 4, 4), torch.ones(2, 4, 3, 3), torch.ones(5, 2, 3, 3)),
            "second must be a 1 x 1 convolution",
        ),
        (
            lambda: low_rank_conv2d(torch.ones(4, 4), torch.ones(2, 4, 1, 1), torch.ones(5, 2, 1, 1)),
            "x must be batch x in_channels x height x width",
        ),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
