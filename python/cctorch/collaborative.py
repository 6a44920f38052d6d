"""Collaborative Compression (Li et al., "Towards Compact CNNs via Collaborative Compression", CVPR 2021).

Input channels and singular values of every layer compete in one ranking, on one budget: multiply-accumulates,
parameters or measured latency. The solver is in C++ (`csrc/collaborative`); this module feeds it a PyTorch model.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from cctorch import _C, branches, distributed, latency_budget, layer_choice
from cctorch.gradients import LossFunction, Progress, mean_gradients, weight_of
from cctorch.graph import Branch, ModelGraph, trace
from cctorch.importance import Head, importances
from cctorch.latency import LatencyTable, Layout
from cctorch.latency_budget import Latency
from cctorch.plan import CompressionPlan, LayerSpec

__all__ = ["Compression", "compress", "solve", "solve_latency"]

Budget = Literal["macs", "parameters", "bytes", "latency"]
Count = Literal["final", "nominal"]


@dataclass
class Compression:
    """A plan, and how it came about."""

    plan: CompressionPlan
    curves: list[_C.RateCurve]
    model_specs: list[LayerSpec]
    dense_macs: int
    nominal_macs: int
    """Removed input channels and singular values counted: the method's own budget."""
    final_macs: int
    """Filters that nobody reads any more counted too."""
    gradient_seconds: float
    curve_seconds: float
    heuristic_seconds: float
    gradients: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """Of the mean loss, for each layer that was searched: `compress` takes them for another target."""
    warnings: list[str] = field(default_factory=list)
    latency: Latency | None = None
    """Predicted and measured, where latency was the budget."""
    lower: Callable[[float], "Compression"] | None = field(default=None, repr=False, compare=False)
    """What `at` calls; it holds the search, and with it the weights and gradients."""

    @property
    def nominal_reduction(self) -> float:
        return 1.0 - self.nominal_macs / self.dense_macs

    @property
    def final_reduction(self) -> float:
        return 1.0 - self.final_macs / self.dense_macs

    def at(self, target: float) -> "Compression":
        """What `compress` finds for a target that is not above this one's, from the same gradients and the same search.

        Raises:
            ValueError: the target is above this one's or not above 0, or falls short; or there is no search to go
                back to: a budget of latency has one for each target, and only rank 0 has one of several ranks.

        Example:
            >>> import cctorch, torch
            >>> from torch import nn
            >>> model = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(4)), nn.Flatten(), nn.Linear(128, 10))
            >>> images = torch.randn(4, 8, 12, 12)
            >>> highest = cctorch.compress(model, [(images, torch.arange(4))], images, target=0.4)
            >>> [highest.at(target).final_reduction > target - 0.01 for target in (0.2, 0.3, 0.4)]
            [True, True, True]
        """
        if self.lower is None:
            raise ValueError(
                f"Compression.at: target = {target:g}, but no search is kept with a budget of latency, nor on any rank "
                "but 0; call compress for this target"
            )
        found = self.lower(target)
        found.gradients = self.gradients
        return found


def solve(
    model: nn.Module,
    graph: ModelGraph,
    gradients: dict[str, Tensor],
    options: _C.SolverOptions,
    *,
    count: Count = "final",
    bounds: Mapping[str, float] | None = None,
    progress: Progress | None = None,
    gradient_seconds: float = 0.0,
) -> Compression:
    """Turns the gradients of a traced model's layers into a plan: rates (eq. E2), units (eq. E3), dead filters.

    Raises:
        ValueError: a weight or gradient is not finite, no allocation reaches the target, or what was reached falls
            short of the target by more than 1 % of the model's budget.
    """
    dense = _C.remaining(graph.specs, CompressionPlan(), options.budget, False)
    search = _C.Search(_solver_layers(model, graph, gradients, bounds or {}), dense, options, progress)

    def at(target: float) -> Compression:
        solution = search.at(target) if count == "nominal" else search.at_final(target, graph.specs, graph.channels)
        nominal_macs = _C.nominal_macs(graph.specs, solution.plan)
        left = _C.remaining(graph.specs, solution.plan, options.budget, False)
        graph.channels.resolve(solution.plan)
        _C.drop_idle_ranks(graph.specs, solution.plan)
        if count == "final":
            left = _C.remaining(graph.specs, solution.plan, options.budget, True)
        if 1.0 - left / dense < target - 0.01:
            raise ValueError(
                f"compress: target = {target:g}, but the plan removes only {1.0 - left / dense:.4f} of the "
                f"model's {options.budget}; lower the target"
            )
        compression = _compression(graph, solution, nominal_macs, gradient_seconds)
        compression.lower = at
        return compression

    return at(options.target)


