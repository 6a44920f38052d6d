"""Factored layers made of dense ones."""

from typing import Any

import pytest
import torch
from cctorch.nn import LowRankConv2d, LowRankLinear
from torch import Tensor, nn


def nearest(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(7, 9), (9, 7), (80, 100)])
def test_linear_from_dense(bias: bool, rows: int, columns: int) -> None:
    dense = nn.Linear(columns, rows, bias).double()
    low = LowRankLinear.from_dense(dense, 3)
    expected = nearest(dense.weight.detach(), 3)
    torch.testing.assert_close((low.second @ low.first).detach(), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(low.first.norm(), low.second.norm())
    x = torch.randn(5, columns, dtype=torch.float64)
    torch.testing.assert_close(low(x), nn.functional.linear(x, expected, dense.bias), rtol=1e-9, atol=1e-10)


def convolution(**arguments: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(6, 8, (3, 5), **arguments).double()


ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "bias": False},
    {"padding": "same", "padding_mode": "reflect"},
]


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("layout", ["channel", "spatial", "tucker"])
def test_convolution_from_dense(layout: Any, arguments: dict[str, Any]) -> None:
    dense = convolution(**arguments)
    weight = dense.weight.detach().clone()
    low = LowRankConv2d.from_dense(dense, (4, 3) if layout == "tucker" else 4, layout)
    y = torch.randn(2, 6, 12, 14, dtype=torch.float64)
    with torch.no_grad():
        if layout == "channel":
            dense.weight.copy_(nearest(weight.flatten(1), 4).view_as(weight))
        elif layout == "spatial":
            matrix = nearest(weight.transpose(1, 2).flatten(2).flatten(0, 1), 4)
            dense.weight.copy_(matrix.view(8, 3, 6, 5).transpose(1, 2))
        else:
            first, core, second = low.first[:, :, 0, 0], low.core, low.second[:, :, 0, 0]
            dense.weight.copy_(torch.einsum("no,oikl,ic->nckl", second, core, first))
            assert 0 < float((dense.weight - weight).norm()) < float(weight.norm())
    torch.testing.assert_close(low(y), dense(y), rtol=1e-9, atol=1e-10)


def test_full_ranks_lose_nothing() -> None:
    dense = convolution(padding=1)
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    for rank, layout in ((8, "channel"), (24, "spatial"), ((8, 6), "tucker")):
        low = LowRankConv2d.from_dense(dense, rank, layout)  # type: ignore[arg-type]
        torch.testing.assert_close(low(x), dense(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", ["channel", "spatial", "tucker"])
def test_layers_start_like_dense_ones(layout: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 64, 10, 10)
    low = LowRankConv2d(64, 96, (48, 32) if layout == "tucker" else 64, 3, bias=False, layout=layout)
    with torch.no_grad():
        ratio = low(x).std() / nn.Conv2d(64, 96, 3, bias=False)(x).std()
    assert 0.8 < float(ratio) < 1.25


@pytest.mark.parametrize("layout", ["channel", "spatial", "tucker"])
def test_state_compile_and_export(layout: Any) -> None:
    rank = (4, 3) if layout == "tucker" else 4
    low = LowRankConv2d.from_dense(convolution(padding=1), rank, layout)
    other = LowRankConv2d(6, 8, rank, (3, 5), padding=1, layout=layout).double()
    other.load_state_dict(low.state_dict())
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(other(x), low(x), rtol=0, atol=0)
    torch.testing.assert_close(torch.compile(low, fullgraph=True, backend="aot_eager")(x), low(x))
    torch.testing.assert_close(torch.export.export(low, (x,)).module()(x), low(x))


def test_frozen_stays_frozen() -> None:
    dense = convolution()
    dense.weight.requires_grad_(False)
    low = LowRankConv2d.from_dense(dense, (4, 3), "tucker")
    assert {n for n, p in low.named_parameters() if p.requires_grad} == {"bias"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LowRankLinear.from_dense(nn.Linear(3, 4), 4), "rank = 4, expected 1 to 3 for a weight of 4 x 3"),
        (lambda: LowRankConv2d(3, 4, 2, 3, layout="tucker"), "expected the ranks of outputs and inputs"),
        (lambda: LowRankConv2d(3, 4, (2, 2), 3), "rank = .2, 2., expected one number"),
        (lambda: LowRankConv2d(3, 4, 2, 3, layout="cp"), "layout = 'cp', expected one of"),  # type: ignore[arg-type]
        (lambda: LowRankConv2d.from_dense(nn.Conv2d(4, 4, 3, groups=2), 2), "groups = 2, expected 1"),
        (lambda: LowRankConv2d.from_dense(nn.Conv2d(4, 4, 3), (5, 1), "tucker"), "rank of outputs = 5"),
        (lambda: LowRankConv2d.from_dense(nn.Conv2d(4, 4, 3), 13, "spatial"), "rank = 13, expected 1 to 12"),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
