"""A run's network as it trains on this rank: whole, with averaged gradients (DDP), or in shards (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cctorch import data, distributed, measure, sharding
from cctorch.config import Config, Training
from cctorch.nn import BatchNorm2d
from cctorch.train import make_optimizer, momentum_by_name, restore_momentum


class Network:
    """`model` with its `optimizer`. Training steps go through `parallel`."""

    def __init__(
        self, model: nn.Module, config: Config, settings: Training, feed: data.Feed, device: torch.device
    ) -> None:
        self.feed, self.device = feed, device
        self._sharded = config.sharded and distributed.world_size() > 1
        self._synchronized = config.synchronize_batch_norm
        self.model = self.parallel = model
        self.wrap(model)
        self.optimizer = make_optimizer(self.model, settings)

    def place(self, model: nn.Module) -> nn.Module:
        return self.feed.place(model, self.device)

    def wrap(self, model: nn.Module) -> None:
        """`model`, in place, is what trains from now on; `optimize` makes its optimizer."""
        for module in model.modules():
            if isinstance(module, BatchNorm2d):
                module.synchronized = self._synchronized
        self.model = self.parallel = model  # the hooks of an earlier wrapper go before another one puts up its own
        if self._sharded:
            self.model = self.parallel = sharding.shard(model, self.device)
            return
        self.model = self.place(model)
        self.parallel = distributed.parallel(
            self.model, self.feed.example(1), broadcasts_buffers=not self._synchronized
        )

    def unwrap(self, blank: Callable[[], nn.Module], settings: Training) -> None:
        """For surgery: `model` is whole, on the device, and so is the optimizer's momentum."""
        momentum = sharding.gathered(self.momentum()) if self._sharded else self.momentum()
        self.model = self.parallel = self.place(self.whole(blank))
        self.optimize(settings, momentum)

    def optimize(self, settings: Training, momentum: dict[str, Tensor]) -> None:
        """An optimizer that starts anew, but for its momentum, whole or in shards."""
        self.optimizer = make_optimizer(self.model, settings)
        parameters = dict(self.model.named_parameters())
        shards = {name: sharding.spread(value, parameters[name]) for name, value in momentum.items()}
        restore_momentum(self.model, self.optimizer, shards)

    def momentum(self) -> dict[str, Tensor]:
        """By the parameters' names."""
        return momentum_by_name(self.model, self.optimizer)

    def whole(self, blank: Callable[[], nn.Module]) -> nn.Module:
        """The model; of a sharded one a copy with whole tensors, on the CPU, made from a `blank` one. On every rank."""
        if not sharding.is_sharded(self.model):
            return self.model
        model = blank()
        model.load_state_dict(sharding.gathered(self.model.state_dict()))
        return model

    def accuracy(self, images: data.ImageSet, model: nn.Module | None = None) -> float:
        """Top-1 of `model`, or of the network's, over all ranks."""
        model = model or self.model
        batches, rank, ranks = self.feed.batches(images, 500), distributed.rank(), distributed.world_size()
        # Shards are gathered in every pass: all ranks have to make as many.
        share = batches.sliced(rank, ranks) if sharding.is_sharded(model) else batches.block(rank, ranks)
        return measure.accuracy(model, share, across_ranks=True)

    def assert_identical(self, what: str) -> None:
        """Everything that is not in shards has the same bits on every rank; else MismatchError."""
        tensors = self.model.state_dict().items()
        distributed.assert_identical(what, ((name, value) for name, value in tensors if not isinstance(value, DTensor)))
