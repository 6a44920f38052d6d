"""The C++ library without its operators. Same names and meanings as in csrc/include/cctorch/."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from torch import Tensor

CUDA_BUILT: bool
TORCH_VERSION: str

def keep_freed_memory() -> bool: ...
def keeps_freed_memory() -> bool: ...
def encode_weights(state: dict[str, Tensor], grids: Mapping[str, tuple[Tensor, int]]) -> dict[str, Tensor]: ...
def decode_weights(state: dict[str, Tensor]) -> dict[str, Tensor]: ...

LayerKind = Literal["conv2d", "depthwise_conv2d", "linear", "batch_norm2d", "lstm"]
LowRankLayout = Literal["channel", "spatial", "tucker"]

class LayerSpec:
    name: str
    kind: LayerKind
    in_channels: int
    out_channels: int
    kernel_height: int
    kernel_width: int
    positions: int
    groups: int
    bits: int
    stride_height: int
    stride_width: int
    def __init__(
        self,
        name: str,
        kind: LayerKind,
        in_channels: int,
        out_channels: int,
        kernel_height: int = 1,
        kernel_width: int = 1,
        positions: int = 1,
        groups: int = 1,
        bits: int = 32,
        stride_height: int = 1,
        stride_width: int = 1,
    ) -> None: ...
    @property
    def macs(self) -> int: ...
    @property
    def parameters(self) -> int: ...

class MaskPlan:
    kind: Literal["magnitude", "nm", "channel"]
    sparsity: float
    n: int
    m: int
    def __init__(
        self, kind: Literal["magnitude", "nm", "channel"] = "magnitude", sparsity: float = 0.0, n: int = 2, m: int = 4
    ) -> None: ...

class LayerPlan:
    name: str
    kind: LayerKind
    in_channels: int
    out_channels: int
    kept_in: list[int]
    kept_out: list[int]
    gather: list[int]
    rank: int | None
    layout: LowRankLayout
    rank_in: int | None
    mask: MaskPlan | None
    bits: int | None
    def __init__(
        self,
        name: str,
        kind: LayerKind,
        in_channels: int,
        out_channels: int,
        *,
        kept_in: Sequence[int] | None = None,
        kept_out: Sequence[int] | None = None,
        gather: Sequence[int] = (),
        rank: int | None = None,
        layout: LowRankLayout = "channel",
        rank_in: int | None = None,
        mask: MaskPlan | None = None,
        bits: int | None = None,
    ) -> None: ...
    @property
    def keeps_shape(self) -> bool: ...
    @property
    def is_unchanged(self) -> bool: ...
    def __copy__(self) -> LayerPlan: ...
    def __deepcopy__(self, memo: dict[int, object]) -> LayerPlan: ...

class CompressionPlan:
    """Lists read from a plan are copies: build a LayerPlan, then assign `layers`."""

    method: str
    target: float
    layers: list[LayerPlan]
    def __init__(self, method: str = "", target: float = 0.0, layers: Sequence[LayerPlan] = ()) -> None: ...
    def find(self, name: str) -> LayerPlan | None: ...
    def validate(self) -> None: ...
    def to_json(self) -> str: ...
    @staticmethod
    def from_json(text: str) -> CompressionPlan: ...

def drop_idle_ranks(model: Sequence[LayerSpec], plan: CompressionPlan) -> None: ...
def factors(weight: Tensor, plan: LayerPlan) -> tuple[Tensor, Tensor | None, Tensor]: ...
def set_bits(model: Sequence[LayerSpec], plan: CompressionPlan, bits: Mapping[str, int]) -> None: ...
def dense_macs(model: Sequence[LayerSpec]) -> int: ...
def nominal_macs(model: Sequence[LayerSpec], plan: CompressionPlan) -> int: ...
def final_macs(model: Sequence[LayerSpec], plan: CompressionPlan) -> int: ...
def layer_macs(spec: LayerSpec, plan: LayerPlan | None, narrowed: bool) -> int: ...

class ChannelGraph:
    def __init__(self) -> None: ...
    def input(self, channels: int) -> list[int]: ...
    def layer(self, name: str, kind: LayerKind, inputs: Sequence[int], out_channels: int) -> list[int]: ...
    def join(self, a: Sequence[int], b: Sequence[int]) -> list[int]: ...
    @staticmethod
    def flatten(channels: Sequence[int], features: int) -> list[int]: ...
    @staticmethod
    def concat(parts: Sequence[Sequence[int]]) -> list[int]: ...
    def pin(self, channels: Sequence[int]) -> None: ...
    def unchanged(self, layer: str) -> LayerPlan: ...
    def producers(self, layer: str) -> list[str]: ...
    def streams(self) -> list[list[str]]: ...
    def resolve(self, plan: CompressionPlan) -> None: ...

class SolverOptions:
    target: float
    gamma: float
    step_fraction: float
    max_rate: float
    units: Literal["both", "channels", "singular_values"]
    basis: Literal["exact", "fixed"]
    budget: Literal["macs", "parameters", "bytes", "table"]
    multiple: int
    effort: float
    layout: Literal["channel", "spatial"]
    def __init__(
        self,
        target: float = 0.5,
        gamma: float = 0.9,
        step_fraction: float = 0.01,
        max_rate: float = 0.95,
        units: Literal["both", "channels", "singular_values"] = "both",
        basis: Literal["exact", "fixed"] = "fixed",
        budget: Literal["macs", "parameters", "bytes", "table"] = "macs",
        multiple: int = 1,
        effort: float = 3e11,
        layout: Literal["channel", "spatial"] = "channel",
    ) -> None: ...

class CostTable:
    channels: list[int]
    ranks: list[int]
    pruned: list[float]
    factored: list[float]
    multiple: int
    removed: float | None
    def __init__(
        self,
        channels: Sequence[int],
        ranks: Sequence[int],
        pruned: Sequence[float],
        factored: Sequence[float],
        multiple: int = 1,
        removed: float | None = None,
    ) -> None: ...

class SolverLayer:
    spec: LayerSpec
    weight: Tensor
    gradient: Tensor
    table: CostTable
    max_rate: float
    importance: float
    lost: float
    cost_before: float
    def __init__(
        self,
        spec: LayerSpec,
        weight: Tensor,
        gradient: Tensor,
        table: CostTable | None = None,
        max_rate: float = 1.0,
        importance: float = 0.0,
        lost: float = 0.0,
        cost_before: float = 0.0,
    ) -> None: ...

class Choice:
    cost: float
    loss: float
    plan: LayerPlan

class LayerChoices:
    name: str
    largest_loss: float
    importance: float
    choices: list[Choice]
    def objective(self, loss: float) -> float: ...

class RateCurve:
    name: str
    rate: list[float]
    loss: list[float]
    a: float
    b: float
    allocated: float

class Solution:
    plan: CompressionPlan
    curves: list[RateCurve]
    # "lambda" is a keyword in Python
    multiplier: float
    losses: list[float]
    curve_seconds: float
    heuristic_seconds: float
    warnings: list[str]

class Search:
    """A search made once for the highest of several targets."""

    def __init__(
        self,
        layers: list[SolverLayer],
        model_cost: float,
        options: SolverOptions,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None: ...
    def at(self, target: float) -> Solution: ...
    def at_final(self, target: float, model: list[LayerSpec], graph: ChannelGraph) -> Solution: ...

def remaining(model: list[LayerSpec], plan: CompressionPlan, budget: str, final: bool) -> int: ...
def low_rank_layout(spec: LayerSpec, wanted: Literal["channel", "spatial"]) -> Literal["channel", "spatial"]: ...
def participants(
    specs: Sequence[LayerSpec], units: Literal["both", "channels", "singular_values"] = "both"
) -> list[LayerSpec]: ...
def layer_choices(
    layers: Sequence[SolverLayer], options: SolverOptions, progress: Callable[[str, int, int], None] | None = None
) -> list[LayerChoices]: ...
def select(layers: Sequence[LayerChoices], model_cost: float, target: float) -> Solution: ...
def solve(
    layers: Sequence[SolverLayer],
    model_cost: float,
    options: SolverOptions,
    progress: Callable[[str, int, int], None] | None = None,
) -> Solution: ...
def unit_scores(
    weight: Tensor, gradient: Tensor, running: Tensor, rank: int, options: SolverOptions
) -> list[float]: ...
def factorize(weight: Tensor, kept_in: Sequence[int], rank: int) -> tuple[Tensor, Tensor]: ...

class Outcome:
    # float64, 0-dim, on the parameters' device
    update_norm: Tensor
    weight_norm: Tensor
    bits: int
    dense_bits: int

class Projection:
    parameters: list[tuple[str, Tensor]]
    values: list[Tensor]
    # Whether each is stored as factors that a layer can be built from.
    factored: list[bool]
    bits: int
    dense_bits: int

RegularizerState = dict[str, int | float | str | Tensor]

class Regularizer:
    def project(self, parameters: Sequence[tuple[str, Tensor]]) -> Projection: ...
    def apply(self, parameters: Sequence[tuple[str, Tensor]]) -> Outcome: ...
    def acts_on(self, parameter: Tensor) -> bool: ...
    def select(self, parameters: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]: ...
    def state_dict(self) -> RegularizerState: ...
    def load_state_dict(self, state: RegularizerState) -> None: ...

def regularized_plan(
    model: Sequence[LayerSpec], weights: Sequence[tuple[str, Tensor]], regularizer: Regularizer
) -> CompressionPlan: ...

class WeightDecay(Regularizer):
    def __init__(self, strength: float) -> None: ...

class UniformNoise(Regularizer):
    def __init__(self, strength: float, seed: int = 0) -> None: ...

class MagnitudePruning(Regularizer):
    def __init__(self, sparsity: float, scope: Literal["global", "layer"] = "global") -> None: ...

class NMPruning(Regularizer):
    def __init__(self, n: int = 2, m: int = 4, axis: int = 1) -> None: ...

class ChannelPruning(Regularizer):
    def __init__(self, sparsity: float, axis: int = 0) -> None: ...

class UniformQuantization(Regularizer):
    def __init__(self, bits: int, per_channel: bool = True, range: Literal["mse", "absmax"] = "mse") -> None: ...

class CodebookQuantization(Regularizer):
    def __init__(self, bits: int) -> None: ...

class BinaryCodeQuantization(Regularizer):
    def __init__(self, bits: int, per_channel: bool = True) -> None: ...

class SVD(Regularizer):
    def __init__(
        self, rank: int | None = None, ratio: float | None = None, view: Literal["channel", "spatial"] = "channel"
    ) -> None: ...

class TiledSVD(Regularizer):
    def __init__(self, tile: int, rank: int) -> None: ...

class Tucker2(Regularizer):
    def __init__(
        self, ranks: tuple[int, int] | None = None, ratio: float | None = None, iterations: int = 3
    ) -> None: ...

class Compose(Regularizer):
    def __init__(self, parts: Sequence[Regularizer]) -> None: ...

class FrequencySchedule:
    def period(self, step: int, lr: float | None = None) -> int: ...
    def record(self, relative_update: float) -> None: ...
    def state_dict(self) -> RegularizerState: ...
    def load_state_dict(self, state: RegularizerState) -> None: ...

class ConstantPeriod(FrequencySchedule):
    def __init__(self, period: int) -> None: ...

class StepwisePeriod(FrequencySchedule):
    def __init__(self, periods: Sequence[tuple[int, int]]) -> None: ...

class InverseLearningRate(FrequencySchedule):
    def __init__(self, product: float, maximum: int = 5000) -> None: ...

class AdaptivePeriod(FrequencySchedule):
    def __init__(self, strength: float, minimum: int = 1, maximum: int = 5000) -> None: ...

class Event:
    step: int
    period: int
    update_norm: float
    weight_norm: float
    bits: int
    dense_bits: int
    @property
    def relative_update(self) -> float: ...

class AsIfAtEvent:
    bits: int
    def __enter__(self) -> AsIfAtEvent: ...
    def __exit__(self, *error: object) -> None: ...

class RegularizationEvents:
    def __init__(
        self,
        parameters: Sequence[tuple[str, Tensor]],
        regularizer: Regularizer,
        schedule: FrequencySchedule,
        include_frozen: bool = False,
    ) -> None: ...
    @property
    def steps(self) -> int: ...
    @property
    def steps_since_event(self) -> int: ...
    @property
    def events(self) -> int: ...
    def step(self, lr: float | None = None) -> Event | None: ...
    def due(self, lr: float | None = None) -> bool: ...
    def finish(self) -> Event | None: ...
    def as_if_at_event(self) -> AsIfAtEvent: ...
    def state_dict(self) -> RegularizerState: ...
    def load_state_dict(self, state: RegularizerState) -> None: ...

class Window:
    def __init__(
        self,
        kernel: tuple[int, int] = (1, 1),
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
    ) -> None: ...

class Moments:
    samples: int
    input_mean: Tensor
    output_mean: Tensor
    input_moment: Tensor
    cross_moment: Tensor
    output_square: Tensor
    def __init__(self, inputs: int, outputs: int) -> None: ...
    def add(self, x: Tensor, y: Tensor) -> None: ...
    def add_conv2d(self, x: Tensor, y: Tensor, window: Window, step: int = 1, first_image: int = 0) -> None: ...
    def all_reduce(self, sum: Callable[[Tensor], object]) -> None: ...

class Fit:
    weight: Tensor
    intercept: Tensor
    before: float
    after: float

class Norm:
    def __init__(self, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, eps: float) -> None: ...

class Affine:
    inputs: int
    outputs: int
    def __init__(
        self,
        *,
        weight: Tensor | None = None,
        first: Tensor | None = None,
        second: Tensor | None = None,
        bias: Tensor | None = None,
        norm: Norm | None = None,
        core: Tensor | None = None,
    ) -> None: ...

def fit_affine(affine: Affine, moments: Moments, ridge: float = 1e-5) -> Fit: ...
def input_samples(x: Tensor, window: Window, step: int = 1, first_image: int = 0) -> Tensor: ...
def output_samples(y: Tensor, step: int = 1, first_image: int = 0) -> Tensor: ...
def least_squares(
    moments: Moments, weight: Tensor, constant: Tensor, ridge: float = 1e-5, intercept: bool = True
) -> Fit: ...
def alternating_least_squares(
    moments: Moments,
    weight: Tensor,
    constant: Tensor,
    inner: Tensor,
    rank: int,
    ridge: float = 1e-5,
    intercept: bool = True,
) -> Fit: ...
def reduced_rank(
    moments: Moments, weight: Tensor, constant: Tensor, rank: int, ridge: float = 1e-5, intercept: bool = True
) -> Fit: ...
