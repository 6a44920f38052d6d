"""The command under torchrun: a rank that dies, a warning of the end, and a run that ends as if neither had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from cctorch.status import Status, status
from safetensors.torch import load_file
from tiny_run import tree, write_dataset

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
TORCHRUN += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--signals-to-handle", "SIGTERM,SIGUSR1"]


@contextmanager
def _started(config: Path, name: str) -> Iterator[subprocess.Popen[str]]:
    command = [*TORCHRUN, "-m", "cctorch", "run", str(config), f"name={name}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def _wait_for_step(folder: Path, process: subprocess.Popen[str], stage: str, epoch: int) -> Status:
    while process.poll() is None:
        if (folder / "config.yaml").exists():
            found = status(folder)
            if found.stage == stage and found.epoch >= epoch and found.state == "running":
                return found
        time.sleep(0.05)
    raise AssertionError(process.communicate()[0])


@pytest.fixture
def config(tmp_path: Path) -> Path:
    training = {"epochs": 40, "batch_size": 32, "lr": 0.05}
    content = tree(write_dataset(tmp_path / "data"), tmp_path, train=training, finetune={**training, "epochs": 2})
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_a_run_survives_a_dead_rank_and_a_warning(config: Path, tmp_path: Path) -> None:
    with _started(config, "whole") as process:
        said = process.communicate()[0]
        assert process.returncode == 0, said
    broken = tmp_path / "broken"
    with _started(config, "broken") as process:
        found = _wait_for_step(broken, process, "train", 2)
        assert found.process is not None
        os.kill(found.process, signal.SIGKILL)
        # torchrun starts both ranks anew.
        while status(broken).process in (found.process, None):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        _wait_for_step(broken, process, "train", 4)
        process.send_signal(signal.SIGUSR1)
        said = process.communicate()[0]
        assert process.returncode != 0
    code = [sys.executable, "-m", "cctorch", "status", str(broken), "--exit-code"]
    told = subprocess.run(code, capture_output=True, text=True, check=False)
    assert told.returncode == os.EX_TEMPFAIL, told.stdout + said
    assert "interrupted" in told.stdout
    assert "resuming at stage train" in (broken / "logs" / "rank1.log").read_text()
    with _started(config, "broken") as process:
        said = process.communicate()[0]
        assert process.returncode == 0, said
    assert (broken / "plan.json").read_bytes() == (tmp_path / "whole" / "plan.json").read_bytes()
    states = [load_file(folder / "checkpoints" / "compressed.safetensors") for folder in (broken, tmp_path / "whole")]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_a_wrong_configuration_is_told_once_per_rank(config: Path, tmp_path: Path) -> None:
    with _started(config, "bad/name") as process:
        said = process.communicate()[0]
    assert process.returncode == 1
    assert "cctorch: name = 'bad/name'" in said
    assert "exitcode  : 2" in said
