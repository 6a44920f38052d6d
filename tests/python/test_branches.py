"""Whole residual branches: found, removed, repaired, and chosen under a budget of latency."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cctorch
import networks
import pytest
import torch
import torch.nn.functional as F
from cctorch import _C, CompressionPlan, branches, checkpoint, collaborative, importance, measure
from cctorch.graph import Branch, trace
from cctorch.latency import LatencyTable
from fake_timer import FakeTimer
from torch import Tensor, nn


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(12)
        self.conv1 = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return self.head(x.mean((2, 3)))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.up, self.down = nn.Linear(8, 20), nn.Linear(20, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(1))


class Normalized(Mlp):
    """A layer normalization would be left over."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.down(F.gelu(self.up(self.norm(x))))).mean(1))


class Bottleneck(nn.Module):
    """Strided, with a projection as the shortcut, a depthwise convolution inside, and an activation behind the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, (3, 5), 2, (1, 2), groups=6, bias=False), nn.BatchNorm2d(6)
        self.conv3, self.bn3 = nn.Conv2d(6, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.projection = nn.Conv2d(8, 16, 1, 2)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = torch.sigmoid(self.bn3(self.conv3(y)))
        return self.head(F.relu(y + self.projection(x)).mean((2, 3)))


class Grouped(nn.Module):
    """As in ResNeXt: of the layers inside, one can only be left as it is, or go with the others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 6, 3, padding=1, groups=3, bias=False), nn.BatchNorm2d(6)
        self.conv3, self.bn3 = nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.conv4, self.conv5 = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y))))))
        return self.head((x + self.conv5(F.relu(self.conv4(x)))).mean((2, 3)))


class Ends(nn.Module):
    """Branches that end in a grouped convolution, and in a normalization behind an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.conv2 = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 3, padding=1, groups=2)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv2(F.relu(self.conv1(x)))
        return self.head((x + self.bn3(F.relu(self.conv3(x)))).mean((2, 3)))


class Parallel(nn.Module):
    """Two branches on one shortcut, of which the second is no longer than the first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.conv2 = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.conv2(F.relu(self.conv1(x))) + self.conv3(x)).mean((2, 3)))


class InPlace(nn.Module):
    """As in torchvision: activations, and the additions, overwrite what a layer gave."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.conv4 = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x
        x = self.relu(y)
        y = self.conv4(self.relu(self.conv3(x)))
        y += x
        return self.head(y.mean((2, 3)))


class Gated(nn.Module):
    """Pools within the branch, which PyTorch refuses to do without channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.conv2(F.max_pool2d(self.conv1(x), 3, 1, 1))).mean((2, 3)))


class Observed(PreActivation):
    """What is inside the branch is read outside too."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu(self.bn2(self.conv1(F.relu(self.bn1(x)))))
        return self.head((x + self.conv2(y)).mean((2, 3))) + y.mean()


class Chain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4))


IMAGES = (3, 8, 8)
FOUND: dict[type[nn.Module], tuple[tuple[int, ...], list[tuple[list[str], str]]]] = {
    networks.PaddedResNet: (
        IMAGES,
        [
            ([f"{block}.{layer}" for layer in ("conv1", "bn1", "conv2", "bn2")], f"{block}.conv2")
            for block in ("layer1.0", "layer1.1", "layer2.0", "layer2.1")
        ],
    ),
    PreActivation: (IMAGES, [(["bn1", "conv1", "bn2", "conv2"], "conv2")]),
    Mlp: ((5, 6), [(["up", "down"], "down")]),
    Normalized: ((5, 6), []),
    Bottleneck: (IMAGES, [(["conv1", "bn1", "conv2", "bn2", "conv3", "bn3"], "conv3")]),
    Grouped: (IMAGES, [(["conv1", "bn1", "conv2", "bn2", "conv3", "bn3"], "conv3"), (["conv4", "conv5"], "conv4")]),
    Ends: (IMAGES, [(["conv1", "conv2"], "conv1"), (["conv3", "bn3"], "conv3")]),
    Parallel: (IMAGES, [(["conv1", "conv2"], "conv2"), (["conv3"], "conv3")]),
    InPlace: (IMAGES, [(["conv1", "bn1", "conv2", "bn2"], "conv2"), (["conv3", "conv4"], "conv4")]),
    Gated: (IMAGES, [(["conv1", "conv2"], "conv2")]),
    Observed: (IMAGES, [(["conv2"], "conv2")]),
    Chain: (IMAGES, []),
}
REMOVABLE = [networks.PaddedResNet, PreActivation, Mlp, Bottleneck, Grouped, Ends, Parallel, InPlace, Observed]


def made(network: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return networks.randomized(network(), 0), torch.randn(4, *FOUND[network][0], dtype=torch.float64)


def without(model: nn.Module, found: list[Branch], x: Tensor) -> Tensor:
    """What the dense model gives where a constant takes the place of the ends' outputs: the reference."""

    def constant(layer: Any, _: object, y: Tensor) -> Tensor:
        bias = (
            torch.zeros(y.shape[-1] if isinstance(layer, nn.Linear) else y.shape[1])
            if layer.bias is None
            else layer.bias
        )
        return y * 0 + (bias if isinstance(layer, nn.Linear) else bias[:, None, None])

    handles = [model.get_submodule(branch.end).register_forward_hook(constant) for branch in found]
    expected: Tensor = model(x)
    for handle in handles:
        handle.remove()
    return expected


