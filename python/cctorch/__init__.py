"""cctorch: compression-aware training for PyTorch and LibTorch.

Custom ops (fake-quantization, masks, channel gates, low rank), modules over them, and Collaborative Compression:
channel pruning and low-rank decomposition on one budget of multiply-accumulates.

    import cctorch

    compression = cctorch.compress(model, train_batches, example, target=0.5)
    optimizer = ...
    cctorch.apply(model, compression.plan, optimizer)
"""

from pathlib import Path

import torch

if not torch.__version__.startswith("2.11."):
    raise ImportError(
        f"cctorch is built against torch 2.11, but torch {torch.__version__} is installed: pip install torch==2.11.0"
    )

_library = Path(__file__).parent / "lib" / "libcctorch.so"
if not _library.exists():
    raise ImportError(f"{_library} is missing: install cctorch with pip, or run `make build` in a source checkout")
torch.ops.load_library(str(_library))  # type: ignore[no-untyped-call]

from cctorch import nn, ops, regularize  # noqa: E402
from cctorch.apply import apply  # noqa: E402
from cctorch.codes import dequantized_state_dict, quantized_state_dict  # noqa: E402
from cctorch.collaborative import Compression, compress  # noqa: E402
from cctorch.plan import CompressionPlan, LayerPlan, LayerSpec, MaskPlan, load_plan, save_plan  # noqa: E402
from cctorch.prepare import convert, prepare  # noqa: E402
from cctorch.repair import repair  # noqa: E402

__version__ = "0.1.0"

# For find_package(cctorch): -DCMAKE_PREFIX_PATH=$(python -c "import cctorch; print(cctorch.cmake_prefix_path)")
cmake_prefix_path = str(Path(__file__).parent)

__all__ = [
    "Compression",
    "CompressionPlan",
    "LayerPlan",
    "LayerSpec",
    "MaskPlan",
    "apply",
    "cmake_prefix_path",
    "compress",
    "convert",
    "dequantized_state_dict",
    "load_plan",
    "nn",
    "ops",
    "prepare",
    "quantized_state_dict",
    "regularize",
    "repair",
    "save_plan",
]
