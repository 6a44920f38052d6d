import pytest
import torch
from cases import LAYOUTS, TYPES, with_threads
from cctorch.ops import gather_channels
from torch import Tensor

SHAPES = [(3, 5), (2000, 3), (2, 5, 7, 7), (2, 3, 30, 30), (1, 1, 1, 1), (0, 3, 2), (2, 0, 3), (2, 700), (2, 3, 4, 5)]
scatter = torch.ops.cctorch.scatter_channels


def some(channels: int, count: int | None = None) -> Tensor:
    """Not sorted, and some twice where there are not so many channels."""
    count = (channels + 1) // 2 if count is None else count
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, max(channels, 1), (count if channels else 0,), generator=generator)


def assert_is_index_select(x: Tensor, index: Tensor, dim: int) -> None:
    """Values and gradient, to the bit where no channel is picked twice."""
    results = []
    for function in (gather_channels, lambda x, index, dim: x.index_select(dim, index)):
        leaf = x.detach().requires_grad_()
        y = function(leaf, index, dim)
        grad = torch.arange(y.numel(), dtype=torch.float64).remainder(7).sub(3).reshape(y.shape).to(x.dtype)
        results.append((y.detach(), torch.autograd.grad(y, leaf, grad)[0]))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_index_select(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    for dim in range(-len(shape), len(shape)):
        for count in (None, 0, 1, 2 * shape[dim]):
            assert_is_index_select(x, some(shape[dim], count), dim)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_layouts(layout: str, dim: int) -> None:
    x = LAYOUTS[layout](torch.randn(6, 5, 4, 70))
    assert_is_index_select(x, some(x.shape[dim]), dim)


@pytest.mark.parametrize("dtype", TYPES)
def test_channels_last_stays_there_and_back(dtype: torch.dtype) -> None:
    for shape, memory_format in (((2, 6, 5, 4), torch.channels_last), ((2, 6, 3, 5, 4), torch.channels_last_3d)):
        x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
        y = gather_channels(x, torch.tensor([5, 0, 3]))
        assert y.is_contiguous(memory_format=memory_format)
        assert not y.is_contiguous()
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.is_contiguous(memory_format=memory_format)
        assert x.grad.sum((0, *range(2, x.dim()))).count_nonzero() == 3
        assert gather_channels(x, torch.tensor([3, 0]), -1).is_contiguous()


def test_first_and_second_derivatives() -> None:
    index = torch.tensor([3, 0, 0])
    for layout in ("contiguous", "channels_last", "strided"):
        x = LAYOUTS[layout](torch.randn(2, 4, 2, 2, dtype=torch.float64)).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: gather_channels(x, index), x)
        assert torch.autograd.gradgradcheck(lambda x: gather_channels(x, index).square(), x)
        assert torch.autograd.gradcheck(lambda y: scatter(y, torch.tensor([1, 6, 2, 0]), 1, 7), x)


def test_results_do_not_depend_on_threads() -> None:
    x, index = torch.randn(64, 9, 30, 31), some(9)
    for layout in ("contiguous", "channels_last"):
        x = LAYOUTS[layout](x)
        for function in (lambda: gather_channels(x, index), lambda: scatter(x, some(20, 9), 1, 20)):  # noqa: B023
            one, two = (with_threads(n, function) for n in (1, 2))
            assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", TYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    for layout in ("contiguous", "channels_last"):
        x = LAYOUTS[layout](torch.randn(4, 3, 5, 5)).to(dtype).requires_grad_()
        torch.library.opcheck(torch.ops.cctorch.gather_channels.default, (x, torch.tensor([2, 0]), 1))
        torch.library.opcheck(scatter.default, (x, torch.tensor([2, 0, 4]), 1, 6))


