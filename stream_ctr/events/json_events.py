"""Events as JSON, one event a record: bytes to columns, and back.

    {"kind": "impression", "impression_id": "a1", "time": 1735689600000,
     "features": {"app": "maps", "age": 31}}
    {"kind": "click", "impression_id": "a1", "time": "2025-01-01T00:00:04.200Z"}
    {"kind": "example", "impression_id": 17, "time": 1735689605000, "label": 1,
     "features": {"app": "maps", "age": 28}}

The compiled scanner (`json_scan`) reads the usual records in blocks. Every record that it does not
pass goes to the strict parser (`json_strict`) alone, so that a bad record delays no other. Both
paths accept exactly the same records and read the same events from them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stream_ctr.events import cloud_events, json_scan
from stream_ctr.events.arrow_columns import ByteSpans, byte_spans
from stream_ctr.events.field import Field
from stream_ctr.events.json_scan import (
    BACKSLASH,
    BOOLEAN,
    FIRST_FEATURE,
    INTEGER,
    NULL,
    NUMBER,
    OBJECT,
    QUOTE,
    SPACE,
    STRING,
    TOP_MEMBERS,
    Members,
    MemberSpans,
)
from stream_ctr.events.json_strict import StrictEvent, parse_event
from stream_ctr.events.parsed_events import (
    EXAMPLE,
    InvalidRecord,
    ParsedEvents,
    Rejection,
    kind_codes,
)
from stream_ctr.events.times import DETECTED, TimeFormat

_BLOCK_ROWS = 2048
_BLOCK_BYTES = 64 << 20
_TEXT_TYPES = STRING | NULL
_NUMBER_TYPES = INTEGER | NUMBER | NULL
_CATEGORY_TYPES = STRING | INTEGER | BOOLEAN | NULL
_TOP_TYPES = {
    "kind": _TEXT_TYPES,
    "impression_id": STRING | INTEGER | NULL,
    "time": STRING | INTEGER | NULL,
    "label": _NUMBER_TYPES,
    "features": OBJECT | NULL,
    "true_probability": _NUMBER_TYPES,
}
_FIELD_TYPES = {"categorical": _CATEGORY_TYPES, "numeric": _NUMBER_TYPES}
_NO_BYTES = pa.scalar(b"", pa.large_binary())
_CLOSING_BRACE = pa.scalar(b"}", pa.large_binary())
_END = np.iinfo(np.int64).max


class JsonReader:
    """Read JSON records into `ParsedEvents` with the given fields."""

    def __init__(
        self,
        fields: Sequence[Field],
        *,
        max_record_bytes: int,
        time_format: TimeFormat = DETECTED,
    ) -> None:
        self.fields = tuple(fields)
        self.max_record_bytes = max_record_bytes
        self.time_format = time_format
        self._members = _members(self.fields)

    def read(
        self, values: pa.LargeBinaryArray, rows: npt.NDArray[np.int64]
    ) -> tuple[list[ParsedEvents], list[Rejection]]:
        """Read the records at `rows`.

        The parts are in no certain order: those that the strict parser read, and the events of
        CloudEvents, are the last ones.
        """
        parts, left = self._scan(values, rows)
        left, wrapped, rejections = self._unwrap(values, left)
        events, rejected = self._read_strictly(values, left)
        parts.append(events)
        if wrapped:
            inner, rejected_inner = self.read_apart(wrapped, within=cloud_events.PREFIX)
            parts += inner
            rejections += rejected_inner
        return parts, [*rejections, *rejected]

    def read_apart(
        self, records: Mapping[int, bytes], *, within: str = ""
    ) -> tuple[list[ParsedEvents], list[Rejection]]:
        """Read records by their rows, whose bytes are a part of those of the records at `rows`.

        A message begins with what they are `within`.
        """
        rows = np.array(list(records), np.int64)
        values = pa.array(records.values(), pa.large_binary())
        parts, left = self._scan(values, np.arange(len(rows)))
        events, rejected = self._read_strictly(values, left)
        parts = [replace(part, row=rows[part.row]) for part in (*parts, events)]
        return parts, [
            rejection._replace(row=int(rows[rejection.row]), message=within + rejection.message)
            for rejection in rejected
        ]

    def _unwrap(
        self, values: pa.LargeBinaryArray, rows: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], dict[int, bytes], list[Rejection]]:
        """Return the rows that are no CloudEvents, the events of the others, and rejections."""
        candidates = cloud_events.may_be_envelopes(values.take(pa.array(rows)))
        is_left = np.ones(len(rows), np.bool_)
        wrapped: dict[int, bytes] = {}
        rejections: list[Rejection] = []
        for index in np.flatnonzero(np.asarray(pc.fill_null(candidates, False))).tolist():
            row = int(rows[index])
            value = values[row].as_py()
            if len(value) > self.max_record_bytes:
                continue
            try:
                event = cloud_events.unwrap(value)
            except InvalidRecord as error:
                rejections.append(Rejection(row, error.reason, error.message))
                is_left[index] = False
                continue
            if event is not None:
                wrapped[row] = event
                is_left[index] = False
        return rows[is_left], wrapped, rejections

    def _scan(
        self, values: pa.LargeBinaryArray, rows: npt.NDArray[np.int64]
    ) -> tuple[list[ParsedEvents], npt.NDArray[np.int64]]:
        """Return the events of the records at `rows` that pass, and the rows of the others."""
        spans = byte_spans(values)
        size = spans.size[rows]
        can_scan = (size > 0) & (size <= self.max_record_bytes)
        parts = []
        left = [rows[~can_scan]]
        for block in _blocks(rows[can_scan], spans.size):
            records = ByteSpans(spans.data, spans.start[block], spans.size[block])
            found = MemberSpans.empty(len(block), len(self._members.accepted_types))
            json_scan.scan(records, self._members, found)
            # What has no kind is no event; it may be wrapped.
            found.passed[(found.length[:, json_scan.KIND] < 0) & found.has_unknown] = False
            scanned = _ScannedRecords(spans.data, found)
            parts.append(self._scanned_events(block, scanned))
            left.append(block[~found.passed])
        return parts, np.sort(np.concatenate(left))

    def _scanned_events(
        self, rows: npt.NDArray[np.int64], records: _ScannedRecords
    ) -> ParsedEvents:
        """Return the events of the records that passed."""
        time = records.times(self.time_format)  # an impossible time revokes `passed`
        kept = np.flatnonzero(records.found.passed)
        if len(kept) < len(rows):
            rows = rows[kept]
            time = time[kept]
            records = records.take(kept)
        kind_text = records.texts(json_scan.KIND)
        kind = kind_codes(kind_text)
        label = records.numbers(json_scan.LABEL).to_numpy(zero_copy_only=False)
        probability = records.numbers(json_scan.PROBABILITY)
        return ParsedEvents(
            row=rows,
            within=np.zeros_like(rows),
            kind=kind,
            kind_text=kind_text,
            impression_id=records.texts(json_scan.ID),
            time=time,
            has_time=records.found.length[:, json_scan.TIME] >= 0,
            has_features=records.found.length[:, json_scan.FEATURES] >= 0,
            label=np.where(kind == EXAMPLE, label, np.nan),
            true_probability=probability.to_numpy(zero_copy_only=False),
            features={
                field.name: records.feature(field, member)
                for member, field in enumerate(self.fields, FIRST_FEATURE)
            },
            # Only examples have a label; the one of another event is not read.
            has_unknown_fields=records.found.has_unknown | (kind != EXAMPLE) & ~np.isnan(label),
        )

    def _read_strictly(
        self, values: pa.LargeBinaryArray, rows: npt.NDArray[np.int64]
    ) -> tuple[ParsedEvents, list[Rejection]]:
        """Read the records at `rows` one by one."""
        good_rows: list[int] = []
        events: list[StrictEvent] = []
        rejections: list[Rejection] = []
        for row in rows.tolist():
            value = values[row].as_py()
            try:
                event = parse_event(
                    value,
                    self.fields,
                    max_record_bytes=self.max_record_bytes,
                    time_format=self.time_format,
                )
            except InvalidRecord as error:
                rejections.append(Rejection(row, error.reason, error.message))
            else:
                good_rows.append(row)
                events.append(event)
        return self._strict_events(np.array(good_rows, np.int64), events), rejections

    def _strict_events(
        self, rows: npt.NDArray[np.int64], events: Sequence[StrictEvent]
    ) -> ParsedEvents:
        kind = pa.array([event.kind for event in events], pa.string())
        time = pa.array([event.time for event in events], pa.int64())
        label = pa.array([event.label for event in events], pa.float64())
        probability = pa.array([event.true_probability for event in events], pa.float64())
        return ParsedEvents(
            row=rows,
            within=np.zeros_like(rows),
            kind=kind_codes(kind),
            kind_text=kind,
            impression_id=pa.array([event.impression_id for event in events], pa.string()),
            time=pc.fill_null(time, 0).to_numpy(),
            has_time=np.asarray(time.is_valid()),
            has_features=np.array([event.has_features for event in events], np.bool_),
            label=label.to_numpy(zero_copy_only=False).astype(np.float64),
            true_probability=probability.to_numpy(zero_copy_only=False).astype(np.float64),
            features={
                field.name: pa.array(
                    [event.features[field.name] for event in events],
                    pa.string() if field.kind == "categorical" else pa.float64(),
                )
                for field in self.fields
            },
            has_unknown_fields=np.array([event.has_unknown_fields for event in events], np.bool_),
        )


def _members(fields: Sequence[Field]) -> Members:
    names = [name.encode() for name in (*TOP_MEMBERS, *(field.name for field in fields))]
    accepted_types = [
        *(_TOP_TYPES[name] for name in TOP_MEMBERS),
        *(_FIELD_TYPES[field.kind] for field in fields),
    ]
    return Members(
        names=np.frombuffer(b"".join(names), np.uint8),
        name_ends=np.cumsum([0, *map(len, names)]),
        accepted_types=np.array(accepted_types, np.uint8),
    )


def _blocks(
    rows: npt.NDArray[np.int64], size: npt.NDArray[np.int64]
) -> list[npt.NDArray[np.int64]]:
    """Split the rows into runs to scan together, bounded in rows and, softly, in bytes."""
    block = np.arange(len(rows)) // _BLOCK_ROWS + np.cumsum(size[rows]) // _BLOCK_BYTES
    return np.split(rows, np.flatnonzero(np.diff(block)) + 1) if len(rows) else []


@dataclass(frozen=True, slots=True)
class _ScannedRecords:
    """A block of n scanned records: their bytes, and where their members stand in them."""

    data: npt.NDArray[np.uint8]
    found: MemberSpans

    def take(self, indices: npt.NDArray[np.int64]) -> _ScannedRecords:
        """Return the records at these indices."""
        found = self.found._replace(
            start=self.found.start[indices],
            length=self.found.length[indices],
            passed=self.found.passed[indices],
            has_unknown=self.found.has_unknown[indices],
        )
        return _ScannedRecords(self.data, found)

    def times(self, time_format: TimeFormat) -> npt.NDArray[np.int64]:
        """Return epoch milliseconds [n]. Clears `passed` where a time is text but not a time."""
        start = self.found.start[:, json_scan.TIME]
        length = self.found.length[:, json_scan.TIME]
        present = self.found.passed & (length >= 0)
        is_text = np.zeros(len(start), np.bool_)
        is_text[present] = self.data[start[present] - 1] == QUOTE
        time = json_scan.parse_integers(self.data, start, np.where(present & ~is_text, length, -1))
        time = time_format.from_integers(time)
        if is_text.any():
            moments = time_format.from_text(self._copy_texts(start[is_text], length[is_text]))
            time[is_text] = pc.fill_null(moments, 0).to_numpy()
            self.found.passed[is_text] = np.asarray(moments.is_valid())
        return time

    def feature(self, field: Field, member: int) -> pa.Array:
        """Return the values of a field, which is this member."""
        return self.texts(member) if field.kind == "categorical" else self.numbers(member)

    def numbers(self, member: int) -> pa.DoubleArray:
        """Return the numbers of a member, null where it is missing [n]."""
        start = self.found.start[:, member]
        length = self.found.length[:, member]
        numbers, inexact = json_scan.parse_numbers(self.data, start, length)
        if inexact.any():
            texts = self._copy_texts(start[inexact], length[inexact])
            numbers[inexact] = texts.cast(pa.float64()).to_numpy()
        missing = length < 0
        return pa.array(numbers, mask=missing if missing.any() else None)

    def texts(self, member: int) -> pa.StringArray:
        """Return the texts of a member, null where it is missing [n]."""
        texts = self._copy_texts(self.found.start[:, member], self.found.length[:, member])
        if not self.found.has_escapes[member]:
            return texts
        escaped = pc.fill_null(pc.match_substring(texts, "\\"), False)
        quoted = [f'"{text}"' for text in texts.filter(escaped).to_pylist()]
        unescaped = msgspec.json.decode(f"[{','.join(quoted)}]")
        return pc.replace_with_mask(texts, escaped, pa.array(unescaped, pa.string()))

    def _copy_texts(
        self, start: npt.NDArray[np.int64], length: npt.NDArray[np.int32]
    ) -> pa.StringArray:
        offsets, text = json_scan.copy_texts(self.data, start, length)
        valid = length >= 0
        bits = None if valid.all() else pa.py_buffer(np.packbits(valid, bitorder="little"))
        buffers = (pa.py_buffer(offsets), pa.py_buffer(text), bits)
        return pa.StringArray.from_buffers(len(start), *buffers)


# -- columns to JSON -----------------------------------------------------------------------------


def encode_impressions(
    impression_id: pa.Array,
    time: npt.NDArray[np.int64],
    features: Mapping[str, pa.Array],
    true_probability: npt.NDArray[np.float64] | None = None,
) -> pa.LargeBinaryArray:
    """Return the JSON bytes of n impressions [n].

    `time` is in epoch milliseconds. Features, by name, are columns of strings, integers, floats or
    booleans, or a dictionary of those. Missing values are left out: nulls, and also NaN and
    infinities, which JSON cannot express.

    >>> features = {"app": pa.array(["maps"]), "age": pa.array([None], pa.int64())}
    >>> time = np.array([1735689600000])
    >>> print(encode_impressions(pa.array(["a"]), time, features)[0].as_py().decode())
    {"kind":"impression","impression_id":"a","time":1735689600000,"features":{"app":"maps"}}
    """
    parts = [
        _member('{"kind":"impression","impression_id":', impression_id),
        _member(',"time":', pa.array(time)),
        _encoded_features(features, len(time)),
    ]
    if true_probability is not None:
        probability = _member(',"true_probability":', pa.array(true_probability))
        parts.append(pc.fill_null(probability, _NO_BYTES))
    return pc.binary_join_element_wise(*parts, _CLOSING_BRACE, _NO_BYTES)


def encode_examples(
    impression_id: pa.Array,
    time: npt.NDArray[np.int64],
    label: pa.Array,
    features: Mapping[str, pa.Array],
) -> pa.LargeBinaryArray:
    """Return the JSON bytes of n labelled rows [n]. A label is 0 or 1; see `encode_impressions`.

    >>> time = np.array([1735689600000])
    >>> encode_examples(pa.array(["a"]), time, pa.array([1]), {"age": pa.array([31])})[0].as_py()
    b'{"kind":"example","impression_id":"a","time":1735689600000,"label":1,"features":{"age":31}}'
    """
    parts = [
        _member('{"kind":"example","impression_id":', impression_id),
        _member(',"time":', pa.array(time)),
        _member(',"label":', label),
        _encoded_features(features, len(time)),
    ]
    return pc.binary_join_element_wise(*parts, _CLOSING_BRACE, _NO_BYTES)


def _encoded_features(features: Mapping[str, pa.Array], n: int) -> pa.LargeBinaryArray:
    """Return the member `features` of each event, with its closing brace [n]."""
    # A member begins with a comma, and is empty when its value is missing. null_handling="skip"
    # would do, but with it Arrow 26 drops rows in which nothing is left to join.
    members = [_member(f",{json.dumps(name)}:", column) for name, column in features.items()]
    joined = pc.binary_join_element_wise(
        *(members or [pa.repeat(_NO_BYTES, n)]),
        _NO_BYTES,
        null_handling="replace",
        null_replacement=b"",
    )
    # The opening replaces the first comma, if there is one.
    opened = pc.binary_replace_slice(joined, 0, 1, b',"features":{')
    return pc.binary_replace_slice(opened, _END, _END, b"}")


def encode_clicks(impression_id: pa.Array, time: npt.NDArray[np.int64]) -> pa.LargeBinaryArray:
    """Return the JSON bytes of n clicks [n]. `time` is in epoch milliseconds.

    >>> encode_clicks(pa.array(["a"]), np.array([1735689600000]))[0].as_py()
    b'{"kind":"click","impression_id":"a","time":1735689600000}'
    """
    parts = [
        _member('{"kind":"click","impression_id":', impression_id),
        _member(',"time":', pa.array(time), "}"),
    ]
    return pc.binary_join_element_wise(*parts, _NO_BYTES)


def _member(before: str, column: pa.Array, after: str = "") -> pa.LargeBinaryArray:
    """Return the JSON of each value between `before` and `after`; null where it is missing."""
    if pa.types.is_dictionary(column.type):
        return _member(before, column.dictionary, after).take(column.indices)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        text = _escaped(column.cast(pa.large_string()))
        before = before + '"'
        after = '"' + after
    elif pa.types.is_floating(column.type):
        text = pc.if_else(pc.is_finite(column), column, None).cast(pa.large_string())
    else:
        text = column.cast(pa.large_string())
    # Two insertions take half the time of one join of three.
    opened = pc.binary_replace_slice(text.cast(pa.large_binary()), 0, 0, before.encode())
    return pc.binary_replace_slice(opened, _END, _END, after.encode()) if after else opened


def _escaped(text: pa.LargeStringArray) -> pa.LargeStringArray:
    """Return each text as it is written between the quotes of a JSON string."""
    if not _needs_escapes(text):
        return text
    words = text.dictionary_encode()
    escaped = [json.dumps(word, ensure_ascii=False)[1:-1] for word in words.dictionary.to_pylist()]
    return pa.array(escaped, pa.large_string()).take(words.indices)


def _needs_escapes(text: pa.LargeStringArray) -> bool:
    """Return True when a text holds a quote, a backslash or a control character."""
    if not len(text):
        return False
    _, offsets, data = text.buffers()
    first, last = np.frombuffer(offsets, np.int64)[[text.offset, text.offset + len(text)]]
    characters = np.frombuffer(data or b"", np.uint8)[first:last]
    special = (characters < SPACE) | (characters == QUOTE) | (characters == BACKSLASH)
    return bool(special.any())
