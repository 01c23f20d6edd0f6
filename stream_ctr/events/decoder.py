"""Events on the wire: the bytes of records in, columns out.

A record holds one event as JSON (`json_events`), or many in columns: a record that begins with ff ff ff ff, which no JSON does, is a stream
of Arrow record batches (`arrow_events`). Both may come in one poll, and what an event is does not depend on how it came:

`time` is epoch milliseconds, in JSON also RFC 3339. A categorical value is a string, an integer or a boolean; a numeric value is a finite
number; null or absent is missing. `true_probability`, on impressions of simulated streams, is the probability that the label was drawn
with. Other members are accepted and counted, of a member that is there twice the last wins. A record's key only says where it goes: the id
in the value counts.

>>> impression = b'{"kind":"impression","impression_id":"a","time":1735689600000,"features":{"app":"maps"}}'
>>> events, rejects = Decoder([Field("app", "categorical")]).decode(pa.array([impression, b"oops"], pa.large_binary()))
>>> events.impressions.impression_id.to_pylist(), events.impressions.features["app"].to_pylist(), rejects.reason, rejects.row.tolist()
(['a'], ['maps'], ['not_json'], [1])
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stream_ctr.errors import DataError
from stream_ctr.events.arrow_events import ArrowReader, feature_types, one_event, read_batches
from stream_ctr.events.candidates import CLICK, IMPRESSION, Candidates, Refusal, Refused
from stream_ctr.events.field import Field
from stream_ctr.events.ipc_frames import MARKER
from stream_ctr.events.json_events import JsonReader, spans

# Epoch milliseconds of 1973-03-03 and 2100-01-01: a time outside is seconds taken for milliseconds, zero, or a broken clock.
EARLIEST_MS, LATEST_MS = 100_000_000_000, 4_102_444_800_000
# Of one record: each would be a dead letter.
_MOST_BAD_EVENTS = 1000
_LETTERS_TO_RECORD, _FEW_LETTERS_BYTES = (
    16,
    1 << 16,
)  # bytes of all its dead letters, to those that it has or at least so many
# A field that fewer impressions have is a slip of one producer, and a row of a model for as long as it lives.
_LEAST_SHARE_OF_IMPRESSIONS = 0.01
_MOST_INFERRED_FIELDS = 1000


@dataclass(frozen=True, slots=True)
class Clicks:
    """n clicks; `row` is the index of the record that each came in, `within` its index there."""

    row: npt.NDArray[np.int64]
    within: npt.NDArray[np.int64]
    impression_id: pa.StringArray
    time: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True, slots=True)
class Impressions:
    """n impressions; features by field name (null: missing): float64 for numeric fields, for categorical ones strings or, where all of
    them came so, a dictionary of int32 and strings."""

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
    """`with_unknown_fields` is how many of the events have a member that nobody reads: one of no configured name, or one there twice."""

    impressions: Impressions
    clicks: Clicks
    with_unknown_fields: int = 0


@dataclass(frozen=True, slots=True)
class Rejects:
    """What is no event: the record, which event of it, a reason code (of a small fixed set, fit for a counter) and what was seen.

    `value` is what to keep: None for the bytes of the record, else a record of this one event alone.
    """

    row: npt.NDArray[np.int64]
    within: npt.NDArray[np.int64]
    reason: list[str]
    message: list[str]
    value: list[bytes | None]

    def __len__(self) -> int:
        return len(self.row)


class Decoder:
    """Records -> events in columns, for the given fields."""

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
    ) -> tuple[Events, Rejects]:
        """`values` [n] -> the events, in order of row and place in it, and what is none. A null value is rejected as `tombstone`.

        `received` [n] is the broker's time of each record in epoch milliseconds (-1: unknown). An event more than `max_ahead_ms` after
        it is rejected: one producer's wrong clock would close the windows of everybody else.
        """
        batched = _begins_with_marker(values)
        parts, refusals = self._json.read(values, np.flatnonzero(~batched))
        streams: dict[int, list[pa.RecordBatch]] = {}
        for row in np.flatnonzero(batched).tolist():
            try:
                streams[row] = read_batches(
                    values[row].as_buffer(), max_record_bytes=self.max_record_bytes
                )
            except Refused as refused:
                refusals.append(Refusal(row, refused.code, refused.message))
        more_parts, more_refusals = self._arrow.read(streams)
        candidates = Candidates.together(
            [part for part in (*parts, *more_parts) if len(part)] or parts
        )
        rejected = [
            _Reject(row, 0, code, message, None)
            for row, code, message in (*refusals, *more_refusals)
        ]
        verdict = self._verdicts(candidates, received)
        bad = np.flatnonzero(verdict != _GOOD)
        for events in (
            np.split(bad, np.flatnonzero(np.diff(candidates.row[bad])) + 1) if len(bad) else []
        ):
            row = int(candidates.row[events[0]])
            try:
                rejected += self._rejected(
                    candidates, events, verdict, streams.get(row), len(values[row].as_buffer())
                )
            except Refused as refused:
                rejected.append(_Reject(row, 0, refused.code, refused.message, None))
                verdict[candidates.row == row] = _OF_NO_USE
        rejected.sort(key=lambda reject: (reject.row, reject.within))
        return _events(candidates, verdict == _GOOD), _columns(rejected)

    def _verdicts(
        self, candidates: Candidates, received: npt.NDArray[np.int64] | None
    ) -> npt.NDArray[np.int8]:
        """Which of `_RULES` each candidate breaks first, `_GOOD`: none [n]."""
        time, truth = candidates.time, candidates.true_probability
        known = np.full(len(time), -1) if received is None else received[candidates.row]
        breaks = [
            candidates.kind < 0,
            np.asarray(pc.fill_null(pc.equal(pc.binary_length(candidates.impression_id), 0), True)),
            ~candidates.has_time,
            (time < EARLIEST_MS) | (time >= LATEST_MS),
            (known >= 0) & (time > known + self.max_ahead_ms),
            (candidates.kind == IMPRESSION) & ~candidates.has_features,
            (truth < 0) | (truth > 1),
        ]
        verdict = np.full(len(time), _GOOD, np.int8)
        for rule, broken in reversed(list(enumerate(breaks))):
            verdict[broken] = rule
        return verdict

    def _rejected(
        self,
        candidates: Candidates,
        events: npt.NDArray[np.int64],
        verdict: npt.NDArray[np.int8],
        stream: list[pa.RecordBatch] | None,
        record_bytes: int,
    ) -> list[_Reject]:
        """Those of one record. Raises `Refused` when they are so many, or so large one by one, that none of its events is taken."""
        if len(events) > _MOST_BAD_EVENTS:
            raise Refused(
                "too_many_bad_events",
                f"{len(events)} of its events are bad, more than {_MOST_BAD_EVENTS}",
            )
        rejected, room = [], max(_FEW_LETTERS_BYTES, _LETTERS_TO_RECORD * record_bytes)
        for at in events.tolist():
            row, within = int(candidates.row[at]), int(candidates.within[at])
            code, message = _RULES[verdict[at]]
            seen = message.format(
                kind=repr(candidates.kind_text[at].as_py())[:80], time=int(candidates.time[at])
            )
            value = None if stream is None else one_event(stream, within)
            room -= len(value or b"")
            if room < 0:
                raise Refused(
                    "too_many_bad_events",
                    f"{len(events)} of its events are bad, and too large one by one",
                )
            rejected.append(_Reject(row, within, code, seen, value))
        return rejected


# A code and what to say, in the order in which they are looked at.
_RULES = (
    ("unknown_kind", "kind must be impression or click, got {kind}"),
    ("missing_id", "impression_id is missing or empty"),
    ("missing_time", "time is missing"),
    ("time_out_of_range", "time {time} ms is not between 1973 and 2100 (seconds?)"),
    ("time_in_future", "time {time} ms is too far ahead of its arrival"),
    ("missing_features", "an impression needs features"),
    ("wrong_probability", "true_probability is not in [0, 1]"),
)
_GOOD, _OF_NO_USE = -1, -2


class _Reject(NamedTuple):
    row: int
    within: int
    code: str
    message: str
    value: bytes | None


def _columns(rejected: Sequence[_Reject]) -> Rejects:
    row, within, code, message, value = (
        (list(column) for column in zip(*rejected, strict=True))
        if rejected
        else ([], [], [], [], [])
    )
    return Rejects(np.array(row, np.int64), np.array(within, np.int64), code, message, value)


def _events(candidates: Candidates, good: npt.NDArray[np.bool_]) -> Events:
    impressions, clicks = (
        candidates if of_kind.all() else candidates.at(np.flatnonzero(of_kind))
        for of_kind in (good & (candidates.kind == kind) for kind in (IMPRESSION, CLICK))
    )
    return Events(
        Impressions(
            impressions.row,
            impressions.within,
            impressions.impression_id,
            impressions.time,
            impressions.features,
            impressions.true_probability,
        ),
        Clicks(clicks.row, clicks.within, clicks.impression_id, clicks.time),
        int(np.count_nonzero(candidates.unread & good)),
    )


def _begins_with_marker(values: pa.LargeBinaryArray) -> npt.NDArray[np.bool_]:
    """Which of them are Arrow, for all that anybody can say yet [n]."""
    data, start, size = spans(values)
    found = np.zeros(len(values), np.bool_)
    first = np.flatnonzero(size >= len(MARKER))
    found[first] = data[start[first]] == MARKER[0]
    first = np.flatnonzero(found)
    found[first] = (
        data[start[first, None] + np.arange(len(MARKER))] == np.frombuffer(MARKER, np.uint8)
    ).all(axis=1)
    return found


# -- fields nobody named -------------------------------------------------------------------------


def infer_fields(
    values: pa.LargeBinaryArray, *, max_record_bytes: int = 1 << 20
) -> tuple[Field, ...]:
    """The fields of these impressions: numeric where every value is a number, categorical otherwise; sorted by kind and name.

    What fewer than one impression in a hundred has is no field; Arrow records that the decoder would refuse have none. Raises `DataError`
    when more than a thousand fields are left.

    >>> infer_fields(pa.array([b'{"kind":"impression","features":{"age":31,"app":"maps"}}'], pa.large_binary()))
    (Field(name='app', kind='categorical'), Field(name='age', kind='numeric'))
    """
    kinds: dict[str, Counter[type]] = {}
    impressions = 0
    batched = _begins_with_marker(values)
    for value, in_batches in zip(values.to_pylist(), batched.tolist(), strict=True):
        for count, features in (
            _features_in_batches(value, max_record_bytes)
            if in_batches
            else _features_in_document(value)
        ):
            impressions += count
            for name, types in features.items():
                kinds.setdefault(name, Counter()).update(types)
    kinds = {
        name: types
        for name, types in kinds.items()
        if types.total() >= _LEAST_SHARE_OF_IMPRESSIONS * impressions
    }
    if len(kinds) > _MOST_INFERRED_FIELDS:
        raise DataError(
            f"the impressions have {len(kinds):,} features, too many to take all for fields; list those that matter in a --config"
        )
    numeric = {name for name, types in kinds.items() if types.keys() <= {int, float}}
    names = [*sorted(kinds.keys() - numeric), *sorted(numeric)]
    return tuple(Field(name, "numeric" if name in numeric else "categorical") for name in names)


def _features_in_document(
    value: bytes | None,
) -> Iterator[tuple[int, Mapping[str, Mapping[type, int]]]]:
    """How many impressions there are, and of each feature the values by type; nothing where there are absurdly many features."""
    try:
        document = msgspec.json.decode(value or b"")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return
    if isinstance(document, dict) and document.get("kind") == "impression":
        features = document.get("features")
        if isinstance(features, dict) and len(features) <= _MOST_INFERRED_FIELDS:
            yield (
                1,
                {
                    name: {type(value): 1}
                    for name, value in features.items()
                    if isinstance(value, (str, bool, int, float))
                },
            )


def _features_in_batches(
    value: bytes, max_record_bytes: int
) -> Iterator[tuple[int, Mapping[str, Mapping[type, int]]]]:
    try:
        batches = read_batches(pa.py_buffer(value), max_record_bytes=max_record_bytes)
        yield from (feature_types(batch) for batch in batches)
    except Refused:
        return
