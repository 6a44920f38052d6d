"""What surrounds training on the device: modules, times, checkpoints, data, one rank of NCCL."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cctorch import _C, data, latency, measure, models, sharding, state
from cctorch import nn as cnn
from cctorch.config import Training
from cctorch.graph import trace
from cctorch.latency import LatencyTable, LayerShape
from cctorch.nn.synchronized import synchronized_batch_norm
from cctorch.step import GraphedStep, Step, make_step
from cctorch.train import make_criterion, make_optimizer, momentum_by_name, restore_momentum
from placed import CPU, DEVICE, assert_same, assert_same_state, needs_device, placed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

pytestmark = needs_device


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


QUANTIZERS: dict[str, Callable[[], cnn.FakeQuant]] = {
    "tensor": lambda: cnn.FakeQuant(4),
    "channels": lambda: cnn.FakeQuant(4, axis=1, channels=8),
    "unsigned": lambda: cnn.FakeQuant(8, signed=False),
    "offset": lambda: cnn.FakeQuant(4, offset=True, init="minmax"),
    "mse": lambda: cnn.FakeQuant(4, axis=0, channels=6, init="mse"),
    "offset by mse": lambda: cnn.FakeQuant(4, axis=0, channels=6, offset=True, init="mse"),
    "groups": lambda: cnn.FakeQuant(4, axis=0, channels=6, groups=4, offset=True, init="minmax"),
}


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_fake_quant(name: str, dtype: torch.dtype) -> None:
    x = drawn(6, 8, 4, 4, dtype=dtype)
    found = []
    for device in (DEVICE, CPU):
        module = QUANTIZERS[name]().to(device, torch.float64 if dtype == torch.float64 else torch.float32)
        leaf = x.to(device).requires_grad_()
        y = module(leaf)
        y.float().square().sum().backward()
        grads = [p.grad for p in module.parameters()]
        module.load_state_dict(copy.deepcopy(module.state_dict()))
        assert torch.equal(module(leaf.detach()), y)
        found.append([y, leaf.grad, *module.parameters(), *grads])
    # In bfloat16 a value may lie on the edge of two levels.
    shares = [(a.cpu().double() - b.double()).abs() for a, b in zip(*found, strict=True)]
    for share, wanted in zip(shares, found[1], strict=True):
        close = share <= 1e-4 * (1 + wanted.double().abs())
        assert close.double().mean() >= (1.0 if dtype == torch.float64 else 0.9)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "gate": lambda: cnn.ChannelGate(8),
    "hard concrete": lambda: cnn.HardConcreteGate(8).eval(),
    "gather": lambda: cnn.GatherChannels([0, 3, 5], nn.Conv2d(3, 4, 3)),
    "gather of a linear layer": lambda: nn.Sequential(cnn.GatherChannels([0, 3], cnn.LowRankLinear(2, 4, 1))),
    "low rank": lambda: cnn.LowRankConv2d(8, 6, 4, 3, padding=1),
    "low rank, spatial": lambda: cnn.LowRankConv2d(8, 6, 4, 3, padding="same", layout="spatial"),
    "low rank, tucker": lambda: cnn.LowRankConv2d(8, 6, (4, 3), 3, padding=1, padding_mode="reflect", layout="tucker"),
    "batch norm": lambda: cnn.BatchNorm2d(8),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_modules(name: str, memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    module = MODULES[name]().double()
    on_device = placed(module)
    for step in range(2):
        x = drawn(5, 8, 6, 8, seed=step).contiguous(memory_format=memory_format)
        y, wanted = on_device(x.to(DEVICE)), module(x)
        assert_same(y, wanted, rtol=1e-9, atol=1e-9)
        y.square().sum().backward()
        wanted.square().sum().backward()
        for ours, theirs in zip(on_device.parameters(), module.parameters(), strict=True):
            assert_same(ours.grad, theirs.grad, rtol=1e-8, atol=1e-8)
    assert_same_state(on_device, module, rtol=1e-9, atol=1e-9)


def test_gates_are_drawn_on_the_device() -> None:
    gate = cnn.HardConcreteGate(1000, device=DEVICE)
    x = torch.ones(1, 1000, 1, 1, device=DEVICE)
    first, second = gate(x), gate(x)
    assert first.device.type == DEVICE.type
    assert not torch.equal(first, second)
    assert float(gate.expected_l0()) == pytest.approx(900, rel=1e-3)
    assert 800 < int((first != 0).sum()) < 980
    torch.manual_seed(0)
    again = gate(x)
    torch.manual_seed(0)
    assert torch.equal(gate(x), again)
    gate(x).sum().backward()


def test_a_soft_threshold_learns() -> None:
    grads = []
    for device in (DEVICE, CPU):
        torch.manual_seed(0)
        layer = nn.Linear(6, 4, bias=False).double().to(device)
        parametrize.register_parametrization(
            layer, "weight", cnn.SoftThreshold(0, 4, 0.1, device=device, dtype=torch.float64)
        )
        layer(drawn(3, 6).to(device)).square().sum().backward()
        grads.append([p.grad for p in layer.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        assert_same(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_synchronized_statistics_of_one_rank(memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    x = drawn(6, 5, 4, 3, dtype=dtype).to(DEVICE).contiguous(memory_format=memory_format).requires_grad_()
    weight, bias = (drawn(5, seed=s, dtype=dtype).to(DEVICE).requires_grad_() for s in (1, 2))
    mean, variance = torch.zeros(5, dtype=dtype, device=DEVICE), torch.ones(5, dtype=dtype, device=DEVICE)
    y, found_mean, found_variance = synchronized_batch_norm(x, weight, bias, 1e-5)
    wanted = F.batch_norm(x, mean, variance, weight, bias, training=True, momentum=1.0)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    seeds = drawn(6, 5, 4, 3, seed=3, dtype=dtype).to(DEVICE)
    pairs = [(y, wanted), (found_mean, mean), (found_variance, variance)]
    grads = [torch.autograd.grad(out, (x, weight, bias), seeds) for out in (y, wanted)]
    for ours, theirs in [*pairs, *zip(*grads, strict=True)]:
        torch.testing.assert_close(ours, theirs, rtol=10 * tolerance, atol=10 * tolerance)


# Times and tables


def test_times() -> None:
    model = placed(models.create("resnet8"))
    x = torch.randn(4, 3, 16, 16)
    assert measure.latency(model, x, repeats=3, warmup=1) > 0
    [first, second] = measure.interleaved([model, copy.deepcopy(model)], x.to(DEVICE), repeats=5)
    assert len(first) == len(second) >= 5
    assert min(first + second) > 0
    times = measure.layer_times(model, x, repeats=2, warmup=1)
    assert set(times) >= {"conv1", "layer1.0.conv1", "linear"}
    assert min(times.values()) > 0


def test_accuracy_of_batches_on_either_device() -> None:
    model = placed(models.create("resnet8")).eval()
    x = torch.randn(12, 3, 16, 16)
    with torch.no_grad():
        labels = model(x.to(DEVICE)).argmax(1).cpu()
    labels[:3] = (labels[:3] + 1) % 10
    for device in (DEVICE, CPU):
        assert measure.accuracy(model, [(x.to(device), labels.to(device))]) == pytest.approx(75.0)


def test_more_work_takes_more_time() -> None:
    if DEVICE.type == "cpu":
        pytest.skip("a device that works while the host goes on")
    small, large = nn.Conv2d(64, 64, 3).to(DEVICE), nn.Conv2d(64, 2048, 3).to(DEVICE)
    x = torch.randn(64, 64, 56, 56, device=DEVICE)
    runs = measure.interleaved([small, large], x, repeats=5)
    assert min(runs[1]) > 2 * min(runs[0])


SHAPES = [
    LayerShape("conv2d", 16, 32, (8, 8), (3, 3), padding=(1, 1)),
    LayerShape("conv2d", 8, 32, (8, 8), (3, 3), padding=(1, 1), rank=4, gathered_from=16),
    LayerShape("depthwise_conv2d", 16, 16, (8, 8), (3, 3), groups=16),
    LayerShape("linear", 64, 10, (), bias=True),
    LayerShape("linear", 32, 10, (7,), rank=4, gathered_from=64),
    LayerShape("batch_norm2d", 16, 16, (8, 8)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_latency_table(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measure, "seconds_of_others", lambda: 0.0)
    table = LatencyTable(DEVICE, dtype, torch.channels_last, 4)
    table.time(SHAPES)
    times = [table.seconds(shape) for shape in SHAPES]
    assert min(times) > 0
    assert max(times) < 1
    monkeypatch.setattr(latency.LatencyTable, "time", None)
    assert [LatencyTable(DEVICE, dtype, torch.channels_last, 4).seconds(shape) for shape in SHAPES] == times


def test_a_table_of_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measure, "seconds_of_others", lambda: 0.0)
    costs = LatencyTable(DEVICE).cost_table(LayerShape("conv2d", 32, 32, (8, 8), (3, 3)), [SHAPES[0]])
    assert isinstance(costs, _C.CostTable)


# Checkpoints


def test_hdf5(tmp_path: Path) -> None:
    pytest.importorskip("hdf5plugin")
    checkpoint = pytest.importorskip("cctorch.checkpoint")
    tensors = {
        "weight": drawn(70, 80, dtype=torch.float32).to(DEVICE),
        "last": drawn(8, 4, 3, 3, dtype=torch.float32).to(DEVICE).contiguous(memory_format=torch.channels_last),
        "half": drawn(30, 40, dtype=torch.bfloat16).to(DEVICE),
        "index": torch.arange(9, device=DEVICE),
        "mask": torch.ones(4, 5, dtype=torch.bool, device=DEVICE),
        "scalar": torch.ones((), device=DEVICE),
        "parameter": nn.Parameter(drawn(9, 9, dtype=torch.float32).to(DEVICE)),
        "cut": drawn(20, 30, dtype=torch.float32).to(DEVICE)[::2, 3:],
    }
    for codec in ("zstd", "sz3", "zfp"):
        checkpoint.save(tmp_path / "model.h5", tensors, codec=codec, error_bound=0.01)
        loaded = checkpoint.load(tmp_path / "model.h5").tensors
        for name, value in tensors.items():
            wanted, found = value.detach().cpu(), loaded[name]
            assert found.dtype == wanted.dtype
            bound = 0.0 if codec == "zstd" else 0.0101 * float(wanted.double().square().mean().sqrt())
            torch.testing.assert_close(found, wanted, rtol=0, atol=bound)


def trained(model: nn.Module, steps: int = 2) -> torch.optim.SGD:
    settings = Training(epochs=1, lr=0.1)
    optimizer = make_optimizer(model, settings)
    for step in range(steps):
        optimizer.zero_grad()
        x = drawn(4, 3, 12, 12, seed=step, dtype=torch.float32).to(DEVICE)
        F.cross_entropy(model(x), torch.arange(4, device=DEVICE)).backward()
        optimizer.step()
    return optimizer


def test_the_checkpoints_of_a_run(tmp_path: Path) -> None:
    model = placed(models.create("resnet8"))
    optimizer = trained(model)
    checkpoints = state.Checkpoints(tmp_path)
    before = copy.deepcopy(model.state_dict())
    tensors = {"model": model.state_dict(), "momentum": momentum_by_name(model, optimizer), "regularization": {}}
    checkpoints.save(state.State(), tensors)
    trained(model)  # while it is written
    checkpoints.wait()
    saved, damaged = checkpoints.newest()
    assert saved is not None
    assert not damaged
    other = placed(models.create("resnet8"))
    momentum = {name: torch.empty_like(p).detach() for name, p in other.named_parameters()}
    checkpoints.load(saved, {"model": other.state_dict(), "momentum": momentum, "regularization": {}})
    checkpoints.close()
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name]), name
    restored = make_optimizer(other, Training(epochs=1, lr=0.1))
    restore_momentum(other, restored, momentum)
    for name, value in momentum_by_name(other, restored).items():
        assert torch.equal(value, tensors["momentum"][name]), name


# Data and steps


def images(count: int = 20) -> data.ImageSet:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, 3, 12, 12), generator=generator, dtype=torch.uint8)
    return data.ImageSet(pixels, torch.arange(count) % 4)


@pytest.mark.parametrize("channels_last", [False, True])
def test_batches_are_those_of_a_cpu(channels_last: bool) -> None:
    sets = [data.Batches(images().to(d), 8, (0.5,) * 3, (0.25,) * 3, channels_last) for d in (DEVICE, CPU)]
    for ours, theirs in zip(sets[0].epoch(3, 1, True, 1), sets[1].epoch(3, 1, True, 1), strict=True):
        assert ours[0].stride() == theirs[0].stride()
        assert_same(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
        assert_same(ours[1], theirs[1])
    for batches in ([s.head(9, 0) for s in sets], [s.block(1, 3) for s in sets], [s.sliced(1, 3) for s in sets]):
        for ours, theirs in zip(*batches, strict=True):
            assert_same(ours[0], theirs[0], rtol=1e-6, atol=1e-6)


def stepped(settings: Training, model: nn.Module, steps: int = 9) -> list[float]:
    step = make_step(model, make_optimizer(model, settings), settings, make_criterion(settings))
    batches = data.Batches(images(8 * steps - 3).to(DEVICE), 8, (0.5,) * 3, (0.25,) * 3)
    model.train()
    losses = [step(x, y, 0.01 * (1 + i), 8) for i, (x, y) in enumerate(batches.epoch(0, 0, True))]
    assert isinstance(step, GraphedStep if settings.cuda_graphs and DEVICE.type == "cuda" else Step)
    return [float(loss.clone()) for loss in losses[-1:]] + [float(p.double().norm()) for p in model.parameters()]


class Wide(nn.Module):
    """Layers of ours, as they train: quantized, masked, gated, of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = cnn.BatchNorm2d(8)
        self.gate = cnn.ChannelGate(8)
        self.low = cnn.LowRankConv2d(8, 16, 4, 3, padding=1)
        self.quant = cnn.FakeQuant(4, axis=1, channels=16)
        self.head = nn.Linear(16, 4)
        parametrize.register_parametrization(self.conv1, "weight", cnn.SoftThreshold())
        parametrize.register_parametrization(self.head, "weight", cnn.Mask(torch.arange(64).view(4, 16) % 3 > 0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.low(F.relu(self.gate(self.bn(self.conv1(x)))))
        return self.head(self.quant(x).mean((2, 3)))


@pytest.mark.parametrize("bf16", [False, True])
def test_graphs_train_our_layers_as_single_kernels_do(bf16: bool) -> None:
    found = []
    for graphs in (False, True):
        torch.manual_seed(0)
        model = Wide()
        model(torch.randn(8, 3, 12, 12))  # the scales start
        model = placed(model)
        found.append(stepped(Training(epochs=1, lr=0.01, cuda_graphs=graphs, bf16=bf16, clip_grad_norm=1.0), model))
    assert found[1] == pytest.approx(found[0], rel=0.05 if bf16 else 1e-3)


def test_our_layers_train_as_on_a_cpu() -> None:
    torch.manual_seed(0)
    model = Wide().double()
    model(torch.randn(8, 3, 12, 12).double())
    found = []
    for device in (DEVICE, CPU):
        of_device = copy.deepcopy(model).to(device).train()
        optimizer = torch.optim.SGD(of_device.parameters(), 0.05, momentum=0.9)
        for step in range(4):
            optimizer.zero_grad()
            x = drawn(8, 3, 12, 12, seed=step).to(device)
            F.cross_entropy(of_device(x), torch.arange(8, device=device) % 4).backward()
            optimizer.step()
        found.append(of_device)
    assert_same_state(*found, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["resnet20", "vgg16", "densenet40", "googlenet", "resnet50", "mobilenet_v2"])
def test_networks_that_configurations_name(name: str) -> None:
    torch.manual_seed(0)
    model = models.create(name).eval()
    size = 64 if name in ("resnet50", "mobilenet_v2") else 32
    x = drawn(2, 3, size, size, dtype=torch.float32)
    with torch.no_grad():
        wanted = model(x)
        on_device = placed(model)
        y = on_device(x.to(DEVICE))
        assert_same(y, wanted, rtol=1e-3, atol=1e-3 * max(1.0, float(wanted.abs().max())))
    assert trace(on_device, x.to(DEVICE)).specs
    assert math.isfinite(float(y.sum()))


# One rank of NCCL


@pytest.fixture
def alone() -> Iterator[None]:
    backends = "cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo"
    if DEVICE.type == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(backends, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def one_step(model: nn.Module) -> None:
    trained(model, 1)


def test_a_rank_that_averages_gradients(alone: None) -> None:
    torch.manual_seed(0)
    plain = placed(models.create("resnet8"))
    wrapped = DistributedDataParallel(copy.deepcopy(plain), [DEVICE] if DEVICE.type == "cuda" else None)
    for model in (plain, wrapped):
        one_step(model)
    assert_same_state(wrapped.module, plain, rtol=1e-4, atol=1e-5)


def test_a_rank_with_all_shards(alone: None) -> None:
    torch.manual_seed(0)
    plain = models.create("resnet8")
    shards = sharding.shard(copy.deepcopy(plain), DEVICE)
    assert sharding.is_sharded(shards)
    plain = placed(plain)
    for model in (plain, shards):
        one_step(model)
    for name, value in sharding.gathered(shards.state_dict()).items():
        torch.testing.assert_close(value, plain.state_dict()[name].cpu(), rtol=1e-4, atol=1e-5)
    parameters = dict(shards.named_parameters())
    again = {name: sharding.spread(value.detach(), parameters[name]) for name, value in plain.named_parameters()}
    for name, value in sharding.gathered(again).items():
        assert torch.equal(value, dict(plain.named_parameters())[name].cpu())
