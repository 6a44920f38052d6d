"""Weights of an nn.LSTM from the trace to a trained and stored LowRankLSTM."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cctorch
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from cctorch import _C, CompressionPlan, LayerPlan, apply, checkpoint, compress, layer_choice
from cctorch.gradients import mean_gradients, weight_of
from cctorch.graph import ModelGraph, trace
from cctorch.nn import LowRankLinear, LowRankLSTM
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

STEPS = 6


class Recurrent(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.a = nn.Linear(10, 24)
        self.r = nn.LSTM(24, 16, batch_first=True, **options)
        self.b = nn.Linear((self.r.proj_size or 16) * (2 if self.r.bidirectional else 1), 20)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.r(F.relu(self.a(x)))
        return self.head(F.relu(self.b(y[:, -1])))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "both ways": {"bidirectional": True},
    "two layers": {"num_layers": 2, "dropout": 0.3},
    "two layers, both ways, projected": {"num_layers": 2, "bidirectional": True, "proj_size": 6},
}


def built(name: str = "plain", dtype: torch.dtype = torch.float64) -> Recurrent:
    torch.manual_seed(0)
    return Recurrent(**OPTIONS[name]).to(dtype)


def batches(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, STEPS, 10, generator=generator, dtype=dtype), torch.randint(5, (n,), generator=generator))
        for n in (8, 8, 5)
    ]


def found(model: nn.Module, **settings: Any) -> cctorch.Compression:
    data = batches(next(model.parameters()).dtype)
    return compress(model, data, data[0][0], **{"target": 0.4, **settings})


def of_lstm(plan: CompressionPlan) -> list[LayerPlan]:
    return [layer for layer in plan.layers if layer.kind == "lstm"]


def truncated(weight: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(weight.detach(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def specs(graph: ModelGraph) -> dict[str, tuple[str, int, int, int]]:
    return {s.name: (s.kind, s.in_channels, s.out_channels, s.positions) for s in graph.specs if s.kind == "lstm"}


def test_each_weight_is_a_layer_with_the_steps_for_positions() -> None:
    graph = trace(built("two layers, both ways, projected"), torch.zeros(1, STEPS, 10).double())
    wanted = {}
    for layer, inputs in ((0, 24), (1, 12)):
        for suffix in ("", "_reverse"):
            wanted[f"r.weight_ih_l{layer}{suffix}"] = ("lstm", inputs, 64, STEPS)
            wanted[f"r.weight_hh_l{layer}{suffix}"] = ("lstm", 6, 64, STEPS)
            wanted[f"r.weight_hr_l{layer}{suffix}"] = ("lstm", 16, 6, STEPS)
    assert specs(graph) == wanted
    assert not graph.warnings
    assert not graph.left_alone
    assert [spec.name for spec in graph.specs][:2] == ["a", "r.weight_ih_l0"]
    assert {spec.bits for spec in graph.specs} == {64}


@pytest.mark.parametrize(
    ("options", "arrange"),
    [
        ({}, lambda x: x.transpose(0, 1)),
        ({"batch_first": True}, lambda x: x),
        ({}, lambda x: x.flatten(0, 1)),
    ],
    ids=["steps first", "batch first", "one sequence of all examples"],
)
def test_all_multiply_accumulates_are_counted(options: dict[str, Any], arrange: Callable[[Tensor], Tensor]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.r = nn.LSTM(10, 7, **options)

        def forward(self, x: Tensor) -> Tensor:
            return self.r(arrange(x))[0]

    graph = trace(Model(), torch.zeros(3, STEPS, 10))
    assert _C.dense_macs(graph.specs) == STEPS * 28 * (10 + 7)


class Layout(nn.Module):
    """Steps first, an odd number of them; and a layer that reads the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.LSTM(10, 7)
        self.each, self.last = nn.Linear(7, 4), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, (h, _) = self.r(x.transpose(0, 1))
        return self.each(y).sum((0, 2)) + self.last(h[-1]).sum(1)


