"""Gradients and compress() on whole models."""

import copy
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from cctorch import CompressionPlan, apply, compress, prepare
from cctorch.gradients import mean_gradients
from cctorch.graph import trace
from cctorch.layer_choice import bounds_of
from cctorch.nn.gather import unwrapped
from torch import Tensor, nn


class CallsOneLayerTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.shared = nn.Conv2d(16, 16, 3, padding=1)
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.shared(F.relu(self.shared(F.relu(self.first(x))))))
        x = F.relu(self.last(F.relu(self.middle(x))))
        return self.head(x.mean((2, 3)))


def batches(sizes: tuple[int, ...] = (4, 4, 3)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 3, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator)) for n in sizes]


def test_a_layer_that_is_called_twice_is_left_alone_and_the_rest_is_compressed() -> None:
    torch.manual_seed(0)
    model = CallsOneLayerTwice()
    data = batches()
    compression = compress(model, data, data[0][0], target=0.3)
    assert [warning for warning in compression.warnings if "'shared'" in warning]
    assert compression.plan.find("shared") is None
    assert compression.final_reduction >= 0.3
    apply(model, compression.plan)
    assert model(data[0][0]).shape == (4, 10)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(24, 6, 2, dropout=0.5, batch_first=True)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x.flatten(2).mT.unflatten(1, (8, 8)).flatten(2))
        return self.head(y[:, -1])


def test_recurrent_layers_are_differentiated_in_the_mode_that_cudnn_can() -> None:
    """In training, without their dropout: the gradient is that of evaluation."""
    torch.manual_seed(0)
    model = Recurrent()
    data, seen = batches(), []
    model.lstm.register_forward_hook(lambda m, i, o: seen.append((m.training, m.dropout)))
    found = mean_gradients(model.train(), data, ["head"])
    assert seen == [(True, 0.0)] * 3
    assert (model.lstm.training, model.lstm.dropout) == (True, 0.5)
    images, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    F.cross_entropy(model.eval()(images), labels).backward()
    torch.testing.assert_close(found["head"], model.head.weight.grad)


def test_mean_gradients_are_those_of_the_loss_over_all_images() -> None:
    torch.manual_seed(0)
    model = CallsOneLayerTwice().double()
    data = [(x.double(), y) for x, y in batches()]
    before = copy.deepcopy(model.state_dict())
    gradients = mean_gradients(model, data, ["middle", "last"])
    images, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    F.cross_entropy(model(images), labels).backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_submodule(name).weight.grad, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradients_refuse_no_images_and_nan_and_leave_the_model_as_it_was() -> None:
    model = CallsOneLayerTwice().train()
    model.last.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="empty"):
        mean_gradients(model, [], ["middle"])
    images, labels = batches()[0]
    with pytest.raises(ValueError, match="'middle' is NaN"):
        mean_gradients(model, [(images * float("nan"), labels)], ["middle"])
    assert model.training
    assert model.middle.weight.requires_grad
    assert not model.last.weight.requires_grad
    assert model.middle.weight.grad is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["last.weight", "first.bias", "norm.running_var"])
def test_values_that_are_not_finite_are_named_before_the_pass_over_the_images(name: str, bad: float) -> None:
    model = CallsOneLayerTwice()
    model.norm = nn.BatchNorm2d(3)
    with torch.no_grad():
        model.state_dict()[name].view(-1)[1] = bad
    with pytest.raises(ValueError, match=f"'{name}' holds NaN or infinite"):
        mean_gradients(model, iter(()), ["middle"])


def test_a_model_without_a_layer_to_compress_is_refused() -> None:
    images = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    with pytest.raises(ValueError, match="none of the model's 1 layers can be compressed"):
        compress(model, [(images, torch.arange(2))], images)


def test_an_already_compressed_model_is_compressed_further() -> None:
    torch.manual_seed(0)
    model = CallsOneLayerTwice()
    data = batches()
    images = torch.cat([x for x, _ in data])
    apply(model, compress(model, data, data[0][0], target=0.2).plan)
    second = compress(model, data, data[0][0], target=0.2)
    assert second.final_reduction >= 0.2
    parameters = sum(value.numel() for value in model.parameters())
    apply(model, second.plan)
    assert sum(value.numel() for value in model.parameters()) < parameters
    assert torch.isfinite(model(images)).all()


