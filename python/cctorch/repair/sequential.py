"""Layer after layer, each on the inputs that the repaired layers before it now give."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cctorch import _C, distributed
from cctorch._C import CompressionPlan
from cctorch.described import describe, describe_plan, fits
from cctorch.graph.lstm import module_of
from cctorch.modes import evaluating
from cctorch.nn import Constant
from cctorch.nn.gather import unwrapped
from cctorch.pairs import pairs
from cctorch.plan import check_plan
from cctorch.repair.affine import affine_of, as_image, as_map
from cctorch.repair.layer_fit import LayerFit
from cctorch.repair.places import Layer, Place, find, is_repairable, watching

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Repair:
    layers: list[LayerFit]
    seconds: float
    warnings: list[str]


def repair(
    model: nn.Module,
    dense: nn.Module,
    plan: CompressionPlan,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    step: int = 8,
    ridge: float = 1e-5,
    shortcuts: bool = True,
    progress: Progress | None = None,
    across_ranks: bool = False,
) -> Repair:
    """Fits the weights of a compressed model to the outputs of the dense one, in place, without a gradient step.

    In order of execution, each layer's weight becomes the minimizer over all weights of the layer's shape (or rank) of

        sum |W x + b - y|^2 + ridge |W - W_0|^2

    (of the layouts `spatial` and `tucker` alternating least squares come close to it)

    where x are the unfolded inputs that the compressed and already repaired layers before it give, y the outputs of the
    dense layer, both behind the BatchNorm if there is one, which then also takes the intercept b. Where the output is
    added to a shortcut, y is the dense model's sum minus the compressed shortcut, so that errors do not add up along
    the blocks. Of a removed residual branch, b alone is fitted: it becomes the mean of y. BatchNorm statistics become
    those of the new outputs. Convolutions and linear layers from the first of another shape on take part; grouped,
    shared and repeatedly executed ones are left alone.

    Args:
        model: `apply(copy of dense, plan)`.
        dense: the model that `plan` was made for; it is not changed.
        batches: (inputs, targets) of the un-augmented training set, on any device; the targets are not used. All of
            them pass through the compressed model as one batch, which must fit into memory; some thousands are enough.
        step: one of `step` positions of each feature map is a sample.
        ridge: relative to the mean variance of the layer's inputs.
        shortcuts: correct the sum instead of the layer's own output.
        progress: called with ("repair", done, total).
        across_ranks: `batches` are this rank's share of the images, those of rank 0 the first, and every rank calls.
            The fit is to the samples of all of them.

    Returns:
        The error of each layer on its samples before and after; the one after is never the higher. Among the warnings:
        layers with fewer samples than an output has weights, which may fit other images worse than before.

    Raises:
        ValueError: `batches` is empty (on any rank), `model` is not what `plan` makes of `dense`, or a layer's inputs
            or wanted outputs are NaN or infinite (the layer is named). The model is unchanged.
        TypeError: `batches` gives something else than pairs, or `plan` is no plan.
    """
    check_plan(plan, "repair")
    start = time.perf_counter()
    parts = [inputs for inputs, _ in pairs(batches, "repair")]
    images = [sum(map(len, parts))]
    if across_ranks:
        images = distributed.gather(torch.tensor(images)).flatten().tolist()
    if not all(images):
        raise ValueError(f"repair: batches is empty (images: {images}), expected at least one (inputs, targets)")
    sampling = _Sampling(step, sum(images[: distributed.rank()]) if across_ranks else 0)
    _check_dense(dense, plan)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        with evaluating(dense) as device:
            places = _from_first_change(find(dense, parts[0][:1].to(device), plan), plan)
            targets = _targets(dense, places, [part.to(device) for part in parts], plan, sampling, shortcuts)
        with evaluating(model) as device:
            pass_ = _Pass(model, places, targets, sampling, ridge, shortcuts, progress, across_ranks)
            pass_.run(torch.cat(parts).to(device))
    except BaseException:
        model.load_state_dict(state)
        raise
    return Repair(pass_.fits, time.perf_counter() - start, _of_few_samples(pass_.fits, step))


def _check_dense(dense: nn.Module, plan: CompressionPlan) -> None:
    for layer in plan.layers:
        found = dict(dense.named_modules()).get(module_of(layer))
        if found is None or not fits(found, layer):
            what = "missing" if found is None else f"a {describe(found)}"
            raise ValueError(
                f"repair: layer '{layer.name}' of the dense model is {what}; the plan expects a "
                f"{describe_plan(layer)}: repair(compressed, dense, plan, batches)"
            )


def _of_few_samples(fits: list[LayerFit], step: int) -> list[str]:
    few = [fit for fit in fits if fit.samples < fit.unknowns]
    if not few:
        return []
    worst = min(few, key=lambda fit: fit.samples / fit.unknowns)
    return [
        f"repair: {len(few)} of {len(fits)} layers were fitted to fewer samples than an output has weights, first of "
        f"all '{worst.name}' ({worst.samples} for {worst.unknowns}): other images may fit worse than before; give "
        f"more, or a step below {step}"
    ]


@dataclass(frozen=True)
class _Sampling:
    """One of `step` positions is a sample; which, depends on an image's number among those of all ranks."""

    step: int
    first_image: int


