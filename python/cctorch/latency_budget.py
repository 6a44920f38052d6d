"""A plan for a budget of measured latency: proposed from a table of layer times, corrected by measuring."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cctorch import _C, branches
from cctorch.apply import apply, is_channels_last
from cctorch.graph import Branch, ModelGraph
from cctorch.latency import LatencyTable, LayerShape
from cctorch.modes import evaluating

__all__ = ["Latency", "search", "table_for"]

_TOLERANCE = 0.01
_ROUNDS = 8
# Seconds after which a plan has been measured for long enough: slow models' times scatter less.
_LONG = 5.0

Progress = Callable[[str, int, int], None]


@dataclass
class Latency:
    """Seconds of one forward pass of a batch, dense and compressed, and what the layers' times had predicted."""

    batch: int
    dense_seconds: float
    seconds: float
    ratio: float
    """Median over pairs of runs, one of each model: seconds compressed / seconds dense."""
    predicted_ratio: float
    rounds: list[tuple[float, float]] = field(default_factory=list)
    """(predicted, measured) ratio of each plan that was tried."""


@dataclass
class Found:
    solution: _C.Solution
    latency: Latency
    warnings: list[str]


def table_for(model: nn.Module, example: Tensor, batch: int) -> LatencyTable:
    """The table of the conditions of ``model(example)``: device and dtype of the one, layout of the other's weights."""
    layout = torch.channels_last if is_channels_last(model) else torch.contiguous_format
    return LatencyTable(example.device, example.dtype, layout, batch)


class Predictor:
    """Seconds of a model under a plan: those of its layers at their final sizes, and the rest, which stays."""

    def __init__(self, model: nn.Module, graph: ModelGraph, example: Tensor, table: LatencyTable) -> None:
        self.graph, self.table = graph, table
        self.shapes = _shapes(model, example)
        self.rest = 0.0
        self.dense = self._layers(_C.CompressionPlan())

    def include_rest(self, model_seconds: float) -> None:
        """What the model takes besides its layers: activations, sums, pooling."""
        self.rest = max(0.0, model_seconds - self.dense)

    def producers(self, layer: str) -> list[LayerShape]:
        return [self.shapes[name] for name in self.graph.channels.producers(layer) if name in self.shapes]

    def beside(self, branch: Branch) -> list[LayerShape]:
        """What else goes with a branch than its key and the layers that make the key's inputs."""
        counted = {branch.key, *self.graph.channels.producers(branch.key)}
        return [self.shapes[name] for name in branch.layers if name not in counted]

    def removed(self, branch: Branch) -> list[LayerShape]:
        """What is left of a branch."""
        plan = _C.CompressionPlan()
        branches.remove(plan, [branch], self.graph)
        return [self.shapes[layer.name].under(layer) for layer in plan.layers]

    def ratio(self, plan: _C.CompressionPlan) -> float:
        return (self.rest + self._layers(plan)) / (self.rest + self.dense)

    def drop_idle_ranks(self, plan: _C.CompressionPlan) -> None:
        """Where a factored layer is no faster than its exact weight, once filters that nobody reads are gone."""
        layers = plan.layers
        for layer in layers:
            if layer.rank is not None:
                factored = self.shapes[layer.name].under(layer)
                exact = dataclasses.replace(factored, rank=None)
                if self.table.seconds(exact) <= self.table.seconds(factored):
                    layer.rank = None
        plan.layers = layers

    def _layers(self, plan: _C.CompressionPlan) -> float:
        planned = {layer.name: layer for layer in plan.layers}
        shapes = [shape.under(planned[name]) if name in planned else shape for name, shape in self.shapes.items()]
        self.table.time(shapes)
        return sum(self.table.seconds(shape) for shape in shapes)


class _Targets:
    """Plans by predicted ratio: finds the share of the table's cost to remove that the final graph needs."""

    def __init__(self, choices: list[_C.LayerChoices], predictor: Predictor, removable: Sequence[Branch]) -> None:
        self.choices, self.predictor, self.removable = choices, predictor, removable
        self.cost = sum(layer.choices[0].cost for layer in choices)
        least = sum(layer.choices[-1].cost for layer in choices)
        self.highest = (1 - least / self.cost) * (1 - 1e-9)

    def plan(self, ratio: float) -> tuple[_C.Solution, float]:
        """The plan with the highest predicted ratio that is not above ``ratio``, or the one with the lowest of all."""
        best = self._at(self.highest)
        low, high = 0.0, self.highest
        for _ in range(14):
            middle = (low + high) / 2
            solution, predicted = self._at(middle)
            if predicted > ratio:
                low = middle
                continue
            high = middle
            if predicted > best[1] or best[1] > ratio:
                best = solution, predicted
        return best

    def _at(self, target: float) -> tuple[_C.Solution, float]:
        solution = _C.select(self.choices, self.cost, target)
        plan, graph = solution.plan, self.predictor.graph
        emptied = {layer.name for layer in plan.layers if not layer.kept_in}
        branches.remove(plan, [branch for branch in self.removable if branch.key in emptied], graph)
        graph.channels.resolve(plan)
        self.predictor.drop_idle_ranks(plan)
        return solution, self.predictor.ratio(plan)


