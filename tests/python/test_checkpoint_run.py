"""The driver's deliverable: plan and tensors, as safetensors or as a compressed checkpoint."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch
from cctorch import checkpoint, store
from cctorch.config import ConfigError
from cctorch.models import CheckpointError
from cctorch.run import run
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_run import config, write_dataset


def _console() -> Console:
    return Console(file=io.StringIO(), width=120)


def test_the_deliverable_is_compressed_on_demand(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    plain = config(data, tmp_path, name="plain")
    lossy = config(data, tmp_path, name="lossy", checkpoint={"format": "hdf5", "codec": "sz3", "error_bound": 0.02})
    exact = config(data, tmp_path, name="exact", checkpoint={"format": "hdf5"})
    for settings in (plain, lossy, exact):
        run(settings, console=_console())
    folders = [settings.folder / "checkpoints" for settings in (plain, lossy, exact)]
    assert [sorted(item.name for item in folder.glob("compressed*")) for folder in folders] == [
        ["compressed.safetensors"],
        ["compressed.h5"],
        ["compressed.h5"],
    ]
    with safe_open(folders[0] / "compressed.safetensors", "pt") as file:
        assert file.metadata()["plan"] == (plain.folder / "plan.json").read_text()
    wanted, architecture = store.load_model(folders[0] / "compressed.safetensors")
    near, _ = store.load_model(folders[1] / "compressed.h5")
    same, of_same = store.load_model(folders[2] / "compressed.h5")
    assert of_same == architecture
    state, near_state, same_state = wanted.state_dict(), near.state_dict(), same.state_dict()
    assert all(torch.equal(same_state[name], value) for name, value in state.items())
    index = checkpoint.info(folders[1] / "compressed.h5").tensors
    lossy_names = {name for name, record in index.items() if record.error_bound}
    assert lossy_names
    for name, value in state.items():
        if name in lossy_names:
            rms = float(value.double().square().mean().sqrt())
            assert 0 < float((near_state[name] - value).abs().max()) <= 0.02 * rms * (1 + 1e-6)
        else:
            assert torch.equal(near_state[name], value)
    events = [json.loads(line) for line in (lossy.folder / "metrics.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events if event["event"] == "stored"] == ["stored"]
    assert (
        "compressed.h5, within 0.02 of the weights' root mean squares: test top-1"
        in (lossy.folder / "run.log").read_text()
    )


def test_hdf5_without_its_packages_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_dataset(tmp_path / "data")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"checkpoint\.format = 'hdf5': expected h5py and hdf5plugin to be installed"):
        config(data, tmp_path, checkpoint={"format": "hdf5"})


@pytest.mark.parametrize("keep", [0, 5, 100, 5000])
def test_a_damaged_model_is_refused(tmp_path: Path, keep: int) -> None:
    architecture = store.Architecture("resnet8", 4, (1, 12, 12), (0.5,), (0.25,))
    folder = store.Folder(tmp_path)
    folder.save_dense(store.build(architecture, None), architecture)
    assert store.load_model(folder.dense)[1] == architecture
    folder.dense.write_bytes(folder.dense.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="is damaged, or no safetensors file"):
        store.load_model(folder.dense)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        store.load_model(folder.compressed)


@pytest.mark.parametrize("described", ["resnet8", "[1]", '{"name": "resnet8"}', '{"name": "x", "classes": "y"}'])
def test_a_model_whose_description_is_something_else_is_refused(tmp_path: Path, described: str) -> None:
    architecture = store.Architecture("resnet8", 4, (1, 12, 12), (0.5,), (0.25,))
    folder = store.Folder(tmp_path)
    tensors = store.build(architecture, None).state_dict()
    save_file(tensors, folder.path / "dense.safetensors", {"format": "2", "architecture": described})
    with pytest.raises(CheckpointError, match=r"dense\.safetensors is damaged \("):
        store.load_model(folder.path / "dense.safetensors")


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "other.h5", {"x": torch.ones(3)})
    with pytest.raises(CheckpointError, match="holds tensors, but not the architecture"):
        store.load_model(tmp_path / "other.h5")
