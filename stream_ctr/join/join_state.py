"""What the joiner holds, as arrays: rows that are used again, an index over ids, clicks that wait; and the compiled passes over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# The curve "a window of W loses x % of the clicks" is measured at these windows, in seconds.
CURVE_SECONDS = (
    1,
    2,
    5,
    10,
    20,
    30,
    60,
    120,
    300,
    600,
    1200,
    1800,
    3600,
    7200,
    14400,
    28800,
    43200,
    86400,
)
COUNTERS = (
    "impressions",  # that arrived, late and duplicate ones included
    "impressions_late",  # came after their own window had closed: never an example
    "impressions_duplicate",
    "clicks",
    "clicks_joined",
    "clicks_early",  # joined, and before their impression in event time
    "clicks_duplicate",  # a second click of the same impression
    "clicks_late",  # their impression is known, but they were made or came after its window
    "clicks_unmatched",  # no impression came while they waited
    "impressions_spilled",  # their features were on disk for a while
    "impressions_evicted",  # given up to keep within max_bytes, their labels unseen: a uniform share
    "clicks_evicted",  # of such an impression, or given up while they waited
    "ids_forgotten_early",  # before the duplicate horizon, to keep within max_bytes
)
(
    IMPRESSIONS,
    IMPRESSIONS_LATE,
    IMPRESSIONS_DUPLICATE,
    CLICKS,
    JOINED,
    EARLY,
    DUPLICATE,
    LATE,
    UNMATCHED,
) = range(9)
SPILLED, EVICTED_IMPRESSIONS, EVICTED_CLICKS, FORGOTTEN = range(9, len(COUNTERS))
NEVER = np.iinfo(np.int64).max
# Slots of the index: a free place; an impression that is no longer pending; one that was given up.
EMPTY, LEFT, EVICTED = np.int32(-1), np.int32(-2), np.int32(-3)
_LOTS = 4096  # an impression draws one by its id; those with the least are given up first


class Rows:
    """Rows of columns, which grow in place; a freed row is used again. sizes: [rows used, length of the free list]."""

    def __init__(self, **columns: Array) -> None:
        self.columns = columns
        self.free = np.empty(0, np.int32)
        self.sizes = np.zeros(2, np.int64)

    def __getitem__(self, name: str) -> Array:
        return self.columns[name]

    def used(self, name: str) -> Array:
        return self.columns[name][: self.sizes[0]]

    def arrays(self) -> list[Array]:
        return list(self.columns.values())

    @property
    def count(self) -> int:
        return int(self.sizes[0] - self.sizes[1])

    def reserve(self, n: int, most: int) -> None:
        needed, have = self.count + n, len(self.free)
        if needed > have:
            # Memory is taken with the size; making it larger moves pages, not what is in them.
            self._resize(max(needed, min(have + max(have // 16, min(have, 1 << 16), 1024), most)))

    def _resize(self, capacity: int) -> None:
        # Not by a copy, which would need the room of both for a moment. Nobody keeps a view of these arrays.
        for array in (*self.arrays(), self.free):
            array.resize((capacity, *array.shape[1:]), refcheck=False)

    def release(self, rows: npt.NDArray[np.int64]) -> None:
        free = int(self.sizes[1])
        self.free[free : free + len(rows)] = rows
        self.sizes[1] += len(rows)

    def fill(self, rows: Mapping[str, Array], n: int) -> None:
        self.sizes[:] = 0
        self._resize(n)
        for name, array in self.columns.items():
            array[:] = rows[name]
        self.sizes[0] = n


def pending_rows() -> Rows:
    """`time` is NEVER in free rows."""
    return Rows(
        id_hash=np.empty(0, np.uint64),
        time=np.empty(0, np.int64),
        partition=np.empty(0, np.int32),
        offset=np.empty(0, np.int64),
        # When the window must have been open for its click to count: the later of the click's time and its partition's watermark; the
        # least over all clicks, NEVER without one. Kept because an earlier impression of the same id may still take this one's place.
        click=np.empty(0, np.int64),
        place=np.empty(0, np.int64),  # the row of its features; negative: on disk
    )


def feature_rows(fields: int, value_fields: int, id_bytes: int) -> Rows:
    """`ids` are as `pack` makes them."""
    ids = np.empty((0, id_bytes * fields), np.uint8)
    return Rows(
        truth=np.empty(0, np.float64), ids=ids, values=np.empty((0, value_fields), np.float32)
    )


INDEX_BYTES, PENDING_BYTES = (
    8 + 8 + 4,
    8 + 8 + 4 + 8 + 8 + 8 + 4,
)  # a row with its place in the free list
CLICK_BYTES = 8 + 8 + 8 + 4 + 1 + 16  # a row with its share of the heads of chains


def in_order(pending: Rows, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """By (event time, partition, offset)."""
    return slots[
        np.lexsort((pending["offset"][slots], pending["partition"][slots], pending["time"][slots]))
    ]


def oldest(time: npt.NDArray[np.int64], before: int, about: int) -> npt.NDArray[np.int64]:
    """Rows with a time before `before`: all of them or, when that is more than `about`, about so many, older than the others."""
    old = time < before
    n = int(np.count_nonzero(old))
    if n > about:
        sample = np.sort(
            time[:: max(1, len(time) >> 16)]
        )  # of millions it is enough to tell where the oldest end
        sample = sample[sample < before]
        if len(sample):
            old = time <= sample[min(len(sample) * about // n * 9 // 8, len(sample) - 1)]
    return np.flatnonzero(old)


class Index:
    """id -> (event time, slot): open addressing, linear probing, at most two thirds full, of at most `most` places. sizes: [entries]."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._clear(min(1 << 12, most))
        self._expired_at = -(1 << 62)

    def _clear(self, capacity: int) -> None:
        self.key = np.zeros(capacity, np.uint64)
        self.time = np.zeros(capacity, np.int64)
        self.slot = np.full(capacity, EMPTY, np.int32)
        self.sizes = np.zeros(1, np.int64)

    def arrays(self) -> list[Array]:
        return [self.key, self.time, self.slot]

    @property
    def entries(self) -> int:
        return int(self.sizes[0])

    def reserve(self, n: int, horizon_start: int) -> int:
        """Room for n more ids. Where there is none, those that left before `horizon_start` are forgotten, then the oldest of the others;
        how many others."""
        capacity = self._capacity(n)
        if capacity <= self.most:
            self._grow(capacity)
            return 0
        self._purge(horizon_start)
        before, most = self.entries, 2 * self.most // 3
        while self.entries + n > most:
            self._purge(self._age_of(self.entries - min(most * 7 // 8, most - n)))
        return before - self.entries

    def _capacity(self, n: int) -> int:
        capacity = len(self.key)
        while 3 * (self.entries + n) > 2 * capacity:
            capacity *= 2
        return capacity

    def _grow(self, capacity: int) -> None:
        have = len(self.key)
        if capacity == have:
            return
        for array in self.arrays():  # in place: a copy would need the room of both
            array.resize(capacity, refcheck=False)
        self.slot[have:] = EMPTY
        self._purge(np.iinfo(np.int64).min)

    def _purge(self, before: int) -> None:
        _rehash(*self.arrays(), self.sizes, before)

    def _age_of(self, n: int) -> int:
        """A time before which about the n oldest of those that left did, and at least one."""
        step = max(
            1, len(self.slot) >> 16
        )  # ids are hashes: every so many places are a fair sample
        sample = np.sort(self.time[::step][self.slot[::step] <= LEFT])
        return int(sample[min(n // step, len(sample) - 1)]) + 1

    def expire(self, watermark: int, horizon: int) -> None:
        """Forget impressions that left and are beyond the horizon; worth a pass once a quarter of the index is."""
        if watermark - self._expired_at < horizon // 16:
            return
        self._expired_at = watermark
        before = watermark - horizon
        old = int(((self.slot <= LEFT) & (self.time < before)).sum())
        if 4 * old >= self.entries + 1024:
            self._purge(before)
            self._shrink()

    def _shrink(self) -> None:
        if 8 * self.entries < len(self.key) and len(self.key) > 1 << 12:
            keep = self.slot != EMPTY
            key, time, slot = self.key[keep], self.time[keep], self.slot[keep]
            self._clear(min(1 << 12, self.most))
            self.fill(key, time, slot)

    def fill(self, key: Array, time: Array, slot: npt.NDArray[np.int32]) -> None:
        self._grow(self._capacity(len(key)))
        _insert_all(key, time, slot, *self.arrays(), self.sizes)

    def left(self, since: int) -> dict[str, Array]:
        """Impressions that left and are not beyond the horizon."""
        rows = np.flatnonzero((self.slot <= LEFT) & (self.time >= since))
        rows = rows[np.argsort(self.key[rows])]
        left: dict[str, Array] = {"key": self.key[rows], "time": self.time[rows]}
        evicted = self.slot[rows] == EVICTED
        return left | {"evicted": evicted} if evicted.any() else left


class WaitingClicks:
    """Clicks whose impression has not come: at most `most`, in a pool chained by id. sizes: [rows used, rows alive]."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._allocate(min(1024, most))

    def _allocate(self, capacity: int) -> None:
        self.key = np.zeros(capacity, np.uint64)
        self.time = np.zeros(capacity, np.int64)
        self.limit = np.zeros(capacity, np.int64)
        self.next = np.full(capacity, EMPTY, np.int32)  # the next row of its chain
        self.head = np.full(1 << int(2 * capacity - 1).bit_length(), EMPTY, np.int32)
        self.sizes = np.zeros(2, np.int64)
        self.alive_rows = np.zeros(capacity, np.bool_)

    def arrays(self) -> list[Array]:
        return [self.key, self.time, self.limit, self.next, self.head, self.alive_rows]

    @property
    def count(self) -> int:
        return int(self.sizes[1])

    def alive(self) -> dict[str, Array]:
        rows = np.flatnonzero(self.alive_rows[: self.sizes[0]])
        rows = rows[np.lexsort((self.limit[rows], self.key[rows], self.time[rows]))]
        return {"key": self.key[rows], "time": self.time[rows], "limit": self.limit[rows]}

    def fill(self, rows: Mapping[str, Array], room: int = 0) -> None:
        n = len(rows["key"])
        self._allocate(max(n + room, min(max(1024, 3 * n // 2), self.most)))
        _wait_all(rows["key"], rows["time"], rows["limit"], *self.arrays(), self.sizes)

    def reserve(self, n: int) -> int:
        """Room for n more. Where there is none the oldest go; how many."""
        if int(self.sizes[0]) + n <= min(len(self.key), self.most):
            return 0
        rows, dropped = self.alive(), 0
        if self.count + n > self.most:
            dropped = self.count - min(self.most * 3 // 4, self.most - n)
        self.fill({name: array[dropped:] for name, array in rows.items()}, n)
        return dropped

    def expire(self, before: int) -> int:
        """Drop clicks older than `before`; how many."""
        used = int(self.sizes[0])
        old = self.alive_rows[:used] & (self.time[:used] < before)
        dropped = int(old.sum())
        self.alive_rows[:used][old] = False
        self.sizes[1] -= dropped
        return dropped

    def drop_all(self) -> int:
        dropped = self.count
        self._allocate(min(1024, self.most))
        return dropped


# -- compiled ------------------------------------------------------------------------------------
#
# One pass over the events in order of arrival. A hash map that a Python loop or a chain of numpy sorts would be far too slow for.


def pack(ids: npt.NDArray[np.int32], id_bytes: int) -> npt.NDArray[np.uint8]:
    """The low 3 or 4 bytes of `ids` [n, F] -> [n, F * id_bytes].

    >>> pack(np.array([[1, 0x012345]], np.int32), 3).tolist()
    [[1, 0, 0, 69, 35, 1]]
    """
    return _pack(ids) if id_bytes == 3 else np.ascontiguousarray(ids).view(np.uint8)


def unpack(packed: npt.NDArray[np.uint8], id_bytes: int) -> npt.NDArray[np.int32]:
    return _unpack(packed) if id_bytes == 3 else packed.view(np.int32)


@numba.njit(cache=True, nogil=True)
def _pack(ids):  # type: ignore[no-untyped-def]
    packed = np.empty((ids.shape[0], ids.shape[1] * 3), np.uint8)
    for i in range(ids.shape[0]):
        for j in range(ids.shape[1]):
            id_ = ids[i, j]
            packed[i, 3 * j], packed[i, 3 * j + 1], packed[i, 3 * j + 2] = (
                id_ & 0xFF,
                (id_ >> 8) & 0xFF,
                (id_ >> 16) & 0xFF,
            )
    return packed


@numba.njit(cache=True, nogil=True)
def _unpack(packed):  # type: ignore[no-untyped-def]
    ids = np.empty((packed.shape[0], packed.shape[1] // 3), np.int32)
    for i in range(ids.shape[0]):
        for j in range(ids.shape[1]):
            ids[i, j] = (
                np.int32(packed[i, 3 * j])
                | np.int32(packed[i, 3 * j + 1]) << 8
                | np.int32(packed[i, 3 * j + 2]) << 16
            )
    return ids


@numba.njit(cache=True, inline="always")
def _home(key, mask):  # type: ignore[no-untyped-def]
    """Where `key` would be in an index with nobody else. Keys are hashes already."""
    return np.int64((key ^ (key >> np.uint64(32))) & np.uint64(mask))


@numba.njit(cache=True, inline="always")
def _place(key, keys, slots):  # type: ignore[no-untyped-def]
    """Where `key` is, or the free place where it belongs."""
    mask = len(keys) - 1
    at = _home(key, mask)
    while slots[at] != EMPTY and keys[at] != key:
        at = (at + 1) & mask
    return at


@numba.njit(cache=True, inline="always")
def _chain(key, heads):  # type: ignore[no-untyped-def]
    return np.int64((key ^ (key >> np.uint64(29))) & np.uint64(len(heads) - 1))


@numba.njit(cache=True)
def _insert_all(key, time, slot, i_key, i_time, i_slot, i_sizes):  # type: ignore[no-untyped-def]
    for i in range(len(key)):
        at = _place(key[i], i_key, i_slot)
        if i_slot[at] == EMPTY:
            i_sizes[0] += 1
        i_key[at], i_time[at], i_slot[at] = key[i], time[i], slot[i]


@numba.njit(cache=True)
def mark(key, slot, fate, i_key, i_time, i_slot):  # type: ignore[no-untyped-def]
    for i in range(len(key)):
        at = _place(key[i], i_key, i_slot)
        if i_slot[at] == slot[i]:
            i_slot[at] = fate


@numba.njit(cache=True)
def _rehash(i_key, i_time, i_slot, i_sizes, before):  # type: ignore[no-untyped-def]
    """Put every entry where it belongs, without room of its own, and leave out those that left before `before`.

    From an empty place on, entry after entry is taken out and put back. All between its home and there were seen to by then, and stay.
    In a table that has just grown, whose new half is empty, some go further on instead, and stay there when their turn comes again.
    """
    mask = len(i_key) - 1
    start = 0
    while i_slot[(start - 1) & mask] != EMPTY:
        start += 1
    for step in range(len(i_key)):
        at = (start + step) & mask
        key, time, slot = i_key[at], i_time[at], i_slot[at]
        if slot == EMPTY:
            continue
        i_slot[at] = EMPTY
        if slot <= LEFT and time < before:
            i_sizes[0] -= 1
            continue
        to = _place(key, i_key, i_slot)
        i_key[to], i_time[to], i_slot[to] = key, time, slot


@numba.njit(cache=True)
def _lot(key):  # type: ignore[no-untyped-def]
    """What an id draws, of _LOTS; not by the hash that chooses examples for the baseline."""
    key = (key ^ np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    return np.int64(
        ((key ^ (key >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)) >> np.uint64(52)
    )


@numba.njit(cache=True)
def thin(id_hash, time, place, n, in_memory):  # type: ignore[no-untyped-def]
    """The slots of the n pending impressions with the least lots, and of those that drew the same as the last of them."""
    drawn = np.zeros(_LOTS, np.int64)
    for slot in range(len(time)):
        if time[slot] != NEVER and (place[slot] >= 0 or not in_memory):
            drawn[_lot(id_hash[slot])] += 1
    last, count = 0, drawn[0]
    while count < n:
        last += 1
        count += drawn[last]
    slots = np.empty(count, np.int64)
    at = 0
    for slot in range(len(time)):
        if (
            time[slot] != NEVER
            and (place[slot] >= 0 or not in_memory)
            and _lot(id_hash[slot]) <= last
        ):
            slots[at] = slot
            at += 1
    return slots


@numba.njit(cache=True)
def count_live(time, place, first, live):  # type: ignore[no-untyped-def]
    for slot in range(len(time)):
        at = (~place[slot] >> 16) - first
        if time[slot] != NEVER and place[slot] < 0 and at < len(live):
            live[at] += 1


@numba.njit(cache=True)
def _wait(key, time, limit, c_key, c_time, c_limit, c_next, c_head, c_alive, c_sizes):  # type: ignore[no-untyped-def]
    row = c_sizes[0]
    at = _chain(key, c_head)
    c_key[row], c_time[row], c_limit[row], c_next[row], c_alive[row] = (
        key,
        time,
        limit,
        c_head[at],
        True,
    )
    c_head[at] = row
    c_sizes[0] += 1
    c_sizes[1] += 1


@numba.njit(cache=True)
def _wait_all(key, time, limit, c_key, c_time, c_limit, c_next, c_head, c_alive, c_sizes):  # type: ignore[no-untyped-def]
    for i in range(len(key)):
        _wait(key[i], time[i], limit[i], c_key, c_time, c_limit, c_next, c_head, c_alive, c_sizes)


@numba.njit(cache=True)
def _count_delay(delays, row, delay):  # type: ignore[no-untyped-def]
    at = 0
    while at < len(CURVE_SECONDS) and delay > CURVE_SECONDS[at] * 1000:
        at += 1
    delays[row, at] += 1


@numba.njit(cache=True)
def _click(slot, impression_time, time, limit, p_click, counters, delays):  # type: ignore[no-untyped-def]
    """A click inside the window of a pending impression."""
    if p_click[slot] != NEVER:
        counters[DUPLICATE] += 1
        p_click[slot] = min(p_click[slot], max(time, limit))
        return
    p_click[slot] = max(time, limit)
    counters[JOINED] += 1
    if time < impression_time:
        counters[EARLY] += 1
    _count_delay(delays, 0, time - impression_time)


@numba.njit(cache=True, inline="always")
def _take(free, sizes):  # type: ignore[no-untyped-def]
    """A row that nobody has."""
    if sizes[1] > 0:
        sizes[1] -= 1
        return free[sizes[1]]
    sizes[0] += 1
    return np.int32(sizes[0] - 1)


@numba.njit(cache=True, nogil=True)
def push_impressions(  # type: ignore[no-untyped-def]
    id_hash, time, partition, offset, limit, ids, values, truth, window, early, horizon,
    p_id, p_time, p_partition, p_offset, p_click, p_place, p_free, p_sizes, f_truth, f_ids, f_values, f_free, f_sizes,
    i_key, i_time, i_slot, i_sizes, c_key, c_time, c_limit, c_next, c_head, c_alive, c_sizes, counters, delays,
):  # fmt: skip
    for i in range(len(time)):
        t = time[i]
        counters[IMPRESSIONS] += 1
        if limit[i] > t + window:
            counters[IMPRESSIONS_LATE] += 1
            continue
        at = _place(id_hash[i], i_key, i_slot)
        known = i_slot[at] != EMPTY
        # Forgetting is lazy, so the horizon is measured here, against the event's own partition: what counts is the log, not the timing.
        if known and max(t, limit[i]) - i_time[at] <= horizon:
            counters[IMPRESSIONS_DUPLICATE] += 1
            slot = i_slot[at]
            # The first in (time, partition, offset) stays, whichever was read first.
            if slot < 0 or (t, partition[i], offset[i]) >= (
                p_time[slot],
                p_partition[slot],
                p_offset[slot],
            ):
                continue
            if p_click[slot] != NEVER and p_click[slot] > t + window:
                p_click[slot] = NEVER
                counters[JOINED] -= 1
                counters[LATE] += 1
        else:
            slot = _take(p_free, p_sizes)
            p_click[slot] = NEVER
            p_place[slot] = -1
            if not known:
                i_sizes[0] += 1
        i_key[at], i_time[at], i_slot[at] = id_hash[i], t, slot
        p_id[slot], p_time[slot], p_partition[slot], p_offset[slot] = (
            id_hash[i],
            t,
            partition[i],
            offset[i],
        )
        if p_place[slot] < 0:
            p_place[slot] = _take(f_free, f_sizes)
        row = p_place[slot]
        f_truth[row] = truth[i]
        f_ids[row] = ids[i]
        f_values[row] = values[i]
        if c_sizes[1] == 0:
            continue
        # Which of several counts as the first must not depend on the order of the chain: a restart makes that anew.
        inside, first, least = 0, NEVER, NEVER
        c = c_head[_chain(id_hash[i], c_head)]
        while c != EMPTY:
            if c_alive[c] and c_key[c] == id_hash[i] and c_time[c] >= t - early:
                c_alive[c] = False
                c_sizes[1] -= 1
                if c_time[c] > t + window or c_limit[c] > t + window:
                    counters[LATE] += 1
                    _count_delay(delays, 1, c_time[c] - t)
                else:
                    inside += 1
                    first, least = min(first, c_time[c]), min(least, max(c_time[c], c_limit[c]))
            c = c_next[c]
        if inside > 0:
            _click(slot, t, first, least, p_click, counters, delays)
            counters[DUPLICATE] += inside - 1


@numba.njit(cache=True, nogil=True)
def push_clicks(  # type: ignore[no-untyped-def]
    id_hash, time, limit, window, early, horizon, watermark, p_click,
    i_key, i_time, i_slot, c_key, c_time, c_limit, c_next, c_head, c_alive, c_sizes, counters, delays,
):  # fmt: skip
    for i in range(len(time)):
        counters[CLICKS] += 1
        at = _place(id_hash[i], i_key, i_slot)
        slot, impression_time = i_slot[at], i_time[at]
        forgotten = slot <= LEFT and max(time[i], limit[i]) - impression_time > horizon
        if slot == EMPTY or forgotten or time[i] < impression_time - early:
            if time[i] < watermark - window - early:
                counters[UNMATCHED] += 1
            else:
                _wait(
                    id_hash[i],
                    time[i],
                    limit[i],
                    c_key,
                    c_time,
                    c_limit,
                    c_next,
                    c_head,
                    c_alive,
                    c_sizes,
                )
        elif slot == EVICTED:
            counters[EVICTED_CLICKS] += 1
        elif (
            slot == LEFT
            or time[i] > impression_time + window
            or limit[i] > impression_time + window
        ):
            counters[LATE] += 1
            _count_delay(delays, 1, time[i] - impression_time)
        else:
            _click(slot, impression_time, time[i], limit[i], p_click, counters, delays)
