"""Data parallel: which process of how many this one is, and what goes over all of them. Alone, all this is a no-op.

    torchrun --nproc-per-node 4 -m cctorch run CONFIG

Collectives (`sum_`, `on_main`, `Vote`, ...) have to be called on every rank, in the same order.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cctorch import heartbeat
from cctorch.rendezvous import fresh_store

T = TypeVar("T")

# Rank 0 searches, measures and exports while the others wait. A rank that died is noticed at once, by torchrun or by
# its connections; one without power by its heartbeat.
_PATIENCE = timedelta(hours=2)


# Groups that were destroyed, but for this last reference. That of a DistributedDataParallel which outlives its group
# (torch 2.11's Reducer) ends gloo's threads while it holds Python's lock, for which they wait to free a tensor
# (github.com/pytorch/pytorch/issues/56297).
_ended: list[dist.ProcessGroup | None] = []


class MismatchError(RuntimeError):
    """Something that has to be the same on every rank is not: the message names it, and the ranks."""


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the one that writes: rank 0."""
    return rank() == 0


def local_rank() -> int:
    """Number of this process on its machine: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return dist.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1


def was_restarted() -> bool:
    """Whether torchrun or Slurm starts the same command for another time."""
    return any(int(os.environ.get(count, "0")) > 0 for count in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """The process group of torchrun: gloo for tensors on the CPU, NCCL for those on a GPU.

    Nothing happens in a process that torchrun did not start, or where there is a process group already.
    """
    if dist.is_initialized() or not launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, ranks = fresh_store()
    backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backends, store=store, rank=rank, world_size=ranks, timeout=_PATIENCE)
    # After an error nobody waits, and nothing is destroyed: others may wait for what this rank will never send.
    with heartbeat.beating(store, rank, ranks, _lost):
        yield
        sum_(torch.zeros(1))  # all have done what they had to: they may fall silent
    sum_(torch.zeros(1))  # nobody listens any more: the store may go
    _ended.append(dist.group.WORLD)
    dist.destroy_process_group()


def _lost(what: str) -> NoReturn:
    print(f"cctorch: {what}; the same command goes on from the last checkpoint", file=sys.stderr)
    leave(os.EX_TEMPFAIL)


def leave(code: int) -> NoReturn:
    """Ends the process of a rank with that exit code, at once.

    With threads of torch's process groups still there, Python's own way out has been seen to abort, a few times in a
    hundred, a process that had done all it had to ("terminate called without an active exception"): they free tensors
    that belong to Python, which is on its way out (github.com/pytorch/pytorch/pull/179291).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def background_group() -> dist.ProcessGroup | None:
    """All ranks, for what another thread sends beside the main one, from CPU to CPU. Alone: None."""
    return dist.new_group(timeout=_PATIENCE, backend="gloo") if dist.is_initialized() else None


def sum_(tensor: Tensor) -> Tensor:
    """Adds `tensor` up over the ranks, in place. The result is the same on all of them to the bit."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(tensor: Tensor) -> Tensor:
    """The `tensor` of each rank, all of one shape: ranks x shape."""
    if world_size() == 1:
        return tensor.unsqueeze(0)
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)


def any_rank(value: bool) -> bool:
    return bool(sum_(torch.tensor(int(value))))


class Vote:
    """Asks at every step whether any rank says yes, without waiting: the answer is the one to the call before."""

    def __init__(self) -> None:
        self._asked: tuple[Tensor, dist.Work | None] | None = None

    def __call__(self, mine: bool) -> bool:
        if world_size() == 1:
            return mine
        answer = False
        if self._asked is not None:
            votes, work = self._asked
            if work is not None:
                work.wait()
            answer = bool(votes)
        votes = torch.tensor(int(mine))
        self._asked = votes, dist.all_reduce(votes, async_op=True)
        return answer


def on_main(function: Callable[[], T]) -> T:
    """What `function` returns on rank 0, given to every rank. What it raises there, every rank raises."""
    if world_size() == 1:
        return function()
    result: T | None = None
    error: BaseException | None = None
    if is_main():
        try:
            result = function()
        except BaseException as raised:  # an interruption too: the others wait
            error = raised
    outcome = [result, _portable(error)]
    dist.broadcast_object_list(outcome, src=0)
    if error is not None:
        raise error
    if isinstance(outcome[1], BaseException):
        raise outcome[1]
    return outcome[0]  # type: ignore[return-value]


def on_all(function: Callable[[], T]) -> list[T]:
    """What `function` returns on each rank, given to every rank. What it raises on one, every rank raises."""
    if world_size() == 1:
        return [function()]
    result: T | None = None
    error: BaseException | None = None
    try:
        result = function()
    except BaseException as raised:  # an interruption too: the others wait
        error = raised
    outcomes: list[tuple[T, BaseException | None]] = [None] * world_size()  # type: ignore[list-item]
    dist.all_gather_object(outcomes, (result, _portable(error)))
    if error is not None:
        raise error
    for _, of_another in outcomes:
        if of_another is not None:
            raise of_another
    return [of_rank for of_rank, _ in outcomes]


def broadcast_buffers(model: nn.Module) -> None:
    """Those of rank 0, for every rank."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def assert_identical(what: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Compares (name, tensor) pairs between the ranks, by hashes.

    Raises MismatchError, on every rank, naming the first tensor that differs and the ranks that differ from rank 0.
    """
    if world_size() == 1:
        return
    found = dict(tensors)
    _compare(f"{what}: the names of the layers", ["names"], [_hash("\n".join(found).encode())])
    _compare(what, found, [_hash_tensor(value) for value in found.values()])


def parallel(model: nn.Module, example: Tensor, *, broadcasts_buffers: bool) -> nn.Module:
    """`model` for training steps: its gradients are averaged over the ranks in the backward pass. Alone: `model`.

    DistributedDataParallel orders its buckets anew after its first backward pass, and the order of a sum over more than
    two ranks depends on the place in a bucket. A pass over `example` (one input, in evaluation mode) comes first
    here, so that a run that was resumed adds up as one that was not.
    """
    if world_size() == 1:
        return model
    devices = [example.device] if example.is_cuda else None
    wrapped = DistributedDataParallel(model, devices, broadcast_buffers=broadcasts_buffers)
    wrapped.eval()
    wrapped(example).sum().backward()
    for parameter in model.parameters():
        parameter.grad = None
    return wrapped


def lost_a_rank(error: BaseException) -> bool:
    """Whether `error` says that another process is gone or did not answer."""
    return world_size() > 1 and (
        isinstance(error, dist.DistError)
        or (isinstance(error, RuntimeError) and any(word in str(error).lower() for word in ("gloo", "nccl")))
    )


def _portable(error: BaseException | None) -> BaseException | None:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def _hash_tensor(tensor: Tensor) -> int:
    return _hash(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _compare(what: str, names: Iterable[str], hashes: list[int]) -> None:
    found = gather(torch.tensor(hashes))
    for name, column in zip(names, found.unbind(1), strict=True):
        others = (column != column[0]).nonzero().flatten().tolist()
        if others:
            raise MismatchError(
                f"{what}: '{name}' of rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))} is not that "
                "of rank 0; expected the same bits. Give all ranks the same software, kind of machine and threads"
            )
