"""File names and operations that snapshots and pointers share: durable writes, named errors."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stream_ctr import state_files
from stream_ctr.errors import SnapshotError

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
TEMPORARY = "tmp-"
"""Names that begin like this are unfinished or half deleted."""

LARGEST_DOCUMENT_BYTES = 1 << 20
"""The largest pointer, and the largest `run.json`."""
LARGEST_MANIFEST_BYTES = 64 << 20

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def plain_name(name: str, kind: str) -> str:
    """Return `name` if it is one that a file may have. Raises `SnapshotError` otherwise.

    >>> plain_name("fm.model", "file stem")
    'fm.model'
    >>> plain_name("../x", "file stem")
    Traceback (most recent call last):
    stream_ctr.errors.SnapshotError: file stem '../x' is not a plain name: letters, digits, '_', \
'-' and '.', not starting with '.' or '-'
    """
    if not _PLAIN_NAME.fullmatch(name):
        raise SnapshotError(
            f"{kind} {name!r:.200} is not a plain name: letters, digits, '_', '-' and '.', "
            "not starting with '.' or '-'"
        )
    return name


def snapshot_name(name: str) -> str:
    """Return `name` if a snapshot may have it. Raises `SnapshotError` otherwise."""
    if name.startswith(TEMPORARY):
        raise SnapshotError(
            f"snapshot {name!r:.200} may not start with {TEMPORARY!r}, which marks unfinished ones"
        )
    return plain_name(name, "snapshot")


class Missing(SnapshotError):
    """A file is not there."""


@contextmanager
def naming(path: Path, failure: str) -> Iterator[None]:
    """Turn an `OSError` inside the block into a `SnapshotError` that says what failed and where."""
    try:
        yield
    except OSError as reason:
        kind = Missing if isinstance(reason, FileNotFoundError) else SnapshotError
        raise kind(f"{failure} {path}: {reason.strerror or reason}") from reason


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a regular file for reading and yield the file descriptor. A symbolic link is refused."""
    with naming(path, "cannot read"):
        fd = state_files.open_file(path, os.O_RDONLY)
        try:
            yield fd
        finally:
            os.close(fd)


def read_all(fd: int) -> bytes:
    """Read the rest of an open file."""
    with os.fdopen(fd, "rb", buffering=0, closefd=False) as file:
        return file.readall()


def read_document(path: Path, largest_bytes: int = LARGEST_DOCUMENT_BYTES) -> bytes:
    """Return the contents of a small regular file.

    Raises `Missing` if there is none, and `SnapshotError` if it is larger than any of its kind: a
    sparse file of many gigabytes takes no room on the disk and all of the memory.
    """
    with opened(path) as fd:
        if (size := os.fstat(fd).st_size) > largest_bytes:
            raise SnapshotError(
                f"{path} has {size:,} bytes, and the largest of its kind has {largest_bytes:,}"
            )
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read(size)


def read_manifest(path: Path) -> bytes:
    """Return the bytes of the manifest of the snapshot at `path`."""
    return read_document(path / MANIFEST, LARGEST_MANIFEST_BYTES)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file; its bytes are on disk when this returns."""
    with open(state_files.create_file(path), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, data: bytes) -> None:
    """Replace a file in one step: after a crash it has the old bytes or the new ones.

    Raises `SnapshotError` that names the file.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    with naming(path, "cannot write"):
        write_durably(temporary, data)
        os.replace(temporary, path)
        sync_directory(path.parent)


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
    """Give an immutable file a second name, or copy it where the file system has no links.

    The bytes are on disk when this returns, if they were before.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())


def is_directory(path: Path) -> bool:
    """Return whether `path` is a directory that this process can look at."""
    try:
        return path.is_dir()
    except OSError:  # the name is too long, or a parent folder may not be entered
        return False


def mebibytes(count: int) -> str:
    """Format a number of bytes.

    >>> mebibytes(3 << 19)
    '1.5 MiB'
    """
    return f"{count / 2**20:,.1f} MiB"
