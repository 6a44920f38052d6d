import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cctorch import _C, ops
from cctorch._C import CompressionPlan, LayerPlan
from cctorch.apply import apply
from cctorch.graph import trace
from cctorch.nn import GatherChannels, LowRankConv2d, LowRankLinear
from networks import (
    Dense,
    OneChannel,
    PaddedResNet,
    SqueezeExcite,
    Vgg,
    counted_macs,
    projected,
    random_plan,
    randomized,
)
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def resnet18() -> nn.Module:
    return pytest.importorskip("torchvision").models.resnet18(num_classes=7)


def mobilenet_v2() -> nn.Module:
    return pytest.importorskip("torchvision").models.mobilenet_v2(num_classes=7, width_mult=0.25)


NETWORKS = [PaddedResNet, Vgg, Dense, SqueezeExcite]
CASES = [*((network, seed) for network in NETWORKS for seed in (0, 1)), (resnet18, 0), (mobilenet_v2, 0)]


def images(count: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.randn(count, channels, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("network", "seed"), CASES)
@torch.no_grad()
def test_applied_model_computes_what_the_projected_dense_model_does(
    network: Callable[[], nn.Module], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = images()
    model = randomized(network(), seed)
    graph = trace(model, x)
    plan = random_plan(graph, seed)
    expected = projected(copy.deepcopy(model), plan)(x)
    assert (expected - model(x)).abs().max() > 1e-3
    assert apply(model, plan) is model
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    # The plan counts the factors one after the other; they run multiplied out where that takes less.
    count = _C.final_macs(graph.specs, plan)
    assert counted_macs(model, x[:1]) <= count
    monkeypatch.setattr(ops, "low_rank_conv2d", in_turn)
    assert counted_macs(model, x[:1]) == count


def in_turn(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None, *window: Any) -> Tensor:
    return nn.functional.conv2d(nn.functional.conv2d(x, first, None, *window), second, bias)


@torch.no_grad()
def test_the_last_filter_of_a_layer_that_nobody_reads_arrives_in_a_concatenation() -> None:
    x = images()
    model = randomized(Dense(), 0)
    graph = trace(model, x)
    plan = CompressionPlan(
        layers=[
            LayerPlan("convs.2", "conv2d", 14, 4, kept_in=[0, 1, 2, 3, 4, 5, 6, 9]),
            LayerPlan("last", "conv2d", 18, 7, kept_in=[*range(10), 14, 15, 16, 17]),
        ]
    )
    graph.channels.resolve(plan)
    expected = projected(copy.deepcopy(model), plan)(x)
    apply(model, plan)
    assert model.convs[1].out_channels == 1
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_dense_model_with_the_plan_loads_the_compressed_checkpoint(network: Callable[[], nn.Module]) -> None:
    x = images()
    compressed = randomized(network())
    plan = random_plan(trace(compressed, x), 3)
    apply(compressed, plan)
    fresh = network().double().eval()
    apply(fresh, CompressionPlan.from_json(plan.to_json()))
    fresh.load_state_dict(compressed.state_dict())
    assert torch.equal(fresh(x), compressed(x))


@torch.no_grad()
def test_single_channels_and_constant_layers() -> None:
    x = images(channels=1)
    model = randomized(OneChannel())
    graph = trace(model, x)
    expected = model(x)
    plan = random_plan(graph, ranks=False)
    apply(model, plan)
    torch.testing.assert_close(model(x), expected)

    constant = randomized(Vgg())
    for parameter in constant.parameters():
        parameter.fill_(0.25)
    plan = random_plan(trace(constant, images()), 2)
    expected = projected(copy.deepcopy(constant), plan)(images())
    torch.testing.assert_close(apply(constant, plan)(images()), expected, rtol=1e-10, atol=1e-10)


def layer_plan(layer: nn.Conv2d | nn.Linear, **fields: object) -> CompressionPlan:
    kind = "linear" if isinstance(layer, nn.Linear) else "conv2d"
    out, inputs = layer.weight.shape[:2]
    return CompressionPlan(layers=[LayerPlan("0", kind, inputs, out, **fields)])


@pytest.mark.parametrize(
    "arguments",
    [
        {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
        {"padding": "same", "dilation": 2},
        {"padding": "valid", "bias": False},
        {"padding": 1, "padding_mode": "circular", "stride": 2},
        {"padding": "same", "padding_mode": "replicate"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4)])
@pytest.mark.parametrize("rank", [None, 6])
@torch.no_grad()
def test_every_convolution_argument_is_kept(
    arguments: dict[str, object], kernel: tuple[int, int], rank: int | None
) -> None:
    conv = nn.Conv2d(5, 6, kernel, **arguments).double()  # type: ignore[arg-type]
    x = torch.randn(2, 5, 11, 9, dtype=torch.float64)
    kept = [0, 3, 4]
    masked = copy.deepcopy(conv)
    masked.weight[:, [1, 2]] = 0
    expected = masked(x)[:, [1, 5]]
    model = apply(nn.Sequential(conv), layer_plan(conv, kept_in=kept, kept_out=[1, 5], gather=kept, rank=rank))
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    inner = model[0].layer
    assert type(inner) is (nn.Conv2d if rank is None else LowRankConv2d)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3), nn.Linear(4, 6)], ids=["conv2d", "linear"])
