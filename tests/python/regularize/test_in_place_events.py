"""Events that rewrite parameters where they lie: to the bit what PyTorch's operators make of them, and what a parameter
in any layout, or one that cannot be rewritten in place, becomes."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from cctorch import regularize as r
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# More than one piece of 8192, and what is left of one.
SHAPES = [(90, 37, 3, 3), (5,), (), (1, 8192), (130, 70), (70, 64, 1, 1), (8200,)]


def contiguous(value: Tensor) -> Tensor:
    return value.clone()


def channels_last(value: Tensor) -> Tensor:
    return value.clone(memory_format=torch.channels_last) if value.dim() == 4 else value.clone()


def transposed(value: Tensor) -> Tensor:
    return value.mT.contiguous().mT if value.dim() >= 2 else value.clone()


def strided(value: Tensor) -> Tensor:
    """With values of nobody's between its own."""
    return torch.stack([value, torch.full_like(value, 7.0)], -1)[..., 0] if value.dim() else value.clone()


LAYOUTS = [contiguous, channels_last, transposed, strided]
Layout = Callable[[Tensor], Tensor]
cases = [pytest.mark.parametrize("dtype", DTYPES), pytest.mark.parametrize("layout", LAYOUTS)]


def everywhere(test: Callable[..., None]) -> Callable[..., None]:
    for case in cases:
        test = case(test)
    return test


def parameters(layout: Layout, dtype: torch.dtype, dimensions: int = 0) -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(11)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    return [(str(i), layout(value).requires_grad_()) for i, value in enumerate(values) if value.dim() >= dimensions]


def event(q: r.Regularizer, named: list[tuple[str, Tensor]], expected: list[Tensor], exactly: bool = True) -> r.Event:
    """An event, after which the parameters are as expected: with norms in float64, where they lay, and nothing beside
    them has changed. `project` and `as_if_at_event` say the same."""
    state, strides = q.state_dict(), [(w.data_ptr(), w.stride(), w._version) for _, w in named]
    before = [w.detach().double().clone() for _, w in named]
    events = r.Events(named, q, 1)
    projected = q.project(named).values
    q.load_state_dict(state)
    with events.as_if_at_event():
        inside = [w.detach().clone() for _, w in named]
    assert all(torch.equal(w.double(), old) for (_, w), old in zip(named, before, strict=True))
    found = events.step()
    assert found is not None
    changes = []
    for (_, w), old, new, then, value in zip(named, before, expected, inside, projected, strict=True):
        if exactly:
            torch.testing.assert_close(w.detach(), new, rtol=0, atol=0)
        else:
            torch.testing.assert_close(w.detach(), new, rtol=0, atol=1e-13)
        assert torch.equal(w, then)
        assert torch.equal(w, value)
        changes.append((w.detach().double() - old).flatten())
    for (_, w), (place, stride, version) in zip(named, strides, strict=True):
        assert (w.data_ptr(), w.stride()) == (place, stride)
        assert w._version > version
        if not w.is_contiguous() and w.dim() and w.stride(-1) == 2:
            assert (w.detach().as_strided((w.numel(),), (2,), w.storage_offset() + 1) == 7).all()
    assert found.update_norm == pytest.approx(float(torch.cat(changes).norm()), rel=1e-12)
    norm = torch.cat([old.flatten() for old in before]).norm()
    assert found.weight_norm == pytest.approx(float(norm), rel=1e-12)
    return found


@everywhere
def test_weight_decay(layout: Layout, dtype: torch.dtype) -> None:
    named = parameters(layout, dtype)
    expected = list(torch._foreach_mul([w.detach().clone() for _, w in named], 1 - 0.3))
    found = event(r.WeightDecay(0.3), named, expected)
    assert found.bits == found.dense_bits


@everywhere
def test_noise_is_that_of_torch_rand(layout: Layout, dtype: torch.dtype) -> None:
    named = parameters(layout, dtype)
    generator = torch.Generator().manual_seed(3)
    q = r.UniformNoise(0.2, seed=3)
    for _ in range(2):  # the second goes on where the first one stopped
        expected = []
        for _, w in named:
            rms = w.detach().double().norm() / math.sqrt(w.numel()) * 0.2
            noise = torch.rand(w.shape, generator=generator, dtype=dtype) * 2 - 1
            expected.append(w.detach() + noise * rms.to(dtype))
        # In float64 the order shows in which the norm's up to 30,000 squares are added.
        event(q, named, expected, exactly=dtype != torch.float64)
    state = q.state_dict()["generator"]
    assert isinstance(state, Tensor)
    assert torch.equal(state, generator.get_state())


@everywhere
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channels_of_the_largest_norm_are_kept(layout: Layout, dtype: torch.dtype, axis: int) -> None:
    named = parameters(layout, dtype, dimensions=2)
    expected, kept_values = [], 0
    for _, w in named:
        norms = w.detach().double().movedim(axis, 0).flatten(1).norm(dim=1)
        kept = max(1, int(0.5 * len(norms)))
        keep = torch.zeros_like(norms).index_fill_(0, norms.argsort(descending=True, stable=True)[:kept], 1)
        keep = keep.view([-1 if d == axis % w.dim() else 1 for d in range(w.dim())])
        expected.append(torch.where(keep > 0, w.detach(), 0))
        kept_values += w.numel() // len(norms) * kept
    found = event(r.ChannelPruning(0.5, axis), named, expected)
    bits = torch.finfo(dtype).bits
    assert found.bits == kept_values * bits + sum(w.shape[axis] for _, w in named)


