"""batch_norm against torch's own in float64."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from cctorch import nn as cnn
from cctorch import ops
from torch import nn

SHAPES = [
    (2, 3, 4, 5),
    (4, 16, 3, 3),
    (1, 1, 2, 2),
    (3, 7, 1, 1),
    (2, 200, 2, 2),
    (8, 5, 40, 40),
    (2, 33, 17, 13),
    (2, 1, 1, 1),
]
LAYOUTS = [torch.channels_last, torch.contiguous_format]


def arguments(shape, dtype=torch.float64, layout=torch.channels_last, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 5
    weight, bias = (torch.randn(shape[1], generator=generator, dtype=torch.float64) for _ in range(2))
    return x.to(dtype).contiguous(memory_format=layout), weight.to(dtype), bias.to(dtype)


def reference(x, weight, bias, eps=1e-5):
    x, weight, bias = x.double().contiguous(), weight.double(), bias.double()
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    inverse = 1 / (var + eps).sqrt()
    per = lambda v: v.view(1, -1, 1, 1)  # noqa: E731
    return (x - per(mean)) * per(inverse * weight) + per(bias), mean, inverse


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_forward_and_backward(shape, layout, dtype, tolerance):
    x, weight, bias = (t.requires_grad_() for t in arguments(shape, dtype, layout))
    y, mean, inverse = ops.batch_norm(x, weight, bias)
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = reference(*wide)
    for got, want in zip((y, mean, inverse), expected, strict=True):
        scale = max(1.0, float(want.detach().abs().max()))
        torch.testing.assert_close(got.detach().double(), want.detach(), rtol=tolerance, atol=tolerance * scale)
    assert y.is_contiguous(memory_format=layout)
    assert not mean.requires_grad
    assert not inverse.requires_grad
    grad = torch.randn(shape, dtype=torch.float64)
    got = torch.autograd.grad(y, (x, weight, bias), grad.to(dtype))
    want = torch.autograd.grad(expected[0], wide, grad)
    for a, b in zip(got, want, strict=True):
        scale = max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=10 * tolerance * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_is_torchs(dtype, layout):
    x, weight, bias = arguments((4, 7, 6, 6), dtype, layout)
    y, *_ = ops.batch_norm(x, weight, bias)
    torch.testing.assert_close(y, F.batch_norm(x, None, None, weight, bias, training=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_second_derivative_is_torchs(dtype, layout):
    tensors = [t.requires_grad_() for t in arguments((4, 7, 6, 6), dtype, layout)]

    def second(function):
        y = function(*tensors)
        first = torch.autograd.grad(y.float().tanh().sum(), tensors[1], create_graph=True)[0]
        return torch.autograd.grad(first.float().sum(), tensors[0])[0]

    got = second(lambda x, w, b: ops.batch_norm(x, w, b)[0])
    want = second(lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True))
    scale = float(want.abs().max())
    torch.testing.assert_close(got, want, rtol=0, atol=scale * (2e-2 if dtype == torch.bfloat16 else 1e-4))


def test_gradients_twice():
    x, weight, bias = (t.requires_grad_() for t in arguments((3, 5, 2, 2)))
    function = lambda *t: ops.batch_norm(*t)[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))


@pytest.mark.parametrize("grads", [(True, False, False), (False, True, True), (False, False, False)])
def test_only_what_is_asked_for(grads):
    tensors = [t.requires_grad_(g) for t, g in zip(arguments((2, 3, 4, 4)), grads, strict=True)]
    y = ops.batch_norm(*tensors)[0]
    assert y.requires_grad == any(grads)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype, layout):
    sample = (*(t.requires_grad_() for t in arguments((2, 3, 4, 4), dtype, layout)), 1e-5)
    op = torch.ops.cctorch.batch_norm.default
    if dtype == torch.bfloat16:
        # The gradient of a sum is zero here: in bfloat16 what is compared would be rounding errors.
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(op, sample, test_utils=tests)
    else:
        torch.library.opcheck(op, sample)


def test_non_contiguous_and_views():
    x, weight, bias = arguments((4, 6, 8, 8))
    for view in (x[:, :, ::2], x[::2], x[:, 1:4], x.transpose(2, 3)):
        count = view.shape[1]
        torch.testing.assert_close(
            ops.batch_norm(view, weight[:count], bias[:count])[0], reference(view, weight[:count], bias[:count])[0]
        )
    expanded = torch.ones(1, dtype=torch.float64).expand(6)
    torch.testing.assert_close(ops.batch_norm(x, expanded, bias)[0], reference(x, expanded, bias)[0])
    y, *_ = ops.batch_norm(x.requires_grad_(), weight, bias)
    y.sum().backward()  # an expanded gradient
    torch.testing.assert_close(x.grad, torch.zeros_like(x), atol=1e-10, rtol=0)


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e4])
def test_a_large_mean_costs_few_digits(offset):
    x, weight, bias = arguments((16, 7, 20, 20), torch.float32)
    x = ((x - 5) / 3 + offset).contiguous(memory_format=torch.channels_last)
    got, want = ops.batch_norm(x, weight, bias)[0], reference(x, weight, bias)[0]
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_a_constant_channel_gives_its_bias():
    x, weight, bias = arguments((4, 3, 5, 5), torch.float32)
    x[:, 1] = 7.25
    y, mean, inverse = ops.batch_norm(x, weight, bias)
    torch.testing.assert_close(y[:, 1], bias[1].expand(4, 5, 5))
    assert mean[1] == 7.25
    torch.testing.assert_close(inverse[1], torch.tensor(1e-5).rsqrt())


def test_the_number_of_threads_changes_nothing():
    x, weight, bias = arguments((16, 11, 32, 32), torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            a, w, b = (t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias))
            y, *_ = ops.batch_norm(a, w, b)
            results.append([y, *torch.autograd.grad(y.square().sum(), (a, w, b))])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x[0], w, b), "x must be N x C x H x W"),
        (lambda x, w, b: (x[:0], w, b), "x must have at least one element"),
        (lambda x, w, b: (x, w[:2], b), "weight must have one element for each of 3 channels, got 2"),
        (lambda x, w, b: (x, w, b.float()), "bias must have the type of x, Double, got Float"),
        (lambda x, w, b: (x.int(), w, b), "x must be float32"),
        (lambda x, w, b: (x, w.view(3, 1), b), "weight must be one-dimensional"),
        (lambda x, w, b: (x, w.to("meta"), b), "x is on cpu but weight is on meta"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(RuntimeError, match=message):
        ops.batch_norm(*change(*arguments((2, 3, 4, 4))))


@pytest.mark.parametrize("shape", [*SHAPES, (0, 3, 4, 4), (2, 3, 0, 4)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_inference(shape, layout, dtype, tolerance):
    x, weight, bias = arguments(shape, dtype, layout)
    mean, var = torch.randn(shape[1], dtype=dtype), torch.rand(shape[1], dtype=dtype)
    y = ops.batch_norm_inference(x, weight, bias, mean, var)
    wide = [t.double().contiguous() for t in (x, mean, var, weight, bias)]
    want = F.batch_norm(*wide) if x.numel() else wide[0]
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance * 1e3)
    assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inference_is_differentiable(layout):
    x, weight, bias = (t.requires_grad_() for t in arguments((3, 5, 2, 2), layout=layout))
    mean, var = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    sample = (x, weight, bias, mean, var, 1e-5)
    assert torch.autograd.gradcheck(torch.ops.cctorch.batch_norm_inference, sample)
    torch.library.opcheck(torch.ops.cctorch.batch_norm_inference.default, sample)
    with pytest.raises(RuntimeError, match="var must have one element for each of 5 channels, got 4"):
        ops.batch_norm_inference(x, weight, bias, mean, var[:4])


MODULES = list(itertools.product((0.1, None), (True, False), LAYOUTS))


@pytest.mark.parametrize(("momentum", "tracks", "layout"), MODULES)
def test_module_is_torchs_in_training_and_evaluation(momentum, tracks, layout):
    torch.manual_seed(0)
    own = nn.BatchNorm2d(7, momentum=momentum, track_running_stats=tracks).double()
    nn.init.normal_(own.weight)
    module = copy.deepcopy(own)
    module.__class__ = cnn.BatchNorm2d
    for step in range(3):
        x = (torch.randn(4, 7, 5, 5).double() * (step + 1) + step).contiguous(memory_format=layout)
        a, b = (x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
        want, got = own(a), module(b)
        torch.testing.assert_close(got, want)
        want.square().sum().backward()
        got.square().sum().backward()
        torch.testing.assert_close(b.grad, a.grad, atol=1e-8, rtol=1e-8)
    assert module.state_dict().keys() == own.state_dict().keys()
    for name, value in own.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value)
    torch.testing.assert_close(module.weight.grad, own.weight.grad)
    torch.testing.assert_close(module.eval()(x), own.eval()(x))


def test_module_falls_back_where_torch_has_the_word():
    module = cnn.BatchNorm2d(3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module(torch.randn(1, 3, 1, 1).contiguous(memory_format=torch.channels_last))
    plain = cnn.BatchNorm2d(3, affine=False)
    assert plain(torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)).shape == (2, 3, 4, 4)
    with pytest.raises(ValueError, match="expected 4D input"):
        module(torch.randn(3, 4, 4))


def test_module_in_an_exported_program_is_torchs():
    module = cnn.BatchNorm2d(5).eval()
    x = torch.randn(4, 5, 6, 6).contiguous(memory_format=torch.channels_last)
    program = torch.export.export(module, (x,), strict=False)
    assert not any("cctorch" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), module(x))


def test_module_compiles_whole():
    module = cnn.BatchNorm2d(5)
    x = torch.randn(4, 5, 6, 6).contiguous(memory_format=torch.channels_last)
    want = copy.deepcopy(module)(x)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), want)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_no_image_has_no_gradient(memory_format: torch.memory_format) -> None:
    x = torch.empty(0, 3, 2, 2).contiguous(memory_format=memory_format).requires_grad_()
    weight, bias = (torch.ones(3, requires_grad=True) for _ in range(2))
    y = ops.batch_norm_inference(x, weight, bias, torch.zeros(3), torch.ones(3))
    grads = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert [grad.shape for grad in grads] == [(0, 3, 2, 2), (3,), (3,)]
    assert not any(grad.any() for grad in grads)
