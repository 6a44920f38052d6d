from __future__ import annotations

import io
import math
import shutil
import zipfile
import zlib
from pathlib import Path

import numpy
import pytest
import torch
from cctorch import data, datasets, image_folder
from cctorch.config import Data
from cctorch.data import Batches, DataError, ImageSet
from cctorch.pixels import as_rgb
from PIL import Image
from tiny_run import images_and_labels, write_dataset, write_idx


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CCTORCH_DATA", raising=False)
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", tmp_path / "nowhere")
    monkeypatch.setattr(datasets, "_download", lambda dataset: False)


def _fashion(root: Path | None, **settings: object) -> Data:
    return Data.model_validate({"kind": "fashion_mnist", "root": str(root) if root else None, **settings})


def _folder(root: Path, per_class: int = 3, size: int = 8) -> Path:
    generator = numpy.random.default_rng(0)
    for part in ("train", "test"):
        for label in ("zebra", "ant"):
            for number in range(per_class):
                file = root / part / label / f"{number:04}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=numpy.uint8)).save(file)
    return root


def _image_folder(root: Path) -> Data:
    return Data(kind="image_folder", root=str(root), validation=0)


@pytest.mark.parametrize("compressed", [True, False])
def test_reads_idx_files(tmp_path: Path, compressed: bool) -> None:
    expected, labels = images_and_labels(10, 0)
    for part in ("train", "t10k"):
        suffix = ".gz" if compressed else ""
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{suffix}", expected)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{suffix}", labels)
    dataset = datasets.load(_fashion(tmp_path, validation=0), 0)
    assert torch.equal(dataset.test.images[:, 0].long(), expected)
    assert torch.equal(dataset.test.labels, labels)
    assert (dataset.shape, dataset.classes) == ((1, 12, 12), 4)


def test_parts_are_disjoint_and_follow_from_the_seed(tmp_path: Path) -> None:
    count = 60
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", torch.arange(count).view(-1, 1, 1).expand(-1, 2, 2))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", torch.arange(count) % 3)

    def members(part: ImageSet) -> list[int]:
        return part.images[:, 0, 0, 0].tolist()

    whole = datasets.load(_fashion(tmp_path, validation=0.25), 3)
    assert len(whole.validation) == 15
    assert sorted(members(whole.train) + members(whole.validation)) == list(range(count))
    again = datasets.load(_fashion(tmp_path, validation=15), 3)
    assert members(again.train) == members(whole.train)
    assert members(datasets.load(_fashion(tmp_path, validation=15), 4).validation) != members(whole.validation)
    limited = datasets.load(_fashion(tmp_path, validation=15, limit_train=20, limit_test=7), 3)
    assert members(limited.validation) == members(whole.validation)
    assert members(limited.train) == members(whole.train)[:20]
    assert len(set(members(limited.test))) == 7


def test_finds_the_data_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "fashion-mnist")
    monkeypatch.setenv("CCTORCH_DATA", str(tmp_path))
    assert datasets.load(_fashion(None), 0).source == str(tmp_path / "fashion-mnist")


@pytest.mark.parametrize("named", [True, False])
def test_says_both_ways_out_where_there_is_no_fashion_mnist(tmp_path: Path, named: bool) -> None:
    with pytest.raises(DataError, match="apt install dataset-fashion-mnist") as caught:
        datasets.load(_fashion(tmp_path if named else None), 0)
    assert "network" in str(caught.value)
    assert str(caught.value).count(". ") == 0


def test_says_where_cifar_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"CIFAR-10 was not found: set data\.root or .* CCTORCH_DATA"):
        datasets.load(Data(kind="cifar10"), 0)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"])
def test_damaged_idx_files_are_named(tmp_path: Path, name: str) -> None:
    file = write_dataset(tmp_path) / name
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=f"{name} is damaged"):
        datasets.load(_fashion(tmp_path), 0)
    write_idx(file, torch.zeros(4, 4))
    with pytest.raises(DataError, match=f"{name} is not an idx file"):
        datasets.load(_fashion(tmp_path), 0)
    if "labels" in name:
        file.unlink()
        with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte\.gz is missing"):
            datasets.load(_fashion(tmp_path), 0)