def test_of_channels_as_large_the_first_are_kept() -> None:
    weight = torch.randn(64).repeat(9, 1) * torch.tensor([1.0, -1, 1, -1, 1, -1, 1, 0, -1])[:, None]
    for value in (weight.clone(), weight[:, :20].clone()):
        r.ChannelPruning(0.5).apply([("w", value)])
        assert torch.equal(value, torch.where(torch.arange(9)[:, None] < 4, weight[:, : value.shape[1]], 0))


@everywhere
@pytest.mark.parametrize("per_channel", [True, False])
def test_levels_up_to_the_largest_magnitude(layout: Layout, dtype: torch.dtype, per_channel: bool) -> None:
    named = parameters(layout, dtype, dimensions=2)
    expected = []
    for _, w in named:
        rows = w.detach().double()
        largest = rows.abs().amax(list(range(1, w.dim())), keepdim=True) if per_channel else rows.abs().amax()
        # In half precision some lie halfway between two levels, where the last digit of the quotient decides;
        # 7 / largest would be another one, of the reciprocal.
        codes = torch.round(rows * torch.full_like(largest, 7).div_(largest)).clamp_(-7, 7)
        expected.append((codes / 7 * largest).to(dtype))
    event(r.UniformQuantization(4, per_channel, "absmax"), named, expected)


MAKE: list[Callable[[], r.Regularizer]] = [
    lambda: r.WeightDecay(0.1),
    lambda: r.UniformNoise(0.1),
    lambda: r.ChannelPruning(0.5),
    lambda: r.UniformQuantization(4, range="absmax"),
]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("make", MAKE)
def test_the_number_of_threads_does_not_show(make: Callable[[], r.Regularizer], threads: Callable[[int], None]) -> None:
    found = []
    for number in (1, 3):
        threads(number)
        named = parameters(contiguous, torch.float32, dimensions=2)
        outcome = make().apply(named)
        found.append(([w.detach() for _, w in named], outcome.update_norm, outcome.weight_norm))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("make", MAKE)
def test_parameters_that_share_memory_are_seen_as_they_were(make: Callable[[], r.Regularizer]) -> None:
    """Each becomes Q of its values before the event; the later one is written over the earlier one."""
    memory = torch.randn(40, 64)
    named = [("upper", memory[:30]), ("lower", memory[20:])]
    expected = memory.clone()
    for part, value in zip((slice(0, 30), slice(20, 40)), make().project(named).values, strict=True):
        expected[part] = value
    r.Events(named, make(), 1, include_frozen=True).step()
    assert torch.equal(memory, expected)


@pytest.mark.parametrize("make", MAKE)
def test_nothing_is_rewritten_where_the_last_parameter_is_not_finite(make: Callable[[], r.Regularizer]) -> None:
    named = parameters(contiguous, torch.float32, dimensions=2)
    named[-1][1].detach()[-1, -1] = math.nan
    before = [w.detach().clone() for _, w in named]
    events = r.Events(named, make(), 1)
    name = named[-1][0]
    with pytest.raises(ValueError, match=f"parameter '{name}' has 1 of 4480 elements NaN or infinite before the event"):
        events.step()
    assert all(torch.equal(w.nan_to_num(9), old.nan_to_num(9)) for (_, w), old in zip(named, before, strict=True))


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float16, 6e4), (torch.float32, 3.3e38)])
def test_noise_that_overflows_changes_nothing(dtype: torch.dtype, largest: float) -> None:
    fine, full = torch.randn(64, 64), torch.full((64,), largest)
    before = [fine.clone(), full.to(dtype)]
    named = [("fine", fine.to(dtype)), ("full", full.to(dtype))]
    with pytest.raises(ValueError, match=r"parameter 'full' has \d+ of 64 elements NaN or infinite in Q\(w\)"):
        r.Events(named, r.UniformNoise(0.9), 1, include_frozen=True).step()
    assert all(torch.equal(w, old.to(dtype)) for (_, w), old in zip(named, before, strict=True))


def test_autograd_finds_that_a_value_it_saved_was_rewritten() -> None:
    weight = torch.randn(8, 64, requires_grad=True)
    y = (weight * weight).sum()
    r.Events([("weight", weight)], r.WeightDecay(0.5), 1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_parts_of_a_composition_see_what_the_parts_before_them_made() -> None:
    weight = torch.randn(64, 80)
    whole = weight.clone()
    parts: list[r.Regularizer] = [
        r.WeightDecay(0.5),
        r.ChannelPruning(0.5),
        r.UniformNoise(0.1, seed=2),
        r.ChannelPruning(0.25, axis=1),
        r.UniformQuantization(4, range="absmax"),
    ]
    outcome = r.Compose(parts).apply([("weight", whole)])
    step = weight.clone()
    for q in (*parts[:2], r.UniformNoise(0.1, seed=2), *parts[3:]):
        q.apply([("weight", step)])
    assert torch.equal(whole, step)
    assert float(outcome.update_norm) == pytest.approx(float((whole.double() - weight.double()).norm()), rel=1e-12)
    assert float(outcome.weight_norm) == pytest.approx(float(weight.double().norm()), rel=1e-12)
