"""A trained model as a program that needs neither its source code nor cctorch."""

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree

from cctorch import atomic
from cctorch.modes import evaluating
from cctorch.nn import FakeQuant


def save_program(model: nn.Module, example: Tensor, path: str | Path) -> ExportedProgram:
    """Exports ``model`` in evaluation mode, writes it to ``path`` and returns it.

    The batch size is free where the model allows it, on CUDA up to 65,535; else it is that of ``example``, and a
    warning says so. The program consists of PyTorch's own operators. What was written is loaded and compared with the
    model before it takes the place of an older file. Load it with ``torch.export.load(path).module()``.

    Args:
        model: takes one tensor, batch first, and gives tensors in whatever structure; stays as it is.
        example: an input, on the model's device.
        path: conventionally ends in ``.pt2``.

    Raises:
        ValueError: an operator is left that is not PyTorch's, a :class:`~cctorch.nn.FakeQuant` has no scale yet, or the
            reloaded program computes something else.
    """
    with evaluating(model):
        program = exported(model, example, "save_program")
        _check_operators(program)
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        data = buffer.getvalue()
        _check_reloaded(data, example, model(example))
    atomic.write(Path(path), data)
    return program


def exported(model: nn.Module, example: Tensor, function: str) -> ExportedProgram:
    """`model`, which is in evaluation mode, without operators of cctorch, but for those that have no decomposition.

    Raises ValueError, in the name of `function`, where a FakeQuant has no scale yet: each call of the program would
    take that of its own input.
    """
    waiting = [
        name for name, module in model.named_modules() if isinstance(module, FakeQuant) and not module.initialized
    ]
    if waiting:
        raise ValueError(
            f"{function}: FakeQuant {', '.join(map(repr, waiting))} has no scale yet; run the model on a batch of "
            "data, or call initialize(x)"
        )
    program: ExportedProgram = _traced(model, example).run_decompositions(_decompositions())
    # Where in which source file each operator came from: paths of this machine, and a good part of a small file.
    for graph in program.graph_module.modules():
        for node in graph.graph.nodes if isinstance(graph, fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def _traced(model: nn.Module, example: Tensor) -> ExportedProgram:
    # Export takes a batch of 1 for a constant.
    batch = torch.cat([example, example]) if example.shape[0] == 1 else example
    # Above, batch normalization on CUDA takes another kernel, which would be another program.
    limit = 65535 if example.is_cuda else None
    try:
        return torch.export.export(model, (batch,), dynamic_shapes=({0: Dim("batch", min=1, max=limit)},), strict=False)
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:200]
        warnings.warn(
            f"{type(model).__name__} is exported for batches of {example.shape[0]} only: {reason}", stacklevel=3
        )
        return torch.export.export(model, (example,), strict=False)


def _decompositions() -> dict[Any, Callable[..., Tensor | tuple[Tensor, ...]]]:
    # The low-rank ones too: run_decompositions() keeps composite operators of other libraries as they are.
    library = torch.ops.cctorch
    return {
        library.fake_quant.default: _fake_quant,
        library.fake_quant_offset.default: _fake_quant_offset,
        library.fake_quant_groups.default: _fake_quant_groups,
        library.pact.default: _pact,
        library.fp8_quant.default: _fp8_quant,
        library.apply_mask.default: _apply_mask,
        library.channel_gate.default: _channel_gate,
        library.soft_threshold.default: _soft_threshold,
        library.sigmoid_gate.default: _sigmoid_gate,
        library.hard_concrete.default: _hard_concrete,
        library.low_rank_linear.default: _low_rank_linear,
        library.low_rank_conv2d.default: _low_rank_conv2d,
        library.low_rank_lstm.default: _low_rank_lstm,
        library.tucker2_conv2d.default: _tucker2_conv2d,
    }


def _fake_quant(
    x: Tensor, log_scale: Tensor, qmin: int, qmax: int, axis: int | None = None, grad_scale: float = 1.0
) -> Tensor:
    scale = _along(x, positive(log_scale), axis)
    return ((x / scale).round().clamp(qmin, qmax) * scale).to(x.dtype)


def positive(logarithm: Tensor) -> Tensor:
    """The scale that an operator has for its logarithm."""
    limits = torch.finfo(logarithm.dtype)
    return logarithm.exp().clamp(limits.tiny, limits.max)


