"""Ingest: what a poll brings is decoded and hashed until it is ready to be joined, when it is wanted or ahead of that in a thread.

A `Poll` is what one poll brought, with what the source said of itself right after that poll. Who goes by the last `Poll` it used, and
never asks the source, is told nothing of what was read since: positions that go into a snapshot are those after what was learned, and
what else has been read by then is read again by the run that goes on from it.

`Ingest` polls when it is asked. `ReadAhead` has the same `take`, and polls before it is asked: Arrow, the loops over buffers and torch let
go of Python's lock, so one thread reads while the other learns.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from stream_ctr.events.batch import Came, EventBatch, RecordColumns, Rejected
from stream_ctr.events.decoder import Decoder, Events, Rejects
from stream_ctr.events.features import Hasher, hash_ids
from stream_ctr.train.source import Source
from stream_ctr.train.stage_timer import ELSE, StageTimer

_LISTENING_SECONDS = 1.0  # from one poll to the next; longer, and nobody listened
_POLL_SECONDS = 0.25
# Of an event's place in its record, within its offset: 2 ** 20 events a record, 2 ** 43 records a partition.
_WITHIN_BITS = 20


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """How a source stood right after a poll. `positions`: partition -> next offset to read; `lag` and `lost` in records, of all partitions.

    `idle` [P]: nothing is to be expected of the partition now. It was read to its end and, where the log goes on, has been silent for
    long though it could have spoken.
    """

    positions: dict[int, int]
    caught_up: npt.NDArray[np.bool_]
    idle: npt.NDArray[np.bool_]
    finished: bool
    lag: int
    lost: int
    silent_seconds: float


@dataclass(frozen=True, slots=True)
class Poll:
    """What one poll brought, None when that was nothing, and how the source stood after it."""

    events: EventBatch | None
    status: SourceStatus


class Silence:
    """For how long each of n partitions has said nothing although it could have: not while brokers were silent, nor while nobody polled.

    >>> silence = Silence(2, now=0.0)
    >>> silence.after_poll(np.array([1]), now=0.5).tolist()  # partition 1 spoke
    [0.5, 0.0]
    >>> silence.after_poll(np.array([], int), now=40.5).tolist()  # one second of these counts as listening
    [1.5, 1.0]
    """

    def __init__(self, partitions: int, *, now: float) -> None:
        self._heard = np.full(partitions, now)
        self._polled = now

    def after_poll(
        self, partition: npt.NDArray[np.integer], *, now: float, brokers_silent: bool = False
    ) -> npt.NDArray[np.float64]:
        """Seconds [n], when the poll that ended `now` brought records of these partitions."""
        away, self._polled = now - self._polled, now
        self._heard += away if brokers_silent else max(0.0, away - _LISTENING_SECONDS)
        self._heard[np.unique(partition)] = now
        return now - self._heard


class Ingest:
    """Takes from `source` when it is asked to. A partition of a log that goes on is idle after `idle_seconds` of silence.

    `clock` tells seconds that nobody sets, `wall_clock` the time of day, which is the time of records whose broker did not know it.
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
        self.source, self.decoder, self.hasher = source, decoder, hasher
        self.timer = StageTimer()
        self._idle_seconds = idle_seconds
        self._clock, self._wall_clock = clock, wall_clock
        self._silence = Silence(len(source.partitions), now=clock())

    def take(self, timeout_seconds: float) -> Poll:
        """The next poll's records, ready to be joined. Raises what the source raises."""
        with self.timer("poll") as stage:
            records = self.source.poll(timeout_seconds)
            status = self.status(records.partition)
            if not len(records) or status.caught_up.all():  # it may have waited for them
                stage.name = "wait.source"
        return Poll(self.columns(records) if len(records) else None, status)

    def status(self, heard: npt.NDArray[np.integer] = np.empty(0, np.int32)) -> SourceStatus:  # noqa: B008 - nobody writes to it
        """How the source stands; `heard` are the partitions of which records came just now."""
        source = self.source
        silent_seconds, caught_up = source.silent_seconds(), source.caught_up()
        silent = self._silence.after_poll(
            heard, now=self._clock(), brokers_silent=silent_seconds > 0
        )
        return SourceStatus(
            positions=source.positions(),
            caught_up=caught_up,
            idle=caught_up if source.until_end else caught_up & (silent >= self._idle_seconds),
            finished=source.finished,
            lag=source.lag(),
            lost=sum(source.lost().values()),
            silent_seconds=silent_seconds,
        )

    def columns(self, records: RecordColumns) -> EventBatch:
        """Decoded and hashed."""
        now_ms = int(
            self._wall_clock() * 1000
        )  # a log has no broker that knew when a record came, but none came after now
        received = np.where(records.time < 0, now_ms, np.minimum(records.time, now_ms))
        with self.timer("decode"):
            events, rejects = self.decoder.decode(records.value, received)
        impressions, clicks = events.impressions, events.clicks
        with self.timer("hash"):
            ids, values = self.hasher.rows(impressions.features)
            came = [
                Came(
                    hash_ids(part.impression_id),
                    part.time,
                    records.partition[part.row],
                    _places(records, part.row, part.within),
                )
                for part in (impressions, clicks)
            ]
        return EventBatch(
            records=len(records),
            impressions=came[0],
            ids=ids,
            values=values,
            true_probability=impressions.true_probability,
            clicks=came[1],
            # Of one record all events stand in one place of the poll, whatever its offset.
            arrival=np.lexsort(
                (
                    np.concatenate([impressions.within, clicks.within]),
                    np.concatenate([impressions.row, clicks.row]),
                ),
            ),
            rejected=_rejected(records, rejects),
            with_fields=frozenset(
                name
                for name, column in impressions.features.items()
                if column.null_count < len(column)
            ),
            with_unknown_fields=events.with_unknown_fields,
            bad_records=_bad_records(events, rejects, len(records)),
        )

    def pause(self, partitions: frozenset[int]) -> None:
        """Exactly these yield nothing from the next poll on."""
        self.source.pause(partitions)

    def close(self) -> None:
        """Nothing to end: who takes, polls."""


