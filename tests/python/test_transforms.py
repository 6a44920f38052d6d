"""torch.func over compressed models."""

import pytest
import torch
import torch.nn.functional as F
from cctorch.apply import apply
from cctorch.graph import trace
from cctorch.nn import BatchNorm2d, GatherChannels
from networks import PaddedResNet, random_plan, randomized
from torch import Tensor
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
