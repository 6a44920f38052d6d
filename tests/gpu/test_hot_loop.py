"""Training on a GPU: nothing between two reads of the loss waits for it, and CUDA graphs train as single kernels do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cctorch import train
from cctorch.config import Distillation, Training
from cctorch.data import Batches, ImageSet
from cctorch.regularize import Events, MagnitudePruning
from cctorch.step import CudaRecorder, GraphedStep, Step
from cctorch.train import make_criterion, train_epoch
from torch import nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
from prepared import resnet8

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

KINDS = ["plain", "masked", "quantized"]
BATCH, PERIOD = 8, 5


def _batches(steps: int) -> Batches:
    """The last one is smaller."""
    generator = torch.Generator().manual_seed(1)
    count = BATCH * steps - 3
    images = torch.randint(0, 256, (count, 3, 12, 12), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (count,), generator=generator)
    on_device = ImageSet(images, labels).to(torch.device("cuda"))
    return Batches(on_device, BATCH, (0.5,) * 3, (0.25,) * 3, channels_last=True)


def _settings(**changes: Any) -> Training:
    return Training(epochs=1, batch_size=BATCH, lr=0.01, clip_grad_norm=1.0, **changes)


def _step(model: nn.Module, settings: Training, teacher: nn.Module | None = None) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)
    distilled = (Distillation(weight=0.9), teacher.eval()) if teacher else None
    return Step(model, optimizer, settings, make_criterion(settings, distilled))


def _epoch(
    model: nn.Module,
    step: Step | GraphedStep,
    settings: Training,
    steps: int,
    after_step: Callable[[], Any] = lambda: None,
    around: Callable[[Iterator[Any]], Iterator[Any]] = lambda batches: batches,
) -> list[float]:
    losses: list[float] = []
    batches = _batches(steps)
    train_epoch(
        model,
        around(batches.epoch(3, 0, augment=True, erasing=0.5)),
        step.optimizer,
        settings,
        epoch=0,
        steps=steps,
        images=len(batches.images),
        train_step=step,
        after_step=after_step,
        progress=lambda seen: losses.__setitem__(slice(None), seen),
    )
    return losses


@contextmanager
def _waiting_is(mode: str) -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bf16", [False, True])
def test_nothing_waits(kind: str, bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads of the loss and regularization events do; nothing else may, the making of batches included."""
    model, settings = resnet8(kind).cuda(), _settings(bf16=bf16)
    step = _step(model, settings)
    events = Events(model.named_parameters(), MagnitudePruning(0.1), PERIOD, step.optimizer)
    _epoch(model, step, settings, steps=2)  # what is chosen and allocated once
    read = train._Losses.read

    def reading(losses: Any, steps: int) -> None:
        with _waiting_is("default"):
            read(losses, steps)

    def after_step() -> None:
        with _waiting_is("default" if (events.steps + 1) % PERIOD == 0 else "error"):
            events.step()

    def guarded(batches: Iterator[Any]) -> Iterator[Any]:
        with _waiting_is("error"):  # and for what the loop does with a batch
            yield from batches

    monkeypatch.setattr(train._Losses, "read", reading)
    _epoch(model, step, settings, 24, after_step, guarded)
    assert events.events == 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_profiler_sees_no_wait_in_a_step(kind: str) -> None:
    """As many in an epoch of 18 steps as in one of 9: the loss is read at the end of each."""
    model, settings = resnet8(kind).cuda(), _settings()
    step, waits = _step(model, settings), []
    for steps in (2, 9, 18):
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            _epoch(model, step, settings, steps)
        calls = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
        waits.append(sum(event.count for event in profiled.key_averages() if event.key in calls))
    assert waits[1] == waits[2] > 0


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_train_as_single_kernels(kind: str, distilled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """To float32's rounding, which 12 steps make larger: a sum's order may differ between the two."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    settings, losses = _settings(), []
    for recorded in (False, True):
        model = resnet8(kind).cuda()
        step = _step(model, settings, resnet8("plain").cuda() if distilled else None)
        events = Events(model.named_parameters(), MagnitudePruning(0.1), PERIOD, step.optimizer)
        trained = GraphedStep(step, CudaRecorder()) if recorded else step
        losses.append(_epoch(model, trained, settings, 12, events.step))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