@pytest.mark.parametrize("examples", [1, 3])
def test_layers_behind_it_are_counted_for_one_example(examples: int) -> None:
    graph = trace(Layout(), torch.zeros(examples, 5, 10))
    assert {spec.name: spec.positions for spec in graph.specs if spec.kind == "linear"} == {"each": 5, "last": 1}


def test_the_layers_around_it_keep_what_it_reads_and_gives() -> None:
    model = built()
    graph = trace(model, torch.zeros(1, STEPS, 10).double())
    kept = {"a": list(range(0, 10, 2)), "b": list(range(0, 16, 2)), "head": [1, 4]}
    layers = [
        LayerPlan(
            s.name,
            s.kind,
            s.in_channels,
            s.out_channels,
            kept_in=kept.get(s.name),
            rank=2 if s.kind == "lstm" else None,
        )
        for s in graph.specs
    ]
    plan = CompressionPlan(layers=layers)
    graph.channels.resolve(plan)
    assert [plan.find(name).kept_out for name in ("a", "b")] == [list(range(24)), [1, 4]]
    assert plan.find("b").gather == kept["b"]
    # The dense model with everything that went set to zero.
    wanted = copy.deepcopy(model)
    with torch.no_grad():
        for name, channels in kept.items():
            weight = wanted.get_submodule(name).weight
            weight[:, [c for c in range(weight.shape[1]) if c not in channels]] = 0
        for name in ("weight_ih_l0", "weight_hh_l0"):
            weight = wanted.r.get_parameter(name)
            weight.copy_(truncated(weight, 2))
    x = torch.randn(4, STEPS, 10, dtype=torch.float64)
    torch.testing.assert_close(apply(model, plan)(x), wanted(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("other", [nn.GRU, nn.RNN])
def test_other_recurrent_layers_are_left_alone_as_before(other: type[nn.RNNBase]) -> None:
    model = built()
    model.r = other(24, 16, batch_first=True).double()
    graph = trace(model, torch.zeros(1, STEPS, 10).double())
    assert {spec.kind for spec in graph.specs} == {"linear"}
    assert any("in 'r' is not followed: all channels that it reads stay" in warning for warning in graph.warnings)


class ReadsItsSize(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.r.hidden_size


class OfItsOwn(nn.LSTM):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        y, states = super().forward(input, hx)
        return 2 * y, states


def hooked(model: Recurrent) -> None:
    model.r.register_forward_hook(lambda *_: None)


def shared(model: Recurrent) -> None:
    model.r.weight_hh_l0 = model.r.weight_ih_l0 = nn.Parameter(torch.randn(64, 16).double())
    model.a, model.r.input_size = nn.Linear(10, 16).double(), 16


def own(model: Recurrent) -> None:
    model.r = OfItsOwn(24, 16, batch_first=True).double()


def reads(model: Recurrent) -> None:
    model.__class__ = ReadsItsSize


@pytest.mark.parametrize(
    ("change", "reason"),
    [(hooked, "it has hooks"), (shared, "shares a parameter"), (own, "OfItsOwn computes"), (reads, "reads its type")],
)
def test_one_that_cannot_be_rebuilt_is_left_alone_but_counted(change: Callable[[Recurrent], None], reason: str) -> None:
    model = built()
    change(model)
    graph = trace(model, torch.zeros(1, STEPS, 10).double())
    assert [warning for warning in graph.warnings if reason in warning and "layer 'r' is left alone" in warning]
    assert set(specs(graph)) == graph.left_alone == {"r.weight_ih_l0", "r.weight_hh_l0"}
    compression = found(model, target=0.05)
    assert not of_lstm(compression.plan)
    assert apply(model, compression.plan).r is model.r


class Twice(Recurrent):
    """On a sequence, and on two steps of it from the end: the ranks of its weights can go all the same."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return self.head(F.relu(self.b(self.r(y)[0][:, -1] + self.r(y.flip(1)[:, :2])[0][:, -1])))


class Packed(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.tensor([STEPS - i % 3 for i in range(len(x))])
        packed = nn.utils.rnn.pack_padded_sequence(self.a(x), lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.b(self.r(packed)[1][0][-1]))


@pytest.mark.parametrize(("network", "steps"), [(Twice, STEPS + 2), (Packed, STEPS - 1)])
def test_several_calls_and_packed_sequences(network: type[Recurrent], steps: int) -> None:
    torch.manual_seed(0)
    model = network().double()
    graph = trace(model, torch.zeros(6, STEPS, 10).double())
    assert {positions for *_, positions in specs(graph).values()} == {steps}
    assert not graph.left_alone
    plan = found(model, target=0.5).plan
    assert any(layer.rank is not None for layer in of_lstm(plan))
    wanted = copy.deepcopy(model)
    only_lstm = CompressionPlan(layers=of_lstm(plan))
    with torch.no_grad():
        for layer in only_lstm.layers:
            if layer.rank is not None:
                weight_of(wanted, layer.name).copy_(truncated(weight_of(wanted, layer.name), layer.rank))
    x = torch.randn(5, STEPS, 10, dtype=torch.float64)
    torch.testing.assert_close(apply(model, only_lstm)(x), wanted(x), rtol=1e-10, atol=1e-10)


def test_mean_gradients_name_parameters() -> None:
    model = built("two layers")
    names = ["a", "r.weight_ih_l0", "r.weight_hh_l1"]
    gradients = mean_gradients(model.train(), batches(), names)
    assert model.r.dropout == 0.3
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    model.eval()
    F.cross_entropy(model(x), y).backward()
    for name in names:
        torch.testing.assert_close(gradients[name], weight_of(model, name).grad, rtol=1e-9, atol=1e-12)


def counted(model: nn.Module, examples: int) -> float:
    """Multiply-accumulates of an example as PyTorch counts them in the products that run, without softmax and sums."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randn(examples, STEPS, 10, dtype=torch.float64))
    return counter.get_total_flops() / 2 / examples


def weights_left(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.dim() > 1)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("budget", "multiple"), [("macs", 1), ("macs", 4), ("parameters", 1), ("bytes", 1)])
def test_what_is_left_is_what_the_plan_says(name: str, budget: Any, multiple: int) -> None:
    model = built(name)
    dense = weights_left(model)
    compression = found(model, budget=budget, multiple=multiple)
    for layer in of_lstm(compression.plan):
        assert (len(layer.kept_in), len(layer.kept_out)) == (layer.in_channels, layer.out_channels)
        assert not layer.gather
    assert any(layer.rank is not None for layer in of_lstm(compression.plan))
    apply(model, compression.plan)
    assert isinstance(model.r, LowRankLSTM)
    model.eval()
    assert counted(model, 16) == compression.final_macs
    if budget == "macs":
        assert 0.4 <= compression.final_reduction <= 0.55
    else:
        assert weights_left(model) <= 0.6 * dense


def test_units_say_whether_it_takes_part() -> None:
    channels = found(built(), units="channels", target=0.05)
    assert not of_lstm(channels.plan)
    values = found(built(), units="singular_values").plan
    assert any(layer.rank is not None for layer in of_lstm(values))
    assert all(len(layer.kept_in) == layer.in_channels for layer in values.layers)


def test_patterns_name_a_module_or_one_weight() -> None:
    assert not of_lstm(found(built(), exclude=["r.*"], target=0.05).plan)
    only = found(built(), exclude=["*.weight_hh_l0"], target=0.3).plan
    assert [layer.name for layer in of_lstm(only)] == ["r.weight_ih_l0"]
    bounded = found(built(), bounds={"r.*": 0.3}, target=0.2)
    dense = {spec.name: spec.macs for spec in bounded.model_specs}
    for layer in of_lstm(bounded.plan):
        spec = next(spec for spec in bounded.model_specs if spec.name == layer.name)
        # A last step may exceed the bound by its units.
        a_value = spec.positions * (spec.in_channels + spec.out_channels)
        assert _C.layer_macs(spec, layer, True) >= 0.7 * dense[layer.name] - a_value


def test_lower_targets_come_from_the_same_search() -> None:
    highest = found(built("two layers"), target=0.5)
    lower = highest.at(0.3)
    assert 0.3 <= lower.final_reduction < highest.final_reduction
    assert lower.plan == found(built("two layers"), target=0.3).plan
    again = found(built("two layers"), target=0.3, gradients=highest.gradients)
    assert again.plan == lower.plan


def test_a_rank_that_saves_nothing_is_dropped_and_the_module_stays() -> None:
    model = built()
    graph = trace(model, torch.zeros(1, STEPS, 10).double())
    plan = CompressionPlan(layers=[LayerPlan("r.weight_hh_l0", "lstm", 16, 64, rank=13)])
    _C.drop_idle_ranks(graph.specs, plan)  # 13 (16 + 64) = 1040 of 1024
    assert plan.layers[0].rank is None
    lstm = model.r
    assert apply(model, plan).r is lstm


def test_with_a_budget_of_latency_it_is_left_alone_with_a_warning() -> None:
    graph = trace(built("two layers"), torch.zeros(1, STEPS, 10).double())
    assert layer_choice.candidates(graph, (), timed=True) == ["a", "b"]
    assert graph.warnings == ["LSTM 'r' is left alone: no layer of its kind is timed for a budget of latency"]


def test_bits_are_not_for_it() -> None:
    compression = found(built(), bits={"r.*": 4, "a": 8})
    assert any("'r.weight_hh_l0' keep theirs, as weights of an LSTM" in warning for warning in compression.warnings)
    assert all(layer.bits is None for layer in of_lstm(compression.plan))
    assert compression.plan.find("a").bits == 8


@pytest.mark.parametrize("name", OPTIONS)
def test_train_store_and_load(name: str, tmp_path: Path) -> None:
    """From the dense model to a checkpoint of the compressed and trained one, in both formats."""
    model = built(name, torch.float32)
    plan = found(model).plan
    x, y = batches(torch.float32)[0]
    apply(model, plan)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    cctorch.save_plan(plan, tmp_path / "plan.json")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    checkpoint.save(tmp_path / "model.h5", model.state_dict(), plan=plan, codec="zstd")
    stored = checkpoint.load(tmp_path / "model.h5")
    for state, of in (
        (safetensors.torch.load_file(tmp_path / "model.safetensors"), cctorch.load_plan(tmp_path / "plan.json")),
        (stored.tensors, CompressionPlan.from_json(stored.plan)),
    ):
        torch.manual_seed(5)
        again = apply(Recurrent(**OPTIONS[name]), of).eval()
        again.load_state_dict(state)
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad])
def test_the_optimizer_follows(kind: type[torch.optim.Optimizer]) -> None:
    model = built()
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.01, **options)
    x, y = batches()[0]
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    plan = CompressionPlan(layers=[LayerPlan("r.weight_hh_l0", "lstm", 16, 64, rank=3)])
    before = {name: dict(optimizer.state[p]) for name, p in model.named_parameters()}
    apply(model, plan, optimizer)
    [group] = optimizer.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in group["params"]] == [
        *("a.weight", "a.bias", "r.weight_ih_l0", "r.weight_hh_l0_first", "r.weight_hh_l0_second"),
        *("r.bias_ih_l0", "r.bias_hh_l0", "b.weight", "b.bias", "head.weight", "head.bias"),
    ]
    for name, parameter in model.named_parameters():
        if name in before:
            for key, value in before[name].items():
                torch.testing.assert_close(optimizer.state[parameter][key], value, rtol=0, atol=0)
        elif kind is not torch.optim.Adagrad:
            assert parameter not in optimizer.state
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert len(optimizer.state) == len(names)


