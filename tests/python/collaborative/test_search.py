"""One search for many targets, and targets of the final graph."""

import math
from typing import Any

import pytest
import torch
from cctorch import _C, apply, compress
from cctorch.graph import ModelGraph, trace
from cctorch.models import create
from cctorch.nn.gather import unwrapped
from torch import Tensor, nn

OPTIONS = {"target": 0.6, "step_fraction": 0.02}


@pytest.fixture(scope="module")
def traced() -> tuple[ModelGraph, list[_C.SolverLayer]]:
    torch.manual_seed(0)
    model = create("resnet20").eval()
    graph = trace(model, torch.randn(1, 3, 32, 32))
    layers = []
    for spec in _C.participants(graph.specs):
        weight = model.get_submodule(spec.name).weight.detach()
        layers.append(_C.SolverLayer(spec, weight, torch.randn_like(weight) * torch.rand(1, weight.shape[1], 1, 1)))
    return graph, layers


def final_reduction(graph: ModelGraph, plan: _C.CompressionPlan, budget: str = "macs") -> float:
    graph.channels.resolve(plan)
    _C.drop_idle_ranks(graph.specs, plan)
    dense = _C.remaining(graph.specs, _C.CompressionPlan(), budget, True)
    return 1 - _C.remaining(graph.specs, plan, budget, True) / dense


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("target", [0.1, 0.35, 0.6])
def test_a_search_has_the_plans_of_lower_targets(
    traced: tuple[ModelGraph, list[_C.SolverLayer]], target: float, multiple: int
) -> None:
    graph, layers = traced
    dense = _C.dense_macs(graph.specs)
    found = _C.Search(layers, dense, _C.SolverOptions(**OPTIONS, multiple=multiple)).at(target)
    alone = _C.solve(layers, dense, _C.SolverOptions(**{**OPTIONS, "target": target}, multiple=multiple))
    assert found.plan == alone.plan
    assert [curve.allocated for curve in found.curves] == [curve.allocated for curve in alone.curves]


@pytest.mark.parametrize("budget", ["macs", "parameters", "bytes"])
@pytest.mark.parametrize("multiple", [1, 4])
def test_the_final_graph_meets_the_target_and_no_more(
    traced: tuple[ModelGraph, list[_C.SolverLayer]], budget: str, multiple: int
) -> None:
    graph, layers = traced
    dense = _C.remaining(graph.specs, _C.CompressionPlan(), budget, True)
    search = _C.Search(layers, dense, _C.SolverOptions(**OPTIONS, budget=budget, multiple=multiple))
    reduction = final_reduction(graph, search.at_final(0.6, graph.specs, graph.channels).plan, budget)
    assert 0.6 <= reduction < (0.61 if multiple == 1 else 0.63)
    assert final_reduction(graph, search.at(0.6).plan, budget) > reduction
    # By brute force: of all targets, the first that is enough.
    targets = [i / 200 for i in range(1, 121)]
    enough = [t for t in targets if final_reduction(graph, search.at(t).plan, budget) >= 0.6]
    assert final_reduction(graph, search.at(min(enough)).plan, budget) >= reduction - 1e-3


def test_remaining_counts_macs_and_parameters(traced: tuple[ModelGraph, list[_C.SolverLayer]]) -> None:
    graph, layers = traced
    plan = _C.Search(layers, _C.dense_macs(graph.specs), _C.SolverOptions(**OPTIONS)).at(0.5).plan
    assert _C.remaining(graph.specs, plan, "macs", False) == _C.nominal_macs(graph.specs, plan)
    assert _C.remaining(graph.specs, plan, "macs", True) == _C.final_macs(graph.specs, plan)
    dense = _C.remaining(graph.specs, _C.CompressionPlan(), "parameters", True)
    model = create("resnet20")
    weighted = [m.weight.numel() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert dense == sum(weighted)
    with pytest.raises(ValueError, match="no closed form"):
        _C.remaining(graph.specs, plan, "table", True)


def in_bits(spec: _C.LayerSpec, bits: int) -> _C.LayerSpec:
    sizes = (spec.in_channels, spec.out_channels, spec.kernel_height, spec.kernel_width, spec.positions, spec.groups)
    return _C.LayerSpec(spec.name, spec.kind, *sizes, bits)


def test_bytes_are_parameters_in_the_bits_of_each_layer(traced: tuple[ModelGraph, list[_C.SolverLayer]]) -> None:
    graph, layers = traced
    widths = {spec.name: (3, 4, 8, 16, 32)[i % 5] for i, spec in enumerate(graph.specs)}
    specs = [in_bits(spec, widths[spec.name]) for spec in graph.specs]
    own = [(in_bits(layer.spec, widths[layer.spec.name]), layer.weight, layer.gradient) for layer in layers]
    dense = _C.remaining(specs, _C.CompressionPlan(), "bytes", True)
    assert dense == sum(math.ceil(spec.parameters * widths[spec.name] / 8) for spec in specs)
    search = _C.Search([_C.SolverLayer(*layer) for layer in own], dense, _C.SolverOptions(**OPTIONS, budget="bytes"))
    plan = search.at_final(0.4, specs, graph.channels).plan
    graph.channels.resolve(plan)
    _C.drop_idle_ranks(specs, plan)
    model = apply(create("resnet20"), plan)
    left = 0.0
    for name, width in widths.items():
        module: Any = unwrapped(model, name)
        factors = [module.weight] if hasattr(module, "weight") else [module.first, module.second]
        left += math.ceil(sum(factor.numel() for factor in factors) * width / 8)
    assert left == _C.remaining(specs, plan, "bytes", True)
    assert 0.4 <= 1 - left / dense < 0.41


def test_targets_out_of_reach(traced: tuple[ModelGraph, list[_C.SolverLayer]]) -> None:
    graph, layers = traced
    search = _C.Search(layers, _C.dense_macs(graph.specs), _C.SolverOptions(**OPTIONS))
    for target in (0.0, 0.61, 1.0):
        with pytest.raises(ValueError, match=r"expected above 0 and at most the 0.6 that was searched for"):
            search.at(target)


class Chain(nn.Module):
    """Half of the filters in front go with the inputs behind them: nominal counts see the inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(i, 32, 3, padding=1) for i in (3, 32, 32, 32)), nn.Flatten())
        self.head = nn.Linear(32 * 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layers(x))
        return y


def test_compress_counts_as_it_is_told() -> None:
    torch.manual_seed(0)
    model = Chain()
    batches = [(torch.randn(4, 3, 8, 8), torch.arange(4))]
    final = compress(model, batches, batches[0][0], target=0.5, units="channels")
    nominal = compress(model, batches, batches[0][0], target=0.5, units="channels", count="nominal")
    assert 0.5 <= final.final_reduction < 0.53
    assert final.nominal_reduction < 0.45
    assert nominal.nominal_reduction >= 0.49
    assert nominal.final_reduction > 0.6
