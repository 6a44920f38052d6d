from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cctorch import cli, compress_stage, trainer
from cctorch.models import CheckpointError
from cctorch.report import page
from cctorch.run import run
from cctorch.status import status
from cctorch.store import Folder
from rich.console import Console
from tiny_run import config, write_dataset


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "render", lambda record: "")


def _quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def test_of_a_run_from_its_first_epoch_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(write_dataset(tmp_path / "data"), tmp_path / "runs")
    seen = []
    for place, name, call in ((trainer, "train_epoch", 2), (compress_stage, "apply", 1), (trainer, "train_epoch", 2)):
        original, calls = getattr(place, name), iter(range(1, 9))

        def failing(*arguments: object, **options: object) -> object:
            if next(calls) == call:  # noqa: B023
                seen.append(status(settings.folder))
                raise KeyboardInterrupt
            return original(*arguments, **options)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(place, name, failing)
            with pytest.raises(KeyboardInterrupt):
                run(settings, console=_quiet())
        seen.append(status(settings.folder))
    assert [(s.state, s.stage, s.epoch) for s in seen] == [
        *[(state, "train", 1) for state in ("running", "interrupted")],
        *[(state, "compress", 0) for state in ("running", "interrupted")],
        *[(state, "finetune", 1) for state in ("running", "interrupted")],
    ]
    assert [s.process for s in seen] == [os.getpid(), None] * 3
    events = [json.loads(line) for line in (settings.folder / "metrics.jsonl").read_text().splitlines()]
    assert seen[4].loss == events[-1]["loss"]
    assert seen[4].seconds_left == pytest.approx(events[-1]["seconds"])  # one of two epochs
    assert seen[2].seconds_left is None  # nobody knows of a search
    assert "running (process" in str(seen[4])
    assert "stage finetune, epoch 1 of 2 done" in str(seen[4])

    run(settings, console=_quiet())
    assert cli.main(["status", str(settings.folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["name"], told["process"], told["epochs"]) == ("finished", "tiny", None, 0)
    assert cli.main(["status", str(settings.folder)]) == 0
    assert capsys.readouterr().out.startswith("tiny: finished; last epoch: loss")


def test_of_a_process_that_was_killed_in_its_lock(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert folder.writer() is None
    (tmp_path / ".lock").write_text("123456789")
    assert folder.writer() is None
    with folder.locked():
        assert folder.writer() == (os.getpid(), socket.gethostname())
    assert folder.writer() is None


def test_a_status_that_nobody_takes(tmp_path: Path) -> None:
    run(config(write_dataset(tmp_path / "data"), tmp_path), console=_quiet())
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "cctorch", "status", str(tmp_path / "tiny")]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "the disk is full" in done.stderr


def test_a_folder_without_a_run_has_no_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", str(tmp_path)]) == 1
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "name: [1"),
        ("config.yaml", "[]"),
        ("config.yaml", "name: tiny\ntrain: {epochs: many}\n"),
        ("metrics.jsonl", '{"event": "epo'),
        ("metrics.jsonl", "[1]"),
        ("metrics.jsonl", '{"event": "epoch", "stage": "train"}'),
        ("summary.json", "{}"),
        ("steps.jsonl", "3"),
        ("steps.jsonl", '{"stage": "train"}'),
    ],
)
def test_a_damaged_file_is_named(name: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("name: tiny\n")
    (tmp_path / name).write_text(content)
    assert cli.main(["status", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"cctorch: {tmp_path / name} is damaged (")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("content", ['{"before": ', "{}", "[1]"])
def test_a_damaged_end_of_a_run_is_named_when_the_run_is_given_again(content: str, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"summary\.json is damaged \(.*or start the run over with --fresh"):
        Folder(tmp_path).summary()


@pytest.mark.parametrize("content", ["name: [1", "[]"])
def test_a_damaged_configuration_is_named_when_the_run_is_given_again(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.yaml is damaged"):
        Folder(tmp_path).check(config(tmp_path, tmp_path))
