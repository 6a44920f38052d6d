"""How `torch.distributed.checkpoint` stores a run's state: a folder of one safetensors file per rank, and state.json.

state.json is written last, by rank 0, and has the checksums of all files: a folder without it is none, and a file that
is missing, cut or changed is known before anything is read from it. Nothing in the folder is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from cctorch import atomic
from cctorch.models import CheckpointError

_FORMAT = 1
_STATE = "state.json"
_RANK = "rank{}.safetensors"
_FRESH = "next"


def is_own(file: Path) -> bool:
    """Whether `file`, in the folder of a state, is one that is written here."""
    return file.name == _STATE or file.match(_RANK.format("*")) or atomic.is_partial(file)


class _Written(NamedTuple):
    """Where a rank has put a part of a tensor, and the checksum of that file."""

    file: str
    checksum: str


class Writer(StorageWriter):
    """Writes the folder `fresh`, with `content` in its state.json, and lets it take the place of `last`.

    The old `last` becomes `previous`, or goes where it `is_damaged`: the one before it is then the only one that is
    whole. Up to then both are as they were.
    """

    def __init__(self, checkpoints: Path, content: dict[str, Any], is_damaged: bool = False) -> None:
        self._fresh, self._last = checkpoints / _FRESH, checkpoints / "last"
        self._content, self._is_damaged = content, is_damaged

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On rank 0, before any rank writes: what a run that was killed left there goes."""
        self.discard()
        self._fresh.mkdir(parents=True)
        return [
            SavePlan(plan.items, storage_data=_RANK.format(rank), planner_data=plan.planner_data)
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        written: Future[list[WriteResult]] = Future()
        tensors = {item.index.fqn: planner.resolve_data(item) for item in plan.items}
        content = safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()})  # type: ignore[union-attr]
        atomic.write(self._fresh / plan.storage_data, content)
        place = _Written(plan.storage_data, _checksum(content))
        written.set_result([WriteResult(item.index, tensors[item.index.fqn].nbytes, place) for item in plan.items])  # type: ignore[union-attr]
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, once all files are on the disk."""
        places = {result.index: result.storage_data for of_rank in results for result in of_rank}
        tensors = {
            name: {
                "dtype": str(stored.properties.dtype).removeprefix("torch."),
                "shape": list(stored.size),
                "parts": [
                    {
                        "offsets": list(chunk.offsets),
                        "shape": list(chunk.sizes),
                        "file": places[MetadataIndex(name, chunk.offsets)].file,
                    }
                    for chunk in stored.chunks
                ],
            }
            for name, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        files = {place.file: place.checksum for place in places.values()}
        text = json.dumps({"format": _FORMAT, "files": files, "tensors": tensors, **self._content})
        checked = f'{{"checksum": "{_checksum(text.encode())}",\n"content": {text}}}\n'
        atomic.write(self._fresh / _STATE, checked.encode())
        _publish(self._last.parent, self._is_damaged)

    def discard(self) -> None:
        """Deletes what was not finished."""
        shutil.rmtree(self._fresh, ignore_errors=True)


def _publish(checkpoints: Path, last_is_damaged: bool) -> None:
    """What is `next`, and whole, becomes `last`. At any moment two are whole, if two were before."""
    fresh, last, previous = (checkpoints / name for name in (_FRESH, "last", "previous"))
    if last_is_damaged:
        shutil.rmtree(last)
    elif last.exists():
        if previous.exists():
            shutil.rmtree(previous)
        last.rename(previous)
    fresh.rename(last)
    atomic.sync_folder(checkpoints)


def finish_interrupted(checkpoints: Path) -> None:
    """Where a process was killed when `next` was whole and not yet `last`: makes it that."""
    if is_whole(checkpoints / _FRESH):
        last = checkpoints / "last"
        _publish(checkpoints, last.exists() and not is_whole(last))


def is_whole(folder: Path) -> bool:
    try:
        check(folder, read_content(folder), slice(None))
    except CheckpointError:
        return False
    return True


class Reader(StorageReader):
    """Reads the tensors of `folder`, whose state.json is `content`."""

    def __init__(self, folder: Path, content: dict[str, Any]) -> None:
        self._folder, self._content = folder, content
        self._files: dict[MetadataIndex, str] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors = {
            name: TensorStorageMetadata(
                TensorProperties(dtype=dtype_of(stored)),
                torch.Size(stored["shape"]),
                [ChunkStorageMetadata(torch.Size(p["offsets"]), torch.Size(p["shape"])) for p in stored["parts"]],
            )
            for name, stored in self._content["tensors"].items()
        }
        files = {
            MetadataIndex(name, part["offsets"]): part["file"]
            for name, stored in self._content["tensors"].items()
            for part in stored["parts"]
        }
        return Metadata(dict(tensors), storage_data=files)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._files = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        files = sorted({self._files[item.storage_index] for item in plan.items})
        for name in files:
            with safetensors.safe_open(self._folder / name, "pt") as file:
                for item in plan.items:
                    if self._files[item.storage_index] != name:
                        continue
                    part = file.get_slice(item.storage_index.fqn)
                    bounds = zip(item.storage_offsets, item.lengths, strict=True)
                    values = part[tuple(slice(offset, offset + length) for offset, length in bounds)]
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(values)
                    planner.commit_tensor(item, target)
        read: Future[None] = Future()
        read.set_result(None)
        return read


def read_content(folder: Path) -> dict[str, Any]:
    """The content of state.json. Raises CheckpointError."""
    file = folder / _STATE
    try:
        found = json.loads(file.read_text())
        checksum, content = found["checksum"], found["content"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is damaged, or was not finished ({_STATE}: {error})") from error
    # What was written is what is written again: numbers and the order of keys survive JSON.
    if not isinstance(content, dict) or checksum != _checksum(json.dumps(content).encode()):
        raise CheckpointError(f"{folder} is damaged: {_STATE} is not what was written")
    if content["format"] != _FORMAT:
        raise CheckpointError(f"{folder} is not a checkpoint of this version of cctorch (format {_FORMAT})")
    return content


def check(folder: Path, content: dict[str, Any], share: slice) -> None:
    """Raises CheckpointError if one of that share of the files is not what was written."""
    for name, checksum in sorted(content["files"].items())[share]:
        try:
            found = _checksum((folder / name).read_bytes())
        except OSError as error:
            raise CheckpointError(f"{folder} is damaged ({error})") from error
        if found != checksum:
            raise CheckpointError(f"{folder} is damaged: {name} is not what was written")


def dtype_of(stored: dict[str, Any]) -> torch.dtype:
    dtype = getattr(torch, stored["dtype"])
    assert isinstance(dtype, torch.dtype)
    return dtype


def _checksum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
