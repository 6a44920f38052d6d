"""The last stage of a run: figures of both models, the exported program, the summary."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cctorch import data, export, measure
from cctorch.config import Config, ConfigError, Measure
from cctorch.device import describe
from cctorch.log import Log
from cctorch.store import Folder, load_model, load_state
from cctorch.summary import Figures, Summary


def check(config: Config) -> None:
    """Raises ConfigError where a package is missing that the stage needs."""
    if config.onnx and not all(importlib.util.find_spec(module) for module in ("onnx", "onnxscript", "onnxruntime")):
        raise ConfigError(
            "onnx = true: expected onnx, onnxscript and onnxruntime to be installed: pip install cctorch[onnx]"
        )


def measured(
    config: Config,
    folder: Folder,
    feed: data.Feed,
    model: nn.Module,
    device: torch.device,
    results: dict[str, Any],
    log: Log,
) -> Summary:
    """Measures `model`, the compressed one, and the folder's dense model; writes the exported files and summary.json.

    `results` are those of the stages before; its layers get the seconds they take.
    """
    log.line("measuring")
    dense = feed.place(load_model(folder.dense)[0], device)
    model.eval()
    before, before_times = _figures(
        config.measure, feed, dense, folder.dense, results["dense_top1"], results["dense_macs"]
    )
    deliverable = folder.deliverable(config.checkpoint)
    after, after_times = _figures(
        config.measure, feed, model, deliverable, results["compressed_top1"], results["final_macs"]
    )
    for layer in results["layers"]:
        layer["seconds_before"] = _seconds_of(layer["name"], before_times)
        layer["seconds_after"] = _seconds_of(layer["name"], after_times)
    export_files(config, folder, log)
    shared = {field: results[field] for field in Summary.__dataclass_fields__ if field in results}
    summary = Summary(
        name=config.name,
        device=describe(device),
        target=config.compress.target if config.compress else 0.0,
        budget=config.compress.budget if config.compress else "macs",
        before=before,
        after=after,
        **shared,
    )
    folder.write("summary.json", summary.to_json())
    return summary


def export_files(config: Config, folder: Folder, log: Log, *, only_missing: bool = False) -> None:
    """Writes what `config` wants exported, of what the deliverable holds."""
    program, onnx = folder.path / "compressed.pt2", folder.path / "compressed.onnx"
    wanted = [file for file, wants in ((program, config.export), (onnx, config.onnx)) if wants]
    if only_missing:
        wanted = [file for file in wanted if not file.exists()]
    if not wanted:
        return
    log.line("exporting")
    deliverable = folder.deliverable(config.checkpoint)
    model, architecture = load_model(deliverable)
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    # A program remembers its device; one on the CPU opens everywhere.
    model = model.to(memory_format=layout)  # type: ignore[call-overload]
    example = torch.rand(2, *architecture.shape, generator=torch.Generator().manual_seed(0))
    example = example.contiguous(memory_format=layout)
    if program in wanted:
        export.save_program(model, example, program)
    if onnx in wanted:
        from cctorch.export_onnx import save_onnx

        save_onnx(model, example, onnx, codes=load_state(deliverable))


def _figures(
    settings: Measure, feed: data.Feed, model: nn.Module, file: Path, top1: float, macs: int
) -> tuple[Figures, dict[str, float]]:
    latency = {
        str(batch): measure.latency(model, feed.example(batch), repeats=settings.repeats)
        for batch in settings.batch_sizes
    }
    figures = Figures(top1, measure.parameters(model), macs, file.stat().st_size, latency)
    return figures, measure.layer_times(model, feed.example(max(settings.batch_sizes)))


def _seconds_of(layer: str, times: dict[str, float]) -> float:
    """Of a layer, or of the parts that it was replaced by."""
    return sum(seconds for name, seconds in times.items() if name == layer or name.startswith(f"{layer}."))