def test_an_already_compressed_model_is_compressed_no_further_than_it_can_be() -> None:
    torch.manual_seed(0)
    model = CallsOneLayerTwice()
    data = batches()
    apply(model, compress(model, data, data[0][0], target=0.3).plan)
    with pytest.raises(ValueError, match="cannot be reached"):
        compress(model, data, data[0][0], target=0.9)
    assert model(data[0][0]).shape == (4, 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_half_precision_are_summed_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = CallsOneLayerTwice().to(dtype).eval()
    data = [(images.to(dtype), labels) for images, labels in batches((2,) * 150)]
    wanted = torch.zeros(model.middle.weight.shape, dtype=torch.float64)
    for images, labels in data:
        [gradient] = torch.autograd.grad(F.cross_entropy(model(images), labels), [model.middle.weight])
        wanted += gradient.double() / len(data)
    found = mean_gradients(model, data, ["middle"])["middle"]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))
    assert compress(model, data, data[0][0], target=0.3).final_reduction >= 0.3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_taken_whatever_mode_is_on(mode: Any) -> None:
    torch.manual_seed(0)
    model, data = CallsOneLayerTwice(), batches()
    wanted = compress(model, data, data[0][0], target=0.3)
    with mode():
        found = compress(model, data, data[0][0], target=0.3)
    assert found.plan == wanted.plan


def test_what_is_frozen_and_what_is_not_stays_so() -> None:
    torch.manual_seed(0)
    model, data = CallsOneLayerTwice(), batches()
    model.first.requires_grad_(False)
    model.middle.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    plan = compress(model, data, data[0][0], target=0.3).plan
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert plan.find("middle") is not None  # frozen, and compressed all the same
    assert not any(parameter.requires_grad for parameter in apply(model, plan).middle.parameters())  # type: ignore[union-attr]


def test_a_loss_of_each_example_is_refused() -> None:
    model, data = CallsOneLayerTwice(), batches()
    with pytest.raises(ValueError, match=r"loss gives a tensor of shape \(4,\), expected the mean over the batch"):
        compress(model, data, data[0][0], loss=nn.CrossEntropyLoss(reduction="none"))


def test_bounds_are_found_by_pattern_and_the_smallest_holds() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(5)), nn.Flatten(), nn.Linear(8 * 64, 3))
    images = torch.randn(2, 8, 8, 8)
    batches = [(images, torch.arange(2))]
    found = compress(model, batches, images, target=0.4, bounds={"?": 0.9, "[12]": 0.25, "2": 0.0})
    allocated = {curve.name: curve.allocated for curve in found.curves}
    assert allocated["1"] <= 0.25
    assert allocated["2"] == 0.0
    assert max(allocated["3"], allocated["4"]) > 0.25
    with pytest.raises(ValueError, match=r"bounds = 'conv\*' names no layer"):
        compress(model, batches, images, bounds={"conv*": 0.5})
    with pytest.raises(ValueError, match=r"bounds\['1'\] = 1.5, expected a share from 0 to 1"):
        compress(model, batches, images, bounds={"1": 1.5})
    with pytest.raises(ValueError, match=r"bounds\['1'\] = '0.5', expected a share from 0 to 1"):
        compress(model, batches, images, bounds={"1": "0.5"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"exclude = 'conv\*', expected a list of patterns"):
        compress(model, batches, images, exclude="conv*")


def test_the_smallest_of_several_bounds_holds() -> None:
    graph = trace(nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(3))), torch.zeros(1, 4, 2, 2))
    for bounds in ({"1": 0.2, "*": 0.9}, {"*": 0.9, "1": 0.2}):
        assert bounds_of(graph, bounds) == {"0": 0.9, "1": 0.2, "2": 0.9}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"budget": "table"}, ValueError, "budget = 'table', expected one of 'macs', 'parameters', 'bytes', 'latency'"),
        ({"count": "finl"}, ValueError, "count = 'finl', expected one of 'final', 'nominal'"),
        ({"target": "0.5"}, TypeError, "target = '0.5', expected a number"),
        ({"gamma": None}, TypeError, "gamma = None, expected a number"),
        ({"example": (torch.zeros(1),)}, TypeError, "example is a tuple, expected the one tensor"),
    ],
)
def test_arguments_of_no_meaning_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compress(CallsOneLayerTwice(), batches(), **{"example": batches()[0][0], **arguments})


