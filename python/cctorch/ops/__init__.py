"""Operators: typed functions over ``torch.ops.cctorch.*``.

Every operator runs on CPU and CUDA in float32, float64, float16 and bfloat16, has a Meta kernel, and keeps the memory
format of its input. All are traced by ``torch.compile(fullgraph=True)`` and ``torch.export``.

Differentiate them by ``backward`` and ``torch.autograd.grad``, of ``torch.vmap`` too. ``torch.func.grad`` and its kin
(``vjp``, ``jvp``, ``jacrev``) take :func:`low_rank_linear`, :func:`low_rank_conv2d`, :func:`tucker2_conv2d`,
:func:`low_rank_lstm`, :func:`hard_concrete` and :func:`hard_concrete_open`, which are PyTorch's operators. The others
are refused: their derivatives are C++, of which PyTorch has no transforms.
"""

from cctorch.ops import batching as _batching  # noqa: F401
from cctorch.ops.batch_norm import batch_norm, batch_norm_inference
from cctorch.ops.channel_gate import channel_gate
from cctorch.ops.fake_quant import fake_quant, fake_quant_groups, fake_quant_offset, pact
from cctorch.ops.fake_quant_weights import fake_quant_weights
from cctorch.ops.float_quant import fp8_quant, power_of_two_quant
from cctorch.ops.gates import hard_concrete, hard_concrete_open, sigmoid_gate
from cctorch.ops.gather_channels import gather_channels
from cctorch.ops.low_rank import low_rank_conv2d, low_rank_linear, truncated_svd, tucker2, tucker2_conv2d
from cctorch.ops.low_rank_lstm import low_rank_lstm
from cctorch.ops.mask import apply_mask, block_masks, channel_masks, magnitude_masks, magnitude_prune, nm_masks
from cctorch.ops.quant_range import observe_range_, quant_range, quant_range_offset
from cctorch.ops.soft_threshold import soft_threshold
from cctorch.ops.value_grid import (
    binary_code_quant,
    binary_quant,
    codebook_indices,
    codebook_quant,
    codebook_update,
    ternary_quant,
)

__all__ = [
    "apply_mask",
    "batch_norm",
    "batch_norm_inference",
    "binary_code_quant",
    "binary_quant",
    "block_masks",
    "channel_gate",
    "channel_masks",
    "codebook_indices",
    "codebook_quant",
    "codebook_update",
    "fake_quant",
    "fake_quant_groups",
    "fake_quant_offset",
    "fake_quant_weights",
    "fp8_quant",
    "gather_channels",
    "hard_concrete",
    "hard_concrete_open",
    "low_rank_conv2d",
    "low_rank_linear",
    "low_rank_lstm",
    "magnitude_masks",
    "magnitude_prune",
    "nm_masks",
    "observe_range_",
    "pact",
    "power_of_two_quant",
    "quant_range",
    "quant_range_offset",
    "sigmoid_gate",
    "soft_threshold",
    "ternary_quant",
    "truncated_svd",
    "tucker2",
    "tucker2_conv2d",
]
