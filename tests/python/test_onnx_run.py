"""compressed.onnx of a run: what its deliverable holds."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cctorch import export_onnx, measure_stage, store
from cctorch.config import Config, ConfigError
from cctorch.report import page
from cctorch.run import run
from rich.console import Console
from tiny_run import config, run_quietly, staged, write_dataset

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

QUANTIZE = {"epochs": 1, "batch_size": 32, "lr": 0.01, "bits": 3}
LOSSY = {"format": "hdf5", "codec": "sz3", "error_bound": 0.3}


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "render", lambda record: record.config)


def _largest_difference(settings: Config, file: Path) -> float:
    """Of ONNX Runtime's outputs from those of the model in a file, for a batch size that was not exported."""
    model = store.load_model(file)[0]
    x = torch.randn(5, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(settings.folder / "compressed.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        return float(np.abs(found - model(x).numpy()).max())


@pytest.mark.parametrize("checkpoint", [{}, LOSSY], ids=["safetensors", "lossy hdf5"])
def test_weights_of_few_bits_are_int8(tmp_path: Path, checkpoint: dict[str, Any]) -> None:
    data = write_dataset(tmp_path / "data")
    settings = staged(data, tmp_path, compress=True, quantize=QUANTIZE, checkpoint=checkpoint, onnx=True)
    summary = run_quietly(settings)
    assert summary.quantized is not None
    graph = onnx.load(settings.folder / "compressed.onnx").graph
    assert [node.op_type for node in graph.node].count("DequantizeLinear") == len(summary.quantized["layers"]) > 5
    whole = {
        value.name for value in graph.initializer if value.data_type == onnx.TensorProto.FLOAT and len(value.dims) > 1
    }
    assert not whole
    file = settings.folder / "checkpoints" / ("compressed.h5" if checkpoint else "compressed.safetensors")
    assert _largest_difference(settings, file) < 1e-3
    assert not (settings.folder / "compressed.pt2").exists()


def test_a_lossy_model_is_what_is_exported(tmp_path: Path) -> None:
    settings = config(write_dataset(tmp_path / "data"), tmp_path, checkpoint=LOSSY, onnx=True, export=True)
    run_quietly(settings)
    file = settings.folder / "checkpoints" / "compressed.h5"
    assert _largest_difference(settings, file) < 1e-3
    x = torch.rand(3, 1, 12, 12)
    program = torch.export.load(settings.folder / "compressed.pt2").module()
    torch.testing.assert_close(program(x), store.load_model(file)[0](x), rtol=1e-4, atol=1e-5)


def test_what_is_exported_may_change_before_and_after_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_dataset(tmp_path / "data")
    wanted, unwanted = (config(data, tmp_path, onnx=onnx) for onnx in (True, False))
    file = wanted.folder / "compressed.onnx"
    with monkeypatch.context() as patch:
        patch.setattr(export_onnx, "_check_run", _differs)
        with pytest.raises(ValueError, match="ONNX Runtime differs"):
            run_quietly(wanted)
    assert not file.exists()
    summary = run_quietly(unwanted)
    assert not file.exists()
    monkeypatch.setattr(measure_stage, "measured", None)  # finished: nothing but the file is made
    for _ in range(2):
        assert run_quietly(wanted) == summary
        assert _largest_difference(wanted, wanted.folder / "checkpoints" / "compressed.safetensors") < 1e-3
        file.unlink()


def _differs(*arguments: Any) -> None:
    raise ValueError("ONNX Runtime differs")


@pytest.mark.parametrize("fresh", [True, False])
def test_a_file_of_an_earlier_state_is_replaced(tmp_path: Path, fresh: bool) -> None:
    settings = config(write_dataset(tmp_path / "data"), tmp_path, onnx=True)
    settings.folder.mkdir()
    (settings.folder / "compressed.onnx").write_text("of an earlier state")
    run(settings, fresh=fresh, console=Console(file=io.StringIO()))
    onnx.checker.check_model(onnx.load(settings.folder / "compressed.onnx"))


def test_without_its_packages_it_is_refused_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(write_dataset(tmp_path / "data"), tmp_path, onnx=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ConfigError, match=r"onnx = true: expected onnx, onnxscript and onnxruntime to be"):
        run_quietly(settings)
    assert not (settings.folder / "run.log").exists()
