"""The networks that configurations name, and their checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from cctorch.models.checkpoints import CheckpointError, load_state, load_tensors, load_weights
from cctorch.models.densenet import DenseNet
from cctorch.models.googlenet import GoogLeNet
from cctorch.models.resnet import BasicBlock, ResNet
from cctorch.models.vgg import VGG16

__all__ = [
    "VGG16",
    "BasicBlock",
    "CheckpointError",
    "DenseNet",
    "GoogLeNet",
    "ResNet",
    "create",
    "load_state",
    "load_tensors",
    "load_weights",
]


def _of_torchvision(name: str, in_channels: int, classes: int) -> nn.Module:
    import torchvision

    if in_channels != 3:
        raise ValueError(f"model name {name!r}: its images have 3 channels, but the data set's have {in_channels}")
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes)
    return model


# Called with the number of channels and of classes.
_NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet8": partial(ResNet, 1),
    "resnet20": partial(ResNet, 3),
    "resnet32": partial(ResNet, 5),
    "resnet56": partial(ResNet, 9),
    "resnet110": partial(ResNet, 18),
    "vgg16": VGG16,
    "densenet40": partial(DenseNet, 12, 12),
    "googlenet": GoogLeNet,
    "resnet50": partial(_of_torchvision, "resnet50"),
    "mobilenet_v2": partial(_of_torchvision, "mobilenet_v2"),
}


def create(name: str, in_channels: int = 3, classes: int = 10) -> nn.Module:
    """A network with fresh weights.

    For small images: resnet20, resnet32, resnet56, resnet110 and the tiny resnet8, vgg16 (with batch normalization),
    densenet40 (growth 12), googlenet. For ImageNet's, as in torchvision: resnet50, mobilenet_v2.
    """
    if name not in _NETWORKS:
        raise ValueError(f"model name {name!r}: expected one of {', '.join(_NETWORKS)}")
    return _NETWORKS[name](in_channels, classes)
