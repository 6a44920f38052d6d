"""How the time of the search grows with a layer's channels: 3 x 3 convolutions and linear layers, as many out as in.

    python benchmarks/search_growth.py --output docs/results/search

Weights and gradients are random; half of the layer goes, in the fixed basis. The least of REPEATS times counts. The
growth is the exponent of the number of channels from one row to the next. OUTPUT/growth/growth.json and growth.md.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from cctorch import _C, atomic

KERNELS = {"conv2d": 3, "linear": 1}


def seconds(kind: Any, channels: int, repeats: int) -> tuple[float, float]:
    """Of the rate curve and of the heuristic."""
    torch.manual_seed(0)
    side = KERNELS[kind]
    spec = _C.LayerSpec("layer", kind, channels, channels, side, side)
    shape = (channels, channels, side, side) if kind == "conv2d" else (channels, channels)
    weight, gradient = (torch.randn(shape) / math.sqrt(channels * side**2) for _ in range(2))
    macs = _C.dense_macs([spec])
    times = []
    for _ in range(repeats):
        options = _C.SolverOptions(target=0.5)
        found = _C.Search([_C.SolverLayer(spec, weight, gradient)], macs, options).at(0.5)
        times.append((found.curve_seconds, found.heuristic_seconds))
    return min(times, key=sum)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| layer | channels | rate s | heuristic s | growth |", "|---|---|---|---|---|"]
    for before, row in zip([None, *rows], rows, strict=False):
        growth = ""
        if before is not None and before["kind"] == row["kind"]:
            ratio = (row["rate"] + row["heuristic"]) / (before["rate"] + before["heuristic"])
            growth = f"{math.log(ratio) / math.log(row['channels'] / before['channels']):.1f}"
        cells = (row["kind"], row["channels"], f"{row['rate']:.3f}", f"{row['heuristic']:.3f}", growth)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rows = []
    for kind in KERNELS:
        for channels in arguments.channels:
            rate, heuristic = seconds(kind, channels, arguments.repeats)
            rows.append({"kind": kind, "channels": channels, "rate": rate, "heuristic": heuristic})
            print(rows[-1], flush=True)
    folder = arguments.output / "growth"
    folder.mkdir(parents=True, exist_ok=True)
    content = {"threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability(), "rows": rows}
    atomic.write(folder / "growth.json", json.dumps(content, indent=1).encode())
    atomic.write(folder / "growth.md", table(rows).encode())


if __name__ == "__main__":
    main()
