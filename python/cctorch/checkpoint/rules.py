"""Which tensor may lose how much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Real

import torch
from torch import Tensor

from cctorch.checkpoint.codec import CODECS, LOSSY, Codec

# Optimizer state, masks, indices and the logarithms of scales, by the names that they usually have.
EXACT = ("optimizer*", "momentum*", "*exp_avg*", "*mask*", "*index", "*indices", "*running_*", "*log_scale")


@dataclass(frozen=True)
class Rule:
    """For the tensors whose names match ``pattern`` (as in a shell): codec and error bound.

    Args:
        pattern: such as ``layer3.*.weight``.
        codec: ``zstd`` loses nothing; ``sz3`` and ``zfp`` keep to the error bound.
        error_bound: the largest difference of a value, in units of the tensor's root mean square if ``relative``.
        relative: as said.

    Raises:
        ValueError: an unknown codec, or a lossy one without a positive, finite bound.
    """

    pattern: str
    codec: Codec
    error_bound: float = 0.0
    relative: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise ValueError(f"pattern = {self.pattern!r}: expected a text such as 'layer3.*.weight'")
        check(self.codec, self.error_bound)


@dataclass(frozen=True)
class Choice:
    """What becomes of one tensor; `error_bound` is absolute."""

    codec: Codec
    error_bound: float = 0.0


def check(codec: str, error_bound: float) -> None:
    if codec not in CODECS:
        raise ValueError(f"codec = {codec!r}: expected one of {', '.join(CODECS)}")
    if not isinstance(error_bound, Real):
        raise ValueError(f"error_bound = {error_bound!r}: expected a number")
    if codec in LOSSY and not 0 < error_bound < math.inf:
        raise ValueError(f"error_bound = {error_bound}: {codec} loses something, expected a positive, finite bound")


def choose(name: str, tensor: Tensor, default: Rule, rules: Sequence[Rule]) -> Choice:
    """The first of `rules` that matches; else `default` for weights, and no loss for everything else."""
    rule = next((rule for rule in rules if fnmatchcase(name, rule.pattern)), None)
    if rule is None:
        weights = tensor.dim() >= 2 and not any(fnmatchcase(name, pattern) for pattern in EXACT)
        rule = default if weights else Rule(name, "zstd")
    elif rule.codec in LOSSY and not _can_lose(tensor):
        raise ValueError(
            f"rules: {rule.pattern!r} gives {rule.codec} to {name!r} of {tensor.dtype}; expected float32 or float64. "
            "Name only such tensors, or ask for zstd"
        )
    if rule.codec not in LOSSY or not _can_lose(tensor) or tensor.numel() == 0:
        return Choice("zstd")
    rms = _rms(tensor)
    bound = rule.error_bound * (rms if rule.relative else 1.0)
    # Where all is zero there is nothing to lose. Codecs are not made for what is not finite.
    return Choice(rule.codec, bound) if bound > 0 and math.isfinite(rms) else Choice("zstd")


def _can_lose(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float32, torch.float64)


def _rms(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64)) / math.sqrt(tensor.numel())
