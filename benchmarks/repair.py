"""What each ingredient of the closed-form repair gives, before any fine-tuning.

    python benchmarks/repair.py configs/resnet56_cifar10.yaml --plan docs/results/repair/resnet56_c50_plan.json \
        --output docs/results/repair/resnet56_c50.json

Every variant starts from the same plan and the same images of the training set. Top-1 is on the test set, measured once
for each variant; nothing is chosen by it here.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cctorch import _C, apply, batch_norm, data, datasets, load_plan, measure, models, repair
from cctorch.config import expand, load_config
from cctorch.nn.gather import unwrapped
from cctorch.plan import CompressionPlan
from cctorch.repair.affine import affine_of, as_image, as_map
from cctorch.repair.places import find, watching
from torch import Tensor, nn

Variant = Callable[[nn.Module], None]


class Experiment:
    def __init__(self, arguments: argparse.Namespace) -> None:
        config = load_config(arguments.config)
        torch.manual_seed(config.seed)
        self.data = datasets.load(config.data, config.seed)
        self.dense = models.create(config.model.name, self.data.shape[0], self.data.classes).eval()
        models.load_weights(self.dense, expand(str(config.model.weights)))
        self.dense = self.dense.to(memory_format=torch.channels_last)
        self.plan: CompressionPlan = load_plan(arguments.plan)
        self.step, self.seed = arguments.step, config.seed
        self.images = self._batches(self.data.train).head(arguments.images, config.seed)

    def _batches(self, images: data.ImageSet) -> data.Batches:
        return data.Batches(images, 500, self.data.mean, self.data.std, channels_last=True)

    def top1(self, model: nn.Module) -> float:
        return measure.accuracy(model, self._batches(self.data.test))

    def compressed(self) -> nn.Module:
        return apply(copy.deepcopy(self.dense), self.plan).eval()

    def statistics(self, model: nn.Module) -> None:
        batch_norm.reestimate(model, self.images)

    def sequential(self, model: nn.Module, shortcuts: bool) -> None:
        repair(model, self.dense, self.plan, self.images, step=self.step, shortcuts=shortcuts)

    @torch.no_grad()
    def parallel(self, model: nn.Module, to_dense_outputs: bool) -> None:
        """Each layer on the dense model's inputs: to the dense outputs, or those of its pruned weight at full rank."""
        example = next(iter(self.images))[0][:1]
        places = {place.layer: place for place in find(self.dense, example, self.plan) if self.plan.find(place.layer)}
        layers = {name: self.dense.get_submodule(name) for name in places}
        smaller = {name: unwrapped(model, name) for name in places}
        affine = {
            name: affine_of(smaller[name], place.norm and model.get_submodule(place.norm))  # type: ignore[arg-type]
            for name, place in places.items()
        }
        moments = {name: _C.Moments(a.inputs, a.outputs) for name, a in affine.items()}
        for images, _ in self.images:
            inputs: dict[str, Tensor] = {}

            def add(name: str, y: Tensor, inputs: dict[str, Tensor] = inputs) -> None:
                planned = self.plan.find(name)
                x = inputs.pop(name)[:, planned.kept_in]
                image, window = as_image(smaller[name], x)
                if to_dense_outputs:
                    wanted = _C.output_samples(as_map(layers[name], y)[:, planned.kept_out], self.step)
                else:
                    weight, constant = self._pruned(name, places[name].norm, planned)
                    wanted = weight @ _C.input_samples(image, window, self.step) + constant.unsqueeze(1)
                moments[name].add_conv2d(image, wanted, window, self.step)

            norms = {place.norm: self.dense.get_submodule(place.norm) for place in places.values() if place.norm}
            with watching(
                layers,
                norms,
                on_input=inputs.__setitem__,
                on_output=lambda name, y: None if places[name].norm else add(name, y),
                on_norm=lambda name, _, y: add(name, y),
            ):
                self.dense(images)
        for name, function in affine.items():
            _C.fit_affine(function, moments[name])

    def _pruned(self, name: str, norm: str | None, planned: _C.LayerPlan) -> tuple[Tensor, Tensor]:
        """Weight and constant of the dense layer and the norm behind it, of what the plan keeps."""
        layer = self.dense.get_submodule(name)
        weight = layer.weight[planned.kept_out][:, planned.kept_in].flatten(1)
        constant = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias[planned.kept_out]
        if norm is None:
            return weight, constant
        behind = self.dense.get_submodule(norm)
        slope = behind.weight * (behind.running_var + behind.eps).rsqrt()
        shift = behind.bias - slope * behind.running_mean
        slope, shift = slope[planned.kept_out], shift[planned.kept_out]
        return slope.unsqueeze(1) * weight, slope * constant + shift

    def variants(self) -> dict[str, list[Variant]]:
        metric: Variant = lambda model: self.parallel(model, to_dense_outputs=False)  # noqa: E731
        parallel: Variant = lambda model: self.parallel(model, to_dense_outputs=True)  # noqa: E731
        sequential: Variant = lambda model: self.sequential(model, shortcuts=False)  # noqa: E731
        shortcuts: Variant = lambda model: self.sequential(model, shortcuts=True)  # noqa: E731
        return {
            "nothing": [],
            "statistics": [self.statistics],
            "metric": [metric],
            "parallel": [parallel],
            "parallel, statistics": [parallel, self.statistics],
            "sequential": [sequential],
            "sequential, shortcuts": [shortcuts],
            "sequential, shortcuts, statistics": [shortcuts, self.statistics],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("--plan", required=True)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--step", type=int, default=8)
    parser.add_argument("--variants", nargs="+", help="some of them by name (default: all)")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    experiment = Experiment(arguments)
    chosen = experiment.variants()
    settings = {name: getattr(arguments, name) for name in ("config", "plan", "images", "step")}
    record = {**settings, "seed": experiment.seed, "threads": torch.get_num_threads(), "variants": []}
    for name in arguments.variants or chosen:
        model = experiment.compressed()
        start, busy = time.perf_counter(), time.process_time()
        for step in chosen[name]:
            step(model)
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        top1 = experiment.top1(model)
        times = {"seconds": round(seconds, 1), "cpu_seconds": round(busy, 1)}
        record["variants"].append({"name": name, "top1": round(top1, 2), **times})
        print(f"{name:<36} {top1:6.2f} %  {seconds:6.1f} s, {busy:6.1f} s of CPU", flush=True)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
