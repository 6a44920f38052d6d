"""Two ranks in their group: one that stops without a word is missed, and the end of the group waits for nothing."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cctorch import distributed, heartbeat


def _enter(rank: int, port: int, folder: str, function: Callable[[], None]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(TORCHELASTIC_RUN_ID="test", TORCHELASTIC_USE_AGENT_STORE="True")
    heartbeat.SECONDS_BETWEEN_BEATS, heartbeat.BEATS_TO_MISS = 0.1, 20
    with contextlib.redirect_stderr(Path(folder, f"said{rank}").open("w")):
        function()
    distributed.leave(0)


def _codes(folder: Path, function: Callable[[], None], silent: int | None = None) -> list[int | None]:
    """Of the ranks, and None of one that did not end within a minute; the silent one is not waited for."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = mp.get_context("spawn")
    ranks = [context.Process(target=_enter, args=(rank, store.port, str(folder), function)) for rank in range(2)]
    for process in ranks:
        process.start()
    end = time.monotonic() + 60
    for rank, process in enumerate(ranks):
        if rank != silent:
            process.join(max(0, end - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    return codes


def _is_silent(silent: int) -> None:
    """As on a machine without power: its connections stay open."""
    with distributed.joined(torch.device("cpu")):
        distributed.sum_(torch.ones(1))
        if distributed.rank() == silent:
            os.kill(os.getpid(), signal.SIGSTOP)
        distributed.sum_(torch.ones(1))


def _first_is_silent() -> None:
    _is_silent(0)


def _second_is_silent() -> None:
    _is_silent(1)


@pytest.mark.parametrize(("silent", "function"), [(0, _first_is_silent), (1, _second_is_silent)], ids=["0", "1"])
def test_one_that_is_silent_is_missed(silent: int, function: Callable[[], None], tmp_path: Path) -> None:
    listener = 1 - silent
    assert _codes(tmp_path, function, silent)[listener] == os.EX_TEMPFAIL
    said = (tmp_path / f"said{listener}").read_text()
    assert f"cctorch: rank {silent} has not been heard of for 2 s; the same command goes on" in said


def _threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def _ends_late_with_a_reducer() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2))]
    with distributed.joined(torch.device("cpu")):
        # As DistributedDataParallel makes it.
        reducer = dist.Reducer(parameters, [[0]], [8], dist.group.WORLD, [False], 8, False, False, {}, 8)
        if distributed.rank() == 1:
            time.sleep(5)  # for longer than the beats to miss, as rank 0 with the report
    before = _threads()
    del reducer
    gc.collect()
    assert _threads() == before  # it did not wait for gloo's


def test_nobody_is_missed_who_is_late_and_no_thread_waited_for(tmp_path: Path) -> None:
    assert _codes(tmp_path, _ends_late_with_a_reducer) == [0, 0]
