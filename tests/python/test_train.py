from __future__ import annotations

import math

import pytest
import torch
from cctorch import distributed
from cctorch.config import Distillation, Training
from cctorch.train import (
    TrainingError,
    distillation_loss,
    learning_rate,
    make_criterion,
    make_optimizer,
    momentum_by_name,
    restore_momentum,
    seeded,
    train_epoch,
)
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


def _batches(count: int, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(6, 3, 4, generator=generator), torch.randint(0, 4, (6,), generator=generator))
        for _ in range(count)
    ]


@pytest.mark.parametrize(("total", "warmup"), [(100, 0.3), (37, 0.1), (1000, 0.5)])
def test_one_cycle_is_torchs(total: int, warmup: float) -> None:
    settings = Training(epochs=1, lr=0.2, warmup=warmup)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total, pct_start=warmup)
    for step in range(total):
        assert learning_rate(settings, step, total) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        if step + 1 < total:
            schedule.step()


def test_cosine_and_step_schedules() -> None:
    cosine = Training(epochs=1, lr=0.4, schedule="cosine", warmup=0.0)
    for step in range(11):
        assert learning_rate(cosine, step, 11) == pytest.approx(0.2 * (1 + math.cos(math.pi * step / 10)), abs=1e-12)
    step_wise = Training(epochs=1, lr=0.4, schedule="step", warmup=0.1)
    rates = [learning_rate(step_wise, step, 40) for step in range(40)]
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert rates[3:20] == pytest.approx([0.4] * 17)
    assert rates[20:30] == pytest.approx([0.04] * 10)
    assert rates[30:] == pytest.approx([0.004] * 10)


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "step"])
@pytest.mark.parametrize("warmup", [0.0, 0.3, 0.99])
def test_short_schedules_stay_in_range(schedule: str, warmup: float) -> None:
    settings = Training.model_validate({"epochs": 1, "lr": 0.1, "schedule": schedule, "warmup": warmup})
    for total in range(1, 6):
        assert all(0 <= learning_rate(settings, step, total) <= 0.1 for step in range(total))
    with pytest.raises(ValueError, match="step = 5: expected 0 <= step < 5"):
        learning_rate(settings, 5, 5)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_an_epoch_is_sgd(clip: float | None) -> None:
    settings = Training(epochs=2, lr=0.1, momentum=0.8, weight_decay=0.01, clip_grad_norm=clip, label_smoothing=0.1)
    model, reference = _model(), _model()
    optimizer = make_optimizer(model, settings)
    velocity = [torch.zeros_like(parameter) for parameter in reference.parameters()]
    for epoch in range(2):
        batches = _batches(3, epoch)
        result = train_epoch(model, batches, optimizer, settings, epoch=epoch, steps=3, images=18)
        losses = []
        for step, (x, y) in enumerate(batches):
            probabilities = reference(x).log_softmax(1)
            loss = -(0.9 * probabilities.gather(1, y[:, None]).mean() + 0.1 * probabilities.mean())
            losses.append(float(loss.detach()))
            gradients = torch.autograd.grad(loss, list(reference.parameters()))
            norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
            scale = min(1.0, clip / norm) if clip else 1.0
            rate = learning_rate(settings, 3 * epoch + step, 6)
            with torch.no_grad():
                for parameter, gradient, speed in zip(reference.parameters(), gradients, velocity, strict=True):
                    speed.mul_(0.8).add_(gradient * scale + 0.01 * parameter)
                    parameter.sub_(rate * speed)
        assert result.loss == pytest.approx(sum(losses) / 3, rel=1e-5)
        assert result.lr == learning_rate(settings, 3 * epoch + 2, 6)
    for got, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_distillation_mixes_in_the_divergence_from_the_teacher() -> None:
    settings, teacher = Training(epochs=1, label_smoothing=0.1), _model().double().eval()
    outputs = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    [(x, y)] = _batches(1)
    x = x.double()
    criterion = make_criterion(settings, (Distillation(temperature=3.0, weight=0.7), teacher))
    loss = criterion(x, outputs, y)
    with torch.no_grad():
        p, q = (torch.exp(z / 3) / torch.exp(z / 3).sum(1, keepdim=True) for z in (teacher(x), outputs))
        labels = torch.nn.functional.cross_entropy(outputs, y, label_smoothing=0.1)
        expected = 0.3 * labels + 0.7 * 9 * (p * torch.log(p / q)).sum() / 6
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-12)
    torch.testing.assert_close(distillation_loss(outputs, outputs.detach(), 5.0).detach(), torch.zeros(()).double())
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    # Hinton et al.: with T large, and T^2 in front, the gradient nears that of half the squared distance of the logits.
    free = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    wanted = torch.randn(6, 4, dtype=torch.float64)
    [gradient] = torch.autograd.grad(distillation_loss(free, wanted, 1e5), free)
    away = free.detach() - wanted
    torch.testing.assert_close(gradient, (away - away.mean(1, keepdim=True)) / 4 / 6, rtol=1e-3, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_and_is_located() -> None:
    batches = _batches(30)
    batches[2] = (torch.full((6, 3, 4), math.nan), batches[2][1])
    settings = Training(epochs=4)
    model = _model()
    with pytest.raises(TrainingError, match=r"the loss is nan at epoch 2, step 3: .* Lower lr"):
        train_epoch(model, batches, make_optimizer(model, settings), settings, epoch=1, steps=30, images=180)


def test_the_loss_is_read_every_20_steps_and_at_the_end() -> None:
    settings, seen = Training(epochs=1), list[int]()
    model = _model()
    train_epoch(
        model,
        _batches(45),
        make_optimizer(model, settings),
        settings,
        epoch=0,
        steps=45,
        images=270,
        progress=lambda losses: seen.append(len(losses)),
    )
    assert seen == [20, 40, 45]


def test_momentum_is_restored_by_name() -> None:
    settings = Training(epochs=1)
    model = _model()
    optimizer = make_optimizer(model, settings)
    assert momentum_by_name(model, optimizer) == {}
    train_epoch(model, _batches(2), optimizer, settings, epoch=0, steps=2, images=12)
    momentum = momentum_by_name(model, optimizer)
    assert set(momentum) == {name for name, _ in model.named_parameters()}
    other = make_optimizer(model, settings)
    restore_momentum(model, other, momentum)
    for name, buffer in momentum_by_name(model, other).items():
        assert torch.equal(buffer, momentum[name])
        assert buffer.data_ptr() != momentum[name].data_ptr()


def test_random_numbers_of_a_step_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal after other draws and in an epoch that goes on; different for each seed, epoch, step and rank."""

    def draws(seed: int, epoch: int, first: int, rank: int) -> list[float]:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        return [float(torch.rand(())) for _ in seeded(_batches(3)[first:], seed, epoch, first)]

    whole = draws(1, 2, first=0, rank=0)
    torch.rand(5)
    assert draws(1, 2, first=1, rank=0) == whole[1:]
    others = [draws(2, 1, 0, 0), draws(0, 2, 0, 0), draws(1, 3, 0, 0), draws(1, 2, 0, 1)]
    assert len({*whole, *(value for drawn in others for value in drawn)}) == 15
