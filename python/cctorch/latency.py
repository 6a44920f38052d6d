"""How long layers take on this device by their shapes: timed once, remembered in the user's cache folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cctorch import _C, atomic, measure
from cctorch.nn import BatchNorm2d, Constant, GatherChannels, LowRankConv2d, LowRankLinear

__all__ = ["LatencyTable", "LayerShape"]

Progress = Callable[[str, int, int], None]
Units = Literal["both", "channels", "singular_values"]
Layout = Literal["channel", "spatial"]
Timer = Callable[[Sequence[nn.Module], Tensor], list[list[float]]]
"""Seconds of repeated runs of each module on one input, the modules in turn: `measure.interleaved`."""

_FORMAT = 2
# Processors that others may keep busy. A second thread that waits for its turn costs a small layer ten times over.
_UNDISTURBED = 0.15
# Changes with the code of the layers, so that times of other code are not taken for theirs.
_LAYERS = 3
# Seconds by which processor times, counted in ticks, may be off.
_CLOCK_TICKS = 0.1


@dataclass(frozen=True)
class LayerShape:
    """All that the time of a layer depends on, besides the device and the batch."""

    kind: str
    inputs: int
    outputs: int
    size: tuple[int, ...]
    """Of one example without its channels: height and width, or what a linear layer has before its features."""
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    padding_mode: str = "zeros"
    groups: int = 1
    bias: bool = False
    rank: int | None = None
    layout: Layout = "channel"
    """Of the factors, where there is a rank: `LowRankConv2d`'s."""
    gathered_from: int | None = None
    """Channels of the tensor that the inputs are picked from; None: it holds exactly the inputs."""

    @staticmethod
    def of(layer: nn.Conv2d | nn.Linear | nn.BatchNorm2d, example: torch.Size) -> LayerShape:
        """Of a dense layer that reads a tensor of the shape ``example``, batch first."""
        if isinstance(layer, nn.Linear):
            size = tuple(example[1:-1])
            return LayerShape("linear", layer.in_features, layer.out_features, size, bias=layer.bias is not None)
        size = tuple(example[2:])
        if isinstance(layer, nn.BatchNorm2d):
            return LayerShape("batch_norm2d", layer.num_features, layer.num_features, size)
        depthwise = layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels
        return LayerShape(
            "depthwise_conv2d" if depthwise else "conv2d",
            layer.in_channels,
            layer.out_channels,
            size,
            _pair(layer.kernel_size),
            _pair(layer.stride),
            layer.padding if isinstance(layer.padding, str) else _pair(layer.padding),
            _pair(layer.dilation),
            layer.padding_mode,
            1 if depthwise else layer.groups,
            layer.bias is not None,
        )

    def under(self, plan: _C.LayerPlan) -> LayerShape:
        """The layer as a resolved plan leaves it."""
        gathered = self.inputs if plan.gather else None
        inputs, outputs = len(plan.kept_in), len(plan.kept_out)
        assert plan.layout != "tucker"
        return dataclasses.replace(
            self, inputs=inputs, outputs=outputs, rank=plan.rank, layout=plan.layout, gathered_from=gathered
        )

    @property
    def full_rank(self) -> int:
        high, wide = self.kernel
        if self.layout == "spatial":
            return min(self.outputs * high, self.inputs * wide)
        return min(self.outputs, self.inputs * high * wide)

    @property
    def useful_rank(self) -> int:
        """Up to where factors may be cheaper than the weight: about half of the full rank of the layout spatial, near
        all of it of the layout channel."""
        high, wide = self.kernel
        if self.layout != "spatial":
            return self.full_rank
        rows, columns = self.outputs * high, self.inputs * wide
        return min(self.full_rank, math.ceil(rows * columns / (rows + columns)))

    @property
    def key(self) -> str:
        changed = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.default != getattr(self, f.name)
        }
        return json.dumps(changed, separators=(",", ":"))

    def example_shape(self, batch: int) -> tuple[int, ...]:
        channels = self.inputs if self.gathered_from is None else self.gathered_from
        return (batch, *self.size, channels) if self.kind == "linear" else (batch, channels, *self.size)

    @property
    def reads_nothing(self) -> bool:
        return self.inputs == 0

    def build(self) -> nn.Module:
        """A module of this shape. A normalization comes with the ReLU that follows it."""
        if self.reads_nothing:
            return self._constant()
        layer: nn.Module
        if self.kind == "batch_norm2d":
            return nn.Sequential(BatchNorm2d(self.inputs), nn.ReLU())
        if self.kind == "linear" and self.rank is None:
            layer = nn.Linear(self.inputs, self.outputs, self.bias)
        elif self.kind == "linear":
            layer = LowRankLinear(self.inputs, self.outputs, self.rank or 1, self.bias)
        else:
            layer = self._convolution()
        return layer if self.gathered_from is None else GatherChannels(self._picked(), layer)

    def _constant(self) -> nn.Module:
        narrow = dataclasses.replace(self, inputs=1, outputs=1, groups=1)
        bias = nn.Parameter(torch.zeros(self.outputs)) if self.outputs else None
        if self.kind == "batch_norm2d":
            return nn.Sequential(Constant(nn.BatchNorm2d(1), bias), nn.ReLU())
        dense = narrow.build()
        assert isinstance(dense, nn.Conv2d | nn.Linear)
        return Constant(dense, bias)

    def _convolution(self) -> nn.Module:
        arguments: dict[str, Any] = {
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "bias": self.bias,
            "padding_mode": self.padding_mode,
        }
        if self.rank is not None:
            return LowRankConv2d(self.inputs, self.outputs, self.rank, layout=self.layout, **arguments)
        groups = self.inputs if self.kind == "depthwise_conv2d" else self.groups
        return nn.Conv2d(self.inputs, self.outputs, groups=groups, **arguments)

    def _picked(self) -> list[int]:
        assert self.gathered_from is not None
        return [i * self.gathered_from // self.inputs for i in range(self.inputs)]


class LatencyTable:
    """Seconds of layer shapes under the conditions that a model will run in.

    What was timed once is read from ``$XDG_CACHE_HOME/cctorch/latency`` (``~/.cache`` without it), one file for each
    device, number of threads, dtype, layout, batch and torch version. Delete the folder to time everything anew.

    Args:
        device: ``cpu`` or ``cuda``.
        dtype: of weights and activations.
        layout: ``torch.contiguous_format`` or ``torch.channels_last``.
        batch: examples in one forward pass.
        threads: that torch uses; absent: as many as now.
        multiple: counts of channels and ranks that the device likes. Only multiples are timed and proposed; of a
            half or a quarter of it in layers that have less than four.
        timer: seconds of repeated runs of modules on an input; :func:`cctorch.measure.interleaved` by default.

    Raises:
        ValueError: ``batch``, ``threads`` or ``multiple`` below 1.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        layout: torch.memory_format = torch.contiguous_format,
        batch: int = 1,
        threads: int | None = None,
        *,
        multiple: int = 8,
        timer: Timer = measure.interleaved,
    ) -> None:
        self.device, self.dtype, self.layout, self.batch = torch.device(device), dtype, layout, batch
        self.threads = torch.get_num_threads() if threads is None else threads
        self.multiple, self.timer = multiple, timer
        for name in ("batch", "threads", "multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"LatencyTable: {name} = {getattr(self, name)}, expected at least 1")
        self.path = _cache_folder() / f"{hashlib.sha256(json.dumps(self.conditions).encode()).hexdigest()[:16]}.json"
        self._seconds = self._read()
        self._disturbed = False

    @property
    def conditions(self) -> dict[str, Any]:
        """What the times hold for."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _processor()
        return {
            "device": name,
            "threads": self.threads,
            "dtype": str(self.dtype),
            "layout": str(self.layout),
            "batch": self.batch,
            "torch": torch.__version__,
            "layers": _LAYERS,
            # Otherwise large outputs cost page faults on CPU.
            "memory_kept": self.device.type == "cpu" and _C.keeps_freed_memory(),
        }

    def seconds(self, shape: LayerShape) -> float:
        """Of one forward pass of a layer; timed now if it was not before."""
        if shape.key not in self._seconds:
            self.time([shape])
        return self._seconds[shape.key]

    def time(self, shapes: Iterable[LayerShape], progress: Progress | None = None) -> None:
        """Times the shapes that are not known yet and writes the cache.

        ``progress`` is called with (stage, done, total). The fastest run counts: what else the machine does only adds
        time. Where others kept it busy all along, a warning says so, and nothing is written.
        """
        missing = list({shape.key: shape for shape in shapes if shape.key not in self._seconds}.values())
        if not missing:
            return
        begin, others = time.perf_counter(), measure.seconds_of_others()
        try:
            for done, shape in enumerate(missing):
                if progress:
                    progress("latency table", done, len(missing))
                with torch.random.fork_rng():
                    module, x = self._placed(shape.build()), self.example(shape.example_shape(self.batch))
                [runs] = self.timer([module], x)
                self._seconds[shape.key] = min(runs)
        finally:
            others = measure.seconds_of_others() - others - _CLOCK_TICKS
            self._keep(others / (time.perf_counter() - begin))
        if progress:
            progress("latency table", len(missing), len(missing))

    def cost_shapes(
        self,
        shape: LayerShape,
        producers: Sequence[LayerShape] = (),
        units: Units = "both",
        layout: Layout = "channel",
    ) -> tuple[list[int], list[int], dict[tuple[int, int | None], list[LayerShape]]]:
        """Channels, ranks, and the shapes whose times add up to the cost of each (channels, rank) of a layer."""
        multiple = self._multiple_in(shape)
        channels = [shape.inputs] if units == "singular_values" else _grid(shape.inputs, multiple, points=8)
        factored = dataclasses.replace(shape, layout=layout)
        ranks = [] if units == "channels" else _grid(factored.useful_rank, multiple, points=4)[:-1]
        cells = {}
        for count in channels:
            gathered = None if producers or count == shape.inputs else shape.inputs
            feeding = [_with_outputs(producer, count) for producer in producers]
            for rank in (None, *ranks):
                form = shape if rank is None else factored
                layer = dataclasses.replace(form, inputs=count, rank=rank, gathered_from=gathered)
                if rank is not None and rank > layer.full_rank:
                    layer = dataclasses.replace(layer, rank=layer.full_rank)
                cells[count, rank] = [layer, *feeding]
        return channels, ranks, cells

    def cost_table(
        self,
        shape: LayerShape,
        producers: Sequence[LayerShape] = (),
        units: Units = "both",
        layout: Layout = "channel",
        *,
        beside: Sequence[LayerShape] = (),
        left: Sequence[LayerShape] | None = None,
    ) -> _C.CostTable:
        """Seconds of a layer by its kept inputs and its rank, for the solver.

        Args:
            shape: of the dense layer.
            producers: layers whose filters go when the layer gives up inputs; their time at as many filters is part of
                the cost. Without any, giving up inputs costs a gather.
            units: what may be removed, as for :func:`cctorch.compress`.
            layout: of the layer's factors.
            beside: layers that stay as they are, unless all of the layer goes with the branch that it is in.
            left: what is left then. None: it can't go.
        """
        channels, ranks, cells = self.cost_shapes(shape, producers, units, layout)
        always = sum(map(self.seconds, beside))
        cost = {cell: always + sum(map(self.seconds, parts)) for cell, parts in cells.items()}
        removed = None if left is None else sum(map(self.seconds, left))
        pruned = [cost[count, None] for count in channels]
        factored = [cost[count, rank] for count in channels for rank in ranks]
        return _C.CostTable(channels, ranks, pruned, factored, self._multiple_in(shape), removed)

    def example(self, shape: Sequence[int]) -> Tensor:
        x = torch.randn(tuple(shape), device=self.device, dtype=self.dtype)
        return x.contiguous(memory_format=self.layout) if x.dim() == 4 else x

    def _multiple_in(self, shape: LayerShape) -> int:
        """Halved while the layer has less than four: of 16 channels, multiples of 8 would be all or half."""
        narrowest, multiple = min(shape.inputs, shape.full_rank), self.multiple
        while self.multiple <= narrowest < 4 * multiple and multiple % 2 == 0:
            multiple //= 2
        return multiple

    def _placed(self, module: nn.Module) -> nn.Module:
        module = module.to(self.device, self.dtype)
        return module.to(memory_format=self.layout).eval()  # type: ignore[call-overload,no-any-return]

    def _read(self) -> dict[str, float]:
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            return self._ignored(str(error))
        try:
            tree = json.loads(text)
            known = tree["format"] == _FORMAT and tree["conditions"] == self.conditions
            seconds = {str(key): float(value) for key, value in tree["seconds"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return self._ignored(f"{type(error).__name__}: {error}")
        if not known or not all(math.isfinite(value) and value > 0 for value in seconds.values()):
            return self._ignored("it was not written for these conditions")
        return seconds

    def _ignored(self, reason: str) -> dict[str, float]:
        warnings.warn(f"the latency table {self.path} is ignored, layers are timed anew: {reason}", stacklevel=4)
        return {}

    def _keep(self, taken: float) -> None:
        self._disturbed |= self.device.type == "cpu" and taken > _UNDISTURBED
        if not self._disturbed:
            self._write()
        elif taken > _UNDISTURBED:
            warnings.warn(
                f"other processes kept {taken:.1f} processors busy while layers were timed: the times are too long and "
                "are not remembered; search again on an idle machine",
                stacklevel=3,
            )

    def _write(self) -> None:
        tree = {"format": _FORMAT, "conditions": self.conditions, "seconds": self._seconds}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write(self.path, json.dumps(tree, indent=0).encode())
        except OSError as error:
            warnings.warn(f"the latency table {self.path} can't be written: {error}", stacklevel=3)


def _with_outputs(shape: LayerShape, outputs: int) -> LayerShape:
    passes = shape.kind in ("batch_norm2d", "depthwise_conv2d")
    return dataclasses.replace(shape, inputs=outputs if passes else shape.inputs, outputs=outputs)


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return int(values[0]), int(values[1])


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "cctorch" / "latency"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _grid(highest: int, multiple: int, points: int) -> list[int]:
    step = multiple * math.ceil(highest / (points * multiple))
    return [*range(step, highest, step), highest]
