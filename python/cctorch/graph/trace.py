import contextlib
import io
import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cctorch.graph import branches
from cctorch.graph.hooks import from_hooks
from cctorch.graph.model_graph import ModelGraph
from cctorch.graph.regions import inline_regions, runs_subgraphs
from cctorch.graph.rules import RULES
from cctorch.graph.sizes import keep_what_sizes_count_on
from cctorch.graph.walker import Walker
from cctorch.modes import evaluating, modes_restored
from cctorch.nn.fake_quant import NoScaleError

_LOUD = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")


def trace(model: nn.Module, example: Tensor) -> ModelGraph:
    """Lists the layers of ``model`` and follows its channels from layer to layer.

    An operation that is not known keeps all channels that it reads, and a warning names it. So does a module that
    computes with the number of its channels, as ``x / x.shape[1]``: a narrower copy is compared. A layer whose type or
    attributes the model reads, as ``isinstance(m, nn.Conv2d)``, is left alone. So are layers in the branches of
    ``torch.cond``, which are not listed: which of them run is not known. A model that cannot be exported gets a graph
    in which no filter can be removed, and one warning. Each weight of an ``nn.LSTM`` is a layer, named as the parameter
    is (``rnn.weight_hh_l0``), of which the rank alone can change. Where layers run in training mode only, as
    GoogLeNet's auxiliary heads, the channels are those of training mode, so that these layers go on working; what runs
    in evaluation mode is listed. The model and its mode stay as they are.

    Args:
        model: takes one tensor, batch first.
        example: an input of the model, e.g. 1 x 3 x 32 x 32, on its device.

    Raises:
        ValueError: the model does not run on ``example``, or has a :class:`~cctorch.nn.FakeQuant` without a scale.
    """
    if example.dim() < 2 or example.shape[0] < 1:
        raise ValueError(f"trace: example has shape {tuple(example.shape)}, expected a batch, e.g. (1, 3, 32, 32)")
    # torch.export treats sizes of 1 as broadcasting; two examples keep the batch apart.
    example = torch.cat([example, example]) if example.shape[0] == 1 else example
    # Dynamo would compile the modes that look on, of a model that is compiled.
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        walker = _walked(model, example)
        if isinstance(walker, Walker) and walker.unseen() is not None:
            walker = _with_heads_for_training(model, example, walker)
        return from_hooks(model, example, walker) if isinstance(walker, str) else walker.finish(branches.find(walker))


def _walked(model: nn.Module, example: Tensor) -> Walker | str:
    """The graph of the model in its present mode, or why there is none."""

    def exported(model: nn.Module) -> torch.export.ExportedProgram:
        with _quiet():
            program = inline_regions(torch.export.export(model, (example,), strict=False))
            if runs_subgraphs(program):
                # Where Dynamo does not compile them, they hold copies of the parameters that they read.
                with torch.compiler.set_stance("default"):
                    program = inline_regions(torch.export.export(model, (example,), strict=False))
            return program

    try:
        program = exported(model)
    except NoScaleError:
        # The layers could be seen in a run, but the scale would start from the example.
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:200]
        return f"it cannot be exported ({type(error).__name__}: {reason})"
    walker = Walker(model, program, example.shape[0])
    walker.run(RULES)
    keep_what_sizes_count_on(model, example, walker, exported)
    return walker


def _with_heads_for_training(model: nn.Module, example: Tensor, evaluated: Walker) -> Walker | str:
    """Layers that run in training only read channels too, which stay; counted is what runs in evaluation mode."""
    with modes_restored(model):
        walker = _walked(model.train(), example)
    unseen = evaluated.unseen() if isinstance(walker, str) else walker.unseen()
    if isinstance(walker, str) or unseen is not None:
        detail = f", and in training {walker}" if isinstance(walker, str) else ", nor in training"
        return f"layer '{unseen}' does not run in evaluation mode{detail}"
    walker.specs = evaluated.specs
    walker.leave_alone(evaluated.left_alone)
    return walker


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Where torch.export gives up it logs and prints what it has so far; the graph's one warning says it shortly."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    disabled = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, before in zip(loggers, disabled, strict=True):
            logger.disabled = before
