"""What a model costs and how good it is: accuracy, latency, time of each layer, parameters, bytes."""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cctorch import distributed
from cctorch.modes import evaluating
from cctorch.nn import GatherChannels
from cctorch.pairs import pairs


def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, across_ranks: bool = False) -> float:
    """Top-1 accuracy in percent over (inputs, targets), in evaluation mode.

    The classes are the second dimension of the model's outputs; targets are their indices, one for each of the rest.

    Args:
        across_ranks: ``batches`` are this rank's share; every rank calls, and gets the accuracy over all of them.

    Raises:
        ValueError: ``batches`` holds no example, or targets of another shape.
        TypeError: ``batches`` gives something else than pairs.
    """
    total = 0
    with evaluating(model) as device:
        correct = torch.zeros((), dtype=torch.int64, device=device)
        for inputs, targets in pairs(batches, "accuracy"):
            predicted = model(inputs.to(device, non_blocking=True)).argmax(1)
            if targets.shape != predicted.shape:  # (N,) and (N, 1) would be compared each with each
                raise ValueError(
                    f"accuracy: targets of shape {tuple(targets.shape)}, expected the indices of the classes, of shape "
                    f"{tuple(predicted.shape)}"
                )
            correct += (predicted == targets.to(device, non_blocking=True)).sum()
            total += targets.numel()
    hits = int(correct)
    if across_ranks:
        total, hits = distributed.sum_(torch.tensor([total, hits])).tolist()
    if total == 0:
        raise ValueError("accuracy: batches is empty, expected at least one (inputs, targets)")
    return 100.0 * hits / total


def latency(model: nn.Module, example: Tensor, repeats: int = 50, warmup: int = 10) -> float:
    """Median seconds of one forward pass in evaluation mode, at the batch size of ``example``."""
    _check_repeats("latency", repeats)
    with evaluating(model) as device:
        example = example.to(device)
        for _ in range(warmup):
            model(example)
        return statistics.median(_seconds(lambda: model(example), device) for _ in range(repeats))


def interleaved(
    models: Sequence[nn.Module], example: Tensor, repeats: int = 30, warmup: int = 3, seconds: float = 0.05
) -> list[list[float]]:
    """Seconds of forward passes of several models, which take turns: what else the machine does hits all of them alike.

    Args:
        models: on the device of ``example``.
        repeats: at most so many runs of each model, and at least 5.
        warmup: runs of each model that do not count.
        seconds: stops after so long, once each model had its 5 runs.

    Returns:
        For each model, its runs in order: run i of one was made beside run i of another.
    """
    _check_repeats("interleaved", repeats)
    runs: list[list[float]] = [[] for _ in models]
    with contextlib.ExitStack() as modes:
        for model in models:
            modes.enter_context(evaluating(model))
        begin = time.perf_counter()
        for turn in range(-warmup, repeats):
            if turn >= min(repeats, 5) and time.perf_counter() - begin > seconds:
                break
            for model, of_model in zip(models, runs, strict=True):
                taken = _seconds(lambda model=model: model(example), example.device)  # type: ignore[misc]
                if turn >= 0:
                    of_model.append(taken)
    return runs


def seconds_of_others() -> float:
    """Processor seconds that everything but this process has used since the machine started; 0 where none are known."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        user, nice, system, _, _, interrupts, soft_interrupts, steal = (int(field) for field in fields[1:9])
    except (OSError, ValueError):
        return 0.0
    busy = user + nice + system + interrupts + soft_interrupts + steal
    return busy / os.sysconf("SC_CLK_TCK") - time.process_time()


def layer_times(model: nn.Module, example: Tensor, repeats: int = 20, warmup: int = 5) -> dict[str, float]:
    """Median seconds that each layer takes in one forward pass in evaluation mode.

    Keys are paths of the dense model: what :func:`cctorch.apply` put in a layer's place counts as that layer.
    """
    _check_repeats("layer_times", repeats)
    layers = dict(_layers(model))
    seconds: dict[str, list[float]] = {}
    with evaluating(model) as device, _timed(layers, device) as reads:
        example = example.to(device)
        for step in range(warmup + repeats):
            model(example)
            _wait(device)
            for name, spans in reads.items():
                if step >= warmup:
                    seconds.setdefault(name, []).append(sum(read() for read in spans))
            reads.clear()
    return {name: statistics.median(seconds[name]) for name in layers if name in seconds}


@contextmanager
def _timed(layers: dict[str, nn.Module], device: torch.device) -> Iterator[dict[str, list[Callable[[], float]]]]:
    running: dict[str, Callable[[], Callable[[], float]]] = {}
    reads: dict[str, list[Callable[[], float]]] = {}
    hooks = []
    for path, layer in layers.items():

        def before(*_: object, path: str = path) -> None:
            running[path] = _timer(device)

        def after(*_: object, path: str = path) -> None:
            reads.setdefault(path, []).append(running.pop(path)())

        hooks += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    try:
        yield reads
    finally:
        for hook in hooks:
            hook.remove()


def parameters(model: nn.Module) -> int:
    """Number of parameters; a shared one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _check_repeats(name: str, repeats: int) -> None:
    if repeats < 1:
        raise ValueError(f"{name}: repeats = {repeats}, expected at least 1")


def _timer(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Starts now. Calling the result stops; what that returns gives the seconds, after the device was waited for."""
    if device.type != "cuda":
        begin = time.perf_counter()

        def stop() -> Callable[[], float]:
            seconds = time.perf_counter() - begin
            return lambda: seconds

        return stop
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()

    def stop_event() -> Callable[[], float]:
        end.record()
        return lambda: float(start.elapsed_time(end)) / 1000

    return stop_event


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    stop = _timer(device)
    run()
    read = stop()
    _wait(device)
    return read()


def _layers(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    children = list(module.named_children())
    if isinstance(module, GatherChannels) or parametrize.is_parametrized(module) or not children:
        yield path, module
        return
    for name, child in children:
        yield from _layers(child, f"{path}.{name}" if path else name)
