"""The folder of one run: its files by name, its checkpoints, and its record of events."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml
from torch import Tensor, nn

from cctorch import atomic, models
from cctorch.config import Config, ConfigError
from cctorch.models import CheckpointError

_FORMAT = 2
_LOCK = ".lock"
_FILES = {
    _LOCK,
    "config.yaml",
    "metrics.jsonl",
    "plan.json",
    "curves.json",
    "summary.json",
    "run.log",
    "report.html",
    "sweep.json",
    "compressed.pt2",
    "checkpoints",
    "tensorboard",
}
_CHECKPOINTS = {"last.pt", "previous.pt", "next.pt", "dense.pt", "compressed.pt", "gradients.pt"}


@dataclass
class State:
    """Where a run stands: everything needed to go on as if it had never stopped."""

    stage: str = "train"
    epoch: int = 0
    plan: str | None = None
    model: dict[str, Tensor] = field(default_factory=dict)
    momentum: dict[str, Tensor] = field(default_factory=dict)
    regularization: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Architecture:
    """What a model is built from. `mean` and `std` normalize its input, pixels in [0, 1]."""

    name: str
    classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_model(path: Path) -> tuple[nn.Module, Architecture]:
    """The model in checkpoints/dense.pt or checkpoints/compressed.pt, on the CPU, in eval mode.

    Raises CheckpointError for a file that is damaged or of another kind.
    """
    content = _load(path)
    described = json.loads(content["architecture"])
    architecture = Architecture(**{key: _tuples(value) for key, value in described.items()})
    model = build(architecture, content["plan"])
    models.load_state(model, content["model"], str(path))
    return model.eval(), architecture


def build(architecture: Architecture, plan: str | None) -> nn.Module:
    """A model with the layers that `plan` (JSON) leaves, and arbitrary weights."""
    model: nn.Module = models.create(architecture.name, architecture.shape[0], architecture.classes)
    if plan is None:
        return model
    from cctorch import _C
    from cctorch.apply import apply

    return apply(model, _C.CompressionPlan.from_json(plan))


class Folder:
    """runs/<name>/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.dense, self.compressed = self.checkpoints / "dense.pt", self.checkpoints / "compressed.pt"
        self.gradients = self.checkpoints / "gradients.pt"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes out until the end of the block, or of this process. Raises ConfigError if one is in."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / _LOCK).open("a") as file:
            if not _lock(file):
                raise ConfigError(
                    f"{self.path} is being written by process {self.writer() or 'unknown'}: wait for its end, or give "
                    "this run a name of its own with name=..."
                )
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def writer(self) -> int | None:
        """The process that is in `locked`, if there is one; 0 for an instant after it came."""
        try:
            with (self.path / _LOCK).open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return int(file.read() or 0)
        except FileNotFoundError:
            pass
        return None

    def clear(self) -> None:
        """Deletes the run's own files. Raises ConfigError, and deletes nothing, if there is any other file."""
        if not self.path.exists():
            return
        foreign = [item for item in self.path.iterdir() if not self._own(item, _FILES)]
        if self.checkpoints.is_dir():
            foreign += [item for item in self.checkpoints.iterdir() if not self._own(item, _CHECKPOINTS)]
        if (self.path / "tensorboard").is_dir():
            foreign += [
                f for f in (self.path / "tensorboard").iterdir() if not f.name.startswith("events.out.tfevents")
            ]
        if foreign:
            names = ", ".join(str(item) for item in foreign[:3])
            raise ConfigError(f"--fresh deletes nothing in {self.path}: {names} is not a run's own file; move it away")
        for item in self.path.iterdir():
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item)
            elif item.name != _LOCK:
                item.unlink()

    @staticmethod
    def _own(item: Path, names: set[str]) -> bool:
        return item.name in names or atomic.is_partial(item)

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").exists()

    def check(self, config: Config) -> None:
        """Raises ConfigError if the run was begun with another configuration."""
        file = self.path / "config.yaml"
        if not file.exists():
            return
        old, new = _flat(yaml.safe_load(file.read_text())), _flat(config.model_dump())
        changed = [
            f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in {**old, **new} if old.get(key) != new.get(key)
        ]
        if changed:
            raise ConfigError(
                f"{self.path} was begun with another configuration ({'; '.join(changed)}). "
                "Give the new one a name of its own with name=..., or start over with --fresh"
            )

    def begin(self, config: Config) -> None:
        """Writes config.yaml, unless it is there."""
        if not (self.path / "config.yaml").exists():
            self.write("config.yaml", config.to_yaml())

    def write(self, name: str, text: str) -> None:
        atomic.write(self.path / name, text.encode())

    def save_model(self, path: Path, model: nn.Module, plan: str | None, architecture: Architecture) -> None:
        described = json.dumps(architecture.__dict__)
        _save(path, {"format": _FORMAT, "architecture": described, "plan": plan, "model": model.state_dict()})

    def save_gradients(self, gradients: dict[str, Tensor]) -> None:
        """Of the dense model's layers: a sweep begins with them."""
        _save(self.gradients, {"format": _FORMAT, "model": gradients})

    def load_gradients(self) -> tuple[dict[str, Tensor] | None, str]:
        """None where there are none, with what is wrong with the file if it is damaged."""
        try:
            return (_load(self.gradients)["model"], "") if self.gradients.exists() else (None, "")
        except CheckpointError as error:
            return None, str(error)

    def save_state(self, state: State) -> None:
        """Keeps the last two states: a full disk or a crash leaves at least one of them whole."""
        content = {
            "format": _FORMAT,
            "stage": state.stage,
            "epoch": state.epoch,
            "plan": state.plan,
            "model": state.model,
            "momentum": state.momentum,
            "regularization": state.regularization,
            "events": json.dumps(state.events),
            "results": json.dumps(state.results),
            "rng": torch.get_rng_state(),
        }
        fresh, last = self.checkpoints / "next.pt", self.checkpoints / "last.pt"
        _save(fresh, content)
        if last.exists():
            last.replace(self.checkpoints / "previous.pt")
        fresh.replace(last)

    def load_state(self) -> tuple[State | None, list[str]]:
        """The last state that can be read, None if there is none yet, and warnings about those that can't."""
        files = [file for name in ("last.pt", "previous.pt") if (file := self.checkpoints / name).exists()]
        warnings = []
        for file in files:
            try:
                content = _load(file)
            except CheckpointError as error:
                warnings.append(f"{error}; going back to the state before it")
                continue
            torch.set_rng_state(content.pop("rng"))
            content["events"], content["results"] = json.loads(content["events"]), json.loads(content["results"])
            return State(**{key: value for key, value in content.items() if key != "format"}), warnings
        if files:
            raise CheckpointError(f"no checkpoint in {self.checkpoints} can be read: start over with --fresh")
        return None, []


