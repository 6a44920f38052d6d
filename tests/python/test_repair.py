import copy
from collections.abc import Iterator

import cctorch
import networks
import pytest
import torch
import torch.nn.functional as F
from cctorch._C import CompressionPlan, LayerPlan
from cctorch.graph import trace
from cctorch.nn import GatherChannels, LowRankLinear
from cctorch.repair.places import Place, find
from torch import Tensor, nn

NETWORKS = {
    "padded_resnet": (networks.PaddedResNet, (3, 8, 8)),
    "vgg": (networks.Vgg, (3, 16, 16)),
    "dense": (networks.Dense, (3, 6, 6)),
    "squeeze_excite": (networks.SqueezeExcite, (3, 6, 6)),
}


def batches(shape: tuple[int, ...], count: int = 3, size: int = 20) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, *shape, generator=generator, dtype=torch.float64), torch.zeros(size)) for _ in range(count)
    ]


def compressed(
    name: str, seed: int = 0, ranks: bool = True
) -> tuple[nn.Module, nn.Module, CompressionPlan, tuple[int, ...]]:
    network, shape = NETWORKS[name]
    torch.manual_seed(seed)
    dense = networks.randomized(network(), seed)
    plan = networks.random_plan(trace(dense, torch.randn(2, *shape, dtype=torch.float64)), seed, ranks)
    return dense, cctorch.apply(copy.deepcopy(dense), plan).eval(), plan, shape


