"""The `quantize` stage of a run: training with fake-quantized weights, and codes of few bits at its end."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import cctorch
import pytest
import torch
from cctorch import measure, models, report, store, trainer
from cctorch import run as driver
from cctorch.config import Config, ConfigError, Quantize, parse_config
from cctorch.graph import trace
from cctorch.log import Log
from cctorch.quantize_stage import planned
from cctorch.report import page
from cctorch.run import Summary
from cctorch.status import status
from cctorch.summary import show
from rich.console import Console
from safetensors.torch import load_file
from tiny_run import deliverable, run_quietly, staged, tree, write_dataset
from torch import nn

STAGE = {"epochs": 2, "batch_size": 32, "lr": 0.01, "bits": 3}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "render", lambda record: record.config)


def _config(
    data: Path, output: Path, *, compress: bool = True, checkpoint: dict[str, Any] | None = None, **changes: Any
) -> Config:
    return staged(data, output, compress=compress, quantize={**STAGE, **changes}, checkpoint=checkpoint or {})


def _compressed(settings: Config) -> nn.Module:
    return store.load_model(settings.folder / "checkpoints" / "compressed.safetensors")[0]


def _values_of_rows(weight: torch.Tensor) -> int:
    return max(len(row.unique()) for row in weight.detach().flatten(1))


@pytest.mark.parametrize("compress", [True, False])
def test_the_run_ends_with_codes_of_few_bits(dataset: Path, tmp_path: Path, compress: bool) -> None:
    settings = _config(dataset, tmp_path, compress=compress)
    summary = run_quietly(settings)
    found = summary.quantized
    assert found is not None
    assert found["top1"] == summary.after.top1
    model = _compressed(settings)
    parameters = dict(model.named_parameters())
    bits = {layer["name"]: layer["bits"] for layer in found["layers"]}
    weights = {name for name, value in parameters.items() if value.dim() > 1}
    assert set(bits) == weights
    assert {name for name, count in bits.items() if count == 8} == {"conv1.weight", "linear.weight"}
    for name, count in bits.items():
        assert _values_of_rows(parameters[name]) <= 2**count, name
        assert {layer["values"] for layer in found["layers"] if layer["name"] == name} == {parameters[name].numel()}
    assert any(_values_of_rows(parameters[name]) > 4 for name, count in bits.items() if count == 3)
    assert found["dense_bits"] == 32 * sum(parameters[name].numel() for name in bits)
    rows = sum(len(parameters[name]) for name in bits)
    assert found["bits"] == 32 * rows + sum(count * parameters[name].numel() for name, count in bits.items())
    stored = deliverable(settings)
    assert sum(tensor.nbytes for name, tensor in stored.items() if name.endswith(".codes")) == sum(
        -(-count * parameters[name].numel() // 8) for name, count in bits.items()
    )
    assert summary.after.bytes == (settings.folder / "checkpoints" / "compressed.safetensors").stat().st_size
    assert summary.before.bytes == (settings.folder / "checkpoints" / "dense.safetensors").stat().st_size
    assert summary.after.bytes < summary.before.bytes / 2
    assert (summary.after.macs < summary.before.macs) == compress
    events = [json.loads(line) for line in (settings.folder / "metrics.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events if event["stage"] == "quantize"] == [
        "prepared",
        "epoch",
        "epoch",
        "quantized",
    ]


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Summary]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "render", lambda record: record.config)
        settings = _config(dataset, tmp_path_factory.mktemp("whole"), distillation={"weight": 0.5})
        return settings, run_quietly(settings)


INTERRUPTIONS = {
    "preparation": (driver, "prepare", 1),
    "first epoch": (trainer, "train_epoch", 5),
    "second epoch": (trainer, "train_epoch", 6),
    "conversion": (driver, "convert", 1),
    "the file": (store.Folder, "save_compressed", 2),
    "measurement": (measure, "latency", 2),
}


@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_an_interrupted_stage_ends_like_one_that_was_not(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: tuple[Config, Summary], name: str
) -> None:
    settings = _config(dataset, tmp_path, distillation={"weight": 0.5})
    place, function, call = INTERRUPTIONS[name]
    original, calls = getattr(place, function), iter(range(1, 100))

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, function, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_quietly(settings)
    now = status(settings.folder)
    assert now.stage == ("measure" if name in ("the file", "measurement") else "quantize")
    summary = run_quietly(settings)
    assert summary.quantized == undisturbed[1].quantized
    first, second = (
        load_file(run.folder / "checkpoints" / "compressed.safetensors") for run in (settings, undisturbed[0])
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_momentum_ends_with_the_weights_that_it_moved(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = trainer.train_epoch
    begun_with: list[bool] = []

    def spy(*arguments: Any, **options: Any) -> Any:
        begun_with.append(any("momentum_buffer" in state for state in arguments[2].state.values()))
        return original(*arguments, **options)

    monkeypatch.setattr(trainer, "train_epoch", spy)
    run_quietly(_config(dataset, tmp_path))
    # Two epochs each of training, of fine-tuning, which goes on with it, and of quantized weights.
    assert begun_with == [False, True, True, True, False, True]


def test_the_scales_and_the_weights_are_trained(
    dataset: Path, tmp_path: Path, undisturbed: tuple[Config, Summary]
) -> None:
    settings = _config(dataset, tmp_path, epochs=0)
    summary = run_quietly(settings)
    assert summary.quantized is not None
    assert summary.quantized["top1"] == summary.quantized["top1_prepared"]
    before, after = deliverable(settings), deliverable(undisturbed[0])
    name = next(name for name in before if name.startswith("layer3") and name.endswith(".codes"))
    assert not torch.equal(before[name], after[name])
    scales = name.replace(".codes", ".scales")
    assert not torch.equal(before[scales], after[scales])
    # Without training, a weight is what prepare and convert make of the fine-tuned one.
    plan = cctorch.load_plan(settings.folder / "plan.json")
    assert {layer.name: layer.bits for layer in plan.layers if layer.bits} == {
        layer.name: 8 if layer.name in ("conv1", "linear") else 3
        for layer in plan.layers
        if layer.kind != "batch_norm2d"
    }


def test_the_dense_model_is_looked_up_to(dataset: Path, tmp_path: Path, undisturbed: tuple[Config, Summary]) -> None:
    settings = _config(dataset, tmp_path)
    run_quietly(settings)
    alone, distilled = deliverable(settings), deliverable(undisturbed[0])
    assert any(not torch.equal(value, distilled[name]) for name, value in alone.items())


def test_the_report_shows_the_bits(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = _config(dataset, tmp_path, compress=False, epochs=1)
    run_quietly(settings)
    monkeypatch.undo()
    text = report.write(settings.folder).read_text()
    assert "weights of 3 and 8 bits" in text
    assert "Quantization to 3 and 8 bits: top-1" in text
    assert "<td>layer3.0.conv2.weight</td><td>3</td>" in text


@pytest.mark.parametrize("budget", ["parameters", "bytes"])
def test_what_is_left_of_the_budget(tmp_path: Path, undisturbed: tuple[Config, Summary], budget: str) -> None:
    _, summary = undisturbed
    screen = io.StringIO()
    with Log(tmp_path / "run.log", Console(file=screen, width=120)) as log:
        show(dataclasses.replace(summary, budget=budget), log)
    line = f"reduction of parameters: {1 - summary.after.parameters / summary.before.parameters:.1%}; target 60.0%"
    # The size of a file of few bits is not what a search had to keep to.
    assert (line in screen.getvalue()) == (budget == "parameters")
    assert "reduction of bytes" not in screen.getvalue()


def test_patterns_choose_bits() -> None:
    dense = models.create("resnet8")
    settings = Quantize.model_validate({**STAGE, "bits": {"*": 6, "layer1.*": 4}})
    plan, warnings = planned(dense, torch.zeros(1, 3, 8, 8), settings)
    assert warnings == []
    assert {layer.name: layer.bits for layer in plan.layers} == {
        name: 4 if name.startswith("layer1") else 6
        for name, module in dense.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


def test_a_layer_that_is_left_alone_is_warned_of_once() -> None:
    dense = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(3)), nn.Flatten(), nn.Linear(16, 2))
    dense[2].weight = dense[1].weight
    example = torch.zeros(2, 4, 2, 2)
    assert trace(dense, example).warnings
    plan, warnings = planned(dense, example, Quantize.model_validate(STAGE))
    assert warnings == ["bits: '1', '2' keep theirs, as layers that are left alone"]
    assert {layer.name: layer.bits for layer in plan.layers} == {"0": 8, "4": 8}


@pytest.mark.parametrize(("bits", "ends"), [(4, 8), (12, 12)])
def test_the_ends_have_at_least_8_bits(bits: int, ends: int) -> None:
    settings = Quantize.model_validate({**STAGE, "bits": bits})
    plan, _ = planned(models.create("resnet8"), torch.zeros(1, 3, 8, 8), settings)
    for layer in plan.layers:
        assert layer.bits == (ends if layer.name in ("conv1", "linear") else bits), layer.name


def test_layers_that_training_alone_runs_keep_their_weights() -> None:
    dense = models.create("googlenet")
    plan, _ = planned(dense, torch.zeros(2, 3, 32, 32), Quantize.model_validate(STAGE))
    assert {layer.name for layer in plan.layers} == {
        spec.name for spec in trace(dense, torch.zeros(2, 3, 32, 32)).specs if spec.kind in ("conv2d", "linear")
    }


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"quantize": {**STAGE, "bits": 1}}, r"quantize\.bits = 1: expected 2 to 16, or a section"),
    ({"quantize": {**STAGE, "bits": {"conv1": 17}}}, r"quantize\.bits = \{'conv1': 17\}: expected 2 to 16"),
    ({"quantize": {**STAGE, "bits": {}}}, r"quantize\.bits = \{\}: expected 2 to 16, or a section"),
    ({"compress": None, "finetune": None}, "compress, regularize and quantize are null"),
    (
        {
            "quantize": STAGE,
            "regularize": {
                "epochs": 1,
                "q": [{"kind": "svd", "ratio": 2}],
                "frequency": {"kind": "constant", "period": 4},
            },
        },
        "regularize with quantize: expected one of them, since training that follows events undoes them",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({**tree(Path(), Path(), **changes), "data": {"kind": "cifar10"}})


def test_a_pattern_that_fits_no_layer_is_refused_before_any_training(dataset: Path, tmp_path: Path) -> None:
    settings = _config(dataset, tmp_path, bits={"*": 4, "layer9.*": 4})
    with pytest.raises(ConfigError, match=r"quantize\.bits = 'layer9\.\*' names no layer of the model"):
        run_quietly(settings)
    assert not (settings.folder / "checkpoints").exists()


@pytest.mark.parametrize("codec", ["zstd", "sz3"])
def test_codes_go_into_hdf5_too_and_are_kept(dataset: Path, tmp_path: Path, codec: str) -> None:
    pytest.importorskip("hdf5plugin")
    settings = _config(dataset, tmp_path, compress=False, epochs=1, checkpoint={"format": "hdf5", "codec": codec})
    summary = run_quietly(settings)
    file = settings.folder / "checkpoints" / "compressed.h5"
    assert summary.after.bytes == file.stat().st_size
    model, _ = store.load_model(file)
    assert _values_of_rows(model.get_parameter("layer3.0.conv2.weight")) <= 8