class Events:
    """The record of a run: metrics.jsonl and TensorBoard's files, one scalar per number."""

    def __init__(self, folder: Folder, past: list[dict[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.all = list(past)
        self._folder = folder
        self._writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=len(past))
        self._write()

    def add(self, kind: str, stage: str, **values: float | int | None) -> None:
        """`kind` is what happened: "epoch", or the name of a one-off such as "compressed"."""
        event = {"event": kind, "stage": stage, "time": round(time.time(), 3), **values}
        for key, value in values.items():
            if value is not None:
                name = f"{stage}/{key}" if kind == "epoch" else f"{kind}/{key}"
                self._writer.add_scalar(name, value, len(self.all))
        self._writer.flush()
        self.all.append(event)
        self._write()

    def close(self) -> None:
        self._writer.close()

    def _write(self) -> None:
        self._folder.write("metrics.jsonl", "".join(json.dumps(event) + "\n" for event in self.all))


def _lock(file: TextIO) -> bool:
    for _ in range(3):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.05)  # `writer` of another process holds it for an instant
    return False


def _save(path: Path, content: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    atomic.write(path, buffer.getvalue())


def _load(path: Path) -> dict[str, Any]:
    content = models.load_tensors(path)
    if not isinstance(content, dict) or content.get("format") != _FORMAT or "model" not in content:
        raise CheckpointError(f"{path} is not a checkpoint of this version of cctorch (format {_FORMAT})")
    return content


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {key: value for name, part in tree.items() for key, value in _flat(part, f"{prefix}{name}.").items()}
