"""Walks an exported graph and carries the channels of each tensor along."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.fx import Node

from cctorch import _C
from cctorch._C import LayerSpec
from cctorch.graph.lstm import module_of
from cctorch.graph.model_graph import Branch, ModelGraph, is_hooked, owners, runs_its_own_forward

_HOOKED = "it has hooks; remove them before it is compressed"


@dataclass(frozen=True)
class Activation:
    channels: list[int]
    dim: int


def value_of(node: Node) -> Tensor:
    value: Tensor = node.meta["val"]
    return value


def path_of(node: Node) -> str:
    """The innermost module that ran the node. A second call of a module is marked @1."""
    stack = node.meta.get("nn_module_stack") or {}
    path: str = list(stack.values())[-1][0] if stack else ""
    return path.split("@")[0]


def op_of(node: Node) -> str:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", str(target))
    name: str = target._schema.name
    return name.removeprefix("aten::").rstrip("_")


class Walker:
    def __init__(self, model: nn.Module, program: torch.export.ExportedProgram, batch: int) -> None:
        self.program = program
        self.batch = batch
        self.graph = _C.ChannelGraph()
        self.modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self.owners = owners(model)
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.weight_paths = program.graph_signature.inputs_to_parameters
        self.values: dict[Node, Activation] = {}
        self.specs: dict[str, LayerSpec] = {}
        self.left_alone: dict[str, str] = {}
        self.whole: set[str] = set()
        """Of those left alone, grouped convolutions that can go with a residual branch."""
        self.not_followed: dict[str, list[str]] = {}
        self.counting: dict[type[nn.Module], list[str]] = {}
        self.behind_lstms: set[Node] = set()
        self.warnings: list[str] = []

    def run(self, rules: "Mapping[str, Rule]") -> None:
        for node in self.program.graph.nodes:
            if op_of(node) == "lstm" or not self.behind_lstms.isdisjoint(node.all_input_nodes):
                self.behind_lstms.add(node)
            if node.op == "output":
                self.pin_inputs(node)
            elif op_of(node) == "_assert_tensor_metadata":  # of x.to(...), for the exported program alone
                continue
            elif node.op == "call_function" and node.target is not operator.getitem:
                self.follow(node, rules.get(op_of(node)))

    def follow(self, node: Node, rule: "Rule | None") -> None:
        activation = rule(self, node) if rule else None
        if activation is not None and value_of(node).shape[activation.dim] == len(activation.channels):
            self.values[node] = activation
            return
        read, place = self.pin_inputs(node), path_of(node) or type(self.modules[""]).__name__
        paths = [self.weight_paths[source.name] for source in node.all_input_nodes if source.name in self.weight_paths]
        if paths and isinstance(node.target, HigherOrderOperator):
            layers = ", ".join(dict.fromkeys(f"'{path.rpartition('.')[0]}'" for path in paths))
            reason = f"{layers} in it are left alone, not counted"
            self.warnings.append(f"{op_of(node)} in '{place}' is not followed: {reason}")
        elif read and op_of(node) not in ("conv2d", "linear") and not self.is_lstm(node):
            self.not_followed.setdefault(op_of(node), []).append(place)

    def is_lstm(self, node: Node) -> bool:
        """Whether layers stand for it, although its channels are not followed."""
        return op_of(node) == "lstm" and isinstance(self.modules.get(path_of(node)), nn.LSTM)

    def keep_within(self, kind: type[nn.Module]) -> bool:
        """Pins the channels that modules of a kind read and write, with one warning. False if that was done before."""
        if kind in self.counting:
            return False
        paths = [path for path, module in self.modules.items() if type(module) is kind]
        self.counting[kind] = paths
        for node in self.program.graph.nodes:
            if node.op == "call_function" and _within(paths, path_of(node)):
                self.pin(node)
                self.pin_inputs(node)
        return True

    def replaceable(self) -> tuple[list[str], list[str]]:
        """In whose place `apply` may put other modules: layers, and normalizations, which stay ones."""
        paths = dict.fromkeys(module_of(spec) for spec in self.specs.values())
        layers = [path for path in paths if path and path not in self.left_alone]
        return layers, [name for name, module in self.modules.items() if name and type(module) is nn.BatchNorm2d]

    def leave_alone(self, reasons: Mapping[str, str]) -> None:
        """Pins the channels that layers read and write which were followed."""
        for node in self.program.graph.nodes:
            if node.op == "call_function" and path_of(node) in reasons:
                self.pin(node)
                self.pin_inputs(node)
        self.left_alone = {**reasons, **self.left_alone}
        self.whole.difference_update(reasons)

    def unseen(self) -> str | None:
        """A layer that the graph does not contain, so that nothing is known of its place."""
        used = {node.name for node in self.program.graph.nodes if node.op == "placeholder" and node.users}
        ran = {id(self.parameters[path]) for name, path in self.weight_paths.items() if name in used}
        for path, module in self.modules.items():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
                weight = module._parameters.get("weight")
                if weight is not None and id(weight) not in ran:
                    return path
        return None

    def finish(self, branches: list[Branch]) -> ModelGraph:
        warnings = [f"layer '{name}' is left alone: {reason}" for name, reason in self.left_alone.items()]
        for op, paths in self.not_followed.items():
            places = ", ".join(f"'{path}'" for path in dict.fromkeys(paths))
            warnings.append(f"{op} in {places} is not followed: all channels that it reads stay")
        for kind, paths in self.counting.items():
            places = ", ".join(f"'{path}'" for path in paths if path)
            place = f"{kind.__name__} in {places}" if places else kind.__name__
            warnings.append(f"{place} computes with numbers of channels: all channels in it stay")
        specs = list(self.specs.values())
        of_modules = {spec.name for spec in specs if module_of(spec) in self.left_alone}
        left_alone = set(self.left_alone) - {module_of(spec) for spec in specs} | of_modules
        return ModelGraph(specs, self.graph, warnings + self.warnings, left_alone, branches)

    def pin(self, node: Node) -> bool:
        activation = self.values.get(node)
        if activation is not None:
            self.graph.pin(activation.channels)
        return activation is not None

    def pin_inputs(self, node: Node) -> bool:
        return sum(self.pin(source) for source in node.all_input_nodes) > 0

    def read(self, node: Node, dim: int) -> list[int]:
        """The channels along one dimension of a tensor; fixed ones where they were not followed."""
        activation = self.values.get(node)
        if activation is not None and activation.dim == dim:
            return activation.channels
        self.pin(node)
        return self.graph.input(value_of(node).shape[dim])

    def record(self, spec: LayerSpec) -> None:
        earlier = self.specs.get(spec.name)
        self.specs[spec.name] = spec if earlier is None else _with_positions(spec, earlier.positions + spec.positions)

    def why_not_followed(self, node: Node, weight: Node, path: str) -> str | None:
        """The reason why the layer cannot be rebuilt as the module at ``path``, if there is one."""
        module = self.modules.get(path)
        if weight.name not in self.weight_paths:
            return "its weight is not a parameter"
        if not isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d) or not runs_its_own_forward(module):
            return f"{type(module).__name__} computes something of its own"
        if is_hooked(module):
            return _HOOKED
        if self.parameters[self.weight_paths[weight.name]] is not module.weight:
            return "its weight belongs to another module"
        shared = self.shared(module)
        if shared is not None:
            return shared
        arguments = [weight, *(a for a in node.all_input_nodes if a.name in self.weight_paths)]
        if any(len(argument.users) > 1 for argument in arguments):
            return "it is used more than once"
        return None

    def why_lstm_not_followed(self, node: Node, module: nn.LSTM, path: str) -> str | None:
        """The same of an LSTM; one that is called several times loses no more than its weights' ranks."""
        if not runs_its_own_forward(module):
            return f"{type(module).__name__} computes something of its own, or a weight of it is not a parameter"
        if is_hooked(module):
            return _HOOKED
        shared = self.shared(module)
        if shared is not None:
            return shared
        read = {self.weight_paths.get(source.name) for source in node.all_input_nodes}
        own = {f"{path}.{name}".lstrip(".") for name in module._parameters}
        return None if own <= read else "its weights belong to another module"

    def shared(self, module: nn.Module) -> str | None:
        for parameter in module._parameters.values():
            if parameter is not None and len(self.owners[id(parameter)]) > 1:
                return f"it shares a parameter: {', '.join(self.owners[id(parameter)])}"
        return None


def _within(paths: list[str], place: str) -> bool:
    return any(path == "" or f"{place}.".startswith(f"{path}.") for path in paths)


def _with_positions(spec: LayerSpec, positions: int) -> LayerSpec:
    return LayerSpec(
        spec.name,
        spec.kind,
        spec.in_channels,
        spec.out_channels,
        spec.kernel_height,
        spec.kernel_width,
        positions,
        spec.groups,
        spec.bits,
        spec.stride_height,
        spec.stride_width,
    )


Rule = Callable[[Walker, Node], Activation | None]
