"""Every Q on the device gives what it gives on the CPU, and its events go on from a checkpoint of either."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import cctorch
import pytest
import torch
from cctorch import regularize as r
from placed import CPU, DEVICE, needs_device
from torch import Tensor, nn

pytestmark = needs_device

EXACT: dict[str, Callable[[], r.Regularizer]] = {
    "magnitude": lambda: r.MagnitudePruning(0.7),
    "magnitude per layer": lambda: r.MagnitudePruning(0.7, "layer"),
    "2:4": lambda: r.NMPruning(2, 4),
    "1:4 along outputs": lambda: r.NMPruning(1, 2, axis=0),
    "channels": lambda: r.ChannelPruning(0.4),
    "weight decay": lambda: r.WeightDecay(0.1),
    "uniform 2": lambda: r.UniformQuantization(2),
    "uniform 4": lambda: r.UniformQuantization(4),
    "uniform 4 per tensor": lambda: r.UniformQuantization(4, per_channel=False),
    "uniform 6 absmax": lambda: r.UniformQuantization(6, range="absmax"),
    "codebook 1": lambda: r.CodebookQuantization(1),
    "codebook 4": lambda: r.CodebookQuantization(4),
    "binary 1": lambda: r.BinaryCodeQuantization(1),
    "binary 2": lambda: r.BinaryCodeQuantization(2),
    "binary 3": lambda: r.BinaryCodeQuantization(3),
    "binary 3 per tensor": lambda: r.BinaryCodeQuantization(3, per_channel=False),
    "pruned and quantized": lambda: r.Compose([r.MagnitudePruning(0.5), r.UniformQuantization(4)]),
}
FACTORED: dict[str, Callable[[], r.Regularizer]] = {
    "svd rank": lambda: r.SVD(rank=3),
    "svd ratio": lambda: r.SVD(ratio=2.5),
    "svd spatial": lambda: r.SVD(ratio=2.5, view="spatial"),
    "tiled svd": lambda: r.TiledSVD(8, 2),
    "tucker": lambda: r.Tucker2(ratio=2.0),
    "tucker ranks": lambda: r.Tucker2(ranks=(4, 3)),
}
ALL = EXACT | FACTORED
SHAPES = {
    "conv1": (16, 8, 3, 3),
    "conv2": (16, 8, 3, 3),
    "conv1d": (12, 16, 3),
    "linear": (10, 36),
    "lstm": (32, 12),
    "wide": (80, 72, 3, 3),
}
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def weights(device: torch.device, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [(name, torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()]
    extra = [("bias", torch.ones(7, dtype=dtype)), ("scale", torch.ones((), dtype=dtype)), ("empty", torch.empty(0, 4))]
    return [(name, value.to(device)) for name, value in drawn + extra]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.cpu().double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", TYPES)
def test_projects_as_on_a_cpu(name: str, dtype: torch.dtype) -> None:
    ours, theirs = weights(DEVICE, dtype), weights(CPU, dtype)
    mine, wanted = ALL[name]().apply(ours), ALL[name]().apply(theirs)
    assert (mine.bits, mine.dense_bits) == (wanted.bits, wanted.dense_bits)
    assert mine.update_norm.device.type == mine.weight_norm.device.type == DEVICE.type
    assert float(mine.weight_norm) == pytest.approx(float(wanted.weight_norm), rel=1e-9)
    # Of a tie between two grids, or of an iteration that does not end, rounding decides: the distance is the same.
    assert float(mine.update_norm) == pytest.approx(float(wanted.update_norm), rel=1e-3)
    if name in FACTORED and dtype != torch.float64:
        return  # a CPU takes another route to a basis as good
    bound = 1e-6 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    for (key, value), (_, expected) in zip(ours, theirs, strict=True):
        if value.numel():
            assert relative_error(value, expected) <= bound, key


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", TYPES)
def test_idempotent_to_the_bit(name: str, dtype: torch.dtype) -> None:
    if name == "weight decay":
        return
    parameters = weights(DEVICE, dtype)
    q = EXACT[name]()
    q.apply(parameters)
    once = [value.clone() for _, value in parameters]
    second = q.apply(parameters)
    assert all(torch.equal(a, b) for a, (_, b) in zip(once, parameters, strict=True))
    assert float(second.update_norm) == 0


@pytest.mark.parametrize("name", FACTORED)
def test_idempotent_to_rounding(name: str) -> None:
    parameters = weights(DEVICE)
    q = FACTORED[name]()
    first, second = q.apply(parameters), q.apply(parameters)
    assert float(first.update_norm) > 0.1 * float(first.weight_norm)
    assert float(second.update_norm) < 1e-8 * float(second.weight_norm)


@pytest.mark.parametrize("name", ALL)
def test_layouts_do_not_matter(name: str) -> None:
    reference = weights(DEVICE)
    strided = [
        (key, value.clone(memory_format=torch.channels_last) if value.dim() == 4 else value.mT.contiguous().mT)
        for key, value in weights(DEVICE)
        if value.dim() > 1
    ]
    strides = [value.stride() for _, value in strided]
    ALL[name]().apply(reference)
    ALL[name]().apply(strided)
    for (_, ours), stride in zip(strided, strides, strict=True):
        assert ours.stride() == stride
    for key, value in strided:
        torch.testing.assert_close(value, dict(reference)[key], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ALL)
def test_zeros_stay_zeros(name: str) -> None:
    value = torch.zeros(8, 16, device=DEVICE)
    ALL[name]().apply([("w", value)])
    assert not value.any()


def test_not_finite_values_are_named_and_nothing_changes() -> None:
    parameters = weights(DEVICE)
    parameters[3][1][0, 0] = math.nan
    before = [value.clone() for _, value in parameters]
    for q in (r.MagnitudePruning(0.5), r.SVD(rank=2), r.UniformQuantization(4)):
        with pytest.raises(ValueError, match=r"parameter 'linear' has 1 of 360 elements NaN or infinite"):
            q.apply(parameters)
    for value, (_, now) in zip(before, parameters, strict=True):
        torch.testing.assert_close(now, value, rtol=0, atol=0, equal_nan=True)


def test_noise() -> None:
    value = torch.randn(50, 40).to(DEVICE)

    def noisy(seed: int) -> Tensor:
        weight = value.clone()
        r.UniformNoise(0.2, seed=seed).apply([("w", weight)])
        return weight

    noise = (noisy(3) - value) / (0.2 * value.square().mean().sqrt())
    assert noise.abs().max() <= 1 + 1e-5
    assert float(noise.square().mean()) == pytest.approx(1 / 3, abs=0.03)
    assert torch.equal(noisy(3), noisy(3))
    assert not torch.equal(noisy(3), noisy(4))


def test_noise_leaves_the_devices_own_random_numbers_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(4, device=DEVICE)
    torch.manual_seed(0)
    r.UniformNoise(0.2, seed=3).apply([("w", torch.randn(50, 40, device="cpu").to(DEVICE))])
    torch.manual_seed(0)
    r.UniformNoise(0.2, seed=3).apply([("w", torch.ones(5, 4).to(DEVICE))])
    assert torch.equal(torch.rand(4, device=DEVICE), expected)


def pruning_and_noise() -> r.Regularizer:
    return r.Compose([r.UniformNoise(0.05, seed=5), r.MagnitudePruning(0.6), r.UniformQuantization(4)])


class Run:
    """A training loop of its own, with momentum and a learning rate that falls at step 9."""

    def __init__(
        self,
        device: torch.device,
        schedule: r.FrequencySchedule | int = 4,
        q: r.Regularizer | None = None,
        dtype: torch.dtype = torch.float64,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)
        ).to(device, dtype)
        self.device, self.dtype = device, dtype
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        named = self.model.named_parameters()
        self.events = r.Events(named, q or pruning_and_noise(), schedule, self.optimizer, **options)
        self.happened: list[tuple[int, int, float]] = []

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            self.optimizer.param_groups[0]["lr"] = 0.05 if step < 9 else 0.01
            self.optimizer.zero_grad()
            x = torch.randn(4, 3, 8, 8, generator=generator).to(self.device, self.dtype)
            nn.functional.cross_entropy(self.model(x), torch.arange(4, device=self.device)).backward()
            self.optimizer.step()
            event = self.events.step()
            if event is not None:
                self.happened.append((event.step, event.period, event.relative_update))

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        state = {"model": self.model, "optimizer": self.optimizer, "events": self.events}
        torch.save({key: value.state_dict() for key, value in state.items()}, file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO, map_location: Any = None) -> None:
        state = torch.load(file, weights_only=True, map_location=map_location)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.events.load_state_dict(state["events"])


SCHEDULES: dict[str, Callable[[], r.FrequencySchedule | int]] = {
    "constant": lambda: 4,
    "stepwise": lambda: r.StepwisePeriod([(0, 3), (8, 5)]),
    "inverse": lambda: r.InverseLearningRate(0.15),
    "adaptive": lambda: r.AdaptivePeriod(0.1, minimum=2, maximum=9),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_events_happen_as_on_a_cpu(schedule: str) -> None:
    runs = [Run(device, SCHEDULES[schedule](), r.MagnitudePruning(0.6)) for device in (DEVICE, CPU)]
    for run in runs:
        run.train(0, 17)
        run.events.finish()
    ours, theirs = runs
    assert [event[:2] for event in ours.happened] == [event[:2] for event in theirs.happened]
    assert [e[2] for e in ours.happened] == pytest.approx([e[2] for e in theirs.happened], rel=1e-6)
    for value, wanted in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(value.cpu(), wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("map_location", [None, "device"])
def test_resumes_mid_period_to_the_bit(schedule: str, dtype: torch.dtype, map_location: str | None) -> None:
    """Also where the whole file, the generator's state with it, is loaded to the device."""
    whole, begun, resumed = (Run(DEVICE, SCHEDULES[schedule](), dtype=dtype) for _ in range(3))
    whole.train(0, 17)
    begun.train(0, 7)
    resumed.load(begun.save(), map_location and DEVICE)
    resumed.train(7, 17)
    assert begun.happened + resumed.happened == whole.happened
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["svd rank", "tucker ranks", "codebook 4"])
def test_a_run_moves_to_a_cpu_and_back(name: str) -> None:
    """A run of the device goes on there, and then here."""
    begun, there, back = Run(DEVICE, q=ALL[name]()), Run(CPU, q=ALL[name]()), Run(DEVICE, q=ALL[name]())
    begun.train(0, 6)
    there.load(begun.save(), CPU)
    there.train(6, 11)
    back.load(there.save())
    back.train(11, 17)
    assert [event[0] for run in (begun, there, back) for event in run.happened] == [4, 8, 12, 16]


