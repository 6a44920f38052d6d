r"""Regularization events: plain training on dense weights, and once in a period of mini-batches ``w <- Q(w)``.

Lee et al., "Modulating Regularization Frequency for Efficient Compression-Aware Model Training" (arXiv 2105.01875). A
regularizer says what Q is, a schedule says when, :class:`Events` ties both to a training loop. All of it is C++ and the
same in both languages; docs/regularization-frequency.md has the formula, size in bits and limits of every class.

    events = cctorch.regularize.Events(model.named_parameters(), MagnitudePruning(0.9), 200, optimizer)
    ...
    optimizer.step()
    events.step()
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from cctorch._C import (
    SVD,
    AdaptivePeriod,
    AsIfAtEvent,
    BinaryCodeQuantization,
    ChannelPruning,
    CodebookQuantization,
    Compose,
    CompressionPlan,
    ConstantPeriod,
    Event,
    FrequencySchedule,
    InverseLearningRate,
    MagnitudePruning,
    NMPruning,
    Outcome,
    Projection,
    RegularizationEvents,
    Regularizer,
    StepwisePeriod,
    TiledSVD,
    Tucker2,
    UniformNoise,
    UniformQuantization,
    WeightDecay,
    drop_idle_ranks,
    regularized_plan,
)
from cctorch.graph.model_graph import ModelGraph
from cctorch.graph.trace import trace

__all__ = [
    "SVD",
    "AdaptivePeriod",
    "AsIfAtEvent",
    "BinaryCodeQuantization",
    "ChannelPruning",
    "CodebookQuantization",
    "Compose",
    "ConstantPeriod",
    "Event",
    "Events",
    "FrequencySchedule",
    "InverseLearningRate",
    "MagnitudePruning",
    "NMPruning",
    "Outcome",
    "Projection",
    "Regularizer",
    "StepwisePeriod",
    "TiledSVD",
    "Tucker2",
    "UniformNoise",
    "UniformQuantization",
    "WeightDecay",
    "plan",
]


class Events:
    r"""Applies ``regularizer`` to ``named_parameters`` whenever ``schedule`` says so.

    .. math::

        w \leftarrow Q(w) \quad \text{once the steps since the last event reach the period}

    Call :meth:`step` after every ``optimizer.step()`` and :meth:`finish` after the last one, so that the model ends in
    compressed form. Between events a step compares two integers. Under data parallelism call it on every rank: equal
    weights stay equal to the bit.

    Args:
        named_parameters: (name, parameter) pairs such as ``model.named_parameters()``. Any shapes; tied and empty
            parameters are dealt with. All but weight decay and noise leave those of one dimension alone. The
            ``log_scale`` and ``offset`` of a :class:`cctorch.nn.FakeQuant` are always left alone, in groups too; it is
            known by its name's having no other parameters. They are held as they are now: of a model that
            :func:`cctorch.apply` rebuilds, make the events afterwards.
        regularizer: Q. In a :class:`Compose`, the parts are applied in order.
        schedule: when; an integer is a :class:`ConstantPeriod`.
        optimizer: whose learning rate (of the first group) :class:`InverseLearningRate` follows. An event is refused
            where it no longer has one of the parameters that it has now, as after :func:`cctorch.apply`.
        clear_momentum: after an event the optimizer forgets its state of the parameters that Q acts on. By default
            momentum is kept.
        include_frozen: also parameters that do not require a gradient at the time of the event. By default these are
            left alone; where there are no others, now or at an event, that is an error.

    Raises:
        ValueError: Q acts on none of the parameters, all that it acts on are frozen, or one does not fit (named).

    Example:
        >>> import cctorch, torch
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> events = cctorch.regularize.Events(
        ...     model.named_parameters(), cctorch.regularize.MagnitudePruning(0.75), 5, optimizer
        ... )
        >>> for _ in range(12):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(16, 8)).square().mean().backward()
        ...     optimizer.step()
        ...     event = events.step()
        >>> events.events, events.steps_since_event
        (2, 2)
        >>> event = events.finish()
        >>> int(model.weight.count_nonzero()), event.bits
        (8, 288)
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        regularizer: Regularizer,
        schedule: FrequencySchedule | int,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        clear_momentum: bool = False,
        include_frozen: bool = False,
    ) -> None:
        if clear_momentum and optimizer is None:
            raise ValueError("clear_momentum = True needs the optimizer: pass it")
        self.regularizer = regularizer
        self.schedule = ConstantPeriod(schedule) if isinstance(schedule, int) else schedule
        self._parameters = list(named_parameters)
        self._check_types()
        self._events = RegularizationEvents(self._parameters, regularizer, self.schedule, include_frozen)
        self._optimizer = optimizer
        current = _parameters_of(optimizer)
        self._optimized = [(name, parameter) for name, parameter in self._parameters if id(parameter) in current]
        self._follows_lr = isinstance(self.schedule, InverseLearningRate)
        self._clear_momentum = clear_momentum
        self._include_frozen = include_frozen

    def _check_types(self) -> None:
        """Else the message would show the values of all parameters."""
        for pair in self._parameters:
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Tensor)):
                raise TypeError(
                    f"named_parameters holds a {type(pair).__name__}, expected (name, parameter) pairs such as "
                    "model.named_parameters()"
                )
        if not isinstance(self.regularizer, Regularizer):
            raise TypeError(f"regularizer = {self.regularizer!r}, expected one such as MagnitudePruning(0.9)")
        if not isinstance(self.schedule, FrequencySchedule):
            raise TypeError(f"schedule = {self.schedule!r}, expected a whole number of steps or a FrequencySchedule")

    def step(self, lr: float | None = None) -> Event | None:
        """Counts a step of the optimizer; where an event is due, applies Q and says what it did.

        Args:
            lr: learning rate, for :class:`InverseLearningRate` without an optimizer.

        Raises:
            ValueError: a parameter is NaN or infinite, or no longer the optimizer's (named), or all are frozen; the
                weights are then as they were.
        """
        lr = self._learning_rate(lr)
        if self._events.due(lr):
            self._expect_in_optimizer()
        return self._after(self._events.step(lr))

    def due(self, lr: float | None = None) -> bool:
        """Whether the next :meth:`step` has an event."""
        return self._events.due(self._learning_rate(lr))

    def finish(self) -> Event | None:
        """An event now, unless the last step was one: the model ends in compressed form."""
        self._expect_in_optimizer()
        return self._after(self._events.finish())

    def as_if_at_event(self) -> AsIfAtEvent:
        """A context in which the parameters are Q(w), for evaluation; then they are what they were, to the bit."""
        self._expect_in_optimizer()
        return self._events.as_if_at_event()

    @property
    def steps(self) -> int:
        return self._events.steps

    @property
    def steps_since_event(self) -> int:
        return self._events.steps_since_event

    @property
    def events(self) -> int:
        """How many there were."""
        return self._events.events

    def state_dict(self) -> dict[str, int | float | str | Tensor]:
        """Steps, and the state of schedule and regularizer. The weights are the model's."""
        return self._events.state_dict()

    def load_state_dict(self, state: dict[str, int | float | str | Tensor]) -> None:
        """Goes on where :meth:`state_dict` was taken.

        Raises:
            ValueError: an entry is missing or of another type (named), or another regularizer's; nothing has changed
                then.
        """
        self._events.load_state_dict(state)

    def _learning_rate(self, lr: float | None) -> float | None:
        if lr is None and self._follows_lr and self._optimizer is not None:
            return float(self._optimizer.param_groups[0]["lr"])
        return lr

    def _expect_in_optimizer(self) -> None:
        current = _parameters_of(self._optimizer)
        for name, parameter in self._optimized:
            if id(parameter) not in current:
                raise ValueError(
                    f"the optimizer no longer has {name!r}, which it had when the events were made: the model has been "
                    "rebuilt. Make new Events of its parameters, after cctorch.apply"
                )

    def _after(self, event: Event | None) -> Event | None:
        if event is not None and self._clear_momentum and self._optimizer is not None:
            for _, parameter in self.regularizer.select(self._parameters):
                if parameter.requires_grad or self._include_frozen:
                    self._optimizer.state.pop(parameter, None)
        return event


