"""Events as JSON, one a record: bytes to columns, and back.

    {"kind": "impression", "impression_id": "a1", "time": 1735689600000, "features": {"app": "maps", "age": 31}}
    {"kind": "click", "impression_id": "a1", "time": "2025-01-01T00:00:04.200Z"}

What the scanner (`json_scan`) does not vouch for is looked at one by one (msgspec, a strict parser), so one bad record costs itself time
and nothing else. Both accept exactly the same records.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stream_ctr.events import json_scan
from stream_ctr.events.candidates import Candidates, Refusal, Refused, kind_codes
from stream_ctr.events.field import Field

_BLOCK_ROWS, _BLOCK_BYTES = 2048, 64 << 20
_NOTHING = pa.scalar(b"", pa.large_binary())
_END = np.iinfo(np.int64).max
_NUMBER = json_scan.INTEGER | json_scan.NUMBER | json_scan.NULL
_CATEGORY = json_scan.STRING | json_scan.INTEGER | json_scan.BOOLEAN | json_scan.NULL
_TEXT = json_scan.STRING | json_scan.NULL
_TOP_TYPES = (_TEXT, _TEXT, _TEXT | json_scan.INTEGER, json_scan.OBJECT | json_scan.NULL, _NUMBER)
_FIELD_TYPES = {"categorical": _CATEGORY, "numeric": _NUMBER}
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_CLOCK = r"([01]\d|2[0-3]):[0-5]\d"
_RFC_3339 = rf"^(19[7-9]\d|20\d\d)-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])[T ]{_CLOCK}:[0-5]\d(\.\d{{1,9}})?(Z|[+-]{_CLOCK})$"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_INT64 = range(-(1 << 63), 1 << 63)


class JsonReader:
    """JSON records -> candidates with these fields."""

    def __init__(self, fields: Sequence[Field], *, max_record_bytes: int) -> None:
        self.fields = tuple(fields)
        self.max_record_bytes = max_record_bytes
        names = [name.encode() for name in (*json_scan.TOP, *(field.name for field in self.fields))]
        self.names = np.frombuffer(b"".join(names), np.uint8)
        self.ends = np.cumsum([0, *map(len, names)])
        self.accepts = np.array(
            [*_TOP_TYPES, *(_FIELD_TYPES[field.kind] for field in self.fields)], np.uint8
        )

    def read(
        self, values: pa.LargeBinaryArray, rows: npt.NDArray[np.int64]
    ) -> tuple[list[Candidates], list[Refusal]]:
        """The records at `rows`, in that order but for those that were looked at one by one, which come last."""
        data, start, size = spans(values)
        plain = (size[rows] > 0) & (size[rows] <= self.max_record_bytes)
        found, left = [], [rows[~plain]]
        for block in _blocks(rows[plain], size):
            scan = _Scan.of(self, data, start[block], size[block])
            found.append(self._scanned(block, scan))
            left.append(block[~scan.passed])
        parts, refusals = self._read_one_by_one(values, np.sort(np.concatenate(left)))
        return [*found, *parts], refusals

    # -- the fast way -----------------------------------------------------------------------------

    def _scanned(self, rows: npt.NDArray[np.int64], scan: _Scan) -> Candidates:
        """Those of these records that were found good."""
        time = scan.times()
        kept = np.flatnonzero(scan.passed)
        if len(kept) < len(rows):
            rows, time, scan = rows[kept], time[kept], scan.only(kept)
        kind = scan.texts(json_scan.KIND)
        features = {
            field.name: scan.texts(member) if field.kind == "categorical" else scan.numbers(member)
            for member, field in enumerate(self.fields, len(json_scan.TOP))
        }
        return Candidates(
            row=rows,
            within=np.zeros_like(rows),
            kind=kind_codes(kind),
            kind_text=kind,
            impression_id=scan.texts(json_scan.ID),
            time=time,
            has_time=scan.length[:, json_scan.TIME] >= 0,
            has_features=scan.length[:, json_scan.FEATURES] >= 0,
            true_probability=scan.numbers(json_scan.PROBABILITY).to_numpy(zero_copy_only=False),
            features=features,
            unread=scan.unread,
        )

    # -- one by one -------------------------------------------------------------------------------

    def _read_one_by_one(
        self, values: pa.LargeBinaryArray, rows: npt.NDArray[np.int64]
    ) -> tuple[list[Candidates], list[Refusal]]:
        good: list[int] = []
        documents, refusals = [], []
        for row in rows.tolist():
            try:
                documents.append(self._read_one(values[row].as_py()))
                good.append(row)
            except Refused as refused:
                refusals.append(Refusal(row, refused.code, refused.message))
        return [self._columns(np.array(good, np.int64), documents)], refusals

    def _read_one(self, value: bytes | None) -> dict[str, Any]:
        if value is None:
            raise Refused("tombstone", "null value")
        if not value.strip():
            raise Refused("empty", "no bytes")
        if len(value) > self.max_record_bytes:
            raise Refused("too_large", f"{len(value)} bytes, more than {self.max_record_bytes}")
        bare = _without_strings(value)
        if _depth(bare) > json_scan.DEEPEST_NESTING:
            raise Refused("too_deep", f"nested more than {json_scan.DEEPEST_NESTING} deep")
        try:
            document = msgspec.json.decode(value)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Refused("not_json", str(error)) from None
        if not isinstance(document, dict):
            raise Refused("not_an_object", f"a JSON {type(document).__name__}")
        for name in ("kind", "impression_id"):
            if not isinstance(document.get(name), (str, type(None))):
                raise Refused("wrong_type", f"{name} must be a string, got {document[name]!r:.80}")
        features = document.get("features")
        if not isinstance(features, (dict, type(None))):
            raise Refused("wrong_type", f"features must be an object, got {features!r:.80}")
        found = {
            field.name: _read_feature(field, (features or {}).get(field.name))
            for field in self.fields
        }
        if (probability := document.get("true_probability")) is not None:
            probability = _read_number("true_probability", probability)
        time = _read_time(document.get("time"))
        read = (
            3
            + (features is not None)
            + (probability is not None)
            + sum(value is not None for value in found.values())
        )
        return {
            "kind": document.get("kind"),
            "impression_id": document.get("impression_id"),
            "time": time,
            "has_features": features is not None,
            "true_probability": probability,
            "unread": _members(bare) > read,
            "features": found,
        }

    def _columns(
        self, rows: npt.NDArray[np.int64], documents: Sequence[Mapping[str, Any]]
    ) -> Candidates:
        def column(name: str, type: pa.DataType) -> pa.Array:
            return pa.array([document[name] for document in documents], type)

        time, kind = column("time", pa.int64()), column("kind", pa.string())
        return Candidates(
            row=rows,
            within=np.zeros_like(rows),
            kind=kind_codes(kind),
            kind_text=kind,
            impression_id=column("impression_id", pa.string()),
            time=pc.fill_null(time, 0).to_numpy(),
            has_time=np.asarray(time.is_valid()),
            has_features=np.array([document["has_features"] for document in documents], np.bool_),
            true_probability=column("true_probability", pa.float64())
            .to_numpy(zero_copy_only=False)
            .astype(np.float64),
            features={
                field.name: pa.array(
                    [document["features"][field.name] for document in documents],
                    pa.string() if field.kind == "categorical" else pa.float64(),
                )
                for field in self.fields
            },
            unread=np.array([document["unread"] for document in documents], np.bool_),
        )


def spans(
    values: pa.LargeBinaryArray,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The bytes of n values, and where in them each starts [n] and how many it has [n], which is none where it is null."""
    _, offsets, data = values.buffers()
    ends = (
        np.frombuffer(offsets, np.int64)[values.offset : values.offset + len(values) + 1]
        if len(values)
        else np.zeros(1, np.int64)
    )
    size = (
        np.diff(ends)
        if not values.null_count
        else np.asarray(pc.fill_null(pc.binary_length(values), 0))
    )
    return np.frombuffer(data or b"", np.uint8), ends[:-1], size


