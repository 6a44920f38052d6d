"""What a run found: summary.json, and the one table that is shown at its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter
from rich.table import Table
from typing_extensions import TypedDict

from cctorch import _C, collaborative
from cctorch.latency_budget import Latency
from cctorch.log import Log
from cctorch.quantize_stage import Quantized
from cctorch.regularize_stage import Regularized


@dataclass(frozen=True)
class Figures:
    """One model, measured. `latency` is in seconds, by batch size; `macs` per image; `bytes` those of its file."""

    top1: float
    parameters: int
    macs: int
    bytes: int
    latency: dict[str, float]


class Layer(TypedDict):
    """Sizes and multiply-accumulates of a layer before and after, and the seconds that it takes."""

    name: str
    kind: str
    in_channels: int
    out_channels: int
    kept_in: int
    kept_out: int
    rank: int | None
    full_rank: int
    macs_before: int
    macs_after: int
    seconds_before: float
    seconds_after: float


@dataclass(frozen=True)
class Summary:
    """What a run found; summary.json."""

    name: str
    device: str
    target: float
    before: Figures
    after: Figures
    nominal_macs: int
    layers: list[Layer]
    # Of Collaborative Compression, where there was one.
    top1_compressed: float | None = None
    top1_reestimated: float | None = None
    # Of that, or of the smaller layers that events have led to.
    top1_repaired: float | None = None
    repair_seconds: float | None = None
    gradient_seconds: float = 0.0
    curve_seconds: float = 0.0
    heuristic_seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    # What `target` is a share of: macs, parameters, bytes or latency.
    budget: str = "macs"
    # Latency, as a dict, where that was the budget.
    latency_budget: dict[str, Any] | None = None
    # Regularized, as a dict.
    regularized: dict[str, Any] | None = None
    # Quantized, as a dict.
    quantized: dict[str, Any] | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Summary:
        """Raises ValueError for what is none."""
        summary = TypeAdapter(Summary).validate_python(json.loads(text))
        TypeAdapter(Latency | None).validate_python(summary.latency_budget)
        TypeAdapter(Regularized | None).validate_python(summary.regularized)
        TypeAdapter(Quantized | None).validate_python(summary.quantized)
        return summary


class Curve(TypedDict):
    """Of curves.json: a layer's measured loss at each rate, its fit a exp(b rate), and the rate allocated to it."""

    name: str
    rate: list[float]
    loss: list[float]
    a: float
    b: float
    allocated: float


@dataclass(frozen=True)
class Point:
    """One target of a sweep. Top-1 in percent, on `images`, None where the run's settings leave that step out; `macs`
    per image.

    `latency`: seconds by batch size, of this model and of the dense one, taken in turns on `device`.
    """

    target: float
    macs: int
    parameters: int
    latency: dict[str, tuple[float, float]]
    top1_compressed: float
    top1_reestimated: float | None
    top1_repaired: float | None
    images: str
    device: str


