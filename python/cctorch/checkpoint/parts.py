"""The arrays that a set of tensors becomes, and what is thought of them before they are compressed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from cctorch.checkpoint import pack
from cctorch.checkpoint.codec import MIN_FILLER, Pipeline, pipeline
from cctorch.checkpoint.predict import Prediction, predict
from cctorch.checkpoint.rules import Choice, Rule, choose

# Smaller arrays are stored as they are, in the header of their dataset.
_INLINE_BYTES = 4096
# Large arrays are compressed in chunks of at most so many bytes.
_CHUNK_BYTES = 4 << 20
# A codec gets a little less than the bound: the rounding of its result comes on top.
_ROUNDING = 1 - 2.0**-12
# What a slot has on top of its head room, for arrays of which a few bytes are a large share.
_SLACK = 64


@dataclass(frozen=True)
class Part:
    """An array of a tensor, its values or the map of its zeros. `chunk` is 0 where it is not compressed."""

    tensor: str
    zeros: bool
    size: int
    dtype: str
    choice: Choice
    chunk: int
    prediction: Prediction

    @property
    def path(self) -> str:
        return dataset_path("zeros" if self.zeros else "tensors", self.tensor)

    @property
    def raw(self) -> int:
        return self.size * np.dtype(self.dtype).itemsize

    @property
    def offsets(self) -> Sequence[int]:
        """Of its chunks."""
        return range(0, self.size, self.chunk) if self.chunk else ()

    @property
    def codec_bound(self) -> float:
        return self.choice.error_bound * _ROUNDING

    @property
    def filters(self) -> Pipeline:
        return pipeline(self.choice.codec, self.codec_bound, np.dtype(self.dtype), self.chunk)

    @property
    def mask(self) -> int:
        return self.filters.mask(lossless=self.choice.error_bound == 0)

    def slot(self, head_room: float) -> int:
        """Bytes kept for a chunk: as predicted and some more, but no more than incompressible data takes."""
        chunk = self.chunk * np.dtype(self.dtype).itemsize
        most = chunk + (chunk >> 8) + _SLACK
        return min(math.ceil(self.prediction.bytes * (1 + head_room)) + _SLACK, most) + MIN_FILLER


class Arrays:
    """Makes parts of tensors, and the values of parts; what has been packed is kept."""

    def __init__(self, tensors: Mapping[str, Tensor], default: Rule, rules: Sequence[Rule]) -> None:
        self.tensors = tensors
        self._default, self._rules = default, rules
        self._packed: dict[str, tuple[Choice, pack.Packed]] = {}

    def parts(self, names: Iterable[str], workers: int) -> list[Part]:
        """Of several tensors; the predictions are made in `workers` threads."""
        with ThreadPoolExecutor(workers) as pool:
            return [part for of_tensor in pool.map(self._parts, names) for part in of_tensor]

    def _parts(self, name: str) -> list[Part]:
        choice, packed = self._pack(name)
        parts = [_part(name, False, packed.values, choice)]
        if packed.zeros is not None:
            parts.append(_part(name, True, packed.zeros, Choice("zstd")))
        return parts

    def values(self, part: Part) -> npt.NDArray[Any]:
        packed = self._pack(part.tensor)[1]
        values = packed.zeros if part.zeros else packed.values
        assert values is not None
        return values

    def chunk(self, part: Part, offset: int) -> npt.NDArray[Any]:
        """Filled up with zeros where the array ends within it, as HDF5 does."""
        values = self.values(part)[offset : offset + part.chunk]
        return np.pad(values, (0, part.chunk - values.size))

    def _pack(self, name: str) -> tuple[Choice, pack.Packed]:
        if name not in self._packed:
            tensor = self.tensors[name]
            choice = choose(name, tensor, self._default, self._rules)
            self._packed[name] = choice, pack.pack(pack.flat(tensor), lossy=choice.error_bound > 0)
        return self._packed[name]


def _part(name: str, zeros: bool, values: npt.NDArray[Any], choice: Choice) -> Part:
    if values.nbytes <= _INLINE_BYTES:
        return Part(name, zeros, values.size, str(values.dtype), Choice("zstd"), 0, Prediction(0, 0.0))
    chunk = math.ceil(values.size / math.ceil(values.nbytes / _CHUNK_BYTES))
    part = Part(name, zeros, values.size, str(values.dtype), choice, chunk, Prediction(0, 0.0))
    return replace(part, prediction=predict(values, replace(choice, error_bound=part.codec_bound), chunk))


def dataset_path(group: str, name: str) -> str:
    """A tensor's name as that of a dataset: HDF5 reads / as a group, and . as the group itself."""
    escaped = name.replace("%", "%25").replace("/", "%2F")
    return f"{group}/{'%2E' * len(name) if set(name) == {'.'} else escaped}"
