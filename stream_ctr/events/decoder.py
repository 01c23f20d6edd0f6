"""Decode records into events in columns, and reject what is not an event.

A record holds one event as JSON (`json_events`), or many events in columns: a record that begins
with the bytes ff ff ff ff, with which no JSON begins, is an Arrow IPC stream (`arrow_events`). One
poll may hold both kinds of records. The rules for an event are the same in both:

- `time` is in epoch milliseconds; JSON may also write it as RFC 3339.
- A categorical value is a string, an integer or a boolean. A numeric value is a finite number. A
  value that is null or absent is missing.
- `true_probability`, on impressions of simulated streams, is the probability from which the label
  was drawn.
- Other members are accepted and counted. The last of several members of one name counts.
- The key of a record decides its partition only; the id comes from the value.

>>> impression = b'''{"kind": "impression", "impression_id": "a", "time": 1735689600000,
...                   "features": {"app": "maps"}}'''
>>> decoder = Decoder([Field("app", "categorical")])
>>> events, rejections = decoder.decode(pa.array([impression, b"oops"], pa.large_binary()))
>>> events.impressions.impression_id.to_pylist(), events.impressions.features["app"].to_pylist()
(['a'], ['maps'])
>>> rejections.row.tolist(), rejections.reason
([1], ['not_json'])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stream_ctr.events.arrow_events import ArrowReader, is_arrow, one_event, read_batches
from stream_ctr.events.field import Field
from stream_ctr.events.json_events import JsonReader
from stream_ctr.events.parsed_events import (
    CLICK,
    IMPRESSION,
    UNKNOWN_KIND,
    InvalidRecord,
    ParsedEvents,
    Rejection,
)

# 1973-03-03 and 2100-01-01 in epoch milliseconds. A time outside of them is in another unit, zero,
# or from a broken clock.
EARLIEST_MS = 100_000_000_000
LATEST_MS = 4_102_444_800_000
_OTHER_UNITS: Mapping[str, Callable[[int], int]] = {
    "seconds": lambda time: time * 1000,
    "microseconds": lambda time: time // 1000,
    "nanoseconds": lambda time: time // 1_000_000,
}

# Every bad event of an Arrow record becomes a dead letter of its own. A record with more of them,
# or whose dead letters would take more than 16 times its bytes (64 KiB at least), is rejected.
_MOST_BAD_EVENTS = 1000
_DEAD_LETTER_FACTOR = 16
_LEAST_DEAD_LETTER_BYTES = 1 << 16

_NO_LIMIT = np.iinfo(np.int64).max
_GOOD = -1
_RECORD_REJECTED = -2

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Clicks:
    """n clicks. `row` is the index of each one's record, `within` its index in the record."""

    row: npt.NDArray[np.int64]
    within: npt.NDArray[np.int64]
    impression_id: pa.StringArray
    time: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True, slots=True)
class Impressions:
    """n impressions. `row` is the index of each one's record, `within` its index in the record.

    Features are columns by field name, null where missing. Numeric ones are float64; categorical
    ones are strings, or a dictionary of strings with int32 indices when all came in that form.
    """

    row: npt.NDArray[np.int64]
    within: npt.NDArray[np.int64]
    impression_id: pa.StringArray
    time: npt.NDArray[np.int64]
    features: Mapping[str, pa.Array]
    true_probability: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True, slots=True)
class Events:
    """Decoded impressions and clicks.

    `with_unknown_fields` is the number of events with a member that the decoder does not read: a
    member of an unknown name, or one that a later member of the same name replaces.
    """

    impressions: Impressions
    clicks: Clicks
    with_unknown_fields: int = 0


@dataclass(frozen=True, slots=True)
class Rejections:
    """n rejected records and events: `Rejection` in columns.

    `reason` is a code from a small fixed set, fit for a counter; `message` quotes what was wrong.
    """

    row: npt.NDArray[np.int64]
    within: npt.NDArray[np.int64]
    reason: list[str]
    message: list[str]
    value: list[bytes | None]

    def __len__(self) -> int:
        return len(self.row)

    @classmethod
    def of(cls, rejections: Sequence[Rejection]) -> Rejections:
        """Return these rejections in order of `row` and `within`."""
        ordered = sorted(rejections, key=lambda rejection: (rejection.row, rejection.within))
        return cls(
            row=np.array([rejection.row for rejection in ordered], np.int64),
            within=np.array([rejection.within for rejection in ordered], np.int64),
            reason=[rejection.reason for rejection in ordered],
            message=[rejection.message for rejection in ordered],
            value=[rejection.value for rejection in ordered],
        )


