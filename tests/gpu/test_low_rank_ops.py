"""Truncated SVD and Tucker-2 on the device: the products of their factors against the CPU's and against torch's SVD."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cctorch import _C, ops
from cctorch.nn import LowRankConv2d, LowRankLinear, LowRankLSTM, LowRankWeight
from placed import DEVICE, assert_same, needs_device
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

pytestmark = needs_device
needs_cudnn = pytest.mark.skipif(DEVICE.type == "cpu", reason="cuDNN is of CUDA")

TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SIZES = [(8, 20, 3), (20, 8, 3), (64, 64, 10), (96, 130, 96), (1, 7, 1), (7, 1, 1), (130, 96, 5)]


def decaying(rows: int, columns: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """With singular values that are well apart, so that the nearest matrix of a rank is one."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, n, generator=generator, dtype=torch.float64) for n in (rows, columns))
    count = min(rows, columns)
    values = torch.exp(-0.1 * torch.arange(count))
    left, right = torch.linalg.qr(left).Q[:, :count], torch.linalg.qr(right).Q[:, :count]
    return ((left * values) @ right.T).to(dtype)


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


def tolerance(dtype: torch.dtype) -> float:
    """Of the product of two factors that are rounded to the type."""
    return 1e-10 if dtype == torch.float64 else 32 * torch.finfo(dtype).eps


def assert_nearest(left: Tensor, right: Tensor, matrix: Tensor, rank: int) -> None:
    """As near as a matrix of the rank gets: within 0.1 % of the error, and what rounding the factors adds."""
    product = left.double() @ right.double()
    assert product.device.type == DEVICE.type
    exact, best = matrix.double().cpu(), truncated(matrix.cpu(), rank)
    rounding = tolerance(matrix.dtype) * float(exact.norm())
    assert float((product.cpu() - exact).norm()) <= 1.001 * float((best - exact).norm()) + rounding
    if matrix.dtype == torch.float64:
        assert_same(product, best, atol=rounding)


@pytest.mark.parametrize("dtype", TYPES)
def test_truncated_svd(dtype: torch.dtype) -> None:
    matrices = [decaying(rows, columns, dtype, i) for i, (rows, columns, _) in enumerate(SIZES)]
    matrices += [decaying(12, 30, dtype, seed) for seed in range(5)]  # of one size: one batch
    matrices.append(torch.stack([decaying(6, 9, dtype, seed) for seed in range(4)]))
    ranks = [rank for *_, rank in SIZES] + [4] * 5 + [2]
    lefts, rights = ops.truncated_svd([m.to(DEVICE) for m in matrices], ranks)
    for matrix, rank, left, right in zip(matrices, ranks, lefts, rights, strict=True):
        assert left.is_contiguous()
        assert right.is_contiguous()
        assert left.dtype == right.dtype == dtype
        assert_nearest(left, right, matrix, rank)


