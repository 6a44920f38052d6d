"""Wide layers, whose rankings cost too much to have many of them: small ones, with an effort that makes them wide."""

import math

import numpy as np
import pytest
import torch
from cctorch import _C

TINY = 1.0  # every ranking costs more
SHAPES = [(24, 32), (32, 24), (16, 12, 3, 3), (64, 6, 3, 3)]


def layer(shape: tuple[int, ...], seed: int = 0) -> _C.SolverLayer:
    """Input channels of uneven size, a spectrum that falls, and the gradient of a few examples."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    n, c, k = shape[0], shape[1], math.prod(shape[2:])
    u, s, v = torch.linalg.svd(normal(n, c * k), full_matrices=False)
    weight = (u / (1 + torch.arange(len(s)))) @ v * normal(c, 1).exp().expand(-1, k).flatten()
    gradient = normal(n, 16) @ normal(16, c * k).relu()
    spec = _C.LayerSpec(f"layer{seed}", "conv2d" if len(shape) == 4 else "linear", c, n, *(shape[2:] or (1, 1)))
    return _C.SolverLayer(spec, weight.view(shape), gradient.view(shape))


def search(layers: list[_C.SolverLayer], **options: float) -> _C.Search:
    return _C.Search(layers, sum(x.spec.macs for x in layers), _C.SolverOptions(**options))


def replayed(layer: _C.SolverLayer) -> tuple[np.ndarray, np.ndarray]:
    """The curve of a wide layer by numpy: an eighth of the units at a time, along the dense weight's singular vectors
    until half of the squares has gone, or fewer inputs than vectors are left."""
    weight, gradient = (t.double().numpy().reshape(t.shape[0], -1) for t in (layer.weight, layer.gradient))
    n, c = layer.weight.shape[:2]
    k = weight.shape[1] // c
    u, s, vh = np.linalg.svd(weight, full_matrices=False)
    alone = list(((gradient * weight) ** 2).reshape(n, c, k).sum((0, 2)))
    alone += [((gradient * np.outer(a * b, d)) ** 2).sum() for a, b, d in zip(u.T, s, vh, strict=True)]
    order = sorted(range(len(alone)), key=lambda i: alone[i])
    x, kept, values, gone, rates, losses = weight.copy(), set(range(c)), len(s), [], [], []
    squares, squares_gone, decomposed = (weight**2).sum(), 0.0, False
    step = max(1, len(order) // 8)
    for begin in range(0, len(order), step):
        units = order[begin : begin + step]
        indices = [unit - c - sum(value < unit for value in gone) for unit in units if unit >= c]
        rank = min(values, len(kept) * k)
        indices = [index for index in indices if index < rank]
        gone += [unit for unit in units if unit >= c]
        if indices:
            if squares_gone >= squares / 2 or u.shape[1] > rank:
                u, s, _ = np.linalg.svd(x, full_matrices=False)
                u, squares, squares_gone = u[:, :rank], (s**2).sum(), 0.0
            removed = u[:, indices]
            x = x - removed @ (removed.T @ x)
            u = np.delete(u, indices, axis=1)
            values, decomposed = rank - len(indices), True
        for channel in (unit for unit in units if unit < c):
            squares_gone += (x[:, channel * k : (channel + 1) * k] ** 2).sum()
            x[:, channel * k : (channel + 1) * k] = 0
            kept.remove(channel)
        rank = min(values, len(kept) * k)
        rate = 1 - ((len(kept) * k + n) * rank if decomposed else len(kept) * k * n) / weight.size
        if rate > 0:
            rates.append(rate)
            losses.append(((gradient * (x - weight)) ** 2).sum())
        if not kept or rank == 0:
            break
    return np.array(rates), np.array(losses) / max(losses)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_curve_against_a_weight_rebuilt_along_the_same_directions(shape, seed):
    wide = layer(shape, seed)
    curve = search([wide], target=0.01, effort=TINY).at(0.01).curves[0]
    rate, loss = replayed(wide)
    np.testing.assert_allclose(curve.rate, rate, rtol=1e-12)
    np.testing.assert_allclose(curve.loss, loss, rtol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("units", ["both", "channels", "singular_values"])
def test_a_wide_layer_gives_up_what_was_asked_and_one_unit_more_at_most(shape, units):
    wide = layer(shape)
    spec, highest = wide.spec, 0.5
    found = search([wide], target=highest, units=units, effort=TINY)
    k, n = math.prod(shape[2:]), shape[0]
    unit = max(k * n, k * spec.in_channels + n) / spec.macs
    for target in (0.1, 0.25, 0.4, highest):
        plan = found.at(target).plan.layers[0]
        removed = 1 - _C.layer_macs(spec, plan, False) / spec.macs
        assert target - 1e-9 <= removed < target + unit


def plan_loss(layer: _C.SolverLayer, plan: _C.LayerPlan) -> float:
    weight, gradient = layer.weight.double(), layer.gradient.double()
    left = torch.zeros_like(weight)
    left[:, plan.kept_in] = weight[:, plan.kept_in]
    if plan.rank is not None:
        first, second = _C.factorize(weight, plan.kept_in, plan.rank)
        left[:, plan.kept_in] = (second.flatten(1) @ first.flatten(1)).view(left[:, plan.kept_in].shape)
    return (gradient * (left - weight)).square().sum().item()


def test_fewer_rankings_choose_about_as_well():
    """Of twelve layers, the losses of plans of the same size: their geometric mean, over that of all rankings."""
    ratios, overlaps = [], []
    for seed in range(4):
        for shape in ((96, 96), (64, 160), (48, 32, 3, 3)):
            one = layer(shape, seed)
            plans = [search([one], target=0.6, effort=effort).at(0.6).plan.layers[0] for effort in (TINY, math.inf)]
            ratios.append(math.log(plan_loss(one, plans[0]) / plan_loss(one, plans[1])))
            kept = [set(plan.kept_in) for plan in plans]
            overlaps.append(len(kept[0] & kept[1]) / len(kept[0] | kept[1]))
    assert math.exp(np.mean(ratios)) < 1.02
    assert np.mean(overlaps) > 0.9


def test_effort_changes_nothing_where_the_options_ask_for_coarser_steps_or_the_exact_basis():
    layers = [layer(shape, seed) for seed, shape in enumerate(SHAPES)]
    exact = [search(layers, target=0.4, basis="exact", effort=e).at(0.4) for e in (TINY, math.inf)]
    assert exact[0].plan == exact[1].plan
    small = [search(layers, target=0.4, effort=e).at(0.4) for e in (_C.SolverOptions().effort, math.inf)]
    assert small[0].plan == small[1].plan
    assert [curve.loss for curve in small[0].curves] == [curve.loss for curve in small[1].curves]


@pytest.mark.parametrize("multiple", [1, 4])
def test_result_does_not_depend_on_the_number_of_threads(multiple):
    layers = [layer(shape, seed) for seed, shape in enumerate([(16, 16), (128, 192), (192, 128), (24, 24, 3, 3)])]
    threads = torch.get_num_threads()
    plans = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            plans.append(search(layers, target=0.5, multiple=multiple, effort=1e7).at(0.5).plan)
    finally:
        torch.set_num_threads(threads)
    assert plans[0] == plans[1] == plans[2]


def test_multiples_of_a_wide_layer():
    wide = layer((48, 64), 3)
    plan = search([wide], target=0.5, multiple=8, effort=TINY).at(0.5).plan.layers[0]
    assert len(plan.kept_in) % 8 == 0
    assert 1 - _C.layer_macs(wide.spec, plan, False) / wide.spec.macs >= 0.5


@pytest.mark.parametrize("effort", [0.0, -1.0, math.nan])
def test_an_impossible_effort_is_refused(effort):
    with pytest.raises(ValueError, match=r"effort = .*, expected more than 0"):
        search([layer((8, 8))], effort=effort)


def test_a_wide_layer_without_gradient_is_left_alone():
    layers = [layer((24, 32), 1), layer((24, 32), 2)]
    layers[0].gradient.zero_()
    found = search(layers, target=0.3, effort=TINY).at(0.3)
    assert found.plan.layers[0].is_unchanged
    assert any("left alone" in warning for warning in found.warnings)
