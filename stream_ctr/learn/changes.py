"""Copies of a table that are renewed by copying only the rows that changed.

>>> changes = Changes(4)
>>> source, target = np.arange(4.0)[:, None], np.zeros((4, 1))
>>> equal_since = changes.copy(source, target, since=0)
>>> source[2] = 9.0
>>> changes.mark(np.array([[2]], np.int32))
>>> equal_since = changes.copy(source, target, since=equal_since)
>>> target.ravel().tolist()
[0.0, 1.0, 9.0, 3.0]
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[Any]


class Changes:
    """When each row of a table changed last, in the count of copies that were made of it."""

    def __init__(self, rows: int) -> None:
        self._last = np.zeros(rows, np.int32)
        self._now = 1

    def mark(self, ids: npt.NDArray[np.int32]) -> None:
        """Note that the rows `ids` [n, F] change."""
        _mark(self._last, ids, self._now)

    def mark_all(self) -> None:
        """Note that every row changes."""
        self._last[:] = self._now

    def copy(self, source: Rows, target: Rows, *, since: int) -> int:
        """Copy the rows of `source` [rows, width] that changed after an earlier copy.

        `since` is what that copy returned, or 0 to copy all rows.
        """
        _copy(self._last, since, source, target)
        self._now += 1
        return self._now


@numba.njit(cache=True, nogil=True)
def _mark(last, ids, now):  # type: ignore[no-untyped-def]
    for e in range(ids.shape[0]):
        for f in range(ids.shape[1]):
            last[ids[e, f]] = now


@numba.njit(cache=True, nogil=True)
def _copy(last, since, source, target):  # type: ignore[no-untyped-def]
    width = source.shape[1]
    for row in range(len(last)):
        if last[row] >= since:
            for column in range(width):
                target[row, column] = source[row, column]
