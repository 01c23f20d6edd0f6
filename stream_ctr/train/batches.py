"""Cutting: the sequence of examples in batches of exactly `size`, whatever the polls were."""

from __future__ import annotations

import numpy as np

from stream_ctr.join.examples import Array, Examples


class BatchCutter:
    """Examples that wait to fill a batch.

    A batch never ends at the boundary of a poll, so the batches are a function of the sequence of
    examples alone.

    >>> def examples(first: int, n: int) -> Examples:
    ...     number = np.arange(first, first + n)
    ...     none = np.zeros((n, 0), np.float32)
    ...     label = np.zeros(n, np.uint8)
    ...     ids = none.astype(np.int32)
    ...     return Examples(number.astype(np.uint64), number, ids, none, label, label)
    >>> batches = BatchCutter(3)
    >>> batches.add(examples(0, 2))
    >>> batches.next() is None
    True
    >>> batches.add(examples(2, 2))
    >>> batches.next().time.tolist(), batches.next(partial=True).time.tolist(), len(batches)
    ([0, 1, 2], [3], 0)
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._parts: list[Examples] = []

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def add(self, examples: Examples) -> None:
        """Append examples."""
        self._parts.append(examples)

    def next(self, *, partial: bool = False) -> Examples | None:
        """Remove and return the next batch, or None if it is not full.

        With `partial`, return what there is, or None if there is nothing.
        """
        count = len(self)
        if count < self.size and not (partial and count):
            return None
        waiting = self._joined()
        self._parts = [waiting[self.size :]]
        return waiting[: self.size]

    def peek(self) -> Examples | None:
        """Return the next batch without removing it, or None if it is not full."""
        return self._joined()[: self.size] if len(self) >= self.size else None

    def _joined(self) -> Examples:
        if len(self._parts) > 1:
            self._parts = [Examples.concat(self._parts)]
        return self._parts[0]

    def state_dict(self) -> dict[str, Array]:
        """Return the waiting examples as arrays, or nothing if there are none."""
        if not len(self):
            return {}
        arrays = self._joined().arrays()
        return {name: np.ascontiguousarray(array) for name, array in arrays.items()}

    def load_state_dict(self, state: dict[str, Array]) -> None:
        """Restore what `state_dict` returned."""
        self._parts = [Examples(**state)] if state else []
