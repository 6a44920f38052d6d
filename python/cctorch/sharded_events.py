"""Regularization events on parameters in shards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from cctorch import sharding
from cctorch.regularize import Event, Events, FrequencySchedule, Regularizer


class ShardedEvents:
    """`regularize.Events` for parameters of which each rank has a shard. All ranks call.

    What Q does to a shard is not what it does to the weight: ranks, groups and thresholds are of the whole. So at an
    event, and only then, all ranks gather the parameters, do the same to them, and each keeps its shards.
    """

    def __init__(
        self,
        named_parameters: list[tuple[str, Tensor]],
        regularizer: Regularizer,
        schedule: FrequencySchedule,
        optimizer: torch.optim.Optimizer,
        *,
        clear_momentum: bool = False,
    ) -> None:
        self._shards = [parameter for _, parameter in named_parameters]
        self._whole = [_empty(parameter) for parameter in self._shards]
        names = [name for name, _ in named_parameters]
        self._named = list(zip(names, self._whole, strict=True))
        self._events = Events(self._named, regularizer, schedule)
        self._optimizer, self._clear_momentum = optimizer, clear_momentum
        self._release()

    def step(self) -> Event | None:
        lr = float(self._optimizer.param_groups[0]["lr"])
        if not self._events.due(lr):
            return self._events.step(lr)
        with self._gathered():
            return self._after(self._events.step(lr))

    def finish(self) -> Event | None:
        with self._gathered():
            return self._after(self._events.finish())

    @contextmanager
    def as_if_at_event(self) -> Iterator[None]:
        """The shards are those of Q(w) in the block; then they are what they were, to the bit."""
        before = [_local(shard).clone() for shard in self._shards]
        with self._gathered(), self._events.as_if_at_event():
            self._scatter()
        try:
            yield
        finally:
            for shard, values in zip(self._shards, before, strict=True):
                _local(shard).copy_(values)

    def state_dict(self) -> dict[str, int | float | str | Tensor]:
        return self._events.state_dict()

    def load_state_dict(self, state: dict[str, int | float | str | Tensor]) -> None:
        self._events.load_state_dict(state)

    def _after(self, event: Event | None) -> Event | None:
        if event is None:
            return None
        self._scatter()
        if self._clear_momentum:
            selected = {id(whole) for _, whole in self._events.regularizer.select(self._named)}
            for shard, whole in zip(self._shards, self._whole, strict=True):
                if id(whole) in selected and shard.requires_grad:
                    self._optimizer.state.pop(shard, None)
        return event

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """The whole parameters have memory and values in the block."""
        with torch.no_grad():
            try:
                for whole, shard in zip(self._whole, self._shards, strict=True):
                    whole.untyped_storage().resize_(whole.numel() * whole.itemsize)
                    whole.copy_(sharding.whole(shard))
                yield
            finally:
                self._release()

    def _release(self) -> None:
        for whole in self._whole:
            whole.untyped_storage().resize_(0)

    def _scatter(self) -> None:
        for whole, shard in zip(self._whole, self._shards, strict=True):
            shard.copy_(sharding.spread(whole, shard))


def _empty(shard: Tensor) -> Tensor:
    whole = torch.empty(shard.shape, dtype=shard.dtype, device=shard.device)
    return whole.requires_grad_(shard.requires_grad)


def _local(shard: Tensor) -> Tensor:
    assert isinstance(shard, DTensor)
    return shard.to_local().detach()