def emptied(
    model: nn.Module, x: Tensor, branch: int = 0, *, others: bool = False
) -> tuple[CompressionPlan, list[Branch]]:
    """A plan without one branch; with `others`, the layers outside of it lose channels as well."""
    graph = trace(model, x)
    removed = [graph.branches[branch]]
    plan = networks.random_plan(graph, 0, ranks=False) if others else CompressionPlan()
    branches.remove(plan, removed, graph)
    graph.channels.resolve(plan)
    return plan, removed


@pytest.mark.parametrize("network", FOUND)
def test_branches_are_what_one_operand_alone_depends_on(network: type[nn.Module]) -> None:
    model, x = made(network)
    found = [(list(branch.layers), branch.key) for branch in trace(model, x).branches]
    assert found == FOUND[network][1]


def test_a_layer_of_a_branch_that_is_left_alone_keeps_the_branch() -> None:
    model, x = made(PreActivation)
    model.get_submodule("conv1").register_forward_hook(lambda *_: None)
    assert [branch.layers for branch in trace(model, x).branches] == []


@pytest.mark.parametrize("network", REMOVABLE)
def test_the_rebuilt_model_computes_the_dense_one_with_a_constant(network: type[nn.Module]) -> None:
    model, x = made(network)
    plan, removed = emptied(model, x)
    expected = without(model, removed, x)
    smaller = cctorch.apply(copy.deepcopy(model), CompressionPlan.from_json(plan.to_json()))
    torch.testing.assert_close(smaller(x), expected, rtol=1e-9, atol=1e-9)
    for name in removed[0].layers:
        assert isinstance(smaller.get_submodule(name), cctorch.nn.Constant)
    assert [name for name in smaller.state_dict() if name.startswith(tuple(removed[0].layers))] == [
        f"{removed[0].end}.bias"
    ]
    # In training too; every parameter takes part.
    smaller.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in smaller.parameters())


@pytest.mark.parametrize("network", REMOVABLE)
def test_multiply_accumulates_of_a_removed_branch_are_gone(network: type[nn.Module]) -> None:
    model, x = made(network)
    plan, removed = emptied(model, x)
    specs = trace(model, x).specs
    expected = sum(spec.macs for spec in specs if spec.name not in removed[0].layers)
    assert _C.final_macs(specs, plan) == _C.nominal_macs(specs, plan) == expected
    assert sum(spec.macs for spec in trace(cctorch.apply(copy.deepcopy(model), plan), x).specs) == expected


def test_other_layers_are_pruned_beside_a_removed_branch() -> None:
    model, x = made(networks.PaddedResNet)
    plan, removed = emptied(model, x, others=True)
    assert any(0 < len(layer.kept_in) < layer.in_channels for layer in plan.layers)
    masked = copy.deepcopy(model)
    for layer in plan.layers:
        if layer.kind in ("conv2d", "linear") and layer.kept_in:
            weight: Any = masked.get_submodule(layer.name).weight
            gone = [channel for channel in range(layer.in_channels) if channel not in layer.kept_in]
            weight.data[:, gone] = 0
    smaller = cctorch.apply(copy.deepcopy(model), plan)
    torch.testing.assert_close(smaller(x), without(masked, removed, x), rtol=1e-9, atol=1e-9)


