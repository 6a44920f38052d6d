"""Times of layer shapes and their cache."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cctorch import _C, apply, measure
from cctorch.latency import LatencyTable, LayerShape
from cctorch.plan import CompressionPlan, LayerPlan
from fake_timer import FakeTimer, eights
from torch import nn

SHAPE = LayerShape("conv2d", 32, 24, (8, 8), (3, 3), (2, 2), (1, 1))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measure, "seconds_of_others", lambda: 0.0)
    return tmp_path / "cctorch" / "latency"


@pytest.mark.parametrize(
    ("layer", "example"),
    [
        (nn.Conv2d(16, 24, (3, 1), (2, 1), (1, 0), bias=False), (2, 16, 9, 7)),
        (nn.Conv2d(16, 16, 3, padding="same", dilation=2, groups=16), (2, 16, 9, 7)),
        (nn.Conv2d(16, 24, 3, padding=1, groups=4, padding_mode="reflect"), (2, 16, 9, 7)),
        (nn.Linear(16, 5), (2, 16)),
        (nn.Linear(16, 5, bias=False), (2, 3, 16)),
    ],
)
def test_a_shape_builds_the_layer_that_it_was_read_from(layer: nn.Module, example: tuple[int, ...]) -> None:
    shape = LayerShape.of(layer, torch.Size(example))  # type: ignore[arg-type]
    assert shape.example_shape(2) == example
    built = shape.build()
    built.load_state_dict(layer.state_dict())
    x = torch.randn(example)
    torch.testing.assert_close(built(x), layer(x))


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("gather", [[], [1, 2, 4]])
def test_a_shape_under_a_plan_is_what_apply_makes(rank: int | None, gather: list[int]) -> None:
    conv = nn.Conv2d(6, 12, 3, padding=1)
    shape = LayerShape.of(conv, torch.Size((2, 6, 5, 5)))
    layer = LayerPlan("0", "conv2d", 6, 12, kept_in=[1, 2, 4], kept_out=list(range(8)), gather=gather, rank=rank)
    applied = apply(nn.Sequential(conv), CompressionPlan("test", 0.5, [layer]))[0]
    built = shape.under(layer).build()
    describe = lambda module: [(type(m), [tuple(p.shape) for p in m.parameters()]) for m in module.modules()]  # noqa: E731
    assert describe(built) == describe(applied)
    assert built(torch.randn(shape.under(layer).example_shape(2))).shape == (2, 8, 5, 5)


def test_the_costs_of_a_layer_include_its_producers_or_its_gather() -> None:
    timer = FakeTimer()
    table = LatencyTable(batch=2, timer=timer)
    producers = [
        LayerShape("conv2d", 16, 32, (8, 8), (3, 3), (1, 1), (1, 1)),
        LayerShape("batch_norm2d", 32, 32, (8, 8)),
    ]
    costs = table.cost_table(SHAPE, producers)
    assert costs.channels == [4, 8, 12, 16, 20, 24, 28, 32]
    assert costs.ranks == [8, 16]
    assert costs.multiple == 4  # 24 outputs are less than four times 8
    launch, positions = timer.launch, 2 * 4 * 4
    for count, cost in zip(costs.channels, costs.pruned, strict=True):
        own = launch + 1e-10 * positions * eights(count) * 24 * 9
        fed = launch + 1e-10 * 128 * 16 * eights(count) * 9 + launch / 4 + 1e-9 * 128 * count
        assert cost == pytest.approx(own + fed, rel=1e-12)
    assert costs.factored[11] == pytest.approx(
        2 * launch + 1e-10 * positions * 16 * (24 * 9 + 24) + launch + 1e-10 * 128 * 16 * 24 * 9
        + launch / 4 + 1e-9 * 128 * 24, rel=1e-12
    )  # fmt: skip
    alone = table.cost_table(SHAPE)
    for count, cost in zip(alone.channels, alone.pruned, strict=True):
        gather = 0 if count == 32 else launch + 4e-9 * positions * count
        assert cost == pytest.approx(launch + 1e-10 * positions * eights(count) * 24 * 9 + gather, rel=1e-12)
    wide = LayerShape("conv2d", 64, 64, (8, 8), (3, 3), (1, 1), (1, 1))
    assert table.cost_table(wide).multiple == 8
    narrow = LayerShape("conv2d", 3, 64, (8, 8), (3, 3), (1, 1), (1, 1))
    assert table.cost_table(narrow).channels == [3]
    assert table.cost_table(SHAPE, units="channels").ranks == []
    assert table.cost_table(SHAPE, units="singular_values").channels == [32]


def test_what_was_timed_is_remembered_for_the_same_conditions_only(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_C, "keeps_freed_memory", lambda: False)
    timer = FakeTimer()
    seconds = LatencyTable(batch=4, timer=timer).seconds(SHAPE)
    again = FakeTimer(launch=1.0)
    assert LatencyTable(batch=4, timer=again).seconds(SHAPE) == seconds
    assert again.calls == 0
    for other in (
        LatencyTable(batch=8, timer=again),
        LatencyTable(batch=4, threads=61, timer=again),
        LatencyTable(batch=4, dtype=torch.float64, timer=again),
        LatencyTable(batch=4, layout=torch.channels_last, timer=again),
    ):
        assert other.seconds(SHAPE) > 1
    monkeypatch.setattr(_C, "keeps_freed_memory", lambda: True)
    assert LatencyTable(batch=4, timer=again).seconds(SHAPE) > 1
    assert len(list(cache.iterdir())) == 6


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": 99, "conditions": {}, "seconds": {}}', "negative", "elsewhere"]
)
def test_a_damaged_cache_is_ignored_with_a_warning_and_replaced(cache: Path, text: str) -> None:
    table = LatencyTable(timer=FakeTimer())
    seconds = table.seconds(SHAPE)
    if text == "negative":
        text = table.path.read_text().replace(str(seconds), str(-seconds))
    if text == "elsewhere":
        text = table.path.read_text().replace('"batch": 1', '"batch": 2')
    table.path.write_text(text)
    with pytest.warns(UserWarning, match="is ignored"):
        fresh = LatencyTable(timer=FakeTimer())
    assert fresh.seconds(SHAPE) == seconds
    assert json.loads(table.path.read_text())["seconds"] == {SHAPE.key: seconds}


def test_a_cache_that_cannot_be_written_costs_a_warning_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="is ignored"):
        table = LatencyTable(timer=FakeTimer())
    with pytest.warns(UserWarning, match="can't be written"):
        seconds = table.seconds(SHAPE)
    assert seconds > 0


def test_times_of_a_busy_machine_are_used_with_a_warning_and_not_remembered(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "seconds_of_others", itertools.count(0.0, 10.0).__next__)
    table = LatencyTable(timer=FakeTimer())
    with pytest.warns(UserWarning, match=r"kept \d+\.\d processors busy while layers were timed"):
        table.seconds(SHAPE)
    monkeypatch.setattr(measure, "seconds_of_others", lambda: 0.0)
    table.seconds(LayerShape("linear", 8, 8, ()))
    assert not cache.exists()


def test_an_interrupted_timing_keeps_what_was_timed() -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        assert (stage, total) == ("latency table", 2)
        if done == 1:
            raise KeyboardInterrupt

    shapes = [SHAPE, LayerShape("linear", 8, 8, ())]
    with pytest.raises(KeyboardInterrupt):
        LatencyTable(timer=FakeTimer()).time(shapes, interrupt)
    again = FakeTimer()
    LatencyTable(timer=again).time(shapes)
    assert again.calls == 1


def test_timing_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    LatencyTable(timer=FakeTimer()).seconds(SHAPE)
    assert torch.equal(torch.rand(3), expected)


def test_bad_conditions_are_named() -> None:
    with pytest.raises(ValueError, match="batch = 0"):
        LatencyTable(batch=0)
    with pytest.raises(ValueError, match="multiple = -8"):
        LatencyTable(multiple=-8)


def test_models_take_turns_and_their_modes_stay() -> None:
    order: list[str] = []
    models = [nn.Linear(3, 3).train(), nn.Linear(3, 3).train()]
    for name, model in zip("ab", models, strict=True):
        model.register_forward_hook(lambda m, i, o, name=name: order.append(name + str(m.training)))  # type: ignore[misc]
    runs = measure.interleaved(models, torch.randn(2, 3), repeats=6, warmup=2, seconds=60)
    assert order == ["aFalse", "bFalse"] * 8
    assert [len(of_model) for of_model in runs] == [6, 6]
    assert all(model.training for model in models)
    runs = measure.interleaved(models, torch.randn(2, 3), repeats=100, seconds=0)
    assert [len(of_model) for of_model in runs] == [5, 5]


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no processor times on this system")
def test_the_processor_time_of_another_process_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    burn = "import time; end = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
    before = measure.seconds_of_others()
    subprocess.run([sys.executable, "-c", burn], check=True)
    assert measure.seconds_of_others() - before > 0.4
