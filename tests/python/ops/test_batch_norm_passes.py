"""The passes that synchronized batch normalization is made of, against their formulas in float64."""

import pytest
import torch

SHAPES = [(2, 3, 4, 5), (4, 16, 3, 3), (1, 1, 2, 2), (3, 7, 1, 1), (2, 200, 2, 2), (8, 5, 40, 40), (2, 33, 17, 13)]
KINDS = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
LAYOUTS = [torch.channels_last, torch.contiguous_format]
passes = torch.ops.cctorch


def images(shape, dtype, layout, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 1
    return x.to(dtype).contiguous(memory_format=layout)


def channels(shape, count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape[1], generator=generator, dtype=torch.float64) for _ in range(count)]


def spread(values):
    return values.view(1, -1, 1, 1)


def close(got, want, tolerance):
    scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), KINDS)
def test_formulas(shape, layout, dtype, tolerance):
    x, grad = images(shape, dtype, layout), images(shape, dtype, layout, seed=2)
    mean, scale, constant, slope = channels(shape, 4)
    wide, wide_grad = x.double(), grad.double()

    got = passes.batch_norm_moments(x)
    assert all(values.dtype == torch.float64 for values in got)
    # The sums of half precision are float32.
    close(got[0], wide.mean((0, 2, 3)), min(tolerance, 1e-5))
    close(got[1], wide.var((0, 2, 3), correction=0), min(tolerance, 1e-5))

    y = passes.batch_norm_affine(x, mean, scale, constant)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=layout)
    close(y, (wide - spread(mean)) * spread(scale) + spread(constant), tolerance)

    sums = passes.batch_norm_grad_sums(grad, x, mean)
    close(sums[0], wide_grad.sum((0, 2, 3)), min(tolerance, 1e-5))
    close(sums[1], (wide_grad * (wide - spread(mean))).sum((0, 2, 3)), min(tolerance, 1e-5))

    grad_x = passes.batch_norm_grad_input(grad, x, mean, constant, scale, slope)
    assert grad_x.dtype == dtype
    want = (wide_grad - spread(constant)) * spread(scale) - (wide - spread(mean)) * spread(slope)
    close(grad_x, want, tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_without_images(layout):
    shape = (0, 3, 4, 4)
    x = images(shape, torch.float32, layout)
    mean, scale, constant, slope = channels(shape, 4)
    with pytest.raises(RuntimeError, match="at least one element"):
        passes.batch_norm_moments(x)
    assert passes.batch_norm_affine(x, mean, scale, constant).shape == shape
    assert all(torch.equal(values, torch.zeros_like(mean)) for values in passes.batch_norm_grad_sums(x, x, mean))
    assert passes.batch_norm_grad_input(x, x, mean, constant, scale, slope).shape == shape


def test_an_expanded_gradient():
    x = images((2, 3, 4, 4), torch.float32, torch.channels_last)
    grad = torch.ones(()).expand(x.shape)
    mean, scale, constant, slope = channels(x.shape, 4)
    close(passes.batch_norm_grad_sums(grad, x, mean)[0], torch.full((3,), 32.0, dtype=torch.float64), 1e-6)
    got = passes.batch_norm_grad_input(grad, x, mean, constant, scale, slope)
    want = (1 - spread(constant)) * spread(scale) - (x.double() - spread(mean)) * spread(slope)
    close(got, want, 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype, layout):
    x, grad = images((2, 3, 4, 4), dtype, layout), images((2, 3, 4, 4), dtype, layout, seed=2)
    mean, scale, constant, slope = channels(x.shape, 4)
    torch.library.opcheck(passes.batch_norm_moments.default, (x,))
    torch.library.opcheck(passes.batch_norm_affine.default, (x, mean, scale, constant))
    torch.library.opcheck(passes.batch_norm_grad_sums.default, (grad, x, mean))
    torch.library.opcheck(passes.batch_norm_grad_input.default, (grad, x, mean, constant, scale, slope))


def test_bad_arguments():
    x = images((2, 3, 4, 4), torch.float32, torch.channels_last)
    mean, scale, constant = channels(x.shape, 3)
    with pytest.raises(RuntimeError, match="N x C x H x W"):
        passes.batch_norm_moments(x[0])
    with pytest.raises(RuntimeError, match="float64 and one-dimensional, got Float"):
        passes.batch_norm_affine(x, mean.float(), scale, constant)
    with pytest.raises(RuntimeError, match="one value for each of 3 channels, got 2"):
        passes.batch_norm_affine(x, mean[:2], scale, constant)
    with pytest.raises(RuntimeError, match="grad"):
        passes.batch_norm_grad_sums(x[:1], x, mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_do_not_matter(dtype):
    x, grad = images((8, 5, 40, 40), dtype, torch.channels_last), images((8, 5, 40, 40), dtype, torch.channels_last, 2)
    (mean,) = channels(x.shape, 1)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append([*passes.batch_norm_moments(x), *passes.batch_norm_grad_sums(grad, x, mean)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
