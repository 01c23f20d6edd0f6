"""Rows of a file in columns, each with the line that it stands on. A row that holds no event is rejected by name; its neighbours stay."""

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
    """Lines (of column formats: rows) that hold no event: how many, and the line number and reason of the first hundred found."""

    count: int = 0
    first: list[tuple[int, str]] = field(default_factory=list)

    def add(self, line: int, reason: str) -> None:
        self.count += 1
        if len(self.first) < _NAMED_REJECTS:
            self.first.append((line, reason))


@dataclass(frozen=True, slots=True)
class Rows:
    """n rows in columns (null: missing, in a text file blank), and the line that each stands on, from 1; in a column file, its number."""

    line: npt.NDArray[np.int64]
    columns: pa.Table
    rejected: Rejected

    def sound(self) -> Rows:
        """The rows whose columns are what they claim to be: text in UTF-8, offsets and indices within bounds."""
        good = np.ones(len(self.line), bool)
        good[_refused(self.columns, _validate)] = False
        for at in np.flatnonzero(~good).tolist():
            self.rejected.add(
                int(self.line[at]), "the row is damaged, or has text that is not UTF-8"
            )
        parts = [self.columns.slice(at, length) for at, length in _runs(good)]
        return (
            self
            if good.all()
            else Rows(
                self.line[good],
                pa.concat_tables(parts or [self.columns.slice(0, 0)]),
                self.rejected,
            )
        )

    def only(self, good: npt.NDArray[np.bool_], name: str, expected: str) -> Rows:
        """The rows that are `good`. The others are rejected: "`name` must be `expected`, got ..."."""
        if good.all():
            return self
        for at in np.flatnonzero(~good).tolist():
            self.rejected.add(
                int(self.line[at]),
                f"{one_line(name)} must be {expected}, got {_shown(self.columns[name][at])}",
            )
        return Rows(self.line[good], self.columns.filter(pa.array(good)), self.rejected)

    def labelled(self, name: str) -> Rows:
        """The rows whose label is 0 or 1, nothing else."""
        return self.only(mask(pc.is_in(self.columns[name], pa.array(["0", "1"]))), name, "0 or 1")

    def identified(self, name: str) -> Rows:
        return self.only(mask(pc.is_valid(self.columns[name])), name, "an id")

    def parsed(self, name: str, parse: Callable[[pa.Array], pa.Array], expected: str) -> Rows:
        """Column `name` put through `parse`, without the rows that it refuses by raising `pa.ArrowInvalid`."""
        column, rows = one_array(self.columns[name]), self
        try:
            values = parse(column)
        except pa.ArrowInvalid:
            good = np.ones(len(column), bool)
            good[_refused(column, parse)] = False
            rows = self.only(good, name, expected)
            values = parse(one_array(rows.columns[name]))
        at = rows.columns.schema.get_field_index(name)
        return Rows(rows.line, rows.columns.set_column(at, name, values), rows.rejected)

    def equal(self, name: str, value: str) -> npt.NDArray[np.bool_]:
        return mask(pc.equal(self.columns[name], value))

    def features(self, names: Iterable[str]) -> dict[str, pa.Array]:
        return {name: one_array(self.columns[name]) for name in names}


def _validate(table: pa.Table) -> None:
    table.validate(full=True)


def _runs(good: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(first, length) of the runs that are good."""
    edges = np.flatnonzero(np.diff(good, prepend=False, append=False))
    return [
        (int(first), int(end - first)) for first, end in zip(edges[::2], edges[1::2], strict=True)
    ]


def _refused(column: Any, parse: Callable[[Any], object], first: int = 0) -> list[int]:
    """Indices of the values (or rows) that `parse` refuses, found by halving."""
    try:
        parse(column)
    except pa.ArrowInvalid:
        half = len(column) // 2
        return (
            [first]
            if not half
            else _refused(column[:half], parse, first)
            + _refused(column[half:], parse, first + half)
        )
    return []


def _shown(scalar: pa.Scalar) -> str:
    try:
        value = scalar.as_py()
    except (ValueError, OverflowError):  # a time that Python has no word for
        return f"some {scalar.type}"
    return "nothing" if value is None else f"{value!r:.80}"
