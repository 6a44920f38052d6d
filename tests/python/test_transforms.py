"""torch.func over compressed models, and compression of models that are compiled or have yet to begin."""

import copy
from collections.abc import Callable

import cctorch
import pytest
import torch
import torch.nn.functional as F
from cctorch import ops
from cctorch.apply import apply
from cctorch.graph import trace
from cctorch.nn import BatchNorm2d, FakeQuant, GatherChannels
from networks import PaddedResNet, random_plan, randomized
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap


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


X, ROWS, ONE = torch.randn(4, 6).double(), torch.ones(4).double(), torch.ones(1).double()
IN_CPP: dict[str, Callable[[Tensor], Tensor]] = {
    "apply_mask": lambda x: ops.apply_mask(x, torch.ones(4, 6, dtype=torch.bool)),
    "batch_norm": lambda x: ops.batch_norm(x.view(2, 3, 2, 2), ROWS[:3], ROWS[:3], 1e-5)[0],
    "binary_quant of a list": lambda x: ops.binary_quant([x])[0],
    "channel_gate": lambda x: ops.channel_gate(x, torch.ones(6).double()),
    "fake_quant": lambda x: ops.fake_quant(x, ONE, -8, 7),
    "fake_quant of a list": lambda x: ops.fake_quant([x], [ONE], -8, 7)[0],
    "fake_quant_weights": lambda x: ops.fake_quant_weights([x], 4)[0][0],
    "gather_channels": lambda x: ops.gather_channels(x, torch.tensor([0, 2])),
    "sigmoid_gate": lambda x: ops.sigmoid_gate(x.view(1, 4, 6), ROWS),
    "ternary_quant": lambda x: ops.ternary_quant(x),
}
OF_PYTORCHS: dict[str, Callable[[Tensor], Tensor]] = {
    "low_rank_linear": lambda x: ops.low_rank_linear(x, torch.ones(2, 6).double(), torch.ones(3, 2).double()),
    "low_rank_conv2d": lambda x: ops.low_rank_conv2d(
        x.view(1, 2, 3, 4), torch.ones(2, 2, 1, 3).double(), torch.ones(5, 2, 3, 1).double()
    ),
    "tucker2_conv2d": lambda x: ops.tucker2_conv2d(
        x.view(1, 2, 3, 4),
        torch.ones(2, 2, 1, 1).double(),
        torch.ones(2, 2, 3, 3).double(),
        torch.ones(4, 2, 1, 1).double(),
    ),
    "low_rank_lstm": lambda x: ops.low_rank_lstm(
        x.view(2, 2, 6), X[:2, :3], X[2:, :3], [X[:2], torch.ones(12, 2).double()], [torch.ones(12, 3).double()]
    )[0],
    "hard_concrete": lambda x: ops.hard_concrete(x, training=False),
    "hard_concrete_open": ops.hard_concrete_open,
}


@pytest.mark.parametrize("name", IN_CPP)
def test_what_torch_func_does_not_differentiate_says_what_to_do(name: str) -> None:
    op = IN_CPP[name]
    for transform in (grad(lambda x: op(x).sum()), lambda x: vjp(op, x), lambda x: jvp(op, (x,), (x,))):
        with pytest.raises(RuntimeError, match=r"use Tensor.backward or torch.autograd.grad, of torch.vmap\(...\) too"):
            transform(X)
    leaf, batch = X.clone().requires_grad_(), torch.stack([X, 2 * X]).requires_grad_()
    torch.autograd.grad(op(leaf).sum(), leaf)
    if name in ("apply_mask", "channel_gate", "fake_quant", "gather_channels"):
        found = torch.autograd.grad(vmap(op)(batch).sum(), batch)[0]
        torch.testing.assert_close(found[0], torch.autograd.grad(op(leaf).sum(), leaf)[0])


@pytest.mark.parametrize("name", OF_PYTORCHS)
def test_what_is_made_of_pytorchs_operators_is_differentiated(name: str) -> None:
    leaf = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(OF_PYTORCHS[name](leaf).sum(), leaf)
    torch.testing.assert_close(grad(lambda x: OF_PYTORCHS[name](x).sum())(X), expected)
