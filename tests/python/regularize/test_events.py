"""Events in a training loop: when they happen, what they cost, and that a run can stop and go on."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from cctorch import CompressionPlan, LayerPlan, apply
from cctorch import regularize as r
from cctorch.nn import FakeQuant
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))


def pruning_and_noise() -> r.Regularizer:
    return r.Compose([r.UniformNoise(0.05, seed=5), r.MagnitudePruning(0.6), r.UniformQuantization(4)])


class Run:
    """A training loop of its own, with momentum and a learning rate that falls at step 9."""

    def __init__(self, schedule: r.FrequencySchedule | int, q: r.Regularizer | None = None) -> None:
        self.model = network()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.events = r.Events(self.model.named_parameters(), q or pruning_and_noise(), schedule, self.optimizer)
        self.happened: list[tuple[int, int]] = []

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            self.optimizer.param_groups[0]["lr"] = 0.05 if step < 9 else 0.01
            self.optimizer.zero_grad()
            y = self.model(torch.randn(4, 3, 8, 8, generator=generator))
            nn.functional.cross_entropy(y, torch.arange(4)).backward()
            self.optimizer.step()
            event = self.events.step()
            if event is not None:
                self.happened.append((event.step, event.period))

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        state = {"model": self.model, "optimizer": self.optimizer, "events": self.events}
        torch.save({key: value.state_dict() for key, value in state.items()}, file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        state = torch.load(file, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.events.load_state_dict(state["events"])


SCHEDULES: dict[str, Callable[[], r.FrequencySchedule | int]] = {
    "constant": lambda: 4,
    "stepwise": lambda: r.StepwisePeriod([(0, 3), (8, 5)]),
    "inverse": lambda: r.InverseLearningRate(0.15),
    "adaptive": lambda: r.AdaptivePeriod(0.1, minimum=2, maximum=9),
}
EXPECTED = {
    "constant": [4, 8, 12, 16],
    "stepwise": [3, 6, 11, 16],
    # Period 3 while lr = 0.05 (steps 1 to 9), then 15.
    "inverse": [3, 6, 9],
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("stop", [5, 7])
def test_resumes_mid_period_to_the_bit(name: str, stop: int) -> None:
    whole = Run(SCHEDULES[name]())
    whole.train(0, 17)
    begun = Run(SCHEDULES[name]())
    begun.train(0, stop)
    resumed = Run(SCHEDULES[name]())
    resumed.load(begun.save())
    resumed.train(stop, 17)
    assert begun.happened + resumed.happened == whole.happened
    assert resumed.events.events == len(whole.happened)
    if name in EXPECTED:
        assert [step for step, _ in whole.happened] == EXPECTED[name]
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_a_change_of_the_learning_rate_takes_effect_at_once() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 4))
    events = r.Events([("w", weight)], r.WeightDecay(0.0), r.InverseLearningRate(1.0))
    assert [events.step(lr=0.1) is not None for _ in range(5)] == [False] * 5
    assert events.step(lr=0.2) is not None
    assert [events.step(lr=1.0) is not None for _ in range(2)] == [True, True]
    with pytest.raises(ValueError, match="learning rate"):
        events.step()
    assert events.steps == 8


def test_adaptive_period_follows_the_update() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 4))
    events = r.Events([("w", weight)], r.WeightDecay(0.25), r.AdaptivePeriod(0.05, minimum=2, maximum=100))
    periods = [event.period for event in (events.step() for _ in range(20)) if event is not None]
    assert periods == [2, 5, 5, 5]


class CountsOperators(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SCHEDULES)
def test_nothing_happens_between_events(name: str) -> None:
    run = Run(SCHEDULES[name]())
    version = run.model[0].weight._version
    with CountsOperators() as counter:
        assert run.events.step() is None
    assert counter.calls == 0
    assert run.model[0].weight._version == version


def test_as_if_at_event_restores_weights_and_random_numbers() -> None:
    run, plain = Run(6), Run(6)
    run.train(0, 4)
    plain.train(0, 4)
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    with run.events.as_if_at_event() as inside:
        assert int(run.model[0].weight.count_nonzero()) < run.model[0].weight.numel()
        assert inside.bits > 0
    with pytest.raises(ZeroDivisionError), run.events.as_if_at_event():
        raise ZeroDivisionError
    assert all(torch.equal(value, before[key]) for key, value in run.model.state_dict().items())
    run.train(4, 9)
    plain.train(4, 9)
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), plain.model.parameters(), strict=True))


def test_one_context_can_be_entered_again() -> None:
    run = Run(6)
    before = run.model[0].weight.detach().clone()
    context = run.events.as_if_at_event()
    for _ in range(2):
        with context:
            assert int(run.model[0].weight.count_nonzero()) < before.numel()
        assert torch.equal(run.model[0].weight, before)


def test_training_is_refused_within_as_if_at_event() -> None:
    run = Run(6)
    with run.events.as_if_at_event():
        with pytest.raises(ValueError, match="as_if_at_event"):
            run.events.step()
        with pytest.raises(ValueError, match="as_if_at_event"):
            run.events.finish()
    assert run.events.steps == 0


def test_finish_ends_on_an_event() -> None:
    run = Run(4, r.MagnitudePruning(0.6))
    run.train(0, 6)
    last = run.events.finish()
    assert last is not None
    assert (last.step, last.period) == (6, 2)
    assert run.events.finish() is None
    weights = [run.model[0].weight, run.model[4].weight]
    total = sum(weight.numel() for weight in weights)
    assert sum(int(weight.count_nonzero()) for weight in weights) == last.bits // 32 - total // 32
    assert run.events.state_dict()["events"] == 2


def test_momentum_is_kept_or_cleared() -> None:
    for clear in (False, True):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        events = r.Events(model.named_parameters(), r.MagnitudePruning(0.6), 1, optimizer, clear_momentum=clear)
        model(torch.randn(4, 3, 8, 8)).sum().backward()
        optimizer.step()
        events.step()
        assert ("momentum_buffer" in optimizer.state.get(model[0].weight, {})) is not clear
        assert "momentum_buffer" in optimizer.state[model[0].bias]
    with pytest.raises(ValueError, match="clear_momentum"):
        r.Events(model.named_parameters(), r.MagnitudePruning(0.6), 1, clear_momentum=True)


class Quantized(nn.Module):
    """Weights and inputs with scales of groups, and a layer whose own matrix has the name of theirs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.last = nn.Linear(8, 6), nn.Linear(6, 4)
        parametrize.register_parametrization(
            self.linear, "weight", FakeQuant(8, axis=0, channels=6, groups=4, offset=True)
        )
        self.last.log_scale = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(self.linear(x), self.last.weight * self.last.log_scale.exp())


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: r.MagnitudePruning(0.5),
        lambda: r.UniformQuantization(2),
        lambda: r.SVD(rank=1),
        lambda: r.Compose([r.WeightDecay(0.5), r.MagnitudePruning(0.5)]),
        lambda: r.UniformNoise(0.5),
    ],
)
def test_scales_of_groups_are_no_weights(make: Callable[[], r.Regularizer], copied: bool) -> None:
    model = copy.deepcopy(Quantized()) if copied else Quantized()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model(torch.randn(3, 8)).square().sum().backward()
    optimizer.step()
    (quant,) = (module for module in model.modules() if isinstance(module, FakeQuant))
    before = [parameter.detach().clone() for parameter in quant.parameters()]
    assert [value.dim() for value in before] == [2, 2]
    events = r.Events(model.named_parameters(), make(), 1, optimizer, clear_momentum=True)
    original, own = model.linear.parametrizations.weight.original, model.last.log_scale
    weights = [value.detach().clone() for value in (original, own)]
    assert events.step() is not None
    for parameter, value in zip(quant.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert "momentum_buffer" in optimizer.state[parameter]
    for parameter, value in zip((original, own), weights, strict=True):
        assert not torch.equal(parameter, value)
        assert parameter not in optimizer.state


def test_the_learning_rate_is_that_of_the_first_group_unless_it_is_given() -> None:
    parameters = {"a": torch.ones(2, 2, requires_grad=True), "b": torch.ones(2, 2, requires_grad=True)}
    groups = [{"params": [parameters["a"]], "lr": 0.5}, {"params": [parameters["b"]], "lr": 0.125}]
    optimizer = torch.optim.SGD(groups)
    events = r.Events(parameters.items(), r.WeightDecay(0.5), r.InverseLearningRate(1.0), optimizer)
    assert [events.step() is not None for _ in range(4)] == [False, True, False, True]
    assert [events.step(lr) is not None for lr in (0.25, 0.25, 0.25, 0.25)] == [False, False, False, True]


def test_momentum_of_a_frozen_parameter_is_not_cleared() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    events = r.Events(model.named_parameters(), r.MagnitudePruning(0.5), 1, optimizer, clear_momentum=True)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    model[0].requires_grad_(False)
    events.step()
    assert "momentum_buffer" in optimizer.state[model[0].weight]
    assert model[1].weight not in optimizer.state


def test_frozen_parameters_are_left_alone_until_asked_for() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    r.Events(model.named_parameters(), r.WeightDecay(0.5), 1).step()
    assert torch.equal(model[0].weight, before)
    r.Events(model.named_parameters(), r.WeightDecay(0.5), 1, include_frozen=True).step()
    assert torch.equal(model[0].weight, before * 0.5)


def test_all_of_them_frozen_is_an_error() -> None:
    message = r"all parameters that the regularizer acts on are frozen, first of all '0.weight': .* include_frozen"
    model = network().requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        r.Events(model.named_parameters(), r.MagnitudePruning(0.5), 1)
    model[0].bias.requires_grad_(True)  # which this Q leaves alone
    with pytest.raises(ValueError, match=message):
        r.Events(model.named_parameters(), r.MagnitudePruning(0.5), 1)
    r.Events(model.named_parameters(), r.MagnitudePruning(0.5), 1, include_frozen=True).step()
    assert int(model[4].weight.count_nonzero()) < 2048

    model = network()
    events = r.Events(model.named_parameters(), r.MagnitudePruning(0.5), 2)
    model.requires_grad_(False)
    before = [value.clone() for value in model.parameters()]
    assert events.step() is None  # nothing was due
    for act in (events.step, events.finish, lambda: events.as_if_at_event().__enter__()):
        with pytest.raises(ValueError, match=message):
            act()
    torch.testing.assert_close(list(model.parameters()), before, rtol=0, atol=0)
    model[4].weight.requires_grad_(True)
    assert events.finish() is not None


def test_nan_stops_and_names_the_parameter() -> None:
    run = Run(3)
    run.train(0, 2)
    with torch.no_grad():
        run.model[4].weight[1, 2] = float("nan")
    before = [value.clone() for value in run.model.parameters()]
    with pytest.raises(ValueError, match=r"parameter '4.weight' has 1 of 2048 elements NaN"):
        run.events.step()
    for value, old in zip(run.model.parameters(), before, strict=True):
        torch.testing.assert_close(value, old, rtol=0, atol=0, equal_nan=True)


def test_refuses_parameters_that_nothing_is_done_to() -> None:
    with pytest.raises(ValueError, match="none of the 2 parameters"):
        r.Events(nn.BatchNorm2d(4).named_parameters(), r.MagnitudePruning(0.5), 1)
    with pytest.raises(ValueError, match="parameter 'weight'"):
        r.Events(nn.Linear(3, 4).named_parameters(), r.NMPruning(2, 4), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"named_parameters": [torch.zeros(2, 2)]}, "named_parameters holds a Tensor, expected .* pairs"),
        ({"regularizer": r.MagnitudePruning}, "regularizer = <class .*, expected one such as"),
        ({"schedule": 1.5}, "schedule = 1.5, expected a whole number of steps"),
    ],
)
def test_other_types_are_refused_without_showing_the_weights(arguments: dict[str, object], message: str) -> None:
    usual = {"named_parameters": [("w", torch.zeros(2, 2))], "regularizer": r.MagnitudePruning(0.5), "schedule": 5}
    with pytest.raises(TypeError, match=f"^{message}") as refused:
        r.Events(**usual | arguments)  # type: ignore[arg-type]
    assert "tensor(" not in str(refused.value)


