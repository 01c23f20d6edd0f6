"""Files of tensors, written durably, and read in part from the bytes whose digest is compared.

A file is in the format of safetensors: 8 bytes with the length of the header, the header as JSON,
and the values of one tensor after another.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import safetensors.numpy

from stream_ctr import state_files
from stream_ctr.errors import SnapshotError
from stream_ctr.failpoint import failpoint

Array = npt.NDArray[Any]
SUFFIX = ".safetensors"
_LENGTH_BYTES = 8
_LARGEST_HEADER_BYTES = 100 << 20  # that of the safetensors library
_BLOCK_BYTES = 1 << 20
_DTYPES = {
    "BOOL": "?",
    **{f"I{8 * size}": f"<i{size}" for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": f"<u{size}" for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": f"<f{size}" for size in (2, 4, 8)},
    "C64": "<c8",
}


class FileDigest(NamedTuple):
    """The SHA-256 and the size of a file."""

    sha256: str
    bytes: int


class Placed(NamedTuple):
    """The type and the shape of a tensor, and the place of its first byte in the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int


class Piece(NamedTuple):
    """A contiguous array, to be filled with the bytes from `start` on."""

    start: int
    target: Array


class _Info(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def file_name(stem: str) -> str:
    """Return the name of the file that holds the tensors with this stem.

    >>> file_name("fm.model")
    'fm.model.safetensors'
    """
    return f"{stem}{SUFFIX}"


def write_tensors(path: Path, named: Mapping[str, Array]) -> FileDigest:
    """Write tensors to a file, which is on disk when this returns.

    Raises `OSError` or `SafetensorError` if it cannot be written.
    """
    safetensors.numpy.save_file({name: stored(array) for name, array in named.items()}, path)
    # Hashed as it stands in the page cache: no second copy of a large table in memory.
    with open(path, "rb+") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        # safetensors makes files that only their owner may read.
        os.fchmod(file.fileno(), 0o666 & ~state_files.UMASK)
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
    failpoint("snapshot.file")
    return FileDigest(digest, size)


def stored(array: Array) -> Array:
    """Return `array` little-endian and in C order.

    safetensors writes the buffer from its first byte on, whatever the strides are: a transposed
    array would come back wrong.
    """
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def require_digest(path: Path, size: int, sha256: str | None, expected: FileDigest) -> None:
    """Raise `SnapshotError` unless the size of a file, and its digest if known, are as expected."""
    if size != expected.bytes:
        raise SnapshotError(f"{path} has {size} bytes, the manifest says {expected.bytes}")
    if sha256 is not None and sha256 != expected.sha256:
        raise SnapshotError(
            f"{path} has SHA-256 {sha256}, the manifest says {expected.sha256}: "
            "the file was changed after it was written"
        )


def read_placed(path: Path) -> dict[str, Placed]:
    """Return the tensors of a file and their places, from its header. No digest is compared."""
    with _opened(path) as file:
        return _header(path, file, os.fstat(file.fileno()).st_size)[1]


def read_pieces(
    path: Path,
    expected: FileDigest,
    wanted: Callable[[Mapping[str, Placed]], Sequence[Piece]],
) -> None:
    """Fill arrays from a file, which is read once from its beginning to its end.

    `wanted` is called with the tensors of the file. It returns pieces in the order of their places,
    and may raise `ValueError`. The file may be far larger than the pieces, and takes no memory.

    Raises `SnapshotError` that names the file if it cannot be read, is damaged, or has not the
    expected size and digest. The arrays are to be thrown away then.
    """
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        require_digest(path, size, None, expected)
        head, placed = _header(path, file, size)
        digest = hashlib.sha256(head)
        try:
            pieces = wanted(placed)
        except ValueError as reason:
            raise SnapshotError(f"{path}: {reason}") from None
        at = len(head)
        for start, target in (*pieces, Piece(size, np.empty(0, np.uint8))):
            for view in chain(_skipped(start - at), _blocks(target)):
                if file.readinto(view) != len(view):  # type: ignore[attr-defined]
                    raise SnapshotError(f"{path} became shorter while it was read")
                digest.update(view)
            at = start + target.nbytes
    require_digest(path, size, digest.hexdigest(), expected)


def _skipped(count: int) -> Iterator[memoryview]:
    """Yield room for so many bytes, block by block, in the same memory."""
    room = memoryview(bytearray(min(count, _BLOCK_BYTES)))
    while count > 0:
        yield room[:count]
        count -= len(room)


def _blocks(array: Array) -> Iterator[memoryview]:
    """Yield the bytes of an array in blocks, each of which is in the cache when it is hashed."""
    view = array.reshape(-1).view(np.uint8).data
    for start in range(0, len(view), _BLOCK_BYTES):
        yield view[start : start + _BLOCK_BYTES]


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with open(state_files.open_file(path, os.O_RDONLY), "rb") as file:
            yield file
    except OSError as reason:
        raise SnapshotError(f"cannot read {path}: {reason.strerror or reason}") from reason


def _header(path: Path, file: BinaryIO, size: int) -> tuple[bytes, dict[str, Placed]]:
    """Return the bytes of the header with its length, and the tensors that it lists."""
    length = file.read(_LENGTH_BYTES)
    count = int.from_bytes(length, "little")
    if len(length) < _LENGTH_BYTES or count > min(size - _LENGTH_BYTES, _LARGEST_HEADER_BYTES):
        raise SnapshotError(f"{path} is not a safetensors file: its header has no end")
    text = file.read(count)
    head = length + text
    try:
        found = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        found.pop("__metadata__", None)
        infos = {name: msgspec.json.decode(raw, type=_Info) for name, raw in found.items()}
        return head, {
            name: _placed(name, info, len(head), size - len(head)) for name, info in infos.items()
        }
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as reason:
        raise SnapshotError(f"{path} is not a safetensors file: {reason}") from None


def _placed(name: str, info: _Info, data_start: int, data_bytes: int) -> Placed:
    if info.dtype not in _DTYPES:
        raise ValueError(f"tensor {name!r:.80} has type {info.dtype!r:.40}, which numpy lacks")
    dtype = np.dtype(_DTYPES[info.dtype])
    start, stop = info.data_offsets
    within = 0 <= start <= stop <= data_bytes and all(n >= 0 for n in info.shape)
    if not within or math.prod(info.shape) * dtype.itemsize != stop - start:
        raise ValueError(f"tensor {name!r:.80} is not where its header says")
    return Placed(dtype, info.shape, data_start + start)
