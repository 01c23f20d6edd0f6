"""A sample of the rows of a table, and what it shows about each column."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stream_ctr.errors import DataError
from stream_ctr.events.arrow_columns import one_array
from stream_ctr.logs.columns import as_text, is_moment, is_number, numbers
from stream_ctr.logs.rows import Rejected
from stream_ctr.logs.tables import Table
from stream_ctr.messages import one_line

_SAMPLE_ROWS = 20_000


@dataclass(frozen=True, slots=True)
class Sample:
    """The first rows of a table, with all columns that can be read, as text or as they are."""

    table: Table
    columns: Mapping[str, pa.Array]
    rows: int
    rejected: Rejected


def read_sample(table: Table, names: Sequence[str] | None = None) -> Sample:
    """Return a sample of the columns `names`, or of all.

    Raises `DataError` when the table has no row that can be read.
    """
    names = list(table.types) if names is None else list(names)
    rejected = Rejected()
    tables: list[pa.Table] = []
    count = 0
    for rows in table.batches(names, rejected):
        tables.append(rows.columns)
        count += len(rows.line)
        if count >= _SAMPLE_ROWS:
            break
    if not count:
        line, reason = min(rejected.first, default=(1, "there are no rows"))
        raise DataError(f"nothing in {table.name} can be read; {table.name}:{line}: {reason}")
    columns = {
        name: _together([one_array(part[name]) for part in tables])[:_SAMPLE_ROWS] for name in names
    }
    return Sample(table, columns, min(count, _SAMPLE_ROWS), rejected)


def _together(parts: Sequence[pa.Array]) -> pa.Array:
    """Return the parts as one array; as text, if blocks of the file have different types."""
    if len(parts) == 1:
        return parts[0]
    if len({part.type for part in parts}) > 1 or pa.types.is_dictionary(parts[0].type):
        parts = [as_text(part) for part in parts]
    return pa.concat_arrays(parts)


class Facts:
    """What the sample of a column shows."""

    def __init__(self, name: str, column: pa.Array) -> None:
        self.name = name
        self.type = column.type
        self.column = column
        self.rows = len(column)

    @cached_property
    def usable(self) -> bool:
        """Whether the type can be that of a feature."""
        kind = self.type
        return is_number(kind) or is_moment(kind) or self.is_boolean or self.text is not None

    @cached_property
    def is_boolean(self) -> bool:
        return bool(pa.types.is_boolean(self.type))

    @cached_property
    def text(self) -> pa.StringArray | None:
        """The values as text without the missing ones, or None if they cannot be text."""
        try:
            return as_text(self.column).drop_null()
        except (pa.ArrowException, UnicodeDecodeError):
            return None

    @cached_property
    def present(self) -> int:
        return len(self.text) if self.text is not None else 0

    @cached_property
    def distinct(self) -> int:
        return int(pc.count_distinct(self.text).as_py()) if self.present else 0

    @property
    def first(self) -> str:
        """The first value for a message."""
        return repr(one_line(self.text[0].as_py(), 40)) if self.text else "missing"

    @cached_property
    def numbers(self) -> npt.NDArray[np.float64] | None:
        """The numbers, or None if a value is none."""
        if self.is_boolean or is_moment(self.type) or not self.present:
            return None
        try:
            found = numbers(self.column if is_number(self.type) else self.text).cast(
                pa.float64(), safe=False
            )
        except pa.ArrowException:
            return None
        values = found.drop_null().to_numpy()
        return values if len(values) else None

    @cached_property
    def is_whole(self) -> bool:
        return self.numbers is not None and bool((self.numbers == np.floor(self.numbers)).all())

    @cached_property
    def has_leading_zeros(self) -> bool:
        found = pc.match_substring_regex(self.text, r"^0\d")
        return bool(self.present and pc.any(found).as_py())

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The words of the name, in lower case.

        >>> Facts("userId_v2", pa.array([1])).words
        ('user', 'id', 'v2')
        """
        return words(self.name)

    @cached_property
    def shown(self) -> str:
        """The name for a message."""
        return one_line(self.name, 60)


def words(name: str) -> tuple[str, ...]:
    """Return the words of a name in lower case.

    >>> words("userId_v2"), words("Zeit Stempel")
    (('user', 'id', 'v2'), ('zeit', 'stempel'))
    """
    parted = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name)
    return tuple(re.findall(r"[^\W_]+", parted.lower()))
