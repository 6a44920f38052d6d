"""Several ranks under gloo, each a process on this machine."""

from __future__ import annotations

import faulthandler
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cctorch import distributed


def spawn(ranks: int, folder: Path, function: Callable[..., None], *arguments: Any) -> None:
    """`function(*arguments)` on each of them; `folder` is for them to meet."""
    folder.mkdir(parents=True, exist_ok=True)
    mp.spawn(_enter, (ranks, str(folder / "rendezvous"), function, arguments), nprocs=ranks)


def _enter(rank: int, ranks: int, rendezvous: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    faulthandler.enable()  # a rank that crashes says where
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=ranks)
    function(*arguments)
    dist.destroy_process_group()
    distributed.leave(0)
