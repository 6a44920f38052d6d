"""The solver as a whole: budget, switches, agreement of the two bases, and bad input."""

import itertools

import numpy as np
import pytest
import torch
from cctorch import _C


def network(seed: int = 0, shapes=((16, 8, 3, 3), (16, 16, 3, 3), (24, 16, 1, 1), (32, 24, 3, 3), (20, 64))):
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for index, shape in enumerate(shapes):
        kind = "linear" if len(shape) == 2 else "conv2d"
        kernel = shape[2:] or (1, 1)
        spec = _C.LayerSpec(f"layer{index}", kind, shape[1], shape[0], *kernel, positions=1 if kind == "linear" else 49)
        weight = torch.randn(shape, generator=generator)
        gradient = torch.randn(shape, generator=generator) * torch.rand(
            1, shape[1], *([1] * (len(shape) - 2)), generator=generator
        )
        layers.append(_C.SolverLayer(spec, weight, gradient))
    return layers


def solve(layers, model_macs=None, progress=None, **options):
    macs = model_macs or _C.dense_macs([layer.spec for layer in layers])
    return _C.solve(layers, macs, _C.SolverOptions(**options), progress)


def reduction(layers, plan):
    specs = [layer.spec for layer in layers]
    return 1 - _C.nominal_macs(specs, plan) / _C.dense_macs(specs)


@pytest.mark.parametrize("basis", ["fixed", "exact"])
@pytest.mark.parametrize("units", ["both", "channels", "singular_values"])
@pytest.mark.parametrize("target", [0.1, 0.5, 0.75])
def test_budget_is_met_by_allocation_and_by_plan(target, units, basis):
    layers = network()
    solution = solve(layers, target=target, units=units, basis=basis)
    total = sum(layer.spec.macs for layer in layers)
    allocated = sum(layer.spec.macs * curve.allocated for layer, curve in zip(layers, solution.curves, strict=True))
    assert allocated / total == pytest.approx(target, abs=1e-9)
    assert reduction(layers, solution.plan) >= target - 1e-9
    for layer in solution.plan.layers:
        if units == "channels":
            assert layer.rank is None
        if units == "singular_values":
            assert len(layer.kept_in) == layer.in_channels


def test_allocation_is_the_minimum_of_the_fitted_losses():
    """No transfer of budget between two layers lowers the sum of F a exp(b c) (the KKT point, by brute force)."""
    layers = network(3)
    curves = solve(layers, target=0.4).curves
    macs = [layer.spec.macs for layer in layers]
    rates = [curve.allocated for curve in curves]

    def total(c):
        return sum(f * curve.a * np.exp(curve.b * x) for f, curve, x in zip(macs, curves, c, strict=True))

    best = total(rates)
    for giver, taker in itertools.permutations(range(len(layers)), 2):
        for amount in (1e-3, 1e-2):
            moved = list(rates)
            moved[giver] -= amount * max(macs) / macs[giver]
            moved[taker] += amount * max(macs) / macs[taker]
            if moved[giver] >= 0 and moved[taker] <= 0.95:
                assert total(moved) > best


@pytest.mark.parametrize(("basis", "tolerance"), [("exact", 1e-12), ("fixed", 1e-6)])
def test_curve_against_a_replay(basis, tolerance):
    """Channels only: the curve's losses are the cumulative sums of the channels' own losses, in ascending order."""
    layers = network(1, shapes=((8, 6, 3, 3),))
    curve = solve(layers, target=0.5, units="channels", basis=basis).curves[0]
    weight, gradient = (t.double() for t in (layers[0].weight, layers[0].gradient))
    cumulative = (weight * gradient).square().sum((0, 2, 3)).sort().values.cumsum(0)
    np.testing.assert_allclose(curve.loss, cumulative / cumulative[-1], rtol=tolerance)
    np.testing.assert_allclose(curve.rate, np.arange(1, 7) / 6, rtol=1e-12)
    slope, intercept = np.polyfit(curve.rate, np.log(np.array(curve.loss) + 1e-10), 1, w=np.array(curve.loss) ** 0.25)
    assert curve.b == pytest.approx(slope, rel=1e-9)
    assert curve.a == pytest.approx(np.exp(intercept), rel=1e-9)


