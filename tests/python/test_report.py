from __future__ import annotations

import base64
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from cctorch import report

LAYERS = ["layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1"]


def _layer(name: str, index: int) -> dict[str, Any]:
    sizes = {"in_channels": 16, "out_channels": 16, "kept_in": 16 - 4 * index, "kept_out": 16, "full_rank": 16}
    costs = {"macs_before": 2_000_000, "macs_after": 1_200_000, "seconds_before": 3e-4, "seconds_after": 2e-4}
    return {"name": name, "kind": "conv2d", "rank": 7 if index == 1 else None, **sizes, **costs}


def _figures(scale: float) -> dict[str, Any]:
    latency = {"1": 0.005 * scale, "128": 0.25 * scale}
    return {
        "top1": 91.25,
        "parameters": int(270_000 * scale),
        "macs": int(40e6 * scale),
        "bytes": 10**6,
        "latency": latency,
    }


def _epoch(stage: str, epoch: int, accuracy: float | None) -> dict[str, Any]:
    return {"event": "epoch", "stage": stage, "epoch": epoch, "accuracy": accuracy, "loss": 1 / epoch, "lr": 0.1}


def _record(folder: Path, *, epochs: int = 2, accuracy: float | None = 80.0, **changes: Any) -> Path:
    folder.mkdir()
    rates = [index / 30 for index in range(1, 30)]
    curves = [
        {
            "name": name,
            "rate": rates,
            "loss": [math.exp(5 * c - 5) for c in rates],
            "a": math.exp(-5),
            "b": 5.0,
            "allocated": 0.4,
        }
        for name in LAYERS
    ]
    events = [_epoch("train", epoch + 1, accuracy) for epoch in range(epochs)]
    events += [
        {"event": kind, "stage": "compress", "accuracy": value}
        for kind, value in (("dense", 91.25), ("compressed", 31.7), ("reestimated", 79.0), ("repaired", 90.5))
    ]
    events += [_epoch("finetune", epoch + 1, accuracy) for epoch in range(epochs)]
    events.append({"event": "finetuned", "stage": "finetune", "accuracy": 91.0})
    summary = {
        "name": "tiny",
        "device": "CPU, 2 threads",
        "target": 0.5,
        "before": _figures(1.0),
        "after": _figures(0.5),
        "nominal_macs": 21_000_000,
        "top1_compressed": 31.7,
        "top1_reestimated": 79.0,
        "top1_repaired": 90.5,
        "repair_seconds": 31.25,
        "gradient_seconds": 12.0,
        "curve_seconds": 0.5,
        "heuristic_seconds": 0.7,
        "layers": [_layer(name, index) for index, name in enumerate(LAYERS)],
        "warnings": [],
        **changes,
    }
    (folder / "config.yaml").write_text("name: tiny\nseed: 12345\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "curves.json").write_text(json.dumps(curves))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def _figures_of(page: str) -> dict[str, str]:
    found = re.findall(r'<img alt="([^"]+)" src="data:image/svg\+xml;base64,([^"]+)"', page)
    return {title: base64.b64decode(content).decode() for title, content in found}


@pytest.mark.parametrize(("epochs", "accuracy"), [(2, 80.0), (2, None), (0, None)])
def test_holds_its_figures_and_the_table(tmp_path: Path, epochs: int, accuracy: float | None) -> None:
    page = report.write(_record(tmp_path / "run", epochs=epochs, accuracy=accuracy)).read_text()
    figures = _figures_of(page)
    assert list(figures) == [
        "Accuracy over time",
        "What each layer gave up",
        "Where the multiply-accumulates and the time went",
        "Loss against rate",
    ]
    for svg in figures.values():
        assert ElementTree.fromstring(svg).tag.endswith("svg")
    # matplotlib draws text as outlines and names it in comments.
    for event in ("trained 91.25 %", "compressed 31.70 %", "BatchNorm re-estimated 79.00 %", "fine-tuned 91.00 %"):
        assert f"<!-- {event} -->" in figures["Accuracy over time"]
    for name in LAYERS:
        for title in list(figures)[1:]:
            assert f"<!-- {name} -->" in figures[title]
    assert "<!-- 12/16, r 7/16 -->" in figures["What each layer gave up"]
    for text in (
        "91.25 %",
        "0.270 M",
        "0.135 M",
        "40.00 M",
        "20.00 M",
        "5.00 ms",
        "125.00 ms",
        "−50.0%",
        "2.00×",
        "47.5% nominal",
    ):
        assert text in page
    assert "seed: 12345" in page


def test_fetches_nothing(tmp_path: Path) -> None:
    page = report.write(_record(tmp_path / "run")).read_text()
    for text in (page, *_figures_of(page).values()):
        assert not re.search(r"<(script|link|iframe|object)\b|@import", text)
        for target in re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", text) + re.findall(r"url\(([^)]*)\)", text):
            assert target.startswith(("data:", "#"))


def test_text_is_escaped_and_warnings_are_shown(tmp_path: Path) -> None:
    page = report.write(_record(tmp_path / "run", name="<b>x</b>", warnings=["op <foo> is not followed"])).read_text()
    assert "<b>x</b>" not in page
    assert "op &lt;foo&gt; is not followed" in page


def test_no_re_estimation_is_not_shown(tmp_path: Path) -> None:
    page = report.write(_record(tmp_path / "run", top1_reestimated=None)).read_text()
    assert "statistics re-estimated" not in page


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    folder = _record(tmp_path / "run")
    (folder / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"holds no finished run \(summary\.json missing\)"):
        report.write(folder)


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "curves.json"])
def test_a_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    folder = _record(tmp_path / "run")
    file = folder / name
    file.write_text(file.read_text()[:-20])
    with pytest.raises(ValueError, match=rf"{name} is damaged \("):
        report.write(folder)
