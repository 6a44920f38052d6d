"""Low-rank regularizers from one event to the next: they start from the last event's factors."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cctorch import regularize as r
from torch import Tensor, nn

FACTORED: dict[str, Callable[[], r.Regularizer]] = {
    "svd": lambda: r.SVD(rank=16),
    "svd spatial": lambda: r.SVD(rank=24, view="spatial"),
    "tucker": lambda: r.Tucker2(ranks=(20, 18)),
    "composed": lambda: r.Compose([r.UniformNoise(0.01), r.SVD(rank=16)]),
}


class Run:
    """Of weights that are too large for the exact route."""

    def __init__(self, q: r.Regularizer) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = {
            "conv": nn.Parameter(torch.randn(96, 80, 3, 3, generator=generator)),
            "linear": nn.Parameter(torch.randn(200, 100, generator=generator)),
        }
        self.events = r.Events(self.weights.items(), q, 2)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step + 1)
            with torch.no_grad():
                for weight in self.weights.values():
                    weight += 0.03 * torch.randn(weight.shape, generator=generator)
            self.events.step()

    def values(self) -> list[Tensor]:
        return [w.detach().clone() for w in self.weights.values()]


@pytest.mark.parametrize("q", FACTORED)
def test_a_resumed_run_goes_on_to_the_bit(q: str) -> None:
    straight = Run(FACTORED[q]())
    straight.train(0, 9)
    stopped = Run(FACTORED[q]())
    stopped.train(0, 5)
    file = io.BytesIO()
    torch.save({"weights": stopped.values(), "events": stopped.events.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = Run(FACTORED[q]())
    with torch.no_grad():
        for weight, value in zip(resumed.weights.values(), state["weights"], strict=True):
            weight.copy_(value)
    resumed.events.load_state_dict(state["events"])
    resumed.train(5, 9)
    for a, b in zip(straight.values(), resumed.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_as_if_at_event_is_what_the_event_then_does() -> None:
    run = Run(r.SVD(rank=16))
    run.train(0, 3)
    with run.events.as_if_at_event():
        seen = run.values()
    run.events.finish()
    for a, b in zip(seen, run.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_every_event_is_near_the_best() -> None:
    q = r.SVD(rank=16)
    run = Run(q)
    for step in range(0, 12, 2):
        run.train(step, step + 1)
        before = run.values()
        run.train(step + 1, step + 2)
        generator = torch.Generator().manual_seed(step + 2)
        for old, new in zip(before, run.values(), strict=True):
            trained = old + 0.03 * torch.randn(old.shape, generator=generator)
            values = np.linalg.svd(trained.flatten(1).double().numpy(), compute_uv=False)
            best = float(np.sqrt((values[16:] ** 2).sum()))
            assert float((new - trained).double().norm()) <= 1.001 * best + 1e-6 * float(trained.norm())


def test_a_state_of_another_rank_is_not_used() -> None:
    weight = [("w", nn.Parameter(torch.randn(100, 120, generator=torch.Generator().manual_seed(0))))]
    other = r.SVD(rank=9)
    other.apply(weight)
    q = r.SVD(rank=16)
    q.load_state_dict(other.state_dict())
    fresh = r.SVD(rank=16)
    torch.testing.assert_close(q.project(weight).values, fresh.project(weight).values, rtol=0, atol=0)


def test_small_weights_leave_no_state() -> None:
    q = r.SVD(rank=2)
    q.apply([("w", nn.Parameter(torch.randn(10, 12)))])
    assert q.state_dict() == {}


@pytest.mark.parametrize(
    "q", [r.SVD(rank=5), r.TiledSVD(16, 3), r.Tucker2(ranks=(5, 5))], ids=["svd", "tiled", "tucker2"]
)
def test_lstm_weights_are_matrices_of_stacked_gates(q: r.Regularizer) -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(12, 20, num_layers=2)
    before = {name: p.detach().clone() for name, p in lstm.named_parameters()}
    q.apply(list(lstm.named_parameters()))
    for name, p in lstm.named_parameters():
        if p.dim() < 2:
            torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=0)
            continue
        values = np.linalg.svd(before[name].double().numpy(), compute_uv=False)
        moved = float((p.detach() - before[name]).double().norm())
        if isinstance(q, r.TiledSVD):
            assert 0 < moved < float(before[name].norm())
        else:
            assert torch.linalg.matrix_rank(p.detach(), rtol=1e-5) == 5
            assert moved == pytest.approx(float(np.sqrt((values[5:] ** 2).sum())), rel=1e-5)
    assert lstm(torch.randn(3, 2, 12))[0].shape == (3, 2, 20)