def test_a_checkpoint_of_a_model_without_a_branch_loads(tmp_path: Path) -> None:
    model, x = made(networks.PaddedResNet)
    plan, _ = emptied(model, x)
    smaller = cctorch.apply(copy.deepcopy(model), plan)
    with torch.no_grad():
        smaller.get_parameter("layer1.0.bn2.bias").add_(1.0)
    checkpoint.save(tmp_path / "model.h5", smaller.state_dict(), plan=plan, codec="zstd")
    loaded = checkpoint.load(tmp_path / "model.h5")
    again = cctorch.apply(copy.deepcopy(model), loaded.compression_plan())
    again.load_state_dict(loaded.tensors)
    torch.testing.assert_close(again(x), smaller(x), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_goes_on_without_the_branch(kind: Any) -> None:
    model, x = made(networks.PaddedResNet)
    model.train()
    optimizer = kind(model.parameters(), lr=0.01, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    model(x).square().sum().backward()
    optimizer.step()
    bias = model.get_parameter("layer1.0.bn2.bias")
    before = {name: value.clone() for name, value in optimizer.state[bias].items()}
    plan, _ = emptied(model, x)
    cctorch.apply(model, plan, optimizer)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in model.parameters()]
    after = optimizer.state[model.get_parameter("layer1.0.bn2.bias")]
    assert after.keys() == before.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value)
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("network", REMOVABLE)
def test_an_exported_program_runs_at_another_batch(network: type[nn.Module]) -> None:
    model, x = made(network)
    plan, _ = emptied(model, x)
    smaller = cctorch.apply(copy.deepcopy(model), plan)
    program = torch.export.export(smaller, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    other = torch.cat([x, x])
    torch.testing.assert_close(program.module()(other), smaller(other))


@pytest.mark.parametrize(
    ("network", "branch"),
    [(each, 0) for each in (networks.PaddedResNet, PreActivation, Bottleneck, Grouped, Ends, InPlace)]
    + [(each, 1) for each in (Grouped, Ends, Parallel)],
)
@torch.no_grad()
def test_repair_makes_the_constant_the_mean_of_what_the_sum_lacks(network: type[nn.Module], branch: int) -> None:
    """With nothing else changed before the addition: the mean of the branch; in float64, by position."""
    model, x = made(network)
    plan, removed = emptied(model, x, branch)
    outputs: list[Tensor] = []
    end = model.get_submodule(removed[0].end)
    handle = end.register_forward_hook(lambda _, __, y: outputs.append(y.clone()))
    model(x)
    handle.remove()
    smaller = cctorch.apply(copy.deepcopy(model), plan)
    found = cctorch.repair(smaller, model, plan, [(x, torch.zeros(4))], step=1)
    bias = smaller.get_parameter(f"{removed[0].end}.bias")
    torch.testing.assert_close(bias, outputs[0].mean((0, 2, 3)))
    fit = next(layer for layer in found.layers if layer.name == removed[0].end)
    spread = (outputs[0] - outputs[0].mean((0, 2, 3), keepdim=True)).square().sum()
    far = outputs[0] - (end.bias if end.bias is not None else torch.zeros(1)).reshape(-1, 1, 1)  # type: ignore[union-attr, operator]
    assert fit.after == 1.0
    assert fit.before == pytest.approx(float(far.square().sum() / spread))


@torch.no_grad()
def test_repair_of_a_removed_branch_of_linear_layers() -> None:
    model, x = made(Mlp)
    plan, removed = emptied(model, x)
    outputs: list[Tensor] = []
    handle = model.get_submodule(removed[0].end).register_forward_hook(lambda _, __, y: outputs.append(y.clone()))
    model(x)
    handle.remove()
    smaller = cctorch.apply(copy.deepcopy(model), plan)
    before = float((smaller(x) - model(x)).square().mean())
    cctorch.repair(smaller, model, plan, [(x, torch.zeros(4))], step=1)
    torch.testing.assert_close(smaller.get_parameter("down.bias"), outputs[0].mean((0, 1)))
    assert float((smaller(x) - model(x)).square().mean()) < before


@torch.no_grad()
def test_layers_behind_a_removed_branch_make_up_for_it() -> None:
    model, x = made(networks.PaddedResNet)
    plan, _ = emptied(model, x)
    smaller = cctorch.apply(copy.deepcopy(model), plan)
    before = float((smaller(x) - model(x)).square().mean())
    found = cctorch.repair(smaller, model, plan, [(x, torch.zeros(4))], step=1)
    assert float((smaller(x) - model(x)).square().mean()) < 0.5 * before
    names = [layer.name for layer in found.layers]
    assert names[0] == "layer1.0.bn2"
    assert {"layer1.1.conv1", "linear"} < set(names)
    assert not {"layer1.0.conv1", "layer1.0.conv2"} & set(names)


def test_a_branch_that_cannot_do_without_channels_stays() -> None:
    model, x = made(Gated)
    graph = trace(model, x)
    assert branches.removable(model, graph, graph.branches, x) == []
    model, x = made(networks.PaddedResNet)
    graph = trace(model, x)
    assert branches.removable(model, graph, graph.branches, x) == graph.branches


def test_a_trial_under_autocast() -> None:
    model, x = made(InPlace)
    model, x = model.float(), x.float()
    graph = trace(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert branches.removable(model, graph, graph.branches, x) == graph.branches


def test_branches_of_a_network_that_changes_tensors_in_place() -> None:
    model, x = made(InPlace)
    graph = trace(model, x)
    assert branches.removable(model, graph, graph.branches, x) == graph.branches
    layers = ["stem", "bn2", "conv4"]
    data = [(x, torch.tensor([0, 1, 2, 3]))]
    assert importance.importances(model, data, {layer: layer for layer in layers}).keys() == set(layers)


@pytest.mark.parametrize("network", [InPlace, PreActivation])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_constant_has_the_layout_and_the_dtype_of_what_it_stands_for(
    network: type[nn.Module], layout: torch.memory_format, dtype: torch.dtype
) -> None:
    model, x = made(network)
    plan, removed = emptied(model, x)
    smaller = cctorch.apply(copy.deepcopy(model), plan)
    outputs: list[Tensor] = []
    for each in (model, smaller):
        each.to(dtype, memory_format=layout)  # type: ignore[call-overload]
        each.get_submodule(removed[0].end).register_forward_hook(lambda _, __, y: outputs.append(y))
        each(x.to(dtype, memory_format=layout))
    dense, constant = outputs
    assert (constant.stride(), constant.dtype) == (dense.stride(), dense.dtype)


def test_a_constant_has_the_dtype_of_autocast() -> None:
    model, x = made(InPlace)
    plan, removed = emptied(model, x)
    smaller = cctorch.apply(model, plan).float()
    outputs: list[Tensor] = []
    smaller.get_submodule(removed[0].end).register_forward_hook(lambda _, __, y: outputs.append(y))
    with torch.autocast("cpu", torch.bfloat16):
        smaller(x.float())
    assert outputs[0].dtype == torch.bfloat16


@pytest.mark.parametrize("network", [InPlace, PreActivation])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_by_example_and_several_models_at_once(network: type[nn.Module], layout: torch.memory_format) -> None:
    model, x = made(network)
    plan, removed = emptied(model, x)
    smaller = cctorch.apply(model, plan).to(memory_format=layout)  # type: ignore[call-overload]
    parameters = {name: parameter.detach() for name, parameter in smaller.named_parameters()}

    def loss(parameters: dict[str, Tensor], example: Tensor) -> Tensor:
        total: Tensor = torch.func.functional_call(smaller, parameters, (example[None],)).square().sum()
        return total

    found = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for index, example in enumerate(x):
        smaller.zero_grad()
        smaller(example[None]).square().sum().backward()
        for name, parameter in smaller.named_parameters():
            torch.testing.assert_close(found[name][index], parameter.grad)
    other = copy.deepcopy(smaller)
    other.get_parameter(f"{removed[0].end}.bias").data.add_(1.0)
    stacked, buffers = torch.func.stack_module_state([smaller, other])  # type: ignore[no-untyped-call]
    both = torch.vmap(lambda *state: torch.func.functional_call(smaller, state, (x,)))(stacked, buffers)
    torch.testing.assert_close(both, torch.stack([smaller(x), other(x)]))


@torch.no_grad()
def test_importance_is_how_much_the_loss_rises() -> None:
    model, x = made(networks.PaddedResNet)
    wanted = model(x)
    data = [(x[:3], wanted[:3]), (x[3:], wanted[3:])]
    ends = ["layer1.0.bn2", "layer2.0.bn2", "linear"]
    found = importance.importances(model, data, {f"of {end}": end for end in ends}, loss=F.mse_loss)

    def loss(layer: str | None) -> float:
        total = 0.0
        for inputs, targets in data:
            handle = None
            if layer is not None:
                handle = model.get_submodule(layer).register_forward_hook(
                    lambda _, __, y: y * 0 + y.mean((0, *range(2, y.dim())), keepdim=True)
                )
            total += float((model(inputs) - targets).square().sum()) / targets.shape[1]
            if handle is not None:
                handle.remove()
        return total / len(x)

    rises = {end: loss(end) - loss(None) for end in ends}
    most = max(rises.values())
    assert most > 0
    for end in ends:
        assert found[f"of {end}"] == pytest.approx(max(rises[end], 1e-3 * most))


def test_importance_of_a_network_that_nothing_harms() -> None:
    model, x = made(networks.PaddedResNet)
    constant = lambda outputs, _: outputs.sum() * 0  # noqa: E731
    found = importance.importances(
        model, [(x, torch.zeros(4).long())], {"linear": "linear", "conv1": "conv1"}, loss=constant
    )
    assert found == {"linear": 1.0, "conv1": 1.0}


def test_importance_needs_images() -> None:
    model, _ = made(networks.PaddedResNet)
    with pytest.raises(ValueError, match="`batches` is empty, expected training images to tell how much each layer"):
        importance.importances(model, [], {"linear": "linear"})


def test_the_first_images_are_remembered_of_batches_that_are_read_once() -> None:
    def once() -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, 500, 100):
            yield torch.arange(first, first + 100).float(), torch.arange(first, first + 100)

    head = importance.Head(once())
    assert sum(len(labels) for _, labels in head) == 500
    assert torch.equal(torch.cat([labels for _, labels in head.read()]), torch.arange(importance.IMAGES))
    unread = importance.Head(once())
    assert torch.equal(torch.cat([labels for _, labels in unread.read()]), torch.arange(importance.IMAGES))


class Trained(nn.Module):
    """Of its two residual branches the first computes next to nothing."""

    def __init__(self, *, quiet: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)) for _ in range(2)
        )
        self.head = nn.Linear(32, 10)
        with torch.no_grad():
            self.blocks[quiet][2].weight.mul_(1e-3)  # type: ignore[index, union-attr, operator]
            self.blocks[1 - quiet][2].weight.mul_(5)  # type: ignore[index, union-attr, operator]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measure, "seconds_of_others", lambda: 0.0)


