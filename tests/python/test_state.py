"""Checkpoints of a run: what is written, by whom and when, what is read in another number of processes, and damage."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cctorch import atomic
from cctorch.models import CheckpointError
from cctorch.state import Checkpoints, State, Tensors
from safetensors import safe_open
from spawned import spawn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

SPREAD = ("weight", "uneven.layer", "row")


def _state(epoch: int) -> State:
    return State("finetune", epoch, plan="{}", losses=[0.1, 1 / 3, 1e-30], seconds=2.5, results={"top1": 12.5})


def _whole() -> Tensors:
    """Of several types and layouts. Of the rows of `uneven.layer` two ranks have 2 and 1; of `row` 1 and 0."""
    generator = torch.Generator().manual_seed(7)
    model = {
        "weight": torch.randn(6, 4, 3, 3, generator=generator).to(memory_format=torch.channels_last),
        "uneven.layer": torch.randn(3, 5, generator=generator),
        "row": torch.randn(1, 5, generator=generator),
        "half": torch.randn(4, generator=generator).bfloat16(),
        "count": torch.tensor(3),
        "empty": torch.zeros(0, 4),
    }
    momentum = {"weight": torch.randn(6, 4, 3, 3, generator=generator, dtype=torch.float64)}
    return {"model": model, "momentum": momentum, "regularization": {}}


def _each(tensors: Tensors) -> dict[str, Tensor]:
    return {f"{group}.{name}": value for group, named in tensors.items() for name, value in named.items()}


def _assert_loads(checkpoints: Checkpoints, epoch: int, warnings: int = 0) -> None:
    saved, warned = checkpoints.newest()
    assert saved is not None
    assert len(warned) == warnings, warned
    assert saved.state == _state(epoch)
    wanted = _whole()
    found = {"model": {name: torch.full_like(value, 99) for name, value in wanted["model"].items()}}
    found |= {group: saved.like(group) for group in ("momentum", "regularization")}
    checkpoints.load(saved, found)
    assert found.keys() == wanted.keys()
    for name, value in _each(wanted).items():
        assert _each(found)[name].dtype == value.dtype
        assert torch.equal(_each(found)[name], value), name


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest() == (None, [])
    # What was left by a process that was killed.
    (tmp_path / "next").mkdir()
    (tmp_path / "next" / "rank5.safetensors").touch()
    checkpoints.save(_state(1), _whole())
    checkpoints.wait()
    _assert_loads(checkpoints, 1)
    assert [item.name for item in tmp_path.iterdir()] == ["last"]
    assert sorted(file.name for file in (tmp_path / "last").iterdir()) == ["rank0.safetensors", "state.json"]
    checkpoints.save(_state(2), _whole())
    checkpoints.save(_state(3), _whole())
    checkpoints.wait()
    _assert_loads(checkpoints, 3)
    shutil.rmtree(tmp_path / "last")
    _assert_loads(checkpoints, 2)


def test_the_only_whole_state_stays_until_there_are_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    for epoch in (1, 2):
        checkpoints.save(_state(epoch), _whole())
    checkpoints.wait()
    (tmp_path / "last" / "rank0.safetensors").unlink()
    checkpoints = Checkpoints(tmp_path)
    _assert_loads(checkpoints, 1, warnings=1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write", full)
        checkpoints.save(_state(3), _whole())
        with pytest.raises(OSError, match="No space left"):
            checkpoints.wait()
    checkpoints.save(_state(3), _whole())
    checkpoints.wait()
    _assert_loads(Checkpoints(tmp_path), 3)
    for epoch in (4, 5):  # from now on both are whole again
        checkpoints.save(_state(epoch), _whole())
        checkpoints.wait()
        _assert_loads(Checkpoints(tmp_path), epoch)
        shutil.copytree(tmp_path / "previous", tmp_path / str(epoch) / "last")
        _assert_loads(Checkpoints(tmp_path / str(epoch)), epoch - 1)


def _killed_at_the_end_of_the_third_save(folder: Path) -> Path:
    """`previous` is of epoch 1, `last` of epoch 2, and `next` of epoch 3 is whole."""
    checkpoints = Checkpoints(folder / "of 3")
    for epoch in (1, 2, 3):
        checkpoints.save(_state(epoch), _whole())
        checkpoints.wait()
        for name in ("previous", "last") if epoch == 2 else ():
            shutil.copytree(folder / "of 3" / name, folder / "killed" / name)
    shutil.copytree(folder / "of 3" / "last", folder / "killed" / "next")
    return folder / "killed"


@pytest.mark.parametrize("gone", [[], ["previous/rank0.safetensors"], ["previous"], ["previous", "last"]])
@pytest.mark.parametrize("damaged", [False, True])
def test_a_state_that_was_whole_before_the_kill_is_the_newest(tmp_path: Path, gone: list[str], damaged: bool) -> None:
    folder = _killed_at_the_end_of_the_third_save(tmp_path)
    for name in gone:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if damaged and "last" not in gone:
        os.truncate(folder / "last" / "rank0.safetensors", 50)
    _assert_loads(Checkpoints(folder), 3)
    assert not (folder / "next").exists()
    if not damaged and "last" not in gone:  # and the one before it is its previous one
        shutil.rmtree(folder / "last")
        _assert_loads(Checkpoints(folder), 2)


def test_a_state_that_was_not_whole_at_the_kill_is_none(tmp_path: Path) -> None:
    folder = _killed_at_the_end_of_the_third_save(tmp_path)
    os.truncate(folder / "next" / "rank0.safetensors", 50)
    _assert_loads(Checkpoints(folder), 2)
    checkpoints = Checkpoints(folder)
    checkpoints.save(_state(3), _whole())
    checkpoints.wait()
    _assert_loads(checkpoints, 3)


def test_the_end_says_what_the_last_save_could_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(atomic, "write", full)
    checkpoints.save(_state(1), _whole())
    with pytest.raises(OSError, match="No space left"):
        checkpoints.close()


def test_training_goes_on_while_a_state_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write = threading.Event()
    write = atomic.write

    def slow(path: Path, content: bytes) -> None:
        assert may_write.wait(60)
        write(path, content)

    monkeypatch.setattr(atomic, "write", slow)
    checkpoints = Checkpoints(tmp_path)
    state, tensors = _state(1), _whole()
    checkpoints.save(state, tensors)
    for value in _each(tensors).values():
        value.zero_()
    state.losses.append(5.0)
    state.results["top1"] = 0.0
    assert not (tmp_path / "last").exists()
    may_write.set()
    checkpoints.wait()
    _assert_loads(checkpoints, 1)


def test_a_tensor_that_was_not_saved_is_named(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(_state(1), _whole())
    checkpoints.wait()
    saved, _ = checkpoints.newest()
    assert saved is not None
    for name, strange in (("unknown", torch.zeros(2)), ("uneven.layer", torch.zeros(4, 5))):
        with pytest.raises(CheckpointError, match=f"last does not fit this configuration: .*model.{name}"):
            checkpoints.load(saved, {"model": {name: strange}})


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(_state(1), _whole())
    checkpoints.wait()
    for module, name in (("pickle", "load"), ("pickle", "loads"), ("pickle", "Unpickler"), ("torch", "load")):
        monkeypatch.setattr(f"{module}.{name}", _refuse)
    _assert_loads(checkpoints, 1)


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("unpickled")


def _sharded() -> Tensors:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def spread(named: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: distribute_tensor(value.contiguous(), mesh, [Shard(0)]) if name in SPREAD else value
            for name, value in named.items()
        }

    return {group: spread(named) for group, named in _whole().items()}


def _two_ranks(folder: Path) -> None:
    rank = dist.get_rank()
    checkpoints = Checkpoints(folder)
    checkpoints.save(_state(1), _whole())
    checkpoints.wait()
    files = [_shapes(folder / "last" / f"rank{r}.safetensors") for r in range(2)]
    assert not files[0].keys() & files[1].keys()
    assert files[0].keys() | files[1].keys() == _each(_whole()).keys()
    assert all(files)
    _assert_loads(checkpoints, 1)

    checkpoints.save(_state(2), _sharded())
    checkpoints.wait()
    for r, rows in enumerate(([3, 2, 1, 3], [3, 1, 0, 3])):
        own = _shapes(folder / "last" / f"rank{r}.safetensors")
        names = [*(f"model.{name}" for name in SPREAD), "momentum.weight"]
        assert [own[name][0] if name in own else 0 for name in names] == rows
    _assert_loads(checkpoints, 2)
    saved, _ = checkpoints.newest()
    assert saved is not None
    found = _sharded()
    for value in _each(found).values():
        value.zero_()
    checkpoints.load(saved, found)
    for name, value in _each(_sharded()).items():
        ours, wanted = (t.to_local() if isinstance(t, DTensor) else t for t in (_each(found)[name], value))
        assert torch.equal(ours, wanted), name

    _full_on_one_rank(checkpoints, folder)
    dist.barrier()
    if rank == 0:
        for name, wrong in (("damaged", "rank1.safetensors"), ("alone", None)):
            shutil.copytree(folder, folder.parent / name)
            if wrong:
                os.truncate(folder.parent / name / "last" / wrong, 200)
    dist.barrier()
    damaged = Checkpoints(folder.parent / "damaged")
    _assert_loads(damaged, 1, warnings=1)
    for each in (checkpoints, damaged):
        each.close()


def _full_on_one_rank(checkpoints: Checkpoints, folder: Path) -> None:
    write = os.write

    def full(descriptor: int, content: Any) -> int:
        if dist.get_rank() == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", full)
        checkpoints.save(_state(3), _sharded())
        with pytest.raises(OSError, match=r"the disk is full: .*rank1\.safetensors"):
            checkpoints.wait()
    dist.barrier()
    assert sorted(item.name for item in folder.iterdir()) == ["last", "previous"]
    _assert_loads(checkpoints, 2)


def _shapes(file: Path) -> dict[str, list[int]]:
    with safe_open(file, "pt") as opened:
        return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118


def test_two_ranks_write_one_state_and_any_number_reads_it(tmp_path: Path) -> None:
    spawn(2, tmp_path / "meet", _two_ranks, tmp_path / "states")
    content = json.loads((tmp_path / "alone" / "last" / "state.json").read_text())["content"]
    assert sorted(content["files"]) == ["rank0.safetensors", "rank1.safetensors"]
    _assert_loads(Checkpoints(tmp_path / "alone"), 2)
    _assert_loads(Checkpoints(tmp_path / "damaged"), 1, warnings=1)
