"""A table that versions of a served model share, and the rows in which a version differs from it.

    table      [N, ...]        the rows of the oldest version that is alive
    overlay    a bit a row     those that this version reads elsewhere, and their values

A version never changes, so a prediction sees all of an update or none of it, without a lock. An
update makes another version: the same table under a larger overlay. When no other version is alive,
`absorb` writes the overlay into the table. A version is alive while anyone holds it, as a
prediction does that began with it.

>>> first = Version(np.zeros((64, 2), np.float32))
>>> second = first.updated(np.array([5], np.uint32), np.ones((1, 2), np.float32))
>>> first.values()[5].tolist(), second.values()[5].tolist()
([0.0, 0.0], [1.0, 1.0])
>>> second.absorb()
False
>>> del first
>>> second.absorb(), second.values()[5].tolist()
(True, [1.0, 1.0])
"""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple, TypeAlias

import numba
import numpy as np
import numpy.typing as npt

from stream_ctr.learn import bit_kernels
from stream_ctr.learn.bit_kernels import Rows, Words
from stream_ctr.learn.table_kernels import prefetch

Floats: TypeAlias = npt.NDArray[np.float32]
_AHEAD = 16  # rows that are prefetched


class Overlay(NamedTuple):
    """Rows with other values than those in a table.

    `rows` uint32 [n] ascend, and `values` [n, width] are theirs, [n] where a row is one number. The
    values of the row whose bit in `words` is the k-th one are the k-th; `ranks` int32 counts the
    bits before each word. Without rows, `words` is empty.
    """

    rows: Rows
    values: Floats
    words: Words
    ranks: npt.NDArray[np.int32]


class _Table:
    """The part that versions share: the array, a lock for those who change it, and who is alive."""

    def __init__(self, array: Floats) -> None:
        self.array = array
        self.lock = threading.Lock()
        self.versions: weakref.WeakSet[Version] = weakref.WeakSet()


class Version:
    """One version of a table [N, width] of rows, or [N] of numbers.

    The array belongs to the versions from then on.
    """

    def __init__(self, array: Floats) -> None:
        self._share(_Table(array), _no_overlay(array))

    def _share(self, table: _Table, overlay: Overlay) -> None:
        self._table = table
        self._overlay = overlay
        table.versions.add(self)

    def read(self) -> tuple[Floats, Overlay]:
        """Return the table and the overlay; they may be read while this version is held."""
        # A row of the table is written only while the overlay of everyone who reads has it.
        return self._table.array, self._overlay

    @property
    def absorbed(self) -> bool:
        """Whether nothing is read from an overlay."""
        return not len(self._overlay.rows)

    def updated(self, rows: Rows, values: Floats) -> Version:
        """Return a version in which `rows` have these `values`.

        `rows` uint32 [n] ascend and lie in the table; `values` are [n, width], or [n] where a row
        is one number. Neither array may be changed afterwards.
        """
        with self._table.lock:
            overlay = self._overlay
            if len(rows):
                if len(overlay.rows):
                    rows, values = _merged(overlay.rows, overlay.values, rows, values)
                overlay = _overlay_of(len(self._table.array), rows, values)
            made = Version.__new__(Version)
            made._share(self._table, overlay)
        return made

    def absorb(self) -> bool:
        """Write the overlay into the table unless another version is alive.

        Returns True once there is no overlay. A prediction with this version may go on meanwhile.
        """
        with self._table.lock:
            if self.absorbed:
                return True
            if any(version is not self for version in self._table.versions):
                return False
            overlay, array = self._overlay, self._table.array
            _write(_rows_of(array), overlay.rows, _rows_of(overlay.values))
            self._overlay = _no_overlay(array)
            return True

    def values(self) -> Floats:
        """Return a copy of all rows [N, width], or numbers [N]."""
        array, overlay = self.read()
        copied = array.copy()
        copied[overlay.rows] = overlay.values
        return copied

    def numbers(self) -> tuple[Rows, Floats]:
        """Return the rows, ascending, whose numbers are not 0, and others that were updated.

        It copies their numbers only: a table [N] may have few of them and be large.
        """
        array, overlay = self.read()
        rows = np.flatnonzero(array).astype(np.uint32)
        if not len(overlay.rows):
            return rows, array[rows]
        return _merged(rows, array[rows], overlay.rows, overlay.values)


def _rows_of(array: Floats) -> Floats:
    """Return rows, also where each is one number."""
    return array.reshape(len(array), -1) if len(array) else array.reshape(0, 1)


def _merged(old: Rows, old_values: Floats, new: Rows, new_values: Floats) -> tuple[Rows, Floats]:
    """Return the union of two lists of ascending rows, the new values where both have a row."""
    most = len(old) + len(new)
    rows = np.empty(most, np.uint32)
    values = np.empty((most, *new_values.shape[1:]), np.float32)
    count = _merge(old, _rows_of(old_values), new, _rows_of(new_values), rows, _rows_of(values))
    return rows[:count], values[:count]


def _no_overlay(array: Floats) -> Overlay:
    return Overlay(
        np.empty(0, np.uint32),
        np.empty((0, *array.shape[1:]), np.float32),
        np.empty(0, np.uint64),
        np.empty(0, np.int32),
    )


def _overlay_of(table_rows: int, rows: Rows, values: Floats) -> Overlay:
    words = bit_kernels.bitmap(table_rows)
    ranks = np.empty(len(words), np.int32)
    bit_kernels.set_bits(words, rows)
    bit_kernels.rank_words(words, ranks)
    return Overlay(np.ascontiguousarray(rows), np.ascontiguousarray(values), words, ranks)


@numba.njit(cache=True, nogil=True)
def _merge(old, old_values, new, new_values, rows, values):  # type: ignore[no-untyped-def]
    width = values.shape[1]
    i = j = count = 0
    while i < len(old) or j < len(new):
        if j < len(new) and (i == len(old) or new[j] <= old[i]):
            if i < len(old) and old[i] == new[j]:
                i += 1
            rows[count] = new[j]
            for column in range(width):
                values[count, column] = new_values[j, column]
            j += 1
        else:
            rows[count] = old[i]
            for column in range(width):
                values[count, column] = old_values[i, column]
            i += 1
        count += 1
    return count


@numba.njit(cache=True, nogil=True)
def _write(table, rows, values):  # type: ignore[no-untyped-def]
    n, width = values.shape
    numbers = table.reshape(-1)
    for i in range(n):
        ahead = np.int64(rows[min(i + _AHEAD, n - 1)]) * width
        prefetch(numbers, ahead)
        prefetch(numbers, ahead + width - 1)
        row = np.int64(rows[i])
        for column in range(width):
            table[row, column] = values[i, column]
