"""Signals at any stage, in a process alone: the run ends in a checkpoint, and ends up where an undisturbed one does."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cctorch import cli, collaborative, measure, network, trainer
from cctorch.config import Config
from cctorch.interruption import Interrupted, Interruption
from cctorch.report import page
from cctorch.run import run
from cctorch.status import status
from rich.console import Console
from safetensors.torch import load_file
from tiny_run import config, tree, write_dataset

PLACES = {
    "training": (trainer, "learning_rate", 2),  # called for the lines of steps.jsonl
    "validation": (measure, "accuracy", 1),
    "saving": (network, "momentum_by_name", 1),
    "search": (collaborative, "compress", 1),
    "measurement": (measure, "latency", 2),
}


def _quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "render", lambda record: "")


def _training(data: Path) -> dict[str, Any]:
    # Batches of 8: epochs of 10 steps, of which the losses are read once.
    return {part: {**tree(data, data)[part], "batch_size": 8} for part in ("train", "finetune")}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    settings = config(dataset, tmp_path_factory.mktemp("runs"), **_training(dataset))
    run(settings, console=_quiet())
    return settings


def _assert_same(settings: Config, other: Config) -> None:
    first, second = (load_file(c.folder / "checkpoints" / "compressed.safetensors") for c in (settings, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    steps, others = (
        [json.loads(line) for line in (c.folder / "steps.jsonl").read_text().splitlines()] for c in (settings, other)
    )
    assert len(steps) == 40
    for step, wanted in zip(steps, others, strict=True):
        assert {**step, "time": 0} == {**wanted, "time": 0}
    epochs, wanted_epochs = (
        [line for line in (c.folder / "metrics.jsonl").read_text().splitlines() if '"epoch"' in line]
        for c in (settings, other)
    )
    for epoch, wanted in zip(map(json.loads, epochs), map(json.loads, wanted_epochs), strict=True):
        assert [epoch[key] for key in ("loss", "lr", "accuracy")] == [wanted[key] for key in ("loss", "lr", "accuracy")]


def _signalled_at(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, call: int, number: signal.Signals) -> None:
    original: Callable[..., Any] = getattr(place, name)
    calls = iter(range(1, 100_000))

    def signalled(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    monkeypatch.setattr(place, name, signalled)


@pytest.mark.parametrize("place", PLACES)
def test_a_signal_ends_a_run_where_it_can_go_on(
    undisturbed: Config, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    settings = config(dataset, tmp_path, **_training(dataset))
    with monkeypatch.context() as patch:
        _signalled_at(patch, *PLACES[place], signal.SIGTERM)
        with pytest.raises(Interrupted, match="SIGTERM received"):
            run(settings, console=_quiet())
    assert status(settings.folder).state == "interrupted"
    run(settings, console=_quiet())
    _assert_same(settings, undisturbed)


@pytest.mark.parametrize("step", [7, 10, 13])
def test_a_signal_within_an_epoch_loses_no_step(
    undisturbed: Config, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    settings = config(dataset, tmp_path, **_training(dataset))
    with monkeypatch.context() as patch:
        _signalled_at(patch, torch.optim.SGD, "step", step, signal.SIGUSR1)
        with pytest.raises(Interrupted, match="SIGUSR1 received"):
            run(settings, console=_quiet())
    last = settings.folder / "checkpoints" / "last"
    state = json.loads((last / "state.json").read_text())["content"]["state"]
    assert (state["epoch"], len(state["losses"])) == divmod(step, 10)
    found = status(settings.folder)
    assert (found.epoch, found.step) == divmod(step, 10)
    # Twice, and from the checkpoint before.
    with monkeypatch.context() as patch:
        _signalled_at(patch, torch.optim.SGD, "step", 2, signal.SIGTERM)
        with pytest.raises(Interrupted):
            run(settings, console=_quiet())
    tensors = last / "rank0.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1000])
    run(settings, console=_quiet())
    _assert_same(settings, undisturbed)


def test_regularization_goes_on_within_an_epoch(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    regularize = {
        **_training(dataset)["train"],
        "q": [{"kind": "uniform_noise", "strength": 0.02}, {"kind": "magnitude_pruning", "sparsity": 0.5}],
        "frequency": {"kind": "constant", "period": 4},
    }
    changes = {**_training(dataset), "compress": None, "finetune": None, "regularize": regularize}
    whole, broken = (config(dataset, tmp_path / name, **changes) for name in ("whole", "broken"))
    run(whole, console=_quiet())
    with monkeypatch.context() as patch:
        _signalled_at(patch, torch.optim.SGD, "step", 20 + 15, signal.SIGINT)
        with pytest.raises(Interrupted):
            run(broken, console=_quiet())
    run(broken, console=_quiet())
    _assert_same(broken, whole)
    traces = [json.loads((c.folder / "summary.json").read_text())["regularized"]["trace"] for c in (whole, broken)]
    assert traces[0] == traces[1]
    assert len(traces[0]) == 5


def test_exit_codes(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tree(dataset, tmp_path / "runs")))
    command = ["run", str(file)]
    folder = str(tmp_path / "runs" / "tiny")
    with monkeypatch.context() as patch:
        _signalled_at(patch, torch.optim.SGD, "step", 1, signal.SIGTERM)
        assert cli.main([*command, "--fresh"]) == os.EX_TEMPFAIL
    told = capsys.readouterr().err
    assert "SIGTERM received: checkpoint written" in told
    assert f"cctorch run {file}" in told
    assert "--fresh" not in told
    assert cli.main(["status", folder, "--exit-code"]) == os.EX_TEMPFAIL
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_epoch", _refuse)
        assert cli.main(command) == 1
    assert cli.main(["status", folder, "--exit-code"]) == 1
    assert "tiny: failed; no more of this" in capsys.readouterr().out
    assert "in _refuse" in (Path(folder) / "run.log").read_text()
    assert cli.main(command) == 0
    assert cli.main(["status", folder, "--exit-code"]) == 0
    assert cli.main(["run", str(file), "seed=-1"]) == 2


def _refuse(*_: object, **__: object) -> None:
    raise RuntimeError("no more of this")


def _twice(interruption: Interruption) -> None:
    with interruption.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt) as caught:
            os.kill(os.getpid(), signal.SIGINT)
        assert not isinstance(caught.value, Interrupted)


def test_ctrl_c_twice_waits_for_nothing() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        with pytest.raises(Interrupted, match="SIGINT received"):
            _twice(interruption)
        os.kill(os.getpid(), signal.SIGTERM)  # what has been asked for is not asked for again
    assert signal.getsignal(signal.SIGINT) is before