class Decoder:
    """Decode records into events with the given fields.

    `max_ahead_ms` bounds how far an event may be ahead of the broker's time of its record. Without
    a bound, one producer's wrong clock would close the label windows of all others.
    """

    def __init__(
        self,
        fields: Sequence[Field],
        *,
        max_record_bytes: int = 1 << 20,
        max_ahead_ms: int = 300_000,
    ) -> None:
        self.fields = tuple(fields)
        self.max_record_bytes = max_record_bytes
        self.max_ahead_ms = max_ahead_ms
        self._json = JsonReader(fields, max_record_bytes=max_record_bytes)
        self._arrow = ArrowReader(fields)

    def decode(
        self, values: pa.LargeBinaryArray, received: npt.NDArray[np.int64] | None = None
    ) -> tuple[Events, Rejections]:
        """Decode n records, and return the events in order of `row` and `within`.

        A null value is rejected with the reason `tombstone`. `received` [n] holds the broker's time
        of each record in epoch milliseconds, -1 where it is unknown.
        """
        in_columns = is_arrow(values)
        streams, rejected_streams = self._open_streams(values, np.flatnonzero(in_columns))
        json_parts, rejected_json = self._json.read(values, np.flatnonzero(~in_columns))
        arrow_parts, rejected_arrow = self._arrow.read(streams)
        parts = [*json_parts, *arrow_parts]
        rejections = [*rejected_json, *rejected_streams, *rejected_arrow]
        parsed = ParsedEvents.concatenate([part for part in parts if len(part)] or parts[:1])
        broken = _first_broken_rules(parsed, self._latest(parsed, received))
        for row, indices in _bad_events_by_record(parsed, broken):
            try:
                rejections += _reject_events(
                    parsed, indices, broken, streams.get(row), len(values[row].as_buffer())
                )
            except InvalidRecord as error:
                rejections.append(Rejection(row, error.reason, error.message))
                broken[parsed.row == row] = _RECORD_REJECTED
        return _valid_events(parsed, broken == _GOOD), Rejections.of(rejections)

    def _open_streams(
        self, values: pa.LargeBinaryArray, rows: npt.NDArray[np.int64]
    ) -> tuple[dict[int, list[pa.RecordBatch]], list[Rejection]]:
        """Return the batches of the Arrow records at `rows`, by row."""
        streams: dict[int, list[pa.RecordBatch]] = {}
        rejections: list[Rejection] = []
        for row in rows.tolist():
            value = values[row].as_buffer()
            try:
                streams[row] = read_batches(value, max_record_bytes=self.max_record_bytes)
            except InvalidRecord as error:
                rejections.append(Rejection(row, error.reason, error.message))
        return streams, rejections

    def _latest(
        self, parsed: ParsedEvents, received: npt.NDArray[np.int64] | None
    ) -> npt.NDArray[np.int64]:
        """Return the latest time that each event may have, in epoch milliseconds [n]."""
        if received is None:
            return np.full(len(parsed), _NO_LIMIT)
        times = received[parsed.row]
        return np.where(times >= 0, times + self.max_ahead_ms, _NO_LIMIT)


# -- the rules -----------------------------------------------------------------------------------


class _Rule(NamedTuple):
    """A rule of events: the reason code, the message, and the events that break it [n]."""

    reason: str
    message: str
    is_broken: Callable[[ParsedEvents, npt.NDArray[np.int64]], Mask]


def _lacks_id(events: ParsedEvents, latest: npt.NDArray[np.int64]) -> Mask:
    is_empty = pc.equal(pc.binary_length(events.impression_id), 0)
    return np.asarray(pc.fill_null(is_empty, True))