def test_empty_and_too_small_data_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "small", train=8)
    with pytest.raises(DataError, match=r"data\.validation = 8: expected less than the 8 training images"):
        datasets.load(_fashion(tmp_path / "small", validation=8), 0)
    write_dataset(tmp_path / "empty", train=0)
    with pytest.raises(DataError, match="holds 0 training and 40 test images"):
        datasets.load(_fashion(tmp_path / "empty"), 0)
    write_dataset(tmp_path / "odd")
    write_idx(tmp_path / "odd" / "train-labels-idx1-ubyte.gz", torch.zeros(5))
    with pytest.raises(DataError, match="96 images but 5 labels in train"):
        datasets.load(_fashion(tmp_path / "odd"), 0)


def test_a_folder_and_its_zip_hold_the_same_images(tmp_path: Path) -> None:
    root = _folder(tmp_path / "cifar10")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for file in root.rglob("*.png"):
            archive.write(file, file.relative_to(tmp_path))
    folder = datasets.load(Data(kind="cifar10", root=str(tmp_path), validation=0), 0)
    archived = datasets.load(Data(kind="cifar10", root=str(tmp_path / "x.zip"), validation=0), 0)
    assert torch.equal(folder.train.images, archived.train.images)
    assert folder.test.labels.tolist() == archived.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    pixels = numpy.asarray(Image.open(root / "test" / "ant" / "0001.png"))
    assert torch.equal(folder.test.images[1].permute(1, 2, 0), torch.tensor(pixels))


def test_the_cache_is_used_renewed_and_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _folder(tmp_path / "images")
    reads = []
    decode = datasets._decode
    monkeypatch.setattr(datasets, "_decode", lambda *arguments: reads.append(1) or decode(*arguments))
    first = datasets.load(_image_folder(root), 0)
    second = datasets.load(_image_folder(root), 0)
    assert len(reads) == 1
    assert torch.equal(first.train.images, second.train.images)
    [cache] = (tmp_path / "cache" / "cctorch").iterdir()
    cache.write_bytes(cache.read_bytes()[:100])
    assert torch.equal(datasets.load(_image_folder(root), 0).train.images, first.train.images)
    assert len(reads) == 2
    (root / "train" / "ant" / "0000.png").unlink()
    assert len(datasets.load(_image_folder(root), 0).train) == 5


def test_folders_that_can_not_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root = .*expected a folder"):
        datasets.load(_image_folder(tmp_path), 0)
    root = _folder(tmp_path / "images")
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, "png")
    (root / "train" / "zebra" / "0001.png").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match=r"train/zebra/0001\.png has shape \(9, 9, 3\), the others \(8, 8, 3\)"):
        datasets.load(_image_folder(root), 0)
    (root / "train" / "zebra" / "0001.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"train/zebra/0001\.png is no readable image"):
        datasets.load(_image_folder(root), 0)
    single = _image_folder(_folder(tmp_path / "single"))
    for part in ("train", "test"):
        for label in (tmp_path / "single" / part).iterdir():
            if label.name != "zebra":
                shutil.rmtree(label)
    with pytest.raises(DataError, match="has one class, 'zebra': expected two or more"):
        datasets.load(single, 0)
    (tmp_path / "x.zip").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"x\.zip is damaged"):
        datasets.load(_image_folder(tmp_path / "x.zip"), 0)


def _numbered(count: int) -> ImageSet:
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    return ImageSet(images.contiguous(), torch.arange(count))


def test_an_epoch_holds_every_image_once_in_an_order_of_its_own() -> None:
    batches = Batches(_numbered(50), 16, (0.0,) * 3, (1 / 255,) * 3)

    def order(seed: int, epoch: int) -> list[int]:
        content = list(batches.epoch(seed, epoch, augment=False))
        for images, labels in content:
            torch.testing.assert_close(images[:, 1, 3, 3], labels.float())
        return [label for _, labels in content for label in labels.tolist()]

    assert len(batches) == 4
    assert sorted(order(0, 0)) == list(range(50))
    assert order(0, 0) == order(0, 0) != order(0, 1) != order(1, 0)


def test_augmentation_follows_from_seed_and_epoch() -> None:
    images = ImageSet(torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8), torch.arange(20))
    batches = Batches(images, 20, (0.5,) * 3, (0.25,) * 3)
    first, again, other = (next(batches.epoch(0, epoch, augment=True))[0] for epoch in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first.sort(0).values, other.sort(0).values)


