import math
from typing import Any

import pytest
import torch
from cases import LAYOUTS, TYPES
from cctorch.ops import channel_gate, hard_concrete, hard_concrete_open, sigmoid_gate
from torch import Tensor

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_sigmoid_gate(layout: str, temperature: float) -> None:
    x = LAYOUTS[layout](torch.randn(3, 4, 5, 6, dtype=torch.float64)).requires_grad_()
    logit = torch.randn(4, dtype=torch.float64, requires_grad=True)
    y = sigmoid_gate(x, logit, temperature)
    expected = x / (1 + torch.exp(-logit / temperature)).view(1, 4, 1, 1)
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-14)
    assert y.stride() == torch.empty_like(x).stride()
    grads, right = (torch.autograd.grad(out.square().sum(), (x, logit)) for out in (y, expected))
    for ours, theirs in zip(grads, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_low_temperature_is_a_step_and_derivatives_are_those_of_differences() -> None:
    gates = sigmoid_gate(torch.ones(1, 3), torch.tensor([-1.0, 0.0, 1.0]), 1e-3)
    assert gates.tolist() == [[0, 0.5, 1]]
    x, logit = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, g: sigmoid_gate(x, g, 0.5), (x.requires_grad_(), logit.requires_grad_()))
    assert torch.autograd.gradgradcheck(lambda x, g: sigmoid_gate(x, g, 0.5), (x, logit))


def by_hand(log_alpha: float, u: float) -> float:
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + log_alpha) / BETA))
    return min(1.0, max(0.0, s * (ZETA - GAMMA) + GAMMA))


