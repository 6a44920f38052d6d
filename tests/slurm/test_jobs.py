"""Jobs that finish, lose a node, are warned and preempted: all end with the bits of one that was left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cluster as slurm
import pytest
import torch
import yaml
from cctorch.status import status
from cluster import Cluster, wait
from safetensors.torch import load_file
from tiny_run import tree, write_dataset

pytestmark = pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seen by all nodes: the configuration and the runs."""
    folder = tmp_path_factory.mktemp("shared")
    training = {"epochs": 60, "batch_size": 32, "lr": 0.05}
    content = tree(write_dataset(folder / "data"), folder, train=training, finetune={**training, "epochs": 2})
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture(scope="module")
def whole_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with slurm.started(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture
def cluster(whole_cluster: Cluster) -> Iterator[Cluster]:
    whole_cluster.power_on()
    yield whole_cluster
    whole_cluster.cancel()


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[int, Path]:
    """Runs of 2 and 4 ranks without Slurm."""
    for ranks in (2, 4):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [*torchrun, "-m", "cctorch", "run", str(folder / "tiny.yaml"), f"name=undisturbed{ranks}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return {ranks: folder / f"undisturbed{ranks}" for ranks in (2, 4)}


def _same(run: Path, other: Path) -> None:
    assert (run / "plan.json").read_bytes() == (other / "plan.json").read_bytes()
    found, wanted = (load_file(each / "checkpoints" / "compressed.safetensors") for each in (run, other))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def _trains(cluster: Cluster, job: int, run: Path, epoch: int) -> None:
    """Waits until the job does, and has finished `epoch` epochs."""

    def so_far() -> bool:
        assert cluster.state(job) in ("PENDING", "RUNNING", "CONFIGURING"), cluster.log(job)
        return (run / "config.yaml").exists() and status(run).state == "running" and status(run).epoch >= epoch

    wait(so_far, f"for {run.name} to train", 120)


def _completed(cluster: Cluster, job: int, run: Path) -> None:
    def so_far() -> bool:
        state = cluster.state(job)
        assert state in ("PENDING", "RUNNING", "COMPLETING", "COMPLETED"), f"{state}\n{cluster.log(job)}"
        return state == "COMPLETED"

    wait(so_far, f"for {run.name}", 300)
    assert status(run).state == "finished"


def _queued_again(cluster: Cluster, job: int, run: Path) -> None:
    wait(lambda: cluster.state(job) == "PENDING", "for the job to be queued again", 120)
    assert status(run).state == "interrupted"
    assert cluster.restarts(job) == 1
    cluster.start_soon(job)


def test_one_node(cluster: Cluster, folder: Path, undisturbed: dict[int, Path]) -> None:
    job = cluster.submit("single_node.sbatch", str(folder / "tiny.yaml"), "name=one")
    _completed(cluster, job, folder / "one")
    _same(folder / "one", undisturbed[2])


def test_two_nodes(cluster: Cluster, folder: Path, undisturbed: dict[int, Path]) -> None:
    job = cluster.submit("multi_node.sbatch", str(folder / "tiny.yaml"), "name=two")
    _completed(cluster, job, folder / "two")
    assert len(list((folder / "two" / "logs").iterdir())) == 3  # of ranks 1 to 3; rank 0 says all in run.log
    _same(folder / "two", undisturbed[4])


@pytest.mark.parametrize("lost", slurm.NODES)
def test_a_node_that_comes_back(cluster: Cluster, folder: Path, undisturbed: dict[int, Path], lost: str) -> None:
    run = folder / f"lost_{lost}"
    job = cluster.submit("multi_node.sbatch", str(folder / "tiny.yaml"), f"name={run.name}")
    _trains(cluster, job, run, 5)
    cluster.power_off(lost)
    _queued_again(cluster, job, run)
    cluster.power_on()
    _completed(cluster, job, run)
    _same(run, undisturbed[4])


@pytest.mark.parametrize("lost", slurm.NODES)
def test_a_node_that_never_comes_back(cluster: Cluster, folder: Path, lost: str) -> None:
    run = folder / f"without_{lost}"
    arguments = (str(folder / "tiny.yaml"), f"name={run.name}")
    job = cluster.submit("multi_node.sbatch", *arguments, options=("--nodes=1-2",))
    _trains(cluster, job, run, 5)
    assert (run / "logs" / "rank3.log").exists()
    cluster.power_off(lost)
    _queued_again(cluster, job, run)
    _completed(cluster, job, run)
    assert "resuming at stage train" in (run / "run.log").read_text()


@pytest.mark.parametrize("ended", ["warned", "preempted"])
def test_queued_again(cluster: Cluster, folder: Path, undisturbed: dict[int, Path], ended: str) -> None:
    run = folder / ended
    job = cluster.submit("requeue.sbatch", str(folder / "tiny.yaml"), f"name={run.name}", RUN=str(run))
    _trains(cluster, job, run, 5)
    if ended == "warned":
        cluster.warn(job)
    else:
        cluster.preempt()
    _queued_again(cluster, job, run)
    _completed(cluster, job, run)
    _same(run, undisturbed[2])