def _from_first_change(places: list[Place], plan: CompressionPlan) -> list[Place]:
    # By apply(); masks and bits, which a plan may also have, act later.
    changed = {module_of(layer) for layer in plan.layers if not layer.keeps_shape}
    # Of these the inputs change with every step.
    left = {module_of(layer) for layer in plan.layers if layer.kind == "lstm"}
    first = next((i for i, place in enumerate(places) if place.layer in changed), len(places))
    return [place for place in places[first:] if place.layer not in left]


def _targets(
    dense: nn.Module,
    places: list[Place],
    parts: list[Tensor],
    plan: CompressionPlan,
    sampling: _Sampling,
    shortcuts: bool,
) -> dict[str, Tensor]:
    """For each place, what the dense model gives there: kept outputs x samples."""
    samples: dict[str, list[Tensor]] = {place.layer: [] for place in places}
    by_layer = {place.layer: place for place in places}
    layers = {layer: dense.get_submodule(layer) for layer in by_layer}
    images = sampling.first_image

    def record(layer: str, y: Tensor) -> None:
        kept = plan.find(layer)
        y = as_map(layers[layer], y)
        if kept is not None and len(kept.kept_out) < kept.out_channels:
            y = y[:, kept.kept_out]
        samples[layer].append(_C.output_samples(y, sampling.step, images))

    def on_output(layer: str, y: Tensor) -> None:
        place = by_layer[layer]
        if place.norm is None and not (place.joins and shortcuts):
            record(layer, y)

    def on_norm(layer: str, norm: str, y: Tensor) -> None:
        place = by_layer[layer]
        if place.norm == norm and not (place.joins and shortcuts):
            record(layer, y)

    def on_joined(layer: str, total: Tensor) -> None:
        if by_layer[layer].joins and shortcuts:
            record(layer, total)

    norms = {place.norm: dense.get_submodule(place.norm) for place in places if place.norm is not None}
    with watching(layers, norms, on_output=on_output, on_norm=on_norm, on_joined=on_joined):
        for part in parts:
            dense(part)
            images += len(part)
    return {layer: torch.cat(found, 1) for layer, found in samples.items()}


class _Pass:
    """One forward pass of the compressed model, during which every layer is fitted before its output is used."""

    def __init__(
        self,
        model: nn.Module,
        places: list[Place],
        targets: dict[str, Tensor],
        sampling: _Sampling,
        ridge: float,
        shortcuts: bool,
        progress: Progress | None,
        across_ranks: bool,
    ) -> None:
        self.model, self.targets, self.sampling, self.ridge = model, targets, sampling, ridge
        self.progress, self.across_ranks = progress, across_ranks
        self.places = {place.layer: place for place in places}
        self.joins = {place.layer for place in places if place.joins and shortcuts}
        self.layers = {place.layer: unwrapped(model, place.layer) for place in places}
        self.norms = {place.norm: model.get_submodule(place.norm) for place in places if place.norm is not None}
        for name, layer in self.layers.items():
            if not is_repairable(layer) and not isinstance(layer, Constant):
                raise ValueError(f"repair: layer '{name}' of the compressed model is a {type(layer).__name__}")
        self.waiting: dict[str, Tensor] = {}
        self.fits: list[LayerFit] = []

    def run(self, inputs: Tensor) -> None:
        with watching(self.layers, self.norms, on_input=self._on_input, on_join=self._on_join):
            self.model(inputs)

    def _on_input(self, layer: str, x: Tensor) -> None:
        if layer in self.joins:
            self.waiting[layer] = x
        else:
            self._fit(layer, x, self.targets.pop(layer))

    def _on_join(self, layer: str, _: str | None, y: Tensor, shortcut: Tensor) -> None:
        """Only now is the shortcut known: fit, and compute the output again."""
        x = self.waiting.pop(layer, None)
        if x is None:
            return
        target = self.targets.pop(layer)
        behind = as_map(self.layers[layer], shortcut)
        target.sub_(_C.output_samples(behind, self.sampling.step, self.sampling.first_image))
        self._fit(layer, x, target)
        norm = self.places[layer].norm
        again = self.layers[layer].forward(x)
        y.copy_(again if norm is None else self.norms[norm].forward(again))

    def _fit(self, name: str, x: Tensor, target: Tensor) -> None:
        norm = self.places[name].norm
        layer: Layer | Constant = self.layers[name]  # type: ignore[assignment]
        batch_norm: _BatchNorm | None = None if norm is None else self.norms[norm]  # type: ignore[assignment]
        affine = affine_of(layer, batch_norm)
        moments = _C.Moments(affine.inputs, affine.outputs)
        try:
            if isinstance(layer, Constant):
                moments.add(target.new_empty(0, target.shape[1]), target)
            else:
                image, window = as_image(layer, x)
                moments.add_conv2d(image, target, window, self.sampling.step, self.sampling.first_image)
            if self.across_ranks and distributed.world_size() > 1:
                moments.all_reduce(distributed.sum_)
            fit = _C.fit_affine(affine, moments, self.ridge)
        except ValueError as error:
            message = str(error).removeprefix("repair: ")
            raise ValueError(f"repair: layer '{name}': {message}") from None
        self.fits.append(LayerFit(name, moments.samples, affine.inputs, fit.before, fit.after))
        if self.progress:
            self.progress("repair", len(self.fits), len(self.layers))
