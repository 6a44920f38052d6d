"""The report's page: plain HTML with its style and figures inside."""

from __future__ import annotations

import base64
from html import escape
from typing import Any

from cctorch.report import Record, plots
from cctorch.summary import Point, bits_text, predicted_against_measured, quantized_text, repaired_text

_STYLE = """
:root { color-scheme: light; --ink: #26303b; --soft: #66717e; --rule: #e3e7ec; --blue: #2563a8; --orange: #d9772b; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f6f8; color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 920px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; }
h2 { font-size: 1.12rem; margin: 0 0 .3rem; }
p { margin: .2rem 0 .8rem; color: var(--soft); }
section { background: #fff; border: 1px solid var(--rule); border-radius: 10px; }
section { padding: 1.1rem 1.2rem; margin-top: 1.1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .8rem; margin-top: 1.1rem; }
.tile { background: #fff; border: 1px solid var(--rule); border-radius: 10px; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .88rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .38rem .6rem; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { color: var(--soft); font-weight: 600; }
img { display: block; width: 100%; min-width: 560px; height: auto; }
pre { background: #f4f6f8; border-radius: 8px; padding: .9rem; overflow-x: auto; font-size: .85rem; margin: .4rem 0 0; }
.warning { border-left: 4px solid var(--orange); }
"""


def render(record: Record) -> str:
    """The page as HTML. Nothing in it is fetched from elsewhere."""
    summary = record.summary
    layers = summary["layers"]
    sections = [
        _section("Before and after", _note(summary), _table(summary)),
        _figure(
            "Accuracy over time",
            "Validation images are held out of the training set; test accuracy is measured once at each event.",
            plots.accuracy(record.events),
        ),
        *([_allocation(record)] if record.curves else []),
        *([_sweep(record.sweep)] if record.sweep else []),
        *_regularization(summary["regularized"]),
        *_quantization(summary["quantized"]),
        _figure(
            "Where the multiply-accumulates and the time went",
            "Per layer, dense and compressed, in the same process. A decomposed layer counts both of its parts.",
            plots.costs(layers),
        ),
        *([_rate_curves(record)] if record.curves else []),
        _section("Configuration", "config.yaml of this run.", f"<pre>{escape(record.config)}</pre>"),
    ]
    warnings = "".join(
        f'<section class="warning"><h2>Warning</h2>{escape(text)}</section>' for text in summary["warnings"]
    )
    name = escape(summary["name"])
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}: compression report</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{name}</h1><p>{_subtitle(summary)}, measured on {escape(summary['device'])}.</p>"
        f"{_tiles(summary)}{warnings}{''.join(sections)}</main></body></html>\n"
    )


def _allocation(record: Record) -> str:
    return _figure(
        "What each layer gave up",
        "The rate that the budget allocated to each layer, and what it kept of its input channels and its rank.",
        plots.layers(record.summary["layers"], record.curves),
    )


def _sweep(points: list[Point]) -> str:
    return _figure(
        "Trade-off",
        f"Top-1 on the {points[0].images} images after compression to several targets, without any fine-tuning.",
        plots.sweep(points),
    )


def _rate_curves(record: Record) -> str:
    return _figure(
        "Loss against rate",
        "Points: measured; line: the fit a·exp(b·c); dotted: the allocated rate.",
        plots.rate_curves(record.curves),
    )


