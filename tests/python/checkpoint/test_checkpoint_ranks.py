"""One file from several processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cctorch import checkpoint, distributed
from cctorch.checkpoint import overlap, parts
from cctorch.checkpoint.predict import Prediction
from torch import Tensor


def _tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layer{i}.weight": torch.randn(50 * i, 100, generator=generator) for i in range(1, 9)}
    tensors |= {f"layer{i}.bias": torch.randn(50 * i, generator=generator) for i in range(1, 9)}
    tensors["large"] = torch.randn(3000, 1000, generator=generator)
    tensors["pruned"] = torch.randn(300, 300, generator=generator).relu()
    return tensors


def _spawn(ranks: int, folder: Path, job: str) -> None:
    mp.spawn(_enter, (ranks, folder, job), nprocs=ranks)


def _enter(rank: int, ranks: int, folder: Path, job: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'rendezvous'}", rank=rank, world_size=ranks)
    {"save": _save, "overflow": _overflow, "fail": _fail}[job](folder)
    dist.destroy_process_group()


def _save(folder: Path) -> None:
    busy = []
    compress = overlap.compress

    def counted(job: overlap.Job) -> overlap.Compressed:
        busy.append(job.part)
        return compress(job)

    overlap.compress = counted
    report = checkpoint.save(folder / "file.h5", _tensors(), error_bound=0.05, across_ranks=True)
    shares = distributed.on_all(lambda: len(busy))
    assert min(shares) > 0
    assert sum(shares) == report.chunks
    assert (
        len({str(other)[:100] for other in distributed.on_all(lambda: (report.raw, report.stored, report.file))}) == 1
    )


def _overflow(folder: Path) -> None:
    parts.predict = lambda *_: Prediction(100, 1e-3)
    report = checkpoint.save(folder / "file.h5", _tensors(), error_bound=0.05, across_ranks=True)
    assert report.overflowed == report.chunks


def _fail(folder: Path) -> None:
    if distributed.rank() == 1:

        def broken(*_: object) -> overlap.Compressed:
            raise OSError(5, "Input/output error")

        overlap.compress = broken
    with pytest.raises(OSError, match="Input/output error"):
        checkpoint.save(folder / "file.h5", _tensors(), across_ranks=True)


@pytest.mark.parametrize("job", ["save", "overflow"])
def test_two_ranks_write_what_one_does(tmp_path: Path, job: str) -> None:
    _spawn(2, tmp_path, job)
    found = checkpoint.load(tmp_path / "file.h5")
    checkpoint.save(tmp_path / "alone.h5", _tensors(), error_bound=0.05)
    alone = checkpoint.load(tmp_path / "alone.h5")
    assert list(found.tensors) == list(alone.tensors)
    for name, tensor in alone.tensors.items():
        assert torch.equal(found.tensors[name], tensor), name
        assert found.index.tensors[name].error_bound == alone.index.tensors[name].error_bound
        assert found.index.tensors[name].max_error == alone.index.tensors[name].max_error


def test_what_fails_on_one_rank_fails_on_all_and_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "file.h5").write_bytes(b"old")
    _spawn(2, tmp_path, "fail")
    assert (tmp_path / "file.h5").read_bytes() == b"old"
    assert {item.name for item in tmp_path.iterdir()} - {"rendezvous"} == {"file.h5"}
