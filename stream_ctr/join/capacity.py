"""The division of the joiner's memory bound among its containers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stream_ctr.join.join_arrays import IdIndex, WaitingClicks, pending_pool

OverBound = Literal["spill", "evict"]

_LEAST_BYTES = 1 << 20
_LEAST_ROWS = 256
_PENDING_BYTES = pending_pool().row_bytes


@dataclass(frozen=True, slots=True)
class Capacity:
    """The number of rows of each container.

    `index` is the number of positions of the id index, a power of two. At most two thirds of them
    hold ids, and at most three quarters of these ids are pending.
    """

    index: int
    pending: int
    features: int
    clicks: int

    @classmethod
    def of(
        cls, max_bytes: int, *, columns: int, feature_bytes: int, over_bound: OverBound
    ) -> Capacity:
        """Return the rows for which `max_bytes` have room.

        The features of an impression are `columns` columns, and a row of them in memory takes
        `feature_bytes`. Raises `ValueError` when `max_bytes` are too few to work in.
        """
        least = max(_LEAST_BYTES, _LEAST_ROWS * feature_bytes * 16 // 3)
        if max_bytes < least:
            mebibytes = f"{least / 2**20:.3g}"
            raise ValueError(
                f"at least {mebibytes} MiB are needed for {columns} columns of features"
            )
        clicks = max_bytes // 16 // WaitingClicks.ROW_BYTES
        rest = max_bytes - clicks * WaitingClicks.ROW_BYTES
        if over_bound == "spill":  # the features of most pending impressions may be on disk
            id_bytes = IdIndex.ENTRY_BYTES + _PENDING_BYTES // 2
            index = _power_of_two_below(max_bytes * 4 // 5 // id_bytes)
            pending = index // 2
            rest -= index * IdIndex.ENTRY_BYTES + pending * _PENDING_BYTES
            return cls(index, pending, rest // feature_bytes, clicks)
        index = _power_of_two_below(max_bytes * 3 // 8 // IdIndex.ENTRY_BYTES)
        rest -= index * IdIndex.ENTRY_BYTES
        pending = min(index // 2, rest // (_PENDING_BYTES + feature_bytes))
        return cls(index, pending, pending, clicks)

    @property
    def ids(self) -> int:
        return 2 * self.index // 3

    @property
    def at_once(self) -> int:
        """The most events that are pushed at once, so that room can be made for them."""
        return max(1, min(self.ids // 16, self.pending // 4, self.features // 4, self.clicks // 4))


def _power_of_two_below(n: int) -> int:
    """Return the greatest power of two that is at most n."""
    return 1 << (n.bit_length() - 1)