def test_noise_moves_to_a_cpu_and_back() -> None:
    """Its draws are another device's then, but the run goes on."""
    begun, there, back = Run(DEVICE), Run(CPU), Run(DEVICE)
    begun.train(0, 6)
    there.load(begun.save(), CPU)
    there.train(6, 11)
    back.load(there.save())
    back.train(11, 17)
    assert [event[0] for run in (begun, there, back) for event in run.happened] == [4, 8, 12, 16]


@pytest.mark.parametrize("name", [name for name in ALL if name != "2:4"])  # which the three colours don't fit
def test_as_if_at_event(name: str) -> None:
    run = Run(DEVICE, q=ALL[name]())
    run.train(0, 6)
    before = copy.deepcopy(run.model.state_dict())
    state = run.events.state_dict()
    with run.events.as_if_at_event():
        assert any(not torch.equal(v, before[k]) for k, v in run.model.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in run.model.state_dict().items())
    again = run.events.state_dict()
    assert state.keys() == again.keys()
    run.train(6, 9)
    assert [event[0] for event in run.happened] == [4, 8]


def test_momentum_is_cleared() -> None:
    run = Run(DEVICE, q=r.MagnitudePruning(0.5), clear_momentum=True)
    run.train(0, 4)
    assert run.model[0].weight not in run.optimizer.state
    assert run.model[0].bias in run.optimizer.state
    run.train(4, 9)


