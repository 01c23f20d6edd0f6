"""The label joiner: impressions wait for their clicks, in event time, and leave as labelled examples.

One example per impression, when its window closes (policy `wait`): label 1 if a click came within it, else 0. The window of an
impression at t is [t - early_click_wait, t + label_window], both ends included, and closes when the watermark passes its end.

An event is late when the watermark *of its own partition* had already passed the end of the window it belongs to. The global
watermark is the least of the partitions' and so never ahead of that; hence which events are late, which example has which label
and the order of examples - by (event time, partition, offset) of the impression - depend on the log alone, not on how polls
interleaved. The exception is a partition that was idle, no longer held the global watermark back, and comes back behind it.

State is arrays: rows of fixed width for pending impressions, with their features apart; a hash index over their ids and over those that
left within the duplicate horizon; and the clicks that wait for their impression. All of it is bounded in bytes (`Shares`). Past the
bound the features of the newest pending impressions go to disk (`spill`) until their windows close. Who they are and whether a click
came stays in memory, so that spilling changes no example, no label, no order and no other counter. What cannot go to disk is given up,
by the hash of its id and never by its label, or by age, and counted. Giving up depends on how polls fell, which the log does not tell.

>>> joiner = LabelJoiner(fields=1, label_window_ms=1000)
>>> joiner.push_impressions(Arrivals.of([7, 8], [0, 500]), np.array([[3], [4]], np.int32))
>>> joiner.push_clicks(Arrivals.of([7], [1000]))
>>> examples = joiner.advance(watermark=1501)
>>> examples.time.tolist(), examples.label.tolist(), examples.ids.tolist()
([0, 500], [1, 0], [[3], [4]])
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, Literal

import numba
import numpy as np
import numpy.typing as npt

from stream_ctr import spill
from stream_ctr.features import mix64
from stream_ctr.spill import Spill

_log = logging.getLogger(__name__)

Array = npt.NDArray[Any]

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
    "impressions_spilled",  # their features were on disk for a while
    "impressions_evicted",  # given up to keep within max_bytes, their labels unseen: a uniform share
    "clicks_evicted",  # of such an impression, or given up while they waited
    "ids_forgotten_early",  # before the duplicate horizon, to keep within max_bytes
)
_N = {name: index for index, name in enumerate(COUNTERS)}
_IMPRESSIONS, _IMPRESSIONS_LATE, _IMPRESSIONS_DUPLICATE, _CLICKS, _JOINED, _EARLY, _DUPLICATE, _LATE, _UNMATCHED = range(9)
_SPILLED, _EVICTED_IMPRESSIONS, _EVICTED_CLICKS, _FORGOTTEN = range(9, len(COUNTERS))
_NEVER = np.iinfo(np.int64).max
# Slots of the index: a free place; an impression that is no longer pending; one that was given up.
_EMPTY, _LEFT, _EVICTED = np.int32(-1), np.int32(-2), np.int32(-3)
_LEAST_BYTES, _LEAST_ROWS = 1 << 20, 256
AT_MOST = 1 << 16  # examples that leave at once
_LOTS = 4096  # an impression draws one by its id; those with the least are given up first


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


@dataclass(frozen=True, slots=True)
class Shares:
    """How many rows of each kind `max_bytes` are room for, and how many events are taken in at once so that there can be room.

    `index` is its capacity, a power of two; two thirds of it are ids, and three quarters of those at most may be pending.
    """

    index: int
    pending: int
    features: int
    clicks: int

    @classmethod
    def of(cls, max_bytes: int, *, feature_bytes: int, over_bound: str) -> Shares:
        clicks = max_bytes // 16 // _CLICK_BYTES
        if over_bound == "spill":  # most features may be on disk
            index = _power_of_two(max_bytes * 3 // 4 // (_INDEX_BYTES + _PENDING_BYTES // 2))
            pending = index // 2
            left = max_bytes - clicks * _CLICK_BYTES - index * _INDEX_BYTES - pending * _PENDING_BYTES
            return cls(index, pending, left // feature_bytes, clicks)
        index = _power_of_two(max_bytes * 3 // 8 // _INDEX_BYTES)
        left = max_bytes - clicks * _CLICK_BYTES - index * _INDEX_BYTES
        pending = min(index // 2, left // (_PENDING_BYTES + feature_bytes))
        return cls(index, pending, pending, clicks)

    @property
    def ids(self) -> int:
        return 2 * self.index // 3

    @property
    def at_once(self) -> int:
        return max(1, min(self.ids // 16, self.pending // 4, self.features // 4, self.clicks // 4))


def _power_of_two(most: int) -> int:
    return 1 << (most.bit_length() - 1)


class LabelJoiner:
    """Pending impressions and waiting clicks; all lengths of time in milliseconds.

    `nbytes` stays within `max_bytes` after every call. Past it, with `over_bound="spill"`, the features of the newest pending impressions
    go to files in `spill_directory` (without one, a temporary directory), which belongs to this joiner; with "evict", or where there is no
    room for more, a uniform share of the pending impressions is given up. Raises ValueError for a bound too small to work in.
    """

    def __init__(
        self,
        *,
        fields: int,
        label_window_ms: int,
        value_fields: int = 0,
        early_click_wait_ms: int = 0,
        duplicate_horizon_ms: int = 3_600_000,
        max_bytes: int = 1 << 30,
        over_bound: Literal["spill", "evict"] = "spill",
        spill_directory: Path | None = None,
    ) -> None:
        self.label_window_ms = label_window_ms
        self.early_click_wait_ms = early_click_wait_ms
        # An id must be remembered for as long as a second impression or a late click of it can still be told from a new one.
        self.duplicate_horizon_ms = max(duplicate_horizon_ms, label_window_ms + early_click_wait_ms)
        self.max_bytes, self.over_bound = max_bytes, over_bound
        self.counters = np.zeros(len(COUNTERS), np.int64)
        self.delays = np.zeros((2, len(CURVE_SECONDS) + 1), np.int64)  # [joined, late] clicks by delay
        self.watermark = -(1 << 62)
        feature_bytes = 8 + 4 * fields + 4 * value_fields + 4
        least = max(_LEAST_BYTES, _LEAST_ROWS * feature_bytes * 16 // 3)
        if max_bytes < least:
            raise ValueError(f"at least {least / 2**20:.3g} MiB are needed for {fields + value_fields} columns of features")
        self._shares = Shares.of(max_bytes, feature_bytes=feature_bytes, over_bound=over_bound)
        self._pending = _pending_rows()
        self._features = _feature_rows(fields, value_fields)
        self._index = _Index(self._shares.index)
        self._clicks = _WaitingClicks(self._shares.clicks)
        self._spill = Spill(spill_directory)
        self._spill_failed = False

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
        values = np.empty((n, 0), np.float32) if values is None else values
        truth = np.full(n, np.nan) if true_probability is None else true_probability
        pending, features, waiting = self._pending, self._features, self._clicks
        for some in self._parts(n):
            self._make_room(some.stop - some.start)
            _push_impressions(
                arrivals.id_hash[some], arrivals.time[some], arrivals.partition[some], arrivals.offset[some], arrivals.limit[some],
                ids[some], values[some], truth[some],
                self.label_window_ms, self.early_click_wait_ms, self.duplicate_horizon_ms,
                *pending.arrays(), pending.free, pending.sizes, *features.arrays(), features.free, features.sizes,
                *self._index.arrays(), self._index.sizes, *waiting.arrays(), waiting.sizes, self.counters, self.delays,
            )  # fmt: skip

    def push_clicks(self, arrivals: Arrivals) -> None:
        waiting = self._clicks
        for some in self._parts(len(arrivals)):
            self.counters[_EVICTED_CLICKS] += waiting.reserve(some.stop - some.start)
            _push_clicks(
                arrivals.id_hash[some], arrivals.time[some], arrivals.limit[some],
                self.label_window_ms, self.early_click_wait_ms, self.duplicate_horizon_ms, self.watermark,
                self._pending["click"], *self._index.arrays(), *waiting.arrays(), waiting.sizes, self.counters, self.delays,
            )  # fmt: skip

    def _parts(self, n: int) -> Iterator[slice]:
        at_once = self._shares.at_once
        return (slice(start, min(start + at_once, n)) for start in range(0, n, at_once))

    # -- out --------------------------------------------------------------------------------------------------------------------------

    def advance(self, watermark: int, at_most: int = AT_MOST) -> Examples:
        """Close every window that ends before `watermark`: the first `at_most` examples of those closed and not yet returned, in order and
        after all earlier ones. Call again until there are none. A watermark that would go back stays."""
        self.watermark = max(self.watermark, watermark)
        examples = self._leave(self.watermark - self.label_window_ms, at_most)
        self._forget()
        return examples

    def drain(self, at_most: int = AT_MOST) -> Examples:
        """Close every window that is still open: the log has ended. As `advance`, to be called until there are no more examples. The
        watermark stays, so that the next log can go on from it."""
        self.counters[_UNMATCHED] += self._clicks.drop_all()
        return self._leave(_NEVER, at_most)

    def _leave(self, before: int, at_most: int) -> Examples:
        pending = self._pending
        slots = _in_order(pending, _oldest(pending.used("time"), before, at_most))[:at_most]
        features = self._features_of(slots)
        examples = Examples(
            pending["id_hash"][slots], pending["time"][slots], features["ids"], features["values"],
            (pending["click"][slots] != _NEVER).astype(np.uint8), features["truth"],
        )  # fmt: skip
        self._remove(slots, _LEFT)
        if self._spill.segments:
            left = int(examples.time[-1]) if len(slots) else before  # nobody older is pending
            self._spill.drop(self._spill.ended_before(left if self.spilled else _NEVER))
        return examples

    def _features_of(self, slots: npt.NDArray[np.int64]) -> dict[str, Array]:
        """The feature columns of pending impressions, from memory and from disk."""
        place = self._pending["place"][slots]
        here = place >= 0
        if here.all():
            return {name: array[place] for name, array in self._features.columns.items()}
        spilled, columns = self._spill.read(place[~here]), {}
        for name, array in self._features.columns.items():
            columns[name] = column = np.empty((len(place), *array.shape[1:]), array.dtype)
            column[here] = array[place[here]]
            if column.size:
                column[~here] = spilled[name]
        return columns

    def _remove(self, slots: npt.NDArray[np.int64], fate: np.int32) -> None:
        """Pending impressions are pending no more."""
        _mark(self._pending["id_hash"][slots], slots, fate, *self._index.arrays())
        place = self._pending["place"][slots]
        self._features.release(place[place >= 0])
        self._pending["time"][slots] = _NEVER
        self._pending.release(slots)

    def _forget(self) -> None:
        """Drop ids beyond the duplicate horizon and clicks that no impression can want any more."""
        self._index.expire(self.watermark, self.duplicate_horizon_ms)
        # An impression that is not late has t + label_window >= watermark, and wants clicks from t - early_click_wait on.
        self.counters[_UNMATCHED] += self._clicks.expire(self.watermark - self.label_window_ms - self.early_click_wait_ms)

    # -- the bound --------------------------------------------------------------------------------------------------------------------

    def _make_room(self, n: int) -> None:
        """For n more impressions, each of which may need a row of every kind."""
        pending, features, shares = self._pending, self._features, self._shares
        if pending.count + n > shares.pending:
            self._evict(pending.count - min(shares.pending * 3 // 4, shares.pending - n))
        if features.count + n > shares.features:
            enough = min(shares.features * 3 // 4, shares.features - n)
            if self.over_bound == "spill":
                self._spill_newest(features.count - enough)
            if features.count > enough:
                self._evict(features.count - enough, in_memory=True)
        pending.reserve(n, shares.pending)
        features.reserve(n, shares.features)
        self.counters[_FORGOTTEN] += self._index.reserve(n, self.watermark - self.duplicate_horizon_ms)

    def _spill_newest(self, n: int) -> None:
        """The newest wait longest before anyone asks for them."""
        time, place = self._pending.used("time"), self._pending.used("place")
        slots = np.flatnonzero((place >= 0) & (time != _NEVER))
        slots = slots[np.argpartition(time[slots], len(slots) - n)[len(slots) - n :]]
        self.counters[_SPILLED] += self._write(_in_order(self._pending, slots))

    def _write(self, slots: npt.NDArray[np.int64]) -> int:
        """Put the features of these impressions, which are in order, into new segments; how many fitted onto the disk."""
        place, time = self._pending["place"], self._pending["time"]
        for start in range(0, len(slots), spill.SEGMENT_ROWS):
            some = slots[start : start + spill.SEGMENT_ROWS]
            try:
                places = self._spill.write(self._features_of(some), last=int(time[some[-1]]))
            except OSError as error:
                if not self._spill_failed:
                    _log.error("pending impressions cannot be put on disk: %s; a share of them is given up instead, and counted", error)
                self._spill_failed = True
                return start
            self._spill_failed = False
            was = place[some]
            self._features.release(was[was >= 0])
            place[some] = places
        return len(slots)

    def _evict(self, n: int, *, in_memory: bool = False) -> None:
        """Give up n pending impressions or a few more, by the hash of their ids: who stays is a fair sample, of either label."""
        time, place = self._pending.used("time"), self._pending.used("place")
        slots = _thin(self._pending["id_hash"], time, place, n, in_memory)
        clicked = int((self._pending["click"][slots] != _NEVER).sum())
        self.counters[_JOINED] -= clicked
        self.counters[_EVICTED_CLICKS] += clicked
        self.counters[_EVICTED_IMPRESSIONS] += len(slots)
        self._remove(slots, _EVICTED)
        if self._spill.segments:
            self._tidy_segments()

    def _tidy_segments(self) -> None:
        """Delete segments of which nobody is pending, and write anew those of which few are: else the disk fills with the given up."""
        numbers = np.array(sorted(self._spill.segments))
        rows = np.array([self._spill.segments[number].rows for number in numbers.tolist()])
        sparse = numbers[2 * self._live_rows(numbers) < rows]
        time, place = self._pending.used("time"), self._pending.used("place")
        slots = np.flatnonzero((place < 0) & (time != _NEVER))
        slots = slots[np.isin(spill.segment_of(place[slots]), sparse)]
        self._write(_in_order(self._pending, slots))
        self._spill.drop(numbers[self._live_rows(numbers) == 0].tolist())

    def _live_rows(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many pending impressions are in each of these segments."""
        live = np.zeros(int(numbers[-1] - numbers[0]) + 1, np.int64)
        _count_live(self._pending.used("time"), self._pending.used("place"), numbers[0], live)
        return live[numbers - numbers[0]]

    # -- what can be seen -------------------------------------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        return self._pending.count

    @property
    def spilled(self) -> int:
        """How many of the pending have their features on disk now."""
        return self._pending.count - self._features.count

    @property
    def nbytes(self) -> int:
        """What is allocated."""
        arrays = [*self._pending.arrays(), self._pending.free, *self._features.arrays(), self._features.free]
        return sum(array.nbytes for array in [*arrays, *self._index.arrays(), *self._clicks.arrays()])

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
        """In an order of its own, and without what may be forgotten: equal for two joiners that would do the same from here on, as long as
        nothing is spilled or given up. What is on disk is in the files that `segments` names."""
        pending = self._pending
        slots = _in_order(pending, np.flatnonzero(pending.used("time") < _NEVER))
        place = pending["place"][slots]
        here = place >= 0
        state: dict[str, Array] = {f"pending.{name}": array[slots] for name, array in pending.columns.items() if name != "place"}
        state |= {f"pending.{name}": array[place[here]] for name, array in self._features.columns.items()}
        if not here.all():
            state["pending.place"] = np.where(here, np.cumsum(here) - 1, place)
        state |= {f"segments.{name}": array for name, array in self._spill.state_dict().items()}
        state |= {f"known.{name}": array for name, array in self._index.left(self.watermark - self.duplicate_horizon_ms).items()}
        state |= {f"clicks.{name}": array for name, array in self._clicks.alive().items()}
        return state | {"counters": self.counters.copy(), "delays": self.delays.copy(), "watermark": np.array([self.watermark])}

    def segments(self) -> dict[str, tuple[Path, str, int]]:
        """Name -> (path, SHA-256, bytes) of the files that belong to the state of this moment. They never change, and are deleted when
        nobody needs them: link them before the next call."""
        return self._spill.files()

    def load_state_dict(self, state: Mapping[str, Array], segments: Mapping[str, tuple[Path, str]] | None = None) -> None:
        """`segments`: name -> (path, SHA-256) of the files that belong to the state, which are linked or copied. Raises ValueError, which
        names the file, when one is missing or is not what it was."""
        self._spill.load_state_dict(_part(state, "segments."), segments or {})
        self._fill(state)
        if self._over():  # it was saved under a wider bound
            self._make_room(0)
            self.counters[_EVICTED_CLICKS] += self._clicks.reserve(0)
            self._fill(self.state_dict())

    def _over(self) -> bool:
        shares = self._shares
        have = len(self._pending.free), len(self._features.free), len(self._index.key), len(self._clicks.key)
        return any(rows > most for rows, most in zip(have, (shares.pending, shares.features, shares.index, shares.clicks), strict=True))

    def _fill(self, state: Mapping[str, Array]) -> None:
        saved = state["counters"]
        self.counters[: len(saved)], self.delays[:] = saved, state["delays"]
        self.watermark = int(state["watermark"][0])
        pending, known = _part(state, "pending."), _part(state, "known.")
        n, here = len(pending["time"]), len(pending["ids"])
        self._pending.fill({"place": np.arange(n), **{name: pending[name] for name in self._pending.columns if name in pending}}, n)
        self._features.fill({name: pending[name] for name in self._features.columns}, here)
        self._index = _Index(self._shares.index)
        gone = np.where(known.get("evicted", np.zeros(len(known["key"]), np.bool_)), _EVICTED, _LEFT)
        self._index.fill(known["key"], known["time"], gone)
        self._index.fill(pending["id_hash"], pending["time"], np.arange(n, dtype=np.int32))
        self._clicks.fill(_part(state, "clicks."))