def search(
    model: nn.Module,
    graph: ModelGraph,
    layers: Sequence[_C.SolverLayer],
    options: _C.SolverOptions,
    example: Tensor,
    table: LatencyTable,
    progress: Progress | None = None,
    removable: Sequence[Branch] = (),
) -> Found:
    """The plan with which the model takes 1 - ``options.target`` of its dense time, measured.

    Every layer's cost is read from ``table``; the plan is carried out on a copy of the model, which takes turns with
    the dense one; what the prediction was off by corrects the next plan, at most 8 times. Of the branches `removable` a
    plan may keep nothing but a constant.

    Raises:
        ValueError: no layer has a cheaper form on this device, or no plan is as fast as wanted; the message states the
            ratio that was reached.
    """
    wanted = 1 - options.target
    index = torch.arange(table.batch, device=example.device) % len(example)
    inputs = example[index].contiguous(memory_format=table.layout)
    predictor = Predictor(model, graph, inputs, table)
    _add_tables(layers, predictor, options, {branch.key: branch for branch in removable}, progress)
    [dense] = table.timer([model], inputs)
    predictor.include_rest(min(dense))
    choices = _C.layer_choices(layers, options, progress)
    if all(len(layer.choices) == 1 for layer in choices):
        raise ValueError(
            "compress: no smaller form of any layer is faster than the dense one on this device at batch "
            f"{table.batch}; raise latency_batch, or use budget='macs'"
        )
    targets = _Targets(choices, predictor, removable)
    rounds: list[tuple[_C.Solution, Latency]] = []
    aim = wanted
    for done in range(_ROUNDS):
        if progress:
            progress("latency rounds", done, _ROUNDS)
        solution, predicted = targets.plan(aim)
        if any(solution.plan == earlier.plan for earlier, _ in rounds):
            break
        latency = _measured(model, solution.plan, inputs, table, predicted)
        rounds.append((solution, latency))
        if wanted - _TOLERANCE <= latency.ratio <= wanted:
            break
        aim = _next_aim([found for _, found in rounds], wanted)
    if progress:
        progress("latency rounds", _ROUNDS, _ROUNDS)
    return _chosen(rounds, wanted)


def _add_tables(
    layers: Sequence[_C.SolverLayer],
    predictor: Predictor,
    options: _C.SolverOptions,
    removable: Mapping[str, Branch],
    progress: Progress | None,
) -> None:
    table = predictor.table
    parts = {layer.spec.name: predictor.producers(layer.spec.name) for layer in layers}
    needed = [
        shape
        for name, producers in parts.items()
        for cell in table.cost_shapes(predictor.shapes[name], producers, options.units)[2].values()
        for shape in cell
    ]
    for branch in removable.values():
        needed += [*predictor.beside(branch), *predictor.removed(branch)]
    table.time(needed, progress)
    for layer in layers:
        name = layer.spec.name
        beside: list[LayerShape] = []
        left: list[LayerShape] | None = None
        if name in removable:
            beside, left = predictor.beside(removable[name]), predictor.removed(removable[name])
        layer.table = table.cost_table(predictor.shapes[name], parts[name], options.units, beside=beside, left=left)


def _measured(
    model: nn.Module, plan: _C.CompressionPlan, inputs: Tensor, table: LatencyTable, predicted: float
) -> Latency:
    compressed = apply(copy.deepcopy(model), plan).to(memory_format=table.layout)  # type: ignore[call-overload]
    runs: list[list[float]] = [[], []]
    begin = time.perf_counter()
    for _ in range(4):
        for total, some in zip(runs, table.timer([model, compressed], inputs), strict=True):
            total += some
        if time.perf_counter() - begin > _LONG:
            break
    dense, smaller = runs
    ratio = statistics.median(after / before for before, after in zip(dense, smaller, strict=True))
    return Latency(len(inputs), statistics.median(dense), statistics.median(smaller), ratio, predicted)


def _next_aim(found: Sequence[Latency], wanted: float) -> float:
    """Secant through the last two (predicted, measured), towards the middle of the tolerated range.

    Plans are steps: as long as none is fast enough, the aim is below all that were tried.
    """
    slope = 1.0
    if len(found) > 1:
        before, last = found[-2:]
        step = last.predicted_ratio - before.predicted_ratio
        if abs(step) > 1e-6:
            slope = min(max((last.ratio - before.ratio) / step, 0.3), 3.0)
    aim = found[-1].predicted_ratio + (wanted - _TOLERANCE / 2 - found[-1].ratio) / slope
    if all(latency.ratio > wanted for latency in found):
        aim = min(aim, min(latency.predicted_ratio for latency in found) - 1e-6)
    return aim


def _chosen(rounds: list[tuple[_C.Solution, Latency]], wanted: float) -> Found:
    history = [(latency.predicted_ratio, latency.ratio) for _, latency in rounds]
    met = [(solution, latency) for solution, latency in rounds if latency.ratio <= wanted]
    if not met:
        reached = min(measured for _, measured in history)
        raise ValueError(
            f"compress: target = {1 - wanted:g} of the latency at batch {rounds[0][1].batch}: the fastest plan "
            f"(of {len(rounds)}) takes {reached:.3f} of the dense time, wanted {wanted:.3f}; lower the target"
        )
    solution, latency = max(met, key=lambda found: found[1].ratio)
    latency.rounds = history
    warnings = []
    if latency.ratio < wanted - _TOLERANCE:
        warnings.append(
            f"the plan takes {latency.ratio:.3f} of the dense time, {wanted:.3f} was asked for: no plan tried is closer"
        )
    return Found(solution, latency, warnings)


def _shapes(model: nn.Module, example: Tensor) -> dict[str, LayerShape]:
    """Shapes of the model's layers at one forward pass, by path."""
    shapes: dict[str, LayerShape] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):

            def record(layer: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                assert isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d)
                shapes[name] = LayerShape.of(layer, inputs[0].shape)

            hooks.append(module.register_forward_pre_hook(record))
    try:
        with evaluating(model):
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return shapes
