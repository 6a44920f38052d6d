import copy
from collections.abc import Callable

import cctorch
import pytest
import torch
import torch.nn.functional as F
from cctorch import _C
from cctorch._C import CompressionPlan, LayerPlan
from cctorch.graph import ModelGraph, trace
from networks import Dense, PaddedResNet, SqueezeExcite, Vgg, counted_macs, projected, random_plan
from torch import Tensor, nn
from torch.nn.utils import parametrize

EXAMPLE = torch.zeros(1, 3, 16, 16)


def pruned(graph: ModelGraph, name: str, kept: list[int]) -> CompressionPlan:
    spec = next(spec for spec in graph.specs if spec.name == name)
    plan = CompressionPlan(layers=[LayerPlan(name, spec.kind, spec.in_channels, spec.out_channels, kept_in=kept)])
    graph.channels.resolve(plan)
    return plan


def kept_out(plan: CompressionPlan, name: str) -> list[int] | None:
    layer = plan.find(name)
    return None if layer is None else layer.kept_out


@pytest.mark.parametrize("network", [PaddedResNet, Vgg, Dense, SqueezeExcite])
def test_specs_count_all_of_the_models_work(network: type[nn.Module]) -> None:
    model = network()
    graph = trace(model, EXAMPLE)
    assert _C.dense_macs(graph.specs) == counted_macs(model, EXAMPLE)
    assert not graph.left_alone


