from __future__ import annotations

import io
import warnings
from pathlib import Path

import pytest
from cctorch import log as module
from cctorch.log import Log, duration
from rich.console import Console


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def _console(terminal: bool) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=100), text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (245, "4 min 05 s"), (7384, "2 h 03 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_without_a_terminal_a_line_every_ten_seconds(tmp_path: Path, clock: list[float]) -> None:
    console, text = _console(False)
    with Log(tmp_path / "run.log", console) as log, log.task("train 1/2", 100) as task:
        for done in range(1, 101):
            clock[0] += 0.25
            task.update(done, f"loss {done}")
    assert text.getvalue().splitlines() == [
        "train 1/2  40/100  loss 40  15.0 s left",
        "train 1/2  80/100  loss 80  5.0 s left",
    ]
    assert [row[10:] for row in (tmp_path / "run.log").read_text().splitlines()] == text.getvalue().splitlines()


def test_in_a_terminal_a_bar_and_plain_lines_in_the_file(tmp_path: Path, clock: list[float]) -> None:
    console, text = _console(True)
    with Log(tmp_path / "run.log", console) as log, log.stages() as progress:
        for done in range(1, 41):
            clock[0] += 0.5
            progress("heuristic", done, 40)
        log.warning("watch out")
    assert "━" in text.getvalue()
    assert "40/40" in text.getvalue()
    assert "s left" not in text.getvalue()
    lines = [row[10:] for row in (tmp_path / "run.log").read_text().splitlines()]
    assert lines == ["heuristic  21/40    9.0 s left", "warning: watch out"]


def test_other_libraries_warnings_go_to_the_file(tmp_path: Path) -> None:
    console, text = _console(False)
    with Log(tmp_path / "run.log", console) as log, warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = log.show_warning
        warnings.warn("from elsewhere", stacklevel=1)
        warnings.warn_explicit("from cctorch", UserWarning, str(Path(module.__file__).with_name("export.py")), 1)
    assert text.getvalue() == "warning: from cctorch\n"
    assert "from elsewhere" in (tmp_path / "run.log").read_text()


def test_a_log_goes_on_where_it_ended(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with Log(tmp_path / "run.log", _console(False)[0]) as log:
            log.line(text)
    assert [row[10:] for row in (tmp_path / "run.log").read_text().splitlines()] == ["first", "second"]
