"""What each ATen operator does with the channels it reads. None: it is not followed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.fx import Node

from cctorch._C import LayerSpec
from cctorch.graph import lstm
from cctorch.graph.model_graph import is_hooked, normalizes_as_usual
from cctorch.graph.walker import Activation, Rule, Walker, op_of, path_of, value_of

if TYPE_CHECKING:
    from cctorch._C import LayerKind


def _argument(node: Node, position: int, name: str, default: object) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _integer(node: Node, position: int, name: str, default: int) -> int:
    value = _argument(node, position, name, default)
    assert isinstance(value, int)
    return value


def _stride(node: Node) -> tuple[int, int]:
    value = _argument(node, 3, "stride", 1)
    sides = value if isinstance(value, Sequence) else [value]
    high, wide = sides[0], sides[-1]
    assert isinstance(high, int)
    assert isinstance(wide, int)
    return high, wide


def _layer(walker: Walker, node: Node) -> Activation | None:
    """conv2d and linear."""
    source, weight = node.args[:2]
    assert isinstance(source, Node)
    assert isinstance(weight, Node)
    convolution = op_of(node) == "conv2d"
    shape, out = value_of(weight).shape, value_of(weight).shape[0]
    groups = _integer(node, 6, "groups", 1) if convolution else 1
    path = path_of(node)
    module_ran = isinstance(walker.modules.get(path), nn.Conv2d | nn.Linear)
    name = path if module_ran else f"{path}.{node.name}".lstrip(".")
    depthwise = groups > 1 and groups == shape[1] * groups == out
    kind: LayerKind = "depthwise_conv2d" if depthwise else "conv2d" if convolution else "linear"
    high, wide = shape[2:] if convolution else (1, 1)
    positions = _positions(value_of(node), out, walker.batch, node in walker.behind_lstms)
    bits = 8 * value_of(weight).element_size()
    down, across = _stride(node) if convolution else (1, 1)
    walker.record(LayerSpec(name, kind, shape[1] * groups, out, high, wide, positions, groups, bits, down, across))

    reason = walker.why_not_followed(node, weight, path)
    if reason is None and convolution and value_of(node).dim() != 4:
        reason = f"its output has {value_of(node).dim()} dimensions, expected 4"
    if reason is not None:
        walker.left_alone.setdefault(name, reason)
        return None
    dim = 1 if convolution else value_of(node).dim() - 1
    channels = walker.graph.layer(name, kind, walker.read(source, dim), out)
    if groups > 1 and not depthwise:
        walker.left_alone.setdefault(name, f"it is a grouped convolution, groups = {groups}")
        walker.whole.add(name)
        walker.pin_inputs(node)
        walker.graph.pin(channels)
    return Activation(channels, dim)


def _positions(output: Tensor, channels: int, batch: int, behind_lstm: bool) -> int:
    """Of one example; of the whole pass where the output does not grow with the batch (a table that a layer reads)."""
    of_all = output.numel() // channels
    # An LSTM has the batch second, as a rule; and torch.export gives its states a dimension too many in front of it.
    grows = output.shape[0] % batch == 0 or (behind_lstm and batch in output.shape[1:-1])
    return of_all // batch if output.dim() > 1 and grows else of_all


def _lstm(walker: Walker, node: Node) -> Activation | None:
    """Its weights become layers, of which singular values alone can go: all channels that it reads or gives stay."""
    path, source = path_of(node), node.args[0]
    module = walker.modules.get(path)
    if isinstance(module, nn.LSTM):
        assert isinstance(source, Node)
        rows = value_of(source).shape[:-1].numel()
        # The example has several examples; a sequence that they share is run once.
        steps = rows // walker.batch if rows % walker.batch == 0 else rows
        for spec in lstm.specs(path, module, steps):
            walker.record(spec)
        reason = walker.why_lstm_not_followed(node, module, path)
        if reason is not None:
            walker.left_alone.setdefault(path, reason)
    return None


def _batch_norm(walker: Walker, node: Node) -> Activation | None:
    source, weight = node.args[0], node.args[1]
    activation = walker.values.get(source) if isinstance(source, Node) else None
    path = path_of(node)
    module = walker.modules.get(path)
    if (
        activation is None
        or activation.dim != 1
        or not isinstance(module, nn.BatchNorm2d)
        or not normalizes_as_usual(module)
        or is_hooked(module)
    ):
        return None
    if isinstance(weight, Node) and walker.why_not_followed(node, weight, path) is not None:
        return None
    channels = walker.graph.layer(path, "batch_norm2d", activation.channels, len(activation.channels))
    return Activation(channels, 1)


def _source(walker: Walker, node: Node) -> tuple[Node, Activation] | None:
    """The one tensor that the node reads, if its channels are known."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or node.all_input_nodes != [source] or source not in walker.values:
        return None
    return source, walker.values[source]


