"""A device whose times are arithmetic: layers cost what their channels, rounded up to eights, multiply to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from cctorch.nn import Constant, GatherChannels, LowRankConv2d
from torch import Tensor, nn

OVERHEAD = 2e-5


def eights(count: int) -> int:
    return 8 * math.ceil(count / 8)


class FakeTimer:
    """In place of ``measure.interleaved``. ``calls`` counts the modules that were timed.

    Args:
        launch: seconds of every call of a layer, whatever its size; a factored layer makes two.
        rest: seconds of a model besides its layers.
        friction: how much slower a layer with a gather runs inside a model than alone.
    """

    def __init__(self, launch: float = OVERHEAD, rest: float = 0.0, friction: float = 1.0) -> None:
        self.launch, self.rest, self.friction = launch, rest, friction
        self.calls = 0

    def __call__(self, modules: Sequence[nn.Module], x: Tensor) -> list[list[float]]:
        self.calls += len(modules)
        return [[self._seconds(module, x)] * 5 for module in modules]

    def _seconds(self, module: nn.Module, x: Tensor) -> float:
        seconds = []
        hooks = [
            part.register_forward_hook(lambda m, i, o: seconds.append(self._part(m, i[0], o)))
            for part in module.modules()
            if isinstance(part, nn.Conv2d | LowRankConv2d | nn.Linear | nn.BatchNorm2d | GatherChannels | Constant)
        ]
        with torch.no_grad():
            module.eval()(x)
        for hook in hooks:
            hook.remove()
        whole = any(isinstance(part, nn.Linear) for part in module.modules()) and len(seconds) > 2
        return sum(seconds) * (self.friction if whole and _compressed(module) else 1) + (self.rest if whole else 0)

    def _part(self, layer: nn.Module, x: Tensor, y: Tensor) -> float:
        if isinstance(layer, Constant):
            return self.launch / 10
        positions = y.numel() / y.shape[1]
        if isinstance(layer, GatherChannels):
            return self.launch + 4e-9 * positions * layer.index.numel()
        if isinstance(layer, nn.BatchNorm2d):
            return self.launch / 4 + 1e-9 * positions * y.shape[1]
        if isinstance(layer, LowRankConv2d):
            rank, inputs, high, wide = layer.first.shape
            work = eights(rank) * (eights(inputs) * high * wide + eights(layer.second.shape[0]) * layer.second.shape[2])
            return 2 * self.launch + 1e-10 * positions * work
        work = eights(x.shape[1]) * eights(y.shape[1]) * layer.weight[0, 0].numel()
        return self.launch + 1e-10 * positions * work


def _compressed(module: nn.Module) -> bool:
    return any(isinstance(part, GatherChannels | LowRankConv2d) for part in module.modules())
