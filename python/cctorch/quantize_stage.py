"""The `quantize` stage of a run: training with fake-quantized weights, which end as codes of few bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from typing_extensions import TypedDict

from cctorch import _C, layer_choice
from cctorch.codes import Grid
from cctorch.config import ConfigError, Quantize
from cctorch.graph import ModelGraph, trace
from cctorch.regularize_stage import ends

_BITS_AT_THE_ENDS = 8


class Layer(TypedDict):
    """A weight; a factored layer has two."""

    name: str
    bits: int
    values: int


@dataclass(frozen=True)
class Quantized:
    """What the stage ended with. Sizes are of the weights that were quantized, with their scales."""

    top1: float
    # With the scales that the weights of the stage before it gave, before any training.
    top1_prepared: float
    bits: int
    dense_bits: int
    layers: list[Layer]


def planned(dense: nn.Module, example: Tensor, settings: Quantize) -> tuple[_C.CompressionPlan, list[str]]:
    """The bits of each layer, which keeps its shape otherwise, and warnings.

    Raises ConfigError where a pattern fits no layer.
    """
    graph = trace(dense, example)
    warned = len(graph.warnings)
    try:
        layer_choice.quantize(graph, _patterns(dense, graph, settings.bits))
    except ValueError as error:
        raise ConfigError(str(error).replace("compress: bits", "quantize.bits")) from error
    plan = _C.CompressionPlan()
    _C.set_bits(graph.specs, plan, graph.bits)
    return plan, graph.warnings[warned:]


def bits_of(plan: _C.CompressionPlan | None) -> dict[str, int]:
    """By the names of layers; none without a plan."""
    return {} if plan is None else {layer.name: layer.bits for layer in plan.layers if layer.bits is not None}


def _patterns(dense: nn.Module, graph: ModelGraph, bits: int | dict[str, int]) -> dict[str, int]:
    if isinstance(bits, dict):
        return bits
    spared = ends(dense)
    names = [spec.name for spec in graph.specs if spec.kind != "batch_norm2d"]
    return {name: max(bits, _BITS_AT_THE_ENDS) if name in spared else bits for name in names}


def result(state: Mapping[str, Tensor], grids: Mapping[str, Grid], top1: float, top1_prepared: float) -> Quantized:
    """`state` is that of the converted model."""
    layers: list[Layer] = [
        {"name": name, "bits": grid.bits, "values": state[name].numel()} for name, grid in grids.items()
    ]
    scales = sum(8 * grid.scales.nbytes for grid in grids.values())
    return Quantized(
        top1,
        top1_prepared,
        scales + sum(layer["bits"] * layer["values"] for layer in layers),
        sum(8 * state[name].nbytes for name in grids),
        layers,
    )
