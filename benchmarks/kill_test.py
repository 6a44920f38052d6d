"""Kills a run at random points, lets it go on, and compares it with one that nothing disturbed: equal to the bit?

    python benchmarks/kill_test.py --ranks 2 --kills 50

A blow is one of: kill -9 of one rank (torchrun restarts all of them), of everything, SIGTERM or SIGINT to the launcher,
SIGUSR1 to it, kill -9 of everything and a newest checkpoint of which one file has lost its end. After each, the same
command is given again. A run that ends is compared (plan, weights of both models, the loss of every step, all metrics
but times), then another one begins, until there were as many blows as were asked for. One rank is a process without
torchrun.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "python"))
from tiny_run import tree, write_dataset

BLOWS = ("kill one", "kill all", "SIGTERM", "SIGINT", "SIGUSR1", "kill all, checkpoint cut")
TIMES = {"time", "seconds", "images_per_second"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--sharded", action="store_true", help="FSDP2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/kill_test"), help="is emptied first")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    data = write_dataset(arguments.folder / "data", train=338)
    training = {"epochs": 4, "batch_size": 16, "lr": 0.05}
    regularize = {
        **training,
        "q": [{"kind": "uniform_noise", "strength": 0.01}, {"kind": "magnitude_pruning", "sparsity": 0.5}],
        "frequency": {"kind": "constant", "period": 7},
    }
    stages = {"train": training, "finetune": training, "regularize": regularize}
    config = arguments.folder / "tiny.yaml"
    config.write_text(
        yaml.safe_dump(tree(data.resolve(), arguments.folder.resolve(), **stages, sharded=arguments.sharded))
    )
    test = KillTest(arguments.folder, config, arguments.ranks, random.Random(arguments.seed))
    return test.execute(arguments.kills)


class KillTest:
    def __init__(self, folder: Path, config: Path, ranks: int, chance: random.Random) -> None:
        self.folder, self.config, self.ranks, self.chance = folder, config, ranks, chance
        self.blows, self.states = Counter[str](), Counter[str]()

    def execute(self, kills: int) -> int:
        process = self._start("undisturbed")
        begun = self._wait_for_work(process, "undisturbed")
        while process.poll() is None and not (self.folder / "undisturbed" / "summary.json").exists():
            time.sleep(0.02)
        seconds = time.monotonic() - begun
        if (code := process.wait()) != 0:
            raise SystemExit(f"the undisturbed run ended with {code}")
        print(f"undisturbed, {self.ranks} ranks: {seconds:.1f} s without start and report", flush=True)
        runs, wrong = 0, 0
        while self.blows.total() < kills:
            runs += 1
            name = f"disturbed{runs}"
            starts = self._disturb(name, seconds, kills)
            differences = compare(self.folder / "undisturbed", self.folder / name)
            wrong += bool(differences)
            print(f"{name}: started {starts} times; {'; '.join(differences) or 'equal'}", flush=True)
        print(f"{self.blows.total()} blows ({dict(self.blows)}), states behind them {dict(self.states)}")
        print(f"{runs} runs, {wrong} of them ended elsewhere")
        return 1 if wrong else 0

    def _disturb(self, name: str, seconds: float, kills: int) -> int:
        """Until the run has ended. Returns how often it was started.

        One that had finished when it was struck, and was writing its report, is left in peace from then on.
        """
        starts, finished = 0, False
        while True:
            starts += 1
            process = self._start(name)
            if not finished:
                self._let_work(process, name, seconds)
                if process.poll() is None and self.blows.total() < kills:
                    self._strike(process, name)
            code = process.wait()
            if code == 0:
                return starts
            state = self._status(name)
            self.states[state] += 1
            finished = state == "finished"
            if state == "failed" or starts > 200:
                raise SystemExit(f"{name} failed, exit code {code}: {self.folder / (name + '.log')}")

    def _let_work(self, process: subprocess.Popen[bytes], name: str, seconds: float) -> None:
        if self.chance.random() < 0.9:
            self._wait_for_work(process, name)
        deadline = time.monotonic() + self.chance.uniform(0, 0.6) * seconds
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)

    def _wait_for_work(self, process: subprocess.Popen[bytes], name: str) -> float:
        """Until the log has a new line. One in ten blows falls into the start instead."""
        log = self.folder / name / "run.log"
        size = log.stat().st_size if log.exists() else 0
        while process.poll() is None and not (log.exists() and log.stat().st_size > size):
            time.sleep(0.02)
        return time.monotonic()

    def _strike(self, process: subprocess.Popen[bytes], name: str) -> None:
        blow = self.chance.choice(BLOWS)
        self.blows[blow] += 1
        if blow.startswith("SIG"):
            process.send_signal(signal.Signals[blow])
            return
        workers = _children(process.pid) or [process.pid]
        if blow == "kill one":
            _kill(self.chance.choice(workers))
            return
        for victim in (process.pid, *workers):
            _kill(victim)
        process.wait()
        last = self.folder / name / "checkpoints" / "last"
        if blow.endswith("cut") and last.exists() and (last.parent / "previous").exists():
            file = self.chance.choice(sorted(last.iterdir()))
            os.truncate(file, self.chance.randrange(file.stat().st_size))

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        run = ["-m", "cctorch", "run", str(self.config), f"name={name}"]
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(self.ranks), "--max-restarts", "3"]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        torchrun += ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", *run]
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *(run if self.ranks == 1 else torchrun)],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def _status(self, name: str) -> str:
        command = [sys.executable, "-m", "cctorch", "status", str(self.folder / name), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return str(json.loads(done.stdout)["state"]) if done.returncode == 0 else "not begun"


def compare(undisturbed: Path, other: Path) -> list[str]:
    """What is different."""
    found = []
    if (undisturbed / "plan.json").read_bytes() != (other / "plan.json").read_bytes():
        found.append("plan.json")
    for name in ("dense.safetensors", "compressed.safetensors"):
        ours, theirs = (load_file(f / "checkpoints" / name) for f in (undisturbed, other))
        found += [f"{name}: {key}" for key in ours if not torch.equal(ours[key], theirs[key])][:1]
    for name in ("steps.jsonl", "metrics.jsonl"):
        if _untimed(undisturbed / name) != _untimed(other / name):
            found.append(name)
    return found


def _untimed(file: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def _children(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except FileNotFoundError:
        return []


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    raise SystemExit(main())
