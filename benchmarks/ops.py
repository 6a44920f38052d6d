"""Times the operators beside PyTorch's, the composed expression under torch.compile, and the memory's limit.

    python benchmarks/ops.py [fake_quant model_weights masks ...] [--memory fresh] [--json FILE]
    python benchmarks/ops.py --device cuda --gigabytes 2 [--json FILE]

Milliseconds, medians of runs taken in turns. The limit is the bytes that have to be read and written, at the bandwidth
of a copy of the same tensors that takes its turns with the others. With `--memory recycled`, the default, freed memory
is kept as cctorch's launcher does it; `--memory fresh` leaves glibc's defaults, under which page faults hide most
differences. torchao takes part if it is installed (pip install torchao).

On a GPU the table also says how many kernels (copies and memsets too) a call launches, and the share of the limit is
that of the time which these take, without the gaps between them: those are the host's.
"""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from cctorch import _C, ops
from timing import in_turns, kernels, machine
from torch import Tensor
from torch.nn.utils import prune

CHANNELS, SIDE = 64, 56
GIGABYTE = 1e9


@dataclass(frozen=True)
class Setting:
    device: str
    gigabytes: float | None

    def activations(self, dtype: torch.dtype) -> Tensor:
        """64 x 64 x 56 x 56, the input of ResNet-50's first stage, or as many images as fill the memory asked for."""
        image = CHANNELS * SIDE * SIDE
        batch = 64 if self.gigabytes is None else round(self.gigabytes * GIGABYTE / (image * dtype.itemsize))
        return torch.randn(batch, CHANNELS, SIDE, SIDE, device=self.device, dtype=dtype)


@dataclass
class Work:
    """One job, done by several; ours is called cctorch."""

    name: str
    tensors: Sequence[Tensor]  # what a pass goes over
    contenders: dict[str, Callable[[], object]]
    passes: float | None = None  # that memory needs; None: the limit is not memory
    target: float | None = None  # times the limit
    milliseconds: dict[str, float] = field(default_factory=dict)
    launches: dict[str, int] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)  # milliseconds of a GPU, without gaps between kernels

    def measure(self, device: str, seconds: float) -> None:
        copies = [torch.empty_like(t) for t in self.tensors]
        functions = dict(self.contenders)
        if self.passes:
            functions["limit"] = (
                (lambda: copies[0].copy_(self.tensors[0]))
                if len(copies) == 1
                else lambda: torch._foreach_copy_(copies, list(self.tensors))
            )
        self.milliseconds = in_turns(functions, seconds, device)
        if device == "cuda":
            for name, function in functions.items():
                self.launches[name], self.busy[name] = kernels(function)
        if self.passes:
            for times in filter(None, (self.milliseconds, self.busy)):
                times["limit"] *= self.passes / 2

    def lines(self) -> Iterator[str]:
        own, times = self.milliseconds["cctorch"], self.busy or self.milliseconds
        for name, taken in self.milliseconds.items():
            of_limit = f"{times[name] / times['limit']:.2f}" if "limit" in times else ""
            on_gpu = f" {self.launches[name]} | {self.busy[name]:.3g} |" if self.busy else ""
            yield f"| {self.name} | {name} | {taken:.3g} |{on_gpu} {of_limit} | {taken / own:.2f} |"


def named(name: str, x: Tensor) -> str:
    return f"{name}, {'x'.join(map(str, x.shape))} {str(x.dtype).removeprefix('torch.')}"


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


def fake_quant_of(dtype: torch.dtype, setting: Setting) -> Iterator[Work]:
    x = setting.activations(dtype)
    grad = torch.randn_like(x)
    log_scale = torch.full((CHANNELS,), -3.0, device=setting.device)
    scale, zeros = log_scale.exp(), torch.zeros(CHANNELS, device=setting.device, dtype=torch.int32)
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
    yield Work(named("fake-quant forward", x), [x], forward, passes=2, target=1.1)
    yield Work(named("LSQ forward + backward", x), [x], both, passes=5, target=1.2)


def fake_quant(setting: Setting) -> Iterator[Work]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield from fake_quant_of(dtype, setting)


def straight_through(values: Tensor, to: Tensor) -> Tensor:
    return values + (to - values).detach()


