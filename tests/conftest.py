"""Every run of the tests draws the same hypothesis examples, so that a commit passes or fails for what is in it.

``--hypothesis-profile=default`` draws new ones: `make explore` looks for what no run has seen yet.
"""

import os

from hypothesis import settings

# pytest-xdist has a worker for each core, and the OpenMP threads of several workers wait for each other for longer than
# they work. Set before torch is imported, for the processes that tests start too. Tests of threads set their number.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")
