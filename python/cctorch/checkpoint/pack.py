"""Tensors as one-dimensional arrays that HDF5 has types for; zeros that are many are taken out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

# Below this share of zeros their map takes more than they do. Where values change and zeros must not, one is enough.
_MANY_ZEROS = 0.1

_SAME = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8")
# torch's types that HDF5 and numpy lack, as the bits of another.
_BITS = {
    "bool": "uint8",
    "bfloat16": "uint16",
    "float8_e4m3fn": "uint8",
    "float8_e4m3fnuz": "uint8",
    "float8_e5m2": "uint8",
    "float8_e5m2fnuz": "uint8",
    "float8_e8m0fnu": "uint8",
}
STORED_AS = {name: name for name in _SAME} | _BITS


@dataclass(frozen=True)
class Packed:
    """`values` in the tensor's order, without those that `zeros` has a bit for (first value: highest bit)."""

    values: Array
    zeros: Array | None


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check(name: str, tensor: Tensor) -> None:
    """Raises ValueError, TypeError for what can't be stored."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensors[{name!r}] is a {type(tensor).__name__}, expected a tensor")
    if not isinstance(name, str) or not name or any(c == "\0" or "\ud800" <= c <= "\udfff" for c in name):
        raise ValueError(
            f"tensors: {name!r} can't name a dataset, expected at least one character, and no NUL, nor a surrogate"
        )
    if dtype_name(tensor) not in STORED_AS or tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError(
            f"tensors[{name!r}] is {tensor.dtype}, {tensor.layout}, on {tensor.device}: expected a dense tensor with "
            f"values, of {', '.join(STORED_AS)}. Store its parts under names of their own"
        )


def flat(tensor: Tensor) -> Array:
    name = dtype_name(tensor)
    values = tensor.detach().cpu().contiguous().reshape(-1)
    if name in _BITS:
        values = values.view(getattr(torch, _BITS[name]))
    array: Array = values.numpy()
    return array


def pack(values: Array, *, lossy: bool) -> Packed:
    """Takes zeros out. A negative zero is one of them only where something may be lost: its sign is."""
    if values.dtype.kind != "f" or values.size == 0:
        return Packed(values, None)
    zero = values == 0
    if not lossy:
        zero &= ~np.signbit(values)
    count = np.count_nonzero(zero)
    if count == 0 or (not lossy and count < _MANY_ZEROS * values.size):
        return Packed(values, None)
    return Packed(values[~zero], np.packbits(zero))


def unpack(packed: Packed, dtype: str, shape: tuple[int, ...]) -> Tensor:
    values = packed.values
    if packed.zeros is not None:
        size = int(np.prod(shape))
        zero = np.unpackbits(packed.zeros, count=size).view(np.bool_)
        whole = np.zeros(size, values.dtype)
        whole[~zero] = values
        values = whole
    tensor = torch.from_numpy(np.require(values, requirements=["C", "W"]))
    if dtype in _BITS:
        tensor = tensor.view(getattr(torch, dtype))
    return tensor.reshape(shape)
