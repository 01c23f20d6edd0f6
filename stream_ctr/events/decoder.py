"""Decode records into events in columns, and reject what is not an event.

A record holds one event as JSON (`json_events`), which may be wrapped as a CloudEvent
(`cloud_events`), one event as Avro (`avro_events`), or many events in columns, as an Arrow IPC
stream (`arrow_events`). The first bytes of a record tell which: no JSON begins with those of the
others. One poll may hold records of every kind. The rules for an event are the same in all:

- `time` is a number of s, ms, us or ns since 1970, or a timestamp; JSON writes it as a number or
  as RFC 3339. `times` has the rule.
- A categorical value is a string, an integer or a boolean. A numeric value is a finite number. A
  value that is null or absent is missing.
- `label`, on events of kind `example`, is 0 or 1.
- `true_probability`, on impressions of simulated streams, is the probability from which the label
  was drawn.
- `impression_id` is a string or an integer; the integer 7 is the same id as the string "7".
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

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stream_ctr.events import cloud_events
from stream_ctr.events.arrow_events import ArrowReader, is_arrow, one_event, read_batches
from stream_ctr.events.avro_events import AvroReader, Schemas, is_framed
from stream_ctr.events.defects import defects_as_invalid
from stream_ctr.events.field import Field
from stream_ctr.events.json_events import JsonReader
from stream_ctr.events.parsed_events import (
    CLICK,
    EXAMPLE,
    IMPRESSION,
    UNKNOWN_KIND,
    InvalidRecord,
    ParsedEvents,
    Rejection,
)
from stream_ctr.events.times import DETECTED, EARLIEST_MS, LATEST_MS, TimeFormat
from stream_ctr.messages import one_line

# Every bad event of an Arrow record becomes a dead letter of its own. A record with more of them,
# or whose dead letters would take more than 16 times its bytes (64 KiB at least), is rejected.
_MOST_BAD_EVENTS = 1000
_DEAD_LETTER_FACTOR = 16
_LEAST_DEAD_LETTER_BYTES = 1 << 16

_NO_LIMIT = np.iinfo(np.int64).max
_LONGEST_MESSAGE = 280  # of a rejection; a path within nested JSON may be as long as the record
_GOOD = -1
_RECORD_REJECTED = -2

Mask = npt.NDArray[np.bool_]
Format = Literal["auto", "json", "arrow", "avro"]
_FORMAT_NAMES: Mapping[Format, str] = {
    "json": "JSON or text",
    "arrow": "an Arrow stream",
    "avro": "Avro, or JSON with a schema id",
}


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
    """n impressions or examples.

    `row` is the index of each one's record, `within` its index in the record. Features are columns
    by field name, null where missing. Numeric ones are float64; categorical ones are strings, or a
    dictionary of strings with int32 indices when all came in that form.
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
    """Decoded impressions, clicks and examples.

    `examples` are impressions that came with their label; `label` [k] is 0 or 1.
    `with_unknown_fields` is the number of events with a member that the decoder does not read: a
    member of an unknown name, or one that a later member of the same name replaces.
    """

    impressions: Impressions
    clicks: Clicks
    examples: Impressions
    label: npt.NDArray[np.uint8]
    with_unknown_fields: int = 0

    @property
    def kinds(self) -> tuple[Impressions, Clicks, Impressions]:
        """The impressions, the clicks and the examples."""
        return self.impressions, self.clicks, self.examples


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
            message=[one_line(rejection.message, _LONGEST_MESSAGE) for rejection in ordered],
            value=[rejection.value for rejection in ordered],
        )


