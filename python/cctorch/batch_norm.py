from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cctorch import distributed
from cctorch.modes import modes_restored
from cctorch.nn import BatchNorm2d
from cctorch.pairs import pairs


@torch.no_grad()
def reestimate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, across_ranks: bool = False) -> None:
    """Replaces the running statistics of all batch normalizations by their average over ``batches``.

    Compressed layers feed other distributions to the normalizations than those they were trained on. Every batch counts
    the same. Only normalizations run in training mode; the mode of every module is put back, as is the momentum.

    Args:
        model: may have no batch normalization; then nothing happens.
        batches: (inputs, targets), on any device; the targets are not used.
        across_ranks: ``batches`` are this rank's slices of the batches, equally many on every rank, and every rank
            calls. The statistics of :class:`cctorch.nn.BatchNorm2d` are those of the whole batches, as one process
            would find them; those of other normalizations are the mean of the slices'.

    Raises:
        ValueError: ``batches`` is empty. The statistics are unchanged then, and when a batch or the model raises.
        TypeError: ``batches`` gives something else than pairs.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return
    device = next(model.parameters()).device
    before = [(norm, norm.momentum, [buffer.clone() for buffer in norm.buffers()]) for norm in norms]
    ours = [(norm, norm.synchronized) for norm in norms if isinstance(norm, BatchNorm2d)]
    seen = 0
    try:
        with modes_restored(model):
            model.eval()
            for norm in norms:
                norm.reset_running_stats()
                # None: a cumulative average.
                norm.momentum = None
                norm.train()
            for norm, _ in ours:
                norm.synchronized = across_ranks
            for inputs, _ in pairs(batches, "reestimate"):
                model(inputs.to(device))
                seen += 1
        if seen == 0:
            raise ValueError("reestimate: batches is empty, expected at least one (inputs, targets)")
        if across_ranks:
            for norm in norms:
                for statistics in (norm.running_mean, norm.running_var):
                    assert statistics is not None
                    distributed.sum_(statistics).div_(distributed.world_size())
    except BaseException:
        for norm, _, buffers in before:
            for buffer, value in zip(norm.buffers(), buffers, strict=True):
                buffer.copy_(value)
        raise
    finally:
        for norm, momentum, _ in before:
            norm.momentum = momentum
        for norm, synchronized in ours:
            norm.synchronized = synchronized
