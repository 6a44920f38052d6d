"""Quantized networks as codes of few bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import cctorch
import pytest
import torch
from cctorch import CompressionPlan, LayerPlan, MaskPlan
from cctorch import nn as cnn
from prepared import rebuilt, resnet8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize


def _assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name].to(value.dtype), value), name


def _trained(model: nn.Module) -> nn.Module:
    """Scales and weights somewhere else than where they start."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("mask", [None, MaskPlan("magnitude", 0.5)])
def test_the_state_is_that_of_the_converted_model(bits: int, mask: MaskPlan | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(45, 7), nn.BatchNorm1d(7))
    layers = [LayerPlan("0", "conv2d", 3, 5, mask=mask, bits=bits), LayerPlan("2", "linear", 45, 7, bits=bits)]
    cctorch.prepare(model, CompressionPlan(layers=layers))
    _trained(model)
    before = copy.deepcopy(model.state_dict())
    state = cctorch.quantized_state_dict(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    # By hand, in float64.
    scale = model[0].parametrizations.weight[-1].log_scale.detach().double().exp()  # type: ignore[union-attr,index]
    codes = (model[0].weight.detach().double() / scale.view(-1, 1, 1, 1)).round()
    assert codes.abs().max() <= 2 ** (bits - 1)
    torch.testing.assert_close(state["0.weight.scales"].double(), scale, rtol=1e-6, atol=0)
    assert state["0.weight.codes"].numel() == -(-codes.numel() * bits // 8)
    if bits == 8:
        assert torch.equal(state["0.weight.codes"].view(torch.int8), codes.flatten().to(torch.int8))
    assert state["0.weight.grid"].tolist() == [bits, 5, 3, 3, 3]
    assert state["3.running_mean"].shape == (7,)
    _assert_equal(cctorch.dequantized_state_dict(state), cctorch.convert(model).state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plan = CompressionPlan(layers=[LayerPlan("0", "linear", 40, 30, bits=5)])
    model = _trained(cctorch.prepare(nn.Sequential(nn.Linear(40, 30)).to(dtype), plan))
    state = cctorch.quantized_state_dict(model)
    assert state["0.weight.scales"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wanted = cctorch.convert(model).state_dict()
    _assert_equal(cctorch.dequantized_state_dict(state), wanted)
    plain = nn.Sequential(nn.Linear(40, 30)).to(dtype)
    plain.load_state_dict(cctorch.dequantized_state_dict(state))
    _assert_equal(dict(plain.state_dict()), wanted)


def test_a_rebuilt_network_through_a_file(tmp_path: Path) -> None:
    dense, plan, model = rebuilt(bits=6)
    x = torch.randn(2, 3, 16, 16)
    _trained(model)
    wanted = model.eval()(x)
    state = cctorch.quantized_state_dict(model)
    save_file(state, tmp_path / "codes.safetensors")
    again = cctorch.apply(copy.deepcopy(dense), plan).eval()
    again.load_state_dict(cctorch.dequantized_state_dict(load_file(tmp_path / "codes.safetensors")))
    assert torch.equal(again(x), wanted)


def test_what_is_on_no_grid_of_rows_is_stored_as_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    steps = [
        cnn.FakeQuant(4, axis=0, channels=8, groups=2),
        cnn.FakeQuant(4, axis=0, channels=8, offset=True),
        cnn.FakeQuant(4),
        cnn.FakeQuant(4, signed=False, axis=0, channels=8, init="minmax"),
        cnn.SoftThreshold(),
    ]
    for layer, step in zip(model, steps, strict=True):
        parametrize.register_parametrization(layer, "weight", step)
    model(torch.randn(2, 8))
    state = cctorch.quantized_state_dict(model)
    _assert_equal(state, cctorch.convert(model).state_dict())
    assert cctorch.dequantized_state_dict(state).keys() == state.keys()


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("first", [True, False])
def test_a_weight_that_convert_leaves_is_left(norm: Callable[[nn.Module], nn.Module], first: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)).eval()
    plan = CompressionPlan(
        layers=[LayerPlan("0", "linear", 8, 6, bits=4), LayerPlan("1", "linear", 6, 4, bits=4)],
    )
    if first:
        norm(model[0])
    cctorch.prepare(model, plan)
    if not first:
        norm(model[0])
    state = cctorch.quantized_state_dict(model)
    assert [name for name in state if name.endswith(".codes")] == ["1.weight.codes"]
    _assert_equal(cctorch.dequantized_state_dict(state), cctorch.convert(copy.deepcopy(model)).state_dict())


@pytest.mark.parametrize("log_scale", [-1000.0, -90.0, -87.0, 87.0, 90.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_scale_beyond_the_type_is_that_of_the_operator(log_scale: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plan = CompressionPlan(layers=[LayerPlan("0", "linear", 8, 3, bits=4)])
    model = cctorch.prepare(nn.Sequential(nn.Linear(8, 3)).to(dtype), plan)
    with torch.no_grad():
        model[0].parametrizations.weight[0].log_scale[1] = log_scale  # type: ignore[union-attr,index]
    state = cctorch.quantized_state_dict(model)
    limits = torch.finfo(dtype)
    wanted = torch.tensor(log_scale, dtype=dtype).exp().clamp(limits.tiny, limits.max)
    torch.testing.assert_close(state["0.weight.scales"][1], wanted, rtol=1e-6, atol=0)
    _assert_equal(cctorch.dequantized_state_dict(state), cctorch.convert(model).state_dict())


def test_a_model_without_quantization_is_its_state() -> None:
    model = resnet8("plain")
    _assert_equal(cctorch.quantized_state_dict(model), model.state_dict())


def test_a_damaged_state_is_refused() -> None:
    plan = CompressionPlan(layers=[LayerPlan("0", "linear", 16, 4, bits=4)])
    state = cctorch.quantized_state_dict(cctorch.prepare(nn.Sequential(nn.Linear(16, 4)), plan))
    with pytest.raises(ValueError, match=r"'0\.weight' has 31 bytes of codes, which is not what 4 bits and the shape"):
        cctorch.dequantized_state_dict({**state, "0.weight.codes": state["0.weight.codes"][:-1]})
    with pytest.raises(ValueError, match=r"'0\.weight' has a scale that is not positive and finite"):
        cctorch.dequantized_state_dict({**state, "0.weight.scales": -state["0.weight.scales"]})
