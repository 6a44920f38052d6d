"""Forward functions that compute with numbers of channels: in the exported graph these are constants."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cctorch._C import CompressionPlan, LayerPlan
from cctorch.apply import apply
from cctorch.graph import trace
from networks import projected, random_plan
from torch import Tensor, nn


class Attention(nn.Module):
    """As in non-local networks: the result takes the shape of the input, by numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.project = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.flatten(2).transpose(1, 2)
        y = F.scaled_dot_product_attention(self.query(y), self.key(y), self.value(y))
        return self.project(y).transpose(1, 2).reshape(n, c, h, w)


class PerChannel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.shape[1]


class PaddedTo16(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, 16 - x.size(1)))


class ZerosTo16(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.zeros(x.shape[0], 16 - x.shape[1], *x.shape[2:], dtype=x.dtype)], 1)


class OneForMany(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) if x.shape[1] > 4 else torch.relu(x)


class ByAttribute(nn.Module):
    def __init__(self, attribute: str) -> None:
        super().__init__()
        self.conv, self.attribute = nn.Conv2d(8, 8, 1), attribute

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * getattr(self.conv, self.attribute) ** -0.5


class Net(nn.Module):
    def __init__(self, middle: Callable[[], nn.Module], between: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.middle = nn.Sequential(nn.ReLU(), middle())
        self.third, self.last = nn.Conv2d(between, 8, 3, padding=1), nn.Conv2d(8, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.second(F.relu(self.first(x))))
        return self.last(F.relu(self.third(x)))


MODULES = [(Attention, 8), (PerChannel, 8), (PaddedTo16, 16), (ZerosTo16, 16), (OneForMany, 8)]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("middle", "between"), MODULES)
@torch.no_grad()
def test_channels_that_are_counted_stay_with_one_warning(
    middle: Callable[[], nn.Module], between: int, seed: int
) -> None:
    model, x = Net(middle, between).double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    graph = trace(model, x)
    plan = random_plan(graph, seed)
    expected = projected(copy.deepcopy(model), plan)(x)
    apply(model, plan)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    counted = [warning for warning in graph.warnings if "numbers of channels" in warning]
    name = middle.__name__  # type: ignore[attr-defined]
    assert counted == [f"{name} in 'middle.1' computes with numbers of channels: all channels in it stay"]
    assert _narrowed(plan) == {"first", "third"}


def _narrowed(plan: CompressionPlan) -> set[str]:
    return {
        layer.name for layer in plan.layers if "middle" not in layer.name and len(layer.kept_out) < layer.out_channels
    }


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))
        self.scales = nn.ModuleList(PerChannel() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for conv, scale in zip(self.convs, self.scales, strict=False):
            x = scale(conv(x))
        return self.convs[2](x)


def test_all_modules_of_the_kind_share_the_warning() -> None:
    graph = trace(Repeated(), torch.randn(1, 8, 4, 4))
    assert graph.warnings == [
        "PerChannel in 'scales.0', 'scales.1' computes with numbers of channels: all channels in it stay"
    ]


class InTheModelItself(Repeated):
    def forward(self, x: Tensor) -> Tensor:
        x = self.convs[0](x)
        return self.convs[2](self.convs[1](x) / x.shape[1])


def test_the_models_own_arithmetic_is_named_too() -> None:
    graph = trace(InTheModelItself(), torch.randn(1, 8, 4, 4))
    assert graph.warnings == ["InTheModelItself computes with numbers of channels: all channels in it stay"]


class Harmless(nn.Module):
    """Reads sizes, but computes the same however many channels there are."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        assert c > 0
        return F.interpolate(x * (h * w), size=(2 * h, 2 * w)).view(n, -1, 1, 1)


def test_sizes_that_are_read_for_nothing_keep_no_channels() -> None:
    graph = trace(Net(Harmless, 128), torch.randn(1, 3, 2, 2))
    assert graph.warnings == []
    [third] = [spec for spec in graph.specs if spec.name == "third"]
    plan = CompressionPlan(layers=[LayerPlan(third.name, third.kind, 128, 8, kept_in=list(range(32)))])
    graph.channels.resolve(plan)
    assert _narrowed(plan) == {"second"}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("attribute", ["out_channels", "in_channels"])
@torch.no_grad()
def test_layers_whose_sizes_the_model_reads_are_left_alone(attribute: str, seed: int) -> None:
    model, x = Net(lambda: ByAttribute(attribute), 8).double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    graph = trace(model, x)
    assert graph.warnings == ["layer 'middle.1.conv' is left alone: the model reads its type or attributes"]
    plan = random_plan(graph, seed)
    expected = projected(copy.deepcopy(model), plan)(x)
    torch.testing.assert_close(apply(model, plan)(x), expected, rtol=1e-10, atol=1e-10)
    assert _narrowed(plan) == {"first", "third"}
