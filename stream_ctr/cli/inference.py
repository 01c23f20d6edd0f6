"""What a run learns from the first records of its source before it begins to learn.

These are the fields, if the configuration names none, and the fit of the numbers (`events.fit`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stream_ctr.errors import DataError
from stream_ctr.events.batch import RecordColumns
from stream_ctr.events.decoder import Decoder
from stream_ctr.events.field import Field
from stream_ctr.events.infer import impression_counts, infer_fields
from stream_ctr.messages import one_line
from stream_ctr.train.source import Source

Plain = Callable[[pa.LargeBinaryArray], pa.LargeBinaryArray]

_IMPRESSIONS = 1000
_LEAST_IMPRESSIONS = 100  # of a partition, however many there are
_BYTES = 16 << 20
_SECONDS = 10.0
_MOST_RECORDS = 100_000  # without a single impression
_REMARKS = {
    "categorical": "",
    "numeric": " - numbers are taken as quantities; list ids in features.categorical",
}


class FirstRecords:
    """The first records of each partition, from its first impression with features on.

    They hold a thousand impressions, of each partition the same number (`most`), or fewer if a
    partition ends before. So they depend on the log alone, not on how it is polled, unless a live
    topic takes more than ten seconds to deliver them. `read` counts all records that were polled,
    `head` holds some of them.
    """

    def __init__(
        self, partitions: int, *, max_record_bytes: int, plain: Plain = lambda values: values
    ) -> None:
        self._plain = plain
        self.read = 0
        self.head: pa.LargeBinaryArray | None = None
        self._max_record_bytes = max_record_bytes
        self.most = max(_IMPRESSIONS // partitions, _LEAST_IMPRESSIONS)
        self._most_bytes = _BYTES // partitions
        self._parts: list[list[pa.LargeBinaryArray]] = [[] for _ in range(partitions)]
        self._impressions = np.zeros(partitions, np.int64)
        self._bytes = np.zeros(partitions, np.int64)
        self._searched = np.zeros(partitions, np.int64)  # records without an impression

    @property
    def found(self) -> bool:
        """Whether there was an impression with features."""
        return any(self._parts)

    @property
    def parts(self) -> list[pa.LargeBinaryArray]:
        """The records of each partition in order of their offsets."""
        empty = pa.array([], pa.large_binary())
        return [pa.concat_arrays([empty, *parts]) for parts in self._parts]

    @property
    def values(self) -> pa.LargeBinaryArray:
        """The records of all partitions."""
        return pa.concat_arrays(self.parts)

    def add(self, records: RecordColumns) -> None:
        """Take what belongs to the first records from a poll."""
        self.read += len(records)
        if self.head is None:
            self.head = _copied(self._plain(records.value[:_IMPRESSIONS]))
        for partition in np.unique(records.partition).tolist():
            rows = np.flatnonzero(records.partition == partition)
            for first in range(0, len(rows), self.most):  # counting all would take time
                if not self._is_full(partition):
                    part = pa.array(rows[first : first + self.most])
                    self._add(partition, records.value.take(part))

    def complete(self, caught_up: npt.NDArray[np.bool_]) -> bool:
        """Return whether nothing is missing; `caught_up` [P] marks partitions without more."""
        if not self.found:
            return self.read >= _MOST_RECORDS
        return all(
            ended or self._is_full(partition) or self._searched[partition] >= 4 * self.most
            for partition, ended in enumerate(caught_up.tolist())
        )

    def _add(self, partition: int, values: pa.LargeBinaryArray) -> None:
        values = self._plain(values)
        counts = impression_counts(values, max_record_bytes=self._max_record_bytes)
        part = self._parts[partition]
        if not part:
            first = next((row for row, count in enumerate(counts) if count), len(counts))
            self._searched[partition] += first
            values, counts = values[first:], counts[first:]
        impressions = self._impressions[partition] + np.cumsum(counts)
        sizes = self._bytes[partition] + np.cumsum(pc.fill_null(pc.binary_length(values), 0))
        # The record that reaches a bound is the last one.
        full = (impressions >= self.most) | (sizes >= self._most_bytes)
        kept = int(np.argmax(full)) + 1 if full.any() else len(values)
        if kept:
            part.append(_copied(values[:kept]))
            self._impressions[partition] = impressions[kept - 1]
            self._bytes[partition] = sizes[kept - 1]

    def _is_full(self, partition: int) -> bool:
        return bool(
            self._impressions[partition] >= self.most or self._bytes[partition] >= self._most_bytes
        )


def first_records(
    source: Source,
    *,
    stopped: Callable[[], bool],
    say: Callable[[str], None],
    max_record_bytes: int,
    reason: str,
    plain: Plain = lambda values: values,
) -> FirstRecords | None:
    """Return the first records of a source, which is then where it was.

    Records in formats that are read only with the fields become JSON (`plain`). Without impressions
    it waits for them, and says so with the `reason` for which they are wanted.
    Returns None if `stopped` becomes true.
    """
    start = source.positions()
    first = FirstRecords(len(source.partitions), max_record_bytes=max_record_bytes, plain=plain)
    deadline = None
    waiting = False
    while not (
        source.finished or stopped() or first.complete(source.caught_up() & source.until_end)
    ):
        records = source.poll(0.25)
        if len(records):
            first.add(records)
        elif not source.until_end and not waiting and not first.found:
            waiting = True
            say(f"waiting for the first impressions, {reason}")
        if first.found:
            deadline = deadline or time.monotonic() + _SECONDS
            if time.monotonic() > deadline:
                break
    if stopped():
        return None
    source.seek(start)
    return first


def inferred_fields(
    first: FirstRecords, source: Source, *, say: Callable[[str], None], max_record_bytes: int
) -> tuple[Field, ...]:
    """Return the fields of the first impressions.

    Raises `DataError` if there are records and no impression among them.
    """
    fields = infer_fields(first.values, max_record_bytes=max_record_bytes)
    if not fields:
        topics = ", ".join(sorted({topic for topic, _ in source.partitions}))
        raise DataError(
            f"no impression with features among {first.read:,} records of {topics}: "
            f"nothing to learn from{describe_records(first.head)}"
        )
    for note in _notes(fields):
        say(note)
    return fields


def _notes(fields: tuple[Field, ...]) -> Iterator[str]:
    for kind, remark in _REMARKS.items():
        names = [one_line(field.name, 60) for field in fields if field.kind == kind]
        if names:
            yield f"note: no fields configured; inferred as {kind}: {', '.join(names)}{remark}"


def _copied(values: pa.LargeBinaryArray) -> pa.LargeBinaryArray:
    """Return a copy, so that the rest of a poll need not be kept."""
    return values.take(pa.array(range(len(values))))


def describe_records(values: pa.LargeBinaryArray | None) -> str:
    """Return what records without any features are instead.

    >>> describe_records(pa.array([b'{"type":"impression"}'], pa.large_binary()))
    '. The first malformed record: kind must be impression, click or example, got None'
    """
    if values is None:
        return ""
    events, rejects = Decoder(()).decode(values)
    if len(rejects):
        return f". The first malformed record: {one_line(rejects.message[0])}"
    return (
        f". Of the first {len(values):,} "
        f"{len(events.impressions) + len(events.examples):,} are impressions without "
        f"features, {len(events.clicks):,} are clicks"
    )