def _unary(walker: Walker, node: Node) -> Activation | None:
    found = _source(walker, node)
    return found[1] if found else None


def _spatial(walker: Walker, node: Node) -> Activation | None:
    """Pooling and resizing work on the last two dimensions."""
    found = _source(walker, node)
    return found[1] if found and found[1].dim < value_of(found[0]).dim() - 2 else None


def _binary(walker: Walker, node: Node) -> Activation | None:
    tensors = [argument for argument in node.args[:2] if isinstance(argument, Node)]
    followed = [tensor for tensor in tensors if tensor in walker.values]
    if not followed or node.all_input_nodes != list(dict.fromkeys(tensors)):
        return None
    if not all(isinstance(tensor.meta["val"], Tensor) for tensor in tensors):
        return None
    from_the_end = {walker.values[tensor].dim - value_of(tensor).dim() for tensor in followed}
    if len(from_the_end) != 1:
        return None
    dim = from_the_end.pop()
    size = value_of(node).shape[dim]
    joined: list[int] | None = None
    for tensor in tensors:
        value = value_of(tensor)
        broadcast = value.dim() < -dim or (value.shape[dim] == 1 and size > 1)
        if broadcast or (value.numel() == 1 and tensor not in followed):
            walker.pin(tensor)
        elif tensor.op == "placeholder":
            # A parameter with a value for each channel: it would not shrink with them.
            return None
        else:
            channels = walker.read(tensor, value.dim() + dim)
            joined = channels if joined is None else walker.graph.join(joined, channels)
    return None if joined is None else Activation(joined, value_of(node).dim() + dim)


def _concat(walker: Walker, node: Node) -> Activation | None:
    tensors = node.args[0]
    assert isinstance(tensors, Sequence)
    # Lists are begun with an empty tensor now and then, which may be torch.empty(0), whatever the others' dimensions.
    parts = [tensor for tensor in tensors if isinstance(tensor, Node) and value_of(tensor).numel() > 0]
    dim = _integer(node, 1, "dim", 0) % value_of(node).dim()
    dims = {walker.values[part].dim for part in parts if part in walker.values}
    if len(dims) != 1:
        return None
    channel_dim = dims.pop()
    channels = [walker.read(part, channel_dim) for part in parts]
    if dim == channel_dim:
        return Activation(walker.graph.concat(channels), dim)
    joined = channels[0]
    for other in channels[1:]:
        joined = walker.graph.join(joined, other)
    return Activation(joined, channel_dim)


def _flatten(walker: Walker, node: Node) -> Activation | None:
    found = _source(walker, node)
    if found is None:
        return None
    source, activation = found
    shape = value_of(source).shape
    start = _integer(node, 1, "start_dim", 0) % len(shape)
    end = _integer(node, 2, "end_dim", -1) % len(shape)
    if start > activation.dim:
        return activation
    if start == activation.dim:
        features = shape[start + 1 : end + 1].numel()
        return Activation(walker.graph.flatten(activation.channels, features), start)
    return None


def _view(walker: Walker, node: Node) -> Activation | None:
    """view(N, -1) and view(N, -1, 1, 1): any other list of sizes is written into the user's code."""
    found = _source(walker, node)
    sizes = _argument(node, 1, "size", None)
    if found is None or not isinstance(sizes, Sequence) or found[1].dim != 1:
        return None
    if list(sizes[:2]) != [walker.batch, -1] or any(size != 1 for size in sizes[2:]):
        return None
    features = value_of(found[0]).shape[2:].numel()
    return Activation(walker.graph.flatten(found[1].channels, features), 1)


