"""How the ranks make one file together: predict, reserve, compress and write, make room for the rest, finish."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from cctorch import distributed
from cctorch.checkpoint import file, overlap, pack
from cctorch.checkpoint.codec import crc32, versions
from cctorch.checkpoint.index import Index, Piece, Record, Stored
from cctorch.checkpoint.order import balanced
from cctorch.checkpoint.parts import Arrays, Part
from cctorch.checkpoint.report import Report

T = TypeVar("T")
Places = dict[int, dict[int, int]]  # of a chunk in the file, by number of its part and by its offset there


class Ranks:
    """All ranks, or this one as if it were alone."""

    def __init__(self, together: bool) -> None:
        self._together = together

    def on_main(self, function: Callable[[], T]) -> T:
        return distributed.on_main(function) if self._together else function()

    def on_all(self, function: Callable[[], T]) -> list[T]:
        return distributed.on_all(function) if self._together else [function()]

    def mine(self, items: list[T], seconds: list[float]) -> list[T]:
        """This rank's share of work that takes so many seconds."""
        if not self._together:
            return items
        owners = balanced(seconds, distributed.world_size())
        return [item for item, owner in zip(items, owners, strict=True) if owner == distributed.rank()]


@dataclass(frozen=True)
class _Done:
    part: int
    offset: int
    piece: Piece
    max_error: float