def relatives(setting: Setting) -> Iterator[Work]:
    """Ours and the composed expression, forward and backward, for the other element-wise operators."""
    x = setting.activations(torch.float32)
    grad = torch.randn_like(x)
    column = torch.full((CHANNELS,), 0.05, device=setting.device)

    def spread(parameter: Tensor) -> Tensor:
        return parameter.view(1, -1, 1, 1)

    def offset(x: Tensor, log_scale: Tensor, offset: Tensor) -> Tensor:
        scale, zero = spread(log_scale.exp()), spread(offset)
        clamped = ((x - zero) / scale).clamp(0, 255)
        return scale * straight_through(clamped, clamped.round()) + zero

    def clipped(x: Tensor, log_bound: Tensor) -> Tensor:
        bound = spread(log_bound.exp())
        clamped = torch.minimum(x.relu(), bound)
        return straight_through(clamped, (clamped / bound * 255).round() * bound / 255)

    def eight_bit_floats(x: Tensor, log_scale: Tensor) -> Tensor:
        scale = spread(log_scale.exp())
        clamped = (x / scale).clamp(-448, 448)
        return scale * straight_through(clamped, clamped.to(torch.float8_e4m3fn).to(x.dtype))

    def thresholded(x: Tensor, threshold: Tensor) -> Tensor:
        return x.sign() * (x.abs() - spread(threshold)).relu()

    def gated(x: Tensor, gate: Tensor) -> Tensor:
        return x * spread(gate)

    log = column.log()
    for name, function, composed, parameters in (
        ("fake-quant with offset (LSQ+)", lambda *t: ops.fake_quant_offset(*t, 0, 255, 1), offset, (log, column)),
        ("PACT", lambda *t: ops.pact(*t, 8, 1), clipped, (log,)),
        ("fp8 (e4m3)", lambda *t: ops.fp8_quant(*t, torch.float8_e4m3fn, 1), eight_bit_floats, (log,)),
        ("soft threshold", lambda *t: ops.soft_threshold(*t, 1), thresholded, (column,)),
        ("channel gate", ops.channel_gate, gated, (column,)),
    ):
        contenders = {"cctorch": function, "torch.compile": compiled(composed), "torch eager": composed}
        yield Work(
            named(f"{name} forward + backward", x),
            [x],
            {who: with_gradients(does, (x, *parameters), grad) for who, does in contenders.items()},
            passes=5,
            target=1.2,
        )


def apply_mask(setting: Setting) -> Iterator[Work]:
    x = setting.activations(torch.float32)
    mask = torch.rand_like(x) < 0.5
    composed = compiled(lambda x, mask: x * mask)
    yield Work(
        named("mask", x),
        [x],
        {
            "cctorch": lambda: ops.apply_mask(x, mask),
            "torch.compile": lambda: composed(x, mask),
            "torch eager": lambda: x * mask,
        },
        passes=2.25,
        target=1.1,
    )


def small(setting: Setting) -> Iterator[Work]:
    device = setting.device
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


def model_weights(setting: Setting) -> Iterator[Work]:
    weights = resnet50_weights(setting.device)
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


