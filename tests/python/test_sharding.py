"""A network in shards on two ranks: what each holds, what is gathered, and events on shards as on whole parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from cctorch import models, regularize, sharding
from cctorch.regularize import Event, Events
from cctorch.sharded_events import ShardedEvents
from spawned import spawn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

CPU = torch.device("cpu")


def _network() -> nn.Module:
    torch.manual_seed(5)
    # 5 classes: 3 and 2 rows of the last layer.
    return models.create("resnet8", 1, 5)


def _each_rank_holds_its_half() -> None:
    model = _network()
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    sharded = sharding.shard(copy.deepcopy(model), CPU)
    assert sharding.is_sharded(sharded)
    assert not sharding.is_sharded(model)
    state = sharded.state_dict()
    for name, parameter in sharded.named_parameters():
        local, rows = state[name].to_local(), whole[name].shape[0]
        half = (rows + 1) // 2
        assert torch.equal(local, whole[name][half:] if dist.get_rank() else whole[name][:half]), name
        assert torch.equal(sharding.spread(whole[name], parameter).to_local(), local)
        assert sharding.spread(whole[name], whole[name]) is whole[name]
    gathered = sharding.gathered(state)
    assert gathered.keys() == whole.keys()
    assert all(torch.equal(gathered[name], value) for name, value in whole.items())


def _blocks_are_whole_one_after_the_other() -> None:
    sharded = sharding.shard(_network(), CPU)
    total = sum(parameter.numel() for parameter in sharded.parameters())
    held: list[int] = []

    def watch(module: nn.Module, inputs: object) -> None:
        parameters = list(sharded.parameters())
        held.append(sum(p.numel() for p in parameters if not isinstance(p, DTensor)))

    for module in sharded.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(watch)
    sharded(torch.zeros(2, 1, 12, 12)).sum().backward()
    assert 0 < max(held) < total
    largest = max(sum(p.numel() for p in block.parameters()) for block in sharding._blocks(sharded))
    rest = total - sum(p.numel() for block in sharding._blocks(sharded) for p in block.parameters())
    assert max(held) <= largest + rest
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())


REGULARIZERS: dict[str, Callable[[], regularize.Regularizer]] = {
    "threshold over all": lambda: regularize.MagnitudePruning(0.7),
    "rank": lambda: regularize.SVD(rank=2),
    "noise, then grid": lambda: regularize.Compose([regularize.UniformNoise(0.1), regularize.UniformQuantization(4)]),
}
SCHEDULES: dict[str, Callable[[], regularize.FrequencySchedule]] = {
    "constant": lambda: regularize.ConstantPeriod(2),
    "with the learning rate": lambda: regularize.InverseLearningRate(0.1),
    "adaptive": lambda: regularize.AdaptivePeriod(0.2, maximum=3),
}


def _weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in model.named_parameters() if value.dim() == 4]


def _trains(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[int]:
    """Four steps on gradients that do not depend on the weights: the same in shards, to the bit."""
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = sharding.spread(gradient, parameter)
        optimizer.step()
        yield step


def _trained(model: nn.Module, kind: type[Events | ShardedEvents], q: str, schedule: str) -> tuple[list[object], dict]:
    """What the events said, and all weights and momentum: between events, as if at one, and after the last."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    events = kind(_weights(model), REGULARIZERS[q](), SCHEDULES[schedule](), optimizer, clear_momentum=True)
    torch.manual_seed(9)
    said: list[Event | None] = []
    states: dict[str, Tensor] = {}

    def note(when: str) -> None:
        for name, parameter in model.named_parameters():
            states[f"{when} {name}"] = sharding.whole(parameter.detach()).clone()
            momentum = optimizer.state[parameter].get("momentum_buffer") if parameter in optimizer.state else None
            states[f"{when} momentum of {name}"] = (
                torch.zeros(0) if momentum is None else sharding.whole(momentum).clone()
            )

    for step in _trains(model, optimizer):
        said.append(events.step())
        with events.as_if_at_event():
            note(f"as if at step {step}")
        note(f"step {step}")
    said.append(events.finish())
    note("end")
    figures = [(e.step, e.period, e.relative_update, e.bits, e.dense_bits) if e else None for e in said]
    return [*figures, str(events.state_dict())], states


def _events_are_those_of_whole_parameters() -> None:
    for q, schedule in zip(REGULARIZERS, SCHEDULES, strict=True):
        wanted, states = _trained(_network(), Events, q, schedule)
        found, of_shards = _trained(sharding.shard(_network(), CPU), ShardedEvents, q, schedule)
        assert found == wanted, q
        assert sum(figures is not None for figures in wanted[:-1]) >= 2
        assert states.keys() == of_shards.keys()
        for name, value in states.items():
            assert torch.equal(of_shards[name], value), f"{q}: {name}"


def _whole_parameters_have_no_memory_between_events() -> None:
    model = sharding.shard(_network(), CPU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    events = ShardedEvents(_weights(model), regularize.MagnitudePruning(0.5), regularize.ConstantPeriod(2), optimizer)
    for _ in range(4):
        assert not any(whole.untyped_storage().nbytes() for whole in events._whole)
        events.step()


def _all() -> None:
    _each_rank_holds_its_half()
    _blocks_are_whole_one_after_the_other()
    _events_are_those_of_whole_parameters()
    _whole_parameters_have_no_memory_between_events()


def test_two_ranks(tmp_path: Path) -> None:
    spawn(2, tmp_path, _all)
