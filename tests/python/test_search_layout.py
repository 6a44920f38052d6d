"""Factored convolutions as two one-dimensional kernels: the search, the budget, and what comes out of it."""

import copy
from pathlib import Path
from typing import Any, Literal

import cctorch
import networks
import pytest
import torch
from cctorch import _C, load_plan
from cctorch.graph import trace
from cctorch.latency import LatencyTable, LayerShape
from cctorch.nn import LowRankConv2d
from cctorch.nn.gather import unwrapped
from tiny_run import config, deliverable, run_quietly, write_dataset
from torch import Tensor, nn

SHAPES = ((16, 8, 3, 3), (16, 16, 5, 3), (24, 16, 1, 1), (32, 24, 3, 3), (12, 20, 1, 3))


def layer(name: str, weight: Tensor, gradient: Tensor, stride: int = 1) -> _C.SolverLayer:
    out, inputs, high, wide = weight.shape
    spec = _C.LayerSpec(name, "conv2d", inputs, out, high, wide, positions=49)
    spec.stride_height = stride
    return _C.SolverLayer(spec, weight, gradient)


def weights(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(shape, generator=generator),
            torch.randn(shape, generator=generator) * torch.rand(1, shape[1], 1, 1, generator=generator),
        )
        for shape in SHAPES
    ]


def unfolded(weight: Tensor) -> Tensor:
    """The matrix of the layout, written down entry by entry, as a 1 x kw convolution of N kh outputs."""
    out, inputs, high, wide = weight.shape
    matrix = torch.empty(out * high, inputs, 1, wide)
    for n in range(out):
        for row in range(high):
            matrix[n * high + row, :, 0] = weight[n, :, row]
    return matrix


def solved(layers: list[_C.SolverLayer], **options: Any) -> _C.Solution:
    return _C.solve(layers, _C.dense_macs([each.spec for each in layers]), _C.SolverOptions(**options))


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("basis", ["fixed", "exact"])
@pytest.mark.parametrize("units", ["both", "channels", "singular_values"])
def test_it_is_the_search_on_the_matrix_of_the_layout(units: str, basis: str, multiple: int) -> None:
    options = {"target": 0.5, "units": units, "basis": basis, "multiple": multiple}
    found = solved([layer(f"l{i}", *pair) for i, pair in enumerate(weights())], layout="spatial", **options)
    same = solved([layer(f"l{i}", unfolded(w), unfolded(g)) for i, (w, g) in enumerate(weights())], **options)
    assert [curve.allocated for curve in found.curves] == [curve.allocated for curve in same.curves]
    assert found.losses == same.losses
    for plan, matrix, shape in zip(found.plan.layers, same.plan.layers, SHAPES, strict=True):
        assert (plan.kept_in, plan.rank) == (matrix.kept_in, matrix.rank)
        assert plan.out_channels == shape[0]
        assert plan.kept_out == list(range(shape[0]))
        assert plan.layout == ("spatial" if plan.rank and shape[2] > 1 else "channel")
    if units == "singular_values":
        assert any(plan.layout == "spatial" for plan in found.plan.layers)


@pytest.mark.parametrize("budget", ["macs", "parameters", "bytes"])
@pytest.mark.parametrize("target", [0.2, 0.5, 0.8])
def test_the_budget_is_met(target: float, budget: str) -> None:
    layers = [layer(f"l{i}", *pair) for i, pair in enumerate(weights())]
    specs = [each.spec for each in layers]
    dense = _C.remaining(specs, _C.CompressionPlan(), budget, False)
    plan = _C.solve(layers, dense, _C.SolverOptions(target=target, budget=budget, layout="spatial")).plan
    assert _C.remaining(specs, plan, budget, False) <= (1 - target) * dense * (1 + 1e-9)


def test_a_convolution_that_strides_along_its_height_is_factored_as_before() -> None:
    layers = [layer(f"l{i}", *pair, stride=2) for i, pair in enumerate(weights())]
    found = solved(layers, layout="spatial", units="singular_values")
    assert found.plan == solved(layers, units="singular_values").plan
    assert {plan.layout for plan in found.plan.layers} == {"channel"}
    for stride, expected in ((1, "spatial"), (2, "channel")):
        spec = _C.LayerSpec("a", "conv2d", 4, 4, 3, 3, positions=9)
        spec.stride_height, spec.stride_width = stride, 2
        assert _C.low_rank_layout(spec, "spatial") == expected
    assert _C.low_rank_layout(_C.LayerSpec("a", "linear", 4, 4), "spatial") == "channel"


def test_what_one_dimensional_kernels_can_compute_is_not_lost() -> None:
    """A weight of rank 4 in this layout, and of full rank, 12, in the other."""
    torch.manual_seed(0)
    weight = torch.einsum("nhr,rcw->nchw", torch.randn(12, 3, 4), torch.randn(4, 12, 3))
    assert torch.linalg.matrix_rank(weight.flatten(1)) == 12
    gradient = torch.randn_like(weight)
    for layout, lost in (("spatial", False), ("channel", True)):
        options = _C.SolverOptions(target=0.6, units="singular_values", multiple=2, layout=layout)
        separable = layer("a", weight, gradient)
        found = _C.Search([separable], separable.spec.macs, options).at(0.6)
        assert (found.losses[0] > 1e-9 * float((gradient * weight).square().sum())) == lost


