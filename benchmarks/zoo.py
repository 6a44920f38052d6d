"""Every classification model of torchvision, a detector and a segmentation network: is the compressed model right?

    pip install onnx onnxscript onnxruntime
    python benchmarks/zoo.py --output docs/results/zoo            # all of them
    python benchmarks/zoo.py --output /tmp/zoo resnet50 vit_b_16  # some

Each model, with random weights, is compressed at C = 0.3 in a process of its own, and then:

    function    the outputs are those of the dense model whose weights were masked and projected by SVD;
    MACs        what the plan predicts to be saved is what torch's FlopCounterMode counts less;
    training    forward and backward run in training mode, and no gradient is infinite or NaN;
    export      torch.export's program gives the model's outputs;
    ONNX        so does ONNX Runtime;
    branches    without every other residual branch as well, the outputs are those of the dense model in which also the
                weights at the branches' ends are zeros.

The smallest model comes first. Its figures are written to OUTPUT/<model>.json as they come, so that an interrupted run
goes on, and those of all so far to OUTPUT/zoo.md; what took too much time or memory is a row that says so. Gradients
are those of random labels on two random images.
"""

import argparse
import copy
import json
import multiprocessing
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cctorch
import torch
import torchvision
from cctorch import batch_norm, branches
from cctorch.graph import trace
from torch import Tensor, nn

# The references are those of the tests.
sys.path.append(str(Path(__file__).parents[1] / "tests" / "python"))
from networks import counted_macs, projected

TARGET = 0.3
# A tenth of a layer's units between two rankings: what is shown does not depend on how good the choices are.
STEP = 0.1
TOLERANCE = 1e-4
SEGMENTATION, DETECTION = "lraspp_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"
# Smaller images than they were made for, where the architecture takes any: the channels are the same. What is not
# listed or named in side() is 224 pixels wide.
SMALL = (
    *(
        "alexnet",
        "convnext",
        "densenet",
        "efficientnet",
        "googlenet",
        "lraspp",
        "mnasnet",
        "mobilenet",
        "regnet",
        "resne",
    ),
    *("shufflenet", "squeezenet", "vgg", "wide_resnet"),
)
CHECKS = ("function", "macs", "training", "export", "onnx", "branches")


def side(name: str) -> int:
    if name.startswith(SMALL):
        return 96
    return 299 if name.startswith("inception") else 128 if name == DETECTION else 224


