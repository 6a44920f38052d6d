"""The `regularize` stage of a run: training with regularization events, and their trace."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import TypedDict

from cctorch import sharding
from cctorch.config import ConfigError, Regularize
from cctorch.nn import Constant, LowRankConv2d, LowRankLinear, LowRankLSTM
from cctorch.nn.gather import unwrapped
from cctorch.plan import CompressionPlan
from cctorch.regularize import Compose, Event, Events, plan
from cctorch.sharded_events import ShardedEvents

# Relative to the largest singular value: what rounding leaves of a weight that was multiplied out of its factors.
_RANK_TOLERANCE = 1e-5


class Described(TypedDict):
    """Fraction of zeros, number of distinct values, and the rank of the size(0) x rest matrix, where there is one."""

    sparsity: float
    values: int
    rank: int | None
    full_rank: int | None


class Parameter(Described):
    name: str


@dataclass(frozen=True)
class Regularized:
    """What the stage ended with. Sizes are of the parameters that Q acts on."""

    top1: float
    # Before the last event: plain weights, not compressed.
    top1_between: float
    events: int
    bits: int
    dense_bits: int
    # (step, steps since the event before, ||Q(w) - w|| / ||w||, bits, dense_bits) of every event.
    trace: Annotated[list[Annotated[list[float], Field(min_length=5, max_length=5)]], Field(min_length=1)]
    parameters: list[Parameter]


class RegularizeStage:
    """Events on the parameters of `model` that the dense model knows by `names`.

    `state` and `trace` are those of a stage that was interrupted.

    Raises ConfigError where Q does not fit a parameter.
    """

    def __init__(
        self,
        settings: Regularize,
        model: nn.Module,
        names: list[str],
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        trace: list[list[float]],
    ) -> None:
        self.parameters = located(model, names)
        quantities = [q.make() for q in settings.q]
        self.regularizer = quantities[0] if len(quantities) == 1 else Compose(quantities)
        schedule = settings.frequency.make()
        events = ShardedEvents if sharding.is_sharded(model) else Events
        try:
            self.events = events(
                self.parameters, self.regularizer, schedule, optimizer, clear_momentum=settings.clear_momentum
            )
        except ValueError as error:
            raise ConfigError(f"regularize: {error}") from error
        if state:
            self.events.load_state_dict(state)
        self.trace = trace

    def step(self) -> None:
        self._record(self.events.step())

    def finish(self) -> None:
        self._record(self.events.finish())

    def since(self, events: int) -> dict[str, float | int | None]:
        """Of the events after the first `events`, for the metrics: how many, their mean update, the last size."""
        recent = self.trace[events:]
        update = sum(entry[2] for entry in recent) / len(recent) if recent else None
        return {"events": len(recent), "update": update, "bits": int(recent[-1][3]) if recent else None}

    def result(self, top1: float, top1_between: float) -> Regularized:
        described: list[Parameter] = [
            {"name": name, **describe(sharding.whole(parameter))} for name, parameter in self.parameters
        ]
        bits, dense_bits = (int(size) for size in self.trace[-1][3:])
        return Regularized(top1, top1_between, len(self.trace), bits, dense_bits, self.trace, described)

    def plan(self, model: nn.Module, names: list[str], example: Tensor) -> CompressionPlan:
        """Of `model`, whole and dense, after the last event."""
        return plan(model, example, located(model, names), self.regularizer)

    def expect_all_smaller(self, dense: nn.Module, names: list[str], example: Tensor) -> None:
        """Raises ConfigError where training that follows would undo what Q does to a parameter, as no layer of `dense`,
        whose weights don't matter, becomes smaller for it."""
        acted_on = located(dense, names)
        q, state = self.regularizer, self.regularizer.state_dict()
        smaller = [name for name, p in acted_on if (found := q.project([(name, p)])).bits < found.dense_bits]
        q.apply(acted_on)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layers = {layer.name for layer in self.plan(dense, names, example).layers}
        q.load_state_dict(state)
        lost = [name for name in smaller if not {name, name.rpartition(".")[0]} & layers]
        if lost or not smaller:
            what = f"{lost[0]!r} would lose what the events do to it" if lost else "no layer becomes smaller"
            raise ConfigError(
                f"regularize.parameters: {what} in the training that follows; expected those of convolutions without "
                "groups and linear layers alone, and a q that makes them smaller"
            )

    def _record(self, event: Event | None) -> None:
        if event is not None:
            self.trace.append([event.step, event.period, event.relative_update, event.bits, event.dense_bits])


def select(dense: nn.Module, patterns: list[str] | None) -> list[str]:
    """Names of the dense model's parameters that match one of `patterns`; by default the weights of convolutions and
    linear layers, the first convolution and the last linear layer left out.

    Raises ConfigError for a pattern that matches nothing.
    """
    names = [name for name, _ in dense.named_parameters()]
    if patterns is None:
        layers = [name for name, module in dense.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        spared = ends(dense)
        return [f"{name}.weight" for name in layers if name not in spared]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"regularize.parameters = {patterns}: {pattern!r} matches no parameter; expected a pattern such as "
                f"{names[len(names) // 2]!r} or '*.conv?.weight'"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def ends(dense: nn.Module) -> set[str]:
    """Names of the first convolution and the last linear layer: few weights, on which much depends."""
    convolutions = [name for name, module in dense.named_modules() if isinstance(module, nn.Conv2d)]
    linears = [name for name, module in dense.named_modules() if isinstance(module, nn.Linear)]
    return {*convolutions[:1], *linears[-1:]}


def located(model: nn.Module, names: list[str]) -> list[tuple[str, Tensor]]:
    """What became of a dense model's parameters: a factored weight is two or three, as of `LowRankConv2d`; of a removed
    residual branch at most a bias is left."""
    found: list[tuple[str, Tensor]] = []
    for name in names:
        path, _, kind = name.rpartition(".")
        layer = unwrapped(model, path)
        if isinstance(layer, Constant) and layer._parameters.get(kind) is None:
            continue
        parts: Sequence[str] = layer.parts(kind) if isinstance(layer, LowRankLSTM) else (kind,)
        if kind == "weight" and isinstance(layer, LowRankConv2d | LowRankLinear):
            parts = [name for name in ("first", "core", "second") if name in layer._parameters]
        for part in parts:
            found.append((f"{path}.{part}".lstrip("."), layer.get_parameter(part)))
    return found


@torch.no_grad()
def describe(parameter: Tensor) -> Described:
    values = parameter.detach().double().cpu()
    described: Described = {
        "sparsity": float((values == 0).double().mean()),
        "values": int(torch.unique(values).numel()),
        "rank": None,
        "full_rank": None,
    }
    if values.dim() >= 2:
        matrix = values.flatten(1)
        described["rank"] = int(torch.linalg.matrix_rank(matrix, rtol=_RANK_TOLERANCE))
        described["full_rank"] = min(matrix.shape)
    return described
