"""Budgets other than multiply-accumulates: artificial cost tables, parameters, and the default left as it was."""

import itertools
import math

import pytest
import torch
from cctorch import _C
from test_solve import network, reduction, solve

RANKS = (4, 8, 12, 16)


def pruned_cost(spec, channels):
    return 1.0 * spec.positions * spec.out_channels * channels * spec.kernel_height * spec.kernel_width


def factored_cost(spec, channels, rank):
    return 1.0 * spec.positions * rank * (channels * spec.kernel_height * spec.kernel_width + spec.out_channels)


def with_tables(layers, multiple=1, factored=factored_cost, pruned=pruned_cost):
    for layer in layers:
        spec = layer.spec
        counts = [*range(multiple, spec.in_channels, multiple), spec.in_channels]
        costs = [pruned(spec, count) for count in counts]
        low_rank = [factored(spec, count, rank) for count in counts for rank in RANKS]
        layer.table = _C.CostTable(counts, RANKS, costs, low_rank, multiple)
    return layers


def cost(layer, plan, multiple=1):
    """Of a plan by the formulas above, with counts rounded up: nothing of the solver's own interpolation."""
    up = lambda count, most: min(math.ceil(count / multiple) * multiple, most)  # noqa: E731
    channels = up(len(plan.kept_in), plan.in_channels)
    if plan.rank is None:
        return pruned_cost(layer.spec, channels)
    return factored_cost(layer.spec, channels, up(plan.rank, RANKS[-1]))


def total(layers):
    return sum(pruned_cost(layer.spec, layer.spec.in_channels) for layer in layers)


