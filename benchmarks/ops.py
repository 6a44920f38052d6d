"""Times the operators beside PyTorch's, the composed expression under torch.compile, and the memory's limit.

    python benchmarks/ops.py [fake_quant model_weights masks ...] [--device cuda] [--memory fresh] [--json FILE]

Milliseconds, medians of runs taken in turns. The limit is the bytes that have to be read and written, at the bandwidth
of a copy of the same tensors that takes its turns with the others. With `--memory recycled`, the default, freed memory
is kept as cctorch's launcher does it; `--memory fresh` leaves glibc's defaults, under which page faults hide most
differences. torchao takes part if it is installed (pip install torchao).
"""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from cctorch import _C, ops
from timing import in_turns, machine
from torch import Tensor
from torch.nn.utils import prune

SHAPE = (64, 64, 56, 56)


@dataclass
class Work:
    """One job, done by several; ours is called cctorch."""

    name: str
    tensors: Sequence[Tensor]  # what a pass goes over
    contenders: dict[str, Callable[[], object]]
    passes: float | None = None  # that memory needs; None: the limit is not memory
    target: float | None = None  # times the limit
    milliseconds: dict[str, float] = field(default_factory=dict)

    def measure(self, device: str, seconds: float) -> None:
        copies = [torch.empty_like(t) for t in self.tensors]

        def copy() -> None:
            for to, tensor in zip(copies, self.tensors, strict=True):
                to.copy_(tensor)

        functions = dict(self.contenders)
        if self.passes:
            functions["limit"] = copy
        self.milliseconds = in_turns(functions, seconds, device)
        if self.passes:
            self.milliseconds["limit"] *= self.passes / 2

    def lines(self) -> Iterator[str]:
        own, limit = self.milliseconds["cctorch"], self.milliseconds.get("limit")
        for name, taken in self.milliseconds.items():
            of_limit = f"{taken / limit:.2f}" if limit else ""
            yield f"| {self.name} | {name} | {taken:.3g} | {of_limit} | {taken / own:.2f} |"


def fake_quant_grid(x: Tensor, log_scale: Tensor) -> Tensor:
    scale = log_scale.exp().view(1, -1, 1, 1)
    clamped = (x / scale).clamp(-128, 127)
    return scale * (clamped + (clamped.round() - clamped).detach())


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    return torch.compile(function, dynamic=False)


def with_gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> Callable[[], object]:
    leaves = tuple(t.detach().requires_grad_() for t in inputs)
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


def ours(x: Tensor, log_scale: Tensor) -> Tensor:
    return ops.fake_quant(x, log_scale, -128, 127, 1)


def learnable(x: Tensor, scale: Tensor) -> Tensor:
    return torch._fake_quantize_learnable_per_channel_affine(x, scale, torch.zeros_like(scale), 1, -128, 127, 1.0)


def fake_quant_of(dtype: torch.dtype, device: str) -> Iterator[Work]:
    x = torch.randn(SHAPE, device=device, dtype=dtype)
    grad = torch.randn_like(x)
    log_scale = torch.full((SHAPE[1],), -3.0, device=device)
    scale, zeros = log_scale.exp(), torch.zeros(SHAPE[1], device=device, dtype=torch.int32)
    step = compiled(fake_quant_grid)
    forward = {"cctorch": lambda: ours(x, log_scale), "torch.compile": lambda: step(x, log_scale)}
    both = {
        "cctorch": with_gradients(ours, (x, log_scale), grad),
        "torch.compile": with_gradients(step, (x, log_scale), grad),
    }
    if dtype == torch.float32:
        forward["torch per channel"] = lambda: torch.fake_quantize_per_channel_affine(x, scale, zeros, 1, -128, 127)
        forward["torch per tensor"] = lambda: torch.fake_quantize_per_tensor_affine(x, scale[:1], zeros[:1], -128, 127)
        both["torch learnable"] = with_gradients(learnable, (x, scale), grad)
    name = f"{'x'.join(map(str, SHAPE))} {str(dtype).removeprefix('torch.')}"
    yield Work(f"fake-quant forward, {name}", [x], forward, passes=2, target=1.1)
    yield Work(f"LSQ forward + backward, {name}", [x], both, passes=5, target=1.2)


def fake_quant(device: str) -> Iterator[Work]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield from fake_quant_of(dtype, device)


def small(device: str) -> Iterator[Work]:
    x = torch.randn(16, 16, 3, 3, device=device)
    log_scale = torch.full((16,), -3.0, device=device)
    scale, zeros = log_scale.exp(), torch.zeros(16, device=device)
    leaves = [t.clone().requires_grad_() for t in (x, log_scale, scale)]
    whole = zeros.int()
    yield Work(
        "fake-quant of 16x16x3x3, no gradient",
        [x],
        {
            "cctorch": lambda: ops.fake_quant(x, log_scale, -128, 127, 0),
            "torch per channel": lambda: torch.fake_quantize_per_channel_affine(x, scale, whole, 0, -128, 127),
        },
    )
    yield Work(
        "fake-quant of 16x16x3x3, recorded",
        [x],
        {
            "cctorch": lambda: ops.fake_quant(leaves[0], leaves[1], -128, 127, 0),
            "torch learnable": lambda: torch._fake_quantize_learnable_per_channel_affine(
                leaves[0], leaves[2], zeros, 0, -128, 127, 1.0
            ),
        },
    )


