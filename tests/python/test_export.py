import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cctorch
import pytest
import torch
import torch.nn.functional as F
from cctorch._C import CompressionPlan, LayerPlan, MaskPlan
from cctorch.apply import apply
from cctorch.export import _traced, save_program
from cctorch.graph import trace
from cctorch.nn import ChannelGate, FakeQuant, HardConcreteGate, LowRankConv2d, LowRankLinear, SoftThreshold
from cctorch.ops import binary_quant, fp8_quant, pact, sigmoid_gate
from cctorch.prepare import prepare
from networks import PaddedResNet, Vgg, random_plan, randomized
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrize

RUN = """
import sys, torch
program = torch.export.load(sys.argv[1])
x = torch.load(sys.argv[2], weights_only=True)
assert "cctorch" not in sys.modules
torch.save(program.module()(x), sys.argv[3])
"""


def run_elsewhere(program: Path, x: Tensor) -> Tensor:
    """The program's output in a process that cannot know cctorch."""
    given, result = program.with_name("x.pt"), program.with_name("y.pt")
    torch.save(x, given)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", RUN, str(program), str(given), str(result)]
    subprocess.run(command, check=True, cwd=program.parent, env=environment, timeout=300)
    return torch.load(result, weights_only=True)


class EveryModule(nn.Module):
    """Everything that runs on an op of cctorch, unconverted."""

    def __init__(self) -> None:
        super().__init__()
        self.features = randomized(Vgg())
        self.gate = ChannelGate(3)
        self.activations = FakeQuant(8, signed=False)
        self.shifted = FakeQuant(8, offset=True, init="mse")
        self.head = LowRankLinear(5, 4, 2)
        self.last = nn.Linear(4, 6)
        parametrize.register_parametrization(self.last, "weight", SoftThreshold(0, 6, 0.2))
        parametrize.register_parametrization(
            self.last, "weight", FakeQuant(4, axis=0, channels=6, groups=2, offset=True)
        )
        self.random = HardConcreteGate(6)
        self.logit = nn.Parameter(torch.randn(6))
        self.log_alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.shifted(self.activations(torch.relu(self.features(self.gate(x)))))
        y = pact(self.last(self.head(y)), self.log_alpha, 4)
        return sigmoid_gate(self.random(y), self.logit, 0.5)


def test_compressed_and_prepared_model_runs_without_cctorch_at_any_batch_size(tmp_path: Path) -> None:
    model = EveryModule().double().train()
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    model(x)
    graph = trace(model, x)
    plan = random_plan(graph, 1)
    apply(model, plan)
    prepare(
        model,
        CompressionPlan(
            layers=[
                LayerPlan(s.name, s.kind, s.in_channels, s.out_channels, mask=MaskPlan("channel", 0.3), bits=8)
                for s in graph.specs
                if s.name.startswith("features")
            ]
        ),
    )
    assert model.training
    path = tmp_path / "model.pt2"
    save_program(model, x[:1], path)
    assert model.training
    torch.testing.assert_close(run_elsewhere(path, x), model.eval()(x), rtol=1e-9, atol=1e-9)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.pt2", "x.pt", "y.pt"]


