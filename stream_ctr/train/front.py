"""The front: every rank reads its own partitions and joins the ids that it owns.

    rank 0, 1, ...   read ahead -> take -> exchange -> join --.
    rank 0                                                    `-> merged examples -> the trainer

A round is a `take` and a `push`, which all ranks make together:

| call | on every rank | rank 0 gets |
|---|---|---|
| `take` | takes the next poll of its partitions, or none | counts, rejects, positions, idleness |
| `push` | sends the events of that poll to their owners, and joins what it owns | figures |
| `release` | moves the watermark, and gives the first examples | examples in order |

So the trainer's loop on rank 0 sees one poll, as if one process had read the polls of all ranks one
after another. It stops and resumes between a `take` and a `push` as it does between two polls.
`front_lead` has what stands in the loop for the ingest and for the joiner.

A rank whose reader fails says so in the next `take`, and rank 0 raises that error. An error inside
a call ends the rank, and with it the run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from stream_ctr.distributed.ranks import Ranks
from stream_ctr.errors import BrokerError, ConfigError, DataError, SnapshotError, StreamCtrError
from stream_ctr.events.batch import (
    Arrivals,
    CountedBatch,
    EventBatch,
    FieldSample,
    Rejected,
)
from stream_ctr.join.shared_joiner import Release, SharedJoiner, Waiting
from stream_ctr.train.ingest import Ingest, Poll, SourceStatus
from stream_ctr.train.read_ahead import ReadAhead

Array = npt.NDArray[Any]

_ERRORS = {
    error.__name__: error
    for error in (StreamCtrError, ConfigError, BrokerError, DataError, SnapshotError)
}
_NO_EPOCH = -1
_NO_POSITION = -1
_MICROSECONDS = 1_000_000


class Front:
    """This rank's reader and its part of the join.

    `reader` reads the partitions that `joiner` counts as this rank's own. Errors of the source are
    raised as those of this package inside `translated`.
    """

    def __init__(
        self,
        ranks: Ranks,
        reader: Ingest | ReadAhead,
        joiner: SharedJoiner,
        *,
        translated: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self.reader = reader
        self.joiner = joiner
        self._ranks = ranks
        self._translated = translated
        self._partitions = reader.source.last
        self._own = joiner.partitions_of
        self._summary = _Summary()
        self._all_began = False
        self._held: Poll | StreamCtrError | None = None  # until all ranks have begun
        self._events: EventBatch | None = None  # taken, not pushed yet
        self._status: SourceStatus | None = None  # of all ranks; on rank 0 the last one

    # -- reading ----------------------------------------------------------------------------------

    def status(self) -> SourceStatus:
        """Return the status of the sources of all ranks.

        It is called before the first `take`, and may be called after `close`.
        """
        own = self.reader.status()
        news = self._exchange(_Message.of(own, None, self._own_partitions), b"")
        return self._together(news, own)

    def take(self, wait_seconds: float) -> Poll:
        """Take the next poll of each rank, waiting for so long if there is none.

        Return the poll of all together on rank 0, and this rank's status elsewhere. Raises the
        error of a rank's reader on rank 0.
        """
        taken = self._take(wait_seconds)
        if not self._have_all_begun(taken):
            assert self._status
            return Poll(None, self._status)
        if isinstance(taken, StreamCtrError):
            assert self._status
            self._events = None
            status = self._status
            extra = msgspec.msgpack.encode({"failure": [_kind(taken), str(taken)]})
        else:
            self._events = taken.events
            status = taken.status
            extra = self._summary.of(taken.events) if taken.events else b""
        message = _Message.of(status, self._events, self._own_partitions)
        news = self._exchange(message, extra)
        if self._ranks.rank:
            return Poll(None, status)
        _raise_first(news)
        return Poll(_events_of(news), self._together(news, status))

    def _take(self, wait_seconds: float) -> Poll | StreamCtrError:
        held, self._held = self._held, None
        if held is not None:
            return held
        try:
            with self._translated():
                return self.reader.take(wait_seconds)
        except StreamCtrError as error:
            return error

    def _have_all_begun(self, taken: Poll | StreamCtrError) -> bool:
        """Return whether every rank reads the input that follows those that had ended before.

        A rank that has begun keeps its poll until all have.
        """
        if self._all_began:
            return True
        begun = isinstance(taken, StreamCtrError) or taken.status.present == self._partitions
        self._all_began = self._ranks.all_true(begun)
        if not self._all_began and begun:
            self._held = taken
        return self._all_began

    @property
    def _own_partitions(self) -> range:
        return self._own[self._ranks.rank]

    def _exchange(self, message: npt.NDArray[np.int64], extra: bytes) -> list[_Message]:
        """Return what all ranks say; what is beyond numbers comes to rank 0 alone."""
        message[0] = len(extra)
        size = self._ranks.size
        counts = [_Message.length(len(own)) for own in self._own]
        received = self._ranks.exchange([message] * size, counts=counts)
        lengths = [int(each[0]) for each in received]
        extras = [b""] * size
        if any(lengths):
            data = np.frombuffer(extra, np.uint8)
            parts = [data if to == 0 else data[:0] for to in range(size)]
            expected = lengths if self._ranks.rank == 0 else [0] * size
            extras = [each.tobytes() for each in self._ranks.exchange(parts, counts=expected)]
        return [
            _Message.read(numbers, own, data)
            for numbers, own, data in zip(received, self._own, extras, strict=True)
        ]

    def _together(self, news: Sequence[_Message], own: SourceStatus) -> SourceStatus:
        """Return the status of all ranks; `own` is that of this rank."""
        positions = {at: own.positions[at] for at in own.positions if at not in self._partitions}
        leader_epochs: dict[int, int] = {}
        caught_up = own.caught_up.copy()
        idle = own.idle.copy()
        for each in news:
            positions |= each.positions
            leader_epochs |= each.leader_epochs
            caught_up[each.partitions] = each.caught_up
            idle[each.partitions] = each.idle
        self._status = replace(
            own,
            positions=dict(sorted(positions.items())),
            leader_epochs=dict(sorted(leader_epochs.items())),
            caught_up=caught_up,
            idle=idle,
            finished=all(each.finished for each in news),
            lag=sum(each.lag for each in news),
            lost=sum(each.lost for each in news),
            silent_seconds=max(each.silent_seconds for each in news),
        )
        return self._status

    def seek(self, positions: Mapping[int, int], leader_epochs: Mapping[int, int]) -> None:
        """Let every rank read on at these offsets. Raises the error of a rank on rank 0."""
        extra = b""
        try:
            with self._translated():
                self.reader.seek(positions, leader_epochs)
        except StreamCtrError as error:
            extra = msgspec.msgpack.encode({"failure": [_kind(error), str(error)]})
        news = self._exchange(_Message.of(self.reader.status(), None, self._own_partitions), extra)
        if not self._ranks.rank:
            _raise_first(news)

    def pause(self, partitions: Sequence[int]) -> None:
        """Let every rank read no events of exactly these partitions."""
        self.reader.pause(frozenset(partitions))

    def stage_times(self) -> dict[str, int]:
        """Return the time in each stage, as the mean over the readers of all ranks, on rank 0."""
        own = msgspec.msgpack.encode(self.reader.timer.nanoseconds())
        total: dict[str, int] = {}
        for each in self._ranks.gather(np.frombuffer(own, np.uint8)):
            for name, spent in msgspec.msgpack.decode(each.tobytes()).items():
                total[name] = total.get(name, 0) + spent
        return {name: spent // self._ranks.size for name, spent in total.items()}

    def close(self) -> None:
        """End the reader of this rank."""
        self.reader.close()

    # -- joining ----------------------------------------------------------------------------------

    def push(self, present: Sequence[int] | None) -> None:
        """Join the events that were taken last.

        With `present`, the first and the next partition of an input, the other ranks first take
        over the watermarks of rank 0.
        """
        events, self._events = self._events, None
        self.joiner.push(events, present=None if present is None else range(*present))

    def release(self, watermark: int | None, at_most: int) -> Release:
        """Release examples; see `SharedJoiner.release`."""
        return self.joiner.release(watermark, at_most)

    def waiting(self) -> Waiting:
        """Return what waits on all ranks, on rank 0."""
        return self.joiner.waiting()

    def segments(self) -> dict[str, tuple[Path, str, int]]:
        """Return the files of the join state of all ranks on rank 0."""
        return self.joiner.segments()

    def state_dict(self) -> dict[str, Array]:
        """Return the join state of all ranks on rank 0."""
        return self.joiner.state_dict()

    def load_state_dict(
        self,
        state: Mapping[str, Array] | None = None,
        segments: Mapping[str, tuple[Path, str]] | None = None,
    ) -> None:
        """Share out the join state that rank 0 gives."""
        self.joiner.load_state_dict(state, segments)


class _Summary:
    """The news of the polls of a rank beside numbers, each thing once.

    The rows of a field that varies are of no more interest than the two that differ first.
    """

    def __init__(self) -> None:
        self._fields: frozenset[str] = frozenset()
        self._unknown: frozenset[str] = frozenset()
        self._first: list[Array] = []
        self._constant: list[npt.NDArray[np.bool_]] = []

    def of(self, events: EventBatch) -> bytes:
        """Return what is new in a poll, empty if nothing is."""
        news: dict[str, Any] = {}
        if fields := events.with_fields - self._fields:
            news["fields"] = sorted(fields)
            self._fields |= fields
        if unknown := events.unknown_features - self._unknown:
            news["unknown"] = sorted(unknown)
            self._unknown |= unknown
        if len(events.rejected):
            news["rejected"] = _rejected_columns(events.rejected)
        if events.bad_shares is not None:
            news["bad_shares"] = events.bad_shares.tobytes()
        sample = events.field_sample()
        rows = self._rows([sample.ids, sample.values])
        if len(rows):
            news["ids"] = sample.ids[rows].tobytes()
            news["values"] = sample.values[rows].tobytes()
            news["rows"] = len(rows)
        return msgspec.msgpack.encode(news) if news else b""

    def _rows(self, columns: list[Array]) -> npt.NDArray[np.int64]:
        """Return the first row of all, and those with the first other value of a column."""
        if not len(columns[0]):
            return np.empty(0, np.int64)
        rows = []
        if not self._first:
            self._first = [array[0].copy() for array in columns]
            self._constant = [np.ones(array.shape[1], np.bool_) for array in columns]
            rows.append(np.zeros(1, np.int64))
        for array, first, constant in zip(columns, self._first, self._constant, strict=True):
            watched = np.flatnonzero(constant)
            differs = array[:, watched] != first[watched]
            varies = differs.any(axis=0)
            rows.append(differs.argmax(axis=0)[varies])
            constant[watched[varies]] = False
        return np.unique(np.concatenate(rows))


class _Message(NamedTuple):
    """The answer of a rank to a `take`: numbers, the state of its partitions, and what is new."""

    partitions: list[int]
    columns: npt.NDArray[np.int64]  # [4, own]: position, epoch, caught up, idle
    numbers: dict[str, int]
    news: dict[str, Any]

    @staticmethod
    def length(own: int) -> int:
        """Return the length of the message of a rank with so many partitions."""
        return len(_NUMBERS) + 4 * own

    @staticmethod
    def of(status: SourceStatus, events: EventBatch | None, own: range) -> npt.NDArray[np.int64]:
        """Return a message [length]."""
        numbers = {
            "extra": 0,
            "finished": int(status.finished),
            "lag": status.lag,
            "lost": status.lost,
            "silent_us": int(status.silent_seconds * _MICROSECONDS),
            **_counts(events),
        }
        columns: list[Any] = [
            [numbers[name] for name in _NUMBERS],
            [status.positions.get(at, _NO_POSITION) for at in own],
            [status.leader_epochs.get(at, _NO_EPOCH) for at in own],
            status.caught_up[own.start : own.stop : own.step],
            status.idle[own.start : own.stop : own.step],
        ]
        return np.concatenate([np.array(column, np.int64) for column in columns])

    @classmethod
    def read(cls, message: npt.NDArray[np.int64], own: range, extra: bytes) -> _Message:
        """Return a message that came from the rank with these partitions."""
        head = len(_NUMBERS)
        return cls(
            list(own),
            message[head:].reshape(4, len(own)),
            dict(zip(_NUMBERS, message[:head].tolist(), strict=True)),
            msgspec.msgpack.decode(extra) if extra else {},
        )

    @property
    def positions(self) -> dict[int, int]:
        """The positions of partitions that are being read."""
        at = zip(self.partitions, self.columns[0].tolist(), strict=True)
        return {index: position for index, position in at if position != _NO_POSITION}

    @property
    def leader_epochs(self) -> dict[int, int]:
        at = zip(self.partitions, self.columns[1].tolist(), strict=True)
        return {index: epoch for index, epoch in at if epoch != _NO_EPOCH}

    @property
    def caught_up(self) -> npt.NDArray[np.bool_]:
        return self.columns[2] > 0

    @property
    def idle(self) -> npt.NDArray[np.bool_]:
        return self.columns[3] > 0

    @property
    def finished(self) -> bool:
        return self.numbers["finished"] > 0

    @property
    def lag(self) -> int:
        return self.numbers["lag"]

    @property
    def lost(self) -> int:
        return self.numbers["lost"]

    @property
    def silent_seconds(self) -> float:
        return self.numbers["silent_us"] / _MICROSECONDS


_COUNTS = ("has_events", "records", "events", "shown", "unknown_fields", "rows", "first", "last")
_NUMBERS = ("extra", "finished", "lag", "lost", "silent_us", *_COUNTS)


def _counts(events: EventBatch | None) -> dict[str, int]:
    if events is None:
        return dict.fromkeys(_COUNTS, 0)
    sample = events.field_sample()
    counts = (
        1,
        events.records,
        events.events,
        events.shown,
        events.with_unknown_fields,
        sample.rows,
        sample.first_ms,
        sample.last_ms,
    )
    return dict(zip(_COUNTS, counts, strict=True))


def _events_of(news: Sequence[_Message]) -> EventBatch | None:
    """Return what the polls of all ranks hold, one after another; None if none has events."""
    given = [each for each in news if each.numbers["has_events"]]
    if not given:
        return None

    def total(name: str) -> int:
        return sum(each.numbers[name] for each in given)

    shares = [_bad_shares(each) for each in given]
    return CountedBatch(
        records=total("records"),
        impressions=Arrivals.of([], []),
        ids=np.empty((0, 0), np.int32),
        values=np.empty((0, 0), np.float32),
        true_probability=np.empty(0),
        clicks=Arrivals.of([], []),
        arrival=np.empty(0, np.int64),
        rejected=_rejected([each.news.get("rejected") for each in given]),
        with_fields=_names(given, "fields"),
        with_unknown_fields=total("unknown_fields"),
        bad_shares=np.concatenate(shares) if any(each.any() for each in shares) else None,
        unknown_features=_names(given, "unknown"),
        counted=total("events"),
        counted_shown=total("shown"),
        sample=_sample(given),
    )


def _sample(given: Sequence[_Message]) -> FieldSample:
    with_rows = [each for each in given if each.numbers["rows"]]
    sampled = [each.news for each in given if each.news.get("rows")]
    return FieldSample(
        rows=sum(each.numbers["rows"] for each in with_rows),
        first_ms=with_rows[0].numbers["first"] if with_rows else 0,
        last_ms=with_rows[-1].numbers["last"] if with_rows else 0,
        ids=_matrix(sampled, "ids", np.int32),
        values=_matrix(sampled, "values", np.float32),
        with_fields=_names(given, "fields"),
        unknown_features=_names(given, "unknown"),
    )


def _matrix(sampled: Sequence[Mapping[str, Any]], name: str, type_: Any) -> Array:
    rows = [np.frombuffer(each[name], type_).reshape(each["rows"], -1) for each in sampled]
    return np.concatenate(rows) if rows else np.empty((0, 0), type_)


def _names(given: Sequence[_Message], name: str) -> frozenset[str]:
    return frozenset(found for each in given for found in each.news.get(name, ()))


def _bad_shares(message: _Message) -> npt.NDArray[np.float64]:
    if "bad_shares" in message.news:
        return np.frombuffer(message.news["bad_shares"], np.float64)
    return np.zeros(message.numbers["records"])


def _rejected_columns(rejected: Rejected) -> list[Any]:
    return [
        rejected.partition.tolist(),
        rejected.offset.tolist(),
        rejected.event,
        rejected.value,
        rejected.reason,
        rejected.message,
    ]


def _rejected(columns: Sequence[list[Any] | None]) -> Rejected:
    partition, offset, *rest = (
        [value for each in columns if each for value in each[index]] for index in range(6)
    )
    return Rejected(np.array(partition, np.int32), np.array(offset, np.int64), *rest)


def _kind(error: StreamCtrError) -> str:
    return next(each.__name__ for each in type(error).__mro__ if each.__name__ in _ERRORS)


def _raise_first(news: Sequence[_Message]) -> None:
    """Raise the error of the first rank that has one."""
    for rank, each in enumerate(news):
        if "failure" in each.news:
            kind, text = each.news["failure"]
            raise _ERRORS[kind](f"rank {rank}: {text}" if rank else text)
