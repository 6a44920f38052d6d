"""Whatever happens to a file, or to the disk while it is written: a clear error or the right data."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import h5py
import pytest
import torch
from cctorch import CompressionPlan, checkpoint
from cctorch.checkpoint import CheckpointError, codec, index, overlap, parts
from cctorch.checkpoint.predict import Prediction
from torch import Tensor


def _tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pruned = torch.randn(64, 64, generator=generator)
    pruned[pruned.abs() < 1] = 0
    return {
        "conv.weight": torch.randn(40, 40, generator=generator),
        "pruned": pruned,
        "half": torch.randn(60, 40, generator=generator).half(),
        "bias": torch.randn(40, generator=generator),
        "steps": torch.tensor(12),
    }


@pytest.fixture
def written(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "file.h5", _tensors(), plan=CompressionPlan("by hand"), error_bound=0.05)
    return tmp_path / "file.h5"


def _same(found: checkpoint.Checkpoint, wanted: checkpoint.Checkpoint) -> bool:
    return (
        found.plan == wanted.plan
        and found.index == wanted.index
        and all(torch.equal(found.tensors[name], tensor) for name, tensor in wanted.tensors.items())
    )


def test_no_flipped_byte_goes_unnoticed(written: Path) -> None:
    content = written.read_bytes()
    wanted = checkpoint.load(written)
    raised = 0
    # Every fifth byte, each time another.
    chosen = random.Random(0)
    for place in range(0, len(content) - 5, 5):
        damaged = bytearray(content)
        damaged[place + chosen.randrange(5)] ^= chosen.randrange(1, 256)
        written.write_bytes(damaged)
        try:
            found = checkpoint.load(written)
        except CheckpointError:
            raised += 1
        else:
            assert _same(found, wanted), place
    assert raised > 0.7 * len(content) / 5  # the others hit what fills up the slots


def test_damage_to_a_tensor_names_it(written: Path) -> None:
    found = checkpoint.info(written).tensors["conv.weight"]
    with h5py.File(written) as opened:
        place = opened[found.values.path].id.get_chunk_info(0).byte_offset
    content = bytearray(written.read_bytes())
    content[place + found.stored // 2] ^= 1
    written.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"file\.h5: tensor 'conv\.weight' is damaged \(the checksum"):
        checkpoint.load(written)
    assert torch.equal(checkpoint.load(written, names=["bias"]).tensors["bias"], _tensors()["bias"])


def test_no_truncated_file_is_taken(written: Path) -> None:
    content = written.read_bytes()
    for length in [*range(0, len(content), 97), len(content) - 1]:
        written.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="copy it again"):
            checkpoint.load(written)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "none.h5")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CheckpointError, match="is not an HDF5 file"):
        checkpoint.load(tmp_path / "text")
    with h5py.File(tmp_path / "other.h5", "w") as opened:
        opened["x"] = 1
    with pytest.raises(CheckpointError, match="has no index or plan that can be read"):
        checkpoint.info(tmp_path / "other.h5")


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "FORMAT", 2)
    checkpoint.save(tmp_path / "file.h5", _tensors())
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 2, this version of cctorch reads format 1"):
        checkpoint.load(tmp_path / "file.h5")


def test_a_codec_that_decodes_to_other_values_is_noticed(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = codec.Pipeline.decode
    monkeypatch.setattr(codec.Pipeline, "decode", lambda *arguments: decode(*arguments) + 1)
    with pytest.raises(CheckpointError, match=r"'conv\.weight' is damaged \(chunk 0 decodes to other values"):
        checkpoint.load(written)


@pytest.mark.parametrize("tail", [b"x", b"abcdefgh", bytes(100)])
def test_what_a_filter_refuses_is_an_error(tail: bytes) -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)).numpy()
    filters = codec.pipeline("zstd", 0.0, values.dtype, values.size)
    with pytest.raises(codec.CodecError, match="HDF5 filter 32015 refused"):
        filters.decode(filters.encode(values, 0) + tail, 0, values.dtype)


def test_an_unknown_codec_is_named(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_plugins", lambda: {})
    codec._plugin.cache_clear()
    with pytest.raises(CheckpointError, match=r"'conv\.weight' is damaged \(HDF5 filter 32015 is unknown"):
        checkpoint.load(written)


@pytest.mark.parametrize("call", ["pwrite", "fsync", "fdatasync"])
def test_a_full_disk_leaves_the_old_file(written: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    before = written.read_bytes()

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    monkeypatch.setattr(overlap, "_SYNC_BYTES", 1000)
    with pytest.raises(OSError, match=r"the disk is full: .* bytes before compression did not fit; the old file is"):
        checkpoint.save(written, _tensors())
    assert written.read_bytes() == before
    assert list(written.parent.iterdir()) == [written]


def test_a_full_disk_in_the_hands_of_hdf5_leaves_the_old_file(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written.read_bytes()

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(OSError, match="the disk is full"):
        checkpoint.save(written, _tensors())
    assert written.read_bytes() == before
    assert list(written.parent.iterdir()) == [written]


def test_an_interruption_leaves_the_old_file(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written.read_bytes()

    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(written, _tensors())
    assert written.read_bytes() == before
    assert list(written.parent.iterdir()) == [written]


def test_short_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, place: write(descriptor, data[:100], place))
    checkpoint.save(tmp_path / "file.h5", _tensors(), codec="zstd")
    assert all(
        torch.equal(found, _tensors()[name]) for name, found in checkpoint.load(tmp_path / "file.h5").tensors.items()
    )


@pytest.mark.parametrize("predicted", [1, 500, 1_000_000])
def test_what_does_not_fit_goes_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, predicted: int) -> None:
    monkeypatch.setattr(parts, "predict", lambda *_: Prediction(predicted, 1e-3))
    big = torch.randn(3000, 1000, generator=torch.Generator().manual_seed(1))
    tensors = {**_tensors(), "big": big}
    report = checkpoint.save(tmp_path / "file.h5", tensors, codec="zstd")
    found = checkpoint.load(tmp_path / "file.h5")
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
    pieces = [piece for record in found.index.tensors.values() for piece in record.pieces]
    assert report.chunks == len(pieces)
    assert report.overflowed == sum(piece.overflowed for piece in pieces)
    assert [piece.overflowed for piece in pieces] == [piece.stored + 8 > piece.slot for piece in pieces]
    assert (report.overflowed == 0) == (predicted == 1_000_000 and max(piece.stored for piece in pieces) < 1_000_000)
    assert all(piece.predicted == predicted for piece in pieces)
    with h5py.File(tmp_path / "file.h5") as opened:
        assert (opened["tensors/big"][()] == big.flatten().numpy()).all()


def test_a_codec_that_breaks_its_bound_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = codec.Pipeline.encode
    monkeypatch.setattr(
        codec.Pipeline,
        "encode",
        lambda self, values, mask: encode(self, values * (1 + (self.lossy and mask == 1)), mask),
    )
    tensors = {"x": torch.randn(200, 100, generator=torch.Generator().manual_seed(1)), "steps": torch.arange(4)}
    report = checkpoint.save(tmp_path / "file.h5", tensors)
    monkeypatch.undo()
    found = checkpoint.load(tmp_path / "file.h5")
    assert torch.equal(found.tensors["x"], tensors["x"])
    assert (report.lossless_instead, report.overflowed, report.chunks) == (1, 1, 1)
    assert found.index.tensors["x"].pieces[0].lossless
    assert found.index.tensors["x"].max_error == 0
    with h5py.File(tmp_path / "file.h5") as opened:
        assert (opened["tensors/x"][()] == tensors["x"].flatten().numpy()).all()