def test_refuses_a_state_that_is_not_its_own() -> None:
    events = Run(SCHEDULES["adaptive"]()).events
    state: dict[str, int | float | Tensor] = events.state_dict()
    for change, message in [({"steps": 1.5}, "'steps'"), ({"since_event": 3}, "since_event = 3")]:
        with pytest.raises(ValueError, match=message):
            events.load_state_dict(state | change)
    with pytest.raises(ValueError, match="'period'"):
        events.load_state_dict({key: value for key, value in state.items() if key != "schedule.period"})
    assert events.state_dict() == state


@pytest.mark.parametrize(
    ("saved", "own", "message"),
    [
        (r.Tucker2(ratio=2), r.SVD(ratio=2), "is of the regularizer Tucker2, expected one of SVD"),
        (
            r.Compose([r.MagnitudePruning(0.5), r.SVD(ratio=2)]),
            r.Compose([r.MagnitudePruning(0.5), r.CodebookQuantization(2)]),
            "is of the regularizer SVD, expected one of CodebookQuantization",
        ),
        (
            r.Compose([r.MagnitudePruning(0.5), r.UniformQuantization(4)]),
            r.Compose([r.MagnitudePruning(0.5)]),
            "is of a Compose of more than 1 parts",
        ),
        (r.Compose([r.MagnitudePruning(0.5)]), r.Compose([r.MagnitudePruning(0.5), r.SVD(ratio=2)]), "no entry '1'"),
    ],
)
def test_refuses_the_state_of_another_regularizer(saved: r.Regularizer, own: r.Regularizer, message: str) -> None:
    torch.manual_seed(0)
    parameters = list(nn.Conv2d(8, 8, 3).named_parameters())
    events = r.Events(parameters, saved, 1)
    events.step()
    other = r.Events(parameters, own, 1)
    before = other.state_dict()
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(events.state_dict())
    assert other.state_dict() == before


