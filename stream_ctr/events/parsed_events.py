"""Events as parsed from their wire format, in columns, before they are validated.

The readers of both wire formats (`json_events`, `arrow_events`) return `ParsedEvents`, and a
`Rejection` for each record that they cannot read. The decoder then applies one set of rules to
the events of both formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

IMPRESSION = 0
CLICK = 1
EXAMPLE = 2
UNKNOWN_KIND = -1
KINDS = ("impression", "click", "example")
_KINDS = pa.array(KINDS)


class InvalidRecord(Exception):
    """Raised when a record cannot be read.

    `reason` is one of a small fixed set of codes, fit for the name of a counter.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class Rejection(NamedTuple):
    """A rejected record, or a rejected event of a record whose other events may be good.

    `row` is the index of the record and `within` the index of the event in it. `value` is a record
    that holds this event alone, or None when the whole record is rejected.
    """

    row: int
    reason: str
    message: str
    within: int = 0
    value: bytes | None = None


@dataclass(frozen=True, slots=True)
class ParsedEvents:
    """n parsed events. `row` is the index of each one's record, `within` its index in the record.

    `kind` is `IMPRESSION`, `CLICK`, `EXAMPLE` or `UNKNOWN_KIND`; for the latter, `kind_text` holds
    what the record said. `label` is that of examples, and NaN for all other kinds. Missing values
    are null in `impression_id` and `features`, NaN in `label` and `true_probability`, and False in
    `has_time` and `has_features`. Numeric features are float64. Categorical features are strings,
    or a dictionary of strings with int32 indices. `has_unknown_fields` marks events with a member
    that the decoder does not read.
    """

    row: npt.NDArray[np.int64]
    within: npt.NDArray[np.int64]
    kind: npt.NDArray[np.int8]
    kind_text: pa.StringArray
    impression_id: pa.StringArray
    time: npt.NDArray[np.int64]
    has_time: npt.NDArray[np.bool_]
    has_features: npt.NDArray[np.bool_]
    label: npt.NDArray[np.float64]
    true_probability: npt.NDArray[np.float64]
    features: Mapping[str, pa.Array]
    has_unknown_fields: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.row)

    @classmethod
    def concatenate(cls, parts: Sequence[ParsedEvents]) -> ParsedEvents:
        """Return the events of one or more parts, in order of `row` and `within`."""
        columns: dict[str, Any] = {
            name: _concatenated([getattr(part, name) for part in parts]) for name in _COLUMNS
        }
        features = {
            name: _concatenated([part.features[name] for part in parts])
            for name in parts[0].features
        }
        events = cls(**columns, features=features)
        row_step = np.diff(events.row)
        in_order = (row_step > 0) | ((row_step == 0) & (np.diff(events.within) > 0))
        if in_order.all():
            return events
        return events.take(np.lexsort((events.within, events.row)))

    def take(self, indices: npt.NDArray[np.int64]) -> ParsedEvents:
        """Return the events at these indices, in this order."""
        arrow_indices = pa.array(indices)

        def taken(column: Any) -> Any:
            if isinstance(column, np.ndarray):
                return column[indices]
            return column.take(arrow_indices)

        columns: dict[str, Any] = {name: taken(getattr(self, name)) for name in _COLUMNS}
        features = {name: taken(column) for name, column in self.features.items()}
        return ParsedEvents(**columns, features=features)


_COLUMNS = [field.name for field in fields(ParsedEvents) if field.name != "features"]


def kind_codes(kind: pa.StringArray) -> npt.NDArray[np.int8]:
    """Return `IMPRESSION`, `CLICK`, `EXAMPLE` or, for anything else, `UNKNOWN_KIND` [n].

    >>> kind_codes(pa.array(["click", "view", None, "impression", "example"])).tolist()
    [1, -1, -1, 0, 2]
    """
    codes = pc.fill_null(pc.index_in(kind, value_set=_KINDS), UNKNOWN_KIND)
    return np.asarray(codes).astype(np.int8)


def _concatenated(columns: Sequence[Any]) -> Any:
    """Return one column of NumPy or Arrow. If any part is a dictionary, all become one."""
    if len(columns) == 1:
        return columns[0]
    if isinstance(columns[0], np.ndarray):
        return np.concatenate(columns)
    if any(pa.types.is_dictionary(column.type) for column in columns):
        # The other way around, a dictionary's words could take many times their memory.
        columns = [
            column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
            for column in columns
        ]
    return pa.concat_arrays(columns)
