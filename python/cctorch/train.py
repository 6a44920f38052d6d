"""One epoch of training, and the learning rate as a pure function of the step (so that a run can resume anywhere)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from cctorch.config import Distillation, Training

_STEPS_BETWEEN_READS = 20

Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From inputs, outputs and labels to the mean loss of a batch."""


class TrainingError(RuntimeError):
    """Training that can't go on, such as a loss that is not finite."""


@dataclass(frozen=True)
class Epoch:
    loss: float  # mean over the steps
    lr: float  # at the last step
    seconds: float
    images_per_second: float


def learning_rate(settings: Training, step: int, total: int) -> float:
    """At step `step` of `total`.

    one_cycle: cosine from lr / 25 up to lr during the warm-up, then cosine down to lr / 250,000 (Smith 2018, as in
    torch's OneCycleLR). cosine: linear warm-up, then cosine to 0. step: linear warm-up, then a tenth after 50 % and
    again after 75 % of the steps.
    """
    if not 0 <= step < total:
        raise ValueError(f"step = {step}: expected 0 <= step < {total}")
    peak = max(settings.warmup * total - 1, 0.0)
    rising = step < peak
    fraction = step / peak if rising else (step - peak) / max(total - 1 - peak, 1.0)
    if settings.schedule == "one_cycle":
        low, high = (settings.lr / 25, settings.lr) if rising else (settings.lr / 25e4, settings.lr)
        return low + (high - low) * (1 + math.cos(math.pi * (1 - fraction if rising else fraction))) / 2
    if rising:
        return settings.lr * (step + 1) / (peak + 1)
    if settings.schedule == "cosine":
        return settings.lr * (1 + math.cos(math.pi * fraction)) / 2
    return settings.lr * (1.0 if 2 * step < total else 0.1 if 4 * step < 3 * total else 0.01)


def make_optimizer(model: nn.Module, settings: Training) -> torch.optim.SGD:
    return torch.optim.SGD(
        model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )


def momentum_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's momentum under the parameters' names: it outlives a change of architecture and of order."""
    buffers = {name: optimizer.state[value].get("momentum_buffer") for name, value in model.named_parameters()}
    return {name: buffer for name, buffer in buffers.items() if buffer is not None}


def restore_momentum(model: nn.Module, optimizer: torch.optim.Optimizer, momentum: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in momentum:
            buffer = torch.empty_like(parameter, memory_format=torch.preserve_format)
            optimizer.state[parameter]["momentum_buffer"] = buffer.copy_(momentum[name])


def distillation_loss(outputs: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(targets / T) || softmax(outputs / T)), the mean over a batch of logits, B x classes.

    Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 2: T^2 keeps the gradient's size.
    """
    given, wanted = (log_softmax(logits / temperature, 1) for logits in (outputs, targets))
    return kl_div(given, wanted, reduction="batchmean", log_target=True) * temperature**2


def make_criterion(settings: Training, distilled: tuple[Distillation, nn.Module] | None = None) -> Criterion:
    """Cross entropy, mixed with the distillation loss from a teacher: a model in eval mode, on the device."""

    def labels_only(inputs: Tensor, outputs: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(outputs, labels, label_smoothing=settings.label_smoothing)

    if distilled is None:
        return labels_only
    distillation, teacher = distilled

    def with_teacher(inputs: Tensor, outputs: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            targets = teacher(inputs)
        soft = distillation_loss(outputs, targets, distillation.temperature)
        return torch.lerp(labels_only(inputs, outputs, labels), soft, distillation.weight)

    return with_teacher


def train_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    settings: Training,
    *,
    epoch: int,
    steps: int,
    images: int,
    criterion: Criterion | None = None,
    progress: Callable[[int, float], None] = lambda step, loss: None,
    after_step: Callable[[], None] = lambda: None,
) -> Epoch:
    """Trains on each of `steps` batches once; `epoch` counts from 0. `criterion` is cross entropy unless given.
    `progress` gets steps done and the loss so far; `after_step` follows each step of the optimizer.

    The loss stays on the device and is read every 20 steps. Raises TrainingError where it is not finite.
    """
    parameters = list(model.parameters())
    device = parameters[0].device
    losses = torch.zeros(steps, device=device)
    criterion = criterion or make_criterion(settings)
    autocast = settings.bf16 and device.type == "cuda"
    start, lr = time.perf_counter(), 0.0
    model.train()
    for step, (x, y) in enumerate(batches):
        lr = learning_rate(settings, epoch * steps + step, settings.epochs * steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast("cuda", torch.bfloat16) if autocast else nullcontext():
            loss = criterion(x, model(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if settings.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, settings.clip_grad_norm)
        optimizer.step()
        after_step()
        losses[step] = loss.detach()
        if (step + 1) % _STEPS_BETWEEN_READS == 0 or step + 1 == steps:
            progress(step + 1, _mean_loss(losses[: step + 1], epoch))
    seconds = time.perf_counter() - start
    return Epoch(float(losses.mean()), lr, seconds, images / seconds)


def _mean_loss(losses: Tensor, epoch: int) -> float:
    mean = float(losses.mean())
    if not math.isfinite(mean):
        step = int((~losses.isfinite()).nonzero()[0])
        raise TrainingError(
            f"the loss is {float(losses[step])} at epoch {epoch + 1}, step {step + 1}: expected a finite number. "
            "Lower lr, or set clip_grad_norm"
        )
    return mean
