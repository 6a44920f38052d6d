from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cctorch import (
    _C,
    batch_norm,
    collaborative,
    compress_stage,
    export,
    measure,
    models,
    repair_stage,
    report,
    state,
    store,
    trainer,
)
from cctorch.config import Config, ConfigError, parse_config
from cctorch.data import DataError
from cctorch.models import CheckpointError
from cctorch.report import page
from cctorch.run import Summary, run
from cctorch.store import Folder
from cctorch.train import TrainingError
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import config, tree, write_dataset

OUTPUTS = {
    "config.yaml",
    "metrics.jsonl",
    "steps.jsonl",
    "plan.json",
    "curves.json",
    "summary.json",
    "run.log",
    "report.html",
    "compressed.pt2",
    "checkpoints",
    "tensorboard",
    ".lock",
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Summary, str]:
    """A run that nothing interrupted, and what it said."""
    settings = config(dataset, tmp_path_factory.mktemp("runs"), export=True)
    console = Console(file=io.StringIO(), width=120)
    return settings, run(settings, console=console), console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all the rest. The run of `finished`, set up before, draws."""
    monkeypatch.setattr(page, "render", lambda record: record.config)


def _weights(settings: Config) -> dict[str, torch.Tensor]:
    return load_file(settings.folder / "checkpoints" / "compressed.safetensors")


def _same(a: Config, b: Config) -> bool:
    first, second = _weights(a), _weights(b)
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def _fail_at(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, call: int, error: BaseException) -> None:
    """Lets the call number `call` of place.name fail, half way through if it takes batches."""
    original: Callable[..., Any] = getattr(place, name)
    calls = iter(range(1, 1000))

    def failing(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise error
        return original(*arguments, **options)

    monkeypatch.setattr(place, name, failing)


def _quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def test_a_run_leaves_all_its_files(finished: tuple[Config, Summary, str]) -> None:
    settings, summary, _ = finished
    folder = settings.folder
    assert {item.name for item in folder.iterdir()} == OUTPUTS
    assert {item.name for item in (folder / "checkpoints").iterdir()} == {
        "dense.safetensors",
        "compressed.safetensors",
        "gradients.safetensors",
        "last",
        "previous",
    }
    assert parse_config(yaml.safe_load((folder / "config.yaml").read_text())) == settings
    assert Summary.from_json((folder / "summary.json").read_text()) == summary
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kinds = ["epoch", "epoch", "dense", "compressed", "reestimated", "repaired", "epoch", "epoch", "finetuned"]
    assert [event["event"] for event in events] == kinds
    for event in events:
        if event["event"] == "epoch":
            assert event.keys() >= {"epoch", "stage", "loss", "accuracy", "lr", "seconds", "images_per_second"}
    scalars = EventAccumulator(str(folder / "tensorboard"))
    scalars.Reload()
    losses = [event["loss"] for event in events if event["event"] == "epoch" and event["stage"] == "train"]
    assert [point.value for point in scalars.Scalars("train/loss")] == pytest.approx(losses)
    accuracies = {event["event"]: event["accuracy"] for event in events if event["event"] != "epoch"}
    assert {f"{kind}/accuracy" for kind in accuracies} <= set(scalars.Tags()["scalars"])


def test_the_figures_are_those_of_the_models(finished: tuple[Config, Summary, str]) -> None:
    settings, summary, _ = finished
    plan = _C.CompressionPlan.from_json((settings.folder / "plan.json").read_text())
    dense, _ = store.load_model(settings.folder / "checkpoints" / "dense.safetensors")
    compressed, architecture = store.load_model(settings.folder / "checkpoints" / "compressed.safetensors")
    assert architecture.shape == (1, 12, 12)
    for model, figures in ((dense, summary.before), (compressed, summary.after)):
        assert figures.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert set(figures.latency) == {"1", "4"}
        assert min(figures.latency.values()) > 0
    assert summary.before.macs == sum(layer["macs_before"] for layer in summary.layers)
    assert summary.after.macs == sum(layer["macs_after"] for layer in summary.layers)
    assert 1 - summary.after.macs / summary.before.macs >= settings.compress.target - 0.01
    assert summary.after.macs <= summary.nominal_macs
    assert plan.target == settings.compress.target
    program = torch.export.load(settings.folder / "compressed.pt2").module()
    x = torch.rand(3, 1, 12, 12)
    torch.testing.assert_close(program(x), compressed(x), rtol=1e-4, atol=1e-5)


def test_a_run_says_what_it_found(finished: tuple[Config, Summary, str]) -> None:
    settings, summary, said = finished
    logged = (settings.folder / "run.log").read_text()
    for text in (said, logged):
        for row in ("top-1", "parameters", "MACs", "size on disk", "latency, batch 1", "latency, batch 4"):
            assert row in text
        assert f"right after compression: {summary.top1_compressed:.2f} %" in text
        assert f"{summary.top1_reestimated:.2f} % with BatchNorm re-estimated" in text
        assert f"{summary.top1_repaired:.2f} % repaired in {summary.repair_seconds:.1f} s" in text
        assert "train 1/2" in text
        assert "finetune 2/2" in text


INTERRUPTIONS = [
    ("first epoch", trainer, "train_epoch", 1),
    ("second epoch", trainer, "train_epoch", 2),
    ("between epochs", state.Checkpoints, "save", 2),
    ("dense model", store.Folder, "save_dense", 1),
    ("search", collaborative, "compress", 1),
    ("surgery", compress_stage, "apply", 1),
    ("re-estimation", batch_norm, "reestimate", 1),
    ("repair", repair_stage, "repair", 1),
    ("first fine-tuning epoch", trainer, "train_epoch", 3),
    ("second fine-tuning epoch", trainer, "train_epoch", 4),
    ("measurement", measure, "latency", 2),
    ("export", export, "save_program", 1),
    ("report", report, "write", 1),
]


@pytest.mark.parametrize(("place", "name", "call"), [x[1:] for x in INTERRUPTIONS], ids=[x[0] for x in INTERRUPTIONS])
def test_an_interrupted_run_ends_like_one_that_was_not(
    finished: tuple[Config, Summary, str],
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: Any,
    name: str,
    call: int,
) -> None:
    # An export takes seconds.
    settings = config(dataset, tmp_path, export=name == "save_program")
    with monkeypatch.context() as patch:
        _fail_at(patch, place, name, call, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(settings, console=_quiet())
    summary = run(settings, console=_quiet())
    assert _same(settings, finished[0])
    assert summary.after.top1 == finished[1].after.top1
    assert (settings.folder / "report.html").exists()
    events = (settings.folder / "metrics.jsonl").read_text().splitlines()
    assert len(events) == len((finished[0].folder / "metrics.jsonl").read_text().splitlines())


def test_a_distilled_run_is_another_one_and_resumes(
    finished: tuple[Config, Summary, str], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune = {**tree(dataset, tmp_path)["finetune"], "distillation": {"weight": 0.9}}
    whole = config(dataset, tmp_path / "whole", finetune=finetune)
    run(whole, console=_quiet())
    assert not _same(whole, finished[0])
    broken = config(dataset, tmp_path / "broken", finetune=finetune)
    with monkeypatch.context() as patch:
        _fail_at(patch, trainer, "train_epoch", 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(broken, console=_quiet())
    run(broken, console=_quiet())
    assert _same(whole, broken)


def test_another_seed_ends_elsewhere(finished: tuple[Config, Summary, str], dataset: Path, tmp_path: Path) -> None:
    settings = config(dataset, tmp_path, seed=1)
    run(settings, console=_quiet())
    assert not _same(settings, finished[0])


def test_a_finished_run_is_read_and_not_repeated(
    finished: tuple[Config, Summary, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, summary, _ = finished
    _fail_at(monkeypatch, trainer, "train_epoch", 1, AssertionError("trained again"))
    _fail_at(monkeypatch, measure, "latency", 1, AssertionError("measured again"))
    console = _quiet()
    assert run(settings, console=console) == summary
    assert "is finished; --fresh starts it over" in console.file.getvalue()  # type: ignore[attr-defined]


def _interrupted(settings: Config, monkeypatch: pytest.MonkeyPatch, epoch: int) -> Path:
    """The folder of checkpoints of a run that ended before `epoch` did, all stages counted together."""
    with monkeypatch.context() as patch:
        _fail_at(patch, trainer, "train_epoch", epoch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(settings, console=_quiet())
    return settings.folder / "checkpoints"


def _flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a missing file": lambda last: (last / "rank0.safetensors").unlink(),
    "a file cut short": lambda last: os.truncate(last / "rank0.safetensors", 1000),
    "a changed header": lambda last: _flip(last / "rank0.safetensors", 40),
    "a changed value": lambda last: _flip(last / "rank0.safetensors", -40),
    "a missing state": lambda last: (last / "state.json").unlink(),
    "a state cut short": lambda last: os.truncate(last / "state.json", 1000),
    "a changed state": lambda last: _flip(last / "state.json", -40),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    finished: tuple[Config, Summary, str], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    settings = config(dataset, tmp_path)
    checkpoints = _interrupted(settings, monkeypatch, 4)
    DAMAGES[damage](checkpoints / "last")
    console = _quiet()
    run(settings, console=console)
    said = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "last is damaged" in said
    assert "going back to the state before it" in said
    assert "resuming at stage finetune, after epoch 0" in said
    assert _same(settings, finished[0])


def test_without_a_checkpoint_that_is_whole_a_run_does_not_go_on(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(dataset, tmp_path)
    checkpoints = _interrupted(settings, monkeypatch, 3)
    for name in ("last", "previous"):
        (checkpoints / name / "rank0.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="can be read: start over with --fresh"):
        run(settings, console=_quiet())
    for name in ("last", "previous"):
        shutil.rmtree(checkpoints / name)
    (checkpoints / "last.pt").touch()
    described = yaml.safe_load((settings.folder / "config.yaml").read_text())
    del described["sharded"]
    (settings.folder / "config.yaml").write_text(yaml.safe_dump(described))
    with pytest.raises(CheckpointError, match=r"last\.pt is a checkpoint of an earlier version"):
        run(settings, console=_quiet())


def test_a_run_that_was_killed_between_the_renames_goes_on(
    finished: tuple[Config, Summary, str], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(dataset, tmp_path)
    checkpoints = _interrupted(settings, monkeypatch, 2)
    (checkpoints / "last").rename(checkpoints / "previous")
    run(settings, console=_quiet())
    assert _same(settings, finished[0])


def test_a_full_disk_is_told_and_the_run_goes_on_later(
    finished: tuple[Config, Summary, str], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(dataset, tmp_path)
    checkpoints = settings.folder / "checkpoints"
    write = os.write

    def full(descriptor: int, content: Any) -> int:
        if len(content) > 300_000 and (checkpoints / "last").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="the disk is full"):
            run(settings, console=_quiet())
    assert not (checkpoints / "next").exists()
    assert json.loads((checkpoints / "last" / "state.json").read_text())["content"]["state"]["epoch"] == 1
    run(settings, console=_quiet())
    assert _same(settings, finished[0])


def test_another_configuration_needs_another_name(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_at(monkeypatch, trainer, "train_epoch", 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(config(dataset, tmp_path), console=_quiet())
    with pytest.raises(ConfigError, match=r"seed: 0 -> 5.*--fresh"):
        run(config(dataset, tmp_path, seed=5), console=_quiet())


def test_a_refused_configuration_leaves_the_folder_as_it_was(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(dataset, tmp_path)
    described = settings.model_dump()
    described["data"]["validation"] = 96
    too_much = parse_config(described)
    with pytest.raises(DataError, match=r"data\.validation = 96"):
        run(too_much, console=_quiet())
    assert [item.name for item in settings.folder.iterdir()] == [".lock"]
    with monkeypatch.context() as patch:
        _fail_at(patch, trainer, "train_epoch", 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(settings, console=_quiet())
    before = {file: file.read_bytes() for file in settings.folder.rglob("*") if file.is_file()}
    with pytest.raises(DataError, match=r"data\.validation = 96"):
        run(too_much, fresh=True, console=_quiet())
    assert {file: file.read_bytes() for file in settings.folder.rglob("*") if file.is_file()} == before


def test_two_processes_do_not_write_one_run(dataset: Path, tmp_path: Path) -> None:
    settings = config(dataset, tmp_path)
    holder = "import sys; from pathlib import Path; from cctorch.store import Folder\n"
    holder += "with Folder(Path(sys.argv[1])).locked():\n print('locked', flush=True)\n sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(settings.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        for fresh in (False, True):
            with pytest.raises(ConfigError, match=f"is being written by process {process.pid} on .*: "):
                run(settings, fresh=fresh, console=_quiet())
        assert [item.name for item in settings.folder.iterdir()] == [".lock"]
        process.kill()
    with Folder(settings.folder).locked():
        pass


def test_fresh_deletes_a_runs_own_files_only(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(dataset, tmp_path)
    _fail_at(monkeypatch, trainer, "train_epoch", 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(settings, console=_quiet())
    (settings.folder / "logs").mkdir()
    (settings.folder / "logs" / "rank1.log").touch()
    for foreign in (
        "notes.txt",
        "checkpoints/mine.pt",
        "checkpoints/last/mine.pt",
        "tensorboard/mine",
        "logs/mine.log",
    ):
        (settings.folder / foreign).touch()
        before = sorted(settings.folder.rglob("*"))
        with pytest.raises(ConfigError, match=f"deletes nothing.*{foreign} is not a run's own file"):
            run(settings, fresh=True, console=_quiet())
        assert sorted(settings.folder.rglob("*")) == before
        (settings.folder / foreign).unlink()
    store.Folder(settings.folder).clear()
    assert [item.name for item in settings.folder.iterdir()] == [".lock"]


@pytest.mark.parametrize("repairs", [True, False])
def test_starts_from_published_weights(dataset: Path, tmp_path: Path, repairs: bool) -> None:
    torch.save(models.create("resnet8", 1, 4).state_dict(), tmp_path / "weights.th")
    changes = {"model": {"name": "resnet8", "weights": str(tmp_path / "weights.th")}}
    for part in ("train", "finetune"):
        changes[part] = {**tree(dataset, tmp_path)[part], "epochs": 0}
    changes["compress"] = {**tree(dataset, tmp_path)["compress"], "repair": repairs}
    settings = config(dataset, tmp_path, **changes)
    summary = run(settings, console=_quiet())
    dense, _ = store.load_model(settings.folder / "checkpoints" / "dense.safetensors")
    expected = models.load_tensors(tmp_path / "weights.th")
    assert all(torch.equal(value, expected[key]) for key, value in dense.state_dict().items())
    assert (summary.top1_repaired is not None) == repairs
    assert summary.after.top1 == (summary.top1_repaired if repairs else summary.top1_reestimated)


def test_weights_of_another_model_are_refused_before_training(dataset: Path, tmp_path: Path) -> None:
    torch.save(models.create("resnet20", 1, 4).state_dict(), tmp_path / "weights.th")
    settings = config(dataset, tmp_path, model={"name": "resnet8", "weights": str(tmp_path / "weights.th")})
    with pytest.raises(CheckpointError, match="another architecture"):
        run(settings, console=_quiet())


@pytest.mark.parametrize("names", [{"exclude": ["layer9.*"]}, {"bounds": {"layer9.*": 0.5}}])
def test_names_that_fit_no_layer_are_refused_before_training(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: dict[str, Any]
) -> None:
    _fail_at(monkeypatch, trainer, "train_epoch", 1, AssertionError("it trained"))
    with pytest.raises(ConfigError, match=r"layer9\.\*"):
        run(config(dataset, tmp_path, compress={"target": 0.3, **names}), console=_quiet())


def test_a_target_out_of_reach_stops_the_run(dataset: Path, tmp_path: Path) -> None:
    settings = config(dataset, tmp_path, compress={"target": 0.9, "max_rate": 0.3})
    with pytest.raises((ValueError, RuntimeError), match=r"0\.9"):
        run(settings, console=_quiet())
    assert not (settings.folder / "plan.json").exists()


def test_a_diverging_run_stops(dataset: Path, tmp_path: Path) -> None:
    training = {**tree(dataset, tmp_path)["train"], "lr": 1e30, "momentum": 0.0}
    with pytest.raises(TrainingError, match="at epoch 1, step"):
        run(config(dataset, tmp_path, train=training), console=_quiet())


def test_a_missing_device_is_refused(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device = 'cuda': torch sees no CUDA device"):
        run(config(dataset, tmp_path, device="cuda"), console=_quiet())
