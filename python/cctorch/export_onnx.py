"""A trained model as an ONNX file, quantized weights and activations as QuantizeLinear and DequantizeLinear."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

# Registers the operators that stand for QuantizeLinear and DequantizeLinear in an exported program.
import torch.ao.quantization.fx._decomposed
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree

from cctorch import _C, atomic
from cctorch.codes import quantized_state_dict
from cctorch.export import check_close, exported, positive
from cctorch.modes import evaluating
from cctorch.nn import FakeQuant
from cctorch.prepare import convert

_INT8 = {"quant_min": -128, "quant_max": 127, "dtype": torch.int8}
_UINT8 = {"quant_min": 0, "quant_max": 255, "dtype": torch.uint8}


def save_onnx(
    model: nn.Module, example: Tensor, path: str | Path, *, codes: Mapping[str, Tensor] | None = None
) -> None:
    """Writes ``model``, in evaluation mode, as ONNX. Needs ``pip install cctorch[onnx]``.

    Weights of up to 8 bits are int8, with a scale for each output channel, and a ``DequantizeLinear`` behind them. An
    activation's :class:`~cctorch.nn.FakeQuant` of up to 8 bits and one scale is ``QuantizeLinear`` and
    ``DequantizeLinear``, behind a ``Clip`` where the bits are fewer than 8; other ones are divided, rounded and clipped
    in floating point. Factors and masks are folded in, as :func:`convert` does it. What was written is run by ONNX
    Runtime and compared with the model before it takes the place of an older file. That is without ONNX Runtime's
    optimizations: its fused products of quantized weights round elsewhere, and may be accurate to three digits only.

    Args:
        model: prepared or converted, of float32; takes one tensor, batch first. It stays as it is.
        example: an input, on the model's device. The batch size is free where the model allows it.
        path: conventionally ends in ``.onnx``.
        codes: for a converted model, its :func:`quantized_state_dict`, of which a run's ``compressed.safetensors`` is
            one. Of a prepared model it is known.

    Raises:
        ValueError: a :class:`~cctorch.nn.FakeQuant` has no scale yet, the codes are those of other weights, an output
            is neither tensor nor None, or ONNX Runtime computes something else.
        ImportError: onnx, onnxscript or onnxruntime is missing.
    """
    _check_installed()
    state = dict(codes) if codes is not None else quantized_state_dict(model)
    deployed = convert(copy.deepcopy(model)).cpu()
    _put_codes(deployed, state)
    activations = _put_activations(deployed)
    example = example.cpu()
    with evaluating(deployed):
        program = exported(deployed, example, "save_onnx")
        expected = deployed(example)
        _expect_tensors(expected)
        onnx = torch.onnx.export(program, dynamo=True, verbose=False)
        assert onnx is not None
        data = _serialized(onnx.model_proto)
        _check_run(data, example, expected, 2e-2 if activations else 1e-4)
    atomic.write(Path(path), data)


def _expect_tensors(outputs: Any) -> None:
    others = [value for value in _pytree.tree_leaves(outputs) if value is not None and not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"save_onnx: the model gives {others[0]!r} beside its tensors, for which ONNX has no output; export a "
            "module whose forward returns tensors alone"
        )


def _serialized(proto: Any) -> bytes:
    """Without PyTorch's notes of what each operator was: they take more bytes than a small network's weights."""
    graph = proto.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
    data: bytes = proto.SerializeToString()
    return data


class _Dequantize(nn.Module):
    def __init__(self, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", torch.zeros(len(scales), dtype=torch.int64))

    def forward(self, codes: Tensor) -> Tensor:
        value: Tensor = torch.ops.quantized_decomposed.dequantize_per_channel(
            codes, self.scales, self.zeros, 0, **_INT8
        )
        return value


class _QuantizeDequantize(nn.Module):
    """Of an activation, with one scale."""

    def __init__(self, quant: FakeQuant) -> None:
        super().__init__()
        self.scale = float(positive(quant.log_scale.detach()))
        self.low, self.high = quant.qmin * self.scale, quant.qmax * self.scale
        self.clips, self.grid = quant.bits < 8, _INT8 if quant.signed else _UINT8

    def forward(self, x: Tensor) -> Tensor:
        if self.clips:
            x = x.clamp(self.low, self.high)
        ops = torch.ops.quantized_decomposed
        value: Tensor = ops.dequantize_per_tensor(
            ops.quantize_per_tensor(x, self.scale, 0, **self.grid), self.scale, 0, **self.grid
        )
        return value


def _put_codes(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """In place of the weights of `model`, which they have to equal."""
    values, weights = _C.decode_weights(dict(state)), dict(model.named_parameters(remove_duplicate=False))
    for key in state:
        name = key.removesuffix(".codes")
        if name == key or name not in values or int(state[f"{name}.grid"][0]) > 8:
            continue
        path, _, kind = name.rpartition(".")
        weight = weights.get(name)
        if weight is None or not torch.equal(weight, values[name].to(weight.dtype)):
            raise ValueError(f"save_onnx: codes: '{name}' is not what the model has; expected codes of this model")
        if weight.dtype != torch.float32:
            raise ValueError(f"save_onnx: '{name}' is of {weight.dtype}, expected float32; call float() on the model")
        module = model.get_submodule(path)
        del module._parameters[kind]
        scales = state[f"{name}.scales"].float().cpu()
        rounded = (values[name] / state[f"{name}.scales"].view(-1, *[1] * (values[name].dim() - 1))).round()
        module.register_buffer(kind, rounded.to(torch.int8))
        parametrize.register_parametrization(module, kind, _Dequantize(scales), unsafe=True)


def _put_activations(model: nn.Module) -> bool:
    """Whether there are any."""
    found = [module for module in model.modules() if isinstance(module, FakeQuant)]
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, FakeQuant) and child.initialized and _is_plain(child):
                setattr(parent, name, _QuantizeDequantize(child))
    return bool(found)


def _is_plain(quant: FakeQuant) -> bool:
    return quant.axis is None and quant.offset is None and quant.bits <= 8


def _check_installed() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"save_onnx needs {error.name}: pip install cctorch[onnx]") from error


def _check_run(data: bytes, example: Tensor, expected: Any, tolerance: float) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # As it is written: fused integer products round elsewhere.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    wanted = [value for value in _pytree.tree_leaves(expected) if isinstance(value, Tensor)]
    for found, value in zip(outputs, wanted, strict=True):
        check_close("save_onnx: ONNX Runtime", torch.from_numpy(found), value, tolerance)
