from __future__ import annotations

import threading

import torch.distributed as dist
from cctorch.rendezvous import agree


def _start(store: dist.Store, order: list[int]) -> list[str]:
    names = [""] * len(order)

    def join(rank: int) -> None:
        names[rank] = agree(store, rank, len(order))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in order]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return names


def test_every_start_of_the_ranks_agrees_on_a_name_of_its_own() -> None:
    store = dist.HashStore()
    seen = set()
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2], [0, 1], [1, 0], [0, 1, 2], [0]):
        [name] = set(_start(store, order))
        assert name
        assert name not in seen
        seen.add(name)


def test_what_a_rank_left_that_died_while_joining_does_not_count() -> None:
    store = dist.HashStore()
    store.set("token/1", "of the dead")
    store.set("confirmed/1", "of the dead")
    store.set("answer/1", "of the dead by the dead")
    assert len(set(_start(store, [0, 1]))) == 1
