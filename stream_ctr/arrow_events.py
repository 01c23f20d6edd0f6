"""Events as Arrow, many a record: the value of a record is an Arrow IPC stream, whose columns become ours, and back.

    kind              string                       impression or click
    impression_id     string
    time              int64 epoch milliseconds, or a timestamp of any unit (UTC where it names no zone), rounded down to milliseconds
    features          struct, a member a field     null for clicks; string, integer or boolean for categorical fields, any number for numeric
    true_probability  any number                   optional

A string may be string, large_string, string_view, or a dictionary of one of them; categorical integers and booleans may come as a dictionary
too. A column of type null is missing everywhere, and of columns or members of one name the last counts. Other columns and members are
accepted and counted. What an event must be is as in JSON; what JSON has no word for is refused: NaN, infinities.

A record that is no such stream, from its schema to its end, or that lacks a column or has one of another type is refused as a whole. So is
one of which more than a thousand events are bad: each would be a dead letter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from stream_ctr import ipc_frames
from stream_ctr.candidates import Candidates, Refusal, Refused, kind_codes
from stream_ctr.config import Field
from stream_ctr.rows import one_line

MARKER = ipc_frames.MARKER
MOST_EVENTS = 1 << 20
"""Of a record: their order within it has 20 bits."""
MOST_BAD_EVENTS = 1000
_UNFOLDING = 16  # a record's bytes once decompressed or decoded, to the most that it may have as it comes
_INT64_MAX = np.iinfo(np.int64).max
_READ_OPTIONS = pa.ipc.IpcReadOptions(use_threads=False, ensure_alignment=pa.ipc.Alignment.DataTypeSpecific)
_TICKS_A_MILLISECOND = {"ms": 1, "us": 1_000, "ns": 1_000_000}
Mask = npt.NDArray[np.bool_]


def read_batches(value: pa.Buffer, *, max_record_bytes: int) -> list[pa.RecordBatch]:
    """The batches of an IPC stream of a stranger, every offset, index and character of them looked at.

    Raises `Refused` when the bytes are no such stream, or one of too many rows or of columns larger than 16 times `max_record_bytes`.
    """
    if value.size > max_record_bytes:
        raise Refused("too_large", f"{value.size} bytes, more than {max_record_bytes}")
    try:
        said = ipc_frames.sizes(memoryview(value))
        if said.rows > MOST_EVENTS:
            raise Refused("too_many_events", f"{said.rows} events, more than {MOST_EVENTS}")
        _require_room(said.bytes, _UNFOLDING * max_record_bytes)
        with pa.ipc.open_stream(value, options=_READ_OPTIONS) as reader:
            batches = list(reader)
        for batch in batches:
            batch.validate(full=True)
    except (ipc_frames.DamagedStream, pa.ArrowException, OSError) as error:
        raise Refused("not_arrow", one_line(error)) from None
    return batches


class ArrowReader:
    """Arrow records -> candidates with these fields."""

    def __init__(self, fields: Sequence[Field], *, max_record_bytes: int) -> None:
        self.fields = tuple(fields)
        self.max_record_bytes = max_record_bytes

    def read(self, batches: Sequence[pa.RecordBatch], row: int) -> tuple[list[Candidates], list[Refusal]]:
        """What is in the batches of the record at `row`, and which of its events cannot be read.

        Raises `Refused` where that is none of them: a column is missing or of a type that it cannot have.
        """
        found: list[Candidates] = []
        refusals: list[Refusal] = []
        first = 0
        for batch in batches:
            columns = _Columns(batch, _UNFOLDING * self.max_record_bytes)
            bad = _Bad(row, first, len(batch))
            candidates = self._candidates(columns, bad)
            found.append(candidates.only(~bad.mask))
            refusals += bad.refusals
            first += len(batch)
        return [part for part in found if len(part)], refusals

    def _candidates(self, columns: _Columns, bad: _Bad) -> Candidates:
        n = len(bad.mask)
        kind, identity = columns.kind(), columns.impression_id()
        time, has_time = columns.time()
        has_features, members = columns.features()
        features = {field.name: self._feature(field, members.pop(field.name, None), has_features, bad) for field in self.fields}
        probability = columns.others.pop("true_probability", None)
        truth = _numbers("true_probability", probability, np.ones(n, bool), bad)
        return Candidates(
            row=np.full(n, bad.row),
            within=np.arange(bad.first, bad.first + n),
            kind=kind,
            kind_text=columns.kind_text,
            impression_id=identity,
            time=time,
            has_time=has_time,
            has_features=has_features,
            true_probability=np.asarray(truth.to_numpy(zero_copy_only=False), np.float64),
            features=features,
            unread=_any_present(columns.unread_columns(), n) | (_any_present([*members.values(), *columns.twice_members], n) & has_features),
        )

    def _feature(self, field: Field, member: pa.Array | None, there: Mask, bad: _Bad) -> pa.Array:
        if field.kind == "numeric":
            return _numbers(field.name, member, there, bad)
        return _categories(field.name, member, there, bad, _UNFOLDING * self.max_record_bytes)


class _Bad:
    """Which of the n events of a batch, the record's from `first` on, cannot be read, and why."""

    def __init__(self, row: int, first: int, n: int) -> None:
        self.row, self.first = row, first
        self.mask = np.zeros(n, bool)
        self.refusals: list[Refusal] = []

    def add(self, broken: Mask, code: str, message: Callable[[int], str]) -> None:
        """What is broken first names the reason."""
        for at in np.flatnonzero(broken & ~self.mask).tolist():
            self.refusals.append(Refusal(self.row, self.first + at, code, message(at)))
        self.mask |= broken


