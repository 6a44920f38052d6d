"""Image data sets as uint8 tensors on the training device, and batches made from them there.

Everything random is drawn from (seed, epoch), so that an epoch can be repeated exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
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

    def epoch(self, seed: int, epoch: int, augment: bool, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """All images once, from batch `first` on; order, crops (of 4 pixels' padding) and flips follow from seed and
        epoch, whatever the number of ranks."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        count, device = len(self.images), self.images.labels.device
        order = _sent(torch.randperm(count, generator=generator), device)
        offsets = _sent(torch.randint(0, 2 * _PAD + 1, (2, count), generator=generator), device)
        flips = _sent(torch.randint(0, 2, (count,), generator=generator, dtype=torch.bool), device)
        scale, shift = self._affine()
        for part in self._parts(first):
            index = order[part]
            images = self.images.images[index]
            if augment:
                images = crop_and_flip(images, offsets[0, index], offsets[1, index], flips[index])
            yield self._normalize(images, scale, shift), self.images.labels[index]

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
