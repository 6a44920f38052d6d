"""Compression with HDF5's filters, outside of HDF5: what a filter makes of a chunk, made in any thread.

h5py compresses under one lock. The filter plugins of `hdf5plugin` are called here directly, which releases Python's
lock, and their output is what HDF5 would have stored, so that any HDF5 with the same plugins reads the file.
"""

from __future__ import annotations

import ctypes
import functools
import zlib
from dataclasses import dataclass
from typing import Any, Literal, get_args

import h5py
import hdf5plugin
import numpy as np
import numpy.typing as npt

Codec = Literal["zstd", "sz3", "zfp"]
CODECS: tuple[Codec, ...] = get_args(Codec)
LOSSY: tuple[Codec, ...] = ("sz3", "zfp")

Bytes = npt.NDArray[np.uint8]

_SHUFFLE = h5py.h5z.FILTER_SHUFFLE
_ZSTD = 32015
_NAMES = {_ZSTD: "zstd", 32024: "sz3", 32013: "zfp"}
_REVERSE = 0x0100
_LEVEL = 3
# Behind a lossy codec zstd finds nothing to do. It is there as the envelope that ignores what fills up a slot.
_ENVELOPE_LEVEL = 1
# A frame that zstd's decompressor skips: magic number, length, content.
_SKIPPABLE = (0x184D2A50).to_bytes(4, "little")
MIN_FILLER = 8

_Filter = ctypes.CFUNCTYPE(
    ctypes.c_size_t,
    ctypes.c_uint,
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_size_t),
    ctypes.POINTER(ctypes.c_void_p),
)


class _Class(ctypes.Structure):
    """H5Z_class2_t."""

    _fields_ = (
        ("version", ctypes.c_int),
        ("id", ctypes.c_int),
        ("encoder_present", ctypes.c_uint),
        ("decoder_present", ctypes.c_uint),
        ("name", ctypes.c_char_p),
        ("can_apply", ctypes.c_void_p),
        ("set_local", ctypes.c_void_p),
        ("filter", _Filter),
    )


_libc = ctypes.CDLL(None)
_libc.malloc.restype, _libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
_libc.free.restype, _libc.free.argtypes = None, [ctypes.c_void_p]


class CodecError(RuntimeError):
    """A filter refused its input."""


@dataclass(frozen=True)
class Stage:
    filter: int
    options: tuple[int, ...]


