"""What a run learns from the first records of its source before it begins to learn.

These are the fields, if the configuration names none, and the fit of the numbers (`events.fit`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stream_ctr.errors import DataError
from stream_ctr.events.batch import RecordColumns
from stream_ctr.events.decoder import Decoder
from stream_ctr.events.field import Field
from stream_ctr.events.infer import impression_counts, infer_fields
from stream_ctr.events.times import DETECTED, TimeFormat
from stream_ctr.messages import one_line
from stream_ctr.train.alarms import partition_words
from stream_ctr.train.ingest import Silence
from stream_ctr.train.source import Source

Plain = Callable[[pa.LargeBinaryArray], pa.LargeBinaryArray]

_IMPRESSIONS = 1000
_LEAST_IMPRESSIONS = 100  # of a partition, however many there are
_BYTES = 16 << 20
_SEARCHED = 4  # times as many records as impressions are wanted
_SECONDS = 10.0
_POLL_SECONDS = 0.25
_MOST_NAMED = 5
_NO_WINDOW = 1 << 62  # later than any event
_MOST_RECORDS = 100_000  # are searched for a single impression, or a few more
_REMARKS = {
    "categorical": "",
    "numeric": " - numbers are taken as quantities; list ids in features.categorical",
}


class FirstRecords:
    """The first records of each partition, from its first impression with features on.

    A partition has its part when it holds its share of a thousand impressions (`most`) or of the
    bytes, or an event whose time is a label window after that of its first impression: nothing is
    learned from it earlier. A partition has none when no impression is among its first records, or
    within a label window of its first event. All of this depends on the partition's log alone, not
    on how it is polled. `read` counts all records that were polled, `head` holds some of them.
    """

    def __init__(
        self,
        partitions: int,
        *,
        max_record_bytes: int,
        label_window_ms: int = _NO_WINDOW,
        times: int = 1,
        plain: Plain = lambda values: values,
        time_format: TimeFormat = DETECTED,
    ) -> None:
        self._plain = plain
        self.read = 0
        self.head: pa.LargeBinaryArray | None = None
        self.most = max(_IMPRESSIONS // partitions, _LEAST_IMPRESSIONS)
        bounds = _Bounds(
            impressions=self.most,
            nbytes=_BYTES // partitions,
            searched=_SEARCHED * self.most * times,
            window_ms=min(label_window_ms * times, _NO_WINDOW),
        )
        self._decoder = Decoder((), max_record_bytes=max_record_bytes, time_format=time_format)
        self._parts = [_Part(bounds) for _ in range(partitions)]

    @property
    def found(self) -> bool:
        """Whether there was an impression with features."""
        return any(part.values for part in self._parts)

    @property
    def searched(self) -> int:
        """The number of records, of all partitions, in which the search found no impression."""
        return sum(part.searched for part in self._parts)

    @property
    def impressions(self) -> int:
        """The number of impressions with features in all parts."""
        return sum(part.impressions for part in self._parts)

    @property
    def parts(self) -> list[pa.LargeBinaryArray]:
        """The records of each partition in order of their offsets."""
        empty = pa.array([], pa.large_binary())
        return [pa.concat_arrays([empty, *part.values]) for part in self._parts]

    @property
    def values(self) -> pa.LargeBinaryArray:
        """The records of all partitions."""
        return pa.concat_arrays(self.parts)

    @property
    def missing(self) -> npt.NDArray[np.bool_]:
        """The partitions [P] that do not have their part yet."""
        return np.array([not part.complete for part in self._parts], np.bool_)

    @property
    def silent(self) -> npt.NDArray[np.bool_]:
        """The partitions [P] that brought no record at all."""
        return np.array([not part.read for part in self._parts], np.bool_)

    def add(self, records: RecordColumns) -> None:
        """Take what belongs to the first records from a poll."""
        self.read += len(records)
        if self.head is None:
            self.head = _copied(self._plain(records.value[:_IMPRESSIONS]))
        for partition in np.unique(records.partition).tolist():
            part = self._parts[partition]
            rows = np.flatnonzero(records.partition == partition)
            for first in range(0, len(rows), self.most):  # counting all would take time
                if part.complete:
                    break
                few = rows[first : first + self.most]
                self._add(part, records.value.take(pa.array(few)), records.time[few])

    @property
    def begun(self) -> bool:
        """Whether a partition that has its part would let learning begin."""
        return any(part.complete and part.values for part in self._parts)

    @property
    def bounded(self) -> bool:
        """Whether a search ended at a bound and not at the end of its partition."""
        return any(part.complete for part in self._parts)

    def _add(
        self, part: _Part, values: pa.LargeBinaryArray, received: npt.NDArray[np.int64]
    ) -> None:
        values = self._plain(values)
        counts = impression_counts(values, max_record_bytes=self._decoder.max_record_bytes)
        events, _ = self._decoder.decode(values, received)
        rows = np.concatenate([part.row for part in events.kinds])
        times = np.concatenate([part.time for part in events.kinds])
        earliest = np.full(len(values), _NO_WINDOW)
        latest = np.full(len(values), -_NO_WINDOW)
        np.minimum.at(earliest, rows, times)
        np.maximum.at(latest, rows, times)
        part.add(values, np.array(counts, np.int64), earliest, latest)


@dataclass(frozen=True, slots=True)
class _Bounds:
    """What a partition has to bring: the first of these bounds ends its part."""

    impressions: int
    nbytes: int
    searched: int  # records without an impression
    window_ms: int


class _Part:
    """What belongs to the first records of one partition."""

    def __init__(self, bounds: _Bounds) -> None:
        self.values: list[pa.LargeBinaryArray] = []
        self.complete = False
        self.impressions = 0
        self.read = 0
        self.searched = 0  # records before the first impression, or before the search ended
        self._bounds = bounds
        self._bytes = 0
        self._first_ms = _NO_WINDOW  # of the first impression, or before it of the first event

    def add(
        self,
        values: pa.LargeBinaryArray,
        counts: npt.NDArray[np.int64],
        earliest: npt.NDArray[np.int64],
        latest: npt.NDArray[np.int64],
    ) -> None:
        """Take n records with so many impressions each, and the times of their events [n]."""
        self.read += len(values)
        start = 0
        if not self.values:
            start = self._search(counts, earliest, latest)
            if self.complete or start == len(values):
                return
            self._first_ms = _NO_WINDOW
        self._begin_window(earliest[start:])
        impressions = self.impressions + np.cumsum(counts[start:])
        lengths = pc.fill_null(pc.binary_length(values[start:]), 0)
        sizes = self._bytes + np.cumsum(lengths.to_numpy())
        # The record that reaches a bound is the last one.
        ends = (impressions >= self._bounds.impressions) | (sizes >= self._bounds.nbytes)
        ends |= self._window_passed(latest[start:])
        kept = int(np.argmax(ends)) + 1 if ends.any() else len(impressions)
        self.complete = bool(ends.any())
        self.values.append(_copied(values[start : start + kept]))
        self.impressions = int(impressions[kept - 1])
        self._bytes = int(sizes[kept - 1])

    def _search(
        self,
        counts: npt.NDArray[np.int64],
        earliest: npt.NDArray[np.int64],
        latest: npt.NDArray[np.int64],
    ) -> int:
        """Return the index of the first record with an impression, or n if there is none."""
        has = np.flatnonzero(counts)
        before = int(has[0]) if len(has) else len(counts)
        self._begin_window(earliest[:before])
        searched = self.searched + np.arange(1, before + 1)
        ends = (searched >= self._bounds.searched) | self._window_passed(latest[:before])
        self.complete = bool(ends.any())
        self.searched += int(np.argmax(ends)) + 1 if self.complete else before
        return before

    def _begin_window(self, earliest: npt.NDArray[np.int64]) -> None:
        """Let the window begin with the first of these records that has a time."""
        timed = np.flatnonzero(earliest < _NO_WINDOW)
        if self._first_ms == _NO_WINDOW and len(timed):
            self._first_ms = int(earliest[timed[0]])

    def _window_passed(self, latest: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        if self._first_ms == _NO_WINDOW or self._bounds.window_ms == _NO_WINDOW:
            return np.zeros(len(latest), np.bool_)
        return latest >= self._first_ms + self._bounds.window_ms


def first_records(
    source: Source,
    *,
    stopped: Callable[[], bool],
    say: Callable[[str], None],
    max_record_bytes: int,
    reason: str,
    plain: Plain = lambda values: values,
    time_format: TimeFormat = DETECTED,
    label_window_ms: int = _NO_WINDOW,
    idle_seconds: float = 30.0,
    clock: Callable[[], float] = time.monotonic,
) -> FirstRecords | None:
    """Return the first records of a source, which is then where it was.

    It waits until every partition has its part, and says so with the `reason` for which they are
    wanted. On a live topic, once a partition has its part, it does not wait for one that brings no
    record within ten seconds, or that was read to its end and is idle as the join understands it.
    Records in formats that are read only with the fields become JSON (`plain`).
    Returns None if `stopped` becomes true.
    """
    wait = _Wait(source, say, reason, idle_seconds, clock)
    start = source.positions()
    paused: frozenset[int] = frozenset()
    times = 1
    while True:
        first = FirstRecords(
            len(source.partitions),
            max_record_bytes=max_record_bytes,
            label_window_ms=label_window_ms,
            times=times,
            plain=plain,
            time_format=time_format,
        )
        while (waited_for := wait.waited_for(first)).any():
            if stopped():
                return None
            complete = frozenset(np.flatnonzero(~first.missing).tolist())
            if complete != paused:
                source.pause(complete)
                paused = complete
            records = source.poll(_POLL_SECONDS)
            wait.heard(records, first)
            if len(records):
                first.add(records)
            wait.speak(first, waited_for)
        if paused:
            source.pause(frozenset())
            paused = frozenset()
        source.seek(start)
        if stopped():
            return None
        if first.found or not first.bounded or first.searched >= _MOST_RECORDS:
            wait.note_passed_over(first)
            return first
        times *= 2  # no impression among so many records: look at more


class _Wait:
    """What a run says while it waits for the first records, and for whom it does not wait."""

    def __init__(
        self,
        source: Source,
        say: Callable[[str], None],
        reason: str,
        idle_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._source = source
        self._say = say
        self._reason = reason
        self._idle_seconds = idle_seconds
        self._clock = clock
        self._silence = Silence(len(source.partitions), now=clock())
        self._silent_seconds = np.zeros(len(source.partitions))
        self._said_at: float | None = None
        self._began = clock()

    def heard(self, records: RecordColumns, first: FirstRecords) -> None:
        """Take note of which partitions a poll brought records of."""
        # A partition that has its part is paused: its silence says nothing.
        partitions = np.concatenate([records.partition, np.flatnonzero(~first.missing)])
        self._silent_seconds = self._silence.after_poll(
            partitions, now=self._clock(), brokers_silent=self._source.silent_seconds() > 0
        )

    def waited_for(self, first: FirstRecords) -> npt.NDArray[np.bool_]:
        """Return the partitions [P] that are waited for."""
        missing = first.missing
        if self._source.until_end:
            return missing & ~self._source.caught_up()
        return missing & ~self._idle(first) if first.begun else missing

    def speak(self, first: FirstRecords, waited_for: npt.NDArray[np.bool_]) -> None:
        """Say every ten seconds what is waited for, and at once when nothing has come."""
        now = self._clock()
        if self._source.until_end:
            return
        if not first.found:
            if self._said_at is None and not first.read:
                self._said_at = now
                self._say(f"waiting for the first impressions, {self._reason}")
            return
        if now - (self._said_at or self._began) < _SECONDS:
            return
        self._said_at = now
        self._say(
            f"waiting for {first.most:,} impressions of each partition, or for a label window of "
            f"event time, {self._reason}: {first.impressions:,} so far; "
            f"not yet complete: {self._named(waited_for)}"
        )

    def note_passed_over(self, first: FirstRecords) -> None:
        """Say which partitions were not waited for."""
        if self._source.until_end or not first.begun:
            return
        silent = first.silent
        if silent.any():
            self._say(
                f"note: {self._named(silent)} brought no record within {_SECONDS:g} s and "
                "is passed over"
            )
        if (idle := first.missing & ~silent).any():
            self._say(
                f"note: {self._named(idle)} brought fewer impressions and has been idle for "
                f"{self._idle_seconds:g} s (join.idle_timeout)"
            )

    def _idle(self, first: FirstRecords) -> npt.NDArray[np.bool_]:
        limit = np.where(first.silent, _SECONDS, max(_SECONDS, self._idle_seconds))
        return self._source.caught_up() & (self._silent_seconds >= limit)

    def _named(self, mask: npt.NDArray[np.bool_]) -> str:
        names = partition_words(np.flatnonzero(mask).tolist(), self._source.partitions)
        others = len(names) - _MOST_NAMED
        return ", ".join(names[:_MOST_NAMED]) + (f" and {others} others" if others > 0 else "")


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
        f". Of the first {len(values):,} records "
        f"{len(events.impressions) + len(events.examples):,} are impressions without features, "
        f"{len(events.clicks):,} are clicks"
    )