class _Columns:
    """The columns of a batch by what they mean. What nobody has asked for is in `others`, and in `twice` what a later one hides."""

    def __init__(self, batch: pa.RecordBatch, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self.others, self._twice = _by_name(batch.schema, batch.columns)
        self.twice_members: list[pa.Array] = []
        if missing := [name for name in ("kind", "impression_id", "time") if name not in self.others]:
            raise Refused("missing_column", f"there is no column {missing[0]}")
        self.kind_text = self.others.pop("kind")

    def kind(self) -> npt.NDArray[np.int8]:
        kind = _require("kind", self.kind_text, _is_text, "a string")
        if not pa.types.is_dictionary(kind.type):
            return kind_codes(_texts(kind, self._most_bytes))
        codes = np.append(kind_codes(_texts(kind.dictionary, self._most_bytes)), np.int8(-1))
        return codes[np.asarray(pc.fill_null(kind.indices.cast(pa.int64()), -1))]

    def impression_id(self) -> pa.StringArray:
        identity = _require("impression_id", self.others.pop("impression_id"), _is_text, "a string")
        if not pa.types.is_dictionary(identity.type):
            return _texts(identity, self._most_bytes)
        texts = _texts(identity.dictionary, self._most_bytes)
        _require_room(pc.sum(pc.binary_length(texts).cast(pa.int64()).take(identity.indices)).as_py() or 0, self._most_bytes)
        return texts.take(identity.indices)

    def time(self) -> tuple[npt.NDArray[np.int64], Mask]:
        """Epoch milliseconds, and whether there is a time."""
        time = _require("time", self.others.pop("time"), _is_time, "int64 milliseconds or a timestamp")
        if pa.types.is_null(time.type):
            return np.zeros(len(time), np.int64), np.zeros(len(time), bool)
        ticks = pc.fill_null(time.cast(pa.int64()), 0).to_numpy()
        if pa.types.is_timestamp(time.type) and time.type.unit == "s":
            ticks = np.clip(ticks, -_INT64_MAX // 1000, _INT64_MAX // 1000) * 1000
        elif pa.types.is_timestamp(time.type):
            ticks = ticks // _TICKS_A_MILLISECOND[time.type.unit]
        return ticks, np.asarray(time.is_valid())

    def features(self) -> tuple[Mask, dict[str, pa.Array]]:
        """Which events have features, and these by their names."""
        features = self.others.pop("features", None)
        if features is None or pa.types.is_null(features.type):
            return np.zeros(len(self.kind_text), bool), {}
        _require("features", features, pa.types.is_struct, "a struct")
        members = [features.field(index) for index in range(features.type.num_fields)]
        by_name, self.twice_members = _by_name(features.type, members)
        return np.asarray(features.is_valid()), by_name

    def unread_columns(self) -> list[pa.Array]:
        return [*self.others.values(), *self._twice]


def _by_name(named: pa.Schema | pa.StructType, columns: Sequence[pa.Array]) -> tuple[dict[str, pa.Array], list[pa.Array]]:
    """The last column of each name, and those before it. Raises `Refused` where a name is no text."""
    try:
        names = [field.name for field in named]
    except UnicodeDecodeError as error:
        raise Refused("not_arrow", f"the name of a column is no text: {error}") from None
    last = {name: index for index, name in enumerate(names)}
    twice = [column for index, column in enumerate(columns) if last[names[index]] != index]
    return {name: columns[index] for name, index in last.items()}, twice


def _any_present(columns: Sequence[pa.Array], n: int) -> Mask:
    """Where any of these is not null [n]."""
    present = np.zeros(n, bool)
    for column in columns:
        if column.null_count == 0:
            return np.ones(n, bool)
        if column.null_count < n:
            present |= np.asarray(column.is_valid())
    return present


# -- columns of one type ------------------------------------------------------------------------------------------------------------


def _require(name: str, column: pa.Array, accepts: Callable[[pa.DataType], bool], expected: str) -> pa.Array:
    if not (accepts(column.type) or pa.types.is_null(column.type)):
        raise Refused("wrong_type", f"column {one_line(name, 80)} must be {expected}, got {one_line(column.type, 80)}")
    return column


def _require_room(needed: int, most: int) -> None:
    if needed > most:
        raise Refused("too_large", f"{needed} bytes once it is unfolded, more than {most}")


def _is_plain_text(type: pa.DataType) -> bool:
    return bool(pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type))


def _is_text(type: pa.DataType) -> bool:
    return _is_plain_text(type.value_type if pa.types.is_dictionary(type) else type)


def _is_category(type: pa.DataType) -> bool:
    type = type.value_type if pa.types.is_dictionary(type) else type
    return bool(_is_plain_text(type) or pa.types.is_integer(type) or pa.types.is_boolean(type))


def _is_time(type: pa.DataType) -> bool:
    return bool(pa.types.is_int64(type) or pa.types.is_timestamp(type))


def _is_number(type: pa.DataType) -> bool:
    return bool(pa.types.is_integer(type) or pa.types.is_floating(type) or pa.types.is_decimal(type))


def _numbers(name: str, column: pa.Array | None, there: Mask, bad: _Bad) -> pa.DoubleArray:
    """As float64. Those that are not finite are bad, where the struct that they are members of is there."""
    if column is None:
        return pa.nulls(len(there), pa.float64())
    numbers = _require(name, column, _is_number, "a number").cast(pa.float64(), safe=False)
    finite = pc.is_finite(numbers)
    if not pc.all(finite, min_count=0).as_py():
        broken = there & ~np.asarray(pc.fill_null(finite, True))
        bad.add(broken, "not_finite", lambda at: f"{name!r:.80} must be a finite number, got {numbers[at]}")
        numbers = pc.if_else(finite, numbers, None)  # where no struct is there
    return numbers


def _categories(name: str, column: pa.Array | None, there: Mask, bad: _Bad, most_bytes: int) -> pa.Array:
    """As strings, or a dictionary of int32 and strings where it is one. Integers beyond 64 bits with sign are bad."""
    if column is None:
        return pa.nulls(len(there), pa.string())
    _require(name, column, _is_category, "a string, an integer or a boolean")
    if not pa.types.is_dictionary(column.type):
        broken = _beyond_int64(column)
        texts = _texts(column, most_bytes)
    else:
        indices = column.indices.cast(pa.int32())
        if column.dictionary.null_count:
            indices = pc.if_else(column.dictionary.is_valid().take(indices), indices, None)
        broken = _beyond_int64(column.dictionary)
        broken = None if broken is None else np.asarray(pc.fill_null(pa.array(broken).take(indices), False))
        texts = pa.DictionaryArray.from_arrays(indices, _texts(column.dictionary, most_bytes))
    if broken is not None:
        expected = f"{name!r:.80} is categorical (a string, a 64-bit integer or a boolean)"
        bad.add(there & broken, "wrong_type", lambda at: f"{expected}, got {column[at].as_py()}")
    return texts


def _beyond_int64(column: pa.Array) -> Mask | None:
    if not pa.types.is_uint64(column.type):
        return None
    beyond = np.asarray(pc.fill_null(pc.greater(column, pa.scalar(_INT64_MAX, pa.uint64())), False))
    return beyond if beyond.any() else None


def _texts(values: pa.Array, most_bytes: int) -> pa.StringArray:
    if pa.types.is_string_view(values.type):  # many views may show the same bytes
        views = np.frombuffer(values.buffers()[1] or b"", np.int32)[4 * values.offset :: 4][: len(values)]
        _require_room(int(views[np.asarray(values.is_valid())].sum(dtype=np.int64)), most_bytes)
    return values.cast(pa.string())


# -- back to bytes ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EventColumns:
    """n events in columns: `impression` (else it is a click), ids, epoch milliseconds, features by name, missing for clicks (string, int64,
    float64, bool, or a dictionary of those)."""

    impression: Mask
    impression_id: pa.Array
    time: npt.NDArray[np.int64]
    features: Any
    true_probability: npt.NDArray[np.float64] | None = None
