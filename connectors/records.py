"""Records: what every source yields, as columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

POLL_BYTES = 16 << 20  # of values, after which a poll reads no further record


@dataclass(frozen=True, slots=True)
class Records:
    """n records in columns.

    `partition` is an index into the source's `partitions`, `offset` the record's offset in it, `time` the broker's timestamp in epoch
    milliseconds (-1: unknown), `value` the bytes (null: a tombstone).
    """

    partition: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    time: npt.NDArray[np.int64]
    value: pa.LargeBinaryArray

    def __len__(self) -> int:
        return len(self.offset)

    def before(self, ends: npt.NDArray[np.int64]) -> Records:
        """Those whose offsets are less than the ends [P] of their partitions.

        >>> values = pa.array([b"a", b"b", b"c"], pa.large_binary())
        >>> records = Records(np.array([0, 1, 1], np.int32), np.array([7, 3, 4]), np.full(3, -1), values)
        >>> records.before(np.array([8, 4])).value.to_pylist()
        [b'a', b'b']
        """
        keep = self.offset < ends[self.partition]
        if keep.all():
            return self
        return Records(
            self.partition[keep],
            self.offset[keep],
            self.time[keep],
            self.value.filter(pa.array(keep)),
        )

    @classmethod
    def empty(cls) -> Records:
        return cls(
            np.empty(0, np.int32),
            np.empty(0, np.int64),
            np.empty(0, np.int64),
            pa.array([], pa.large_binary()),
        )
