"""report.html: one file that opens offline and tells what a run did."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cctorch import atomic
from cctorch.store import damage_named


@dataclass(frozen=True)
class Record:
    """What a finished run left in its folder."""

    config: str
    events: list[dict[str, Any]]
    curves: list[dict[str, Any]]
    summary: dict[str, Any]
    sweep: list[dict[str, Any]]


def write(folder: Path) -> Path:
    """Writes report.html into the folder of a finished run, and returns its path.

    Raises ValueError where `folder` holds no finished run.
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
    return Record(
        (folder / "config.yaml").read_text(),
        [_json(folder / "metrics.jsonl", line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        _json(curves, curves.read_text()) if (curves := folder / "curves.json").exists() else [],
        _json(folder / "summary.json", (folder / "summary.json").read_text()),
        _json(sweep, sweep.read_text()) if (sweep := folder / "sweep.json").exists() else [],
    )


def _json(file: Path, text: str) -> Any:
    with damage_named(file):
        return json.loads(text)
