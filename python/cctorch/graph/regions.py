"""Parts of a forward pass under ``torch.autocast`` or ``torch.enable_grad``, which an exported program holds apart."""

import operator

from torch._ops import HigherOrderOperator
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from cctorch.graph.walker import op_of

_REGIONS = ("wrap_with_autocast", "wrap_with_set_grad_enabled")


def inline_regions(program: ExportedProgram) -> ExportedProgram:
    """Puts the operators of such parts where they run; to be walked, not to be run. Returns ``program``."""
    _inline_regions(program.graph_module)
    return program


def runs_subgraphs(program: ExportedProgram) -> bool:
    """Whether operators run parts of the model of their own, as ``torch.cond`` does."""
    return any(isinstance(node.target, HigherOrderOperator) for node in program.graph.nodes)


def _inline_regions(within: GraphModule) -> None:
    for node in list(within.graph.nodes):
        if isinstance(node.target, HigherOrderOperator) and op_of(node) in _REGIONS:
            _inline(within, node)


def _inline(within: GraphModule, region: Node) -> None:
    position, body = next(
        (i, body) for i, arg in enumerate(region.args) if isinstance(body := _attribute(within, arg), GraphModule)
    )
    _inline_regions(body)
    inputs = [node for node in body.graph.nodes if node.op == "placeholder"]
    values = dict(zip(inputs, region.args[position + 1 :], strict=True))
    with within.graph.inserting_before(region):
        results = within.graph.graph_copy(body.graph, values)
    assert isinstance(results, tuple | list)
    for user in list(region.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        within.graph.erase_node(user)
    within.graph.erase_node(region)


def _attribute(within: GraphModule, argument: object) -> object:
    if isinstance(argument, Node) and argument.op == "get_attr":
        return within._modules.get(str(argument.target))
    return None
