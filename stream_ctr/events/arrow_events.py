"""Events as Arrow, many a record: the value of a record is an Arrow IPC stream, whose columns become ours, and back.

    kind              string                       impression or click
    impression_id     string
    time              int64 epoch milliseconds, or a timestamp of any unit (UTC where it names no zone), rounded down to milliseconds
    features          struct, a member a field     null for clicks; text, integer or boolean for categorical fields, a number for numeric
    true_probability  any number                   optional

A string may be string, large_string, string_view, or a dictionary of one of them; categorical integers and booleans may come as a
dictionary too. A column of type null is missing everywhere, NaN and infinities are missing, and of columns or members of one name the
last counts. Other columns and members are accepted and counted.

A record that is no such stream, from its schema to its end, or that lacks a column or has one of another type is refused as a whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from stream_ctr.events import ipc_frames
from stream_ctr.events.arrow_columns import epoch_ms, one_array
from stream_ctr.events.candidates import IMPRESSION, Candidates, Refusal, Refused, kind_codes
from stream_ctr.events.field import Field
from stream_ctr.messages import one_line

MOST_EVENTS = 1 << 20
"""Of a record: their order within it has 20 bits."""
# What a record takes as columns, to the most bytes that it may have as it comes, and to those that it has: many small ones come in a poll.
# Of the latter a record of good events that compress well takes 40, one that was made to fill memory thousands.
_UNFOLDING = 16
_UNFOLDING_OF_OWN = 64
_SMALL = 1 << 17  # bytes that any record may take
_EVENT_BYTES = 100  # of an event once it is read, whatever its columns had: nulls and indices have next to none
_BLOCK_BYTES = 64 << 20
_SHOWN = 100  # characters of what is no kind
_LARGEST_PACKED = (
    900_000  # bytes: brokers and clients take a megabyte, if nobody told them otherwise
)
_INT64_MAX = np.iinfo(np.int64).max
_READ_OPTIONS = pa.ipc.IpcReadOptions(
    use_threads=False, ensure_alignment=pa.ipc.Alignment.DataTypeSpecific
)
_TICKS_A_MILLISECOND = {"ms": 1, "us": 1_000, "ns": 1_000_000}
Mask = npt.NDArray[np.bool_]


def read_batches(value: pa.Buffer, *, max_record_bytes: int) -> list[pa.RecordBatch]:
    """The batches of an IPC stream of a stranger, every offset, index and character of them looked at.

    Raises `Refused` when the bytes are no such stream, or one of too many rows, or one that would take too much memory: more than 16 times
    `max_record_bytes`, or than 64 times its own and 128 KiB.
    """
    if value.size > max_record_bytes:
        raise Refused("too_large", f"{value.size} bytes, more than {max_record_bytes}")
    try:
        said = ipc_frames.sizes(memoryview(value))
        if said.rows > MOST_EVENTS:
            raise Refused("too_many_events", f"{said.rows} events, more than {MOST_EVENTS}")
        room = (
            min(_UNFOLDING * max_record_bytes, max(_SMALL, _UNFOLDING_OF_OWN * value.size))
            - _EVENT_BYTES * said.rows
        )
        _require_room(said.bytes, room)
        with pa.ipc.open_stream(value, options=_READ_OPTIONS) as reader:
            _require_text(reader.schema)
            batches = list(reader)
        for batch in batches:
            batch.validate(full=True)
        _require_room(_shown_bytes(batches), room)
    except MemoryError:  # Arrow's is an ArrowException too, and says nothing of the record
        raise
    except (ipc_frames.DamagedStream, pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise Refused("not_arrow", one_line(error)) from None
    return batches


def _shown_bytes(batches: Sequence[pa.RecordBatch]) -> int:
    """Of texts that are stored once and may be shown often: views, and ids in a dictionary."""
    total, words_counted = 0, set()
    for batch in batches:
        columns = list(zip(batch.schema.names, batch.columns, strict=True))
        while columns:
            name, column = columns.pop()
            if pa.types.is_struct(column.type):
                columns += [("", column.field(index)) for index in range(column.type.num_fields)]
            elif pa.types.is_string_view(column.type):
                total += int(_lengths(column).sum())
            elif pa.types.is_dictionary(column.type) and _is_text(column.type):
                if name == "impression_id":
                    total += int(
                        _lengths(column.dictionary)[column.indices.drop_null().to_numpy()].sum()
                    )
                address = column.dictionary.buffers()[1].address if len(column.dictionary) else 0
                if pa.types.is_string_view(column.type.value_type) and address not in words_counted:
                    words_counted.add(address)  # batches share them
                    total += int(_lengths(column.dictionary).sum())
    return total


def _lengths(texts: pa.Array) -> npt.NDArray[np.int64]:
    """Bytes of each, 0 where it is missing [n]."""
    if not pa.types.is_string_view(texts.type):
        return pc.fill_null(pc.binary_length(texts), 0).to_numpy().astype(np.int64)
    views = np.frombuffer(texts.buffers()[1] or b"", np.int32)[4 * texts.offset :: 4][
        : len(texts)
    ]  # each begins with its length
    return np.where(texts.is_valid(), views, 0).astype(np.int64)


def _require_text(columns: Iterable[pa.Field]) -> None:
    """Raises UnicodeDecodeError where a name is none: whoever prints it later would."""
    for column in columns:
        _ = column.name
        _require_text(column.type.field(index) for index in range(column.type.num_fields))


class ArrowReader:
    """Arrow records -> candidates with these fields."""

    def __init__(self, fields: Sequence[Field]) -> None:
        self.fields = tuple(fields)

    def read(
        self, streams: Mapping[int, Sequence[pa.RecordBatch]]
    ) -> tuple[list[Candidates], list[Refusal]]:
        """What is in the batches of the record at each row.

        Refused is a record in which a column is missing or of a type that it cannot have.
        """
        found: list[Candidates] = []
        refusals: list[Refusal] = []
        for _, group in itertools.groupby(
            _parts(streams), key=lambda part: (part.batch.schema, part.block)
        ):
            self._read(list(group), found, refusals)
        whole = {refusal.row for refusal in refusals}
        return [
            part.at(np.flatnonzero(~np.isin(part.row, list(whole)))) if whole else part
            for part in found
        ], refusals

    def _read(
        self, parts: Sequence[_Part], found: list[Candidates], refusals: list[Refusal]
    ) -> None:
        """Batches of one schema at once, which is faster; when that cannot be, by halves."""
        try:
            found.append(self._candidates(parts))
        except MemoryError:  # Arrow's is an ArrowException too
            raise
        except (Refused, pa.ArrowException, UnicodeDecodeError) as error:
            if half := len(parts) // 2:
                self._read(parts[:half], found, refusals)
                self._read(parts[half:], found, refusals)
            elif all(refusal.row != parts[0].row for refusal in refusals):
                refused = (
                    error if isinstance(error, Refused) else Refused("not_arrow", one_line(error))
                )
                refusals.append(Refusal(parts[0].row, refused.code, refused.message))

    def _candidates(self, parts: Sequence[_Part]) -> Candidates:
        columns = _Columns(pa.Table.from_batches([part.batch for part in parts]))
        sizes = [len(part.batch) for part in parts]
        kind, kind_text = columns.kind()
        identity = columns.impression_id()
        time, has_time = columns.time()
        has_features, members = columns.features()
        features = {
            field.name: self._feature(field, members.pop(field.name, None), len(kind))
            for field in self.fields
        }
        truth = _numbers(
            "true_probability", columns.others.pop("true_probability", None), len(kind)
        )
        return Candidates(
            row=np.repeat([part.row for part in parts], sizes),
            within=np.concatenate(
                [
                    np.arange(part.first, part.first + size)
                    for part, size in zip(parts, sizes, strict=True)
                ]
            ),
            kind=kind,
            kind_text=kind_text,
            impression_id=identity,
            time=time,
            has_time=has_time,
            has_features=has_features,
            true_probability=truth.to_numpy(zero_copy_only=False),
            features=features,
            unread=columns.any_other()
            | (_any_present([*members.values(), *columns.twice_members], len(kind)) & has_features),
        )

    def _feature(self, field: Field, member: pa.Array | None, n: int) -> pa.Array:
        return (
            _numbers(field.name, member, n)
            if field.kind == "numeric"
            else _categories(field.name, member, n)
        )


class _Part(NamedTuple):
    """A batch of the record at `row`, whose events from the `first` on it holds; `block`: those that are small enough together."""

    row: int
    first: int
    batch: pa.RecordBatch
    block: int


def _parts(streams: Mapping[int, Sequence[pa.RecordBatch]]) -> Iterator[_Part]:
    size = 0
    for row, batches in streams.items():
        first = 0
        for batch in batches:
            size += batch.get_total_buffer_size()
            if len(batch):
                yield _Part(row, first, batch, size // _BLOCK_BYTES)
            first += len(batch)


class _Columns:
    """The columns of some batches by what they mean. What nobody has asked for is in `others`, and what a later one hides in `_twice`."""

    def __init__(self, table: pa.Table) -> None:
        self._n = len(table)
        self.others, self._twice = _by_name(
            table.schema, [one_array(column) for column in table.columns]
        )
        self.twice_members: list[pa.Array] = []

    def kind(self) -> tuple[npt.NDArray[np.int8], pa.StringArray]:
        """Its code, and where that is none, the beginning of what is there."""
        kind = self._needed("kind", _is_text, "a string")
        if not pa.types.is_dictionary(kind.type):
            texts = kind.cast(pa.string())
            return kind_codes(texts), texts
        words = kind.dictionary.cast(pa.string())
        codes = np.append(kind_codes(words), np.int8(-1))[
            np.asarray(pc.fill_null(kind.indices.cast(pa.int64()), -1))
        ]
        others = pc.if_else(pa.array(codes < 0), kind.indices, None)
        return codes, pc.utf8_slice_codeunits(words, 0, _SHOWN).take(others)

    def impression_id(self) -> pa.StringArray:
        identity = self._needed("impression_id", _is_text, "a string")
        if not pa.types.is_dictionary(identity.type):
            return identity.cast(pa.string())
        return identity.dictionary.cast(pa.string()).take(identity.indices)

    def time(self) -> tuple[npt.NDArray[np.int64], Mask]:
        """Epoch milliseconds, and whether there is a time."""
        time = self._needed("time", _is_time, "int64 milliseconds or a timestamp")
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
            return np.zeros(self._n, bool), {}
        _require("features", features, pa.types.is_struct, "a struct")
        members = [features.field(index) for index in range(features.type.num_fields)]
        by_name, self.twice_members = _by_name(features.type, members)
        return np.asarray(features.is_valid()), by_name

    def any_other(self) -> Mask:
        """Where there is something in a column that nobody reads."""
        return _any_present([*self.others.values(), *self._twice], self._n)

    def _needed(self, name: str, accepts: Callable[[pa.DataType], bool], expected: str) -> pa.Array:
        if name not in self.others:
            raise Refused("missing_column", f"there is no column {name}")
        return _require(name, self.others.pop(name), accepts, expected)


def _by_name(
    named: pa.Schema | pa.StructType, columns: Sequence[pa.Array]
) -> tuple[dict[str, pa.Array], list[pa.Array]]:
    """The last column of each name, and those before it."""
    names = [field.name for field in named]
    last = {name: index for index, name in enumerate(names)}
    twice = [column for index, column in enumerate(columns) if last[names[index]] != index]
    return {name: columns[index] for name, index in last.items()}, twice


def _any_present(columns: Sequence[pa.Array], n: int) -> Mask:
    """Where any of these is not null [n]."""
    present = np.zeros(n, bool)
    for column in columns:
        present |= np.asarray(column.is_valid())
    return present


# -- columns of one type -------------------------------------------------------------------------


def _require(
    name: str, column: pa.Array, accepts: Callable[[pa.DataType], bool], expected: str
) -> pa.Array:
    if not (accepts(column.type) or pa.types.is_null(column.type)):
        raise Refused(
            "wrong_type",
            f"column {one_line(name, 80)} must be {expected}, got {one_line(column.type, 80)}",
        )
    return column


def _require_room(needed: int, most: int) -> None:
    if needed > most:
        raise Refused("too_large", f"{needed} bytes once it is unfolded, more than {most}")


def _is_plain_text(type: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type)
    )


def _is_text(type: pa.DataType) -> bool:
    return _is_plain_text(type.value_type if pa.types.is_dictionary(type) else type)


def _is_category(type: pa.DataType) -> bool:
    type = type.value_type if pa.types.is_dictionary(type) else type
    return bool(_is_plain_text(type) or pa.types.is_integer(type) or pa.types.is_boolean(type))


def _is_time(type: pa.DataType) -> bool:
    return bool(pa.types.is_int64(type) or pa.types.is_timestamp(type))


def _is_number(type: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(type) or pa.types.is_floating(type) or pa.types.is_decimal(type)
    )


def _numbers(name: str, column: pa.Array | None, n: int) -> pa.DoubleArray:
    """As float64, null where they are not finite."""
    if column is None:
        return pa.nulls(n, pa.float64())
    numbers = _require(name, column, _is_number, "a number").cast(pa.float64(), safe=False)
    finite = pc.is_finite(numbers)
    return numbers if pc.all(finite, min_count=0).as_py() else pc.if_else(finite, numbers, None)


def _categories(name: str, column: pa.Array | None, n: int) -> pa.Array:
    """As strings, or a dictionary of int32 and strings where it is one."""
    if column is None:
        return pa.nulls(n, pa.string())
    _require(name, column, _is_category, "a string, an integer or a boolean")
    if not pa.types.is_dictionary(column.type):
        return column.cast(pa.string())
    words, indices = column.dictionary.cast(pa.string()), column.indices.cast(pa.int32())
    if words.null_count:
        words, indices = (
            pc.fill_null(words, ""),
            pc.if_else(words.is_valid().take(indices), indices, None),
        )
    return pa.DictionaryArray.from_arrays(indices, words)


def feature_types(batch: pa.RecordBatch) -> tuple[int, dict[str, dict[type, int]]]:
    """How many impressions there are in a batch that was read, and of each feature how many values of which Python type."""
    columns = _Columns(pa.Table.from_batches([batch]))
    impressions = columns.kind()[0] == IMPRESSION
    _, members = columns.features()
    found: dict[str, dict[type, int]] = {}
    for name, member in members.items():
        count = int(np.count_nonzero(impressions & np.asarray(member.is_valid())))
        if count and (_is_category(member.type) or _is_number(member.type)):
            number = _is_number(member.type)
            found[name] = {(float if number else str): count}
    return int(np.count_nonzero(impressions)), found


# -- back to bytes -------------------------------------------------------------------------------


def one_event(batches: Sequence[pa.RecordBatch], within: int) -> bytes:
    """A record of the one event at this place in a record. Raises `Refused` where Arrow cannot write what else is there."""
    for batch in batches:
        if within < len(batch):
            break
        within -= len(batch)
    row = batch.slice(within, 1)
    try:
        return _stream(
            pa.RecordBatch.from_arrays([_alone(column) for column in row.columns], row.schema.names)
        )
    except MemoryError:  # Arrow's is an ArrowException too
        raise
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise Refused("not_arrow", one_line(error)) from None


def _alone(value: pa.Array) -> pa.Array:
    """An array of one value without what else it was stored with: the words of its dictionary, the bytes of other strings."""
    if pa.types.is_struct(value.type):
        names = [value.type.field(index).name for index in range(value.type.num_fields)]
        members = [_alone(member) for member in value.flatten()]
        mask = pa.array([not value.is_valid()[0].as_py()])
        return pa.StructArray.from_arrays(members, names, mask=mask) if members else value
    if pa.types.is_dictionary(value.type):
        index = value.indices[0].as_py()
        return (
            pa.nulls(1, value.type.value_type)
            if index is None
            else _alone(value.dictionary.slice(index, 1))
        )
    return value.cast(pa.large_string()) if pa.types.is_string_view(value.type) else value


def pack(values: pa.LargeBinaryArray, *, events_a_record: int) -> pa.LargeBinaryArray:
    """JSON events -> Arrow records of at most so many of them, in order. What does not fit into columns with its neighbours, or is no
    event, is a record of its own, as it is.

    A column has one type: whole numbers become fractions beside a fraction in the same feature. A numeric field has the same values then; a
    categorical one, which takes no fraction, refuses the record and not the one event.

    >>> event = b'{"kind":"click","impression_id":"a","time":1735689600000}'
    >>> [record[:4] for record in pack(pa.array([event, event, b"oops"], pa.large_binary()), events_a_record=2).to_pylist()]
    [b'\\xff\\xff\\xff\\xff', b'oops']
    """
    packed: list[bytes] = []
    lines = values.to_pylist()
    for first in range(0, len(lines), events_a_record):
        _pack(lines[first : first + events_a_record], packed)
    return pa.array(packed, pa.large_binary())


def _pack(values: Sequence[bytes], packed: list[bytes]) -> None:
    try:
        packed.append(_record_of(values))
    except (ValueError, TypeError, OverflowError):  # Arrow's and msgspec's among them
        if len(values) == 1:
            packed += values
        else:
            half = len(values) // 2
            _pack(values[:half], packed)
            _pack(values[half:], packed)


def _record_of(values: Sequence[bytes]) -> bytes:
    """Raises when one of these is no event, or has another type where another one has this type."""
    events = msgspec.json.decode(b"[" + b",".join(values) + b"]", type=list[_Event])
    if len(events) != len(values):
        raise ValueError("two in one line")
    time = pa.array([event.time for event in events])
    columns = {
        "kind": pa.array([event.kind for event in events]),
        "impression_id": pa.array([event.impression_id for event in events]),
        "time": epoch_ms(time),
        "features": pa.array([event.features for event in events]),
        "true_probability": pa.array([event.true_probability for event in events], pa.float64()),
    }
    record = _stream(pa.RecordBatch.from_pydict(columns))
    if len(record) > _LARGEST_PACKED:
        raise ValueError("too large for one record")
    return record


class _Event(msgspec.Struct):
    """What fits into columns. Members that nobody reads are left out."""

    kind: Literal["impression", "click"]
    impression_id: str
    time: int | str
    features: dict[str, str | int | float | bool | None] | None = None
    true_probability: float | None = None


def _stream(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())