@pytest.mark.parametrize("units", ["both", "channels", "singular_values"])
@pytest.mark.parametrize("target", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("multiple", [1, 4])
def test_the_budget_is_met_in_the_unit_of_the_table_and_hardly_exceeded(target, units, multiple):
    layers = with_tables(network(), multiple)
    plan = solve(layers, model_macs=total(layers), target=target, units=units, budget="table").plan
    left = sum(cost(layer, found, multiple) for layer, found in zip(layers, plan.layers, strict=True))
    assert 1 - left / total(layers) >= target - 1e-9
    largest = max(pruned_cost(layer.spec, layer.spec.in_channels) for layer in layers) / total(layers)
    assert 1 - left / total(layers) <= target + largest / 2


def test_a_table_in_which_factoring_never_pays_gives_no_factored_layer():
    def plan_of(factored):
        layers = with_tables(network(), factored=factored)
        layers[1].weight.fill_(0.5)  # of rank one: factoring it loses nothing
        return solve(layers, model_macs=total(layers), target=0.4, budget="table").plan

    assert plan_of(factored_cost).layers[1].rank is not None
    plan = plan_of(lambda spec, channels, rank: 1.01 * pruned_cost(spec, channels))
    assert all(layer.rank is None for layer in plan.layers)


@pytest.mark.parametrize("multiple", [4, 8])
def test_a_table_with_steps_gives_multiples(multiple):
    layers = with_tables(network(7), multiple)
    plan = solve(layers, model_macs=total(layers), target=0.4, budget="table").plan
    assert any(len(layer.kept_in) < layer.in_channels for layer in plan.layers)
    for layer in plan.layers:
        assert len(layer.kept_in) % multiple == 0 or len(layer.kept_in) == layer.in_channels
        assert layer.rank is None or layer.rank % multiple == 0


def test_the_most_valuable_channels_are_those_that_come_back():
    """12 channels in steps of 4, one removed at a time: whatever is kept is what importance alone would keep."""
    layers = with_tables(network(2, shapes=((8, 12, 3, 3),)), 4)
    importance = (layers[0].weight.double() * layers[0].gradient.double()).square().sum((0, 2, 3))
    options = _C.SolverOptions(gamma=0.0, units="channels", step_fraction=0.3, budget="table", basis="exact")
    [found] = _C.layer_choices(layers, options)
    assert [len(choice.plan.kept_in) for choice in found.choices] == [12, 8, 4]
    for choice in found.choices[1:]:
        best = importance.argsort(descending=True)[: len(choice.plan.kept_in)]
        assert choice.plan.kept_in == sorted(best.tolist())
        gone = [c for c in range(12) if c not in choice.plan.kept_in]
        assert choice.loss == pytest.approx(importance[gone].sum().item(), rel=1e-9)


def test_the_loss_of_a_choice_is_that_of_the_weight_that_is_deployed():
    layers = with_tables(network(3))
    for layer, found in zip(layers, _C.layer_choices(layers, _C.SolverOptions(budget="table")), strict=True):
        weight, gradient = layer.weight.double(), layer.gradient.double()
        for choice in found.choices:
            kept = torch.zeros(weight.shape[1], dtype=torch.float64)
            kept[choice.plan.kept_in] = 1
            matrix = (weight * kept.view(1, -1, *([1] * (weight.dim() - 2)))).flatten(1)
            if choice.plan.rank is not None:
                u, s, v = torch.linalg.svd(matrix, full_matrices=False)
                s[choice.plan.rank :] = 0
                matrix = (u * s) @ v
            loss = (gradient.flatten(1) * (matrix - weight.flatten(1))).square().sum().item()
            assert choice.loss == pytest.approx(loss, rel=1e-6, abs=1e-12 * found.largest_loss)


def test_choices_fall_in_cost_and_rise_in_loss():
    layers = with_tables(network(4), 2)
    for found in _C.layer_choices(layers, _C.SolverOptions(budget="table")):
        assert found.choices[0].plan.is_unchanged
        for one, next_one in itertools.pairwise(found.choices):
            assert next_one.cost < one.cost
            assert next_one.loss > one.loss


def removed_and_objective(found, combination):
    """What is removed of the cost, and the objective of E2, for the index of a choice in each layer."""
    chosen = [(layer, layer.choices[0].cost, layer.choices[c]) for layer, c in zip(found, combination, strict=True)]
    removed = sum(dense - choice.cost for _, dense, choice in chosen)
    return removed, sum(dense * choice.loss / layer.largest_loss for layer, dense, choice in chosen)


def chosen_by(found, solution):
    return tuple(
        [choice.plan for choice in layer.choices].index(plan)
        for layer, plan in zip(found, solution.plan.layers, strict=True)
    )


@pytest.mark.parametrize("multiple", [2, 4])
def test_selection_against_all_combinations(multiple):
    """Where the convex hull has a point on the budget the optimum is found; elsewhere the budget is used up."""
    layers = with_tables(network(5, shapes=((16, 8, 3, 3), (8, 16, 1, 1), (16, 8, 3, 3))), multiple)
    found = _C.layer_choices(layers, _C.SolverOptions(budget="table"))
    points = {c: removed_and_objective(found, c) for c in itertools.product(*(range(len(f.choices)) for f in found))}
    tested = set()
    for exponent in range(-40, 20):
        lagrangian = min(points, key=lambda c: points[c][1] - 2.0 ** (exponent / 4) * points[c][0])
        budget, objective = points[lagrangian]
        if budget == 0 or lagrangian in tested:
            continue
        tested.add(lagrangian)
        chosen = chosen_by(found, _C.select(found, total(layers), budget * (1 - 1e-12) / total(layers)))
        assert points[chosen][1] == pytest.approx(objective, rel=1e-12)
    assert len(tested) > 4
    for target in (0.15, 0.35, 0.55):
        budget = target * total(layers)
        chosen = chosen_by(found, _C.select(found, total(layers), target))
        assert points[chosen][0] >= budget * (1 - 1e-12)
        for layer, index in enumerate(chosen):
            for less in range(index):
                with_less = (*chosen[:layer], less, *chosen[layer + 1 :])
                assert points[with_less][0] < budget


def test_unreachable_and_misfitting_tables_are_refused():
    layers = with_tables(network())
    with pytest.raises(ValueError, match=r"cannot be reached.* 0\.4"):
        solve(layers, model_macs=2 * total(layers), target=0.6, budget="table")
    layers[2].table = _C.CostTable([1, 2], [], [1.0, 2.0], [])
    with pytest.raises(ValueError, match="cost table of layer 'layer2'"):
        solve(layers, model_macs=total(layers), target=0.3, budget="table")
    with pytest.raises(ValueError, match=r"cost table of layer 'layer.' is for 0 channel counts"):
        solve(network(), model_macs=total(network()), target=0.3, budget="table")


def test_a_layer_without_gradient_keeps_its_form():
    layers = with_tables(network())
    layers[1].gradient.zero_()
    solution = solve(layers, model_macs=total(layers), target=0.3, budget="table")
    assert solution.plan.layers[1].is_unchanged
    assert [warning for warning in solution.warnings if "'layer1'" in warning]


@pytest.mark.parametrize("target", [0.3, 0.6])
def test_the_budget_can_be_parameters(target):
    layers = network()
    weights = [layer.spec.parameters for layer in layers]
    solution = solve(layers, model_macs=sum(weights), target=target, budget="parameters")
    allocated = sum(w * curve.allocated for w, curve in zip(weights, solution.curves, strict=True))
    assert allocated / sum(weights) == pytest.approx(target, abs=1e-9)
    left = sum(
        math.prod(
            (spec.out_channels if p.rank is None else p.rank, len(p.kept_in), spec.kernel_height, spec.kernel_width)
        )
        + (0 if p.rank is None else p.rank * spec.out_channels)
        for spec, p in ((layer.spec, p) for layer, p in zip(layers, solution.plan.layers, strict=True))
    )
    assert left <= (1 - target) * sum(weights) + 1e-6
    assert reduction(layers, solution.plan) != pytest.approx(target, abs=1e-3)


def wavy_layers():
    layers = []
    for index, shape in enumerate(((12, 8, 3, 3), (16, 12, 1, 1), (10, 16, 3, 3))):
        n = torch.arange(math.prod(shape), dtype=torch.float64).view(shape)
        weight = torch.sin(1.3 * n + 0.7 * torch.sin(0.37 * n))
        gradient = torch.cos(2.1 * n + index) * (1 + torch.sin(0.11 * n))
        spec = _C.LayerSpec(f"layer{index}", "conv2d", shape[1], shape[0], *shape[2:], positions=49)
        layers.append(_C.SolverLayer(spec, weight, gradient))
    return layers


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (0.3, [(range(8), 5), (range(12), 6), (range(16), 6)]),
        (0.6, [(range(8), 3), ([1, 2, 4, 5, 7, 8, 10, 11], 4), ([*range(12), 13, 14, 15], 4)]),
    ],
)
def test_plans_for_multiply_accumulates_are_those_of_the_solver_before_it_knew_other_budgets(target, expected):
    plan = solve(wavy_layers(), target=target).plan
    assert [(layer.kept_in, layer.rank) for layer in plan.layers] == [(list(kept), rank) for kept, rank in expected]


