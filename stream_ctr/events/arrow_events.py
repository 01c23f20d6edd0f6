"""Events in columns, many a record: the value of a record is an Arrow IPC stream.

The stream has these columns:

    kind              string                       impression, click or example
    impression_id     string, or any integer
    time              int64 epoch milliseconds, or a timestamp of any unit, rounded down to
                      milliseconds (UTC unless it names a zone)
    label             boolean, or any number       0 or 1 for examples; not read for other kinds
    features          struct, a member a field     null for clicks; a categorical field is text,
                                                   integer or boolean, a numeric field is a number
    true_probability  any number                   optional

A string may be `string`, `large_string`, `string_view`, or a dictionary of one of them. Categorical
integers and booleans may come as a dictionary too. A column of type null is missing everywhere. NaN
and infinities are missing. The last of several columns or members of one name counts. Other columns
and members are accepted and counted.

A record is rejected as a whole when it is not a complete Arrow IPC stream, when a column is absent,
or when a column has another type.
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
from stream_ctr.events.arrow_columns import Buffers, buffers_of, byte_spans
from stream_ctr.events.field import Field
from stream_ctr.events.ipc_frames import MARKER
from stream_ctr.events.parsed_events import (
    EXAMPLE,
    IMPRESSION,
    UNKNOWN_KIND,
    InvalidRecord,
    ParsedEvents,
    Rejection,
    kind_codes,
)
from stream_ctr.events.times import DETECTED, TimeFormat
from stream_ctr.messages import one_line

MOST_EVENTS = 1 << 20
"""The most events of a record: their order within it has 20 bits."""

# What a record may take once it is unfolded: this many times `max_record_bytes`, and this many
# times its own size, because one poll brings many small records. A record of good events that
# compress well takes about 40 times its size, a record made to exhaust memory takes thousands.
_UNFOLDED_TO_LIMIT = 16
_UNFOLDED_TO_SIZE = 64
_LEAST_ROOM_BYTES = 1 << 17  # any record may take this much
_MOST_ROOM_BYTES = 1 << 29  # with those before it in a poll, below the 2 GiB of a column of texts
_EVENT_BYTES = 100  # of a parsed event, even one whose columns take next to no space
_BLOCK_BYTES = 64 << 20
_SHOWN_CHARACTERS = 100  # of an unknown kind
_LARGEST_PACKED_BYTES = 900_000  # by default, brokers and clients accept a megabyte
_VIEW_WORDS = 4  # a view of a string is four int32; the first is the length of the string
_INT32_BYTES = 4
_READ_OPTIONS = pa.ipc.IpcReadOptions(
    use_threads=False, ensure_alignment=pa.ipc.Alignment.DataTypeSpecific
)
Mask = npt.NDArray[np.bool_]
Chunks = Sequence[pa.Array]  # the column of each batch


def is_arrow(values: pa.LargeBinaryArray) -> Mask:
    """Return which records begin with the marker of an Arrow IPC stream [n].

    >>> values = [b"{}", b"\\xff\\xff\\xff\\xff...", b"", None]
    >>> is_arrow(pa.array(values, pa.large_binary())).tolist()
    [False, True, False, False]
    """
    data, start, size = byte_spans(values)
    found = np.zeros(len(values), np.bool_)
    indices = np.flatnonzero(size >= len(MARKER))
    found[indices] = data[start[indices]] == MARKER[0]  # cheap, and False for all JSON
    indices = np.flatnonzero(found)
    beginnings = data[start[indices, None] + np.arange(len(MARKER))]
    found[indices] = (beginnings == np.frombuffer(MARKER, np.uint8)).all(axis=1)
    return found


# -- untrusted streams ---------------------------------------------------------------------------


def read_batches(value: pa.Buffer, *, max_record_bytes: int) -> list[pa.RecordBatch]:
    """Return the batches of an untrusted IPC stream, with every offset, index and text validated.

    Raises `InvalidRecord` when the bytes are not such a stream, or when it has too many rows or
    takes too much memory once it is unfolded: more than 16 times `max_record_bytes`, more than both
    64 times its own size and 128 KiB, or more than 512 MiB. That counts what Arrow allocates to
    read it (`ipc_frames.sizes`, before anything is read), the texts that it holds once and that
    occur often, and 100 bytes an event. Beside this, an event takes 8 bytes a field.
    """
    if value.size > max_record_bytes:
        raise InvalidRecord("too_large", f"{value.size} bytes, more than {max_record_bytes}")
    try:
        declared = ipc_frames.sizes(memoryview(value))
        if declared.rows > MOST_EVENTS:
            raise InvalidRecord(
                "too_many_events", f"{declared.rows} events, more than {MOST_EVENTS}"
            )
        most = max(_LEAST_ROOM_BYTES, _UNFOLDED_TO_SIZE * value.size)
        room = min(_UNFOLDED_TO_LIMIT * max_record_bytes, most, _MOST_ROOM_BYTES)
        needed = _EVENT_BYTES * declared.rows + declared.bytes
        _require_room(needed, room)
        with pa.ipc.open_stream(value, options=_READ_OPTIONS) as reader:
            _require_text_names(reader.schema)
            batches = list(reader)
        for batch in batches:
            batch.validate(full=True)
        _require_room(needed + _repeated_text_bytes(batches), room)
    except MemoryError:  # Arrow's is an ArrowException too, but no fault of the record
        raise
    except (ipc_frames.DamagedStream, pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InvalidRecord("not_arrow", one_line(error)) from None
    return batches


def _require_room(needed: int, room: int) -> None:
    if needed > room:
        raise InvalidRecord("too_large", f"{needed} bytes once unfolded, more than {room}")


def _require_text_names(columns: Iterable[pa.Field]) -> None:
    """Raises `UnicodeDecodeError` when a name is not UTF-8. Printing it later would raise it."""
    for column in columns:
        _ = column.name
        _require_text_names(column.type.field(index) for index in range(column.type.num_fields))


def _repeated_text_bytes(batches: Sequence[pa.RecordBatch]) -> int:
    """Return the bytes of texts that are stored once and may occur often: views, and ids in a
    dictionary."""
    total = 0
    unfolded: set[tuple[str, Buffers]] = set()  # the dictionaries of each column
    for batch in batches:
        columns = list(zip(batch.schema.names, batch.columns, strict=True))
        while columns:
            name, column = columns.pop()
            if pa.types.is_struct(column.type):
                columns += [
                    (f"{name}.{index}", column.field(index))
                    for index in range(column.type.num_fields)
                ]
            elif pa.types.is_string_view(column.type):
                total += int(_text_bytes(column).sum())
            elif pa.types.is_dictionary(column.type) and _is_text(column.type):
                if name == "impression_id":
                    indices = column.indices.drop_null().to_numpy()
                    total += int(_text_bytes(column.dictionary)[indices].sum())
                place = name, buffers_of(column.dictionary)
                if pa.types.is_string_view(column.type.value_type) and place not in unfolded:
                    unfolded.add(place)
                    total += int(_text_bytes(column.dictionary).sum())
    return total


def _text_bytes(texts: pa.Array) -> npt.NDArray[np.int64]:
    """Return the bytes of each text, 0 where it is missing [n]."""
    if not pa.types.is_string_view(texts.type):
        return pc.fill_null(pc.binary_length(texts), 0).to_numpy().astype(np.int64)
    views = texts.buffers()[1]
    if not len(texts) or views is None:
        return np.zeros(len(texts), np.int64)
    words = np.frombuffer(
        views, np.int32, _VIEW_WORDS * len(texts), texts.offset * _VIEW_WORDS * _INT32_BYTES
    )
    return np.where(texts.is_valid(), words[::_VIEW_WORDS], 0).astype(np.int64)


# -- columns to events ---------------------------------------------------------------------------


class ArrowReader:
    """Read Arrow records into `ParsedEvents` with the given fields."""

    def __init__(self, fields: Sequence[Field], *, time_format: TimeFormat = DETECTED) -> None:
        self.fields = tuple(fields)
        self.time_format = time_format

    def read(
        self, streams: Mapping[int, Sequence[pa.RecordBatch]]
    ) -> tuple[list[ParsedEvents], list[Rejection]]:
        """Read the batches of the record at each row.

        A record in which a column is absent or has a wrong type is rejected.
        """
        parts: list[ParsedEvents] = []
        rejections: list[Rejection] = []
        records = _records(streams)
        for _, group in itertools.groupby(records, lambda record: (record.schema, record.block)):
            self._read(list(group), parts, rejections)
        return parts, rejections

    def _read(
        self, records: Sequence[_Record], parts: list[ParsedEvents], rejections: list[Rejection]
    ) -> None:
        """Read records of one schema together, which is faster. If that fails, halve them."""
        try:
            parts.append(self._parse(records))
        except MemoryError:  # Arrow's is an ArrowException too
            raise
        except (InvalidRecord, pa.ArrowException, UnicodeDecodeError) as error:
            if half := len(records) // 2:
                self._read(records[:half], parts, rejections)
                self._read(records[half:], parts, rejections)
            else:
                reason = error.reason if isinstance(error, InvalidRecord) else "not_arrow"
                message = error.message if isinstance(error, InvalidRecord) else one_line(error)
                rejections.append(Rejection(records[0].row, reason, message))

    def _parse(self, records: Sequence[_Record]) -> ParsedEvents:
        columns = _Columns([batch for record in records for batch in record.batches])
        sizes = [sum(map(len, record.batches)) for record in records]
        n = sum(sizes)
        kind, kind_text = columns.kind()
        impression_id = columns.impression_id()
        time, has_time = columns.time(self.time_format)
        label, has_unread_label = columns.label(kind == EXAMPLE)
        has_features = columns.has_features()
        features = {
            field.name: feature_column(field, columns.feature(field.name), n)
            for field in self.fields
        }
        true_probability = columns.true_probability().to_numpy(zero_copy_only=False)
        return ParsedEvents(
            row=np.repeat([record.row for record in records], sizes),
            within=np.concatenate([np.arange(size) for size in sizes]),
            kind=kind,
            kind_text=kind_text,
            impression_id=impression_id,
            time=time,
            has_time=has_time,
            has_features=has_features,
            label=label,
            true_probability=true_probability,
            features=features,
            has_unknown_fields=(
                columns.any_unread()
                | has_unread_label
                | (columns.any_unread_feature() & has_features)
            ),
        )


class _Record(NamedTuple):
    """The batches of the record at `row`, none of them empty.

    Records of one `block` are small enough to be read together.
    """

    row: int
    batches: Sequence[pa.RecordBatch]
    block: int

    @property
    def schema(self) -> pa.Schema:
        return self.batches[0].schema


def _records(streams: Mapping[int, Sequence[pa.RecordBatch]]) -> Iterator[_Record]:
    """Yield the records that hold an event."""
    total_bytes = 0
    for row, batches in streams.items():
        total_bytes += sum(batch.get_total_buffer_size() for batch in batches)
        if filled := [batch for batch in batches if len(batch)]:
            yield _Record(row, filled, total_bytes // _BLOCK_BYTES)


class _Columns:
    """The columns of batches of one schema by their meaning, n events in all.

    Each method takes its column from `_unread`. The columns that are left in the end are only asked
    which of their values are null: they are of any type, and not every type can be joined.
    """

    def __init__(self, batches: Sequence[pa.RecordBatch]) -> None:
        schema = batches[0].schema
        columns = [[batch.column(index) for batch in batches] for index in range(len(schema))]
        self._n = sum(map(len, batches))
        self._unread, self._replaced = _last_by_name(schema, columns)
        self._unread_features: dict[str, Chunks] = {}
        self._replaced_features: list[Chunks] = []

    def kind(self) -> tuple[npt.NDArray[np.int8], pa.StringArray]:
        """Return the codes of kinds, and the beginning of the text where the kind is unknown."""
        kind = self._required("kind", _is_text, "a string")
        if not pa.types.is_dictionary(kind.type):
            texts = kind.cast(pa.string())
            return kind_codes(texts), texts
        words = kind.dictionary.cast(pa.string())
        code_of_word = np.append(kind_codes(words), np.int8(UNKNOWN_KIND))  # the last: null
        codes = code_of_word[np.asarray(pc.fill_null(kind.indices.cast(pa.int64()), -1))]
        unknown = pc.if_else(pa.array(codes == UNKNOWN_KIND), kind.indices, None)
        return codes, pc.utf8_slice_codeunits(words, 0, _SHOWN_CHARACTERS).take(unknown)

    def impression_id(self) -> pa.StringArray:
        column = self._required("impression_id", _is_id, "a string or an integer")
        if not pa.types.is_dictionary(column.type):
            return column.cast(pa.string())
        return column.dictionary.cast(pa.string()).take(column.indices)

    def time(self, time_format: TimeFormat) -> tuple[npt.NDArray[np.int64], Mask]:
        """Return epoch milliseconds, and which events have a time."""
        time = self._required("time", _is_time, "int64 or a timestamp")
        if pa.types.is_null(time.type):
            return np.zeros(len(time), np.int64), np.zeros(len(time), bool)
        ms = pc.fill_null(time_format.epoch_ms(time), 0)
        return ms.to_numpy(zero_copy_only=False), np.asarray(time.is_valid())

    def label(self, is_example: Mask) -> tuple[npt.NDArray[np.float64], Mask]:
        """Return the labels of examples, NaN where missing, and which other events have one."""
        chunks = self._unread.pop("label", None)
        if chunks is None:
            return np.full(self._n, np.nan), np.zeros(self._n, bool)
        has_unread = _any_present([chunks], self._n) & ~is_example
        if not is_example.any():
            return np.full(self._n, np.nan), has_unread
        column = _joined(chunks)
        if pa.types.is_boolean(column.type):
            column = column.cast(pa.int8())
        label = _numbers("label", column, self._n).to_numpy(zero_copy_only=False)
        return np.where(is_example, label, np.nan), has_unread

    def has_features(self) -> Mask:
        """Return which events have features, which `feature` can take from now on."""
        chunks = self._unread.pop("features", None)
        if chunks is None or pa.types.is_null(chunks[0].type):
            return np.zeros(self._n, bool)
        type = chunks[0].type
        _require_type("features", type, pa.types.is_struct, "a struct")
        members = [[chunk.field(index) for chunk in chunks] for index in range(type.num_fields)]
        self._unread_features, self._replaced_features = _last_by_name(type, members)
        return _any_present([chunks], self._n)

    def feature(self, name: str) -> pa.Array | None:
        """Return the feature of this name, if there is one."""
        chunks = self._unread_features.pop(name, None)
        return None if chunks is None else _joined(chunks)

    def unread_features(self) -> Mapping[str, Chunks]:
        """Return the features that were not taken, by name."""
        return self._unread_features

    def true_probability(self) -> pa.DoubleArray:
        chunks = self._unread.pop("true_probability", None)
        return _numbers("true_probability", None if chunks is None else _joined(chunks), self._n)

    def any_unread(self) -> Mask:
        """Return the events with a value in a column that no method has taken."""
        return _any_present([*self._unread.values(), *self._replaced], self._n)

    def any_unread_feature(self) -> Mask:
        """Return the events with a value in a feature that was not taken."""
        return _any_present([*self._unread_features.values(), *self._replaced_features], self._n)

    def _required(
        self, name: str, accepts: Callable[[pa.DataType], bool], expected: str
    ) -> pa.Array:
        if name not in self._unread:
            raise InvalidRecord("missing_column", f"there is no column {name}")
        chunks = self._unread.pop(name)
        _require_type(name, chunks[0].type, accepts, expected)
        return _joined(chunks)


def _last_by_name(
    named: pa.Schema | pa.StructType, columns: Sequence[Chunks]
) -> tuple[dict[str, Chunks], list[Chunks]]:
    """Return the last column of each name, and all other columns."""
    names = [field.name for field in named]
    last = {name: index for index, name in enumerate(names)}
    replaced = [column for index, column in enumerate(columns) if last[names[index]] != index]
    return {name: columns[index] for name, index in last.items()}, replaced


def _any_present(columns: Iterable[Chunks], n: int) -> Mask:
    """Return the rows in which any of these columns is not null [n]."""
    present = np.zeros(n, bool)
    for chunks in columns:
        present |= np.concatenate([np.asarray(chunk.is_valid()) for chunk in chunks])
    return present


def _joined(chunks: Chunks) -> pa.Array:
    """Return the chunks of a column as one array.

    Words of dictionaries become text before they are joined, each distinct dictionary once: Arrow
    joins no dictionaries of other words, and each of many batches would unfold its own.
    """
    if len(chunks) == 1:
        return chunks[0]
    if pa.types.is_dictionary(chunks[0].type):
        known: dict[Buffers, _Words] = {}
        chunks = [_with_text_words(chunk, known) for chunk in chunks]
    return pa.concat_arrays(chunks)


class _Words(NamedTuple):
    """The words of a dictionary as text, and which of them are not null, None if all are."""

    texts: pa.StringArray
    present: pa.BooleanArray | None

    @classmethod
    def of(cls, dictionary: pa.Array) -> _Words:
        texts = dictionary.cast(pa.string())
        if not texts.null_count:
            return cls(texts, None)
        return cls(pc.fill_null(texts, ""), texts.is_valid())


def _with_text_words(
    column: pa.DictionaryArray, known: dict[Buffers, _Words] | None = None
) -> pa.DictionaryArray:
    """Return a dictionary of strings with int32 indices; an index of a null becomes null.

    `known` has the words of dictionaries by their buffers.
    """
    known = {} if known is None else known
    place = buffers_of(column.dictionary)
    if place not in known:
        known[place] = _Words.of(column.dictionary)
    words = known[place]
    indices = column.indices.cast(pa.int32())
    if words.present is not None:
        indices = pc.if_else(words.present.take(indices), indices, None)
    return pa.DictionaryArray.from_arrays(indices, words.texts)


def feature_types(batch: pa.RecordBatch) -> tuple[int, dict[str, dict[type, int]]]:
    """Return the number of impressions in a batch, and of their features by name and Python type.

    Examples are impressions, too.

    Raises `InvalidRecord` when the batch does not hold events.

    >>> columns = {"kind": ["impression"], "features": [{"app": "maps", "age": 31}]}
    >>> feature_types(pa.RecordBatch.from_pydict(columns))
    (1, {'app': {<class 'str'>: 1}, 'age': {<class 'float'>: 1}})
    """
    columns = _Columns([batch])
    impressions = np.isin(columns.kind()[0], (IMPRESSION, EXAMPLE))
    columns.has_features()
    found: dict[str, dict[type, int]] = {}
    for name, (member,) in columns.unread_features().items():
        count = int(np.count_nonzero(impressions & np.asarray(member.is_valid())))
        if count and (_is_category(member.type) or _is_number(member.type)):
            found[name] = {(float if _is_number(member.type) else str): count}
    return int(np.count_nonzero(impressions)), found


# -- columns of one type -------------------------------------------------------------------------


def _require_type(
    name: str, type: pa.DataType, accepts: Callable[[pa.DataType], bool], expected: str
) -> None:
    if not (accepts(type) or pa.types.is_null(type)):
        raise InvalidRecord(
            "wrong_type",
            f"column {one_line(name, 80)} must be {expected}, got {one_line(type, 80)}",
        )


def _is_plain_text(type: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type)
    )


def _is_text(type: pa.DataType) -> bool:
    return _is_plain_text(type.value_type if pa.types.is_dictionary(type) else type)


def _is_id(type: pa.DataType) -> bool:
    type = type.value_type if pa.types.is_dictionary(type) else type
    return bool(_is_plain_text(type) or pa.types.is_integer(type))


def _is_category(type: pa.DataType) -> bool:
    type = type.value_type if pa.types.is_dictionary(type) else type
    return bool(_is_plain_text(type) or pa.types.is_integer(type) or pa.types.is_boolean(type))


def _is_time(type: pa.DataType) -> bool:
    return bool(pa.types.is_int64(type) or pa.types.is_timestamp(type))


def _is_number(type: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(type) or pa.types.is_floating(type) or pa.types.is_decimal(type)
    )


def feature_column(field: Field, column: pa.Array | None, n: int) -> pa.Array:
    """Return a column of features as text or float64 [n]; None is missing everywhere.

    Raises `InvalidRecord` when the field does not take the column's type.

    >>> feature_column(Field("age", "numeric"), pa.array([1, None]), 2).to_pylist()
    [1.0, None]
    """
    if field.kind == "numeric":
        return _numbers(field.name, column, n)
    return _categories(field.name, column, n)


def _numbers(name: str, column: pa.Array | None, n: int) -> pa.DoubleArray:
    """Return float64, null where a number is not finite [n]."""
    if column is None:
        return pa.nulls(n, pa.float64())
    _require_type(name, column.type, _is_number, "a number")
    numbers = column.cast(pa.float64(), safe=False)
    finite = pc.is_finite(numbers)
    return numbers if pc.all(finite, min_count=0).as_py() else pc.if_else(finite, numbers, None)


def _categories(name: str, column: pa.Array | None, n: int) -> pa.Array:
    """Return strings or, for a dictionary, a dictionary of strings with int32 indices [n]."""
    if column is None:
        return pa.nulls(n, pa.string())
    _require_type(name, column.type, _is_category, "a string, an integer or a boolean")
    if not pa.types.is_dictionary(column.type):
        return column.cast(pa.string())
    return _with_text_words(column)


# -- events to records ---------------------------------------------------------------------------


def one_event(batches: Sequence[pa.RecordBatch], within: int) -> bytes:
    """Return a record that holds only the event at index `within` of these batches.

    Raises `InvalidRecord` when Arrow cannot write another column of the event.
    """
    for batch in batches:
        if within < len(batch):
            break
        within -= len(batch)
    event = batch.slice(within, 1)
    try:
        columns = [_compact(column) for column in event.columns]
        return _write_stream(pa.RecordBatch.from_arrays(columns, event.schema.names))
    except MemoryError:  # Arrow's is an ArrowException too
        raise
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InvalidRecord("not_arrow", one_line(error)) from None


def _compact(value: pa.Array) -> pa.Array:
    """Return an array of one value without the other values that share its buffers."""
    if pa.types.is_struct(value.type):
        names = [value.type.field(index).name for index in range(value.type.num_fields)]
        members = [_compact(member) for member in value.flatten()]
        mask = pa.array([not value.is_valid()[0].as_py()])
        return pa.StructArray.from_arrays(members, names, mask=mask) if members else value
    if pa.types.is_dictionary(value.type):
        index = value.indices[0].as_py()
        if index is None:
            return pa.nulls(1, value.type.value_type)
        return _compact(value.dictionary.slice(index, 1))
    return value.cast(pa.large_string()) if pa.types.is_string_view(value.type) else value


def pack(values: pa.LargeBinaryArray, *, events_a_record: int) -> pa.LargeBinaryArray:
    """Pack JSON events into Arrow records of at most `events_a_record` events, in order.

    A record that is not an event, or that does not fit into columns with its neighbours, stays as
    it is.

    A column has one type, so integers become floats when the same feature also has a fraction. The
    values of a numeric field stay the same. A categorical field takes no fractions, so the decoder
    rejects the whole Arrow record where it would reject one JSON event.

    >>> event = b'{"kind":"click","impression_id":"a","time":1735689600000}'
    >>> packed = pack(pa.array([event, event, b"oops"], pa.large_binary()), events_a_record=2)
    >>> [record[:4] for record in packed.to_pylist()]
    [b'\\xff\\xff\\xff\\xff', b'oops']
    """
    packed: list[bytes] = []
    lines = values.to_pylist()
    for first in range(0, len(lines), events_a_record):
        packed += _pack(lines[first : first + events_a_record])
    return pa.array(packed, pa.large_binary())


def _pack(lines: Sequence[bytes]) -> Sequence[bytes]:
    """Return the lines as one Arrow record. If they do not fit together, halve them."""
    try:
        return [_pack_together(lines)]
    except (ValueError, TypeError, OverflowError):  # including those of Arrow and msgspec
        if len(lines) == 1:
            return lines
        half = len(lines) // 2
        return [*_pack(lines[:half]), *_pack(lines[half:])]


def _pack_together(lines: Sequence[bytes]) -> bytes:
    """Raises an error when a line is not an event, or has another type than its neighbours."""
    events = msgspec.json.decode(b"[" + b",".join(lines) + b"]", type=list[_Event])
    if len(events) != len(lines):
        raise ValueError("a line holds several events")
    columns = {
        "kind": pa.array([event.kind for event in events]),
        "impression_id": pa.array([str(event.impression_id) for event in events]),
        "time": DETECTED.epoch_ms(pa.array([event.time for event in events])),
        "label": pa.array([event.label for event in events]),
        "features": pa.array([event.features for event in events]),
        "true_probability": pa.array([event.true_probability for event in events], pa.float64()),
    }
    record = _write_stream(pa.RecordBatch.from_pydict(columns))
    if len(record) > _LARGEST_PACKED_BYTES:
        raise ValueError("too large for one record")
    return record


class _Event(msgspec.Struct):
    """The members that fit into columns. All others are left out."""

    kind: Literal["impression", "click", "example"]
    impression_id: str | int
    time: int | str
    label: int | bool | None = None
    features: dict[str, str | int | float | bool | None] | None = None
    true_probability: float | None = None


def _write_stream(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())
