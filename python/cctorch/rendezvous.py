"""How the ranks that torchrun started find each other, and not those of an earlier start."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

_PATIENCE = timedelta(minutes=10)
_SECONDS_BETWEEN_LOOKS = 0.02


def fresh_store() -> tuple[Store, int, int]:
    """torchrun's store under a prefix of this start's own; rank; number of ranks.

    One store serves all restarts of torchrun's workers (torch 2.11), so that gloo finds the addresses of the ranks that
    were there before, and tries to connect to them. Restarts can't be told apart by their number: it is counted on each
    node for itself.
    """
    store, rank, ranks = next(rendezvous("env://", timeout=_PATIENCE))
    return PrefixStore(agree(store, rank, ranks), store), rank, ranks


def agree(store: Store, rank: int, ranks: int) -> str:
    """The same new name on every rank, whatever earlier ranks have left in `store`.

    Each rank shows a token of its own until rank 0 has answered to that token with the name, and confirms the name.
    """
    own = secrets.token_hex(8)
    if rank == 0:
        answered: dict[int, str] = {}

        def all_confirmed() -> str | None:
            missing = [r for r in range(1, ranks) if _read(store, f"confirmed/{r}") != own]
            for r in missing:
                token = _read(store, f"token/{r}")
                if token and answered.get(r) != token:
                    answered[r] = token
                    store.set(f"answer/{r}", f"{token} {own}")
            return None if missing else own

        return _wait(all_confirmed, "the other ranks")
    store.set(f"token/{rank}", own)

    def name() -> str | None:
        token, _, found = _read(store, f"answer/{rank}").partition(" ")
        return found if token == own else None

    found = _wait(name, "rank 0")
    store.set(f"confirmed/{rank}", found)
    return found


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _wait(found: Callable[[], str | None], whom: str) -> str:
    deadline = time.monotonic() + _PATIENCE.total_seconds()
    while (name := found()) is None:
        if time.monotonic() > deadline:
            raise RuntimeError(f"no answer from {whom} within {_PATIENCE}: start all ranks of the job")
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return name