class Saving:
    """One call of `save` on this rank. Rank 0 makes the HDF5 file; all ranks write chunks to the places it reserves."""

    def __init__(self, arrays: Arrays, ranks: Ranks, head_room: float, bandwidth: float, workers: int) -> None:
        self._arrays, self._ranks = arrays, ranks
        self._head_room, self._bandwidth, self._workers = head_room, bandwidth, workers
        self._parts: list[Part] = []
        self._done: list[_Done] = []
        self._seconds: list[overlap.Seconds] = []
        self._overflow: list[overlap.Compressed] = []

    def into(self, path: Path, plan: str | None, metadata: dict[str, str]) -> None:
        self._prepare()
        places = self._ranks.on_main(lambda: self._create(path))
        outcomes = self._ranks.on_all(lambda: self._compress(path, places))
        self._done = [done for of_rank, _ in outcomes for done in of_rank]
        self._seconds = [seconds for _, seconds in outcomes]
        places = self._ranks.on_main(lambda: self._make_room(path))
        late = [(places[item.job.part][item.job.offset], item.data) for item in self._overflow]
        self._ranks.on_all(lambda: overlap.write_exactly(path, late))
        self._ranks.on_main(lambda: self._finish(path, plan, metadata))

    def report(self, file_bytes: int, seconds: float) -> Report:
        pieces = [done.piece for done in self._done]
        chunks = sum(piece.stored for piece in pieces)
        inline = sum(part.raw for part in self._parts if not part.chunk)
        return Report(
            raw=sum(tensor.nbytes for tensor in self._arrays.tensors.values()),
            predicted=sum(piece.predicted for piece in pieces),
            stored=inline + chunks,
            stored_chunks=chunks,
            slots=sum(piece.slot + piece.overflowed * piece.stored for piece in pieces),
            file=file_bytes,
            chunks=len(pieces),
            overflowed=sum(piece.overflowed for piece in pieces),
            lossless_instead=sum(
                done.piece.lossless and self._parts[done.part].choice.error_bound > 0 for done in self._done
            ),
            compressing=sum(seconds.compressing for seconds in self._seconds),
            writing=sum(seconds.writing for seconds in self._seconds),
            hidden=sum(seconds.hidden for seconds in self._seconds),
            seconds=seconds,
        )

    def _prepare(self) -> None:
        """Predictions, each made by one rank, known to all."""
        tensors = self._arrays.tensors
        names = self._ranks.mine(list(tensors), [float(tensor.nbytes) for tensor in tensors.values()])
        predicted = self._ranks.on_all(lambda: self._arrays.parts(names, self._workers))
        order = {name: i for i, name in enumerate(tensors)}
        self._parts = sorted((part for of_rank in predicted for part in of_rank), key=lambda part: order[part.tensor])

    def _create(self, path: Path) -> Places:
        """All datasets, and slots for all chunks."""
        places = {}
        with file.Writer(path, "w") as writer:
            for number, part in enumerate(self._parts):
                tensor = self._arrays.tensors[part.tensor]
                if part.chunk:
                    dtype, codec = np.dtype(part.dtype), part.choice.codec
                    writer.create(part.path, part.size, dtype, codec, part.codec_bound, part.chunk)
                    slot = part.slot(self._head_room), part.mask
                    places[number] = writer.reserve(part.path, dict.fromkeys(part.offsets, slot))
                else:
                    values = self._arrays.values(part)
                    whole = values.size == tensor.numel() and not part.zeros
                    writer.create_inline(part.path, values.reshape(tensor.shape) if whole else values)
                if not part.zeros:
                    writer.describe(part.path, tuple(tensor.shape), pack.dtype_name(tensor))
        return places

    def _compress(self, path: Path, places: Places) -> tuple[list[_Done], overlap.Seconds]:
        jobs = [self._job(number, offset, place) for number in places for offset, place in places[number].items()]
        mine = self._ranks.mine(jobs, [job.prediction.seconds for job in jobs])
        compressed, seconds = overlap.execute(path, mine, self._workers, self._bandwidth)
        self._overflow = [item for item in compressed if item.piece.overflowed]
        return [_Done(item.job.part, item.job.offset, item.piece, item.max_error) for item in compressed], seconds

    def _job(self, number: int, offset: int, place: int) -> overlap.Job:
        part = self._parts[number]
        return overlap.Job(
            part=number,
            offset=offset,
            place=place,
            slot=part.slot(self._head_room),
            prediction=part.prediction,
            filters=part.filters,
            error_bound=part.choice.error_bound,
            values=partial(self._arrays.chunk, part, offset),
        )

    def _make_room(self, path: Path) -> Places:
        """Slots that fit, for the chunks that overflowed theirs."""
        overflowed = [done for done in self._done if done.piece.overflowed]
        places: Places = {}
        if overflowed:
            with file.Writer(path, "r+") as writer:
                for done in overflowed:
                    part = self._parts[done.part]
                    slot = {done.offset: (done.piece.stored, part.filters.mask(lossless=done.piece.lossless))}
                    places.setdefault(done.part, {}).update(writer.reserve(part.path, slot))
        return places

    def _finish(self, path: Path, plan: str | None, metadata: dict[str, str]) -> None:
        index = Index(self._records(), versions(), metadata)
        with file.Writer(path, "r+") as writer:
            writer.write_text("index", index.to_json())
            if plan is not None:
                writer.write_text("plan", plan)
        overlap.write_exactly(path, [])  # fsync

    def _records(self) -> dict[str, Record]:
        records: dict[str, Record] = {}
        parts = {number: self._stored(part) for number, part in enumerate(self._parts)}
        for done in sorted(self._done, key=lambda done: done.offset):
            parts[done.part].pieces.append(done.piece)
        for number, part in enumerate(self._parts):
            if part.zeros:
                records[part.tensor].zeros = parts[number]
                continue
            tensor, choice = self._arrays.tensors[part.tensor], part.choice
            errors = [done.max_error for done in self._done if done.part == number]
            records[part.tensor] = Record(
                dtype=pack.dtype_name(tensor),
                shape=tuple(tensor.shape),
                codec=choice.codec if part.chunk else "none",
                error_bound=choice.error_bound,
                values=parts[number],
                max_error=max(errors, default=0.0),
            )
        return records

    def _stored(self, part: Part) -> Stored:
        return Stored(part.path, part.raw, crc32=0 if part.chunk else crc32(self._arrays.values(part)))
