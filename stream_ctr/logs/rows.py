"""Rows of a file as Arrow columns, each with its line number.

Every check rejects the rows that hold no event, by line number and reason, and keeps the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stream_ctr.events.arrow_columns import mask, one_array
from stream_ctr.messages import one_line

_NAMED_REJECTS = 100


@dataclass(slots=True)
class Rejected:
    """The lines that hold no event (in column formats: the rows).

    `count` counts all of them. `first` has (line number, reason) of the first hundred found.
    """

    count: int = 0
    first: list[tuple[int, str]] = field(default_factory=list)

    def add(self, line: int, reason: str) -> None:
        self.count += 1
        if len(self.first) < _NAMED_REJECTS:
            self.first.append((line, reason))


@dataclass(frozen=True, slots=True)
class Rows:
    """n rows as columns, and the line number of each.

    `line` counts from 1; in a column file it is the row number. A null in `columns` is a missing
    value, which a text file writes as a blank cell. The methods that drop rows add these to
    `rejected`.
    """

    line: npt.NDArray[np.int64]
    columns: pa.Table
    rejected: Rejected

    def valid(self) -> Rows:
        """Return the rows without damage: text is UTF-8, offsets and indices are within bounds."""
        good = np.ones(len(self.line), bool)
        good[_refused(self.columns, _validate)] = False
        if good.all():
            return self
        for index in np.flatnonzero(~good).tolist():
            self.rejected.add(
                int(self.line[index]), "the row is damaged, or has text that is not UTF-8"
            )
        # Slices copy no data, so that damaged offsets are never followed. A filter would copy.
        parts = [self.columns.slice(start, length) for start, length in runs_of(good)]
        columns = pa.concat_tables(parts or [self.columns.slice(0, 0)])
        return Rows(self.line[good], columns, self.rejected)

    def keep(self, good: npt.NDArray[np.bool_], name: str, expected: str) -> Rows:
        """Return the rows that are `good`; reject the others.

        The reason is "`name` must be `expected`, got ...", with the value in column `name`.
        """
        if good.all():
            return self
        column = self.columns[name]
        for index in np.flatnonzero(~good).tolist():
            reason = f"{one_line(name)} must be {expected}, got {_shown(column[index])}"
            self.rejected.add(int(self.line[index]), reason)
        return Rows(self.line[good], self.columns.filter(pa.array(good)), self.rejected)

    def with_column(self, name: str, column: pa.Array) -> Rows:
        """Return the rows with a column more, or with another one of this name."""
        index = self.columns.schema.get_field_index(name)
        columns = self.columns if index < 0 else self.columns.remove_column(index)
        return Rows(self.line, columns.append_column(name, column), self.rejected)

    def parsed_into(
        self, target: str, name: str, parse: Callable[[pa.Array], pa.Array], expected: str
    ) -> Rows:
        """Return the rows with a new column `target` of `parse(column)`; see `parsed`."""
        column = self.columns[name]
        copied = Rows(self.line, self.columns.append_column(target, column), self.rejected)
        return copied.parsed(target, parse, expected, shown=name)

    def labelled(self, name: str) -> Rows:
        """Return the rows whose column `name` is the text 0 or 1."""
        return self.keep(mask(pc.is_in(self.columns[name], pa.array(["0", "1"]))), name, "0 or 1")

    def identified(self, name: str) -> Rows:
        """Return the rows that have an id in column `name`."""
        return self.keep(mask(pc.is_valid(self.columns[name])), name, "present")

    def parsed(
        self,
        name: str,
        parse: Callable[[pa.Array], pa.Array],
        expected: str,
        *,
        shown: str = "",
    ) -> Rows:
        """Return the rows with column `name` replaced by `parse(column)`.

        `parse` raises `pa.ArrowInvalid` for a column with a value it cannot convert. The rows of
        such values are rejected; the reason names the column `shown`, or else `name`.
        """
        rows = self
        column = one_array(self.columns[name])
        try:
            values = parse(column)
        except pa.ArrowInvalid:
            good = np.ones(len(column), bool)
            good[_refused(column, parse)] = False
            rows = self.keep(good, shown or name, expected)
            values = parse(one_array(rows.columns[name]))
        index = rows.columns.schema.get_field_index(name)
        return Rows(rows.line, rows.columns.set_column(index, name, values), rows.rejected)

    def equal(self, name: str, value: str) -> npt.NDArray[np.bool_]:
        """Return a mask of the rows whose column `name` equals `value`; null is False."""
        return mask(pc.equal(self.columns[name], value))

    def features(self, names: Iterable[str]) -> dict[str, pa.Array]:
        """Return the columns of these names, one array each."""
        return {name: one_array(self.columns[name]) for name in names}


def _validate(table: pa.Table) -> None:
    table.validate(full=True)


def runs_of(good: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return (start, length) of each run of True.

    >>> runs_of(np.array([True, True, False, True]))
    [(0, 2), (3, 1)]
    """
    edges = np.flatnonzero(np.diff(good, prepend=False, append=False))
    return [
        (int(start), int(end - start)) for start, end in zip(edges[::2], edges[1::2], strict=True)
    ]


def _refused(column: Any, parse: Callable[[Any], object], first: int = 0) -> list[int]:
    """Return the indices of the values (or rows) that `parse` refuses.

    They are found by bisection: k refused values of n take about k log2(n) calls. `first` is the
    index of the first value.
    """
    try:
        parse(column)
    except pa.ArrowInvalid:
        if len(column) < 2:
            return [first]
        half = len(column) // 2
        left = _refused(column[:half], parse, first)
        return left + _refused(column[half:], parse, first + half)
    return []


def _shown(scalar: pa.Scalar) -> str:
    try:
        value = scalar.as_py()
    except (ValueError, OverflowError):  # Python's datetime ends at the year 9999
        return f"a {scalar.type} out of range"
    return "nothing" if value is None else f"{value!r:.80}"
