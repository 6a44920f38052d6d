"""What a checkpoint says about its tensors: the records behind `index`, and their JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cctorch.checkpoint.pack import STORED_AS
from cctorch.models import CheckpointError

FORMAT = 1


@dataclass
class Piece:
    """One chunk: bytes predicted, kept for it, and used; the checksums of those used, and of what they decode to.

    `overflowed`: it did not fit and went to the end of the file. `lossless`: nothing was lost, by request or because
    the codec broke its error bound.
    """

    predicted: int
    slot: int
    stored: int = 0
    crc32: int = 0
    decoded_crc32: int = 0
    lossless: bool = True
    overflowed: bool = False


@dataclass
class Stored:
    """A dataset: its chunks, or the checksum of one that is not compressed. `raw` bytes without compression."""

    path: str
    raw: int
    pieces: list[Piece] = field(default_factory=list)
    crc32: int = 0

    @property
    def stored(self) -> int:
        return sum(piece.stored for piece in self.pieces) if self.pieces else self.raw


@dataclass
class Record:
    """A tensor. `error_bound` and `max_error` are absolute, 0 where nothing was lost."""

    dtype: str
    shape: tuple[int, ...]
    codec: str
    error_bound: float
    values: Stored
    zeros: Stored | None = None
    max_error: float = 0.0

    @property
    def parts(self) -> list[Stored]:
        return [self.values] if self.zeros is None else [self.values, self.zeros]

    @property
    def raw(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * np.dtype(STORED_AS[self.dtype]).itemsize

    @property
    def stored(self) -> int:
        return sum(part.stored for part in self.parts)

    @property
    def pieces(self) -> list[Piece]:
        return [piece for part in self.parts for piece in part.pieces]


@dataclass
class Index:
    """Of a file. `versions` are those of the libraries that wrote it; SZ3 does not promise to read an older one's."""

    tensors: dict[str, Record]
    versions: dict[str, str]
    metadata: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **vars(self)}, default=vars, separators=(",", ":"))

    @staticmethod
    def from_json(text: str, source: str) -> Index:
        try:
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise CheckpointError(
                    f"{source} has format {content['format']!r}, this version of cctorch reads format {FORMAT}"
                )
            tensors = {name: _record(entry) for name, entry in content["tensors"].items()}
            return Index(tensors, content["versions"], content["metadata"])
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{source} has an index that can't be read ({error!r}): copy it again") from error


def _record(entry: Mapping[str, Any]) -> Record:
    zeros = entry["zeros"]
    parts = {"values": _stored(entry["values"]), "zeros": None if zeros is None else _stored(zeros)}
    return Record(**{**entry, **parts, "shape": tuple(entry["shape"])})


def _stored(entry: Mapping[str, Any]) -> Stored:
    return Stored(**{**entry, "pieces": [Piece(**piece) for piece in entry["pieces"]]})