def test_the_compressed_network_is_the_projected_dense_one() -> None:
    torch.manual_seed(0)
    dense = networks.randomized(networks.PaddedResNet(), 0)
    x = torch.randn(16, 3, 8, 8, dtype=torch.float64)
    data = [(x, torch.arange(16) % 4)]
    found = cctorch.compress(dense, data, x[:2], target=0.5, layout="spatial", units="singular_values")
    assert found.final_reduction >= 0.49
    model = cctorch.apply(copy.deepcopy(dense), found.plan).eval()
    layouts = {plan.name: plan.layout for plan in found.plan.layers if plan.rank}
    assert "spatial" in layouts.values()
    projected = copy.deepcopy(dense)
    for plan in found.plan.layers:
        module = projected.get_submodule(plan.name)
        if not isinstance(module, nn.Conv2d):
            continue
        with torch.no_grad():
            gone = torch.ones(plan.in_channels, dtype=torch.bool)
            gone[plan.kept_in] = False
            module.weight[:, gone] = 0
            if plan.layout == "spatial":
                made = unwrapped(model, plan.name)
                assert isinstance(made, LowRankConv2d)
                assert (made.layout, made.rank) == ("spatial", plan.rank)
                matrix = module.weight.transpose(1, 2).reshape(-1, module.in_channels * module.kernel_size[1])
                u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
                low = (u[:, : plan.rank] * values[: plan.rank]) @ vh[: plan.rank]
                out, inputs, high, wide = module.weight.shape
                module.weight.copy_(low.view(out, high, inputs, wide).transpose(1, 2))
            elif plan.rank:
                u, values, vh = torch.linalg.svd(module.weight.flatten(1), full_matrices=False)
                low = (u[:, : plan.rank] * values[: plan.rank]) @ vh[: plan.rank]
                module.weight.copy_(low.view_as(module.weight))
    with torch.no_grad():
        torch.testing.assert_close(model(x), projected(x), rtol=1e-8, atol=1e-8)
    graph = trace(dense, x[:2])
    assert found.final_macs == _C.final_macs(graph.specs, found.plan)


def test_tables_of_times_are_of_the_layout() -> None:
    table = LatencyTable(batch=2, multiple=8)
    shape = LayerShape("conv2d", 32, 24, (8, 8), (3, 3), (1, 1), (1, 1))
    channels, ranks, cells = table.cost_shapes(shape, layout="spatial")
    assert channels[-1] == 32
    # Of 72 x 96: factors of rank 42 have as many parameters as the weight.
    assert ranks == [12, 24, 36]
    for (count, rank), parts in cells.items():
        made = parts[0].build()
        made = made.layer if hasattr(made, "layer") else made
        if rank is None:
            assert isinstance(made, nn.Conv2d)
            continue
        assert isinstance(made, LowRankConv2d)
        assert (made.layout, made.rank) == ("spatial", min(rank, 3 * count))
    plan = _C.LayerPlan("a", "conv2d", 32, 24, rank=40, layout="spatial")
    assert shape.under(plan).layout == "spatial"


def test_a_run_says_it_in_its_configuration(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    settings = config(data, tmp_path, compress={"target": 0.5, "layout": "spatial", "repair_images": 64})
    summary = run_quietly(settings)
    plan = load_plan(settings.folder / "plan.json")
    spatial = [each.name for each in plan.layers if each.layout == "spatial"]
    assert spatial
    shapes = {name: tensor.shape for name, tensor in deliverable(settings).items()}
    for name in spatial:
        [first] = [shape for key, shape in shapes.items() if key.startswith(name) and key.endswith(".first")]
        [second] = [shape for key, shape in shapes.items() if key.startswith(name) and key.endswith(".second")]
        assert (first[2], second[2]) == (1, 3)
    assert summary.after.macs <= 0.51 * summary.before.macs


@pytest.mark.parametrize("budget", ["parameters", "bytes"])
def test_parameters_are_counted_once_whatever_strides(budget: str) -> None:
    spec = _C.LayerSpec("a", "conv2d", 6, 8, 3, 3, positions=16)
    spec.stride_height = spec.stride_width = 2
    tucker = _C.LayerPlan("a", "conv2d", 6, 8, rank=4, layout="tucker", rank_in=3)
    spatial = _C.LayerPlan("a", "conv2d", 6, 8, rank=5, layout="spatial")
    for layer, count in ((tucker, 3 * 6 + 4 * 3 * 9 + 8 * 4), (spatial, 5 * 6 * 3 + 8 * 5 * 3)):
        plan = _C.CompressionPlan("test", 0.5, [layer])
        assert _C.remaining([spec], plan, budget, True) == count * (4 if budget == "bytes" else 1)


def test_a_kernel_that_lies_on_its_side_is_refused() -> None:
    wrong = layer("a", torch.randn(8, 6, 5, 1), torch.randn(8, 6, 5, 1))
    wrong.weight, wrong.gradient = torch.randn(8, 6, 1, 5), torch.randn(8, 6, 1, 5)
    with pytest.raises(ValueError, match="a kernel of 5 x 1"):
        solved([wrong], layout="spatial")


@pytest.mark.parametrize("budget", ["macs", "latency"])
def test_a_layout_that_is_none_of_a_matrix_is_refused(budget: Literal["macs", "latency"]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4))
    x = torch.randn(4, 3, 8, 8)
    for wrong in ("tucker", "rows"):
        with pytest.raises(ValueError, match=f"compress: layout = '{wrong}', expected one of 'channel', 'spatial'"):
            cctorch.compress(model, [(x, torch.arange(4))], x, budget=budget, layout=wrong)  # type: ignore[arg-type]
    layers = [layer(f"l{i}", *pair) for i, pair in enumerate(weights())]
    with pytest.raises(ValueError, match="layout = tucker, expected channel or spatial"):
        solved(layers, layout="tucker")
