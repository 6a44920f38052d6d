"""The plan that makes layers as small as a regularizer has left their weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import cctorch
import pytest
import torch
import torch.nn.functional as F
from cctorch import _C, CompressionPlan, models
from cctorch import regularize as r
from cctorch.graph import trace
from cctorch.nn import LowRankConv2d, LowRankLinear, LowRankLSTM
from networks import Dense, PaddedResNet, Vgg
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

LOW_RANK: dict[str, Callable[[], r.Regularizer]] = {
    "channel": lambda: r.SVD(ratio=2.0),
    "spatial": lambda: r.SVD(ratio=2.0, view="spatial"),
    "tucker": lambda: r.Tucker2(ratio=2.0),
}
NETWORKS: dict[str, Callable[[], nn.Module]] = {"padded": PaddedResNet, "vgg": Vgg, "dense": Dense}


def example(name: str) -> Tensor:
    return torch.randn(3, 3, *((8, 8) if name != "vgg" else (16, 16)), dtype=torch.float64)


def regularized(model: nn.Module, q: r.Regularizer, x: Tensor) -> CompressionPlan:
    q.apply(model.named_parameters())
    return r.plan(model, x, model.named_parameters(), q)


def separate(layer: LowRankConv2d, x: Tensor) -> Tensor:
    """Its convolutions one by one, in PyTorch's own; padding of zeros."""
    (down, across), (high, wide) = layer.stride, layer.dilation
    assert isinstance(layer.padding, tuple)
    above, beside = layer.padding
    if layer.layout == "spatial":
        x = F.conv2d(x, layer.first, None, (1, across), (0, beside), (1, wide))
        return F.conv2d(x, layer.second, layer.bias, (down, 1), (above, 0), (high, 1))
    if layer.layout == "tucker":
        x = F.conv2d(F.conv2d(x, layer.first), layer.core, None, layer.stride, layer.padding, layer.dilation)
    else:
        x = F.conv2d(x, layer.first, None, layer.stride, layer.padding, layer.dilation)
    return F.conv2d(x, layer.second, layer.bias)


