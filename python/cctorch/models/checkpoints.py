"""Checkpoints of networks, read without running any code in them."""

from __future__ import annotations

import os
import pickle
from typing import Any

import torch
from torch import Tensor, nn


class CheckpointError(ValueError):
    """A checkpoint that can't be used: the message names the file and what does not fit."""


def load_tensors(path: str | os.PathLike[str]) -> Any:
    """The tensors and plain values in a file, on the CPU. Raises CheckpointError for a damaged or unsafe file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors and plain values (which is refused): copy it again"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged, probably truncated ({error}): copy it again") from error


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads a published checkpoint: a state dict, or a dict holding one, keys with or without "module."."""
    content = load_tensors(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dict: expected a dict of tensors, or one under 'state_dict'")
    load_state(model, {key.removeprefix("module."): value for key, value in state.items()}, str(path))


def load_state(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """`model.load_state_dict(state)`; raises CheckpointError naming the first keys and shapes that do not fit."""
    own = model.state_dict()
    problems = [f"{key} is missing" for key in own if key not in state and not key.endswith("num_batches_tracked")]
    problems += [f"{key} is unknown to the model" for key in state if key not in own]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{source} is a checkpoint of another architecture: {'; '.join(problems[:3])}{more}. "
            "Choose the model that the checkpoint was made from"
        )
    model.load_state_dict(state, strict=False)
