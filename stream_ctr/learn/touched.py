"""The rows of a table that learning has touched since they were last taken: one bit a row.

A table of 2^26 rows has a bitmap of 8 MiB, which is scanned in milliseconds.

>>> touched = Touched(1024)
>>> touched.mark(np.array([[7, 900], [7, 3]], np.int32))
>>> len(touched), touched.take().tolist(), len(touched)
(3, [3, 7, 900], 0)
>>> touched.put_back(np.array([7], np.uint32))
>>> touched.take().tolist()
[7]
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stream_ctr.learn import bit_kernels
from stream_ctr.learn.bit_kernels import Rows


class Touched:
    """A set of rows of a table of `rows` rows; none is touched at first."""

    def __init__(self, rows: int) -> None:
        self._words = bit_kernels.bitmap(rows)

    def __len__(self) -> int:
        return int(bit_kernels.count_bits(self._words))

    def mark(self, ids: npt.NDArray[np.int32]) -> None:
        """Add the rows `ids` int32 [n, F], which lie in the table."""
        bit_kernels.set_bits_of(self._words, ids)

    def take(self) -> Rows:
        """Return the touched rows, ascending, as uint32 [n]; after it none is touched."""
        rows = np.empty(len(self), np.uint32)
        bit_kernels.take_bits(self._words, rows)
        return rows

    def put_back(self, rows: Rows) -> None:
        """Add `rows` uint32 [n], which were taken and did not reach a server."""
        bit_kernels.set_bits(self._words, rows)


def require_touched(touched: Touched | None) -> Touched:
    """Return the touched rows of a learner. Raises `ValueError` if it does not track them."""
    if touched is None:
        raise ValueError("touched rows are not tracked: call track_touched first")
    return touched
