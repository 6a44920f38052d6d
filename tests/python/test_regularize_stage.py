"""The `regularize` stage of a run: events while it trains, their trace, and what an interruption leaves."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cctorch
import pytest
import torch
from cctorch import (
    CompressionPlan,
    branches,
    data,
    datasets,
    measure,
    measure_stage,
    models,
    repair_stage,
    report,
    store,
    trainer,
)
from cctorch import run as driver
from cctorch.config import Config, ConfigError, parse_config
from cctorch.graph import trace
from cctorch.nn import LowRankConv2d
from cctorch.regularize_stage import RegularizeStage, describe, located, select
from cctorch.report import page
from cctorch.run import Summary
from cctorch.status import status
from tiny_run import deliverable, run_quietly, staged, tree, write_dataset
from torch import nn

# 80 training images in batches of 32: 3 steps in each of 2 epochs.
STAGE = {
    "epochs": 2,
    "batch_size": 32,
    "lr": 0.02,
    "q": [{"kind": "magnitude_pruning", "sparsity": 0.75, "scope": "layer"}],
    "frequency": {"kind": "constant", "period": 4},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "render", lambda record: record.config)


def _config(data: Path, output: Path, *, compress: bool = False, **changes: Any) -> Config:
    return staged(data, output, compress=compress, regularize={**STAGE, **changes})


def test_the_run_ends_in_compressed_form(dataset: Path, tmp_path: Path) -> None:
    settings = _config(dataset, tmp_path)
    summary = run_quietly(settings)
    found = summary.regularized
    assert found is not None
    assert [entry[:2] for entry in found["trace"]] == [[4, 4], [6, 2]]
    assert found["top1"] == summary.after.top1
    weights = deliverable(settings)
    names = [entry["name"] for entry in found["parameters"]]
    assert names == [name for name in weights if ".conv" in name and name.endswith(".weight")]
    for entry in found["parameters"]:
        zeros = int((weights[entry["name"]] == 0).sum())
        assert zeros == weights[entry["name"]].numel() * 3 // 4
        assert entry["sparsity"] == pytest.approx(zeros / weights[entry["name"]].numel())
    assert int((weights["conv1.weight"] == 0).sum()) == 0
    assert found["dense_bits"] == 32 * sum(weights[name].numel() for name in names)
    assert found["bits"] < found["dense_bits"]
    assert summary.top1_compressed is None
    assert summary.before.macs == summary.after.macs == summary.nominal_macs
    events = [json.loads(line) for line in (settings.folder / "metrics.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["epoch", "epoch", "dense", "epoch", "epoch", "regularized"]
    assert [event["events"] for event in events[3:5]] == [0, 1]
    assert events[3]["update"] is None
    assert events[4]["update"] == pytest.approx(found["trace"][0][2])
    assert (events[3]["bits"], events[4]["bits"]) == (None, found["trace"][0][3])


def test_events_follow_fine_tuning_of_a_smaller_network(dataset: Path, tmp_path: Path) -> None:
    settings = _config(dataset, tmp_path, compress=True)
    summary = run_quietly(settings)
    assert summary.regularized is not None
    assert summary.after.macs < summary.before.macs
    dense, _ = store.load_model(settings.folder / "checkpoints" / "dense.safetensors")
    model, _ = store.load_model(settings.folder / "checkpoints" / "compressed.safetensors")
    names = select(dense, None)
    regularized = located(model, names)
    # Every weight has its place, also behind a gather, and as two factors.
    assert {name.rpartition(".")[0] for name, _ in regularized} == {name.rpartition(".")[0] for name in names}
    assert any(name.endswith(".second") for name, _ in regularized)
    assert [entry["name"] for entry in summary.regularized["parameters"]] == [name for name, _ in regularized]
    for name, parameter in regularized:
        assert describe(parameter)["sparsity"] == pytest.approx(0.75, abs=1 / parameter.numel()), name


def test_of_a_removed_branch_only_what_is_left_is_regularized() -> None:
    dense = models.create("resnet8")
    graph = trace(dense, torch.zeros(1, 3, 8, 8))
    plan = CompressionPlan()
    branches.remove(plan, [branch for branch in graph.branches if branch.key == "layer2.0.conv2"], graph)
    graph.channels.resolve(plan)
    model = cctorch.apply(copy.deepcopy(dense), plan)
    left = [name for name, _ in model.named_parameters()]
    assert "layer2.0.bn2.bias" in left
    for patterns in (None, ["*"]):
        names = select(dense, patterns)
        assert [name for name, _ in located(model, names)] == [name for name in names if name in left]


def test_accuracies_of_the_epochs_are_as_if_at_an_event(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    original: Callable[..., float] = measure.accuracy

    def spy(model: nn.Module, batches: Any, **options: Any) -> float:
        seen.append(describe(model.get_submodule("layer1.0.conv1").weight)["sparsity"])  # type: ignore[arg-type]
        return original(model, batches, **options)

    monkeypatch.setattr(measure, "accuracy", spy)
    run_quietly(_config(dataset, tmp_path, frequency={"kind": "constant", "period": 100}))
    # Two epochs of training, the dense model, two epochs as if at an event, the weights between, the last event.
    assert [round(sparsity, 2) for sparsity in seen] == [0, 0, 0, 0.75, 0.75, 0, 0.75]


SCHEDULES: list[dict[str, Any]] = [
    {"kind": "constant", "period": 4},
    {"kind": "stepwise", "periods": [[0, 2], [3, 3]]},
    {"kind": "inverse_learning_rate", "product": 0.02},
    {"kind": "adaptive", "strength": 0.2},
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule["kind"])
def test_an_interrupted_stage_ends_like_one_that_was_not(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: dict[str, Any]
) -> None:
    changes = {
        "frequency": schedule,
        "q": [{"kind": "uniform_noise", "strength": 0.01}, {"kind": "uniform_quantization", "bits": 4}],
    }
    whole, parts = (_config(dataset, tmp_path / name, **changes) for name in ("whole", "parts"))
    undisturbed = run_quietly(whole).regularized
    original, calls = trainer.train_epoch, iter(range(1, 100))

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_quietly(parts)
    assert run_quietly(parts).regularized == undisturbed
    first, second = deliverable(whole), deliverable(parts)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


LOW_RANK: dict[str, list[dict[str, Any]]] = {
    "channel": [{"kind": "svd", "ratio": 2.0}],
    "spatial": [{"kind": "svd", "ratio": 2.0, "view": "spatial"}],
    "tucker": [{"kind": "tucker2", "ratio": 2.0}],
}


@pytest.mark.parametrize("layout", LOW_RANK)
def test_layers_end_as_small_as_their_weights(dataset: Path, tmp_path: Path, layout: str) -> None:
    settings = _config(dataset, tmp_path / "whole", q=LOW_RANK[layout])
    summary = run_quietly(settings)
    found = summary.regularized
    assert found is not None
    assert found["top1"] == pytest.approx(summary.after.top1, abs=2.5)  # one test image
    assert summary.after.macs < 0.7 * summary.before.macs
    assert summary.after.parameters < 0.7 * summary.before.parameters
    assert summary.after.bytes < 0.8 * summary.before.bytes
    weights = deliverable(settings)
    factors = {name: value for name, value in weights.items() if name.endswith((".first", ".core", ".second"))}
    assert 32 * sum(value.numel() for value in factors.values()) == found["bits"]
    model, _ = store.load_model(settings.folder / "checkpoints" / "compressed.safetensors")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LowRankConv2d)}
    assert {m.layout for m in layers.values()} == {layout}
    ranked = {layer["name"]: layer for layer in summary.layers if layer["rank"] is not None}
    assert ranked.keys() == layers.keys()
    largest = {"channel": 64, "spatial": 3 * 64, "tucker": 64}[layout]
    assert ranked["layer3.0.conv2"]["full_rank"] == largest
    # What the events left, in float32's rounding.
    dense = run_quietly(_config(dataset, tmp_path / "dense", q=LOW_RANK[layout], apply=False))
    assert dense.after.macs == dense.before.macs
    x = torch.rand(3, 1, 12, 12)
    plain, _ = store.load_model(tmp_path / "dense" / "tiny" / "checkpoints" / "compressed.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("place", "function"),
    [
        (driver, "apply"),
        (repair_stage, "repair"),
        (store.Folder, "save_compressed"),
        (measure_stage, "measured"),
    ],
    ids=["surgery", "repair", "the file", "measurement"],
)
def test_an_interruption_at_the_smaller_layers_changes_nothing(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any, function: str
) -> None:
    stage = {"q": LOW_RANK["tucker"], "repair": True}
    whole, parts = (_config(dataset, tmp_path / name, **stage) for name in ("whole", "parts"))
    run_quietly(whole)
    with monkeypatch.context() as patch:
        patch.setattr(place, function, _interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_quietly(parts)
    summary = run_quietly(parts)
    assert summary.after.macs < summary.before.macs
    first, second = deliverable(whole), deliverable(parts)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def _interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_folder_of_before_layers_became_smaller_is_opened(dataset: Path, tmp_path: Path) -> None:
    settings = _config(dataset, tmp_path, q=LOW_RANK["channel"], apply=False)
    first = run_quietly(settings)
    file = settings.folder / "config.yaml"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if "apply:" not in line))
    assert run_quietly(settings).after == first.after
    with pytest.raises(ConfigError, match=r"regularize\.apply: False -> True"):
        run_quietly(_config(dataset, tmp_path, q=LOW_RANK["channel"]))


def _trained_on(data: Path, output: Path) -> Config:
    training = {"epochs": 1, "batch_size": 32, "lr": 0.02}
    whole = tree(data, output, regularize={**STAGE, "q": LOW_RANK["tucker"]}, compress=None)
    return parse_config({**whole, "finetune": training, "quantize": {**training, "bits": 4}})


@pytest.fixture(scope="module")
def trained_on(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Summary]:
    settings = _trained_on(dataset, tmp_path_factory.mktemp("trained-on"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "render", lambda record: record.config)
        return settings, run_quietly(settings)


def test_smaller_layers_are_fine_tuned_and_quantized(trained_on: tuple[Config, Summary]) -> None:
    settings, summary = trained_on
    events = [json.loads(line) for line in (settings.folder / "metrics.jsonl").read_text().splitlines()]
    stages = list(dict.fromkeys(event["stage"] for event in events))
    assert stages == settings.stages[:-1] == ["train", "regularize", "finetune", "quantize"]
    assert summary.regularized is not None
    assert summary.quantized is not None
    assert summary.quantized["top1"] == summary.after.top1
    plan = cctorch.load_plan(settings.folder / "plan.json")
    layer = plan.find("layer3.0.conv2")
    assert layer is not None
    assert (layer.layout, layer.bits) == ("tucker", 4)
    weights = deliverable(settings)
    assert {f"layer3.0.conv2.{factor}.codes" for factor in ("first", "core", "second")} <= weights.keys()
    assert summary.after.bytes < summary.before.bytes / 4
    assert status(settings.folder).state == "finished"


@pytest.mark.parametrize("epoch", [3, 4, 5])
def test_what_follows_the_events_goes_on_after_an_interruption(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trained_on: tuple[Config, Summary],
    epoch: int,
) -> None:
    """In the second epoch of events, in fine-tuning and in the training with codes."""
    settings = _trained_on(dataset, tmp_path)
    original, calls = trainer.train_epoch, iter(range(100))

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if next(calls) == epoch:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_quietly(settings)
    now = status(settings.folder)
    expected = {3: ("regularize", 1), 4: ("finetune", 0), 5: ("quantize", 0)}
    assert (now.stage, now.epoch) == expected[epoch]
    run_quietly(settings)
    first, second = deliverable(trained_on[0]), deliverable(settings)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("layout", LOW_RANK)
def test_smaller_layers_are_fitted_to_the_dense_model(dataset: Path, tmp_path: Path, layout: str) -> None:
    stage = {"q": LOW_RANK[layout], "epochs": 0}
    plain, fitted = (
        run_quietly(_config(dataset, tmp_path / name, **stage, **more))
        for name, more in (("plain", {}), ("fitted", {"repair": True, "repair_images": 80}))
    )
    assert plain.top1_repaired is None
    assert fitted.top1_repaired == fitted.after.top1
    assert fitted.after.macs == plain.after.macs
    settings = [_config(dataset, tmp_path / name) for name in ("plain", "fitted")]
    folders = [store.Folder(each.folder) for each in settings]
    events = [json.loads(line)["event"] for line in (folders[1].path / "metrics.jsonl").read_text().splitlines()]
    assert events[-3:] == ["regularized", "applied", "repaired"]
    files = [folder.deliverable(settings[0].checkpoint) for folder in folders]
    far, near, teacher = (store.load_model(file)[0].eval() for file in (*files, folders[0].dense))
    images = datasets.load(settings[0].data, settings[0].seed)
    x, _ = next(iter(data.Batches(images.train, len(images.train), images.mean, images.std)))
    with torch.no_grad():
        errors = [float((model(x) - teacher(x)).square().mean()) for model in (far, near)]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("compress", "changes"),
    [(False, {}), (False, {"q": LOW_RANK["channel"], "apply": False}), (True, {"q": LOW_RANK["channel"]})],
    ids=["masks", "layers of full size", "beside compress"],
)
def test_repair_of_layers_that_stay_as_large_is_refused(
    dataset: Path, tmp_path: Path, compress: bool, changes: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"regularize\.repair: expected where events end in smaller layers"):
        _config(dataset, tmp_path, compress=compress, repair=True, **changes)


def test_nothing_to_fit_is_said(dataset: Path, tmp_path: Path) -> None:
    settings = _config(dataset, tmp_path, q=[{"kind": "svd", "rank": 1000}], epochs=0, repair=True)
    assert run_quietly(settings).top1_repaired is None
    assert "no layer has become smaller, and none is fitted" in (settings.folder / "run.log").read_text()


REFUSED: dict[str, dict[str, Any]] = {
    "masks": {"q": STAGE["q"]},
    "ranks and then masks": {"q": [*LOW_RANK["channel"], *STAGE["q"]]},
    "filters": {"q": [{"kind": "channel_pruning", "sparsity": 0.5}]},
    "left as they are": {"q": LOW_RANK["channel"], "apply": False},
}


@pytest.mark.parametrize("name", REFUSED)
def test_training_that_would_undo_the_events_is_refused(dataset: Path, tmp_path: Path, name: str) -> None:
    stage = {**STAGE, **REFUSED[name]}
    with pytest.raises(ConfigError, match="regularize with finetune: expected one of them"):
        parse_config(tree(dataset, tmp_path, regularize=stage, compress=None))


def test_events_that_make_no_layer_smaller_are_refused_before_training_follows(dataset: Path, tmp_path: Path) -> None:
    stage = {**STAGE, "q": [{"kind": "svd", "rank": 1000}]}
    with pytest.raises(ConfigError, match=r"parameters: no layer becomes smaller in the training that follows"):
        run_quietly(parse_config(tree(dataset, tmp_path, regularize=stage, compress=None)))
    model = nn.Sequential(nn.Conv2d(16, 16, 3, groups=2), nn.Conv2d(16, 16, 3))
    settings = _config(dataset, tmp_path, q=LOW_RANK["channel"]).regularize
    assert settings is not None
    names = ["0.weight", "1.weight"]
    begun = RegularizeStage(settings, model, names, torch.optim.SGD(model.parameters(), lr=0.1), {}, [])
    with pytest.raises(ConfigError, match=r"'0\.weight' would lose what the events do to it"):
        begun.expect_all_smaller(copy.deepcopy(model), names, torch.randn(2, 16, 7, 7))
    begun.expect_all_smaller(copy.deepcopy(model), names[1:], torch.randn(2, 16, 7, 7))


def test_momentum_of_what_stays_goes_on_after_the_events(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, begun = trainer.train_epoch, []

    def spy(*arguments: Any, **options: Any) -> Any:
        parallel, state = arguments[0], arguments[2].state
        begun.append({name for name, p in parallel.named_parameters() if "momentum_buffer" in state.get(p, {})})
        return original(*arguments, **options)

    monkeypatch.setattr(trainer, "train_epoch", spy)
    run_quietly(_trained_on(dataset, tmp_path))
    # Two epochs of training, two of events, one of fine-tuning, in which factors are new, and one with codes.
    assert not begun[0]
    assert {"conv1.weight", "layer1.0.bn1.weight", "layer1.0.conv1.weight"} <= begun[2]
    assert {"conv1.weight", "layer1.0.bn1.weight"} <= begun[4]
    assert not any(name.endswith((".first", ".core", ".second")) for name in begun[4])
    assert not begun[5]


def test_pruned_inputs_leave_a_narrower_network(dataset: Path, tmp_path: Path) -> None:
    q = [{"kind": "channel_pruning", "sparsity": 0.5, "axis": 1}]
    settings = _config(dataset, tmp_path, q=q, parameters=["*.conv2.weight"])
    summary = run_quietly(settings)
    assert summary.after.macs < 0.6 * summary.before.macs
    weights = deliverable(settings)
    assert weights["layer1.0.conv2.weight"].shape[1] == 8
    assert weights["layer1.0.conv1.weight"].shape[0] == 8


def test_the_period_follows_the_learning_rate(dataset: Path, tmp_path: Path) -> None:
    # One cycle over 6 steps, the peak at the second.
    found = run_quietly(
        _config(dataset, tmp_path, frequency={"kind": "inverse_learning_rate", "product": 0.02})
    ).regularized
    assert found is not None
    periods = [entry[1] for entry in found["trace"]]
    assert 1 in periods
    assert len(periods) < 6


def test_a_pattern_that_matches_nothing_is_refused_before_any_training(dataset: Path, tmp_path: Path) -> None:
    settings = _config(dataset, tmp_path, parameters=["layer1.*.weight", "layer9.*"])
    with pytest.raises(ConfigError, match=r"'layer9\.\*' matches no parameter; expected a pattern such as"):
        run_quietly(settings)
    assert not (settings.folder / "checkpoints").exists()


def test_a_shape_that_does_not_fit_is_refused_before_any_training(dataset: Path, tmp_path: Path) -> None:
    settings = _config(dataset, tmp_path, q=[{"kind": "nm_pruning", "n": 2, "m": 5}])
    with pytest.raises(ConfigError, match=r"regularize: NMPruning: parameter 'layer1\.0\.conv1\.weight' has shape"):
        run_quietly(settings)
    assert not (settings.folder / "checkpoints").exists()


def test_patterns_choose_parameters() -> None:
    model = models.create("resnet8")
    assert select(model, ["layer3.*.weight", "linear.*"]) == [
        "layer3.0.conv1.weight",
        "layer3.0.bn1.weight",
        "layer3.0.conv2.weight",
        "layer3.0.bn2.weight",
        "linear.weight",
        "linear.bias",
    ]


def test_a_parameter_is_described_by_zeros_values_and_rank() -> None:
    weight = torch.zeros(4, 2, 3, 3)
    weight[0], weight[1, 0] = 1.0, 2.0
    assert describe(weight) == {"sparsity": 1 - 27 / 72, "values": 3, "rank": 2, "full_rank": 4}
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(32, 3, generator=generator), torch.randn(3, 40, generator=generator)
    assert describe(factors[0] @ factors[1])["rank"] == 3  # in spite of the rounding of their product
    assert describe(torch.ones(3)) == {"sparsity": 0.0, "values": 1, "rank": None, "full_rank": None}


def test_the_report_shows_the_events(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = _config(dataset, tmp_path)
    run_quietly(settings)
    monkeypatch.undo()
    text = report.write(settings.folder).read_text()
    assert "2 regularization events" in text
    assert "Regularization events" in text
    assert "layer3.0.conv2.weight" in text
    assert "75.0%" in text
    assert "Loss against rate" not in text
