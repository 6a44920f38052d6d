"""Kept sets that all readers of a stream share."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from cctorch import _C, CompressionPlan, apply, collaborative, compress, latency_budget, measure
from cctorch.graph import trace
from cctorch.latency import LatencyTable
from cctorch.streams import Narrowed, streams
from fake_timer import FakeTimer
from test_latency_budget import Block
from torch import Tensor, nn


class Stage(nn.Module):
    """A stream of 32 channels with three writers, read by two blocks and the convolution behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.Sequential(Block(32), Block(32))
        self.down = nn.Conv2d(32, 48, 3, stride=2)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.blocks(self.stem(x))).relu().mean((2, 3)))


READERS = ["blocks.0.conv1", "blocks.1.conv1", "down"]
WRITERS = ["stem", "blocks.0.conv2", "blocks.1.conv2"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measure, "seconds_of_others", lambda: 0.0)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = Stage().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.bias, -1, 1)
    return model


def searched(model: nn.Module, importance: float = 1.0) -> list[_C.SolverLayer]:
    """Every layer between the first and the last, with a table that only says which counts are wanted."""
    specs = trace(model, torch.randn(2, 3, 8, 8)).specs
    layers = []
    for spec in _C.participants(specs):
        weight = model.get_submodule(spec.name).weight.detach()
        table = _C.CostTable([8, spec.in_channels], [], [1.0, 2.0], [], 8)
        layers.append(_C.SolverLayer(spec, weight, torch.randn_like(weight), table, importance=importance))
    return layers


def columns(layer: _C.SolverLayer) -> Tensor:
    """(E1) of each input channel of the whole layer."""
    return (layer.weight * layer.gradient).double().square().sum((0, 2, 3))


def test_channels_are_ranked_by_what_their_readers_lose(model: nn.Module) -> None:
    graph, layers = trace(model, torch.randn(2, 3, 8, 8)), searched(model)
    by_name = {layer.spec.name: layer for layer in layers}
    by_name["down"].importance = 5.0
    [stream] = streams(graph, layers, set(), dict.fromkeys(by_name, 8))
    assert stream.readers == READERS
    assert stream.widths == [8, 16, 24]
    shares = [columns(by_name[name]) / columns(by_name[name]).sum() for name in READERS]
    need = shares[0] + shares[1] + 5 * shares[2]
    assert stream.order == sorted(range(32), key=lambda c: -float(need[c]))
    assert stream.kept(3) == sorted(stream.order[:3])
    assert streams(graph, layers, {"down"}, dict.fromkeys(by_name, 8)) == []
    assert streams(graph, layers[:-1], set(), dict.fromkeys(by_name, 8)) == []


