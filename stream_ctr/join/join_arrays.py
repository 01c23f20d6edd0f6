"""The containers of the join state: arrays that grow in place up to a bound.

`RowPool` holds rows that are used again, `IdIndex` the ids of known impressions, and
`WaitingClicks` the clicks without an impression. `join_state` has the compiled passes over them.

A secret decides where an id stands in the last two, so that no producer can choose ids that stand
in one another's way. Nothing else depends on it: what is released, evicted, forgotten or saved is
chosen by ids and times, never by position.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from stream_ctr.join.join_state import (
    ALIVE,
    EMPTY,
    EVICTED,
    FREED,
    LEFT,
    USED,
    FeatureArrays,
    IndexArrays,
    PendingArrays,
    Secret,
    WaitingArrays,
    insert_all,
    nth_time,
    rehash,
    wait_all,
)
from stream_ctr.join.watermark import NOT_YET

Array = npt.NDArray[Any]
Arrays = TypeVar("Arrays", bound=PendingArrays | FeatureArrays)

_LEAST_INDEX = 1 << 12
_LEAST_WAITING = 1 << 10
# Where an answer need not be exact, about this many entries are looked at.
_SAMPLE = 1 << 16


def new_secret() -> Secret:
    """Return a secret from the operating system."""
    secret = np.frombuffer(secrets.token_bytes(24), np.uint64)
    return secret | np.array([0, 1, 1], np.uint64)


def pending_pool() -> RowPool[PendingArrays]:
    """Return a pool without pending impressions."""
    return RowPool(
        PendingArrays(
            id_hash=np.empty(0, np.uint64),
            time=np.empty(0, np.int64),
            partition=np.empty(0, np.int32),
            place=np.empty(0, np.int64),
            click_end=np.empty(0, np.int64),
            delay=np.empty(0, np.int32),
            feature_row=np.empty(0, np.int64),
            free=np.empty(0, np.int32),
            sizes=np.zeros(2, np.int64),
        )
    )


def feature_pool(fields: int, value_fields: int, id_bytes: int) -> RowPool[FeatureArrays]:
    """Return a pool without features; `fields` is F + C, `value_fields` is V."""
    return RowPool(
        FeatureArrays(
            true_probability=np.empty(0, np.float64),
            ids=np.empty((0, id_bytes * fields), np.uint8),
            values=np.empty((0, value_fields), np.float32),
            free=np.empty(0, np.int32),
            sizes=np.zeros(2, np.int64),
        )
    )


class RowPool(Generic[Arrays]):
    """Rows of several columns, which grow in place. A released row is used again.

    `arrays` holds the columns and, last, `free` (the stack of released rows) and `sizes`.
    """

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays
        every: list[Array] = [*arrays]
        self._resizable = every[:-1]
        self.columns = every[:-2]

    @property
    def row_bytes(self) -> int:
        """The bytes of a row, with its place on the stack."""
        return sum(array.itemsize * int(np.prod(array.shape[1:])) for array in self._resizable)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._resizable)

    @property
    def capacity(self) -> int:
        return len(self.arrays.free)

    @property
    def used(self) -> int:
        """The number of rows from the start that are, or were, in use."""
        return int(self.arrays.sizes[USED])

    @property
    def count(self) -> int:
        """The number of rows in use."""
        return int(self.arrays.sizes[USED] - self.arrays.sizes[FREED])

    def reserve(self, n: int, limit: int) -> None:
        """Make room for n more rows, and for some that may follow, up to `limit` rows in all."""
        needed = self.count + n
        capacity = self.capacity
        if needed > capacity:
            spare = max(capacity // 16, min(capacity, _SAMPLE), 1024)
            self._resize(max(needed, min(capacity + spare, limit)))

    def _resize(self, capacity: int) -> None:
        # In place: a copy would need the memory of both for a moment. No view of an array is kept.
        for array in self._resizable:
            array.resize((capacity, *array.shape[1:]), refcheck=False)

    def release(self, rows: npt.NDArray[np.int64]) -> None:
        """Mark rows as free."""
        freed = int(self.arrays.sizes[FREED])
        self.arrays.free[freed : freed + len(rows)] = rows
        self.arrays.sizes[FREED] += len(rows)

    def fill(self, columns: list[Array]) -> None:
        """Replace all rows by these columns, which have the order of `self.columns`."""
        self.arrays.sizes[:] = 0
        self._resize(len(columns[0]))
        for array, column in zip(self.columns, columns, strict=True):
            array[:] = column
        self.arrays.sizes[USED] = len(columns[0])


class IdIndex:
    """The ids of known impressions, each with its event time and its slot or state.

    The table is at most two thirds full, and has at most `limit` positions (a power of two).
    """

    ENTRY_BYTES = 8 + 8 + 4

    def __init__(self, limit: int, secret: Secret) -> None:
        self.limit = limit
        self._secret = secret
        self._clear(min(_LEAST_INDEX, limit))
        self._expired_at = NOT_YET

    def _clear(self, capacity: int) -> None:
        self.arrays = IndexArrays(
            key=np.zeros(capacity, np.uint64),
            time=np.zeros(capacity, np.int64),
            slot=np.full(capacity, EMPTY, np.int32),
            secret=self._secret,
            sizes=np.zeros(1, np.int64),
        )

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._columns)

    @property
    def _columns(self) -> tuple[Array, Array, Array]:
        return self.arrays.key, self.arrays.time, self.arrays.slot

    @property
    def capacity(self) -> int:
        return len(self.arrays.key)

    @property
    def entries(self) -> int:
        return int(self.arrays.sizes[USED])

    def reserve(self, n: int, horizon_start: int) -> int:
        """Make room for n more ids.

        If the table may not grow, entries of released and evicted impressions are forgotten:
        those before `horizon_start`, then the oldest of the others. Return how many others.
        """
        capacity = self._capacity_for(n)
        if capacity <= self.limit:
            self._grow(capacity)
            return 0
        self._purge(horizon_start)
        before = self.entries
        most = 2 * self.limit // 3
        while self.entries + n > most:
            keep = min(most * 7 // 8, most - n)
            self._purge(self._time_of_oldest(self.entries - keep))
        return before - self.entries

    def _capacity_for(self, n: int) -> int:
        capacity = self.capacity
        while 3 * (self.entries + n) > 2 * capacity:
            capacity *= 2
        return capacity

    def _grow(self, capacity: int) -> None:
        have = self.capacity
        if capacity == have:
            return
        for array in self._columns:  # in place: a copy would need the memory of both
            array.resize(capacity, refcheck=False)
        self.arrays.slot[have:] = EMPTY
        self._purge(np.iinfo(np.int64).min)

    def _purge(self, before: int) -> None:
        rehash(self.arrays, before)

    def _time_of_oldest(self, n: int) -> int:
        """Return a time that n of the released and evicted entries precede, and those with it."""
        removable = int((self.arrays.slot <= LEFT).sum())
        return int(nth_time(self.arrays.time, self.arrays.slot, min(n, removable) - 1)) + 1

    def expire(self, watermark: int, horizon_ms: int) -> None:
        """Forget released and evicted impressions that are beyond the horizon.

        A pass over the table is made only when it removes about a quarter of the entries.
        """
        if watermark - self._expired_at < horizon_ms // 16:
            return
        self._expired_at = watermark
        before = watermark - horizon_ms
        removable = int(((self.arrays.slot <= LEFT) & (self.arrays.time < before)).sum())
        if 4 * removable >= self.entries + 1024:
            self._purge(before)
            self._shrink()

    def _shrink(self) -> None:
        if 8 * self.entries < self.capacity and self.capacity > _LEAST_INDEX:
            key, time, slot = self._columns
            kept = slot != EMPTY
            self._clear(min(_LEAST_INDEX, self.limit))
            self.fill(key[kept], time[kept], slot[kept])

    def fill(
        self,
        key: npt.NDArray[np.uint64],
        time: npt.NDArray[np.int64],
        slot: npt.NDArray[np.int32],
    ) -> None:
        """Insert n entries."""
        self._grow(self._capacity_for(len(key)))
        insert_all(key, time, slot, self.arrays)

    def state_dict(self, since: int) -> dict[str, Array]:
        """Return the released and evicted impressions with a time of at least `since`, by id."""
        key, time, slot = self._columns
        rows = np.flatnonzero((slot <= LEFT) & (time >= since))
        rows = rows[np.argsort(key[rows])]
        state: dict[str, Array] = {"key": key[rows], "time": time[rows]}
        evicted = slot[rows] == EVICTED
        return state | {"evicted": evicted} if evicted.any() else state


class WaitingClicks:
    """At most `limit` clicks whose impression has not arrived."""

    ROW_BYTES = 8 + 8 + 8 + 4 + 1 + 16  # the last: its share of the heads of chains

    def __init__(self, limit: int, secret: Secret) -> None:
        self.limit = limit
        self._secret = secret
        self._allocate(min(_LEAST_WAITING, limit))

    def _allocate(self, capacity: int) -> None:
        chains = 1 << int(2 * capacity - 1).bit_length()
        self.arrays = WaitingArrays(
            key=np.zeros(capacity, np.uint64),
            time=np.zeros(capacity, np.int64),
            limit=np.zeros(capacity, np.int64),
            next=np.full(capacity, EMPTY, np.int32),
            head=np.full(chains, EMPTY, np.int32),
            alive=np.zeros(capacity, np.bool_),
            secret=self._secret,
            sizes=np.zeros(2, np.int64),
        )

    @property
    def nbytes(self) -> int:
        a = self.arrays
        columns: tuple[Array, ...] = (a.key, a.time, a.limit, a.next, a.head, a.alive)
        return sum(array.nbytes for array in columns)

    @property
    def capacity(self) -> int:
        return len(self.arrays.key)

    @property
    def count(self) -> int:
        return int(self.arrays.sizes[ALIVE])

    def state_dict(self) -> dict[str, Array]:
        """Return the clicks in the order (time, id, limit)."""
        key, time, limit = self.arrays.key, self.arrays.time, self.arrays.limit
        rows = np.flatnonzero(self.arrays.alive[: self.arrays.sizes[USED]])
        rows = rows[np.lexsort((limit[rows], key[rows], time[rows]))]
        return {"key": key[rows], "time": time[rows], "limit": limit[rows]}

    def fill(self, state: Mapping[str, Array], room: int = 0) -> None:
        """Replace all clicks by these, and make room for so many more."""
        n = len(state["key"])
        self._allocate(max(n + room, min(max(_LEAST_WAITING, 3 * n // 2), self.limit)))
        wait_all(state["key"], state["time"], state["limit"], self.arrays)

    def reserve(self, n: int) -> int:
        """Make room for n more clicks. Return how many of the oldest were dropped for it."""
        if int(self.arrays.sizes[USED]) + n <= min(self.capacity, self.limit):
            return 0
        clicks = self.state_dict()
        dropped = 0
        if self.count + n > self.limit:
            dropped = self.count - min(self.limit * 3 // 4, self.limit - n)
        self.fill({name: array[dropped:] for name, array in clicks.items()}, n)
        return dropped

    def expire(self, before: int) -> int:
        """Drop the clicks older than `before`. Return how many."""
        used = int(self.arrays.sizes[USED])
        alive = self.arrays.alive[:used]
        old = alive & (self.arrays.time[:used] < before)
        dropped = int(old.sum())
        alive[old] = False
        self.arrays.sizes[ALIVE] -= dropped
        return dropped

    def drop_all(self) -> int:
        """Drop all clicks. Return how many."""
        dropped = self.count
        self._allocate(min(_LEAST_WAITING, self.limit))
        return dropped
