"""Compression in threads, while the calling thread writes what is done into its slot."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cctorch.checkpoint.codec import Pipeline, crc32, filled, fits
from cctorch.checkpoint.index import Piece
from cctorch.checkpoint.order import johnson
from cctorch.checkpoint.predict import Prediction

# What is written goes to the disk at once, in portions of that many bytes, instead of waiting for the last fsync.
_SYNC_BYTES = 8 << 20


@dataclass(frozen=True)
class Job:
    """One chunk to compress. `place` is that of its slot in the file."""

    part: int
    offset: int
    place: int
    slot: int
    prediction: Prediction
    filters: Pipeline
    error_bound: float
    values: Callable[[], npt.NDArray[Any]]


@dataclass(frozen=True)
class Compressed:
    job: Job
    data: bytes
    piece: Piece
    max_error: float
    seconds: float
    ended: float


@dataclass
class Seconds:
    """Of compressing (summed over the threads), of writing, and of the writing that went on beside compression."""

    compressing: float = 0.0
    writing: float = 0.0
    hidden: float = 0.0


def execute(path: Path, jobs: Sequence[Job], workers: int, bandwidth: float) -> tuple[list[Compressed], Seconds]:
    """Compresses all jobs and writes those that fit, in the order of Johnson's rule. The others keep their data."""
    compressing = [job.prediction.seconds / workers for job in jobs]
    writing = [job.prediction.bytes / bandwidth for job in jobs]
    ordered = [jobs[i] for i in johnson(compressing, writing)]
    seconds, done, spans = Seconds(), [], []
    with ThreadPoolExecutor(workers) as pool, _File(path) as file:
        for result in _ahead(pool, ordered, 2 * workers + 1):
            seconds.compressing += result.seconds
            if result.piece.overflowed:
                done.append(result)
                continue
            begin = time.perf_counter()
            file.write(filled(result.data, result.job.slot), result.job.place)
            spans.append((begin, time.perf_counter()))
            done.append(_without_data(result))
        begin = time.perf_counter()
        file.sync()
        spans.append((begin, time.perf_counter()))
    last = max((result.ended for result in done), default=0.0)
    seconds.writing = sum(end - begin for begin, end in spans)
    seconds.hidden = sum(max(0.0, min(end, last) - begin) for begin, end in spans)
    return done, seconds


def write_exactly(path: Path, chunks: Iterable[tuple[int, bytes]]) -> None:
    """Writes (place, data) pairs and waits for the disk."""
    with _File(path) as file:
        for place, data in chunks:
            file.write(data, place)
        file.sync()


def compress(job: Job) -> Compressed:
    """Keeps to the error bound: what a lossy codec makes is decoded and compared, and else stored without loss."""
    begin = time.perf_counter()
    values = job.values()
    lossy = job.error_bound > 0
    data = job.filters.encode(values, job.filters.mask(lossless=not lossy))
    max_error = 0.0
    broken = False
    decoded = values
    if lossy:
        decoded = job.filters.decode(data, job.filters.mask(lossless=False), values.dtype)
        with np.errstate(all="ignore"):  # a codec may return anything
            max_error = float(np.abs(decoded.astype(np.float64) - values).max())
        broken = not max_error <= job.error_bound
    if broken:
        decoded = values
        data, max_error = job.filters.encode(values, job.filters.mask(lossless=True)), 0.0
    piece = Piece(
        job.prediction.bytes,
        job.slot,
        len(data),
        crc32(data),
        crc32(decoded),
        lossless=broken or not lossy,
        # A slot's filter mask is that of its reservation.
        overflowed=broken or not fits(data, job.slot),
    )
    ended = time.perf_counter()
    return Compressed(job, data, piece, max_error, ended - begin, ended)


def _ahead(pool: ThreadPoolExecutor, jobs: Iterable[Job], count: int) -> Iterable[Compressed]:
    """The results in order; at most `count` jobs are begun before their turn, so memory stays bounded."""
    begun: deque[Future[Compressed]] = deque()
    try:
        for job in jobs:
            begun.append(pool.submit(compress, job))
            if len(begun) == count:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()


def _without_data(result: Compressed) -> Compressed:
    return Compressed(result.job, b"", result.piece, result.max_error, result.seconds, result.ended)


class _File:
    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY)
        self._unsynced = 0

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def write(self, data: bytes, place: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view, place)
            view, place = view[written:], place + written
        self._unsynced += len(data)
        if self._unsynced >= _SYNC_BYTES:
            os.fdatasync(self._descriptor)
            self._unsynced = 0

    def sync(self) -> None:
        os.fsync(self._descriptor)
