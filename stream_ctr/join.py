"""The label joiner: impressions wait for their clicks, in event time, and leave as labelled examples.

One example per impression, when its window closes (policy `wait`): label 1 if a click came within it, else 0. The window of an
impression at t is [t - early_click_wait, t + label_window], both ends included, and closes when the watermark passes its end.

An event is late when the watermark *of its own partition* had already passed the end of the window it belongs to. The global
watermark is the least of the partitions' and so never ahead of that; hence which events are late, which example has which label
and the order of examples - by (event time, partition, offset) of the impression - depend on the log alone, not on how polls
interleaved. The exception is a partition that was idle, no longer held the global watermark back, and comes back behind it.

State is arrays: a pool of fixed-width rows for pending impressions, a hash index over their ids and over those that left within the
duplicate horizon, and the clicks that wait for their impression.

>>> joiner = LabelJoiner(fields=1, label_window_ms=1000)
>>> joiner.push_impressions(Arrivals.of([7, 8], [0, 500]), np.array([[3], [4]], np.int32))
>>> joiner.push_clicks(Arrivals.of([7], [1000]))
>>> examples = joiner.advance(watermark=1501)
>>> examples.time.tolist(), examples.label.tolist(), examples.ids.tolist()
([0, 500], [1, 0], [[3], [4]])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields

import numba
import numpy as np
import numpy.typing as npt

from stream_ctr.features import mix64

Array = npt.NDArray[np.generic]

# The curve "a window of W loses x % of the clicks" is measured at these windows, in seconds.
CURVE_SECONDS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 43200, 86400)
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
)
_N = {name: index for index, name in enumerate(COUNTERS)}
_IMPRESSIONS, _IMPRESSIONS_LATE, _IMPRESSIONS_DUPLICATE, _CLICKS, _JOINED, _EARLY, _DUPLICATE, _LATE, _UNMATCHED = range(len(COUNTERS))
_NEVER = np.iinfo(np.int64).max
_EMPTY, _LEFT = np.int32(-1), np.int32(-2)  # slots of the index: a free place; an impression that is no longer pending


@dataclass(frozen=True, slots=True)
class Arrivals:
    """n events of one kind, in order of arrival: id_hash uint64, time int64 ms, partition int32, offset int64, and `limit` int64, the
    watermark of each event's own partition when it arrived (an event of a window that ends before it is late)."""

    id_hash: npt.NDArray[np.uint64]
    time: npt.NDArray[np.int64]
    partition: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    limit: npt.NDArray[np.int64]

    @classmethod
    def of(cls, id_hash: Sequence[int], time: Sequence[int]) -> Arrivals:
        """In time order, from one partition without lateness."""
        t = np.array(time, np.int64)
        limit = np.maximum.accumulate(t) if len(t) else t
        return cls(np.array(id_hash, np.uint64), t, np.zeros(len(t), np.int32), np.arange(len(t)), limit)

    def __len__(self) -> int:
        return len(self.time)


@dataclass(frozen=True, slots=True)
class Examples:
    """n impressions with their final labels: id_hash uint64 · time int64 ms · ids int32 [n, F] · values float32 [n, V] · label uint8 ·
    true_probability float64 (NaN: unknown)."""

    id_hash: npt.NDArray[np.uint64]
    time: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]
    label: npt.NDArray[np.uint8]
    true_probability: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.time)

    def __getitem__(self, rows: slice | npt.NDArray[np.bool_]) -> Examples:
        return Examples(*(getattr(self, field.name)[rows] for field in dataclass_fields(self)))

    @classmethod
    def concat(cls, parts: Sequence[Examples]) -> Examples:
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in dataclass_fields(cls)))

    def arrays(self) -> dict[str, Array]:
        return {field.name: getattr(self, field.name) for field in dataclass_fields(self)}


@dataclass(frozen=True, slots=True)
class Ledger:
    """(count, sum mod 2^64 of H(impression, label)) of all that was trained: free of order, so a run that crashed and resumed can be
    compared with one that did not.

    >>> a, b = Ledger().add(np.array([1], np.uint64), np.array([1])), Ledger().add(np.array([2], np.uint64), np.array([0]))
    >>> a.add(np.array([2], np.uint64), np.array([0])) == b.add(np.array([1], np.uint64), np.array([1]))
    True
    """

    count: int = 0
    sum: int = 0

    def add(self, id_hash: npt.NDArray[np.uint64], label: npt.NDArray[np.generic]) -> Ledger:
        with np.errstate(over="ignore"):
            hashed = mix64(id_hash * np.uint64(2) + label.astype(np.uint64))
        return Ledger(self.count + len(id_hash), (self.sum + int(hashed.sum(dtype=np.uint64))) % (1 << 64))


