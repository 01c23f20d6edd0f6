"""Digests of arrays, made of those of slices, which threads and ranks take at the same time.

    an array [R, C]       gcd(R, 64) slices of R / gcd(R, 64) consecutive rows
    any other array       one slice
    the digest of a set   SHA-256 over name, type, shape and the digests of the slices of each array

A table of 2 ** b rows has 64 slices, or as many as rows. They are the shards in which ranks hold it
(see `shard_files`), so a table that no process holds as a whole has the digest of one that does.

>>> table = np.arange(12, dtype=np.float32).reshape(4, 3)
>>> len(digest_of(table).slices)
4
>>> tensors_sha256({"table": table}) == tensors_sha256({"table": digest_of(table)})
True
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
T = TypeVar("T")
R = TypeVar("R")
SLICES = 64

_BLOCK_BYTES = 1 << 24  # of an array that must be copied before it is hashed
_FOR_THREADS_BYTES = 1 << 20  # threads cost more than they save for less
_MOST_THREADS = 16


@dataclass(frozen=True, slots=True)
class ArrayDigest:
    """The type, the shape and the digests of the slices of an array."""

    dtype: str
    shape: tuple[int, ...]
    slices: tuple[bytes, ...]


def slices_of(shape: Sequence[int]) -> int:
    """Return the number of slices of an array.

    >>> slices_of((1 << 20, 16)), slices_of((16, 8)), slices_of((400, 3)), slices_of((400,))
    (64, 16, 16, 1)
    """
    return math.gcd(shape[0], SLICES) if len(shape) == 2 and shape[0] else 1


def digest_of(array: Array) -> ArrayDigest:
    """Return the digest of an array of any layout. Threads take those of a large one."""
    count = slices_of(array.shape)
    rows = len(array) // count if count > 1 else 0
    parts = [array[i * rows : (i + 1) * rows] for i in range(count)] if rows else [array]
    slices = in_threads(slice_sha256, parts, nbytes=array.nbytes)
    return ArrayDigest(_stored_type(array).str, array.shape, tuple(slices))


def slice_sha256(array: Array) -> bytes:
    """Return the digest of the values of an array, in C order and little-endian."""
    digest = hashlib.sha256()
    for block in _blocks(array):
        stored = np.ascontiguousarray(block, _stored_type(block))
        digest.update(stored.reshape(-1).view(np.uint8).data)
    return digest.digest()


def tensors_sha256(tensors: Mapping[str, Array | ArrayDigest]) -> str:
    """Return the SHA-256 over name, type, shape and values of all arrays, in the order of names.

    Two digests are equal if every bit is. An array may be given by its digest.

    >>> zeros, ones = np.zeros(2), np.ones(1)
    >>> tensors_sha256({"a": zeros, "b": ones}) == tensors_sha256({"b": ones, "a": zeros})
    True
    >>> tensors_sha256({"a": zeros}) == tensors_sha256({"a": zeros[:, None]})
    False
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        given = tensors[name]
        found = given if isinstance(given, ArrayDigest) else digest_of(given)
        digest.update(json.dumps([name, found.dtype, found.shape]).encode() + b"\n")
        digest.update(b"".join(found.slices))
    return digest.hexdigest()


def in_threads(work: Callable[[T], R], items: Sequence[T], *, nbytes: int) -> list[R]:
    """Return the results of `work` on the items, in their order.

    Threads do it if the items have so many bytes that this is faster.
    """
    threads = min(len(items), os.cpu_count() or 1, _MOST_THREADS)
    if threads == 1 or nbytes < _FOR_THREADS_BYTES:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads, thread_name_prefix="files") as pool:
        return list(pool.map(work, items))


def _blocks(array: Array) -> Iterator[Array]:
    """Yield the array in parts of some megabytes, so that no large copy of it is made."""
    if array.ndim == 0 or not array.size or array.flags.c_contiguous:
        yield array
        return
    rows = max(_BLOCK_BYTES * len(array) // array.nbytes, 1)
    for start in range(0, len(array), rows):
        yield array[start : start + rows]


def _stored_type(array: Array) -> np.dtype[Any]:
    return array.dtype.newbyteorder("<")
