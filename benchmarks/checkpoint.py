"""Compressed checkpoints: size and time of writing, against no compression and against HDF5's own filters.

    python benchmarks/checkpoint.py [--models resnet56 resnet50 vit_b_16] [--pruned 0 0.9] [--limit MB/S] [--json FILE]

Weights: ResNet-56 as published (CCTORCH_WEIGHTS); ResNet-50 and ViT-B/16 of torchvision with normal random weights of
standard deviation 0.02, which are harder to compress than trained ones. Pruned: the smallest magnitudes of every
weight are zero. Error bound: 0.05 of a weight's root mean square (0.001 where that is 0.02).

All write into one folder and end with fsync; medians of runs taken in turns.

uncompressed: plan + safetensors, as the driver writes it. filters: h5py with SZ3 as the datasets' filter, chunk by
chunk, one thread, nothing beside it, nothing verified. sz3, zfp, zstd: cctorch.checkpoint.save, which decodes and
compares all that it compresses with loss.

--limit makes every write take at least as long as it would at that many MB/s, as on a shared file system: a sleep in
os.write and os.pwrite. fsync is still the disk's.
"""

import argparse
import contextlib
import io
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import hdf5plugin
import safetensors.torch
import torch
import torchvision
from cctorch import _C, atomic, checkpoint, models
from timing import in_turns, machine
from torch import Tensor

METHODS = ["uncompressed", "filters", *checkpoint.CODECS]
BOUND = 0.05
CHUNK = 1 << 20


def tensors(name: str, pruned: float) -> dict[str, Tensor]:
    if name == "resnet56":
        model = models.create(name)
        models.load_weights(model, Path(os.environ["CCTORCH_WEIGHTS"]) / "resnet56-4bfd9763.th")
    else:
        model = getattr(torchvision.models, name)()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for value in state.values():
        if value.dim() >= 2:
            if name != "resnet56":
                value.normal_(0, 0.02, generator=generator)
            if pruned:
                value *= value.abs() > value.abs().flatten().kthvalue(max(1, round(pruned * value.numel()))).values
    return state


class Throttled(io.FileIO):
    """What h5py writes through os.write, where --limit acts."""

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        size = len(view)
        while view:
            view = view[os.write(self.fileno(), view) :]
        return size


def write_uncompressed(path: Path, state: dict[str, Tensor]) -> None:
    atomic.write(path, safetensors.torch.save(state))


def write_with_filters(path: Path, state: dict[str, Tensor]) -> None:
    with Throttled(path, "w+") as raw, h5py.File(raw, "w", libver="v110") as file:
        for name, value in state.items():
            settings: dict[str, Any] = {}
            if value.dim() >= 2:
                bound = BOUND * float(value.square().mean().sqrt())
                settings = {"chunks": (min(CHUNK, value.numel()),), **hdf5plugin.SZ3(absolute=bound)}
            file.create_dataset(name, data=value.reshape(-1).numpy(), **settings)
        file.flush()
        os.fsync(raw.fileno())


@contextlib.contextmanager
def limited(megabytes: float | None) -> Iterator[None]:
    if megabytes is None:
        yield
        return

    def slow(write: Callable[..., int]) -> Callable[..., int]:
        def call(descriptor: int, data: Any, *rest: int) -> int:
            begin = time.perf_counter()
            written = write(descriptor, data, *rest)
            time.sleep(max(0.0, written / (1e6 * megabytes) - (time.perf_counter() - begin)))
            return written

        return call

    with mock.patch("os.write", slow(os.write)), mock.patch("os.pwrite", slow(os.pwrite)):
        yield


def disk_speed(folder: Path) -> float:
    """Bytes per second, fsync included."""
    data = os.urandom(64 << 20)
    ms = in_turns({"disk": lambda: atomic.write(folder / "disk", data)}, seconds=1.0, warmup=0)["disk"]
    (folder / "disk").unlink()
    return len(data) / (1e-3 * ms)