class ReadsATable(nn.Module):
    """Layers on a table of 5 x 3 positions, whose output does not depend on the batch, as in Swin V2."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(5, 3, 2))
        self.bias = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        self.linear = nn.Linear(3 * 16 * 16, 15)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1)) + self.bias(self.table).flatten()


def test_what_runs_once_for_a_batch_counts_once() -> None:
    model = ReadsATable()
    graph = trace(model, EXAMPLE)
    assert {spec.name: spec.positions for spec in graph.specs} == {"bias.0": 15, "bias.2": 15, "linear": 1}
    assert _C.dense_macs(graph.specs) == counted_macs(model, EXAMPLE)


class InRegions(nn.Module):
    """Layers under autocast, one of them within a region of its own, and under enable_grad."""

    def __init__(self, regions: bool) -> None:
        super().__init__()
        self.regions = regions
        self.layers = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 8), (8, 12), (12, 16), (16, 8)))
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.regions):
            x = F.relu(self.layers[1](F.relu(self.layers[0](x))))
            with torch.autocast("cpu", enabled=False):
                x = F.relu(self.layers[2](x.float()))
                half = x * 0.5
        with torch.set_grad_enabled(self.regions):
            x = self.layers[3](x + half)
        return self.linear(x.mean((2, 3)))


def test_regions_of_autocast_and_grad_mode_are_followed() -> None:
    torch.manual_seed(0)
    model, plain = InRegions(regions=True), InRegions(regions=False)
    plain.load_state_dict(model.state_dict())
    graph = trace(model, EXAMPLE)
    assert [spec.name for spec in graph.specs] == ["layers.0", "layers.1", "layers.2", "layers.3", "linear"]
    assert _C.dense_macs(graph.specs) == counted_macs(plain, EXAMPLE)
    assert not graph.warnings
    plan = pruned(graph, "layers.2", [1, 4, 5])
    assert kept_out(plan, "layers.1") == [1, 4, 5]
    with torch.no_grad():
        plain.layers[2].weight[:, [0, 2, 3, *range(6, 12)]] = 0
    cctorch.apply(model, plan)
    model.regions = False
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(x), plain(x))


def test_first_convolution_and_classifier_take_no_part() -> None:
    graph = trace(PaddedResNet(), EXAMPLE)
    names = [spec.name for spec in graph.specs]
    assert [spec.name for spec in _C.participants(graph.specs)] == [n for n in names if n not in ("conv1", "linear")]
    assert [spec.name for spec in graph.specs][:2] == ["conv1", "layer1.0.conv1"]
    spec = graph.specs[-2]
    assert (spec.name, spec.kind, spec.in_channels, spec.positions) == ("layer2.1.conv2", "conv2d", 16, 64)


def test_model_and_modes_are_unchanged() -> None:
    model = PaddedResNet().train()
    model.bn1.eval()
    before = copy.deepcopy(model.state_dict())
    trace(model, EXAMPLE)
    assert model.training
    assert model.layer1[0].bn1.training
    assert not model.bn1.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_padded_shortcut_keeps_what_is_read_but_not_the_inner_filters() -> None:
    graph = trace(PaddedResNet(), EXAMPLE)
    inner = pruned(graph, "layer2.0.conv2", [0, 5, 9])
    assert kept_out(inner, "layer2.0.conv1") == [0, 5, 9]
    assert kept_out(inner, "layer2.0.bn1") == [0, 5, 9]
    assert inner.find("layer2.0.conv2").gather == []
    summed = pruned(graph, "layer2.1.conv1", [0, 1])
    assert kept_out(summed, "layer2.0.conv2") is None
    assert summed.find("layer2.1.conv1").gather == [0, 1]
    assert graph.warnings == []


def test_channels_die_through_a_padded_shortcut() -> None:
    graph = trace(PaddedResNet(), EXAMPLE)
    kept = [0, 1, 2, 4, 5, 6, 7]  # of layer1, which are channels 4 to 11 of layer2
    later = [0, 1, 2, 3, *(4 + channel for channel in kept), 12, 13, 14, 15]
    plan = CompressionPlan()
    for spec in graph.specs:
        if spec.name in ("layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1"):
            plan.layers += [LayerPlan(spec.name, spec.kind, 8, spec.out_channels, kept_in=kept)]
        elif spec.name in ("layer2.1.conv1", "linear"):
            plan.layers += [LayerPlan(spec.name, spec.kind, 16, spec.out_channels, kept_in=later)]
    graph.channels.resolve(plan)
    assert [kept_out(plan, name) for name in ("conv1", "layer1.0.conv2", "layer1.1.conv2")] == [kept] * 3
    assert [kept_out(plan, name) for name in ("layer2.0.conv2", "layer2.1.conv2")] == [later] * 2
    assert all(layer.gather == [] for layer in plan.layers)
    model = PaddedResNet().eval()
    with torch.no_grad():
        # What is dropped carries nothing, so that the smaller network computes the same.
        for layer in (model.bn1, model.layer1[0].bn2, model.layer1[1].bn2):
            layer.weight[3] = 0
        for norm in (model.layer2[0].bn2, model.layer2[1].bn2):
            norm.weight[7] = 0
        expected = model(EXAMPLE + 1)
        torch.testing.assert_close(cctorch.apply(model, plan)(EXAMPLE + 1), expected)


def test_flatten_keeps_a_filter_while_one_position_is_read() -> None:
    graph = trace(Vgg(), EXAMPLE)
    plan = pruned(graph, "hidden", [0, 27, 28, 29])
    assert kept_out(plan, "features.6") == [0, 1]


def test_concatenated_filter_dies_when_no_reader_is_left() -> None:
    graph = trace(Dense(), EXAMPLE)
    readers = {"convs.0": [0, 1], "convs.1": [1, 2, 7], "convs.2": [0, 13], "last": [0, 13, 17]}
    specs = {spec.name: spec for spec in graph.specs}
    plan = CompressionPlan(
        layers=[
            LayerPlan(name, "conv2d", specs[name].in_channels, specs[name].out_channels, kept_in=kept)
            for name, kept in readers.items()
        ]
    )
    graph.channels.resolve(plan)
    assert kept_out(plan, "stem") == [0, 1, 2]
    assert kept_out(plan, "convs.0") == [1]
    assert kept_out(plan, "convs.1") == [3]
    assert kept_out(plan, "convs.2") == [3]
    assert kept_out(plan, "norms.2") == [0, 1, 2, 7, 13]


@pytest.mark.parametrize(
    "begin", [lambda x: torch.empty(0), lambda x: x[:, :0]], ids=["without dimensions", "no channels"]
)
def test_a_concatenation_may_begin_with_an_empty_tensor(begin: Callable[[Tensor], Tensor]) -> None:
    class Collected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 1)
            self.last = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([begin(x), self.first(x)], 1))

    graph = trace(Collected(), EXAMPLE)
    assert kept_out(pruned(graph, "last", [2, 5]), "first") == [2, 5]


def test_gate_dies_with_the_channel_it_scales() -> None:
    graph = trace(SqueezeExcite(), EXAMPLE)
    specs = {spec.name: spec for spec in graph.specs}
    plan = CompressionPlan(
        layers=[
            LayerPlan(name, "conv2d", specs[name].in_channels, specs[name].out_channels, kept_in=kept)
            for name, kept in {"squeeze": [2], "project": [2, 7]}.items()
        ]
    )
    graph.channels.resolve(plan)
    for name in ("expand", "depthwise", "excite"):
        assert kept_out(plan, name) == [2, 7], name


class Awkward(nn.Module):
    """One layer of each sort that must be left alone, between two that can change."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = middle
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(F.relu(self.first(x)))).mean((2, 3))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.conv(x)))


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Borrowed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.conv.weight)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 1)
        self.b = nn.Conv2d(8, 8, 1)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


