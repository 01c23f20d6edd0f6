"""Logs of events: JSON lines in the wire format, or columns of a Parquet or Arrow file."""

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

_NEWLINE = ord("\n")
_CARRIAGE_RETURN = ord("\r")
_ARROW_FILE = b"ARROW1\0\0"
_ARROW_STREAM = b"\xff\xff\xff\xff"  # the continuation marker of the first message
MAGIC: Mapping[bytes, str] = {b"PAR1": "parquet", _ARROW_FILE: "arrow", _ARROW_STREAM: "arrow"}
"""The first bytes of each binary format, and the name of the format."""


class EventLog(TextLog):
    """JSON lines, passed through byte for byte.

    Malformed lines pass too, because the decoder of the stream sets these aside. A line whose time
    cannot be read has the time of the line before it. Lines out of order are sorted as far as a
    bounded buffer reaches.
    """

    format = "events"

    def __init__(self, path: Path) -> None:
        super().__init__(path, None)

    def _read(self) -> Iterator[LogBatch]:
        return map(_log_batch, in_time_order(self._events()))

    def _events(self) -> Iterator[pa.RecordBatch]:
        decoder = Decoder(())
        latest = 0
        for _, data in self.line_blocks():
            value = _lines(data)
            if len(value):
                batch = _timed(decoder, value, latest)
                latest = batch["time"][-1].as_py()
                yield batch


def _lines(data: bytes) -> pa.LargeBinaryArray:
    """Return the non-empty lines of a block, without their ends (LF or CRLF).

    >>> _lines(b"a\\n\\nbc\\r\\n").to_pylist()
    [b'a', b'bc']
    """
    text = np.frombuffer(data, np.uint8)
    newlines = np.flatnonzero(text == _NEWLINE)
    starts = np.concatenate([[0], newlines[:-1] + 1])
    ends = newlines - ((newlines > starts) & (text[newlines - 1] == _CARRIAGE_RETURN))
    # One array over the bytes without a copy: line, its end, line, its end, ... The even elements
    # are the lines.
    offsets = np.append(np.stack([starts, ends], 1).ravel(), len(text))
    pieces = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(offsets) - 1, [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    )
    return pieces.take(pa.array(2 * np.flatnonzero(ends > starts)))


def _timed(decoder: Decoder, value: pa.LargeBinaryArray, before: int) -> pa.RecordBatch:
    """Return the columns time, key, value of n lines.

    A line that holds no event has a null key and the time of the line before it; `before` is the
    time of the line before the first.
    """
    events, _ = decoder.decode(value)
    kinds = events.kinds
    row = np.concatenate([kind.row for kind in kinds])
    event_of_line = np.full(len(value), -1)
    event_of_line[row] = np.arange(len(row))
    known = event_of_line >= 0
    key = (
        pa.concat_arrays([kind.impression_id for kind in kinds])
        .cast(pa.large_binary())
        .take(pa.array(event_of_line, mask=~known))
    )
    latest_known = np.maximum.accumulate(np.where(known, np.arange(len(value)), -1))
    times = np.append(np.concatenate([kind.time for kind in kinds]), before)
    time = times[np.where(latest_known >= 0, event_of_line[latest_known], -1)]
    return pa.RecordBatch.from_pydict({"time": pa.array(time), "key": key, "value": value})


def _log_batch(batch: pa.RecordBatch) -> LogBatch:
    return LogBatch(batch["time"].to_numpy(), batch["key"], batch["value"])


