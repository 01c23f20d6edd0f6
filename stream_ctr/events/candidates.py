"""What every wire format yields: events as they were read, in columns, before anybody asks whether they are events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

IMPRESSION, CLICK = 0, 1
_KINDS = pa.array(["impression", "click"])


class Refused(Exception):
    """A record that cannot be read: a reason code (of a small fixed set, fit for a counter) and what was seen."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class Refusal(NamedTuple):
    """Of the record at `row`."""

    row: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Candidates:
    """n events; `row` is the index of the record that each came in, `within` its place there.

    `kind` is `IMPRESSION`, `CLICK` or -1, then `kind_text` says what was there instead. What is missing: a null in `impression_id` and
    `features`, NaN in `true_probability`, False in `has_time` and `has_features`. Categorical features are strings or a dictionary of
    int32 and strings, numeric ones float64. `unread`: has a member that nobody reads.
    """

    row: npt.NDArray[np.int64]
    within: npt.NDArray[np.int64]
    kind: npt.NDArray[np.int8]
    kind_text: pa.StringArray
    impression_id: pa.StringArray
    time: npt.NDArray[np.int64]
    has_time: npt.NDArray[np.bool_]
    has_features: npt.NDArray[np.bool_]
    true_probability: npt.NDArray[np.float64]
    features: Mapping[str, pa.Array]
    unread: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.row)

    @classmethod
    def together(cls, parts: Sequence[Candidates]) -> Candidates:
        """All of them, in order of row and place. Takes one part at least."""
        columns: dict[str, Any] = {
            name: _concatenated([getattr(part, name) for part in parts]) for name in _PLAIN
        }
        features = {
            name: _concatenated([part.features[name] for part in parts])
            for name in parts[0].features
        }
        whole = cls(**columns, features=features)
        steps = np.diff(whole.row)
        if np.all((steps > 0) | ((steps == 0) & (np.diff(whole.within) > 0))):
            return whole
        return whole.at(np.lexsort((whole.within, whole.row)))

    def at(self, indices: npt.NDArray[np.int64]) -> Candidates:
        """The events at these indices, in this order."""
        where = pa.array(indices)

        def taken(column: Any) -> Any:
            return column[indices] if isinstance(column, np.ndarray) else column.take(where)

        columns: dict[str, Any] = {name: taken(getattr(self, name)) for name in _PLAIN}
        return Candidates(
            **columns, features={name: taken(column) for name, column in self.features.items()}
        )


_PLAIN = [field.name for field in fields(Candidates) if field.name != "features"]


def kind_codes(kind: pa.StringArray) -> npt.NDArray[np.int8]:
    """`IMPRESSION`, `CLICK`, or -1 for anything else [n].

    >>> kind_codes(pa.array(["click", "view", None, "impression"])).tolist()
    [1, -1, -1, 0]
    """
    found = pc.index_in(kind, value_set=_KINDS)
    return np.asarray(pc.fill_null(found, -1)).astype(np.int8)


def _concatenated(columns: Sequence[Any]) -> Any:
    """Arrays of NumPy or of Arrow."""
    if len(columns) == 1:
        return columns[0]
    if isinstance(columns[0], np.ndarray):
        return np.concatenate(columns)
    if any(
        pa.types.is_dictionary(column.type) for column in columns
    ):  # words unfolded may be many times as large
        columns = [
            column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
            for column in columns
        ]
    return pa.concat_arrays(columns)