def show(summary: Summary, log: Log) -> None:
    """The one table."""
    before, after = summary.before, summary.after
    table = Table(title=f"{summary.name}, on {summary.device}", title_justify="left")
    for heading in ("", "before", "after", "ratio"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("top-1", f"{before.top1:.2f} %", f"{after.top1:.2f} %", f"{after.top1 - before.top1:+.2f}")
    rows: list[tuple[str, float, float, Callable[[float], str]]] = [
        ("parameters", before.parameters, after.parameters, lambda value: f"{value / 1e6:.3f} M"),
        ("MACs", before.macs, after.macs, lambda value: f"{value / 1e6:.2f} M"),
        ("size on disk", before.bytes, after.bytes, lambda value: f"{value / 1e6:.3f} MB"),
    ]
    for batch in before.latency:
        label = f"latency, batch {batch}"
        rows.append((label, before.latency[batch], after.latency[batch], lambda value: f"{value * 1e3:.2f} ms"))
    for label, old, new, text in rows:
        table.add_row(label, text(old), text(new), f"{new / old:.3f}")
    log.table(table)
    if summary.top1_compressed is not None:
        _show_search(summary, log)
    if summary.regularized is not None:
        found = summary.regularized
        log.line(
            f"regularization: {found['events']} events, top-1 {found['top1']:.2f} % right after the last "
            f"({found['top1_between']:.2f} % before it); where Q acts {found['dense_bits'] / 8e6:.3f} MB -> "
            f"{found['bits'] / 8e6:.3f} MB, {found['dense_bits'] / found['bits']:.2f} to 1"
        )
        if summary.top1_compressed is None and summary.top1_repaired is not None:
            log.line(f"in smaller layers: {repaired_text(asdict(summary))}")
    if summary.quantized is not None:
        log.line(quantized_text(summary.quantized))


def repaired_text(summary: dict[str, Any]) -> str:
    return f"{summary['top1_repaired']:.2f} % repaired in {summary['repair_seconds']:.1f} s"


def bits_text(quantized: dict[str, Any]) -> str:
    return " and ".join(map(str, sorted({layer["bits"] for layer in quantized["layers"]})))


def quantized_text(found: dict[str, Any]) -> str:
    """`found` is a Quantized, as a dict."""
    return (
        f"quantization to {bits_text(found)} bits: top-1 {found['top1']:.2f} % "
        f"({found['top1_prepared']:.2f} % before any training); {len(found['layers'])} weights, "
        f"{found['dense_bits'] / 8e6:.3f} MB -> {found['bits'] / 8e6:.3f} MB with their scales, "
        f"{found['dense_bits'] / found['bits']:.2f} to 1"
    )


def predicted_against_measured(target: float, latency: dict[str, Any]) -> str:
    """The latency that was asked for, that the layers' times promised, and that the search measured."""
    return (
        f"latency at batch {latency['batch']}: {latency['ratio']:.3f} of the dense time measured, "
        f"{latency['predicted_ratio']:.3f} predicted, {1 - target:.3f} wanted; {len(latency['rounds'])} plans, "
        f"{latency['dense_seconds'] * 1e3:.2f} ms -> {latency['seconds'] * 1e3:.2f} ms"
    )


def _show_search(summary: Summary, log: Log) -> None:
    restored = (
        f", {summary.top1_reestimated:.2f} % with BatchNorm re-estimated"
        if summary.top1_reestimated is not None
        else ""
    )
    if summary.top1_repaired is not None:
        restored += f", {repaired_text(asdict(summary))}"
    log.line(f"right after compression: {summary.top1_compressed:.2f} %{restored}")
    log.line(
        f"reduction of MACs: {1 - summary.nominal_macs / summary.before.macs:.1%} nominal, "
        f"{1 - summary.after.macs / summary.before.macs:.1%} final (dead filters removed)"
        + (f"; target {summary.target:.1%}" if summary.budget == "macs" else "")
    )
    # The budget of bytes knows the bits, of which a quantized file's size beside the dense one says nothing.
    if summary.budget == "parameters" or (summary.budget == "bytes" and summary.quantized is None):
        kept = getattr(summary.after, summary.budget) / getattr(summary.before, summary.budget)
        log.line(f"reduction of {summary.budget}: {1 - kept:.1%}; target {summary.target:.1%} of the weights")
    if summary.latency_budget is not None:
        log.line(predicted_against_measured(summary.target, summary.latency_budget))
    log.line(
        f"search: gradients {summary.gradient_seconds:.1f} s, rate curves {summary.curve_seconds:.1f} s, "
        f"heuristic {summary.heuristic_seconds:.1f} s"
    )


def counted(specs: list[_C.LayerSpec], plan: _C.CompressionPlan | None = None) -> dict[str, Any]:
    """The results of a model that was not searched."""
    done = plan or _C.CompressionPlan()
    return {
        "dense_macs": _C.dense_macs(specs),
        "nominal_macs": _C.nominal_macs(specs, done),
        "final_macs": _C.final_macs(specs, done),
        "layers": _layers(specs, plan),
    }


def _layers(specs: list[_C.LayerSpec], whole: _C.CompressionPlan | None) -> list[dict[str, Any]]:
    layers = []
    for spec in specs:
        plan = whole.find(spec.name) if whole else None
        layers.append(
            {
                "name": spec.name,
                "kind": spec.kind,
                "in_channels": spec.in_channels,
                "out_channels": spec.out_channels,
                "kept_in": len(plan.kept_in) if plan else spec.in_channels,
                "kept_out": len(plan.kept_out) if plan else spec.out_channels,
                "rank": plan.rank if plan else None,
                "full_rank": _full_rank(spec, plan),
                "macs_before": spec.macs,
                "macs_after": _C.layer_macs(spec, plan, True),
            }
        )
    return layers


def _full_rank(spec: _C.LayerSpec, plan: _C.LayerPlan | None) -> int:
    """Of the matrix that the plan's layout factors."""
    inputs, high, wide = spec.in_channels // spec.groups, spec.kernel_height, spec.kernel_width
    if plan is not None and plan.layout == "spatial":
        return min(spec.out_channels * high, inputs * wide)
    return min(spec.out_channels, inputs * high * wide)


def search_results(found: collaborative.Compression) -> dict[str, Any]:
    """What a run keeps of its search."""
    names = ("dense_macs", "nominal_macs", "final_macs", "gradient_seconds", "curve_seconds", "heuristic_seconds")
    return {name: getattr(found, name) for name in names} | {
        "layers": _layers(found.model_specs, found.plan),
        "warnings": list(found.warnings),
        "latency_budget": asdict(found.latency) if found.latency else None,
    }