class ColumnLog(Log):
    """Events in the columns kind, impression_id, time, the features and true_probability.

    The features are the members of a struct column `features`, or all other columns. Numbers are
    numeric fields. Text, booleans and unsigned 64-bit integers are categorical fields. NaN and
    infinities are missing values, because JSON does not have them.
    """

    path: Path

    def __init__(self, path: Path) -> None:
        try:
            schema = self._schema(path)
            _require_distinct_names(schema)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is not a {self.format} file: {one_line(error)}") from None
        _require_event_columns(path, schema)
        self._nested = "features" in schema.names
        columns = _feature_columns(path, schema)
        super().__init__(path, tuple(_field(path, column) for column in columns))

    def _schema(self, path: Path) -> pa.Schema:
        raise NotImplementedError

    def _record_batches(self) -> Iterator[pa.RecordBatch]:
        raise NotImplementedError

    def _read(self) -> Iterator[LogBatch]:
        return map(_log_batch, in_time_order(self._events()))

    def _events(self) -> Iterator[pa.RecordBatch]:
        first = 1
        try:
            for batch in self._record_batches():
                line = np.arange(first, first + len(batch))
                rows = Rows(line, pa.Table.from_batches([batch]), self.rejected)
                yield self._encoded(_event_rows(rows.valid()))
                first += len(batch)
        except (pa.ArrowException, OSError) as error:
            self.rejected.add(first, f"the rest cannot be read: {one_line(error)}")

    def _encoded(self, rows: Rows) -> pa.RecordBatch:
        """Return the events as columns time, key, value in the order of the rows."""
        impression = rows.equal("kind", "impression")
        impressions = rows.columns.filter(pa.array(impression))
        clicks = rows.columns.filter(pa.array(~impression))
        order = np.argsort(np.argsort(~impression, kind="stable"))
        value = pa.concat_arrays([self._encoded_impressions(impressions), _encoded_clicks(clicks)])
        return pa.RecordBatch.from_pydict(
            {
                "time": one_array(rows.columns["time"]),
                "key": one_array(rows.columns["impression_id"]).cast(pa.large_binary()),
                "value": value.take(pa.array(order)),
            }
        )

    def _encoded_impressions(self, table: pa.Table) -> pa.LargeBinaryArray:
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
        if self._nested:
            struct = one_array(table["features"])
            columns = [pc.struct_field(struct, [index]) for index in range(len(names))]
        else:
            columns = [one_array(table[name]) for name in names]
        return {name: _feature(column) for name, column in zip(names, columns, strict=True)}


def _event_rows(rows: Rows) -> Rows:
    """Return the rows that hold an event; reject the others."""
    rows = rows.parsed("time", epoch_ms, "epoch milliseconds, a timestamp or RFC 3339")
    rows = rows.identified("impression_id")
    time = rows.columns["time"]
    in_range = pc.and_(pc.greater_equal(time, EARLIEST_MS), pc.less(time, LATEST_MS))
    rows = rows.keep(mask(in_range), "time", "between 1973 and 2100 in milliseconds")
    rows = rows.parsed("kind", _text, "text")
    rows = rows.parsed("impression_id", _text, "text")
    known = pc.is_in(rows.columns["kind"], pa.array(["impression", "click"]))
    return rows.keep(mask(known), "kind", "impression or click")


def _encoded_clicks(table: pa.Table) -> pa.LargeBinaryArray:
    return encode_clicks(one_array(table["impression_id"]), table["time"].to_numpy())


def _feature(column: pa.Array) -> pa.Array:
    if column.type == pa.uint64():
        return column.cast(pa.string())
    return column.cast(pa.float64()) if pa.types.is_floating(column.type) else column


def _text(column: pa.Array) -> pa.Array:
    return column.cast(pa.string())


def _require_distinct_names(columns: Iterable[pa.Field]) -> None:
    """Raise `pa.ArrowInvalid` when two columns, or two members of a struct, have the same name.

    Raises `UnicodeDecodeError` when a name is not UTF-8.
    """
    columns = list(columns)
    counts = Counter(column.name for column in columns)
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise pa.ArrowInvalid(f"column {repeated[0]} appears twice")
    for column in columns:
        if pa.types.is_struct(column.type):
            _require_distinct_names(column.type)


def _require_event_columns(path: Path, schema: pa.Schema) -> None:
    """Raise `DataError` when a column of events is missing or of a wrong type."""
    needed = "needed are kind and impression_id as text, time as milliseconds or timestamp"
    for name, accepted in _EVENT_COLUMNS.items():
        if name not in schema.names:
            raise DataError(f"{path} holds no events: there is no column {name}; {needed}")
        found = schema.field(name).type
        if not any(accepts(found) for accepts in accepted):
            raise DataError(f"{path} holds no events: column {name} is {one_line(found)}; {needed}")
    if "true_probability" in schema.names:
        found = schema.field("true_probability").type
        if not _is_number(found):
            raise DataError(f"{path}: column true_probability is {one_line(found)}, not a number")


