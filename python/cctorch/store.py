"""The folder of one run: its files by name, its checkpoints, and its record of events."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import safetensors
import safetensors.torch
import yaml
from pydantic import BaseModel
from torch import Tensor, nn

from cctorch import atomic, codes, distributed, models, state_files
from cctorch.config import Checkpoint, Config, ConfigError
from cctorch.models import CheckpointError
from cctorch.records import damage_named
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
    "compressed.onnx",
    "checkpoints",
    "tensorboard",
}
# Settings of what is made of a finished model.
_EXPORTED = {"export", "onnx"}
_STATES = ("last", "previous", "next")
_CHECKPOINTS = {*_STATES, "gradients.safetensors", "dense.safetensors", "compressed.safetensors", "compressed.h5"}
# Of earlier versions.
_CHECKPOINTS |= {"last.pt", "previous.pt", "next.pt", "gradients.pt"}


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
    tensors, metadata = _load(path)
    if "architecture" not in metadata:
        raise CheckpointError(f"{path} holds tensors, but not the architecture of a run's model")
    with damage_named(path):
        described = json.loads(metadata["architecture"])
        architecture = Architecture(**{key: _tuples(value) for key, value in described.items()})
        model = build(architecture, metadata.get("plan"))
        tensors = codes.dequantized_state_dict(tensors)
    models.load_state(model, tensors, str(path))
    return model.eval(), architecture


def load_state(path: Path) -> dict[str, Tensor]:
    """The tensors of such a file, codes as codes. Raises CheckpointError for a file that is damaged."""
    return _load(path)[0]


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
        self.gradients = self.checkpoints / "gradients.safetensors"

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

    def holder(self) -> str:
        """What `locked` has written into the lock, in this process or in another; empty where there is no lock."""
        try:
            return (self.path / _LOCK).read_text()
        except FileNotFoundError:
            return ""

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
        for state in (self.checkpoints / name for name in _STATES):
            if state.is_dir():
                foreign += [item for item in state.iterdir() if not state_files.is_own(item)]
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
        with damage_named(file):
            old = _flat({**_settings(), **yaml.safe_load(file.read_text())})
        new = _flat(config.model_dump())
        if config.regularize:
            # Runs of before it was a setting left the layers as they were; with `compress` it has no effect.
            old.setdefault("regularize.apply", config.regularize.apply if config.compress else False)
        changed = [
            f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
            for key in {**old, **new}
            if old.get(key) != new.get(key) and key not in _EXPORTED
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
        if not file.exists():
            return None
        with damage_named(file):
            return Summary.from_json(file.read_text())

    def write(self, name: str, text: str) -> None:
        atomic.write(self.path / name, text.encode())

    def save_dense(self, model: nn.Module, architecture: Architecture) -> None:
        _save_safetensors(self.dense, model.state_dict(), None, architecture)

    def save_compressed(
        self,
        model: nn.Module,
        plan: str | None,
        architecture: Architecture,
        settings: Checkpoint,
        grids: Mapping[str, codes.Grid],
    ) -> None:
        """Plan and tensors in the format of `settings`; codes of the weights that are on one of `grids`."""
        state = codes.encoded(model.state_dict(), grids)
        if settings.format == "safetensors":
            _save_safetensors(self.compressed, state, plan, architecture)
            return
        from cctorch import checkpoint

        metadata = {"architecture": json.dumps(architecture.__dict__)}
        checkpoint.save(
            self.deliverable(settings),
            state,
            plan=plan,
            metadata=metadata,
            codec=settings.codec,
            error_bound=settings.error_bound,
        )

    def deliverable(self, settings: Checkpoint) -> Path:
        """The file of `save_compressed`."""
        return self.compressed if settings.format == "safetensors" else self.compressed.with_suffix(".h5")

    def save_gradients(self, gradients: dict[str, Tensor]) -> None:
        """Of the dense model's layers: a sweep begins with them."""
        tensors = {name: value.contiguous() for name, value in gradients.items()}
        atomic.write(self.gradients, safetensors.torch.save(tensors, {"format": str(_FORMAT)}))

    def load_gradients(self) -> tuple[dict[str, Tensor] | None, str]:
        """None where there are none, with what is wrong with the file if it is damaged."""
        try:
            return (_load_safetensors(self.gradients)[0], "") if self.gradients.exists() else (None, "")
        except CheckpointError as error:
            return None, str(error)


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


def _save_safetensors(path: Path, state: Mapping[str, Tensor], plan: str | None, architecture: Architecture) -> None:
    metadata = {"format": str(_FORMAT), "architecture": json.dumps(architecture.__dict__)}
    if plan is not None:
        metadata["plan"] = plan
    tensors = {name: value.contiguous() for name, value in state.items()}
    atomic.write(path, safetensors.torch.save(tensors, metadata))


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    return (_load_hdf5 if path.suffix == ".h5" else _load_safetensors)(path)


def _load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged, or no safetensors file ({error}): copy it again") from error
    if metadata.get("format") != str(_FORMAT):
        raise CheckpointError(f"{path} is not of this version of cctorch (format {_FORMAT})")
    return tensors, metadata


def _load_hdf5(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from cctorch import checkpoint

    found = checkpoint.load(path)
    return found.tensors, found.metadata if found.plan is None else {**found.metadata, "plan": found.plan}


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _settings() -> dict[str, Any]:
    """Those outside of any section, as they are where a file, of an earlier version, does not have them."""
    defaults = {name: setting.default for name, setting in Config.model_fields.items() if not setting.is_required()}
    return {name: value for name, value in defaults.items() if not isinstance(value, BaseModel)}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {key: value for name, part in tree.items() for key, value in _flat(part, f"{prefix}{name}.").items()}