def replayed(layer, units):
    """The curve by numpy: one SVD for every unit that goes, none of ours."""
    weight, gradient = (t.double().numpy().reshape(t.shape[0], -1) for t in (layer.weight, layer.gradient))
    n, c = layer.weight.shape[:2]
    k = weight.shape[1] // c
    triplets = np.linalg.svd(weight, full_matrices=False)
    alone = [((gradient * weight) ** 2).reshape(n, c, k).sum((0, 2))[j] for j in range(c)]
    alone += [
        ((gradient * s * np.outer(u, v)) ** 2).sum() for u, s, v in zip(triplets[0].T, *triplets[1:], strict=True)
    ]
    chosen = {"both": range(c + len(triplets[1])), "channels": range(c)}[units]
    x, kept, values, gone, rates, losses = weight.copy(), c, len(triplets[1]), [], [], []
    decomposed = False
    for unit in sorted(chosen, key=lambda i: alone[i]):
        if unit < c:
            x[:, unit * k : (unit + 1) * k] = 0
            kept -= 1
        else:
            index = unit - c - sum(value < unit for value in gone)
            gone.append(unit)
            if index < min(values, kept * k):
                u, s, vh = np.linalg.svd(x, full_matrices=False)
                values = min(values, kept * k) - 1
                x -= s[index] * np.outer(u[:, index], vh[index])
                decomposed = True
        rank = min(values, kept * k)
        rate = 1 - ((kept * k + n) * rank if decomposed else kept * k * n) / (n * c * k)
        if rate > 0:
            rates.append(rate)
            losses.append(((gradient * (x - weight)) ** 2).sum())
        if kept == 0 or rank == 0:
            break
    return np.array(rates), np.array(losses) / max(losses)


@pytest.mark.parametrize("shape", [(8, 12, 3, 3), (40, 6, 3, 3), (24, 16, 1, 1), (10, 16, 1, 1), (1, 12, 1, 1)])
@pytest.mark.parametrize("dominant", [1.0, 1e3])
def test_curve_of_both_kinds_against_svds_of_its_own(shape, dominant):
    """`dominant`: two large channels that are harmless go first, and what is left is small beside them."""
    [layer] = network(6, shapes=(shape,))
    layer.weight[:, :2] *= dominant
    layer.gradient[:, :2] /= dominant**2
    rate, loss = replayed(layer, "both")
    for basis, tolerance in (("exact", 1e-9), ("fixed", 1e-3)):
        options = _C.SolverOptions(target=0.01, basis=basis)
        curve = _C.solve([layer], layer.spec.macs, options, None).curves[0]
        np.testing.assert_allclose(curve.rate, rate, rtol=1e-12)
        np.testing.assert_allclose(curve.loss, loss, rtol=tolerance, atol=1e-14 if basis == "exact" else 1e-6)


@pytest.mark.parametrize("units", ["both", "channels", "singular_values"])
@pytest.mark.parametrize("step", [0.3, 1.0])
def test_a_coarse_heuristic_still_has_a_fine_curve(units, step):
    layers = network(4)
    solution = solve(layers, target=0.3, units=units, step_fraction=step)
    assert solution.warnings == []
    assert all(len(curve.rate) >= 5 for curve in solution.curves)
    assert reduction(layers, solution.plan) >= 0.3


def test_a_curve_of_many_units_passes_through_the_points_of_the_fine_one():
    """250 channels: two at a time, or one at a time with step_fraction = 0.004."""
    layers = network(1, shapes=((8, 250, 1, 1),))
    coarse, fine = (
        solve(layers, target=0.5, units="channels", basis="exact", step_fraction=step).curves[0]
        for step in (0.01, 0.004)
    )
    assert len(fine.loss) == 250
    assert len(coarse.loss) == 125
    np.testing.assert_allclose(coarse.rate, fine.rate[1::2], rtol=1e-12)
    np.testing.assert_allclose(coarse.loss, fine.loss[1::2], rtol=1e-12)


def test_channels_only_removes_the_least_important():
    layers = network(2, shapes=((8, 12, 3, 3),))
    weight, gradient = layers[0].weight.double(), layers[0].gradient.double()
    plan = solve(layers, target=0.5, units="channels", gamma=0.0).plan.layers[0]
    importance = (weight * gradient).square().sum((0, 2, 3))
    assert plan.kept_in == sorted(importance.argsort()[6:].tolist())


def test_fixed_basis_agrees_with_exact():
    layers = network(4)
    exact, fixed = (solve(layers, target=0.5, basis=basis).plan for basis in ("exact", "fixed"))
    pairs = list(zip(exact.layers, fixed.layers, strict=True))
    overlap = [len(set(a.kept_in) & set(b.kept_in)) / len(set(a.kept_in) | set(b.kept_in)) for a, b in pairs]
    assert np.mean(overlap) > 0.8
    assert [a.rank is None for a, _ in pairs] == [b.rank is None for _, b in pairs]


