"""Signals that ask a run to end, so that it ends where it can go on."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
    """The run was asked to end, or lost one of its processes: the same command goes on from its checkpoint."""


class Interruption:
    """Takes SIGTERM, SIGUSR1 (Slurm's warning) and SIGINT while it is entered, in the main thread.

    Raises Interrupted at once where nothing would be lost, and inside `deferred` only notes the wish. Ctrl-C for a
    second time is a KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._deferred = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, who trains asks for `requested` and ends at a checkpoint. One that came too late is heard after."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.requested:
            raise self.interrupted()

    def interrupted(self) -> Interrupted:
        return Interrupted(f"{self.signal.name} received" if self.signal else "another rank was asked to end")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        repeated = self.requested
        self.signal = self.signal or signal.Signals(number)
        if repeated:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
        elif not self._deferred:
            raise self.interrupted()
