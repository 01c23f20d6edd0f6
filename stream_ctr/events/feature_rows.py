"""Features given in Python become the columns of a hasher, by the rules of training.

Rows are dictionaries, one dictionary, or a table: pandas, polars, Arrow, or anything else that
exports an Arrow stream. A dictionary follows the rules of a JSON event, a table those of an Arrow
record, so a value has the row of the embedding table that training gave it:

    field          dictionary                                   column of a table
    categorical    str; int of 64 bits, as its decimal text;    text, integers, booleans, or a
                   bool, as "true" and "false"                  dictionary of them
    numeric        int, float: finite, not bool                 integers, floats, decimals; NaN and
                                                                infinities are missing
    either         None or absent: missing                      null or absent: missing

The scalars of NumPy count as the Python values that they stand for. Anything that training would
reject, and anything that it would leave unread, is invalid:

    reason           invalid
    wrong_type       a value of another type, a number that is not finite, text that is not UTF-8
    unknown_field    a name that is not a field of the model
    no_field         a row without any value
    wrapped_event    a whole event with `features` or `kind` instead of its features

>>> rows = FeatureRows([Field("app", "categorical"), Field("age", "numeric")])
>>> [columns] = rows.columns([{"app": 7, "age": 31}, {"app": True}])
>>> columns["app"].to_pylist(), columns["age"].to_pylist()
(['7', 'true'], [31.0, None])
>>> list(rows.columns({"ap": "maps"}))
Traceback (most recent call last):
stream_ctr.errors.InvalidFeatures: row 0: there is no field 'ap'; did you mean 'app'? The fields \
are app, age
>>> lenient = FeatureRows(rows.fields, on_invalid="score")
>>> [columns] = lenient.columns({"ap": "maps", "age": "31"})
>>> columns["age"].to_pylist(), sorted(lenient.invalid.items())
([None], [('no_field', 1), ('unknown_field', 1), ('wrong_type', 1)])
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn, Protocol, TypeAlias

import numpy as np
import pyarrow as pa

from stream_ctr.errors import InvalidFeatures
from stream_ctr.events.arrow_columns import one_array
from stream_ctr.events.arrow_events import feature_column
from stream_ctr.events.field import Field
from stream_ctr.events.json_strict import parse_feature
from stream_ctr.events.parsed_events import InvalidRecord
from stream_ctr.messages import nearest, one_line

OnInvalid = Literal["error", "score"]

_BLOCK_ROWS = 1 << 16
_WRAPPERS = frozenset({"features", "kind"})
_WRAPPED = "a whole event; only the object under its 'features' is scored"
_SHOWN_FIELDS = 20
_TEXT = frozenset({str, type(None)})
_FLOAT = frozenset({float, type(None)})
_NUMBER = _FLOAT | {int}


class ArrowStream(Protocol):
    """A table that exports an Arrow stream, as those of pandas, polars and Arrow do."""

    def __arrow_c_stream__(self, requested_schema: object = None) -> object: ...


Table: TypeAlias = ArrowStream | pa.Table | pa.RecordBatch
"""Features in columns, one for each field."""


class FeatureRows:
    """Convert rows to columns of the given fields.

    With `on_invalid="error"` the first thing that is invalid raises `InvalidFeatures`. With "score"
    it is a missing value, and `invalid` counts it by its reason: each value of a wrong type, each
    unknown name in each row, each row without a value, each wrapped event. Threads may share an
    instance.
    """

    def __init__(
        self,
        fields: Sequence[Field],
        *,
        on_invalid: OnInvalid = "error",
        invalid: Counter[str] | None = None,
    ) -> None:
        if on_invalid not in ("error", "score"):
            raise ValueError(f"on_invalid is 'error' or 'score', got {on_invalid!r:.80}")
        self.fields = tuple(fields)
        self.invalid: Counter[str] = Counter() if invalid is None else invalid
        self._raises = on_invalid == "error"
        self._kinds = {field.name: field.kind for field in self.fields}
        self._lock = threading.Lock()

    def columns(
        self, rows: Mapping[str, object] | Sequence[Mapping[str, object]] | Table
    ) -> Iterator[dict[str, pa.Array]]:
        """Yield the columns of all fields, in blocks of consecutive rows."""
        if isinstance(rows, Mapping):
            yield self._of_mappings([rows])
        elif (table := _as_table(rows)) is not None:
            yield from self._of_table(table)
        elif type(rows).__module__.partition(".")[0] == "pandas" and hasattr(rows, "iloc"):
            yield from self._of_pandas(rows)
        else:
            yield self._of_mappings(_as_mappings(rows))

    # -- dictionaries ----------------------------------------------------------------------------

    def _of_mappings(self, rows: Sequence[Mapping[str, object]]) -> dict[str, pa.Array]:
        names = set().union(*rows)
        if not names <= self._kinds.keys():
            self._reject_names(names - self._kinds.keys(), rows)
        columns = {
            field.name: self._column(field, [row.get(field.name) for row in rows])
            for field in self.fields
        }
        return self._with_values(columns, first=0)

    def _column(self, field: Field, values: list[Any], first: int = 0) -> pa.Array:
        """Return the column of a field. Values of the expected types need no look at each."""
        types = set(map(type, values))
        if field.kind == "categorical":
            if types <= _TEXT:
                try:
                    return pa.array(values, pa.string())
                except UnicodeEncodeError:  # a lone surrogate
                    pass
            return pa.array(self._parsed(field, values, first), pa.string())
        if types <= _NUMBER:
            with contextlib.suppress(OverflowError):  # an integer beyond the range of a double
                values = [None if value is None else float(value) for value in values]
                types -= {int}
        if not types <= _FLOAT or not all(map(math.isfinite, filter(None, values))):
            values = self._parsed(field, values, first)
        return pa.array(values, pa.float64())

    def _parsed(self, field: Field, values: list[Any], first: int) -> list[Any]:
        parsed = []
        for row, value in enumerate(values, first):
            try:
                parsed.append(_parse(field, value))
            except InvalidRecord as error:
                parsed.append(None)
                problem = f"{one_line(error.message, 300)} ({type(value).__name__})"
                self._reject("wrong_type", problem, row=row, field=field.name)
        return parsed

    def _reject_names(self, names: set[Any], rows: Sequence[Mapping[str, object]]) -> None:
        """Reject these names, which are not fields."""
        for index, row in enumerate(rows):
            unknown = [name for name in row if name in names]
            if _WRAPPERS.intersection(unknown):
                self._reject("wrapped_event", _WRAPPED, row=index)
                continue
            for name in unknown:
                self._reject("unknown_field", self._no_field(name), row=index, field=str(name))

    # -- tables ----------------------------------------------------------------------------------

    def _of_table(self, table: pa.Table) -> Iterator[dict[str, pa.Array]]:
        self._require_names(table.column_names, len(table))
        indices = {name: index for index, name in enumerate(table.column_names)}
        for first in range(0, len(table), _BLOCK_ROWS):
            block = table.slice(first, _BLOCK_ROWS)
            columns = {
                field.name: self._arrow_column(
                    field,
                    one_array(block.column(indices[field.name])) if field.name in indices else None,
                    len(block),
                    first,
                )
                for field in self.fields
            }
            yield self._with_values(columns, first)

    def _arrow_column(self, field: Field, column: pa.Array | None, n: int, first: int) -> pa.Array:
        try:
            return feature_column(field, column, n)
        except InvalidRecord as error:
            assert column is not None
            present = np.flatnonzero(np.asarray(column.is_valid()))
            if len(present):
                problem = one_line(error.message, 300)
                row = first + int(present[0])
                count = len(present)
                self._reject("wrong_type", problem, row=row, field=field.name, count=count)
            return pa.nulls(n, pa.string() if field.kind == "categorical" else pa.float64())

    def _of_pandas(self, frame: Any) -> Iterator[dict[str, pa.Array]]:
        """Columns of objects of several types are read value by value, as dictionaries are."""
        self._require_names(list(frame.columns), len(frame))
        indices = {name: index for index, name in enumerate(frame.columns)}
        for first in range(0, len(frame), _BLOCK_ROWS):
            block = frame.iloc[first : first + _BLOCK_ROWS]
            columns = {}
            for field in self.fields:
                if field.name not in indices:
                    columns[field.name] = feature_column(field, None, len(block))
                    continue
                series = block.iloc[:, indices[field.name]]
                try:
                    column = _pandas_array(series)
                except (pa.ArrowInvalid, pa.ArrowTypeError):
                    values = series.astype(object).where(series.notna(), None).tolist()
                    columns[field.name] = self._column(field, values, first)
                else:
                    columns[field.name] = self._arrow_column(field, column, len(block), first)
            yield self._with_values(columns, first)

    def _require_names(self, names: Sequence[Any], rows: int) -> None:
        """Reject the columns of a table that are not fields."""
        unknown = [name for name in names if name not in self._kinds]
        if _WRAPPERS.intersection(unknown):
            self._reject("wrapped_event", f"the table is {_WRAPPED}", count=rows)
            return
        for name in unknown:
            self._reject("unknown_field", self._no_field(name), field=str(name), count=rows)

    # -- rules of both ---------------------------------------------------------------------------

    def _with_values(self, columns: dict[str, pa.Array], first: int) -> dict[str, pa.Array]:
        """Reject the rows in which every field is missing."""
        if all(column.null_count for column in columns.values()):
            present = np.logical_or.reduce([column.is_valid() for column in columns.values()])
            for row in np.flatnonzero(~present).tolist():
                problem = f"a value of at least one field is needed: {self._shown_fields()}"
                self._reject("no_field", problem, row=first + row)
        return columns

    def _reject(
        self,
        reason: str,
        problem: str,
        *,
        row: int | None = None,
        field: str | None = None,
        count: int = 1,
    ) -> None:
        if self._raises:
            raise InvalidFeatures(problem, reason=reason, row=row, field=field)
        with self._lock:
            self.invalid[reason] += count

    def _no_field(self, name: object) -> str:
        return (
            f"there is no field {one_line(repr(name), 80)}"
            f"{nearest(str(name), self._kinds) or '.'} The fields are {self._shown_fields()}"
        )

    def _shown_fields(self) -> str:
        names = [one_line(name, 60) for name in self._kinds]
        more = len(names) - _SHOWN_FIELDS
        return ", ".join(names[:_SHOWN_FIELDS]) + (f" and {more} more" if more > 0 else "")


def _parse(field: Field, value: object) -> str | float | None:
    """Return the value as training reads it in a JSON event, or raise `InvalidRecord`."""
    value = value.item() if isinstance(value, np.generic) else value
    parsed = parse_feature(field, value)
    if isinstance(parsed, float) and not math.isfinite(parsed):
        raise InvalidRecord(
            "wrong_type",
            f"{field.name!r:.80} must be a finite number or None, got {value!r:.80}",
        )
    if isinstance(parsed, str):
        try:
            parsed.encode()
        except UnicodeEncodeError:
            raise InvalidRecord("wrong_type", f"{field.name!r:.80} is not UTF-8") from None
    return parsed


def _as_table(rows: object) -> pa.Table | None:
    """Return an Arrow table without a copy of its data, or None for rows of another kind."""
    if isinstance(rows, pa.Table):
        return rows
    if isinstance(rows, pa.RecordBatch):
        return pa.Table.from_batches([rows])
    if hasattr(rows, "__arrow_c_stream__") and not hasattr(rows, "iloc"):
        return pa.table(rows)
    return None


def _pandas_array(series: Any) -> pa.Array:
    column = pa.array(series, from_pandas=True)
    return one_array(column) if isinstance(column, pa.ChunkedArray) else column


def _as_mappings(rows: Any) -> Sequence[Mapping[str, object]]:
    if isinstance(rows, str | bytes) or not isinstance(rows, Sequence):
        _refuse_rows(rows, None)
    if not set(map(type, rows)) <= {dict}:
        for index, row in enumerate(rows):
            if not isinstance(row, Mapping):
                _refuse_rows(row, index)
    return rows


def _refuse_rows(given: object, row: int | None) -> NoReturn:
    raise InvalidFeatures(
        "features are a dictionary by field name, a sequence of those, or a table; "
        f"got {one_line(repr(given), 80)} ({type(given).__name__})",
        reason="wrong_type",
        row=row,
    )
