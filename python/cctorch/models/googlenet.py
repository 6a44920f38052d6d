"""GoogLeNet (Szegedy et al. 2015) for images of 32 x 32 pixels, with batch normalization.

As filter pruning papers compress it: one 3 x 3 convolution first, and two 3 x 3 convolutions in place of each 5 x 5.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cctorch.nn import BatchNorm2d

# Filters: 1 x 1; 1 x 1 before the 3 x 3; 3 x 3; 1 x 1 before the two 3 x 3; those; 1 x 1 after the pooling.
_INCEPTIONS = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)


def _convolution(in_channels: int, channels: int, size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, size, padding=size // 2), BatchNorm2d(channels), nn.ReLU(inplace=True)
    )


class Inception(nn.Module):
    """Four branches over the same channels, one after another in the result."""

    def __init__(self, in_channels: int, filters: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        one, before_three, three, before_five, five, pooled = filters
        self.one = _convolution(in_channels, one, 1)
        self.three = nn.Sequential(_convolution(in_channels, before_three, 1), _convolution(before_three, three, 3))
        self.five = nn.Sequential(
            _convolution(in_channels, before_five, 1),
            _convolution(before_five, five, 3),
            _convolution(five, five, 3),
        )
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), _convolution(in_channels, pooled, 1))
        self.channels = one + three + five + pooled

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pooled(x)], 1)


class GoogLeNet(nn.Module):
    """Nine inceptions over images of shape N x `in_channels` x H x W; returns N x `classes` logits."""

    def __init__(self, in_channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        channels = 192
        layers: list[nn.Module] = [_convolution(in_channels, channels, 3)]
        for stage, inceptions in enumerate(_INCEPTIONS):
            if stage:
                layers.append(nn.MaxPool2d(3, 2, 1))
            for filters in inceptions:
                inception = Inception(channels, filters)
                layers.append(inception)
                channels = inception.channels
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.features(x))
        return logits
