"""Small networks, one for each way channels go, and plans drawn for them."""

import random

import torch
import torch.nn.functional as F
from cctorch._C import CompressionPlan, LayerPlan
from cctorch.graph import ModelGraph
from torch import Tensor, nn


class _PaddedBlock(nn.Module):
    """CIFAR ResNet block, option A: the shortcut is strided and padded with zero channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.extra = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.extra:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return F.relu(x + y)


class PaddedResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(_PaddedBlock(8, 8, 1), _PaddedBlock(8, 8, 1))
        self.layer2 = nn.Sequential(_PaddedBlock(8, 16, 2), _PaddedBlock(16, 16, 1))
        self.linear = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        x = F.avg_pool2d(x, x.size(3))
        return self.linear(x.view(x.size(0), -1))


class Vgg(nn.Module):
    """Flattens more than one position of each channel into its linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding="same", dilation=2),
            nn.BatchNorm2d(12),
            nn.ReLU(inplace=True),
            nn.Conv2d(12, 6, (3, 2), stride=(2, 1), padding=(1, 0), padding_mode="reflect"),
            nn.Dropout(0.5),
        )
        self.hidden = nn.Linear(6 * 4 * 7, 20)
        self.classifier = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.gelu(self.hidden(torch.flatten(self.features(x), 1))))


class Dense(nn.Module):
    """Concatenation, with normalizations of what was concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(6 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.last = nn.Conv2d(18, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return self.last(x).mean((2, 3))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.squeeze = nn.Conv2d(12, 4, 1)
        self.excite = nn.Conv2d(4, 12, 1)
        self.project = nn.Conv2d(12, 8, 1, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.depthwise(self.expand(x)))
        gate = self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(x, 1))))
        x = self.project(x * torch.sigmoid(gate))
        return self.head(x.amax((2, 3)))


class OneChannel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 1, 3)
        self.second = nn.Conv2d(1, 1, 1)
        self.head = nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(F.relu(self.first(x))).mean((2, 3)))


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Double precision, with statistics and affine parameters that are not the initial zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data = torch.rand(tensor.shape, generator=generator) + 0.5
    return model.double().eval()


def random_plan(graph: ModelGraph, seed: int = 0, ranks: bool = True) -> CompressionPlan:
    """Drops about half of the inputs of every layer and gives every other one a rank; then drops dead filters."""
    draw = random.Random(seed)
    plan = CompressionPlan("random", 0.5)
    layers = []
    for spec in graph.specs:
        if spec.kind not in ("conv2d", "linear") or spec.name in graph.left_alone:
            continue
        kept = sorted(draw.sample(range(spec.in_channels), max(1, spec.in_channels // 2)))
        columns = len(kept) * spec.kernel_height * spec.kernel_width
        # The reference takes an SVD of each weight, which is slow for wide ones.
        ranked = ranks and columns * spec.out_channels < 2**13 and draw.random() < 0.6
        rank = draw.randint(1, min(spec.out_channels, columns)) if ranked else None
        layers.append(LayerPlan(spec.name, spec.kind, spec.in_channels, spec.out_channels, kept_in=kept, rank=rank))
    plan.layers = layers
    graph.channels.resolve(plan)
    return plan


@torch.no_grad()
def projected(model: nn.Module, plan: CompressionPlan) -> nn.Module:
    """The dense model with the plan's input columns zeroed and its ranks enforced: what apply must compute."""
    for layer in plan.layers:
        weight = getattr(model.get_submodule(layer.name), "weight", None)
        if not layer.kept_in:
            assert weight is not None
            weight.zero_()
            continue
        if layer.kind not in ("conv2d", "linear") or weight is None:
            continue
        gone = [i for i in range(layer.in_channels) if i not in set(layer.kept_in)]
        weight[:, gone] = 0
        if layer.rank is not None:
            u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
            s[layer.rank :] = 0
            weight.copy_(((u * s) @ v).view_as(weight))
    return model


def counted_macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one example, from the shapes that reach conv2d and linear."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(example)
    return counter.get_total_flops() // 2 // example.shape[0]
