"""The label joiner: impressions wait for their clicks, and leave as labelled examples.

Each impression becomes one example when its window closes: the label is 1 if a click came within
the window, else 0. The window of an impression at t is [t - early_click_wait, t + label_window],
both ends included. It closes when the watermark has passed its end.

An event is late when the watermark *of its own partition* had passed the end of its window before
it arrived. The overall watermark is the least of the partitions' watermarks, so it is never ahead
of that. Hence the late events, the labels, and the order of the examples depend on the log alone,
not on how polls interleave the partitions. The exception is a partition that was excused as idle
and comes back behind the overall watermark. `join_state` has the states and transitions.

The state is arrays: rows of fixed width for pending impressions, with their features apart; a hash
index of their ids and of the ids released within the duplicate horizon; and the clicks that wait
for their impression. Everything is bounded in bytes (see `Capacity`). Above the bound the features
of the newest pending impressions go to disk until their windows close. The ids, and whether a
click came, stay in memory, so spilling changes no example, label or order, and no other counter.
Impressions that cannot go to disk are evicted by the hash of their ids, never by their label;
waiting clicks and remembered ids by age. All of this is counted. Which events are evicted depends
on the polls as well as on the log.

>>> joiner = LabelJoiner(fields=1, label_window_ms=1000)
>>> joiner.push_impressions(Arrivals.of([7, 8], [0, 500]), np.array([[3], [4]], np.int32))
>>> joiner.push_clicks(Arrivals.of([7], [1000]))
>>> examples = joiner.advance(watermark=1501)
>>> examples.time.tolist(), examples.label.tolist(), examples.ids.tolist()
([0, 500], [1, 0], [[3], [4]])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from stream_ctr.events.batch import Arrivals, EventBatch, LabelledArrivals
from stream_ctr.join import join_state
from stream_ctr.join.capacity import Capacity, OverBound
from stream_ctr.join.examples import Examples
from stream_ctr.join.join_arrays import IdIndex, WaitingClicks, feature_pool, new_secret
from stream_ctr.join.join_state import (
    CLICKS_EVICTED,
    CLICKS_JOINED,
    CLICKS_UNMATCHED,
    COUNTERS,
    CURVE_SECONDS,
    EVICTED,
    IDS_FORGOTTEN_EARLY,
    IMPRESSIONS_EVICTED,
    IMPRESSIONS_SPILLED,
    LABELLED_EVICTED,
    LEFT,
    NEVER,
    PACKED_BITS,
    PACKED_BYTES,
    Counts,
    EventColumns,
    Windows,
)
from stream_ctr.join.pending import Order, PendingImpressions, Slots
from stream_ctr.join.spill import Spill
from stream_ctr.join.watermark import NOT_YET, Watermarks

Array = npt.NDArray[Any]

# The most examples that are released at once.
AT_MOST = 1 << 16


class Joiner(Protocol):
    """A joiner as the trainer uses it: `LabelJoiner`, or that of several ranks together."""

    @property
    def label_window_ms(self) -> int: ...
    @property
    def watermark(self) -> int: ...
    @property
    def pending(self) -> int: ...
    @property
    def oldest_pending_ms(self) -> int | None: ...
    @property
    def filled(self) -> float: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def click_coverage(self) -> float | None: ...
    def push(self, events: EventBatch, watermarks: Watermarks) -> None: ...
    def advance(self, watermark: int) -> Examples: ...
    def drain(self) -> Examples: ...
    def counts(self) -> dict[str, int]: ...
    def window_curve(self) -> list[dict[str, float]]: ...
    def segments(self) -> dict[str, tuple[Path, str, int]]: ...
    def state_dict(self) -> dict[str, Array]: ...
    def load_state_dict(
        self, state: Mapping[str, Array], segments: Mapping[str, tuple[Path, str]] | None = None
    ) -> None: ...


class LabelJoiner:
    """Joins impressions with clicks. All lengths of time are in milliseconds.

    Ids below 2^24 (`id_bits` of at most 24) take three bytes each, others four.

    `nbytes` is at most `max_bytes` after every call. Above it, with `over_bound="spill"`, the
    features of the newest pending impressions go to files in `spill_directory`, which no other
    joiner may use; without it they go to a temporary directory. With `over_bound="evict"`, and
    when more does not fit, a uniform share of the pending impressions is evicted. Files have every
    s-th number, from the first on that is f modulo s; `segment_numbers` is (f, s). Raises
    `ValueError` when `max_bytes` are too few to work in.
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
        over_bound: OverBound = "spill",
        spill_directory: Path | None = None,
        segment_numbers: tuple[int, int] = (0, 1),
    ) -> None:
        self.label_window_ms = label_window_ms
        self.early_click_wait_ms = early_click_wait_ms
        # An id is remembered while a second impression or a late click of it may be recognised.
        self.duplicate_horizon_ms = max(duplicate_horizon_ms, label_window_ms + early_click_wait_ms)
        self.max_bytes = max_bytes
        self.over_bound = over_bound
        self.watermark = NOT_YET
        self.counters = np.zeros(len(COUNTERS), np.int64)
        # Clicks by delay: [joined or late, bounded by CURVE_SECONDS].
        self.delays = np.zeros((2, len(CURVE_SECONDS) + 1), np.int64)
        self.id_bytes = PACKED_BYTES if id_bits <= PACKED_BITS else 4
        features = feature_pool(fields, value_fields, self.id_bytes)
        self._capacity = Capacity.of(
            max_bytes,
            columns=fields + value_fields,
            feature_bytes=features.row_bytes,
            over_bound=over_bound,
        )
        self._pending = PendingImpressions(
            features,
            Spill(spill_directory, numbers=segment_numbers),
            id_bytes=self.id_bytes,
            label_window_ms=label_window_ms,
        )
        self._secret = new_secret()
        self._index = IdIndex(self._capacity.index, self._secret)
        self._clicks = WaitingClicks(self._capacity.clicks, self._secret)
        self._windows = Windows(label_window_ms, early_click_wait_ms, self.duplicate_horizon_ms)
        self._counts = Counts(self.counters, self.delays)

    # -- in ---------------------------------------------------------------------------------------

    def push(self, events: EventBatch, watermarks: Watermarks) -> None:
        """Add the impressions, clicks and labelled examples of one poll.

        `watermarks` observes them in order of arrival. The watermark of an event's own partition
        at that moment decides whether the event is late.
        """
        impression_limit, click_limit, example_limit = watermarks.observe_batch(events)
        # A partition that was excused as idle may come back behind the windows closed meanwhile.
        self.push_impressions(
            events.impressions,
            events.ids,
            events.values,
            events.true_probability,
            limit=np.maximum(impression_limit, self.watermark),
        )
        self.push_clicks(events.clicks, limit=np.maximum(click_limit, self.watermark))
        self.push_labelled(events.examples, limit=np.maximum(example_limit, self.watermark))

    def push_impressions(
        self,
        impressions: Arrivals,
        ids: npt.NDArray[np.int32],
        values: npt.NDArray[np.float32] | None = None,
        true_probability: npt.NDArray[np.float64] | None = None,
        *,
        limit: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Add n impressions with their `ids` [n, F + C], packed or not, and `values` [n, V].

        `limit` [n] is the watermark of each event's own partition when it arrived; without it no
        impression is late.
        """
        n = len(impressions)
        values = np.empty((n, 0), np.float32) if values is None else values
        truth = np.full(n, np.nan) if true_probability is None else true_probability
        for rows in self._parts(n):
            self._make_room(rows.stop - rows.start)
            join_state.push_impressions(
                _columns(impressions, limit, rows),
                self._pending.columns(ids[rows], values[rows], truth[rows]),
                self._windows,
                self._pending.rows.arrays,
                self._pending.features.arrays,
                self._index.arrays,
                self._clicks.arrays,
                self._counts,
            )

    def push_clicks(self, clicks: Arrivals, *, limit: npt.NDArray[np.int64] | None = None) -> None:
        """Add n clicks. `limit` [n] is as in `push_impressions`."""
        for rows in self._parts(len(clicks)):
            self.counters[CLICKS_EVICTED] += self._clicks.reserve(rows.stop - rows.start)
            join_state.push_clicks(
                _columns(clicks, limit, rows),
                self._windows,
                self.watermark,
                self._pending.rows.arrays,
                self._index.arrays,
                self._clicks.arrays,
                self._counts,
            )

    def push_labelled(
        self, examples: LabelledArrivals, *, limit: npt.NDArray[np.int64] | None = None
    ) -> None:
        """Add k examples that came with their label. `limit` [k] is as in `push_impressions`.

        They are released when the watermark has passed their time. A late one is released as soon
        as the watermark has passed its `limit`.
        """
        for rows in self._parts(len(examples)):
            self._make_room(rows.stop - rows.start)
            columns = _columns(examples.arrivals, limit, rows)
            join_state.push_labelled(
                columns._replace(id_hash=join_state.given_key(columns.id_hash)),
                examples.label[rows],
                self._pending.columns(
                    examples.ids[rows], examples.values[rows], examples.true_probability[rows]
                ),
                self._windows,
                self._pending.rows.arrays,
                self._pending.features.arrays,
                self._index.arrays,
                self._counts,
            )

    def _parts(self, n: int) -> Iterator[slice]:
        at_once = self._capacity.at_once
        return (slice(start, min(start + at_once, n)) for start in range(0, n, at_once))

    # -- out --------------------------------------------------------------------------------------

    def advance(self, watermark: int, at_most: int = AT_MOST) -> Examples:
        """Close every window that ends before `watermark`, and return the first examples.

        Labelled examples are returned, too, when their time is before `watermark`. At most
        `at_most` are returned, in the order of the watermarks that release them and after all
        earlier ones. Call again until there are none. The watermark of the joiner never goes back.
        """
        self.reach(watermark)
        examples = self._release(self.closes_before(), at_most)
        self.forget()
        return examples

    def drain(self, at_most: int = AT_MOST) -> Examples:
        """Close every open window, because the log has ended, and return the first examples.

        As with `advance`, call again until there are none. The watermark stays, so that another
        log can follow.
        """
        self.drop_clicks()
        return self._release(self.closes_before(drain=True), at_most)

    def reach(self, watermark: int) -> None:
        """Move the watermark, which never goes back."""
        self.watermark = max(self.watermark, watermark)

    def drop_clicks(self) -> None:
        """Drop all waiting clicks: no impression comes any more."""
        self.counters[CLICKS_UNMATCHED] += self._clicks.drop_all()

    def closes_before(self, *, drain: bool = False) -> int:
        """Return the time before which windows are closed; with `drain` all are."""
        return NEVER if drain else self.watermark - self.label_window_ms

    def _release(self, before: int, at_most: int) -> Examples:
        """Return the first impressions with a time before `before` as examples."""
        slots, order = self.first(before, at_most)
        # All impressions that are still pending are at least as new as the last example.
        return self.release(slots, rest=int(order.time[-1]) if len(slots) else before)

    def first(self, before: int, at_most: int) -> tuple[Slots, Order]:
        """Return the first pending rows with a time before `before`, in the order of release."""
        slots = self._pending.oldest(before, at_most)
        return slots, self._pending.order(slots)

    def release(self, slots: Slots, *, rest: int) -> Examples:
        """Remove pending rows, and return them as examples; no other has a time before `rest`."""
        examples = self._pending.examples(slots)
        self._remove(slots, LEFT)
        self._pending.drop_segments(rest)
        return examples

    def _remove(self, slots: npt.NDArray[np.int64], state: np.int32) -> None:
        """Take impressions out of the pending; `state` is LEFT or EVICTED."""
        join_state.mark_all(self._pending.keys(slots), slots, state, self._index.arrays)
        self._pending.remove(slots)

    def forget(self) -> None:
        """Drop ids beyond the duplicate horizon, and clicks that no impression can want."""
        self._index.expire(self.watermark, self.duplicate_horizon_ms)
        # An impression at t that is not late has t + label_window >= watermark, and wants clicks
        # from t - early_click_wait on.
        oldest = self.watermark - self.label_window_ms - self.early_click_wait_ms
        self.counters[CLICKS_UNMATCHED] += self._clicks.expire(oldest)

    # -- the memory bound -------------------------------------------------------------------------

    def _make_room(self, n: int) -> None:
        """Make room for n more impressions, each of which may need a row of every kind."""
        pending = self._pending
        capacity = self._capacity
        if pending.count + n > capacity.pending:
            keep = min(capacity.pending * 3 // 4, capacity.pending - n)
            self._evict(pending.count - keep)
        if pending.in_memory + n > capacity.features:
            keep = min(capacity.features * 3 // 4, capacity.features - n)
            if self.over_bound == "spill":
                spilled = pending.spill_newest(pending.in_memory - keep)
                self.counters[IMPRESSIONS_SPILLED] += spilled
            if pending.in_memory > keep:
                self._evict(pending.in_memory - keep, in_memory=True)
        pending.reserve(n, limit=capacity.pending, features_limit=capacity.features)
        horizon_start = self.watermark - self.duplicate_horizon_ms
        self.counters[IDS_FORGOTTEN_EARLY] += self._index.reserve(n, horizon_start)

    def _evict(self, n: int, *, in_memory: bool = False) -> None:
        """Evict n pending impressions or a few more.

        They are chosen by the hash of their ids, so the others are a fair sample of both labels.
        """
        slots = self._pending.uniform_share(n, in_memory=in_memory)
        clicked = int(self._pending.clicked(slots).sum())
        given = int(self._pending.given(slots).sum())
        self.counters[CLICKS_JOINED] -= clicked
        self.counters[CLICKS_EVICTED] += clicked
        self.counters[IMPRESSIONS_EVICTED] += len(slots) - given
        self.counters[LABELLED_EVICTED] += given
        self._remove(slots, EVICTED)
        self._pending.compact_segments()

    # -- figures ----------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """The number of pending impressions."""
        return self._pending.count

    @property
    def oldest_pending_ms(self) -> int | None:
        """The event time of the oldest pending impression, or None if there is none."""
        return self._pending.oldest_ms

    @property
    def spilled(self) -> int:
        """The number of pending impressions whose features are on disk now."""
        return self._pending.spilled

    @property
    def segment_count(self) -> int:
        """The number of files that belong to the state."""
        return len(self._pending.spill.segments)

    @property
    def filled(self) -> float:
        """The share of the room for impressions and clicks that is taken, from 0 to 1."""
        capacity = self._capacity
        return max(
            self._pending.count / capacity.pending,
            self._pending.in_memory / capacity.features,
            self._clicks.count / capacity.clicks,
        )

    @property
    def nbytes(self) -> int:
        """The number of bytes that are allocated."""
        return self._pending.nbytes + self._index.nbytes + self._clicks.nbytes

    def counts(self) -> dict[str, int]:
        """Return the counters by name."""
        return dict(zip(COUNTERS, self.counters.tolist(), strict=True))

    @property
    def click_coverage(self) -> float | None:
        """The share of the clicks with a known fate that became a label or repeated one.

        It is None before the first such click.
        """
        return click_coverage(self.counts())

    def window_curve(self) -> list[dict[str, float]]:
        """Return the share of the clicks that shorter or longer label windows would lose.

        A click that never found its impression is lost with any window, so the shares end at the
        share of these. They are exact up to the present window; beyond it only clicks whose
        impression was still remembered are known. Repeated clicks do not count.
        """
        return window_curve(self.delays, int(self.counters[CLICKS_UNMATCHED]))

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Array]:
        """Return the state in a canonical order, without ids that may be forgotten.

        While nothing is spilled or evicted, the states of two joiners are equal when both would
        return the same from here on. Features on disk are in the files of `segments`.
        """
        horizon_start = self.watermark - self.duplicate_horizon_ms
        return {
            **_prefixed("pending.", self._pending.state_dict()),
            **_prefixed("segments.", self._pending.spill.state_dict()),
            **_prefixed("known.", self._index.state_dict(horizon_start)),
            **_prefixed("clicks.", self._clicks.state_dict()),
            "counters": self.counters.copy(),
            "delays": self.delays.copy(),
            "watermark": np.array([self.watermark]),
        }

    def segments(self) -> dict[str, tuple[Path, str, int]]:
        """Return the (path, SHA-256, bytes) of the files that belong to the state, by name.

        The files never change, and are deleted when they are no longer needed: link them before
        the next call.
        """
        return self._pending.spill.files()

    def load_state_dict(
        self, state: Mapping[str, Array], segments: Mapping[str, tuple[Path, str]] | None = None
    ) -> None:
        """Replace the state.

        `segments` maps the names of the files that belong to `state` to (path, SHA-256); they are
        linked or copied. Raises `ValueError`, which names the file, when one is missing or has
        changed. A state that exceeds the memory bound is spilled or evicted down to it.
        """
        self._pending.spill.load_state_dict(_with_prefix("segments.", state), segments or {})
        self._fill(state)
        if self._over_capacity():
            self._make_room(0)
            self.counters[CLICKS_EVICTED] += self._clicks.reserve(0)
            self._fill(self.state_dict())

    def _over_capacity(self) -> bool:
        capacity = self._capacity
        return (
            self._pending.rows.capacity > capacity.pending
            or self._pending.features.capacity > capacity.features
            or self._index.capacity > capacity.index
            or self._clicks.capacity > capacity.clicks
        )

    def _fill(self, state: Mapping[str, Array]) -> None:
        counters = state["counters"]
        self.counters[: len(counters)] = counters  # an older state has fewer
        self.delays[:] = state["delays"]
        self.watermark = int(state["watermark"][0])
        pending = _with_prefix("pending.", state)
        known = _with_prefix("known.", state)
        self._pending.fill(pending)
        self._index = IdIndex(self._capacity.index, self._secret)
        evicted = known.get("evicted", np.zeros(len(known["key"]), np.bool_))
        self._index.fill(known["key"], known["time"], np.where(evicted, EVICTED, LEFT))
        slots = np.arange(len(pending["time"]))
        given = self._pending.given(slots)
        time = pending["time"] + np.where(given, self.label_window_ms, 0)
        self._index.fill(self._pending.keys(slots), time, slots.astype(np.int32))
        self._clicks.fill(_with_prefix("clicks.", state))


def click_fates(counts: Mapping[str, int]) -> tuple[int, int]:
    """Return how many clicks became a label or repeated one, and how many have a known fate.

    `counts` are the counters of a joiner by name.

    >>> click_fates(dict.fromkeys(COUNTERS, 1))
    (2, 4)
    """
    joined = counts["clicks_joined"] + counts["clicks_duplicate"]
    return joined, joined + counts["clicks_late"] + counts["clicks_unmatched"]


def click_coverage(counts: Mapping[str, int]) -> float | None:
    """Return `LabelJoiner.click_coverage` for the counters of a joiner by name."""
    joined, known = click_fates(counts)
    return joined / known if known else None


def window_curve(delays: npt.NDArray[np.int64], unmatched: int) -> list[dict[str, float]]:
    """Return `LabelJoiner.window_curve` for clicks by delay, and so many unmatched ones."""
    measured = delays.sum(axis=0)
    total = int(measured.sum()) + unmatched
    if not total:
        return []
    lost = 1.0 - np.cumsum(measured)[:-1] / total
    return [
        {"window_seconds": seconds, "lost_share": round(float(share), 6)}
        for seconds, share in zip(CURVE_SECONDS, lost, strict=True)
    ]


def _columns(events: Arrivals, limit: npt.NDArray[np.int64] | None, rows: slice) -> EventColumns:
    part = events[rows]
    limits = np.full(len(part), NOT_YET, np.int64) if limit is None else limit[rows]
    return EventColumns(part.id_hash, part.time, part.partition, part.place, limits)


def _prefixed(prefix: str, state: Mapping[str, Array]) -> dict[str, Array]:
    return {prefix + name: array for name, array in state.items()}


def _with_prefix(prefix: str, state: Mapping[str, Array]) -> dict[str, Array]:
    """Return the arrays whose names have the prefix, without it."""
    return {
        name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)
    }
