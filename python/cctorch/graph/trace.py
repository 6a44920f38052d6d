import contextlib
import io
import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cctorch.graph.hooks import from_hooks
from cctorch.graph.model_graph import ModelGraph
from cctorch.graph.rules import RULES
from cctorch.graph.walker import Walker
from cctorch.modes import evaluating


def trace(model: nn.Module, example: Tensor) -> ModelGraph:
    """Lists the layers of ``model`` and follows its channels from layer to layer.

    An operation that is not known keeps all channels that it reads, and a warning names it. A model that cannot be
    exported gets a graph in which no filter can be removed, and one warning. The model and its mode stay as they are.

    Args:
        model: takes one tensor, batch first.
        example: an input of the model, e.g. 1 x 3 x 32 x 32, on its device.

    Raises:
        ValueError: the model does not run on ``example``.
    """
    if example.dim() < 2 or example.shape[0] < 1:
        raise ValueError(f"trace: example has shape {tuple(example.shape)}, expected a batch, e.g. (1, 3, 32, 32)")
    # torch.export treats sizes of 1 as broadcasting; two examples keep the batch apart.
    example = torch.cat([example, example]) if example.shape[0] == 1 else example
    with evaluating(model):
        try:
            with _quiet():
                program = torch.export.export(model, (example,), strict=False)
        except Exception as error:
            reason = str(error).strip().split("\n")[0][:200]
            return from_hooks(model, example, f"it cannot be exported ({type(error).__name__}: {reason})")
        walker = Walker(model, program, example.shape[0])
        walker.run(RULES)
        unseen = walker.unseen()
        if unseen is not None:
            return from_hooks(model, example, f"layer '{unseen}' does not run in evaluation mode")
    return walker.finish()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Where torch.export gives up it logs and prints what it has so far; the graph's one warning says it shortly."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    disabled, logger.disabled = logger.disabled, True
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.disabled = disabled
