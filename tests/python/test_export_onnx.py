"""ONNX files with quantized weights and activations, run by ONNX Runtime."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import cctorch
import numpy as np
import pytest
import torch
from cctorch import CompressionPlan, LayerPlan, MaskPlan
from cctorch import regularize as r
from cctorch.export import save_program
from cctorch.export_onnx import save_onnx
from cctorch.nn import FakeQuant
from prepared import rebuilt, resnet8
from torch import Tensor, nn

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def _run(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [output] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(output)


def _content(path: Path) -> tuple[Counter[str], dict[str, np.ndarray[Any, Any]]]:
    graph = onnx.load(path).graph
    kinds = Counter(node.op_type for node in graph.node)
    return kinds, {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer}


@pytest.mark.parametrize("mask", [None, MaskPlan("nm", n=2, m=4)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_are_int8_with_a_scale_for_each_row(tmp_path: Path, bits: int, mask: MaskPlan | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 12)).eval()
    layers = [LayerPlan("0", "conv2d", 4, 8, mask=mask, bits=bits), LayerPlan("4", "linear", 128, 12, bits=bits)]
    cctorch.prepare(model, CompressionPlan(layers=layers))
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(3, 4, 6, 6)
    save_onnx(model, x[:2], tmp_path / "model.onnx")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    torch.testing.assert_close(_run(tmp_path / "model.onnx", x), model(x), rtol=1e-4, atol=1e-4)
    kinds, values = _content(tmp_path / "model.onnx")
    assert kinds["DequantizeLinear"] == 2
    assert not kinds.keys() & {"QuantizeLinear", "Round", "Clip", "Where"}
    codes = [value for value in values.values() if value.dtype == np.int8 and value.ndim > 1]
    assert sorted(value.shape for value in codes) == [(8, 4, 3, 3), (12, 128)]
    assert max(abs(int(value.min())) for value in codes) <= 2 ** (bits - 1)
    assert all(value.dtype != np.float32 or value.size <= 16 for value in values.values())


def test_activations_are_quantized_and_dequantized(tmp_path: Path) -> None:
    model = resnet8("quantized").eval()
    x = torch.randn(4, 3, 12, 12)
    save_onnx(model, x, tmp_path / "model.onnx")
    kinds, _ = _content(tmp_path / "model.onnx")
    layers = sum(isinstance(module, FakeQuant) and module.axis is None for module in model.modules())
    assert kinds["QuantizeLinear"] == layers > 5
    assert kinds["DequantizeLinear"] == 2 * layers
    wanted = model(x)
    # A sum that is rounded elsewhere may step to the next value.
    assert (_run(tmp_path / "model.onnx", x) - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize(("bits", "signed"), [(8, True), (8, False), (5, True), (3, False)])
def test_an_activation_is_on_its_grid(tmp_path: Path, bits: int, signed: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), FakeQuant(bits, signed=signed))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(16))
        model[0].bias.zero_()
    x = torch.randn(64, 16) * torch.logspace(-2, 1, 64).view(-1, 1)
    model(x)
    save_onnx(model, x, tmp_path / "model.onnx")
    torch.testing.assert_close(_run(tmp_path / "model.onnx", x), model.eval()(x), rtol=1e-6, atol=1e-7)


def test_other_grids_stay_in_floating_point(tmp_path: Path) -> None:
    torch.manual_seed(0)
    steps = (FakeQuant(4, axis=1, channels=16), FakeQuant(8, offset=True), FakeQuant(12))
    model = nn.Sequential(nn.Linear(16, 16), *steps)
    cctorch.prepare(model, CompressionPlan(layers=[LayerPlan("0", "linear", 16, 16, bits=12)]))
    x = torch.randn(64, 16)
    model(x)
    save_onnx(model, x, tmp_path / "model.onnx")
    assert not _content(tmp_path / "model.onnx")[0].keys() & {"QuantizeLinear", "DequantizeLinear"}
    torch.testing.assert_close(_run(tmp_path / "model.onnx", x), model.eval()(x), rtol=1e-2, atol=1e-2)


def test_a_rebuilt_network_from_its_codes(tmp_path: Path) -> None:
    _, _, model = rebuilt(bits=6)
    model.eval()
    x = torch.randn(2, 3, 16, 16)
    state = cctorch.quantized_state_dict(model)
    cctorch.convert(model)
    save_onnx(model, x, tmp_path / "model.onnx", codes=state)
    kinds, _ = _content(tmp_path / "model.onnx")
    assert kinds["DequantizeLinear"] == sum(name.endswith(".codes") for name in state) > 5
    torch.testing.assert_close(_run(tmp_path / "model.onnx", x), model(x), rtol=1e-3, atol=1e-4)
    written = (tmp_path / "model.onnx").read_bytes()
    assert not any(str(Path(place).parent).encode() in written for place in (cctorch.__file__, torch.__file__))
    assert len(written) < 2 * sum(value.nbytes for value in cctorch.quantized_state_dict(model).values())
    save_onnx(model, x, tmp_path / "plain.onnx")
    assert "DequantizeLinear" not in _content(tmp_path / "plain.onnx")[0]
    with torch.no_grad():
        next(model.parameters()).add_(1)
    before = (tmp_path / "model.onnx").read_bytes()
    with pytest.raises(ValueError, match="is not what the model has; expected codes of this model"):
        save_onnx(model, x, tmp_path / "model.onnx", codes=state)
    assert (tmp_path / "model.onnx").read_bytes() == before


def test_without_a_scale_it_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), FakeQuant(8))
    with pytest.raises(ValueError, match="save_onnx: FakeQuant '1' has no scale yet"):
        save_onnx(model, torch.randn(2, 4), tmp_path / "model.onnx")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    plan = CompressionPlan(layers=[LayerPlan("0", "linear", 4, 4, bits=4)])
    model = cctorch.prepare(nn.Sequential(nn.Linear(4, 4)).to(dtype), plan)
    with pytest.raises(ValueError, match=r"'0\.weight' is of torch\.float\d\d, expected float32; call float"):
        save_onnx(model, torch.randn(2, 4, dtype=dtype), tmp_path / "model.onnx")


def test_codes_of_other_layers_are_refused(tmp_path: Path) -> None:
    plan = CompressionPlan(layers=[LayerPlan("1", "linear", 4, 4, bits=4)])
    state = cctorch.quantized_state_dict(cctorch.prepare(nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), plan))
    with pytest.raises(ValueError, match=r"codes: '1\.weight' is not what the model has"):
        save_onnx(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), tmp_path / "model.onnx", codes=state)


def test_a_scale_below_the_least_float_is_that_of_the_operator(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), FakeQuant(8))
    x = torch.randn(8, 4)
    model(x)
    with torch.no_grad():
        model[1].log_scale.fill_(-200)
    save_onnx(model, x, tmp_path / "model.onnx")
    _, values = _content(tmp_path / "model.onnx")
    smallest = np.finfo(np.float32).tiny
    assert any(value.dtype == np.float32 and value.size == 1 and value.item() == smallest for value in values.values())


def test_what_runs_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = CompressionPlan(layers=[LayerPlan("0", "linear", 4, 4, bits=4)])
    model = cctorch.prepare(nn.Sequential(nn.Linear(4, 4)), plan)
    real = torch.onnx.export

    def other(program: Any, **options: Any) -> Any:
        return real(torch.export.export(nn.Linear(4, 4), (torch.randn(2, 4),)), **options)

    monkeypatch.setattr(torch.onnx, "export", other)
    with pytest.raises(ValueError, match="save_onnx: ONNX Runtime differs from the model by"):
        save_onnx(model, torch.randn(2, 4), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_outputs_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, None, int]:
            return self.layer(x), None, 3

    with pytest.raises(ValueError, match="save_onnx: the model gives 3 beside its tensors"):
        save_onnx(Counting(), torch.randn(2, 4), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    ("q", "convolutions"), [(r.SVD(ratio=2.0, view="spatial"), 4), (r.Tucker2(ratio=2.0), 6)], ids=["spatial", "tucker"]
)
def test_factors_of_every_layout(tmp_path: Path, q: r.Regularizer, convolutions: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1))
    x = torch.randn(2, 8, 9, 9)
    q.apply(model.named_parameters())
    model = cctorch.apply(model, r.plan(model, x, model.named_parameters(), q)).eval()
    save_onnx(model, x, tmp_path / "model.onnx")
    assert _content(tmp_path / "model.onnx")[0]["Conv"] == convolutions
    torch.testing.assert_close(_run(tmp_path / "model.onnx", x), model(x), atol=1e-4, rtol=1e-4)
    save_program(model, x, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(x), model(x))