def test_hard_concrete_is_the_papers_formula_of_the_generators_draws() -> None:
    log_alpha = 3 * torch.randn(200, dtype=torch.float64)
    z = hard_concrete(log_alpha, generator=seeded(5))
    u = torch.rand(200, dtype=torch.float64, generator=seeded(5))
    expected = [by_hand(a, b) for a, b in zip(log_alpha.tolist(), u.tolist(), strict=True)]
    torch.testing.assert_close(z, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert (z == 0).any()
    assert (z == 1).any()
    torch.manual_seed(5)
    assert torch.equal(hard_concrete(log_alpha), z)
    assert not torch.equal(hard_concrete(log_alpha), z)


def test_without_training_gates_are_certain() -> None:
    log_alpha = torch.linspace(-6, 6, 50, dtype=torch.float64)
    z = hard_concrete(log_alpha, training=False)
    expected = [min(1.0, max(0.0, 1.2 / (1 + math.exp(-a)) - 0.1)) for a in log_alpha.tolist()]
    torch.testing.assert_close(z, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("beta", "gamma", "zeta"), [(BETA, GAMMA, ZETA), (0.5, -0.3, 1.05)])
def test_open_is_the_share_of_gates_that_are_not_zero(beta: float, gamma: float, zeta: float) -> None:
    count = 200_000
    for log_alpha in (-2.0, 0.0, 1.5):
        z = hard_concrete(
            torch.full((count,), log_alpha, dtype=torch.float64), True, beta, gamma, zeta, generator=seeded(0)
        )
        p = hard_concrete_open(torch.tensor([log_alpha], dtype=torch.float64), beta, gamma, zeta).item()
        # Five standard deviations of a share among `count` draws
        assert abs((z > 0).double().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / count)


def test_derivatives_of_gates_and_penalty() -> None:
    log_alpha = torch.randn(40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: hard_concrete(a, generator=seeded(1)), (log_alpha,))
    assert torch.autograd.gradcheck(lambda a: hard_concrete(a, training=False), (log_alpha,))
    assert torch.autograd.gradcheck(hard_concrete_open, (log_alpha,))


def test_extreme_logits_have_finite_gradients() -> None:
    log_alpha = torch.tensor([-1e4, -100.0, 100.0, 1e4], requires_grad=True)
    for training in (False, True):
        z = hard_concrete(log_alpha, training)
        assert z.tolist() == [0, 0, 1, 1]
        (grad,) = torch.autograd.grad(z.sum() + hard_concrete_open(log_alpha).sum(), log_alpha)
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", TYPES)
def test_types_and_shapes(dtype: torch.dtype) -> None:
    log_alpha = torch.randn(3, 0, 2).to(dtype)
    assert hard_concrete(log_alpha).shape == hard_concrete_open(log_alpha).shape == (3, 0, 2)
    for function in (hard_concrete, hard_concrete_open, lambda a: hard_concrete(a, False)):
        z = function(torch.randn(64).to(dtype))
        assert z.dtype == dtype
        assert ((z >= 0) & (z <= 1)).all()
    gate = sigmoid_gate(torch.ones(2, 3).to(dtype), torch.zeros(3).to(dtype))
    assert gate.tolist() == [[0.5] * 3] * 2


@pytest.mark.parametrize("dtype", TYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    ops = torch.ops.cctorch
    x, logit = torch.randn(2, 3, 4).to(dtype).requires_grad_(), torch.randn(3).to(dtype).requires_grad_()
    torch.library.opcheck(ops.sigmoid_gate.default, (x, logit, 0.5))
    torch.library.opcheck(ops.hard_concrete.default, (logit, False))
    torch.library.opcheck(ops.hard_concrete_open.default, (logit,))
    # Draws differ from call to call, so results cannot be compared.
    torch.library.opcheck(ops.hard_concrete.default, (logit, True), test_utils=("test_schema", "test_faketensor"))


def test_compile_and_export() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, log_alpha: Tensor) -> Tensor:
            return (
                sigmoid_gate(channel_gate(x, hard_concrete(log_alpha)), log_alpha) * hard_concrete_open(log_alpha).sum()
            )

    x, log_alpha = torch.randn(4, 3, 5), torch.randn(3, requires_grad=True)
    torch.manual_seed(0)
    expected = Module()(x, log_alpha)
    for module in (
        torch.compile(Module(), fullgraph=True, backend="aot_eager"),
        torch.export.export(Module(), (x, log_alpha)).module(),
    ):
        torch.manual_seed(0)
        y = module(x, log_alpha)
        torch.testing.assert_close(y, expected)
        (grad,) = torch.autograd.grad(y.sum(), log_alpha)
        assert grad.isfinite().all()


@pytest.mark.parametrize("function", [channel_gate, sigmoid_gate])
def test_vmap_equals_a_loop(function: Any) -> None:
    x, gates = torch.randn(3, 4, 5, 6, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    for dims in ((0, 0), (0, None), (None, 0), (2, 1)):
        xs = x if dims[0] == 0 else x[0] if dims[0] is None else x.movedim(0, 2)
        gs = gates if dims[1] == 0 else gates[0] if dims[1] is None else gates.movedim(0, 1)
        samples = [(x[i if dims[0] is not None else 0], gates[i if dims[1] is not None else 0]) for i in range(3)]
        expected = torch.stack([function(a, b) for a, b in samples])
        assert torch.equal(torch.vmap(function, dims)(xs, gs), expected)


@pytest.mark.parametrize("batched_x", [True, False])
def test_vmap_has_the_gradients_of_a_loop(batched_x: bool) -> None:
    x = torch.randn(*([3] if batched_x else []), 4, 5, 6, dtype=torch.float64, requires_grad=True)
    gates = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    y = torch.vmap(channel_gate, (0 if batched_x else None, 0))(x, gates)
    expected = x * gates.view(3, 1, 5, 1)
    grads, right = (torch.autograd.grad(out.square().sum(), (x, gates)) for out in (y, expected))
    for ours, theirs in zip(grads, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_many_gradients_at_once() -> None:
    x = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(5, dtype=torch.float64, requires_grad=True)
    many = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    grads = torch.autograd.grad(channel_gate(x, gate), (x, gate), many, is_grads_batched=True)
    torch.testing.assert_close(grads[0], many * gate.view(5, 1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads[1], (many * x).sum((1, 3)), rtol=1e-12, atol=1e-12)


def test_random_gates_under_vmap() -> None:
    log_alpha = torch.zeros(3, 50)
    z = torch.vmap(hard_concrete, randomness="different")(log_alpha)
    assert not torch.equal(z[0], z[1])
    certain = torch.vmap(lambda a: hard_concrete(a, False))(log_alpha)
    assert torch.equal(certain, hard_concrete(log_alpha, False))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sigmoid_gate(torch.ones(2, 3), torch.ones(3), 0.0), "temperature must be positive and finite, got 0"),
        (lambda: sigmoid_gate(torch.ones(2, 3), torch.ones(2)), "one element for each of the 3 channels"),
        (lambda: sigmoid_gate(torch.ones(2, 3), torch.ones(3).int()), "logit must be float32"),
        (lambda: hard_concrete(torch.ones(3).int()), "log_alpha must be float32"),
        (lambda: hard_concrete(torch.ones(3), beta=-1.0), "hard_concrete: beta must be positive and finite, got -1"),
        (lambda: hard_concrete(torch.ones(3), gamma=0.1), "gamma < 0 and zeta > 1"),
        (
            lambda: hard_concrete_open(torch.ones(3), zeta=math.nan),
            "hard_concrete_open: expected gamma < 0 and zeta > 1",
        ),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
