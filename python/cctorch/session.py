"""A run's folder and logs for as long as a process, or all ranks together, work on it."""

from __future__ import annotations

import contextlib
import socket
import time
import traceback
import warnings
from collections.abc import Iterator

from rich.console import Console

from cctorch import distributed
from cctorch.config import Config, ConfigError
from cctorch.interruption import Interrupted, Interruption
from cctorch.log import Log
from cctorch.store import Folder

# What is new in a network's folder may be seen late.
_SECONDS_TO_APPEAR = 60.0


@contextlib.contextmanager
def locked(config: Config, interruption: Interruption) -> Iterator[Folder]:
    """The run's folder, locked by rank 0; nothing is written to it yet.

    Raises ConfigError where it belongs to another process or another rank does not see it, Interrupted for an error
    that says no more than that another rank is gone.
    """
    folder = Folder(config.folder)
    with contextlib.ExitStack() as stack:
        distributed.on_main(lambda: stack.enter_context(folder.locked()))
        _check_shared(folder)
        try:
            yield folder
        except Exception as error:
            if _other_rank_is_gone(error, interruption):
                raise Interrupted(f"another rank is gone: {error}") from error
            raise


def _check_shared(folder: Folder) -> None:
    """Every rank writes its part of a checkpoint, into one folder."""
    wanted = distributed.on_main(folder.holder)
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while (seen := folder.holder()) != wanted and time.monotonic() < deadline:
        time.sleep(0.1)
    hosts = distributed.on_all(lambda: None if seen == wanted else socket.gethostname())
    blind = {rank: host for rank, host in enumerate(hosts) if host is not None}
    if blind:
        ranks = ", ".join(f"{rank} (on {host})" for rank, host in blind.items())
        raise ConfigError(
            f"output: {folder.path.absolute()} of rank 0 is not seen by rank {ranks}; expected a folder that all "
            "machines share, since all ranks write the checkpoints"
        )


@contextlib.contextmanager
def logged(
    folder: Folder, config: Config, interruption: Interruption, fresh: bool, console: Console | None
) -> Iterator[Log]:
    """This rank's log, once the folder has its configuration. How the block ends is noted in both."""

    def begin() -> None:
        if fresh:
            folder.clear()
        folder.begin(config)

    distributed.on_main(begin)
    with _log(folder, console) as log, warnings.catch_warnings(), _failures_noted(folder, log, interruption):
        warnings.showwarning = log.show_warning
        yield log


def _other_rank_is_gone(error: Exception, interruption: Interruption) -> bool:
    return distributed.world_size() > 1 and (interruption.requested or distributed.lost_a_rank(error))


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
        if _other_rank_is_gone(error, interruption):
            log.line(f"interrupted, another rank is gone: {error}", on_console=False)
            raise
        with contextlib.suppress(OSError):
            log.line(f"failed: {error}\n{traceback.format_exc()}", on_console=False)
            if distributed.is_main():
                folder.write("failure.txt", f"{error}\n")
        raise
