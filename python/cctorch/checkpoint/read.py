"""Loads a compressed checkpoint, or its index alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cctorch._C import CompressionPlan
from cctorch.checkpoint import codec, pack
from cctorch.checkpoint.codec import crc32
from cctorch.checkpoint.file import read_text
from cctorch.checkpoint.index import Index, Piece, Record, Stored
from cctorch.models import CheckpointError

# What h5py, numpy and the filters raise about a file that is damaged.
_DAMAGE = (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError, OverflowError, MemoryError)


@dataclass(frozen=True)
class Checkpoint:
    """What is in a file. ``plan`` is the JSON of a :class:`cctorch.CompressionPlan`, or None."""

    tensors: dict[str, Tensor]
    plan: str | None
    index: Index

    @property
    def metadata(self) -> dict[str, str]:
        return self.index.metadata

    def compression_plan(self) -> CompressionPlan | None:
        return None if self.plan is None else CompressionPlan.from_json(self.plan)


def load(path: str | os.PathLike[str], *, names: Iterable[str] | None = None, workers: int | None = None) -> Checkpoint:
    """Reads what :func:`save` wrote, on the CPU. Nothing that is in the file is executed.

    Args:
        path: the file.
        names: of the tensors to read. Absent: all.
        workers: threads that decompress. Absent: as many as PyTorch uses.

    Raises:
        CheckpointError: no such file, a damaged one (the message names the tensor), or another kind of file.
        KeyError: ``names`` has one that the file lacks.
    """
    with _open(path) as (file, found, plan), ThreadPoolExecutor(workers or torch.get_num_threads()) as pool:
        wanted = list(found.tensors) if names is None else list(names)
        if unknown := [name for name in wanted if name not in found.tensors]:
            raise KeyError(f"names: {unknown[0]!r} is not in {path}")
        # The next tensor is read while the last ones are decompressed.
        pending = [(name, pool.submit(_read(file, name, found.tensors[name], path))) for name in wanted]
        tensors = {}
        for name, future in pending:
            with _named(path, name):
                tensors[name] = future.result()
        return Checkpoint(tensors, plan, found)


def info(path: str | os.PathLike[str]) -> Index:
    """What the file says about its tensors, without reading them. Raises CheckpointError as :func:`load` does."""
    with _open(path) as (_, found, _):
        return found


@contextlib.contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[tuple[h5py.File, Index, str | None]]:
    """The file, its index and its plan."""
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise CheckpointError(f"{path} is not an HDF5 file, or is damaged ({error}): copy it again") from error
    with file:
        try:
            index = Index.from_json(read_text(file, "index", str(path)), str(path))
            plan = read_text(file, "plan", str(path)) if "plan" in file else None
        except CheckpointError:
            raise
        except _DAMAGE as error:
            raise CheckpointError(f"{path} has no index or plan that can be read ({error}): copy it again") from error
        yield file, index, plan


@contextlib.contextmanager
def _named(path: str | os.PathLike[str], name: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(f"{path}: tensor {name!r} is damaged ({error}): copy the file again") from error


def _read(file: h5py.File, name: str, record: Record, path: str | os.PathLike[str]) -> partial[Tensor]:
    """Takes the stored bytes out of the file; the call of what is returned makes a tensor of them."""
    with _named(path, name):
        if record.dtype not in pack.STORED_AS:
            raise ValueError(f"unknown dtype {record.dtype!r}")
        values = _array(file, record.values)
        return partial(_tensor, record, values, _array(file, record.zeros) if record.zeros else None)


def _tensor(record: Record, values: _Array, zeros: _Array | None) -> Tensor:
    packed = pack.Packed(values.decoded(), None if zeros is None else zeros.decoded())
    return pack.unpack(packed, record.dtype, record.shape)


@dataclass(frozen=True)
class _Array:
    """A dataset as it is stored: chunks to decode, or values."""

    size: int
    dtype: np.dtype[Any]
    filters: codec.Pipeline | None
    chunks: list[tuple[Piece, int, bytes]]
    values: npt.NDArray[Any]

    def decoded(self) -> npt.NDArray[Any]:
        if self.filters is None:
            return self.values
        out = []
        for number, (piece, mask, data) in enumerate(self.chunks):
            out.append(self.filters.decode(data, mask, self.dtype))
            if crc32(out[-1]) != piece.decoded_crc32:
                raise ValueError(f"chunk {number} decodes to other values than when it was written")
        return np.concatenate(out)[: self.size]


def _array(file: h5py.File, stored: Stored) -> _Array:
    dataset = file[stored.path]
    if not stored.pieces:
        values: npt.NDArray[Any] = np.ravel(dataset[()])
        _check(stored.crc32, values)
        return _Array(dataset.size, dataset.dtype, None, [], values)
    filters = codec.of_dataset(dataset.id)
    chunks = []
    for number, piece in enumerate(stored.pieces):
        mask, data = dataset.id.read_direct_chunk((number * dataset.chunks[0],))
        data = data[: piece.stored]
        _check(piece.crc32, data, number)
        chunks.append((piece, mask, data))
    return _Array(dataset.size, dataset.dtype, filters, chunks, np.empty(0, dataset.dtype))


def _check(expected: int, data: Any, chunk: int = 0) -> None:
    if crc32(data) != expected:
        raise ValueError(f"the checksum of chunk {chunk} is another")
