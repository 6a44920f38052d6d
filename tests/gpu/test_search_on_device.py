"""Wide layers are searched on the device that holds their weights: the same plans as on the CPU, to rounding."""

from __future__ import annotations

import math

import pytest
import torch
from cctorch import _C
from placed import CPU, DEVICE, needs_device

pytestmark = needs_device
SHAPES = [(48, 64), (64, 48), (32, 24, 3, 3), (96, 12, 3, 3), (8, 8)]
WIDE = 1.0  # every ranking costs more
MIXED = 2e7  # the last two shapes are not wide


def layers(device: torch.device, dtype: torch.dtype = torch.float32) -> list[_C.SolverLayer]:
    """Uneven input channels, a spectrum that falls, and the gradient of a few examples."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    made = []
    for index, shape in enumerate(SHAPES):
        n, c, k = shape[0], shape[1], math.prod(shape[2:])
        u, s, v = torch.linalg.svd(normal(n, c * k), full_matrices=False)
        weight = (u / (1 + torch.arange(len(s)))) @ v * normal(c, 1).exp().expand(-1, k).flatten()
        gradient = normal(n, 16) @ normal(16, c * k).relu()
        kind = "conv2d" if len(shape) == 4 else "linear"
        spec = _C.LayerSpec(f"layer{index}", kind, c, n, *(shape[2:] or (1, 1)))
        placed = [t.view(shape).to(device, dtype) for t in (weight, gradient)]
        made.append(_C.SolverLayer(spec, *placed))
    return made


@pytest.mark.parametrize("effort", [WIDE, MIXED])
@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("units", ["both", "channels", "singular_values"])
def test_plans_are_those_of_a_cpu(units: str, multiple: int, effort: float) -> None:
    solutions = []
    for device in (DEVICE, CPU):
        options = _C.SolverOptions(target=0.45, units=units, multiple=multiple, effort=effort)
        searched = layers(device)
        solutions.append(_C.Search(searched, sum(x.spec.macs for x in searched), options).at(0.45))
    ours, theirs = (solution.plan.layers for solution in solutions)
    for got, expected in zip(ours, theirs, strict=True):
        assert got.kept_in == expected.kept_in, got.name
        assert got.rank == expected.rank, got.name
    for curve, reference in zip(*(solution.curves for solution in solutions), strict=True):
        assert curve.rate == pytest.approx(reference.rate)
        assert curve.loss == pytest.approx(reference.loss, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("multiple", [1, 4])
def test_half_precision_models_and_streams_of_the_callers(multiple: int) -> None:
    """Weights that the caller's stream has not finished when the search is called; TF32 allowed outside."""
    if DEVICE.type != "cuda":
        pytest.skip("streams are a GPU's")
    options = _C.SolverOptions(target=0.45, multiple=multiple, effort=WIDE)
    expected = layers(CPU, torch.float16)
    reference = _C.Search(expected, sum(x.spec.macs for x in expected), options).at(0.45).plan
    stream = torch.cuda.Stream()
    torch.backends.cuda.matmul.allow_tf32 = True
    with torch.cuda.stream(stream):
        torch.cuda._sleep(int(2e8))
        searched = layers(DEVICE, torch.float16)
        late = [_C.SolverLayer(x.spec, x.weight * 1, x.gradient * 1) for x in searched]
        plan = _C.Search(late, sum(x.spec.macs for x in late), options).at(0.45).plan
    for got, wanted in zip(plan.layers, reference.layers, strict=True):
        assert (got.kept_in, got.rank) == (wanted.kept_in, wanted.rank)
