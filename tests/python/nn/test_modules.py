import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cctorch import ops
from cctorch.nn import (
    ChannelGate,
    FakeQuant,
    GatherChannels,
    HardConcreteGate,
    LowRankConv2d,
    LowRankLinear,
    LowRankWeight,
    Mask,
    SoftThreshold,
)
from cctorch.prepare import convert
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel


def reloaded(module: nn.Module, fresh: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    return fresh


def test_mask_keeps_the_gradient_of_pruned_weights() -> None:
    layer = nn.Linear(3, 2, bias=False)
    dense = layer.weight.detach().clone()
    mask = torch.tensor([[True, False, True], [False, False, True]])
    parametrize.register_parametrization(layer, "weight", Mask(mask))
    assert torch.equal(layer.weight, dense * mask)
    layer(torch.ones(1, 3)).sum().backward()
    assert torch.equal(layer.parametrizations.weight.original.grad, torch.ones(2, 3))


def test_channel_gate_starts_as_the_identity_and_its_gradient_is_the_taylor_importance() -> None:
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    gate = ChannelGate(3, dtype=torch.float64)
    y = gate(x)
    assert torch.equal(y, x)
    (y**2).sum().backward()
    torch.testing.assert_close(gate.gate.grad, (2 * x * x).sum((0, 2, 3)))


@pytest.mark.parametrize(("axis", "channels"), [(None, None), (0, 4), (1, 6)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_soft_threshold_starts_where_asked_and_is_learned(
    axis: int | None, channels: int | None, dtype: torch.dtype
) -> None:
    layer = nn.Linear(6, 4, bias=False, dtype=dtype)
    dense = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", SoftThreshold(axis, channels, threshold=0.2))
    step = layer.parametrizations.weight[0]
    torch.testing.assert_close(torch.sigmoid(step.s), torch.full((channels or 1,), 0.2))
    expected = F.softshrink(dense.double(), 0.2)
    eps = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
    torch.testing.assert_close(layer.weight.double(), expected, rtol=eps, atol=torch.finfo(torch.float32).eps)
    layer.weight.sum().backward()
    count = expected.sign().sum().view(1) if axis is None else expected.sign().sum(1 - axis)
    torch.testing.assert_close(step.s.grad, (-count * 0.2 * 0.8).float(), rtol=1e-5, atol=1e-6)
    pruned = layer.weight.detach().clone()
    convert(layer)
    assert torch.equal(layer.weight, pruned)
    assert not parametrize.is_parametrized(layer)


def test_hard_concrete_gate_draws_in_training_only() -> None:
    gate = HardConcreteGate(2000, open=0.7, dtype=torch.float64)
    torch.testing.assert_close(gate.expected_l0(), torch.tensor(1400.0, dtype=torch.float64))
    x = torch.ones(3, 2000, dtype=torch.float64)
    torch.manual_seed(0)
    y = gate(x)
    assert torch.equal(y[0], y[2])
    assert not torch.equal(gate(x), y)
    # Five standard deviations of 2000 draws
    assert abs(int((y[0] > 0).sum()) - 1400) < 5 * math.sqrt(2000 * 0.7 * 0.3)
    (y.sum() + gate.expected_l0()).backward()
    assert gate.log_alpha.grad.gt(0).all()
    gate.eval()
    assert torch.equal(gate(x), gate(x))
    assert torch.equal(reloaded(gate, HardConcreteGate(2000, dtype=torch.float64)).eval()(x), gate(x))


@pytest.mark.parametrize(("bits", "signed"), [(2, True), (4, True), (8, True), (8, False), (16, True)])
@pytest.mark.parametrize("axis", [None, 0, -1])
def test_scale_starts_after_lsq(bits: int, signed: bool, axis: int | None) -> None:
    x = torch.randn(3, 4, 3, dtype=torch.float64)
    quant = FakeQuant(bits, signed, axis, None if axis is None else 3, dtype=torch.float64)
    quant.initialize(x)
    qmax = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    groups = [x] if axis is None else x.unbind(axis)
    expected = torch.tensor([2 * group.abs().mean() / math.sqrt(qmax) for group in groups], dtype=torch.float64)
    torch.testing.assert_close(quant.log_scale.detach().exp(), expected)


def test_first_call_initializes_and_a_checkpoint_remembers() -> None:
    x = torch.randn(5, 7)
    quant = FakeQuant(4)
    y = quant(x)
    scale = quant.log_scale.detach().exp()
    torch.testing.assert_close(y, scale * (x / scale).round().clamp(-8, 7))
    other = reloaded(quant, FakeQuant(4))
    assert torch.equal(other(x * 100), quant(x * 100))


@pytest.mark.parametrize("arguments", [{}, {"offset": True, "init": "minmax"}, {"axis": 1, "channels": 7}], ids=str)
def test_an_averaged_copy_keeps_the_scales_that_it_averaged(arguments: dict[str, Any]) -> None:
    quant = FakeQuant(4, **arguments)
    average = AveragedModel(quant)
    started = []
    for _ in range(2):
        quant(torch.randn(5, 7))
        with torch.no_grad():
            quant.log_scale += 0.5
        average.update_parameters(quant)
        started.append(quant.log_scale.detach().clone())
    average(100 * torch.randn(5, 7))
    torch.testing.assert_close(average.module.log_scale.detach(), (started[0] + started[1]) / 2)


def test_a_scale_that_has_not_started_is_not_exported() -> None:
    quant, x = FakeQuant(4).eval(), torch.randn(5, 7)
    for strict in (False, True):
        with pytest.raises(Exception, match="run the model on a batch of data first"):
            torch.export.export(quant, (x,), strict=strict)
    quant(x)
    assert torch.equal(torch.export.export(quant, (x,)).module()(3 * x), quant(3 * x))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("arguments", [{}, {"init": "mse"}, {"axis": 1, "channels": 7, "init": "minmax"}], ids=str)
def test_a_first_batch_that_overflows_leaves_a_scale_to_go_on_from(arguments: dict[str, Any], bad: float) -> None:
    x = torch.randn(5, 7, dtype=torch.float64)
    quant, expected = (FakeQuant(4, dtype=torch.float64, **arguments) for _ in range(2))
    quant(torch.cat([x, torch.full((1, 7), bad, dtype=torch.float64)]))
    expected(x)
    torch.testing.assert_close(quant.log_scale, expected.log_scale)


def test_a_vector_has_a_scale_for_each_value() -> None:
    x = torch.tensor([3.0, -0.5, 0.0, 20.0])
    quant = FakeQuant(4, axis=0, channels=4)
    # Of a value alone, 2 |x| / sqrt(7) is the scale, and the value 1.32 of it, which is rounded to one.
    torch.testing.assert_close(quant(x), x.sign() * 2 * x.abs() / math.sqrt(7))


def test_an_empty_input_starts_no_scale() -> None:
    x = torch.randn(5, 7)
    quant, expected = FakeQuant(4), FakeQuant(4)
    assert quant(torch.empty(0, 7)).shape == (0, 7)
    assert torch.equal(quant(x), expected(x))


def test_scale_gradient_is_scaled_by_the_values_that_share_it() -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    quant = FakeQuant(3, axis=0, channels=4, dtype=torch.float64)
    quant(x).sum().backward()
    trained = quant.log_scale.grad.clone()
    quant.log_scale.grad = None
    quant.eval()(x).sum().backward()
    torch.testing.assert_close(trained, quant.log_scale.grad / math.sqrt(6 * 3))


def test_zeros_and_masked_values_give_finite_scales() -> None:
    quant = FakeQuant(4, axis=0, channels=2)
    quant.initialize(torch.tensor([[0.0, 0.0, 0.0], [4.0, 0.0, 0.0]]), torch.tensor([[True] * 3, [True, False, False]]))
    torch.testing.assert_close(quant.log_scale.exp(), torch.tensor([1.0, 8 / math.sqrt(7)]))
    assert torch.equal(quant(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("arguments", [{}, {"offset": True}, {"axis": 0, "channels": 4, "groups": 2}])
def test_a_module_in_half_precision_starts_and_goes_on_with_float32_scales(
    arguments: dict[str, Any], dtype: torch.dtype
) -> None:
    # 200,000 magnitudes of 2 add up to more than float16 holds.
    x = (4 * torch.rand(4, 50000, generator=torch.Generator().manual_seed(0))).to(dtype)
    quant = FakeQuant(4, **arguments).to(dtype)
    reference = FakeQuant(4, **arguments)
    y = quant(x)
    reference(x.float())
    assert torch.equal(quant.log_scale, reference.log_scale)
    assert y.dtype == dtype
    assert torch.equal(y, reference(x.float()).to(dtype))
    y.sum().backward()
    assert quant.log_scale.grad.isfinite().all()
    parameter = quant.log_scale
    assert torch.equal(quant.to(dtype)(x), y)
    assert quant.log_scale is parameter
    assert quant.double().log_scale.dtype == torch.float64


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_value_of_a_range_is_clipped(signed: bool, offset: bool, groups: int, dtype: torch.dtype) -> None:
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x = (x if signed or offset else x.abs()).requires_grad_()
    quant = FakeQuant(4, signed, 0, 40, dtype=dtype, offset=offset, groups=groups, init="minmax")
    quant(x).sum().backward()
    assert x.grad is not None
    assert (x.grad == 1).all()


@pytest.mark.parametrize("init", ["lsq", "minmax", "mse"])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_scales_and_offsets_start_from_the_data(init: str, offset: bool, groups: int) -> None:
    x = torch.randn(3, 4, 2, dtype=torch.float64) + (2 if offset else 0)
    quant = FakeQuant(3, axis=0, channels=3, dtype=torch.float64, offset=offset, groups=groups, init=init)
    y = quant(x)
    rows = x.view(3 * groups, -1)
    log_scale, start = 2 * rows.abs().mean(1).div(math.sqrt(3)), torch.zeros(len(rows), dtype=torch.float64)
    log_scale = log_scale.log()
    if init != "lsq" and offset:
        log_scale, start = ops.quant_range_offset(rows, -4, 3, 0, init)
    elif init != "lsq":
        log_scale = ops.quant_range(rows, -4, 3, 0, init)
    if init != "lsq":
        log_scale = log_scale + 1e-6  # the largest value is inside, not at the end
    torch.testing.assert_close(quant.log_scale.detach().flatten(), log_scale)
    assert quant.log_scale.shape == ((3,) if groups == 1 else (3, groups))
    if offset:
        torch.testing.assert_close(quant.offset.detach().flatten(), start)
    scale, start = log_scale.exp().unsqueeze(1), start.unsqueeze(1)
    expected = scale * ((rows - start) / scale).clamp(-4, 3).round() + start
    torch.testing.assert_close(y.detach(), expected.view_as(x))
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in quant.parameters())
    fresh = FakeQuant(3, axis=0, channels=3, dtype=torch.float64, offset=offset, groups=groups, init=init)
    assert torch.equal(reloaded(quant, fresh)(x * 2), quant(x * 2))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("options", [{}, {"offset": True}, {"init": "mse"}, {"groups": 2, "init": "minmax"}], ids=str)
@pytest.mark.parametrize("lr", [0.1, 10.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_training_from_scratch_keeps_scales_positive_and_finite(
    bits: int, options: dict[str, Any], lr: float, seed: int
) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    for layer in (net[0], net[2]):
        quant = FakeQuant(bits, axis=0, channels=layer.out_features, **options)
        parametrize.register_parametrization(layer, "weight", quant)
    activations = FakeQuant(bits, signed=False, offset="offset" in options, init=options.get("init", "lsq"))
    net.insert(2, activations)
    x, target = torch.randn(64, 8), torch.randint(4, (64,))
    net(x)
    quants = [module for module in net.modules() if isinstance(module, FakeQuant)]
    assert len(quants) == 3
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(net(x), target).backward()
        optimizer.step()
        for quant in quants:
            assert quant.log_scale.isfinite().all()
            # What one step above zero is quantized to: the scale that is used.
            one = ops.fake_quant(torch.full_like(quant.log_scale, math.inf).view(-1), quant.log_scale.view(-1), 0, 1, 0)
            assert one.isfinite().all()
            assert (one > 0).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FakeQuant(1), "bits = 1, expected 2 to 16"),
        (lambda: FakeQuant(4, axis=0), "axis = 0 with channels = None, expected both or neither"),
        (lambda: FakeQuant(4, groups=2), "groups = 2 with axis = None, expected 1, or more with axis 0"),
        (lambda: FakeQuant(4, axis=0, channels=2, groups=0), "groups = 0 with axis = 0"),
        (lambda: FakeQuant(4, init="best"), "init = 'best', expected 'lsq', 'minmax' or 'mse'"),
        (lambda: FakeQuant(4, axis=0, channels=2, groups=3)(torch.ones(2, 4)), "each of 3 equal groups"),
        (lambda: ChannelGate(0), "channels = 0, expected at least 1"),
        (lambda: SoftThreshold(axis=0), "axis = 0 with channels = None, expected both or neither"),
        (lambda: SoftThreshold(0, 0), "channels = 0, expected at least 1"),
        (lambda: SoftThreshold(threshold=0.0), "threshold = 0.0, expected a number between 0 and 1"),
        (lambda: HardConcreteGate(0), "channels = 0, expected at least 1"),
        (lambda: HardConcreteGate(3, open=1.0), "open = 1.0, expected a probability between 0 and 1"),
        (lambda: LowRankLinear(3, 4, 0), "rank = 0, expected at least 1"),
        (lambda: LowRankConv2d(3, 4, 2, 3, padding="half"), "padding = 'half', expected numbers, 'same' or 'valid'"),
        (lambda: LowRankConv2d(3, 4, 2, 3, 2, "same"), "needs stride 1"),
        (lambda: LowRankConv2d(3, 4, 2, 3, padding_mode="mirror"), "padding_mode = 'mirror'"),
    ],
)
def test_bad_arguments_are_named(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": "same", "dilation": (1, 3)},
        {"padding": 2, "padding_mode": "reflect"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", [3, (2, 3)])
def test_low_rank_convolution_is_the_convolution_with_the_product(
    arguments: dict[str, object], kernel: int | tuple[int, int]
) -> None:
    low = LowRankConv2d(5, 6, 2, kernel, **arguments).double()  # type: ignore[arg-type]
    full = nn.Conv2d(5, 6, kernel, **arguments).double()  # type: ignore[arg-type]
    full.weight.data = torch.einsum("or,rihw->oihw", low.second[:, :, 0, 0], low.first).detach()
    full.bias.data = low.bias.detach()
    x = torch.randn(2, 5, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(low(x), full(x))
    low(x).sum().backward()
    assert all(parameter.grad is not None for parameter in low.parameters())


def test_low_rank_layers_start_like_dense_ones() -> None:
    torch.manual_seed(0)
    low = LowRankLinear(64, 512, 64)
    dense = nn.Linear(64, 512)
    product = low.second @ low.first
    assert abs(product.std().item() / dense.weight.std().item() - 1) < 0.1
    torch.testing.assert_close(low(torch.eye(64)), (product + low.bias[:, None]).T, rtol=1e-5, atol=1e-5)


def test_gather_reads_the_chosen_channels() -> None:
    conv, x = nn.Conv2d(2, 4, 3), torch.randn(3, 5, 4, 4)
    assert torch.equal(GatherChannels([4, 1], conv)(x), conv(x[:, [4, 1]]))
    for linear in (nn.Linear(2, 4), LowRankLinear(2, 4, 1)):
        x = torch.randn(3, 6, 5)
        assert torch.equal(GatherChannels([4, 1], linear)(x), linear(x[..., [4, 1]]))


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3), nn.Linear(8, 6)], ids=["conv2d", "linear"])
def test_low_rank_weight_is_the_best_approximation_and_stays_low_rank(layer: nn.Module) -> None:
    layer = copy.deepcopy(layer).double()
    dense = layer.weight.detach().flatten(1)
    parametrize.register_parametrization(layer, "weight", LowRankWeight(3))
    u, s, v = torch.linalg.svd(dense, full_matrices=False)
    torch.testing.assert_close(layer.weight.detach().flatten(1), (u[:, :3] * s[:3]) @ v[:3])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    (layer.weight**2).sum().backward()
    optimizer.step()
    assert torch.linalg.matrix_rank(layer.weight.flatten(1)) == 3
    with pytest.raises(ValueError, match="rank = 7, expected at most 6"):
        parametrize.register_parametrization(nn.Linear(8, 6), "weight", LowRankWeight(7))


def test_quantized_weights_compile_to_one_graph() -> None:
    layer = nn.Linear(4, 3)
    quant = FakeQuant(4, axis=0, channels=3)
    quant.initialize(layer.weight)
    parametrize.register_parametrization(layer, "weight", quant)
    x = torch.randn(2, 4)
    compiled = torch.compile(lambda x: F.relu(layer(x)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), F.relu(layer(x)))
