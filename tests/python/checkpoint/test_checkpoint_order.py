"""Johnson's rule and the shares of the ranks, against every order and every share."""

from __future__ import annotations

import itertools

import pytest
from cctorch.checkpoint import balanced, johnson, makespan
from hypothesis import given
from hypothesis import strategies as st

TIMES = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=0, max_size=6)


def _simulated(order: list[int], first: list[int], second: list[int]) -> int:
    """Tick by tick: a job at a time on each machine."""
    waiting, queue, busy_first, busy_second, now = list(order), [], 0, 0, 0
    while waiting or queue or busy_first or busy_second:
        if not busy_first and waiting:
            current = waiting.pop(0)
            busy_first = first[current]
            if busy_first == 0:
                queue.append(current)
                continue
        if not busy_second and queue:
            busy_second = second[queue.pop(0)]
            if busy_second == 0:
                continue
        step = min(time for time in (busy_first, busy_second) if time) if busy_first or busy_second else 0
        now += step
        if busy_first:
            busy_first -= step
            if not busy_first:
                queue.append(current)
        if busy_second:
            busy_second -= step
    return now


@given(TIMES)
def test_no_order_ends_sooner(times: list[tuple[int, int]]) -> None:
    first, second = [a for a, _ in times], [b for _, b in times]
    order = johnson(first, second)
    assert sorted(order) == list(range(len(times)))
    best = min(_simulated(list(other), first, second) for other in itertools.permutations(range(len(times))))
    assert _simulated(order, first, second) == best
    assert makespan(order, first, second) == best


@given(st.lists(st.integers(1, 20), max_size=7), st.integers(1, 3))
def test_shares_are_close_to_the_best(times: list[int], ranks: int) -> None:
    owners = balanced([float(time) for time in times], ranks)

    def longest(shares: tuple[int, ...] | list[int]) -> int:
        return max(sum(t for t, rank in zip(times, shares, strict=True) if rank == r) for r in range(ranks))

    best = min(longest(shares) for shares in itertools.product(range(ranks), repeat=len(times)))
    # Graham 1969, of the longest first.
    assert longest(owners) <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-9


def test_makespan_is_that_of_the_paper_by_hand() -> None:
    # Compressing 2, 1; writing 1, 3: the short one first, and the other is compressed while it is written.
    assert johnson([2, 1], [1, 3]) == [1, 0]
    assert makespan([1, 0], [2, 1], [1, 3]) == pytest.approx(5)
    assert makespan([0, 1], [2, 1], [1, 3]) == pytest.approx(6)
