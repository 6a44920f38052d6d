"""A run's folder and logs for as long as a process, or all ranks together, work on it."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Iterator

from rich.console import Console

from cctorch import distributed
from cctorch.config import Config
from cctorch.interruption import Interrupted, Interruption
from cctorch.log import Log
from cctorch.store import Folder


@contextlib.contextmanager
def opened(
    config: Config, interruption: Interruption, fresh: bool, console: Console | None
) -> Iterator[tuple[Folder, Log]]:
    """The folder, locked by rank 0, and this rank's log. How the block ends is noted in both.

    Raises ConfigError where the folder belongs to another process or configuration, Interrupted for an error that says
    no more than that another rank is gone.
    """
    folder = Folder(config.folder)
    with contextlib.ExitStack() as stack:
        distributed.on_main(lambda: _open(folder, config, fresh, stack))
        log = stack.enter_context(_log(folder, console))
        stack.enter_context(warnings.catch_warnings())
        warnings.showwarning = log.show_warning
        with _failures_noted(folder, log, interruption):
            yield folder, log


def _open(folder: Folder, config: Config, fresh: bool, stack: contextlib.ExitStack) -> None:
    stack.enter_context(folder.locked())
    # The command that a launcher repeats may say --fresh.
    if fresh and not distributed.was_restarted():
        folder.clear()
    folder.begin(config)


def _log(folder: Folder, console: Console | None) -> Log:
    if distributed.is_main():
        return Log(folder.path / "run.log", console)
    return Log(folder.path / "logs" / f"rank{distributed.rank()}.log", Console(quiet=True))


@contextlib.contextmanager
def _failures_noted(folder: Folder, log: Log, interruption: Interruption) -> Iterator[None]:
    """In the log, and for `cctorch status` in failure.txt: a failed run will fail again, an interrupted one not."""
    try:
        yield
    except KeyboardInterrupt as error:
        log.line(f"interrupted: {error or 'Ctrl-C'}", on_console=False)
        raise
    except Exception as error:
        if distributed.world_size() > 1 and (interruption.requested or distributed.lost_a_rank(error)):
            log.line(f"interrupted, another rank is gone: {error}", on_console=False)
            raise Interrupted(f"another rank is gone: {error}") from error
        with contextlib.suppress(OSError):
            log.line(f"failed: {error}\n{traceback.format_exc()}", on_console=False)
            if distributed.is_main():
                folder.write("failure.txt", f"{error}\n")
        raise
