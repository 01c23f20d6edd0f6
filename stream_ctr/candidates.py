"""What every wire format yields: events as they were read, in columns, before anybody asks whether they are events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

IMPRESSION, CLICK = 0, 1


class Refused(Exception):
    """A record or an event that cannot be read: a reason code (of a small fixed set, fit for a counter) and what was seen."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class Refusal(NamedTuple):
    """`within`: which event of the record; of the whole record -1."""

    row: int
    within: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Candidates:
    """n events; `row` is the index of the record that each came in, `within` its place there.

    `kind` is `IMPRESSION`, `CLICK` or -1, then `kind_text` says what was there instead. What is missing: a null in `impression_id` and
    `features`, NaN in `true_probability`, False in `has_time` and `has_features`. Categorical features are string arrays or dictionary
    arrays of int32 and strings, numeric ones float64. `unread`: has a member that nobody reads.
    """

    row: npt.NDArray[np.int64]
    within: npt.NDArray[np.int64]
    kind: npt.NDArray[np.int8]
    kind_text: pa.Array
    impression_id: pa.StringArray
    time: npt.NDArray[np.int64]
    has_time: npt.NDArray[np.bool_]
    has_features: npt.NDArray[np.bool_]
    true_probability: npt.NDArray[np.float64]
    features: Mapping[str, pa.Array]
    unread: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.row)

    def only(self, keep: npt.NDArray[np.bool_]) -> Candidates:
        """Those where `keep` [n] is true."""
        if keep.all():
            return self
        mask = pa.array(keep)
        return Candidates(
            self.row[keep],
            self.within[keep],
            self.kind[keep],
            self.kind_text.filter(mask),
            self.impression_id.filter(mask),
            self.time[keep],
            self.has_time[keep],
            self.has_features[keep],
            self.true_probability[keep],
            {name: column.filter(mask) for name, column in self.features.items()},
            self.unread[keep],
        )


def kind_codes(kind: pa.StringArray) -> npt.NDArray[np.int8]:
    """`IMPRESSION`, `CLICK`, or -1 for anything else [n].

    >>> kind_codes(pa.array(["click", "view", None, "impression"])).tolist()
    [1, -1, -1, 0]
    """
    found = pc.index_in(kind, value_set=pa.array(["impression", "click"]))
    return np.asarray(pc.fill_null(found, -1)).astype(np.int8)
