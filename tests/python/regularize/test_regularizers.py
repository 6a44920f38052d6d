"""What holds for every Q, and each one's formula and size."""

import math
from collections.abc import Callable

import pytest
import torch
from cctorch import regularize as r
from torch import Tensor, nn

EXACT: dict[str, Callable[[], r.Regularizer]] = {
    "magnitude": lambda: r.MagnitudePruning(0.7),
    "magnitude per layer": lambda: r.MagnitudePruning(0.7, "layer"),
    "2:4": lambda: r.NMPruning(2, 4),
    "channels": lambda: r.ChannelPruning(0.4),
    "uniform 2": lambda: r.UniformQuantization(2),
    "uniform 4": lambda: r.UniformQuantization(4),
    "uniform 4 per tensor": lambda: r.UniformQuantization(4, per_channel=False),
    "uniform 6 absmax": lambda: r.UniformQuantization(6, range="absmax"),
    "codebook 1": lambda: r.CodebookQuantization(1),
    "codebook 4": lambda: r.CodebookQuantization(4),
    "binary 1": lambda: r.BinaryCodeQuantization(1),
    "binary 2": lambda: r.BinaryCodeQuantization(2),
    "binary 3": lambda: r.BinaryCodeQuantization(3),
    "binary 3 per tensor": lambda: r.BinaryCodeQuantization(3, per_channel=False),
    "pruned and quantized": lambda: r.Compose([r.MagnitudePruning(0.5), r.UniformQuantization(4)]),
}
FACTORED: dict[str, Callable[[], r.Regularizer]] = {
    "svd rank": lambda: r.SVD(rank=3),
    "svd spatial": lambda: r.SVD(ratio=2.5, view="spatial"),
    "tiled svd": lambda: r.TiledSVD(8, 2),
    "tucker": lambda: r.Tucker2(ratio=2.0),
    "tucker ranks": lambda: r.Tucker2(ranks=(4, 3)),
}
ALL = EXACT | FACTORED
SHAPES = {"conv1": (16, 8, 3, 3), "conv2": (16, 8, 3, 3), "conv1d": (12, 16, 3), "linear": (10, 36), "lstm": (32, 12)}