@pytest.mark.parametrize("budget", ["macs", "parameters", "bytes"])
@pytest.mark.parametrize("multiple", [2, 8])
@pytest.mark.parametrize("units", ["both", "channels", "singular_values"])
def test_multiples_meet_a_budget_of_counts(budget, multiple, units):
    layers = network(7)
    for layer, bits in zip(layers, itertools.cycle((4, 32, 16)), strict=False):
        layer.spec.bits = bits
    units_of = {"macs": lambda spec: spec.positions, "parameters": lambda _: 1, "bytes": lambda spec: spec.bits / 8}
    scale = units_of[budget]
    whole = sum(layer.spec.parameters * scale(layer.spec) for layer in layers)
    plan = solve(layers, model_macs=whole, target=0.4, units=units, budget=budget, multiple=multiple).plan
    left = 0
    for layer, found in zip(layers, plan.layers, strict=True):
        inputs, rank = len(found.kept_in), found.rank
        assert inputs % multiple == 0 or inputs == found.in_channels
        area = layer.spec.kernel_height * layer.spec.kernel_width
        most = min(found.out_channels, inputs * area)
        assert rank is None or rank % multiple == 0 or rank == most
        per_position = (
            found.out_channels * inputs * area if rank is None else rank * (inputs * area + found.out_channels)
        )
        left += per_position * scale(layer.spec)
    assert left < whole
    assert 1 - left / whole >= 0.4 - 1e-9
    assert 1 - left / whole < 0.5


def test_an_impossible_multiple_is_refused():
    for multiple in (0, -8):
        with pytest.raises(ValueError, match=f"multiple = {multiple}, expected at least 1"):
            solve(network(), multiple=multiple)