def compressed(quiet: int, **options: Any) -> tuple[nn.Module, collaborative.Compression]:
    """On a device where calls are dear, so that fewer channels hardly save time."""
    torch.manual_seed(0)
    model = Trained(quiet=quiet)
    images = torch.randn(64, 3, 8, 8)
    data = [(images, model(images).argmax(1))]
    table = LatencyTable(batch=4, timer=FakeTimer(launch=1e-3))
    settings = {"target": 0.28, "budget": "latency", "latency_table": table} | options
    return model, cctorch.compress(model, data, images[:2], **settings)


@pytest.mark.parametrize("quiet", [0, 1])
@pytest.mark.usefixtures("cache")
def test_the_branch_that_matters_least_goes_whole(quiet: int) -> None:
    model, found = compressed(quiet)
    removed = {layer.name for layer in found.plan.layers if not layer.kept_in}
    assert removed == {f"blocks.{quiet}.0", f"blocks.{quiet}.2"}
    assert found.latency is not None
    assert found.latency.ratio <= 0.72
    assert found.latency.predicted_ratio == pytest.approx(found.latency.ratio, rel=1e-6)
    smaller = cctorch.apply(copy.deepcopy(model), found.plan)
    assert smaller(torch.randn(2, 3, 8, 8)).shape == (2, 10)


