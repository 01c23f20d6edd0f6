"""Pairs of fields as columns of logistic regression, made from the ids of the fields.

A linear model over single fields cannot see that two values mean more together. Over their pairs
it can. The ids of pairs are made where they are learned, so that an impression that waits for its
click does not carry them. A server in any language can reproduce a row of the pair (i, j) from the
rows a and b of its fields:

    salt = (i * 65536 + j) * 0x9E3779B97F4A7C15 mod 2^64
    row  = fmix64((a * 2^32 + b) xor salt) mod 2^table_bits

fmix64 is the finaliser of MurmurHash3 (`events.features.mix64`). A field alone is the pair (i, i).

>>> columns = choose_columns(fields=3)
>>> columns
[(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)]
>>> PairHasher(columns, table_bits=8).rows(np.array([[5, 7, 9]], np.int32)).tolist()
[[7, 201, 250, 114, 81, 126]]
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numba
import numpy as np
import numpy.typing as npt

MOST_PAIRS = 190
_GOLDEN = 0x9E3779B97F4A7C15
_ALL_BITS = (1 << 64) - 1
_MIX_1 = np.uint64(0xFF51AFD7ED558CCD)
_MIX_2 = np.uint64(0xC4CEB9FE1A85EC53)
_SHIFT = np.uint64(33)
_HALF = np.uint64(32)


def choose_columns(fields: int, without: Collection[int] = ()) -> list[tuple[int, int]]:
    """Return the columns of `fields` fields: each alone, then pairs.

    All pairs are taken if there are at most 190, else a fixed random 190: on the logs that this
    was tried on, a choice by count or by gain was no better. Fields in `without`, which carry a
    value, are in no pair.
    """
    crossed = [field for field in range(fields) if field not in without]
    pairs = [(i, j) for i in crossed for j in crossed if i < j]
    if len(pairs) > MOST_PAIRS:
        chosen = np.random.default_rng(0).choice(len(pairs), MOST_PAIRS, replace=False)
        pairs = [pairs[index] for index in sorted(chosen.tolist())]
    return [(field, field) for field in range(fields)] + pairs


class PairHasher:
    """Hash the rows of fields to the rows of `columns`, in a table of 2 ** `table_bits` rows."""

    def __init__(self, columns: Sequence[tuple[int, int]], *, table_bits: int) -> None:
        self._first, self._second = (
            np.array(each, np.int64) for each in zip(*columns, strict=True)
        )
        salts = [((i << 16 | j) * _GOLDEN) & _ALL_BITS for i, j in columns]
        self._salts = np.array(salts, np.uint64)
        self._mask = np.uint64((1 << table_bits) - 1)

    def rows(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Return the rows [n, columns] of examples with the field ids `ids` [n, F]."""
        out = np.empty((len(ids), len(self._first)), np.int32)
        _hash(ids, self._first, self._second, self._salts, self._mask, out)
        return out


@numba.njit(cache=True, nogil=True)
def _hash(ids, first, second, salts, mask, out):  # type: ignore[no-untyped-def]
    for e in range(len(ids)):
        for c in range(len(first)):
            x = (np.uint64(ids[e, first[c]]) << _HALF) | np.uint64(ids[e, second[c]])
            x ^= salts[c]
            x = (x ^ (x >> _SHIFT)) * _MIX_1
            x = (x ^ (x >> _SHIFT)) * _MIX_2
            out[e, c] = np.int32((x ^ (x >> _SHIFT)) & mask)
