"""Milliseconds of a training step of ResNet-56 on a GPU: dense and compressed, launched one by one and as a CUDA graph.

    python benchmarks/gpu_step.py [--plans docs/results/resnet56_cifar10_long/plan.json ...] [--batches 128 256]

Random images of CIFAR-10's size, through the driver's own loop: batches made on the device, with crops and flips, and
clipped gradients. Mean over the second epoch. Each line is a network of its own, in channels_last, float32 (TF32 in
convolutions) and recorded as a CUDA graph but for what its change says.
"""

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from cctorch import apply, models
from cctorch._C import CompressionPlan
from cctorch.config import Distillation, Finetune
from cctorch.data import Batches, ImageSet
from cctorch.step import make_step
from cctorch.train import make_criterion, make_optimizer, train_epoch

PLANS = [Path(f"docs/results/{name}/plan.json") for name in ("resnet56_cifar10", "resnet56_cifar10_long")]


def milliseconds(
    plan: Path | None, batch: int, steps: int, channels_last: bool, distilled: bool, **options: Any
) -> float:
    device = torch.device("cuda")
    count = batch * steps
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    data = ImageSet(images, torch.randint(0, 10, (count,))).to(device)
    batches = Batches(data, batch, (0.5,) * 3, (0.25,) * 3, channels_last)
    model = models.create("resnet56")
    teacher = copy.deepcopy(model).eval()
    if plan:
        apply(model, CompressionPlan.from_json(plan.read_text()))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model, teacher = (m.to(device, memory_format=layout) for m in (model, teacher))  # type: ignore[call-overload]
    settings = Finetune(epochs=2, batch_size=batch, lr=0.01, clip_grad_norm=1.0, **options)
    optimizer = make_optimizer(model, settings)
    step = make_step(
        model, optimizer, settings, make_criterion(settings, (Distillation(), teacher) if distilled else None)
    )
    for epoch in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        made = batches.epoch(0, epoch, augment=True)
        train_epoch(model, made, optimizer, settings, epoch=epoch, steps=steps, images=count, train_step=step)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return 1e3 * seconds / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=Path, nargs="*", default=PLANS)
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    usual = {"channels_last": True, "distilled": False, "cuda_graphs": True}
    changes: list[dict[str, Any]] = [
        {},
        {"distilled": True},
        {"bf16": True},
        {"channels_last": False},
        {"cuda_graphs": False},
    ]
    print("| network | batch | change | ms |\n|---|---|---|---|")
    for batch in arguments.batches:
        for plan in (None, *arguments.plans):
            for change in changes:
                ms = milliseconds(plan, batch, arguments.steps, **usual | change)
                name = plan.parent.name if plan else "dense"
                said = ", ".join(f"{key}={value}" for key, value in change.items())
                print(f"| {name} | {batch} | {said} | {ms:.2f} |", flush=True)


if __name__ == "__main__":
    main()
