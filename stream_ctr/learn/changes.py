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

import os
from functools import partial
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from stream_ctr.learn.thread_pool import ThreadPool

Rows = npt.NDArray[Any]


class Changes:
    """When each row of a table changed last, in the count of copies that were made of it."""

    FIRST = 1
    """Since when a table has changed at all."""

    def __init__(self, rows: int) -> None:
        self._last = np.zeros(rows, np.int32)
        self._pool = ThreadPool(os.cpu_count() or 1)
        self._now = self.FIRST

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
        edges = np.linspace(0, len(source), self._pool.threads + 1).astype(int).tolist()
        self._pool.run(
            [
                partial(
                    _copy,
                    self._last[first:end],
                    since,
                    np.empty(end - first + 1, np.int32),
                    source[first:end],
                    target[first:end],
                )
                for first, end in pairwise(edges)
            ]
        )
        self._now += 1
        return self._now


@numba.njit(cache=True, nogil=True)
def _mark(last, ids, now):  # type: ignore[no-untyped-def]
    for e in range(ids.shape[0]):
        for f in range(ids.shape[1]):
            last[ids[e, f]] = now


@numba.njit(cache=True, nogil=True)
def _copy(last, since, rows, source, target):  # type: ignore[no-untyped-def]
    """Copy the rows that changed; `rows` is memory for one number more than there are rows."""
    count = 0
    for row in range(len(last)):
        # The next row overwrites one that does not count: this avoids an unpredictable branch.
        rows[count] = row
        count += last[row] >= since
    if 4 * count > len(last):
        target[:] = source
        return
    for i in range(count):
        row = rows[i]
        for column in range(source.shape[1]):
            target[row, column] = source[row, column]
