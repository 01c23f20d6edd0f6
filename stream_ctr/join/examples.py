"""Labelled examples, and the ledger of those that were trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_ctr.events.features import mix64

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Examples:
    """Columns of n impressions with their final labels, in the order in which they are learned.

    That is event-time order, save for examples that came with their label: they do not wait for a
    click, so they are ahead of the impressions beside them. `time` [n] is the event time in epoch
    milliseconds. `ids` is [n, F + C] and `values` [n, V]. `label` [n] is 1 for a clicked
    impression, else 0. `true_probability` [n] is NaN where it is unknown. Impressions before
    `closed_ms` [n] were learned before this example: that is its own time, and of an example that
    came with its label a label window less than the time at which it was released. It never falls
    from one example to the next. Indexing with a slice or a mask selects examples.
    """

    id_hash: npt.NDArray[np.uint64]
    time: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]
    label: npt.NDArray[np.uint8]
    true_probability: npt.NDArray[np.float64]
    closed_ms: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.time)

    def __getitem__(self, rows: slice | npt.NDArray[np.bool_]) -> Examples:
        return Examples(*(column[rows] for column in self.arrays().values()))

    @classmethod
    def concat(cls, parts: Sequence[Examples]) -> Examples:
        """Return the examples of one or more parts, in the order of the parts."""
        columns = zip(*(part.arrays().values() for part in parts), strict=True)
        return cls(*(np.concatenate(arrays) for arrays in columns))

    def arrays(self) -> dict[str, Array]:
        """Return the columns by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True)
class Ledger:
    """The count of the trained examples, and the sum of their hashes modulo 2^64.

    A hash is that of (impression id, label). The sum does not depend on the order, so a run that
    crashed and resumed can be compared with an undisturbed one.

    >>> one, two = np.array([1], np.uint64), np.array([2], np.uint64)
    >>> clicked, ignored = np.array([1]), np.array([0])
    >>> forward = Ledger().add(one, clicked).add(two, ignored)
    >>> forward == Ledger().add(two, ignored).add(one, clicked)
    True
    """

    count: int = 0
    sum: int = 0

    def add(self, id_hash: npt.NDArray[np.uint64], label: npt.NDArray[np.generic]) -> Ledger:
        """Return the ledger with n more examples."""
        with np.errstate(over="ignore"):
            hashed = mix64(id_hash * np.uint64(2) + label.astype(np.uint64))
        total = self.sum + int(hashed.sum(dtype=np.uint64))
        return Ledger(self.count + len(id_hash), total % (1 << 64))
