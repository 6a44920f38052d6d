"""What only a device has: streams, its memory, and tensors of more elements than 32 bits count."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cctorch import ops
from cctorch import regularize as r
from placed import DEVICE, needs_device
from torch import Tensor
from torch.utils._pytree import tree_leaves

pytestmark = needs_device
on_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="of a CUDA device")


def scale(x: Tensor, count: int = 1) -> Tensor:
    return x.new_full((count,), -2.0, dtype=torch.float32)


def backward(function: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> Any:
    leaves = [t.detach().requires_grad_() for t in (x, *parameters)]
    y = function(*leaves)
    return y.detach(), torch.autograd.grad(y, leaves, y.detach())


def applied(q: r.Regularizer, x: Tensor) -> Tensor:
    value = x.clone()
    q.apply([("x", value)])
    return value


# Of x, N x 16 x 8 x 8.
CALLS: dict[str, Callable[[Tensor], Any]] = {
    "fake_quant": lambda x: backward(lambda x, s: ops.fake_quant(x, s, -8, 7, 1), x, scale(x, 16)),
    "fake_quant whole": lambda x: backward(lambda x, s: ops.fake_quant(x, s, -8, 7), x, scale(x)),
    "fake_quant_offset": lambda x: backward(
        lambda x, s, o: ops.fake_quant_offset(x, s, o, -8, 7, 1), x, scale(x, 16), scale(x, 16)
    ),
    "fake_quant_groups": lambda x: backward(
        lambda x, s: ops.fake_quant_groups(x, s, -8, 7, 64), x, scale(x, 16 * len(x)).view(-1, 16)
    ),
    "fake_quant_weights": lambda x: ops.fake_quant_weights([x, x[0], x[1:]], 4),
    "fake_quant of a list": lambda x: backward(
        lambda x, s: torch.cat([y.flatten() for y in ops.fake_quant([x, x[0], x[1:]], [s, s, s], -8, 7)]), x, scale(x)
    ),
    "pact": lambda x: backward(lambda x, s: ops.pact(x, s, 4), x, scale(x)),
    "fp8_quant": lambda x: backward(lambda x, s: ops.fp8_quant(x, s), x, scale(x)),
    "soft_threshold": lambda x: backward(lambda x, t: ops.soft_threshold(x, t, 1), x, scale(x, 16).exp()),
    "channel_gate": lambda x: backward(ops.channel_gate, x, scale(x, 16).to(x.dtype)),
    "apply_mask": lambda x: backward(lambda x: ops.apply_mask(x, x > 0), x),
    "magnitude_masks": lambda x: ops.magnitude_masks([x, x[0], x[1:]], 0.7),
    "magnitude_prune": lambda x: ops.magnitude_prune([x, x[0], x[1:]], 0.7),
    "nm_masks": lambda x: ops.nm_masks([x, x[1:]], 2, 4),
    "channel_masks": lambda x: ops.channel_masks([x, x[1:]], 0.5),
    "block_masks": lambda x: ops.block_masks([x, x[:2]], 0.5, 2, 4),
    "power_of_two_quant": lambda x: ops.power_of_two_quant(x, 4, 0),
    "binary_quant": lambda x: ops.binary_quant(x, 0),
    "ternary_quant": lambda x: ops.ternary_quant(x, 0),
    "binary_code_quant": lambda x: ops.binary_code_quant(x, 2, axis=0),
    "codebook_quant": lambda x: ops.codebook_quant(x, torch.linspace(-1, 1, 7, device=x.device)),
    "quant_range": lambda x: ops.quant_range(x, -8, 7, 0, "mse"),
    "batch_norm": lambda x: ops.batch_norm(x, *(scale(x, 16).to(x.dtype) for _ in range(2))),
    "magnitude pruning": lambda x: applied(r.MagnitudePruning(0.5), x),
    "uniform quantization": lambda x: applied(r.UniformQuantization(4), x),
    "codebook": lambda x: applied(r.CodebookQuantization(2), x),
}


def image(dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(8, 16, 8, 8, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_every_time(name: str, dtype: torch.dtype) -> None:
    first, second = (tree_leaves(CALLS[name](image(dtype))) for _ in range(2))
    assert len(first) > 0
    for a, b in zip(first, second, strict=True):
        assert a.device.type == DEVICE.type
        assert torch.equal(a, b)


@on_cuda
@pytest.mark.parametrize("name", CALLS)
def test_runs_on_the_current_stream(name: str) -> None:
    """Behind work of that stream that takes a while: on another one, it would see what was there before."""
    expected = [t.clone() for t in tree_leaves(CALLS[name](image(torch.float32)))]
    source, x = image(torch.float32), image(torch.float32, seed=1)
    torch.cuda.synchronize()
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        torch.cuda._sleep(20_000_000)
        x.copy_(source)
        found = tree_leaves(CALLS[name](x))
    aside.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@on_cuda
@pytest.mark.parametrize("name", CALLS)
def test_leaves_no_memory_behind(name: str) -> None:
    x = image(torch.float32)
    used = []
    for _ in range(3):
        CALLS[name](x)
        gc.collect()
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert used[1] == used[2]


@pytest.fixture
def large() -> Tensor:
    """2^31 + 2^15 elements."""
    if DEVICE.type != "cuda" or torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("40 GiB of a device's memory")
    gc.collect()
    torch.cuda.empty_cache()
    x = torch.empty(2**16 + 1, 8, 64, 64, dtype=torch.bfloat16, device=DEVICE)
    return x.uniform_(-1, 1)


ENDS = [slice(0, 2), slice(2**15 - 1, 2**15 + 1), slice(-2, None)]
ELEMENT_WISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "channel_gate": lambda x, p: ops.channel_gate(x, p.to(x.dtype)),
    "fake_quant": lambda x, p: ops.fake_quant(x, p, -8, 7, 1),
    "soft_threshold": lambda x, p: ops.soft_threshold(x, p.exp(), 1),
    "fp8_quant": lambda x, p: ops.fp8_quant(x, p[:1]),
    "apply_mask": lambda x, p: ops.apply_mask(x, x > 0.5),
}


@pytest.mark.parametrize("name", ELEMENT_WISE)
def test_more_elements_than_32_bits_count(large: Tensor, name: str) -> None:
    parameter = torch.linspace(-3, -1, 8, device=DEVICE)
    y = ELEMENT_WISE[name](large, parameter)
    for part in ENDS:
        assert torch.equal(y[part], ELEMENT_WISE[name](large[part], parameter))


def test_gradients_of_more_elements_than_32_bits_count(large: Tensor) -> None:
    gate = torch.ones(8, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    y = ops.channel_gate(large.requires_grad_(), gate)
    grad_x, grad = torch.autograd.grad(y, (large, gate), torch.ones((), device=DEVICE, dtype=y.dtype).expand_as(y))
    assert bool((grad_x[-1] == 1).all())
    sums = torch.stack([large.detach()[:, c].sum(dtype=torch.float64) for c in range(8)])
    torch.testing.assert_close(grad.double(), sums, rtol=0.01, atol=1.0)


@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_masks_of_more_elements_than_32_bits_count(large: Tensor, sparsity: float) -> None:
    (mask,) = ops.magnitude_masks([large], sparsity)
    kept = int(mask.sum())
    assert abs(kept - (1 - sparsity) * large.numel()) <= 1
    for part in ENDS:
        magnitudes = large[part].abs()
        assert magnitudes[mask[part]].min() >= magnitudes[~mask[part]].max()
    (mask,) = ops.nm_masks([large], 2, 4)
    assert int(mask.sum()) == large.numel() // 2
    assert torch.equal(mask[-2:], ops.nm_masks([large[-2:]], 2, 4)[0])
