"""Carries out a compression plan: rebuilds the layers smaller."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cctorch import _C
from cctorch._C import CompressionPlan, LayerPlan
from cctorch.described import describe, describe_plan, fits
from cctorch.graph.lstm import module_of
from cctorch.graph.model_graph import is_hooked, owners, runs_its_own_forward
from cctorch.nn import BatchNorm2d, Constant, GatherChannels, LowRankConv2d, LowRankLinear, LowRankLSTM
from cctorch.plan import check_plan

_KINDS: dict[str, type[nn.Module]] = {
    "conv2d": nn.Conv2d,
    "depthwise_conv2d": nn.Conv2d,
    "linear": nn.Linear,
    "batch_norm2d": nn.BatchNorm2d,
    "lstm": nn.LSTM,
}


def apply(model: nn.Module, plan: CompressionPlan, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Rebuilds the layers of ``model`` that ``plan`` names, in place, and returns it.

    A layer keeps the rows ``kept_out`` and the columns ``kept_in`` of its weight; one with a ``rank`` becomes a
    :class:`~cctorch.nn.LowRankConv2d` of the plan's ``layout`` or a :class:`~cctorch.nn.LowRankLinear`, of the
    truncated SVD or Tucker-2, an ``nn.LSTM`` of which a weight has one a :class:`~cctorch.nn.LowRankLSTM`; one with a
    ``gather`` is wrapped in :class:`~cctorch.nn.GatherChannels`; one without ``kept_in``, of a removed residual branch,
    becomes a :class:`~cctorch.nn.Constant` of its bias; every ``nn.BatchNorm2d`` becomes a
    :class:`~cctorch.nn.BatchNorm2d`, a class of its own: a model that asks ``type(m) is nn.BatchNorm2d``, in place of
    ``isinstance``, computes something else then, and :func:`cctorch.graph.trace` warns. Masks and bits are left to
    :func:`cctorch.prepare`. What the modules are depends on the plan alone, so a compressed checkpoint loads into
    ``apply(dense_model, plan)``.

    Args:
        model: the dense model that the plan was made for.
        plan: e.g. from :func:`cctorch.collaborative.compress`.
        optimizer: its parameter groups are pointed to the new parameters in the same order. State of a parameter's
            shape (momentum, Adam's moments) is kept for the kept indices; factors of a decomposed layer start without.
            ``torch.optim.LBFGS`` is refused, whose history is one vector over all parameters, and where a parameter
            that is trained is replaced, one that has none of ``model``.

    Raises:
        ValueError: the plan does not fit the model, naming the layer, what was found and what was expected; or the
            optimizer is refused. The model and the optimizer are unchanged.
        TypeError: ``plan`` is no plan.
    """
    check_plan(plan, "apply")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("apply: LBFGS keeps one history over all parameters; make it anew after apply(model, plan)")
    paths = owners(model)
    channels_last = is_channels_last(model)
    changed = [layer for layer in plan.layers if _changes_shape(layer)]
    edits = [_edit(model, layer, paths, channels_last) for layer in changed if layer.kind != "lstm"]
    edits += _recurrent_edits(model, [layer for layer in changed if layer.kind == "lstm"], paths)
    if optimizer is not None and any(old.requires_grad for edit in edits for old in edit.successors):
        _expect_optimizer_of(model, optimizer)
    successors: dict[Tensor, _Successor] = {}
    replaced: dict[nn.Module, nn.Module] = {}
    for edit in edits:
        successors.update(edit.successors)
        edit.commit()
        if edit.replacement is not edit.module:
            replaced[edit.module] = edit.replacement
    # A gather holds the module it replaces, which must not be looked into.
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replaced:
                parent._modules[name] = replaced[child]
    without_fused_encoders(model, set(replaced.values()))
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            # Same parameters, buffers and hooks; PyTorch's own is slow to train with channels that don't fill vectors.
            module.__class__ = BatchNorm2d
    if optimizer is not None:
        _carry_over(optimizer, successors)
    return replaced.get(model, model)


def is_channels_last(model: nn.Module) -> bool:
    # An image of one channel, and a kernel of one position, are in both layouts.
    return any(
        parameter.dim() == 4
        and parameter.is_contiguous(memory_format=torch.channels_last)
        and not parameter.is_contiguous()
        for parameter in model.parameters()
    )


def without_fused_encoders(model: nn.Module, replacements: set[nn.Module]) -> None:
    """PyTorch's fused Transformer layer reads the weights of its linear layers itself, and has to leave those alone."""
    fused: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and replacements & set(module.children()):
            module.activation_relu_or_gelu = 0
            fused.add(module)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and fused & set(module.layers):
            module.use_nested_tensor = False


def _changes_shape(layer: LayerPlan) -> bool:
    narrowed = len(layer.kept_in) < layer.in_channels or len(layer.kept_out) < layer.out_channels
    return narrowed or bool(layer.gather) or layer.rank is not None


