"""Events on the wire: JSON bytes in, columns out, and back.

    {"kind": "impression", "impression_id": "a1", "time": 1735689600000, "features": {"app": "maps", "age": 31}}
    {"kind": "click", "impression_id": "a1", "time": "2025-01-01T00:00:04.200Z"}

`time` is epoch milliseconds or RFC 3339. A categorical value is a string, an integer or a boolean; a numeric value is a finite number;
null or absent is missing. `true_probability`, on impressions of simulated streams, is the probability that the label was drawn with.
Other members are accepted and counted, of a member that is there twice the last wins. A record's key only says where it goes: the id in
the value counts.

Good records are parsed a block at a time by Arrow's JSON reader. Only records of a block that it refuses are looked at one by one
(msgspec, a strict parser), so one bad record costs its neighbours time and nothing else. Both ways accept exactly the same records.

>>> impression = b'{"kind":"impression","impression_id":"a","time":1735689600000,"features":{"app":"maps"}}'
>>> events, rejects = Decoder([Field("app", "categorical")]).decode(pa.array([impression, b"oops"], pa.large_binary()))
>>> events.impressions.impression_id.to_pylist(), events.impressions.features["app"].to_pylist(), rejects.reason, rejects.row.tolist()
(['a'], ['maps'], ['not_json'], [1])
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from stream_ctr.config import Field
from stream_ctr.errors import DataError

# Epoch milliseconds of 1973-03-03 and 2100-01-01: a time outside is seconds taken for milliseconds, zero, or a broken clock.
EARLIEST_MS, LATEST_MS = 100_000_000_000, 4_102_444_800_000
_BLOCK_ROWS, _BLOCK_BYTES = 8192, 64 << 20
_NEWLINE = pa.scalar(b"\n", pa.large_binary())
_NOTHING = pa.scalar(b"", pa.large_binary())
_END = np.iinfo(np.int64).max
_SMALLEST_BLOCK_ROWS = 32
# Deeper than any event; the strict parser stops at about a thousand, depending on the stack it stands on.
_DEEPEST_NESTING = 256
# The strict parser refuses an integer of more than 4,300 digits, wherever it stands.
_MOST_DIGITS = 4000
# A field that fewer impressions have is a slip of one producer, and a row of a model for as long as it lives.
_LEAST_SHARE_OF_IMPRESSIONS = 0.01
_MOST_INFERRED_FIELDS = 1000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_INT64 = range(-(1 << 63), 1 << 63)


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
    """n impressions; features by field name (string arrays for categorical, float64 for numeric fields, null: missing)."""

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
    """Records that are no events: their rows, a reason code each (a small fixed set, fit for a counter) and what was seen."""

    row: npt.NDArray[np.int64]
    within: npt.NDArray[np.int64]
    reason: list[str]
    message: list[str]
    value: list[bytes | None]

    def __len__(self) -> int:
        return len(self.row)


class Decoder:
    """Event bytes -> columns, for the given fields."""

    def __init__(self, fields: Sequence[Field], *, max_record_bytes: int = 1 << 20, max_ahead_ms: int = 86_400_000) -> None:
        self.fields = tuple(fields)
        self.max_record_bytes = max_record_bytes
        self.max_ahead_ms = max_ahead_ms
        # JSON type of the fields that producers may write in several ways. Learned from what came, so that the fast way fits; it never
        # changes what is decoded, only how fast.
        self._time_type: pa.DataType = pa.int64()
        self._types: dict[str, pa.DataType] = {
            field.name: pa.string() if field.kind == "categorical" else pa.float64() for field in self.fields
        }

    def decode(self, values: pa.LargeBinaryArray, received: npt.NDArray[np.int64] | None = None) -> tuple[Events, Rejects]:
        """`values` [n] -> the events and the rejects among them. A null value is rejected as `tombstone`.

        `received` [n] is the broker's time of each record in epoch milliseconds (-1: unknown). An event more than `max_ahead_ms` after
        it is rejected: one producer's wrong clock would close the windows of everybody else.
        """
        tables: list[pa.Table] = []
        bad: list[tuple[int, str, str]] = []
        text = _Text.of(values)
        fast, slow = self._sort_out(text)
        for rows in text.blocks(fast):
            tables += self._decode_block(values, rows, bad)
        if len(slow):
            tables.append(self._decode_one_by_one(values, slow, bad))
        table = pa.concat_tables(tables) if tables else self._table([], [])
        rows = table["row"].to_numpy()
        if len(tables) > 1 and np.any(np.diff(rows) < 0):
            table = table.take(pa.array(np.argsort(rows, kind="stable")))
        return self._checked(table.combine_chunks(), text, bad, received)

    # -- the fast way -------------------------------------------------------------------------------------------------------------

    def _sort_out(self, text: _Text) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Rows that may be parsed together, and rows that must be looked at alone.

        A record that starts with { and ends with } cannot merge with its neighbours into fewer documents: a raw newline is not allowed
        inside a string, and { may not follow. So when n such records parse to n rows, each record is exactly one row. What Arrow reads
        although it is no JSON, or no JSON to the strict parser, is looked at alone too.
        """
        plain = (text.size > 1) & (text.size <= self.max_record_bytes)
        at = np.flatnonzero(plain)
        plain[at] = (text.data[text.start[at]] == ord("{")) & (text.data[text.start[at] + text.size[at] - 1] == ord("}"))
        doubtful = np.flatnonzero(plain & (text.doubtful | (text.size > 2 * _DEEPEST_NESTING)))
        nesting, digits, constants = _structure(text.data, text.start[doubtful], text.size[doubtful])
        plain[doubtful] = (nesting <= _DEEPEST_NESTING) & (digits <= _MOST_DIGITS) & ~constants
        return np.flatnonzero(plain), np.flatnonzero(~plain)

    def _decode_block(self, values: pa.LargeBinaryArray, rows: npt.NDArray[np.int64], bad: list[tuple[int, str, str]]) -> list[pa.Table]:
        table = self._parse(values, rows)
        if table is not None:
            return [table]
        if len(rows) <= _SMALLEST_BLOCK_ROWS:
            return [self._decode_one_by_one(values, rows, bad, learn_types=True)]
        half = len(rows) // 2
        return [*self._decode_block(values, rows[:half], bad), *self._decode_block(values, rows[half:], bad)]

    def _parse(self, values: pa.LargeBinaryArray, rows: npt.NDArray[np.int64]) -> pa.Table | None:
        contiguous = rows[-1] - rows[0] + 1 == len(rows)
        block = values.slice(int(rows[0]), len(rows)) if contiguous else values.take(pa.array(rows))
        lines = pa.LargeListArray.from_arrays(pa.array([0, len(block)], pa.int64()), block)
        text = pc.binary_join(lines, _NEWLINE)[0].as_buffer()
        features = pa.struct([(field.name, self._types[field.name]) for field in self.fields])
        schema = pa.schema(
            [
                ("kind", pa.string()),
                ("impression_id", pa.string()),
                ("time", self._time_type),
                ("features", features),
                ("true_probability", pa.float64()),
            ]
        )
        try:
            block.cast(pa.large_string())  # Arrow's JSON parser lets invalid UTF-8 through
            table = pa.json.read_json(
                pa.BufferReader(text),
                read_options=pa.json.ReadOptions(use_threads=False, block_size=max(text.size + 1, 1 << 16)),
                parse_options=pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
            ).combine_chunks()
            return self._table_of(rows, table) if len(table) == len(rows) else None
        except pa.ArrowInvalid:
            return None

    def _table_of(self, rows: npt.NDArray[np.int64], parsed: pa.Table) -> pa.Table:
        time = parsed["time"]
        if pa.types.is_string(time.type):
            time = pc.cast(pc.floor_temporal(pc.cast(time, pa.timestamp("ns", "UTC")), unit="millisecond"), pa.timestamp("ms", "UTC")).cast(
                pa.int64()
            )
        features = parsed["features"].combine_chunks()
        columns = {field.name: pc.struct_field(features, [index]) for index, field in enumerate(self.fields)}
        numbers = [parsed["true_probability"], *(columns[field.name] for field in self.fields if field.kind == "numeric")]
        if not all(pc.all(pc.is_finite(column), min_count=0).as_py() for column in numbers):  # of an integer with hundreds of digits
            raise pa.ArrowInvalid("not finite")
        arrays = [pa.array(rows), parsed["kind"], parsed["impression_id"], time, pc.is_valid(features), parsed["true_probability"]]
        arrays += [column.cast(pa.string()) if field.kind == "categorical" else column for field, column in self._with(columns)]
        return pa.table(arrays, schema=self._schema())

    def _with(self, columns: Mapping[str, pa.Array]) -> list[tuple[Field, pa.Array]]:
        return [(field, columns[field.name]) for field in self.fields]

    def _schema(self) -> pa.Schema:
        head = [
            ("row", pa.int64()),
            ("kind", pa.string()),
            ("impression_id", pa.string()),
            ("time", pa.int64()),
            ("has_features", pa.bool_()),
            ("true_probability", pa.float64()),
        ]
        return pa.schema(head + [(f"f.{f.name}", pa.string() if f.kind == "categorical" else pa.float64()) for f in self.fields])

    # -- one by one ---------------------------------------------------------------------------------------------------------------

    def _decode_one_by_one(
        self, values: pa.LargeBinaryArray, rows: npt.NDArray[np.int64], bad: list[tuple[int, str, str]], *, learn_types: bool = False
    ) -> pa.Table:
        good_rows, documents = [], []
        for row in rows.tolist():
            try:
                documents.append(self._read_one(values[row].as_py()))
                good_rows.append(row)
            except _Bad as reason:
                bad.append((row, reason.code, reason.message))
        if learn_types:
            self._learn_types(documents)
        return self._table(good_rows, documents)

    def _read_one(self, value: bytes | None) -> dict[str, Any]:
        if value is None:
            raise _Bad("tombstone", "null value")
        if not value.strip():
            raise _Bad("empty", "no bytes")
        if len(value) > self.max_record_bytes:
            raise _Bad("too_large", f"{len(value)} bytes, more than {self.max_record_bytes}")
        if _structure(np.frombuffer(value, np.uint8), np.zeros(1, np.int64), np.array([len(value)]))[0][0] > _DEEPEST_NESTING:
            raise _Bad("too_deep", f"nested more than {_DEEPEST_NESTING} deep")
        try:
            document = msgspec.json.decode(value)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _Bad("not_json", str(error)) from None
        if not isinstance(document, dict):
            raise _Bad("not_an_object", f"a JSON {type(document).__name__}")
        for name in ("kind", "impression_id"):
            if not isinstance(document.get(name), (str, type(None))):
                raise _Bad("wrong_type", f"{name} must be a string, got {document[name]!r:.80}")
        features = document.get("features")
        if not isinstance(features, (dict, type(None))):
            raise _Bad("wrong_type", f"features must be an object, got {features!r:.80}")
        read = {field.name: _read_feature(field, (features or {}).get(field.name)) for field in self.fields}
        if (probability := document.get("true_probability")) is not None:
            probability = _read_number("true_probability", probability)
        return {
            **document,
            "true_probability": probability,
            "time": _read_time(document.get("time")),
            "features": features,
            "read": read,
            "raw_time": document.get("time"),
        }

    def _learn_types(self, documents: Sequence[Mapping[str, Any]]) -> None:
        """When all values of a block had one other JSON type, expect that type from now on."""
        known = {str: pa.string(), int: pa.int64(), bool: pa.bool_()}
        for field in self.fields:
            seen = {type(value) for d in documents if (value := (d["features"] or {}).get(field.name)) is not None}
            if field.kind == "categorical" and len(seen) == 1:
                self._types[field.name] = known[seen.pop()]
        times = {type(d["raw_time"]) for d in documents if d["raw_time"] is not None}
        if len(times) == 1:
            self._time_type = known[times.pop()]

    def _table(self, rows: Sequence[int], documents: Sequence[Mapping[str, Any]]) -> pa.Table:
        columns: list[list[Any]] = [
            list(rows),
            [d.get("kind") for d in documents],
            [d.get("impression_id") for d in documents],
            [d["time"] for d in documents],
            [d["features"] is not None for d in documents],
            [d.get("true_probability") for d in documents],
            *([d["read"][field.name] for d in documents] for field in self.fields),
        ]
        schema = self._schema()
        return pa.table([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema)

    # -- what holds for both ------------------------------------------------------------------------------------------------------

    def _checked(
        self, table: pa.Table, text: _Text, bad: list[tuple[int, str, str]], received: npt.NDArray[np.int64] | None
    ) -> tuple[Events, Rejects]:
        n = len(table)
        kind, identity = table["kind"], table["impression_id"]
        impression = np.asarray(pc.fill_null(pc.equal(kind, "impression"), False))
        click = np.asarray(pc.fill_null(pc.equal(kind, "click"), False))
        time = np.asarray(pc.fill_null(table["time"], 0))
        probability = np.asarray(table["true_probability"].to_numpy(), np.float64)
        known = np.full(n, -1) if received is None else received[table["row"].to_numpy()]
        # The first rule that a record breaks names it.
        rules = [
            ("unknown_kind", ~(impression | click), "kind must be impression or click, got {kind}"),
            ("missing_id", np.asarray(pc.fill_null(pc.equal(pc.binary_length(identity), 0), True)), "impression_id is missing or empty"),
            ("missing_time", np.asarray(pc.is_null(table["time"])), "time is missing"),
            ("time_out_of_range", (time < EARLIEST_MS) | (time >= LATEST_MS), "time {time} ms is not between 1973 and 2100 (seconds?)"),
            ("time_in_future", (known >= 0) & (time > known + self.max_ahead_ms), "time {time} ms is too far ahead of its arrival"),
            ("missing_features", impression & ~np.asarray(table["has_features"]), "an impression needs features"),
            (
                "wrong_probability",
                ~(np.isnan(probability) | ((probability >= 0) & (probability <= 1))),
                "true_probability is not in [0, 1]",
            ),
        ]
        fine = np.ones(n, bool)
        for code, broken, message in rules:
            for at in np.flatnonzero(broken & fine).tolist():
                seen = message.format(kind=repr(kind[at].as_py())[:80], time=int(time[at]))
                bad.append((table["row"][at].as_py(), code, seen))
            fine &= ~broken
        bad.sort()
        rows = np.array([row for row, _, _ in bad], np.int64)
        rejects = Rejects(
            rows, np.zeros_like(rows), [code for _, code, _ in bad], [message for _, _, message in bad], [None] * len(bad)
        )
        unknown = self._with_unknown_fields(table, text, fine)
        return Events(self._impressions(table, impression & fine), self._clicks(table, click & fine), unknown), rejects

    def _with_unknown_fields(self, table: pa.Table, text: _Text, fine: npt.NDArray[np.bool_]) -> int:
        """Records with more members than were read from them. Few have even as many colons, so few are looked at again."""
        read = 3 + np.asarray(table["has_features"], np.int64) + np.asarray(pc.is_valid(table["true_probability"]))
        for field in self.fields:
            column = table[f"f.{field.name}"]
            read += np.asarray(pc.is_valid(column)) if column.null_count else 1
        rows = table["row"].to_numpy()
        at = np.flatnonzero(fine & (text.colons[rows] > read))
        return int(np.count_nonzero(_members(text.data, text.start[rows[at]], text.size[rows[at]]) > read[at]))

    def _impressions(self, table: pa.Table, keep: npt.NDArray[np.bool_]) -> Impressions:
        kept = (table if keep.all() else table.filter(pa.array(keep))).combine_chunks()
        features = {field.name: _one_chunk(kept[f"f.{field.name}"]) for field in self.fields}
        probability = np.asarray(kept["true_probability"].to_numpy(), np.float64)
        row = kept["row"].to_numpy()
        return Impressions(row, np.zeros_like(row), _one_chunk(kept["impression_id"]), kept["time"].to_numpy(), features, probability)

    def _clicks(self, table: pa.Table, keep: npt.NDArray[np.bool_]) -> Clicks:
        kept = table.select(["row", "impression_id", "time"]).filter(pa.array(keep)).combine_chunks()
        row = kept["row"].to_numpy()
        return Clicks(row, np.zeros_like(row), _one_chunk(kept["impression_id"]), kept["time"].to_numpy())


class _Bad(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


@dataclass(frozen=True, slots=True)
class _Text:
    """The bytes of n records, and what a glance at each tells: colons, and whether Arrow may read something that is no JSON."""

    data: npt.NDArray[np.uint8]
    start: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    colons: npt.NDArray[np.int64]
    doubtful: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, values: pa.LargeBinaryArray) -> _Text:
        _, offsets, data = values.buffers()
        text = np.frombuffer(data or b"", np.uint8)
        ends = np.frombuffer(offsets, np.int64)[values.offset : values.offset + len(values) + 1] if len(values) else np.zeros(1, np.int64)
        start, size = ends[:-1], np.asarray(pc.fill_null(pc.binary_length(values), 0))
        return cls(text, start, size, *_glance(text, start, size))

    def blocks(self, rows: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """These rows in runs that are parsed at once."""
        part = np.arange(len(rows)) // _BLOCK_ROWS + np.cumsum(self.size[rows]) // _BLOCK_BYTES
        return np.split(rows, np.flatnonzero(np.diff(part)) + 1) if len(rows) else []


@numba.njit(cache=True, nogil=True)
def _glance(
    data: npt.NDArray[np.uint8], start: npt.NDArray[np.int64], size: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Colons in each record, and whether NaN or Inf occurs in it. Written so that the compiler makes vector instructions of it."""
    colons, doubtful = np.zeros(len(start), np.int64), np.zeros(len(start), np.bool_)
    for i in range(len(start)):
        record = data[start[i] : start[i] + size[i]]
        count, found = np.int32(0), np.int32(0)
        for at in range(len(record) - 2):
            count += record[at] == 58  # :
            found |= (record[at] == 78) & (record[at + 1] == 97) & (record[at + 2] == 78)
            found |= (record[at] == 73) & (record[at + 1] == 110) & (record[at + 2] == 102)
        colons[i], doubtful[i] = count, found > 0
    return colons, doubtful


@numba.njit(cache=True, nogil=True)
def _structure(
    data: npt.NDArray[np.uint8], start: npt.NDArray[np.int64], size: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """How deep the brackets of each record nest, its longest run of digits, and whether it has an N or I; nothing in strings counts."""
    deepest, longest, constants = np.zeros(len(start), np.int64), np.zeros(len(start), np.int64), np.zeros(len(start), np.bool_)
    for i in range(len(start)):
        depth, digits, quoted, escaped = 0, 0, False, False
        for at in range(start[i], start[i] + size[i]):
            byte = data[at]
            if escaped:
                escaped = False
            elif quoted:
                escaped = byte == 92  # backslash
                quoted = byte != 34
            elif 48 <= byte <= 57:
                digits += 1
                longest[i] = max(longest[i], digits)
                continue
            elif byte == 34:  # "
                quoted = True
            elif byte == 123 or byte == 91:  # { [
                depth += 1
                deepest[i] = max(deepest[i], depth)
            elif byte == 125 or byte == 93:  # } ]
                depth -= 1
            elif byte == 78 or byte == 73:
                constants[i] = True
            digits = 0
    return deepest, longest, constants


@numba.njit(cache=True, nogil=True)
def _members(data: npt.NDArray[np.uint8], start: npt.NDArray[np.int64], size: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Members of all objects in each record (valid JSON) but those that are null."""
    members = np.zeros(len(start), np.int64)
    for i in range(len(start)):
        quoted, escaped, named = False, False, False
        for at in range(start[i], start[i] + size[i]):
            byte = data[at]
            if escaped:
                escaped = False
            elif quoted:
                escaped = byte == 92  # backslash
                quoted = byte != 34
            elif named and byte > 32:
                members[i] += byte != 110  # n
                named = False
                quoted = byte == 34
            elif byte == 34:  # "
                quoted = True
            elif byte == 58:  # :
                named = True
    return members


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return (
        column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    )


def _read_feature(field: Field, value: object) -> str | float | None:
    if value is None:
        return None
    if field.kind == "numeric":
        return _read_number(field.name, value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) or (isinstance(value, int) and value in _INT64):
        return str(value)
    raise _Bad("wrong_type", f"{field.name!r:.80} is categorical (a string, a 64-bit integer or a boolean), got {value!r:.80}")


def _read_number(name: str, value: object) -> float:
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    except OverflowError:
        pass
    raise _Bad("wrong_type", f"{name!r:.80} must be a number, got {value!r:.80}")


def _read_time(value: object) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value in _INT64):
        return value
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise _Bad("wrong_time", f"time is neither epoch milliseconds nor RFC 3339: {value!r:.80}") from None
        if moment.tzinfo is None:
            raise _Bad("wrong_time", f"time has no zone offset: {value!r:.80}")
        return (moment - _EPOCH) // timedelta(milliseconds=1)
    raise _Bad("wrong_time", f"time is neither epoch milliseconds nor RFC 3339: {value!r:.80}")


# -- back to bytes ------------------------------------------------------------------------------------------------------------------


def encode_impressions(
    impression_id: pa.Array,
    time: npt.NDArray[np.int64],
    features: Mapping[str, pa.Array],
    true_probability: npt.NDArray[np.float64] | None = None,
) -> pa.LargeBinaryArray:
    """JSON bytes [n] of n impressions: ids, epoch milliseconds, features by name (string, int64, float64, bool, or a dictionary of those).

    What is missing is left out: nulls and, because JSON has no word for them, NaN and infinities.

    >>> features = {"app": pa.array(["maps"]), "age": pa.array([None], pa.int64())}
    >>> encode_impressions(pa.array(["a"]), np.array([1735689600000]), features)[0].as_py()
    b'{"kind":"impression","impression_id":"a","time":1735689600000,"features":{"app":"maps"}}'
    """
    # Each member brings a comma and a missing one is nothing: Arrow 26 drops rows in which null_handling="skip" leaves nothing to join.
    members = [_member(f",{json.dumps(name)}:", column) for name, column in features.items()] or [pa.repeat(_NOTHING, len(time))]
    joined = pc.binary_join_element_wise(*members, _NOTHING, null_handling="replace", null_replacement=b"")
    parts = [
        _member('{"kind":"impression","impression_id":', impression_id),
        _member(',"time":', pa.array(time)),
        pc.binary_replace_slice(joined, 0, 1, b',"features":{'),  # in place of the first comma, or of nothing
        pa.scalar(b"}", pa.large_binary()),
    ]
    if true_probability is not None:
        parts.append(pc.fill_null(_member(',"true_probability":', pa.array(true_probability)), _NOTHING))
    return pc.binary_join_element_wise(*parts, pa.scalar(b"}", pa.large_binary()), _NOTHING)


def encode_clicks(impression_id: pa.Array, time: npt.NDArray[np.int64]) -> pa.LargeBinaryArray:
    """JSON bytes [n] of n clicks."""
    parts = [_member('{"kind":"click","impression_id":', impression_id), _member(',"time":', pa.array(time), "}")]
    return pc.binary_join_element_wise(*parts, _NOTHING)


def _member(before: str, column: pa.Array, after: str = "") -> pa.LargeBinaryArray:
    """The JSON text of each value between `before` and `after`; null where the value is missing."""
    if pa.types.is_dictionary(column.type):
        return _member(before, column.dictionary, after).take(column.indices)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        text, before, after = _escaped(column.cast(pa.large_string())), before + '"', '"' + after
    elif pa.types.is_floating(column.type):
        text = pc.if_else(pc.is_finite(column), column, None).cast(pa.large_string())
    else:
        text = column.cast(pa.large_string())
    # Two insertions take half the time of one join of three.
    opened = pc.binary_replace_slice(text.cast(pa.large_binary()), 0, 0, before.encode())
    return pc.binary_replace_slice(opened, _END, _END, after.encode()) if after else opened


def _escaped(text: pa.LargeStringArray) -> pa.LargeStringArray:
    """What stands between the quotes of the JSON string of each text."""
    if not _has_special(text):
        return text
    words = text.dictionary_encode()
    inside = pa.array([json.dumps(word, ensure_ascii=False)[1:-1] for word in words.dictionary.to_pylist()], pa.large_string())
    return inside.take(words.indices)


def _has_special(text: pa.LargeStringArray) -> bool:
    """Whether JSON must escape anything in these texts: a quote, a backslash or a control character."""
    if not len(text):
        return False
    _, offsets, data = text.buffers()
    first, last = np.frombuffer(offsets, np.int64)[[text.offset, text.offset + len(text)]]
    characters = np.frombuffer(data or b"", np.uint8)[first:last]
    return bool(((characters < 0x20) | (characters == ord('"')) | (characters == ord("\\"))).any())


# -- fields nobody named ------------------------------------------------------------------------------------------------------------


def infer_fields(values: pa.LargeBinaryArray) -> tuple[Field, ...]:
    """The fields of these impressions: numeric where every value is a number, categorical otherwise; sorted by kind and name.

    What fewer than one impression in a hundred has is no field. Raises `DataError` when more than a thousand fields are left.

    >>> infer_fields(pa.array([b'{"kind":"impression","features":{"age":31,"app":"maps"}}'], pa.large_binary()))
    (Field(name='app', kind='categorical'), Field(name='age', kind='numeric'))
    """
    kinds: dict[str, Counter[type]] = {}
    impressions = 0
    for features in _features_of(values):
        impressions += 1
        for name, feature in features.items():
            if isinstance(feature, (str, bool, int, float)):
                kinds.setdefault(name, Counter())[type(feature)] += 1
    kinds = {name: types for name, types in kinds.items() if types.total() >= _LEAST_SHARE_OF_IMPRESSIONS * impressions}
    if len(kinds) > _MOST_INFERRED_FIELDS:
        raise DataError(
            f"the impressions have {len(kinds):,} features, too many to take all for fields; list those that matter in a --config"
        )
    numeric = {name for name, types in kinds.items() if types.keys() <= {int, float}}
    names = [*sorted(kinds.keys() - numeric), *sorted(numeric)]
    return tuple(Field(name, "numeric" if name in numeric else "categorical") for name in names)


def _features_of(values: pa.LargeBinaryArray) -> Iterator[Mapping[str, object]]:
    """Of the impressions among these records; without those that have absurdly many."""
    for value in values.to_pylist():
        try:
            document = msgspec.json.decode(value or b"")
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        if isinstance(document, dict) and document.get("kind") == "impression":
            features = document.get("features")
            if isinstance(features, dict) and len(features) <= _MOST_INFERRED_FIELDS:
                yield features
