"""CUDA against CPU, for every operator. Run on a machine with a GPU: python -m pytest tests/gpu"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cctorch import ops
from torch import Tensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(0, 3, 2, 2), (1, 1, 1, 1), (8, 5, 7, 7), (64, 32, 28, 28)]
FORMATS = [torch.contiguous_format, torch.channels_last]


def on_both(function: Callable[..., Tensor], *tensors: Tensor) -> list[list[Tensor]]:
    """Result and gradients on CPU and on CUDA."""
    results = []
    generator = torch.Generator().manual_seed(1)
    grad: Tensor | None = None
    for device in ("cpu", "cuda"):
        leaves = [t.detach().to(device).requires_grad_() for t in tensors]
        y = function(*leaves)
        if grad is None:
            grad = torch.randn(y.shape, generator=generator).to(y.dtype)
        results.append([y, *torch.autograd.grad(y, leaves, grad.to(device))])
        assert all(t.device.type == device for t in results[-1])
    return results


def assert_agree(results: list[list[Tensor]], dtype: torch.dtype, terms: int) -> None:
    cpu, cuda = results
    eps = torch.finfo(dtype).eps
    for ours, theirs in zip(cuda, cpu, strict=True):
        assert ours.stride() == theirs.stride()
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours.cpu(), theirs, rtol=4 * eps, atol=4 * torch.finfo(torch.float32).eps * terms)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_fake_quant(dtype: torch.dtype, shape: tuple[int, ...], memory_format: torch.memory_format, axis: Any) -> None:
    step = 2.0**-3
    # Quarter steps off the half: exp may differ in the last bit between devices, a rounding decision may not.
    x = ((torch.randint(-60, 60, shape) * 4 + 1) * step / 16).to(dtype).contiguous(memory_format=memory_format)
    count = 1 if axis is None else shape[axis]
    log_scale = torch.full((count,), step).log().to(torch.promote_types(dtype, torch.float32))
    results = on_both(lambda x, log_scale: ops.fake_quant(x, log_scale, -8, 7, axis, 0.5), x, log_scale)
    assert_agree(results, dtype, x.numel())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("op", ["fake_quant_offset", "pact", "fp8_quant"])
def test_relatives_of_fake_quant(
    op: str, dtype: torch.dtype, shape: tuple[int, ...], memory_format: torch.memory_format, axis: Any
) -> None:
    step = 2.0**-3
    # Off the halves again; fp8's numbers that lie off the ties of both formats.
    x = ((torch.randint(-60, 60, shape) * 4 + 1) * step / 16).to(dtype).contiguous(memory_format=memory_format)
    kind = torch.promote_types(dtype, torch.float32)
    count = 1 if axis is None else shape[axis]
    log_scale, offset = torch.full((count,), step).log().to(kind), torch.full((count,), step).to(kind)
    calls: dict[str, Callable[..., Tensor]] = {
        "fake_quant_offset": lambda x, s, o: ops.fake_quant_offset(x, s, o, -8, 7, axis, 0.5),
        "pact": lambda x, s: ops.pact(x, s + 2.01, 3, axis),
        "fp8_quant": lambda x, s: ops.fp8_quant(x, s + 0.01, torch.float8_e4m3fn, axis, 0.5),
    }
    parameters = (log_scale, offset) if op == "fake_quant_offset" else (log_scale,)
    assert_agree(on_both(calls[op], x, *parameters), dtype, x.numel())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_value_grids(dtype: torch.dtype, axis: Any) -> None:
    x = torch.randn(16, 8, 3, 3).to(dtype)
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda x: ops.power_of_two_quant(x, 4, axis),
        lambda x: ops.binary_quant(x, axis),
        lambda x: ops.ternary_quant(x, axis),
        lambda x: ops.binary_code_quant(x, 3, "greedy", axis),
        lambda x: ops.binary_code_quant(x, 2, axis=axis),
        lambda x: ops.quant_range(x, -8, 7, axis).to(x.dtype),
        lambda x: ops.quant_range_offset(x, 0, 15, axis, "mse")[1].to(x.dtype),
    ]
    for call in calls:
        torch.testing.assert_close(call(x.cuda()).cpu(), call(x), rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    codebook = torch.randn(7).to(torch.promote_types(dtype, torch.float32))
    assert_agree(on_both(ops.codebook_quant, x, codebook), dtype, x.numel())
    torch.testing.assert_close(ops.codebook_update(x.cuda(), codebook.cuda()).cpu(), ops.codebook_update(x, codebook))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_channel_gate(dtype: torch.dtype, shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    assert_agree(on_both(ops.channel_gate, x, torch.randn(shape[1]).to(dtype)), dtype, x.numel())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dim", [1, -1])
def test_gather_channels(dtype: torch.dtype, memory_format: torch.memory_format, dim: int) -> None:
    x = torch.randn(8, 40, 7, 24).to(dtype).contiguous(memory_format=memory_format)
    index = torch.tensor([23, 0, 4, 5, 17])
    assert_agree(on_both(lambda x: ops.gather_channels(x, index.to(x.device), dim), x), dtype, 1)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_soft_threshold(
    dtype: torch.dtype, shape: tuple[int, ...], memory_format: torch.memory_format, axis: Any
) -> None:
    x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    threshold = torch.rand(1 if axis is None else shape[axis], dtype=torch.promote_types(dtype, torch.float32))
    assert_agree(on_both(lambda x, t: ops.soft_threshold(x, t, axis), x, threshold), dtype, x.numel())


def test_gates() -> None:
    x, logit = torch.randn(4, 8, 5, 5, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    assert_agree(on_both(lambda x, logit: ops.sigmoid_gate(x, logit, 0.5), x, logit), torch.float64, x.numel())
    assert_agree(on_both(lambda a: ops.hard_concrete(a, training=False), logit), torch.float64, 1)


def test_a_captured_graph_draws_new_gates() -> None:
    log_alpha = torch.zeros(1000, device="cuda")
    ops.hard_concrete(log_alpha)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = ops.hard_concrete(log_alpha)
    draws = []
    for _ in range(2):
        graph.replay()
        draws.append(z.clone())
    assert not torch.equal(*draws)


def tied(*shape: int) -> Tensor:
    """Few distinct magnitudes, so that most decisions are ties."""
    return torch.randint(-4, 5, shape) / 4


def permuted(*shape: int) -> Tensor:
    return tied(*reversed(shape)).permute(*reversed(range(len(shape))))


WEIGHTS: dict[str, Callable[[], list[Tensor]]] = {
    "mixed": lambda: [tied(16, 8, 3, 3).contiguous(memory_format=torch.channels_last), torch.randn(100_000)],
    "equal": lambda: [torch.ones(3, 5), -torch.ones(200_000), torch.ones(7)],
    "empty": lambda: [torch.empty(0), tied(3, 3), torch.empty(4, 0)],
    "all empty": lambda: [torch.empty(0, 3)],
    "unaligned": lambda: [torch.randn(10_001)[1:], tied(5, 101)[1:, 3:]],
    "layouts": lambda: [permuted(4, 6, 5), tied(1, 9).expand(4, 9), torch.randn(())],
    "hundreds": lambda: [tied(i % 50) for i in range(700)],
    "large": lambda: [torch.randn(3_000_000), torch.zeros(3_000_000), torch.randn(1_000_003)],
    "extremes": lambda: [torch.tensor([0.0, -0.0, 1e-45, -math.inf, math.inf, 1e-38, -3e38])],
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_magnitude_masks(dtype: torch.dtype, name: str) -> None:
    weights = [weight.to(dtype) for weight in WEIGHTS[name]()]
    on_device = [weight.cuda() for weight in weights]
    for sparsity in (0.0, 0.3, 0.9, 0.999, 1.0):
        masks, expected = (ops.magnitude_masks(w, sparsity) for w in (on_device, weights))
        pruned, kept = (ops.magnitude_prune(w, sparsity) for w in (on_device, weights))
        for weight, ours, theirs in zip(on_device * 2, masks + pruned, expected + kept, strict=True):
            assert torch.equal(ours.cpu(), theirs)
            assert ours.stride() == torch.empty_like(weight).stride()


@pytest.mark.parametrize("dtype", TYPES)
def test_nan_is_the_largest(dtype: torch.dtype) -> None:
    weight = torch.tensor([math.inf, 1, math.nan, 2, -math.nan, 3, 4, 5], dtype=dtype, device="cuda")
    assert ops.magnitude_masks([weight], 0.75)[0].tolist() == [False, False, True, False, True, False, False, False]
    assert ops.magnitude_masks([weight], 0.5)[0].tolist() == [True, False, True, False, True, False, False, True]
    assert ops.nm_masks([weight], 1, 4, 0)[0].tolist() == [False, False, True, False, True, False, False, False]
    assert ops.channel_masks([weight], 0.75)[0].tolist() == [False, False, True, False, True, False, False, False]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (3, 8), (1, 1)])
def test_structured_masks(dtype: torch.dtype, axis: int, n: int, m: int) -> None:
    for weight in (tied(16, 8, 24), permuted(16, 8, 24), tied(48, 8, 72)[::3, :, ::3], torch.randn(256, 64, 512)):
        weight = weight.to(dtype)
        (mask,) = ops.nm_masks([weight.cuda()], n, m, axis)
        assert torch.equal(mask.cpu(), ops.nm_masks([weight], n, m, axis)[0])
        assert mask.stride() == torch.empty_like(weight).stride()
    for sparsity in (0.0, 0.3, 1.0):
        (mask,) = ops.channel_masks([weight.cuda()], sparsity, axis)
        assert torch.equal(mask.cpu(), ops.channel_masks([weight], sparsity, axis)[0])


@pytest.mark.parametrize("dtype", TYPES)
def test_masks_of_lists(dtype: torch.dtype) -> None:
    weights = [tied(16, 8, 24).to(dtype), permuted(8, 48).to(dtype), torch.randn(256, 64, 3, 3).to(dtype)]
    weights += [tied(4, 4 * (i % 5)).to(dtype) for i in range(200)]
    on_device = [weight.cuda() for weight in weights]
    for function in (
        lambda w: ops.nm_masks(w, 2, 4),
        lambda w: ops.nm_masks(w, 1, 4, 0),
        lambda w: ops.channel_masks(w, 0.6, 1),
        lambda w: ops.block_masks(w, 0.6, 4, 4),
    ):
        for ours, theirs in zip(function(on_device), function(weights), strict=True):
            assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("dtype", TYPES)
def test_apply_mask(dtype: torch.dtype) -> None:
    for weight in (torch.randn(0, 3), tied(5), tied(1, 3).expand(4, 3), permuted(7, 33, 65), torch.randn(1025)[1:]):
        weight = weight.to(dtype)
        mask = torch.rand(weight.shape) < 0.5
        (ours, grad), (theirs, expected) = (
            (y, torch.autograd.grad(y.sum(), leaf)[0])
            for leaf, m in ((weight.cuda().requires_grad_(), mask.cuda()), (weight.clone().requires_grad_(), mask))
            for y in (ops.apply_mask(leaf, m),)
        )
        assert torch.equal(ours.cpu(), theirs)
        assert torch.equal(grad.cpu(), expected)
    weight = torch.tensor([math.nan, math.inf, 1], dtype=dtype, device="cuda")
    assert ops.apply_mask(weight, torch.tensor([False, False, True], device="cuda")).tolist() == [0, 0, 1]


def test_a_captured_graph_keeps_the_list_of_weights() -> None:
    weights = [torch.randn(1000, device="cuda") for _ in range(200)]
    ops.magnitude_masks(weights, 0.5)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        masks = ops.magnitude_masks(weights, 0.5)
    for weight in weights:
        weight.normal_()
    graph.replay()
    expected = ops.magnitude_masks([weight.cpu() for weight in weights], 0.5)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(masks, expected, strict=True))


@pytest.mark.parametrize("shape", [(64, 32, 28, 28), (512, 64, 3, 3), (4096, 3), (100_000, 64)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_sums_are_the_same_every_time(shape: tuple[int, ...], channels_last: bool) -> None:
    x = torch.randn(shape, device="cuda")
    if channels_last and len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    gate = torch.randn(shape[1], device="cuda", requires_grad=True)
    grads = [torch.autograd.grad(ops.channel_gate(x, gate), gate, x)[0] for _ in range(5)]
    assert all(torch.equal(grad, grads[0]) for grad in grads)
    dims = [d for d in range(len(shape)) if d != 1]
    torch.testing.assert_close(grads[0].double(), x.double().square().sum(dims), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("count", [2, 16, 100, 256])
def test_sums_over_members_are_the_same_every_time(count: int) -> None:
    x, book = torch.randn(3_000_001, device="cuda"), torch.randn(count, device="cuda")
    updates = [ops.codebook_update(x, book) for _ in range(5)]
    assert all(torch.equal(update, updates[0]) for update in updates)
    torch.testing.assert_close(updates[0].cpu(), ops.codebook_update(x.cpu(), book.cpu()), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rows", [2, 1000])
def test_low_rank(rows: int) -> None:
    x, first, second = (torch.randn(s, dtype=torch.float64) for s in ((rows, 16), (14, 16), (24, 14)))
    assert_agree(on_both(ops.low_rank_linear, x, first, second), torch.float64, 1)
    image, first, second = (torch.randn(s, dtype=torch.float64) for s in ((2, 8, 9, 9), (4, 8, 3, 3), (16, 4, 1, 1)))
    assert_agree(on_both(lambda *t: ops.low_rank_conv2d(*t, None, 2, 1), image, first, second), torch.float64, 1)


def test_no_operator_waits_for_the_device() -> None:
    x = torch.randn(4, 8, 3, 3, device="cuda", requires_grad=True)
    threshold = torch.full((8,), 0.1, device="cuda", requires_grad=True)
    log_scale, gate = (torch.zeros(8, device="cuda", requires_grad=True) for _ in range(2))
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = ops.fake_quant(ops.channel_gate(x, gate), log_scale, -8, 7, 1)
        y = (
            ops.sigmoid_gate(ops.soft_threshold(y, threshold, 1), ops.hard_concrete(gate))
            + ops.magnitude_prune([x], 0.5)[0]
        )
        y = y + ops.codebook_quant(x, ops.codebook_update(x, log_scale)) + ops.binary_quant(x, 0)
        (mask,) = ops.magnitude_masks([x], 0.5)
        masks = [mask, *ops.nm_masks([x], 2, 4), *ops.channel_masks([x, x], 0.5), *ops.block_masks([x], 0.5, 2, 3)]
        sum(ops.apply_mask(y, mask).sum() for mask in masks).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
