"""A budget of latency on a device whose times are arithmetic."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cctorch import CompressionPlan, apply, collaborative, compress, latency_budget, measure
from cctorch.latency import LatencyTable
from fake_timer import FakeTimer
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(32) for _ in range(4)))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measure, "seconds_of_others", lambda: 0.0)


def run(timer: FakeTimer, **options: Any) -> tuple[nn.Module, collaborative.Compression]:
    torch.manual_seed(0)
    model = Net()
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(10, (8,)))]
    table = LatencyTable(batch=4, timer=timer)
    found = compress(model, batches, batches[0][0], budget="latency", latency_table=table, **options)
    return model, found


def seconds(timer: FakeTimer, model: nn.Module) -> float:
    return timer([model], torch.randn(4, 3, 8, 8))[0][0]


@pytest.mark.parametrize("target", [0.2, 0.4, 0.5])
def test_the_model_takes_the_time_that_was_asked_for(target: float) -> None:
    timer = FakeTimer(launch=1e-6, rest=2e-5)
    model, found = run(timer, target=target)
    assert found.latency is not None
    smaller = apply(copy.deepcopy(model), found.plan)
    ratio = seconds(timer, smaller) / seconds(timer, model)
    assert found.latency.ratio == pytest.approx(ratio, rel=1e-9)
    # Times add up on this device, so that the prediction is exact.
    assert found.latency.predicted_ratio == pytest.approx(ratio, rel=1e-6)
    assert 1 - target - 0.05 < ratio <= 1 - target
    assert found.plan.target == target
    for layer in found.plan.layers:
        assert len(layer.kept_in) % 8 == 0 or layer.kind != "conv2d" or layer.name == "stem"
        assert layer.rank is None or layer.rank % 8 == 0
    assert smaller(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_inner_channels_go_without_a_gather_where_calls_are_dear() -> None:
    """A gather or a second factor costs a launch, more than it can save here; filters that die cost nothing."""
    _, found = run(FakeTimer(launch=2e-4), target=0.1)
    assert all(layer.rank is None and not layer.gather for layer in found.plan.layers)
    narrowed = [layer.name for layer in found.plan.layers if layer.kind == "conv2d" and len(layer.kept_in) < 32]
    assert set(narrowed) - {"stem"} <= {f"blocks.{i}.conv2" for i in range(4)}
    assert len(narrowed) > 1


def test_what_the_prediction_was_off_by_corrects_the_next_plan() -> None:
    timer = FakeTimer(launch=1e-7, friction=1.08)
    model, found = run(timer, target=0.4, units="singular_values", residual_branches=False)
    assert found.latency is not None
    assert len(found.latency.rounds) > 1
    assert found.latency.rounds[0][1] > 0.6
    assert seconds(timer, apply(copy.deepcopy(model), found.plan)) / seconds(timer, model) <= 0.6


def test_the_search_goes_on_below_a_plan_that_was_a_little_too_slow() -> None:
    """Plans are steps. The one predicted at 0.55 measures 0.601: what is asked for next is below it, not beside it."""
    slow = latency_budget.Latency(1, 1.0, 0.601, ratio=0.601, predicted_ratio=0.55)
    assert latency_budget._next_aim([slow], wanted=0.6) < 0.55
    slower = latency_budget.Latency(1, 1.0, 0.7, ratio=0.7, predicted_ratio=0.5)
    assert latency_budget._next_aim([slow, slower], wanted=0.6) < 0.5
    # The secant of these two, the slower one predicted to be the faster, leads between them.
    assert latency_budget._next_aim([slower, slow], wanted=0.6) < 0.5
    # Two that took the same time say nothing of how far to go.
    same = latency_budget.Latency(1, 1.0, 0.5, ratio=0.5001, predicted_ratio=0.6)
    fast = latency_budget.Latency(1, 1.0, 0.5, ratio=0.5, predicted_ratio=0.5)
    assert 0.6 < latency_budget._next_aim([fast, same], wanted=0.6) < 0.92
    assert 0.5 < latency_budget._next_aim([slow, fast], wanted=0.6) < 0.55


@pytest.mark.parametrize(
    ("measured", "tried", "chosen"),
    [
        ((0.3, 0.595, 0.2), 2, 0.595),  # faster than asked for: the next plan is tried; near enough: none
        ((0.7, 0.3, 0.4, 0.35, 0.59), 4, 0.4),  # of those that are fast enough, the one that gives up least
    ],
)
def test_the_nearest_of_the_plans_that_are_fast_enough(
    measured: tuple[float, ...], tried: int, chosen: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios = iter(measured)

    def stated(*arguments: Any) -> latency_budget.Latency:
        ratio = next(ratios)
        return latency_budget.Latency(4, 1.0, ratio, ratio, predicted_ratio=arguments[-1])

    monkeypatch.setattr(latency_budget, "_measured", stated)
    monkeypatch.setattr(latency_budget, "_ROUNDS", 4)
    _, found = run(FakeTimer(launch=1e-7), target=0.4, units="singular_values")
    assert found.latency is not None
    assert found.latency.ratio == chosen
    assert [ratio for _, ratio in found.latency.rounds] == list(measured[:tried])
    warned = [warning for warning in found.warnings if "no plan tried is closer" in warning]
    assert bool(warned) == (chosen < 0.59)


def test_no_rank_is_kept_that_saves_no_time() -> None:
    timer = FakeTimer(launch=1e-6, rest=2e-5)
    model, found = run(timer, target=0.6)
    for layer in found.plan.layers:
        if layer.rank is not None:
            exact = CompressionPlan.from_json(found.plan.to_json()).layers
            next(other for other in exact if other.name == layer.name).rank = None
            without = apply(copy.deepcopy(model), CompressionPlan(layers=exact))
            assert seconds(timer, apply(copy.deepcopy(model), found.plan)) < seconds(timer, without), layer.name


@pytest.mark.parametrize("channels", [1, 3])
def test_layers_are_timed_in_the_layout_of_the_model(channels: int) -> None:
    model = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.Conv2d(8, 8, 3))
    example = torch.randn(2, channels, 8, 8)
    assert latency_budget.table_for(model, example, 4).layout == torch.contiguous_format
    model = model.to(memory_format=torch.channels_last)
    assert latency_budget.table_for(model, example, 4).layout == torch.channels_last


@pytest.mark.parametrize(("slower", "warned"), [(1.05, False), (1.5, True)])
def test_a_table_of_slower_times_is_named(slower: float, warned: bool) -> None:
    class ThenSlower(FakeTimer):
        """Layers alone take longer than in the model: they were timed when the device was slower."""

        def __call__(self, modules: Any, x: Tensor) -> list[list[float]]:
            whole = len(modules) > 1 or isinstance(modules[0], Net)
            return [[t * (1 if whole else slower) for t in times] for times in super().__call__(modules, x)]

    _, found = run(ThenSlower(launch=1e-6), target=0.3)
    said = [warning for warning in found.warnings if "time layers anew" in warning]
    assert len(said) == warned
    if warned:
        path = re.search(r"delete (\S+\.json) to", said[0])
        assert path is not None
        assert Path(path[1]).is_file()


def test_a_target_out_of_reach_states_what_was_reached() -> None:
    timer = FakeTimer(launch=1e-6, rest=3e-3)
    reached = r"batch 4: the fastest plan \(of 1\) takes (0\.\d+) of the dense time, wanted 0\.300"
    with pytest.raises(ValueError, match=reached) as caught:
        run(timer, target=0.7)
    stated = float(re.search(reached, str(caught.value))[1])  # type: ignore[index]
    _, found = run(timer, target=1 - stated - 0.001)
    assert found.latency is not None
    assert found.latency.ratio == pytest.approx(stated, abs=1e-3)


def test_a_device_on_which_nothing_smaller_is_faster_is_an_error() -> None:
    class Flat(FakeTimer):
        def __call__(self, modules: Any, x: Tensor) -> list[list[float]]:
            return [[1.0]] * len(modules)

    with pytest.raises(ValueError, match="no smaller form of any layer is faster"):
        run(Flat(), target=0.3)


def test_excluded_layers_keep_inputs_and_rank() -> None:
    timer = FakeTimer(launch=1e-6)
    _, found = run(timer, target=0.2, exclude=["blocks.0.*", "blocks.3.conv2"])
    for name in ("blocks.0.conv1", "blocks.0.conv2", "blocks.3.conv2"):
        layer = found.plan.find(name)
        assert layer is None or (len(layer.kept_in) == 32 and layer.rank is None)
    with pytest.raises(ValueError, match=r"exclude = 'layer9\.\*' names no layer"):
        run(timer, exclude=["layer9.*"])


def test_bounded_layers_are_no_faster_than_their_bound() -> None:
    timer = FakeTimer(launch=1e-6)
    _, free = run(timer, target=0.4, residual_branches=False)
    _, bounded = run(timer, target=0.4, bounds={"blocks.*": 0.9, "blocks.2.conv?": 0.1})
    kept = [len(found.plan.find("blocks.2.conv2").kept_in) for found in (free, bounded)]
    assert kept[0] < 28 <= kept[1]


def test_the_default_budget_times_nothing_and_knows_no_latency() -> None:
    torch.manual_seed(0)
    model = Net()
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(10, (8,)))]
    by_macs = compress(model, batches, batches[0][0], target=0.4)
    assert by_macs.latency is None
    by_parameters = compress(model, batches, batches[0][0], target=0.4, budget="parameters")
    weights = lambda m: sum(p.numel() for p in m.parameters() if p.dim() > 1)  # noqa: E731
    before = weights(model)
    assert weights(apply(model, by_parameters.plan)) <= 0.6 * before