@pytest.mark.usefixtures("cache")
def test_no_branch_goes_with_a_grouped_convolution_that_a_user_keeps() -> None:
    """Which is never searched, and can only go with its branch."""
    torch.manual_seed(0)
    model, images = Grouped().eval(), torch.randn(8, *IMAGES)
    data = [(images, torch.arange(8) % 4)]

    def removed(**options: Any) -> set[str]:
        table = LatencyTable(batch=4, timer=FakeTimer(launch=1e-3))
        settings = {"target": 0.1, "budget": "latency", "latency_table": table} | options
        found = cctorch.compress(model, data, images[:2], **settings)
        return {layer.name for layer in found.plan.layers if not layer.kept_in}

    first, second = {"conv1", "bn1", "conv2", "bn2", "conv3", "bn3"}, {"conv4", "conv5"}
    assert removed() == removed(exclude=["conv5"]) == first
    assert removed(exclude=["conv2"]) == removed(bounds={"conv2": 0.5}) == second


@pytest.mark.parametrize(
    "options",
    [
        {"residual_branches": False},
        {"exclude": ["blocks.0.0", "blocks.1.2"]},
        {"bounds": {"blocks.*": 0.9}},
    ],
)
@pytest.mark.usefixtures("cache")
def test_no_branch_goes_that_a_user_keeps(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"lower the target|cannot be reached"):
        compressed(0, **options)
    _, found = compressed(0, target=0.02, **options)
    assert all(layer.kept_in for layer in found.plan.layers)