@torch.no_grad()
def error(model: nn.Module, dense: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    x = torch.cat([inputs for inputs, _ in data])
    y = dense(x)
    return float((model(x) - y).square().sum() / (y - y.mean(0)).square().sum())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("shortcuts", [True, False])
@pytest.mark.parametrize("step", [1, 5])
def test_no_layer_fits_worse_and_the_model_fits_better(name: str, shortcuts: bool, step: int) -> None:
    dense, model, plan, shape = compressed(name)
    data = batches(shape)
    before = error(model, dense, data)
    found = cctorch.repair(model, dense, plan, data, shortcuts=shortcuts, step=step)
    assert found.layers
    for layer in found.layers:
        assert layer.after <= layer.before
        assert layer.samples > 0
    assert error(model, dense, data) < 0.5 * before


class _Reference:
    """The same by definition: for each layer, both models run from the start, and an explicit least-squares problem."""

    def __init__(self, model: nn.Module, dense: nn.Module, plan: CompressionPlan, ridge: float) -> None:
        self.model, self.dense, self.plan, self.ridge = model, dense, plan, ridge

    def run(self, x: Tensor) -> None:
        stages = [*self.model.layer1, *self.model.layer2]
        wanted = [*self.dense.layer1, *self.dense.layer2]
        for block, original, name in zip(stages, wanted, ("layer1.0", "layer1.1", "layer2.0", "layer2.1"), strict=True):
            before = self.seen(self.model, block, x)
            kept = self.plan.find(f"{name}.conv1").kept_out
            normed = self.output(self.dense, original.bn1, x)[:, kept]
            self.solve(block.conv1, block.bn1, self.seen(self.model, block.conv1, x), normed)
            hidden = self.seen(self.model, block.conv2, x)
            total = self.output(self.dense, original.bn2, x) + self.shortcut(
                original, self.seen(self.dense, original, x)
            )
            if self.plan.find(f"{name}.conv2"):
                total = total[:, self.plan.find(f"{name}.conv2").kept_out]
            self.solve(block.conv2, block.bn2, hidden, total - self.shortcut(block, before))
        self.solve(self.model.linear, None, self.seen(self.model, self.model.linear, x), self.dense(x))

    @staticmethod
    def shortcut(block: nn.Module, x: Tensor) -> Tensor:
        if not block.extra:
            return x
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, block.extra // 2, block.extra - block.extra // 2))

    @staticmethod
    def seen(model: nn.Module, module: nn.Module, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        handle = module.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].clone()))
        model(x)
        handle.remove()
        return found[0]

    @staticmethod
    def output(model: nn.Module, module: nn.Module, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        handle = module.register_forward_hook(lambda _, __, y: found.append(y.clone()))
        model(x)
        handle.remove()
        return found[0]

    def solve(self, layer: nn.Module, norm: nn.Module | None, x: Tensor, y: Tensor) -> None:
        if isinstance(layer, GatherChannels):
            x, layer = x[:, layer.index], layer.layer
        if isinstance(layer, nn.Linear | LowRankLinear):
            rows, wanted = x, y
        else:
            columns = F.unfold(x, 3, padding=1, stride=layer.stride)
            rows, wanted = columns.transpose(1, 2).flatten(0, 1), y.flatten(2).transpose(1, 2).flatten(0, 1)
        weight = (
            layer.second.flatten(1) @ layer.first.flatten(1) if hasattr(layer, "first") else layer.weight.flatten(1)
        )
        slope = torch.ones(len(weight)).double() if norm is None else norm.weight / (norm.running_var + norm.eps).sqrt()
        x_central, y_central = rows - rows.mean(0), wanted - wanted.mean(0)
        pull = (self.ridge * x_central.square().sum(0).mean()).sqrt() * torch.eye(rows.shape[1]).double()
        design = torch.cat([x_central, pull])
        targets = torch.cat([y_central, pull @ (slope[:, None] * weight).T])
        best = torch.linalg.lstsq(design, targets).solution
        if hasattr(layer, "first"):
            u, s, v = torch.linalg.svd(design @ best, full_matrices=False)
            s[len(layer.first) :] = 0
            best = torch.linalg.lstsq(design, (u * s) @ v).solution
        constant = wanted.mean(0) - rows.mean(0) @ best
        self.write(layer, norm, best.T / slope[:, None], slope, constant)

    @staticmethod
    def write(layer: nn.Module, norm: nn.Module | None, weight: Tensor, slope: Tensor, constant: Tensor) -> None:
        if hasattr(layer, "first"):
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            rank = min(len(layer.first), len(s))
            layer.first.data.zero_()[:rank] = (s[:rank, None] * v[:rank]).view(rank, *layer.first.shape[1:])
            layer.second.data.flatten(1).zero_()[:, :rank] = u[:, :rank]
        else:
            layer.weight.data = weight.reshape(layer.weight.shape)
        if norm is None:
            layer.bias.data = constant
        else:
            norm.running_mean.zero_()
            norm.bias.data = constant


@pytest.mark.parametrize("seed", [0, 1])
def test_one_pass_equals_running_from_the_start_for_each_layer(seed: int) -> None:
    dense, model, plan, shape = compressed("padded_resnet", seed)
    data = batches(shape)
    reference = copy.deepcopy(model)
    # The networks' first convolution is in the plan: it sees unchanged images.
    cctorch.repair(model, dense, plan, data, step=1, ridge=1e-4)
    x = torch.cat([inputs for inputs, _ in data])
    with torch.no_grad():
        runner = _Reference(reference, dense, plan, 1e-4)
        kept = plan.find("conv1").kept_out if plan.find("conv1") else list(range(8))
        if plan.find("conv1"):
            runner.solve(
                reference.conv1,
                reference.bn1,
                runner.seen(reference, reference.conv1, x),
                runner.output(dense, dense.bn1, x)[:, kept],
            )
        runner.run(x)
        fresh = torch.randn(30, *shape, dtype=torch.float64)
        torch.testing.assert_close(model(fresh), reference(fresh), rtol=1e-5, atol=1e-5)


class ChannelsLastBlock(nn.Module):
    """Linear layers on B x H x W x C, as in ConvNeXt; H may be any number, that of the channels too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.wide, self.narrow, self.head = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(F.relu(self.stem(x))).permute(0, 2, 3, 1)
        return self.head(self.narrow(F.gelu(self.wide(y))).mean((1, 2)))


@pytest.mark.parametrize("size", [5, 8, 32])
def test_linear_layers_on_feature_maps(size: int) -> None:
    torch.manual_seed(0)
    dense = ChannelsLastBlock().double().eval()
    graph = trace(dense, torch.randn(2, 3, size, size, dtype=torch.float64))
    plan = networks.random_plan(graph, 0, True)
    model = cctorch.apply(copy.deepcopy(dense), plan).eval()
    data = batches((3, size, size))
    before = error(model, dense, data)
    found = cctorch.repair(model, dense, plan, data, step=1)
    assert {"wide", "narrow"} <= {layer.name for layer in found.layers}
    assert all(layer.after <= layer.before for layer in found.layers)
    assert error(model, dense, data) < 0.5 * before


class Duplicates(nn.Module):
    """The second half of the filters repeat the first with another scale, so half of the inputs say all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(6 * 16, 12)
        self.linear = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.linear(F.relu(self.hidden(x.flatten(1))))


@torch.no_grad()
def duplicates() -> nn.Module:
    torch.manual_seed(0)
    model = networks.randomized(Duplicates())
    model.conv1.weight[4:] = model.conv1.weight[:4]
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(model.bn1, name)[4:] = getattr(model.bn1, name)[:4]
    model.bn1.weight[4:] *= 3
    model.bn1.bias[4:] *= 3
    return model


@pytest.mark.parametrize("rank", [None, 4])
def test_what_the_smaller_layers_can_compute_is_recovered(rank: int | None) -> None:
    dense = duplicates()
    layers = [LayerPlan("conv2", "conv2d", 8, 6, kept_in=[0, 1, 6, 7], rank=rank, gather=[0, 1, 6, 7])]
    plan = CompressionPlan("test", 0.5, layers)
    model = cctorch.apply(copy.deepcopy(dense), plan).eval()
    data = batches((3, 8, 8), size=100)
    x = torch.randn(9, 3, 8, 8, dtype=torch.float64)
    assert error(model, dense, [(x, x)]) > 0.1
    found = cctorch.repair(model, dense, plan, data, step=1, ridge=1e-12)
    assert [layer.name for layer in found.layers] == ["conv2", "hidden", "linear"]
    assert max(layer.after for layer in found.layers) < 1e-9
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)