class LabelJoiner:
    """Pending impressions and waiting clicks; all lengths of time in milliseconds."""

    def __init__(
        self,
        *,
        fields: int,
        label_window_ms: int,
        value_fields: int = 0,
        early_click_wait_ms: int = 0,
        duplicate_horizon_ms: int = 3_600_000,
    ) -> None:
        self.label_window_ms = label_window_ms
        self.early_click_wait_ms = early_click_wait_ms
        # An id must be remembered for as long as a second impression or a late click of it can still be told from a new one.
        self.duplicate_horizon_ms = max(duplicate_horizon_ms, label_window_ms + early_click_wait_ms)
        self.counters = np.zeros(len(COUNTERS), np.int64)
        self.delays = np.zeros((2, len(CURVE_SECONDS) + 1), np.int64)  # [joined, late] clicks by delay
        self.watermark = -(1 << 62)
        self._pending = _Pool(fields, value_fields)
        self._index = _Index()
        self._clicks = _WaitingClicks()

    # -- in ---------------------------------------------------------------------------------------------------------------------------

    def push_impressions(
        self,
        arrivals: Arrivals,
        ids: npt.NDArray[np.int32],
        values: npt.NDArray[np.float32] | None = None,
        true_probability: npt.NDArray[np.float64] | None = None,
    ) -> None:
        """`ids` int32 [n, F], `values` float32 [n, V]."""
        n = len(arrivals)
        pool, waiting = self._pending, self._clicks
        pool.reserve(n)
        self._index.reserve(n)
        values = np.empty((n, 0), np.float32) if values is None else values
        truth = np.full(n, np.nan) if true_probability is None else true_probability
        _push_impressions(
            arrivals.id_hash, arrivals.time, arrivals.partition, arrivals.offset, arrivals.limit, ids, values, truth,
            self.label_window_ms, self.early_click_wait_ms, self.duplicate_horizon_ms,
            *pool.arrays(), pool.free, pool.sizes, *self._index.arrays(), self._index.sizes, *waiting.arrays(), waiting.sizes,
            self.counters, self.delays,
        )  # fmt: skip

    def push_clicks(self, arrivals: Arrivals) -> None:
        waiting = self._clicks
        waiting.reserve(len(arrivals))
        _push_clicks(
            arrivals.id_hash, arrivals.time, arrivals.limit,
            self.label_window_ms, self.early_click_wait_ms, self.duplicate_horizon_ms, self.watermark,
            self._pending.click, *self._index.arrays(), *waiting.arrays(), waiting.sizes, self.counters, self.delays,
        )  # fmt: skip

    # -- out --------------------------------------------------------------------------------------------------------------------------

    def advance(self, watermark: int) -> Examples:
        """Close every window that ends before `watermark`; the examples are in order and after all earlier ones. A watermark that would
        go back stays."""
        self.watermark = max(self.watermark, watermark)
        closed = np.flatnonzero(self._pending.end_before(self.watermark - self.label_window_ms))
        examples = self._leave(closed)
        self._forget()
        return examples

    def drain(self) -> Examples:
        """Close every window that is still open: the log has ended. The watermark stays, so that the next log can go on from it."""
        examples = self._leave(np.flatnonzero(self._pending.end_before(_NEVER)))
        self.counters[_UNMATCHED] += self._clicks.drop_all()
        return examples

    def _leave(self, slots: npt.NDArray[np.int64]) -> Examples:
        pool = self._pending
        slots = pool.in_order(slots)
        examples = Examples(
            pool.id_hash[slots], pool.time[slots], pool.ids[slots], pool.values[slots],
            (pool.click[slots] != _NEVER).astype(np.uint8), pool.truth[slots],
        )  # fmt: skip
        _mark_left(examples.id_hash, slots, *self._index.arrays())
        pool.release(slots)
        return examples

    def _forget(self) -> None:
        """Drop ids beyond the duplicate horizon and clicks that no impression can want any more."""
        self._index.expire(self.watermark, self.duplicate_horizon_ms)
        # An impression that is not late has t + label_window >= watermark, and wants clicks from t - early_click_wait on.
        self.counters[_UNMATCHED] += self._clicks.expire(self.watermark - self.label_window_ms - self.early_click_wait_ms)

    # -- what can be seen -------------------------------------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        return self._pending.count

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for part in (self._pending, self._index, self._clicks) for array in part.arrays())

    def counts(self) -> dict[str, int]:
        return {name: int(self.counters[index]) for name, index in _N.items()}

    @property
    def click_coverage(self) -> float | None:
        """Clicks that became a label or repeated one / clicks whose fate is known. None before the first."""
        counted = self.counts()
        joined = counted["clicks_joined"] + counted["clicks_duplicate"]
        known = joined + counted["clicks_late"] + counted["clicks_unmatched"]
        return joined / known if known else None

    def window_curve(self) -> list[dict[str, float]]:
        """What share of the clicks whose delay was measured a shorter or longer label window would lose.

        Exact for windows up to the present one; beyond it only clicks whose impression was still remembered are known.
        """
        measured = self.delays.sum(axis=0)
        total = int(measured.sum())
        if not total:
            return []
        lost = 1.0 - np.cumsum(measured)[:-1] / total
        return [{"window_seconds": w, "lost_share": round(float(x), 6)} for w, x in zip(CURVE_SECONDS, lost, strict=True)]

    # -- state ------------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Array]:
        """In an order of its own, and without what may be forgotten: equal for two joiners that would do the same from here on."""
        pool = self._pending
        slots = pool.in_order(np.flatnonzero(pool.end_before(_NEVER)))
        state: dict[str, Array] = {f"pending.{name}": array[slots] for name, array in pool.named().items()}
        state |= {f"known.{name}": array for name, array in self._index.left(self.watermark - self.duplicate_horizon_ms).items()}
        state |= {f"clicks.{name}": array for name, array in self._clicks.alive().items()}
        return state | {"counters": self.counters.copy(), "delays": self.delays.copy(), "watermark": np.array([self.watermark])}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        def part(prefix: str) -> dict[str, Array]:
            return {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}

        self.counters[:], self.delays[:] = state["counters"], state["delays"]
        self.watermark = int(state["watermark"][0])
        pending, known = part("pending."), part("known.")
        slots = self._pending.fill(pending)
        self._index.fill(known["key"], known["time"], np.full(len(known["key"]), _LEFT, np.int32))
        self._index.fill(pending["id_hash"], pending["time"], slots)
        self._clicks.fill(part("clicks."))