def test_a_bound_holds_and_the_others_make_up_for_it():
    layers = network(4)
    free = solve(layers, target=0.25)
    bound = free.curves[3].allocated / 2
    layers[3].max_rate, layers[0].max_rate = bound, 0.0
    bounded = solve(layers, target=0.25)
    assert bound > 0.05
    assert bounded.curves[3].allocated == bound
    assert bounded.curves[0].allocated == 0.0
    assert bounded.plan.layers[0].kept_in == list(range(8))
    assert bounded.plan.layers[0].rank is None
    macs = [layer.spec.macs for layer in layers]
    taken = sum(c * curve.allocated for c, curve in zip(macs, bounded.curves, strict=True))
    assert taken / sum(macs) == pytest.approx(0.25, abs=1e-9)
    # One channel of 24 is 4 %: a last step goes no further.
    assert 1 - _C.layer_macs(layers[3].spec, bounded.plan.layers[3], False) / macs[3] < bound + 0.05


@pytest.mark.parametrize("bound", [-0.1, 1.1, float("nan")])
def test_an_impossible_bound_is_refused_naming_the_layer(bound):
    layers = network()
    layers[2].max_rate = bound
    with pytest.raises(ValueError, match=r"'layer2': max_rate = .*, expected 0 to 1"):
        solve(layers)


def test_result_does_not_depend_on_the_number_of_threads():
    layers = network(5)
    threads = torch.get_num_threads()
    plans = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            plans.append(solve(layers, target=0.5).plan)
    finally:
        torch.set_num_threads(threads)
    assert plans[0] == plans[1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("what", ["weight", "gradient"])
def test_not_finite_is_refused_naming_the_layer(what, bad):
    layers = network()
    getattr(layers[3], what)[0, 0] = bad
    with pytest.raises(ValueError, match=rf"'layer3'.* {what} elements are NaN or infinite"):
        solve(layers)


def test_unreachable_target_states_the_highest():
    layers = network()
    total = sum(layer.spec.macs for layer in layers)
    with pytest.raises(ValueError, match=r"cannot be reached.* 0\.4[67]"):
        solve(layers, model_macs=2 * total, target=0.6)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("target", 0.0),
        ("target", 1.0),
        ("target", float("nan")),
        ("gamma", -1.0),
        ("step_fraction", 0.0),
        ("max_rate", 1.0),
    ],
)
def test_impossible_options_are_named(option, value):
    with pytest.raises(ValueError, match=option):
        solve(network(), **{option: value})


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="units = 'filters', expected one of 'both', 'channels', 'singular_values'"):
        _C.SolverOptions(units="filters")
    with pytest.raises(ValueError, match="basis"):
        _C.SolverOptions(basis="quick")


def test_a_layer_without_gradient_is_left_alone_with_a_warning():
    layers = network()
    layers[1].gradient.zero_()
    solution = solve(layers, target=0.4)
    assert solution.plan.layers[1].is_unchanged
    assert [w for w in solution.warnings if "layer1" in w]
    assert len(solution.warnings) == 1


def test_constant_weights_become_rank_one_before_they_lose_channels():
    layers = network()
    layers[1].weight.fill_(0.5)
    solution = solve(layers, target=0.5)
    assert reduction(layers, solution.plan) >= 0.5 - 1e-9


def test_layers_of_one_channel_and_one_filter():
    layers = network(6, shapes=((8, 1, 3, 3), (1, 8, 3, 3), (16, 16, 3, 3)))
    solution = solve(layers, target=0.5)
    assert solution.plan.layers[0].kept_in == [0]
    assert all(len(layer.kept_in) >= 1 for layer in solution.plan.layers)


def test_shape_mismatch_is_refused():
    layers = network()
    layers[0].gradient = layers[0].gradient[:, :3].clone()
    with pytest.raises(ValueError, match=r"'layer0'.*shape"):
        solve(layers)


def test_progress_reports_every_layer_and_can_stop_the_search():
    layers = network()
    calls = []
    solve(layers, progress=lambda *call: calls.append(call))
    for stage in ("rate optimization", "multi-step heuristic"):
        assert [done for name, done, _ in calls if name == stage] == list(range(len(layers) + 1))

    def interrupt(stage, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solve(layers, progress=interrupt)