def test_layouts_and_zeros() -> None:
    matrix = decaying(10, 14)
    for m in (matrix.T.contiguous().T, torch.stack([matrix, matrix], -1)[..., 0], torch.zeros(5, 9).double()):
        (left,), (right,) = ops.truncated_svd([m.to(DEVICE)], [3])
        assert_same(left @ right, truncated(m, 3), atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_earlier_bases_lead_to_the_same(dtype: torch.dtype) -> None:
    matrices = [decaying(*size[:2], dtype, i).to(DEVICE) for i, size in enumerate(SIZES)]
    ranks = [rank for *_, rank in SIZES]
    lefts, rights = ops.truncated_svd(matrices, ranks)
    bases = [
        left if m.shape[0] <= m.shape[1] else right for m, left, right in zip(matrices, lefts, rights, strict=True)
    ]
    moved = [m + 1e-3 * decaying(*m.shape, dtype, 9).to(DEVICE) for m in matrices]
    for start in (bases, [], [b if i % 2 else b.new_empty(0) for i, b in enumerate(bases)]):
        again = ops.truncated_svd(moved, ranks, start)
        for m, rank, left, right in zip(moved, ranks, *again, strict=True):
            assert_nearest(left, right, m, rank)


def rebuilt(core: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    return torch.einsum("no,oi...,ci->nc...", outer.double(), core.double(), inner.double())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("iterations", [0, 2])
def test_tucker2(dtype: torch.dtype, iterations: int) -> None:
    shapes = [(16, 8, 3, 3), (10, 12, 3), (6, 9), (70, 66, 3, 3), (5, 4, 1, 1)]
    ranks = [(5, 3), (4, 6), (3, 3), (20, 18), (5, 4)]
    weights = [torch.randn(s, generator=torch.Generator().manual_seed(i)).to(dtype) for i, s in enumerate(shapes)]
    weights[0] = weights[0].contiguous(memory_format=torch.channels_last)
    ours, theirs = (ops.tucker2([w.to(d) for w in weights], ranks, iterations) for d in (DEVICE, "cpu"))
    for weight, core, outer, inner, *cpu in zip(weights, *ours, *theirs, strict=True):
        assert core.dtype == dtype
        mine, wanted = rebuilt(core, outer, inner), rebuilt(*cpu)
        # Random weights have singular values close to each other: the error is what has to agree.
        errors = [float((r.cpu() - weight.double()).norm()) for r in (mine, wanted)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-3, abs=tolerance(dtype) * float(weight.double().norm()))
    (core,), (outer,), (inner,) = ops.tucker2([weights[-1].to(DEVICE)], [(5, 4)], iterations)
    assert_same(rebuilt(core, outer, inner), weights[-1].double(), atol=4 * tolerance(dtype))


def test_tucker2_from_bases() -> None:
    weight = torch.randn(70, 66, 3, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    _, outers, inners = ops.tucker2([weight], [(20, 18)])
    moved = weight + 1e-3 * torch.randn_like(weight)
    fresh, started = ops.tucker2([moved], [(20, 18)]), ops.tucker2([moved], [(20, 18)], 2, [(outers[0], inners[0])])
    errors = [float((rebuilt(*(part[0] for part in parts)) - moved.double()).norm()) for parts in (fresh, started)]
    # Iterations from other bases end near another optimum.
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


@pytest.mark.parametrize("shape", [(12, 7, 3, 3), (9, 30), (30, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factorize(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept = [0, 2, 3, 6]
    products = []
    for device in (DEVICE, torch.device("cpu")):
        first, second = _C.factorize(weight.to(device), kept, 3)
        assert first.device.type == second.device.type == device.type
        products.append(second.flatten(1) @ first.flatten(1))
    assert_same(*products, atol=tolerance(dtype) * float(weight.norm()))


@pytest.mark.parametrize("layout", ["channel", "spatial", "tucker"])
def test_layers_from_dense_ones(layout: str) -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(8, 12, 3, padding=1).double()
    rank = (6, 5) if layout == "tucker" else 6
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    expected = LowRankConv2d.from_dense(dense, rank, layout)(x)  # type: ignore[arg-type]
    ours = LowRankConv2d.from_dense(dense.to(DEVICE), rank, layout)(x.to(DEVICE))  # type: ignore[arg-type]
    assert_same(ours, expected, atol=1e-9)
    linear, y = nn.Linear(8, 12).double(), torch.randn(3, 8, dtype=torch.float64)
    expected = LowRankLinear.from_dense(linear, 4)(y)
    assert_same(LowRankLinear.from_dense(linear.to(DEVICE), 4)(y.to(DEVICE)), expected, atol=1e-9)


@pytest.mark.parametrize("packed", [False, True])
def test_an_lstm_from_a_dense_one(packed: bool) -> None:
    torch.manual_seed(0)
    dense = nn.LSTM(8, 12, 2, bidirectional=True).double()
    ranks = {"weight_ih_l0": 4, "weight_hh_l0": 3, "weight_hh_l1_reverse": 5}
    x = torch.randn(6, 3, 8, dtype=torch.float64)
    outputs, gradients = [], []
    for device in (torch.device("cpu"), DEVICE):
        lstm = LowRankLSTM.from_dense(dense.to(device), ranks)
        given = nn.utils.rnn.pack_padded_sequence(x.to(device), torch.tensor([6, 4, 1])) if packed else x.to(device)
        y, (h, c) = lstm(given)
        outputs.append((y.data if packed else y, h, c))
        (outputs[-1][0].square().sum() + c.sum()).backward()
        # Factors are any of many: what is the same for all is the gradient of what they are products with.
        gradients.append([lstm.weight_ih_l1.grad, lstm.bias_hh_l0.grad])
    for ours, expected in zip((*outputs[1], *gradients[1]), (*outputs[0], *gradients[0]), strict=True):
        assert_same(ours, expected, atol=1e-9)


def layer_of_an_lstm(case: str, dtype: torch.dtype) -> tuple[dict[str, list[Tensor]], Tensor | None]:
    """The arguments of low_rank_lstm with 5 inputs, 6 states and 4 examples, as leaves of the device."""
    generator = torch.Generator().manual_seed(0)

    def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
        values = [torch.randn(shape, generator=generator, dtype=torch.float64) / 2 for shape in shapes]
        return [value.to(DEVICE, dtype).requires_grad_() for value in values]

    packed, outputs = "packed" in case, 3 if "projected" in case else 6
    arguments = {
        "x": leaves((9, 5) if packed else (3, 4, 5)),
        "h": leaves((4, outputs)),
        "c": leaves((4, 6)),
        "weight_ih": leaves((2, 5), (24, 2)) if "whole" not in case else leaves((24, 5)),
        "weight_hh": leaves((2, outputs), (24, 2)) if "whole hh" not in case else leaves((24, outputs)),
        "weight_hr": leaves((2, 6), (3, 2)) if "projected" in case else [],
        "bias_ih": [] if "no bias" in case else leaves((24,)),
        "bias_hh": [] if "bias" in case else leaves((24,)),
    }
    return arguments, torch.tensor([4, 3, 2]) if packed else None


LISTS = ("weight_ih", "weight_hh", "weight_hr")


def run_layer(arguments: dict[str, list[Tensor]], sizes: Tensor | None, reverse: bool) -> tuple[Tensor, ...]:
    given = {name: values if name in LISTS else values[0] for name, values in arguments.items() if values}
    return ops.low_rank_lstm(**given, batch_sizes=sizes, reverse=reverse)  # type: ignore[arg-type]


def of_cudnn(run: Callable[[], object]) -> bool:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return any(event.key == "aten::_cudnn_rnn" for event in profiler.key_averages())


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "case", ["factors", "packed", "projected", "packed, projected", "no bias", "one bias", "whole", "whole hh, packed"]
)
def test_a_layer_of_an_lstm_by_cudnn_is_that_of_its_steps(case: str, dtype: torch.dtype, reverse: bool) -> None:
    arguments, sizes = layer_of_an_lstm(case, dtype)
    assert DEVICE.type == "cpu" or of_cudnn(lambda: run_layer(arguments, sizes, reverse))
    exact = {name: [v.detach().double().requires_grad_() for v in values] for name, values in arguments.items()}
    results = []
    # The steps in float64 are what both are compared with.
    for enabled, given in ((True, arguments), (False, arguments), (False, exact)):
        leaves = [value for values in given.values() for value in values]
        with torch.backends.cudnn.flags(enabled=enabled, allow_tf32=False):
            outputs = run_layer(given, sizes, reverse)
        weights = [torch.arange(1.0, y.numel() + 1, device=DEVICE).view(y.shape).cos().to(y.dtype) for y in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, weights)])
    for ours, steps, expected in zip(*results, strict=True):
        assert ours.dtype == dtype
        errors = [float((value.detach().double() - expected.detach()).norm()) for value in (ours, steps)]
        assert errors[0] <= 4 * errors[1] + 4 * torch.finfo(dtype).eps * float(expected.detach().norm())


def test_where_cudnn_is_not_asked() -> None:
    """What sees through the operator, or needs what cuDNN has not, gets the steps."""
    arguments, _ = layer_of_an_lstm("factors", torch.float32)
    (x,), rest = arguments["x"], {name: values for name, values in arguments.items() if name != "x"}

    def run(x: Tensor) -> Tensor:
        return run_layer({"x": [x], **rest}, None, False)[0]

    expected, tangent = run(x), torch.randn_like(x)
    mapped = torch.vmap(run)(torch.stack([x, x]))
    assert_close(mapped[1], expected, rtol=0, atol=1e-5)
    with torch.backends.cudnn.flags(enabled=False):
        _, moved = torch.func.jvp(run, (x,), (tangent,))
    assert_close(torch.func.jvp(run, (x,), (tangent,))[1], moved, rtol=0, atol=1e-5)
    with forward_ad.dual_level():
        assert_close(forward_ad.unpack_dual(run(forward_ad.make_dual(x, tangent))).tangent, moved, rtol=0, atol=1e-5)
    assert_close(
        torch.func.grad(lambda x: run(x).sum())(x), torch.autograd.grad(expected.sum(), x)[0], rtol=0, atol=1e-5
    )
    assert not of_cudnn(lambda: torch.vmap(run)(x.unsqueeze(0)))
    square = {**rest, "weight_hr": [torch.randn(6, 6, device=DEVICE)]}
    assert not of_cudnn(lambda: run_layer({"x": [x], **square}, None, False))
    large = {**rest, "h": [x.new_zeros(4, 2049)], "c": [x.new_zeros(4, 2049)], "bias_ih": [], "bias_hh": []}
    large |= {"weight_ih": [x.new_zeros(8196, 5)], "weight_hh": [x.new_zeros(1, 2049), x.new_zeros(8196, 1)]}
    assert not of_cudnn(lambda: run_layer({"x": [x], **large}, None, False))


@needs_cudnn
def test_second_derivatives_of_an_lstm_need_its_steps() -> None:
    arguments, _ = layer_of_an_lstm("factors", torch.float64)
    (x,) = arguments["x"]

    def penalty() -> Tensor:
        (grad,) = torch.autograd.grad(run_layer(arguments, None, False)[0].sum(), x, create_graph=True)
        return grad.square().sum()

    with pytest.raises(RuntimeError, match=r"cudnn\.flags"):
        penalty().backward()
    with torch.backends.cudnn.flags(enabled=False):
        penalty().backward()
    assert float(arguments["weight_hh"][0].grad.norm()) > 0  # type: ignore[union-attr]


@needs_cudnn
def test_an_lstm_under_autocast() -> None:
    arguments, _ = layer_of_an_lstm("factors", torch.float32)
    results = []
    for enabled in (True, False):
        with torch.backends.cudnn.flags(enabled=enabled), torch.autocast("cuda", torch.float16):
            y = run_layer(arguments, None, False)[0]
        results.append([y, *torch.autograd.grad(y.float().square().sum(), arguments["weight_hh"])])
    assert results[0][0].dtype == torch.float16
    for ours, expected in zip(*results, strict=True):
        assert_close(ours, expected, rtol=0.02, atol=0.02)


@needs_cudnn
@pytest.mark.parametrize("case", ["factors", "packed"])
def test_an_lstm_in_reverse_in_a_graph(case: str) -> None:
    """The order of packed rows is copied from the host, which a graph can't record: it gets the steps."""
    arguments, sizes = layer_of_an_lstm(case, torch.float32)
    with torch.no_grad():
        eager = run_layer(arguments, sizes, True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = run_layer(arguments, sizes, True)
        graph.replay()
    for ours, expected in zip(recorded, eager, strict=True):
        assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(3, 64), (5, 7), (300, 40), (1, 1), (0, 4)])
def test_the_cell_of_an_lstm(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    cell = torch.ops.cctorch.lstm_cell
    gates, c = torch.randn(shape[0], 4 * shape[1], dtype=torch.float64).to(dtype), torch.randn(shape).to(dtype)
    grads = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    results = []
    # The second is strided, and begins in the middle of a vector.
    for device, cut in ((torch.device("cpu"), None), (DEVICE, None), (DEVICE, 1)):
        leaves = [t.to(device).requires_grad_() for t in (gates, c)]
        given = leaves if cut is None else [torch.cat([t[:1, :1].expand(len(t), 1), t], 1)[:, cut:] for t in leaves]
        outputs = cell(*given)
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, [g.to(device) for g in grads])])
    arithmetic = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for ours in results[1:]:
        for found, expected in zip(ours, results[0], strict=True):
            assert_same(found, expected, rtol=torch.finfo(dtype).eps, atol=64 * arithmetic)


def test_the_cell_of_an_lstm_is_differentiated_twice() -> None:
    gates, c = (torch.randn(3, n, dtype=torch.float64, device=DEVICE, requires_grad=True) for n in (20, 5))
    cell = torch.ops.cctorch.lstm_cell
    torch.library.opcheck(cell.default, (gates, c))
    assert torch.autograd.gradcheck(cell, (gates, c))
    assert torch.autograd.gradgradcheck(cell, (gates, c))


def test_a_weight_of_low_rank_trains() -> None:
    layer = nn.Conv2d(8, 12, 3).to(DEVICE)
    parametrize.register_parametrization(layer, "weight", LowRankWeight(3))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.ones(2, 8, 5, 5, device=DEVICE)).square().mean().backward()
        optimizer.step()
    assert torch.linalg.matrix_rank(layer.weight.detach().flatten(1).double(), rtol=1e-5) == 3


@pytest.mark.parametrize("size", [2, 33, 200])
def test_not_finite_values_end_in_an_error_or_in_nan(size: int) -> None:
    """Never in finite factors."""
    matrix = decaying(size, size)
    matrix[0, 0] = float("nan")
    try:
        (left,), (right,) = ops.truncated_svd([matrix.to(DEVICE)], [1])
    except RuntimeError:
        return
    assert not (left @ right).isfinite().all()
