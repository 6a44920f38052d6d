"""Finds forward functions that compute with numbers of channels, which their operators do not show.

``x / x.shape[1]`` and ``y.reshape(n, c, h, w)`` with the ``c`` of ``x`` are exported with these numbers as they were:
the network runs differently, or not at all, once channels are gone. A narrower copy tells.
"""

from collections.abc import Callable, Iterator
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree

from cctorch._C import CompressionPlan, LayerPlan
from cctorch.graph.strangers import READ, READ_OF_NORM, UNCOPIED, Twin, copied
from cctorch.graph.walker import Walker, op_of, path_of
from cctorch.nn import GatherChannels

_SIZES = (Tensor.size, Tensor.shape.__get__, Tensor.numel)  # type: ignore[attr-defined]

Export = Callable[[nn.Module], torch.export.ExportedProgram]


def keep_what_sizes_count_on(model: nn.Module, example: Tensor, walker: Walker, export: Export) -> None:
    """Pins the channels in modules that compute something else when there are fewer of them."""
    twin = Twin.of(model, example)
    if twin is None:
        walker.warnings.append(f"{type(model).__name__} {UNCOPIED}")
        return
    for names, reason in zip(walker.replaceable(), (READ, READ_OF_NORM), strict=True):
        walker.leave_alone(dict.fromkeys(twin.reads(names), reason))
    if not twin.calls_any(_SIZES):  # as in few networks of convolutions
        return
    with torch.random.fork_rng([example.device] if example.is_cuda else []):  # heads for training have dropout
        while (module := _differing(model, example, walker, export)) is not None:
            kinds = dict.fromkeys([type(module), type(model)])
            if not any(walker.keep_within(kind) for kind in kinds):
                return


def _differing(model: nn.Module, example: Tensor, walker: Walker, export: Export) -> nn.Module | None:
    """A module of `model` that differs when most of all input channels are gone."""
    from cctorch.apply import apply  # which needs this package

    narrow = copied(model, lambda tensor: tensor.detach().clone())
    apply(narrow, _narrowed(walker))
    try:
        narrow(example)
        changed = list(_calculations(export(narrow), narrow))
    except Exception as error:
        return model.get_submodule(_failed(narrow, error))
    for before, after in zip_longest(_calculations(walker.program, model), changed):
        if before is None or after is None:
            return model
        if before[1:] != after[1:]:
            return model.get_submodule(path_of(before[0]))
    return None


def _narrowed(walker: Walker) -> CompressionPlan:
    """The first eighth of each layer's inputs: of padded, concatenated and flattened channels too, few are left."""
    plan = CompressionPlan(
        layers=[
            LayerPlan(
                spec.name,
                spec.kind,
                spec.in_channels,
                spec.out_channels,
                kept_in=list(range((spec.in_channels + 7) // 8)),
            )
            for spec in walker.specs.values()
            if spec.kind not in ("depthwise_conv2d", "lstm") and spec.name not in walker.left_alone
        ]
    )
    walker.graph.resolve(plan)
    return plan


def _failed(model: nn.Module, error: Exception) -> str:
    """The innermost module of the user's own that ran: PyTorch's layers only tell that what reaches them is wrong."""
    names = {id(module): name for name, module in model.named_modules()}
    failed = ""
    traceback = error.__traceback__
    while traceback is not None:
        running = traceback.tb_frame.f_locals.get("self")
        if id(running) in names and not type(running).__module__.startswith(("torch.", "cctorch.")):
            failed = names[id(running)]
        traceback = traceback.tb_next
    return failed


def _calculations(program: torch.export.ExportedProgram, model: nn.Module) -> Iterator[tuple[Node, str, list[object]]]:
    """All operators with their numbers, but for what `apply` changes: gathers, groups of depthwise convolutions."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for node in program.graph.nodes:
        if node.op == "call_function" and not isinstance(modules.get(path_of(node)), GatherChannels):
            leaves = _pytree.tree_leaves((node.args, node.kwargs))
            numbers = [leaf for leaf in leaves if not isinstance(leaf, Node)]
            yield node, op_of(node), [] if op_of(node) == "conv2d" else numbers