def parametrized() -> nn.Module:
    conv = nn.Conv2d(8, 8, 1)
    parametrize.register_parametrization(conv, "weight", nn.Tanh())
    return conv


def hooked() -> nn.Module:
    conv = nn.Conv2d(8, 8, 1)
    conv.register_forward_hook(lambda _, __, y: 2 * y)
    return conv


@pytest.mark.parametrize(
    ("middle", "names"),
    [
        (Twice, ["middle.conv"]),
        (lambda: Standardized(8, 8, 1), ["middle"]),
        (Borrowed, ["middle.conv2d_1"]),
        (Tied, ["middle.a", "middle.b"]),
        (parametrized, ["middle"]),
        (lambda: nn.Conv2d(8, 8, 3, groups=2), ["middle"]),
        (hooked, ["middle"]),
    ],
    ids=["shared", "computed", "functional", "tied", "parametrized", "grouped", "hooked"],
)
def test_layers_left_alone_are_named_counted_and_fixed(middle: type[nn.Module], names: list[str]) -> None:
    model = Awkward(middle())
    graph = trace(model, EXAMPLE)
    assert graph.left_alone == set(names)
    assert [sum(f"'{name}'" in warning for warning in graph.warnings) for name in names] == [1] * len(names)
    assert len(graph.warnings) == len(names)
    assert _C.dense_macs(graph.specs) == counted_macs(model, EXAMPLE)
    assert kept_out(pruned(graph, "last", [0, 1]), "first") is None


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


class HardCoded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, 8, 16, 16)


class CountedView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)).view(2, 8)[:, :, None, None]


class Shifted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 1, -1))


@pytest.mark.parametrize("amounts", [(0, 8), (8, 0), (0, 1)])
def test_channels_may_be_padded_on_one_side(amounts: tuple[int, int]) -> None:
    class Padded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.pad(x, (0, 0, 0, 0, *amounts))

    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), Padded(), nn.Conv2d(8 + sum(amounts), 4, 1), nn.Flatten(), nn.Linear(1024, 2)
    )
    graph = trace(model, EXAMPLE)
    assert graph.warnings == []
    kept = [*range(amounts[0]), *(amounts[0] + channel for channel in (2, 5)), *range(amounts[0] + 8, 8 + sum(amounts))]
    assert kept_out(pruned(graph, "2", kept), "0") == [2, 5]