@pytest.mark.parametrize("rank", [None, 1])
def test_dtype_flags_and_memory_format_are_kept(layer: nn.Conv2d | nn.Linear, rank: int | None) -> None:
    layer = copy.deepcopy(layer).to(torch.bfloat16).eval()
    layer.weight.requires_grad_(False)
    convolution = isinstance(layer, nn.Conv2d)
    if convolution:
        layer.to(memory_format=torch.channels_last)
    model = apply(nn.Sequential(layer), layer_plan(layer, kept_in=[0, 1, 3], rank=rank))
    rebuilt = model[0]
    assert rebuilt.training is False
    weight = rebuilt.weight if rank is None else rebuilt.first
    assert weight.dtype == torch.bfloat16
    assert not weight.requires_grad
    assert rebuilt.bias.requires_grad
    if convolution:
        assert weight.is_contiguous(memory_format=torch.channels_last)


def test_structure_of_the_rebuilt_layers() -> None:
    conv, linear = nn.Conv2d(8, 6, 3), nn.Linear(6, 4)
    model = nn.Sequential(conv, linear)
    plan = CompressionPlan(
        layers=[
            LayerPlan("0", "conv2d", 8, 6, kept_in=[0, 2, 7], gather=[0, 2, 7], rank=2),
            LayerPlan("1", "linear", 6, 4, kept_in=[1, 2], kept_out=[0, 1, 3], rank=1),
        ]
    )
    apply(model, plan)
    assert isinstance(model[0], GatherChannels)
    assert isinstance(model[1], LowRankLinear)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == {
        "0.index": (3,),
        "0.layer.first": (2, 3, 3, 3),
        "0.layer.second": (6, 2, 1, 1),
        "0.layer.bias": (6,),
        "1.first": (1, 2),
        "1.second": (3, 1),
        "1.bias": (3,),
    }


def snapshot(model: nn.Module) -> tuple[str, dict[str, torch.Tensor], list[int]]:
    return repr(model), copy.deepcopy(model.state_dict()), [id(parameter) for parameter in model.parameters()]


def assert_unchanged(model: nn.Module, before: tuple[str, dict[str, torch.Tensor], list[int]]) -> None:
    description, state, parameters = snapshot(model)
    assert (description, parameters) == (before[0], before[2])
    assert all(torch.equal(state[name], before[1][name]) for name in before[1])


def test_compressed_model_and_other_architecture_are_refused_unchanged() -> None:
    model = randomized(PaddedResNet())
    plan = random_plan(trace(model, images()), 0)
    apply(model, plan)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"is a .*; the plan expects a conv2d of .* apply a plan once"):
        apply(model, plan)
    assert_unchanged(model, before)

    other = randomized(Vgg())
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"Vgg has no layer '.*'; the plan expects a conv2d of"):
        apply(other, plan)
    assert_unchanged(other, before)


def grouped() -> nn.Conv2d:
    return nn.Conv2d(8, 6, 3, groups=2)


def prepared() -> nn.Conv2d:
    conv = nn.Conv2d(8, 6, 3)
    nn.utils.parametrize.register_parametrization(conv, "weight", nn.Tanh())
    return conv


def hooked() -> nn.Conv2d:
    conv = nn.Conv2d(8, 6, 3)
    conv.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
    return conv


