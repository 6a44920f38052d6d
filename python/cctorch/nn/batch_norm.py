import torch
from torch import Tensor, nn

from cctorch import distributed, ops
from cctorch.nn.synchronized import synchronized_batch_norm
from cctorch.nn.transforms import within_transform


class BatchNorm2d(nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d``, fast on CPU in channels_last whatever the number of channels.

    `cctorch.apply` makes it of every ``nn.BatchNorm2d`` of a model. On other devices, in other layouts, in an exported
    program and under ``torch.func`` it is PyTorch's own. Parameters, buffers and state dict are the same.

    Where ``synchronized`` is set, and torch.distributed has more than one rank, it trains on the statistics of all
    ranks' examples, as if one process had them: ``torch.nn.SyncBatchNorm``, on CPU too.
    """

    synchronized = False

    def forward(self, input: Tensor) -> Tensor:
        if self.training and self.synchronized and distributed.world_size() > 1:
            weight = self.weight if self.affine else input.new_ones(self.num_features)
            bias = self.bias if self.affine else input.new_zeros(self.num_features)
            y, mean, variance = synchronized_batch_norm(input, weight, bias, self.eps)
            self._track(mean, variance)
            return y
        if not self._ours(input):
            return super().forward(input)
        if not self.training and self.running_mean is not None and self.running_var is not None:
            return ops.batch_norm_inference(
                input, self.weight, self.bias, self.running_mean, self.running_var, self.eps
            )
        y, mean, inverse_deviation = ops.batch_norm(input, self.weight, self.bias, self.eps)
        if self.training and self.track_running_stats:
            count = input.numel() // input.size(1)
            with torch.no_grad():
                variance = (inverse_deviation**-2 - self.eps).clamp_min_(0.0)
                self._track(mean, variance * (count / (count - 1)))
        return y

    def _ours(self, x: Tensor) -> bool:
        return (
            self.affine
            and x.dim() == 4
            and x.device.type == "cpu"
            and x.dtype == self.weight.dtype
            and x.dtype in (torch.float32, torch.float64)
            and x.is_contiguous(memory_format=torch.channels_last)
            and x.numel() > x.size(1)
            and not torch.compiler.is_exporting()
            and not within_transform()
        )

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats:
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)