def solve_latency(
    model: nn.Module,
    graph: ModelGraph,
    gradients: dict[str, Tensor],
    options: _C.SolverOptions,
    example: Tensor,
    table: LatencyTable,
    *,
    importance: Mapping[str, float] | None = None,
    bounds: Mapping[str, float] | None = None,
    progress: Progress | None = None,
    gradient_seconds: float = 0.0,
) -> Compression:
    """Turns the gradients of a traced model's layers into a plan that removes ``options.target`` of the measured time.

    With the `importance` of each layer, its loss is weighed by that in place of its cost (E2), and whole residual
    branches may go: those of which all layers are searched, and none has a bound.

    Raises:
        ValueError: a weight or gradient is not finite, or no plan is that fast; the message states what was reached.
    """
    start = time.perf_counter()
    options.budget = "table"
    layers = _solver_layers(model, graph, gradients, bounds or {})
    removable: list[Branch] = []
    if importance:
        for layer in layers:
            layer.importance = importance[layer.spec.name]
        bounded = {name for name, bound in (bounds or {}).items() if bound < 1}
        free = branches.within(graph, gradients.keys(), bounded)
        removable = branches.removable(model, graph, free, example)
    found = latency_budget.search(model, graph, layers, options, example, table, progress, removable)
    found.solution.plan.target = options.target
    nominal_macs = _C.nominal_macs(graph.specs, found.solution.plan)
    compression = _compression(graph, found.solution, nominal_macs, gradient_seconds)
    compression.heuristic_seconds = time.perf_counter() - start
    compression.warnings += found.warnings
    compression.latency = found.latency
    return compression


def _solver_layers(
    model: nn.Module, graph: ModelGraph, gradients: dict[str, Tensor], bounds: Mapping[str, float]
) -> list[_C.SolverLayer]:
    return [
        _C.SolverLayer(
            spec, weight_of(model, spec.name).detach(), gradients[spec.name], max_rate=bounds.get(spec.name, 1.0)
        )
        for spec in graph.specs
        if spec.name in gradients
    ]


def _compression(graph: ModelGraph, solution: _C.Solution, nominal_macs: int, gradient_seconds: float) -> Compression:
    _C.set_bits(graph.specs, solution.plan, graph.bits)
    return Compression(
        plan=solution.plan,
        curves=solution.curves,
        model_specs=graph.specs,
        dense_macs=_C.dense_macs(graph.specs),
        nominal_macs=nominal_macs,
        final_macs=_C.final_macs(graph.specs, solution.plan),
        gradient_seconds=gradient_seconds,
        curve_seconds=solution.curve_seconds,
        heuristic_seconds=solution.heuristic_seconds,
        warnings=[*graph.warnings, *solution.warnings],
    )


