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

import numpy as np
import numpy.typing as npt

from stream_ctr.events.features import mix64
from stream_ctr.join import join_state, spill
from stream_ctr.join.join_state import (
    CLICK_BYTES,
    COUNTERS,
    CURVE_SECONDS,
    EVICTED,
    EVICTED_CLICKS,
    EVICTED_IMPRESSIONS,
    FORGOTTEN,
    INDEX_BYTES,
    JOINED,
    LEFT,
    NEVER,
    PENDING_BYTES,
    SPILLED,
    UNMATCHED,
    Index,
    WaitingClicks,
)
from stream_ctr.join.spill import Spill

_log = logging.getLogger(__name__)

Array = npt.NDArray[Any]

_N = {name: index for index, name in enumerate(COUNTERS)}
_LEAST_BYTES, _LEAST_ROWS = 1 << 20, 256
AT_MOST = 1 << 16  # examples that leave at once


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
        return cls(
            np.array(id_hash, np.uint64), t, np.zeros(len(t), np.int32), np.arange(len(t)), limit
        )

    def __len__(self) -> int:
        return len(self.time)


@dataclass(frozen=True, slots=True)
class Examples:
    """n impressions with their final labels: id_hash uint64 · time int64 ms · ids int32 [n, F + C] · values float32 [n, V] · label uint8 ·
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
        return cls(
            *(
                np.concatenate([getattr(part, field.name) for part in parts])
                for field in dataclass_fields(cls)
            )
        )

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
        return Ledger(
            self.count + len(id_hash), (self.sum + int(hashed.sum(dtype=np.uint64))) % (1 << 64)
        )


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
        clicks = max_bytes // 16 // CLICK_BYTES
        if over_bound == "spill":  # most features may be on disk
            index = _power_of_two(max_bytes * 3 // 4 // (INDEX_BYTES + PENDING_BYTES // 2))
            pending = index // 2
            left = max_bytes - clicks * CLICK_BYTES - index * INDEX_BYTES - pending * PENDING_BYTES
            return cls(index, pending, left // feature_bytes, clicks)
        index = _power_of_two(max_bytes * 3 // 8 // INDEX_BYTES)
        left = max_bytes - clicks * CLICK_BYTES - index * INDEX_BYTES
        pending = min(index // 2, left // (PENDING_BYTES + feature_bytes))
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
    """Pending impressions and waiting clicks; all lengths of time in milliseconds. Ids of up to 24 `id_bits` take three bytes.

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
        id_bits: int = 31,
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
        self.delays = np.zeros(
            (2, len(CURVE_SECONDS) + 1), np.int64
        )  # [joined, late] clicks by delay
        self.watermark = -(1 << 62)
        self._id_bytes = 3 if id_bits <= 24 else 4
        feature_bytes = 8 + self._id_bytes * fields + 4 * value_fields + 4
        least = max(_LEAST_BYTES, _LEAST_ROWS * feature_bytes * 16 // 3)
        if max_bytes < least:
            raise ValueError(
                f"at least {least / 2**20:.3g} MiB are needed for {fields + value_fields} columns of features"
            )
        self._shares = Shares.of(max_bytes, feature_bytes=feature_bytes, over_bound=over_bound)
        self._pending = join_state.pending_rows()
        self._features = join_state.feature_rows(fields, value_fields, self._id_bytes)
        self._index = Index(self._shares.index)
        self._clicks = WaitingClicks(self._shares.clicks)
        self._spill = Spill(spill_directory)
        self._spill_failed = False

    # -- in ---------------------------------------------------------------------------------------

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
            join_state.push_impressions(
                arrivals.id_hash[some], arrivals.time[some], arrivals.partition[some], arrivals.offset[some], arrivals.limit[some],
                join_state.pack(ids[some], self._id_bytes), values[some], truth[some],
                self.label_window_ms, self.early_click_wait_ms, self.duplicate_horizon_ms,
                *pending.arrays(), pending.free, pending.sizes, *features.arrays(), features.free, features.sizes,
                *self._index.arrays(), self._index.sizes, *waiting.arrays(), waiting.sizes, self.counters, self.delays,
            )  # fmt: skip

    def push_clicks(self, arrivals: Arrivals) -> None:
        waiting = self._clicks
        for some in self._parts(len(arrivals)):
            self.counters[EVICTED_CLICKS] += waiting.reserve(some.stop - some.start)
            join_state.push_clicks(
                arrivals.id_hash[some], arrivals.time[some], arrivals.limit[some],
                self.label_window_ms, self.early_click_wait_ms, self.duplicate_horizon_ms, self.watermark,
                self._pending["click"], *self._index.arrays(), *waiting.arrays(), waiting.sizes, self.counters, self.delays,
            )  # fmt: skip

    def _parts(self, n: int) -> Iterator[slice]:
        at_once = self._shares.at_once
        return (slice(start, min(start + at_once, n)) for start in range(0, n, at_once))

    # -- out --------------------------------------------------------------------------------------

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
        self.counters[UNMATCHED] += self._clicks.drop_all()
        return self._leave(NEVER, at_most)

    def _leave(self, before: int, at_most: int) -> Examples:
        pending = self._pending
        slots = join_state.in_order(
            pending, join_state.oldest(pending.used("time"), before, at_most)
        )[:at_most]
        features = self._features_of(slots)
        examples = Examples(
            pending["id_hash"][slots], pending["time"][slots], join_state.unpack(features["ids"], self._id_bytes), features["values"],
            (pending["click"][slots] != NEVER).astype(np.uint8), features["truth"],
        )  # fmt: skip
        self._remove(slots, LEFT)
        if self._spill.segments:
            left = int(examples.time[-1]) if len(slots) else before  # nobody older is pending
            self._spill.drop(self._spill.ended_before(left if self.spilled else NEVER))
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
        join_state.mark(self._pending["id_hash"][slots], slots, fate, *self._index.arrays())
        place = self._pending["place"][slots]
        self._features.release(place[place >= 0])
        self._pending["time"][slots] = NEVER
        self._pending.release(slots)

    def _forget(self) -> None:
        """Drop ids beyond the duplicate horizon and clicks that no impression can want any more."""
        self._index.expire(self.watermark, self.duplicate_horizon_ms)
        # An impression that is not late has t + label_window >= watermark, and wants clicks from t - early_click_wait on.
        self.counters[UNMATCHED] += self._clicks.expire(
            self.watermark - self.label_window_ms - self.early_click_wait_ms
        )

    # -- the bound --------------------------------------------------------------------------------

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
        self.counters[FORGOTTEN] += self._index.reserve(
            n, self.watermark - self.duplicate_horizon_ms
        )

    def _spill_newest(self, n: int) -> None:
        """The newest wait longest before anyone asks for them."""
        time, place = self._pending.used("time"), self._pending.used("place")
        slots = np.flatnonzero((place >= 0) & (time != NEVER))
        slots = slots[np.argpartition(time[slots], len(slots) - n)[len(slots) - n :]]
        self.counters[SPILLED] += self._write(join_state.in_order(self._pending, slots))

    def _write(self, slots: npt.NDArray[np.int64]) -> int:
        """Put the features of these impressions, which are in order, into new segments; how many fitted onto the disk."""
        place, time = self._pending["place"], self._pending["time"]
        for start in range(0, len(slots), spill.SEGMENT_ROWS):
            some = slots[start : start + spill.SEGMENT_ROWS]
            try:
                places = self._spill.write(self._features_of(some), last=int(time[some[-1]]))
            except OSError as error:
                if not self._spill_failed:
                    _log.error(
                        "pending impressions cannot be put on disk: %s; a share of them is given up instead, and counted",
                        error,
                    )
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
        slots = join_state.thin(self._pending["id_hash"], time, place, n, in_memory)
        clicked = int((self._pending["click"][slots] != NEVER).sum())
        self.counters[JOINED] -= clicked
        self.counters[EVICTED_CLICKS] += clicked
        self.counters[EVICTED_IMPRESSIONS] += len(slots)
        self._remove(slots, EVICTED)
        if self._spill.segments:
            self._tidy_segments()

    def _tidy_segments(self) -> None:
        """Delete segments of which nobody is pending, and write anew those of which few are: else the disk fills with the given up."""
        numbers = np.array(sorted(self._spill.segments))
        rows = np.array([self._spill.segments[number].rows for number in numbers.tolist()])
        sparse = numbers[2 * self._live_rows(numbers) < rows]
        time, place = self._pending.used("time"), self._pending.used("place")
        slots = np.flatnonzero((place < 0) & (time != NEVER))
        slots = slots[np.isin(spill.segment_of(place[slots]), sparse)]
        self._write(join_state.in_order(self._pending, slots))
        self._spill.drop(numbers[self._live_rows(numbers) == 0].tolist())

    def _live_rows(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many pending impressions are in each of these segments."""
        live = np.zeros(int(numbers[-1] - numbers[0]) + 1, np.int64)
        join_state.count_live(
            self._pending.used("time"), self._pending.used("place"), numbers[0], live
        )
        return live[numbers - numbers[0]]

    # -- what can be seen -------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        return self._pending.count

    @property
    def spilled(self) -> int:
        """How many of the pending have their features on disk now."""
        return self._pending.count - self._features.count

    @property
    def filled(self) -> float:
        """Of the room for what waits, the share that is taken: 0 to 1."""
        have = self._pending.count, self._features.count, self._clicks.count
        room = self._shares.pending, self._shares.features, self._shares.clicks
        return max(rows / most for rows, most in zip(have, room, strict=True))

    @property
    def nbytes(self) -> int:
        """What is allocated."""
        arrays = [
            *self._pending.arrays(),
            self._pending.free,
            *self._features.arrays(),
            self._features.free,
        ]
        return sum(
            array.nbytes for array in [*arrays, *self._index.arrays(), *self._clicks.arrays()]
        )

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
        return [
            {"window_seconds": w, "lost_share": round(float(x), 6)}
            for w, x in zip(CURVE_SECONDS, lost, strict=True)
        ]

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Array]:
        """In an order of its own, and without what may be forgotten: equal for two joiners that would do the same from here on, as long as
        nothing is spilled or given up. What is on disk is in the files that `segments` names."""
        pending = self._pending
        slots = join_state.in_order(pending, np.flatnonzero(pending.used("time") < NEVER))
        place = pending["place"][slots]
        here = place >= 0
        state: dict[str, Array] = {
            f"pending.{name}": array[slots]
            for name, array in pending.columns.items()
            if name != "place"
        }
        state |= {
            f"pending.{name}": array[place[here]] for name, array in self._features.columns.items()
        }
        if not here.all():
            state["pending.place"] = np.where(here, np.cumsum(here) - 1, place)
        state |= {f"segments.{name}": array for name, array in self._spill.state_dict().items()}
        state |= {
            f"known.{name}": array
            for name, array in self._index.left(self.watermark - self.duplicate_horizon_ms).items()
        }
        state |= {f"clicks.{name}": array for name, array in self._clicks.alive().items()}
        return state | {
            "counters": self.counters.copy(),
            "delays": self.delays.copy(),
            "watermark": np.array([self.watermark]),
        }

    def segments(self) -> dict[str, tuple[Path, str, int]]:
        """Name -> (path, SHA-256, bytes) of the files that belong to the state of this moment. They never change, and are deleted when
        nobody needs them: link them before the next call."""
        return self._spill.files()

    def load_state_dict(
        self, state: Mapping[str, Array], segments: Mapping[str, tuple[Path, str]] | None = None
    ) -> None:
        """`segments`: name -> (path, SHA-256) of the files that belong to the state, which are linked or copied. Raises ValueError, which
        names the file, when one is missing or is not what it was."""
        self._spill.load_state_dict(_part(state, "segments."), segments or {})
        self._fill(state)
        if self._over():  # it was saved under a wider bound
            self._make_room(0)
            self.counters[EVICTED_CLICKS] += self._clicks.reserve(0)
            self._fill(self.state_dict())

    def _over(self) -> bool:
        shares = self._shares
        have = (
            len(self._pending.free),
            len(self._features.free),
            len(self._index.key),
            len(self._clicks.key),
        )
        return any(
            rows > most
            for rows, most in zip(
                have, (shares.pending, shares.features, shares.index, shares.clicks), strict=True
            )
        )

    def _fill(self, state: Mapping[str, Array]) -> None:
        saved = state["counters"]
        self.counters[: len(saved)], self.delays[:] = saved, state["delays"]
        self.watermark = int(state["watermark"][0])
        pending, known = _part(state, "pending."), _part(state, "known.")
        n, here = len(pending["time"]), len(pending["ids"])
        self._pending.fill(
            {
                "place": np.arange(n),
                **{name: pending[name] for name in self._pending.columns if name in pending},
            },
            n,
        )
        self._features.fill({name: pending[name] for name in self._features.columns}, here)
        self._index = Index(self._shares.index)
        gone = np.where(known.get("evicted", np.zeros(len(known["key"]), np.bool_)), EVICTED, LEFT)
        self._index.fill(known["key"], known["time"], gone)
        self._index.fill(pending["id_hash"], pending["time"], np.arange(n, dtype=np.int32))
        self._clicks.fill(_part(state, "clicks."))


def _part(state: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {
        name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)
    }
