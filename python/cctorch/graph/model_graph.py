from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from cctorch import _C
from cctorch._C import LayerSpec
from cctorch.graph.lstm import weight_names
from cctorch.nn import BatchNorm2d


@dataclass(frozen=True)
class Branch:
    """Layers on which one operand of an addition depends, and nothing else does.

    Attributes:
        layers: in order of execution. The operand depends on them through the last one alone: where that one gives a
            constant, the network works without the others.
        key: the last convolution or linear layer.
    """

    layers: tuple[str, ...]
    key: str

    @property
    def end(self) -> str:
        return self.layers[-1]


@dataclass
class ModelGraph:
    """What :func:`cctorch.graph.trace` found.

    Attributes:
        specs: convolutions, linear layers and the weights of LSTMs in order of execution; all of the model's
            multiply-accumulates but for those of other recurrent layers.
        channels: which filters are read by nobody once a plan has chosen the input channels of every layer.
        warnings: one for each thing that was not followed, naming it.
        left_alone: names of the specs that a plan must not change: shared, grouped, with a computed weight...
        branches: residual branches, of which a plan may keep nothing but a constant; no two share a layer.
        bits: of layers whose weights are to be quantized, which plans say then.
    """

    specs: list[LayerSpec]
    channels: _C.ChannelGraph
    warnings: list[str] = field(default_factory=list)
    left_alone: set[str] = field(default_factory=set)
    branches: list[Branch] = field(default_factory=list)
    bits: dict[str, int] = field(default_factory=dict)

    def ends(self, layers: Iterable[str]) -> dict[str, str]:
        """The end of the branch that each of ``layers`` is in; of one in none, the layer."""
        ends = {name: branch.end for branch in self.branches for name in branch.layers}
        return {name: ends.get(name, name) for name in layers}


def runs_its_own_forward(module: nn.Module) -> bool:
    """Whether a layer computes what PyTorch's class of that kind does, with a weight that is a plain parameter."""
    if isinstance(module, nn.LSTM):
        return type(module).forward is nn.LSTM.forward and all(n in module._parameters for n in weight_names(module))
    if "weight" not in module._parameters:
        return False
    if isinstance(module, nn.Conv2d):
        own = type(module)
        return own.forward is nn.Conv2d.forward and own._conv_forward is nn.Conv2d._conv_forward
    if isinstance(module, nn.BatchNorm2d):
        return normalizes_as_usual(module)
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks see or change what the layer reads or gives: another layer in its place would not run them."""
    forward = module._forward_pre_hooks or module._forward_hooks
    return bool(forward or module._backward_pre_hooks or module._backward_hooks)


def normalizes_as_usual(module: nn.BatchNorm2d) -> bool:
    return type(module).forward in (nn.BatchNorm2d.forward, BatchNorm2d.forward)


def owners(model: nn.Module) -> dict[int, list[str]]:
    """Paths of each parameter, by its id: more than one where it is shared."""
    paths: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        paths.setdefault(id(parameter), []).append(name)
    return paths
