"""The driver with a budget of latency."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from cctorch import latency_budget, measure
from cctorch.latency import LatencyTable
from cctorch.run import run
from fake_timer import FakeTimer
from rich.console import Console
from tiny_run import config, write_dataset


def test_a_run_reports_predicted_against_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measure, "seconds_of_others", lambda: 0.0)
    asked: list[int] = []

    def table_for(model: object, example: object, batch: int) -> LatencyTable:
        asked.append(batch)
        return LatencyTable(batch=batch, timer=FakeTimer(launch=1e-7))

    monkeypatch.setattr(latency_budget, "table_for", table_for)
    compress = {
        "target": 0.2,
        "budget": "latency",
        "latency_batch": 4,
        "exclude": ["layer3.0.conv2"],
        "bn_reestimate_images": 32,
    }
    settings = config(write_dataset(tmp_path / "data"), tmp_path / "runs", compress=compress)
    console = Console(file=io.StringIO(), width=160)
    summary = run(settings, console=console)
    assert asked == [4]
    assert summary.budget == "latency"
    assert summary.latency_budget is not None
    assert summary.latency_budget["batch"] == 4
    assert 0.5 < summary.latency_budget["ratio"] <= 0.8
    [excluded] = [layer for layer in summary.layers if layer["name"] == "layer3.0.conv2"]
    assert excluded["kept_in"] == excluded["in_channels"]
    assert excluded["rank"] is None
    said = f"latency at batch 4: {summary.latency_budget['ratio']:.3f} of the dense time measured, .* 0.800 wanted"
    assert re.search(said, console.file.getvalue())  # type: ignore[attr-defined]
    page = (settings.folder / "report.html").read_text()
    assert "to 80% of the latency" in page
    assert re.search("In the search, " + said, page)