@pytest.mark.parametrize("factors", ["channel", "spatial"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_plan_of_the_narrowed_network_is_one_of_the_whole_network(
    model: nn.Module, layout: torch.memory_format, factors: Literal["channel", "spatial"]
) -> None:
    """Carried out at once, it gives what it gives on the model that was narrowed before."""
    model = model.to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(2, 3, 8, 8)
    graph, layers = trace(model, x), searched(model)
    kept = [1, 2, 3, 5, 8, 13, 21, 30]
    narrowed = Narrowed(graph, dict.fromkeys(READERS, kept))
    narrow_model = apply(copy.deepcopy(model), narrowed.plan)
    left = {layer.spec.name: layer for layer in narrowed.layers(layers)}
    for name in (*READERS, *WRITERS[1:]):
        assert torch.equal(left[name].weight, narrow_model.get_submodule(name).weight), name
    assert [left[name].spec.in_channels for name in READERS] == [8, 8, 8]
    assert [left[name].spec.out_channels for name in WRITERS[1:]] == [8, 8]

    plan = CompressionPlan()
    narrow_graph = trace(narrow_model, x)
    chosen = [narrow_graph.channels.unchanged(name) for name in left]
    for layer in chosen:
        layer.kept_in = layer.kept_in[1:] if layer.name != "down" else layer.kept_in[::2]
        if layer.name == "blocks.1.conv1":
            layer.rank, layer.layout = 6, factors
    plan.layers = chosen
    on_narrow = CompressionPlan.from_json(plan.to_json())
    narrow_graph.channels.resolve(on_narrow)
    narrowed.widen(plan)
    graph.channels.resolve(plan)
    expected, found = apply(narrow_model, on_narrow), apply(copy.deepcopy(model), plan)
    torch.testing.assert_close(found(x), expected(x), rtol=1e-5, atol=1e-6)
    assert [len(layer.gather) for layer in plan.layers if layer.name == "down"] == [4]


def test_what_a_layer_loses_with_the_stream_is_counted(model: nn.Module) -> None:
    layers = searched(model)
    narrowed = Narrowed(trace(model, torch.randn(2, 3, 8, 8)), {name: list(range(8)) for name in READERS})
    for whole, narrow in zip(layers, narrowed.layers(layers), strict=True):
        rows = range(8) if whole.spec.name in WRITERS else range(whole.spec.out_channels)
        product = (whole.weight.double() * whole.gradient.double())[list(rows)]
        lost = product[:, 8:].square().sum() if whole.spec.name in READERS else 0.0
        assert narrow.lost == pytest.approx(float(lost), rel=1e-12), whole.spec.name
        assert narrow.importance == whole.importance
        if narrow is not whole:
            assert narrow.cost_before == 2.0


def run(timer: FakeTimer, model: nn.Module, **options: Any) -> collaborative.Compression:
    torch.manual_seed(1)
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(10, (8,)))]
    table = LatencyTable(batch=4, timer=timer)
    return compress(
        model, batches, batches[0][0], budget="latency", latency_table=table, residual_branches=False, **options
    )


class DearGathers(FakeTimer):
    """Calls cost nothing, a gather as much as a layer: streams can only become narrower as a whole."""

    def _part(self, layer: nn.Module, x: Tensor, y: Tensor) -> float:
        return super()._part(layer, x, y) + (1e-3 if type(layer).__name__ == "GatherChannels" else 0.0)


def test_a_stream_becomes_narrower_where_gathers_are_dear(model: nn.Module) -> None:
    timer = DearGathers(launch=0.0, rest=1e-4)
    said: list[tuple[str, int, int]] = []
    found = run(timer, model, target=0.6, units="channels", progress=lambda *state: said.append(state))
    assert [state for state in said if state[0] == "shared streams"] == [("shared streams", i, 3) for i in range(4)]
    layers = {layer.name: layer for layer in found.plan.layers}
    kept = [layers[name].kept_in for name in READERS]
    assert kept[0] == kept[1] == kept[2]
    assert len(kept[0]) < 32
    assert not any(layer.gather for layer in found.plan.layers)
    assert all(layers[name].kept_out == kept[0] for name in WRITERS)
    assert found.latency is not None
    assert found.latency.shared == READERS
    assert found.latency.predicted_ratio == pytest.approx(found.latency.ratio, rel=1e-6)
    assert 0.35 < found.latency.ratio <= 0.4
    smaller = apply(copy.deepcopy(model), found.plan)
    ratio = timer([smaller], torch.randn(4, 3, 8, 8))[0][0] / timer([model], torch.randn(4, 3, 8, 8))[0][0]
    assert found.latency.ratio == pytest.approx(ratio)


