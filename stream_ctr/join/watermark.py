"""Watermarks: the event time that each partition, and all partitions together, have reached.

The watermark of a partition is its greatest event time minus the allowed lateness. It never goes
back. The overall watermark is the least of the partitions' watermarks.

A partition *stalls* when its clicks are overdue, so that a click stream that has stopped is not
learned as "no clicks":

| partition | its watermark follows | it changes to |
|---|---|---|
| running | its greatest event time | stalled, when more than `stall_clicks` clicks are overdue |
| stalled | the greatest event time of its clicks | running, when the clicks have caught up |

Clicks are overdue by `stall_clicks` when the impressions since the last click should have brought
that many, at the partition's rate so far. This happens by chance with probability
e^-stall_clicks. Clicks have caught up when their greatest event time is within the allowed
lateness of the partition's greatest event time. Both rules depend on the partition's own log
alone.

Inputs are read one after another, each with partitions of its own (`begin`). A log, which is one
partition, is followed by one partition as if both were one. Before several partitions, the log
stays as it is: if its clicks are overdue, it waits for those of the input that follows.

>>> marks = Watermarks(partitions=2, lateness_ms=100)
>>> marks.observe(np.array([0, 0, 1, 0]), np.array([1000, 900, 5000, 1500]))
array([ 900,  900, 4900, 1400])
>>> marks.overall(excused=np.array([False, False]))
1400
>>> marks.overall(excused=np.array([True, False]))
4900
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from stream_ctr.events.batch import EventBatch

NOT_YET = -(1 << 62)
# A partition needs this many clicks before their rate is used.
_MIN_CLICKS = 100
MARKS = (
    "latest",
    "mark",
    "latest_click",
    "impressions",
    "clicks",
    "since_click",
    "stalled",
)
"""The arrays of `Watermarks` that depend on a partition's own events."""
_STATE = (*MARKS, "all_since_click")


class _Partitions(NamedTuple):
    """The arrays [P] that `_observe` updates in place."""

    latest: npt.NDArray[np.int64]
    mark: npt.NDArray[np.int64]
    latest_click: npt.NDArray[np.int64]
    impressions: npt.NDArray[np.int64]
    clicks: npt.NDArray[np.int64]
    since_click: npt.NDArray[np.int64]
    stalled: npt.NDArray[np.bool_]


