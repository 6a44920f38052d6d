"""The order in which tensors are compressed and written: a flow shop of two machines."""

from __future__ import annotations

from collections.abc import Sequence


def johnson(first: Sequence[float], second: Sequence[float]) -> list[int]:
    """The order of jobs that ends soonest when each passes machine one, then machine two (Johnson 1954).

    Jobs that are shorter on the first machine come first, by their time there; the others follow, by falling time on
    the second. The second machine then starts early and has little left to do when the first one is done.

    Args:
        first: seconds of each job on machine one: compressing.
        second: seconds on machine two: writing.

    Returns:
        Indices of the jobs.

    Example:
        >>> johnson([3.0, 1.0, 2.0], [1.0, 2.0, 3.0])
        [1, 2, 0]
    """
    jobs = range(len(first))
    early = sorted((job for job in jobs if first[job] < second[job]), key=lambda job: first[job])
    late = sorted((job for job in jobs if first[job] >= second[job]), key=lambda job: -second[job])
    return early + late


def makespan(order: Sequence[int], first: Sequence[float], second: Sequence[float]) -> float:
    """Seconds until the last job has left machine two.

    Example:
        >>> makespan([1, 2, 0], [3.0, 1.0, 2.0], [1.0, 2.0, 3.0])
        7.0
    """
    compressed = written = 0.0
    for job in order:
        compressed += first[job]
        written = max(written, compressed) + second[job]
    return written


def balanced(seconds: Sequence[float], ranks: int) -> list[int]:
    """The rank that takes each job: the longest first, each to the rank with the least to do.

    Example:
        >>> balanced([5.0, 4.0, 3.0, 2.0], 2)
        [0, 1, 1, 0]
    """
    loads = [0.0] * ranks
    taken = [0] * len(seconds)
    for job in sorted(range(len(seconds)), key=lambda job: -seconds[job]):
        rank = min(range(ranks), key=lambda rank: loads[rank])
        taken[job] = rank
        loads[rank] += seconds[job]
    return taken
