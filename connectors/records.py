"""Records: what every source yields, as columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa


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

    @classmethod
    def empty(cls) -> Records:
        return cls(np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int64), pa.array([], pa.large_binary()))
