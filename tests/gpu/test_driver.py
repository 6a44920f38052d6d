"""A whole run on the device: every kind of training ends, goes on where it was interrupted, and is read on a CPU."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cctorch import _C, latency_budget, models, store
from cctorch.config import Config
from cctorch.latency import LatencyTable
from cctorch.report import page
from cctorch.run import run
from cctorch.summary import Summary
from cctorch.sweep import sweep
from fake_timer import FakeTimer
from placed import CPU, DEVICE, needs_device
from rich.console import Console
from safetensors.torch import load_file
from signalled import signalled_at
from tiny_run import config, write_dataset

pytestmark = needs_device

STEPS = 10  # of an epoch


def _training(**changes: Any) -> dict[str, Any]:
    # Batches of 8: more than a graph's warm-up, and losses that are read once in an epoch.
    return {"epochs": 2, "batch_size": 8, "lr": 0.05, "augment": True, **changes}


def _both(**changes: Any) -> dict[str, Any]:
    return {"train": _training(**changes), "finetune": _training(**changes)}


def _compress(**changes: Any) -> dict[str, Any]:
    return {"compress": {"target": 0.4, "bn_reestimate_images": 32, "repair_images": 32, "multiple": 8, **changes}}


def _regularize(*q: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**_training(**changes), "q": list(q), "frequency": {"kind": "constant", "period": 4}}


NOISE = {"kind": "uniform_noise", "strength": 0.02}
PRUNING = {"kind": "magnitude_pruning", "sparsity": 0.5}
ALONE: dict[str, Any] = {"compress": None, "finetune": None}
DISTILLED = {"distillation": {"weight": 0.9}}

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "contiguous": _both(channels_last=False),
    "bf16": _both(bf16=True),
    "graphs": _both(cuda_graphs=True),
    "graphs in bf16": _both(cuda_graphs=True, bf16=True, clip_grad_norm=1.0),
    "clipped and smoothed": _both(clip_grad_norm=1.0, label_smoothing=0.1, schedule="cosine"),
    "distilled": {"finetune": _training(**DISTILLED)},
    "distilled in graphs": {"finetune": _training(cuda_graphs=True, **DISTILLED)},
    "distilled in bf16": {"finetune": _training(bf16=True, **DISTILLED)},
    "regularized": {**ALONE, "regularize": _regularize(NOISE, PRUNING)},
    "regularized in graphs": {**ALONE, "regularize": _regularize(PRUNING, cuda_graphs=True)},
    "regularized after compression": {"regularize": _regularize(PRUNING, {"kind": "uniform_quantization", "bits": 4})},
    "channels": _compress(units="channels"),
    "singular values": _compress(units="singular_values"),
    "exact": _compress(basis="exact", repair=False),
    "parameters": _compress(budget="parameters", multiple=2),
}
INTERRUPTED = [
    "plain",
    "bf16",
    "graphs",
    "clipped and smoothed",
    "distilled",
    "regularized",
    "regularized after compression",
]


def _quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "render", lambda record: "")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


def _settings(dataset: Path, output: Path, kind: str, **changes: Any) -> Config:
    return config(dataset, output, **{"device": DEVICE.type, **_both(), **_compress(), **KINDS[kind], **changes})


def _losses(settings: Config) -> list[float]:
    return [json.loads(line)["loss"] for line in (settings.folder / "steps.jsonl").read_text().splitlines()]


def _weights(settings: Config) -> dict[str, torch.Tensor]:
    return load_file(settings.folder / "checkpoints" / "compressed.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_ends_in_a_model_that_a_cpu_reads(dataset: Path, tmp_path: Path, kind: str) -> None:
    settings = _settings(dataset, tmp_path, kind)
    summary = run(settings, console=_quiet())
    losses = _losses(settings)
    assert len(losses) >= 2 * 2 * STEPS
    assert all(map(math.isfinite, losses))
    assert math.isfinite(summary.after.top1)
    if settings.compress:
        assert summary.after.macs < summary.before.macs
    model, _ = store.load_model(settings.folder / "checkpoints" / "compressed.safetensors")
    assert {tensor.device for tensor in model.state_dict().values()} == {CPU}
    with torch.no_grad():
        assert model.eval()(torch.rand(3, 1, 12, 12)).isfinite().all()


def test_the_first_steps_are_those_of_a_cpu(dataset: Path, tmp_path: Path) -> None:
    """To float32's rounding, which training makes larger."""
    losses = []
    for device in ("cpu", DEVICE.type):
        settings = _settings(
            dataset, tmp_path / device, "regularized", device=device, train=_training(epochs=1, augment=True)
        )
        run(settings, console=_quiet())
        losses.append(_losses(settings)[:STEPS])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("kind", INTERRUPTED)
