from collections.abc import Callable
from typing import Any

import pytest
import torch
from cctorch.ops import low_rank_lstm
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

INPUTS, HIDDEN, RANK, BATCH, STEPS = 5, 4, 2, 3, 6


def factors(rows: int, columns: int, rank: int | None, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = [(rows, columns)] if rank is None else [(rank, columns), (rows, rank)]
    return [torch.randn(shape, dtype=dtype).mul_(0.7).requires_grad_() for shape in shapes]


def product(weight: list[Tensor]) -> Tensor:
    return weight[0] if len(weight) == 1 else weight[1] @ weight[0]


def arguments(
    ih: int | None = RANK, hh: int | None = RANK, hr: int | None = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """`hr` = 0: no projection, None: a whole one to 2 features."""
    torch.manual_seed(0)
    outputs = HIDDEN if hr == 0 else 2
    return {
        "x": torch.randn(STEPS, BATCH, INPUTS, dtype=dtype, requires_grad=True),
        "h": torch.randn(BATCH, outputs, dtype=dtype, requires_grad=True),
        "c": torch.randn(BATCH, HIDDEN, dtype=dtype, requires_grad=True),
        "weight_ih": factors(4 * HIDDEN, INPUTS, ih, dtype),
        "weight_hh": factors(4 * HIDDEN, outputs, hh, dtype),
        "weight_hr": [] if hr == 0 else factors(2, HIDDEN, hr, dtype),
        "bias_ih": torch.randn(4 * HIDDEN, dtype=dtype, requires_grad=True),
        "bias_hh": torch.randn(4 * HIDDEN, dtype=dtype, requires_grad=True),
    }


def leaves(given: dict[str, Any]) -> list[Tensor]:
    return [
        leaf for value in given.values() for leaf in (value if isinstance(value, list) else [value]) if leaf is not None
    ]


def by_pytorch(given: dict[str, Any], reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's own LSTM, of the products, on steps in the order of time."""
    weights = [product(given["weight_ih"]), product(given["weight_hh"])]
    biases = [b for b in (given["bias_ih"], given["bias_hh"]) if b is not None]
    weights += biases
    if given["weight_hr"]:
        weights.append(product(given["weight_hr"]))
    x = given["x"].flip(0) if reverse else given["x"]
    states = [given["h"].unsqueeze(0), given["c"].unsqueeze(0)]
    y, h, c = torch.lstm(x, states, weights, bool(biases), 1, 0.0, False, False, False)
    return y.flip(0) if reverse else y, h[0], c[0]


@pytest.mark.parametrize("ranks", [(RANK, RANK, 0), (None, 1, 0), (RANK, None, 0), (RANK, RANK, 1), (RANK, RANK, None)])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_lstm_of_the_products_with_its_gradients(
    ranks: tuple[int | None, int | None, int | None], reverse: bool, bias: bool
) -> None:
    given = arguments(*ranks)
    if not bias:
        given |= {"bias_ih": None, "bias_hh": None}
    ours, theirs = low_rank_lstm(**given, reverse=reverse), by_pytorch(given, reverse)
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    cotangents = [torch.randn_like(wanted) for wanted in theirs]
    gradients = [torch.autograd.grad(outputs, leaves(given), cotangents) for outputs in (ours, theirs)]
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def flat(names: list[str], values: tuple[Tensor, ...]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name, value in zip(names, values, strict=True):
        if name.startswith("weight"):
            given.setdefault(name, []).append(value)
        else:
            given[name] = value
    return given


def test_derivatives_of_first_and_second_order() -> None:
    given = arguments()
    given["x"] = given["x"].detach()[:2].requires_grad_()
    names = [name for name, value in given.items() for _ in (value if isinstance(value, list) else [value])]

    def outputs(*values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return low_rank_lstm(**flat(names, values))

    assert torch.autograd.gradcheck(outputs, leaves(given))
    assert torch.autograd.gradgradcheck(outputs, leaves(given), fast_mode=True)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_packed_sequence_is_each_example_alone(reverse: bool) -> None:
    given = arguments()
    lengths = [5, 3, 1]
    packed = nn.utils.rnn.pack_padded_sequence(given["x"], torch.tensor(lengths))
    y, h, c = low_rank_lstm(**(given | {"x": packed.data}), batch_sizes=packed.batch_sizes, reverse=reverse)
    padded, _ = nn.utils.rnn.pad_packed_sequence(nn.utils.rnn.PackedSequence(y, packed.batch_sizes))
    alone = []
    for i, length in enumerate(lengths):
        states = {"h": given["h"][i : i + 1], "c": given["c"][i : i + 1]}
        wanted = by_pytorch(given | states | {"x": given["x"][:length, i : i + 1]}, reverse)
        alone.append(wanted[0].square().sum() + wanted[2].sum())
        for found, value in zip((padded[:length, i], h[i], c[i]), wanted, strict=True):
            torch.testing.assert_close(found, value.view_as(found), rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(y.square().sum() + c.sum(), leaves(given))
    theirs = torch.autograd.grad(torch.stack(alone).sum(), leaves(given))
    for found, value in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x[:1].expand(STEPS, BATCH, INPUTS),
        lambda x: x[:, :1],
        lambda x: x[:, :0],
        lambda x: x[:1],
    ],
    ids=["batch first", "strided", "expanded", "batch of one", "no examples", "one step"],
)
def test_layouts_and_small_sizes(layout: Callable[[Tensor], Tensor]) -> None:
    given = arguments()
    x = layout(given["x"].detach())
    given |= {"x": x, "h": given["h"][: x.shape[1]], "c": given["c"][: x.shape[1]]}
    ours = low_rank_lstm(**given, reverse=True)
    # PyTorch's own takes no empty batch; there is nothing in it.
    theirs = by_pytorch(given, True) if x.numel() else (x.new_zeros(STEPS, 0, HIDDEN), given["h"], given["c"])
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    ours[0].sum().backward()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_types(dtype: torch.dtype, tolerance: float) -> None:
    given = arguments(dtype=dtype)
    wide = {
        name: [v.double() for v in value] if isinstance(value, list) else value.double()
        for name, value in given.items()
    }
    ours, exact = low_rank_lstm(**given), by_pytorch(wide, False)
    for found, wanted in zip(ours, exact, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    ours[0].sum().backward()
    assert all(leaf.grad is None or leaf.grad.dtype == dtype for leaf in leaves(given))


def test_autocast_has_the_types_of_pytorchs_own() -> None:
    given = arguments(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = low_rank_lstm(**given)
        theirs = by_pytorch(given, False)
    assert [y.dtype for y in ours] == [y.dtype for y in theirs] == [torch.bfloat16] * 3
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=4e-2, atol=4e-2)
    ours[0].float().sum().backward()
    assert given["weight_hh"][0].grad.dtype == torch.float32


def test_torch_func_and_vmap() -> None:
    given = {
        name: [v.detach() for v in value] if isinstance(value, list) else value.detach()
        for name, value in arguments().items()
    }
    leaf = given["x"].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(low_rank_lstm(**(given | {"x": leaf}))[0].sum(), leaf)

    def total(x: Tensor) -> Tensor:
        return low_rank_lstm(**(given | {"x": x}))[0].sum()

    torch.testing.assert_close(grad(total)(given["x"]), wanted)
    tangent = torch.randn_like(given["x"])
    torch.testing.assert_close(jvp(total, (given["x"],), (tangent,))[1], (wanted * tangent).sum())
    many = torch.stack([given["x"], 2 * given["x"]])
    torch.testing.assert_close(vmap(total)(many), torch.stack([total(x) for x in many]))
    torch.testing.assert_close(vmap(grad(total))(many), torch.stack([grad(total)(x) for x in many]))


def test_the_factors_are_never_multiplied_out() -> None:
    """Even where that would take fewer multiplications, as for the inputs of many rows at a high rank."""
    from torch.utils.flop_counter import FlopCounterMode

    given = arguments(ih=5, hh=4)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        low_rank_lstm(**given)
    rows = STEPS * BATCH
    assert counter.get_total_flops() == 2 * rows * ((INPUTS + 4 * HIDDEN) * 5 + (HIDDEN + 4 * HIDDEN) * 4)


def test_it_is_traced() -> None:
    given = arguments()
    torch.library.opcheck(torch.ops.cctorch.low_rank_lstm.default, tuple(given.values()))

    def run(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return low_rank_lstm(**(given | {"x": x, "h": h, "c": c}))

    states = (given["x"], given["h"], given["c"])
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(compiled(*states), run(*states), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.ones(6, 5)}, "x must be steps x batch x inputs, got shape"),
        ({"x": torch.ones(0, 3, 5)}, "at least one step"),
        ({"x": torch.ones(6, 2, 5)}, "h must be of the batch of x, 2"),
        ({"x": torch.ones(6, 3, 7)}, "weight_ih must read 7 features"),
        ({"h": torch.ones(4)}, "h and c must be batch x features"),
        ({"h": torch.ones(2, 4)}, "h and c must be of one batch"),
        ({"h": torch.ones(3, 2)}, "weight_hh must read 2 features"),
        ({"weight_ih": []}, "weight_ih must be a matrix or two factors, got 0"),
        ({"weight_hh": [torch.ones(2, 4)]}, "weight_hh must give 16 features"),
        ({"weight_hh": [torch.ones(2, 4), torch.ones(16, 3)]}, "the factors of weight_hh must have one rank"),
        ({"weight_hh": [torch.ones(16)]}, "weight_hh must have 2 dimensions"),
        ({"weight_hr": [torch.ones(2, 4)]}, "weight_hr must give 4 features"),
        ({"bias_ih": torch.ones(4)}, "bias_ih must have 16 elements, got 4"),
        ({"bias_hh": torch.ones(1, 16)}, "bias_hh must be one-dimensional"),
        ({"x": torch.ones(4, 5), "batch_sizes": torch.tensor([3, 2])}, "add up to the 4 rows"),
        ({"x": torch.ones(6, 5), "batch_sizes": torch.tensor([2, 4])}, "be positive and not rise"),
        ({"x": torch.ones(3, 5), "batch_sizes": torch.tensor([3, 0])}, "be positive and not rise"),
        ({"x": torch.ones(4, 5), "batch_sizes": torch.tensor([2, 2])}, "begin with the batch of h, 3"),
        ({"x": torch.ones(4, 5), "batch_sizes": torch.tensor([3.0, 1.0])}, "integers on the CPU, int64"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        low_rank_lstm(**(arguments(dtype=torch.float32) | changed))


def test_without_a_projection_the_outputs_are_the_hidden_features() -> None:
    with pytest.raises(RuntimeError, match="without weight_hr, h and c must have as many features"):
        low_rank_lstm(**(arguments(hr=1) | {"weight_hr": []}))
