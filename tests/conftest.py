"""Every run of the tests draws the same hypothesis examples, so that a commit passes or fails for what is in it.

``--hypothesis-profile=default`` draws new ones: `make explore` looks for what no run has seen yet.
"""

import os

import pytest
from hypothesis import settings

# pytest-xdist has a worker for each core, and the OpenMP threads of several workers wait for each other for longer than
# they work. Set before torch is imported, for the processes that tests start too. Tests of threads set their number.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest test first, most of which is waiting for torchrun: last, the other workers would wait for it."""
    items.sort(key=lambda item: item.path.name != "test_torchrun.py")
