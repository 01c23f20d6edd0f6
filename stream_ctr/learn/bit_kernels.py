"""Compiled loops over bitmaps: one bit a row of a table, in words of 64 rows.

>>> words = bitmap(128)
>>> set_bits(words, np.array([3, 64, 127], np.uint32))
>>> count_bits(words), words.tolist()
(3, [8, 9223372036854775809])
"""

from __future__ import annotations

from typing import TypeAlias

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from stream_ctr.learn.table_kernels import prefetch

Words: TypeAlias = npt.NDArray[np.uint64]
Rows: TypeAlias = npt.NDArray[np.uint32]

_SHIFT = np.uint64(6)
_LOW = np.uint64(63)
_ONE = np.uint64(1)
_NONE = np.uint64(0)
_AHEAD = 16  # rows that are prefetched


@intrinsic
def popcount(_typing, word):  # type: ignore[no-untyped-def]
    """Return the number of bits of a uint64 that are set."""

    def generate(_context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


@intrinsic
def trailing_zeros(_typing, word):  # type: ignore[no-untyped-def]
    """Return the number of the lowest bit of a uint64 that is set."""

    def generate(_context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


def bitmap(rows: int) -> Words:
    """Return a bitmap of `rows` rows in which no bit is set."""
    return np.zeros(-(-rows // 64), np.uint64)


@numba.njit(cache=True, nogil=True)
def set_bits_of(words, ids):  # type: ignore[no-untyped-def]
    """Set the bits of the rows `ids` int32 [n, F]."""
    n = ids.shape[0]
    for e in range(n):
        following = min(e + 1, n - 1)
        for f in range(ids.shape[1]):
            prefetch(words, ids[following, f] >> 6)
        for f in range(ids.shape[1]):
            row = np.uint64(ids[e, f])
            words[row >> _SHIFT] |= _ONE << (row & _LOW)


@numba.njit(cache=True, nogil=True)
def set_bits(words, rows):  # type: ignore[no-untyped-def]
    """Set the bits of `rows` uint32 [n]."""
    for i in range(len(rows)):
        row = np.uint64(rows[i])
        words[row >> _SHIFT] |= _ONE << (row & _LOW)


@numba.njit(cache=True, nogil=True)
def count_bits(words):  # type: ignore[no-untyped-def]
    """Return the number of bits that are set."""
    count = 0
    for word in words:
        count += popcount(word)
    return count


@numba.njit(cache=True, nogil=True)
def take_bits(words, rows):  # type: ignore[no-untyped-def]
    """Write the rows whose bits are set into `rows` uint32 [n], ascending, and clear the bits."""
    count = 0
    for index in range(len(words)):
        word = words[index]
        if word == _NONE:
            continue
        words[index] = _NONE
        while word != _NONE:
            rows[count] = index * 64 + trailing_zeros(word)
            count += 1
            word &= word - _ONE


@numba.njit(cache=True, nogil=True)
def rank_words(words, ranks):  # type: ignore[no-untyped-def]
    """Write the number of bits that are set before each word into `ranks` int32."""
    count = 0
    for index in range(len(words)):
        ranks[index] = count
        count += popcount(words[index])


@numba.njit(cache=True, nogil=True)
def rank_of(words, ranks, row):  # type: ignore[no-untyped-def]
    """Return the number of bits that are set before that of `row`, or -1 if its bit is not set."""
    place = np.uint64(row)
    word = words[place >> _SHIFT]
    bit = _ONE << (place & _LOW)
    if word & bit == _NONE:
        return -1
    return ranks[place >> _SHIFT] + popcount(word & (bit - _ONE))
