"""Runs of a network that draws random numbers in every step."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from cctorch import models
from cctorch.config import parse_config
from cctorch.report import page
from cctorch.run import run
from rich.console import Console
from safetensors.torch import load_file
from signalled import signalled_at
from spawned import spawn
from tiny_run import tree, write_dataset
from torch import Tensor, nn


def _with_dropout(in_channels: int, classes: int) -> nn.Module:
    network = models.ResNet(1, in_channels, classes)
    network.linear = nn.Sequential(nn.Dropout(0.5), network.linear)  # type: ignore[assignment]
    return network


def _run(settings: dict[str, Any], name: str) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models._NETWORKS, "resnet8", _with_dropout)
        patch.setattr(page, "render", lambda record: "")
        run(parse_config({**settings, "name": name}), console=Console(file=io.StringIO()))
    return load_file(Path(settings["output"]) / name / "checkpoints" / "compressed.safetensors")


def _broken(settings: dict[str, Any], stops: tuple[int, ...]) -> dict[str, Tensor]:
    """The last rank gets a signal at each of these numbers of steps since it was started."""
    for stop in stops:
        with signalled_at(stop):
            _run(settings, "broken")
    return _run(settings, "broken")


def _assert_a_broken_run_ends_like_a_whole_one(settings: dict[str, Any], stops: tuple[int, ...]) -> None:
    """Repair and distillation read the dense model, which draws weights on the way."""
    whole, broken = _run(settings, "whole"), _broken(settings, stops)
    assert whole.keys() == broken.keys()
    assert all(torch.equal(value, broken[name]) for name, value in whole.items())


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """80 images in batches of 27: two ranks have 13 and 14 of them."""
    content = tree(write_dataset(tmp_path / "data"), tmp_path)
    content["train"] |= {"batch_size": 27}
    content["finetune"] |= {"batch_size": 27, "distillation": {"weight": 0.9}}
    return content


def test_alone(settings: dict[str, Any]) -> None:
    _assert_a_broken_run_ends_like_a_whole_one(settings, (2, 5))


def test_on_two_ranks(settings: dict[str, Any], tmp_path: Path) -> None:
    spawn(2, tmp_path / "files", _assert_a_broken_run_ends_like_a_whole_one, settings, (2, 4))