@dataclass(frozen=True)
class _Successor:
    """What takes a parameter's place, and where its state is found in the old one's: indices for each dimension."""

    parameters: Sequence[nn.Parameter]
    kept: Sequence[Sequence[int]] | None = None


@dataclass
class _Edit:
    module: nn.Module
    replacement: nn.Module
    tensors: dict[str, nn.Parameter | Tensor]
    attributes: dict[str, int]
    successors: dict[Tensor, _Successor]

    def commit(self) -> None:
        for name, tensor in self.tensors.items():
            setattr(self.module, name, tensor)
        for name, value in self.attributes.items():
            setattr(self.module, name, value)


def _edit(model: nn.Module, layer: LayerPlan, paths: dict[int, list[str]], channels_last: bool) -> _Edit:
    module = _checked_module(model, layer, paths)
    if not layer.kept_in:
        return _empty(module, layer, channels_last)
    if layer.rank is not None:
        return _decompose(module, layer, layer.rank)
    kept: dict[str, Sequence[Sequence[int]]] = {"bias": [layer.kept_out]}
    if layer.kind == "batch_norm2d":
        kept.update({name: [layer.kept_out] for name in ("weight", "running_mean", "running_var")})
        attributes = {"num_features": len(layer.kept_out)}
    elif layer.kind == "depthwise_conv2d":
        kept["weight"] = [layer.kept_out]
        attributes = dict.fromkeys(("in_channels", "out_channels", "groups"), len(layer.kept_out))
    else:
        kept["weight"] = [layer.kept_out, layer.kept_in]
        unit = "features" if layer.kind == "linear" else "channels"
        attributes = {f"in_{unit}": len(layer.kept_in), f"out_{unit}": len(layer.kept_out)}
    tensors: dict[str, nn.Parameter | Tensor] = {}
    successors: dict[Tensor, _Successor] = {}
    for name, indices in kept.items():
        old = getattr(module, name)
        if old is None:
            continue
        tensors[name] = _parameter(_pick(old, indices), old) if isinstance(old, nn.Parameter) else _pick(old, indices)
        if isinstance(old, nn.Parameter):
            successors[old] = _Successor([tensors[name]], indices)  # type: ignore[list-item]
    replacement = GatherChannels(layer.gather, module) if layer.gather else module
    return _Edit(module, replacement, tensors, attributes, successors)


def _empty(module: nn.Module, layer: LayerPlan, channels_last: bool) -> _Edit:
    assert isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d)
    weight, old = module.weight, module.bias
    successors = {parameter: _Successor([]) for parameter in (weight, old) if parameter is not None}
    bias = None
    if old is not None and layer.kept_out:
        bias = _parameter(_pick(old, [layer.kept_out]), old)
        successors[old] = _Successor([bias], [layer.kept_out])
    elif layer.kept_out:
        like = next((tensor for tensor in (weight, module._buffers.get("running_mean")) if tensor is not None), None)
        zeros = torch.zeros(len(layer.kept_out)) if like is None else like.new_zeros(len(layer.kept_out))
        bias = nn.Parameter(zeros, requires_grad=weight is None or weight.requires_grad)
        if weight is not None:
            successors[weight] = _Successor([bias])
    return _Edit(module, Constant(module, bias, channels_last=channels_last), {}, {}, successors)


def _decompose(module: nn.Module, layer: LayerPlan, rank: int) -> _Edit:
    assert isinstance(module, nn.Conv2d | nn.Linear)
    first, core, second = _C.factors(module.weight.detach(), layer)
    inputs, outputs, bias = len(layer.kept_in), len(layer.kept_out), module.bias is not None
    factored: LowRankConv2d | LowRankLinear
    if isinstance(module, nn.Linear):
        factored = LowRankLinear(inputs, outputs, rank, bias, device="meta")
    else:
        padding = module.padding if isinstance(module.padding, str) else (module.padding[0], module.padding[1])
        factored = LowRankConv2d(
            inputs,
            outputs,
            rank if layer.rank_in is None else (rank, layer.rank_in),
            kernel_size=(module.kernel_size[0], module.kernel_size[1]),
            stride=(module.stride[0], module.stride[1]),
            padding=padding,
            dilation=(module.dilation[0], module.dilation[1]),
            bias=bias,
            padding_mode=module.padding_mode,
            layout=layer.layout,
            device="meta",
        )
    factored.train(module.training)
    parts = {"first": first, "core": core, "second": second}
    factors = {name: _parameter(value, module.weight) for name, value in parts.items() if value is not None}
    for name, factor in factors.items():
        setattr(factored, name, factor)
    successors = {module.weight: _Successor(list(factors.values()))}
    if module.bias is not None:
        factored.bias = _parameter(_pick(module.bias, [layer.kept_out]), module.bias)
        successors[module.bias] = _Successor([factored.bias], [layer.kept_out])
    replacement = GatherChannels(layer.gather, factored) if layer.gather else factored
    return _Edit(module, replacement, {}, {}, successors)


