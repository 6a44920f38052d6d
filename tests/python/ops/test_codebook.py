"""codebook_quant, codebook_indices and codebook_update beside float64, of tensors and of lists."""

from typing import Any

import pytest
import torch
from cases import LAYOUTS, TYPES, scale_type, with_threads
from cctorch.ops import codebook_indices, codebook_quant, codebook_update
from torch import Tensor


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count", [1, 2, 16, 96, 97, 128, 129, 1000])
def test_codebooks_of_few_and_many_values(count: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    book = torch.randn(count).to(scale_type(dtype))
    book[0] = -0.0
    halfway = (book.double()[:-1] + book.double()[1:]) / 2
    x = torch.cat([torch.randn(2000), halfway, torch.tensor([50.0, -50.0])]).to(dtype)
    distance = (x.double().unsqueeze(-1) - book.double()).abs()
    tied = torch.where(distance == distance.amin(-1, keepdim=True), book.double(), torch.inf)
    expected = tied.argmin(-1)  # the lower of two as near
    assert torch.equal(codebook_indices(x, book), expected)
    y = codebook_quant(x, book)
    assert torch.equal(y, book[expected].to(dtype))
    assert torch.equal(torch.signbit(y), torch.signbit(book[expected]))
    with_nan = torch.cat([x[:5], torch.tensor([float("nan")]).to(dtype)])
    assert torch.equal(codebook_quant(with_nan, book).isnan(), with_nan.isnan())


def test_sums_over_members_do_not_depend_on_threads() -> None:
    torch.manual_seed(0)
    x, grad, book = torch.randn(3, 90000).t(), torch.randn(90000, 3), torch.randn(11)
    x.requires_grad_()
    book.requires_grad_()

    def gradient() -> Tensor:
        return torch.autograd.grad(codebook_quant(x, book), book, grad)[0]

    indices = codebook_indices(x.detach(), book.detach())
    one, two = (with_threads(n, gradient) for n in (1, 2))
    assert torch.equal(one, two)
    expected = torch.zeros(11).double().index_add(0, indices.view(-1), grad.double().view(-1))
    torch.testing.assert_close(one.double(), expected, rtol=1e-6, atol=1e-9)
    one, two = (with_threads(n, lambda: codebook_update(x.detach(), book.detach())) for n in (1, 2))
    assert torch.equal(one, two)
    means = [x.detach().double()[indices == k].mean() for k in range(11)]
    torch.testing.assert_close(one.double(), torch.stack(means), rtol=1e-7, atol=0)


def test_the_codebooks_gradient_is_linear_in_that_of_the_values() -> None:
    x, book = torch.tensor([0.0, 2.0, 9.0]), torch.tensor([8.0, 1.0]).requires_grad_()
    grad = torch.tensor([1.0, 2.0, 4.0]).requires_grad_()
    (first,) = torch.autograd.grad(codebook_quant(x, book), book, grad, create_graph=True)
    assert first.tolist() == [4, 3]
    (second,) = torch.autograd.grad(first, grad, torch.tensor([10.0, 20.0]))
    assert second.tolist() == [20, 20, 10]


def lists(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    xs = [transform(torch.randn(6, 5, 4, 7).to(dtype)) for transform in LAYOUTS.values()]
    xs += [torch.randn(shape).to(dtype) for shape in [(), (1,), (3, 0), (40000,)]]
    return xs, [torch.randn(n, dtype=scale_type(dtype)) for n in range(1, len(xs) + 1)]


@pytest.mark.parametrize("dtype", TYPES)
def test_a_list_is_the_operator_on_each(dtype: torch.dtype) -> None:
    xs, books = lists(dtype)
    ys, updated = codebook_quant(xs, books), codebook_update(xs, books)
    assert isinstance(ys, list)
    assert isinstance(updated, list)
    for x, book, y, new in zip(xs, books, ys, updated, strict=True):
        assert torch.equal(y, book[(x.double().unsqueeze(-1) - book.double()).abs().argmin(-1)].to(dtype))
        assert y.stride() == torch.empty_like(x).stride()
        assert torch.equal(new, codebook_update(x, book))
    one, two = (with_threads(n, lambda: codebook_quant(xs, books)) for n in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_gradients_of_a_list() -> None:
    xs, books = lists(torch.float64)
    leaves = [t.contiguous().requires_grad_() for t in (*xs, *books)]
    xs, books = leaves[: len(xs)], leaves[len(xs) :]
    grads = [torch.randn_like(x) for x in xs]
    ys = codebook_quant(xs, books)
    used = [i for i in range(len(xs)) if i != 2]
    torch.autograd.backward([ys[i] for i in used], [grads[i] for i in used])
    assert xs[2].grad is None
    assert books[2].grad is None
    for i in used:
        assert torch.equal(xs[i].grad, grads[i])
        members = codebook_indices(xs[i].detach(), books[i].detach()).view(-1)
        expected = torch.zeros_like(books[i]).index_add(0, members, grads[i].view(-1))
        torch.testing.assert_close(books[i].grad, expected, rtol=1e-12, atol=1e-12)
    assert not any(book.requires_grad for book in codebook_update(xs, books))


def test_a_batch_of_gradients_of_a_list() -> None:
    xs = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    books = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (3, 8)]
    ys, batch = codebook_quant(xs, books), [torch.randn(5, 4, 3, dtype=torch.float64) for _ in xs]
    together = torch.autograd.grad(ys, [*xs, *books], batch, is_grads_batched=True, retain_graph=True)
    for i in range(5):
        one = torch.autograd.grad(ys, [*xs, *books], [grads[i] for grads in batch], retain_graph=True)
        for ours, expected in zip(together, one, strict=True):
            torch.testing.assert_close(ours[i], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", TYPES)
def test_lists_pass_opcheck(dtype: torch.dtype) -> None:
    xs = [torch.randn(4, 3), torch.randn(2, 5, 3, 3).contiguous(memory_format=torch.channels_last)]
    xs, books = [x.to(dtype) for x in xs], [torch.randn(n, dtype=scale_type(dtype)) for n in (3, 8)]
    torch.library.opcheck(torch.ops.cctorch.codebook_update.list, (xs, books))
    torch.library.opcheck(torch.ops.cctorch._member_sums.default, (xs[0], xs[0], books[0]))
    torch.library.opcheck(torch.ops.cctorch._member_sums.list, (xs, xs, books))
    for tensor in (*xs, *books):
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.cctorch.codebook_quant.list, (xs, books))


def test_empty_lists_and_compilation() -> None:
    assert codebook_quant([], []) == []
    assert codebook_update([], []) == []

    def loss(a: Tensor, b: Tensor, book: Tensor) -> Tensor:
        first, second = codebook_quant([a, b], [book, book])
        return first.sum() + second.square().sum()

    inputs = (torch.randn(4, 3), torch.randn(2, 5), torch.tensor([0.25, -1.0]))
    leaves, again = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
    loss(*leaves).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*again).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, again, strict=True))