def test_an_interrupted_run_ends_like_one_that_was_not(dataset: Path, tmp_path: Path, kind: str) -> None:
    whole, broken = (_settings(dataset, tmp_path / name, kind) for name in ("whole", "broken"))
    run(whole, console=_quiet())
    # Of a graph, Python sees the warm-up of each stage alone.
    with signalled_at(2 if "graphs" in kind else STEPS + 3):
        run(broken, console=_quiet())
    run(broken, console=_quiet())
    assert _losses(broken) == _losses(whole)
    ours, theirs = _weights(broken), _weights(whole)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_the_same_run_twice(dataset: Path, tmp_path: Path) -> None:
    first, second = (_settings(dataset, tmp_path / name, "plain") for name in ("first", "second"))
    for settings in (first, second):
        run(settings, console=_quiet())
    assert _losses(first) == _losses(second)
    assert all(torch.equal(value, _weights(second)[name]) for name, value in _weights(first).items())


@pytest.fixture(scope="module")
def exported(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Summary]:
    settings = _settings(dataset, tmp_path_factory.mktemp("runs"), "plain", export=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "render", lambda record: "")
        return settings, run(settings, console=_quiet())


def test_the_exported_program_runs_on_a_cpu(exported: tuple[Config, Summary]) -> None:
    settings, _ = exported
    compressed, _ = store.load_model(settings.folder / "checkpoints" / "compressed.safetensors")
    program = torch.export.load(settings.folder / "compressed.pt2").module()
    for batch in (1, 5):
        x = torch.rand(batch, 1, 12, 12)
        torch.testing.assert_close(program(x), compressed(x), rtol=1e-4, atol=1e-5)


def test_the_figures_are_those_of_the_models(exported: tuple[Config, Summary]) -> None:
    settings, summary = exported
    plan = _C.CompressionPlan.from_json((settings.folder / "plan.json").read_text())
    assert plan.target == 0.4
    for name, figures in (("dense", summary.before), ("compressed", summary.after)):
        model, _ = store.load_model(settings.folder / "checkpoints" / f"{name}.safetensors")
        assert figures.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert min(figures.latency.values()) > 0


def test_a_finished_run_gives_its_gradients_to_a_sweep(exported: tuple[Config, Summary]) -> None:
    settings, _ = exported
    gradients, _ = store.Folder(settings.folder).load_gradients()
    assert gradients
    points = sweep(settings.folder, [0.25, 0.5], console=_quiet())
    assert [point.target for point in points] == [0.0, 0.25, 0.5]
    assert points[0].macs > points[1].macs > points[2].macs
    assert all(lowest > 0 for point in points for lowest, *_ in point.latency.values())


def test_published_weights_reach_the_device(dataset: Path, tmp_path: Path) -> None:
    torch.save(models.create("resnet8", 1, 4).state_dict(), tmp_path / "weights.th")
    changes = {"model": {"name": "resnet8", "weights": str(tmp_path / "weights.th")}, **_both(epochs=0)}
    settings = _settings(dataset, tmp_path, "plain", **changes)
    run(settings, console=_quiet())
    dense, _ = store.load_model(settings.folder / "checkpoints" / "dense.safetensors")
    expected = models.load_tensors(tmp_path / "weights.th")
    assert all(torch.equal(value, expected[key]) for key, value in dense.state_dict().items())


@pytest.mark.parametrize("codec", ["zstd", "sz3", "zfp"])
def test_the_model_is_stored_as_hdf5(dataset: Path, tmp_path: Path, codec: str) -> None:
    pytest.importorskip("h5py")
    pytest.importorskip("hdf5plugin")
    changes = {"checkpoint": {"format": "hdf5", "codec": codec}, **_both(epochs=1)}
    settings = _settings(dataset, tmp_path, "plain", **changes)
    run(settings, console=_quiet())
    [file] = (settings.folder / "checkpoints").glob("compressed.*")
    model, _ = store.load_model(file)
    assert all(value.device == CPU for value in model.state_dict().values())


def test_a_budget_of_latency(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its times are arithmetic: layers this small take the same time on a GPU whatever they have."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def table_for(model: object, example: torch.Tensor, batch: int) -> LatencyTable:
        assert example.device.type == DEVICE.type
        return LatencyTable(DEVICE, batch=batch, timer=FakeTimer(launch=1e-7))

    monkeypatch.setattr(latency_budget, "table_for", table_for)
    compress = _compress(budget="latency", target=0.2, latency_batch=4, bn_reestimate_images=32)
    summary = run(_settings(dataset, tmp_path, "plain", **compress), console=_quiet())
    assert summary.latency_budget is not None
    assert summary.latency_budget["ratio"] <= 0.8


def test_layers_are_timed_on_the_device(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no plan is fast enough, the run says so."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = _settings(dataset, tmp_path, "plain", **_compress(budget="latency", target=0.1, latency_batch=4))
    outcome = "reached"
    try:
        run(settings, console=_quiet())
    except ValueError as error:
        outcome = str(error)
    assert outcome == "reached" or "of the latency at batch 4: the fastest plan" in outcome
