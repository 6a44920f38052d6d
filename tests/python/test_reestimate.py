import copy
from collections.abc import Iterator

import pytest
import torch
from cctorch.batch_norm import reestimate
from torch import nn


def batches(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(4, 2, 5, 5, generator=generator, dtype=torch.float64) * (i + 1) + i, torch.zeros(4))
        for i in range(count)
    ]


def model() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(2, momentum=0.3), nn.Dropout(0.9), nn.Flatten(), nn.BatchNorm1d(50)).double()


def test_statistics_are_the_average_over_the_batches() -> None:
    norm = model().train()
    weights = copy.deepcopy(dict(norm.named_parameters()))
    norm[0].running_mean.fill_(100)
    reestimate(norm, batches())
    means = torch.stack([x.mean((0, 2, 3)) for x, _ in batches()]).mean(0)
    variances = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x, _ in batches()]).mean(0)
    torch.testing.assert_close(norm[0].running_mean, means)
    torch.testing.assert_close(norm[0].running_var, variances)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in norm.named_parameters())


def test_dropout_stays_off_and_modes_and_momentum_come_back() -> None:
    norm = model().eval()
    norm[1].train()
    reestimate(norm, batches())
    assert (norm[3].running_mean != 0).all()
    normalized = [
        (x - x.mean((0, 2, 3), keepdim=True)) / x.var((0, 2, 3), correction=0, keepdim=True).add(1e-5).sqrt()
        for x, _ in batches()
    ]
    torch.testing.assert_close(norm[3].running_mean, torch.stack([x.flatten(1).mean(0) for x in normalized]).mean(0))
    assert [module.training for module in norm] == [False, True, False, False]
    assert norm[0].momentum == 0.3


def test_no_batches_change_nothing() -> None:
    norm = model()
    norm[0].running_mean.fill_(7)
    with pytest.raises(ValueError, match="batches is empty"):
        reestimate(norm, [])
    assert (norm[0].running_mean == 7).all()
    assert norm[0].momentum == 0.3


def test_a_batch_that_fails_leaves_the_statistics() -> None:
    norm = model().eval()
    norm[0].running_mean.fill_(7)
    with pytest.raises(RuntimeError, match="second batch"):
        reestimate(norm, _failing())
    assert (norm[0].running_mean == 7).all()
    assert norm[3].num_batches_tracked == 0
    assert norm[0].momentum == 0.3
    assert not norm[0].training


def _failing() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    yield batches(1)[0]
    raise RuntimeError("second batch")


def test_model_without_normalization() -> None:
    reestimate(nn.Linear(2, 2), [])
