from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import yaml
from cctorch import apply, compress, models
from cctorch.config import load_config
from cctorch.graph import trace
from cctorch.models import CheckpointError
from networks import counted_macs, projected

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(("name", "parameters"), [("resnet20", 269722), ("resnet32", 464154), ("resnet56", 853018)])
def test_sizes_are_the_published_ones(name: str, parameters: int) -> None:
    assert sum(parameter.numel() for parameter in models.create(name).parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("resnet56", 125.49),
        ("resnet110", 252.89),
        ("densenet40", 282.92),
        ("googlenet", 1520),
        # 313.73 M in papers, which add 0.28 M for the biases; ours are those of the products alone.
        ("vgg16", 313.73 - 0.28),
        ("mobilenet_v2", 300),
        ("resnet50", 4100),
    ],
)
def test_multiply_accumulates_are_the_published_ones(name: str, published: float) -> None:
    large = name in ("mobilenet_v2", "resnet50")
    model = models.create(name, 3, 1000 if large else 10).eval()
    side = 224 if large else 32
    counted = counted_macs(model, torch.rand(1, 3, side, side))
    assert counted / 1e6 == pytest.approx(published, rel=0.003)


def test_densenet_passes_on_what_it_reads() -> None:
    layer = models.DenseNet(1, 4).eval().blocks[0]
    x = torch.rand(2, 8, 5, 5)
    y = layer(x)
    assert torch.equal(y[:, :8], x)
    bn = layer.bn
    scaled = (x - bn.running_mean.view(-1, 1, 1)) / (bn.running_var.view(-1, 1, 1) + bn.eps).sqrt()
    torch.testing.assert_close(y[:, 8:], torch.nn.functional.conv2d(scaled.clamp_min(0), layer.conv.weight, padding=1))


def test_networks_of_imagenet_refuse_other_channels() -> None:
    with pytest.raises(ValueError, match="'resnet50': its images have 3 channels, but the data set's have 1"):
        models.create("resnet50", 1)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_networks_of_configurations_are_followed_and_compressed(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("CCTORCH_WEIGHTS", "CCTORCH_IMAGENET"):
        monkeypatch.setenv(variable, str(tmp_path))
    if weights := yaml.safe_load(path.read_text())["model"].get("weights"):
        (tmp_path / Path(weights).name).touch()
    config = load_config(path)
    assert config.compress is not None
    torch.manual_seed(0)
    channels = 1 if config.data.kind == "fashion_mnist" else 3
    model = models.create(config.model.name, channels, 7).eval()
    images = torch.randn(2, channels, 32, 32)
    graph = trace(model, images)
    assert graph.warnings == []
    gradients = {spec.name: torch.randn_like(model.get_submodule(spec.name).weight) for spec in graph.specs}
    target = config.compress.target
    # Coarse steps: the plan need not be good.
    found = compress(model, [], images, target=target, gradients=gradients, step_fraction=0.25)
    assert target <= found.final_reduction <= target + 0.05
    with torch.no_grad():
        expected = projected(copy.deepcopy(model), found.plan)(images)
        compressed = apply(copy.deepcopy(model), found.plan)
        torch.testing.assert_close(compressed(images), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert counted_macs(compressed, images) == found.final_macs


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
