"""One epoch of training, and the learning rate as a pure function of the step (so that a run can resume anywhere)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from cctorch import distributed
from cctorch.config import Distillation, Training
from cctorch.step import Criterion, GraphedStep, Step, graphed, make_step

_STEPS_BETWEEN_READS = 20


class TrainingError(RuntimeError):
    """Training that can't go on, such as a loss that is not finite."""


@dataclass(frozen=True)
class Epoch:
    loss: float  # mean over the steps
    lr: float  # at the last step
    seconds: float
    images_per_second: float


@dataclass
class Partial:
    """What was done of an epoch: the losses of its first steps, over the batches of all ranks, and their seconds."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


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
        model.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        fused=graphed(model, settings) or None,
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


def seeded(
    batches: Iterable[tuple[Tensor, Tensor]], seed: int, epoch: int, first: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """`batches`, from number `first` of the epoch on, each with random numbers of its own for the step that it is for.

    What layers such as Dropout draw then follows from seed, epoch, step and rank, and not from what was drawn before:
    a run that goes on may have drawn less, or rank 0 more than the others.
    """
    for step, batch in enumerate(batches, start=first):
        sequence = numpy.random.SeedSequence((seed, epoch, step, distributed.rank()))
        torch.manual_seed(int(sequence.generate_state(1, numpy.uint64)[0]))
        yield batch


def train_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    settings: Training,
    *,
    epoch: int,
    steps: int,
    images: int,
    train_step: Step | GraphedStep | None = None,
    progress: Callable[[list[float]], None] = lambda losses: None,
    after_step: Callable[[], None] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
    done: Partial | None = None,
) -> Epoch | None:
    """Trains on each of `steps` batches once; `epoch` counts from 0. `progress` gets the losses of all steps so far;
    `after_step` follows each step of the optimizer. `train_step` is made of `model`, `optimizer` and `settings`, with
    cross entropy, unless given: a recorded one serves all epochs.

    The epoch goes on behind what is `done`, and so does `batches`. Where `stop` says so after a step, the epoch ends
    there: `done` then holds what was, and the result is None.

    On several ranks, `batches` are slices of batches of ``settings.batch_size`` out of `images`, and `model` averages
    gradients (`distributed.parallel`).

    The loss stays on the device and is read every 20 steps. Raises TrainingError where it is not finite.
    """
    device = next(model.parameters()).device
    done = done or Partial()
    losses = _Losses(steps, device, done, epoch)
    train_step = train_step or make_step(model, optimizer, settings, make_criterion(settings))
    start, lr = time.perf_counter() - done.seconds, 0.0
    model.train()
    for step, (x, y) in enumerate(batches, start=len(done.losses)):
        lr = learning_rate(settings, epoch * steps + step, settings.epochs * steps)
        loss = train_step(x, y, lr, min(settings.batch_size, images - step * settings.batch_size))
        after_step()
        losses.put(step, loss)
        stopped = step + 1 < steps and stop()
        if stopped or (step + 1) % _STEPS_BETWEEN_READS == 0 or step + 1 == steps:
            losses.read(step + 1)
            done.seconds = time.perf_counter() - start
            progress(done.losses)
        if stopped:
            return None
    return Epoch(losses.mean(), lr, done.seconds, images / done.seconds)


class _Losses:
    """Of an epoch's steps, on the device until they are read into `done`."""

    def __init__(self, steps: int, device: torch.device, done: Partial, epoch: int) -> None:
        self._values = torch.zeros(steps, device=device)
        self._values[: len(done.losses)] = torch.tensor(done.losses)
        self._done, self._epoch = done, epoch

    def put(self, step: int, loss: Tensor) -> None:
        self._values[step] = loss

    def read(self, steps: int) -> None:
        first = len(self._done.losses)
        # Rank after rank: in an all-reduce the order, and with it the last bit, depends on how many are read at once.
        total = sum(distributed.gather(self._values[first:steps]).unbind(), torch.zeros((), device=self._values.device))
        self._values[first:steps] = total
        recent = total.tolist()
        for step, loss in enumerate(recent, start=first):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} at epoch {self._epoch + 1}, step {step + 1}: expected a finite number. "
                    "Lower lr, or set clip_grad_norm"
                )
        self._done.losses += recent

    def mean(self) -> float:
        return float(self._values.mean())
