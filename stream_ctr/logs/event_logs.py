"""Logs of events: JSON lines as on the wire, or the same in the columns of a Parquet or Arrow file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet

from stream_ctr.errors import DataError
from stream_ctr.events.arrow_columns import epoch_ms, mask, one_array
from stream_ctr.events.decoder import EARLIEST_MS, LATEST_MS, Decoder
from stream_ctr.events.field import Field
from stream_ctr.events.json_events import encode_clicks, encode_impressions
from stream_ctr.logs.log import BATCH_ROWS, Log, LogBatch, in_time_order
from stream_ctr.logs.rows import Rows
from stream_ctr.logs.text_log import TextLog
from stream_ctr.messages import one_line

_ARROW_FILE = b"ARROW1\0\0"
MAGIC: Mapping[bytes, str] = {
    b"PAR1": "parquet",
    _ARROW_FILE: "arrow",
    b"\xff\xff\xff\xff": "arrow",
}
"""The first bytes of the formats that are no text; an Arrow stream begins with the marker of its first message."""


class EventLog(TextLog):
    """JSON lines. Each line passes through byte for byte, also one that is no event: whoever decodes it shall see it and set it aside.

    A line whose time cannot be read takes the time of the line before. Lines out of order are sorted as far as a bounded buffer reaches.
    """

    format = "events"

    def __init__(self, path: Path) -> None:
        super().__init__(path, None)

    def _read(self) -> Iterator[LogBatch]:
        return map(_event_batch, in_time_order(self._events()))

    def _events(self) -> Iterator[pa.RecordBatch]:
        decoder = Decoder(())
        before = 0
        for _, data in self.line_blocks():
            value = _lines(data)
            if len(value):
                batch = _timed(decoder, value, before)
                before = batch["time"][-1].as_py()
                yield batch


def _lines(data: bytes) -> pa.LargeBinaryArray:
    """The lines of a block that are not empty, without their ends (LF or CRLF).

    >>> _lines(b"a\\n\\nbc\\r\\n").to_pylist()
    [b'a', b'bc']
    """
    text = np.frombuffer(data, np.uint8)
    newlines = np.flatnonzero(text == ord("\n"))
    starts = np.concatenate([[0], newlines[:-1] + 1])
    ends = newlines - ((newlines > starts) & (text[newlines - 1] == ord("\r")))
    # Line, its end, next line, ...: one array over the bytes as they are, of which the even elements are taken.
    offsets = np.append(np.stack([starts, ends], 1).ravel(), len(text))
    pieces = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(offsets) - 1, [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    )
    return pieces.take(pa.array(2 * np.flatnonzero(ends > starts)))


def _timed(decoder: Decoder, value: pa.LargeBinaryArray, before: int) -> pa.RecordBatch:
    """time, key, value of n lines: time and key as decoded, else the time of the line before and no key."""
    events, _ = decoder.decode(value)
    both = (events.impressions, events.clicks)
    row = np.concatenate([part.row for part in both])
    source = np.full(len(value), -1)
    source[row] = np.arange(len(row))
    known = source >= 0
    key = (
        pa.concat_arrays([part.impression_id for part in both])
        .cast(pa.large_binary())
        .take(pa.array(source, mask=~known))
    )
    latest_known = np.maximum.accumulate(np.where(known, np.arange(len(value)), -1))
    times = np.append(np.concatenate([part.time for part in both]), before)
    time = times[np.where(latest_known >= 0, source[latest_known], -1)]
    return pa.RecordBatch.from_pydict({"time": pa.array(time), "key": key, "value": value})


def _event_batch(batch: pa.RecordBatch) -> LogBatch:
    return LogBatch(batch["time"].to_numpy(), batch["key"], batch["value"])


class _ColumnLog(Log):
    """Events in columns. Features are a struct `features`, or all columns that are nothing else. Numbers are numeric fields, text,
    booleans and unsigned 64-bit integers categorical; NaN and infinities, which JSON lacks, are missing.
    """

    path: Path

    def __init__(self, path: Path) -> None:
        try:
            schema = self._schema(path)
            _require_names_once(schema)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is no {self.format} file: {one_line(error)}") from None
        for name, accepted in _EVENT_COLUMNS.items():
            if name not in schema.names or not any(
                accepts(schema.field(name).type) for accepts in accepted
            ):
                what = (
                    f"column {name} is {one_line(schema.field(name).type)}"
                    if name in schema.names
                    else f"there is no column {name}"
                )
                raise DataError(
                    f"{path} holds no events: {what}; needed are kind and impression_id as text, time as milliseconds or timestamp"
                )
        self.nested = "features" in schema.names
        columns = [
            column for column in schema if column.name not in (*_EVENT_COLUMNS, "true_probability")
        ]
        if self.nested:
            columns = _members(path, schema.field("features"))
        if "true_probability" in schema.names and not _is_number(
            schema.field("true_probability").type
        ):
            raise DataError(
                f"{path}: column true_probability is {one_line(schema.field('true_probability').type)}, not a number"
            )
        super().__init__(path, tuple(_column_field(path, column) for column in columns))

    def _schema(self, path: Path) -> pa.Schema:
        raise NotImplementedError

    def _record_batches(self) -> Iterator[pa.RecordBatch]:
        raise NotImplementedError

    def _read(self) -> Iterator[LogBatch]:
        return map(_event_batch, in_time_order(self._events()))

    def _events(self) -> Iterator[pa.RecordBatch]:
        first = 1
        try:
            for batch in self._record_batches():
                rows = Rows(
                    np.arange(first, first + len(batch)),
                    pa.Table.from_batches([batch]),
                    self.rejected,
                )
                yield self._encoded(rows.sound())
                first += len(batch)
        except (pa.ArrowException, OSError) as error:
            self.rejected.add(first, f"the rest cannot be read: {one_line(error)}")

    def _encoded(self, rows: Rows) -> pa.RecordBatch:
        rows = rows.parsed(
            "time", epoch_ms, "epoch milliseconds, a timestamp or RFC 3339"
        ).identified("impression_id")
        in_range = pc.and_(
            pc.greater_equal(rows.columns["time"], EARLIEST_MS),
            pc.less(rows.columns["time"], LATEST_MS),
        )
        rows = rows.only(mask(in_range), "time", "between 1973 and 2100 in milliseconds")
        rows = rows.parsed("kind", _text, "text").parsed("impression_id", _text, "text")
        rows = rows.only(
            mask(pc.is_in(rows.columns["kind"], pa.array(["impression", "click"]))),
            "kind",
            "impression or click",
        )
        impression = rows.equal("kind", "impression")
        order = pa.array(np.argsort(np.argsort(~impression, kind="stable")))
        shown, clicked = (
            rows.columns.filter(pa.array(impression)),
            rows.columns.filter(pa.array(~impression)),
        )
        value = pa.concat_arrays([self._impressions(shown), _clicks(clicked)]).take(order)
        key = one_array(rows.columns["impression_id"]).cast(pa.large_binary())
        return pa.RecordBatch.from_pydict(
            {"time": one_array(rows.columns["time"]), "key": key, "value": value}
        )

    def _impressions(self, table: pa.Table) -> pa.LargeBinaryArray:
        known = "true_probability" in table.column_names
        probability = table["true_probability"].cast(pa.float64()).to_numpy() if known else None
        return encode_impressions(
            one_array(table["impression_id"]),
            table["time"].to_numpy(),
            self._features(table),
            probability,
        )

    def _features(self, table: pa.Table) -> dict[str, pa.Array]:
        names = [field.name for field in self.fields or ()]
        features = one_array(table["features"]) if self.nested else None
        return {
            name: _feature(
                one_array(table[name]) if features is None else pc.struct_field(features, [i])
            )
            for i, name in enumerate(names)
        }


def _clicks(table: pa.Table) -> pa.LargeBinaryArray:
    return encode_clicks(one_array(table["impression_id"]), table["time"].to_numpy())


def _feature(column: pa.Array) -> pa.Array:
    if column.type == pa.uint64():
        return column.cast(pa.string())
    return column.cast(pa.float64()) if pa.types.is_floating(column.type) else column


def _text(column: pa.Array) -> pa.Array:
    return column.cast(pa.string())


def _members(path: Path, features: pa.Field) -> list[pa.Field]:
    if not pa.types.is_struct(features.type):
        raise DataError(
            f"{path}: column features is {one_line(features.type)}; it must be a struct, or each feature a column of its own"
        )
    return list(features.type)


def _require_names_once(columns: Iterable[pa.Field]) -> None:
    """Also within structs. Raises UnicodeDecodeError where a name is no text."""
    columns = list(columns)
    counts = Counter(column.name for column in columns)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise pa.ArrowInvalid(f"column {twice[0]} is there twice")
    for column in columns:
        if pa.types.is_struct(column.type):
            _require_names_once(column.type)


def _is_number(type: pa.DataType) -> bool:
    return bool(pa.types.is_integer(type) or pa.types.is_floating(type))


def _column_field(path: Path, column: pa.Field) -> Field:
    if column.type != pa.uint64() and _is_number(column.type):
        return Field(column.name, "numeric")
    if _is_text(column.type) or column.type in (pa.uint64(), pa.bool_()):
        return Field(column.name, "categorical")
    raise DataError(
        f"{path}: column {one_line(column.name)} is {one_line(column.type)}; a feature is text, a number or a boolean"
    )


def _is_text(type: pa.DataType) -> bool:
    if pa.types.is_dictionary(type):
        type = type.value_type
    return bool(pa.types.is_string(type) or pa.types.is_large_string(type))


_EVENT_COLUMNS: Mapping[str, tuple[Callable[[pa.DataType], bool], ...]] = {
    "kind": (_is_text,),
    "impression_id": (_is_text, pa.types.is_integer),
    "time": (_is_text, pa.types.is_integer, pa.types.is_timestamp),
}


class ParquetLog(_ColumnLog):
    __doc__ = _ColumnLog.__doc__
    format = "parquet"

    def _schema(self, path: Path) -> pa.Schema:
        with pa.parquet.ParquetFile(path) as file:
            return file.schema_arrow

    def _record_batches(self) -> Iterator[pa.RecordBatch]:
        with pa.parquet.ParquetFile(self.path) as file:
            done, rows = 0, max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=BATCH_ROWS, use_threads=False):
                done += len(batch)
                self.progress = done / rows
                yield batch


class ArrowLog(_ColumnLog):
    """As `ParquetLog`, from an Arrow IPC file or stream."""

    format = "arrow"

    def _schema(self, path: Path) -> pa.Schema:
        with pa.OSFile(str(path)) as file:
            return _stream(file).schema

    def _record_batches(self) -> Iterator[pa.RecordBatch]:
        with pa.OSFile(
            str(self.path)
        ) as file:  # not mapped: a file that shrinks meanwhile would end the process
            reader, size = _stream(file), max(1, file.size())
            for batch in reader:
                self.progress = min(1.0, file.tell() / size)
                for column in batch.columns:
                    _require_sound(column)
                for start in range(0, len(batch), BATCH_ROWS):
                    yield batch.slice(start, BATCH_ROWS)


def _require_sound(column: pa.Array) -> None:
    """Raises `pa.ArrowInvalid` where it is not: what is read from an Arrow file are addresses, and nothing has looked at them yet."""
    column.validate(full=True)
    if pa.types.is_dictionary(column.type):
        _require_sound(column.dictionary)
    if pa.types.is_struct(column.type):
        for index in range(column.type.num_fields):
            _require_sound(column.field(index))


def _stream(file: pa.OSFile) -> pa.RecordBatchReader:
    """A reader of the batches one after the other. An IPC file is an IPC stream between the magic `ARROW1` and a footer."""
    if file.read(8) != _ARROW_FILE:
        file.seek(0)
    return pa.ipc.open_stream(file)
