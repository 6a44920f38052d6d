"""The report's figures, as SVG."""

from __future__ import annotations

import io
import math

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cctorch.records import Epoch, Event
from cctorch.summary import Curve, Layer, Point

BLUE, ORANGE, GREEN = "#2563a8", "#d9772b", "#3f8f5f"
GREY, INK, RULE = "#aab2bd", "#26303b", "#e3e7ec"
_EVENTS = {
    "dense": "trained",
    "compressed": "compressed",
    "reestimated": "BatchNorm re-estimated",
    "repaired": "repaired",
    "finetuned": "fine-tuned",
    "stored": "as stored",
    "regularized": "after the last event",
    "applied": "in smaller layers",
    "prepared": "quantized",
    "quantized": "trained quantized",
}
_STAGES = (
    ("train", "training", GREY),
    ("finetune", "fine-tuning", BLUE),
    ("regularize", "as if at an event", GREEN),
    ("quantize", "quantized", GREEN),
)


def accuracy(events: list[Event]) -> str:
    """Top-1 and loss over the epochs, with what happened in between."""
    figure = Figure(figsize=(8, 5.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.3))
    epochs: list[Epoch] = []
    shift = 0.0
    for event in events:
        if event["event"] == "epoch":
            epochs.append(event)
            continue
        # Events between the same epochs would hide each other.
        shift = shift + 0.12 if event["event"] in ("reestimated", "repaired", "applied", "stored", "prepared") else 0.0
        color = ORANGE if event["event"] in ("compressed", "reestimated", "repaired") else INK
        place = len(epochs) + shift
        top.plot(place, event["accuracy"], "o", color=color, zorder=4)
        low = event["event"] not in ("compressed", "regularized", "quantized")
        text = f"{_EVENTS[event['event']]} {event['accuracy']:.2f} %"
        top.annotate(
            text,
            (place, event["accuracy"]),
            xytext=(6 if place < max(1, len(events) / 2) else -6, -14 if low else 6),
            ha="left" if place < max(1, len(events) / 2) else "right",
            textcoords="offset points",
            color=color,
            fontsize=9,
            zorder=5,
            bbox={"facecolor": "white", "alpha": 0.6, "edgecolor": "none", "pad": 0.6},
        )
    for stage, label, style in _STAGES:
        part = [(index + 1, event) for index, event in enumerate(epochs) if event["stage"] == stage]
        shown = [(index, event["accuracy"]) for index, event in part if event["accuracy"] is not None]
        if shown:
            top.plot([x for x, _ in shown], [y for _, y in shown], ".-", color=style, label=f"validation, {label}")
        bottom.plot([index for index, _ in part], [event["loss"] for _, event in part], ".-", color=style)
    dense = sum(event["stage"] == "train" for event in epochs)
    for axes in (top, bottom):
        if any(event["event"] == "compressed" for event in events):
            axes.axvline(dense, color=ORANGE, linewidth=1, linestyle=":")
        _clean(axes)
    top.margins(x=0.08, y=0.16)
    top.set_ylabel("top-1, %")
    top.plot([], [], "o", color=INK, label="test")
    top.legend(frameon=False, fontsize=9, loc="best")
    bottom.set_ylabel("training loss")
    bottom.set_xlabel("epoch (dotted: compression)")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _svg(figure)


