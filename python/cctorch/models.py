"""ResNets for small images (He et al. 2016, section 4.2), with the published checkpoints' parameter names."""

from __future__ import annotations

import os
import pickle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cctorch.nn import BatchNorm2d

_BLOCKS = {"resnet8": 1, "resnet20": 3, "resnet32": 5, "resnet56": 9, "resnet110": 18}


class CheckpointError(ValueError):
    """A checkpoint that can't be used: the message names the file and what does not fit."""


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions around a parameter-free shortcut (option A: every other pixel, zero channels added)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = BatchNorm2d(channels)
        self.stride = stride
        self.padding = (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride != 1 or self.padding:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return functional.relu(y + x)


class ResNet(nn.Module):
    """6n + 2 layers over images of shape N x `in_channels` x H x W; returns N x `classes` logits."""

    def __init__(self, blocks: int, in_channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1)
        self.layer2 = _stage(16, 32, blocks, 2)
        self.layer3 = _stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.layer3(self.layer2(self.layer1(y)))
        y = torch.flatten(functional.adaptive_avg_pool2d(y, 1), 1)
        logits: Tensor = self.linear(y)
        return logits


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def create(name: str, in_channels: int = 3, classes: int = 10) -> ResNet:
    """resnet20, resnet32, resnet56, resnet110, or the tiny resnet8, with fresh weights."""
    if name not in _BLOCKS:
        raise ValueError(f"model name {name!r}: expected one of {', '.join(_BLOCKS)}")
    return ResNet(_BLOCKS[name], in_channels, classes)


def load_tensors(path: str | os.PathLike[str]) -> Any:
    """The tensors and plain values in a file, on the CPU. Raises CheckpointError for a damaged or unsafe file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors and plain values (which is refused): copy it again"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged, probably truncated ({error}): copy it again") from error


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads a published checkpoint: a state dict, or a dict holding one, keys with or without "module."."""
    content = load_tensors(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dict: expected a dict of tensors, or one under 'state_dict'")
    load_state(model, {key.removeprefix("module."): value for key, value in state.items()}, str(path))


def load_state(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """`model.load_state_dict(state)`; raises CheckpointError naming the first keys and shapes that do not fit."""
    own = model.state_dict()
    problems = [f"{key} is missing" for key in own if key not in state and not key.endswith("num_batches_tracked")]
    problems += [f"{key} is unknown to the model" for key in state if key not in own]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{source} is a checkpoint of another architecture: {'; '.join(problems[:3])}{more}. "
            "Choose the model that the checkpoint was made from"
        )
    model.load_state_dict(state, strict=False)