def resnet50_weights(device: str) -> list[Tensor]:
    from torchvision.models import resnet50

    torch.manual_seed(0)
    return [p.detach().to(device) for p in resnet50().parameters() if p.dim() > 1]


def quantize_on_own_range(weights: list[Tensor]) -> list[Tensor]:
    quantized = []
    for weight in weights:
        scale = weight.abs().amax(list(range(1, weight.dim())), keepdim=True) / 127
        quantized.append((weight / scale).round() * scale)
    return quantized


def torchao_fake_quantizer() -> Callable[[Tensor], Tensor] | None:
    """Eight bits, symmetric, a range per channel at every call; of matrices."""
    with contextlib.suppress(ImportError):
        from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

        quantizer: Callable[[Tensor], Tensor] = IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int8, "per_channel"))
        return quantizer
    return None


def model_weights(device: str) -> Iterator[Work]:
    weights = resnet50_weights(device)
    step = compiled(quantize_on_own_range)
    torchao = torchao_fake_quantizer()
    peers = {"torchao": lambda: [torchao(w.flatten(1)) for w in weights]} if torchao else {}
    yield Work(
        "ResNet-50: ranges per channel + fake-quant of 54 weights",
        weights,
        {
            "cctorch": lambda: ops.fake_quant_weights(weights, 8),
            "torch.compile": lambda: step(weights),
            "torch eager": lambda: quantize_on_own_range(weights),
            **peers,
        },
        passes=2,
        target=1.25,
    )


def masks(device: str) -> Iterator[Work]:
    weights = resnet50_weights(device)
    kept = sum(w.numel() for w in weights) // 5

    def all_magnitudes() -> Tensor:
        return torch.cat([w.abs().view(-1) for w in weights])

    def by_threshold(threshold: Tensor) -> list[Tensor]:
        return [w * (w.abs() >= threshold) for w in weights]

    def torchs_pruning() -> None:
        layers = [torch.nn.Linear(1, 1, bias=False) for _ in weights]
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight = torch.nn.Parameter(weight)
        prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=0.8)

    yield Work(
        "ResNet-50: exact global top-k at 80 % + mask",
        weights,
        {
            "cctorch": lambda: ops.magnitude_prune(weights, 0.8),
            "cctorch, masks only": lambda: ops.magnitude_masks(weights, 0.8),
            "torch.topk": lambda: by_threshold(all_magnitudes().topk(kept).values[-1]),
            "torch.kthvalue": lambda: by_threshold(all_magnitudes().kthvalue(4 * kept).values),
            "torch prune.global_unstructured": torchs_pruning,
        },
        passes=2,
    )


def channel_gate(device: str) -> Iterator[Work]:
    x = torch.randn(SHAPE, device=device)
    gate, grad = torch.ones(SHAPE[1], device=device), torch.randn_like(x)

    def composed(x: Tensor, gate: Tensor) -> Tensor:
        return x * gate.view(1, -1, 1, 1)

    contenders: dict[str, Callable[..., Tensor]] = {
        "cctorch": ops.channel_gate,
        "torch.compile": compiled(composed),
        "torch eager": composed,
    }
    yield Work(
        "channel gate forward + backward",
        [x],
        {name: with_gradients(function, (x, gate), grad) for name, function in contenders.items()},
        passes=5,
        target=1.2,
    )


WORKS = {work.__name__: work for work in (fake_quant, small, model_weights, masks, channel_gate)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"of {', '.join(WORKS)}; all by default")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", choices=["recycled", "fresh"], default="recycled")
    parser.add_argument("--seconds", type=float, default=3.0, help="of turns for each work")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.works if name not in WORKS]
    if unknown:
        parser.error(f"no work named {', '.join(unknown)}; there are {', '.join(WORKS)}")
    if arguments.memory == "recycled":
        _C.keep_freed_memory()
    print("| work | by | ms | of the limit | of cctorch's |\n|---|---|---|---|---|")
    rows = []
    for name in arguments.works or WORKS:
        for work in WORKS[name](arguments.device):
            work.measure(arguments.device, arguments.seconds)
            print(*work.lines(), sep="\n", flush=True)
            rows.append({"work": work.name, "target_of_limit": work.target, "ms": work.milliseconds})
    if arguments.json:
        settings = {**machine(arguments.device), "memory": arguments.memory}
        arguments.json.write_text(json.dumps({**settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
