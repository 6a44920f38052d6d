"""What a run says: progress bars in a terminal, plain lines elsewhere, plain lines in run.log always."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

_SECONDS_BETWEEN_LINES = 10.0


def duration(seconds: float) -> str:
    """12.3 s, 4 min 05 s, 2 h 03 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class Task:
    """One thing whose progress is shown."""

    def __init__(self, log: Log, label: str, total: int, bar: Progress | None) -> None:
        self._log, self._label, self._total = log, label, total
        self._bar = bar
        self._id: TaskID | None = bar.add_task(label, total=total, note="") if bar else None
        self._start = self._last = time.monotonic()
        self._done = 0

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        """Says that `done` of `total` steps are done. `note` is shown beside it."""
        self._done, self._total = done, total or self._total
        if self._bar is not None and self._id is not None:
            self._bar.update(self._id, completed=done, total=self._total, note=note)
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_LINES and 0 < done < self._total:
            self._last = now
            left = (now - self._start) / done * (self._total - done)
            self._log.line(f"{self._label}  {done}/{self._total}  {note}  {duration(left)} left", self._bar is None)


class Log:
    """Writes to the console and to `file`. Use it as a context manager."""

    def __init__(self, file: Path, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=not sys.stdout.isatty(), highlight=False)
        self._path = file
        self._file: TextIO | None = None

    def __enter__(self) -> Log:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def line(self, text: str, on_console: bool = True, style: str = "") -> None:
        if on_console:
            self.console.print(text, style=style, markup=False)
        if self._file is not None:
            stamp = datetime.now().strftime("%H:%M:%S")
            self._file.write("".join(f"{stamp}  {row}\n" for row in text.splitlines()))
            self._file.flush()

    def warning(self, text: str) -> None:
        self.line(f"warning: {text}", style="yellow")

    def show_warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """Takes the place of `warnings.showwarning`: what other libraries warn of goes to the file only."""
        if Path(filename).is_relative_to(Path(__file__).parent):
            self.warning(str(message))
        else:
            # From the package on: where it is installed says something of the machine, and nothing of the warning.
            where = filename.rpartition("site-packages/")[2]
            self.line(f"warning: {where}:{lineno}: {message}", on_console=False)

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        """A progress bar with the time left, or a line every ten seconds where the output is no terminal."""
        if not self.console.is_terminal:
            yield Task(self, label, total, None)
            return
        with self._bar() as bar:
            yield Task(self, label, total, bar)

    @contextmanager
    def stages(self) -> Iterator[Callable[[str, int, int], None]]:
        """A function (stage, done, total) that shows a task for each stage; any thread may call it."""
        tasks: dict[str, Task] = {}
        with self._bar() if self.console.is_terminal else nullcontext() as bar:

            def progress(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = Task(self, stage, total, bar)
                tasks[stage].update(done, total=total)

            yield progress

    def _bar(self) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        return Progress(*columns, console=self.console, transient=True)

    def table(self, table: Table) -> None:
        self.console.print(table)
        if self._file is not None:
            Console(file=self._file, width=100).print(table)
            self._file.flush()