def test_bits_of_a_layer_that_keeps_its_shape_change_nothing() -> None:
    dense, data = duplicates(), batches((3, 8, 8))
    narrow = LayerPlan("conv2", "conv2d", 8, 6, kept_in=[0, 1, 6, 7], gather=[0, 1, 6, 7])
    repaired = []
    for layers in ([narrow], [LayerPlan("conv1", "conv2d", 3, 8, bits=4), narrow]):
        plan = CompressionPlan("test", 0.5, layers)
        model = cctorch.apply(copy.deepcopy(dense), plan).eval()
        assert [layer.name for layer in cctorch.repair(model, dense, plan, data).layers] == [
            "conv2",
            "hidden",
            "linear",
        ]
        repaired.append(model.state_dict())
    assert all(torch.equal(value, repaired[1][name]) for name, value in repaired[0].items())


class Projected(nn.Module):
    """A block whose shortcut is a convolution of its own, executed last, added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.conv = nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(6, 8, 1, bias=False)
        self.down_bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.last = nn.Conv2d(8, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        y = self.bn(self.conv(x))
        y += self.down_bn(self.down(x))
        return self.last(self.act(y)).mean((2, 3))


def test_the_branch_that_ends_last_makes_up_for_the_other() -> None:
    torch.manual_seed(0)
    dense = networks.randomized(Projected())
    layers = [
        LayerPlan("conv", "conv2d", 6, 8, kept_in=[0, 1], gather=[0, 1]),
        LayerPlan("down", "conv2d", 6, 8, kept_in=[2, 3, 4], gather=[2, 3, 4]),
    ]
    plan = CompressionPlan("test", 0.5, layers)
    data = batches((3, 6, 6))
    errors = {}
    for shortcuts in (True, False):
        model = cctorch.apply(copy.deepcopy(dense), plan).eval()
        found = cctorch.repair(model, dense, plan, data, shortcuts=shortcuts, step=1)
        assert [layer.name for layer in found.layers] == ["conv", "down", "last"]
        x = torch.cat([inputs for inputs, _ in data])
        with torch.no_grad():
            seen = [_Reference.seen(m, m.last, x) for m in (model, dense)]
        errors[shortcuts] = float((seen[0] - seen[1]).square().sum())
    assert errors[True] < errors[False]


def test_a_training_step_starts_from_the_fitted_function() -> None:
    dense, model, plan, shape = compressed("padded_resnet")
    data = batches(shape)
    cctorch.repair(model, dense, plan, data, step=1)
    x = torch.cat([inputs for inputs, _ in data])
    with torch.no_grad():
        evaluated = model(x)
        training = copy.deepcopy(model).train()
        for module in (training.conv1, training.bn1):
            module.eval()
        torch.testing.assert_close(training(x), evaluated, rtol=0.02, atol=0.02)


class Biased(nn.Module):
    """Convolutions with a bias in front of their norms, and one whose output is normalized and also added as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_bn = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12)
        self.second, self.second_bn = nn.Conv2d(12, 12, 3), nn.BatchNorm2d(12)
        self.both, self.both_bn = nn.Conv2d(12, 12, 3), nn.BatchNorm2d(12)
        self.last = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second_bn(self.second(F.relu(self.first_bn(self.first(x))))))
        y = self.both(x)
        return self.last(F.relu(self.both_bn(y)) + y)