class FirstOutput(nn.Module):
    """The tensor in what a segmentation network, or a detector's backbone, returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        first: Tensor = next(iter(self.model(images).values()))
        return first.mean((2, 3))


def build(name: str) -> nn.Module:
    if name == DETECTION:
        detector = torchvision.models.get_model(name, weights=None, weights_backbone=None)
        return FirstOutput(detector.backbone)
    if name == SEGMENTATION:
        return FirstOutput(torchvision.models.get_model(name, weights=None, weights_backbone=None))
    options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    if name.startswith("vit"):  # its head starts with zeros, whatever comes before it
        nn.init.normal_(model.get_submodule("heads.head").weight)
    return model


def difference(output: Tensor, reference: Tensor) -> float:
    return ((output - reference).abs().max() / reference.abs().max()).item()


def training(model: nn.Module, images: Tensor) -> str:
    model.train()
    outputs = model(images)
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(tensor.float().square().mean() for tensor in tensors if tensor is not None).backward()
    model.eval()
    wrong = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    reached = sum(p.grad is not None for p in model.parameters())
    return f"gradient of {wrong[0]} is not finite" if wrong else "ok" if reached else "no parameter has a gradient"


@torch.no_grad()
def exported(model: nn.Module, images: Tensor, expected: Tensor) -> float:
    return difference(torch.export.export(model, (images,), strict=False).module()(images), expected)


def in_onnx_runtime(model: nn.Module, images: Tensor, expected: Tensor) -> float:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        torch.onnx.export(model, (images,), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        [output, *_] = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return difference(torch.from_numpy(output), expected)


@torch.no_grad()
def without_branches(dense: nn.Module, plan: cctorch.CompressionPlan, images: Tensor) -> dict[str, Any]:
    graph = trace(dense, images[:1])
    found = branches.removable(dense, graph, graph.branches, images)
    branches.remove(plan, found[::2], graph)
    graph.channels.resolve(plan)
    outputs = cctorch.apply(copy.deepcopy(dense), plan)(images)
    expected = projected(copy.deepcopy(dense), plan)(images)
    return {"found": len(found), "removed": len(found[::2]), "function": difference(outputs, expected)}


def attempt(check: Callable[[], Any]) -> Any:
    try:
        return check()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"


def parameters(name: str) -> int:
    """As torchvision publishes them."""
    return int(torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"])


def examine(name: str, path: Path, seconds: int, gib: float) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (int(gib * 2**30), int(gib * 2**30)))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    row: dict[str, Any] = {"model": name, "side": side(name)}
    try:
        dense = build(name).eval()
        images = torch.randn(2, 3, side(name), side(name))
        batches = [(images, torch.arange(2))]
        batch_norm.reestimate(dense, [(torch.randn(8, *images.shape[1:]), torch.zeros(8))])
        row["parameters"] = sum(p.numel() for p in dense.parameters())
        compression = cctorch.compress(dense, batches, images[:1], target=TARGET, step_fraction=STEP)
        plan = compression.plan
        row |= {
            "macs": compression.dense_macs,
            "nominal": compression.nominal_reduction,
            "final": compression.final_reduction,
            "layers": len(compression.model_specs),
            "changed": sum(layer.kind != "batch_norm2d" for layer in plan.layers),
            "warnings": compression.warnings,
        }
        model = cctorch.apply(copy.deepcopy(dense), plan)
        with torch.no_grad():
            outputs = model(images)
            row["function"] = difference(outputs, projected(copy.deepcopy(dense), plan)(images))
        saved = counted_macs(dense, images[:1]) - counted_macs(model, images[:1])
        row["macs_saved"], row["macs_counted"] = compression.dense_macs - compression.final_macs, saved
        row["export"] = attempt(lambda: exported(model, images, outputs))
        row["onnx"] = attempt(lambda: in_onnx_runtime(model, images, outputs))
        row["training"] = attempt(lambda: training(model, images))
        row["branches"] = attempt(lambda: without_branches(dense, plan, images))
    except Exception as error:
        traceback.print_exc()
        row["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
    row["gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    cctorch.atomic.write(path, json.dumps(row, indent=1).encode())


def verdict(row: dict[str, Any], check: str) -> str:
    if check == "macs":
        right = row["macs_saved"] == row["macs_counted"]
        return "as predicted" if right else f"**{row['macs_counted'] / row['macs_saved']:.4f} of predicted**"
    value = row.get(check, "not run")
    if check == "branches" and isinstance(value, dict):
        if not value["found"]:
            return "none"
        return f"{value['removed']} of {value['found']}, {verdict(value, 'function')}"
    if isinstance(value, str):
        return value if value in ("ok", "not run") else f"**{value}**"
    return f"{value:.0e}" if value <= TOLERANCE else f"**{value:.0e}**"


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | side | MACs, M | nominal | final | not followed | " + " | ".join(CHECKS) + " |",
        "|---|---|---|---|---|---|" + "---|" * len(CHECKS),
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['model']} | {row['side']} | **{row['error']}** |" + " |" * (3 + len(CHECKS)))
            continue
        lines.append(
            f"| {row['model']} | {row['side']} | {row['macs'] / 1e6:.0f} | {row['nominal']:.1%} | {row['final']:.1%} "
            f"| {len(row['warnings'])} | " + " | ".join(verdict(row, check) for check in CHECKS) + " |"
        )
    return "\n".join(lines) + "\n"


def in_a_process(name: str, path: Path, seconds: int, gib: float, millions: float) -> str | None:
    """Writes the model's row to `path`; or says why there is none."""
    if parameters(name) > 1e6 * millions:
        return f"skipped: {parameters(name) / 1e6:.0f} M parameters, more than {millions:.0f} M"
    process = multiprocessing.get_context("spawn").Process(target=examine, args=(name, path, seconds, gib))
    process.start()
    process.join()
    if path.exists():
        return None
    late = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
    return f"not done in {seconds} s of CPU time" if late else f"its process ended with code {process.exitcode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names in torchvision; all, when none is given")
    parser.add_argument("--output", type=Path, required=True, help="folder for the figures and the table")
    parser.add_argument("--seconds", type=int, default=1800, help="of CPU time for one model")
    parser.add_argument("--gib", type=float, default=16, help="memory for one model")
    parser.add_argument("--millions", type=float, default=1000, help="skip models with more parameters")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    names = arguments.models or [*torchvision.models.list_models(torchvision.models), SEGMENTATION, DETECTION]
    names.sort(key=parameters)
    for number, name in enumerate(names, start=1):
        path = arguments.output / f"{name}.json"
        if not path.exists():
            start = time.perf_counter()
            reason = in_a_process(name, path, arguments.seconds, arguments.gib, arguments.millions)
            if reason is not None:
                path.write_text(json.dumps({"model": name, "side": side(name), "error": reason}))
            print(f"{number}/{len(names)} {name}: {time.perf_counter() - start:.0f} s", flush=True)
        rows = [json.loads(file.read_text()) for file in sorted(arguments.output.glob("*.json"))]
        (arguments.output / "zoo.md").write_text(table(rows))


if __name__ == "__main__":
    main()