class ReadAhead:
    """`ingest` in a thread of its own, so that what is taken was polled, decoded and hashed before.

    It is ahead by no more than one poll over `most_records` and `most_bytes`, of what is ready to be joined. The thread begins with the
    first `take`; until then, and after `close`, the source is the caller's. What may be asked of it between says `Source`.
    """

    def __init__(self, ingest: Ingest, *, most_records: int, most_bytes: int = 64 << 20) -> None:
        self._ingest = ingest
        self.source, self.timer, self.status = ingest.source, ingest.timer, ingest.status
        self._most_records, self._most_bytes = most_records, most_bytes
        self._ready: deque[Poll] = deque()
        self._records = self._bytes = 0
        self._last: SourceStatus | None = None  # of what was taken last
        self._pause: frozenset[int] | None = None  # asked for, and not passed on yet
        self._failure: BaseException | None = None
        self._finished = self._ended = self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, name="reader", daemon=True)

    def take(self, timeout_seconds: float) -> Poll:
        """The next that was read; when there is none in time, nothing, and the source as it stood before.

        Raises what ended the thread, with the traceback that it had there, when all that was read before is taken.
        """
        if self._last is None:
            self._last = self.status()
            self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ended, timeout_seconds)
            if self._ready:
                return self._hand_out()
            if self._failure:
                raise self._failure
            return Poll(None, self._last)

    def pause(self, partitions: frozenset[int]) -> None:
        """Exactly these yield nothing from the thread's next poll on; what was read of them before is still to be taken."""
        with self._changed:
            self._pause = partitions

    def close(self) -> None:
        """End the thread, which may be in a poll; what it has read and nobody took is dropped."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.ident:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hand_out(self) -> Poll:
        poll = self._ready.popleft()
        if poll.events:
            self._records -= poll.events.records
            self._bytes -= poll.events.nbytes
        self._last = poll.status
        self._changed.notify_all()
        return poll

    # -- in the thread ----------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            with self.timer(ELSE):
                while not self._finished and self._has_room():
                    self._put(self._ingest.take(_POLL_SECONDS))
        except BaseException as error:  # noqa: BLE001 - `take` raises it
            self._failure = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _has_room(self) -> bool:
        """Waits for it, and passes on what is to be paused; false when the thread shall end."""
        with self.timer("wait.trainer"), self._changed:
            self._changed.wait_for(
                lambda: (
                    self._closing
                    or (self._records < self._most_records and self._bytes < self._most_bytes)
                )
            )
            pause, self._pause = self._pause, None
        if pause is not None:
            self._ingest.pause(pause)
        return not self._closing

    def _put(self, poll: Poll) -> None:
        with self._changed:
            # Polls that bring nothing are not bounded by records: of several in a row the last one tells it all.
            if self._ready and not self._ready[-1].events and not poll.events:
                self._ready.pop()
            self._ready.append(poll)
            if poll.events:
                self._records += poll.events.records
                self._bytes += poll.events.nbytes
            self._changed.notify_all()
        self._finished = poll.status.finished


def _places(
    records: RecordColumns, rows: npt.NDArray[np.int64], within: npt.NDArray[np.integer]
) -> npt.NDArray[np.int64]:
    return records.offset[rows] << _WITHIN_BITS | within


def _rejected(records: RecordColumns, rejects: Rejects) -> Rejected:
    own = [
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
        own,
        rejects.reason,
        rejects.message,
    )


def _bad_records(events: Events, rejects: Rejects, n: int) -> float:
    rows = rejects.row[[reason != "tombstone" for reason in rejects.reason]]
    if not len(rows):
        return 0.0
    bad = np.bincount(rows, minlength=n)
    good = np.bincount(events.impressions.row, minlength=n) + np.bincount(
        events.clicks.row, minlength=n
    )
    return float((bad / np.maximum(bad + good, 1)).sum())