def test_a_target_out_of_reach_says_what_is_left_alone() -> None:
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(4)), nn.Flatten(), nn.Linear(128, 10))
    model[1] = nn.Conv2d(8, 8, 3, groups=2)
    images = torch.randn(4, 8, 12, 12)
    with pytest.raises(ValueError, match=r"cannot be reached.*; layer '1' is left alone: it is a grouped convolution"):
        compress(model, [(images, torch.arange(4))], images, target=0.9)


def grid(weight: Tensor) -> int:
    """The most values that a row of a weight has."""
    return max(len(row.unique()) for row in weight.detach().flatten(1))


def test_bits_are_in_the_plan_and_count_in_a_budget_of_bytes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(i, 32, 3, padding=1) for i in (3, 32, 32)), nn.Flatten(), nn.Linear(32 * 64, 10))
    data = [(torch.randn(4, 3, 8, 8), torch.arange(4))]
    bits = {"1": 8, "?": 4, "4": 2}
    found = compress(model, data, data[0][0], target=0.3, budget="bytes", bits=bits)
    stored = {"0": 4, "1": 4, "2": 4, "4": 2}
    dense = sum(model.get_submodule(name).get_parameter("weight").numel() * width / 8 for name, width in stored.items())
    for plan, target in ((found.plan, 0.3), (found.at(0.2).plan, 0.2)):
        assert {layer.name: layer.bits for layer in plan.layers if layer.bits} == stored
        smaller = prepare(apply(copy.deepcopy(model), plan), plan)
        left = 0.0
        for name, width in stored.items():
            layer: Any = unwrapped(smaller, name)
            for factor in [layer.weight] if hasattr(layer, "weight") else [layer.first, layer.second]:
                left += factor.numel() * width / 8
                assert grid(factor) <= 2**width
        assert target <= 1 - left / dense < target + 0.02
    assert CompressionPlan.from_json(found.plan.to_json()) == found.plan


def test_bits_go_with_any_budget_and_are_those_of_the_type_without() -> None:
    torch.manual_seed(0)
    model, data = CallsOneLayerTwice(), batches()
    plain = compress(model, data, data[0][0], target=0.2)
    found = compress(model, data, data[0][0], target=0.2, bits={"*": 5})
    assert all(layer.bits is None for layer in plain.plan.layers)
    quantized = {layer.name for layer in found.plan.layers if layer.bits == 5}
    graph = trace(model, data[0][0])
    assert quantized == {spec.name for spec in graph.specs} - graph.left_alone
    alone = next(iter(graph.left_alone))
    assert [warning for warning in found.warnings if warning.startswith(f"bits: '{alone}' keep theirs")]
    assert {spec.bits for spec in graph.specs} == {32}
    assert {spec.bits for spec in trace(model.bfloat16(), data[0][0].bfloat16()).specs} == {16}


@pytest.mark.parametrize("bits", [{"*": 1}, {"*": 17}, {"*": True}, {"*": 4.0}, {"nothing": 4}])
def test_bits_that_cannot_be_are_named(bits: dict[str, int]) -> None:
    model, data = CallsOneLayerTwice(), batches()
    with pytest.raises(ValueError, match="compress: bits"):
        compress(model, data, data[0][0], target=0.2, bits=bits)


@pytest.mark.parametrize("count", ["final", "nominal"])
@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("budget", ["macs", "parameters", "bytes"])
def test_lower_targets_of_one_search_have_the_plans_of_searches_of_their_own(
    count: Literal["final", "nominal"], multiple: int, budget: Literal["macs", "parameters", "bytes"]
) -> None:
    torch.manual_seed(0)
    model, data = CallsOneLayerTwice(), batches()
    highest = compress(model, data, data[0][0], target=0.3, count=count, multiple=multiple, budget=budget)
    # Not in order: one plan must leave nothing behind that another sees.
    for target in (0.2, 0.3, 0.05, 0.25):
        own = compress(model, data, data[0][0], target=target, count=count, multiple=multiple, budget=budget)
        found = highest.at(target)
        assert found.plan == own.plan
        assert (found.final_macs, found.nominal_macs, found.warnings) == (
            own.final_macs,
            own.nominal_macs,
            own.warnings,
        )
        assert found.gradients is highest.gradients
        assert found.at(target).plan == own.plan
    with pytest.raises(ValueError, match=r"at most the 0\.3"):
        highest.at(0.4)
    highest.lower = None
    with pytest.raises(ValueError, match=r"target = 0\.2, but no search is kept"):
        highest.at(0.2)