@pytest.mark.parametrize("layout", LOW_RANK)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_smaller_model_computes_the_same(name: str, layout: str) -> None:
    torch.manual_seed(0)
    model, x = NETWORKS[name]().double().eval(), example(name)
    q = LOW_RANK[layout]()
    outcome = q.apply(model.named_parameters())
    with torch.no_grad():
        expected = model(x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    remembered = q.state_dict()
    plan = r.plan(model, x, model.named_parameters(), q)
    assert q.state_dict().keys() == remembered.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert CompressionPlan.from_json(plan.to_json()) == plan
    layers = {layer.name: layer for layer in plan.layers if layer.rank is not None}
    assert any(layer.layout == layout for layer in layers.values())
    smaller = cctorch.apply(copy.deepcopy(model), plan)
    with torch.no_grad():
        assert (smaller(x) - expected).abs().max() < 1e-9 * expected.abs().max()
    entries = 0
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            rebuilt = smaller.get_submodule(path)
            assert isinstance(rebuilt, LowRankConv2d | LowRankLinear) == (path in layers)
            entries += sum(p.numel() for p in rebuilt.parameters() if p.dim() >= 2)
    assert entries * 64 == outcome.bits


@pytest.mark.parametrize("layout", LOW_RANK)
def test_multiply_accumulates_are_those_of_the_convolutions_that_run(layout: str) -> None:
    """Of strides 1 and 2, with padding that keeps the size."""
    torch.manual_seed(0)
    model = models.create("resnet8").eval()
    x = torch.randn(1, 3, 16, 16)
    specs = {spec.name: spec for spec in trace(model, x).specs}
    plan = regularized(model, LOW_RANK[layout](), x)
    smaller = cctorch.apply(model, plan)
    seen: dict[str, int] = {}

    def count(path: str, module: LowRankConv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        with FlopCounterMode(display=False) as counter:
            alone = separate(module, inputs[0])
        torch.testing.assert_close(alone, output, atol=1e-4, rtol=1e-4)
        seen[path] = counter.get_total_flops() // 2

    for path, module in smaller.named_modules():
        if isinstance(module, LowRankConv2d):
            module.register_forward_hook(lambda *args, path=path: count(path, *args))
    with torch.no_grad():
        smaller(x)
    assert any(specs[path].stride_height == 2 for path in seen)
    for path, macs in seen.items():
        assert _C.layer_macs(specs[path], plan.find(path), True) == macs, path


def test_columns_of_zeros_narrow_the_network() -> None:
    torch.manual_seed(0)
    model, x = models.create("resnet8").double().eval(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    inner = [(name, p) for name, p in model.named_parameters() if name.endswith("conv2.weight")]
    q = r.ChannelPruning(0.5, axis=1)
    q.apply(inner)
    with torch.no_grad():
        expected = model(x)
    plan = r.plan(model, x, inner, q)
    smaller = cctorch.apply(copy.deepcopy(model), plan)
    for name, weight in inner:
        path = name.removesuffix(".weight")
        assert smaller.get_submodule(path).weight.shape[1] == weight.shape[1] // 2
        before = path.replace("conv2", "conv1")  # of which nobody reads the other filters
        assert smaller.get_submodule(before).weight.shape[0] == weight.shape[1] // 2
    assert not any(layer.gather for layer in plan.layers)
    with torch.no_grad():
        torch.testing.assert_close(smaller(x), expected)


def test_factors_of_what_is_left_of_the_inputs() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(16, 12, 3, bias=False)).double(), torch.randn(1, 16, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight[:, 4:] *= 1e-3
    q = r.Compose([r.ChannelPruning(0.75, axis=1), r.SVD(rank=6)])
    plan = regularized(model, q, x)
    found = plan.find("0")
    assert found is not None
    assert (found.kept_in, found.gather, found.rank) == ([0, 1, 2, 3], [0, 1, 2, 3], 6)
    expected = model(x)
    torch.testing.assert_close(cctorch.apply(model, plan)(x), expected)
    # Factors of more numbers than the four columns have are none.
    wide = nn.Sequential(nn.Conv2d(16, 12, 1, bias=False))
    dense = regularized(wide, r.Compose([r.ChannelPruning(0.85, axis=1), r.SVD(rank=5)]), x.float()).find("0")
    assert dense is not None
    assert (len(dense.kept_in), dense.rank) == (2, None)


@pytest.mark.parametrize("layout", LOW_RANK)
def test_factors_are_smaller_than_what_is_left_of_both_sides(layout: str) -> None:
    torch.manual_seed(0)
    sizes = (16, 64, 64, 64)
    model = nn.Sequential(*(nn.Conv2d(i, o, 3, padding=1) for i, o in itertools.pairwise(sizes))).double()
    x = torch.randn(1, 16, 8, 8, dtype=torch.float64)
    plan = regularized(model, r.Compose([r.ChannelPruning(0.9, axis=1), LOW_RANK[layout]()]), x)
    expected = model(x)
    smaller = cctorch.apply(model, plan)
    torch.testing.assert_close(smaller(x), expected)
    for layer in plan.layers:
        weights = [p for p in smaller.get_submodule(layer.name).parameters() if p.dim() == 4]
        assert sum(p.numel() for p in weights) <= 9 * len(layer.kept_in) * len(layer.kept_out), layer.name


def test_an_lstm() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(12, 16, batch_first=True)
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    torch.manual_seed(0)
    model, x = Tagger().eval(), torch.randn(2, 7, 12)
    plan = regularized(model, r.SVD(rank=4), x)
    with torch.no_grad():
        expected = model(x)
        smaller = cctorch.apply(model, plan)
        assert isinstance(smaller.rnn, LowRankLSTM)
        torch.testing.assert_close(smaller(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LOW_RANK)
def test_types_that_round(dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(24, 32, 3, padding=1)).to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(2, 24, 6, 6).to(dtype)
    plan = regularized(model, LOW_RANK[layout](), x)
    expected = model(x).float()
    smaller = cctorch.apply(model, plan)
    assert all(p.dtype == dtype for p in smaller.parameters())
    limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert (smaller(x).float() - expected).norm() < limit * expected.norm()


def test_momentum_goes_with_a_weight_that_is_factored() -> None:
    model, x = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16, 2)), torch.randn(2, 16, 3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).sum().backward()
    optimizer.step()
    named = [("0.weight", model[0].weight)]
    q = r.Tucker2(ratio=3.0)
    q.apply(named)
    plan = r.plan(model, x, named, q)
    model = cctorch.apply(model, plan, optimizer)
    parameters = optimizer.param_groups[0]["params"]
    assert [id(p) for p in parameters] == [id(p) for p in model.parameters()]
    model(x).sum().backward()
    assert all(p.grad is not None for p in parameters)
    optimizer.step()


def test_only_parameters_that_were_given_change() -> None:
    torch.manual_seed(0)
    model, x = models.create("resnet8").eval(), torch.randn(1, 3, 16, 16)
    chosen = [(name, p) for name, p in model.named_parameters() if name == "layer2.0.conv2.weight"]
    q = r.SVD(ratio=2.0)
    q.apply(chosen)
    assert [layer.name for layer in r.plan(model, x, chosen, q).layers] == ["layer2.0.conv2"]


def test_between_two_events_there_is_no_plan() -> None:
    model, x = models.create("resnet8").eval(), torch.randn(1, 3, 16, 16)
    events = r.Events(model.named_parameters(), r.SVD(ratio=2.0), 100)
    with pytest.raises(ValueError, match=r"layer 'conv1' is not of the rank .* finish\(\) of the events"):
        r.plan(model, x, model.named_parameters(), events.regularizer)
    events.finish()
    assert r.plan(model, x, model.named_parameters(), events.regularizer).layers
    # In float64 much less is seen.
    model = model.double()
    events = r.Events(model.named_parameters(), r.SVD(ratio=2.0), 100)
    events.finish()
    with torch.no_grad():
        model.layer1[0].conv1.weight.mul_(1 + 1e-5 * torch.randn_like(model.layer1[0].conv1.weight))
    with pytest.raises(ValueError, match=r"layer 'layer1\.0\.conv1' is not of the rank"):
        r.plan(model, x.double(), model.named_parameters(), events.regularizer)


def test_what_makes_no_layer_smaller_gives_an_empty_plan() -> None:
    torch.manual_seed(0)
    spoilers = (r.UniformNoise(0.1), r.MagnitudePruning(0.3), r.CodebookQuantization(3))
    leave: list[r.Regularizer] = [
        *(r.UniformQuantization(4), r.WeightDecay(0.1), r.UniformNoise(0.1), r.NMPruning(2, 4), r.TiledSVD(4, 1)),
        *(r.CodebookQuantization(2), r.BinaryCodeQuantization(2), r.MagnitudePruning(0.99), r.ChannelPruning(0.5)),
        *(r.Compose([r.SVD(ratio=2.0), spoiler]) for spoiler in spoilers),
    ]
    for q in leave:
        model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3))
        assert regularized(model, q, torch.randn(1, 8, 6, 6)).layers == []