def row(name: str, pruned: float, folder: Path, bandwidth: float, methods: list[str], seconds: float) -> dict[str, Any]:
    state = tensors(name, pruned)
    reports: dict[str, list[checkpoint.Report]] = {codec: [] for codec in checkpoint.CODECS}

    def ours(codec: Any) -> Callable[[], None]:
        def save() -> None:
            reports[codec].append(
                checkpoint.save(folder / codec, state, codec=codec, error_bound=BOUND, bandwidth=bandwidth)
            )

        return save

    functions: dict[str, Callable[[], object]] = {
        "uncompressed": lambda: write_uncompressed(folder / "uncompressed", state),
        "filters": lambda: write_with_filters(folder / "filters", state),
        **{codec: ours(codec) for codec in checkpoint.CODECS},
    }
    functions = {method: functions[method] for method in methods}
    ms = in_turns(functions, seconds=seconds, warmup=0)
    sizes = {method: (folder / method).stat().st_size for method in functions}
    raw = sum(value.nbytes for value in state.values())
    found: dict[str, Any] = {"model": name, "pruned": pruned, "raw_bytes": raw, "methods": {}}
    for method in functions:
        entry: dict[str, Any] = {"ms": ms[method], "bytes": sizes[method], "ratio": raw / sizes[method]}
        if method in reports:
            entry |= figures(reports[method][-1], checkpoint.info(folder / method))
        found["methods"][method] = entry
    return found


def figures(report: checkpoint.Report, index: checkpoint.Index) -> dict[str, Any]:
    pieces = [piece for record in index.tensors.values() for piece in record.pieces]
    errors = sorted(abs(piece.predicted / piece.stored - 1) for piece in pieces)
    return {
        "predicted_per_stored": report.predicted / report.stored_chunks,
        "prediction_error_median": errors[len(errors) // 2],
        "prediction_error_max": errors[-1],
        "slots_overhead": report.slots / report.stored_chunks - 1,
        "file_overhead": report.file / report.stored - 1,
        "chunks": report.chunks,
        "overflowed": report.overflowed,
        "lossless_instead": report.lossless_instead,
        "compressing_s": report.compressing,
        "writing_s": report.writing,
        "writing_hidden": report.hidden / report.writing,
        "error_per_bound_max": max(
            (record.max_error / record.error_bound for record in index.tensors.values() if record.error_bound),
            default=0.0,
        ),
    }


def show(found: dict[str, Any]) -> None:
    base, filters = (found["methods"].get(method, {}).get("ms", math.nan) for method in ("uncompressed", "filters"))
    for method, entry in found["methods"].items():
        cells = [
            found["model"],
            f"{100 * found['pruned']:.0f} %",
            method,
            f"{entry['ratio']:.2f}",
            f"{entry['ms']:.0f}",
        ]
        cells += [f"{base / entry['ms']:.2f}", f"{filters / entry['ms']:.2f}"]
        if "chunks" in entry:
            cells += [f"{entry['predicted_per_stored']:.3f}", f"{100 * entry['file_overhead']:.1f} %"]
            cells += [f"{entry['overflowed']}/{entry['chunks']}", f"{100 * entry['writing_hidden']:.0f} %"]
        else:
            cells += ["", "", "", ""]
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet56", "resnet50", "vit_b_16"])
    parser.add_argument("--pruned", type=float, nargs="+", default=[0.0, 0.9])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--limit", type=float, help="MB/s of every write")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each model; every method has three turns")
    parser.add_argument("--folder", type=Path, help="on the disk to write to; absent: the system's temporary folder")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    _C.keep_freed_memory()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, limited(arguments.limit):
        bandwidth = disk_speed(Path(folder))
        print(
            f"disk: {bandwidth / 1e6:.0f} MB/s with fsync"
            + (f", limited to {arguments.limit:g}" if arguments.limit else "")
        )
        titles = "model | pruned | method | ratio | ms | x uncompressed | x filters | predicted / stored | overhead"
        print(f"| {titles} | overflow | hidden |\n" + "|---" * 11 + "|")
        rows = []
        for name in arguments.models:
            for pruned in arguments.pruned:
                rows.append(row(name, pruned, Path(folder), bandwidth, arguments.methods, arguments.seconds))
                show(rows[-1])
    if arguments.json:
        settings = {"bytes_per_s": bandwidth, "limit_mb_per_s": arguments.limit, "error_bound": BOUND, **machine()}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({**settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
