"""Where in a model a repaired layer's output ends up: behind its BatchNorm, behind the addition of a shortcut."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils.weak import WeakTensorKeyDictionary

from cctorch._C import CompressionPlan
from cctorch.graph.lstm import module_of
from cctorch.graph.model_graph import owners, runs_its_own_forward
from cctorch.nn import LowRankConv2d, LowRankLinear

Layer: TypeAlias = nn.Conv2d | nn.Linear | LowRankConv2d | LowRankLinear

_ADDITIONS = {torch.add, torch.Tensor.add, torch.Tensor.add_}


@dataclass
class Place:
    """A layer in order of execution. `norm`: path of the BatchNorm that reads it. `joins`: a shortcut is added."""

    layer: str
    norm: str | None = None
    joins: bool = False


def is_repairable(module: nn.Module) -> bool:
    """A layer whose output is a weight times its unfolded input; not a grouped convolution."""
    if isinstance(module, LowRankConv2d | LowRankLinear):
        return True
    return isinstance(module, nn.Conv2d | nn.Linear) and runs_its_own_forward(module) and _groups(module) == 1


def _groups(module: nn.Module) -> int:
    return module.groups if isinstance(module, nn.Conv2d) else 1


def find(model: nn.Module, example: Tensor, plan: CompressionPlan) -> list[Place]:
    """The repairable layers that the dense `model(example)` executes exactly once, in that order.

    Of a residual branch that the plan removes, the layer, of whatever kind, in whose place there is a constant. Among
    them are the LSTMs of which the plan decomposes weights: what runs after one reads other inputs.
    """
    removed = {layer.name: not layer.kept_out for layer in plan.layers if not layer.kept_in}
    paths = owners(model)
    layers = {
        name: module
        for name, module in model.named_modules()
        if (name not in removed and is_repairable(module) and all(len(paths[id(p)]) == 1 for p in module.parameters()))
        or removed.get(name) is False
    }
    norms = {
        name: module for name, module in model.named_modules() if name not in layers and _holds_an_intercept(module)
    }
    order: list[str] = []
    recurrent = {module_of(layer) for layer in plan.layers if layer.kind == "lstm" and not layer.is_unchanged}
    normed: list[tuple[str, str]] = []
    joined: list[tuple[str, str | None]] = []
    used: list[str] = []
    with watching(
        layers,
        norms,
        on_output=lambda layer, _: order.append(layer),
        on_norm=lambda layer, norm, _: normed.append((layer, norm)),
        on_join=lambda layer, norm, *_: joined.append((layer, norm)),
        on_use=used.append,
    ):
        hooks = [
            model.get_submodule(path).register_forward_hook(lambda *_, path=path: order.append(path))
            for path in recurrent
        ]
        try:
            model(example)
        finally:
            for handle in hooks:
                handle.remove()
    return [
        _place(layer, normed, joined, used)
        for layer in dict.fromkeys(order)
        if order.count(layer) == 1 or layer in recurrent
    ]


def _place(layer: str, normed: list[tuple[str, str]], joined: list[tuple[str, str | None]], used: list[str]) -> Place:
    norms = [norm for source, norm in normed if source == layer]
    joins = [norm for source, norm in joined if source == layer]
    # A norm that runs for others too, one of several, or one beside which the output is used as it is.
    shared = len(norms) != 1 or [norm for _, norm in normed].count(norms[0]) != 1 or layer in used
    norm = None if shared else norms[0]
    # A norm would have read the output that the fit, at the addition, replaces.
    return Place(layer, norm, joins=joins == [norm] and (norm is not None or not norms))


def _holds_an_intercept(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.affine and module.running_mean is not None


def _ignore(*_: Any) -> None:
    return None


@contextmanager
def watching(
    layers: dict[str, nn.Module],
    norms: dict[str, nn.Module],
    *,
    on_input: Callable[[str, Tensor], None] = _ignore,
    on_output: Callable[[str, Tensor], None] = _ignore,
    on_norm: Callable[[str, str, Tensor], None] = _ignore,
    on_join: Callable[[str, str | None, Tensor, Tensor], None] = _ignore,
    on_joined: Callable[[str, Tensor], None] = _ignore,
    on_use: Callable[[str], None] = _ignore,
) -> Iterator[None]:
    """Reports what happens to the layers' outputs while a model runs.

    on_input(layer, x) before a layer runs, on_output(layer, y) after; on_norm(layer, norm, y) after a norm that read a
    layer's output; on_join(layer, norm, y, other) before y, which came out of the norm, or of the layer if that is
    None, is added to a tensor of the same shape, and on_joined(layer, sum) after; on_use(layer) where something else
    than a norm makes a tensor of the layer's own output.
    """
    sources = WeakTensorKeyDictionary()
    executed: dict[str, int] = {}
    clock = itertools.count()

    def mark(y: Tensor, layer: str, norm: str | None = None) -> None:
        sources[y] = (layer, norm, y._version)

    def source(x: Tensor) -> tuple[str | None, str | None]:
        """Layer, and the norm after it, that gave x."""
        layer, norm, version = sources.get(x, (None, None, 0))  # type: ignore[no-untyped-call]
        # Changed in place since (an activation, another addition): no longer what they gave.
        return (layer, norm) if version == x._version else (None, None)

    def own_outputs(values: object) -> list[str]:
        found = [source(leaf) for leaf in _pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
        return [layer for layer, norm in found if layer is not None and norm is None]

    def entered(layer: str) -> Callable[..., None]:
        return lambda _, inputs: on_input(layer, inputs[0])

    def left(layer: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, y: Tensor) -> None:
            executed[layer] = next(clock)
            mark(y, layer)
            on_output(layer, y)

        return hook

    def normalizing(_: nn.Module, __: object) -> None:
        calls.in_norm = True

    def normalized(norm: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
            calls.in_norm = False
            layer, _before = source(inputs[0])
            if layer is not None:
                mark(y, layer, norm)
                on_norm(layer, norm, y)

        return hook

    def latest(tensors: Sequence[Tensor]) -> int:
        return max((0, 1), key=lambda i: executed.get(source(tensors[i])[0] or "", -1))

    class Calls(TorchFunctionMode):
        in_norm = False

        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            uses = [] if self.in_norm else own_outputs((args, kwargs))
            result = self.called(func, args, kwargs or {})
            if any(isinstance(leaf, Tensor) for leaf in _pytree.tree_leaves(result)):
                for layer in uses:
                    on_use(layer)
            return result

        def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if func not in _ADDITIONS or kwargs or not _same_shape(args):
                return func(*args, **kwargs)
            mine = latest(args)
            layer, norm = source(args[mine])
            if layer is None:
                return func(*args)
            on_join(layer, norm, args[mine], args[1 - mine])
            total = func(*args)
            on_joined(layer, total)
            return total

    calls = Calls()
    handles = [module.register_forward_pre_hook(entered(name)) for name, module in layers.items()]
    handles += [module.register_forward_hook(left(name)) for name, module in layers.items()]
    handles += [module.register_forward_pre_hook(normalizing) for module in norms.values()]
    handles += [module.register_forward_hook(normalized(name)) for name, module in norms.items()]
    try:
        with calls:
            yield
    finally:
        for handle in handles:
            handle.remove()


def _same_shape(args: Sequence[Any]) -> bool:
    return len(args) == 2 and all(isinstance(a, Tensor) for a in args) and args[0].shape == args[1].shape
