"""A network in shards, one per rank (FSDP2): how it gets into them, and how whole tensors come out of them.

Alone, or where nothing is sharded, `whole` and `gathered` give back what they are given. All functions are to be called
on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cctorch import distributed

_SEQUENCES = (nn.Sequential, nn.ModuleList)


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """`model`, the same on every rank, in shards of its parameters' first dimension, in place.

    What stands in a sequence, such as a ResNet's blocks, is moved to `device`, and whole in a pass, one after the
    other; the rest (first and last layers) belongs together.
    """
    distributed.assert_identical("before it is sharded", model.state_dict().items())
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP takes no other
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole ones, on the CPU, gathered one after the other."""
    return {name: whole(tensor).cpu() for name, tensor in tensors.items()}


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """Of `tensor`, the same on every rank, the shard that `like` has."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.contiguous(), like.device_mesh, like.placements, src_data_rank=None)


def _blocks(module: nn.Module, in_sequence: bool = False) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, _SEQUENCES):
            yield from _blocks(child, True)
        elif in_sequence and next(child.parameters(), None) is not None:
            yield child
