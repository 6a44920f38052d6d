"""Images per second of training, plain and under each constraint, on one rank and on several.

    python benchmarks/throughput.py [--model resnet20] [--ranks 1 2] [--steps 6] [--turns 5] [--out FOLDER]

Random images of CIFAR-10's size, through the driver's own loop: batches made on the device, with crops and flips,
synchronized batch normalization. Variants: plain; a pruning mask on every convolution and linear layer; quantization of
their weights (LSQ, 4 bits, a scale for each filter) and inputs (8 bits); magnitude pruning events once in 200 steps.
The variants take turns of --steps steps, so that what else the machine does hits them alike; medians over the turns,
and as a ratio to plain the median of the turns' ratios. A turn with events counts --steps / 200 of an event's time.

Two ranks are two processes that share every batch, and the cores (gloo), or have a GPU each (--device cuda; NCCL).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from cctorch import _C, distributed, prepare
from cctorch._C import CompressionPlan, LayerPlan, MaskPlan
from cctorch.config import Training
from cctorch.data import Batches, ImageSet
from cctorch.graph import trace
from cctorch.models import create
from cctorch.nn import BatchNorm2d, FakeQuant
from cctorch.regularize import Events, MagnitudePruning
from cctorch.regularize_stage import located, select
from cctorch.step import make_step
from cctorch.train import make_criterion, make_optimizer, train_epoch
from timing import machine
from torch import Tensor, nn

VARIANTS = ("plain", "masks", "quantization", "events")
PERIOD = 200


def constrain(model: nn.Module, variant: str, example: Tensor) -> None:
    specs = [spec for spec in trace(model, example).specs if spec.kind in ("conv2d", "linear")]
    mask, bits = (MaskPlan("magnitude", 0.5), None) if variant == "masks" else (None, 4)
    layers = [LayerPlan(s.name, s.kind, s.in_channels, s.out_channels, mask=mask, bits=bits) for s in specs]
    prepare(model, CompressionPlan(layers=layers))
    if variant == "quantization":
        for spec in specs:
            layer = model.get_submodule(spec.name)
            layer.add_module("input_quant", FakeQuant(8, signed=spec is specs[0]))
            layer.register_forward_pre_hook(lambda layer, inputs: (layer.get_submodule("input_quant")(inputs[0]),))
        model(example)  # the scales start from a first batch


class Contestant:
    def __init__(self, variant: str, batches: Batches, settings: Training, name: str) -> None:
        torch.manual_seed(0)
        self.batches, self.settings, self.turns = batches, settings, 0
        device = batches.images.labels.device
        model = create(name)
        example = next(iter(batches))[0][:2].cpu()
        self.events: Events | None = None
        if variant == "events":
            self.events = Events(located(model, select(model, None)), MagnitudePruning(0.5), PERIOD)
        elif variant != "plain":
            constrain(model, variant, example)
        model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        for module in model.modules():
            if isinstance(module, BatchNorm2d):
                module.synchronized = True
        self.model = distributed.parallel(model, example[:1].to(device), broadcasts_buffers=False)
        optimizer = make_optimizer(model, settings)
        self.step = make_step(self.model, optimizer, settings, make_criterion(settings))

    def turn(self) -> float:
        """Seconds of the steps of one turn."""
        shares = self.batches.sliced(distributed.rank(), distributed.world_size())
        distributed.sum_(torch.zeros(1))  # together
        start = time.perf_counter()
        train_epoch(
            self.model,
            shares.epoch(0, self.turns, augment=True),
            self.step.optimizer,
            self.settings,
            epoch=self.turns,
            steps=len(shares),
            images=len(shares.images),
            train_step=self.step,
            after_step=self.events.step if self.events else lambda: None,
        )
        seconds = time.perf_counter() - start
        self.turns += 1
        if self.events is None:
            return seconds
        start = time.perf_counter()
        self.events.finish()
        if self.batches.images.labels.is_cuda:
            torch.cuda.synchronize()
        return seconds + (time.perf_counter() - start) * len(shares) / PERIOD


def worker(arguments: argparse.Namespace) -> None:
    """One rank; rank 0 writes what it measured."""
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", distributed.local_rank())
    else:
        torch.set_num_threads(arguments.threads)
    with distributed.joined(device):
        count = arguments.steps * arguments.batch
        images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
        data = ImageSet(images, torch.randint(0, 10, (count,))).to(device)
        batches = Batches(data, arguments.batch, (0.5,) * 3, (0.25,) * 3, channels_last=True)
        settings = Training(
            epochs=arguments.turns + 1,
            batch_size=arguments.batch,
            lr=0.01,
            bf16=arguments.bf16,
            cuda_graphs=arguments.cuda_graphs and distributed.world_size() == 1,
        )
        contestants = {variant: Contestant(variant, batches, settings, arguments.model) for variant in VARIANTS}
        turns: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for turn in range(-1, arguments.turns):
            for variant, contestant in contestants.items():
                seconds = contestant.turn()
                if turn >= 0:
                    turns[variant].append(seconds)
            if distributed.is_main():
                print(f"{distributed.world_size()} rank(s): turn {turn + 1} of {arguments.turns}", flush=True)
        if distributed.is_main():
            arguments.worker.write_text(json.dumps({"seconds": turns, "machine": machine(device.type)}))


def measure(arguments: argparse.Namespace, ranks: int, threads: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "seconds.json"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        own = ["--worker", str(file), "--threads", str(max(threads // ranks, 1))]
        command = [sys.executable, *torchrun, *sys.argv, *own]
        subprocess.run(command, check=True)
        measured = json.loads(file.read_text())
    images = arguments.steps * arguments.batch
    rows = []
    for variant, seconds in measured["seconds"].items():
        ratios = [plain / own for plain, own in zip(measured["seconds"]["plain"], seconds, strict=True)]
        rows.append(
            {
                "ranks": ranks,
                "variant": variant,
                "images_per_second": images / statistics.median(seconds),
                "of_plain": statistics.median(ratios),
                **measured["machine"],
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| ranks | threads each | variant | images/s | of plain |", "|---|---|---|---|---|"]
    for row in rows:
        start = f"| {row['ranks']} | {row['threads']} | {row['variant']} "
        lines.append(f"{start}| {row['images_per_second']:.0f} | {row['of_plain']:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch", type=int, default=128, help="images of all ranks together")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=6, help="in a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--cuda-graphs", action="store_true", help="where there is one rank")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of all ranks together")
    parser.add_argument("--out", type=Path, default=Path("docs/results/throughput"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not 1 <= arguments.steps < PERIOD:
        parser.error(f"--steps {arguments.steps}: expected 1 to {PERIOD - 1}, since an event is timed on its own")
    _C.keep_freed_memory()
    if arguments.worker:
        worker(arguments)
        return
    rows = [row for ranks in arguments.ranks for row in measure(arguments, ranks, arguments.threads)]
    print(table(rows))
    arguments.out.mkdir(parents=True, exist_ok=True)
    names = ("model", "batch", "steps", "turns", "device", "bf16", "cuda_graphs")
    settings = {name: getattr(arguments, name) for name in names}
    stem = arguments.model if arguments.device == "cpu" else f"{arguments.model}_cuda"
    (arguments.out / f"{stem}.json").write_text(json.dumps({**settings, "rows": rows}, indent=1) + "\n")
    (arguments.out / f"{stem}.md").write_text(table(rows))


if __name__ == "__main__":
    main()
