"""A plan for a budget of measured latency: proposed from a table of layer times, corrected by measuring."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cctorch import _C
from cctorch.apply import apply, is_channels_last
from cctorch.graph import Branch, ModelGraph
from cctorch.latency import LatencyTable, LayerShape
from cctorch.latency_predictor import Predictor, shapes_of
from cctorch.streams import Narrowed, streams

__all__ = ["Latency", "search", "table_for"]

_TOLERANCE = 0.01
_ROUNDS = 8
# Seconds after which a plan has been measured for long enough: slow models' times scatter less.
_LONG = 5.0
# Layers that take so many times as long, one by one, as the whole model were timed when the device was slower.
_OUTDATED = 1.1

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
    shared: list[str] = field(default_factory=list)
    """Layers that keep the same channels of a stream as all that read it."""


@dataclass
class Found:
    solution: _C.Solution
    latency: Latency
    warnings: list[str]


def table_for(model: nn.Module, example: Tensor, batch: int) -> LatencyTable:
    """The table of the conditions of ``model(example)``: device and dtype of the one, layout of the other's weights."""
    layout = torch.channels_last if is_channels_last(model) else torch.contiguous_format
    return LatencyTable(example.device, example.dtype, layout, batch)


@dataclass
class _Setting:
    """What is searched, and how it is measured."""

    model: nn.Module
    graph: ModelGraph
    shapes: dict[str, LayerShape]
    options: _C.SolverOptions
    inputs: Tensor
    table: LatencyTable
    removable: Sequence[Branch]
    progress: Progress | None
    dense_seconds: float = 0.0

    def timed(self, plan: _C.CompressionPlan) -> nn.Module:
        """A copy of the model that a plan is carried out on."""
        smaller = apply(copy.deepcopy(self.model), plan)
        return smaller.to(memory_format=self.table.layout)  # type: ignore[call-overload,no-any-return]


