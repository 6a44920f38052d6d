"""Compressed checkpoints in HDF5: a plan and tensors, the weights within an error bound that is checked.

    from cctorch import checkpoint

    checkpoint.save("model.h5", model.state_dict(), plan=plan, error_bound=0.01)
    model.load_state_dict(checkpoint.load("model.h5").tensors)

Needs `h5py` and `hdf5plugin`: pip install cctorch[hdf5].
"""

try:
    import h5py as _h5py  # noqa: F401
    import hdf5plugin as _hdf5plugin  # noqa: F401
except ImportError as error:
    raise ImportError("cctorch.checkpoint needs h5py and hdf5plugin: pip install cctorch[hdf5]") from error

from cctorch.checkpoint.codec import CODECS, Codec
from cctorch.checkpoint.index import Index, Piece, Record, Stored
from cctorch.checkpoint.order import balanced, johnson, makespan
from cctorch.checkpoint.read import Checkpoint, info, load
from cctorch.checkpoint.report import Report
from cctorch.checkpoint.rules import EXACT, Rule
from cctorch.checkpoint.show import show
from cctorch.checkpoint.write import save
from cctorch.models import CheckpointError

__all__ = [
    "CODECS",
    "EXACT",
    "Checkpoint",
    "CheckpointError",
    "Codec",
    "Index",
    "Piece",
    "Record",
    "Report",
    "Rule",
    "Stored",
    "balanced",
    "info",
    "johnson",
    "load",
    "makespan",
    "save",
    "show",
]
