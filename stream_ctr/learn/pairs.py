"""Pairs of fields as columns of logistic regression, made from the ids of the fields.

A linear model over single fields cannot see that two values mean more together. Over their pairs
it can. The ids of pairs are made where they are learned, so that an impression that waits for its
click does not carry them. A server in any language can reproduce a row of the pair (i, j) from the
rows a and b of its fields:

    salt = (i * 65536 + j) * 0x9E3779B97F4A7C15 mod 2^64
    row  = fmix64((a * 2^32 + b) xor salt) mod 2^table_bits

fmix64 is the finaliser of MurmurHash3 (`events.features.mix64`). A field alone is the pair (i, i).

A run that began with the weights of another one may have other fields at these places. Then i and j
in the salt are the numbers of the fields (`Pairs.numbers`), which stay with a field, so its pairs
keep their rows.

>>> columns = choose_columns(fields=3)
>>> columns
[(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)]
>>> PairHasher(columns, table_bits=8).rows(np.array([[5, 7, 9]], np.int32)).tolist()
[[7, 201, 250, 114, 81, 126]]
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

import numba
import numpy as np
import numpy.typing as npt
from msgspec import UNSET

from stream_ctr.learn.spec import Pairs

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
    return [(field, field) for field in range(fields)] + _some(pairs, MOST_PAIRS)


def columns_after(
    earlier: Pairs,
    before: Sequence[str],
    now: Sequence[str],
    *,
    stay: Collection[str],
    without: Collection[int] = (),
) -> Pairs:
    """Return the columns of the fields `now`, of which those that `stay` were among those `before`.

    Fields that stay keep their numbers, and pairs of them stay, in the order that their numbers
    have in the salt. Others are added up to 190, those of new fields first. Fields in `without`
    are in no pair. If all fields stay, the result is equal to `earlier`.

    >>> earlier = Pairs(columns=tuple(choose_columns(3)))
    >>> after = columns_after(earlier, ["a", "b", "c"], ["c", "d", "a"], stay=["a", "c"])
    >>> after.columns, after.numbers
    (((0, 0), (1, 1), (2, 2), (2, 0), (0, 1), (1, 2)), (2, 3, 0))
    """
    numbers_before = range(len(before)) if earlier.numbers is UNSET else earlier.numbers
    known = {name: n for name, n in zip(before, numbers_before, strict=True) if name in stay}
    free = itertools.count(max(numbers_before) + 1)
    numbers = tuple(known[name] if name in known else next(free) for name in now)
    place = {name: index for index, name in enumerate(now)}
    named = [(before[i], before[j]) for i, j in earlier.columns if i != j]
    kept = [
        (place[first], place[second])
        for first, second in named
        if {first, second} <= known.keys() and not {place[first], place[second]} & {*without}
    ]
    crossed = [field for field in range(len(now)) if field not in without]
    taken = {frozenset(pair) for pair in kept}
    others = [(i, j) for i in crossed for j in crossed if i < j and frozenset((i, j)) not in taken]
    new = [pair for pair in others if any(now[field] not in known for field in pair)]
    others = [pair for pair in others if pair not in new]
    added = _some(new, max(MOST_PAIRS - len(kept), 0))
    added += _some(others, max(MOST_PAIRS - len(kept) - len(added), 0))
    columns = [(field, field) for field in range(len(now))] + kept + added
    return Pairs(
        columns=tuple(columns),
        table_bits=earlier.table_bits,
        numbers=UNSET if numbers == tuple(range(len(now))) else numbers,
    )


def _some(pairs: list[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """Return the pairs, or a fixed random choice of `most` of them, in their order."""
    if len(pairs) <= most:
        return pairs
    chosen = np.random.default_rng(0).choice(len(pairs), most, replace=False)
    return [pairs[index] for index in sorted(chosen.tolist())]


class PairHasher:
    """Hash the rows of fields to the rows of `columns`, in a table of 2 ** `table_bits` rows.

    `numbers` are those of the fields in the salts, their indices by default.
    """

    def __init__(
        self,
        columns: Sequence[tuple[int, int]],
        *,
        table_bits: int,
        numbers: Sequence[int] | None = None,
    ) -> None:
        self._first, self._second = (
            np.array(each, np.int64) for each in zip(*columns, strict=True)
        )
        numbered = [(numbers[i], numbers[j]) for i, j in columns] if numbers else columns
        salts = [((i << 16 | j) * _GOLDEN) & _ALL_BITS for i, j in numbered]
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
