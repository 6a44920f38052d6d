"""Saves a compressed checkpoint."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor

from cctorch import atomic
from cctorch._C import CompressionPlan
from cctorch.checkpoint import pack
from cctorch.checkpoint.codec import Codec
from cctorch.checkpoint.parts import Arrays
from cctorch.checkpoint.report import Report
from cctorch.checkpoint.rules import Rule
from cctorch.checkpoint.saving import Ranks, Saving


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    plan: CompressionPlan | str | None = None,
    metadata: Mapping[str, str] | None = None,
    codec: Codec = "sz3",
    error_bound: float = 0.01,
    relative: bool = True,
    rules: Sequence[Rule] = (),
    head_room: float = 0.1,
    bandwidth: float = 5e8,
    workers: int | None = None,
    across_ranks: bool = False,
) -> Report:
    """Writes tensors and plan into an HDF5 file, compressed (Jin et al., SC 2022). A reader sees the old or the new.

    Weights, which are tensors of float32 or float64 with two dimensions or more, may lose ``error_bound``; everything
    else is stored to the bit, and so are tensors whose names look like :data:`cctorch.checkpoint.EXACT`. A zero stays
    zero. Each compressed chunk is decoded and compared before it is written; one that breaks the bound is stored
    without loss.

    Args:
        path: conventionally ends in ``.h5``.
        tensors: dense, on any device; their names are arbitrary.
        plan: carried along.
        metadata: carried along.
        codec: ``sz3`` and ``zfp`` for weights, or ``zstd``, which loses nothing.
        error_bound: the largest difference of a value, in units of the tensor's root mean square if ``relative``.
        relative: as said.
        rules: the first whose pattern matches a name decides for that tensor.
        head_room: of a chunk's slot, as a share of its predicted size.
        bandwidth: bytes per second at which this rank can write, as far as known; only the order depends on it.
        workers: threads that compress. Absent: as many as PyTorch uses.
        across_ranks: every rank calls, with the same tensors and a path that all of them see, and compresses and
            writes its share.

    Returns:
        Sizes and times.

    Raises:
        ValueError: an argument, or a tensor that can't be stored; nothing was written.
        OSError: the disk is full, or another problem with it; the old file is intact.

    Example:
        >>> import tempfile, torch
        >>> from cctorch import checkpoint
        >>> weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = checkpoint.save(f"{folder}/model.h5", {"weight": weight}, error_bound=0.05)
        ...     loaded = checkpoint.load(f"{folder}/model.h5")
        >>> bool((loaded.tensors["weight"] - weight).abs().max() <= 0.05 * weight.square().mean().sqrt())
        True
        >>> report.ratio > 4
        True
    """
    begin = time.perf_counter()
    default = Rule("*", codec, error_bound, relative)
    _check_numbers(head_room, bandwidth, workers)
    _check_contents(tensors, plan, metadata or {}, rules)
    text = plan.to_json() if isinstance(plan, CompressionPlan) else plan
    ranks = Ranks(across_ranks)
    saving = Saving(Arrays(tensors, default, rules), ranks, head_room, bandwidth, workers or torch.get_num_threads())
    with contextlib.ExitStack() as stack:
        what = f"{sum(tensor.nbytes for tensor in tensors.values()):,} bytes before compression"
        temporary = ranks.on_main(lambda: stack.enter_context(atomic.replacing(path, what)))
        saving.into(temporary, text, dict(metadata or {}))
        size = ranks.on_main(lambda: temporary.stat().st_size)
        ranks.on_main(stack.close)
    return saving.report(size, time.perf_counter() - begin)


def _check_numbers(head_room: object, bandwidth: object, workers: object) -> None:
    rates = all(isinstance(rate, Real) and math.isfinite(rate) for rate in (head_room, bandwidth))
    threads = workers is None or (isinstance(workers, int) and workers >= 1)
    if not rates or not threads or head_room < 0 or bandwidth <= 0:  # type: ignore[operator]
        raise ValueError(
            f"head_room = {head_room!r}, bandwidth = {bandwidth!r}, workers = {workers!r}: expected at least 0, a "
            "positive number, both finite, and an integer of at least 1"
        )


def _check_contents(tensors: object, plan: object, metadata: object, rules: object) -> None:
    if not isinstance(plan, CompressionPlan | str | None):
        raise ValueError(f"plan is a {type(plan).__name__}, expected a CompressionPlan or its JSON")
    if isinstance(plan, str):
        try:
            CompressionPlan.from_json(plan)
        except ValueError as error:
            raise ValueError(f"plan is no plan's JSON: {error}") from error
    if not isinstance(tensors, Mapping):
        raise ValueError(f"tensors is a {type(tensors).__name__}, expected names and tensors: model.state_dict()")
    for name, tensor in tensors.items():
        pack.check(name, tensor)
    if not isinstance(metadata, Mapping) or not all(
        isinstance(text, str) for pair in metadata.items() for text in pair
    ):
        raise ValueError(f"metadata = {metadata!r}, expected texts by name; json.dumps makes one of anything else")
    if not isinstance(rules, Sequence) or not all(isinstance(rule, Rule) for rule in rules):
        raise ValueError(f"rules = {rules!r}, expected a list such as [Rule('*.weight', 'zfp', error_bound=0.1)]")
