"""File operations that snapshots and pointers share: durable writes, bounded reads, named errors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from stream_ctr.errors import SnapshotError

TEMPORARY = "tmp-"
"""Names that begin like this are unfinished or half deleted."""


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


UMASK = _read_umask()


@contextmanager
def naming(path: Path, failure: str) -> Iterator[None]:
    """Turn an `OSError` inside the block into a `SnapshotError` that says what failed and where."""
    try:
        yield
    except OSError as reason:
        raise SnapshotError(f"{failure} {path}: {reason.strerror or reason}") from reason


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open `path` for reading and yield the file descriptor. A symbolic link is refused."""
    with naming(path, "cannot read"):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            yield fd
        finally:
            os.close(fd)


def read_all(fd: int) -> bytes:
    """Read the rest of an open file."""
    with os.fdopen(fd, "rb", buffering=0, closefd=False) as file:
        return file.readall()


def write_durably(path: Path, data: bytes) -> None:
    """Write a file; its bytes are on disk when this returns."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Delete a file or a directory with everything in it. A missing path is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link(source: Path, target: Path) -> None:
    """Give a file that never changes a second name, or copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def is_directory(path: Path) -> bool:
    """Return whether `path` is a directory that this process can look at."""
    try:
        return path.is_dir()
    except OSError:  # the name is too long, or a parent folder may not be entered
        return False


def to_json(value: Mapping[str, object]) -> bytes:
    """Encode a manifest or a pointer as indented JSON. Raises `SnapshotError` for NaN and infinity."""
    try:
        return json.dumps(value, indent=1, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as reason:
        raise SnapshotError(f"manifest or pointer is not JSON: {reason}") from reason


def mebibytes(count: int) -> str:
    """Format a number of bytes.

    >>> mebibytes(3 << 19)
    '1.5 MiB'
    """
    return f"{count / 2**20:,.1f} MiB"