def test_crops_and_flips_like_one_image_at_a_time() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 8, 10), dtype=torch.uint8, generator=generator)
    top, left = torch.randint(0, 9, (2, 40), generator=generator)
    flip = torch.randint(0, 2, (40,), dtype=torch.bool, generator=generator)
    result = data.crop_and_flip(images, top, left, flip)
    for index in range(40):
        padded = numpy.pad(images[index].numpy(), ((0, 0), (4, 4), (4, 4)))
        window = padded[:, top[index] : top[index] + 8, left[index] : left[index] + 10]
        assert numpy.array_equal(result[index].numpy(), window[:, :, ::-1] if flip[index] else window)


def test_erases_a_box_of_some_images_and_nothing_else() -> None:
    images = ImageSet(torch.randint(0, 256, (400, 3, 16, 20), dtype=torch.uint8), torch.arange(400))
    batches = Batches(images, 150, (0.4, 0.5, 0.6), (0.25,) * 3)  # pixels of 255 * (0.4, 0.5, 0.6) are no integers
    whole, erased = (
        torch.cat([x for x, _ in batches.epoch(3, 1, augment=True, erasing=erasing)]) for erasing in (0.0, 0.6)
    )
    changed = (whole != erased).any(1)
    padding = whole == torch.tensor([-1.6, -2.0, -2.4]).view(-1, 1, 1)
    assert not padding.all(1)[changed].all()
    for before, after, pixels in zip(whole, erased, changed, strict=True):
        assert (after[:, pixels] == 0).all()
        assert torch.equal(before[:, ~pixels], after[:, ~pixels])
        rows, columns = pixels.any(1), pixels.any(0)
        assert torch.equal(pixels, rows[:, None] & columns)
        assert all(len(lengths) <= 3 for lengths in (rows.unique_consecutive(), columns.unique_consecutive()))
    assert 0.5 < changed.flatten(1).any(1).float().mean() < 0.7


def test_boxes_have_the_areas_and_shapes_of_random_erasing() -> None:
    count, sides = 40_000, (64, 80)
    top, left, height, width = data.boxes_to_erase(count, sides, 0.25, torch.Generator().manual_seed(0)).double()
    drawn = height > 0
    assert torch.equal(drawn, width > 0)
    assert drawn.double().mean() == pytest.approx(0.25, abs=0.01)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height).max() == 64
    assert (left + width).max() == 80
    area, ratio = (height * width)[drawn] / math.prod(sides), (height / width)[drawn]
    cut = (height[drawn] == 64) | (width[drawn] == 80)
    assert area.min() > 0.018
    assert area.max() < 0.34
    assert area[~cut].mean() == pytest.approx(0.175, abs=0.005)
    assert ratio.min() > 0.28
    assert ratio.max() < 3.6
    assert ratio.log().mean() == pytest.approx((math.log(0.3) + math.log(3.3)) / 2, abs=0.03)


def test_a_rank_erases_its_part_of_what_one_process_erases() -> None:
    images = ImageSet(torch.randint(1, 256, (24, 3, 8, 8), dtype=torch.uint8), torch.arange(24))
    batches = Batches(images, 10, (0.5,) * 3, (0.25,) * 3)
    whole = torch.cat([x for x, _ in batches.epoch(0, 0, augment=True, first=1, erasing=1.0)])
    ranks = [list(batches.sliced(rank, 2).epoch(0, 0, augment=True, first=1, erasing=1.0)) for rank in range(2)]
    assert torch.equal(whole, torch.cat([x for step in zip(*ranks, strict=True) for x, _ in step]))


@pytest.mark.parametrize("channels_last", [True, False])
def test_normalizes_as_torchvision_does(channels_last: bool) -> None:
    from torchvision.transforms import v2

    images = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    [(batch, _)] = Batches(ImageSet(images, torch.zeros(7)), 10, mean, std, channels_last)
    expected = v2.functional.normalize(v2.functional.to_dtype(images, torch.float32, scale=True), list(mean), list(std))
    torch.testing.assert_close(batch, expected)
    assert batch.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_head_takes_that_many_different_images() -> None:
    batches = Batches(_numbered(50), 16, (0.0,) * 3, (1.0,) * 3)
    labels = [label for _, labels in batches.head(20, 0) for label in labels.tolist()]
    assert len(set(labels)) == 20
    assert labels != list(range(20))
    assert len(batches.head(80, 0).images) == 50


def _resized(root: Path, **settings: object) -> Data:
    return Data.model_validate({"kind": "image_folder", "root": str(root), "size": 14, "validation": 0, **settings})