class _Targets:
    """Plans by predicted ratio: finds the share of the table's cost to remove that the final graph needs."""

    def __init__(self, setting: _Setting, layers: Sequence[_C.SolverLayer], narrowed: Narrowed | None = None) -> None:
        self.setting, self.layers = setting, layers
        self.predictor = Predictor(setting.graph, setting.shapes, setting.table, narrowed)
        _add_tables(layers, self.predictor, setting)
        self.choices = _C.layer_choices(layers, setting.options, setting.progress)
        self.cost = sum(layer.choices[0].cost for layer in self.choices)
        least = sum(layer.choices[-1].cost for layer in self.choices)
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

    def objective(self, solution: _C.Solution) -> float:
        """What `select` minimizes."""
        return sum(layer.objective(loss) for layer, loss in zip(self.choices, solution.losses, strict=True))

    def _at(self, target: float) -> tuple[_C.Solution, float]:
        solution = _C.select(self.choices, self.cost, target)
        self.predictor.complete(solution.plan, self.setting.removable)
        return solution, self.predictor.seconds(solution.plan) / self.setting.dense_seconds


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
    plan may keep nothing but a constant, and the readers of a stream share one kept set where that gives up less.

    Raises:
        ValueError: no layer has a cheaper form on this device, or no plan is as fast as wanted; the message states the
            ratio that was reached.
    """
    wanted = 1 - options.target
    index = torch.arange(table.batch, device=example.device) % len(example)
    inputs = example[index].contiguous(memory_format=table.layout)
    setting = _Setting(model, graph, shapes_of(model, inputs), options, inputs, table, removable, progress)
    targets = _Targets(setting, layers)
    if all(len(layer.choices) == 1 for layer in targets.choices):
        raise ValueError(
            "compress: no smaller form of any layer is faster than the dense one on this device at batch "
            f"{table.batch}; raise latency_batch, or use budget='macs'"
        )
    [dense] = table.timer([model], inputs)
    layers_alone = targets.predictor.layers(_C.CompressionPlan())
    setting.dense_seconds = max(min(dense), layers_alone)
    targets.predictor.rest = setting.dense_seconds - layers_alone
    targets = _narrower(targets, wanted) or targets
    rounds: list[tuple[_C.Solution, Latency]] = []
    aim = wanted
    for done in range(_ROUNDS):
        if progress:
            progress("latency rounds", done, _ROUNDS)
        solution, predicted = targets.plan(aim)
        if any(solution.plan == earlier.plan for earlier, _ in rounds):
            break
        latency = _measured(setting, solution.plan, predicted)
        rounds.append((solution, latency))
        if wanted - _TOLERANCE <= latency.ratio <= wanted:
            break
        aim = _next_aim([found for _, found in rounds], wanted)
    if progress:
        progress("latency rounds", _ROUNDS, _ROUNDS)
    found = _chosen(rounds, wanted)
    if layers_alone > _OUTDATED * min(dense):
        found.warnings.append(
            f"the times of layers add up to {layers_alone:.3g} s, but the whole model takes {min(dense):.3g} s: they "
            f"were taken when the device was slower; delete {table.path} to time layers anew"
        )
    if targets.predictor.narrowed:
        found.latency.shared = targets.predictor.narrowed.readers
    return found


def _narrower(targets: _Targets, wanted: float) -> _Targets | None:
    """The same search with streams whose readers share what they keep, where it gives up less for the time wanted."""
    setting = targets.setting
    solution, predicted = targets.plan(wanted)
    if predicted > wanted or setting.options.units == "singular_values":
        return None
    kept = _worth_sharing(targets, solution)
    if not kept:
        return None
    narrowed = Narrowed(setting.graph, kept)
    found = _Targets(setting, narrowed.layers(targets.layers), narrowed)
    dense, narrow = setting.table.timer([setting.model, setting.timed(narrowed.plan)], setting.inputs)
    taken = min(narrow) / min(dense) * setting.dense_seconds
    found.predictor.rest = max(0.0, taken - found.predictor.layers(narrowed.plan))
    shared, reached = found.plan(wanted)
    better = reached <= wanted and found.objective(shared) < targets.objective(solution)
    return found if better else None


def _worth_sharing(targets: _Targets, solution: _C.Solution) -> dict[str, list[int]]:
    """The channels that the readers of each stream keep at the width that lowers objective + multiplier x seconds most.

    All else stays as in `solution`, which is resolved; readers become dense.
    """
    predictor, graph, progress = targets.predictor, targets.setting.graph, targets.setting.progress
    searched = {layer.spec.name: layer for layer in targets.layers}
    bounded = {name for name, layer in searched.items() if layer.max_rate < 1}
    multiples = {name: layer.table.multiple for name, layer in searched.items()}
    now = predictor.seconds(solution.plan)
    kept: dict[str, list[int]] = {}
    chosen = {layer.name: (layer, loss) for layer, loss in zip(targets.choices, solution.losses, strict=True)}
    reading = {layer.name for layer in solution.plan.layers if layer.kept_in}
    found = streams(graph, targets.layers, bounded, multiples)
    done, trials = 0, sum(len(stream.widths) for stream in found)
    for stream in found:
        best = 0.0
        for width in stream.widths:
            if progress:
                progress("shared streams", done, trials)
            done += 1
            shared = dict.fromkeys(stream.readers, stream.kept(width))
            plan = _with_inputs(solution.plan, shared)
            graph.channels.resolve(plan)
            narrowed = Narrowed(graph, shared)
            change = solution.multiplier * (predictor.seconds(plan) - now)
            for name in filter(reading.__contains__, stream.readers):
                layer, loss = chosen[name]
                change += layer.objective(narrowed.lost(searched[name])) - layer.objective(loss)
            if change < best:
                best = change
                kept |= shared
    if progress and trials:
        progress("shared streams", trials, trials)
    return kept


def _with_inputs(plan: _C.CompressionPlan, kept: Mapping[str, list[int]]) -> _C.CompressionPlan:
    """A copy in which these layers, if they read anything, are dense and keep these inputs."""
    copied = _C.CompressionPlan.from_json(plan.to_json())
    layers = copied.layers
    for layer in layers:
        if layer.name in kept and layer.kept_in:
            layer.kept_in, layer.gather, layer.rank, layer.layout = kept[layer.name], [], None, "channel"
    copied.layers = layers
    return copied


def _add_tables(layers: Sequence[_C.SolverLayer], predictor: Predictor, setting: _Setting) -> None:
    table, units = setting.table, setting.options.units
    removable = {branch.key: branch for branch in setting.removable}
    parts = {layer.spec.name: predictor.producers(layer.spec.name) for layer in layers}
    layouts = {layer.spec.name: _C.low_rank_layout(layer.spec, setting.options.layout) for layer in layers}
    needed = [
        shape
        for name, producers in parts.items()
        for cell in table.cost_shapes(predictor.shapes[name], producers, units, layouts[name])[2].values()
        for shape in cell
    ]
    for branch in removable.values():
        needed += [*predictor.beside(branch), *predictor.removed(branch)]
    table.time(needed, setting.progress)
    for layer in layers:
        name = layer.spec.name
        beside: list[LayerShape] = []
        left: list[LayerShape] | None = None
        if name in removable:
            beside, left = predictor.beside(removable[name]), predictor.removed(removable[name])
        layer.table = table.cost_table(
            predictor.shapes[name], parts[name], units, layouts[name], beside=beside, left=left
        )


def _measured(setting: _Setting, plan: _C.CompressionPlan, predicted: float) -> Latency:
    compressed = setting.timed(plan)
    runs: list[list[float]] = [[], []]
    begin = time.perf_counter()
    for _ in range(4):
        for total, some in zip(runs, setting.table.timer([setting.model, compressed], setting.inputs), strict=True):
            total += some
        if time.perf_counter() - begin > _LONG:
            break
    dense, smaller = runs
    ratio = statistics.median(after / before for before, after in zip(dense, smaller, strict=True))
    inputs = len(setting.inputs)
    return Latency(inputs, statistics.median(dense), statistics.median(smaller), ratio, predicted)


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
