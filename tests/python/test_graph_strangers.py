"""Forward functions that read the type or attributes of layers, which those that `apply` makes lack."""

import copy
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cctorch.apply import apply
from cctorch.graph import trace
from networks import projected, random_plan
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    def __init__(self, middle: Forward, exportable: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.known, self.middle, self.exportable = (self.conv,), middle, exportable

    def forward(self, x: Tensor) -> Tensor:
        if not self.exportable:
            x = x if float(x.sum()) < 1e9 else -x
        return self.last(F.relu(self.norm(self.middle(self, F.relu(self.first(x))))))


def by_class(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    return torch.tanh(y) if isinstance(net.conv, nn.Conv2d) else y


def by_type(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    return torch.tanh(y) if type(net.conv) is nn.Conv2d else y


def by_class_of_what_is_added(net: Net, x: Tensor) -> Tensor:
    """The operators are the same; what they read is not."""
    y = net.conv(x)
    return y + (x if isinstance(net.conv, nn.Conv2d) else y)


def by_presence(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    return torch.tanh(y) if hasattr(net.conv, "weight") else y


def by_any_of_them(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    return torch.tanh(y) if any(isinstance(child, nn.Conv2d) for child in net.children()) else y


def by_type_of_weight(net: Net, x: Tensor) -> Tensor:
    return net.conv(x.to(net.conv.weight.dtype))


def by_device_of_weight(net: Net, x: Tensor) -> Tensor:
    return net.conv(x.to(net.conv.weight.device))


def by_number(net: Net, x: Tensor) -> Tensor:
    return net.conv(x) * net.conv.out_channels**-0.5


def by_stride(net: Net, x: Tensor) -> Tensor:
    return F.interpolate(net.conv(x), scale_factor=float(net.conv.stride[0]))


def by_another_name(net: Net, x: Tensor) -> Tensor:
    return net.known[0](x)


READING = [
    *(by_class, by_type, by_class_of_what_is_added, by_presence, by_type_of_weight, by_device_of_weight, by_number),
    *(by_stride, by_another_name),
]


def _check(model: nn.Module, x: Tensor, seed: int) -> set[str]:
    """Applies a random plan; gives what is left alone."""
    graph = trace(model, x)
    plan = random_plan(graph, seed)
    assert plan.layers, "nothing is compressed"
    expected = projected(copy.deepcopy(model), plan)(x)
    torch.testing.assert_close(apply(model, plan)(x), expected, rtol=1e-10, atol=1e-10)
    return graph.left_alone


@pytest.mark.parametrize("exportable", [True, False])
@pytest.mark.parametrize("middle", READING)
@torch.no_grad()
def test_layers_that_the_model_reads_are_left_alone_by_name(middle: Forward, exportable: bool) -> None:
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    model = Net(middle, exportable).double().eval()
    warning = "layer 'conv' is left alone: the model reads its type or attributes"
    found = trace(model, x).warnings
    # Where the model cannot be exported, reads of its weight count as uses of it.
    assert found.count(warning) == 1 or (not exportable and middle in (by_type_of_weight, by_device_of_weight))
    for seed in range(3):
        assert _check(Net(middle, exportable).double().eval(), x, seed) == {"conv"}


@torch.no_grad()
def test_layers_that_the_model_reads_together_are_left_alone() -> None:
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    graph = trace(Net(by_any_of_them, True).double(), x)
    assert graph.left_alone == {"first", "conv", "last"}
    assert random_plan(graph).layers == []


@pytest.mark.parametrize("exportable", [True, False])
@torch.no_grad()
def test_layers_whose_types_are_compared_are_left_alone(exportable: bool) -> None:
    def middle(net: Net, x: Tensor) -> Tensor:
        y = net.conv(x)
        return torch.tanh(y) if type(net.conv) is type(net.last) else y

    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for seed in range(3):
        assert _check(Net(middle, exportable).double().eval(), x, seed) == {"conv", "last"}


@torch.no_grad()
def test_a_normalization_whose_type_is_read_is_said_to_change_it() -> None:
    def middle(net: Net, x: Tensor) -> Tensor:
        y = net.conv(x)
        return torch.tanh(y) if type(net.norm) is nn.BatchNorm2d else y

    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    (warning,) = trace(Net(middle, True).double(), x).warnings
    assert warning.startswith(
        "layer 'norm' is left alone: the model reads its type or attributes; cctorch.apply makes it"
    )


@torch.no_grad()
def test_numbers_of_a_normalization_keep_its_channels() -> None:
    def middle(net: Net, x: Tensor) -> Tensor:
        return net.conv(x) / net.norm.num_features

    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for seed in range(3):
        _check(Net(middle, True).double().eval(), x, seed)


class Harmless(Net):
    """Reads what stays: a parameter's type wherever it is, and the encoder's own shortcut past its layers."""

    def __init__(self) -> None:
        super().__init__(lambda net, x: net.conv(x.to(next(net.parameters()).dtype)), True)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 16, batch_first=True), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(super().forward(x).flatten(2).transpose(1, 2))


@torch.no_grad()
def test_what_every_layer_has_keeps_none() -> None:
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    graph = trace(Harmless().double(), x)
    assert all("self_attn" in name for name in graph.left_alone)
    assert {"first", "conv", "last", "encoder.layers.0.linear1"} <= {spec.name for spec in graph.specs}


class Starting(nn.Module):
    started = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.started:
            x.abs().mean()
        self.started = not torch.compiler.is_exporting()
        return x


def test_what_a_first_run_sets_up_keeps_none() -> None:
    model, x = Net(lambda net, x: net.quant(net.conv(x)), True), torch.randn(2, 3, 6, 6)
    model.quant = Starting()
    assert trace(model, x).left_alone == set()


def test_tracing_leaves_the_model_as_it_was() -> None:
    model, x = Net(by_class, True), torch.randn(2, 3, 6, 6)
    before, modules, state = copy.deepcopy(model.state_dict()), list(model.modules()), torch.get_rng_state()
    trace(model, x)
    assert list(model.modules()) == modules
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("exportable", [True, False])
def test_a_model_that_cannot_be_copied_is_named(exportable: bool) -> None:
    model = Net(lambda net, x: net.conv(x), exportable)
    model.lock = threading.Lock()
    assert trace(model, torch.randn(2, 3, 6, 6)).warnings[-1] == (
        "Net cannot be copied: what it computes with numbers of channels, or types of its layers, is not found"
    )


NORMS = [weight_norm, spectral_norm, parametrizations.weight_norm, parametrizations.spectral_norm]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning", "ignore:The tensor attribute")
@pytest.mark.parametrize("norm", [*NORMS, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)])
@pytest.mark.parametrize("exportable", [True, False])
def test_layers_of_computed_weights_are_left_alone(norm: Callable[[nn.Module], nn.Module], exportable: bool) -> None:
    def made() -> Net:
        model = Net(lambda net, x: net.conv(x) * x.shape[2], exportable).double()
        model.conv, model.known = norm(model.conv), ()
        return model.eval()

    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    model = made()
    model(x)  # with gradients: the computed weight then is no leaf
    graph = trace(model, x)
    assert graph.left_alone == {"conv"}
    assert not any("cannot be copied" in warning for warning in graph.warnings)
    plan = random_plan(graph)
    with torch.no_grad():
        expected = projected(made(), plan)(x)
        torch.testing.assert_close(apply(model, plan)(x), expected, rtol=1e-10, atol=1e-10)
