"""Round trips: every dtype and shape, the error bound, zeros, names, and what plain HDF5 sees."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # registers the filters that h5py reads with
import numpy as np
import pytest
import torch
from cctorch import CompressionPlan, LayerPlan, checkpoint, cli, prepare
from cctorch.checkpoint import Rule, pack
from cctorch.nn import FakeQuant
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from torch import Tensor, nn
from torch.nn.utils import parametrize

DTYPES = [getattr(torch, name) for name in pack.STORED_AS]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def bits(tensor: Tensor) -> bytes:
    array: bytes = tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return array


def rms(tensor: Tensor) -> float:
    return math.sqrt(float(tensor.double().square().mean()))


def saved(folder: Path, tensors: dict[str, Tensor], **settings: Any) -> checkpoint.Checkpoint:
    checkpoint.save(folder / "file.h5", tensors, **settings)
    loaded = checkpoint.load(folder / "file.h5")
    assert list(loaded.tensors) == list(tensors)
    for name, tensor in tensors.items():
        assert (loaded.tensors[name].dtype, loaded.tensors[name].shape) == (tensor.dtype, tensor.shape), name
    return loaded


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5,), (70, 80), (2, 3, 4, 5, 60), (3000, 1000)], ids=str)
def test_every_dtype_and_shape_comes_back_to_the_bit(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    count = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    tensor = (raw.bool() if dtype == torch.bool else raw.view(dtype)).reshape(shape)
    loaded = saved(tmp_path, {"x": tensor}, codec="zstd")
    assert bits(loaded.tensors["x"]) == bits(tensor)


@pytest.mark.parametrize("codec", ["sz3", "zfp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_keep_to_the_bound_and_everything_else_to_the_bit(
    tmp_path: Path, codec: checkpoint.Codec, dtype: torch.dtype
) -> None:
    tensors = {
        "weight": random(300, 40, dtype=dtype),
        "conv": random(16, 30, 3, 3, seed=1, dtype=dtype),
        "large": random(1500, 1000, seed=2, dtype=dtype),
        "transposed": random(90, 60, seed=3, dtype=dtype).T,
        "channels_last": random(8, 30, 5, 5, seed=4, dtype=dtype).to(memory_format=torch.channels_last),
        "bias": random(5000, seed=5, dtype=dtype),
        "running_mean": random(5000, seed=6, dtype=dtype),
        "optimizer.weight": random(300, 40, seed=7, dtype=dtype),
        "half": random(300, 40, seed=8).half(),
        "brain": random(300, 40, seed=9).bfloat16(),
        "steps": torch.tensor(7),
        "kept": torch.arange(3000),
        "pruning_mask": random(100, 90, seed=10) > 0,
    }
    loaded = saved(tmp_path, tensors, codec=codec, error_bound=0.02)
    for name, tensor in tensors.items():
        found, record = loaded.tensors[name], loaded.index.tensors[name]
        if name in ("weight", "conv", "large", "transposed", "channels_last"):
            error = float((found.double() - tensor.double()).abs().max())
            assert 0 < error <= 0.02 * rms(tensor) * (1 + 1e-9)
            assert record.max_error == error
            assert record.error_bound == pytest.approx(0.02 * rms(tensor))
            assert record.codec == codec
            assert record.stored < 0.5 * record.raw
        else:
            assert bits(found) == bits(tensor), name
            assert record.error_bound == record.max_error == 0
    assert loaded.index.versions == {"hdf5plugin": hdf5plugin.version, "hdf5": h5py.version.hdf5_version}


VALUES = st_numpy.arrays(
    np.float32,
    st.integers(1025, 1500),
    elements=st.floats(width=32, allow_nan=True, allow_infinity=True),
    fill=st.sampled_from([0.0, 1.0, -3.5, 1e-30]),
)


@given(VALUES, st.sampled_from(["sz3", "zfp"]), st.floats(1e-6, 10))
def test_any_values_keep_to_an_absolute_bound(
    tmp_path_factory: pytest.TempPathFactory, values: Any, codec: checkpoint.Codec, bound: float
) -> None:
    tensor = torch.from_numpy(values).reshape(1, -1)
    loaded = saved(tmp_path_factory.mktemp("any"), {"x": tensor}, codec=codec, error_bound=bound, relative=False)
    found = loaded.tensors["x"]
    finite = tensor.isfinite()
    assert bits(found[~finite]) == bits(tensor[~finite])
    assert float((found.double() - tensor.double())[finite].abs().max() if finite.any() else 0) <= bound
    assert torch.equal(found == 0, tensor == 0) or not (found[tensor == 0] != 0).any()


@pytest.mark.parametrize("codec", checkpoint.codec.CODECS)
@pytest.mark.parametrize("share", [0.001, 0.5, 0.9, 0.9999, 1.0])
def test_zeros_stay_zeros(tmp_path: Path, codec: checkpoint.Codec, share: float) -> None:
    tensor = random(400, 300)
    tensor[torch.rand(400, 300, generator=torch.Generator().manual_seed(1)) < share] = 0
    tensor[0, 0] = -0.0
    found = saved(tmp_path, {"x": tensor}, codec=codec, error_bound=0.3).tensors["x"]
    assert not found[tensor == 0].any()
    if codec == "zstd":
        assert bits(found) == bits(tensor)
    else:
        assert float((found - tensor).abs().max()) <= 0.3 * rms(tensor)


def test_a_pruned_weight_takes_a_fraction_of_a_dense_one(tmp_path: Path) -> None:
    dense = random(1000, 500)
    pruned = dense * (dense.abs() > dense.abs().flatten().kthvalue(450_000).values)
    loaded = saved(tmp_path, {"dense": dense, "pruned": pruned}, error_bound=0.05)
    stored = {name: record.stored for name, record in loaded.index.tensors.items()}
    assert stored["pruned"] < 0.3 * stored["dense"]


def test_a_rule_decides_for_the_names_that_it_matches(tmp_path: Path) -> None:
    tensors = {"a.weight": random(100, 100), "b.weight": random(100, 100), "b.bias": random(9000)}
    rules = [Rule("*.bias", "zfp", 0.25, relative=False), Rule("b.*", "zstd")]
    index = saved(tmp_path, tensors, rules=rules).index.tensors
    assert {name: record.codec for name, record in index.items()} == {
        "a.weight": "sz3",
        "b.weight": "zstd",
        "b.bias": "zfp",
    }
    assert index["b.bias"].error_bound == 0.25


def test_plain_hdf5_reads_values_zeros_and_shapes(tmp_path: Path) -> None:
    pruned = random(200, 100)
    pruned[:, 10:] = 0
    loaded = saved(tmp_path, {"deep/w": random(1200, 1000), "pruned": pruned, "b": random(7)}, error_bound=0.05)
    with h5py.File(tmp_path / "file.h5") as file:
        assert set(file["tensors"]) == {"deep%2Fw", "pruned", "b"}
        for name in ("deep%2Fw", "b"):
            dataset = file["tensors"][name]
            found = torch.from_numpy(dataset[()]).reshape(tuple(dataset.attrs.get("shape", dataset.shape)))
            assert bits(found) == bits(loaded.tensors[name.replace("%2F", "/")])
        zero = np.unpackbits(file["zeros/pruned"][()], count=pruned.numel()).astype(bool)
        assert bits(loaded.tensors["pruned"].flatten()[~torch.from_numpy(zero)]) == file["tensors/pruned"][()].tobytes()


def test_any_name_will_do(tmp_path: Path) -> None:
    names = [".", "..", "a", "a/b", "a%2Fb", "%", "ä ö", "layer1.0.conv1.weight", "/"]
    tensors = {name: random(40, 40, seed=i) for i, name in enumerate(names)}
    loaded = saved(tmp_path, tensors, codec="zstd").tensors
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_plan_and_metadata_are_carried_along(tmp_path: Path) -> None:
    layers = [LayerPlan(f"layer{i}", "linear", 4000, 4000, kept_in=list(range(0, 4000, 2))) for i in range(20)]
    plan = CompressionPlan("by hand", 0.5, layers)
    loaded = saved(tmp_path, {"x": random(3)}, plan=plan, metadata={"who": "ü"})
    assert len(plan.to_json()) > 100_000  # more than HDF5 has room for in an attribute
    assert loaded.compression_plan() == plan
    assert loaded.metadata == {"who": "ü"}
    assert saved(tmp_path, {}).plan is None


def test_scales_of_groups_are_not_moved_by_the_bound_of_weights(tmp_path: Path) -> None:
    layer = nn.Linear(256, 256, bias=False)
    parametrize.register_parametrization(layer, "weight", FakeQuant(4, axis=0, channels=256, groups=8))
    scales = layer.parametrizations.weight[0].log_scale.detach().exp()
    name = "parametrizations.weight.0.log_scale"
    loaded = saved(tmp_path, layer.state_dict(), codec="sz3", error_bound=0.05)
    torch.testing.assert_close(loaded.tensors[name].exp(), scales, rtol=1e-6, atol=0)
    assert bits(loaded.tensors["parametrizations.weight.original"]) != bits(layer.parametrizations.weight.original)


def test_some_tensors_are_read_without_the_others(tmp_path: Path) -> None:
    tensors = {"a": random(50, 50), "b": random(60, 60)}
    saved(tmp_path, tensors, codec="zstd")
    assert torch.equal(checkpoint.load(tmp_path / "file.h5", names=["b"]).tensors["b"], tensors["b"])
    with pytest.raises(KeyError, match=r"'c' is not in .*file\.h5"):
        checkpoint.load(tmp_path / "file.h5", names=["c"])


def test_a_prepared_model_comes_back(tmp_path: Path) -> None:
    plan = CompressionPlan("by hand", layers=[LayerPlan("0", "linear", 64, 64, bits=4)])
    model, other = (prepare(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), plan) for _ in range(2))
    other.load_state_dict(saved(tmp_path, model.state_dict(), codec="zstd").tensors)
    x = random(5, 64)
    assert torch.equal(other.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codec": "gzip"}, "codec = 'gzip': expected one of zstd, sz3, zfp"),
        ({"error_bound": 0.0}, "error_bound = 0.0: sz3 loses something, expected a positive"),
        ({"error_bound": math.nan}, "error_bound = nan"),
        ({"head_room": -0.1}, "head_room = -0.1"),
        ({"workers": 0}, "workers = 0"),
        ({"bandwidth": 0.0}, "bandwidth = 0.0"),
        ({"bandwidth": math.nan}, "bandwidth = nan"),
        ({"head_room": math.inf}, "head_room = inf"),
        ({"plan": {"layers": []}}, "plan is a dict, expected a CompressionPlan or its JSON"),
        ({"tensors": torch.nn.Linear(2, 2)}, r"tensors is a Linear, expected names and tensors: model.state_dict\(\)"),
        ({"rules": [Rule("x", "zfp", 0.1)], "tensors": {"x": torch.arange(5)}}, "gives zfp to 'x' of torch.int64"),
        ({"error_bound": "0.1"}, "error_bound = '0.1': expected a number"),
        ({"head_room": None}, "head_room = None, .* expected at least 0"),
        ({"bandwidth": "5"}, "bandwidth = '5', .* a positive number"),
        ({"workers": 1.5}, "workers = 1.5: .* an integer of at least 1"),
        ({"plan": "nonsense"}, "plan is no plan's JSON: "),
        ({"plan": '{"layers": 5}'}, "plan is no plan's JSON: "),
        ({"metadata": {"epoch": 5}}, "metadata = {'epoch': 5}, expected texts by name"),
        ({"metadata": {5: "epoch"}}, "metadata = {5: 'epoch'}, expected texts by name"),
        ({"metadata": "epoch"}, "metadata = 'epoch', expected texts by name"),
        ({"rules": ["*"]}, r"rules = \['\*'\], expected a list such as \[Rule"),
        ({"rules": Rule("*", "zstd")}, r"rules = Rule\(.*\), expected a list"),
        ({"rules": None}, "rules = None, expected a list"),
        ({"tensors": {"": torch.ones(2)}}, "'' can't name a dataset"),
        ({"tensors": {5: torch.ones(2)}}, "5 can't name a dataset, expected"),
        ({"tensors": {"\ud800": torch.ones(2)}}, "can't name a dataset"),
        ({"tensors": {"x": torch.ones(2, dtype=torch.complex64)}}, r"'x'\] is torch.complex64"),
        ({"tensors": {"x": torch.eye(2).to_sparse()}}, "expected a dense tensor"),
        ({"tensors": {"x": torch.ones(2, device="meta")}}, "on meta: expected a dense tensor"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_what_can_not_be_stored_is_named_and_nothing_is_written(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    tensors = arguments.pop("tensors", {"x": random(50, 50)})
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path / "file.h5", tensors, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_rule_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="pattern = 5: expected a text such as"):
        Rule(5, "zstd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"error_bound = '0\.1': expected a number"):
        Rule("*", "sz3", "0.1")  # type: ignore[arg-type]


def test_something_else_than_a_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"tensors\['x'\] is a list, expected a tensor"):
        checkpoint.save(tmp_path / "file.h5", {"x": [1.0]})  # type: ignore[dict-item]


def test_the_command_shows_what_is_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, {"layer.weight": random(100, 100), "steps": torch.tensor(3)})
    assert cli.main(["checkpoint", str(tmp_path / "file.h5")]) == 0
    said = capsys.readouterr().out
    for word in ("layer.weight", "float32", "100x100", "sz3", "40,000", "scalar", "hdf5plugin"):
        assert word in said
    assert cli.main(["checkpoint", str(tmp_path / "none.h5")]) == 1
    assert "no such checkpoint" in capsys.readouterr().err


def test_the_index_says_what_was_asked_for(tmp_path: Path) -> None:
    loaded = saved(tmp_path, {"x": random(500, 40)}, error_bound=0.05)
    with h5py.File(tmp_path / "file.h5") as file:
        content = json.load(io.BytesIO(file["index"][()].tobytes()))
    assert content["format"] == 1
    assert content["tensors"]["x"]["error_bound"] == loaded.index.tensors["x"].error_bound
    assert [piece["predicted"] > 0 for piece in content["tensors"]["x"]["values"]["pieces"]] == [True]
