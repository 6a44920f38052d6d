"""A file's index as text."""

from __future__ import annotations

import os
from pathlib import Path

from cctorch.checkpoint.index import Record
from cctorch.checkpoint.read import info

_COLUMNS = (
    "tensor",
    "dtype",
    "shape",
    "codec",
    "error bound",
    "largest error",
    "bytes",
    "stored",
    "ratio",
    "predicted",
)


def show(path: str | os.PathLike[str]) -> str:
    """A line for each tensor of a checkpoint, and one for the file. Raises CheckpointError as :func:`load` does.

    ``predicted`` is the size that was predicted for the tensor, per byte that is stored of it.
    """
    index = info(path)
    rows = [tuple(_COLUMNS), *(_row(name, record) for name, record in index.tensors.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    raw, size = sum(record.raw for record in index.tensors.values()), Path(path).stat().st_size
    written = ", ".join(f"{name} {version}" for name, version in index.versions.items())
    lines.append(f"{len(index.tensors)} tensors, {raw:,} bytes in a file of {size:,} ({raw / size:.2f} x); {written}")
    return "\n".join(lines)


def _row(name: str, record: Record) -> tuple[str, ...]:
    predicted, chunks = (sum(getattr(piece, of) for piece in record.pieces) for of in ("predicted", "stored"))
    return (
        name,
        record.dtype,
        "x".join(map(str, record.shape)) or "scalar",
        record.codec,
        f"{record.error_bound:.3g}" if record.error_bound else "",
        f"{record.max_error:.3g}" if record.error_bound else "",
        f"{record.raw:,}",
        f"{record.stored:,}",
        f"{record.raw / record.stored:.2f}" if record.stored else "",
        f"{predicted / chunks:.3f}" if chunks else "",
    )