def weights(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(name, torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()]


def applied(q: r.Regularizer, value: Tensor) -> Tensor:
    value = value.clone()
    q.apply([("w", value)])
    return value


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_idempotent_to_the_bit(name: str, dtype: torch.dtype) -> None:
    parameters = weights(dtype)
    q = EXACT[name]()
    first = q.apply(parameters)
    assert float(first.update_norm) > 0
    once = [value.clone() for _, value in parameters]
    second = q.apply(parameters)
    assert all(torch.equal(a, b) for a, (_, b) in zip(once, parameters, strict=True))
    assert float(second.update_norm) == 0
    assert second.bits == first.bits


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_binary_codes_with_few_levels_stay(bits: int) -> None:
    """Rows that use fewer levels than they might, which no fit could tell from another code."""
    code = torch.tensor([[0.5, 0.25, 0.125]])[:, :bits]
    signs = torch.tensor([[1, 1, 1], [-1, -1, -1], [1, -1, -1], [1, 1, -1], [-1, 1, 1]])[:, :bits].float()
    weight = (code * signs).sum(1).repeat(3).view(1, -1)
    assert torch.equal(applied(r.BinaryCodeQuantization(bits), weight), weight)


@pytest.mark.parametrize("name", FACTORED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_idempotent_to_rounding(name: str, dtype: torch.dtype) -> None:
    parameters = weights(dtype)
    q = FACTORED[name]()
    first = q.apply(parameters)
    second = q.apply(parameters)
    assert float(first.update_norm) > 0.1 * float(first.weight_norm)
    # float32: one rounding of the float64 result, and nothing else. float64: that of the Gram matrix.
    rounding = torch.finfo(torch.float32).eps if dtype == torch.float32 else 1e-12
    assert float(second.update_norm) < rounding * float(second.weight_norm)
    assert second.bits == first.bits < first.dense_bits


@pytest.mark.parametrize("name", ALL)
def test_layouts_do_not_matter(name: str) -> None:
    reference = weights()
    strided = [
        (key, value.clone(memory_format=torch.channels_last) if value.dim() == 4 else value.mT.contiguous().mT)
        for key, value in weights()
    ]
    strides = [value.stride() for _, value in strided]
    ALL[name]().apply(reference)
    ALL[name]().apply(strided)
    for (_, ours), (_, theirs), stride in zip(strided, reference, strides, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        assert ours.stride() == stride


@pytest.mark.parametrize("name", ALL)
def test_norms_sizes_and_what_is_left_alone(name: str) -> None:
    parameters = [*weights(), ("bias", torch.randn(7)), ("scale", torch.randn(())), ("empty", torch.empty(0, 4))]
    before = {key: value.clone() for key, value in parameters}
    outcome = ALL[name]().apply(parameters)
    after = dict(parameters)
    acted = list(SHAPES)
    assert torch.equal(after["bias"], before["bias"])
    assert torch.equal(after["scale"], before["scale"])
    update = math.sqrt(sum(float((after[key].double() - before[key].double()).square().sum()) for key in acted))
    norm = math.sqrt(sum(float(before[key].double().square().sum()) for key in acted))
    assert outcome.update_norm.dtype == torch.float64
    assert float(outcome.update_norm) == pytest.approx(update, rel=1e-6)
    assert float(outcome.weight_norm) == pytest.approx(norm, rel=1e-12)
    assert outcome.dense_bits == 32 * sum(before[key].numel() for key in acted)


@pytest.mark.parametrize("name", ALL)
def test_zeros_stay_zeros(name: str) -> None:
    assert not applied(ALL[name](), torch.zeros(8, 16)).any()


def test_project_changes_nothing() -> None:
    parameters = weights()
    before = [value.clone() for _, value in parameters]
    projection = r.MagnitudePruning(0.5).project(parameters)
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, parameters, strict=True))
    r.MagnitudePruning(0.5).apply(parameters)
    assert all(torch.equal(a, b) for a, (_, b) in zip(projection.values, parameters, strict=True))


def test_weight_decay_and_noise() -> None:
    weight = torch.randn(50, 40)
    bias = torch.randn(30)
    decayed = bias.clone()
    r.WeightDecay(0.1).apply([("bias", decayed)])
    torch.testing.assert_close(decayed, bias * 0.9)
    noise = (applied(r.UniformNoise(0.2, seed=3), weight) - weight) / (0.2 * weight.square().mean().sqrt())
    assert noise.abs().max() <= 1 + 1e-5
    # The mean of 2000 uniform numbers in [-1, 1) has a standard deviation of 0.013, their square's mean of 0.0067.
    assert abs(float(noise.mean())) < 0.06
    assert float(noise.square().mean()) == pytest.approx(1 / 3, abs=0.03)
    assert torch.equal(applied(r.UniformNoise(0.2, seed=3), weight), applied(r.UniformNoise(0.2, seed=3), weight))
    assert not torch.equal(applied(r.UniformNoise(0.2, seed=3), weight), applied(r.UniformNoise(0.2, seed=4), weight))


def stored(q: r.Regularizer, *shape: int) -> tuple[int, Tensor]:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return q.apply([("w", value)]).bits, value


def test_sizes_of_pruned_weights() -> None:
    for q in (r.MagnitudePruning(0.7), r.MagnitudePruning(0.7, "layer")):
        bits, value = stored(q, 10, 12)
        assert bits == 32 * int(value.count_nonzero()) + value.numel()
    bits, value = stored(r.NMPruning(2, 4), 10, 12)
    assert bits == (32 + 2) * int(value.count_nonzero())
    bits, value = stored(r.NMPruning(1, 8, axis=0), 16, 3, 3, 3)
    assert bits == (32 + 3) * int(value.count_nonzero())
    bits, value = stored(r.ChannelPruning(0.4, axis=1), 10, 20, 3, 3)
    assert bits == 32 * int(value.count_nonzero()) + 20
    parameters = weights()
    outcome = r.MagnitudePruning(0.9).apply(parameters)
    total = sum(value.numel() for _, value in parameters)
    assert outcome.bits == 32 * sum(int(value.count_nonzero()) for _, value in parameters) + total


def test_sizes_of_quantized_weights() -> None:
    assert stored(r.UniformQuantization(5), 10, 12)[0] == 120 * 5 + 10 * 32
    assert stored(r.UniformQuantization(5, per_channel=False), 10, 12)[0] == 120 * 5 + 32
    assert stored(r.CodebookQuantization(3), 10, 12)[0] == 120 * 3 + 8 * 32
    assert stored(r.BinaryCodeQuantization(2), 10, 12)[0] == 120 * 2 + 10 * 2 * 32
    value = torch.randn(10, 12, dtype=torch.float16)
    assert r.UniformQuantization(4).apply([("w", value)]).bits == 120 * 4 + 10 * 16


def test_sizes_of_factored_weights() -> None:
    assert stored(r.SVD(rank=4), 16, 8, 3, 3)[0] == 32 * 4 * (16 + 72)
    assert stored(r.SVD(rank=4, view="spatial"), 16, 8, 3, 5)[0] == 32 * 4 * (48 + 40)
    bits, value = stored(r.SVD(ratio=3.0), 40, 50)
    rank = int(torch.linalg.matrix_rank(value, rtol=1e-5))
    assert bits == 32 * rank * 90
    assert rank * 90 <= 2000 / 3 < (rank + 1) * 90
    assert stored(r.SVD(rank=30), 40, 50)[0] == 32 * 2000
    # 17 x 20 in tiles of 8: heights 8, 8, 1 and widths 8, 8, 4; the 1-row tiles and 8 x 4 (24 < 32) ones differ.
    tiles = sum(min(2 * (h + w), h * w) for h in (8, 8, 1) for w in (8, 8, 4))
    assert stored(r.TiledSVD(8, 2), 17, 20)[0] == 32 * tiles
    assert stored(r.Tucker2(ranks=(5, 3)), 16, 8, 3, 3)[0] == 32 * (16 * 5 + 8 * 3 + 5 * 3 * 9)
    assert stored(r.Tucker2(ranks=(5, 3)), 16, 8, 1, 1)[0] == 32 * 3 * (16 + 8)
    assert stored(r.Tucker2(ratio=4.0), 32, 16, 3, 3)[0] <= 32 * 32 * 16 * 9 / 4
    assert stored(r.Tucker2(ranks=(16, 8)), 16, 8, 3, 3)[0] == 32 * 16 * 72


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_norms_of_every_type_and_layout_in_float64(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(*shape, generator=generator).to(dtype) for shape in [(300, 70, 3, 3), (5, 7), (1, 1)]]
    weights[0] = weights[0].to(memory_format=torch.channels_last)
    weights[1] = weights[1].t()
    weights.append(torch.randn(40, 60, generator=generator).to(dtype)[::2, 3:])
    before = [weight.double().clone() for weight in weights]
    outcome = r.MagnitudePruning(0.5).apply([(str(i), weight) for i, weight in enumerate(weights)])
    changes = [weight.double() - old for weight, old in zip(weights, before, strict=True)]
    for norm, tensors in [(outcome.update_norm, changes), (outcome.weight_norm, before)]:
        expected = torch.cat([tensor.flatten() for tensor in tensors]).norm()
        assert float(norm) == pytest.approx(float(expected), rel=1e-12)


def test_sizes_of_compositions() -> None:
    prune, quantize = r.MagnitudePruning(0.75), r.UniformQuantization(4)
    for parts in ([prune, quantize], [quantize, prune]):
        bits, value = stored(r.Compose(parts), 10, 12)
        assert int(value.count_nonzero()) <= 30
        assert bits == 30 * 4 + 120 + 10 * 32
    assert stored(r.Compose([r.SVD(rank=2), quantize]), 10, 12)[0] == 120 * 4 + 10 * 32
    assert stored(r.Compose([prune, r.CodebookQuantization(2)]), 10, 12)[0] == 120 * 2 + 4 * 32
    assert stored(r.Compose([prune, r.SVD(rank=2)]), 10, 12)[0] == 32 * 2 * 22
    assert stored(r.Compose([prune, r.WeightDecay(0.1)]), 10, 12)[0] == 32 * 30 + 120


@pytest.mark.parametrize(
    ("parts", "mask_bits"),
    [
        ([r.MagnitudePruning(0.5), r.MagnitudePruning(0.75)], 16 * 24),
        ([r.MagnitudePruning(0.5), r.NMPruning(2, 4)], 16 * 24),
        ([r.NMPruning(2, 4), r.ChannelPruning(0.5)], 16 * 24),
        ([r.ChannelPruning(0.25), r.NMPruning(1, 8)], 16 + 16 * 24 // 8 * 3),
        ([r.ChannelPruning(0.5, axis=1), r.ChannelPruning(0.5)], 24 + 16),
    ],
)
def test_of_several_prunings_what_all_leave_is_counted(parts: list[r.Regularizer], mask_bits: int) -> None:
    weight = torch.randn(24, 16).t()[:, ::1]
    wide = torch.randn(16, 48)[:, ::2]
    for start in (weight, wide):
        value = start.clone(memory_format=torch.preserve_format)
        outcome = r.Compose(parts).apply([("weight", value)])
        assert outcome.bits == 32 * int(value.count_nonzero()) + mask_bits
        quantized = r.Compose([*parts, r.UniformQuantization(8, per_channel=False)])
        assert quantized.project([("weight", start)]).bits == 8 * int(value.count_nonzero()) + mask_bits + 32


def test_composition_acts_in_order_on_what_each_part_acts_on() -> None:
    weight, bias = torch.randn(6, 8), torch.randn(6)
    expected = applied(r.MagnitudePruning(0.5), weight * 0.5)
    parameters = [("weight", weight.clone()), ("bias", bias.clone())]
    r.Compose([r.WeightDecay(0.5), r.MagnitudePruning(0.5)]).apply(parameters)
    assert torch.equal(parameters[0][1], expected)
    assert torch.equal(parameters[1][1], bias * 0.5)


def test_global_pruning_sees_all_weights_and_tied_ones_once() -> None:
    small, large = torch.full((4, 4), 0.1), torch.rand(4, 4) + 1
    outcome = r.MagnitudePruning(0.5).apply([("small", small), ("tied", small), ("large", large)])
    assert not small.any()
    assert large.all()
    assert outcome.dense_bits == 32 * 32


@pytest.mark.parametrize("name", ALL)
def test_lstm_and_gradients(name: str) -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(16, 8)
    ALL[name]().apply(list(lstm.named_parameters()))
    lstm(torch.randn(3, 2, 16))[0].sum().backward()
    assert lstm.weight_ih_l0.is_leaf
    assert lstm.weight_ih_l0.grad is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: r.WeightDecay(1.5), "strength = 1.5"),
        (lambda: r.UniformNoise(math.nan), "strength = nan"),
        (lambda: r.MagnitudePruning(-0.1), "sparsity = -0.1"),
        (lambda: r.MagnitudePruning(0.1, "all"), "scope = 'all'"),
        (lambda: r.NMPruning(5, 4), "n = 5 and m = 4"),
        (lambda: r.UniformQuantization(1), "bits = 1"),
        (lambda: r.CodebookQuantization(9), "bits = 9"),
        (lambda: r.BinaryCodeQuantization(4), "bits = 4"),
        (lambda: r.SVD(), "neither"),
        (lambda: r.SVD(rank=1, ratio=2.0), "both"),
        (lambda: r.SVD(ratio=1.0), "ratio = 1"),
        (lambda: r.TiledSVD(8, 4), "rank = 4 for tile = 8"),
        (lambda: r.Tucker2(ranks=(0, 1)), "ranks = 0, 1"),
        (lambda: r.Compose([]), "at least one regularizer"),
    ],
)
def test_arguments_are_refused_by_name_and_value(make: Callable[[], r.Regularizer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("q", "bad", "message"),
    [
        (r.NMPruning(2, 4), torch.randn(4, 3), r"parameter 'bad' has shape \[4, 3\]"),
        (r.ChannelPruning(0.5, axis=2), torch.randn(4, 4), "parameter 'bad'"),
        (r.MagnitudePruning(0.5), torch.randn(4, 4).double(), "parameter 'bad' is Double"),
        (r.SVD(rank=1), torch.ones(4, 4, dtype=torch.int64), "parameter 'bad' is Long"),
        (r.SVD(rank=1), torch.full((4, 4), math.inf), "parameter 'bad' has 16 of 16"),
    ],
)
def test_parameters_are_refused_by_name_and_none_is_changed(q: r.Regularizer, bad: Tensor, message: str) -> None:
    good = torch.randn(4, 4, 4)
    before = good.clone()
    with pytest.raises(ValueError, match=message):
        q.apply([("good", good), ("bad", bad)])
    assert torch.equal(good, before)
