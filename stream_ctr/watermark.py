"""Watermarks: how far event time has come, a partition at a time and for all of them.

>>> marks = Watermarks(partitions=2, lateness_ms=100)
>>> marks.observe(np.array([0, 0, 1, 0]), np.array([1000, 900, 5000, 1500]))  # each event's own partition, with itself
array([ 900,  900, 4900, 1400])
>>> marks.overall(excused=np.array([False, False])), marks.overall(excused=np.array([True, False]))
(1400, 4900)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

NOT_YET = -(1 << 62)


class Watermarks:
    """`latest` is the greatest event time seen in each partition, in epoch milliseconds.

    The watermark of a partition lags behind it by `lateness_ms`.
    """

    def __init__(self, *, partitions: int, lateness_ms: int) -> None:
        self.lateness_ms = lateness_ms
        self.latest = np.full(partitions, NOT_YET, np.int64)

    def observe(self, partition: npt.NDArray[np.integer], time: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The watermark of its own partition at each of n events, in order of arrival."""
        limit = np.empty(len(time), np.int64)
        for index in np.unique(partition).tolist():
            rows = np.flatnonzero(partition == index)
            latest = np.maximum(np.maximum.accumulate(time[rows]), self.latest[index])
            limit[rows] = latest - self.lateness_ms
            self.latest[index] = latest[-1]
        return limit

    def overall(self, *, excused: npt.NDArray[np.bool_]) -> int:
        """The least watermark of the partitions that are not excused; of all excused, the greatest."""
        holding = self.latest[~excused]
        latest = int(holding.min()) if len(holding) else int(self.latest.max(initial=NOT_YET))
        return latest - self.lateness_ms if latest != NOT_YET else NOT_YET

    def ahead(self, watermark: int, by_ms: int) -> frozenset[int]:
        """Partitions whose watermark is further ahead than this: reading on in them only fills memory."""
        return (
            frozenset(np.flatnonzero(self.latest - self.lateness_ms > watermark + by_ms).tolist()) if watermark != NOT_YET else frozenset()
        )