def compress(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    example: Tensor,
    *,
    target: float = 0.5,
    units: layer_choice.Units = "both",
    layout: Layout = "channel",
    basis: Literal["exact", "fixed"] = "fixed",
    gamma: float = 0.9,
    step_fraction: float = 0.01,
    max_rate: float = 0.95,
    budget: Budget = "macs",
    count: Count = "final",
    multiple: int | None = None,
    latency_batch: int = 1,
    latency_table: LatencyTable | None = None,
    residual_branches: bool = True,
    bits: Mapping[str, int] | None = None,
    exclude: Sequence[str] = (),
    bounds: Mapping[str, float] | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    loss: LossFunction = F.cross_entropy,
    progress: Progress | None = None,
    across_ranks: bool = False,
) -> Compression:
    """Finds a plan that removes a fraction of a model's multiply-accumulates, parameters, bytes or latency.

    The model is not changed: see `apply`.

    The loss that a unit's removal causes is estimated to first order from the mean gradient g over the training set,

        (E1)  I(W') = sum [ g * (W' - W) ]^2,

    rates are allocated over layers from fitted curves loss = a exp(b rate) (E2), and units are removed one after
    another by their loss plus `gamma` times the expected loss one step later (E3).

    Args:
        batches: (images, labels) of the un-augmented training set, on the model's device.
        example: one batch of inputs, to trace the model with; N x C x H x W.
        target: fraction of the budget to remove, in (0, 1): 0.4 of the latency leaves 0.6 of the dense time.
        units: what may be removed: input channels, singular values, or both. Weights of an ``nn.LSTM`` give up
            singular values alone; each of them is a layer, named as the parameter is: ``rnn.weight_hh_l0``.
        layout: what a factored convolution becomes: ``channel``, the paper's, is k x k to `rank` channels, then 1 x 1;
            ``spatial`` is 1 x k, then k x 1, for those whose kernel is higher than 1 and does not stride along its
            height. Singular values are those of the matrix that the layout factors. Both kernels are counted at the
            positions of the output, which is exact where padding keeps the height.
        basis: `exact` decomposes the weight anew for every candidate channel, `fixed` keeps its singular vectors.
        step_fraction: share of a layer's units removed between two rankings.
        max_rate: no layer gives up more than this share.
        budget: what `target` is a fraction of: multiply-accumulates, parameters of weights, the bytes that these
            take, or latency. ``bytes`` are those of the weights' type, or of their `bits`: `target` is what goes
            besides the quantization, whose scales do not count. ``latency`` is measured on the device of `example`,
            with its dtype and layout and as many threads as torch uses now: layers are timed by their shapes, forms
            that don't pay are left out, and the whole model is measured. Layers that read one residual stream keep the
            same channels of it where that gives up less than a choice of their own, for which they have to gather.
        count: what counts as removed, with any other budget than ``latency``. ``final`` is what the network has
            lost once the filters that nobody reads any more are gone too; ``nominal`` is what the layers' removed
            inputs and singular values save, as in the paper, and the network may lose more.
        multiple: kept channels and ranks are multiples of it, where not all are kept; by default 8 on CUDA, as its
            tensor cores want them, and 1 elsewhere. The rates then come from the counts that are
            possible, not from fitted curves. A budget of latency has its own, from the times.
        latency_batch: examples in the forward pass whose latency counts.
        latency_table: times of layers made before, in place of `latency_batch`.
        residual_branches: with a budget of latency, whole residual branches may go too: `apply` leaves the bias of
            their last layer, and `repair` makes it the branch's mean. Layers are then weighed by how much the loss of
            the first 256 images rises when all of the layer, or of its branch, is replaced by its mean: these should
            be of all classes, so shuffle what is sorted by class.
        bits: for patterns of names, the bits, 2 to 16, that the weights are going to be quantized to; where several
            patterns fit, the fewest hold. The plan says them, and `prepare` quantizes by it, once `apply` has rebuilt
            the layers.
        exclude: patterns of names, such as ``layer1.*``, of layers that keep their inputs and rank.
        bounds: for patterns of names, the largest share of a layer's budget that is taken from it; where several
            patterns fit, the smallest holds. 0 is `exclude`.
        gradients: of an earlier `Compression` of this model, in place of a pass over `batches`; `residual_branches`
            still reads their first images.
        progress: called with (stage, done, total).
        across_ranks: `batches` are this rank's share, and every rank calls. Gradients are those over all shares; rank 0
            searches while the others wait, and all get its plan. The curves and the measured latency stay with rank 0.

    Raises:
        ValueError: a bad argument, a pattern that names no layer, weights or gradients that are not finite, or a target
            that cannot be reached.
        TypeError: `batches` gives something else than pairs, `example` is no tensor, or `target` no number.

    Example:
        >>> import cctorch, torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> conv = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.ReLU())
        >>> model = nn.Sequential(conv(3, 16), conv(16, 16), conv(16, 16), nn.Flatten(), nn.Linear(16 * 64, 10))
        >>> batches = [(torch.randn(8, 3, 8, 8), torch.arange(8))]
        >>> compression = cctorch.compress(model, batches, batches[0][0], target=0.4)
        >>> compression.final_reduction > 0.39
        True
    """
    _check_arguments(example, budget, count, layout)
    _check_numbers(target=target, gamma=gamma, step_fraction=step_fraction, max_rate=max_rate)
    counted: Literal["macs", "parameters", "bytes"] = "macs" if budget == "latency" else budget
    if multiple is None:
        multiple = 8 if example.is_cuda else 1
    options = _C.SolverOptions(target, gamma, step_fraction, max_rate, units, basis, counted, multiple, layout=layout)
    if budget == "latency" and latency_table is None:
        latency_table = latency_budget.table_for(model, example, latency_batch)
    graph = trace(model, example)
    start = time.perf_counter()
    layer_choice.quantize(graph, bits or {})
    bounded = layer_choice.bounds_of(graph, bounds or {}, exclude)
    searched = layer_choice.candidates(graph, exclude, units, timed=budget == "latency")
    head = Head(batches)
    found = (
        mean_gradients(model, head, searched, loss=loss, progress=progress, across_ranks=across_ranks)
        if gradients is None
        else _given(gradients, searched)
    )
    importance = None
    if budget == "latency" and residual_branches:
        importance = importances(
            model, head.read(), graph.ends(searched), loss=loss, progress=progress, across_ranks=across_ranks
        )
    seconds = time.perf_counter() - start

    def search() -> Compression:
        if latency_table is None:
            return solve(
                model, graph, found, options, count=count, bounds=bounded, progress=progress, gradient_seconds=seconds
            )
        return solve_latency(
            model,
            graph,
            found,
            options,
            example,
            latency_table,
            importance=importance,
            bounds=bounded,
            progress=progress,
            gradient_seconds=seconds,
        )

    def search_or_say_why_not() -> Compression:
        try:
            return search()
        except ValueError as error:
            raise ValueError("; ".join([str(error), *graph.warnings])) from error

    compression = _of_main(graph, search_or_say_why_not, seconds) if across_ranks else search_or_say_why_not()
    compression.gradients = found
    return compression