def _blocks(
    rows: npt.NDArray[np.int64], size: npt.NDArray[np.int64]
) -> list[npt.NDArray[np.int64]]:
    """These rows in runs that are scanned at once."""
    part = np.arange(len(rows)) // _BLOCK_ROWS + np.cumsum(size[rows]) // _BLOCK_BYTES
    return np.split(rows, np.flatnonzero(np.diff(part)) + 1) if len(rows) else []


@dataclass(frozen=True, slots=True)
class _Scan:
    """Where the M members of n records stand in `data`, as `json_scan.scan` tells it."""

    data: npt.NDArray[np.uint8]
    at: npt.NDArray[np.int64]
    length: npt.NDArray[np.int32]
    passed: npt.NDArray[np.bool_]
    unread: npt.NDArray[np.bool_]
    escaped: npt.NDArray[np.bool_]

    @classmethod
    def of(
        cls,
        reader: JsonReader,
        data: npt.NDArray[np.uint8],
        start: npt.NDArray[np.int64],
        size: npt.NDArray[np.int64],
    ) -> _Scan:
        n, members = len(start), len(reader.accepts)
        at, length = np.empty((n, members), np.int64), np.full((n, members), -1, np.int32)
        passed, unread, escaped = (
            np.zeros(n, np.bool_),
            np.zeros(n, np.bool_),
            np.zeros(members, np.bool_),
        )
        json_scan.scan(
            data,
            start,
            size,
            reader.names,
            reader.ends,
            reader.accepts,
            at,
            length,
            passed,
            unread,
            escaped,
        )
        return cls(data, at, length, passed, unread, escaped)

    def only(self, kept: npt.NDArray[np.int64]) -> _Scan:
        return _Scan(
            self.data,
            self.at[kept],
            self.length[kept],
            self.passed[kept],
            self.unread[kept],
            self.escaped,
        )

    def times(self) -> npt.NDArray[np.int64]:
        """Epoch milliseconds; records whose time is a text that is read more slowly have not `passed` any more."""
        at, length = self.at[:, json_scan.TIME], self.length[:, json_scan.TIME]
        there = self.passed & (length >= 0)
        text = np.zeros(len(at), np.bool_)
        text[there] = self.data[at[there] - 1] == ord('"')
        time = json_scan.integers(self.data, at, np.where(there & ~text, length, -1))
        if text.any():
            moments = _moments(self._texts(at[text], length[text]))
            time[text] = pc.fill_null(moments, 0).to_numpy()
            self.passed[text] = np.asarray(moments.is_valid())
        return time

    def numbers(self, member: int) -> pa.DoubleArray:
        at, length = self.at[:, member], self.length[:, member]
        found, inexact = json_scan.numbers(self.data, at, length)
        if inexact.any():
            found[inexact] = self._texts(at[inexact], length[inexact]).cast(pa.float64()).to_numpy()
        missing = length < 0
        return pa.array(found, mask=missing if missing.any() else None)

    def texts(self, member: int) -> pa.StringArray:
        found = self._texts(self.at[:, member], self.length[:, member])
        if not self.escaped[member]:
            return found
        special = pc.fill_null(pc.match_substring(found, "\\"), False)
        quoted = [f'"{text}"' for text in found.filter(special).to_pylist()]
        meant = msgspec.json.decode(f"[{','.join(quoted)}]")
        return pc.replace_with_mask(found, special, pa.array(meant, pa.string()))

    def _texts(self, at: npt.NDArray[np.int64], length: npt.NDArray[np.int32]) -> pa.StringArray:
        offsets, text = json_scan.texts(self.data, at, length)
        valid = length >= 0
        bits = None if valid.all() else pa.py_buffer(np.packbits(valid, bitorder="little"))
        return pa.StringArray.from_buffers(len(at), pa.py_buffer(offsets), pa.py_buffer(text), bits)


