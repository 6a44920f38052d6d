"""Numbers on a GPU as on a CPU: no TF32, and sums in the same order each time. And a session that outlives its device.

An illegal access to memory takes the process's CUDA context, and every test after it would fail. So the session ends
there, as one that is interrupted. Behind it, and behind a test that ended the process, others go on:

    export CCTORCH_TEST_BEGUN=$(mktemp)
    for _ in {1..20}; do python -m pytest tests/gpu; [[ $? =~ ^[015]$ ]] && break; done
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Networks, configurations and data sets are those of the other tests.
sys.path.insert(0, str(Path(__file__).parents[1] / "python"))

_BEGUN = Path(os.environ.get("CCTORCH_TEST_BEGUN", os.devnull))


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark = False, False, True, False
    yield
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what an earlier session has begun."""
    begun = set(_BEGUN.read_text().splitlines())
    items[:] = [item for item in items if item.nodeid not in begun]


def pytest_runtest_logstart(nodeid: str) -> None:
    with _BEGUN.open("a") as file:
        file.write(f"{nodeid}\n")


def pytest_runtest_logfinish(nodeid: str) -> None:
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"{nodeid} lost the CUDA context: {error}", returncode=pytest.ExitCode.INTERRUPTED)
