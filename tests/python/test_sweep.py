from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cctorch import apply, batch_norm, collaborative, compress_stage, data, datasets, report, store
from cctorch import sweep as sweeping
from cctorch.config import Config
from cctorch.measure import accuracy, parameters
from cctorch.report import page
from cctorch.run import run
from cctorch.sweep import sweep
from rich.console import Console
from tiny_run import config, write_dataset


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    data = write_dataset(tmp_path_factory.mktemp("data"))
    settings = config(data, tmp_path_factory.mktemp("runs"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "render", lambda record: "")
        run(settings, console=_quiet())
    return settings


def _quiet() -> Console:
    return Console(file=io.StringIO(), width=140)


def test_points_are_what_a_search_for_each_finds(finished: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert finished.compress is not None
    dense, _ = store.load_model(finished.folder / "checkpoints" / "dense.safetensors")
    held_out = datasets.load(finished.data, finished.seed)
    feed = data.Feed(held_out, True)
    dense = feed.place(dense, torch.device("cpu"))
    images = feed.batches(held_out.train, finished.train.batch_size)
    expected = [
        compress_stage.search(dense, images, finished.seed, finished.compress, target=target)
        for target in (0.25, 0.4, 0.5)
    ]

    searched: list[float] = []
    search = compress_stage.search

    def spy(*arguments: Any, **options: Any) -> collaborative.Compression:
        searched.append(options["target"])
        return search(*arguments, **options)

    monkeypatch.setattr(compress_stage, "search", spy)
    monkeypatch.setattr(collaborative, "mean_gradients", None)  # the run's own are used
    plans: list[Any] = []
    monkeypatch.setattr(sweeping, "apply", lambda model, plan: plans.append(plan) or apply(model, plan))
    points = sweep(finished.folder, [0.5, 0.25, 0.4], console=_quiet())
    assert searched == [0.5]
    assert [json.loads(plan.to_json()) for plan in plans] == [json.loads(found.plan.to_json()) for found in expected]
    assert [point.target for point in points] == [0.0, 0.25, 0.4, 0.5]
    assert points[0].macs > points[1].macs > points[3].macs
    assert points[0].parameters == parameters(dense)
    for point, found in zip(points[1:], expected, strict=True):
        assert point.macs == found.final_macs
        model = apply(store.load_model(finished.folder / "checkpoints" / "dense.safetensors")[0], found.plan)
        assert point.parameters == parameters(model)
        assert set(point.latency) == {"1", "4"}
        top1 = [accuracy(model, feed.batches(held_out.validation, 500))]
        batch_norm.reestimate(model, feed.batches(held_out.train, 32).head(32, finished.seed))
        top1.append(accuracy(model, feed.batches(held_out.validation, 500)))
        assert [point.top1_compressed, point.top1_reestimated] == top1
    # The run's own target gives the run's own plan.
    assert json.loads(plans[1].to_json()) == json.loads((finished.folder / "plan.json").read_text())
    assert "Trade-off" in (finished.folder / "report.html").read_text()

    before = (finished.folder / "sweep.json").read_text()
    assert len(sweep(finished.folder, [0.25, 0.6], console=_quiet())) == 5
    assert searched == [0.5, 0.6]  # 0.25 was there
    assert json.loads((finished.folder / "sweep.json").read_text())[:4] == json.loads(before)


def test_a_target_out_of_reach_keeps_and_shows_the_points_before_it(
    finished: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "render", lambda record: str(record.sweep))
    console = _quiet()
    with pytest.raises(ValueError, match="cannot be reached"):
        sweep(finished.folder, [0.999, 0.35], console=console)
    assert 0.35 in [point.target for point in report.read(finished.folder).sweep]
    assert "0.35" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "0.35" in (finished.folder / "report.html").read_text()


@pytest.mark.parametrize("damage", ["absent", "truncated", "foreign"])
def test_gradients_that_cannot_be_read_are_computed_again(
    finished: Config, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "render", lambda record: "")
    folder = tmp_path / "copy"
    shutil.copytree(finished.folder, folder)
    (folder / "sweep.json").unlink(missing_ok=True)
    file = folder / "checkpoints" / "gradients.safetensors"
    # Copied: safetensors maps the file, which is damaged in place.
    whole = {name: value.clone() for name, value in (store.Folder(folder).load_gradients()[0] or {}).items()}
    assert whole
    if damage == "absent":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:100] if damage == "truncated" else b"not a checkpoint")
    console = _quiet()
    sweep(folder, [0.3], console=console)
    assert ("computing the gradients again" in console.file.getvalue()) == (damage != "absent")  # type: ignore[attr-defined]
    again = store.Folder(folder).load_gradients()[0]
    assert again is not None
    for name, gradient in whole.items():
        torch.testing.assert_close(again[name], gradient)


def test_steps_that_the_run_leaves_out_are_left_out(finished: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "render", lambda record: "")
    assert finished.compress is not None
    plain = finished.compress.model_copy(update={"bn_reestimate_images": 0, "repair": False})
    settings = finished.model_copy(update={"name": "plain", "compress": plain})
    run(settings, console=_quiet())
    for point in sweep(settings.folder, [0.3], console=_quiet()):
        assert point.top1_reestimated is None
        assert point.top1_repaired is None


@pytest.mark.parametrize("target", [0.0, 1.0, -0.5, float("nan")])
def test_an_impossible_target_is_refused_at_once(
    finished: Config, target: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "_Sweep", None)
    with pytest.raises(ValueError, match="expected above 0 and below 1"):
        sweep(finished.folder, [0.3, target], console=_quiet())


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no finished run"):
        sweep(tmp_path, [0.3], console=_quiet())
    assert not list(tmp_path.iterdir())


def test_gradients_of_another_model_are_refused() -> None:
    model = torch.nn.Sequential(
        *(torch.nn.Conv2d(4, 4, 3) for _ in range(4)), torch.nn.Flatten(), torch.nn.Linear(64, 3)
    )
    images = torch.randn(2, 4, 12, 12)
    with pytest.raises(ValueError, match="gradients has none for layer '1'"):
        collaborative.compress(model, [], images, target=0.2, gradients={})
    found = collaborative.compress(model, [(images, torch.arange(2))], images, target=0.2)
    again = collaborative.compress(model, [], images, target=0.2, gradients=found.gradients)
    assert again.plan == found.plan
