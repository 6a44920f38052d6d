"""A rank whose machine is gone, which no connection tells: one without power closes none, and a collective would wait.

Each rank says through torchrun's store, every few seconds, that it is there, and listens to the next one; the last one
to the first. Who hears nothing for long ends its own process. torchrun does the rest: it ends the ranks beside that
one, and their ends reach the ranks of other machines.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta

from torch.distributed.distributed_c10d import Store

SECONDS_BETWEEN_BEATS = 5.0
# Three minutes, counted in beats of one's own: a job that was suspended as a whole has missed none.
BEATS_TO_MISS = 36


@contextlib.contextmanager
def beating(store: Store, rank: int, ranks: int, lost: Callable[[str], None]) -> Iterator[None]:
    """`lost` is called once, in a thread, with what is to be said when nothing has been heard for three minutes.

    Every rank comes here, and waits for the others before it leaves, and again before it takes `store` away from them.
    """
    # Another connection: the main thread may wait in its own, for what rank 0 takes long for.
    store = store.clone()  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=SECONDS_BETWEEN_BEATS * BEATS_TO_MISS))
    stopped = threading.Event()
    thread = threading.Thread(target=_beat, args=(store, rank, (rank + 1) % ranks, stopped, lost), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _beat(store: Store, rank: int, neighbor: int, stopped: threading.Event, lost: Callable[[str], None]) -> None:
    beat, missed, heard = 0, 0, b""
    try:
        while missed < BEATS_TO_MISS:
            store.set(f"beat/{rank}", str(beat))
            found = store.get(f"beat/{neighbor}")
            beat, missed, heard = beat + 1, missed + 1 if found == heard else 0, found
            if stopped.wait(SECONDS_BETWEEN_BEATS):
                return
    except RuntimeError as error:  # of torch.distributed, about the connection
        if not stopped.is_set():
            lost(f"the store of the ranks is gone: {error}")
        return
    lost(f"rank {neighbor} has not been heard of for {SECONDS_BETWEEN_BEATS * BEATS_TO_MISS:g} s")
