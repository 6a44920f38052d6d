"""Operators that test_ops.py leaves out, on the device against the CPU: the rest of the values, types and shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cctorch import ops
from placed import DEVICE, assert_same, needs_device
from torch import Tensor

pytestmark = needs_device

TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 1, 1), (8, 5, 7, 7), (16, 24, 6, 6)]
FORMATS = [torch.contiguous_format, torch.channels_last]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def results(function: Callable[..., Tensor], device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """What it returns, and the gradient of each tensor."""
    leaves = [t.detach().to(device).requires_grad_() for t in tensors]
    y = function(*leaves)
    seeds = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, seeds.to(device))]


def compare(function: Callable[..., Tensor], *tensors: Tensor, rtol: float, atol: float) -> None:
    pairs = zip(results(function, DEVICE, *tensors), results(function, torch.device("cpu"), *tensors), strict=True)
    for ours, theirs in pairs:
        assert_same(ours, theirs, rtol=rtol, atol=atol)


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_batch_norm(dtype: torch.dtype, shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    x = drawn(*shape, dtype=dtype).contiguous(memory_format=memory_format)
    weight, bias = (drawn(shape[1], seed=seed, dtype=dtype) for seed in (1, 2))
    tolerance = max(eps(dtype), 1e-6) * 16
    compare(lambda *t: ops.batch_norm(*t)[0], x, weight, bias, rtol=tolerance, atol=tolerance * math.sqrt(x.numel()))
    for ours, theirs in zip(
        ops.batch_norm(x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE)), ops.batch_norm(x, weight, bias), strict=True
    ):
        assert ours.stride() == theirs.stride()
        assert_same(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(0, 3, 2, 2), *SHAPES])
def test_batch_norm_inference(dtype: torch.dtype, shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    x = drawn(*shape, dtype=dtype).contiguous(memory_format=memory_format)
    weight, bias, mean, var = (drawn(shape[1], seed=seed, dtype=dtype) for seed in range(1, 5))
    var = var.abs() + 0.5
    tolerance = max(eps(dtype), 1e-6) * 8

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.batch_norm_inference(x, weight, bias, mean.to(x.device), var.to(x.device))

    compare(function, x, weight, bias, rtol=tolerance, atol=tolerance * math.sqrt(max(x.numel(), 1)))


def test_batch_norm_twice_differentiated() -> None:
    x = drawn(4, 3, 2, 2, dtype=torch.float64).to(DEVICE).requires_grad_()
    weight, bias = (drawn(3, seed=seed, dtype=torch.float64).to(DEVICE).requires_grad_() for seed in (1, 2))
    assert torch.autograd.gradcheck(lambda *t: ops.batch_norm(*t)[0], (x, weight, bias))
    assert torch.autograd.gradgradcheck(lambda *t: ops.batch_norm(*t)[0], (x, weight, bias))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_passes_of_synchronized_statistics(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    passes = torch.ops.cctorch
    x, grad = (drawn(6, 5, 4, 3, seed=s, dtype=dtype).contiguous(memory_format=memory_format) for s in (0, 1))
    per_channel = [drawn(5, seed=seed, dtype=torch.float64) for seed in range(2, 6)]
    calls: list[Callable[..., Any]] = [
        lambda x, grad, a, b, c, d: passes.batch_norm_moments(x),
        lambda x, grad, a, b, c, d: passes.batch_norm_affine(x, a, b, c),
        lambda x, grad, a, b, c, d: passes.batch_norm_grad_sums(grad, x, a),
        lambda x, grad, a, b, c, d: passes.batch_norm_grad_input(grad, x, a, b, c, d),
    ]
    for call in calls:
        ours = call(*(t.to(DEVICE) for t in (x, grad, *per_channel)))
        theirs = call(x, grad, *per_channel)
        for mine, wanted in zip(*(r if isinstance(r, tuple) else (r,) for r in (ours, theirs)), strict=True):
            # Sums of 72 numbers, made in float64 whatever the type.
            tolerance = (72 if dtype == torch.float64 else 8) * eps(dtype)
            assert_same(mine, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fake_quant_weights(dtype: torch.dtype, axis: int, bits: int) -> None:
    # Exact quotients: their largest is a power of two times the largest level.
    levels = 2 ** (bits - 1) - 1
    generator = torch.Generator().manual_seed(0)
    weights = []
    for shape in [(16, 8, 3, 3), (10, 36), (1, 1), (33, 7, 5)] + [(8, 4)] * 150:
        values = torch.randint(-levels, levels + 1, shape, generator=generator) + 0.25
        values.movedim(axis, 0).flatten(1)[:, 0] = levels
        weights.append((values * 2.0**-5).to(dtype))
    weights[0] = weights[0].contiguous(memory_format=torch.channels_last)
    weights.append(torch.zeros(4, 3, dtype=dtype))
    weights.append(torch.empty(0, 3, dtype=dtype))
    ours, theirs = (ops.fake_quant_weights([w.to(d) for w in weights], bits, axis) for d in (DEVICE, "cpu"))
    for part in (0, 1):
        for mine, wanted in zip(ours[part], theirs[part], strict=True):
            assert mine.stride() == wanted.stride()
            assert_same(mine, wanted, rtol=eps(wanted.dtype), atol=0.0)
    leaves = [w.to(DEVICE).requires_grad_() for w in weights]
    grads = torch.autograd.grad(sum(y.sum() for y in ops.fake_quant_weights(leaves, bits, axis)[0]), leaves)
    assert all(torch.equal(grad, torch.ones_like(grad)) for grad in grads)


LISTS: dict[str, Callable[..., list[Tensor]]] = {
    "fake_quant": lambda xs, s, axis: ops.fake_quant(xs, s, -8, 7, axis, [1 / (1 + i) for i in range(len(xs))]),
    "fake_quant_offset": lambda xs, s, axis: ops.fake_quant_offset(xs, s, [t + 3 for t in s], -8, 7, axis, 0.5),
    "fp8_quant": lambda xs, s, axis: ops.fp8_quant(xs, s, axis=axis),
    "soft_threshold": lambda xs, s, axis: ops.soft_threshold(xs, [t.exp() for t in s], axis),
    "power_of_two_quant": lambda xs, s, axis: ops.power_of_two_quant(xs, 4, axis),
    "binary_quant": lambda xs, s, axis: ops.binary_quant(xs, axis),
    "ternary_quant": lambda xs, s, axis: ops.ternary_quant(xs, axis),
    "binary_code_quant": lambda xs, s, axis: ops.binary_code_quant(xs, 2, axis=axis),
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_lists(name: str, dtype: torch.dtype, axis: int | None) -> None:
    """With more tensors than a launch has room for, in several layouts."""
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(16, 8, 3, 3), (10, 36), (1, 1), (33, 7, 5), (4, 5000), (0, 3), *[(8, 4)] * 60]
    # Quarter steps off the half and off the ends of the grids: exp may differ in the last bit between devices, a
    # rounding decision may not.
    step = 2.0**-3
    xs = [(torch.randint(-60, 60, shape, generator=generator) * 4 + 1) * step / 16 for shape in shapes]
    if name == "fp8_quant":  # whose grid is finer near 0: a 64th above its own levels
        xs = [(x / step).to(torch.float8_e4m3fn).float() * (65 / 64 * step) for x in xs]
    xs = [x.to(dtype) for x in xs]
    xs[0] = xs[0].contiguous(memory_format=torch.channels_last)
    xs[3] = xs[3].permute(2, 0, 1)
    grads = [torch.randn(x.shape, generator=generator).to(dtype) for x in xs]
    scales = [torch.full([1 if axis is None else x.shape[axis]], step).log().to(wide(dtype)) for x in xs]

    def run(device: torch.device | str) -> tuple[list[Tensor], list[Tensor | None]]:
        leaves = [t.detach().to(device).requires_grad_() for t in (*xs, *scales)]
        ys = LISTS[name](leaves[: len(xs)], leaves[len(xs) :], axis)
        return ys, list(torch.autograd.grad(ys, leaves, [g.to(device) for g in grads], allow_unused=True))

    ours, theirs = run(DEVICE), run("cpu")
    # Sums of gradients of either sign; the largest are of 20000 elements.
    error = 20000 * torch.finfo(torch.float32).eps
    for mine, wanted in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        assert (mine is None) == (wanted is None)
        if mine is not None and wanted is not None:
            assert mine.stride() == wanted.stride()
            assert_same(mine, wanted, rtol=4 * eps(wanted.dtype), atol=error)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_fake_quant_groups(dtype: torch.dtype, offset: bool, memory_format: torch.memory_format) -> None:
    step = 2.0**-3
    generator = torch.Generator().manual_seed(0)
    x = ((torch.randint(-60, 60, (6, 8, 3, 3), generator=generator) * 4 + 1) * step / 16).to(dtype)
    x = x.contiguous(memory_format=memory_format)
    log_scale = torch.full((6, 4), math.log(step), dtype=wide(dtype))
    parameters = [log_scale, torch.full((6, 4), step, dtype=wide(dtype))] if offset else [log_scale]

    def function(x: Tensor, log_scale: Tensor, *offset: Tensor) -> Tensor:
        return ops.fake_quant_groups(x, log_scale, -8, 7, 18, 0.5, *offset)

    compare(function, x, *parameters, rtol=4 * eps(dtype), atol=1e-4 if dtype != torch.float64 else 1e-12)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_ranges(dtype: torch.dtype, axis: int | None, method: str) -> None:
    x = drawn(12, 8, 5, dtype=dtype)
    tolerance = 1e-5 if dtype != torch.float64 else 1e-12
    assert_same(
        ops.quant_range(x.to(DEVICE), -8, 7, axis, method),
        ops.quant_range(x, -8, 7, axis, method),
        rtol=tolerance,
        atol=tolerance,
    )
    ours, theirs = (ops.quant_range_offset(x.to(d), 0, 15, axis, method) for d in (DEVICE, "cpu"))
    for mine, wanted in zip(ours, theirs, strict=True):
        assert_same(mine, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("axis", [None, 1])
def test_observed_ranges(dtype: torch.dtype, axis: int | None) -> None:
    count = 1 if axis is None else 8
    averages = []
    for device in (DEVICE, torch.device("cpu")):
        low, high = (torch.full((count,), sign * math.inf, dtype=wide(dtype), device=device) for sign in (1, -1))
        for seed in range(3):
            ops.observe_range_(low, high, drawn(12, 8, 5, seed=seed, dtype=dtype).to(device), 0.25, axis)
        ops.observe_range_(low, high, torch.empty(0, 8, 5, dtype=dtype, device=device), 0.25, axis)
        averages.append((low, high))
    for ours, theirs in zip(*averages, strict=True):
        assert_same(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("axis", [None, 0, 2])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("method", ["greedy", "alternating"])
def test_binary_codes(dtype: torch.dtype, axis: int | None, bits: int, method: str) -> None:
    """To the error, since two codes of nearly the same error may be chosen by a rounding."""
    x = drawn(6, 10, 4, dtype=dtype)
    errors = []
    for device in (DEVICE, torch.device("cpu")):
        y = ops.binary_code_quant(x.to(device), bits, method, axis)
        assert y.shape == x.shape
        errors.append(float((y.cpu().double() - x.double()).square().sum()))
    assert errors[0] == pytest.approx(errors[1], rel=1e-6 if dtype == torch.float64 else 20 * eps(dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_binary_and_ternary_gradients(dtype: torch.dtype) -> None:
    x = drawn(6, 10, 4, dtype=dtype)
    for axis in (None, 0, 1):
        compare(lambda x, a=axis: ops.binary_quant(x, a), x, rtol=4 * eps(dtype), atol=1e-7)
        compare(lambda x, a=axis: ops.ternary_quant(x, a), x, rtol=4 * eps(dtype), atol=1e-7)
    compare(lambda x: ops.power_of_two_quant(x, 4, 0), x, rtol=4 * eps(dtype), atol=1e-7)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count", [1, 2, 16])
def test_codebooks(dtype: torch.dtype, count: int) -> None:
    x, codebook = drawn(40, 30, dtype=dtype), drawn(count, seed=1, dtype=wide(dtype))
    x[0, :3] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    assert torch.equal(
        ops.codebook_indices(x[1:].to(DEVICE), codebook.to(DEVICE)).cpu(), ops.codebook_indices(x[1:], codebook)
    )
    assert_same(ops.codebook_quant(x.to(DEVICE), codebook.to(DEVICE)), ops.codebook_quant(x, codebook))
    ours, theirs = codebook.to(DEVICE), codebook
    for _ in range(3):
        ours, theirs = ops.codebook_update(x[1:].to(DEVICE), ours), ops.codebook_update(x[1:], theirs)
    assert_same(ours, theirs, rtol=1e-6, atol=1e-7)


EMPTY: dict[str, Callable[[Tensor], Any]] = {
    "fake_quant": lambda x: ops.fake_quant(x, x.new_zeros(3, dtype=wide(x.dtype)), -8, 7, 1),
    "fake_quant whole": lambda x: ops.fake_quant(x, x.new_zeros(1, dtype=wide(x.dtype)), -8, 7),
    "pact": lambda x: ops.pact(x, x.new_zeros(1, dtype=wide(x.dtype)), 4),
    "fp8_quant": lambda x: ops.fp8_quant(x, x.new_zeros(1, dtype=wide(x.dtype))),
    "power_of_two_quant": lambda x: ops.power_of_two_quant(x, 4, 1),
    "binary_quant": lambda x: ops.binary_quant(x, 1),
    "ternary_quant": lambda x: ops.ternary_quant(x, 1),
    "binary_code_quant": lambda x: ops.binary_code_quant(x, 3, axis=1),
    "codebook_quant": lambda x: ops.codebook_quant(x, x.new_ones(2, dtype=wide(x.dtype))),
    "codebook_indices": lambda x: ops.codebook_indices(x, x.new_ones(2, dtype=wide(x.dtype))),
    "codebook_update": lambda x: ops.codebook_update(x, x.new_ones(2, dtype=wide(x.dtype))),
    "quant_range": lambda x: ops.quant_range(x, -8, 7, 1),
    "quant_range_offset": lambda x: ops.quant_range_offset(x, 0, 7, 1)[0],
    "soft_threshold": lambda x: ops.soft_threshold(x, x.new_ones(1, dtype=wide(x.dtype))),
    "channel_gate": lambda x: ops.channel_gate(x, x.new_ones(3)),
    "batch_norm_inference": lambda x: ops.batch_norm_inference(x, *(x.new_ones(3) for _ in range(4))),
    "magnitude_masks": lambda x: ops.magnitude_masks([x], 0.5)[0],
    "nm_masks": lambda x: ops.nm_masks([x], 1, 3)[0],
    "channel_masks": lambda x: ops.channel_masks([x], 0.5, 1)[0],
    "apply_mask": lambda x: ops.apply_mask(x, x.new_ones(x.shape, dtype=torch.bool)),
    "fake_quant_weights": lambda x: ops.fake_quant_weights([x], 4)[0][0],
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_empty_tensors(name: str, dtype: torch.dtype) -> None:
    x = torch.empty(0, 3, 2, 2, dtype=dtype)
    assert_same(EMPTY[name](x.to(DEVICE)), EMPTY[name](x))


def test_lists_without_tensors() -> None:
    for function in (
        lambda: ops.magnitude_masks([], 0.5),
        lambda: ops.magnitude_prune([], 0.5),
        lambda: ops.nm_masks([], 2, 4),
        lambda: ops.channel_masks([], 0.5),
        lambda: ops.block_masks([], 0.5, 2, 2),
        lambda: ops.fake_quant_weights([], 4)[0],
        *(lambda call=call: call([], [], None) for call in LISTS.values()),
        lambda: ops.truncated_svd([], [])[0],
        lambda: ops.tucker2([], [])[0],
    ):
        assert function() == []


def on_device(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return drawn(*shape, dtype=dtype).to(DEVICE).requires_grad_()


def listed(lists: int) -> tuple[list[Tensor], ...]:
    """A list of two tensors, and lists of parameters for their axis 1."""
    return ([on_device(4, 3), on_device(2, 5, 2)], *([on_device(3), on_device(5)] for _ in range(lists - 1)))


CHECKED: dict[str, Callable[[], tuple[Any, ...]]] = {
    "fake_quant": lambda: (on_device(4, 3, 2, 2), on_device(3), -8, 7, 1, 0.5),
    "fake_quant_offset": lambda: (on_device(4, 3, 2, 2), on_device(3), on_device(3), -8, 7, 1, 0.5),
    "channel_gate": lambda: (on_device(4, 3, 2, 2), on_device(3)),
    "soft_threshold": lambda: (on_device(4, 3, 2, 2), on_device(3), 1),
    "apply_mask": lambda: (on_device(4, 3), on_device(4, 3).detach() > 0),
    "binary_quant": lambda: (on_device(4, 3), 0),
    "ternary_quant": lambda: (on_device(4, 3), 0),
    "binary_code_quant": lambda: (on_device(4, 9), 2, "alternating", 0),
    "codebook_quant": lambda: (on_device(4, 3), on_device(5)),
    "batch_norm": lambda: (on_device(4, 3, 2, 2), on_device(3), on_device(3), 1e-5),
    "batch_norm_moments": lambda: (on_device(4, 3, 2, 2).detach(),),
    "magnitude_masks": lambda: ([on_device(4, 3).detach(), on_device(7).detach()], 0.5),
    "magnitude_prune": lambda: ([on_device(4, 3).detach(), on_device(7).detach()], 0.5),
    "nm_masks": lambda: ([on_device(4, 8).detach()], 2, 4, 1),
    "channel_masks": lambda: ([on_device(4, 8).detach()], 0.5, 0),
    "block_masks": lambda: ([on_device(4, 8).detach()], 0.5, 2, 2),
    "fake_quant_weights": lambda: ([on_device(4, 8), on_device(3, 2, 2, 2)], 4, 0),
    "fake_quant.list": lambda: (*listed(2), -8, 7, 1, [0.5, 0.25]),
    "fake_quant_offset.list": lambda: (*listed(3), -8, 7, 1, [0.5, 0.25]),
    "fp8_quant.list": lambda: (*listed(2), torch.float8_e4m3fn, 1, []),
    "soft_threshold.list": lambda: (*listed(2), 1),
    "power_of_two_quant.list": lambda: (*listed(1), 4, 1),
    "binary_quant.list": lambda: (*listed(1), 1),
    "ternary_quant.list": lambda: (*listed(1), 1),
    "binary_code_quant.list": lambda: (*listed(1), 2, "alternating", 1),
    "truncated_svd": lambda: ([on_device(4, 8).detach()], [2], []),
    "tucker2": lambda: ([on_device(4, 8, 3, 3).detach()], [2], [3], 1, [], []),
}


@pytest.mark.parametrize("name", CHECKED)
def test_opcheck(name: str) -> None:
    base, _, overload = name.partition(".")
    torch.library.opcheck(getattr(getattr(torch.ops.cctorch, base), overload or "default"), CHECKED[name]())


@pytest.mark.parametrize("name", ["channel_gate", "soft_threshold", "batch_norm"])
def test_gradcheck(name: str) -> None:
    function = getattr(torch.ops.cctorch, name)
    assert torch.autograd.gradcheck(function, CHECKED[name](), nondet_tol=0.0)


def quantized(x: Tensor, gate: Tensor, log_scale: Tensor) -> Tensor:
    mask = ops.magnitude_masks([x.detach()], 0.5)[0]
    return ops.fake_quant(ops.channel_gate(ops.apply_mask(x, mask), gate), log_scale, -8, 7, 1)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(backend: str) -> None:
    if backend == "inductor" and DEVICE.type == "cuda":
        pytest.importorskip("triton")
    torch._dynamo.reset()
    compiled = torch.compile(quantized, fullgraph=True, backend=backend)
    found = []
    for function in (compiled, quantized):
        leaves = [t.to(DEVICE).requires_grad_() for t in (drawn(4, 3, 2, 2), drawn(3, seed=1), drawn(3, seed=2))]
        y = function(*leaves)
        found.append([y, *torch.autograd.grad(y.sum(), leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    """Low rank is cast as torch's linear layers and convolutions are; the other operators take what they get."""
    x, first, second = (drawn(*s).to(DEVICE) for s in ((6, 16), (4, 16), (8, 4)))
    image, inner, outer = (drawn(*s).to(DEVICE) for s in ((2, 8, 9, 9), (4, 8, 3, 3), (16, 4, 1, 1)))
    with torch.autocast(DEVICE.type, dtype):
        linear = ops.low_rank_linear(x, first, second)
        convolved = ops.low_rank_conv2d(image, inner, outer, None, 1, 1)
        gated = ops.channel_gate(convolved, torch.ones(16, device=DEVICE, dtype=dtype))
        quantized = ops.fake_quant(convolved, torch.zeros(1, device=DEVICE), -8, 7)
    assert {linear.dtype, convolved.dtype, gated.dtype, quantized.dtype} == {dtype}
    torch.testing.assert_close(linear.float(), x @ (second @ first).T, rtol=0.05, atol=0.2)