def test_a_state_that_is_refused_at_its_end_has_changed_nothing() -> None:
    """The schedule's period and the first part's generator come before the part that is refused."""
    parameters = list(network().named_parameters())
    schedule = SCHEDULES["adaptive"]
    saved = r.Events(parameters, r.Compose([r.UniformNoise(0.3, seed=5), r.SVD(ratio=2)]), schedule())
    for _ in range(2):
        saved.step()
    own = r.Events(parameters, r.Compose([r.UniformNoise(0.3, seed=7), r.MagnitudePruning(0.5)]), schedule())
    before = own.state_dict()
    assert saved.state_dict()["schedule.period"] != before["schedule.period"]
    with pytest.raises(ValueError, match="is of the regularizer SVD, expected one of MagnitudePruning"):
        own.load_state_dict(saved.state_dict())
    after = own.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        old = after[key]
        assert torch.equal(value, old) if isinstance(value, Tensor) and isinstance(old, Tensor) else value == old, key


@pytest.mark.parametrize("act", ["step", "finish", "as_if_at_event"])
def test_an_event_on_parameters_that_apply_has_replaced_is_refused(act: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    events = r.Events(model.named_parameters(), r.MagnitudePruning(0.5), 2, optimizer)
    kept = LayerPlan("2", "conv2d", 8, 8, kept_in=(0, 1, 2, 3))
    apply(model, CompressionPlan("by hand", layers=[kept]), optimizer)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert events.step() is None
    with pytest.raises(ValueError, match=r"no longer has '2.weight', .* Make new Events of its parameters, after"):
        getattr(events, act)()
    torch.testing.assert_close(dict(model.named_parameters()), before, rtol=0, atol=0)


def test_events_on_parameters_that_the_optimizer_never_had() -> None:
    model, trained = nn.Linear(8, 8), nn.Linear(8, 8)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    events = r.Events(model.named_parameters(), r.MagnitudePruning(0.5), 2, optimizer)
    assert not events.due()
    assert events.step() is None
    assert events.due()
    assert events.step() is not None


def test_an_lstm_trains_under_binary_codes() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(12, 16)
    optimizer = torch.optim.Adam(lstm.parameters(), lr=0.01)
    events = r.Events(lstm.named_parameters(), r.BinaryCodeQuantization(2), 3, optimizer)
    for _ in range(7):
        optimizer.zero_grad()
        lstm(torch.randn(5, 2, 12))[0].square().mean().backward()
        optimizer.step()
        events.step()
    events.finish()
    assert all(len(row.unique()) <= 4 for row in lstm.weight_hh_l0)
    assert len(lstm.bias_hh_l0.unique()) > 4