class Decoder:
    """Decode records into events with the given fields.

    `max_ahead_ms` bounds how far an event may be ahead of the broker's time of its record. Without
    a bound, one producer's wrong clock would close the label windows of all others.

    `schemas` has those of Avro records. With a `format` other than "auto", records in any other
    format are rejected.
    """

    def __init__(
        self,
        fields: Sequence[Field],
        *,
        max_record_bytes: int = 1 << 20,
        max_ahead_ms: int = 300_000,
        time_format: TimeFormat = DETECTED,
        schemas: Schemas | None = None,
        format: Format = "auto",
    ) -> None:
        self.fields = tuple(fields)
        self.max_record_bytes = max_record_bytes
        self.max_ahead_ms = max_ahead_ms
        self._json = JsonReader(fields, max_record_bytes=max_record_bytes, time_format=time_format)
        self._arrow = ArrowReader(fields, time_format=time_format)
        self._avro = AvroReader(
            fields, schemas, max_record_bytes=max_record_bytes, time_format=time_format
        )
        self._format = format

    def decode(
        self, values: pa.LargeBinaryArray, received: npt.NDArray[np.int64] | None = None
    ) -> tuple[Events, Rejections]:
        """Decode n records, and return the events in order of `row` and `within`.

        A null value is rejected with the reason `tombstone`. `received` [n] holds the broker's time
        of each record in epoch milliseconds, -1 where it is unknown.

        No record makes this raise. One for which a reader raises an error that it should not is
        rejected with the reason `undecodable`. What is raised is a lack of memory, or the error of
        `schemas`.
        """
        try:
            return self._decode(values, received)
        except InvalidRecord:
            return self._decode_around_defects(values, received)

    def _decode_around_defects(
        self, values: pa.LargeBinaryArray, received: npt.NDArray[np.int64] | None
    ) -> tuple[Events, Rejections]:
        """Decode the records, of which at least one makes a reader raise, and reject those."""
        defects = dict(self._defects(values, received, np.arange(len(values))))
        is_good = np.ones(len(values), np.bool_)
        is_good[list(defects)] = False
        events, rejections = self._decode(pc.if_else(pa.array(is_good), values, None), received)
        for index, row in enumerate(rejections.row.tolist()):
            if row in defects:  # it was decoded as a tombstone
                rejections.reason[index] = defects[row].reason
                rejections.message[index] = defects[row].message
        return events, rejections

    def _defects(
        self,
        values: pa.LargeBinaryArray,
        received: npt.NDArray[np.int64] | None,
        rows: npt.NDArray[np.int64],
    ) -> Iterator[tuple[int, InvalidRecord]]:
        """Yield which of the records at `rows` make a reader raise when each is read alone."""
        try:
            self._decode(values.take(pa.array(rows)), None if received is None else received[rows])
        except InvalidRecord as error:
            if len(rows) == 1:
                yield int(rows[0]), error
                return
            for half in np.array_split(rows, 2):
                yield from self._defects(values, received, half)

    @defects_as_invalid()
    def _decode(
        self, values: pa.LargeBinaryArray, received: npt.NDArray[np.int64] | None
    ) -> tuple[Events, Rejections]:
        rows, rejections = self._rows_by_format(values)
        streams, rejected_streams = self._open_streams(values, rows["arrow"])
        avro_parts, rejected_avro, framed_json = self._avro.read(values, rows["avro"])
        json_parts, rejected_json = self._json.read(values, rows["json"])
        arrow_parts, rejected_arrow = self._arrow.read(streams)
        parts = [*json_parts, *avro_parts, *arrow_parts]
        rejections += [*rejected_json, *rejected_avro, *rejected_streams, *rejected_arrow]
        if framed_json:
            framed_parts, rejected_framed = self._json.read_apart(framed_json)
            parts += framed_parts
            rejections += rejected_framed
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

    def plain(self, values: pa.LargeBinaryArray) -> pa.LargeBinaryArray:
        """Return records with a JSON event in place of each CloudEvent and each Avro record.

        What cannot be read stays as it is. This is for looks at a few records; it is slow.

        >>> cloud_event = b'{"specversion":"1.0","id":"a","data":{"kind":"click"}}'
        >>> Decoder([]).plain(pa.array([cloud_event], pa.large_binary())).to_pylist()
        [b'{"kind":"click","impression_id":"a"}']
        """
        framed = is_framed(values)
        wrapped = np.asarray(pc.fill_null(cloud_events.may_be_envelopes(values), False)) & ~framed
        if not (framed | wrapped).any():
            return values
        records = values.to_pylist()
        for row in np.flatnonzero(framed | wrapped).tolist():
            with contextlib.suppress(InvalidRecord):
                records[row] = self._plain(records[row], is_framed=framed[row])
        return pa.array(records, pa.large_binary())

    @defects_as_invalid()
    def _plain(self, value: bytes, *, is_framed: bool) -> bytes:
        return self._avro.plain(value) if is_framed else cloud_events.unwrap(value) or value

    def _rows_by_format(
        self, values: pa.LargeBinaryArray
    ) -> tuple[dict[Format, npt.NDArray[np.int64]], list[Rejection]]:
        """Return the rows of each format, and the rejections of those in another than the set one.

        Nulls and empty records count as JSON.
        """
        masks: dict[Format, Mask] = {"arrow": is_arrow(values), "avro": is_framed(values)}
        masks["json"] = ~(masks["arrow"] | masks["avro"])
        has_bytes = np.asarray(pc.fill_null(pc.binary_length(values), 0)) > 0
        rejections = []
        for found, mask in masks.items():
            if self._format in ("auto", found):
                continue
            other = mask & has_bytes
            message = f"begins as {_FORMAT_NAMES[found]}, but input.format is {self._format}"
            rejections += [
                Rejection(row, "other_format", message) for row in np.flatnonzero(other).tolist()
            ]
            masks[found] = mask & ~has_bytes
        return {found: np.flatnonzero(mask) for found, mask in masks.items()}, rejections

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
        "kind must be impression, click or example, got {kind}",
        lambda events, latest: events.kind == UNKNOWN_KIND,
    ),
    _Rule("missing_id", "impression_id is missing or empty", _lacks_id),
    _Rule("missing_time", "time is missing", lambda events, latest: ~events.has_time),
    _Rule(
        "time_out_of_range",
        "time {time} is not between 1973 and 2100",
        lambda events, latest: (events.time < EARLIEST_MS) | (events.time >= LATEST_MS),
    ),
    _Rule(
        "time_in_future",
        "time {time} ms is too far ahead of its arrival",
        lambda events, latest: events.time > latest,
    ),
    _Rule(
        "missing_features",
        "an impression or example needs features",
        lambda events, latest: np.isin(events.kind, (IMPRESSION, EXAMPLE)) & ~events.has_features,
    ),
    _Rule(
        "missing_label",
        "an example needs a label, 0 or 1",
        lambda events, latest: (events.kind == EXAMPLE) & np.isnan(events.label),
    ),
    _Rule(
        "wrong_label",
        "the label of an example must be 0 or 1, got {label}",
        lambda events, latest: (events.kind == EXAMPLE) & (events.label != 0) & (events.label != 1),
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
        message = rule.message.format(
            kind=kind, time=int(events.time[index]), label=f"{events.label[index]:g}"
        )
        value = None if stream is None else one_event(stream, within)
        remaining_bytes -= len(value or b"")
        if remaining_bytes < 0:
            raise InvalidRecord(
                "too_many_bad_events",
                f"{len(indices)} of its events are bad, and too large as records of their own",
            )
        rejections.append(Rejection(int(events.row[index]), rule.reason, message, within, value))
    return rejections


def _valid_events(events: ParsedEvents, is_good: Mask) -> Events:
    clicks = _select(events, is_good & (events.kind == CLICK))
    examples = _select(events, is_good & (events.kind == EXAMPLE))
    return Events(
        _impressions(_select(events, is_good & (events.kind == IMPRESSION))),
        Clicks(
            row=clicks.row,
            within=clicks.within,
            impression_id=clicks.impression_id,
            time=clicks.time,
        ),
        _impressions(examples),
        examples.label.astype(np.uint8),
        with_unknown_fields=int(np.count_nonzero(events.has_unknown_fields & is_good)),
    )


def _impressions(events: ParsedEvents) -> Impressions:
    return Impressions(
        row=events.row,
        within=events.within,
        impression_id=events.impression_id,
        time=events.time,
        features=events.features,
        true_probability=events.true_probability,
    )


def _select(events: ParsedEvents, mask: Mask) -> ParsedEvents:
    return events if mask.all() else events.take(np.flatnonzero(mask))
