"""Ingest: poll a source, decode and hash the records, and return them ready to be joined.

A `Poll` is what one poll returned, with the status of the source right after it. The trainer uses
the status of the last poll that it took, and never asks the source itself: the positions in a
snapshot are those after what was learned. Records that were read ahead of that are read again by
the run that resumes from the snapshot.

`Ingest` polls when it is called. `read_ahead.ReadAhead` has the same interface and polls in a
thread of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from stream_ctr.events.batch import (
    Arrivals,
    EventBatch,
    LabelledArrivals,
    RecordColumns,
    Rejected,
)
from stream_ctr.events.decoder import Decoder, Events, Rejections
from stream_ctr.events.features import Hasher, hash_ids
from stream_ctr.events.infer import feature_names
from stream_ctr.snapshots.manifest import Input
from stream_ctr.train.inputs import Inputs
from stream_ctr.train.source import Source
from stream_ctr.train.stage_timer import StageTimer

# A longer time between two polls does not count as silence of the source: nobody polled.
_LISTENING_SECONDS = 1.0
# The bits of an event's place that hold its index in the record: 2 ** 20 events a record,
# 2 ** 43 records a partition.
_INDEX_BITS = 20
_SHARES = 1 << 20
AHEAD_OF_CLOCK = "time_ahead_of_clock"
"""The reason of a rejection that depends on when the record was read, and not on the log alone."""
# The features that are no fields are named in so many records of a run, and so many of a poll.
_NAMED_RECORDS = 1000
_NAMED_RECORDS_OF_A_POLL = 100


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """The status of a source right after a poll.

    `inputs` are those that have begun, the last of which has the partitions `present`. `positions`
    maps each partition of theirs to the next offset to read, and `leader_epochs` to the epoch of
    the record before it, where there is one. `idle` [P] is true where nothing is to
    be expected now: the partition is not one of `present`, or was read to its end and, if the log
    goes on, has been silent for long. `lag` and `lost` count records of all partitions.
    """

    inputs: tuple[Input, ...]
    present: range
    positions: dict[int, int]
    leader_epochs: dict[int, int]
    caught_up: npt.NDArray[np.bool_]
    idle: npt.NDArray[np.bool_]
    finished: bool
    lag: int
    lost: int
    silent_seconds: float


@dataclass(frozen=True, slots=True)
class Poll:
    """The events of one poll, None if there were none, and the status of the source after it."""

    events: EventBatch | None
    status: SourceStatus


class Times(Protocol):
    """The time that was spent in each stage."""

    def nanoseconds(self) -> dict[str, int]: ...


class Reading(Protocol):
    """Ingest as the trainer uses it: `Ingest`, `ReadAhead`, or that of several ranks together."""

    @property
    def source(self) -> Inputs: ...
    @property
    def timer(self) -> Times: ...
    def status(self) -> SourceStatus: ...
    def take(self, timeout_seconds: float) -> Poll: ...
    def seek(self, positions: Mapping[int, int], leader_epochs: Mapping[int, int]) -> None: ...
    def pause(self, partitions: frozenset[int]) -> None: ...
    def close(self) -> None: ...


class Silence:
    """Measure for how long each partition has been silent.

    Time in which no broker answered, or in which nobody polled, does not count.

    >>> silence = Silence(2, now=0.0)
    >>> silence.after_poll(np.array([1]), now=0.5).tolist()  # records of partition 1 arrived
    [0.5, 0.0]
    >>> silence.after_poll(np.array([], int), now=40.5).tolist()  # one second of these counts
    [1.5, 1.0]
    """

    def __init__(self, partitions: int, *, now: float) -> None:
        self._heard = np.full(partitions, now)
        self._polled = now

    def after_poll(
        self,
        partition: npt.NDArray[np.integer],
        *,
        now: float,
        brokers_silent: bool = False,
    ) -> npt.NDArray[np.float64]:
        """Return the silence [P] in seconds after a poll that ended `now`.

        `partition` holds the partitions whose records the poll returned.
        """
        elapsed = now - self._polled
        self._polled = now
        self._heard += elapsed if brokers_silent else max(0.0, elapsed - _LISTENING_SECONDS)
        self._heard[np.unique(partition)] = now
        return now - self._heard


class Ingest:
    """Read events from `source` when asked.

    A partition of a log that goes on is idle after `idle_seconds` of silence. `clock` returns
    monotonic seconds. `wall_clock` returns the time of day, which stands in for the arrival time
    of records whose broker did not record it.
    """

    def __init__(
        self,
        source: Source,
        decoder: Decoder,
        hasher: Hasher,
        *,
        idle_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.source = Inputs.of(source)
        self.decoder = decoder
        self.hasher = hasher
        self.timer = StageTimer()
        self._idle_seconds = idle_seconds
        self._clock = clock
        self._wall_clock = wall_clock
        self._silence = Silence(len(source.partitions), now=clock())
        self._records_to_name = _NAMED_RECORDS

    def take(self, timeout_seconds: float) -> Poll:
        """Return the next poll. Raises whatever the source raises."""
        with self.timer("poll") as stage:
            records = self.source.poll(timeout_seconds)
            status = self._status(records.partition)
            if not len(records) or status.caught_up.all():  # the poll may have waited
                stage.name = "wait.source"
        return Poll(self.events(records) if len(records) else None, status)

    def status(self) -> SourceStatus:
        """Return the status of the source now."""
        return self._status(np.empty(0, np.int32))

    def _status(self, heard: npt.NDArray[np.integer]) -> SourceStatus:
        """Return the status after a poll that returned records of the partitions `heard`."""
        source = self.source
        silent_seconds = source.silent_seconds()
        caught_up = source.caught_up()
        silence = self._silence.after_poll(
            heard, now=self._clock(), brokers_silent=silent_seconds > 0
        )
        idle = caught_up if source.until_end else caught_up & (silence >= self._idle_seconds)
        present = source.present
        others = np.ones(len(idle), np.bool_)
        others[present.start : present.stop] = False
        return SourceStatus(
            inputs=source.begun,
            present=present,
            positions=source.positions(),
            leader_epochs=source.leader_epochs(),
            caught_up=caught_up,
            idle=idle | others,
            finished=source.finished,
            lag=source.lag(),
            lost=sum(source.lost().values()),
            silent_seconds=silent_seconds,
        )

    def events(self, records: RecordColumns) -> EventBatch:
        """Decode and hash records."""
        # No record arrived after now, whatever its producer's clock says. A log does not say.
        now_ms = int(self._wall_clock() * 1000)
        by_clock = (records.time < 0) | (records.time > now_ms)
        received = np.where(by_clock, now_ms, records.time)
        with self.timer("decode"):
            events, rejects = self.decoder.decode(records.value, received)
        impressions = events.impressions
        with self.timer("hash"):
            ids, values = self.hasher.rows(impressions.features)
            impression_columns, click_columns, example_columns = (
                Arrivals(
                    hash_ids(part.impression_id),
                    part.time,
                    records.partition[part.row],
                    _places(records, part.row, part.within),
                )
                for part in events.kinds
            )
            examples = self._examples(events, example_columns)
        return EventBatch(
            records=len(records),
            impressions=impression_columns,
            ids=ids,
            values=values,
            true_probability=impressions.true_probability,
            clicks=click_columns,
            arrival=np.lexsort(
                (
                    np.concatenate([part.within for part in events.kinds]),
                    np.concatenate([part.row for part in events.kinds]),
                ),
            ),
            rejected=_rejected(records, rejects, by_clock),
            with_fields=frozenset(
                name
                for part in (impressions, events.examples)
                for name, column in part.features.items()
                if column.null_count < len(column)
            ),
            with_unknown_fields=events.with_unknown_fields,
            bad_shares=_bad_shares(events, rejects, len(records)),
            unknown_features=self._unknown_features(records, events),
            examples=examples,
        )

    def _examples(self, events: Events, arrivals: Arrivals) -> LabelledArrivals:
        if not len(arrivals):
            return LabelledArrivals.none()
        ids, values = self.hasher.rows(events.examples.features)
        return LabelledArrivals(
            arrivals, events.label, ids, values, events.examples.true_probability
        )

    def _unknown_features(self, records: RecordColumns, events: Events) -> frozenset[str]:
        """Return the names of features that are no fields, from the first records of a run."""
        n = min(self._records_to_name, _NAMED_RECORDS_OF_A_POLL, len(records))
        if not events.with_unknown_fields or not n:
            return frozenset()
        self._records_to_name -= n
        limit = self.decoder.max_record_bytes
        names = feature_names(self.decoder.plain(records.value[:n]), max_record_bytes=limit)
        return names - {field.name for field in self.decoder.fields}

    def seek(self, positions: Mapping[int, int], leader_epochs: Mapping[int, int]) -> None:
        """Read on at these offsets, after records of these epochs."""
        self.source.seek(positions)
        self.source.expect_epochs(leader_epochs)

    def pause(self, partitions: frozenset[int]) -> None:
        """Return no events of exactly these partitions from the next poll on."""
        self.source.pause(partitions)

    def close(self) -> None:
        """Do nothing: no thread has to end."""


def _places(
    records: RecordColumns, rows: npt.NDArray[np.int64], within: npt.NDArray[np.integer]
) -> npt.NDArray[np.int64]:
    return records.offset[rows] << _INDEX_BITS | within


def _rejected(
    records: RecordColumns, rejects: Rejections, by_clock: npt.NDArray[np.bool_]
) -> Rejected:
    """Return the rejections with their values; `by_clock` [records] marks those judged by now."""
    reasons = [
        AHEAD_OF_CLOCK if reason == "time_in_future" and by_clock[row] else reason
        for row, reason in zip(rejects.row.tolist(), rejects.reason, strict=True)
    ]
    values = [
        value if value is not None else records.value[row].as_py()
        for row, value in zip(rejects.row.tolist(), rejects.value, strict=True)
    ]
    event = [
        None if value is None else within
        for within, value in zip(rejects.within.tolist(), rejects.value, strict=True)
    ]
    return Rejected(
        records.partition[rejects.row],
        records.offset[rejects.row],
        event,
        values,
        reasons,
        rejects.message,
    )


def _bad_shares(events: Events, rejects: Rejections, n: int) -> npt.NDArray[np.float64] | None:
    """Return the share of each of n records that was rejected [n], or None if none was.

    The shares are multiples of 2^-20, so that their sums are exact in any order.
    """
    rows = rejects.row[[reason != "tombstone" for reason in rejects.reason]]
    if not len(rows):
        return None
    bad = np.bincount(rows, minlength=n)
    good = np.bincount(np.concatenate([part.row for part in events.kinds]), minlength=n)
    shares: npt.NDArray[np.float64] = np.round(bad / np.maximum(bad + good, 1) * _SHARES)
    return shares / _SHARES
