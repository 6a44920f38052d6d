"""Training-time constraints as parametrizations: attached by :func:`prepare`, baked in by :func:`convert`."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cctorch import ops
from cctorch._C import CompressionPlan, LayerPlan, MaskPlan
from cctorch.described import describe, describe_plan
from cctorch.graph.model_graph import owners
from cctorch.nn import FakeQuant, GatherChannels, LowRankConv2d, LowRankLinear, LowRankWeight, Mask, SoftThreshold
from cctorch.plan import check_plan

_Weight = tuple[nn.Module, str]
_OURS = (Mask, FakeQuant, LowRankWeight, SoftThreshold)


def prepare(model: nn.Module, plan: CompressionPlan, *, init: Literal["lsq", "minmax", "mse"] = "lsq") -> nn.Module:
    """Attaches the masks and the fake-quantization of ``plan`` to the weights of ``model``, in place, and returns it.

    The mask comes first, then the quantization; a :class:`~cctorch.nn.LowRankWeight` that the user registered before
    comes ahead of both. Magnitude masks of equal sparsity are one global selection over all of them. Weights are
    quantized with one scale for each output channel. In a model that :func:`cctorch.apply` rebuilt, the factors of
    a decomposed layer take the place of its weight, and of an ``nn.LSTMCell`` (or another recurrent cell) both weights
    are taken, in which the gates lie below each other. ``nn.LSTM`` cannot be parametrized; regularizers act on it.

    Optimizers made before keep working: the parameters stay the same objects. The scales are new ones, which start as
    ``init`` says (:class:`~cctorch.nn.FakeQuant`): a trained network loses least by ``"mse"`` at 4 bits and more.

    Raises:
        ValueError: ``init`` is none of the three; the plan names a layer that the model lacks, that has no weight,
            another kind or more channels, that shares its weight with another layer, is a transposed convolution, or is
            already prepared; or a weight is not finite.
        TypeError: ``plan`` is no plan.
    """
    check_plan(plan, "prepare")
    targets = {
        layer.name: _weights(model, layer) for layer in plan.layers if layer.mask is not None or layer.bits is not None
    }
    _check_unshared(model, targets)
    masks = _masks(plan, targets)
    for layer in plan.layers:
        for module, name in targets.get(layer.name, []):
            mask = masks.get((module, name))
            if mask is not None:
                parametrize.register_parametrization(module, name, Mask(mask))
            if layer.bits is not None:
                _quantize(module, name, layer.bits, mask, init)
    return model


def convert(model: nn.Module) -> nn.Module:
    """Replaces every weight that :func:`prepare`, or a module of :mod:`cctorch.nn`, constrained by its value.

    Returns ``model``.

    Parametrizations of other origin stay, and so does a weight that has one of them.
    """
    for module in list(model.modules()):
        for name in constraints(module):
            _own_class(module)
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return model


def constraints(module: nn.Module) -> dict[str, list[nn.Module]]:
    """The parametrizations of each tensor of a module that :func:`convert` replaces by its value."""
    return {name: steps for name, steps in _steps(module).items() if all(isinstance(step, _OURS) for step in steps)}


def _own_class(module: nn.Module) -> None:
    """PyTorch deletes the weight's property from the module's class, which copy.deepcopy shares with the original."""
    shared = type(module)
    module.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))


def _steps(module: nn.Module) -> dict[str, list[nn.Module]]:
    """The parametrizations of each parametrized tensor of a module."""
    if not parametrize.is_parametrized(module):
        return {}
    parametrizations = module.parametrizations
    assert isinstance(parametrizations, nn.ModuleDict)
    return {name: list(steps.children()) for name, steps in parametrizations.items()}


def _weights(model: nn.Module, layer: LayerPlan) -> list[_Weight]:
    try:
        module = model.get_submodule(layer.name)
    except AttributeError:
        raise ValueError(f"plan: {type(model).__name__} has no layer '{layer.name}' to mask or quantize") from None
    if isinstance(module, GatherChannels):
        module = module.layer
    names: tuple[str, ...] = ("weight",)
    if isinstance(module, LowRankConv2d | LowRankLinear):
        names = tuple(name for name in ("first", "core", "second") if hasattr(module, name))
    elif isinstance(module, nn.RNNCellBase):
        names = ("weight_ih", "weight_hh")
    for name in names:
        weight = getattr(module, name, None)
        # The rows of a transposed convolution's weight are its inputs, and all that a plan says is of outputs.
        transposed = isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
        if transposed or not isinstance(weight, Tensor) or weight.dim() < 2:
            kind = type(module).__name__
            raise ValueError(
                f"plan: layer '{layer.name}' is a {kind}; only convolutions and linear layers take masks and bits"
            )
        if any(isinstance(step, Mask | FakeQuant) for step in _steps(module).get(name, [])):
            raise ValueError(f"plan: layer '{layer.name}' is prepared already; run cctorch.convert(model) first")
        if name not in module._parameters and not parametrize.is_parametrized(module, name):
            raise ValueError(
                f"plan: layer '{layer.name}' has a {name} that is no parameter, as of the older weight_norm, "
                "spectral_norm and prune of torch.nn.utils; use those of torch.nn.utils.parametrizations, or remove it"
            )
        if not weight.is_meta and not weight.isfinite().all():
            raise ValueError(
                f"plan: layer '{layer.name}' has a {name} with NaN or infinity; restore it, or leave the layer out"
            )
    _check_sizes(module, layer)
    return [(module, name) for name in names]


def _check_unshared(model: nn.Module, targets: dict[str, list[_Weight]]) -> None:
    paths = owners(model)
    layers: dict[_Weight, str] = {}
    for layer, weights in targets.items():
        for module, name in weights:
            other = layers.setdefault((module, name), layer)
            if other != layer:
                raise ValueError(f"plan: layers '{other}' and '{layer}' are one module of the model; keep one of them")
            shared = paths.get(id(getattr(module, name)), [])
            if len({id(model.get_submodule(path.rpartition(".")[0])) for path in shared}) > 1:
                raise ValueError(
                    f"plan: layer '{layer}' shares its weight ({', '.join(shared)}); leave it out, since what it "
                    "becomes would hold for the other too"
                )


def _check_sizes(module: nn.Module, layer: LayerPlan) -> None:
    """The plan's layer as it was dense, or a smaller one as :func:`cctorch.apply` leaves it; in groups too."""
    found = _sizes(module)
    if found is None:
        return
    kind, inputs, outputs = found
    if kind not in layer.kind or inputs > layer.in_channels or outputs > layer.out_channels:
        described = describe(module)
        if described == type(module).__name__:
            described += f", which a plan calls a {kind} of {inputs} -> {outputs} channels"
        raise ValueError(
            f"plan: layer '{layer.name}' is a {described}; the plan expects a {describe_plan(layer)}, or of less"
        )


