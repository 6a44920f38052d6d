import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from cctorch.export import save_program
from cctorch.nn import LowRankLSTM
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

SIZES = {
    "plain": {},
    "no bias": {"bias": False},
    "two layers, both ways": {"num_layers": 2, "bidirectional": True},
    "batch first, projected": {"batch_first": True, "num_layers": 2, "proj_size": 3},
    "all": {"num_layers": 3, "bidirectional": True, "batch_first": True, "proj_size": 2, "bias": False},
}


def truncated(weight: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def pair(options: dict[str, Any], every: int = 1) -> tuple[nn.LSTM, LowRankLSTM]:
    """A dense one of truncated weights, and ours of the weights before. `every`: rank for every so many weights."""
    torch.manual_seed(0)
    dense = nn.LSTM(7, 5, **options).double()
    weights = [name for name, p in dense.named_parameters() if p.dim() == 2]
    ranks = dict.fromkeys(weights[::every], 2)
    ours = LowRankLSTM.from_dense(dense, ranks)
    with torch.no_grad():
        for name in ranks:
            dense.get_parameter(name).copy_(truncated(dense.get_parameter(name), 2))
    return dense, ours


def states(lstm: nn.LSTM | LowRankLSTM, batch: int | None) -> tuple[Tensor, Tensor]:
    layers = lstm.num_layers * (2 if lstm.bidirectional else 1)
    shape = (layers,) if batch is None else (layers, batch)
    h = torch.randn(*shape, lstm.proj_size or lstm.hidden_size, dtype=torch.float64, requires_grad=True)
    return h, torch.randn(*shape, lstm.hidden_size, dtype=torch.float64, requires_grad=True)


def assert_same(ours: Any, theirs: Any) -> None:
    for found, wanted in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("batch", [3, 1, None])
def test_it_is_the_lstm_of_truncated_weights(name: str, every: int, batch: int | None) -> None:
    dense, ours = pair(SIZES[name], every)
    shape = (4, 7) if batch is None else (batch, 4, 7) if dense.batch_first else (4, batch, 7)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert_same(ours(x), dense(x))
    hx = states(dense, batch)
    found, wanted = ours(x, hx), dense(x, hx)
    assert_same(found, wanted)
    gradients = [
        torch.autograd.grad(y.square().sum() + c.sin().sum() + h.sum(), (x, *hx)) for y, (h, c) in (found, wanted)
    ]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("sorted_", [True, False])
def test_packed_sequences(name: str, sorted_: bool) -> None:
    dense, ours = pair(SIZES[name])
    lengths = [5, 3, 3, 1] if sorted_ else [1, 3, 5, 3]
    sequences = [torch.randn(length, 7, dtype=torch.float64) for length in lengths]
    packed = pack_sequence(sequences, enforce_sorted=sorted_)
    for hx in (None, states(dense, 4)):
        found, wanted = ours(packed, hx), dense(packed, hx)
        assert_same((found[0].data, found[1]), (wanted[0].data, wanted[1]))
        padded = [pad_packed_sequence(y[0], batch_first=True)[0] for y in (found, wanted)]
        torch.testing.assert_close(*padded, rtol=1e-11, atol=1e-11)


def test_gradients_of_factors_are_those_of_the_product() -> None:
    dense, ours = pair({"bidirectional": True})
    x = torch.randn(4, 3, 7, dtype=torch.float64)
    for lstm in (dense, ours):
        lstm(x)[0].square().sum().backward()
    for name, parameter in dense.named_parameters():
        if name not in ours.ranks:
            torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, rtol=1e-10, atol=1e-10)
            continue
        first, second = (ours.get_parameter(part) for part in ours.parts(name))
        torch.testing.assert_close(first.grad, second.T @ parameter.grad, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(second.grad, parameter.grad @ first.T, rtol=1e-10, atol=1e-10)


def test_dropout_lies_between_the_layers_and_in_training_only() -> None:
    _, ours = pair({"num_layers": 2, "dropout": 0.5})
    x = torch.randn(4, 3, 7, dtype=torch.float64)
    torch.manual_seed(1)
    y, (h, _) = ours(x)
    torch.manual_seed(1)
    first, second = LowRankLSTM(7, 5, {}), LowRankLSTM(5, 5, {})
    for one, layer in ((first, 0), (second, 1)):
        for name, parameter in ours.named_parameters():
            if f"_l{layer}" in name:
                plain = name.replace(f"_l{layer}", "_l0")
                setattr(one, plain, parameter)
        one.ranks = {name.replace(f"_l{layer}", "_l0"): r for name, r in ours.ranks.items() if f"_l{layer}" in name}
    torch.manual_seed(1)
    middle, (h0, _) = first(x)
    last, (h1, _) = second(nn.functional.dropout(middle, 0.5))
    torch.testing.assert_close(y, last)
    torch.testing.assert_close(h, torch.cat([h0, h1]))
    ours.eval()
    torch.testing.assert_close(ours(x)[0], second(middle)[0])


def test_copies_pickles_and_state_dicts() -> None:
    _, ours = pair({"num_layers": 2, "bidirectional": True, "proj_size": 3}, every=2)
    x = torch.randn(4, 3, 7, dtype=torch.float64)
    blank = LowRankLSTM(7, 5, ours.ranks, num_layers=2, bidirectional=True, proj_size=3).double()
    blank.load_state_dict(ours.state_dict())
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), blank):
        assert torch.equal(other(x)[0], ours(x)[0])
        assert repr(other) == repr(ours)