def test_what_no_layer_is_made_of_stays_with_a_warning() -> None:
    q, x = r.SVD(ratio=1.1), torch.randn(1, 16, 9, 9)
    grouped, depthwise = nn.Conv2d(16, 16, 3, groups=2), nn.Conv2d(16, 16, 3, groups=16)
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3))
    for layer, named in (
        (grouped, "0.weight"),
        (depthwise, "0.weight"),
        (normed, r"0.parametrizations\.weight\.original1"),
    ):
        with pytest.warns(UserWarning, match=f"'{named}' stays as it is, of low rank"):
            plan = regularized(nn.Sequential(layer, nn.Conv2d(16, 16, 3)), q, x)
        assert [layer.name for layer in plan.layers] == ["1"]


@pytest.mark.parametrize("layout", LOW_RANK)
def test_repair_fits_factors_of_every_layout(layout: str) -> None:
    torch.manual_seed(0)
    dense = models.create("resnet8").double().eval()
    model = copy.deepcopy(dense)
    x = torch.randn(40, 3, 16, 16, dtype=torch.float64)
    plan = regularized(model, LOW_RANK[layout](), x)
    cctorch.apply(model, plan).eval()

    def error() -> float:
        with torch.no_grad():
            return float((model(x) - dense(x)).square().mean())

    before, shapes = error(), {key: value.shape for key, value in model.state_dict().items()}
    result = cctorch.repair(model, dense, plan, [(x, torch.zeros(40, dtype=torch.long))], step=1)
    fitted = {fit.name: fit for fit in result.layers}
    factored = [layer.name for layer in plan.layers if layer.rank is not None]
    assert factored
    for name in factored:
        assert fitted[name].after < fitted[name].before
    assert error() < 0.5 * before
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes


@pytest.mark.parametrize("layout", LOW_RANK)
def test_repair_finds_the_outer_factors_of_right_inner_ones(layout: str) -> None:
    """By the dense model, whose weights have that rank: what follows the first factor had become something else."""
    torch.manual_seed(0)
    dense = models.create("resnet8").double().eval()
    x = torch.randn(40, 3, 16, 16, dtype=torch.float64)
    plan = regularized(dense, LOW_RANK[layout](), x)
    model = cctorch.apply(copy.deepcopy(dense), plan).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".second", ".core")):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    cctorch.repair(model, dense, plan, [(x, torch.zeros(40, dtype=torch.long))], step=1, ridge=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)


def test_plans_are_copied() -> None:
    layer = cctorch.LayerPlan("a", "conv2d", 4, 6, rank=3, layout="tucker", rank_in=2)
    for twin in (copy.copy(layer), copy.deepcopy(layer)):
        assert twin == layer
        twin.rank_in = 1
        assert layer.rank_in == 2