def _imagenet(root: Path, sizes: tuple[tuple[int, int], ...] = ((20, 16), (16, 40), (8, 8))) -> Path:
    """A bright square in the middle of dark images; the class is its colour."""
    for part in ("train", "val"):
        for channel, label in enumerate(("n01", "n02", "n03")):
            for number, (height, width) in enumerate(sizes):
                pixels = numpy.zeros((height, width, 3), dtype=numpy.uint8)
                pixels[height // 4 : -(height // 4), width // 4 : -(width // 4), channel] = 255
                file = root / part / label / f"{number}.JPEG"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(file, quality=95)
    return root


def test_images_of_any_size_are_scaled_and_cut_to_the_middle(tmp_path: Path) -> None:
    dataset = datasets.load(_resized(_imagenet(tmp_path)), 0)
    assert (dataset.shape, dataset.classes, len(dataset.train), len(dataset.test)) == ((3, 14, 14), 3, 9, 9)
    for images, label in zip(dataset.train.images, dataset.train.labels, strict=True):
        middle = images[:, 6:8, 6:8].float().mean((1, 2))
        assert int(middle.argmax()) == int(label)
        assert middle.max() > 200
    # By hand: 14 is 7/8 of 16, so that an image of 20 x 16 keeps its scale and loses 3 rows and 1 column on each side.
    with Image.open(tmp_path / "val" / "n01" / "0.JPEG") as image:
        expected = torch.from_numpy(numpy.asarray(image).copy()).permute(2, 0, 1)[:, 3:17, 1:15]
    assert any(torch.equal(images, expected) for images in dataset.test.images[dataset.test.labels == 0])


def test_only_as_many_images_as_asked_for_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    decode = image_folder._decoded
    monkeypatch.setattr(image_folder, "_decoded", lambda path, size: decoded.append(path) or decode(path, size))
    root = _imagenet(tmp_path)
    dataset = datasets.load(_resized(root, validation=1, limit_train=1, limit_test=1), 0)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test), len(decoded)) == (1, 1, 1, 3)
    # Two images can't show all classes.
    few = _resized(root, limit_train=1, limit_test=1)
    assert {datasets.load(few, seed).classes for seed in range(8)} == {3}
    again = datasets.load(_resized(root, validation=1, limit_train=1, limit_test=1), 0)
    assert torch.equal(again.train.images, dataset.train.images)
    share = datasets.load(_resized(root, validation=0.5, limit_train=2), 0)
    assert (len(share.train), len(share.validation)) == (2, 2)


def _png(width: bytes, kind: bytes = b"IHDR") -> bytes:
    header = kind + width + b"\0\1\0\0" + b"\x08\0\0\0\0"
    return b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + header + zlib.crc32(header).to_bytes(4, "big")


@pytest.mark.parametrize(
    "content", [_png(b"\0\1\0\0"), _png(b"\0\0\0\1", b"IH\0R"), b"\x89PNG\r\n\x1a\n\0\0\0\1IHDR\0"]
)
def test_no_image_is_too_odd_for_a_sentence(content: bytes) -> None:
    """Four billion pixels, a chunk without a name, a header that ends early: PIL has an exception for each."""
    with pytest.raises(ValueError, match="is no readable image"):
        as_rgb(io.BytesIO(content))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "I;16"])
def test_images_of_other_modes_show_the_same(mode: str) -> None:
    ramp = numpy.arange(0, 256, 4, dtype=numpy.uint8).reshape(8, 8)
    grey = Image.fromarray(ramp)
    image = Image.fromarray(ramp.astype(numpy.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "tiff")
    assert numpy.abs(numpy.asarray(as_rgb(buffer)).astype(int) - ramp[..., None]).max() <= 1


def test_what_is_wrong_with_a_folder_of_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no folder train"):
        datasets.load(_resized(tmp_path), 0)
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match=r"Couldn't find any class folder"):
        datasets.load(_resized(tmp_path), 0)
    root = _imagenet(tmp_path / "whole")
    (root / "val" / "n03").rename(root / "val" / "n04")
    with pytest.raises(DataError, match="class 'n03' is in only one of train and val"):
        datasets.load(_resized(root), 0)
    (root / "val" / "n04").rename(root / "val" / "n03")
    file = root / "train" / "n02" / "1.JPEG"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=r"n02/1\.JPEG is no readable image"):
        datasets.load(_resized(root), 0)
    with pytest.raises(ValueError, match="expected kind: image_folder"):
        Data.model_validate({"kind": "cifar10", "size": 32})
