"""The lines of a run's metrics.jsonl and steps.jsonl, and an error that names a file in which something else stands."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from cctorch.models import CheckpointError


@contextlib.contextmanager
def damage_named(file: Path) -> Iterator[None]:
    """Around what reads a file of a run: raises CheckpointError where it does not hold what was written."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(_reason(error).split())
        raise CheckpointError(
            f"{file} is damaged ({reason}): copy it again, or start the run over with --fresh"
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        return f"{place}: {first['msg']}" if place else first["msg"]
    return f"{type(error).__name__}: {error}"


class Epoch(TypedDict):
    """A line of metrics.jsonl: an epoch that is done. What else it holds, such as the learning rate, is not listed."""

    event: Literal["epoch"]
    stage: Literal["train", "finetune", "regularize", "quantize"]
    epoch: int
    loss: float
    accuracy: float | None
    seconds: float
    time: float


class Milestone(TypedDict):
    """A line of metrics.jsonl: a model that was tested."""

    event: Literal[
        "dense",
        "compressed",
        "reestimated",
        "repaired",
        "finetuned",
        "stored",
        "regularized",
        "applied",
        "prepared",
        "quantized",
    ]
    stage: str
    accuracy: float
    time: float


class Step(TypedDict):
    """A line of steps.jsonl."""

    stage: str
    epoch: int
    step: int
    loss: float


Event = Epoch | Milestone
_EVENTS = TypeAdapter(list[Annotated[Event, Field(discriminator="event")]])


def read_events(folder: Path) -> list[Event]:
    """metrics.jsonl of a run; none where it has not begun. Raises CheckpointError where it is damaged."""
    file = folder / "metrics.jsonl"
    if not file.exists():
        return []
    with damage_named(file):
        return _EVENTS.validate_python([json.loads(line) for line in file.read_text().splitlines()])
