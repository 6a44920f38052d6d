"""Gradients of the loss with respect to layers' weights: what Collaborative Compression weighs what it keeps with."""

from collections.abc import Callable, Iterable, Sequence
from operator import length_hint

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cctorch import distributed
from cctorch.modes import evaluating_with_gradients
from cctorch.pairs import pairs

Progress = Callable[[str, int, int], None]
LossFunction = Callable[[Tensor, Tensor], Tensor]


def mean_gradients(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    layers: Sequence[str],
    *,
    loss: LossFunction = F.cross_entropy,
    progress: Progress | None = None,
    across_ranks: bool = False,
) -> dict[str, Tensor]:
    """Gradient of the mean loss with respect to the weight of each layer in `layers`, the model in eval mode.

    Args:
        batches: pairs (inputs, labels) on the model's device, un-augmented; weighted by their number of examples.
        layers: paths of modules with a `weight`, or of parameters, as those of an LSTM.
        loss: mean loss of a batch.
        across_ranks: `batches` are this rank's share; every rank calls, and gets the gradients over all of them.

    Returns:
        For each layer, a tensor of its weight's shape, float32 for weights in half precision. The model's own `.grad`
        fields are left as they were.

    Raises:
        ValueError: there is no batch, or a parameter, a buffer or the gradient of a layer is not finite (it is named),
            or `loss` gives more than one number.
        TypeError: `batches` gives something else than pairs.
    """
    weights = [weight_of(model, name) for name in layers]
    _check_finite(model)
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    examples = 0
    total = length_hint(batches)
    try:
        for parameter in requires_grad:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        with evaluating_with_gradients(model):
            # Of thousands of batches: in half precision, the small ones would be lost.
            sums = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
            for done, (inputs, labels) in enumerate(pairs(batches, "compress"), start=1):
                gradients = torch.autograd.grad(_mean(loss(model(inputs), labels)), weights, allow_unused=True)
                used = [(s, g) for s, g in zip(sums, gradients, strict=True) if g is not None]
                torch._foreach_add_([s for s, _ in used], [g for _, g in used], alpha=len(labels))
                examples += len(labels)
                if progress:
                    progress("gradients", done, max(total, done))
    finally:
        for parameter, flag in requires_grad.items():
            parameter.requires_grad_(flag)
    if across_ranks:
        examples = int(distributed.sum_(torch.tensor(examples)))
        for gradient in sums:
            distributed.sum_(gradient)
    if examples == 0:
        raise ValueError("compress: `batches` is empty, expected at least one batch of training images")
    for name, gradient in zip(layers, sums, strict=True):
        gradient /= examples
        if not torch.isfinite(gradient).all():
            raise ValueError(
                f"compress: the gradient of layer '{name}' is NaN or infinite; check the images, and the loss that the "
                "model has on them"
            )
    return dict(zip(layers, sums, strict=True))


def _mean(loss: Tensor) -> Tensor:
    if loss.numel() != 1:
        raise ValueError(
            f"compress: loss gives a tensor of shape {tuple(loss.shape)}, expected the mean over the batch, one number"
        )
    return loss


def _check_finite(model: nn.Module) -> None:
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"compress: the {kind} '{name}' holds NaN or infinite values, expected finite ones; load a sound "
                    "checkpoint, or train the model again"
                )


def weight_of(model: nn.Module, name: str) -> Tensor:
    path, _, own = name.rpartition(".")
    owner = model.get_submodule(path)
    weight = getattr(owner, own) if own in owner._parameters else model.get_submodule(name).weight
    if not isinstance(weight, Tensor):
        raise ValueError(f"compress: layer '{name}' has no weight tensor")
    return weight