def _slice(walker: Walker, node: Node) -> Activation | None:
    found = _source(walker, node)
    if found is None:
        return None
    dim, start = _integer(node, 1, "dim", 0), _argument(node, 2, "start", None)
    end, step = _argument(node, 3, "end", None), _argument(node, 4, "step", 1)
    whole = start in (None, 0) and (end is None or end == 2**63 - 1) and step == 1
    return found[1] if whole or dim % value_of(found[0]).dim() != found[1].dim else None


def _pad(walker: Walker, node: Node) -> Activation | None:
    found = _source(walker, node)
    amounts = _argument(node, 1, "pad", None)
    if found is None or not isinstance(amounts, Sequence):
        return None
    position = 2 * (value_of(found[0]).dim() - 1 - found[1].dim)
    before, after = [*amounts[position : position + 2], 0, 0][:2]
    if before == after == 0:
        return found[1]
    if min(before, after) < 0 or (op_of(node) == "pad" and _argument(node, 2, "mode", "constant") != "constant"):
        return None
    # Channels of zeros, as many whatever is removed: the parameter-free shortcut of He et al. 2016.
    first, last = (walker.graph.input(count) if count else [] for count in (before, after))
    return Activation(walker.graph.concat([first, found[1].channels, last]), found[1].dim)


def _dims(node: Node, rank: int) -> list[int] | None:
    dims = _argument(node, 1, "dim", None)
    if isinstance(dims, int):
        dims = [dims]
    return [int(str(dim)) % rank for dim in dims] if isinstance(dims, Sequence) and dims else None


def _reduce(walker: Walker, node: Node) -> Activation | None:
    found = _source(walker, node)
    dims = _dims(node, value_of(found[0]).dim()) if found else None
    if found is None or dims is None or found[1].dim in dims:
        return None
    if _argument(node, 2, "keepdim", False):
        return found[1]
    return Activation(found[1].channels, found[1].dim - sum(dim < found[1].dim for dim in dims))


def _squeeze(walker: Walker, node: Node) -> Activation | None:
    found = _source(walker, node)
    dims = _dims(node, value_of(found[0]).dim()) if found else None
    if found is None or dims is None or found[1].dim in dims:
        return None
    gone = [dim for dim in dims if dim < found[1].dim and value_of(found[0]).shape[dim] == 1]
    return Activation(found[1].channels, found[1].dim - len(gone))


def _unsqueeze(walker: Walker, node: Node) -> Activation | None:
    found = _source(walker, node)
    dims = _dims(node, value_of(node).dim())
    if found is None or dims is None:
        return None
    return Activation(found[1].channels, found[1].dim + (dims[0] <= found[1].dim))


def _permute(walker: Walker, node: Node) -> Activation | None:
    found = _source(walker, node)
    dims = _dims(node, value_of(node).dim())
    if found is None or dims is None:
        return None
    if op_of(node) == "transpose":
        a, b = dims[0], int(str(node.args[2])) % value_of(node).dim()
        dims = [b if dim == a else a if dim == b else dim for dim in range(value_of(node).dim())]
    return Activation(found[1].channels, dims.index(found[1].dim))


_ELEMENT_WISE = (
    *("relu", "relu6", "hardtanh", "silu", "hardswish", "hardsigmoid", "gelu", "sigmoid", "tanh", "leaky_relu", "elu"),
    *("selu", "celu", "mish", "softplus", "softsign", "log_sigmoid"),
    *("abs", "neg", "exp", "sqrt", "rsqrt", "square", "pow", "clamp", "clamp_min", "clamp_max"),
    *("dropout", "feature_dropout", "alpha_dropout"),
    *("clone", "contiguous", "detach", "alias", "to", "_to_copy", "lift_fresh_copy"),
)
_POOLS_AND_RESIZES = (
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"),
    *("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"),
)
RULES: dict[str, Rule] = {
    "conv2d": _layer,
    "linear": _layer,
    "lstm": _lstm,
    "batch_norm": _batch_norm,
    "cat": _concat,
    "flatten": _flatten,
    "slice": _slice,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    **dict.fromkeys(("view", "reshape", "_unsafe_view"), _view),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("mean", "sum", "amax", "amin"), _reduce),
    **dict.fromkeys(("permute", "transpose"), _permute),
    **dict.fromkeys(("add", "sub", "rsub", "mul", "div", "maximum", "minimum"), _binary),
    **dict.fromkeys(_ELEMENT_WISE, _unary),
    **dict.fromkeys(_POOLS_AND_RESIZES, _spatial),
}