def _sizes(module: nn.Module) -> tuple[str, int, int] | None:
    """A layer's kind in a plan, and its inputs and outputs: the rows of its weight, which have a scale each."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | LowRankConv2d):
        return "conv2d", module.in_channels, module.out_channels
    if isinstance(module, nn.Linear | LowRankLinear):
        return "linear", module.in_features, module.out_features
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "linear", module.embedding_dim, module.num_embeddings
    if isinstance(module, nn.RNNCellBase):
        return "linear", module.input_size, module.weight_ih.shape[0]
    return None


def _masks(plan: CompressionPlan, targets: dict[str, list[_Weight]]) -> dict[_Weight, Tensor]:
    masks: dict[_Weight, Tensor] = {}
    together: dict[float, list[_Weight]] = {}
    for layer in plan.layers:
        if layer.mask is None:
            continue
        if layer.mask.kind == "magnitude":
            together.setdefault(layer.mask.sparsity, []).extend(targets[layer.name])
            continue
        for module, name in targets[layer.name]:
            masks[module, name] = _own_mask(layer.name, getattr(module, name).detach(), layer.mask)
    for sparsity, members in together.items():
        weights = [getattr(module, name).detach() for module, name in members]
        masks.update(zip(members, ops.magnitude_masks(weights, sparsity), strict=True))
    return masks


def _own_mask(layer: str, weight: Tensor, mask: MaskPlan) -> Tensor:
    if mask.kind == "nm":
        if weight.shape[1] % mask.m:
            raise ValueError(
                f"plan: layer '{layer}' has {weight.shape[1]} input channels, expected a multiple of m = {mask.m} for "
                f"its mask; leave it out or choose another m"
            )
        return ops.nm_masks([weight], mask.n, mask.m, axis=1)[0]
    return ops.channel_masks([weight], mask.sparsity, axis=0)[0]


def _quantize(module: nn.Module, name: str, bits: int, mask: Tensor | None, init: str) -> None:
    weight = getattr(module, name).detach()
    scales = torch.promote_types(weight.dtype, torch.float32)
    quant = FakeQuant(bits, axis=0, channels=weight.shape[0], device=weight.device, dtype=scales, init=init)
    quant.initialize(weight, mask)
    parametrize.register_parametrization(module, name, quant)