def _regularization(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    rows = [
        f"<td>{escape(entry['name'])}</td><td>{entry['sparsity']:.1%}</td>"
        f"<td>{entry['rank'] if entry['rank'] is not None else ''}</td>"
        f"<td>{entry['full_rank'] if entry['full_rank'] is not None else ''}</td><td>{entry['values']}</td>"
        for entry in found["parameters"]
    ]
    head = "<tr><th>parameter</th><th>zeros</th><th>rank</th><th>of</th><th>distinct values</th></tr>"
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    note = (
        f"{found['events']} events. Right after the last: {found['top1']:.2f} %; before it: "
        f"{found['top1_between']:.2f} %. Size where Q acts: {found['dense_bits'] / 8e6:.3f} MB dense, "
        f"{found['bits'] / 8e6:.3f} MB compressed."
    )
    return [
        _figure(
            "Regularization events",
            "How much each event changed the weights, and the steps since the event before.",
            plots.regularization(found["trace"]),
        ),
        _section("What the events left", note, f'<div class="scroll"><table>{head}{body}</table></div>'),
    ]


def _quantization(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    rows = [
        f"<td>{escape(layer['name'])}</td><td>{layer['bits']}</td><td>{layer['values']}</td>"
        for layer in found["layers"]
    ]
    head = "<tr><th>weight</th><th>bits</th><th>values</th></tr>"
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    table = f'<div class="scroll"><table>{head}{body}</table></div>'
    text = quantized_text(found)
    return [_section("Quantized weights", f"{text[0].upper()}{text[1:]}.", table)]


def _tiles(summary: dict[str, Any]) -> str:
    before, after = summary["before"], summary["after"]
    batch = max(before["latency"], key=int)
    tiles = [
        (f"{after['top1']:.2f} %", f"top-1 ({after['top1'] - before['top1']:+.2f})"),
        (f"−{1 - after['macs'] / before['macs']:.1%}", "multiply-accumulates"),
        (f"−{1 - after['parameters'] / before['parameters']:.1%}", "parameters"),
        (f"{before['latency'][batch] / after['latency'][batch]:.2f}×", f"as fast at batch {batch}"),
    ]
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{a}</b><span>{b}</span></div>' for a, b in tiles)
        + "</div>"
    )


def _subtitle(summary: dict[str, Any]) -> str:
    parts = []
    if summary["top1_compressed"] is not None:
        counted = "multiply-accumulates" if summary["budget"] == "macs" else summary["budget"]
        parts.append(f"Collaborative Compression to {1 - summary['target']:.0%} of the {counted}")
    if summary["regularized"] is not None:
        parts.append(f"{summary['regularized']['events']} regularization events")
    if summary["quantized"] is not None:
        parts.append(f"weights of {bits_text(summary['quantized'])} bits")
    return ", ".join(parts)


def _note(summary: dict[str, Any]) -> str:
    if summary["top1_compressed"] is None:
        smaller = any(layer["macs_after"] < layer["macs_before"] for layer in summary["layers"])
        if not smaller:
            return "Layers of the dense model's shapes."
        note = "Layers as small as the last event left their weights"
        return f"{note}." if summary["top1_repaired"] is None else f"{note}; {repaired_text(summary)}."
    text = f"Right after compression: {summary['top1_compressed']:.2f} %"
    if summary["top1_reestimated"] is not None:
        text += f", {summary['top1_reestimated']:.2f} % with BatchNorm statistics re-estimated"
    if summary["top1_repaired"] is not None:
        text += f", {repaired_text(summary)}"
    if summary["latency_budget"] is not None:
        searched = predicted_against_measured(summary["target"], summary["latency_budget"])
        text += f". In the search, {searched}"
    nominal = 1 - summary["nominal_macs"] / summary["before"]["macs"]
    return (
        f"{text}. MACs removed: {nominal:.1%} nominal; the table counts dead filters too. Search: gradients "
        f"{summary['gradient_seconds']:.1f} s, rate curves {summary['curve_seconds']:.1f} s, "
        f"heuristic {summary['heuristic_seconds']:.1f} s."
    )


def _table(summary: dict[str, Any]) -> str:
    before, after = summary["before"], summary["after"]
    rows = [("top-1", f"{before['top1']:.2f} %", f"{after['top1']:.2f} %", f"{after['top1'] - before['top1']:+.2f}")]
    measured = [
        ("parameters", before["parameters"], after["parameters"], 1e-6, 3, "M"),
        ("MACs per image", before["macs"], after["macs"], 1e-6, 2, "M"),
        ("size on disk", before["bytes"], after["bytes"], 1e-6, 3, "MB"),
    ]
    measured += [
        (f"latency, batch {batch}", before["latency"][batch], after["latency"][batch], 1e3, 2, "ms")
        for batch in before["latency"]
    ]
    for label, old, new, scale, digits, unit in measured:
        rows.append((label, f"{old * scale:.{digits}f} {unit}", f"{new * scale:.{digits}f} {unit}", f"{new / old:.3f}"))
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    head = "<tr><th></th><th>before</th><th>after</th><th>ratio</th></tr>"
    return f'<div class="scroll"><table>{head}{body}</table></div>'


def _figure(title: str, note: str, svg: str) -> str:
    source = base64.b64encode(svg.encode()).decode()
    return _section(
        title, note, f'<div class="scroll"><img alt="{escape(title)}" src="data:image/svg+xml;base64,{source}"></div>'
    )


def _section(title: str, note: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{escape(note)}</p>{content}</section>"