class Standardized(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (grouped, "is a conv2d of 8 -> 6 channels in 2 groups; the plan expects a conv2d of 8 -> 6 channels"),
        (prepared, r"has parametrizations; run cctorch.convert\(model\) first"),
        (lambda: Standardized(8, 6, 3), r"\(Standardized\) has a forward of its own"),
        (hooked, "has hooks; remove them"),
        (lambda: nn.Conv2d(8, 5, 3), "is a conv2d of 8 -> 5 channels; the plan expects a conv2d of 8 -> 6"),
        (lambda: nn.Linear(8, 6), "is a linear of 8 -> 6 channels; the plan expects a conv2d of 8 -> 6"),
    ],
    ids=["grouped", "parametrized", "own forward", "hooked", "width", "kind"],
)
def test_layer_that_does_not_fit_is_refused_by_name(layer: Callable[[], nn.Module], message: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), layer())
    plan = CompressionPlan(
        layers=[
            LayerPlan("0", "conv2d", 3, 8, kept_out=[0, 1]),
            LayerPlan("1", "conv2d", 8, 6, kept_in=[0, 1]),
        ]
    )
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"plan: layer '1' .*{message}"):
        apply(model, plan)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "changes",
    [{"kept_in": [0, 2, 5], "gather": [0, 2, 5]}, {"rank": 2}, {"kept_out": [0, 1, 7]}],
    ids=["gather", "rank", "narrower"],
)
@torch.no_grad()
def test_transformer_runs_its_smaller_layers_in_evaluation_too(changes: dict[str, Any]) -> None:
    """PyTorch's fused path reads `linear1.weight`; the unfused one, which training takes, is the reference."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).double()
    plans = [LayerPlan("layers.0.linear1", "linear", 8, 16, **changes)]
    if "kept_out" in changes:
        plans.append(LayerPlan("layers.0.linear2", "linear", 16, 8, kept_in=changes["kept_out"]))
    apply(model, CompressionPlan(layers=plans))
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    expected = model.train()(x, src_key_padding_mask=padding)
    result = model.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(result[~padding], expected[~padding])


class ByKeyword(nn.Module):
    """Layers take their input as `input`, as PyTorch's documentation names it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.third, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(input=F.relu(self.norm(input=self.first(input=x))))
        return self.last(input=F.relu(self.third(input=x.mean((2, 3)))))


@pytest.mark.parametrize("rank", [None, 1])
@torch.no_grad()
def test_layers_that_are_called_by_keyword(rank: int | None) -> None:
    model, x = randomized(ByKeyword()), images()
    graph = trace(model, x)
    plan = random_plan(graph, 1, ranks=False)
    for layer in plan.layers:
        if layer.kind in ("conv2d", "linear"):
            layer.rank = rank
    expected = projected(copy.deepcopy(model), plan)(x)
    apply(model, plan)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_shared_parameter_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"layer '1' shares a parameter \(0.weight, 1.weight\)"):
        apply(model, CompressionPlan(layers=[LayerPlan("1", "linear", 4, 4, kept_in=[0])]))


def optimizers() -> list[Callable[[list[dict[str, object]]], torch.optim.Optimizer]]:
    return [
        lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
        lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True),
        lambda groups: torch.optim.AdamW(groups, lr=0.01, foreach=False),
    ]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, masks: dict[nn.Parameter, torch.Tensor]) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(images(4)), torch.tensor([0, 1, 2, 0])).backward()
    for parameter, mask in masks.items():
        assert parameter.grad is not None
        parameter.grad *= mask
    optimizer.step()


def test_an_optimizer_with_one_history_of_all_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.LBFGS(model.parameters())
    plan = CompressionPlan(layers=[LayerPlan("0", "linear", 4, 4, rank=1)])
    with pytest.raises(ValueError, match="LBFGS keeps one history over all parameters"):
        apply(model, plan, optimizer)
    assert isinstance(model[0], nn.Linear)


