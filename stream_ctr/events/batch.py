"""What one poll brings, decoded and hashed: the columns that the joiner takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa


class RecordColumns(Protocol):
    @property
    def partition(self) -> npt.NDArray[np.int32]: ...
    @property
    def offset(self) -> npt.NDArray[np.int64]: ...
    @property
    def time(self) -> npt.NDArray[np.int64]: ...
    @property
    def value(self) -> pa.LargeBinaryArray: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Came:
    """n events of one kind in order of arrival: id_hash uint64 · time int64 ms · partition int32 · place int64, the order of events within
    their partition: `offset << 20 | index of the event in its record`."""

    id_hash: npt.NDArray[np.uint64]
    time: npt.NDArray[np.int64]
    partition: npt.NDArray[np.int32]
    place: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.time)


@dataclass(frozen=True, slots=True)
class Rejected:
    """n rejects with what their dead letters hold: where they came from, the bytes, and why.

    `event` is the index of the event in its record whose other events may be good, then `value` is a record of this one alone; None of
    those that are a record as it came.
    """

    partition: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    event: list[int | None]
    value: list[bytes | None]
    reason: list[str]
    message: list[str]

    def __len__(self) -> int:
        return len(self.reason)


@dataclass(frozen=True, slots=True)
class EventBatch:
    """What `records` records held: n impressions with `ids` int32 [n, F + C], `values` float32 [n, V] and `true_probability` float64 [n],
    m clicks, and rejects.

    `arrival` [n + m] are indices into the impressions and then the clicks, in order of arrival over both. `with_fields` are the names of
    the fields that any of the impressions had; `with_unknown_fields` is how many events had members that nobody reads. `bad_records` is how
    many of the records are rejected, tombstones not among them; of one with good events, the share of those that are bad.
    """

    records: int
    impressions: Came
    ids: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]
    true_probability: npt.NDArray[np.float64]
    clicks: Came
    arrival: npt.NDArray[np.int64]
    rejected: Rejected
    with_fields: frozenset[str]
    with_unknown_fields: int
    bad_records: float

    @property
    def events(self) -> int:
        """All that came, rejects included."""
        return len(self.impressions) + len(self.clicks) + len(self.rejected)

    @property
    def nbytes(self) -> int:
        came = [
            array
            for part in (self.impressions, self.clicks)
            for array in (part.id_hash, part.time, part.partition, part.place)
        ]
        arrays = [
            *came,
            self.ids,
            self.values,
            self.true_probability,
            self.arrival,
            self.rejected.partition,
            self.rejected.offset,
        ]
        return sum(array.nbytes for array in arrays) + sum(
            len(value) for value in self.rejected.value if value
        )