def _feature_columns(path: Path, schema: pa.Schema) -> list[pa.Field]:
    if "features" not in schema.names:
        others = (*_EVENT_COLUMNS, "true_probability")
        return [column for column in schema if column.name not in others]
    features = schema.field("features").type
    if not pa.types.is_struct(features):
        raise DataError(
            f"{path}: column features is {one_line(features)}; "
            "it must be a struct, or each feature a column of its own"
        )
    return list(features)


def _field(path: Path, column: pa.Field) -> Field:
    if column.type != pa.uint64() and _is_number(column.type):
        return Field(column.name, "numeric")
    if _is_text(column.type) or column.type in (pa.uint64(), pa.bool_()):
        return Field(column.name, "categorical")
    raise DataError(
        f"{path}: column {one_line(column.name)} is {one_line(column.type)}; "
        "a feature is text, a number or a boolean"
    )


def _is_number(type: pa.DataType) -> bool:
    return bool(pa.types.is_integer(type) or pa.types.is_floating(type))


def _is_text(type: pa.DataType) -> bool:
    if pa.types.is_dictionary(type):
        type = type.value_type
    return bool(pa.types.is_string(type) or pa.types.is_large_string(type))


_EVENT_COLUMNS: Mapping[str, tuple[Callable[[pa.DataType], bool], ...]] = {
    "kind": (_is_text,),
    "impression_id": (_is_text, pa.types.is_integer),
    "time": (_is_text, pa.types.is_integer, pa.types.is_timestamp),
}


class ParquetLog(ColumnLog):
    """Events in the columns of a Parquet file; see `ColumnLog`."""

    format = "parquet"

    def _schema(self, path: Path) -> pa.Schema:
        with pa.parquet.ParquetFile(path) as file:
            return file.schema_arrow

    def _record_batches(self) -> Iterator[pa.RecordBatch]:
        with pa.parquet.ParquetFile(self.path) as file:
            rows = max(1, file.metadata.num_rows)
            rows_read = 0
            for batch in file.iter_batches(batch_size=BATCH_ROWS, use_threads=False):
                rows_read += len(batch)
                self.progress = rows_read / rows
                yield batch


class ArrowLog(ColumnLog):
    """Events in the columns of an Arrow IPC file or stream; see `ColumnLog`."""

    format = "arrow"

    def _schema(self, path: Path) -> pa.Schema:
        with pa.OSFile(str(path)) as file:
            return _stream(file).schema

    def _record_batches(self) -> Iterator[pa.RecordBatch]:
        # A memory map would end the process if the file shrank while it is read.
        with pa.OSFile(str(self.path)) as file:
            reader = _stream(file)
            size = max(1, file.size())
            for batch in reader:
                self.progress = min(1.0, file.tell() / size)
                for column in batch.columns:
                    _require_sound(column)
                for start in range(0, len(batch), BATCH_ROWS):
                    yield batch.slice(start, BATCH_ROWS)


def _require_sound(column: pa.Array) -> None:
    """Raise `pa.ArrowInvalid` when an offset or index of the column points out of bounds.

    Arrow does not check these when it reads a file.
    """
    column.validate(full=True)
    if pa.types.is_dictionary(column.type):
        _require_sound(column.dictionary)
    if pa.types.is_struct(column.type):
        for index in range(column.type.num_fields):
            _require_sound(column.field(index))


def _stream(file: pa.OSFile) -> pa.RecordBatchReader:
    """Return a reader that yields one batch after another.

    An IPC file is an IPC stream between the magic `ARROW1` and a footer.
    """
    if file.read(len(_ARROW_FILE)) != _ARROW_FILE:
        file.seek(0)
    return pa.ipc.open_stream(file)
