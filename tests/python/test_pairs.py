"""Loaders that give something else than (inputs, targets)."""

import re
from collections import UserDict
from collections.abc import Callable, Iterable
from typing import Any

import cctorch
import pytest
import torch
from cctorch import batch_norm, measure
from torch import nn

IMAGES, LABELS = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 2))


def repair(model: nn.Module, batches: Iterable[Any]) -> None:
    plan = cctorch.CompressionPlan(layers=[cctorch.LayerPlan("2", "conv2d", 8, 8, rank=2)])
    compressed = network()
    cctorch.apply(compressed, plan)
    cctorch.repair(compressed, model, plan, batches)


FUNCTIONS: dict[str, Callable[[nn.Module, Iterable[Any]], object]] = {
    "compress": lambda model, batches: cctorch.compress(model, batches, IMAGES, target=0.3),
    "repair": repair,
    "reestimate": batch_norm.reestimate,
    "accuracy": measure.accuracy,
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"x": IMAGES, "y": LABELS}, "a dict of 'x', 'y', expected .* ((batch['x'], batch['y']) for batch in loader)"),
        (UserDict(a=1, b=2, c=3), "a UserDict of 'a', 'b', 'c', expected .* ((batch[...], batch[...]) for batch in"),
        ((IMAGES, LABELS, 1), "a tuple of 3 (Tensor, Tensor, int), expected .* for inputs, targets, *_ in loader"),
        ([IMAGES], "a list of 1 (Tensor), expected"),
        (({"x": IMAGES}, LABELS), "a tuple of 2 (dict, Tensor), expected"),
        (IMAGES, "a Tensor, expected .* pass [(inputs, targets)]"),  # two images: they could be unpacked
    ],
)
def test_names_what_it_is_and_the_way_out(function: str, batch: object, found: str) -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pattern = re.escape(f"{function}: batches gives {found}").replace(r"\.\*", ".*")
    with pytest.raises(TypeError, match=pattern):
        FUNCTIONS[function](model, [batch])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_loader_of_pairs_gives_lists(function: str) -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES, LABELS), batch_size=2)
    assert isinstance(next(iter(loader)), list)
    FUNCTIONS[function](network(), loader)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_way_out_works(function: str) -> None:
    loader = torch.utils.data.DataLoader([(x, y, "extra") for x, y in zip(IMAGES, LABELS, strict=True)], batch_size=2)
    FUNCTIONS[function](network(), ((inputs, targets) for inputs, targets, *_ in loader))
    named = [{"pixels": IMAGES, "labels": LABELS}]
    FUNCTIONS[function](network(), ((batch["pixels"], batch["labels"]) for batch in named))
