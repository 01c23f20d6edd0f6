"""A table as a log: its rows become events, whatever its columns are called.

The rows of a table are events, impressions with the times of their clicks, or labelled rows; see
`layout.ColumnNames`. Labelled rows become events of kind `example`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stream_ctr.events.arrow_columns import mask, one_array
from stream_ctr.events.json_events import encode_clicks, encode_examples, encode_impressions
from stream_ctr.events.times import EARLIEST_MS, LATEST_MS, TimeUnit, infer_unit, unit_words
from stream_ctr.logs.columns import (
    Shape,
    categories,
    find_columns,
    ids,
    is_moment,
    is_number,
    is_text,
    labels,
    numbers,
    require_fields,
)
from stream_ctr.logs.guess import guess_fields
from stream_ctr.logs.labelled_logs import SyntheticTimes
from stream_ctr.logs.layout import Layout
from stream_ctr.logs.log import Log, LogBatch, impression_batch, in_time_order, merge_clicks
from stream_ctr.logs.rows import Rejected, Rows
from stream_ctr.logs.tables import Table
from stream_ctr.messages import one_line

# Names of the columns of a batch that hold parsed values. No column of a file begins with a null.
_TIME = "\0time"
_ID = "\0id"
_LABEL = "\0label"
_KIND = "\0kind"
_CLICK_TIME = "\0click_time"
_PROBABILITY = "\0true_probability"
_KINDS = ("impression", "click", "example")
_KIND_OF_SHAPE: Mapping[Shape, str] = {
    "examples": "example",
    "shown": "impression",
    "clicked": "click",
    "unlabelled": "impression",
}
_IN_RANGE = "between 1973 and 2100"


class ColumnLog(Log):
    """The rows of a table as events.

    Without a column of times, the rows get times that are spread over the span of `times`, in their
    order. Without a column of ids, an id is made from the file and the number of the row. Numbers,
    text, booleans and dates are features; NaN and infinities are missing values, because JSON does
    not have them.
    """

    def __init__(
        self, table: Table, layout: Layout, times: SyntheticTimes, *, shape: Shape | None = None
    ) -> None:
        self.table = table
        self.format = table.format  # type: ignore[misc]
        self.columns = find_columns(table, layout, shape)
        self._formats = layout.times
        self._times = times
        notes: list[str] = []
        fields = () if shape == "clicked" else layout.fields
        if not fields and shape != "clicked":
            fields, note = guess_fields(table, self.columns)
            notes += note
        require_fields(table, self.columns, fields)
        super().__init__(table.path, fields, (), name=table.name)
        self._assumptions = (*self._time_notes(), *notes)

    @cached_property
    def identity(self) -> str:
        """The name of the file, and a hash of its beginning and of the meaning of its columns."""
        return f"{self._file_name}#{self._digest}"

    @property
    def _file_name(self) -> str:
        return self.name.rpartition("/")[2]

    @cached_property
    def _digest(self) -> str:
        meaning = [self.columns, self._formats]
        if not self.columns.time:
            meaning.append(self._times)
        content = self.table.first_bytes() + repr(meaning).encode()
        return hashlib.sha256(content).hexdigest()[:12]

    def _read(self) -> Iterator[LogBatch]:
        if self.columns.shape == "impressions":
            return merge_clicks(in_time_order(self._impressions()))
        events = self.events()
        return map(_log_batch, in_time_order(events) if self.columns.time else events)

    def start_pass(self) -> None:
        """Forget what the latest pass found."""
        self.rejected = Rejected()
        self.out_of_order = 0
        self.progress = 0.0

    # -- rows ------------------------------------------------------------------------------------

    def rows(self) -> Iterator[Rows]:
        """Yield the rows that are events, with parsed times, ids and kinds."""
        columns = self.columns
        used = columns.used
        if not columns.features:
            used += [field.name for field in self.fields or ()]
        spread = None if columns.time else self._times.spread_over(self.table.count_rows())
        for rows in self.table.batches(list(dict.fromkeys(used)), self.rejected):
            self.progress = self.table.progress
            if spread:
                time = pa.array(spread.impression_time(rows.line - 1))
                rows = rows.with_column(_TIME, time)
            else:
                rows = self._timed(rows, _TIME, columns.time)
            if columns.true_probability:
                rows = rows.parsed_into(_PROBABILITY, columns.true_probability, numbers, "a number")
            yield self._with_kinds(self._with_ids(rows))

    def _timed(self, rows: Rows, target: str, name: str) -> Rows:
        """Return the rows whose column `name` is a time, parsed into `target`."""
        rows = rows.parsed_into(target, name, self._formats.epoch_ms, self._formats.expected)
        rows = rows.keep(mask(pc.is_valid(rows.columns[target])), name, "present")
        time = rows.columns[target]
        in_range = pc.and_(pc.greater_equal(time, EARLIEST_MS), pc.less(time, LATEST_MS))
        return rows.keep(mask(in_range), name, _IN_RANGE)

    def _with_ids(self, rows: Rows) -> Rows:
        name = self.columns.id
        if not name:
            prefix = f"{self._file_name}#{self._digest[:6]}"
            made = pc.binary_join_element_wise(prefix, pa.array(rows.line).cast(pa.string()), "-")
            return rows.with_column(_ID, made)
        rows = rows.parsed_into(_ID, name, ids, "text or an integer")
        return rows.keep(mask(pc.is_valid(rows.columns[_ID])), name, "present")

    def _with_kinds(self, rows: Rows) -> Rows:
        columns = self.columns
        if columns.shape == "events":
            rows = rows.parsed_into(_KIND, columns.kind, _as_text, "text")
            kinds = _KINDS if columns.label else _KINDS[:2]
            known = pc.is_in(rows.columns[_KIND], pa.array(kinds))
            rows = rows.keep(mask(known), columns.kind, " or ".join(kinds))
        if columns.shape == "examples":
            rows = self._labelled(rows)
        return rows

    def _labelled(self, rows: Rows) -> Rows:
        rows = rows.parsed_into(_LABEL, self.columns.label, labels, "0 or 1")
        return rows.keep(mask(pc.is_valid(rows.columns[_LABEL])), self.columns.label, "0 or 1")

    def _featured(self, rows: Rows) -> tuple[Rows, dict[str, pa.Array]]:
        """Return the rows whose features can be read, and the features."""
        fields = self.fields or ()
        names = [field.name for field in fields]
        if self.columns.features:
            struct = one_array(rows.columns[self.columns.features])
            for name in names:
                rows = rows.with_column(f"\0{name}", _member(struct, name))
            names = [f"\0{name}" for name in names]
        for field, name in zip(fields, names, strict=True):
            convert = numbers if field.kind == "numeric" else categories
            rows = rows.parsed(name, convert, _EXPECTED[field.kind], shown=field.name)
        return rows, {
            field.name: one_array(rows.columns[name])
            for field, name in zip(fields, names, strict=True)
        }

    # -- events ----------------------------------------------------------------------------------

    def _impressions(self) -> Iterator[pa.RecordBatch]:
        for rows in self.rows():
            rows = self._clicked(rows)
            rows, features = self._featured(rows)
            plain = {name: _without_dictionary(column) for name, column in features.items()}
            yield impression_batch(
                one_array(rows.columns[_ID]),
                rows.columns[_TIME].to_numpy(),
                one_array(rows.columns[_CLICK_TIME]),
                plain,
                self._probability(rows),
            )

    def _clicked(self, rows: Rows) -> Rows:
        """Return the rows whose click time is a time or missing, as 0 and -1 are too."""
        name = self.columns.click_time
        expected = f"{self._formats.expected}, or missing"
        rows = rows.parsed_into(_CLICK_TIME, name, self._formats.epoch_ms, expected)
        time = rows.columns[_CLICK_TIME]
        absent = pc.fill_null(pc.less_equal(time, 0), True)
        in_range = pc.and_(pc.greater_equal(time, EARLIEST_MS), pc.less(time, LATEST_MS))
        rows = rows.with_column(_CLICK_TIME, pc.if_else(absent, None, time))
        return rows.keep(mask(pc.or_kleene(absent, in_range)), name, f"{_IN_RANGE}, or missing")

    def _probability(self, rows: Rows) -> npt.NDArray[np.float64] | None:
        name = self.columns.true_probability
        if not name:
            return None
        column = one_array(rows.columns[_PROBABILITY]).cast(pa.float64())
        return np.asarray(column.to_numpy(zero_copy_only=False))

    def events(self) -> Iterator[pa.RecordBatch]:
        """Yield the events as columns time, key, value, in the order of the rows."""
        kind_of_all = _KIND_OF_SHAPE.get(self.columns.shape)
        for rows in self.rows():
            if kind_of_all:
                yield self._encoded(rows, kind_of_all)
                continue
            kind = rows.columns[_KIND]
            parts = [(each, mask(pc.equal(kind, each))) for each in _KINDS]
            parts = [part for part in parts if part[1].any()] or parts[:1]
            yield _in_line_order(
                [self._encoded(_filtered(rows, rows_of), each) for each, rows_of in parts]
            )

    def _encoded(self, rows: Rows, kind: str) -> pa.RecordBatch:
        """Return events of one kind as columns time, key, value, line."""
        if kind == "example" and self.columns.shape == "events":
            rows = self._labelled(rows)
        features: dict[str, pa.Array] = {}
        if kind != "click":
            rows, features = self._featured(rows)
        impression_id = one_array(rows.columns[_ID])
        time = rows.columns[_TIME].to_numpy()
        if kind == "click":
            value = encode_clicks(impression_id, time)
        elif kind == "example":
            label = one_array(rows.columns[_LABEL])
            value = encode_examples(impression_id, time, label, features)
        else:
            value = encode_impressions(impression_id, time, features, self._probability(rows))
        columns = {
            "time": pa.array(time),
            "key": impression_id.cast(pa.large_binary()),
            "value": value,
            "line": pa.array(rows.line),
        }
        return pa.RecordBatch.from_pydict(columns)

    # -- notes -----------------------------------------------------------------------------------

    def _time_notes(self) -> Iterator[str]:
        if not self.columns.time:
            yield self._times.impression_note()
        if not self.columns.id:
            yield "no ids in this log: they are made from the file and the number of the row"
        for name in filter(None, (self.columns.time, self.columns.click_time)):
            yield from self._unit_notes(name)

    def _unit_notes(self, name: str) -> Iterator[str]:
        """Yield the unit or the zone that the first times are read in."""
        kind = self.table.types[name]
        in_zone = kind is None or not is_moment(kind) or getattr(kind, "tz", None)
        if not (in_zone or self._formats.zone):
            yield f"{one_line(name)} names no time zone and is read as UTC (input.time_zone)"
        if self._formats.unit or not (kind is None or is_number(kind) or is_text(kind)):
            return
        rows = next(self.table.batches([name], Rejected()), None)
        unit = _unit(one_array(rows.columns[name])) if rows else None
        if unit and unit != "ms":
            words = unit_words(unit)
            yield f"{one_line(name)} is read as epoch {words} (input.time_unit)"


def _unit(column: pa.Array) -> TimeUnit | None:
    """Return the unit of times that are numbers, or None."""
    try:
        ticks = numbers(column).cast(pa.float64(), safe=False).drop_null().to_numpy()
    except pa.ArrowException:  # text, then
        return None
    return infer_unit(ticks) if len(ticks) else None


_EXPECTED = {"numeric": "a number", "categorical": "text"}


def _as_text(column: pa.Array) -> pa.StringArray:
    return pc.utf8_trim_whitespace(column.cast(pa.string()))


def _member(struct: pa.StructArray, name: str) -> pa.Array:
    index = struct.type.get_field_index(name)
    return pc.struct_field(struct, [index]) if index >= 0 else pa.nulls(len(struct))


def _without_dictionary(column: pa.Array) -> pa.Array:
    is_dictionary = pa.types.is_dictionary(column.type)
    return column.cast(column.type.value_type) if is_dictionary else column


def _filtered(rows: Rows, chosen: npt.NDArray[np.bool_]) -> Rows:
    if chosen.all():
        return rows
    return Rows(rows.line[chosen], rows.columns.filter(pa.array(chosen)), rows.rejected)


def _in_line_order(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """Return the rows of the batches as one, in the order of their lines."""
    if len(batches) == 1:
        return batches[0]
    table = pa.Table.from_batches(batches).combine_chunks()
    order = np.argsort(table["line"].to_numpy(), kind="stable")
    return table.take(pa.array(order)).combine_chunks().to_batches()[0]


def _log_batch(batch: pa.RecordBatch) -> LogBatch:
    return LogBatch(batch["time"].to_numpy(), batch["key"], batch["value"])