def test_program_holds_pytorchs_operators_only(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model = randomized(PaddedResNet())
    apply(model, random_plan(trace(model, x), 0))
    program = save_program(model, x, tmp_path / "model.pt2")
    operators = [node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert {operator.namespace for operator in operators} == {"aten"}


def test_no_path_of_this_machine_is_written(tmp_path: Path) -> None:
    model = nn.Sequential(LowRankLinear(4, 4, 2), FakeQuant(8), nn.ReLU())
    x = torch.randn(2, 4)
    model(x)
    save_program(model, x, tmp_path / "model.pt2")
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        contents = [archive.read(name) for name in archive.namelist()]
    for place in (cctorch.__file__, torch.__file__, __file__):
        assert not any(str(Path(place).parent).encode() in content for content in contents)


@pytest.mark.parametrize("padding", [1, "same"])
@pytest.mark.parametrize("layout", ["channel", "spatial", "tucker"])
def test_every_layout_of_a_low_rank_convolution(layout: Any, padding: Any, tmp_path: Path) -> None:
    rank = (2, 3) if layout == "tucker" else 2
    conv = LowRankConv2d(3, 4, rank, (3, 5), padding=padding, layout=layout, dtype=torch.float64)
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    program = save_program(conv, x, tmp_path / "model.pt2")
    torch.testing.assert_close(program.module()(x), conv(x), rtol=1e-10, atol=1e-10)


class Eighths(nn.Module):
    """Activations in 8-bit floating point, some beyond its range, and layers whose weights are as well."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.log_scales = nn.Parameter(torch.tensor([-9.0, 0.0, 3.0]))
        self.linear = nn.Linear(3, 4)
        self.log_scale = nn.Parameter(torch.tensor([-5.0]))

    def forward(self, x: Tensor) -> Tensor:
        weight = fp8_quant(self.linear.weight, self.log_scale, self.dtype)
        x = fp8_quant(x, self.log_scales, self.dtype, axis=1)
        return F.linear(x, weight.to(x.dtype), self.linear.bias.to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_floating_point_of_eight_bits_runs_without_cctorch(
    format: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, path = Eighths(format), tmp_path / "model.pt2"
    x = (100 * torch.randn(50, 3)).to(dtype)
    save_program(model, x[:2], path)
    assert torch.equal(run_elsewhere(path, x), model(x))


class Outputs(nn.Module):
    def __init__(self, of: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> object:
        return self.of(x)


@pytest.mark.parametrize(
    "of",
    [
        lambda x: {"logits": 2 * x, "features": [x + 1, None]},
        lambda x: (x > 0, x.argmax(1)),
        lambda x: x[:, :0],
        lambda x: (x.log(), torch.exp(1e30 * x)),
    ],
    ids=["structure", "no numbers", "empty", "NaN and infinity"],
)
def test_outputs_of_all_kinds(of: Callable[[Tensor], object], tmp_path: Path) -> None:
    x = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]])
    path = tmp_path / "model.pt2"
    save_program(Outputs(of), x, path)
    torch.testing.assert_close(torch.export.load(path).module()(x), of(x), equal_nan=True)


@pytest.mark.parametrize(
    "of",
    [
        lambda x: {"a": x, "b": torch.rand_like(x)},
        lambda x: torch.rand_like(x) > 0.5,
        lambda x: (torch.rand_like(x) - 0.5).log(),
    ],
    ids=["structure", "no numbers", "NaN"],
)
def test_an_output_that_differs_is_found_in_all_kinds(of: Callable[[Tensor], object], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the reloaded program differs from the model by"):
        save_program(Outputs(of), torch.zeros(40, 30), tmp_path / "model.pt2")


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(4, 3)


def test_fixed_batch_size_is_exported_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="FixedBatch is exported for batches of 4 only"):
        save_program(FixedBatch(), torch.zeros(4, 3), tmp_path / "model.pt2")
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(torch.ones(4, 3)), torch.ones(4, 3))


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def test_program_that_computes_something_else_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"older")
    with pytest.raises(ValueError, match="the reloaded program differs from the model by"):
        save_program(Random(), torch.zeros(4, 3), path)
    assert path.read_bytes() == b"older"


def test_weights_on_a_grid_that_is_not_exported_say_the_way_out(tmp_path: Path) -> None:
    class Signs(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return binary_quant(weight)

    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    parametrize.register_parametrization(model, "weight", Signs())
    with pytest.raises(ValueError, match=r"needs cctorch::binary_quant.* remove_parametrizations"):
        save_program(model, x, tmp_path / "model.pt2")
    expected = model(x)
    parametrize.remove_parametrizations(model, "weight")
    torch.testing.assert_close(save_program(model, x, tmp_path / "model.pt2").module()(x), expected)


def test_operator_of_another_library_is_named(tmp_path: Path) -> None:
    with torch.library._scoped_library("cctorch_test", "DEF") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: x * 2, "CompositeExplicitAutograd")
        library.impl("double", lambda x: torch.empty_like(x), "Meta")

        class Foreign(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.ops.cctorch_test.double(x)

        with pytest.raises(ValueError, match="needs cctorch_test::double, which is not part of PyTorch"):
            save_program(Foreign(), torch.zeros(2, 3), tmp_path / "model.pt2")


def test_a_scale_that_has_not_started_is_refused_and_stays_so(tmp_path: Path) -> None:
    """Each call of the program took the scale of its own input."""
    model, x = nn.Sequential(nn.Linear(4, 4), FakeQuant(8)), torch.randn(2, 4)
    with pytest.raises(
        ValueError, match="save_program: FakeQuant '1' has no scale yet; run the model on a batch of data"
    ):
        save_program(model, x, tmp_path / "model.pt2")
    assert not model[1].initialized
    assert not list(tmp_path.iterdir())
    model(x)
    expected = model(4 * x)
    program = save_program(model, x, tmp_path / "model.pt2")
    torch.testing.assert_close(program.module()(4 * x), expected)


def test_the_batch_is_free_on_cuda_too() -> None:
    """Traced on fake tensors: batch normalization takes one of several kernels there, by the batch."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        layers = nn.Conv2d(3, 4, 3, device="cuda"), nn.BatchNorm2d(4, device="cuda"), nn.ReLU()
        x = torch.empty(6, 3, 8, 8, device="cuda")
    model = nn.Sequential(*layers).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program = _traced(model, x)
    [(low, high)] = [(limits.lower, limits.upper) for limits in program.range_constraints.values()]
    assert (low, high) == (1, 65535)
