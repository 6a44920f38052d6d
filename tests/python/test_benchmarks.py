"""Every benchmark finds what it imports of the library: a name that has moved would show only when somebody runs it."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("name", sorted(file.stem for file in BENCHMARKS.glob("*.py")))
def test_it_imports(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCHMARKS)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("cctorch") or (BENCHMARKS / f"{error.name}.py").exists():
            raise
        pytest.skip(f"{error.name} is not installed")
    finally:
        for imported in set(sys.modules) - before:
            if (BENCHMARKS / f"{imported}.py").exists():
                del sys.modules[imported]
    assert Path(str(module.__file__)).parent == BENCHMARKS
