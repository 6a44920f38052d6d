"""Where the tests of this folder run: CCTORCH_TEST_DEVICE=cpu tries the tests themselves on a machine without a GPU."""

from __future__ import annotations

import copy
import os
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

DEVICE = torch.device(os.environ.get("CCTORCH_TEST_DEVICE", "cuda"))
CPU = torch.device("cpu")

needs_device = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device, or CCTORCH_TEST_DEVICE=cpu"
)

M = TypeVar("M", bound=nn.Module)


def placed(model: M) -> M:
    """A copy of it, on the device."""
    return copy.deepcopy(model).to(DEVICE)


def assert_same(ours: Tensor, theirs: Tensor, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """`ours` is on the device and equals `theirs`, which is on the CPU."""
    assert ours.device.type == DEVICE.type
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours.detach().cpu(), theirs.detach(), rtol=rtol, atol=atol, equal_nan=True)


def assert_same_state(ours: nn.Module, theirs: nn.Module, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    mine, wanted = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            mine[name].cpu(), value.cpu(), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
