"""The `regularize` section of an experiment: one class for each Q, with the arguments of its namesake in C++."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cctorch import _C


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class _Q(Section):
    @abstractmethod
    def make(self) -> _C.Regularizer: ...


class WeightDecay(_Q):
    kind: Literal["weight_decay"]
    strength: float = Field(ge=0, le=1)

    def make(self) -> _C.Regularizer:
        return _C.WeightDecay(self.strength)


class UniformNoise(_Q):
    kind: Literal["uniform_noise"]
    strength: float = Field(ge=0)
    seed: int = Field(default=0, ge=0)

    def make(self) -> _C.Regularizer:
        return _C.UniformNoise(self.strength, self.seed)


class MagnitudePruning(_Q):
    kind: Literal["magnitude_pruning"]
    sparsity: float = Field(ge=0, lt=1)
    scope: Literal["global", "layer"] = "global"

    def make(self) -> _C.Regularizer:
        return _C.MagnitudePruning(self.sparsity, self.scope)


class NMPruning(_Q):
    kind: Literal["nm_pruning"]
    n: int = Field(default=2, ge=1)
    m: int = Field(default=4, ge=2)
    axis: int = 1

    def make(self) -> _C.Regularizer:
        return _C.NMPruning(self.n, self.m, self.axis)


class ChannelPruning(_Q):
    kind: Literal["channel_pruning"]
    sparsity: float = Field(ge=0, lt=1)
    axis: int = 0

    def make(self) -> _C.Regularizer:
        return _C.ChannelPruning(self.sparsity, self.axis)


class UniformQuantization(_Q):
    kind: Literal["uniform_quantization"]
    bits: int = Field(ge=2, le=16)
    per_channel: bool = True
    range: Literal["mse", "absmax"] = "mse"

    def make(self) -> _C.Regularizer:
        return _C.UniformQuantization(self.bits, self.per_channel, self.range)


class CodebookQuantization(_Q):
    kind: Literal["codebook_quantization"]
    bits: int = Field(ge=1, le=8)

    def make(self) -> _C.Regularizer:
        return _C.CodebookQuantization(self.bits)


class BinaryCodeQuantization(_Q):
    kind: Literal["binary_code_quantization"]
    bits: int = Field(ge=1, le=3)
    per_channel: bool = True

    def make(self) -> _C.Regularizer:
        return _C.BinaryCodeQuantization(self.bits, self.per_channel)


class SVD(_Q):
    kind: Literal["svd"]
    rank: int | None = Field(default=None, ge=1)
    ratio: float | None = Field(default=None, gt=1)
    view: Literal["channel", "spatial"] = "channel"

    @model_validator(mode="after")
    def _one_size(self) -> SVD:
        if (self.rank is None) == (self.ratio is None):
            raise ValueError("expected exactly one of rank and ratio")
        return self

    def make(self) -> _C.Regularizer:
        return _C.SVD(self.rank, self.ratio, self.view)


class TiledSVD(_Q):
    kind: Literal["tiled_svd"]
    tile: int = Field(ge=2)
    rank: int = Field(ge=1)

    def make(self) -> _C.Regularizer:
        return _C.TiledSVD(self.tile, self.rank)


class Tucker2(_Q):
    kind: Literal["tucker2"]
    ratio: float = Field(gt=1)
    iterations: int = Field(default=3, ge=0)

    def make(self) -> _C.Regularizer:
        return _C.Tucker2(ratio=self.ratio, iterations=self.iterations)


Q = Annotated[
    WeightDecay
    | UniformNoise
    | MagnitudePruning
    | NMPruning
    | ChannelPruning
    | UniformQuantization
    | CodebookQuantization
    | BinaryCodeQuantization
    | SVD
    | TiledSVD
    | Tucker2,
    Field(discriminator="kind"),
]


class Constant(Section):
    kind: Literal["constant"]
    period: int = Field(ge=1)

    def make(self) -> _C.FrequencySchedule:
        return _C.ConstantPeriod(self.period)


class Stepwise(Section):
    kind: Literal["stepwise"]
    # [[step, period], ...]: that period from that step on; the first step is 0.
    periods: list[list[int]] = Field(min_length=1)

    @model_validator(mode="after")
    def _ascending(self) -> Stepwise:
        if not all(len(entry) == 2 and entry[0] >= 0 and entry[1] >= 1 for entry in self.periods):
            raise ValueError("expected periods = [[step, period], ...] with step >= 0 and period >= 1")
        steps = [step for step, _ in self.periods]
        if steps[0] != 0 or steps != sorted(set(steps)):
            raise ValueError("expected the steps of periods to begin with 0 and to ascend")
        return self

    def make(self) -> _C.FrequencySchedule:
        return _C.StepwisePeriod([(step, period) for step, period in self.periods])


class InverseLearningRate(Section):
    kind: Literal["inverse_learning_rate"]
    # period x learning rate: 2 is an event in 200 steps at a learning rate of 0.01.
    product: float = Field(gt=0)
    maximum: int = Field(default=5000, ge=1)

    def make(self) -> _C.FrequencySchedule:
        return _C.InverseLearningRate(self.product, self.maximum)


class Adaptive(Section):
    kind: Literal["adaptive"]
    # ||Q(w) - w|| / ||w|| per mini-batch.
    strength: float = Field(gt=0)
    minimum: int = Field(default=1, ge=1)
    maximum: int = Field(default=5000, ge=1)

    @model_validator(mode="after")
    def _bounds(self) -> Adaptive:
        if self.maximum < self.minimum:
            raise ValueError("expected minimum <= maximum")
        return self

    def make(self) -> _C.FrequencySchedule:
        return _C.AdaptivePeriod(self.strength, self.minimum, self.maximum)


Frequency = Annotated[Constant | Stepwise | InverseLearningRate | Adaptive, Field(discriminator="kind")]
