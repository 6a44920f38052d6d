"""Finds layers whose type or attributes the model reads: what `apply` puts in a layer's place has others.

``isinstance(m, nn.Conv2d)`` and ``x.to(layer.weight.dtype)`` leave nothing in an exported graph. In a copy of the model
strangers take the layers' places, which compute the same and have none of their attributes.
"""

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

_NUMBERS = (bool, int, float, complex, str, torch.dtype, torch.device, type(None))
READ = "the model reads its type or attributes"
READ_OF_NORM = f"{READ}; cctorch.apply makes it a cctorch.nn.BatchNorm2d, which isinstance takes for an nn.BatchNorm2d"
UNCOPIED = "cannot be copied: what it computes with numbers of channels, or types of its layers, is not found"

_Call = tuple[object, list[str]]


def copied(model: nn.Module, own: Callable[[Tensor], Tensor], tensors: Iterable[Tensor] = ()) -> nn.Module:
    """A deep copy; ``own`` makes that of given tensors, and of weights that hooks compute: PyTorch refuses to."""
    plain = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(tensor): own(tensor) for tensor in (*plain, *tensors)})


class Twin:
    """A copy of a model, which runs to see what it calls: on tensors without data, if it runs on those."""

    def __init__(self, model: nn.Module, example: Tensor, fake: FakeTensorMode | None) -> None:
        from cctorch.apply import without_fused_encoders  # which needs this package

        def own(tensor: Tensor) -> Tensor:
            return fake.from_tensor(tensor, static_shapes=True) if fake else tensor.detach().clone()

        self.model = copied(model, own, (*model.parameters(), *model.buffers()) if fake else ())
        without_fused_encoders(self.model, set(self.model.modules()))
        self._example, self._fake = own(example), fake
        self._devices = [example.device] if example.is_cuda else []
        self._calls = self._run()

    @classmethod
    def of(cls, model: nn.Module, example: Tensor) -> "Twin | None":
        """None where there is none: a user's class may refuse."""
        for fake in (FakeTensorMode(allow_non_fake_inputs=True), None):
            try:
                return cls(model, example, fake)
            except Exception:  # whatever a user's model raises
                continue
        return None

    def calls_any(self, functions: Sequence[object]) -> bool:
        return any(function in functions for function, _ in self._calls)

    def reads(self, names: Sequence[str]) -> list[str]:
        """Those of the layers ``names`` that, alone or together, cannot be other modules that compute the same."""
        if not names or not self._changes(names):
            return []
        self._calls = self._run()  # That what a first run sets up is missing is not the strangers' doing.
        return self._reads(names)

    def _reads(self, names: Sequence[str]) -> list[str]:
        if not names or not self._changes(names):
            return []
        if len(names) == 1:
            return list(names)
        middle = len(names) // 2
        found = self._reads(names[:middle]) + self._reads(names[middle:])
        rest = [name for name in names if name not in found]
        return found if found and not self._changes(rest) else list(names)

    def _changes(self, names: Sequence[str]) -> bool:
        strangers = {layer: _stranger(layer) for layer in map(self.model.get_submodule, names)}
        replaced = [
            (parent, name, child)
            for parent in self.model.modules()
            for name, child in parent._modules.items()
            if child in strangers
        ]
        for parent, name, child in replaced:
            parent._modules[name] = strangers[child]
        try:
            # A layer that runs all the same is known by a name which `apply` does not see.
            return self._run() != self._calls or not all(stranger.ran for stranger in strangers.values())
        except Exception:  # An attribute is missing, as a rule.
            return True
        finally:
            for parent, name, child in replaced:
                parent._modules[name] = child

    def _run(self) -> list[_Call]:
        calls = _Calls()
        with torch.random.fork_rng(self._devices):  # the same dropout each time
            if self._fake is None:
                with calls:
                    output = self.model(self._example)
            else:
                with self._fake, calls:
                    output = self.model(self._example)
        return [*calls.made, (None, calls.noted(output))]


class _Calls(TorchFunctionMode):
    """What is called with which numbers, and on the results of which other calls."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[_Call] = []
        self._tensors: dict[int, int] = {}
        self._alive: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.made.append((func, self.noted((args, kwargs, result))))
        return result

    def noted(self, values: object) -> list[str]:
        return [self._noted(leaf) for leaf in _pytree.tree_leaves(values)]

    def _noted(self, leaf: object) -> str:
        if isinstance(leaf, Tensor):
            self._alive.append(leaf)  # so that no other one gets its id
            return f"tensor {self._tensors.setdefault(id(leaf), len(self._tensors))}"
        return repr(leaf) if isinstance(leaf, _NUMBERS) else type(leaf).__name__


class _Stranger(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.ran = False
        self.__dict__["layer"] = layer  # hidden from modules()
        self.training = layer.training
        for index, parameter in enumerate(layer.parameters()):
            self.register_parameter(str(index), parameter)  # as next(self.parameters()).dtype goes on to work

    def forward(self, *args: object, **kwargs: object) -> object:
        self.ran = True
        return self.__dict__["layer"](*args, **kwargs)


class _StrangeBatchNorm2d(nn.BatchNorm2d):
    """`apply` leaves a batch normalization one, of fewer channels and of another class."""

    ran = True


def _stranger(layer: nn.Module) -> "_Stranger | _StrangeBatchNorm2d":
    if type(layer) is not nn.BatchNorm2d:
        # A class for each: two that a model finds of one type are not so any more where `apply` replaces one.
        stranger: _Stranger = type("_OneStranger", (_Stranger,), {})(layer)
        return stranger
    normalization = copy.copy(layer)
    normalization.__class__ = _StrangeBatchNorm2d
    del normalization.__dict__["num_features"]  # its own forward function does without
    assert isinstance(normalization, _StrangeBatchNorm2d)
    return normalization
