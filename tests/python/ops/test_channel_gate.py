import pytest
import torch
from cases import LAYOUTS, TYPES, with_threads
from cctorch.ops import channel_gate
from torch import Tensor


def reference(x: Tensor, gate: Tensor) -> Tensor:
    return x * gate.view(-1, *[1] * (x.dim() - 2))


def gradients(x: Tensor, gate: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    x, gate = x.detach().requires_grad_(), gate.detach().requires_grad_()
    y = channel_gate(x, gate)
    return (y.detach(), *torch.autograd.grad(y, (x, gate), grad))


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, gate, grad = (torch.randn(s, generator=generator) for s in (shape, shape[1:2], shape))
    return x.to(dtype), gate.to(dtype), grad.to(dtype)


SHAPES = [(3, 5), (2000, 3), (2, 5, 7, 7), (2, 3, 30, 30), (1, 1, 1, 1), (0, 3, 2), (2, 700), (2, 3, 4, 5, 6)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_agrees_with_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, gate, grad = inputs(shape, dtype)
    y, grad_x, grad_gate = gradients(x, gate, grad)
    xd, gd, gradd = x.double(), gate.double(), grad.double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y, reference(xd, gd).to(dtype), rtol=eps, atol=0)
    torch.testing.assert_close(grad_x, reference(gradd, gd).to(dtype), rtol=eps, atol=0)
    other = [d for d in range(x.dim()) if d != 1]
    exact, magnitude = ((gradd * xd).sum(other), (gradd * xd).abs().sum(other))
    # One rounding to the type of the gate, over sums in float32 or better
    bound = (1e-14 if dtype == torch.float64 else 1e-6) * magnitude
    assert ((grad_gate.double() - exact).abs() <= bound + eps * exact.abs()).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TYPES)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    x, gate, grad = inputs((6, 5, 4, 70), dtype)
    x = LAYOUTS[layout](x)
    results = gradients(x, gate, grad)
    expected = gradients(x.contiguous(), gate, grad)
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[1], expected[1])
    torch.testing.assert_close(results[2], expected[2], rtol=max(1e-5, torch.finfo(dtype).eps), atol=1e-4)
    assert results[0].stride() == torch.empty_like(x).stride()


def test_first_and_second_derivatives() -> None:
    for layout in ("contiguous", "channels_last", "strided"):
        x = LAYOUTS[layout](torch.randn(2, 3, 2, 2, dtype=torch.float64)).requires_grad_()
        gate = torch.randn(3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(channel_gate, (x, gate))
        assert torch.autograd.gradgradcheck(channel_gate, (x, gate))


def test_gate_gradient_at_one_is_the_taylor_importance() -> None:
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    weight = torch.randn(3, dtype=torch.float32)
    loss = (channel_gate(x, torch.ones(3, requires_grad=True)).tanh() * weight.view(1, 3, 1, 1)).sum()
    (grad_x,) = torch.autograd.grad(loss, x)
    gate = torch.ones(3, requires_grad=True)
    (importance,) = torch.autograd.grad((channel_gate(x, gate).tanh() * weight.view(1, 3, 1, 1)).sum(), gate)
    torch.testing.assert_close(importance, (grad_x * x).sum((0, 2, 3)), rtol=1e-5, atol=1e-5)


def test_half_sums_do_not_stop_growing() -> None:
    x = torch.ones(8, 2, 64, 64, dtype=torch.float16)
    gate = torch.ones(2, requires_grad=True)
    channel_gate(x, gate).sum(dtype=torch.float32).backward()
    assert gate.grad is not None
    assert gate.grad.tolist() == [8 * 64 * 64] * 2


def test_results_do_not_depend_on_threads() -> None:
    for shape in ((30000, 3), (64, 9, 130)):
        arguments = inputs(shape)
        one, two = (with_threads(n, lambda: gradients(*arguments)) for n in (1, 2))  # noqa: B023
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("dtype", TYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    x, gate, grad = (t.requires_grad_() for t in inputs((4, 3, 5, 5), dtype))
    torch.library.opcheck(torch.ops.cctorch.channel_gate.default, (x, gate))
    torch.library.opcheck(torch.ops.cctorch.channel_gate_backward.default, (grad, x, gate))


def test_compile_and_export_with_dynamic_shapes() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return channel_gate(x, gate)

    compiled = torch.compile(channel_gate, fullgraph=True, backend="aot_eager", dynamic=True)
    x, gate, _ = inputs((4, 3, 5))
    program = torch.export.export(Module(), (x, gate), dynamic_shapes=({0: torch.export.Dim("batch")}, None))
    for batch in (4, 6):
        x, gate, grad = inputs((batch, 3, 5))
        assert torch.equal(program.module()(x, gate), channel_gate(x, gate))
        x.requires_grad_()
        gate.requires_grad_()
        grads = torch.autograd.grad(compiled(x, gate), (x, gate), grad)
        for ours, theirs in zip(grads, gradients(x, gate, grad)[1:], strict=True):
            assert torch.equal(ours, theirs)


def test_autocast_with_a_float32_gate() -> None:
    conv, gate = torch.nn.Conv2d(3, 4, 3), torch.ones(4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = channel_gate(conv(torch.randn(2, 3, 8, 8)), gate)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert gate.grad is not None
    assert gate.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("x", "gate", "message"),
    [
        (torch.ones(2, 3).int(), torch.ones(3), "x must be float32"),
        (torch.ones(2, 3), torch.ones(3).half(), "gate must have the type of x, Float, got Half"),
        (torch.ones(2, 3).half(), torch.ones(3).double(), "Half, or be float32, got Double"),
        (torch.ones(3), torch.ones(3), "x must have at least two dimensions"),
        (torch.ones(2, 3), torch.ones(2), "one element for each of the 3 channels"),
        (torch.ones(2, 3), torch.ones(3, 1), "gate must be one-dimensional"),
        (torch.ones(2, 3, device="meta"), torch.ones(3), "x is on meta but gate is on cpu"),
    ],
)
def test_bad_arguments(x: Tensor, gate: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        channel_gate(x, gate)
