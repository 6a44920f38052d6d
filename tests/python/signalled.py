"""Runs that a signal interrupts at a step of training."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cctorch import distributed
from cctorch.interruption import Interrupted


@contextlib.contextmanager
def signalled_at(stop: int) -> Iterator[None]:
    """SIGUSR1 for the last rank at its step number `stop` within; the body has to end as interrupted."""
    step, calls = torch.optim.SGD.step, itertools.count(1)

    def signalled(*arguments: Any, **options: Any) -> Any:
        if next(calls) == stop and distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", signalled)
        with pytest.raises(Interrupted):
            yield