@pytest.mark.parametrize("dtype", TYPES)
def test_low_rank_convolutions(dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 40 * eps(dtype))
    x, bias = drawn(3, 8, 9, 7, dtype=dtype), drawn(6, seed=4, dtype=dtype)
    kernels = {
        "channel": [(4, 8, 3, 3), (6, 4, 1, 1)],
        "spatial": [(4, 8, 1, 3), (6, 4, 3, 1)],
    }
    if dtype in (torch.float16, torch.bfloat16):
        x, bias = x / 4, bias / 4
    for shapes in kernels.values():
        first, second = (drawn(*s, seed=i, dtype=dtype) / 4 for i, s in enumerate(shapes, 1))
        compare(lambda *t: ops.low_rank_conv2d(*t, 2, 1), x, first, second, bias, rtol=tolerance, atol=tolerance * 10)
    tucker = [drawn(*s, seed=i, dtype=dtype) / 4 for i, s in enumerate([(4, 8, 1, 1), (5, 4, 3, 3), (6, 5, 1, 1)], 1)]
    compare(lambda *t: ops.tucker2_conv2d(*t, 1, 1), x, *tucker, bias, rtol=tolerance, atol=tolerance * 10)


def test_vmap() -> None:
    x, gate = drawn(5, 2, 3, 4, 4).to(DEVICE), drawn(5, 3, seed=1).to(DEVICE)
    ours = torch.vmap(ops.channel_gate)(x, gate)
    torch.testing.assert_close(ours, torch.stack([ops.channel_gate(a, b) for a, b in zip(x, gate, strict=True)]))
    scale = drawn(5, 1, seed=2).to(DEVICE)
    ours = torch.vmap(lambda x, s: ops.fake_quant(x, s, -8, 7))(x, scale)
    wanted = torch.stack([ops.fake_quant(a, b, -8, 7) for a, b in zip(x, scale, strict=True)])
    torch.testing.assert_close(ours, wanted)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="of two devices")