@dataclass(frozen=True)
class Pipeline:
    """The filters of a dataset: shuffle, a lossy codec or none, zstd. Every chunk leaves one of the first two out."""

    stages: tuple[Stage, ...]
    itemsize: int

    def mask(self, *, lossless: bool) -> int:
        """HDF5's filter mask of a chunk: bit i is set where filter i is left out."""
        if not self.lossy:
            return 0
        return sum(1 << i for i, stage in enumerate(self.stages) if self._is_left_out(stage, lossless))

    @property
    def lossy(self) -> bool:
        return any(stage.filter not in (_SHUFFLE, _ZSTD) for stage in self.stages)

    @staticmethod
    def _is_left_out(stage: Stage, lossless: bool) -> bool:
        return stage.filter != _ZSTD and (stage.filter == _SHUFFLE) != lossless

    def encode(self, values: npt.NDArray[Any], mask: int) -> bytes:
        data = values.tobytes()
        for i, stage in enumerate(self.stages):
            if not mask >> i & 1:
                if stage.filter == _SHUFFLE:
                    data = np.frombuffer(data, np.uint8).reshape(-1, self.itemsize).T.tobytes()
                else:
                    data = _call(stage, 0, data)
        return data

    def decode(self, data: bytes, mask: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        for i, stage in reversed(list(enumerate(self.stages))):
            if not mask >> i & 1:
                if stage.filter == _SHUFFLE:
                    data = np.frombuffer(data, np.uint8).reshape(self.itemsize, -1).T.tobytes()
                else:
                    data = _call(stage, _REVERSE, data)
        return np.frombuffer(data, dtype)


def filled(data: bytes, size: int) -> bytes:
    """`data` as a chunk of `size` bytes, where it fits with a frame that zstd skips: see :func:`fits`.

    Only the frame's head is returned with it; what follows does not matter.
    """
    gap = size - len(data)
    return data if gap == 0 else data + _SKIPPABLE + (gap - MIN_FILLER).to_bytes(4, "little")


def fits(data: bytes, size: int) -> bool:
    return len(data) == size or len(data) + MIN_FILLER <= size


def creation_properties(codec: Codec, error_bound: float, dtype: np.dtype[Any], chunk: int) -> h5py.h5p.PropDCID:
    """HDF5's properties of a one-dimensional dataset with the codec's filters."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_obj_track_times(False)
    properties.set_chunk((chunk,))
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    if dtype.itemsize > 1:
        properties.set_shuffle()
    level = _LEVEL
    if codec != "zstd":
        asked = hdf5plugin.SZ3(absolute=error_bound) if codec == "sz3" else hdf5plugin.Zfp(accuracy=error_bound)
        properties.set_filter(asked.filter_id, 0, asked.filter_options)
        level = _ENVELOPE_LEVEL
    properties.set_filter(_ZSTD, 0, (level,))
    return properties


@functools.lru_cache(maxsize=4096)
def pipeline(codec: Codec, error_bound: float, dtype: np.dtype[Any], chunk: int) -> Pipeline:
    """The filters with the options that they choose for themselves when a dataset is created."""
    with h5py.File.in_memory() as file:
        properties = creation_properties(codec, error_bound, dtype, chunk)
        space = h5py.h5s.create_simple((chunk,))
        dataset = h5py.h5d.create(file.id, b"x", h5py.h5t.py_create(dtype), space, properties)
        return of_dataset(dataset)


def of_dataset(dataset: h5py.h5d.DatasetID) -> Pipeline:
    properties = dataset.get_create_plist()
    found = [properties.get_filter(i) for i in range(properties.get_nfilters())]
    return Pipeline(tuple(Stage(code, tuple(options)) for code, _, options, _ in found), dataset.dtype.itemsize)


def crc32(data: Bytes | npt.NDArray[Any] | bytes) -> int:
    return zlib.crc32(data)  # type: ignore[arg-type]  # an array is a buffer


def versions() -> dict[str, str]:
    """Of what decides how the bytes look."""
    return {"hdf5plugin": hdf5plugin.version, "hdf5": h5py.version.hdf5_version}


def _call(stage: Stage, flags: int, data: bytes) -> bytes:
    """One call of a filter, which replaces the buffer that it is given."""
    buffer = ctypes.c_void_p(_libc.malloc(max(1, len(data))))
    if not buffer:
        raise MemoryError(f"no memory for {len(data):,} bytes to compress")
    ctypes.memmove(buffer, data, len(data))
    size = ctypes.c_size_t(len(data))
    options = (ctypes.c_uint * len(stage.options))(*stage.options)
    try:
        made = _plugin(stage.filter)(
            flags, len(stage.options), options, len(data), ctypes.byref(size), ctypes.byref(buffer)
        )
        # hdf5plugin's zstd returns its error codes, which are negative, as if they were sizes.
        if not 0 < made < 1 << 63:
            raise CodecError(f"HDF5 filter {stage.filter} refused {len(data):,} bytes")
        return ctypes.string_at(buffer, made)
    finally:
        _libc.free(buffer)


@functools.cache
def _plugin(code: int) -> Any:
    if code not in _plugins():
        known = ", ".join(f"{number} ({name})" for number, name in _NAMES.items())
        raise CodecError(f"HDF5 filter {code} is unknown, expected one of {known}")
    library = ctypes.CDLL(_plugins()[code])
    library.H5PLget_plugin_info.restype = ctypes.POINTER(_Class)
    return library.H5PLget_plugin_info().contents.filter


def _plugins() -> dict[int, str]:
    """The files of the filters."""
    files = hdf5plugin.get_config().registered_filters
    return {code: files[name] for code, name in _NAMES.items() if name in files}
