"""report.html: one file that opens offline and tells what a run did."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from cctorch import atomic
from cctorch.records import Event, damage_named, read_events
from cctorch.store import Folder
from cctorch.summary import Curve, Point

_T = TypeVar("_T")


@dataclass(frozen=True)
class Record:
    """What a finished run left in its folder."""

    config: str
    events: list[Event]
    curves: list[Curve]
    summary: dict[str, Any]
    sweep: list[Point]


def write(folder: Path) -> Path:
    """Writes report.html into the folder of a finished run, and returns its path.

    Raises ValueError where `folder` holds no finished run, or a damaged one.
    """
    from cctorch.report.page import render

    target = folder / "report.html"
    atomic.write(target, render(read(folder)).encode())
    return target


def read(folder: Path) -> Record:
    missing = [name for name in ("config.yaml", "summary.json", "metrics.jsonl") if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} holds no finished run ({', '.join(missing)} missing): give the folder of one, such as runs/demo"
        )
    summary = Folder(folder).summary()
    assert summary is not None
    return Record(
        (folder / "config.yaml").read_text(),
        read_events(folder),
        _entries(folder / "curves.json", Curve),
        asdict(summary),
        _entries(folder / "sweep.json", Point),
    )


def _entries(file: Path, kind: type[_T]) -> list[_T]:
    """None where there is no such file."""
    if not file.exists():
        return []
    with damage_named(file):
        return TypeAdapter(list[kind]).validate_python(json.loads(file.read_text()))  # type: ignore[valid-type]
