"""Collaborative Compression of a model on the device: gradients, plan, surgery, repair and masks, against the CPU."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import cctorch
import networks
import pytest
import torch
import torch.nn.functional as F
from cctorch import batch_norm
from cctorch._C import CompressionPlan, LayerPlan, MaskPlan
from cctorch.export import save_program
from cctorch.gradients import mean_gradients
from cctorch.graph import trace
from cctorch.nn import FakeQuant, LowRankWeight, Mask
from placed import CPU, DEVICE, assert_same, assert_same_state, needs_device, placed
from torch import Tensor, nn

pytestmark = needs_device


class Attention(nn.Module):
    """A Vision Transformer of one block, its attention written out."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.norm = nn.LayerNorm(16)
        self.qkv, self.project = nn.Linear(16, 48), nn.Linear(16, 16)
        self.wide, self.narrow = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.project(y)
        x = x + self.narrow(F.gelu(self.wide(x)))
        return self.head(x.mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.embed = nn.Linear(12, 16)
        self.lstm = nn.LSTM(16, 12, batch_first=True)
        self.hidden, self.head = nn.Linear(12, 20), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = F.relu(self.conv(x)).mean(3).transpose(1, 2)
        y, _ = self.lstm(F.relu(self.embed(rows)))
        return self.head(F.relu(self.hidden(y[:, -1])))


def resnet18() -> nn.Module:
    return pytest.importorskip("torchvision").models.resnet18(num_classes=7)


def mobilenet_v2() -> nn.Module:
    return pytest.importorskip("torchvision").models.mobilenet_v2(num_classes=7, width_mult=0.25)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "padded resnet": networks.PaddedResNet,
    "vgg": networks.Vgg,
    "dense": networks.Dense,
    "squeeze and excite": networks.SqueezeExcite,
    "attention": Attention,
    "recurrent": Recurrent,
    "resnet18": resnet18,
    "mobilenet_v2": mobilenet_v2,
}
SMALL = ["padded resnet", "vgg", "dense", "squeeze and excite", "attention", "recurrent"]


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return networks.randomized(NETWORKS[name]())


