"""DenseNet for small images (Huang et al. 2017), without bottlenecks and compression: 3n + 4 layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cctorch.nn import BatchNorm2d


class DenseLayer(nn.Module):
    """Adds `growth` channels to those that it reads."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.bn = BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(functional.relu(self.bn(x)))], 1)


class Transition(nn.Module):
    """As many channels on half as many rows and columns."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.avg_pool2d(self.conv(functional.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """Three blocks of `layers` each over images of shape N x `in_channels` x H x W; returns N x `classes` logits."""

    def __init__(self, layers: int, growth: int, in_channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        channels = 2 * growth
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        parts: list[nn.Module] = []
        for block in range(3):
            if block:
                parts.append(Transition(channels))
            parts += [DenseLayer(channels + layer * growth, growth) for layer in range(layers)]
            channels += layers * growth
        self.blocks = nn.Sequential(*parts)
        self.bn = BatchNorm2d(channels)
        self.linear = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn(self.blocks(self.conv(x))))
        logits: Tensor = self.linear(torch.flatten(functional.adaptive_avg_pool2d(y, 1), 1))
        return logits
