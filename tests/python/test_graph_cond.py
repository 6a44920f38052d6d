"""Models that choose between layers by torch.cond."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cctorch.apply import apply
from cctorch.graph import trace
from networks import projected, random_plan, randomized
from torch import Tensor, nn


class Choosing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 1), nn.Linear(12, 5)
        self.bright = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.dark = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.cond(x.sum() > 0, lambda x: self.bright(x), lambda x: self.dark(x), (F.relu(self.first(x)),))
        return self.head(F.relu(self.last(F.relu(chosen))).mean((2, 3)))


@torch.no_grad()
def test_layers_in_branches_are_left_alone_with_one_warning() -> None:
    torch.manual_seed(0)
    model, x = randomized(Choosing()), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    graph = trace(model, x)
    assert graph.warnings == [
        "cond in 'Choosing' is not followed: 'bright.0', 'bright.1', 'dark' in it are left alone, not counted"
    ]
    assert [spec.name for spec in graph.specs] == ["first", "last", "head"]


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_all_branches_compute_as_before(seed: int) -> None:
    torch.manual_seed(0)
    model, x = randomized(Choosing()), torch.rand(2, 3, 6, 6, dtype=torch.float64)
    plan = random_plan(trace(model, x), seed)
    assert {"last", "head"} & {layer.name for layer in plan.layers}
    expected = projected(copy.deepcopy(model), plan)
    apply(model, plan)
    for batch in (x, -x):
        torch.testing.assert_close(model(batch), expected(batch), rtol=1e-10, atol=1e-10)
