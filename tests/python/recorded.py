"""Without a GPU: a recording of the operators that a step runs, and a guard against those that wait for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What a host learns from a device it has to wait for.
WAITING = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::item",
    "aten::masked_select",
    "aten::nonzero",
    "aten::_unique2",
}


class NothingWaits(TorchDispatchMode):
    """Fails where an operator would wait for the device, if the tensors were on one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name not in WAITING, f"{func} waits for the device"
        # An index of booleans has to be counted first.
        if func._schema.name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_"):
            assert not any(t.dtype == torch.bool for t in tree_leaves(args[1]) if t is not None), f"{func} of a mask"
        return func(*args, **(kwargs or {}))


class _Operators(NothingWaits):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.calls.append((func, args, kwargs or {}, result))
        return result


class OperatorRecorder:
    """Like a CUDA graph, a list of operators on tensors at fixed places: Python's numbers are those of the recording.

    Unlike one, recording runs the step, so the first replay is that run.
    """

    def __init__(self) -> None:
        self.warm, self.recordings, self.replays = 0, 0, 0

    def warm_up(self, run: Callable[[], Tensor]) -> Tensor:
        self.warm += 1
        return run()

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.recordings += 1
        with _Operators() as operators:
            loss = run()

        def replay() -> None:
            self.replays += 1
            if self.replays > 1:
                with torch.no_grad():
                    for call in operators.calls:
                        _again(*call)

        return replay, loss


def _again(func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Runs it on the tensors of the recording; what it made then gets the new values. Views and arguments have them."""
    if any(value.alias_info is not None for value in func._schema.returns):
        if func._schema.is_mutable:
            func(*args, **kwargs)
        return
    for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
        if isinstance(old, Tensor):
            old.copy_(new)
