"""CUDA against CPU, for every operator. Run on a machine with a GPU: python -m pytest tests/gpu"""

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
def test_channel_gate(dtype: torch.dtype, shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    assert_agree(on_both(ops.channel_gate, x, torch.randn(shape[1]).to(dtype)), dtype, x.numel())


@pytest.mark.parametrize("dtype", TYPES)
def test_masks(dtype: torch.dtype) -> None:
    weights = [
        (torch.randint(-4, 5, (16, 8, 3, 3)) / 4).to(dtype).contiguous(memory_format=torch.channels_last),
        torch.randn(100_000).to(dtype),
    ]
    on_device = [weight.cuda() for weight in weights]
    for sparsity in (0.0, 0.3, 0.9, 1.0):
        masks, expected = (ops.magnitude_masks(w, sparsity) for w in (on_device, weights))
        assert all(torch.equal(a.cpu(), b) for a, b in zip(masks, expected, strict=True))
        assert torch.equal(ops.channel_mask(on_device[0], sparsity).cpu(), ops.channel_mask(weights[0], sparsity))
    mask = ops.nm_mask(on_device[0], 2, 4)
    assert torch.equal(mask.cpu(), ops.nm_mask(weights[0], 2, 4))
    assert torch.equal(ops.apply_mask(on_device[0], mask).cpu(), ops.apply_mask(weights[0], mask.cpu()))


@pytest.mark.parametrize("rows", [2, 1000])
def test_low_rank(rows: int) -> None:
    x, first, second = (torch.randn(s, dtype=torch.float64) for s in ((rows, 16), (14, 16), (24, 14)))
    assert_agree(on_both(ops.low_rank_linear, x, first, second), torch.float64, 1)
    image, first, second = (torch.randn(s, dtype=torch.float64) for s in ((2, 8, 9, 9), (4, 8, 3, 3), (16, 4, 1, 1)))
    assert_agree(on_both(lambda *t: ops.low_rank_conv2d(*t, None, 2, 1), image, first, second), torch.float64, 1)


def test_no_operator_waits_for_the_device() -> None:
    x = torch.randn(4, 8, 3, 3, device="cuda", requires_grad=True)
    log_scale, gate = (torch.zeros(8, device="cuda", requires_grad=True) for _ in range(2))
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = ops.fake_quant(ops.channel_gate(x, gate), log_scale, -8, 7, 1)
        (mask,) = ops.magnitude_masks([x], 0.5)
        masks = [mask, ops.nm_mask(x, 2, 4), ops.channel_mask(x, 0.5)]
        sum(ops.apply_mask(y, mask).sum() for mask in masks).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
