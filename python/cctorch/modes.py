from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Puts the training mode of every module back at the end."""
    training = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; gives the device of the model."""
    first = next(model.parameters(), None)
    with modes_restored(model), torch.no_grad():
        model.eval()
        yield torch.device("cpu") if first is None else first.device


@contextmanager
def evaluating_with_gradients(model: nn.Module) -> Iterator[None]:
    """Evaluation mode in which gradients can be taken of every module, whatever mode of autograd is on outside.

    cuDNN has those of recurrent layers in training mode alone, which differs by their dropout: that is 0 meanwhile.
    """
    dropouts = {module: module.dropout for module in model.modules() if isinstance(module, nn.RNNBase)}
    with modes_restored(model), torch.inference_mode(False), torch.enable_grad():
        model.eval()
        try:
            for recurrent in dropouts:
                recurrent.dropout = 0.0
                recurrent.train()
            yield
        finally:
            for recurrent, dropout in dropouts.items():
                recurrent.dropout = dropout