def _recurrent_edits(model: nn.Module, layers: Sequence[LayerPlan], paths: dict[int, list[str]]) -> list[_Edit]:
    """One of each LSTM, of which several weights may have a rank."""
    ranks: dict[nn.LSTM, dict[str, int]] = {}
    for layer in layers:
        module = _checked_module(model, layer, paths)
        assert isinstance(module, nn.LSTM)
        assert layer.rank is not None
        ranks.setdefault(module, {})[layer.name.rpartition(".")[2]] = layer.rank
    edits = []
    for module, of_weights in ranks.items():
        factored = LowRankLSTM.from_dense(module, of_weights)
        successors: dict[Tensor, _Successor] = {
            old: _Successor(
                [factored.get_parameter(part) for part in factored.parts(name)], None if name in of_weights else []
            )
            for name, old in module.named_parameters()
        }
        edits.append(_Edit(module, factored, {}, {}, successors))
    return edits


def _pick(tensor: Tensor, kept: Sequence[Sequence[int]]) -> Tensor:
    picked = tensor.detach()
    for dim, indices in enumerate(kept):
        picked = picked.index_select(dim, torch.as_tensor(indices, dtype=torch.int64, device=tensor.device))
    return _like(picked, tensor)


def _like(tensor: Tensor, old: Tensor) -> Tensor:
    channels_last = old.dim() == 4 and not old.is_contiguous() and old.is_contiguous(memory_format=torch.channels_last)
    format = torch.channels_last if channels_last and tensor.dim() == 4 else torch.contiguous_format
    return tensor.contiguous(memory_format=format)


def _parameter(tensor: Tensor, old: Tensor) -> nn.Parameter:
    return nn.Parameter(_like(tensor, old), requires_grad=old.requires_grad)


def _checked_module(model: nn.Module, layer: LayerPlan, paths: dict[int, list[str]]) -> nn.Module:
    expected = f"the plan expects a {describe_plan(layer)}"
    advice = "apply a plan once, to the dense model that it was made for"
    try:
        module = model.get_submodule(module_of(layer))
    except AttributeError:
        raise ValueError(f"plan: {type(model).__name__} has no layer '{layer.name}'; {expected}; {advice}") from None
    found = f"plan: layer '{layer.name}' of {type(model).__name__} is a {describe(module)}; {expected}; {advice}"
    if not isinstance(module, _KINDS[layer.kind]) or not fits(module, layer):
        raise ValueError(found)
    if hasattr(module, "parametrizations"):
        raise ValueError(f"plan: layer '{layer.name}' has parametrizations; run cctorch.convert(model) first")
    if layer.kind != "batch_norm2d" and not runs_its_own_forward(module):
        raise ValueError(f"plan: layer '{layer.name}' ({type(module).__name__}) has a forward of its own; leave it out")
    if is_hooked(module):
        raise ValueError(f"plan: layer '{layer.name}' has hooks; remove them, and add them again to the smaller layer")
    for parameter in module.parameters(recurse=False):
        if len(paths[id(parameter)]) > 1:
            shared = ", ".join(paths[id(parameter)])
            raise ValueError(f"plan: layer '{layer.name}' shares a parameter ({shared}); leave it out of the plan")
    return module


def _expect_optimizer_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in model.parameters()):
        raise ValueError(
            f"apply: the optimizer has none of the parameters of this {type(model).__name__}, and would go on without "
            "the new ones: pass the one that trains this model"
        )


def _carry_over(optimizer: torch.optim.Optimizer, successors: dict[Tensor, _Successor]) -> None:
    for group in optimizer.param_groups:
        group["params"] = [
            new for old in group["params"] for new in (successors[old].parameters if old in successors else [old])
        ]
    for old, successor in successors.items():
        state = optimizer.state.pop(old, None)
        if state is None or successor.kept is None:
            continue
        [new] = successor.parameters
        carried = {name: _carried(value, old, successor.kept) for name, value in state.items()}
        # State of another shape (a whole-model vector, factored moments) has no meaning for the kept entries.
        if all(not isinstance(v, Tensor) or v.numel() == 1 or v.shape == new.shape for v in carried.values()):
            optimizer.state[new] = carried
    if isinstance(optimizer, torch.optim.Adagrad):
        _begin_adagrad(optimizer)


def _begin_adagrad(optimizer: torch.optim.Adagrad) -> None:
    """Alone among PyTorch's optimizers it makes its state when it is constructed, and takes no step without it."""
    for group in optimizer.param_groups:
        new = [parameter for parameter in group["params"] if parameter not in optimizer.state]
        if new:
            value = group["initial_accumulator_value"]
            begun = torch.optim.Adagrad([{**group, "params": new}], initial_accumulator_value=value)
            optimizer.state.update(begun.state)


def _carried(value: object, old: Tensor, kept: Sequence[Sequence[int]]) -> object:
    return _pick(value, kept) if isinstance(value, Tensor) and value.shape == old.shape else value
