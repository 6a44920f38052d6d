"""Operators: typed functions over ``torch.ops.cctorch.*``.

Every operator runs on CPU and CUDA in float32, float64, float16 and bfloat16, has a Meta kernel, and keeps the memory
format of its input. All are traced by ``torch.compile(fullgraph=True)`` and ``torch.export``.
"""

from cctorch.ops import batching as _batching  # noqa: F401
from cctorch.ops.batch_norm import batch_norm, batch_norm_inference
from cctorch.ops.channel_gate import channel_gate
from cctorch.ops.fake_quant import fake_quant
from cctorch.ops.fake_quant_weights import fake_quant_weights
from cctorch.ops.gates import hard_concrete, hard_concrete_open, sigmoid_gate
from cctorch.ops.low_rank import low_rank_conv2d, low_rank_linear
from cctorch.ops.mask import apply_mask, block_masks, channel_masks, magnitude_masks, magnitude_prune, nm_masks
from cctorch.ops.soft_threshold import soft_threshold

__all__ = [
    "apply_mask",
    "batch_norm",
    "batch_norm_inference",
    "block_masks",
    "channel_gate",
    "channel_masks",
    "fake_quant",
    "fake_quant_weights",
    "hard_concrete",
    "hard_concrete_open",
    "low_rank_conv2d",
    "low_rank_linear",
    "magnitude_masks",
    "magnitude_prune",
    "nm_masks",
    "sigmoid_gate",
    "soft_threshold",
]
