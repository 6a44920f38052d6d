"""Layers by their shapes alone, for a model that cannot be exported."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from cctorch._C import ChannelGraph, LayerSpec
from cctorch.graph import lstm
from cctorch.graph.model_graph import ModelGraph, is_hooked, owners, runs_its_own_forward
from cctorch.graph.strangers import READ, UNCOPIED, Twin

if TYPE_CHECKING:
    from cctorch._C import LayerKind


def from_hooks(model: nn.Module, example: Tensor, reason: str) -> ModelGraph:
    """Layers by their shapes alone. Every channel is fixed, so that only what a layer reads and its rank can change."""
    sizes: dict[str, list[int]] = {}
    unbatched: set[str] = set()
    hooks = []
    uses = _Uses(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.LSTM):

            def record(_: nn.Module, __: object, output: Any, name: str = name) -> None:
                # An LSTM gives a tuple, the first of which may be a packed sequence.
                output = output if isinstance(output, Tensor) else output[0].data
                sizes.setdefault(name, []).append(output.numel() // example.shape[0])
                if isinstance(model.get_submodule(name), nn.Conv2d) and output.dim() != 4:
                    unbatched.add(name)

            hooks.append(module.register_forward_hook(record))
    try:
        with uses:
            model(example)
    except Exception as error:
        raise ValueError(
            f"trace: {type(model).__name__} does not run on the example of shape {tuple(example.shape)}: {error}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()

    warning = f"{type(model).__name__} is not followed: {reason}; its layers keep all their filters"
    graph = ModelGraph([], ChannelGraph(), [warning])
    shared = owners(model)
    for name, seen in sizes.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear | nn.LSTM)
        specs = _hooked_specs(name, layer, sum(seen))
        graph.specs += specs
        tied = any(len(shared[id(parameter)]) > 1 or uses.of[id(parameter)] > 1 for parameter in layer.parameters())
        alone = specs[0].groups > 1 or len(seen) > 1 or name in unbatched
        if alone or tied or is_hooked(layer) or not runs_its_own_forward(layer):
            graph.left_alone.update(spec.name for spec in specs)
    twin = Twin.of(model, example)
    if twin is None:
        graph.warnings.append(f"{type(model).__name__} {UNCOPIED}")
    paths = dict.fromkeys(lstm.module_of(spec) for spec in graph.specs if spec.name not in graph.left_alone)
    read = twin.reads([path for path in paths if path]) if twin else []
    graph.warnings += [f"layer '{name}' is left alone: {READ}" for name in read]
    graph.left_alone.update(spec.name for spec in graph.specs if lstm.module_of(spec) in read)
    for spec in graph.specs:
        if spec.name not in graph.left_alone and spec.kind != "lstm":
            inputs = graph.channels.input(spec.in_channels)
            graph.channels.pin(graph.channels.layer(spec.name, spec.kind, inputs, spec.out_channels))
    return graph


class _Uses(TorchFunctionMode):
    """Counts the operators that read each parameter: its layer's, and those that need it where it is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.of = {id(parameter): 0 for parameter in model.parameters()}

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        for leaf in _pytree.tree_leaves((args, kwargs)):
            if id(leaf) in self.of:
                self.of[id(leaf)] += 1
        return func(*args, **(kwargs or {}))


def _hooked_specs(name: str, layer: nn.Conv2d | nn.Linear | nn.LSTM, outputs: int) -> list[LayerSpec]:
    """`outputs`: elements of the output for each example."""
    if isinstance(layer, nn.LSTM):
        width = (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
        return lstm.specs(name, layer, max(1, outputs // width))
    return [_hooked_spec(name, layer, outputs)]


def _hooked_spec(name: str, layer: nn.Conv2d | nn.Linear, outputs: int) -> LayerSpec:
    bits = 8 * layer.weight.element_size()
    if isinstance(layer, nn.Linear):
        rows = outputs // layer.out_features
        return LayerSpec(name, "linear", layer.in_features, layer.out_features, positions=rows, bits=bits)
    high, wide = layer.kernel_size
    depthwise = layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels
    kind: LayerKind = "depthwise_conv2d" if depthwise else "conv2d"
    positions = outputs // layer.out_channels
    channels, stride = (layer.in_channels, layer.out_channels), (layer.stride[0], layer.stride[1])
    return LayerSpec(name, kind, *channels, high, wide, positions, layer.groups, bits, *stride)