def test_repair_leaves_it_as_it_is_and_fits_what_comes_after() -> None:
    dense = built()
    compression = found(dense, target=0.55)
    model = apply(copy.deepcopy(dense), compression.plan)
    assert isinstance(model.r, LowRankLSTM)
    before = {name: tensor.clone() for name, tensor in model.r.state_dict().items()}
    error = (model(batches()[0][0]) - dense(batches()[0][0])).square().mean()
    repaired = cctorch.repair(model, dense, compression.plan, batches(), step=1)
    assert {fit.name for fit in repaired.layers} >= {"b", "head"}
    for name, tensor in model.r.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert (model(batches()[0][0]) - dense(batches()[0][0])).square().mean() < error


def test_repair_begins_behind_the_first_that_changes() -> None:
    dense = built()
    plan = CompressionPlan(layers=[LayerPlan("r.weight_ih_l0", "lstm", 24, 64, rank=2)])
    model = apply(copy.deepcopy(dense), plan)
    fits = cctorch.repair(model, dense, plan, batches(), step=1).layers
    assert [fit.name for fit in fits] == ["b", "head"]
    assert fits[0].after < fits[0].before


def lstm_plan(name: str = "r.weight_hh_l0", inputs: int = 16, outputs: int = 64) -> CompressionPlan:
    return CompressionPlan(layers=[LayerPlan(name, "lstm", inputs, outputs, rank=3)])


