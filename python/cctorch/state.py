"""Where a run stands, and its checkpoints: checkpoints/last/ and previous/, written by all ranks together.

    checkpoints = Checkpoints(folder.checkpoints)
    checkpoints.save(state, tensors)  # returns once `tensors` are copied
    ...
    checkpoints.wait()

`tensors` are groups of named ones: whole, the same on every rank, or DTensors, of which each rank has a shard. What was
saved is loaded in any number of processes.
"""

from __future__ import annotations

import concurrent.futures
import copy
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from cctorch import distributed, state_files
from cctorch.models import CheckpointError

Tensors = dict[str, dict[str, Tensor]]
"""By group (model, momentum, ...) and name."""


@dataclass
class State:
    """Everything but tensors that is needed to go on as if the run had never stopped."""

    stage: str = "train"
    epoch: int = 0
    plan: str | None = None
    # Of the regularizer and its schedule.
    regularization: dict[str, Any] = field(default_factory=dict)
    # Of an epoch that was interrupted: `train.Partial`, and the regularization events before it.
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    events_before: int = 0
    # Of steps.jsonl: what follows belongs to steps that will be done again.
    steps_bytes: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A checkpoint whose files are whole."""

    folder: Path
    content: dict[str, Any]

    @property
    def state(self) -> State:
        return State(**copy.deepcopy(self.content["state"]))

    def like(self, group: str) -> dict[str, Tensor]:
        """Tensors for `Checkpoints.load` to fill: those that `group` had, whole, on the CPU."""
        stored = self.content["tensors"]
        return {
            name: torch.empty(stored[f"{group}.{name}"]["shape"], dtype=state_files.dtype_of(stored[f"{group}.{name}"]))
            for name in self.names(group)
        }

    def names(self, group: str) -> list[str]:
        prefix = f"{group}."
        return [name.removeprefix(prefix) for name in self.content["tensors"] if name.startswith(prefix)]


class Checkpoints:
    """Those in `folder`. Every rank makes one, and calls the same methods in the same order."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._group = distributed.background_group()
        self._writer: state_files.Writer | None = None
        self._last_is_damaged = False
        self._pending: concurrent.futures.Future[Any] | None = None

    def newest(self) -> tuple[Saved | None, list[str]]:
        """The newest one that is whole, None if there is none yet, and warnings about those that are damaged.

        Raises CheckpointError where there are some, and none is whole.
        """
        distributed.on_main(lambda: state_files.finish_interrupted(self._folder))
        names = distributed.on_main(lambda: [name for name in ("last", "previous") if (self._folder / name).exists()])
        warned: list[str] = []
        for name in names:
            try:
                return _whole(self._folder / name), warned
            except CheckpointError as error:
                warned.append(f"{error}; going back to the state before it")
                self._last_is_damaged |= name == "last"
        if names:
            raise CheckpointError(f"no checkpoint in {self._folder} can be read: start over with --fresh")
        if distributed.on_main((self._folder / "last.pt").exists):
            raise CheckpointError(
                f"{self._folder / 'last.pt'} is a checkpoint of an earlier version of cctorch: go on with that "
                "version, or start over with --fresh"
            )
        return None, []

    def load(self, saved: Saved, tensors: Tensors) -> None:
        """Fills `tensors` in place. Raises CheckpointError where one is not in `saved`, or of another shape there."""
        _expect_one_process()
        reader = state_files.Reader(saved.folder, saved.content)
        try:
            load(_filled(tensors), storage_reader=reader, process_group=self._group)
        except CheckpointException as failed:
            raise CheckpointError(f"{saved.folder} does not fit this configuration: {_cause(failed)}") from failed

    def save(self, state: State, tensors: Tensors) -> None:
        """Copies all there is to be written, and writes it in the background, behind what is being written.

        What goes wrong there is raised by the next call, on every rank.
        """
        self.wait()
        content = copy.deepcopy({"state": asdict(state)})
        self._writer = state_files.Writer(self._folder, content, self._last_is_damaged)
        _expect_one_process()
        future = async_save(_filled(tensors), storage_writer=self._writer, process_group=self._group)
        assert isinstance(future, concurrent.futures.Future)
        self._pending = future

    def wait(self) -> None:
        """Until the last one that was saved is on the disk.

        Raises on every rank what one of them could not write; the checkpoints before it are as they were.
        """
        if self._pending is None:
            return
        try:
            self._pending.result()
        except CheckpointException as failed:
            self._pending = None
            if self._writer is not None and distributed.is_main():
                self._writer.discard()
            raise _cause(failed) from failed
        self._pending, self._last_is_damaged = None, False

    def close(self) -> None:
        """On every rank, at the end: waits, and lets go of what the ranks talk through in the background."""
        self.wait()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None


def _whole(folder: Path) -> Saved:
    """Each rank reads its share of the files. Raises CheckpointError, on every rank."""
    content = distributed.on_main(lambda: state_files.read_content(folder))
    share = slice(distributed.rank(), None, distributed.world_size())
    distributed.on_all(lambda: state_files.check(folder, content, share))
    return Saved(folder, content)


def _filled(tensors: Tensors) -> dict[str, Any]:
    """Without empty groups: torch.distributed.checkpoint would pickle an empty dict."""
    return {group: named for group, named in tensors.items() if named}


def _cause(failed: CheckpointException) -> BaseException:
    """What was raised on the first of the ranks that failed."""
    return failed.failures[min(failed.failures)][0]


def _expect_one_process() -> None:
    """torch.distributed.checkpoint warns, in whatever thread it works, where there is but one."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