class Chunked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([b, a], 1)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class NormalizedRows(nn.Module):
    """BatchNorm over the rows of images that have as many rows as channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.adaptive_avg_pool2d(x, 8).transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize(
    ("middle", "op"),
    [
        (Unknown(), "cumsum"),
        (HardCoded(), "view"),
        (CountedView(), "view"),
        (Shifted(), "pad"),
        (Chunked(), "chunk"),
        (Scaled(), "mul"),
        (nn.GroupNorm(2, 8), "group"),
        (NormalizedRows(), "batch_norm"),
    ],
)
def test_operation_that_is_not_followed_keeps_its_channels_with_one_warning(middle: nn.Module, op: str) -> None:
    graph = trace(Awkward(middle), EXAMPLE)
    assert len(graph.warnings) == 1
    assert op in graph.warnings[0]
    assert "'middle" in graph.warnings[0]
    assert kept_out(pruned(graph, "last", [0, 1]), "first") is None


class Permuted(nn.Module):
    dtype = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1).squeeze(1)
        x = F.pad(x[:, :, 1:, ::2], (1, 1)).permute(0, 2, 3, 1).contiguous()
        x = x.to(torch.float64).to(self.dtype)
        return torch.relu(x.unsqueeze(1).squeeze(1) * 2 + 1).transpose(2, 3).transpose(1, 2)


def test_channels_are_followed_through_changes_of_layout() -> None:
    graph = trace(Awkward(Permuted()), EXAMPLE)
    assert graph.warnings == []
    assert kept_out(pruned(graph, "last", [1, 6]), "first") == [1, 6]


class DataDependent(Awkward):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 1e9 else super().forward(-x)


class NeverRuns(Awkward):
    def __init__(self) -> None:
        super().__init__(nn.ReLU())
        self.unused = nn.Conv2d(8, 2, 1)


@pytest.mark.parametrize(("model", "named"), [(DataDependent(nn.ReLU()), "DataDependent"), (NeverRuns(), "unused")])
def test_model_that_cannot_be_followed_keeps_its_filters_with_one_warning(
    model: nn.Module, named: str, capfd: pytest.CaptureFixture[str]
) -> None:
    graph = trace(model, EXAMPLE)
    assert capfd.readouterr() == ("", "")
    assert len(graph.warnings) == 1
    assert named in graph.warnings[0]
    assert type(model).__name__ in graph.warnings[0]
    model.eval()
    assert _C.dense_macs(graph.specs) == counted_macs(model, EXAMPLE)
    plan = pruned(graph, "last", [0, 1])
    assert [layer.name for layer in plan.layers] == ["last"]
    assert plan.layers[0].gather == [0, 1]


def test_example_that_the_model_cannot_take_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"PaddedResNet does not run on the example of shape \(2, 4, 16, 16\)"):
        trace(PaddedResNet(), torch.zeros(1, 4, 16, 16))
    with pytest.raises(ValueError, match="expected a batch"):
        trace(PaddedResNet(), torch.zeros(3))
    flat = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="shapes cannot be multiplied"):
        trace(flat, EXAMPLE)
    assert capfd.readouterr() == ("", "")


def test_torchvision_networks_are_followed_to_the_end() -> None:
    models = pytest.importorskip("torchvision").models
    graph = trace(models.mobilenet_v2(), torch.zeros(1, 3, 32, 32))
    assert graph.warnings == []
    plan = random_plan(graph, ranks=False)
    for block in range(2, 17):
        expand, depthwise, project = (f"features.{block}.conv.{part}" for part in ("0.0", "1.0", "2"))
        read = plan.find(project).kept_in
        assert kept_out(plan, expand) == kept_out(plan, depthwise) == read, block


class HeadForTraining(nn.Module):
    """Its auxiliary head runs in training mode only, as those of GoogLeNet and Inception v3."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 10, 3, padding=1)
        self.bn = nn.BatchNorm2d(10)
        self.third = nn.Conv2d(10, 12, 3, padding=1)
        self.head = nn.Linear(12, 4)
        self.auxiliary = nn.Sequential(nn.Conv2d(10, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 4))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = F.relu(self.bn(self.second(F.relu(self.first(x)))))
        logits = self.head(F.relu(self.third(y)).mean((2, 3)))
        return (logits, self.auxiliary(y)) if self.training else logits


