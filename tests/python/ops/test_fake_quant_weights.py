import math
from typing import Any

import pytest
import torch
from cases import HALF_TYPES, LAYOUTS, TYPES, scale_type, with_threads
from cctorch.ops import fake_quant_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

SHAPES = [(16, 3, 3, 3), (5, 7, 1, 1), (1, 300), (300, 1), (7, 40000), (9,), (2, 1, 1, 1)]


def weights(dtype: torch.dtype, shapes: list[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def reference(weight: Tensor, bits: int, axis: int) -> tuple[Tensor, Tensor]:
    """The same by torch's operators, in the type the arithmetic is done in."""
    w = weight.to(scale_type(weight.dtype))
    qmax = 2 ** (bits - 1) - 1
    scale = (w.abs().movedim(axis, 0).flatten(1).amax(1) if w.dim() > 1 else w.abs()) / qmax
    scale = scale.clamp(torch.finfo(w.dtype).tiny, torch.finfo(w.dtype).max)
    steps = scale.view([-1 if d == axis % w.dim() else 1 for d in range(w.dim())])
    return ((w / steps).round().clamp(-qmax, qmax) * steps).to(weight.dtype), scale


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_equals_the_composed_expression(dtype: torch.dtype, bits: int) -> None:
    quantized, scales = fake_quant_weights(weights(dtype), bits)
    for weight, y, scale in zip(weights(dtype), quantized, scales, strict=True):
        expected, expected_scale = reference(weight, bits, 0)
        assert torch.equal(scale, expected_scale)
        assert torch.equal(y, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1])
@pytest.mark.parametrize("dtype", TYPES)
def test_layouts(layout: str, axis: int, dtype: torch.dtype) -> None:
    weight = LAYOUTS[layout](weights(dtype, [(6, 5, 4, 70)])[0])
    (y,), (scale,) = fake_quant_weights([weight], 4, axis)
    expected, expected_scale = reference(weight, 4, axis)
    assert torch.equal(y, expected)
    assert torch.equal(scale, expected_scale)
    assert y.stride() == torch.empty_like(weight).stride()


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("dtype", TYPES)
def test_the_largest_number_stays_finite(bits: int, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    (y,), _ = fake_quant_weights([torch.tensor([[largest, -largest]], dtype=dtype)], bits)
    torch.testing.assert_close(y, torch.tensor([[largest, -largest]], dtype=dtype))


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20),
    bits=st.integers(2, 8),
)
def test_every_weight_is_within_half_a_step_on_its_grid(values: list[float], bits: int) -> None:
    weight = torch.tensor([values])
    (y,), (scale,) = fake_quant_weights([weight], bits)
    qmax = 2 ** (bits - 1) - 1
    assert torch.isin(y, torch.arange(-qmax, qmax + 1) * scale).all()
    # Exact but for the roundings of a division and a product.
    allowed = scale.double() * 0.5 + weight.abs().max().double() * 2 * torch.finfo(torch.float32).eps
    assert ((y.double() - weight.double()).abs() <= allowed).all()
    assert scale > 0


def test_extremes() -> None:
    rows = torch.tensor([[math.nan, 7.0, 0.6], [math.inf, 1.0, -2.0], [0.0, -0.0, 0.0], [1e-45, 0.0, -1e-45]])
    (y,), (scale,) = fake_quant_weights([rows], 4)
    finfo = torch.finfo(torch.float32)
    assert torch.equal(y[0].nan_to_num(99), torch.tensor([99.0, 7, 1]))
    assert scale[[0, 2, 3]].tolist() == [1, finfo.tiny, finfo.tiny]
    assert 0.999 * finfo.max < y[1, 0] <= finfo.max
    assert y[1, 1:].tolist() == [0, -0.0]
    assert y[2].tolist() == [0, 0, 0]
    assert y[3].tolist() == [0, 0, 0]
    (y,), (scale,) = fake_quant_weights([torch.full((2, 2), math.nan)], 4)
    assert y.isnan().all()
    assert scale.isfinite().all()


def test_gradient_is_straight_through_and_scales_are_constants() -> None:
    inputs = [w.requires_grad_(i != 1) for i, w in enumerate(weights(torch.float32, [(4, 3), (2, 5), (3, 3, 3, 3)]))]
    quantized, scales = fake_quant_weights(inputs, 4)
    assert [y.requires_grad for y in quantized] == [True, True, True]
    assert not any(scale.requires_grad for scale in scales)
    grads = [torch.randn_like(y) for y in quantized]
    first, third = torch.autograd.grad([quantized[0], quantized[2]], [inputs[0], inputs[2]], [grads[0], grads[2]])
    assert torch.equal(first, grads[0])
    assert torch.equal(third, grads[2])


def test_unused_outputs_have_no_gradient() -> None:
    inputs = [w.requires_grad_() for w in weights(torch.float32, [(4, 3), (2, 5)])]
    quantized, _ = fake_quant_weights(inputs, 4)
    quantized[1].sum().backward()
    assert inputs[0].grad is None
    assert torch.equal(inputs[1].grad, torch.ones(2, 5))


def test_empty() -> None:
    assert fake_quant_weights([], 4) == ([], [])
    quantized, scales = fake_quant_weights([torch.empty(0, 3), torch.empty(3, 0), torch.ones(1, 2)], 4)
    assert [tuple(y.shape) for y in quantized] == [(0, 3), (3, 0), (1, 2)]
    assert [scale.tolist() for scale in scales[:2]] == [[], [1, 1, 1]]


def test_results_do_not_depend_on_threads() -> None:
    one, two = (with_threads(n, lambda: fake_quant_weights(weights(torch.float32), 4)) for n in (1, 2))
    for a, b in zip(one[0] + one[1], two[0] + two[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", TYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    inputs = [w.requires_grad_() for w in weights(dtype, [(4, 3), (2, 5, 3, 3)])]
    torch.library.opcheck(torch.ops.cctorch.fake_quant_weights.default, (inputs, 4, 1))


def test_compile_and_export() -> None:
    class Module(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            quantized, scales = fake_quant_weights([a, b], 4)
            return quantized[0].sum() + (quantized[1] / scales[1].view(-1, 1)).sum()

    inputs = tuple(weights(torch.float32, [(4, 3), (2, 5)]))
    expected = Module()(*inputs)
    assert torch.equal(torch.compile(Module(), fullgraph=True, backend="aot_eager")(*inputs), expected)
    assert torch.equal(torch.export.export(Module(), inputs).module()(*inputs), expected)


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_scales_of_half_precision_are_float32(dtype: torch.dtype) -> None:
    assert fake_quant_weights(weights(dtype), 4)[1][0].dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([torch.ones(2, 2)], 1), r"bits must be in \[2, 16\], got 1"),
        (([torch.ones(2, 2)], 17), r"bits must be in \[2, 16\], got 17"),
        (([torch.ones(2, 2), torch.ones(2)], 4, 1), r"axis must be in \[-1, 0\] for a 1-dimensional weights\[1\]"),
        (([torch.ones(())], 4), r"0-dimensional weights\[0\]"),
        (
            ([torch.ones(2), torch.ones(2).double()], 4),
            r"one type, got Float .* and Double in weights\[1\]",
        ),
        (([torch.ones(2, dtype=torch.int64)], 4), r"weights\[0\] must be float32"),
        (([torch.ones(2), torch.ones(2, device="meta")], 4), r"weights\[1\] is on meta but weights\[0\] is on cpu"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        fake_quant_weights(*arguments)