class _Pool:
    """Rows of pending impressions; a freed row is used again.

    `time` is _NEVER in free rows. sizes: [rows used, length of the free list].
    """

    def __init__(self, fields: int, value_fields: int) -> None:
        self.id_hash = np.empty(0, np.uint64)
        self.time = np.empty(0, np.int64)
        self.partition = np.empty(0, np.int32)
        self.offset = np.empty(0, np.int64)
        # When the window must have been open for its click to count: the later of the click's time and its partition's watermark; the
        # least over all clicks, _NEVER without one. Kept because an earlier impression of the same id may still take this one's place.
        self.click = np.empty(0, np.int64)
        self.truth = np.empty(0, np.float64)
        self.ids = np.empty((0, fields), np.int32)
        self.values = np.empty((0, value_fields), np.float32)
        self.free = np.empty(0, np.int32)
        self.sizes = np.zeros(2, np.int64)

    def named(self) -> dict[str, Array]:
        names = ("id_hash", "time", "partition", "offset", "click", "truth", "ids", "values")
        return {name: getattr(self, name) for name in names}

    def arrays(self) -> list[Array]:
        return list(self.named().values())

    @property
    def count(self) -> int:
        return int(self.sizes[0] - self.sizes[1])

    def end_before(self, time: int) -> npt.NDArray[np.bool_]:
        return self.time[: self.sizes[0]] < time

    def in_order(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """By (event time, partition, offset)."""
        return slots[np.lexsort((self.offset[slots], self.partition[slots], self.time[slots]))]

    def reserve(self, n: int) -> None:
        needed, have = self.count + n, len(self.time)
        if needed <= have:
            return
        capacity = max(needed, have + have // 2, 1024)
        for name, array in self.named().items():
            grown = np.empty((capacity, *array.shape[1:]), array.dtype)
            grown[:have] = array
            setattr(self, name, grown)
        self.free = np.concatenate([self.free, np.empty(capacity - have, np.int32)])

    def release(self, slots: npt.NDArray[np.int64]) -> None:
        self.time[slots] = _NEVER
        used, free = self.sizes
        self.free[free : free + len(slots)] = slots
        self.sizes[1] += len(slots)

    def fill(self, rows: Mapping[str, Array]) -> npt.NDArray[np.int32]:
        n = len(rows["time"])
        self.sizes[:] = 0
        self.reserve(n)
        for name, array in self.named().items():
            array[:n] = rows[name]
        self.sizes[0] = n
        return np.arange(n, dtype=np.int32)


class _Index:
    """id -> (event time, slot): open addressing, linear probing, at most two thirds full. sizes: [entries]."""

    def __init__(self) -> None:
        self._clear(1 << 12)
        self._expired_at = -(1 << 62)

    def _clear(self, capacity: int) -> None:
        self.key = np.zeros(capacity, np.uint64)
        self.time = np.zeros(capacity, np.int64)
        self.slot = np.full(capacity, _EMPTY, np.int32)
        self.sizes = np.zeros(1, np.int64)

    def arrays(self) -> list[Array]:
        return [self.key, self.time, self.slot]

    def reserve(self, n: int) -> None:
        if 3 * (int(self.sizes[0]) + n) > 2 * len(self.key):
            self._rebuild(self.slot != _EMPTY, n)

    def expire(self, watermark: int, horizon: int) -> None:
        """Forget impressions that left and are beyond the horizon; worth a pass once a quarter of the index is."""
        if watermark - self._expired_at < horizon // 16:
            return
        self._expired_at = watermark
        before = watermark - horizon
        old = (self.slot == _LEFT) & (self.time < before)
        if 4 * int(old.sum()) >= int(self.sizes[0]) + 1024:
            self._rebuild((self.slot != _EMPTY) & ~old, 0)

    def _rebuild(self, keep: npt.NDArray[np.bool_], room: int) -> None:
        key, time, slot = self.key[keep], self.time[keep], self.slot[keep]
        self._clear(max(1 << 12, 1 << int(2 * (len(key) + room) - 1).bit_length()))
        self.fill(key, time, slot)

    def fill(self, key: Array, time: Array, slot: npt.NDArray[np.int32]) -> None:
        if 3 * (int(self.sizes[0]) + len(key)) > 2 * len(self.key):
            self._rebuild(self.slot != _EMPTY, len(key))
        _insert_all(key, time, slot, *self.arrays(), self.sizes)

    def left(self, since: int) -> dict[str, Array]:
        """Impressions that left and are not beyond the horizon."""
        rows = np.flatnonzero((self.slot == _LEFT) & (self.time >= since))
        rows = rows[np.argsort(self.key[rows])]
        return {"key": self.key[rows], "time": self.time[rows]}


class _WaitingClicks:
    """Clicks whose impression has not come: a pool chained by id. sizes: [rows used, rows alive]."""

    def __init__(self) -> None:
        self._allocate(1024)

    def _allocate(self, capacity: int) -> None:
        self.key = np.zeros(capacity, np.uint64)
        self.time = np.zeros(capacity, np.int64)
        self.limit = np.zeros(capacity, np.int64)
        self.next = np.full(capacity, _EMPTY, np.int32)  # the next row of its chain
        self.head = np.full(1 << int(2 * capacity - 1).bit_length(), _EMPTY, np.int32)
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
        self._allocate(max(1024, n + room, 3 * n // 2))
        _wait_all(rows["key"], rows["time"], rows["limit"], *self.arrays(), self.sizes)

    def reserve(self, n: int) -> None:
        if int(self.sizes[0]) + n > len(self.key):
            self.fill(self.alive(), n)

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
        self._allocate(1024)
        return dropped


# -- compiled -------------------------------------------------------------------------------------------------------------------------
#
# One pass over the events in order of arrival. A hash map that a Python loop or a chain of numpy sorts would be far too slow for.


@numba.njit(cache=True, inline="always")
def _place(key, keys, slots):  # type: ignore[no-untyped-def]
    """Where `key` is, or the free place where it belongs. Keys are hashes already."""
    mask = len(keys) - 1
    at = np.int64((key ^ (key >> np.uint64(32))) & np.uint64(mask))
    while slots[at] != _EMPTY and keys[at] != key:
        at = (at + 1) & mask
    return at


@numba.njit(cache=True, inline="always")
def _chain(key, heads):  # type: ignore[no-untyped-def]
    return np.int64((key ^ (key >> np.uint64(29))) & np.uint64(len(heads) - 1))


@numba.njit(cache=True)
def _insert_all(key, time, slot, i_key, i_time, i_slot, i_sizes):  # type: ignore[no-untyped-def]
    for i in range(len(key)):
        at = _place(key[i], i_key, i_slot)
        if i_slot[at] == _EMPTY:
            i_sizes[0] += 1
        elif i_slot[at] >= 0 and slot[i] == _LEFT:
            continue
        i_key[at], i_time[at], i_slot[at] = key[i], time[i], slot[i]


@numba.njit(cache=True)
def _mark_left(key, slot, i_key, i_time, i_slot):  # type: ignore[no-untyped-def]
    for i in range(len(key)):
        at = _place(key[i], i_key, i_slot)
        if i_slot[at] == slot[i]:
            i_slot[at] = _LEFT


@numba.njit(cache=True)
def _wait(key, time, limit, c_key, c_time, c_limit, c_next, c_head, c_alive, c_sizes):  # type: ignore[no-untyped-def]
    row = c_sizes[0]
    at = _chain(key, c_head)
    c_key[row], c_time[row], c_limit[row], c_next[row], c_alive[row] = key, time, limit, c_head[at], True
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
    if p_click[slot] != _NEVER:
        counters[_DUPLICATE] += 1
        p_click[slot] = min(p_click[slot], max(time, limit))
        return
    p_click[slot] = max(time, limit)
    counters[_JOINED] += 1
    if time < impression_time:
        counters[_EARLY] += 1
    _count_delay(delays, 0, time - impression_time)


@numba.njit(cache=True, nogil=True)
def _push_impressions(  # type: ignore[no-untyped-def]
    id_hash, time, partition, offset, limit, ids, values, truth, window, early, horizon,
    p_id, p_time, p_partition, p_offset, p_click, p_truth, p_ids, p_values, p_free, p_sizes,
    i_key, i_time, i_slot, i_sizes, c_key, c_time, c_limit, c_next, c_head, c_alive, c_sizes, counters, delays,
):  # fmt: skip
    for i in range(len(time)):
        t = time[i]
        counters[_IMPRESSIONS] += 1
        if limit[i] > t + window:
            counters[_IMPRESSIONS_LATE] += 1
            continue
        at = _place(id_hash[i], i_key, i_slot)
        known = i_slot[at] != _EMPTY
        # Forgetting is lazy, so the horizon is measured here, against the event's own partition: what counts is the log, not the timing.
        if known and max(t, limit[i]) - i_time[at] <= horizon:
            counters[_IMPRESSIONS_DUPLICATE] += 1
            slot = i_slot[at]
            # The first in (time, partition, offset) stays, whichever was read first.
            if slot < 0 or (t, partition[i], offset[i]) >= (p_time[slot], p_partition[slot], p_offset[slot]):
                continue
            if p_click[slot] != _NEVER and p_click[slot] > t + window:
                p_click[slot] = _NEVER
                counters[_JOINED] -= 1
                counters[_LATE] += 1
        else:
            if p_sizes[1] > 0:
                p_sizes[1] -= 1
                slot = p_free[p_sizes[1]]
            else:
                slot = np.int32(p_sizes[0])
                p_sizes[0] += 1
            p_click[slot] = _NEVER
            if not known:
                i_sizes[0] += 1
        i_key[at], i_time[at], i_slot[at] = id_hash[i], t, slot
        p_id[slot], p_time[slot], p_partition[slot], p_offset[slot], p_truth[slot] = id_hash[i], t, partition[i], offset[i], truth[i]
        p_ids[slot] = ids[i]
        p_values[slot] = values[i]
        if c_sizes[1] == 0:
            continue
        row = c_head[_chain(id_hash[i], c_head)]
        while row != _EMPTY:
            if c_alive[row] and c_key[row] == id_hash[i] and c_time[row] >= t - early:
                c_alive[row] = False
                c_sizes[1] -= 1
                if c_time[row] > t + window or c_limit[row] > t + window:
                    counters[_LATE] += 1
                    _count_delay(delays, 1, c_time[row] - t)
                else:
                    _click(slot, t, c_time[row], c_limit[row], p_click, counters, delays)
            row = c_next[row]


@numba.njit(cache=True, nogil=True)
def _push_clicks(  # type: ignore[no-untyped-def]
    id_hash, time, limit, window, early, horizon, watermark, p_click,
    i_key, i_time, i_slot, c_key, c_time, c_limit, c_next, c_head, c_alive, c_sizes, counters, delays,
):  # fmt: skip
    for i in range(len(time)):
        counters[_CLICKS] += 1
        at = _place(id_hash[i], i_key, i_slot)
        slot, impression_time = i_slot[at], i_time[at]
        forgotten = slot == _LEFT and max(time[i], limit[i]) - impression_time > horizon
        if slot == _EMPTY or forgotten or time[i] < impression_time - early:
            if time[i] < watermark - window - early:
                counters[_UNMATCHED] += 1
            else:
                _wait(id_hash[i], time[i], limit[i], c_key, c_time, c_limit, c_next, c_head, c_alive, c_sizes)
        elif slot == _LEFT or time[i] > impression_time + window or limit[i] > impression_time + window:
            counters[_LATE] += 1
            _count_delay(delays, 1, time[i] - impression_time)
        else:
            _click(slot, impression_time, time[i], limit[i], p_click, counters, delays)
