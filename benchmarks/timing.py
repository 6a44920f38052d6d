"""What the benchmarks share: medians of runs taken in turns, and what machine they ran on."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def in_turns(
    functions: Mapping[str, Callable[[], object]],
    seconds: float = 3.0,
    device: str = "cpu",
    warmup: int = 2,
    before: Callable[[str], object] = lambda name: None,
) -> dict[str, float]:
    """Median milliseconds of each function; all take turns, so that what else the machine does hits them alike.

    Runs until ``seconds`` are over and every function had three turns; one that alone takes longer than ``seconds`` has
    one turn. ``before`` is called with a function's name ahead of each run, and not timed. On a GPU a run is between
    two events on its stream, the first of which the GPU reaches when it has nothing else to do.
    """
    runs: dict[str, list[float]] = {name: [] for name in functions}
    slow = set()

    def run(name: str) -> float:
        before(name)
        return _on_gpu(functions[name]) if device == "cuda" else _on_cpu(functions[name])

    for name, function in functions.items():
        before(name)
        function()  # what is compiled or allocated once
        first = run(name)
        if first > 1e3 * seconds:
            runs[name].append(first)
            slow.add(name)
    begin = time.perf_counter()
    turn = -warmup
    while turn < 3 or time.perf_counter() - begin < seconds:
        for name in functions:
            if name not in slow:
                taken = run(name)
                if turn >= 0:
                    runs[name].append(taken)
        turn += 1
    return {name: statistics.median(times) for name, times in runs.items()}


def _on_cpu(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def _on_gpu(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def kernels(function: Callable[[], object], calls: int = 3) -> tuple[int, float]:
    """Of a call on the GPU: how many kernels, copies and memsets, and their milliseconds without the gaps between."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    seen = [event for event in profiled.events() or [] if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(seen) // calls, sum(event.device_time for event in seen) / 1e3 / calls


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor or card, threads and versions, for the JSON beside a table."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else platform.processor()
    return {
        "device": name,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
