"""torch-pruning's models, at a ratio or of a wanted size: the peer of the ablation and of the budget of latency.

CIFAR's ResNets have a shortcut without parameters, which torch-pruning's surgery does not follow: the streams of their
residual sums keep all their channels, and the filters inside the blocks go. Of other networks all but the classifier
may.
"""

import copy
from collections.abc import Callable, Iterable, Sized

import torch
from cctorch import models
from torch import Tensor, nn

IMPORTANCES = {"magnitude": "GroupMagnitudeImportance", "Taylor": "GroupTaylorImportance"}


class TorchPruning:
    """
    Args:
        model: in eval mode; it stays as it is.
        example: an input of it.
        images: batches (images, labels), with a length, whose mean gradient Taylor's importance takes.
    """

    def __init__(self, model: nn.Module, example: Tensor, images: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.model, self.example, self.images = model, example, images
        self.gradients: dict[str, Tensor] | None = None

    def at_ratio(self, importance: str, ratio: float) -> nn.Module:
        import torch_pruning

        model = copy.deepcopy(self.model)
        if importance == "Taylor":
            for name, parameter in model.named_parameters():
                parameter.grad = self._gradients()[name].clone()
        pruner = torch_pruning.pruner.BasePruner(
            model,
            self.example,
            importance=getattr(torch_pruning.importance, IMPORTANCES[importance])(),
            pruning_ratio=ratio,
            max_pruning_ratio=0.95,
            global_pruning=True,
            ignored_layers=self._kept_whole(model),
        )
        pruner.step()
        model.zero_grad(set_to_none=True)
        return model

    def closest(
        self, importance: str, size: Callable[[nn.Module], float], wanted: float, steps: int = 9
    ) -> tuple[nn.Module, float]:
        """The model whose size is closest to `wanted`, and its ratio, by bisection: size falls as the ratio rises."""
        low, high, best = 0.0, 0.99, None
        for _ in range(steps):
            ratio = (low + high) / 2
            model = self.at_ratio(importance, ratio)
            left = size(model)
            if best is None or abs(left - wanted) < abs(best[1] - wanted):
                best = model, left, ratio
            low, high = (low, ratio) if left < wanted else (ratio, high)
        assert best is not None
        return best[0], best[2]

    @staticmethod
    def _kept_whole(model: nn.Module) -> list[nn.Module]:
        if isinstance(model, models.ResNet):
            kept = [name for name, _ in model.named_modules() if name in ("conv1", "linear") or name[-5:] == "conv2"]
        else:
            kept = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)][-1:]
        return [model.get_submodule(name) for name in kept]

    def _gradients(self) -> dict[str, Tensor]:
        """The mean gradient of every parameter, computed once."""
        if self.gradients is None:
            model = copy.deepcopy(self.model)
            assert isinstance(self.images, Sized)
            for images, labels in self.images:
                (nn.functional.cross_entropy(model(images), labels) / len(self.images)).backward()
            self.gradients = {
                name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                for name, parameter in model.named_parameters()
            }
        return self.gradients
