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