@pytest.mark.parametrize("training", [True, False])
def test_what_a_head_for_training_reads_stays_and_the_rest_is_followed(training: bool) -> None:
    torch.manual_seed(0)
    model, images = HeadForTraining().train(training), torch.randn(4, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    graph = trace(model, images)
    assert (graph.warnings, model.training, model.auxiliary[0].training) == ([], training, training)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [spec.name for spec in graph.specs] == ["first", "second", "third", "head"]
    assert _C.dense_macs(graph.specs) == counted_macs(model.eval(), images)
    assert len(kept_out(pruned(graph, "second", [1, 4, 5]), "first") or []) == 3
    # The auxiliary head reads all that the third layer no longer does.
    assert kept_out(pruned(graph, "third", [0, 2, 9]), "second") in (None, list(range(10)))
    plan = random_plan(graph)
    compressed = cctorch.apply(copy.deepcopy(model), plan)
    expected = projected(copy.deepcopy(model), plan)
    with torch.no_grad():
        torch.testing.assert_close(compressed(images), expected(images), rtol=1e-4, atol=1e-5)
        both = zip(compressed.train()(images), expected.train()(images), strict=True)
        for output, reference in both:
            torch.testing.assert_close(output, reference, rtol=1e-4, atol=1e-5)


def test_a_head_that_cannot_run_in_training_keeps_all_filters() -> None:
    # The head is made for 8 x 8 pixels.
    graph = trace(HeadForTraining(), torch.randn(2, 3, 6, 6))
    assert "layer 'auxiliary.0' does not run in evaluation mode, and in training it cannot be" in graph.warnings[0]
    assert kept_out(pruned(graph, "second", [1, 4]), "first") in (None, list(range(8)))


class NotExportable(nn.Module):
    """What it does depends on the values, so torch.export gives up."""

    def __init__(self) -> None:
        super().__init__()
        self.once, self.twice = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.tied, self.other = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.other.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.once(x)))
        return self.other(self.tied(x if float(x.sum()) < 1e9 else -x))


def test_repeated_and_shared_layers_of_a_model_that_cannot_be_exported_are_left_alone() -> None:
    graph = trace(NotExportable(), EXAMPLE)
    assert graph.left_alone == {"twice", "tied", "other"}
    # All that runs is counted.
    assert {spec.name: spec.positions for spec in graph.specs} == {"once": 256, "twice": 512, "tied": 256, "other": 256}
    [warning] = graph.warnings
    assert warning.startswith("NotExportable is not followed: it cannot be exported (")


class UsesItsParameters(nn.Module):
    """Not exportable either; it reads parameters of its layers outside of them, and an image without its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.transposed = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.normalized, self.shifted = nn.Linear(8, 8), nn.Linear(8, 8)
        self.single = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(x if float(x.sum()) < 1e9 else -x)
        x = F.conv_transpose2d(F.relu(self.transposed(x)), self.transposed.weight, padding=1)
        x = self.normalized(x.permute(0, 2, 3, 1)) / self.normalized.weight.norm()
        x = (self.shifted(x) - self.shifted.bias).permute(0, 3, 1, 2)
        return x + self.single(x[0])


def test_layers_whose_parameters_the_model_reads_are_left_alone_where_it_cannot_be_exported() -> None:
    torch.manual_seed(0)
    model, x = UsesItsParameters().double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    graph = trace(model, x)
    assert graph.left_alone == {"transposed", "normalized", "shifted", "single"}
    plan = random_plan(graph)
    assert [layer.name for layer in plan.layers] == ["plain"]
    with torch.no_grad():
        expected = projected(copy.deepcopy(model), plan)(x)
        torch.testing.assert_close(cctorch.apply(model, plan)(x), expected, rtol=1e-10, atol=1e-10)