def layers(layers: list[Layer], curves: list[Curve]) -> str:
    """Per layer: the rate allocated to it, and the input channels and the rank that it keeps.

    What went with a residual branch had no rate of its own, and has no rank.
    """
    allocated = {curve["name"]: curve["allocated"] for curve in curves}
    shown = [layer for layer in layers if layer["name"] in allocated]
    places = numpy.arange(len(shown))
    figure = Figure(figsize=(8, 1.2 + 0.24 * len(shown)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    rates = [allocated[layer["name"]] if layer["kept_in"] else 1.0 for layer in shown]
    left.barh(places, rates, color=BLUE, height=0.65)
    left.set_title("rate (MACs to remove)", loc="left", fontsize=10)
    left.set_yticks(places, [layer["name"] for layer in shown], fontsize=8)
    left.set_ylim(len(shown) - 0.4, -0.6)
    kept = [layer["kept_in"] / layer["in_channels"] for layer in shown]
    right.barh(places - 0.18, kept, color=GREY, height=0.34, label="input channels kept")
    rank = [(layer["rank"] or layer["full_rank"]) / layer["full_rank"] if layer["kept_in"] else 0.0 for layer in shown]
    colors = [ORANGE if layer["rank"] else "#f3dcc8" for layer in shown]
    right.barh(places + 0.18, rank, color=colors, height=0.34, label="rank kept (pale: not decomposed)")
    for place, layer in enumerate(shown):
        text = f"{layer['kept_in']}/{layer['in_channels']}"
        text += f", r {layer['rank']}/{layer['full_rank']}" if layer["rank"] else ""
        text += "" if layer["kept_in"] else ", removed"
        right.text(1.02, place, text, va="center", fontsize=7, color=INK)
    right.set_title("kept: channels (grey), rank (orange)", loc="left", fontsize=10)
    right.set_xlim(0, 1.42)
    for axes in (left, right):
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
        _clean(axes, "x")
    return _svg(figure)


def rate_curves(curves: list[Curve]) -> str:
    """Per layer: measured loss against rate, its fit a exp(b c), and the allocated rate."""
    columns = min(4, len(curves)) or 1
    rows = math.ceil(len(curves) / columns) or 1
    figure = Figure(figsize=(8, 0.5 + 1.35 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(curves) :]:
        axes.set_visible(False)
    for axes, curve in zip(grid.flat, curves, strict=False):
        rate = numpy.linspace(0, 1, 80)
        axes.plot(rate, curve["a"] * numpy.exp(curve["b"] * rate), color=ORANGE, linewidth=1.4)
        stride = max(1, len(curve["rate"]) // 60)
        axes.plot(curve["rate"][::stride], curve["loss"][::stride], ".", color=BLUE, markersize=2.5)
        axes.axvline(curve["allocated"], color=INK, linewidth=0.9, linestyle=":")
        axes.set_title(curve["name"], fontsize=7.5, loc="left", pad=2)
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.03, 1.05)
        axes.set_xticks([0, 0.5, 1])
        axes.tick_params(labelsize=7)
        _clean(axes)
    figure.supxlabel("rate c", fontsize=9)
    figure.supylabel("loss / layer's maximum", fontsize=9)
    return _svg(figure)


def costs(layers: list[Layer]) -> str:
    """Per layer: multiply-accumulates and time, before and after."""
    shown = [layer for layer in layers if layer["macs_before"] or layer["seconds_before"]]
    places = numpy.arange(len(shown))
    figure = Figure(figsize=(8, 1.2 + 0.24 * len(shown)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key, scale, title in (
        (left, "macs", 1e-6, "MACs, millions per image (grey: before)"),
        (right, "seconds", 1e3, "time, ms per batch (blue: after)"),
    ):
        for offset, moment, color in ((-0.19, "before", GREY), (0.19, "after", BLUE)):
            values = [layer[f"{key}_{moment}"] * scale for layer in shown]  # type: ignore[literal-required]
            axes.barh(places + offset, values, color=color, height=0.38)
        axes.set_title(title, loc="left", fontsize=10)
        _clean(axes, "x")
    left.set_yticks(places, [layer["name"] for layer in shown], fontsize=8)
    left.set_ylim(len(shown) - 0.4, -0.6)
    return _svg(figure)


def regularization(trace: list[list[float]]) -> str:
    """Of every event: the update in relation to the weights, for each mini-batch of its period, and the period."""
    steps, periods, updates = ([entry[index] for entry in trace] for index in range(3))
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    top.plot(steps, updates, ".-", color=BLUE, label="at the event")
    per_batch = [update / period for update, period in zip(updates, periods, strict=True)]
    top.plot(steps, per_batch, ".-", color=ORANGE, label="for each mini-batch of its period")
    top.set_yscale("log" if min(per_batch) > 0 else "linear")
    top.set_ylabel("update / weights")
    top.legend(frameon=False, fontsize=9)
    bottom.step(steps, periods, where="pre", color=INK)
    bottom.set_ylabel("period")
    bottom.set_xlabel("step of the stage")
    for axes in (top, bottom):
        _clean(axes)
    return _svg(figure)


def sweep(points: list[Point]) -> str:
    """Top-1 against the multiply-accumulates and against the latency that are left."""
    batch = max(points[0].latency, key=int)
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, label, left_over in (
        (left, "multiply-accumulates left", [point.macs / points[0].macs for point in points]),
        (
            right,
            f"latency left, batch {batch}",
            [point.latency[batch][0] / point.latency[batch][1] for point in points],
        ),
    ):
        for kind, name, color in (
            ("repaired", "repaired", BLUE),
            ("reestimated", "BatchNorm re-estimated", ORANGE),
            ("compressed", "right after compression", GREY),
        ):
            top1 = [getattr(point, f"top1_{kind}") for point in points]
            shown = [(x, y) for x, y in zip(left_over, top1, strict=True) if y is not None]
            axes.plot([x for x, _ in shown], [y for _, y in shown], ".-", color=color, label=name)
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        _clean(axes)
    left.set_ylabel("top-1, %")
    left.legend(frameon=False, fontsize=9)
    return _svg(figure)


def _clean(axes: Axes, grid: str = "y") -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    axes.tick_params(color=GREY, labelcolor=INK)
    axes.grid(axis=grid, color=RULE, linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def _svg(figure: Figure) -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "cctorch"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()