def lists(setting: Setting) -> Iterator[Work]:
    """A model's weights in one call, one call for each, and the composed expression of all of them."""
    weights = resnet50_weights(setting.device)
    grads = [torch.randn_like(w) for w in weights]

    def spread(parameter: Tensor, weight: Tensor) -> Tensor:
        return parameter.view(-1, *[1] * (weight.dim() - 1))

    def grid(x: Tensor, log_scale: Tensor) -> Tensor:
        scale = spread(log_scale.exp(), x)
        clamped = (x / scale).clamp(-8, 7)
        return scale * straight_through(clamped, clamped.round())

    def around(x: Tensor, log_scale: Tensor, offset: Tensor) -> Tensor:
        return grid(x - spread(offset, x), log_scale) + spread(offset, x)

    def eight_bit_floats(x: Tensor, log_scale: Tensor) -> Tensor:
        scale = spread(log_scale.exp(), x)
        clamped = (x / scale).clamp(-448, 448)
        return scale * straight_through(clamped, clamped.to(torch.float8_e4m3fn).to(x.dtype))

    def thresholded(x: Tensor, threshold: Tensor) -> Tensor:
        return x.sign() * (x.abs() - spread(threshold, x)).relu()

    def each(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
        return lambda *tensors: [function(*t) for t in zip(*tensors, strict=True)]

    def recorded(function: Callable[..., list[Tensor]], parameters: int) -> Callable[[], object]:
        columns = [[torch.full((len(w),), -4.0, device=w.device) for w in weights] for _ in range(parameters)]
        inputs = [[t.detach().requires_grad_() for t in tensors] for tensors in (weights, *columns)]
        leaves = [t for tensors in inputs for t in tensors]
        return lambda: torch.autograd.grad(function(*inputs), leaves, grads)

    for name, parameters, function, composed in (
        ("LSQ", 1, lambda x, s: ops.fake_quant(x, s, -8, 7, 0), grid),
        ("LSQ+", 2, lambda x, s, o: ops.fake_quant_offset(x, s, o, -8, 7, 0), around),
        ("fp8", 1, lambda x, s: ops.fp8_quant(x, s, torch.float8_e4m3fn, 0), eight_bit_floats),
        ("soft threshold", 1, lambda x, t: ops.soft_threshold(x, t, 0), thresholded),
    ):
        contenders = {
            "cctorch": function,
            "cctorch, one by one": each(function),
            "torch.compile": compiled(each(composed)),
            "torch eager": each(composed),
        }
        yield Work(
            f"ResNet-50: {name} of 54 weights, forward + backward",
            weights,
            {who: recorded(does, parameters) for who, does in contenders.items()},
            passes=5,
        )
    for name, computed in (
        ("powers of two", lambda x: ops.power_of_two_quant(x, 4, 0)),
        ("scaled signs", lambda x: ops.binary_quant(x, 0)),
        ("ternary", lambda x: ops.ternary_quant(x, 0)),
        ("2-bit codes", lambda x: ops.binary_code_quant(x, 2, axis=0)),
    ):
        yield Work(
            f"ResNet-50: {name} of 54 weights",
            weights,
            {"cctorch": lambda f=computed: f(weights), "cctorch, one by one": lambda f=computed: each(f)(weights)},
            passes=2,
        )
    yield from codebooks(weights, grads)


def codebooks(weights: list[Tensor], grads: list[Tensor]) -> Iterator[Work]:
    """Sixteen values for each weight, and torch's own search for the nearest."""
    books = [w.std() * torch.linspace(-2, 2, 16, device=w.device) for w in weights]
    leaves = [t.detach().requires_grad_() for t in (*weights, *books)]
    xs, values = leaves[: len(weights)], leaves[len(weights) :]

    def nearest(x: Tensor, book: Tensor) -> Tensor:
        return book[torch.bucketize(x, (book[:-1] + book[1:]) / 2)]

    def each(function: Callable[..., Tensor]) -> list[Tensor]:
        return [function(w, b) for w, b in zip(weights, books, strict=True)]

    quantizers = {
        "cctorch": lambda: ops.codebook_quant(weights, books),
        "cctorch, one by one": lambda: each(ops.codebook_quant),
        "torch eager": lambda: each(nearest),
    }
    yield Work("ResNet-50: codebooks of 54 weights", weights, quantizers, passes=2)
    both = {"cctorch": lambda: torch.autograd.grad(ops.codebook_quant(xs, values), leaves, grads)}
    yield Work("ResNet-50: codebooks of 54 weights, forward + backward", weights, both, passes=4)
    update = {"cctorch": lambda: ops.codebook_update(weights, books)}
    yield Work("ResNet-50: a step of k-means of 54 weights", weights, update, passes=1)


def masks(setting: Setting) -> Iterator[Work]:
    weights = resnet50_weights(setting.device)
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


def structured_masks(setting: Setting) -> Iterator[Work]:
    """Without the first convolution, whose 3 input channels no group of 4 fits."""
    weights = resnet50_weights(setting.device)[1:]

    def two_of_four(w: Tensor) -> Tensor:
        groups = (
            w.flatten(2).view(w.shape[0], -1, 4, w[0, 0].numel()) if w.dim() == 4 else w.view(*w.shape[:1], -1, 4, 1)
        )
        kept = groups.abs().topk(2, dim=2).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, kept, True).view_as(w)

    def largest_channels() -> Tensor:
        norms = torch.cat([w.square().sum([d for d in range(w.dim()) if d != 1]).sqrt() for w in weights])
        kept = norms.topk(norms.numel() // 2).indices
        return torch.zeros_like(norms, dtype=torch.bool).scatter_(0, kept, True)

    for name, function, composed in (
        ("2:4 masks", lambda: ops.nm_masks(weights, 2, 4), lambda: [two_of_four(w) for w in weights]),
        ("masks of half the input channels", lambda: ops.channel_masks(weights, 0.5, 1), largest_channels),
    ):
        contenders = {"cctorch": function, "torch eager": composed}
        yield Work(f"ResNet-50: {name}", weights, contenders, passes=1.25)


_ALL = (fake_quant, relatives, apply_mask, small, model_weights, lists, masks, structured_masks)
WORKS = {work.__name__: work for work in _ALL}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"of {', '.join(WORKS)}; all by default")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gigabytes", type=float, help="of activations; 64 images (51 MB in float32) by default")
    parser.add_argument("--memory", choices=["recycled", "fresh"], default="recycled")
    parser.add_argument("--seconds", type=float, default=3.0, help="of turns for each work")
    parser.add_argument("--without", nargs="*", default=[], metavar="WHO", help="such as torch.compile")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.works if name not in WORKS]
    if unknown:
        parser.error(f"no work named {', '.join(unknown)}; there are {', '.join(WORKS)}")
    if arguments.memory == "recycled":
        _C.keep_freed_memory()
    setting = Setting(arguments.device, arguments.gigabytes)
    on_gpu = " launches | busy ms |" if setting.device == "cuda" else ""
    print(f"| work | by | ms |{on_gpu} of the limit | of cctorch's |")
    print("|---" * (5 + on_gpu.count("|")) + "|")
    rows = []
    for name in arguments.works or WORKS:
        for work in WORKS[name](setting):
            for who in arguments.without:
                work.contenders.pop(who, None)
            work.measure(setting.device, arguments.seconds)
            print(*work.lines(), sep="\n", flush=True)
            row = {"work": work.name, "target_of_limit": work.target, "ms": work.milliseconds}
            rows.append({**row, "launches": work.launches, "busy_ms": work.busy} if work.busy else row)
    if arguments.json:
        settings = {**machine(setting.device), "memory": arguments.memory, "gigabytes": setting.gigabytes}
        arguments.json.write_text(json.dumps({**settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