# An event is rejected for the first rule that it breaks.
_RULES = (
    _Rule(
        "unknown_kind",
        "kind must be impression or click, got {kind}",
        lambda events, latest: events.kind == UNKNOWN_KIND,
    ),
    _Rule("missing_id", "impression_id is missing or empty", _lacks_id),
    _Rule("missing_time", "time is missing", lambda events, latest: ~events.has_time),
    _Rule(
        "time_out_of_range",
        "time {time} ms is not between 1973 and 2100{unit}",
        lambda events, latest: (events.time < EARLIEST_MS) | (events.time >= LATEST_MS),
    ),
    _Rule(
        "time_in_future",
        "time {time} ms is too far ahead of its arrival",
        lambda events, latest: events.time > latest,
    ),
    _Rule(
        "missing_features",
        "an impression needs features",
        lambda events, latest: (events.kind == IMPRESSION) & ~events.has_features,
    ),
    _Rule(
        "wrong_probability",
        "true_probability is not in [0, 1]",
        lambda events, latest: (events.true_probability < 0) | (events.true_probability > 1),
    ),
)


def _first_broken_rules(
    events: ParsedEvents, latest: npt.NDArray[np.int64]
) -> npt.NDArray[np.int8]:
    """Return the index of the first rule that each event breaks, or `_GOOD` [n]."""
    first = np.full(len(events), _GOOD, np.int8)
    for index, rule in reversed(list(enumerate(_RULES))):
        first[rule.is_broken(events, latest)] = index
    return first


def _bad_events_by_record(
    events: ParsedEvents, broken: npt.NDArray[np.int8]
) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Yield each row with bad events, and their indices."""
    bad = np.flatnonzero(broken != _GOOD)
    rows = events.row[bad]
    for indices in np.split(bad, np.flatnonzero(np.diff(rows)) + 1) if len(bad) else []:
        yield int(events.row[indices[0]]), indices


def _reject_events(
    events: ParsedEvents,
    indices: npt.NDArray[np.int64],
    broken: npt.NDArray[np.int8],
    stream: Sequence[pa.RecordBatch] | None,
    record_bytes: int,
) -> list[Rejection]:
    """Return a rejection for each of these bad events of one record.

    Raises `InvalidRecord` when they are too many, or too large as records of their own.
    """
    if len(indices) > _MOST_BAD_EVENTS:
        raise InvalidRecord(
            "too_many_bad_events",
            f"{len(indices)} of its events are bad, more than {_MOST_BAD_EVENTS}",
        )
    rejections = []
    remaining_bytes = max(_LEAST_DEAD_LETTER_BYTES, _DEAD_LETTER_FACTOR * record_bytes)
    for index in indices.tolist():
        rule = _RULES[broken[index]]
        within = int(events.within[index])
        kind = repr(events.kind_text[index].as_py())[:80]
        time = int(events.time[index])
        message = rule.message.format(kind=kind, time=time, unit=_unit_hint(time))
        value = None if stream is None else one_event(stream, within)
        remaining_bytes -= len(value or b"")
        if remaining_bytes < 0:
            raise InvalidRecord(
                "too_many_bad_events",
                f"{len(indices)} of its events are bad, and too large as records of their own",
            )
        rejections.append(Rejection(int(events.row[index]), rule.reason, message, within, value))
    return rejections


def _unit_hint(time: int) -> str:
    """Return the unit that a time which is not in milliseconds seems to have, for a message.

    >>> _unit_hint(1_735_689_600), _unit_hint(1_735_689_600_000_000), _unit_hint(0)
    (': is it in seconds?', ': is it in microseconds?', '')
    """
    for unit, in_milliseconds in _OTHER_UNITS.items():
        if EARLIEST_MS <= in_milliseconds(time) < LATEST_MS:
            return f": is it in {unit}?"
    return ""


def _valid_events(events: ParsedEvents, is_good: Mask) -> Events:
    impressions = _select(events, is_good & (events.kind == IMPRESSION))
    clicks = _select(events, is_good & (events.kind == CLICK))
    return Events(
        Impressions(
            row=impressions.row,
            within=impressions.within,
            impression_id=impressions.impression_id,
            time=impressions.time,
            features=impressions.features,
            true_probability=impressions.true_probability,
        ),
        Clicks(
            row=clicks.row,
            within=clicks.within,
            impression_id=clicks.impression_id,
            time=clicks.time,
        ),
        with_unknown_fields=int(np.count_nonzero(events.has_unknown_fields & is_good)),
    )


def _select(events: ParsedEvents, mask: Mask) -> ParsedEvents:
    return events if mask.all() else events.take(np.flatnonzero(mask))