def _moments(text: pa.StringArray) -> pa.Int64Array:
    """Epoch milliseconds, rounded down, of RFC 3339; null where it is anything else."""
    return _cast_moments(pc.if_else(pc.match_substring_regex(text, _RFC_3339), text, None))


def _cast_moments(text: pa.StringArray) -> pa.Int64Array:
    try:
        moments = text.cast(pa.timestamp("ns", "UTC"))
    except pa.ArrowInvalid:  # a 30th of February: nobody is told which, it is found by halving
        half = len(text) // 2
        return (
            pa.concat_arrays([_cast_moments(text[:half]), _cast_moments(text[half:])])
            if half
            else pa.nulls(1, pa.int64())
        )
    return (
        pc.floor_temporal(moments, unit="millisecond")
        .cast(pa.timestamp("ms", "UTC"))
        .cast(pa.int64())
    )


def _without_strings(value: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(_STRING.sub(b'"', value), np.uint8)


def _depth(bare: npt.NDArray[np.uint8]) -> int:
    """How deep the brackets nest, [ and ] and their like, which differ from these by one bit."""
    folded = bare | 32
    return int(
        np.cumsum((folded == ord("{")).astype(np.int64) - (folded == ord("}"))).max(initial=0)
    )


def _members(bare: npt.NDArray[np.uint8]) -> int:
    """Members of all objects (of valid JSON) but those that are null."""
    dense = bare[bare > 32]
    return int(np.count_nonzero((dense[:-1] == ord(":")) & (dense[1:] != ord("n"))))


def _read_feature(field: Field, value: object) -> str | float | None:
    if value is None:
        return None
    if field.kind == "numeric":
        return _read_number(field.name, value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) or (isinstance(value, int) and value in _INT64):
        return str(value)
    raise Refused(
        "wrong_type",
        f"{field.name!r:.80} is categorical (a string, a 64-bit integer or a boolean), got {value!r:.80}",
    )


def _read_number(name: str, value: object) -> float:
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    except OverflowError:
        pass
    raise Refused("wrong_type", f"{name!r:.80} must be a number, got {value!r:.80}")


def _read_time(value: object) -> int | None:
    if value is None or (
        isinstance(value, int) and not isinstance(value, bool) and value in _INT64
    ):
        return value
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise Refused(
                "wrong_time", f"time is neither epoch milliseconds nor RFC 3339: {value!r:.80}"
            ) from None
        if moment.tzinfo is None:
            raise Refused("wrong_time", f"time has no zone offset: {value!r:.80}")
        return (moment - _EPOCH) // timedelta(milliseconds=1)
    raise Refused("wrong_time", f"time is neither epoch milliseconds nor RFC 3339: {value!r:.80}")


# -- back to bytes -------------------------------------------------------------------------------


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
    members = [_member(f",{json.dumps(name)}:", column) for name, column in features.items()] or [
        pa.repeat(_NOTHING, len(time))
    ]
    joined = pc.binary_join_element_wise(
        *members, _NOTHING, null_handling="replace", null_replacement=b""
    )
    parts = [
        _member('{"kind":"impression","impression_id":', impression_id),
        _member(',"time":', pa.array(time)),
        pc.binary_replace_slice(
            joined, 0, 1, b',"features":{'
        ),  # in place of the first comma, or of nothing
        pa.scalar(b"}", pa.large_binary()),
    ]
    if true_probability is not None:
        parts.append(
            pc.fill_null(_member(',"true_probability":', pa.array(true_probability)), _NOTHING)
        )
    return pc.binary_join_element_wise(*parts, pa.scalar(b"}", pa.large_binary()), _NOTHING)


def encode_clicks(impression_id: pa.Array, time: npt.NDArray[np.int64]) -> pa.LargeBinaryArray:
    """JSON bytes [n] of n clicks."""
    parts = [
        _member('{"kind":"click","impression_id":', impression_id),
        _member(',"time":', pa.array(time), "}"),
    ]
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
    inside = pa.array(
        [json.dumps(word, ensure_ascii=False)[1:-1] for word in words.dictionary.to_pylist()],
        pa.large_string(),
    )
    return inside.take(words.indices)


def _has_special(text: pa.LargeStringArray) -> bool:
    """Whether JSON must escape anything in these texts: a quote, a backslash or a control character."""
    if not len(text):
        return False
    _, offsets, data = text.buffers()
    first, last = np.frombuffer(offsets, np.int64)[[text.offset, text.offset + len(text)]]
    characters = np.frombuffer(data or b"", np.uint8)[first:last]
    return bool(((characters < 0x20) | (characters == ord('"')) | (characters == ord("\\"))).any())