def test_what_is_new_has_the_spread_of_pytorchs_own() -> None:
    torch.manual_seed(0)
    ours = LowRankLSTM(300, 256, {"weight_ih_l0": 40, "weight_hh_l0": 40})
    for name in ours.ranks:
        first, second = (ours.get_parameter(part).detach() for part in ours.parts(name))
        deviation = (second @ first).std().item()
        assert deviation == pytest.approx((1 / (3 * 256)) ** 0.5, rel=0.05)
    assert ours.bias_ih_l0.abs().max() <= 1 / 16


def test_no_random_number_is_drawn_for_a_dense_one() -> None:
    dense = nn.LSTM(7, 5)
    dense.weight_hh_l0.requires_grad_(False)
    torch.manual_seed(0)
    ours = LowRankLSTM.from_dense(dense.eval(), {"weight_hh_l0": 1})
    assert torch.initial_seed() == 0
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))
    assert not ours.training
    assert not ours.weight_hh_l0_first.requires_grad
    assert ours.weight_ih_l0.requires_grad
    assert ours.weight_ih_l0.data_ptr() != dense.weight_ih_l0.data_ptr()


class Last(nn.Module):
    def __init__(self, lstm: nn.Module) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0][:, -1]


@pytest.mark.parametrize("name", ["batch first, projected", "all"])
def test_a_program_of_pytorchs_operators_for_batches_of_any_size(name: str, tmp_path: Path) -> None:
    _, ours = pair(SIZES[name])
    model = Last(ours)
    save_program(model, torch.randn(2, 4, 7, dtype=torch.float64), tmp_path / "lstm.pt2")
    program = torch.export.load(tmp_path / "lstm.pt2").module()
    for batch in (1, 5):
        x = torch.randn(batch, 4, 7, dtype=torch.float64)
        torch.testing.assert_close(program(x), model(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRankLSTM(7, 5, {"weight_ih_l1": 2}), r"ranks names 'weight_ih_l1', expected of weight_ih_l0, wei"),
        (lambda: LowRankLSTM(7, 5, {"bias_ih_l0": 2}), r"ranks names 'bias_ih_l0'"),
        (lambda: LowRankLSTM(7, 5, {"weight_ih_l0": 8}), r"ranks\['weight_ih_l0'\] = 8, expected 1 to 7 for a weight"),
        (lambda: LowRankLSTM(7, 5, {"weight_ih_l0": 0}), r"= 0, expected 1 to 7"),
        (lambda: LowRankLSTM(7, 5, {})(torch.ones(2, 3, 6)), "expected 7 features in the last"),
        (lambda: LowRankLSTM(7, 5, {})(torch.ones(2, 2, 3, 7)), "input has 4 dimensions, expected 2 or 3"),
        (
            lambda: LowRankLSTM(7, 5, {})(torch.ones(2, 3, 7), (torch.ones(1, 3, 5), torch.ones(1, 2, 5))),
            r"c_0 has shape \(1, 2, 5\), expected \(1, 3, 5\)",
        ),
        (
            lambda: LowRankLSTM(7, 5, {})(torch.ones(2, 7), (torch.ones(1, 1, 5), torch.ones(1, 1, 5))),
            r"h_0 has shape \(1, 1, 5\), expected \(1, 5\)",
        ),
    ],
)
def test_bad_arguments_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
