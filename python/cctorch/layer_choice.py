"""Which layers of a model a user's name patterns mean."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Literal

from cctorch import _C
from cctorch.graph import ModelGraph
from cctorch.graph.lstm import module_of

Units = Literal["both", "channels", "singular_values"]


def _named(graph: ModelGraph, pattern: str, option: str) -> list[str]:
    names = [spec.name for spec in graph.specs]
    found = fnmatch.filter(names, pattern)
    if not found:
        raise ValueError(
            f"compress: {option} = {pattern!r} names no layer of the model, expected a pattern such as "
            f"{names[0]!r} or '{names[0].split('.')[0]}*'"
        )
    return found


def _excluded(graph: ModelGraph, exclude: Sequence[str]) -> set[str]:
    if isinstance(exclude, str):
        raise ValueError(f"compress: exclude = {exclude!r}, expected a list of patterns: [{exclude!r}]")
    return {name for pattern in exclude for name in _named(graph, pattern, "exclude")}


def bounds_of(graph: ModelGraph, bounds: Mapping[str, float], exclude: Sequence[str] = ()) -> dict[str, float]:
    """The bound of each layer that a pattern names, the lowest of several: 0 of excluded ones."""
    bounded = dict.fromkeys(_excluded(graph, exclude), 0.0)
    for pattern, bound in bounds.items():
        if not (isinstance(bound, int | float) and 0 <= bound <= 1):
            raise ValueError(f"compress: bounds[{pattern!r}] = {bound!r}, expected a share from 0 to 1")
        for name in _named(graph, pattern, "bounds"):
            bounded[name] = min(bound, bounded.get(name, 1.0))
    return bounded


def quantize(graph: ModelGraph, bits: Mapping[str, int]) -> None:
    """Notes the bits of each layer that a pattern names, the fewest of several, also of those that are not searched."""
    for pattern, count in bits.items():
        if not (isinstance(count, int) and not isinstance(count, bool) and 2 <= count <= 16):
            raise ValueError(f"compress: bits[{pattern!r}] = {count!r}, expected 2 to 16 bits for each weight")
        for name in _named(graph, pattern, "bits"):
            graph.bits[name] = min(count, graph.bits.get(name, count))
    # Grouped convolutions are left as they are by a search, but can be quantized.
    alone = [spec.name for spec in graph.specs if spec.name in graph.left_alone and spec.groups == 1]
    unquantized = [name for name in alone if graph.bits.pop(name, None)]
    if unquantized:
        graph.warnings.append(f"bits: {', '.join(map(repr, unquantized))} keep theirs, as layers that are left alone")
    recurrent = [spec.name for spec in graph.specs if spec.kind == "lstm" and spec.name in graph.bits]
    for name in recurrent:
        del graph.bits[name]
    if recurrent:
        graph.warnings.append(f"bits: {', '.join(map(repr, recurrent))} keep theirs, as weights of an LSTM")
    for spec in graph.specs:
        spec.bits = graph.bits.get(spec.name, spec.bits)


def candidates(graph: ModelGraph, exclude: Sequence[str], units: Units = "both", timed: bool = False) -> list[str]:
    """The layers that can be compressed, without those that a pattern excludes.

    Args:
        units: weights of an LSTM have singular values alone to give.
        timed: with a budget of latency; an LSTM is not, and keeps its weights, with a warning.

    Raises:
        ValueError: there are none.
    """
    passed_over = _excluded(graph, exclude) | graph.left_alone
    chosen = [spec for spec in _C.participants(graph.specs, units) if spec.name not in passed_over]
    if timed:
        recurrent = dict.fromkeys(module_of(spec) for spec in chosen if spec.kind == "lstm")
        chosen = [spec for spec in chosen if spec.kind != "lstm"]
        if recurrent:
            names = ", ".join(map(repr, recurrent))
            graph.warnings.append(f"LSTM {names} is left alone: no layer of its kind is timed for a budget of latency")
    found = [spec.name for spec in chosen]
    if not found:
        raise ValueError(
            f"compress: none of the model's {len(graph.specs)} layers can be compressed, expected a convolution or a "
            "linear layer besides the first convolution and the last linear layer, or an LSTM"
            + "".join(f"; {warning}" for warning in graph.warnings)
        )
    return found