@pytest.mark.parametrize(
    ("plan", "change", "message"),
    [
        (
            lstm_plan("q.weight_hh_l0"),
            None,
            "Recurrent has no layer 'q.weight_hh_l0'; the plan expects a lstm of 16 -> 64",
        ),
        (
            lstm_plan("a.weight", 10, 24),
            None,
            "layer 'a.weight' of Recurrent is a linear of 10 -> 24 channels; the plan",
        ),
        (lstm_plan(inputs=8), None, "layer 'r.weight_hh_l0' of Recurrent is a LSTM"),
        (lstm_plan("r.weight_hh_l1"), None, "layer 'r.weight_hh_l1' of Recurrent is a LSTM"),
        (lstm_plan(), hooked, "layer 'r.weight_hh_l0' has hooks"),
        (lstm_plan(), own, "'r.weight_hh_l0' \\(OfItsOwn\\) has a forward of its own"),
        (lstm_plan("r.weight_hh_l0"), shared, "'r.weight_hh_l0' shares a parameter"),
        (
            CompressionPlan(layers=[LayerPlan("r.weight_hh_l0", "lstm", 16, 64, kept_in=[0, 1])]),
            None,
            "a weight of an lstm keeps all its inputs",
        ),
    ],
)
def test_plans_that_do_not_fit_are_refused_and_change_nothing(
    plan: CompressionPlan, change: Callable[[Recurrent], None] | None, message: str
) -> None:
    model = built()
    if change:
        change(model)
    lstm, before = model.r, [id(p) for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        apply(model, plan)
    assert model.r is lstm
    assert [id(p) for p in model.parameters()] == before


def test_parametrized_weights_are_refused() -> None:
    model = built()
    parametrize.register_parametrization(model.r, "weight_ih_l0", nn.Identity())
    with pytest.raises(ValueError, match=r"layer 'r\.weight_hh_l0' has parametrizations"):
        apply(model, lstm_plan())


def test_a_plan_is_applied_once() -> None:
    model = apply(built(), lstm_plan())
    with pytest.raises(ValueError, match="is a LowRankLSTM; the plan expects"):
        apply(model, lstm_plan())
    assert isinstance(built().a, nn.Linear)
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())