ONE, TWO = torch.ones(1), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([TWO], [ONE, ONE]), "codebook must have one for each of the 1 tensors of x, got 2"),
        (([TWO, TWO], [ONE, ONE.double()]), r"codebook\[1\] must be Float for Float x\[1\], got Double"),
        (([TWO, TWO], [ONE, TWO]), r"codebook\[1\] must be one-dimensional"),
        (([TWO, TWO.double()], [ONE, ONE]), r"all x must be of one type"),
        (([TWO], [torch.ones(0)]), r"codebook\[0\] must have at least one value"),
    ],
)
def test_bad_lists(arguments: Any, message: str) -> None:
    for op in (codebook_quant, codebook_update):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count", [1, 2, 16, 97, 1000])
@pytest.mark.parametrize("places", [[0], [-1], [-1, 0]])
def test_a_codebooks_nan_is_the_nearest_as_for_argmin(count: int, places: list[int], dtype: torch.dtype) -> None:
    """On CPU, and in what other devices run."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(3000), torch.tensor([50.0, -50.0])]).to(dtype)
    book = torch.randn(count).to(scale_type(dtype))
    book[places] = torch.nan
    nearest = (x.double().unsqueeze(-1) - book.double()).abs().argmin(-1)
    means = book.clone()
    means[nearest[0]] = x.double().mean()
    beyond = torch.tensor([torch.inf, -torch.inf]).to(dtype)
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    for name, expected in [("indices", nearest), ("quant", book[nearest].to(dtype)), ("update", means)]:
        op = getattr(torch.ops.cctorch, f"codebook_{name}").default
        for found in (op(x, book), op.redispatch(key, x, book)):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7, equal_nan=True)
    for found in (codebook_quant(beyond, book), torch.ops.cctorch.codebook_quant.default.redispatch(key, beyond, book)):
        assert found.isnan().all()
    book.requires_grad_()
    (gradient,) = torch.autograd.grad(codebook_quant(x, book), book, torch.ones_like(x))
    assert torch.equal(gradient, torch.zeros(count, dtype=book.dtype).index_fill(0, nearest[:1], len(x)))


@pytest.mark.parametrize("unknown", [False, True])
def test_on_other_devices_an_update_sums_the_values_once(unknown: bool) -> None:
    """What a codebook with a NaN needs besides must cost the others no pass over the values."""
    x, book = torch.randn(4000), torch.randn(8)
    book[3] = torch.nan if unknown else 0.0
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    with torch.profiler.profile(record_shapes=True, acc_events=True) as profile:
        found = torch.ops.cctorch.codebook_update.default.redispatch(key, x, book)
    sums = [
        event.name
        for event in profile.events()
        if event.name in ("aten::sum", "aten::mean", "aten::cumsum")
        and any(shape and shape[-1] == 4000 for shape in event.input_shapes)
    ]
    assert sums == ["aten::cumsum"]
    torch.testing.assert_close(found, codebook_update(x, book), rtol=1e-6, atol=1e-7, equal_nan=True)
