"""Recorded steps train as those that are not, to the bit; and what a step launches never waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cctorch import train
from cctorch.config import Config, ConfigError, Training, parse_config
from cctorch.data import Batches, ImageSet
from cctorch.device import select_device
from cctorch.regularize import Events, MagnitudePruning
from cctorch.step import GraphedStep, Step
from cctorch.train import make_criterion, train_epoch
from prepared import resnet8
from recorded import NothingWaits, OperatorRecorder
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

KINDS = ["plain", "masked", "quantized"]
IMAGES, BATCH = 90, 8


def _batches() -> Batches:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (IMAGES, 3, 12, 12), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (IMAGES,), generator=generator)
    return Batches(ImageSet(images, labels), BATCH, (0.5,) * 3, (0.25,) * 3, channels_last=True)


def _optimizer(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, fused=True)


def _train(model: nn.Module, settings: Training, step: Any, after_step: Callable[[], Any]) -> list[float]:
    losses: list[float] = []
    batches = _batches()
    for epoch in range(settings.epochs):
        train_epoch(
            model,
            batches.epoch(3, epoch, augment=True),
            step.optimizer,
            settings,
            epoch=epoch,
            steps=len(batches),
            images=IMAGES,
            train_step=step,
            after_step=after_step,
            progress=lambda seen: losses.append(seen[-1]),
        )
    return losses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_recorded_steps_are_those_that_are_not(kind: str, clip: float | None) -> None:
    settings = Training(epochs=3, batch_size=BATCH, clip_grad_norm=clip, label_smoothing=0.1)
    results = []
    recorder = OperatorRecorder()
    for recorded in (False, True):
        model = resnet8(kind)
        step = Step(model, _optimizer(model), settings, make_criterion(settings))
        events = Events(model.named_parameters(), MagnitudePruning(0.1), 5, step.optimizer)
        trained = GraphedStep(step, recorder) if recorded else step
        losses = _train(model, settings, trained, lambda events=events: events.step())  # type: ignore[misc]
        momentum = [step.optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
        results.append((losses, [*model.state_dict().values(), *momentum], step.optimizer.param_groups[0]["lr"]))
    (losses, values, lr), (recorded_losses, recorded_values, recorded_lr) = results
    assert recorded_losses == losses
    assert all(torch.equal(a, b) for a, b in zip(values, recorded_values, strict=True))
    assert isinstance(recorded_lr, float)
    assert recorded_lr == lr
    # 11 full batches and one of 2 images in each epoch.
    assert (recorder.warm, recorder.recordings, recorder.replays) == (3, 1, 30)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Training(epochs=2, batch_size=BATCH, clip_grad_norm=1.0)
    model = resnet8(kind)
    step = Step(model, _optimizer(model), settings, make_criterion(settings))
    events = Events(model.named_parameters(), MagnitudePruning(0.1), 5, step.optimizer)
    read, reads = train._Losses.read, list[int]()

    def reading(losses: Any, steps: int) -> None:
        reads.append(steps)
        with _disable_current_modes():
            read(losses, steps)

    def after_step() -> None:
        if (events.steps + 1) % 5 == 0:
            with _disable_current_modes():
                events.step()
        else:
            events.step()

    monkeypatch.setattr(train._Losses, "read", reading)
    monkeypatch.setattr(train._Losses, "mean", lambda losses: 0.0)
    with NothingWaits():
        _train(model, settings, step, after_step)
    assert events.events == 4
    assert reads == [12, 12]


def test_the_guard_sees_what_waits() -> None:
    x = torch.arange(3.0)
    for wait in (lambda: float(x[0]), lambda: bool(x[0]), lambda: x[x > 1], lambda: x.nonzero(), lambda: x.equal(x)):
        with pytest.raises(AssertionError, match=r"waits for the device|of a mask"), NothingWaits():
            wait()


def _config(**changes: Any) -> Config:
    training = {"epochs": 1, "cuda_graphs": True}
    return parse_config(
        {
            "name": "graphs",
            "data": {"kind": "cifar10"},
            "model": {"name": "resnet8"},
            "train": training,
            "finetune": {"epochs": 1},
            **changes,
        }
    )


def test_graphs_of_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert select_device(_config()) == torch.device("cuda")
    monkeypatch.setattr("cctorch.distributed.launched", lambda: True)
    with pytest.raises(ConfigError, match=r"train\.cuda_graphs = True with several ranks: expected false"):
        select_device(_config())
    assert select_device(_config(device="cpu")) == torch.device("cpu")


def test_graphs_keep_the_momentum() -> None:
    regularize = {
        "epochs": 1,
        "cuda_graphs": True,
        "clear_momentum": True,
        "q": [{"kind": "magnitude_pruning", "sparsity": 0.5}],
        "frequency": {"kind": "constant", "period": 7},
    }
    with pytest.raises(ConfigError, match="cuda_graphs with clear_momentum"):
        _config(regularize=regularize)
