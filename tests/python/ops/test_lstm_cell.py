"""The cell of ``low_rank_lstm``: one pass over the gates, and one for their gradients."""

from typing import Any

import cctorch  # noqa: F401 (the operators)
import pytest
import torch
from cases import TYPES, with_threads
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

cell, backward = torch.ops.cctorch.lstm_cell, torch.ops.cctorch.lstm_cell_backward


def inputs(batch: int, hidden: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gates = 3 * torch.randn(batch, 4 * hidden, generator=generator, dtype=torch.float64)
    return gates.to(dtype), torch.randn(batch, hidden, generator=generator, dtype=torch.float64).to(dtype)


def by_pytorch(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """``nn.LSTMCell`` in float64, whose input is the gates."""
    hidden = c.shape[1]
    module = nn.LSTMCell(4 * hidden, hidden, bias=False).double()
    module.weight_ih.data = torch.eye(4 * hidden, dtype=torch.float64)
    h, c = module(gates.double(), (torch.zeros_like(c, dtype=torch.float64), c.double()))
    return h, c


def gradients(function: Any, gates: Tensor, c: Tensor, grads: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    leaves = gates.detach().requires_grad_(), c.detach().requires_grad_()
    return torch.autograd.grad(function(*leaves), leaves, grads)


def assert_rounded(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Rounded once to the type, after at most 16 roundings of the arithmetic's, of terms no larger than 4."""
    assert ours.dtype == dtype
    arithmetic = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    bound = torch.finfo(dtype).eps * exact.abs() + 64 * arithmetic + torch.finfo(dtype).smallest_normal
    assert ((ours.double() - exact).abs() <= bound).all()


SHAPES = [(1, 1), (3, 7), (2, 64), (5, 513), (40, 100), (1, 1300), (0, 4), (3, 0)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_it_is_pytorchs_cell_in_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gates, c = inputs(*shape, dtype)
    grads = torch.randn_like(c).clamp(-2, 2), torch.randn_like(c).clamp(-2, 2)
    ours = (*cell(gates, c), *gradients(cell, gates, c, grads))
    # PyTorch's own takes no cell without features.
    if c.numel() == 0:
        assert [y.shape for y in ours] == [c.shape, c.shape, gates.shape, c.shape]
        return
    wide = gates.double(), c.double()
    exact = (*by_pytorch(*wide), *gradients(by_pytorch, *wide, (grads[0].double(), grads[1].double())))
    for found, wanted in zip(ours, exact, strict=True):
        assert_rounded(found, wanted, dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_gates_far_from_zero_and_near_it(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    values = [0.0, 1e-6, -1e-6, 1e-3, 0.3, -0.35, 5.0, -20.0, 86.0, -90.0, 800.0, -800.0, largest, -largest, torch.inf]
    gate = torch.tensor([*values, -torch.inf]).to(dtype)
    for which in range(4):
        gates = torch.zeros(len(gate), 4, dtype=dtype)
        gates[:, which] = gate
        c = torch.full((len(gate), 1), 0.5, dtype=dtype)
        grads = torch.ones_like(c), torch.ones_like(c)
        ours = (*cell(gates, c), *gradients(cell, gates, c, grads))
        wide = gates.double(), c.double()
        exact = (*by_pytorch_elementwise(*wide), *gradients(by_pytorch_elementwise, *wide, (grads[0].double(),) * 2))
        for found, wanted in zip(ours, exact, strict=True):
            assert_rounded(found, wanted, dtype)


def by_pytorch_elementwise(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """What takes infinities: in a product with the identity they would meet zeros."""
    i, f, g, o = gates.chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


@pytest.mark.parametrize("dtype", TYPES)
def test_nan_passes_through(dtype: torch.dtype) -> None:
    gates, c = inputs(1, 40, dtype)
    gates[0, 2 * 40 + 7] = torch.nan
    h, after = cell(gates, c)
    wanted = torch.arange(40) == 7
    assert torch.equal(h[0].isnan(), wanted)
    assert torch.equal(after[0].isnan(), wanted)


def test_small_gates_lose_no_digits() -> None:
    """tanh(x) is x there, not the difference of two numbers near 1."""
    g = torch.logspace(-30, -3, 100)
    gates = torch.cat([torch.full_like(g, 100.0), g * 0, g, g * 0]).unsqueeze(0)
    _, c = cell(gates, torch.zeros(1, 100))
    torch.testing.assert_close(c[0].double(), g.double().tanh(), rtol=1e-6, atol=0)


def test_layouts() -> None:
    gates, c = inputs(6, 20)
    expected = cell(gates, c)
    strided = torch.stack([gates, gates], -1)[..., 0], torch.stack([c, c], -1)[..., 0]
    transposed = gates.t().contiguous().t(), c.t().contiguous().t()
    offset = torch.cat([gates[:1], gates])[1:], torch.cat([c[:1], c])[1:]
    grads = torch.randn_like(c), torch.randn_like(c)
    wanted = gradients(cell, gates, c, grads)
    for given in (strided, transposed, offset):
        for found, same in zip(cell(*given), expected, strict=True):
            assert found.is_contiguous()
            assert torch.equal(found, same)
        for other in (grads, tuple(g.t().contiguous().t() for g in grads)):
            assert all(map(torch.equal, gradients(cell, *given, other), wanted))


def test_derivatives_of_first_and_second_order() -> None:
    gates, c = (t.requires_grad_() for t in inputs(3, 5))
    assert torch.autograd.gradcheck(cell, (gates, c), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(cell, (gates, c), check_batched_grad=True)
    # One of the two results alone
    for which in (0, 1):
        assert torch.autograd.gradcheck(lambda *given, i=which: cell(*given)[i], (gates, c))


def test_gradients_that_are_differentiated_further_are_the_same() -> None:
    gates, c = (t.requires_grad_() for t in inputs(3, 5))
    outputs, grads = cell(gates, c), (torch.randn_like(c), torch.randn_like(c))
    further = torch.autograd.grad(outputs, (gates, c), grads, create_graph=True)
    for found, wanted in zip(further, torch.autograd.grad(outputs, (gates, c), grads), strict=True):
        assert found.grad_fn is not None
        torch.testing.assert_close(found, wanted)


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_forward_and_backward_are_an_operator_each() -> None:
    gates, c = (t.requires_grad_() for t in inputs(3, 5))
    with Operators() as forward:
        h, after = cell(gates, c)
    assert forward.names == ["cctorch::lstm_cell"]
    grads = torch.ones_like(h), torch.ones_like(after)
    with Operators() as derived:
        torch.autograd.grad((h, after), (gates, c), grads)
    assert [name for name in derived.names if "detach" not in name] == ["cctorch::lstm_cell_backward"]


def test_torch_func_and_vmap() -> None:
    gates, c = inputs(3, 5)

    def total(gates: Tensor, c: Tensor) -> Tensor:
        return sum(y.square().sum() for y in cell(gates, c))  # type: ignore[return-value]

    leaves = gates.clone().requires_grad_(), c.clone().requires_grad_()
    wanted = torch.autograd.grad(total(*leaves), leaves)
    for found, same in zip(grad(total, (0, 1))(gates, c), wanted, strict=True):
        torch.testing.assert_close(found, same)
    tangents = torch.randn_like(gates), torch.randn_like(c)
    slope = sum((g * t).sum() for g, t in zip(wanted, tangents, strict=True))
    torch.testing.assert_close(jvp(total, (gates, c), tangents)[1], slope)
    many = torch.stack([gates, 2 * gates]), torch.stack([c, -c])
    for found, same in zip(vmap(cell)(*many), zip(*map(cell, *many), strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(same))
    ours = vmap(backward)(many[1], many[1], *many)
    for found, same in zip(ours, zip(*map(backward, many[1], many[1], *many), strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(same))
    both = zip(*(grad(total, (0, 1))(*one) for one in zip(*many, strict=True)), strict=True)
    for found, same in zip(vmap(grad(total, (0, 1)))(*many), both, strict=True):
        torch.testing.assert_close(found, torch.stack(same))


def test_results_do_not_depend_on_threads() -> None:
    for shape in ((64, 200), (3, 5000), (5000, 3)):
        gates, c = inputs(*shape, torch.float32)
        grads = torch.randn_like(c), torch.randn_like(c)
        one, two = (
            with_threads(n, lambda: (*cell(gates, c), *gradients(cell, gates, c, grads)))  # noqa: B023
            for n in (1, 2)
        )
        assert all(map(torch.equal, one, two))


@pytest.mark.parametrize("dtype", TYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    gates, c = (t.requires_grad_() for t in inputs(3, 5, dtype))
    torch.library.opcheck(cell.default, (gates, c))
    torch.library.opcheck(backward.default, (torch.ones_like(c), torch.ones_like(c), gates, c))


def test_compiles_with_dynamic_shapes() -> None:
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (3, 5):
        gates, c = inputs(batch, 4)
        grads = torch.randn_like(c), torch.randn_like(c)
        assert all(map(torch.equal, gradients(compiled, gates, c, grads), gradients(cell, gates, c, grads)))


@pytest.mark.parametrize(
    ("gates", "c", "message"),
    [
        (torch.ones(3, 16), torch.ones(2, 4), "gates and c must be of one batch"),
        (torch.ones(3, 12), torch.ones(3, 4), "gates must have four times the features of c, 4, got shape"),
        (torch.ones(16), torch.ones(3, 4), "gates must be batch x 4 hidden and c batch x hidden"),
        (torch.ones(3, 16), torch.ones(3, 4).double(), "c must have the type of gates"),
        (torch.ones(3, 16).int(), torch.ones(3, 4).int(), "gates must be float32, float64, float16 or bfloat16"),
        (torch.ones(3, 16), torch.ones(3, 4, device="meta"), "gates is on cpu but c is on meta"),
    ],
)
def test_arguments_that_do_not_fit_are_named(gates: Tensor, c: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        cell(gates, c)


def test_gradients_that_do_not_fit_are_named() -> None:
    gates, c = inputs(3, 4)
    for grads, name in (((gates, c), "grad_h"), ((c, c[:2]), "grad_c"), ((c, c.float()), "grad_c")):
        with pytest.raises(RuntimeError, match=f"lstm_cell_backward: {name} must have the"):
            backward(*grads, gates, c)
