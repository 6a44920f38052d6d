import pytest
import torch
from cctorch import measure
from cctorch.apply import apply
from cctorch.graph import trace
from networks import PaddedResNet, random_plan, randomized
from torch import Tensor, nn


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(2, 3)
        self.unused = nn.Linear(2, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls += 1
        return self.used(x) + self.used(-x)


def test_accuracy_counts_over_uneven_batches() -> None:
    scores = torch.eye(4)
    model = nn.Identity().train()
    batches = [(scores[:3], torch.tensor([0, 1, 0])), (scores[3:], torch.tensor([3]))]
    assert measure.accuracy(model, batches) == 75.0
    assert model.training
    with pytest.raises(ValueError, match="batches is empty"):
        measure.accuracy(model, [])


@pytest.mark.parametrize("targets", [torch.zeros(4, 1, dtype=torch.int64), torch.eye(4, dtype=torch.int64)])
def test_accuracy_refuses_targets_that_would_be_compared_each_with_each(targets: Tensor) -> None:
    with pytest.raises(ValueError, match=r"targets of shape \(4, [14]\), expected the indices .* of shape \(4,\)"):
        measure.accuracy(nn.Identity(), [(torch.eye(4), targets)])


def test_latency_runs_warmup_and_repeats_in_evaluation_mode() -> None:
    model = Counting().train()
    assert measure.latency(model, torch.ones(1, 2), repeats=3, warmup=2) > 0
    assert model.calls == 5
    assert model.training
    with pytest.raises(ValueError, match="repeats = 0, expected at least 1"):
        measure.latency(model, torch.ones(1, 2), repeats=0)


def test_layer_times_name_the_layers_that_ran_and_leave_no_hooks() -> None:
    model = Counting()
    times = measure.layer_times(model, torch.ones(1, 2), repeats=2, warmup=1)
    assert list(times) == ["used"]
    assert times["used"] > 0
    assert not model.used._forward_hooks
    assert not model.used._forward_pre_hooks


def test_layer_times_of_a_compressed_model_have_the_dense_names() -> None:
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model = randomized(PaddedResNet())
    dense = measure.layer_times(model, x, repeats=1, warmup=0)
    apply(model, random_plan(trace(model, x)))
    assert list(measure.layer_times(model, x, repeats=1, warmup=0)) == list(dense)


def test_a_shared_parameter_counts_once() -> None:
    model = nn.Sequential(nn.Linear(100, 100), nn.BatchNorm1d(100))
    assert measure.parameters(model) == 100 * 100 + 100 + 200
    model[0] = nn.Linear(100, 100)
    tied = nn.Sequential(model[0], model[0])
    assert measure.parameters(tied) == 10100
