"""The device of a run, or of one of its ranks."""

from __future__ import annotations

import torch

from cctorch import _C, distributed
from cctorch.config import Config, ConfigError


def select_device(config: Config) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda': torch sees no CUDA device; expected auto or cpu on this machine")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if not distributed.launched():
        return torch.device("cuda")
    if distributed.local_rank() >= torch.cuda.device_count():
        raise ConfigError(
            f"torchrun --nproc-per-node: rank {distributed.local_rank()} of this machine has no GPU; expected at most "
            f"{torch.cuda.device_count()} processes, one for each GPU, or device=cpu"
        )
    _refuse_graphs(config)
    return torch.device("cuda", distributed.local_rank())


def set_up(config: Config) -> torch.device:
    """The device, and what torch and the C library are told about how to use it."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    device = select_device(config)
    if device.type == "cpu":
        _C.keep_freed_memory()
    return device


def _refuse_graphs(config: Config) -> None:
    """DistributedDataParallel can be recorded under conditions on NCCL and its threads that are not met here."""
    for name, settings in (("train", config.train), ("finetune", config.finetune), ("regularize", config.regularize)):
        if settings is not None and settings.cuda_graphs:
            raise ConfigError(f"{name}.cuda_graphs = True with several ranks: expected false, or one process")


def describe(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    ranks = distributed.world_size()
    return name if ranks == 1 else f"{ranks} ranks of {name}"