def test_an_optimizer_of_another_model_is_refused_before_anything_changes() -> None:
    model, other = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)) for _ in "ab")
    plan = CompressionPlan(layers=[LayerPlan("0", "linear", 4, 4, rank=1)])
    with pytest.raises(ValueError, match="the optimizer has none of the parameters of this Sequential"):
        apply(model, plan, torch.optim.SGD(other.parameters(), lr=0.1))
    assert isinstance(model[0], nn.Linear)
    apply(copy.deepcopy(model), CompressionPlan(), torch.optim.SGD(other.parameters(), lr=0.1))
    apply(copy.deepcopy(model).requires_grad_(False), plan, torch.optim.SGD(other.parameters(), lr=0.1))
    apply(model, plan, torch.optim.SGD(model[1].parameters(), lr=0.1))


@pytest.mark.parametrize("build", optimizers(), ids=["SGD", "Adam", "AdamW"])
def test_optimizer_goes_on_with_the_kept_entries(
    build: Callable[[list[dict[str, object]]], torch.optim.Optimizer],
) -> None:
    model = randomized(SqueezeExcite())
    plan = random_plan(trace(model, images()), 5, ranks=False)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = build([{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}])
    step(model, optimizer, {})

    dense = copy.deepcopy(model)
    positions = {id(old): new for old, new in zip(model.parameters(), dense.parameters(), strict=True)}
    dense_optimizer = build(
        [{**group, "params": [positions[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
    )
    dense_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    projected(dense, plan)

    apply(model, plan, optimizer)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in model.parameters()}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    assert all(parameter.dim() > 1 for parameter in optimizer.param_groups[0]["params"])

    step(model, optimizer, {})
    step(dense, dense_optimizer, {})
    for layer in plan.layers:
        narrow, wide = model.get_submodule(layer.name), dense.get_submodule(layer.name)
        narrow = narrow.layer if isinstance(narrow, GatherChannels) else narrow
        weight = wide.weight[layer.kept_out]
        weight = weight if layer.kind == "depthwise_conv2d" else weight[:, layer.kept_in]
        torch.testing.assert_close(narrow.weight, weight, rtol=1e-9, atol=1e-9)
        if narrow.bias is not None:
            torch.testing.assert_close(narrow.bias, wide.bias[layer.kept_out], rtol=1e-9, atol=1e-9)


def test_factors_take_their_weights_place_in_the_optimizer_without_state() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    kept = optimizer.state[model[0].bias]["momentum_buffer"].clone()
    apply(model, CompressionPlan(layers=[LayerPlan("0", "linear", 4, 6, rank=2)]), optimizer)
    held = optimizer.param_groups[0]["params"]
    expected = [model[0].first, model[0].second, model[0].bias, model[1].weight, model[1].bias]
    assert [id(parameter) for parameter in held] == [id(parameter) for parameter in expected]
    assert model[0].first not in optimizer.state
    assert torch.equal(optimizer.state[model[0].bias]["momentum_buffer"], kept)
    assert len(optimizer.state) == 3


def test_adagrad_goes_on_with_factors() -> None:
    """Its state is made when it is constructed, so that factors need one from `apply`."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), torch.randn(7, 6)
    optimizer = torch.optim.Adagrad(model.parameters(), 0.1, initial_accumulator_value=0.25)
    model(x).square().sum().backward()
    optimizer.step()
    apply(model, CompressionPlan(layers=[LayerPlan("0", "linear", 6, 5, rank=2)]), optimizer)
    before = model[0].first.detach().clone()
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    gradient = model[0].first.grad
    torch.testing.assert_close(model[0].first, before - 0.1 * gradient / ((0.25 + gradient**2).sqrt() + 1e-10))
    assert [float(optimizer.state[p]["step"]) for p in (model[0].first, model[0].bias, model[1].weight)] == [1, 2, 2]


def test_state_that_is_not_of_the_parameters_shape_starts_anew() -> None:
    """Adafactor keeps one number for each row and each column; those of the dense weight fit no smaller one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    optimizer = torch.optim.Adafactor(model.parameters())
    model(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    plan = [LayerPlan("0", "linear", 6, 8, kept_out=[1, 5]), LayerPlan("2", "linear", 8, 4, kept_in=[1, 5])]
    apply(model, CompressionPlan(layers=plan), optimizer)
    before = model[2].weight.detach().clone()
    optimizer.zero_grad()
    model(torch.ones(3, 6)).square().sum().backward()
    optimizer.step()
    assert optimizer.state[model[2].weight]["row_var"].shape == (4, 1)
    assert optimizer.state[model[2].weight]["col_var"].shape == (1, 2)
    assert not torch.equal(model[2].weight, before)