def _check_arguments(example: object, budget: str, count: str, layout: str) -> None:
    if not isinstance(example, Tensor):
        raise TypeError(
            f"compress: example is a {type(example).__name__}, expected the one tensor that the model takes"
        )
    for name, value, known in (
        ("budget", budget, get_args(Budget)),
        ("count", count, get_args(Count)),
        ("layout", layout, get_args(Layout)),
    ):
        if value not in known:
            raise ValueError(f"compress: {name} = {value!r}, expected one of {', '.join(map(repr, known))}")


def _check_numbers(**arguments: object) -> None:
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"compress: {name} = {value!r}, expected a number")


def _of_main(graph: ModelGraph, search: Callable[[], Compression], gradient_seconds: float) -> Compression:
    """What rank 0 finds; the other ranks get the plan and the counts."""
    own: list[Compression] = []

    def told() -> tuple[str, int]:
        own.append(search())
        return own[0].plan.to_json(), own[0].nominal_macs

    text, nominal_macs = distributed.on_main(told)
    if own:
        return own[0]
    plan = CompressionPlan.from_json(text)
    return Compression(
        plan=plan,
        curves=[],
        model_specs=graph.specs,
        dense_macs=_C.dense_macs(graph.specs),
        nominal_macs=nominal_macs,
        final_macs=_C.final_macs(graph.specs, plan),
        gradient_seconds=gradient_seconds,
        curve_seconds=0.0,
        heuristic_seconds=0.0,
        warnings=list(graph.warnings),
    )


def _given(gradients: Mapping[str, Tensor], searched: Sequence[str]) -> dict[str, Tensor]:
    missing = [name for name in searched if name not in gradients]
    if missing:
        raise ValueError(
            f"compress: gradients has none for layer '{missing[0]}', expected those of a Compression of this model"
        )
    return {name: gradients[name] for name in searched}
