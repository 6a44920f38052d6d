"""Operators: typed functions over ``torch.ops.cctorch.*``.

Every operator runs on CPU and CUDA in float32, float64, float16 and bfloat16, has a Meta kernel, and keeps the memory
format of its input. All are traced by ``torch.compile(fullgraph=True)`` and ``torch.export``.
"""

from cctorch.ops.batch_norm import batch_norm, batch_norm_inference
from cctorch.ops.channel_gate import channel_gate
from cctorch.ops.fake_quant import fake_quant
from cctorch.ops.low_rank import low_rank_conv2d, low_rank_linear, truncated_svd, tucker2, tucker2_conv2d
from cctorch.ops.mask import apply_mask, channel_mask, magnitude_masks, nm_mask

__all__ = [
    "apply_mask",
    "batch_norm",
    "batch_norm_inference",
    "channel_gate",
    "channel_mask",
    "fake_quant",
    "low_rank_conv2d",
    "low_rank_linear",
    "magnitude_masks",
    "nm_mask",
    "truncated_svd",
    "tucker2",
    "tucker2_conv2d",
]
