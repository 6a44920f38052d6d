"""Files that are either the old ones or the new ones, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

_SUFFIX = ".partial"


def write(path: str | os.PathLike[str], data: bytes) -> None:
    """Replaces `path` by `data`: temporary file in the same folder, fsync, rename, fsync of the folder.

    Raises OSError with a message of its own when the disk is full; the old file is then intact. What is no file,
    such as a folder or a device, is refused.
    """
    with replacing(path, f"{len(data):,} bytes") as temporary:
        _write_synced(temporary, data)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], what: str) -> Iterator[Path]:
    """A temporary path for the block to write and fsync; it takes the place of `path` at the end, or is deleted.

    Raises OSError as `write` does, where `what` did not fit.
    """
    target = Path(path)
    if target.exists() and not target.is_file():  # else the rename would put a file in the place of a device
        kind = errno.EISDIR if target.is_dir() else errno.EINVAL
        raise OSError(kind, "it is not a file, which alone is replaced; expected the path of a file", str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_SUFFIX}")
    try:
        yield temporary
        temporary.replace(target)
        sync_folder(target.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            state = "the old file is intact" if target.exists() else "nothing was written"
            raise OSError(
                error.errno,
                f"the disk is full: {what} did not fit; {state}. Free some space, then try again",
                str(target),
            ) from error
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise


def is_partial(path: Path) -> bool:
    """Whether `path` is a temporary file that a killed process left behind."""
    return path.name.startswith(".") and path.name.endswith(_SUFFIX)


def _write_synced(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
