"""Finds image data sets on this machine, reads them and splits them."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy
import torch
from torch import Tensor

from cctorch import atomic
from cctorch.config import Data, expand
from cctorch.data import DataError, Dataset, ImageSet
from cctorch.models import CheckpointError, load_tensors
from cctorch.pixels import as_rgb

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_STATISTICS = {"fashion_mnist": ((0.2860,), (0.3530,))}
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp"}


def load(settings: Data, seed: int, device: torch.device | str = "cpu") -> Dataset:
    """Finds, reads and splits a data set. Raises DataError where it is missing, empty or too small for the split."""
    loaders: dict[str, Callable[[Data], tuple[ImageSet, ImageSet, str]]] = {
        "fashion_mnist": _fashion_mnist,
        "cifar10": _cifar10,
        "image_folder": _image_folder,
    }
    classes = None
    if settings.size is not None:
        train, test, source, classes = _resized_folder(settings, seed, settings.size)
    else:
        train, test, source = loaders[settings.kind](settings)
    if not len(train) or not len(test):
        raise DataError(f"{source} holds {len(train)} training and {len(test)} test images: expected at least one each")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train), generator=generator)
    held_out = settings.validation if isinstance(settings.validation, int) else int(settings.validation * len(train))
    if held_out >= len(train):
        raise DataError(f"data.validation = {settings.validation}: expected less than the {len(train)} training images")
    chosen = order[held_out:][: settings.limit_train]
    tested = torch.randperm(len(test), generator=generator)[: settings.limit_test].sort().values
    mean, std = _STATISTICS.get(settings.kind, _IMAGENET)
    device = torch.device(device)
    return Dataset(
        train.take(chosen).to(device),
        train.take(order[:held_out]).to(device),
        test.take(tested).to(device),
        classes or int(torch.cat([train.labels, test.labels]).max()) + 1,
        mean,
        std,
        source,
    )


def _roots(settings: Data, *usual: Path) -> list[Path]:
    """Where to look: only data.root if the configuration names it."""
    if settings.root is not None:
        return [expand(settings.root)]
    variable = os.environ.get("CCTORCH_DATA")
    return [*([Path(variable).expanduser()] if variable else []), *usual]


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cctorch"


def _fashion_mnist(settings: Data) -> tuple[ImageSet, ImageSet, str]:
    downloads = cache_folder() / "FashionMNIST" / "raw"
    for root in _roots(settings, DEBIAN_FASHION_MNIST, downloads):
        for folder in (root, root / "fashion-mnist", root / "FashionMNIST" / "raw"):
            if _idx_file(folder, "train-images-idx3-ubyte"):
                return _idx_set(folder, "train"), _idx_set(folder, "t10k"), str(folder)
    if settings.root is None:
        from torchvision.datasets import FashionMNIST

        if _download(FashionMNIST):
            return _idx_set(downloads, "train"), _idx_set(downloads, "t10k"), str(downloads)
    raise DataError(
        "Fashion-MNIST was not found: install it with `apt install dataset-fashion-mnist`, "
        "or allow the network for torchvision's download or set data.root to a folder with its four idx files."
    )


def _cifar10(settings: Data) -> tuple[ImageSet, ImageSet, str]:
    from torchvision.datasets import CIFAR10

    for root in _roots(settings, cache_folder()):
        for place in (root, root / "cifar10.zip", root / "cifar10"):
            if place.suffix == ".zip" and place.is_file():
                return _cached(place, _read_zip)
            if (place / "train").is_dir():
                return _cached(place, _read_folder)
        if (root / "cifar-10-batches-py").is_dir():
            return _torchvision_set(root, True), _torchvision_set(root, False), str(root)
    if settings.root is None and _download(CIFAR10):
        folder = cache_folder()
        return _torchvision_set(folder, True), _torchvision_set(folder, False), str(folder)
    raise DataError(
        "CIFAR-10 was not found: set data.root or the environment variable CCTORCH_DATA to a folder with cifar10.zip "
        "or cifar10/{train,test}/<class>/*.png or torchvision's cifar-10-batches-py, or allow a download."
    )


def _image_folder(settings: Data) -> tuple[ImageSet, ImageSet, str]:
    for root in _roots(settings):
        if root.suffix == ".zip" and root.is_file():
            return _cached(root, _read_zip)
        if (root / "train").is_dir() and (root / "test").is_dir():
            return _cached(root, _read_folder)
    raise DataError(
        f"data.root = {settings.root!r}: expected a folder (or a zip file) with {{train,test}}/<class>/<image files>"
    )


def _resized_folder(settings: Data, seed: int, size: int) -> tuple[ImageSet, ImageSet, str, int]:
    """As many images as the limits ask for, and the number of classes, not all of which these need show."""
    from cctorch import image_folder

    [root, *_] = [*_roots(settings), None]
    if root is None:
        raise DataError(f"data.root = {settings.root!r}: expected a folder with train/<class>/ and val/<class>/")
    generator = torch.Generator().manual_seed(seed)
    try:
        train, test = image_folder.parts(root)
        count = image_folder.wanted(settings.limit_train, settings.validation)
        sets = [
            ImageSet(*image_folder.read(part, size, limit, generator))
            for part, limit in ((train, count), (test, settings.limit_test))
        ]
    except ValueError as error:
        raise DataError(str(error)) from error
    return sets[0], sets[1], str(root), len(train.classes)


def _download(dataset: Callable[..., object]) -> bool:
    cache_folder().mkdir(parents=True, exist_ok=True)
    try:
        dataset(str(cache_folder()), train=True, download=True)
    except (OSError, RuntimeError):
        return False
    return True


def _torchvision_set(root: Path, train: bool) -> ImageSet:
    from torchvision.datasets import CIFAR10

    try:
        content = CIFAR10(str(root), train=train)
    except RuntimeError as error:
        raise DataError(f"{root / 'cifar-10-batches-py'} is damaged ({error}): unpack it again") from error
    return ImageSet(torch.from_numpy(content.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(content.targets))


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((file for file in (folder / f"{name}.gz", folder / name) if file.is_file()), None)


def _idx_set(folder: Path, part: str) -> ImageSet:
    images, labels = (
        _read_idx(folder, f"{part}-images-idx3-ubyte", 3),
        _read_idx(folder, f"{part}-labels-idx1-ubyte", 1),
    )
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} images but {len(labels)} labels in {part}: copy the data set again")
    return ImageSet(images.unsqueeze(1), labels.long())


def _read_idx(folder: Path, name: str, dimensions: int) -> Tensor:
    file = _idx_file(folder, name)
    if file is None:
        raise DataError(f"{folder / name}.gz is missing beside the data set's other files: copy the data set again")
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{file} is damaged ({error}): copy the data set again") from error
    header = 4 + 4 * dimensions
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != header + int(numpy.prod(shape)):
        raise DataError(
            f"{file} is not an idx file of {dimensions} dimensions, or is truncated: copy the data set again"
        )
    return (
        torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).reshape(shape)
        if shape[0]
        else torch.empty(shape, dtype=torch.uint8)
    )


def _cached(source: Path, read: Callable[[Path], dict[str, Tensor]]) -> tuple[ImageSet, ImageSet, str]:
    """Decoding takes ten seconds and reading its result one."""
    file = cache_folder() / f"{source.name}-{_fingerprint(source)}.pt"
    try:
        content = load_tensors(file)
    except CheckpointError:
        content = read(source)
        buffer = io.BytesIO()
        torch.save(content, buffer)
        atomic.write(file, buffer.getvalue())
    train, test = (ImageSet(content[f"{part}_images"], content[f"{part}_labels"]) for part in ("train", "test"))
    return train, test, str(source)


def _fingerprint(source: Path) -> str:
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    stats = [file.stat() for file in files]
    newest = max((stat.st_mtime_ns for stat in stats), default=0)
    text = f"{source.resolve()}:{len(files)}:{sum(stat.st_size for stat in stats)}:{newest}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_zip(source: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(source) as archive:
            names = [name for name in archive.namelist() if Path(name).suffix.lower() in _IMAGE_SUFFIXES]
            return _decode(str(source), ((name, archive.read(name)) for name in sorted(names)))
    except zipfile.BadZipFile as error:
        raise DataError(f"{source} is damaged ({error}): copy it again") from error


def _read_folder(source: Path) -> dict[str, Tensor]:
    files = sorted(file for file in source.rglob("*") if file.suffix.lower() in _IMAGE_SUFFIXES)
    return _decode(str(source), ((file.relative_to(source).as_posix(), file.read_bytes()) for file in files))


def _decode(source: str, files: Iterable[tuple[str, bytes]]) -> dict[str, Tensor]:
    """Files named .../{train,test}/<class>/<file>; classes are numbered by name."""
    images: dict[str, list[numpy.ndarray]] = {"train": [], "test": []}
    labels: dict[str, list[str]] = {"train": [], "test": []}
    for name, content in files:
        *_, part, label, _ = ("", "", *name.split("/"))
        if part not in images:
            raise DataError(f"{source}: {name} is not in train/<class>/ or test/<class>/")
        try:
            pixels = numpy.asarray(as_rgb(io.BytesIO(content)))
        except ValueError as error:
            raise DataError(f"{source}: {name} {error}") from error
        if images[part] and pixels.shape != images[part][0].shape:
            raise DataError(f"{source}: {name} has shape {pixels.shape}, the others {images[part][0].shape}: resize it")
        images[part].append(pixels)
        labels[part].append(label)
    found = sorted({*labels["train"], *labels["test"]})
    if len(found) == 1:
        raise DataError(f"{source} has one class, {found[0]!r}: expected two or more")
    classes = {label: index for index, label in enumerate(found)}
    result = {}
    for part in images:
        if not images[part]:
            raise DataError(f"{source} holds no images in {part}/<class>/")
        result[f"{part}_images"] = torch.from_numpy(numpy.stack(images[part])).permute(0, 3, 1, 2).contiguous()
        result[f"{part}_labels"] = torch.tensor([classes[label] for label in labels[part]])
    return result