def _part(state: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}


class _Rows:
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
            self._resize(max(needed, min(max(have + have // 2, 1024), most)))

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


def _pending_rows() -> _Rows:
    """`time` is _NEVER in free rows."""
    return _Rows(
        id_hash=np.empty(0, np.uint64),
        time=np.empty(0, np.int64),
        partition=np.empty(0, np.int32),
        offset=np.empty(0, np.int64),
        # When the window must have been open for its click to count: the later of the click's time and its partition's watermark; the
        # least over all clicks, _NEVER without one. Kept because an earlier impression of the same id may still take this one's place.
        click=np.empty(0, np.int64),
        place=np.empty(0, np.int64),  # the row of its features; negative: on disk
    )


def _feature_rows(fields: int, value_fields: int) -> _Rows:
    return _Rows(truth=np.empty(0, np.float64), ids=np.empty((0, fields), np.int32), values=np.empty((0, value_fields), np.float32))


_INDEX_BYTES, _PENDING_BYTES = 8 + 8 + 4, 8 + 8 + 4 + 8 + 8 + 8 + 4  # a row with its place in the free list
_CLICK_BYTES = 8 + 8 + 8 + 4 + 1 + 16  # a row with its share of the heads of chains


def _in_order(pending: _Rows, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """By (event time, partition, offset)."""
    return slots[np.lexsort((pending["offset"][slots], pending["partition"][slots], pending["time"][slots]))]


def _oldest(time: npt.NDArray[np.int64], before: int, about: int) -> npt.NDArray[np.int64]:
    """Rows with a time before `before`: all of them or, when that is more than `about`, about so many, older than the others."""
    old = time < before
    n = int(np.count_nonzero(old))
    if n > about:
        sample = np.sort(time[:: max(1, len(time) >> 16)])  # of millions it is enough to tell where the oldest end
        sample = sample[sample < before]
        if len(sample):
            old = time <= sample[min(len(sample) * about // n * 9 // 8, len(sample) - 1)]
    return np.flatnonzero(old)


class _Index:
    """id -> (event time, slot): open addressing, linear probing, at most two thirds full, of at most `most` places. sizes: [entries]."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._clear(min(1 << 12, most))
        self._expired_at = -(1 << 62)

    def _clear(self, capacity: int) -> None:
        self.key = np.zeros(capacity, np.uint64)
        self.time = np.zeros(capacity, np.int64)
        self.slot = np.full(capacity, _EMPTY, np.int32)
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
        self.slot[have:] = _EMPTY
        self._purge(np.iinfo(np.int64).min)

    def _purge(self, before: int) -> None:
        _rehash(*self.arrays(), self.sizes, before)

    def _age_of(self, n: int) -> int:
        """A time before which about the n oldest of those that left did, and at least one."""
        step = max(1, len(self.slot) >> 16)  # ids are hashes: every so many places are a fair sample
        sample = np.sort(self.time[::step][self.slot[::step] <= _LEFT])
        return int(sample[min(n // step, len(sample) - 1)]) + 1

    def expire(self, watermark: int, horizon: int) -> None:
        """Forget impressions that left and are beyond the horizon; worth a pass once a quarter of the index is."""
        if watermark - self._expired_at < horizon // 16:
            return
        self._expired_at = watermark
        before = watermark - horizon
        old = int(((self.slot <= _LEFT) & (self.time < before)).sum())
        if 4 * old >= self.entries + 1024:
            self._purge(before)
            self._shrink()

    def _shrink(self) -> None:
        if 8 * self.entries < len(self.key) and len(self.key) > 1 << 12:
            keep = self.slot != _EMPTY
            key, time, slot = self.key[keep], self.time[keep], self.slot[keep]
            self._clear(min(1 << 12, self.most))
            self.fill(key, time, slot)

    def fill(self, key: Array, time: Array, slot: npt.NDArray[np.int32]) -> None:
        self._grow(self._capacity(len(key)))
        _insert_all(key, time, slot, *self.arrays(), self.sizes)

    def left(self, since: int) -> dict[str, Array]:
        """Impressions that left and are not beyond the horizon."""
        rows = np.flatnonzero((self.slot <= _LEFT) & (self.time >= since))
        rows = rows[np.argsort(self.key[rows])]
        left: dict[str, Array] = {"key": self.key[rows], "time": self.time[rows]}
        evicted = self.slot[rows] == _EVICTED
        return left | {"evicted": evicted} if evicted.any() else left


class _WaitingClicks:
    """Clicks whose impression has not come: at most `most`, in a pool chained by id. sizes: [rows used, rows alive]."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._allocate(min(1024, most))

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


# -- compiled -------------------------------------------------------------------------------------------------------------------------
#
# One pass over the events in order of arrival. A hash map that a Python loop or a chain of numpy sorts would be far too slow for.


@numba.njit(cache=True, inline="always")
def _home(key, mask):  # type: ignore[no-untyped-def]
    """Where `key` would be in an index with nobody else. Keys are hashes already."""
    return np.int64((key ^ (key >> np.uint64(32))) & np.uint64(mask))


@numba.njit(cache=True, inline="always")
def _place(key, keys, slots):  # type: ignore[no-untyped-def]
    """Where `key` is, or the free place where it belongs."""
    mask = len(keys) - 1
    at = _home(key, mask)
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
        i_key[at], i_time[at], i_slot[at] = key[i], time[i], slot[i]


@numba.njit(cache=True)
def _mark(key, slot, fate, i_key, i_time, i_slot):  # type: ignore[no-untyped-def]
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
    while i_slot[(start - 1) & mask] != _EMPTY:
        start += 1
    for step in range(len(i_key)):
        at = (start + step) & mask
        key, time, slot = i_key[at], i_time[at], i_slot[at]
        if slot == _EMPTY:
            continue
        i_slot[at] = _EMPTY
        if slot <= _LEFT and time < before:
            i_sizes[0] -= 1
            continue
        to = _place(key, i_key, i_slot)
        i_key[to], i_time[to], i_slot[to] = key, time, slot


@numba.njit(cache=True)
def _lot(key):  # type: ignore[no-untyped-def]
    """What an id draws, of _LOTS; not by the hash that chooses examples for the baseline."""
    key = (key ^ np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    return np.int64(((key ^ (key >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)) >> np.uint64(52))


@numba.njit(cache=True)
def _thin(id_hash, time, place, n, in_memory):  # type: ignore[no-untyped-def]
    """The slots of the n pending impressions with the least lots, and of those that drew the same as the last of them."""
    drawn = np.zeros(_LOTS, np.int64)
    for slot in range(len(time)):
        if time[slot] != _NEVER and (place[slot] >= 0 or not in_memory):
            drawn[_lot(id_hash[slot])] += 1
    last, count = 0, drawn[0]
    while count < n:
        last += 1
        count += drawn[last]
    slots = np.empty(count, np.int64)
    at = 0
    for slot in range(len(time)):
        if time[slot] != _NEVER and (place[slot] >= 0 or not in_memory) and _lot(id_hash[slot]) <= last:
            slots[at] = slot
            at += 1
    return slots


@numba.njit(cache=True)
def _count_live(time, place, first, live):  # type: ignore[no-untyped-def]
    for slot in range(len(time)):
        at = (~place[slot] >> 16) - first
        if time[slot] != _NEVER and place[slot] < 0 and at < len(live):
            live[at] += 1


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


@numba.njit(cache=True, inline="always")
def _take(free, sizes):  # type: ignore[no-untyped-def]
    """A row that nobody has."""
    if sizes[1] > 0:
        sizes[1] -= 1
        return free[sizes[1]]
    sizes[0] += 1
    return np.int32(sizes[0] - 1)


@numba.njit(cache=True, nogil=True)
def _push_impressions(  # type: ignore[no-untyped-def]
    id_hash, time, partition, offset, limit, ids, values, truth, window, early, horizon,
    p_id, p_time, p_partition, p_offset, p_click, p_place, p_free, p_sizes, f_truth, f_ids, f_values, f_free, f_sizes,
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
            slot = _take(p_free, p_sizes)
            p_click[slot] = _NEVER
            p_place[slot] = -1
            if not known:
                i_sizes[0] += 1
        i_key[at], i_time[at], i_slot[at] = id_hash[i], t, slot
        p_id[slot], p_time[slot], p_partition[slot], p_offset[slot] = id_hash[i], t, partition[i], offset[i]
        if p_place[slot] < 0:
            p_place[slot] = _take(f_free, f_sizes)
        row = p_place[slot]
        f_truth[row] = truth[i]
        f_ids[row] = ids[i]
        f_values[row] = values[i]
        if c_sizes[1] == 0:
            continue
        # Which of several counts as the first must not depend on the order of the chain: a restart makes that anew.
        inside, first, least = 0, _NEVER, _NEVER
        c = c_head[_chain(id_hash[i], c_head)]
        while c != _EMPTY:
            if c_alive[c] and c_key[c] == id_hash[i] and c_time[c] >= t - early:
                c_alive[c] = False
                c_sizes[1] -= 1
                if c_time[c] > t + window or c_limit[c] > t + window:
                    counters[_LATE] += 1
                    _count_delay(delays, 1, c_time[c] - t)
                else:
                    inside += 1
                    first, least = min(first, c_time[c]), min(least, max(c_time[c], c_limit[c]))
            c = c_next[c]
        if inside > 0:
            _click(slot, t, first, least, p_click, counters, delays)
            counters[_DUPLICATE] += inside - 1


@numba.njit(cache=True, nogil=True)
def _push_clicks(  # type: ignore[no-untyped-def]
    id_hash, time, limit, window, early, horizon, watermark, p_click,
    i_key, i_time, i_slot, c_key, c_time, c_limit, c_next, c_head, c_alive, c_sizes, counters, delays,
):  # fmt: skip
    for i in range(len(time)):
        counters[_CLICKS] += 1
        at = _place(id_hash[i], i_key, i_slot)
        slot, impression_time = i_slot[at], i_time[at]
        forgotten = slot <= _LEFT and max(time[i], limit[i]) - impression_time > horizon
        if slot == _EMPTY or forgotten or time[i] < impression_time - early:
            if time[i] < watermark - window - early:
                counters[_UNMATCHED] += 1
            else:
                _wait(id_hash[i], time[i], limit[i], c_key, c_time, c_limit, c_next, c_head, c_alive, c_sizes)
        elif slot == _EVICTED:
            counters[_EVICTED_CLICKS] += 1
        elif slot == _LEFT or time[i] > impression_time + window or limit[i] > impression_time + window:
            counters[_LATE] += 1
            _count_delay(delays, 1, time[i] - impression_time)
        else:
            _click(slot, impression_time, time[i], limit[i], p_click, counters, delays)
