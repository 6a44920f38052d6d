"""Finds residual branches: what is added to a shortcut, and can go without the rest of the network going with it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from cctorch.graph.model_graph import Branch
from cctorch.graph.walker import Walker, op_of, path_of

_LAYERS = ("conv2d", "linear", "batch_norm")


def find(walker: Walker) -> list[Branch]:
    """The innermost ones, of layers that can all be rebuilt; one for each addition: the longer of two."""
    found: list[Branch] = []
    taken: set[str] = set()
    order = {node: place for place, node in enumerate(walker.program.graph.nodes)}
    for node in order:
        if node.op != "call_function" or op_of(node) != "add":
            continue
        operands = [operand for operand in node.args[:2] if isinstance(operand, Node)]
        if len(operands) < 2 or operands[0] is operands[1] or len({_shape(operand) for operand in operands}) != 1:
            continue
        branches = [_branch(walker, node, operand, order) for operand in operands]
        # Of x + a(x) + b(x), one operand of the second addition depends on a alone, which the first one took.
        fresh = [branch for branch in branches if branch and taken.isdisjoint(branch.layers)]
        if fresh:
            longest = max(fresh, key=lambda branch: len(branch.layers))
            taken.update(longest.layers)
            found.append(longest)
    return found


def _shape(node: Node) -> torch.Size | None:
    value = node.meta.get("val")
    return value.shape if isinstance(value, Tensor) else None


def _branch(walker: Walker, addition: Node, operand: Node, order: dict[Node, int]) -> Branch | None:
    within = _exclusive(operand, addition)
    layers = sorted((node for node in within if op_of(node) in _LAYERS), key=order.__getitem__)
    names = [path_of(node) for node in layers]
    weighted = [name for name in names if name in walker.specs and walker.specs[name].groups == 1]
    kept = set(walker.left_alone) - walker.whole
    followed = all(node in walker.values for node in layers) and not set(names) & kept
    if not weighted or len(set(names)) < len(names) or not followed or _has_other_parameters(walker, within, layers):
        return None
    # Nothing that a layer has to do with reaches the addition but through the last one.
    reached, beyond = {operand}, [operand]
    while beyond:
        node = beyond.pop()
        if node is layers[-1]:
            continue
        if node in layers:
            return None
        for source in node.all_input_nodes:
            if source in within and source not in reached:
                reached.add(source)
                beyond.append(source)
    return Branch(tuple(names), weighted[-1])


def _has_other_parameters(walker: Walker, within: set[Node], layers: list[Node]) -> bool:
    """As those of a layer normalization, which would stay behind, and get no gradient."""
    sources = (source for node in within.difference(layers) for source in node.all_input_nodes)
    return any(source.name in walker.weight_paths for source in sources)


def _exclusive(operand: Node, addition: Node) -> set[Node]:
    """The nodes that nothing but the operand depends on."""
    within: set[Node] = set()
    candidates = [operand]
    while candidates:
        node = candidates.pop()
        users = set(node.users) - ({addition} if node is operand else set())
        if node.op == "call_function" and users <= within:
            within.add(node)
            candidates += [source for source in node.all_input_nodes if source not in within]
    return within