@torch.no_grad()
def test_the_errors_that_are_reported_are_those_of_the_repaired_model() -> None:
    torch.manual_seed(0)
    dense = networks.randomized(Biased(), 0).eval()
    plan = CompressionPlan(
        layers=[
            LayerPlan("first", "conv2d", 3, 12, rank=3),
            LayerPlan("second", "conv2d", 12, 12, rank=3),
            LayerPlan("both", "conv2d", 12, 12, rank=3),
        ]
    )
    model = cctorch.apply(copy.deepcopy(dense), plan)
    data = batches((3, 9, 9))
    found = cctorch.repair(model, dense, plan, data, step=1)
    x = torch.cat([inputs for inputs, _ in data])
    behind = {"first": "first_bn", "second": "second_bn", "both": "both", "last": "last"}
    outputs: list[dict[str, Tensor]] = []
    for network in (model, dense):
        seen: dict[str, Tensor] = {}
        for layer, name in behind.items():
            network.get_submodule(name).register_forward_hook(
                lambda _, __, y, layer=layer, seen=seen: seen.__setitem__(layer, y.clone())
            )
        network(x)
        outputs.append(seen)
    assert [fit.name for fit in found.layers] == list(behind)
    for fit in found.layers:
        y, wanted = (seen[fit.name] for seen in outputs)
        variance = (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().sum()
        assert fit.after == pytest.approx(float((y - wanted).square().sum() / variance), rel=1e-6), fit.name


@torch.no_grad()
def test_a_channel_that_its_norm_silences_can_speak_again() -> None:
    dense, model, plan, shape = compressed("padded_resnet")
    for network in (dense, model):
        network.layer1[1].bn2.weight[::2] = 0
    data = batches(shape)
    found = cctorch.repair(model, dense, plan, data, step=1)
    fit = next(layer for layer in found.layers if layer.name == "layer1.1.conv2")
    assert fit.after < fit.before
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert (model.layer1[1].bn2.weight != 0).all()


def test_only_the_weights_of_the_compressed_model_change() -> None:
    dense, model, plan, shape = compressed("padded_resnet")
    model.train()
    parameters = list(model.parameters())
    before = copy.deepcopy(dense.state_dict())
    model.bn1.weight.requires_grad_(False)
    cctorch.repair(model, dense, plan, batches(shape))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert not model.bn1.weight.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for m in (dense, model) for module in m.modules())


def test_grouped_layers_are_left_alone() -> None:
    dense, model, plan, shape = compressed("squeeze_excite")
    weight = model.depthwise.weight.clone()
    found = cctorch.repair(model, dense, plan, batches(shape))
    assert "depthwise" not in [layer.name for layer in found.layers]
    assert torch.equal(weight, model.depthwise.weight)