def _along(x: Tensor, parameter: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return parameter
    shape = [1] * x.dim()
    shape[axis] = -1
    return parameter.view(shape)


def _fake_quant_offset(
    x: Tensor,
    log_scale: Tensor,
    offset: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    grad_scale: float = 1.0,
) -> Tensor:
    offset = _along(x, offset, axis)
    return (_fake_quant(x - offset, log_scale, qmin, qmax, axis) + offset).to(x.dtype)


def _fake_quant_groups(
    x: Tensor,
    log_scale: Tensor,
    qmin: int,
    qmax: int,
    group_size: int,
    grad_scale: float = 1.0,
    offset: Tensor | None = None,
) -> Tensor:
    groups = x.reshape(-1, group_size)
    if offset is None:
        return _fake_quant(groups, log_scale.reshape(-1), qmin, qmax, 0).view(x.shape)
    return _fake_quant_offset(groups, log_scale.reshape(-1), offset.reshape(-1), qmin, qmax, 0).view(x.shape)


def _pact(x: Tensor, log_alpha: Tensor, bits: int, axis: int | None = None) -> Tensor:
    levels = 2**bits - 1
    scale: Tensor = (_along(x, positive(log_alpha), axis) / levels).clamp_min(torch.finfo(log_alpha.dtype).tiny)
    return ((x / scale).round().clamp(0, levels) * scale).to(x.dtype)


def _fp8_quant(
    x: Tensor,
    log_scale: Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    axis: int | None = None,
    grad_scale: float = 1.0,
) -> Tensor:
    scale = _along(x, positive(log_scale), axis)
    largest = torch.finfo(dtype).max
    v = (x / scale).clamp(-largest, largest)
    return (v.to(dtype).to(v.dtype) * scale).to(x.dtype)


def _apply_mask(weight: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, weight, torch.zeros_like(weight))


def _channel_gate(x: Tensor, gate: Tensor) -> Tensor:
    return x * gate.view(1, -1, *[1] * (x.dim() - 2))


def _soft_threshold(x: Tensor, threshold: Tensor, axis: int | None = None) -> Tensor:
    if axis is not None:
        shape = [1] * x.dim()
        shape[axis] = -1
        threshold = threshold.view(shape)
    return (x.sign() * (x.abs() - threshold).relu()).to(x.dtype)


def _sigmoid_gate(x: Tensor, logit: Tensor, temperature: float = 1.0) -> Tensor:
    return _channel_gate(x, torch.sigmoid(logit / temperature))


def _hard_concrete(
    log_alpha: Tensor,
    training: bool,
    beta: float = 2 / 3,
    gamma: float = -0.1,
    zeta: float = 1.1,
    generator: torch.Generator | None = None,
) -> Tensor:
    logit = log_alpha
    if training:
        u = torch.rand(log_alpha.shape, generator=generator, dtype=log_alpha.dtype, device=log_alpha.device)
        logit = (u.log() - (-u).log1p() + log_alpha) / beta
    return (torch.sigmoid(logit) * (zeta - gamma) + gamma).clamp(0, 1)


def _low_rank_linear(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(F.linear(x, first), second, bias)


def _low_rank_conv2d(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    # Of a dimension they act where the kernel extends: in `second` where that does, else in `first`.
    outer = [size > 1 for size in second.shape[2:]]

    def part(of: tuple[int, int], idle: int, outside: bool) -> list[int]:
        return [value if o == outside else idle for o, value in zip(outer, of, strict=True)]

    narrow = F.conv2d(x, first, None, part(stride, 1, False), part(padding, 0, False), part(dilation, 1, False))
    return F.conv2d(narrow, second, bias, part(stride, 1, True), part(padding, 0, True), part(dilation, 1, True))


def _low_rank_lstm(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: list[Tensor],
    weight_hh: list[Tensor],
    weight_hr: list[Tensor],
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    if batch_sizes is not None:
        raise ValueError("save_program: a packed sequence has as many steps as its values say, expected a padded one")

    def product(y: Tensor, weight: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
        for factor in weight[:-1]:
            y = F.linear(y, factor)
        return F.linear(y, weight[-1], bias)

    steps = list(product(x, weight_ih, bias_ih).unbind(0))
    outputs = []
    for step in reversed(steps) if reverse else steps:
        i, f, g, o = (step + product(h, weight_hh, bias_hh)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        if weight_hr:
            h = product(h, weight_hr)
        outputs.append(h)
    return torch.stack(outputs[::-1] if reverse else outputs), h, c


def _tucker2_conv2d(
    x: Tensor,
    first: Tensor,
    core: Tensor,
    second: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    return _low_rank_conv2d(F.conv2d(x, first), core, second, bias, stride, padding, dilation)


def _check_operators(program: ExportedProgram) -> None:
    names = set()
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                if isinstance(node.target, torch._ops.OpOverload):
                    names.add(node.target._schema.name)
    foreign = sorted(name for name in names if not name.startswith(("aten::", "prim::", "higher_order")))
    if foreign:
        way_out = "; on weights, write them in with remove_parametrizations of torch.nn.utils.parametrize"
        raise ValueError(
            f"save_program: the program needs {', '.join(foreign)}, which is not part of PyTorch"
            + (way_out if any(name.startswith("cctorch::") for name in foreign) else "")
        )


def _check_reloaded(data: bytes, example: Tensor, expected: object) -> None:
    found, found_structure = _pytree.tree_flatten(torch.export.load(io.BytesIO(data)).module()(example))
    wanted, structure = _pytree.tree_flatten(expected)
    if found_structure != structure:
        raise ValueError(f"save_program: the reloaded program gives {found_structure}, expected {structure}")
    for reloaded, output in zip(found, wanted, strict=True):
        if isinstance(output, Tensor):
            # On CUDA products of float32 may be those of TF32, which keeps as many bits as float16.
            exact = output.dtype == torch.float32 and not output.is_cuda
            tolerance = 1e-9 if output.dtype == torch.float64 else 1e-4 if exact else 2e-2
            check_close("save_program: the reloaded program", reloaded, output, tolerance)
        elif reloaded != output:
            raise ValueError(f"save_program: the reloaded program gives {reloaded!r}, expected {output!r}")


def check_close(which: str, reloaded: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raises ValueError where they differ by more than `tolerance` times the largest value, or 1 if that is larger."""
    wide = torch.promote_types(expected.dtype, torch.float64)
    found, wanted = reloaded.to(wide), expected.to(wide)
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    largest = torch.where(wanted.isfinite(), wanted, 0).abs().amax() if wanted.numel() else 0.0
    allowed = tolerance * max(1.0, float(largest))
    error = (found - wanted)[~same].abs()
    if not bool((error <= allowed).all()):
        raise ValueError(f"{which} differs from the model by {error.max().item():.3g}, expected {allowed:.3g}")
