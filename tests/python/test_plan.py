import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cctorch
import pytest
from cctorch.plan import CompressionPlan, LayerPlan, MaskPlan, load_plan, save_plan
from torch import nn


def example() -> CompressionPlan:
    return CompressionPlan(
        "by hand",
        0.5,
        [
            LayerPlan("a", "conv2d", 8, 6, kept_in=[0, 3], kept_out=[1, 2, 5], gather=[0, 1], rank=2),
            LayerPlan("b", "linear", 6, 4, mask=MaskPlan("nm", n=1, m=4), bits=4),
        ],
    )


def test_file_holds_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    save_plan(example(), path)
    plan = load_plan(str(path))
    assert plan == example()
    layer = plan.find("a")
    assert layer is not None
    assert (layer.kept_in, layer.kept_out, layer.gather, layer.rank) == ([0, 3], [1, 2, 5], [0, 1], 2)
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_copies_and_other_processes_get_an_equal_plan() -> None:
    plan = example()
    for other in (copy.deepcopy(plan), copy.copy(plan), pickle.loads(pickle.dumps(plan))):
        assert other == example()
        other.target = 0.25
        assert plan == example()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (example().to_json()[:-20].encode(), "truncated or malformed"),
        (b"", "truncated or malformed"),
        (b"\xff\xfe\x00", "utf-8"),
        (b"[1, 2]", "cctorch_plan"),
        (example().to_json().replace('"rank":2', '"rank":99').encode(), "'a': rank = 99"),
        (example().to_json().replace("[0,3]", "[0,30]").encode(), r"'a': kept_in\[1\] = 30"),
    ],
    ids=["truncated", "empty", "binary", "other JSON", "rank", "index"],
)
def test_damaged_file_is_named_with_the_reason(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_plan(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"rank":2', '"rank":2.7', "layer 'a': rank = 2.7, expected an integer"),
        ('"rank":2', '"rank":18446744073709551615', "rank = 18446744073709551615, expected an integer"),
        ('"rank":2', '"rank":null', "layer 'a': rank = null, expected an integer"),
        ('"bits":4', '"bits":4.9', "layer 'b': bits = 4.9, expected an integer"),
        ("[0,3]", "[0.5,3]", "layer 'a': kept_in = 0.5, expected an integer"),
        ("[0,3]", "3", "layer 'a': kept_in = 3, expected a list of integers"),
        ('"in_channels":8', '"in_channels":8.7', "layer 'a': in_channels = 8.7"),
        ('"m":4', '"m":4.5', "the mask of layer 'b': m = 4.5"),
        ('"rank":2', '"rnak":2', "unknown key 'rnak', expected one of name, .* rank"),
        ('"m":4', '"M":4', "the mask of layer 'b' has the unknown key 'M'"),
        ('"nm"', '"magnitude"', "'sparsity' not found"),
        ('"cctorch_plan": 1', '"cctorch_plan": 1.5', "format version = 1.5"),
        ('"layers": [', '"layers": {}, "was": [', "unknown key 'was'"),
        ('"target": 0.5', '"target": 1e999', "out of range|1e999"),
    ],
)
def test_what_a_hand_got_wrong_is_named(tmp_path: Path, before: str, after: str, message: str) -> None:
    text = example().to_json()
    assert before in text
    path = tmp_path / "plan.json"
    path.write_text(text.replace(before, after, 1))
    with pytest.raises(ValueError, match=message):
        load_plan(path)


@pytest.mark.parametrize("layers", ["{}", "null", '"abc"'])
def test_layers_that_are_no_list_are_refused(tmp_path: Path, layers: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(f'{{"cctorch_plan": 1, "method": "x", "target": 0.5, "layers": {layers}}}')
    with pytest.raises(ValueError, match=r"layers is of type .*, expected a list of layers"):
        load_plan(path)


@pytest.mark.parametrize("target", [float("nan"), float("inf")])
def test_a_target_that_json_can_not_hold_is_not_written(tmp_path: Path, target: float) -> None:
    with pytest.raises(ValueError, match=r"target = (nan|inf), expected a finite number"):
        save_plan(CompressionPlan("x", target), tmp_path / "plan.json")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_plan(tmp_path / "plan.json")


def test_impossible_plan_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(ValueError, match="occurs twice"):
        save_plan(CompressionPlan(layers=[LayerPlan("a", "linear", 2, 2), LayerPlan("a", "linear", 2, 2)]), path)
    assert not path.exists()


@pytest.mark.parametrize("function", ["apply", "prepare", "repair", "save_plan"])
def test_what_is_no_plan_is_named(function: str, tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    calls: dict[str, Callable[[Any], object]] = {
        "apply": lambda plan: cctorch.apply(model, plan),
        "prepare": lambda plan: cctorch.prepare(model, plan),
        "repair": lambda plan: cctorch.repair(model, model, plan, []),
        "save_plan": lambda plan: cctorch.save_plan(plan, tmp_path / "plan.json"),
    }
    with pytest.raises(TypeError, match=f"{function}: plan is a str, expected a CompressionPlan: the `plan` of what"):
        calls[function]("plan.json")
    assert not list(tmp_path.iterdir())
