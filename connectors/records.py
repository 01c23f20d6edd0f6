"""Records as columns, the output of every source."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

POLL_BYTES = 16 << 20  # a poll stops reading once its values have this many bytes


@dataclass(frozen=True, slots=True)
class Records:
    """n records in columns, each of length n.

    `partition` is an index into the source's `partitions`, and `offset` the record's offset in that
    partition. `time` is the broker's timestamp in epoch milliseconds, or -1 if it is unknown.
    `value` holds the bytes; null is a tombstone.

    >>> values = pa.array([b"a", None], pa.large_binary())
    >>> records = Records(np.array([0, 1], np.int32), np.array([7, 3]), np.full(2, -1), values)
    >>> len(records), len(Records.empty())
    (2, 0)
    """

    partition: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    time: npt.NDArray[np.int64]
    value: pa.LargeBinaryArray

    def __len__(self) -> int:
        return len(self.offset)

    def before(self, ends: npt.NDArray[np.int64]) -> Records:
        """Return the records whose offset is less than the end of their partition.

        `ends` [P] has one offset for each partition.

        >>> partition = np.array([0, 1, 1], np.int32)
        >>> values = pa.array([b"a", b"b", b"c"], pa.large_binary())
        >>> records = Records(partition, np.array([7, 3, 4]), np.full(3, -1), values)
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