def images(count: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def batches(device: torch.device, count: int = 3, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    return [(images(size, seed).to(device), (torch.arange(size) % 3).to(device)) for seed in range(count)]


def tree(plan: CompressionPlan) -> Any:
    return json.loads(plan.to_json())


@pytest.mark.parametrize("name", NETWORKS)
def test_tracing(name: str) -> None:
    model = built(name)
    ours, theirs = trace(placed(model), images(2).to(DEVICE)), trace(model, images(2))
    assert [repr(s.__class__) + s.name for s in ours.specs] == [repr(s.__class__) + s.name for s in theirs.specs]
    for mine, wanted in zip(ours.specs, theirs.specs, strict=True):
        assert (mine.kind, mine.in_channels, mine.out_channels, mine.positions) == (
            wanted.kind,
            wanted.in_channels,
            wanted.out_channels,
            wanted.positions,
        )
    assert ours.warnings == theirs.warnings
    assert tree(networks.random_plan(ours)) == tree(networks.random_plan(theirs))


@pytest.mark.parametrize("name", SMALL)
def test_mean_gradients(name: str) -> None:
    model = built(name)
    layers = [s.name for s in trace(model, images(2)).specs if s.kind in ("conv2d", "linear")]
    ours = mean_gradients(placed(model), batches(DEVICE), layers)
    # On CUDA torch's hardswish divides by 6 with the 1 / 6 of float32, in float64 too.
    bound = 1e-7 if name == "squeeze and excite" else 1e-10
    for layer, gradient in mean_gradients(model, batches(CPU), layers).items():
        assert_same(ours[layer], gradient, rtol=1e-8, atol=bound * float(gradient.abs().max()))


@pytest.mark.parametrize("units", ["both", "channels", "singular_values"])
@pytest.mark.parametrize("basis", ["fixed", "exact"])
def test_the_plan_is_that_of_a_cpu(units: str, basis: str) -> None:
    """From the same gradients, so that no rounding of theirs decides."""
    model = built("padded resnet")
    layers = [s.name for s in trace(model, images(2)).specs if s.kind in ("conv2d", "linear")]
    gradients = mean_gradients(model, batches(CPU), layers)
    options: dict[str, Any] = {"target": 0.4, "units": units, "basis": basis, "multiple": 1}
    theirs = cctorch.compress(model, [], images(2), gradients=gradients, **options)
    on_device = {layer: gradient.to(DEVICE) for layer, gradient in gradients.items()}
    ours = cctorch.compress(placed(model), [], images(2).to(DEVICE), gradients=on_device, **options)
    assert tree(ours.plan) == tree(theirs.plan)
    assert tree(ours.at(0.2).plan) == tree(theirs.at(0.2).plan)


@pytest.mark.parametrize("name", ["padded resnet", "dense", "attention", "recurrent", "resnet18", "mobilenet_v2"])
def test_compress_and_apply(name: str) -> None:
    """All of it, with what a GPU's users get: multiples of 8, where a layer has as many."""
    model = built(name)
    dense = placed(model)
    target = 0.05 if name == "recurrent" else 0.15  # few multiples of 8 fit into so narrow an LSTM
    found = cctorch.compress(dense, batches(DEVICE), images(2).to(DEVICE), target=target)
    assert found.final_reduction > target - 0.01
    small = cctorch.apply(copy.deepcopy(dense), found.plan)
    assert {tensor.device.type for tensor in small.state_dict().values()} == {DEVICE.type}
    on_cpu = cctorch.apply(copy.deepcopy(model), found.plan).eval()
    with torch.no_grad():
        assert_same(small.eval()(images().to(DEVICE)), on_cpu(images()), rtol=1e-6, atol=1e-6)


def test_a_budget_of_parameters_in_float32() -> None:
    model = built("padded resnet").float().to(DEVICE).to(memory_format=torch.channels_last)
    data = [(x.float().contiguous(memory_format=torch.channels_last), y) for x, y in batches(DEVICE)]
    found = cctorch.compress(model, data, data[0][0], target=0.3, budget="parameters", multiple=2)
    small = cctorch.apply(model, found.plan)
    loss = F.cross_entropy(small.train()(data[0][0]), data[0][1])
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_surgery_computes_what_the_projected_dense_model_does(name: str, seed: int) -> None:
    model = built(name)
    plan = networks.random_plan(trace(model, images(2)), seed)
    expected = networks.projected(copy.deepcopy(model), plan)(images())
    small = cctorch.apply(placed(model), plan)
    assert_same(small(images().to(DEVICE)), expected, rtol=1e-7, atol=1e-7 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_surgery_in_other_types(dtype: torch.dtype) -> None:
    model = built("padded resnet")
    plan = networks.random_plan(trace(model, images(2)), 0)
    layout = torch.channels_last
    small = cctorch.apply(placed(model).to(dtype=dtype, memory_format=layout), plan)  # type: ignore[call-overload]
    y = small(images().to(DEVICE, dtype).contiguous(memory_format=layout))
    expected = networks.projected(copy.deepcopy(model), plan)(images())
    error = float((y.double().cpu() - expected).norm() / expected.norm())
    assert error < (1e-4 if dtype == torch.float32 else 0.2)


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    for x, y in batches(device):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, 0.001, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, 0.001, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_optimizer_goes_on(optimizer: str) -> None:
    model = built("squeeze and excite")
    plan = networks.random_plan(trace(model, images(2)), 5, ranks=False)
    trained = []
    for device in (DEVICE, CPU):
        of_device = copy.deepcopy(model).to(device)
        steps = OPTIMIZERS[optimizer](of_device.parameters())
        stepped(of_device, steps, device)
        cctorch.apply(of_device, plan, steps)
        stepped(of_device, steps, device)
        trained.append(of_device)
    assert_same_state(*trained, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shortcuts", [True, False])
def test_repair(name: str, shortcuts: bool) -> None:
    model = built(name)
    plan = networks.random_plan(trace(model, images(2)), 0)
    found, outputs = [], []
    for device in (DEVICE, CPU):
        dense = copy.deepcopy(model).to(device)
        small = cctorch.apply(copy.deepcopy(dense), plan).eval()
        found.append(cctorch.repair(small, dense, plan, batches(device, 4, 20), step=2, shortcuts=shortcuts))
        with torch.no_grad():
            outputs.append(small(images().to(device)))
    assert [fit.name for fit in found[0].layers] == [fit.name for fit in found[1].layers]
    for ours, theirs in zip(found[0].layers, found[1].layers, strict=True):
        assert (ours.samples, ours.unknowns) == (theirs.samples, theirs.unknowns)
        assert ours.after <= ours.before
        assert ours.before == pytest.approx(theirs.before, rel=1e-3, abs=1e-6)
        assert ours.after == pytest.approx(theirs.after, rel=1e-2, abs=1e-6)
    scale = float(outputs[1].abs().max())
    assert_same(*outputs, rtol=1e-2, atol=1e-2 * scale)


@pytest.mark.parametrize("layout", ["spatial", "tucker"])
def test_repair_of_other_layouts(layout: Literal["spatial", "tucker"]) -> None:
    model = built("padded resnet")
    layers = [
        LayerPlan(
            spec.name,
            "conv2d",
            spec.in_channels,
            spec.out_channels,
            rank=spec.out_channels // 2,
            layout=layout,
            rank_in=max(1, spec.in_channels // 2) if layout == "tucker" else None,
        )
        for spec in trace(model, images(2)).specs
        if spec.kind == "conv2d" and spec.kernel_height > 1
    ]
    plan = CompressionPlan("test", 0.5, layers)
    found = []
    for device in (DEVICE, CPU):
        dense = copy.deepcopy(model).to(device)
        small = cctorch.apply(copy.deepcopy(dense), plan).eval()
        found.append(cctorch.repair(small, dense, plan, batches(device, 4, 20), step=2))
    assert {layer.name for layer in layers} <= {fit.name for fit in found[0].layers}
    for ours, theirs in zip(found[0].layers, found[1].layers, strict=True):
        assert ours.name == theirs.name
        assert ours.after <= ours.before
        assert ours.after == pytest.approx(theirs.after, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repair_in_other_types(dtype: torch.dtype) -> None:
    """From batches on the CPU, as a loader gives them."""
    dense = placed(built("padded resnet")).to(dtype)
    plan = networks.random_plan(trace(built("padded resnet"), images(2)), 0)
    small = cctorch.apply(copy.deepcopy(dense), plan).eval()
    found = cctorch.repair(small, dense, plan, [(x.to(dtype), y) for x, y in batches(CPU, 4, 20)], step=2)
    assert found.layers
    assert all(fit.after <= fit.before for fit in found.layers)
    assert all(value.isfinite().all() for value in small.state_dict().values())


def test_repair_of_values_that_are_not_finite_changes_nothing() -> None:
    dense = placed(built("padded resnet"))
    plan = networks.random_plan(trace(built("padded resnet"), images(2)), 0)
    small = cctorch.apply(copy.deepcopy(dense), plan).eval()
    before = copy.deepcopy(small)
    data = batches(DEVICE)
    data[1][0][3, 0, 2, 2] = float("nan")
    with pytest.raises(ValueError, match=r"repair: layer '.*': .*NaN or infinite"):
        cctorch.repair(small, dense, plan, data)
    assert_same_state(small, before)


def test_statistics_are_reestimated() -> None:
    model = built("padded resnet")
    ours = placed(model)
    batch_norm.reestimate(ours, batches(CPU))
    batch_norm.reestimate(model, batches(CPU))
    assert_same_state(ours, model, rtol=1e-9, atol=1e-9)


def masked(model: nn.Module, mask: MaskPlan | None, bits: int | None) -> CompressionPlan:
    specs = [s for s in trace(model, images(2)).specs if s.kind in ("conv2d", "linear") and s.in_channels % 4 == 0]
    return CompressionPlan(
        layers=[LayerPlan(s.name, s.kind, s.in_channels, s.out_channels, mask=mask, bits=bits) for s in specs]
    )


PREPARED: dict[str, tuple[MaskPlan | None, int | None]] = {
    "magnitude": (MaskPlan("magnitude", 0.6), None),
    "nm": (MaskPlan("nm", n=2, m=4), None),
    "channel": (MaskPlan("channel", 0.5), None),
    "bits": (None, 4),
    "magnitude and bits": (MaskPlan("magnitude", 0.6), 4),
}


@pytest.mark.parametrize("kind", PREPARED)
@pytest.mark.parametrize("name", ["padded resnet", "attention"])
def test_prepare_train_and_convert(name: str, kind: str) -> None:
    model = built(name)
    plan = masked(model, *PREPARED[kind])
    ours, theirs = cctorch.prepare(placed(model), plan), cctorch.prepare(copy.deepcopy(model), plan)
    assert {tensor.device.type for key, tensor in ours.state_dict().items() if "_extra_state" not in key} == {
        DEVICE.type
    }
    assert_same_state(ours, theirs, rtol=1e-12, atol=1e-12)
    ours.train()
    optimizer = torch.optim.SGD(ours.parameters(), 0.01)
    stepped(ours, optimizer, DEVICE)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())
    # To a CPU and back through a file.
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    theirs.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    with torch.no_grad():
        y = theirs.eval()(images())
        assert_same(ours.eval()(images().to(DEVICE)), y, rtol=1e-6, atol=1e-6 * float(y.abs().max()))
        converted = cctorch.convert(ours)
        assert not any(isinstance(m, Mask | FakeQuant | LowRankWeight) for m in converted.modules())
        assert_same(converted(images().to(DEVICE)), y, rtol=1e-6, atol=1e-6 * float(y.abs().max()))


def test_prepare_a_smaller_model() -> None:
    model = placed(built("padded resnet"))
    plan = networks.random_plan(trace(built("padded resnet"), images(2)), 0)
    cctorch.apply(model, plan)
    for layer in plan.layers:
        if layer.kind in ("conv2d", "linear"):
            layer.mask, layer.bits = MaskPlan("magnitude", 0.5), 4
    cctorch.prepare(model, plan)
    F.cross_entropy(model.train()(images().to(DEVICE)), torch.arange(6, device=DEVICE)).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_state_of_a_compressed_model_goes_to_a_cpu_and_back() -> None:
    model = built("padded resnet")
    plan = networks.random_plan(trace(model, images(2)), 0)
    ours = cctorch.apply(placed(model), plan)
    theirs = cctorch.apply(copy.deepcopy(model), CompressionPlan.from_json(plan.to_json()))
    for parameter in theirs.parameters():
        parameter.data.zero_()
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        y = theirs.eval()(images())
        assert_same(ours.eval()(images().to(DEVICE)), y, rtol=1e-9, atol=1e-9)
        assert_same(placed(theirs)(images().to(DEVICE)), y, rtol=1e-9, atol=1e-9)


def test_a_compressed_model_in_a_captured_graph() -> None:
    if DEVICE.type != "cuda":
        pytest.skip("of CUDA graphs")
    model = placed(built("padded resnet")).float()
    cctorch.apply(model, networks.random_plan(trace(built("padded resnet"), images(2)), 0))
    x = images().to(DEVICE).float()
    with torch.no_grad():
        for _ in range(3):
            model(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        x.copy_(images(seed=5))
        graph.replay()
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_a_compressed_model_compiles(backend: str) -> None:
    torch._dynamo.reset()
    model = placed(built("padded resnet"))
    cctorch.apply(model, networks.random_plan(trace(built("padded resnet"), images(2)), 0))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = images().to(DEVICE)
    torch.testing.assert_close(compiled(x), model(x))


def test_export_on_the_device() -> None:
    model = placed(built("padded resnet"))
    cctorch.apply(model, networks.random_plan(trace(built("padded resnet"), images(2)), 0))
    x = images().to(DEVICE)
    program = torch.export.export(model.eval(), (x,)).module()
    torch.testing.assert_close(program(x), model(x))


@pytest.mark.parametrize("tf32", [False, True])
def test_a_program_of_the_device(tf32: bool, tmp_path: Path) -> None:
    """TF32, which is how torch convolves unless told otherwise, is no reason to refuse the program."""
    torch.backends.cudnn.allow_tf32 = tf32  # which the fixture puts back
    model = placed(built("padded resnet")).float()
    cctorch.apply(model, networks.random_plan(trace(built("padded resnet"), images(2)), 0))
    x = images().to(DEVICE).float()
    save_program(model, x, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(x[:3]), model(x[:3]), rtol=0.02, atol=0.02)


def test_a_quantized_program_of_the_device(tmp_path: Path) -> None:
    model = placed(built("padded resnet")).float()
    cctorch.prepare(model, masked(built("padded resnet"), MaskPlan("magnitude", 0.5), 4))
    x = images().to(DEVICE).float()
    save_program(model, x, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x), rtol=1e-3, atol=1e-3)
