"""The jobs of examples/slurm under a Slurm of their own. On CPU: what Slurm calls a GPU there is a file."""

from __future__ import annotations

import sys
from pathlib import Path

# Networks, configurations and data sets are those of the other tests.
sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
