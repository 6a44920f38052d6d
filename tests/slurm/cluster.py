"""Slurm on this machine: a controller, and two nodes, each a namespace of processes with a name and an address."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Two "GPUs" for each node: files that exist. A program sees that Slurm gave it two, and finds no CUDA device.
GPUS = "/dev/null,/dev/zero"
NODES = {"node9": "127.0.0.9", "node10": "127.0.0.10"}
EXAMPLES = Path(__file__).parents[2] / "examples" / "slurm"


def missing() -> str:
    """What this machine lacks for it; empty where it lacks nothing."""
    if shutil.which("slurmctld") is None or shutil.which("slurmd") is None:
        return "Slurm is missing: apt install slurm-wlm"
    if subprocess.run(["unshare", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode:
        return "namespaces can't be made here: run it as root"
    return ""


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = (), **variables: str) -> int:
        """An example as it stands, for the few cores of this machine."""
        command = ["sbatch", "--parsable", "--gpus-per-node=2", "--cpus-per-task=2", "--time=30", *options]
        said = self._run(*command, str(EXAMPLES / script), *arguments, variables=variables)
        return int(said)

    def state(self, job: int) -> str:
        return self._of(job, "JobState")

    def restarts(self, job: int) -> int:
        return int(self._of(job, "Restarts"))

    def log(self, job: int) -> str:
        return (self.folder / f"cctorch-{job}.log").read_text(errors="replace")

    def warn(self, job: int) -> None:
        """What Slurm sends to the steps of a job that asked for --signal=USR1@..., before its time is over."""
        self._run("scancel", "--signal=USR1", str(job))

    def start_soon(self, job: int) -> None:
        """A job that was queued again would wait for two minutes; in the second of its end its node would refuse it."""
        self._run("scontrol", "update", f"JobId={job}", "StartTime=now+5")

    def preempt(self) -> None:
        """A job that goes before all others has both nodes, for a second."""
        self._run("srun", "--partition=urgent", "--nodes=2", "--exclusive", "sleep", "1")

    def cancel(self) -> None:
        self._run("scancel", "--user=root", "--full")
        wait(lambda: not self._run("squeue", "--noheader"), "for jobs to end", 90)

    def power_off(self, node: str) -> None:
        """All of its processes are gone, with the first of their namespace."""
        self._nodes[node].kill()
        self._nodes.pop(node).wait()

    def power_on(self) -> None:
        for node in NODES.keys() - self._nodes.keys():
            begin = 'mount --bind "$1" /etc/hosts && hostname "$2" && exec slurmd -D -N "$2"'
            apart = ["unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child=KILL"]
            command = [*apart, "sh", "-c", begin, "sh", str(self.folder / "hosts"), node]
            self._nodes[node] = subprocess.Popen(command, env=self.environment, stderr=subprocess.DEVNULL)
        wait(lambda: self._run("sinfo", "--noheader", "--states=idle", "--format=%D") == "2", "for both nodes", 60)

    def close(self) -> None:
        for node in list(self._nodes):
            self.power_off(node)

    def _of(self, job: int, field: str) -> str:
        found = re.search(rf"\b{field}=(\S+)", self._run("scontrol", "show", "job", str(job)))
        assert found is not None, field
        return found.group(1)

    def _run(self, *command: str, variables: dict[str, str] | None = None) -> str:
        environment = {**self.environment, **(variables or {})}
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()


@contextmanager
def started(folder: Path) -> Iterator[Cluster]:
    folder.mkdir(parents=True)
    (folder / "slurm.conf").write_text(_configuration(folder))
    (folder / "gres.conf").write_text(f"NodeName={','.join(NODES)} Name=gpu File={GPUS}\n")
    hosts = {"localhost": "127.0.0.1", **NODES}
    (folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
    cluster = Cluster(folder)
    controller = subprocess.Popen(["slurmctld", "-D", "-c"], env=cluster.environment, stderr=subprocess.DEVNULL)
    try:
        cluster.power_on()
        yield cluster
    finally:
        cluster.close()
        controller.kill()
        controller.wait()


def wait(until: Callable[[], bool], what: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, f"waited {seconds:g} s {what}"
        time.sleep(0.2)


def _configuration(folder: Path) -> str:
    (folder / "state").mkdir()
    ports = iter(_free_ports(1 + len(NODES)))
    lines = [
        "ClusterName=tests",
        f"SlurmctldHost={socket.gethostname().split('.')[0]}(127.0.0.1)",
        f"SlurmctldPort={next(ports)}",
        "SlurmUser=root",
        "AuthType=auth/none",
        "CredType=cred/none",
        "MailProg=/bin/true",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "SlurmdParameters=config_overrides",
        "GresTypes=gpu",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "ReturnToService=2",
        "SlurmdTimeout=10",
        "PropagateResourceLimitsExcept=ALL",
        f"StateSaveLocation={folder / 'state'}",
        f"SlurmdSpoolDir={folder / 'spool-%n'}",
        f"SlurmctldPidFile={folder / 'slurmctld.pid'}",
        f"SlurmdPidFile={folder / 'slurmd-%n.pid'}",
        f"SlurmctldLogFile={folder / 'slurmctld.log'}",
        f"SlurmdLogFile={folder / 'slurmd-%n.log'}",
    ]
    for node, address in NODES.items():
        lines.append(f"NodeName={node} NodeAddr={address} Port={next(ports)} CPUs=16 RealMemory=8000 Gres=gpu:2")
    lines.append("PartitionName=usual Nodes=ALL Default=YES PriorityTier=1 GraceTime=40 State=UP")
    lines.append("PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF State=UP")
    return "\n".join(lines) + "\n"


def _free_ports(count: int) -> list[int]:
    with_port = [socket.socket() for _ in range(count)]
    for each in with_port:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in with_port]
    for each in with_port:
        each.close()
    return ports
