import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cctorch import ops
from cctorch._C import CompressionPlan, LayerPlan, MaskPlan
from cctorch.apply import apply
from cctorch.graph import trace
from cctorch.nn import LowRankConv2d, LowRankLinear, LowRankWeight
from cctorch.prepare import convert, prepare
from networks import PaddedResNet, random_plan, randomized
from torch import nn
from torch.nn.utils import parametrize


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 6)).double()


def plan_of(*, mask: MaskPlan | None = None, bits: int | None = None) -> CompressionPlan:
    return CompressionPlan(
        layers=[
            LayerPlan("0", "conv2d", 4, 8, mask=mask, bits=bits),
            LayerPlan("3", "linear", 8, 6, mask=mask, bits=bits),
        ]
    )


def quantized(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    scale = scale.view(-1, *[1] * (weight.dim() - 1))
    return scale * (weight / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def test_magnitude_mask_is_one_selection_over_all_layers() -> None:
    model = two_layers()
    dense = [model[0].weight.detach().clone(), model[3].weight.detach().clone()]
    prepare(model, plan_of(mask=MaskPlan("magnitude", sparsity=0.75)))
    values = torch.cat([weight.flatten() for weight in dense])
    kept = values.abs().argsort(descending=True)[: values.numel() // 4]
    expected = torch.zeros_like(values)
    expected[kept] = values[kept]
    assert torch.equal(torch.cat([model[0].weight.flatten(), model[3].weight.flatten()]), expected)


def test_other_masks_belong_to_their_layer() -> None:
    model = prepare(two_layers(), plan_of(mask=MaskPlan("nm", n=1, m=4)))
    assert ((model[3].weight != 0).view(6, 2, 4).sum(2) == 1).all()
    model = prepare(two_layers(), plan_of(mask=MaskPlan("channel", sparsity=0.5)))
    assert (model[0].weight.flatten(1).norm(dim=1) > 0).sum() == 4


def test_mask_comes_before_quantization_and_convert_bakes_both_in() -> None:
    model = two_layers()
    dense = model[3].weight.detach().clone()
    prepare(model, plan_of(mask=MaskPlan("channel", sparsity=0.5), bits=3))
    steps = model[3].parametrizations.weight
    scale = steps[1].log_scale.detach().exp()
    masked = dense * steps[0].mask
    kept = steps[0].mask.any(1)
    torch.testing.assert_close(scale[kept], 2 * dense[kept].abs().mean(1) / 3**0.5)
    assert torch.equal(model[3].weight, quantized(masked, scale, 3))
    assert len(model[3].weight[steps[0].mask].unique()) <= 3 * 8
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    expected = model(x)
    assert convert(model) is model
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert isinstance(model[3].weight, nn.Parameter)
    assert torch.equal(model(x), expected)


def test_scales_start_from_the_weights_that_the_mask_keeps() -> None:
    model = prepare(two_layers(), plan_of(mask=MaskPlan("nm", n=1, m=4), bits=4))
    mask, quant = model[3].parametrizations.weight
    kept = model[3].parametrizations.weight.original.detach() * mask.mask
    torch.testing.assert_close(quant.log_scale.exp(), 2 * kept.abs().sum(1) / mask.mask.sum(1) / 7**0.5)


def test_training_keeps_the_mask_and_the_optimizers_parameters() -> None:
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {id(parameter) for parameter in model.parameters()}
    prepare(model, plan_of(mask=MaskPlan("magnitude", sparsity=0.5), bits=4))
    zeros = model[3].weight == 0
    F.mse_loss(model(torch.randn(4, 4, 3, 3).double()), torch.ones(4, 6).double()).backward()
    optimizer.step()
    masks = model[3].parametrizations.weight[0].mask
    assert (model[3].weight[~masks] == 0).all()
    assert (zeros | masks).all()
    convert(model)
    assert {id(parameter) for parameter in model.parameters()} == before


def test_low_rank_constraint_comes_first() -> None:
    model = two_layers()
    parametrize.register_parametrization(model[3], "weight", LowRankWeight(2))
    low = model[3].weight.detach().clone()
    prepare(model, plan_of(bits=5))
    scale = model[3].parametrizations.weight[1].log_scale.detach().exp()
    torch.testing.assert_close(model[3].weight, quantized(low, scale, 5))
    expected = model[3].weight.detach().clone()
    convert(model)
    assert torch.equal(model[3].weight, expected)


def test_compressed_model_is_prepared_through_its_factors() -> None:
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model = randomized(PaddedResNet())
    plan = random_plan(trace(model, x), 1)
    apply(model, plan)
    ranked = [layer for layer in plan.layers if layer.rank is not None]
    assert ranked
    quantization = CompressionPlan(
        layers=[LayerPlan(l.name, l.kind, l.in_channels, l.out_channels, bits=8) for l in ranked]  # noqa: E741
    )
    exact = model(x)
    prepare(model, quantization)
    error = (model(x) - exact).norm() / exact.norm()
    assert 0 < error < 0.2
    expected = model(x)
    convert(model)
    assert torch.equal(model(x), expected)


def test_converting_a_copy_leaves_the_original_in_training() -> None:
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    model = prepare(two_layers(), plan_of(mask=MaskPlan("channel", sparsity=0.5), bits=3))
    average = copy.deepcopy(model)
    expected = model(x)
    snapshot = convert(copy.deepcopy(model))
    assert not any(parametrize.is_parametrized(module) for module in snapshot.modules())
    for trained in (model, average, copy.deepcopy(average)):
        assert torch.equal(trained(x), expected)
        trained(x).sum().backward()
    assert type(snapshot[0]) is nn.Conv2d
    assert torch.equal(snapshot(x), expected)
    for other in (model, average):
        assert torch.equal(convert(other)(x), expected)


def test_parametrizations_of_others_stay() -> None:
    model = two_layers()
    parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    assert parametrize.is_parametrized(convert(model)[0])
    prepare(model, plan_of(bits=4))
    before = model[0].weight.detach().clone()
    convert(model)
    assert len(model[0].parametrizations.weight) == 2
    assert torch.equal(model[0].weight, before)


def test_misfits_are_refused_before_anything_changes() -> None:
    model = two_layers()
    model.add_module("4", nn.BatchNorm1d(6))
    good = LayerPlan("0", "conv2d", 4, 8, bits=4)
    for bad, message in [
        (LayerPlan("9", "linear", 8, 6, bits=4), "Sequential has no layer '9'"),
        (LayerPlan("3", "linear", 8, 6, kept_in=[8]), r"layer '3': kept_in\[0\] = 8, expected 0 to 7"),
        (
            LayerPlan("3", "conv2d", 8, 6, bits=4),
            "layer '3' is a linear of 8 -> 6 .* expects a conv2d",
        ),
        (LayerPlan("3", "linear", 8, 5, bits=4), "layer '3' is a linear of 8 -> 6 .* expects a linear of 8 -> 5"),
        (LayerPlan("4", "batch_norm2d", 6, 6, bits=4), "layer '4' is a BatchNorm1d"),
        (LayerPlan("3", "linear", 8, 6, mask=MaskPlan("nm", n=1, m=3)), "layer '3' has 8 input channels, .* of m = 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            prepare(model, CompressionPlan(layers=[good, bad]))
        assert not parametrize.is_parametrized(model[0])
    prepare(model, plan_of(bits=4))
    with pytest.raises(ValueError, match=r"layer '0' is prepared already; run cctorch.convert"):
        prepare(model, plan_of(bits=4))


@pytest.mark.parametrize("layers", [("0",), ("1",), ("0", "1")])
def test_a_weight_of_two_layers_is_refused(layers: tuple[str, ...]) -> None:
    """Each would have scales of its own, and `convert` leaves one weight for both."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    plan = CompressionPlan(layers=[LayerPlan(name, "linear", 8, 8, bits=4) for name in layers])
    with pytest.raises(
        ValueError, match=rf"layer '{layers[0]}' shares its weight \(0.weight, 1.weight\); leave it out"
    ):
        prepare(model, plan)
    assert not any(parametrize.is_parametrized(layer) for layer in model)
    repeated = nn.Sequential(model[0], nn.ReLU(), model[0])
    del model[1]
    prepare(repeated, CompressionPlan(layers=[LayerPlan("0", "linear", 8, 8, bits=4)]))  # one layer, run twice
    assert len(repeated[2].weight.unique()) <= 8 * 15


def test_one_module_under_two_names_is_refused() -> None:
    """It would be quantized twice, the second time what the first one made."""
    model = nn.Sequential(nn.Linear(8, 8))
    model.add_module("again", model[0])
    plan = CompressionPlan(layers=[LayerPlan(name, "linear", 8, 8, bits=4) for name in ("0", "again")])
    with pytest.raises(ValueError, match="layers '0' and 'again' are one module of the model; keep one of them"):
        prepare(model, plan)
    assert not parametrize.is_parametrized(model[0])


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
@pytest.mark.parametrize("asked", [{"bits": 4}, {"mask": MaskPlan("channel", sparsity=0.5)}], ids=["bits", "mask"])
def test_a_transposed_convolution_is_refused(kind: Callable[..., nn.Module], asked: dict[str, Any]) -> None:
    """Its weight is in_channels x out_channels: masks and scales would be those of its inputs."""
    model = nn.Sequential(kind(4, 8, 3))
    layer = LayerPlan("0", "conv2d", 4, 8, **asked)
    with pytest.raises(ValueError, match=r"layer '0' is a ConvTranspose.d; only convolutions and linear layers"):
        prepare(model, CompressionPlan(layers=[layer]))


SIZES: list[tuple[Callable[[], nn.Module], str, int, int]] = [
    (lambda: nn.Conv1d(4, 8, 3), "conv2d", 4, 8),
    (lambda: nn.Conv3d(4, 8, 3), "conv2d", 4, 8),
    (lambda: nn.Conv1d(4, 8, 3, groups=2), "conv2d", 4, 8),
    (lambda: nn.Embedding(8, 4), "linear", 4, 8),
    (lambda: nn.EmbeddingBag(8, 4), "linear", 4, 8),
    (lambda: nn.GRUCell(4, 8), "linear", 4, 24),
    (lambda: LowRankLinear(4, 8, 2), "linear", 4, 8),
    (lambda: LowRankConv2d(4, 8, 2, 3), "conv2d", 4, 8),
]


@pytest.mark.parametrize(("made", "kind", "inputs", "outputs"), SIZES)
def test_kind_and_sizes_are_those_of_all_kinds_of_layers(
    made: Callable[[], nn.Module], kind: str, inputs: int, outputs: int
) -> None:
    model = nn.Sequential(made())
    other = "linear" if kind == "conv2d" else "conv2d"
    for wrong in [(other, inputs, outputs), (kind, inputs - 1, outputs), (kind, inputs, outputs - 1)]:
        layer = LayerPlan("0", *wrong, bits=4)  # type: ignore[arg-type]
        with pytest.raises(
            ValueError, match=rf"'0' is a .*; the plan expects a {wrong[0]} of {wrong[1]} -> {wrong[2]}"
        ):
            prepare(model, CompressionPlan(layers=[layer]))
    for right in [(inputs, outputs), (inputs + 1, outputs + 1)]:
        prepare(nn.Sequential(made()), CompressionPlan(layers=[LayerPlan("0", kind, *right, bits=4)]))  # type: ignore[arg-type]


@pytest.mark.parametrize("asked", [{"bits": 4}, {"mask": MaskPlan("magnitude", sparsity=0.5)}], ids=["bits", "mask"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_before_anything_changes(asked: dict[str, Any], value: float) -> None:
    model = two_layers()
    with torch.no_grad():
        model[3].weight[1, 2] = value
    with pytest.raises(ValueError, match="layer '3' has a weight with NaN or infinity; restore it, or leave"):
        prepare(model, plan_of(**asked))
    assert not parametrize.is_parametrized(model[0])


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_weight_that_a_hook_computes_is_refused_by_name(norm: Callable[[nn.Module], nn.Module]) -> None:
    model = two_layers()
    norm(model[3])
    with pytest.raises(ValueError, match="layer '3' has a weight that is no parameter, as of the older weight_norm"):
        prepare(model, plan_of(bits=4))
    assert not parametrize.is_parametrized(model[0])


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_weight_that_a_parametrization_computes_is_what_is_quantized(norm: Callable[[nn.Module], nn.Module]) -> None:
    model = two_layers().eval()
    norm(model[3])
    model.eval()
    computed = model[3].weight.detach().clone()
    prepare(model, plan_of(bits=3))
    scale = model[3].parametrizations.weight[-1].log_scale.detach().exp()
    assert torch.equal(model[3].weight, quantized(computed, scale, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_prepared_model_is_converted_to_half_precision(dtype: torch.dtype) -> None:
    """As the converted one is prepared: its scales learn, which in half precision are too coarse to."""
    model, x = prepare(two_layers(), plan_of(bits=4)).to(dtype), torch.randn(2, 4, 3, 3).to(dtype)
    scale = model[3].parametrizations.weight[0].log_scale
    assert scale.dtype == torch.float32
    before = scale.detach().clone()
    optimizer = torch.optim.SGD([scale], lr=1e-3)
    model(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(scale.detach(), before - 1e-3 * scale.grad)
    assert (scale != before).any()


def test_a_depthwise_convolution_and_the_mode_of_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)).double().eval()
    before = model[0].weight.detach().clone()
    prepare(model, CompressionPlan(layers=[LayerPlan("0", "depthwise_conv2d", 8, 8, bits=4)]))
    assert not model[0].parametrizations.weight[0].training
    scale = model[0].parametrizations.weight[0].log_scale.detach().exp()
    assert torch.equal(model[0].weight, quantized(before, scale, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_float32_scales(dtype: torch.dtype) -> None:
    model = prepare(two_layers().to(dtype), plan_of(bits=4))
    scale = model[3].parametrizations.weight[0].log_scale
    assert scale.dtype == torch.float32
    model(torch.randn(2, 4, 3, 3, dtype=dtype)).sum().backward()
    dense = model[3].parametrizations.weight.original.detach()
    assert torch.equal(model[3].weight, quantized(dense.float(), scale.detach().exp(), 4).to(dtype))


def test_both_weights_of_a_recurrent_cell() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTMCell(8, 16))
    dense = {name: weight.detach().clone() for name, weight in model[0].named_parameters()}
    parametrize.register_parametrization(model[0], "weight_hh", LowRankWeight(4))
    layer = LayerPlan("0", "linear", 8, 64, mask=MaskPlan("channel", sparsity=0.5))
    prepare(model, CompressionPlan(layers=[layer]))
    model(torch.randn(3, 8))[0].sum().backward()
    convert(model)
    u, s, vh = torch.linalg.svd(dense["weight_hh"])
    low = (u[:, :4] * s[:4]) @ vh[:4]
    for name, weight in (("weight_ih", dense["weight_ih"]), ("weight_hh", low)):
        kept = weight.norm(dim=1) >= weight.norm(dim=1).sort().values[32]
        torch.testing.assert_close(getattr(model[0], name).detach(), weight * kept[:, None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["lsq", "minmax", "mse"])
def test_the_scales_start_as_init_says(init: Any) -> None:
    model = two_layers()
    weight = model[3].weight.detach().clone()
    prepare(model, plan_of(bits=4), init=init)
    scale = model[3].parametrizations.weight[0].log_scale.detach().exp()
    if init == "lsq":
        wanted = 2 * weight.abs().mean(1) / 7**0.5
    elif init == "minmax":
        wanted = torch.maximum(weight.amax(1) / 7, weight.amin(1) / -8) * (1 + 1e-6)
    else:
        wanted = ops.quant_range(weight, -8, 7, 0, "mse").exp() * (1 + 1e-6)
    torch.testing.assert_close(scale, wanted)


def test_another_start_of_the_scales_is_refused() -> None:
    with pytest.raises(ValueError, match="FakeQuant: init = 'best', expected 'lsq', 'minmax' or 'mse'"):
        prepare(two_layers(), plan_of(bits=4), init="best")  # type: ignore[arg-type]


def test_the_largest_value_is_within_the_grid_whatever_its_last_bit() -> None:
    model = prepare(two_layers(), plan_of(bits=4), init="minmax")
    model[3].weight.sum().backward()
    original = model[3].parametrizations.weight.original
    # Straight-through: a value that is clipped has no gradient.
    assert (original.grad == 1).all()
