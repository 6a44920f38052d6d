from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from cctorch import models
from cctorch.models import CheckpointError


@pytest.mark.parametrize(("name", "parameters"), [("resnet20", 269722), ("resnet32", 464154), ("resnet56", 853018)])
def test_sizes_are_the_published_ones(name: str, parameters: int) -> None:
    assert sum(parameter.numel() for parameter in models.create(name).parameters()) == parameters


def test_a_shortcut_takes_every_other_pixel_and_adds_zero_channels() -> None:
    block = models.BasicBlock(4, 8, 2).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 4, 6, 6)
    expected = torch.zeros(2, 8, 3, 3)
    expected[:, 2:6] = x[:, :, ::2, ::2]
    torch.testing.assert_close(block(x), expected, rtol=0, atol=0)


def test_takes_other_channels_and_classes() -> None:
    assert models.create("resnet8", 1, 7)(torch.rand(2, 1, 12, 12)).shape == (2, 7)
    with pytest.raises(ValueError, match=r"'resnet9': expected one of resnet8"):
        models.create("resnet9")


@pytest.mark.parametrize("wrapped", [True, False])
def test_loads_published_names(tmp_path: Path, wrapped: bool) -> None:
    source, target = models.create("resnet8"), models.create("resnet8")
    state = {f"module.{key}": value for key, value in source.state_dict().items() if "num_batches" not in key}
    file = tmp_path / "weights.th"
    torch.save({"state_dict": state, "best_prec1": 91.0} if wrapped else state, file)
    models.load_weights(target, file)
    for old, new in zip(source.parameters(), target.parameters(), strict=True):
        assert torch.equal(old, new)


def test_another_architecture_is_named(tmp_path: Path) -> None:
    file = tmp_path / "resnet20.th"
    torch.save(models.create("resnet20").state_dict(), file)
    model = models.create("resnet8")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"resnet20\.th is .* another architecture: layer1\.1\.conv1\.weight is unkno"
    ):
        models.load_weights(model, file)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.save(models.create("resnet8", classes=3).state_dict(), file)
    with pytest.raises(CheckpointError, match=r"linear\.weight has shape \(3, 64\), expected \(10, 64\)"):
        models.load_weights(model, file)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path: Path, share: float) -> None:
    file = tmp_path / "weights.th"
    torch.save(models.create("resnet8").state_dict(), file)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"weights\.th is damaged"):
        models.load_weights(models.create("resnet8"), file)


class _Code:
    pass


def test_refuses_objects_and_what_is_no_state_dict(tmp_path: Path) -> None:
    file = tmp_path / "weights.th"
    torch.save({"state_dict": _Code()}, file)
    with pytest.raises(CheckpointError, match="more than tensors and plain values"):
        models.load_weights(models.create("resnet8"), file)
    torch.save([1, 2], file)
    with pytest.raises(CheckpointError, match="holds no state dict"):
        models.load_weights(models.create("resnet8"), file)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        models.load_weights(models.create("resnet8"), tmp_path / "nowhere.th")


@pytest.mark.skipif("CCTORCH_WEIGHTS" not in os.environ, reason="needs the published weights in CCTORCH_WEIGHTS")
@pytest.mark.parametrize("file", ["resnet20-12fca82f.th", "resnet32-d509ac18.th", "resnet56-4bfd9763.th"])
def test_loads_the_published_weights(file: str) -> None:
    models.load_weights(models.create(file.split("-")[0]), Path(os.environ["CCTORCH_WEIGHTS"]) / file)