class Tied(nn.Module):
    """Two layers with one weight: what fits the one moves the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.free = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(F.relu(self.free(F.relu(self.stem(x)))))))


def test_layers_that_share_a_weight_are_left_alone() -> None:
    torch.manual_seed(0)
    dense = Tied().double().eval()
    plan = CompressionPlan("test", 0.5, [LayerPlan("free", "conv2d", 8, 8, rank=2)])
    model = cctorch.apply(copy.deepcopy(dense), plan).eval()
    found = cctorch.repair(model, dense, plan, batches((3, 6, 6)), step=1)
    assert [layer.name for layer in found.layers] == ["free"]
    assert model.second.weight is model.first.weight
    assert all(torch.equal(a, b) for a, b in zip(model.first.parameters(), dense.first.parameters(), strict=True))


def test_a_layer_without_anything_to_gain_keeps_its_bits() -> None:
    """Small whole numbers are exact in float64; the input that is dropped was never used."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.copy_(torch.randint(-4, 5, parameter.shape))
        dense[2].weight[:, 2] = 0
    kept = [0, 1, 3, 4, 5]
    plan = CompressionPlan("test", 0.5, [LayerPlan("2", "linear", 6, 5, kept_in=kept, gather=kept)])
    model = cctorch.apply(copy.deepcopy(dense), plan)
    before = copy.deepcopy(model.state_dict())
    found = cctorch.repair(model, dense, plan, [(torch.randint(-4, 5, (64, 4)).double(), torch.zeros(64))], step=1)
    assert [(layer.name, layer.before, layer.after) for layer in found.layers] == [("2", 0.0, 0.0), ("4", 0.0, 0.0)]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_weights_are_fitted_in_double_precision(dtype: torch.dtype) -> None:
    dense, model, plan, shape = compressed("padded_resnet")
    exact = copy.deepcopy(model)
    data = batches(shape)
    before = error(model, dense, data)
    cctorch.repair(exact, dense, plan, data)
    low = [(inputs.to(dtype), labels) for inputs, labels in data]
    model.to(dtype)
    cctorch.repair(model, dense.to(dtype), plan, low)
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    dense.double()
    best, reached = error(exact, dense, data), error(model.double(), dense, data)
    assert reached < best + (1e-3 if dtype == torch.float32 else 0.3) * before


def test_fewer_samples_than_inputs() -> None:
    dense, model, plan, shape = compressed("padded_resnet")
    data = batches(shape, count=1, size=2)
    found = cctorch.repair(model, dense, plan, data, step=1000)
    assert {layer.samples for layer in found.layers} == {2}
    assert "fitted to fewer samples than an output has weights" in found.warnings[0]
    assert all(layer.after <= layer.before for layer in found.layers)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


@pytest.mark.parametrize("bad", ["inputs", "weights"])
def test_values_that_are_not_finite_name_the_layer_and_change_nothing(bad: str) -> None:
    dense, model, plan, shape = compressed("padded_resnet")
    data = batches(shape)
    if bad == "inputs":
        data[1][0][3, 0, 2, 2] = float("nan")
    else:
        model.layer2[0].bn1.bias.data[0] = float("inf")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"repair: layer '.*': .*NaN or infinite"):
        cctorch.repair(model, dense, plan, data)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)


def test_bad_arguments() -> None:
    dense, model, plan, shape = compressed("padded_resnet")
    with pytest.raises(ValueError, match="batches is empty"):
        cctorch.repair(model, dense, plan, [])
    with pytest.raises(ValueError, match="ridge"):
        cctorch.repair(model, dense, plan, batches(shape), ridge=0.0)
    with pytest.raises(ValueError, match="step"):
        cctorch.repair(model, dense, plan, batches(shape), step=0)
    with pytest.raises(ValueError, match=r"layer 'layer1\.0\.conv1'"):
        cctorch.repair(dense, copy.deepcopy(dense), plan, batches(shape))
    with pytest.raises(ValueError, match=r"of the dense model is .*repair\(compressed, dense, plan, batches\)"):
        cctorch.repair(dense, model, plan, batches(shape))