def test_readers_gather_what_they_keep_where_that_gives_up_less(model: nn.Module) -> None:
    """Two readers that need different channels: a set that both share has to be wider."""
    with torch.no_grad():
        for name, needed in (("blocks.0.conv1", slice(0, 16)), ("blocks.1.conv1", slice(16, 32))):
            weight = model.get_submodule(name).weight
            rest = torch.ones(32, dtype=torch.bool)
            rest[needed] = False
            weight[:, rest] *= 1e-4
    timer = FakeTimer(launch=0.0)
    found = run(timer, model, target=0.25, units="channels", exclude=["blocks.*.conv2"])
    layers = {layer.name: layer for layer in found.plan.layers}
    assert set(layers["blocks.0.conv1"].kept_in) <= set(range(16))
    assert set(layers["blocks.1.conv1"].kept_in) <= set(range(16, 32))
    assert layers["blocks.0.conv1"].gather
    assert layers["blocks.1.conv1"].gather
    assert found.latency is not None
    assert not found.latency.shared


def test_it_gives_up_less_than_the_search_without(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by (E1) of both plans' weights over all of the layer's, as the objective of (E2) has it."""

    def objective(found: collaborative.Compression) -> float:
        total = 0.0
        smaller = {layer.name: layer for layer in found.plan.layers}
        for name, gradient in found.gradients.items():
            dense = model.get_submodule(name).weight.detach()
            left = dense.clone()
            dropped = sorted(set(range(dense.shape[1])) - set(smaller[name].kept_in))
            left[:, dropped] = 0
            rows = smaller[name].kept_out
            lost = ((left - dense) * gradient)[rows].double().square().sum()
            total += seconds[name] * float(lost / (dense * gradient)[rows].double().square().sum())
        return total

    seconds: dict[str, float] = {}
    hooked, timer = copy.deepcopy(model), FakeTimer(launch=0.0)
    for name, module in hooked.named_modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(lambda m, x, y, name=name: seconds.update({name: timer._part(m, x[0], y)}))
    hooked(torch.randn(4, 3, 8, 8))
    for block in ("blocks.0", "blocks.1"):
        # With its inputs go the filters of the layers before it.
        seconds[f"{block}.conv2"] += seconds[f"{block}.conv1"] + seconds[f"{block}.bn1"]
    shared = run(DearGathers(launch=0.0), model, target=0.6, units="channels")
    monkeypatch.setattr(latency_budget, "streams", lambda *_: [])
    alone = run(DearGathers(launch=0.0), model, target=0.6, units="channels")
    assert objective(shared) < objective(alone)


@pytest.mark.parametrize("units", ["both", "singular_values"])
@pytest.mark.parametrize("timer", [FakeTimer(launch=0.0), DearGathers(launch=0.0)])
def test_factors_of_one_dimensional_kernels(model: nn.Module, timer: FakeTimer, units: Any) -> None:
    found = run(timer, model, target=0.6, units=units, layout="spatial")
    factored = {layer.name: layer for layer in found.plan.layers if layer.rank}
    layouts = {layer.layout for name, layer in factored.items() if name != "down"}
    assert layouts == {"spatial"} or (not layouts and units == "both")
    assert "down" not in factored or factored["down"].layout == "channel"  # it strides
    assert found.latency is not None
    assert found.latency.predicted_ratio == pytest.approx(found.latency.ratio, rel=1e-6)
    assert 0.35 < found.latency.ratio <= 0.4
    smaller = apply(copy.deepcopy(model), found.plan)
    ratio = timer([smaller], torch.randn(4, 3, 8, 8))[0][0] / timer([model], torch.randn(4, 3, 8, 8))[0][0]
    assert found.latency.ratio == pytest.approx(ratio)


@pytest.mark.parametrize(
    "options", [{"units": "singular_values", "target": 0.6}, {"exclude": ["down"]}, {"bounds": {"blocks.0.conv1": 0.9}}]
)
def test_streams_stay_whole_where_a_reader_must_keep_its_inputs(model: nn.Module, options: dict[str, Any]) -> None:
    found = run(DearGathers(launch=0.0), model, **{"target": 0.3, **options})
    layers = {layer.name: layer for layer in found.plan.layers}
    assert all(len(layers[name].kept_out) == 32 for name in WRITERS if name in layers)
