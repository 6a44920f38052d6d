"""The compression plan and its file."""

from pathlib import Path

from cctorch import atomic
from cctorch._C import CompressionPlan, LayerPlan, LayerSpec, MaskPlan

__all__ = ["CompressionPlan", "LayerPlan", "LayerSpec", "MaskPlan", "load_plan", "save_plan"]


def check_plan(plan: object, function: str) -> None:
    """Raises TypeError where `function` was given something else, ValueError where the plan is impossible."""
    if not isinstance(plan, CompressionPlan):
        raise TypeError(
            f"{function}: plan is a {type(plan).__name__}, expected a CompressionPlan: the `plan` of what compress "
            "returns, or load_plan(path)"
        )
    plan.validate()


def save_plan(plan: CompressionPlan, path: str | Path) -> None:
    """Writes the plan as JSON. A reader sees the old file or the whole new one."""
    check_plan(plan, "save_plan")
    atomic.write(Path(path), plan.to_json().encode())


def load_plan(path: str | Path) -> CompressionPlan:
    """Reads a plan that :func:`save_plan` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, is not a plan, or its indices or ranks are impossible; names the file.
    """
    try:
        return CompressionPlan.from_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