def test_the_composite_of_other_devices_is_the_same() -> None:
    """CUDA has no kernel of its own: what runs there is made of ATen's operators."""
    index = torch.tensor([4, 0, 0, 2])
    gather = torch.ops.cctorch.gather_channels.default
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    for layout in LAYOUTS:
        x = LAYOUTS[layout](torch.randn(6, 5, 4, 7))
        for dim, channels in ((1, index), (2, index[1:]), (-1, index)):
            ours = gather(x, channels, dim)
            theirs = gather.redispatch(key, x, channels, dim)
            assert torch.equal(ours, theirs)
            assert ours.stride() == theirs.stride()
            y = x.narrow(dim, 0, 3)
            for result in (scatter(y, channels[:3], dim, 9), scatter.default.redispatch(key, y, channels[:3], dim, 9)):
                assert torch.equal(result, torch.zeros_like(result).index_add(dim, channels[:3], y))
                assert result.is_contiguous(memory_format=torch.channels_last) == (
                    layout == "channels_last" and dim == 1
                )


def test_compile_and_export_with_dynamic_shapes() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return gather_channels(x, index)

    compiled = torch.compile(gather_channels, fullgraph=True, backend="aot_eager", dynamic=True)
    x, index = torch.randn(4, 3, 5), torch.tensor([2, 1])
    program = torch.export.export(Module(), (x, index), dynamic_shapes=({0: torch.export.Dim("batch")}, None))
    for batch in (4, 6):
        x = torch.randn(batch, 3, 5, requires_grad=True)
        assert torch.equal(program.module()(x, index), x[:, index])
        y = compiled(x, index)
        assert torch.equal(y, x[:, index])
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0][0, :, 0], torch.tensor([0.0, 1.0, 1.0]))


def test_vmap() -> None:
    x, index = torch.randn(3, 2, 5, 4, requires_grad=True), torch.tensor([4, 1, 2])
    for in_dims, dim in ((0, 1), (0, -1), (1, 1), (3, 2)):
        picked = index % (x.movedim(in_dims, 0).shape[1:][dim])
        y = torch.vmap(lambda x: gather_channels(x, picked, dim), in_dims=(in_dims,))(x)  # noqa: B023
        expected = torch.stack([sample.index_select(dim, picked) for sample in x.unbind(in_dims)])
        assert torch.equal(y, expected)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])


def test_vmap_takes_one_index_for_all_samples() -> None:
    with pytest.raises(ValueError, match="in_dims of None"):
        torch.vmap(gather_channels)(torch.randn(3, 2, 4), torch.zeros(3, 2, dtype=torch.int64))


def test_bad_arguments() -> None:
    x = torch.randn(2, 3, 4)
    with pytest.raises(IndexError, match=r"index\[1\] = 3, expected 0 to 2"):
        gather_channels(x, torch.tensor([0, 3]))
    with pytest.raises(IndexError, match=r"index\[0\] = -1"):
        gather_channels(x, torch.tensor([-1]))
    with pytest.raises(IndexError, match=r"scatter_channels: index\[0\] = 5"):
        scatter(x, torch.tensor([5, 0, 1]), 1, 5)
    with pytest.raises(RuntimeError, match="index must be int64 and one-dimensional, got Int"):
        gather_channels(x, torch.tensor([0], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="index must be int64 and one-dimensional"):
        gather_channels(x, torch.tensor([[0]]))
    with pytest.raises(RuntimeError, match="x must be float32, float64, float16 or bfloat16, got Long"):
        gather_channels(x.long(), torch.tensor([0]))
    with pytest.raises(RuntimeError, match=r"dim must be in \[-3, 2\] for a 3-dimensional x, got 3"):
        gather_channels(x, torch.tensor([0]), 3)
    with pytest.raises(RuntimeError, match="index is on meta"):
        gather_channels(x, torch.tensor([0], device="meta"))
    with pytest.raises(RuntimeError, match="for each of the 2 entries of index, got 3"):
        scatter(x, torch.tensor([0, 1]), 1, 5)
