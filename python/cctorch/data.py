"""Image data sets as uint8 tensors on the training device, and batches made from them there.

Everything random is drawn from (seed, epoch), so that an epoch can be repeated exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

_PAD = 4


class DataError(ValueError):
    """A data set that is missing, empty or damaged: the message says what to do."""


@dataclass(frozen=True)
class ImageSet:
    """`images`: uint8, N x C x H x W. `labels`: int64, N."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> ImageSet:
        return ImageSet(self.images[index], self.labels[index])

    def block(self, rank: int, ranks: int) -> ImageSet:
        """The part number `rank` of `ranks` in order, about as large as the others."""
        begin, end = _bounds(len(self), rank, ranks)
        return ImageSet(self.images[begin:end], self.labels[begin:end])

    def to(self, device: torch.device) -> ImageSet:
        return ImageSet(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """`train` and `validation` are disjoint parts of the training images. `mean`, `std` are of pixels in [0, 1]."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


@dataclass(frozen=True)
class Batches:
    """Normalized float32 batches (B x C x H x W, labels). Iterating gives all images in order, as they are.

    With several `ranks` each gets a slice of every batch, which may be empty: `batch_size` is that of all together.
    """

    images: ImageSet
    batch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels_last: bool = False
    rank: int = 0
    ranks: int = 1

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        scale, shift = self._affine()
        for part in self._parts():
            yield self._normalize(self.images.images[part], scale, shift), self.images.labels[part]

    def sliced(self, rank: int, ranks: int) -> Batches:
        """The same batches, of which this rank gets its slice."""
        return replace(self, rank=rank, ranks=ranks)

    def block(self, rank: int, ranks: int) -> Batches:
        """Full batches over this rank's part of the images."""
        return replace(self, images=self.images.block(rank, ranks))

    def epoch(
        self, seed: int, epoch: int, augment: bool, first: int = 0, *, erasing: float = 0.0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """All images once, from batch `first` on; order, crops (of 4 pixels' padding), flips and what is erased, with
        probability `erasing`, follow from seed and epoch, whatever the number of ranks."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        count, device = len(self.images), self.images.labels.device
        order = _sent(torch.randperm(count, generator=generator), device)
        offsets = _sent(torch.randint(0, 2 * _PAD + 1, (2, count), generator=generator), device)
        flips = _sent(torch.randint(0, 2, (count,), generator=generator, dtype=torch.bool), device)
        boxes = _sent(boxes_to_erase(count, self.images.images.shape[2:], erasing, generator), device)
        scale, shift = self._affine()
        for part in self._parts(first):
            index = order[part]
            images = self.images.images[index]
            if augment:
                images = crop_and_flip(images, offsets[0, index], offsets[1, index], flips[index])
            images = self._normalize(images, scale, shift)
            if erasing:
                images = erase(images, *boxes[:, index])
            yield images, self.images.labels[index]

    def head(self, count: int, seed: int) -> Batches:
        """Batches over `count` images chosen at random, all of them if there are not more."""
        generator = torch.Generator().manual_seed(seed)
        index = torch.randperm(len(self.images), generator=generator)[:count].to(self.images.labels.device)
        return replace(self, images=self.images.take(index))

    def _parts(self, first: int = 0) -> Iterator[slice]:
        """Where this rank's slice of each batch begins and ends."""
        for start in range(first * self.batch_size, len(self.images), self.batch_size):
            begin, end = _bounds(min(self.batch_size, len(self.images) - start), self.rank, self.ranks)
            yield slice(start + begin, start + end)

    def _affine(self) -> tuple[Tensor, Tensor]:
        device = self.images.labels.device
        mean, std = torch.tensor(self.mean).view(-1, 1, 1), torch.tensor(self.std).view(-1, 1, 1)
        return _sent(1 / (255 * std), device), _sent(-mean / std, device)

    def _normalize(self, images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.to(torch.float32, memory_format=layout).mul_(scale).add_(shift)


@dataclass(frozen=True)
class Feed:
    """What a model is fed with: a data set's images in one memory layout, and the model in the same."""

    data: Dataset
    channels_last: bool

    def batches(self, images: ImageSet, batch_size: int) -> Batches:
        return Batches(images, batch_size, self.data.mean, self.data.std, self.channels_last)

    def example(self, batch: int) -> Tensor:
        """One batch of test images, repeated where there are not enough."""
        images = self.data.test
        index = torch.arange(batch, device=images.labels.device) % len(images)
        return next(iter(self.batches(images.take(index), batch)))[0]

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return model.to(device=device, memory_format=layout)  # type: ignore[call-overload,no-any-return]


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On its way to the device: nobody waits."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _bounds(count: int, rank: int, ranks: int) -> tuple[int, int]:
    return rank * count // ranks, (rank + 1) * count // ranks


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Per image, the window at (top, left) of the image padded by 4 zero pixels, mirrored where `flip`."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (_PAD, _PAD, _PAD, _PAD))
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - columns, columns)
    batch = torch.arange(count, device=images.device)
    return padded[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def boxes_to_erase(count: int, sides: Sequence[int], probability: float, generator: torch.Generator) -> Tensor:
    """Top, left, height and width of a box in each of `count` images of height x width `sides`: int64, 4 x count.

    With `probability` of an area in [0.02, 0.33] of the image's and a ratio of height to width in [0.3, 3.3], the first
    uniformly and the second log-uniformly distributed, cut to the image's sides; else empty. Zhong et al., "Random
    Erasing Data Augmentation", 2020, algorithm 1, which draws again where the box is larger than the image.
    """
    if not probability:
        return torch.zeros(4, count, dtype=torch.int64)
    erased, area, ratio, top, left = torch.rand(5, count, generator=generator)
    area = (0.02 + 0.31 * area) * math.prod(sides)
    ratio = torch.exp(math.log(3.3) + (math.log(0.3) - math.log(3.3)) * ratio)
    height, width = (
        (area * of).sqrt().round().clamp(1, side) * (erased < probability)
        for of, side in zip((ratio, 1 / ratio), sides, strict=True)
    )
    corner = (
        (free * (side - size + 1)).floor() for free, side, size in zip((top, left), sides, (height, width), strict=True)
    )
    return torch.stack([*corner, height, width]).long()


def erase(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Zeros in a box of each of the B x C x H x W images, the mean color of normalized ones."""

    def inside(begin: Tensor, size: Tensor, side: int) -> Tensor:
        places = torch.arange(side, device=images.device)
        return (places >= begin[:, None]) & (places < (begin + size)[:, None])

    rows, columns = inside(top, height, images.shape[2]), inside(left, width, images.shape[3])
    return images.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0)
