"""The `regularize` section of an experiment: a class for each Q and each schedule.

It has the name and the arguments of its namesake in C++, which alone knows what values are allowed.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cctorch import _C


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class _Namesake(Section):
    def make(self) -> Any:
        """The object of C++. Raises ValueError for an argument that it does not take."""
        return getattr(_C, type(self).__name__)(**self.model_dump(exclude={"kind"}))

    @model_validator(mode="after")
    def _can_be_made(self) -> _Namesake:
        self.make()
        return self


class WeightDecay(_Namesake):
    kind: Literal["weight_decay"]
    strength: float


class UniformNoise(_Namesake):
    kind: Literal["uniform_noise"]
    strength: float
    seed: int = 0


class MagnitudePruning(_Namesake):
    kind: Literal["magnitude_pruning"]
    sparsity: float
    scope: Literal["global", "layer"] = "global"


class NMPruning(_Namesake):
    kind: Literal["nm_pruning"]
    n: int = 2
    m: int = 4
    axis: int = 1


class ChannelPruning(_Namesake):
    kind: Literal["channel_pruning"]
    sparsity: float
    axis: int = 0


class UniformQuantization(_Namesake):
    kind: Literal["uniform_quantization"]
    bits: int
    per_channel: bool = True
    range: Literal["mse", "absmax"] = "mse"


class CodebookQuantization(_Namesake):
    kind: Literal["codebook_quantization"]
    bits: int


class BinaryCodeQuantization(_Namesake):
    kind: Literal["binary_code_quantization"]
    bits: int
    per_channel: bool = True


class SVD(_Namesake):
    kind: Literal["svd"]
    rank: int | None = None
    ratio: float | None = None
    view: Literal["channel", "spatial"] = "channel"


class TiledSVD(_Namesake):
    kind: Literal["tiled_svd"]
    tile: int
    rank: int


class Tucker2(_Namesake):
    kind: Literal["tucker2"]
    # [of the outputs, of the inputs]
    ranks: list[int] | None = Field(default=None, min_length=2, max_length=2)
    ratio: float | None = None
    iterations: int = 3


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


class ConstantPeriod(_Namesake):
    kind: Literal["constant"]
    period: int


class StepwisePeriod(_Namesake):
    kind: Literal["stepwise"]
    # [[step, period], ...]: that period from that step on; the first step is 0.
    periods: list[Annotated[list[int], Field(min_length=2, max_length=2)]]


class InverseLearningRate(_Namesake):
    kind: Literal["inverse_learning_rate"]
    # period x learning rate: 2 is an event in 200 steps at a learning rate of 0.01.
    product: float
    maximum: int = 5000


class AdaptivePeriod(_Namesake):
    kind: Literal["adaptive"]
    # ||Q(w) - w|| / ||w|| per mini-batch.
    strength: float
    minimum: int = 1
    maximum: int = 5000


Frequency = Annotated[
    ConstantPeriod | StepwisePeriod | InverseLearningRate | AdaptivePeriod, Field(discriminator="kind")
]