def test_reports_its_progress() -> None:
    dense, model, plan, shape = compressed("padded_resnet")
    calls: list[tuple[str, int, int]] = []
    found = cctorch.repair(model, dense, plan, batches(shape), progress=lambda *call: calls.append(call))
    count = len(found.layers)
    assert calls == [("repair", done, count) for done in range(1, count + 1)]


def test_batches_may_be_an_iterator() -> None:
    dense, model, plan, shape = compressed("padded_resnet")
    other = copy.deepcopy(model)

    def once() -> Iterator[tuple[Tensor, Tensor]]:
        yield from batches(shape)

    cctorch.repair(model, dense, plan, once())
    cctorch.repair(other, dense, plan, batches(shape))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_images_count_and_not_how_they_are_batched() -> None:
    dense, model, plan, shape = compressed("padded_resnet")
    [(images, _)] = batches(shape, count=1, size=20)
    other = copy.deepcopy(model)
    cctorch.repair(model, dense, plan, [(images, images)], step=5)
    cctorch.repair(other, dense, plan, [(part, part) for part in images.split([7, 9, 4])], step=5)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=1e-7, atol=1e-9)


class Places(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.activated = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 1)
        self.depthwise = nn.Conv2d(4, 4, 1, groups=4)
        self.plain = nn.Conv2d(4, 4, 1)
        self.shared_bn = nn.BatchNorm2d(4)
        self.other = nn.Conv2d(4, 4, 1)
        self.unused = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.activated(x)), inplace=True) + x
        x = self.depthwise(self.twice(self.twice(x))) + x
        x = self.shared_bn(self.plain(x)) + 1
        return torch.add(x, self.shared_bn(self.other(x)))


class PreActivated(nn.Module):
    """He et al. 2016b: what the stem gives is normalized, and added as it is; what `branch` gives is pooled too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1, self.conv1 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), _conv()
        self.bn2, self.conv2 = nn.BatchNorm2d(8), _conv()
        self.branch, self.bn3, self.last = _conv(), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv1(F.relu(self.bn1(x)))
        x = self.branch(F.relu(self.conv2(F.relu(self.bn2(y))) + x))
        return self.last(F.relu(self.bn3(x)) + F.avg_pool2d(x, 3, 1, 1))


def _conv() -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, padding=1, bias=False)


@torch.no_grad()
def test_an_output_that_is_normalized_and_used_as_it_is_is_fitted_as_it_is() -> None:
    """A norm behind it would take the intercept, which the other use does not see."""
    torch.manual_seed(0)
    dense = networks.randomized(PreActivated(), 0).eval()
    assert find(dense, torch.randn(2, 6, 6, 6, dtype=torch.float64), CompressionPlan()) == [
        *(Place("stem"), Place("conv1", "bn2"), Place("conv2", joins=True), Place("branch"), Place("last"))
    ]
    layers = [LayerPlan("stem", "conv2d", 6, 8, rank=3), LayerPlan("branch", "conv2d", 8, 8, rank=3)]
    plan = CompressionPlan(layers=layers)
    data = batches((6, 6, 6))
    x = torch.cat([inputs for inputs, _ in data])
    model = cctorch.apply(copy.deepcopy(dense), plan).eval()
    outputs: list[Tensor] = []
    for network in (dense, model):
        network.stem.register_forward_hook(lambda _, __, y: outputs.append(y.clone()))
        network(x)
    cctorch.repair(model, dense, plan, data, step=1)
    outputs = outputs[:2]
    model(x)
    wanted, before, after = outputs
    assert (after - wanted).square().sum() < (before - wanted).square().sum()


def test_places_are_found_by_what_happens_to_the_outputs() -> None:
    assert find(Places().eval(), torch.randn(2, 4, 3, 3), CompressionPlan()) == [
        # An activation lies between this one's norm and the addition.
        Place("activated", "bn", joins=False),
        Place("plain", None, joins=False),
        # Its norm runs twice, and only the norm's output is added.
        Place("other", None, joins=False),
    ]
    assert find(Projected().eval(), torch.randn(2, 3, 6, 6), CompressionPlan()) == [
        Place("stem"),
        Place("conv", "bn", joins=False),
        Place("down", "down_bn", joins=True),
        Place("last"),
    ]
