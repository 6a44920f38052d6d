"""The folder of one run: its files by name, its checkpoints, and its record of events."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import safetensors
import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from cctorch import atomic, distributed, models
from cctorch.config import Checkpoint, Config, ConfigError
from cctorch.models import CheckpointError
from cctorch.summary import Summary

_FORMAT = 2
_LOCK = ".lock"
_FILES = {
    _LOCK,
    "config.yaml",
    "metrics.jsonl",
    "steps.jsonl",
    "logs",
    "failure.txt",
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
_CHECKPOINTS = {
    "last.pt",
    "previous.pt",
    "next.pt",
    "gradients.pt",
    "dense.safetensors",
    "compressed.safetensors",
    "compressed.h5",
}


@dataclass
class State:
    """Where a run stands: everything needed to go on as if it had never stopped."""

    stage: str = "train"
    epoch: int = 0
    plan: str | None = None
    model: dict[str, Tensor] = field(default_factory=dict)
    momentum: dict[str, Tensor] = field(default_factory=dict)
    regularization: dict[str, Any] = field(default_factory=dict)
    # Of an epoch that was interrupted: `train.Partial`, and the regularization events before it.
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    events_before: int = 0
    # Of steps.jsonl: what follows belongs to steps that will be done again.
    steps_bytes: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)


class Writer(NamedTuple):
    process: int
    host: str

    def __str__(self) -> str:
        return f"process {self.process or 'unknown'}" + (f" on {self.host}" if self.host else "")


@dataclass(frozen=True)
class Architecture:
    """What a model is built from. `mean` and `std` normalize its input, pixels in [0, 1]."""

    name: str
    classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_model(path: Path) -> tuple[nn.Module, Architecture]:
    """The model in checkpoints/dense.safetensors, compressed.safetensors or compressed.h5, on the CPU, in eval mode.

    Raises CheckpointError for a file that is damaged or of another kind.
    """
    tensors, plan, described = (_load_hdf5 if path.suffix == ".h5" else _load_safetensors)(path)
    architecture = Architecture(**{key: _tuples(value) for key, value in json.loads(described).items()})
    model = build(architecture, plan)
    models.load_state(model, tensors, str(path))
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
        self.dense, self.compressed = (
            self.checkpoints / "dense.safetensors",
            self.checkpoints / "compressed.safetensors",
        )
        self.gradients = self.checkpoints / "gradients.pt"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes out until the end of the block, or of this process. Raises ConfigError if one is in."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / _LOCK).open("a") as file:
            if not _lock(file):
                raise ConfigError(
                    f"{self.path} is being written by {self.writer() or 'another process'}: wait for its end, or give "
                    "this run a name of its own with name=..."
                )
            file.truncate(0)
            file.write(f"{os.getpid()} {socket.gethostname()}")
            file.flush()
            yield

    def writer(self) -> Writer | None:
        """The process that is in `locked`, if there is one; number 0 for an instant after it came."""
        try:
            with (self.path / _LOCK).open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    process, _, host = file.read().partition(" ")
                    return Writer(int(process or 0), host)
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
        for name, ours in (("tensorboard", "events.out.tfevents*"), ("logs", "rank*.log")):
            if (self.path / name).is_dir():
                foreign += [item for item in (self.path / name).iterdir() if not item.match(ours)]
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
        (self.path / "failure.txt").unlink(missing_ok=True)

    def summary(self) -> Summary | None:
        """Of a finished run."""
        file = self.path / "summary.json"
        return Summary.from_json(file.read_text()) if file.exists() else None

    def write(self, name: str, text: str) -> None:
        atomic.write(self.path / name, text.encode())

    def save_model(self, path: Path, model: nn.Module, plan: str | None, architecture: Architecture) -> None:
        """Plan and tensors, as safetensors."""
        metadata = {"format": str(_FORMAT), "architecture": json.dumps(architecture.__dict__)}
        if plan is not None:
            metadata["plan"] = plan
        tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
        atomic.write(path, safetensors.torch.save(tensors, metadata))

    def save_compressed(
        self, model: nn.Module, plan: str | None, architecture: Architecture, settings: Checkpoint
    ) -> Path:
        """The same in the format of `settings`. Returns the file."""
        if settings.format == "safetensors":
            self.save_model(self.compressed, model, plan, architecture)
            return self.compressed
        from cctorch import checkpoint

        path = self.compressed.with_suffix(".h5")
        metadata = {"architecture": json.dumps(architecture.__dict__)}
        checkpoint.save(
            path,
            model.state_dict(),
            plan=plan,
            metadata=metadata,
            codec=settings.codec,
            error_bound=settings.error_bound,
        )
        return path

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
            "losses": state.losses,
            "seconds": state.seconds,
            "events_before": state.events_before,
            "steps_bytes": state.steps_bytes,
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
    """The record of a run: metrics.jsonl and TensorBoard's files, one scalar per number. Rank 0 writes them."""

    def __init__(self, folder: Folder, past: list[dict[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.all = list(past)
        self._folder, self._writer = folder, None
        if distributed.is_main():
            self._writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=len(past))
            self._write()

    def add(self, kind: str, stage: str, **values: float | int | None) -> None:
        """`kind` is what happened: "epoch", or the name of a one-off such as "compressed"."""
        event = {"event": kind, "stage": stage, "time": round(time.time(), 3), **values}
        self.all.append(event)
        if self._writer is None:
            return
        for key, value in values.items():
            if value is not None:
                name = f"{stage}/{key}" if kind == "epoch" else f"{kind}/{key}"
                self._writer.add_scalar(name, value, len(self.all) - 1)
        self._writer.flush()
        self._write()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _write(self) -> None:
        self._folder.write("metrics.jsonl", "".join(json.dumps(event) + "\n" for event in self.all))


class Steps:
    """steps.jsonl: one line for every step of training, appended when its loss is read. Rank 0 writes it.

    A run that goes on drops what follows `size` bytes: those steps are done again.
    """

    def __init__(self, folder: Folder, size: int) -> None:
        self._file: TextIO | None = None
        if distributed.is_main():
            self._file = (folder.path / "steps.jsonl").open("a", encoding="utf-8")
            if self._file.tell() > size:
                self._file.truncate(size)

    def add(self, stage: str, epoch: int, first: int, losses: list[float], lr: Callable[[int], float]) -> None:
        """`losses` of the steps from number `first` on, counted from 0; the lines count from 1."""
        if self._file is None:
            return
        now = round(time.time(), 3)
        for step, loss in enumerate(losses, start=first):
            line = {"stage": stage, "epoch": epoch, "step": step + 1, "loss": loss, "lr": lr(step), "time": now}
            self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def size(self) -> int:
        """Bytes that are safe on the disk."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


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


def _load_safetensors(path: Path) -> tuple[dict[str, Tensor], str | None, str]:
    """Tensors, plan and architecture."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged, or no safetensors file ({error}): copy it again") from error
    if metadata.get("format") != str(_FORMAT) or "architecture" not in metadata:
        raise CheckpointError(f"{path} is not a model of this version of cctorch (format {_FORMAT})")
    return tensors, metadata.get("plan"), metadata["architecture"]


def _load_hdf5(path: Path) -> tuple[dict[str, Tensor], str | None, str]:
    from cctorch import checkpoint

    found = checkpoint.load(path)
    if "architecture" not in found.metadata:
        raise CheckpointError(f"{path} holds tensors, but not the architecture of a run's model")
    return found.tensors, found.plan, found.metadata["architecture"]


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {key: value for name, part in tree.items() for key, value in _flat(part, f"{prefix}{name}.").items()}
