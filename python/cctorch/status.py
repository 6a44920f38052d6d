"""Where a run stands, read off its folder: of one that is running, that was interrupted or that is finished.

status(Path("runs/demo")).stage
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter

from cctorch.config import stages
from cctorch.log import duration
from cctorch.records import Event, Step, damage_named, read_events
from cctorch.store import Folder, Writer


@dataclass(frozen=True)
class Status:
    """`epoch` of `epochs` are done in `stage`.

    `loss` and `accuracy` (validation, percent) are those of the last epoch of any stage, `seconds_since` the time since
    the last result, `seconds_left` that of this stage's epochs at the pace of the last one.
    """

    name: str
    state: Literal["running", "interrupted", "failed", "finished"]
    process: int | None
    host: str | None
    stage: str
    epoch: int
    epochs: int
    loss: float | None
    accuracy: float | None
    seconds_since: float | None
    seconds_left: float | None
    last_line: str
    # Why it failed, if it did; an interrupted run can go on.
    failure: str | None = None
    # Of the epoch that was interrupted or is under way, the steps whose losses have been read, and the last one's.
    step: int = 0
    step_loss: float | None = None

    def __str__(self) -> str:
        parts = [f"{self.name}: {self.state}"]
        if self.process is not None:
            parts[0] += f" ({Writer(self.process, self.host or '')})"
        if self.failure is not None:
            parts.append(self.failure)
        if self.state != "finished":
            parts.append(f"stage {self.stage}" + (f", epoch {self.epoch} of {self.epochs} done" if self.epochs else ""))
            if self.step_loss is not None:
                parts[-1] += f" and {self.step} steps of the next (loss {self.step_loss:.4f})"
        if self.loss is not None:
            accuracy = "" if self.accuracy is None else f", validation top-1 {self.accuracy:.2f} %"
            parts.append(f"last epoch: loss {self.loss:.4f}{accuracy}")
        if self.state == "running" and self.seconds_left is not None:
            parts.append(f"about {duration(self.seconds_left)} left in this stage")
        if self.state == "interrupted" and self.seconds_since is not None:
            parts.append(f"last result {duration(self.seconds_since)} ago")
        text = "; ".join(parts)
        return f"{text}\n{self.last_line}" if self.last_line else text


def status(folder: Path) -> Status:
    """Raises ValueError where `folder` holds no run, or a damaged one."""
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} holds no run (config.yaml missing): give the folder of one, such as runs/demo")
    events = read_events(folder)
    with damage_named(folder / "config.yaml"):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        name = str(config["name"])
        stage, epoch = _reached(config, events)
        epochs = _epochs(config, stage)
    writer = Folder(folder).writer()
    finished = Folder(folder).summary() is not None and writer is None
    failure = folder / "failure.txt"
    failed = failure.read_text().strip() if failure.exists() and writer is None else None
    step = _last_step(folder / "steps.jsonl", stage, epoch + 1)
    past = [event for event in events if event["event"] == "epoch"]
    last = past[-1] if past else None
    left = (epochs - epoch) * last["seconds"] if last and last["stage"] == stage and epochs else None
    return Status(
        name=name,
        state="finished" if finished else "running" if writer else "failed" if failed is not None else "interrupted",
        process=writer.process if writer else None,
        host=writer.host or None if writer else None,
        stage="measure" if finished else stage,
        epoch=epoch,
        epochs=epochs,
        loss=last["loss"] if last else None,
        accuracy=last["accuracy"] if last else None,
        seconds_since=max(time.time() - events[-1]["time"], 0.0) if events else None,
        seconds_left=None if finished else left,
        last_line=_last_line(folder / "run.log"),
        failure=failed,
        step=step["step"] if step else 0,
        step_loss=step["loss"] if step else None,
    )


def _epochs(config: dict[str, Any], stage: str) -> int:
    settings = config.get(stage)
    return int(settings.get("epochs", 0)) if isinstance(settings, dict) else 0


def _reached(config: dict[str, Any], events: list[Event]) -> tuple[str, int]:
    """The stage that the last event leaves the run in, and the epochs of it that are done."""
    ends = {"dense": "train", "finetuned": "finetune", "regularized": "regularize", "quantized": "quantize"}
    planned = stages({name for name, section in config.items() if section})
    stage, epoch = "train", 0
    for event in events:
        if event["event"] == "epoch":
            stage, epoch = event["stage"], event["epoch"]
        elif event["event"] in ends:
            stage, epoch = planned[planned.index(ends[event["event"]]) + 1], 0
        elif event["stage"] == "compress":
            # Which of a compression's events is its last depends on what was asked for.
            stage, epoch = "compress", 0
    return stage, epoch


def _last_step(file: Path, stage: str, epoch: int) -> Step | None:
    """Of this epoch, if its last step was written whole."""
    try:
        line = json.loads(_last_line(file))
    except ValueError:
        return None
    with damage_named(file):
        step = TypeAdapter(Step).validate_python(line)
    return step if (step["stage"], step["epoch"]) == (stage, epoch) else None


def _last_line(file: Path) -> str:
    if not file.exists():
        return ""
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 4096))
        lines = stream.read().decode(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "")
