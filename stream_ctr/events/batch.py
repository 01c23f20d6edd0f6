"""The columns of one poll: decoded and hashed events, and the records that were rejected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Array = npt.NDArray[Any]


class RecordColumns(Protocol):
    """Columns of n records in order of arrival.

    `partition` is an index into the partitions of the source. `time` is the broker's time in
    epoch milliseconds, -1 where it is unknown. `value` is null in a tombstone.
    """

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
class Arrivals:
    """Columns of n events of one kind, in order of arrival.

    `time` is the event time in epoch milliseconds. `place` orders the events of a partition: it is
    `offset << 20 | index of the event in its record`.

    >>> Arrivals.of([7, 8], [1000, 1500]).place.tolist()
    [0, 1]
    """

    id_hash: npt.NDArray[np.uint64]
    time: npt.NDArray[np.int64]
    partition: npt.NDArray[np.int32]
    place: npt.NDArray[np.int64]

    @classmethod
    def of(cls, id_hash: Sequence[int], time: Sequence[int]) -> Arrivals:
        """Return events of partition 0 with the places 0, 1, 2 and so on."""
        n = len(id_hash)
        return cls(
            np.array(id_hash, np.uint64),
            np.array(time, np.int64),
            np.zeros(n, np.int32),
            np.arange(n),
        )

    def __len__(self) -> int:
        return len(self.time)

    def __getitem__(self, rows: slice | npt.NDArray[np.bool_]) -> Arrivals:
        return Arrivals(self.id_hash[rows], self.time[rows], self.partition[rows], self.place[rows])

    def arrays(self) -> list[Array]:
        return [self.id_hash, self.time, self.partition, self.place]


@dataclass(frozen=True, slots=True)
class LabelledArrivals:
    """k events of kind `example`, in order of arrival: examples that came with their label.

    `label` [k] is 0 or 1. `ids` [k, F + C], `values` [k, V] and `true_probability` [k] are those
    of `EventBatch`.
    """

    arrivals: Arrivals
    label: npt.NDArray[np.uint8]
    ids: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]
    true_probability: npt.NDArray[np.float64]

    @classmethod
    def none(cls) -> LabelledArrivals:
        """Return no examples.

        >>> len(LabelledArrivals.none())
        0
        """
        return cls(
            Arrivals.of([], []),
            np.empty(0, np.uint8),
            np.empty((0, 0), np.int32),
            np.empty((0, 0), np.float32),
            np.empty(0),
        )

    def __len__(self) -> int:
        return len(self.label)

    def arrays(self) -> list[Array]:
        return [
            *self.arrivals.arrays(),
            self.label,
            self.ids,
            self.values,
            self.true_probability,
        ]


@dataclass(frozen=True, slots=True)
class Rejected:
    """Columns of n rejects: where each came from, its bytes, and the reason.

    `event` is None when the whole record is rejected; then `value` holds the record as it came.
    Otherwise `event` is the index of the rejected event in a record whose other events may be
    good, and `value` holds a record of this one event.
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
class FieldSample:
    """The fields of so many impressions and examples, from `first_ms` to `last_ms` (0 of none).

    `ids` [s, F + C] and `values` [s, V] are rows of them in which each field has as many values,
    one or several, as in all of them. `with_fields` names the fields that at least one had, and
    `unknown_features` other features.
    """

    rows: int
    first_ms: int
    last_ms: int
    ids: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]
    with_fields: frozenset[str]
    unknown_features: frozenset[str]


@dataclass(frozen=True, slots=True)
class EventBatch:
    """The contents of the records of one poll: n impressions, m clicks, k examples, and rejects.

    `records` counts the records. `ids` [n, F + C], `values` [n, V] and `true_probability` [n] (NaN
    where it is unknown) belong to the impressions. `arrival` [n + m + k] lists the events of all
    kinds in order of arrival, as indices into the impressions, the clicks and the examples.

    `with_fields` names the fields that at least one impression or example had.
    `with_unknown_fields` counts the events with members that are not read; `unknown_features` names
    such features, at the beginning of a run. `bad_shares` [records] has the share of the events of
    each record that were rejected, 1 for a record that could not be read; None if none was.
    """

    records: int
    impressions: Arrivals
    ids: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]
    true_probability: npt.NDArray[np.float64]
    clicks: Arrivals
    arrival: npt.NDArray[np.int64]
    rejected: Rejected
    with_fields: frozenset[str]
    with_unknown_fields: int
    bad_shares: npt.NDArray[np.float64] | None
    unknown_features: frozenset[str] = frozenset()
    examples: LabelledArrivals = field(default_factory=LabelledArrivals.none)

    @property
    def events(self) -> int:
        """The number of events, rejects included."""
        return len(self.impressions) + len(self.clicks) + len(self.examples) + len(self.rejected)

    @property
    def shown(self) -> int:
        """The number of impressions."""
        return len(self.impressions)

    def field_sample(self) -> FieldSample:
        """Return the fields of the impressions and the examples, all rows of them."""
        given = self.examples
        times = np.concatenate([self.impressions.time, given.arrivals.time])
        ids, values = self.ids, self.values
        if len(given):
            ids = np.concatenate([ids, given.ids]) if len(ids) else given.ids
            values = np.concatenate([values, given.values]) if len(values) else given.values
        return FieldSample(
            len(times),
            int(times[0]) if len(times) else 0,
            int(times[-1]) if len(times) else 0,
            ids,
            values,
            self.with_fields,
            self.unknown_features,
        )

    @property
    def nbytes(self) -> int:
        arrays = [
            *self.impressions.arrays(),
            *self.clicks.arrays(),
            *self.examples.arrays(),
            self.ids,
            self.values,
            self.true_probability,
            self.arrival,
            self.rejected.partition,
            self.rejected.offset,
        ]
        values = sum(len(value) for value in self.rejected.value if value)
        return values + sum(array.nbytes for array in arrays)


@dataclass(frozen=True, slots=True)
class CountedBatch(EventBatch):
    """The contents of a poll whose events are elsewhere: rejects, counts and a sample of fields.

    There are `counted` events, rejects included, of which `counted_shown` are impressions.
    """

    counted: int = 0
    counted_shown: int = 0
    sample: FieldSample = field(kw_only=True)

    @property
    def events(self) -> int:
        """The number of events, rejects included."""
        return self.counted

    @property
    def shown(self) -> int:
        """The number of impressions."""
        return self.counted_shown

    def field_sample(self) -> FieldSample:
        """Return the fields of the impressions and the examples."""
        return self.sample