def test_tensors_of_two_devices_are_refused() -> None:
    x, scale = torch.randn(2, 3, 4, 4, device=DEVICE), torch.zeros(1)
    for call in (
        lambda: ops.fake_quant(x, scale, -8, 7),
        lambda: ops.channel_gate(x, torch.ones(3)),
        lambda: ops.codebook_quant(x, torch.ones(2)),
        lambda: ops.magnitude_masks([x, torch.ones(3)], 0.5),
        lambda: ops.truncated_svd([torch.ones(3, 3, device=DEVICE), torch.ones(3, 3)], [1, 1]),
    ):
        with pytest.raises(RuntimeError, match=r"device|cuda|cpu"):
            call()


def test_large_tensors_by_64_bit_indices_of_their_strides() -> None:
    """A view whose elements lie far apart, without that much memory: expanded and cut."""
    x = drawn(1, 4, 1, 1).to(DEVICE).expand(70_000, 4, 3, 3)
    gate = drawn(4, seed=1).to(DEVICE)
    torch.testing.assert_close(ops.channel_gate(x, gate), x * gate.view(-1, 1, 1))
    assert_same(
        ops.fake_quant(x, torch.zeros(1, device=DEVICE), -8, 7)[:3], ops.fake_quant(x[:3].cpu(), torch.zeros(1), -8, 7)
    )