class InOrder(NamedTuple):
    """The events of a poll, all kinds in order of arrival. `arrival` is that of `EventBatch`."""

    arrival: npt.NDArray[np.int64]
    partition: npt.NDArray[np.int32]
    time: npt.NDArray[np.int64]
    click: npt.NDArray[np.bool_]
    labelled: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, events: EventBatch) -> InOrder:
        """Return the events of a poll in order of arrival."""
        parts = (events.impressions, events.clicks, events.examples.arrivals)
        arrival = events.arrival
        n = len(events.impressions)
        labelled = arrival >= n + len(events.clicks)
        return cls(
            arrival,
            np.concatenate([part.partition for part in parts])[arrival],
            np.concatenate([part.time for part in parts])[arrival],
            (arrival >= n) & ~labelled,
            labelled,
        )

    def by_kind(
        self, limit: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the limits of the impressions [n], the clicks [m] and the examples [k]."""
        placed = np.empty(len(limit), np.int64)
        placed[self.arrival] = limit
        k = int(self.labelled.sum())
        m = int(self.click.sum())
        n = len(limit) - m - k
        return placed[:n], placed[n : n + m], placed[n + m :]


class Watermarks:
    """The watermarks of P partitions; all times are epoch milliseconds.

    `latest` [P] is the greatest event time and `mark` [P] the watermark of each partition.
    `stall_clicks` is the number of overdue clicks at which a partition stalls; with 0 none does.
    `present` are the partitions of the input that is read now.
    """

    def __init__(self, *, partitions: int, lateness_ms: int, stall_clicks: float = 0.0) -> None:
        self.lateness_ms = lateness_ms
        self.stall_clicks = stall_clicks
        self.present = range(partitions)
        self.latest = np.full(partitions, NOT_YET, np.int64)
        self.mark = np.full(partitions, NOT_YET, np.int64)
        self.latest_click = np.full(partitions, NOT_YET, np.int64)
        self.impressions = np.zeros(partitions, np.int64)
        self.clicks = np.zeros(partitions, np.int64)
        self.since_click = np.zeros(partitions, np.int64)
        # Impressions of all partitions that are later than the last click of each partition; used
        # for partitions that carry clicks only.
        self.all_since_click = np.zeros(partitions, np.int64)
        self.stalled = np.zeros(partitions, np.bool_)
        self.stalls = 0

    def begin(self, present: range) -> None:
        """Begin to read the partitions `present`; those before them have ended.

        >>> marks = Watermarks(partitions=2, lateness_ms=100)
        >>> marks.begin(range(1))
        >>> marks.observe(np.array([0]), np.array([1000]))
        array([900])
        >>> marks.begin(range(1, 2))
        >>> marks.observe(np.array([1]), np.array([500]))
        array([900])
        """
        before = self.present
        self.present = present
        # They have counted impressions of the inputs before them.
        self.all_since_click[present.start : present.stop] = 0
        if len(before) == len(present) == 1 and before.stop == present.start:
            for name in _STATE:
                array = getattr(self, name)
                array[present.start] = array[before.start]
            self.stalled[before.start] = False

    def observe(
        self,
        partition: npt.NDArray[np.integer],
        time: npt.NDArray[np.int64],
        click: npt.NDArray[np.bool_] | None = None,
        labelled: npt.NDArray[np.bool_] | None = None,
    ) -> npt.NDArray[np.int64]:
        """Advance over n events in order of arrival.

        Return, for each event, the watermark of its own partition after the event. `click` [n] is
        True for clicks, `labelled` [n] for examples that came with their label and await no click;
        all other events are impressions.
        """
        click = np.zeros(len(time), np.bool_) if click is None else click
        labelled = np.zeros(len(time), np.bool_) if labelled is None else labelled
        limit = self.advance(partition, time, click, labelled)
        later = self.later_than_clicks(time[~(click | labelled)])
        self.count_since_clicks(later, np.unique(partition[click]))
        self.follow(time[click])
        return limit

    def advance(
        self,
        partition: npt.NDArray[np.integer],
        time: npt.NDArray[np.int64],
        click: npt.NDArray[np.bool_],
        labelled: npt.NDArray[np.bool_],
    ) -> npt.NDArray[np.int64]:
        """Advance what depends on a partition's own events alone; return what `observe` returns."""
        limit = np.empty(len(time), np.int64)
        state = _Partitions(*(getattr(self, name) for name in _Partitions._fields))
        self.stalls += _observe(
            partition.astype(np.int32),
            time,
            click,
            labelled,
            limit,
            self.lateness_ms,
            self.stall_clicks,
            state,
        )
        return limit

    def later_than_clicks(self, time: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return how many of these times are after the last click of each present partition."""
        present = slice(self.present.start, self.present.stop)
        later: npt.NDArray[np.int64] = (time > self.latest_click[present, None]).sum(axis=1)
        return later

    def count_since_clicks(
        self, later: npt.NDArray[np.int64], clicked: npt.NDArray[np.integer]
    ) -> None:
        """Count impressions that are `later` than the last click of each present partition.

        The partitions `clicked` had a click now.
        """
        self.all_since_click[self.present.start : self.present.stop] += later
        self.all_since_click[clicked] = 0

    def follow(self, time: npt.NDArray[np.int64]) -> None:
        """Let ended partitions whose clicks are overdue follow the clicks at these times."""
        ended = np.flatnonzero(self.stalled[: self.present.start])
        if not len(ended) or not len(time):
            return
        latest = self.latest[ended]
        clicks = np.maximum(self.latest_click[ended], time.max())
        stalled = clicks < latest - self.lateness_ms
        reached = np.where(stalled, clicks, latest) - self.lateness_ms
        self.latest_click[ended] = clicks
        self.stalled[ended] = stalled
        self.mark[ended] = np.maximum(self.mark[ended], reached)

    def observe_batch(
        self, events: EventBatch
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Advance over the events of one poll, all kinds in order of arrival.

        Return what `observe` returns, for the impressions [n], the clicks [m] and the examples [k].
        """
        came = InOrder.of(events)
        return came.by_kind(self.observe(came.partition, came.time, came.click, came.labelled))

    def overall(self, *, excused: npt.NDArray[np.bool_]) -> int:
        """Return the least watermark of the partitions that are not excused.

        A stalled partition is never excused. If all partitions are excused, return the greatest
        watermark.
        """
        holding = self.mark[~excused | self.stalled]
        return int(holding.min()) if len(holding) else int(self.mark.max(initial=NOT_YET))

    def ahead(self, watermark: int, by_ms: int) -> frozenset[int]:
        """Return the partitions whose watermark is more than `by_ms` after `watermark`.

        To read on in these partitions would only fill memory.
        """
        if watermark == NOT_YET:
            return frozenset()
        return frozenset(np.flatnonzero(self.mark > watermark + by_ms).tolist())

    def silent_clicks(self) -> npt.NDArray[np.bool_]:
        """Return True [P] for each partition that carries clicks only and whose clicks are overdue.

        Such a partition is not idle but stalled.
        """
        if not self.stall_clicks:
            return np.zeros(len(self.clicks), np.bool_)
        clicks_only = (self.impressions == 0) & (self.clicks >= _MIN_CLICKS)
        clicks_only[: self.present.start] = False
        impressions = int(self.impressions[self.present.start : self.present.stop].sum())
        expected = self.all_since_click * self.clicks / max(1, impressions)
        return clicks_only & (expected > self.stall_clicks)

    def state_dict(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return the state of the partitions up to the present ones; no other has any."""
        state = {name: getattr(self, name)[: self.present.stop].copy() for name in _STATE}
        # In a partition with impressions this count is not used, and it depends on the polls.
        state["all_since_click"][state["impressions"] > 0] = 0
        first = np.array([self.present.start])
        return state | {"stalls": np.array([self.stalls]), "first": first}

    def load_state_dict(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Restore what `state_dict` returned; further partitions are as they were made."""
        stop = len(state["mark"])
        for name in _STATE:
            getattr(self, name)[:stop] = state[name]
        self.stalls = int(state["stalls"][0])
        first = state.get("first")  # a state of one input may lack it
        self.present = range(int(first[0]) if first is not None else 0, stop)


@numba.njit(cache=True, nogil=True)
def _observe(  # type: ignore[no-untyped-def]
    partition,
    time,
    click,
    labelled,
    limit,
    lateness,
    stall_clicks,
    state,
):
    """Update `state` and fill `limit` [n]; return how often a partition stalled."""
    latest, mark, latest_click, impressions, clicks, since_click, stalled = state
    stalls = 0
    for i in range(len(time)):
        p = partition[i]
        latest[p] = max(latest[p], time[i])
        if click[i]:
            clicks[p] += 1
            since_click[p] = 0
            latest_click[p] = max(latest_click[p], time[i])
            if stalled[p] and latest_click[p] >= latest[p] - lateness:
                stalled[p] = False
        elif not labelled[i]:
            impressions[p] += 1
            since_click[p] += 1
            if stall_clicks > 0 and not stalled[p] and clicks[p] >= _MIN_CLICKS:
                stalled[p] = since_click[p] * clicks[p] > stall_clicks * impressions[p]
                stalls += stalled[p]
        reached = latest_click[p] if stalled[p] else latest[p]
        mark[p] = max(mark[p], reached - lateness)
        limit[i] = mark[p]
    return stalls
