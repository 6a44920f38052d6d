"""A data set and a configuration small enough for tests: 12 x 12 images whose brightest quarter is the label."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import torch
from cctorch.config import Config, parse_config
from cctorch.run import Summary, run
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor


def write_idx(file: Path, values: Tensor) -> None:
    header = bytes([0, 0, 8, values.dim()]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    content = header + values.to(torch.uint8).contiguous().numpy().tobytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(content, 1) if file.suffix == ".gz" else content)


def images_and_labels(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    images = torch.randint(0, 120, (count, 12, 12), generator=generator)
    for index, label in enumerate(labels.tolist()):
        row, column = 6 * (label // 2), 6 * (label % 2)
        images[index, row : row + 6, column : column + 6] += 100
    return images, labels


def write_dataset(folder: Path, train: int = 96, test: int = 40) -> Path:
    for part, count, seed in (("train", train, 0), ("t10k", test, 1)):
        images, labels = images_and_labels(count, seed)
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    return folder


def tree(data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    training = {"epochs": 2, "batch_size": 32, "lr": 0.05, "augment": True}
    return {
        "name": "tiny",
        "device": "cpu",
        "threads": 1,
        "output": str(output),
        "data": {"kind": "fashion_mnist", "root": str(data), "validation": 16},
        "model": {"name": "resnet8"},
        "train": dict(training),
        "compress": {"target": 0.4, "bn_reestimate_images": 32, "repair_images": 32},
        "finetune": dict(training),
        "measure": {"batch_sizes": [1, 4], "repeats": 1},
        "export": False,
        **changes,
    }


def config(data: Path, output: Path, **changes: Any) -> Config:
    return parse_config(tree(data, output, **changes))


def staged(data: Path, output: Path, *, compress: bool, **sections: Any) -> Config:
    """With a stage after the compression and the fine-tuning, or after the training alone."""
    whole = tree(data, output, **sections)
    if compress:
        whole["compress"]["target"] = 0.6  # so that a layer is factored
    else:
        whole |= {"compress": None, "finetune": None}
    return parse_config(whole)


def run_quietly(settings: Config) -> Summary:
    return run(settings, console=Console(file=io.StringIO(), width=120))


def deliverable(settings: Config) -> dict[str, Tensor]:
    """The tensors of its compressed.safetensors."""
    return load_file(settings.folder / "checkpoints" / "compressed.safetensors")
