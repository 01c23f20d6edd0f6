"""Cutting: the sequence of examples in batches of definite sizes, whatever the polls were."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from stream_ctr.join.examples import Array, Examples


class BatchCutter:
    """Examples that wait to fill a batch.

    `size_after` returns the size of the batch that follows so many examples. A batch never ends at
    the boundary of a poll, so the batches are a function of the sequence of examples alone.

    >>> def examples(first: int, n: int) -> Examples:
    ...     number = np.arange(first, first + n)
    ...     none = np.zeros((n, 0), np.float32)
    ...     label = np.zeros(n, np.uint8)
    ...     ids = none.astype(np.int32)
    ...     return Examples(number.astype(np.uint64), number, ids, none, label, label, number)
    >>> batches = BatchCutter(lambda seen: 3)
    >>> batches.add(examples(0, 2))
    >>> batches.next() is None
    True
    >>> batches.add(examples(2, 2))
    >>> batches.next().time.tolist(), batches.next(partial=True).time.tolist(), len(batches)
    ([0, 1, 2], [3], 0)
    """

    def __init__(self, size_after: Callable[[int], int]) -> None:
        self._size_after = size_after
        self._parts: list[Examples] = []
        self._cut = 0  # examples in the batches before

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
        size = self._size_after(self._cut)
        if count < size and not (partial and count):
            return None
        waiting = self._joined()
        self._parts = [waiting[size:]]
        self._cut += min(count, size)
        return waiting[:size]

    def peek(self) -> Examples | None:
        """Return the next batch without removing it, or None if it is not full."""
        size = self._size_after(self._cut)
        return self._joined()[:size] if len(self) >= size else None

    def _joined(self) -> Examples:
        if len(self._parts) > 1:
            self._parts = [Examples.concat(self._parts)]
        return self._parts[0]

    def state_dict(self) -> dict[str, Array]:
        """Return the waiting examples as arrays, if there are any, and `cut` [1]."""
        state: dict[str, Array] = {"cut": np.array([self._cut])}
        if len(self):
            arrays = self._joined().arrays()
            state |= {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        return state

    def load_state_dict(self, state: dict[str, Array]) -> None:
        """Restore what `state_dict` returned."""
        waiting = {name: array for name, array in state.items() if name != "cut"}
        if waiting:
            waiting.setdefault("closed_ms", waiting["time"])  # an older state lacks it
        self._parts = [Examples(**waiting)] if waiting else []
        self._cut = int(state["cut"][0])