def plan(
    model: nn.Module, example: Tensor, named_parameters: Iterable[tuple[str, Tensor]], regularizer: Regularizer
) -> CompressionPlan:
    """The plan by which :func:`cctorch.apply` makes the layers of ``model`` as small as ``regularizer`` has left them.

    Factors of the ranks of :class:`SVD` (its view is the plan's ``layout``) and :class:`Tucker2`, where these save
    numbers and multiply-accumulates; and none of the input channels that :class:`ChannelPruning` along dimension 1 set
    to zero, nor the filters that nobody reads then. What the network computes stays as it is, to rounding. Masks and
    bits are not in it: they make no layer smaller; groups of N:M shift where inputs go.

    Args:
        model: dense, its parameters as :meth:`Events.finish` or :meth:`Regularizer.apply` has left them.
        example: an input of the model, batch first, e.g. 1 x 3 x 32 x 32.
        named_parameters: those that ``regularizer`` was given. One of low rank that is no weight of a layer that can be
            changed, as of a grouped convolution, stays as it is, with a warning.
        regularizer: Q. Its state stays as it is.

    Raises:
        ValueError: the weight of a layer (named) is not of the rank that Q gives it, as between two events.

    Example:
        >>> import cctorch, torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3))
        >>> q = cctorch.regularize.Tucker2(ratio=4.0)
        >>> outcome = q.apply(model.named_parameters())
        >>> plan = cctorch.regularize.plan(model, torch.randn(1, 16, 8, 8), model.named_parameters(), q)
        >>> plan.find("2").layout, plan.find("2").rank, plan.find("2").rank_in
        ('tucker', 12, 12)
        >>> cctorch.apply(model, plan)[2].core.shape
        torch.Size([12, 12, 3, 3])
    """
    graph = trace(model, example)
    layers = {id(weight): name for name, weight in _changeable(model, graph)}
    weights: list[tuple[str, Tensor]] = []
    left: list[tuple[str, Tensor]] = []
    for name, parameter in regularizer.select(list(named_parameters)):
        layer = layers.get(id(parameter))
        (left if layer is None else weights).append((layer or name, parameter))
    for name in _factored(regularizer, left):
        warnings.warn(
            f"regularize.plan: {name!r} stays as it is, of low rank: it is no weight of a layer that can be changed",
            stacklevel=2,
        )
    found = regularized_plan(graph.specs, weights, regularizer)
    graph.channels.resolve(found)
    drop_idle_ranks(graph.specs, found)
    return found


def _changeable(model: nn.Module, graph: ModelGraph) -> Iterator[tuple[str, Tensor]]:
    """Layers that may be narrowed or factored, with their weights."""
    for spec in graph.specs:
        if spec.name in graph.left_alone or spec.groups > 1 or spec.kind == "batch_norm2d":
            continue
        with contextlib.suppress(AttributeError):  # an operator that reads its weight elsewhere
            yield spec.name, model.get_parameter(spec.name if spec.kind == "lstm" else f"{spec.name}.weight")


def _factored(regularizer: Regularizer, named_parameters: list[tuple[str, Tensor]]) -> list[str]:
    """Names of those that it leaves of low rank."""
    state = regularizer.state_dict()
    projection = regularizer.project(named_parameters)
    regularizer.load_state_dict(state)
    return [name for (name, _), is_so in zip(projection.parameters, projection.factored, strict=True) if is_so]


def _parameters_of(optimizer: torch.optim.Optimizer | None) -> set[int]:
    groups = optimizer.param_groups if optimizer is not None else []
    return {id(parameter) for group in groups for parameter in group["params"]}
