"""Size and time of compression, before it: from a small and a twice as large sample."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cctorch.checkpoint.codec import Pipeline, pipeline
from cctorch.checkpoint.rules import Choice

# Arrays of up to so many values are tried as a whole: what a codec makes of a part says little about them.
_WHOLE = 8192
# Values of the smaller sample: so many, but not more than this share of the array. It is made of that many runs.
_SAMPLE = 16384
_SHARE = 4
_RUNS = 4


@dataclass(frozen=True)
class Prediction:
    """Of one chunk."""

    bytes: int
    seconds: float


def predict(values: npt.NDArray[Any], choice: Choice, chunk: int) -> Prediction:
    """What a chunk of ``chunk`` of the ``values`` will take, compressed.

    Codecs have costs that do not grow with the size (trees of codes, headers), so a line through two samples is taken.
    """
    if values.size <= _WHOLE:
        return _trial(values, choice)
    count = min(_SAMPLE, values.size // _SHARE)
    small, large = (_trial(_sample(values, size), choice) for size in (count, 2 * count))
    scale = (chunk - count) / count
    size = small.bytes + (large.bytes - small.bytes) * scale
    seconds = small.seconds + (large.seconds - small.seconds) * scale
    # Where a clock or a lucky sample says less than that, the larger sample's rate is as good a guess.
    return Prediction(
        round(size) if size > large.bytes else round(large.bytes * chunk / (2 * count)),
        seconds if seconds > large.seconds else large.seconds * chunk / (2 * count),
    )


def _sample(values: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    """Runs of neighbours from all over the array."""
    length = max(1, count // _RUNS)
    starts = np.linspace(0, max(0, values.size - length), max(1, count // length)).astype(np.int64)
    return np.concatenate([values[start : start + length] for start in starts])


def _trial(sample: npt.NDArray[Any], choice: Choice) -> Prediction:
    filters: Pipeline = pipeline(choice.codec, choice.error_bound, sample.dtype, sample.size)
    begin = time.perf_counter()
    data = filters.encode(sample, filters.mask(lossless=choice.error_bound == 0))
    return Prediction(len(data), time.perf_counter() - begin)
