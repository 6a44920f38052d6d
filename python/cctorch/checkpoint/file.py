"""The HDF5 side of a checkpoint: datasets with slots, whose places are known before anything is there to be stored."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import numpy.typing as npt

from cctorch.checkpoint.codec import Codec, crc32, creation_properties
from cctorch.models import CheckpointError

# Checksums on all of HDF5's own structures, and readable since HDF5 1.10.
_VERSIONS = ("v110", "v110")


class _Sparse(io.FileIO):
    """A file in which slots can be reserved: meanwhile, what is written leaves a hole.

    HDF5 can't give up a file that can't be written. So it is not told: `error` is for who closes the file.
    """

    reserving = False
    error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        size = len(view)
        if self.reserving:
            self.seek(size, io.SEEK_CUR)
            return size
        try:
            while view:
                view = view[os.write(self.fileno(), view) :]
        except OSError as error:
            self.error = error
        return size


class Writer:
    """An HDF5 file on its way: rank 0's. Chunks are written behind its back, at the places that `reserve` returns."""

    def __init__(self, path: Path, mode: str) -> None:
        """`mode` is "w" for a new file, "r+" for one that is there."""
        self._raw = _Sparse(path, "w+" if mode == "w" else "r+")
        try:
            self._file = h5py.File(self._raw, mode, libver=_VERSIONS)
        except BaseException:
            self._raw.close()
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()
        finally:
            self._raw.close()
        if self._raw.error is not None:
            raise self._raw.error

    def create(self, path: str, size: int, dtype: np.dtype[Any], codec: Codec, error_bound: float, chunk: int) -> None:
        """A dataset in one dimension with the codec's filters."""
        properties = creation_properties(codec, error_bound, dtype, chunk)
        space, kind = h5py.h5s.create_simple((size,)), h5py.h5t.py_create(dtype)
        h5py.h5d.create(self._file.id, path.encode(), kind, space, properties, self._links()).close()

    def create_inline(self, path: str, values: npt.NDArray[Any]) -> None:
        """A small dataset, inside of its header and under the header's checksum."""
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_obj_track_times(False)
        properties.set_layout(h5py.h5d.COMPACT)
        space, kind = h5py.h5s.create_simple(values.shape), h5py.h5t.py_create(values.dtype)
        dataset = h5py.h5d.create(self._file.id, path.encode(), kind, space, properties, self._links())
        if values.size:
            dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ascontiguousarray(values))

    def reserve(self, path: str, slots: Mapping[int, tuple[int, int]]) -> dict[int, int]:
        """Keeps `slots[offset] = bytes, filter mask` for the chunks of a dataset; returns their places in the file.

        A chunk that has a slot of another size gets a new one, at the end of the file or where another one was.
        """
        dataset = self._file[path].id
        with self._reserving():
            for offset, (size, mask) in slots.items():
                dataset.write_direct_chunk((offset,), bytes(size), mask)
        return {offset: dataset.get_chunk_info_by_coord((offset,)).byte_offset for offset in slots}

    def describe(self, path: str, shape: tuple[int, ...], dtype: str) -> None:
        """For readers that know HDF5 and not the index: what of it is not that of the dataset."""
        dataset = self._file[path]
        if dataset.shape != shape:
            dataset.attrs["shape"] = np.array(shape, np.int64)
        if dataset.dtype.name != dtype:
            # Of fixed length: HDF5 keeps no checksum of the other kind of text.
            dataset.attrs["dtype"] = np.bytes_(dtype)

    def write_text(self, name: str, text: str) -> None:
        data = np.frombuffer(text.encode(), np.uint8)
        dataset = self._file.create_dataset(name, data=data, **hdf5plugin.Zstd())
        dataset.attrs["crc32"] = np.uint32(crc32(data))

    @contextlib.contextmanager
    def _reserving(self) -> Iterator[None]:
        self._raw.reserving = True
        try:
            yield
        finally:
            self._raw.reserving = False

    @staticmethod
    def _links() -> h5py.h5p.PropLCID:
        links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
        links.set_create_intermediate_group(True)
        links.set_char_encoding(h5py.h5t.CSET_UTF8)
        return links


def read_text(file: h5py.File, name: str, source: str) -> str:
    """What `write_text` wrote. Raises CheckpointError where its checksum is another."""
    dataset = file[name]
    data: npt.NDArray[np.uint8] = dataset[()]
    if crc32(data) != int(dataset.attrs["crc32"]):
        raise CheckpointError(f"{source}: its {name} is damaged: copy the file again")
    return data.tobytes().decode()
