"""torch.func over compressed models, and compression of models that are compiled or have yet to begin."""

import copy

import cctorch
import pytest
import torch
import torch.nn.functional as F
from cctorch.apply import apply
from cctorch.graph import trace
from cctorch.nn import BatchNorm2d, FakeQuant, GatherChannels
from networks import PaddedResNet, random_plan, randomized
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_each_example(format: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64).contiguous(memory_format=format)
    model = randomized(PaddedResNet())
    apply(model, random_plan(trace(model, x), 0))
    model = model.to(memory_format=format).eval()
    assert {BatchNorm2d, GatherChannels} <= {type(module) for module in model.modules()}
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    targets = torch.tensor([0, 1, 2])

    def loss(parameters: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
        batch = image.unsqueeze(0).contiguous(memory_format=format)
        return F.cross_entropy(functional_call(model, parameters, (batch,)), target.unsqueeze(0))

    found = vmap(grad(loss), (None, 0, 0))(parameters, x, targets)
    for i in range(3):
        alone = grad(loss)(parameters, x[i], targets[i])
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), targets[i : i + 1]).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(alone[name], parameter.grad)
            torch.testing.assert_close(found[name][i], parameter.grad)


def test_a_compiled_model_is_traced_and_rebuilt() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model = randomized(PaddedResNet())
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    graph = trace(compiled, x)
    assert [spec.name for spec in graph.specs] == [f"_orig_mod.{spec.name}" for spec in trace(plain, x).specs]
    assert not graph.warnings
    apply(compiled, random_plan(graph, 0))
    apply(plain, random_plan(trace(plain, x), 0))
    torch.testing.assert_close(compiled.eval()(x), plain.eval()(x))


def test_a_scale_does_not_start_from_the_example_that_is_traced() -> None:
    x, quant = torch.randn(4, 3, 8, 8), FakeQuant(4, signed=False)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), quant, nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    with pytest.raises(ValueError, match="run the model on a batch of data first"):
        cctorch.compress(model, [(x, torch.arange(4))], torch.zeros(1, 3, 8, 8), target=0.1)
    assert not quant.initialized
    assert quant.log_scale.item() == 0
    model(x)
    cctorch.compress(model, [(x, torch.arange(4))], torch.zeros(1, 3, 8, 8), target=0.1)
