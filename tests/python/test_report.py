from __future__ import annotations

import base64
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from cctorch import cli, report
from cctorch.summary import Summary

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
    figures = {"accuracy": accuracy, "loss": 1 / epoch, "lr": 0.1, "seconds": 2.5}
    return {"event": "epoch", "stage": stage, "time": 1e9, "epoch": epoch, **figures}


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
        {"event": kind, "stage": "compress", "time": 1e9, "accuracy": value}
        for kind, value in (("dense", 91.25), ("compressed", 31.7), ("reestimated", 79.0), ("repaired", 90.5))
    ]
    events += [_epoch("finetune", epoch + 1, accuracy) for epoch in range(epochs)]
    events.append({"event": "finetuned", "stage": "finetune", "time": 1e9, "accuracy": 91.0})
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


def test_a_removed_layer_has_no_rank_and_gave_up_everything(tmp_path: Path) -> None:
    folder = _record(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    summary["layers"][2] |= {"kept_in": 0, "kept_out": 0, "macs_after": 0}
    (folder / "summary.json").write_text(json.dumps(summary))
    drawn = _figures_of(report.write(folder).read_text())["What each layer gave up"]
    assert "<!-- 0/16, removed -->" in drawn

    def widths(color: str) -> list[float]:
        bars = re.findall(rf'd="M ([\d.]+) [\d.]+ \nL ([\d.]+) [^"]*"[^>]*fill: {color}', drawn)
        return [float(right) - float(left) for left, right in bars]

    rates, ranks = widths("#2563a8"), widths("#f3dcc8")
    assert [rate / rates[2] for rate in rates] == pytest.approx([0.4, 0.4, 1.0])
    assert ranks[-1] == 0.0


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


REGULARIZED = {
    **{"top1": 50.0, "top1_between": 60.0, "events": 1, "bits": 8, "dense_bits": 64},
    **{"trace": [[4, 4, 0.5, 8, 64]], "parameters": []},
}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("summary.json", {}, "name: Field required"),
        ("summary.json", [1], "Input should be a dictionary or an instance of Summary"),
        ("summary.json", {"before": {"top1": "high"}}, "before.top1: Input should be a valid number"),
        ("summary.json", {"layers": [{"name": "conv"}]}, "layers.0.kind: Field required"),
        ("summary.json", {"regularized": {"events": 3}}, "top1: Field required"),
        ("summary.json", {"regularized": {**REGULARIZED, "parameters": 3}}, "parameters: Input should be a valid list"),
        (
            "summary.json",
            {"regularized": {**REGULARIZED, "parameters": [3]}},
            "parameters.0: Input should be a valid dict",
        ),
        ("summary.json", {"regularized": {**REGULARIZED, "parameters": [{}]}}, "parameters.0.sparsity: Field required"),
        ("summary.json", {"regularized": {**REGULARIZED, "trace": []}}, "trace: List should have at least 1 item"),
        (
            "summary.json",
            {"regularized": {**REGULARIZED, "trace": [[1]]}},
            "trace.0: List should have at least 5 items",
        ),
        ("summary.json", {"latency_budget": {"batch": 3}}, "dense_seconds: Field required"),
        ("metrics.jsonl", 3, "0: Input should be a valid dictionary"),
        ("metrics.jsonl", {"event": "epoch"}, "0.epoch.stage: Field required"),
        ("metrics.jsonl", {"event": "party"}, "0: Input tag 'party' found"),
        ("curves.json", {"name": "conv"}, "Input should be a valid list"),
        ("curves.json", [{"name": "conv"}], "0.rate: Field required"),
        ("sweep.json", [{"target": 0.3}], "0.macs: Field required"),
        ("sweep.json", "[]", "Input should be a valid list"),
    ],
)
def test_json_of_something_else_is_named(
    tmp_path: Path, name: str, content: Any, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _record(tmp_path / "run")
    if isinstance(content, dict) and content and name == "summary.json":
        whole = json.loads((folder / name).read_text())
        nested = {key: {**whole[key], **part} for key, part in content.items() if isinstance(whole.get(key), dict)}
        content = {**whole, **content, **nested}
    (folder / name).write_text(json.dumps(content))
    assert cli.main(["report", str(folder)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"cctorch: {folder / name} is damaged ({reason}")
    assert error.count("\n") == 1
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("name", ["resnet56_cifar10", "resnet32_tucker2"])
def test_reads_the_runs_of_the_documentation(name: str) -> None:
    file = Path(__file__).parents[2] / "docs" / "results" / name / "summary.json"
    tree = json.loads(file.read_text())
    read = json.loads(Summary.from_json(file.read_text()).to_json())
    assert {key: read[key] for key in tree} == tree