@pytest.mark.parametrize("name", ["svd ratio", "svd spatial", "tucker"])
def test_layers_become_as_small_as_their_weights(name: str) -> None:
    torch.manual_seed(0)
    stack = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3, 2, 1), nn.Conv2d(32, 8, 1))
    model, x = stack.double().to(DEVICE), torch.randn(2, 3, 9, 9, dtype=torch.float64, device=DEVICE)
    q = FACTORED[name]()
    q.apply(model.named_parameters())
    expected = model(x)
    plan = r.plan(model, x, model.named_parameters(), q)
    assert len(plan.layers) == 3
    smaller = cctorch.apply(model, plan)
    assert all(parameter.device.type == DEVICE.type for parameter in smaller.parameters())
    torch.testing.assert_close(smaller(x), expected)


def test_hundreds_of_parameters() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(i % 40 + 3, 12, generator=generator) for i in range(400)]
    for q in (lambda: r.MagnitudePruning(0.7), lambda: r.UniformQuantization(4), lambda: r.NMPruning(2, 4)):
        ours, theirs = ([(str(i), w.clone().to(d)) for i, w in enumerate(drawn)] for d in (DEVICE, CPU))
        q().apply(ours)
        q().apply(theirs)
        for (key, value), (_, wanted) in zip(ours, theirs, strict=True):
            torch.testing.assert_close(value.cpu(), wanted, rtol=1e-6, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
