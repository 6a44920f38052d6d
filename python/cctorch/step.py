"""A training step: forward pass, backward pass and optimizer, launched one kernel at a time or as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from cctorch import distributed
from cctorch.config import Training

Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From inputs, outputs and labels to the mean loss of a batch."""

_WARM_UP_STEPS = 3


class Step:
    """Trains `model` on a batch of `whole` images, of which x and y are this rank's slice.

    `model` averages gradients over the ranks (`distributed.parallel`).
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Training, criterion: Criterion
    ) -> None:
        self.optimizer = optimizer
        self._model, self._settings, self._criterion = model, settings, criterion
        self._parameters = list(model.parameters())
        self._autocast = settings.bf16 and self._parameters[0].device.type == "cuda"

    def __call__(self, x: Tensor, y: Tensor, lr: float, whole: int) -> Tensor:
        """Returns the loss: this rank's part of the mean over the whole batch."""
        self.set_lr(lr)
        return self.run(x, y, whole)

    def set_lr(self, lr: float | Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def run(self, x: Tensor, y: Tensor, whole: int) -> Tensor:
        ranks = distributed.world_size()
        with torch.autocast("cuda", torch.bfloat16) if self._autocast else nullcontext():
            outputs = self._model(x)
            loss = self._criterion(x, outputs, y) if len(y) else outputs.sum()
            if ranks > 1:
                # The mean over the whole batch is the sum of these; gradients are averaged over the ranks.
                loss = loss * (len(y) / whole)
        self.optimizer.zero_grad(set_to_none=True)
        (loss * ranks if ranks > 1 else loss).backward()
        if self._settings.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._settings.clip_grad_norm)
        self.optimizer.step()
        return loss.detach()


class Recorder(Protocol):
    """How a graph is made: `CudaRecorder`, or, in tests, something that runs without a GPU."""

    def warm_up(self, run: Callable[[], Tensor]) -> Tensor:
        """Runs, where what is allocated and chosen for good does not disturb a later recording."""

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What repeats the operations of `run` in the same memory, and where its result is then; not run so far."""


class GraphedStep:
    """A `Step` that is recorded once and replayed for every batch of the same shape.

    The first batches are trained on one kernel at a time, and so is any of another shape, such as an epoch's last.
    Parameters and momentum may change, but not be replaced. For one rank, and torch.optim.SGD with ``fused=True``,
    which reads its learning rate on the device.
    """

    def __init__(self, step: Step, recorder: Recorder) -> None:
        self.optimizer = step.optimizer
        self._step, self._recorder = step, recorder
        self._warm = 0
        self._replay: Callable[[], None] | None = None
        self._lr = torch.zeros(())
        for group in step.optimizer.param_groups:
            for parameter in group["params"]:
                self._lr = self._lr.to(parameter.device)
                if group["momentum"] and "momentum_buffer" not in step.optimizer.state[parameter]:
                    step.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def __call__(self, x: Tensor, y: Tensor, lr: float, whole: int) -> Tensor:
        self._lr.fill_(lr)
        self._step.set_lr(self._lr)
        try:
            return self._run(x, y, whole)
        finally:
            self._step.set_lr(lr)

    def _run(self, x: Tensor, y: Tensor, whole: int) -> Tensor:
        if self._warm == 0:
            self._x, self._y = torch.empty_like(x), torch.empty_like(y)
        if x.shape != self._x.shape:
            return self._step.run(x, y, whole)
        self._x.copy_(x)
        self._y.copy_(y)
        if self._warm < _WARM_UP_STEPS:
            self._warm += 1
            return self._recorder.warm_up(lambda: self._step.run(self._x, self._y, whole))
        if self._replay is None:
            self._replay, self._loss = self._recorder.record(lambda: self._step.run(self._x, self._y, whole))
        self._replay()
        return self._loss


class CudaRecorder:
    def warm_up(self, run: Callable[[], Tensor]) -> Tensor:
        # Aside, as torch asks for: on the default stream, autograd's nodes would stay bound to it.
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            result = run()
        here.wait_stream(aside)
        return result

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()
        return graph.replay, result


def make_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: Training, criterion: Criterion
) -> Step | GraphedStep:
    step = Step(model, optimizer, settings, criterion)
    return GraphedStep(step, CudaRecorder()) if graphed(model, settings) else step


def graphed(model: nn.Module, settings: Training) -> bool:
    return settings.cuda_graphs and next(model.parameters()).is_cuda
