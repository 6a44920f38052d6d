"""Ranks that stop without a word, as on a machine without power: their connections stay open."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cctorch import distributed, heartbeat


def _rank(rank: int, port: int, folder: str, silent: int | None) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="3")
    os.environ.update(TORCHELASTIC_RUN_ID="test")
    heartbeat.SECONDS_BETWEEN_BEATS, heartbeat.BEATS_TO_MISS = 0.1, 20
    said = contextlib.redirect_stderr(Path(folder, f"said{rank}").open("w"))  # noqa: SIM115
    with said, distributed.joined(torch.device("cpu")):
        distributed.sum_(torch.ones(1))
        if rank == silent:
            os.kill(os.getpid(), signal.SIGSTOP)
        distributed.sum_(torch.ones(1))
        if rank == 1:
            time.sleep(5)  # more than the beats to miss, and at the end, as rank 0 with the report
    distributed.leave(0)


def _codes(folder: Path, silent: int | None) -> list[int | None]:
    """Of the ranks, and None of one that did not end within a minute."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = mp.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, store.port, str(folder), silent)) for rank in range(3)]
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


@pytest.mark.parametrize("silent", [0, 1])
def test_one_that_is_silent_is_missed(silent: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    codes = _codes(tmp_path, silent)
    listener = (silent - 1) % 3
    assert codes[listener] == os.EX_TEMPFAIL
    said = (tmp_path / f"said{listener}").read_text()
    assert f"cctorch: rank {silent} has not been heard of for 2 s; the same command goes on" in said


def test_nobody_is_missed_who_is_late_or_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert _codes(tmp_path, None) == [0, 0, 0]
