"""Freshness: the ages of examples at each stage of their way to a server.

    event time -> label window closed -> learned -> published

Ages are counted in a histogram with logarithmic bins, so that percentiles cost the same memory
however many examples there are. Times that are still needed, such as when the window of an example
closed that is not published yet, are kept as `Moments`: few points with counts. Nothing here holds
an object for each example, and nothing reads a clock.

>>> ages = AgeHistogram()
>>> ages.add(np.array([1000, 2000, 3000]), np.array([50, 49, 1]))
>>> found = ages.percentiles()
>>> round(found.p50), round(found.p99), found.examples
(1, 2, 100)
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from stream_ctr.evaluate.summary import Count

Times = npt.NDArray[np.int64]

STAGES = ("event_to_closed", "closed_to_learned", "closed_to_published", "event_to_published")
"""The stretches of the way whose ages are measured."""
UNKNOWN_MS = 0
"""Stands for the time at which a window closed that an earlier process has closed."""

_GROWTH = 1.1  # a bin's geometric middle is at most 4.9 % from any age in the bin
_LONGEST_MS = 30 * 86_400_000
_BINS = 2 + math.ceil(math.log(_LONGEST_MS) / math.log(_GROWTH))
_KEPT_POINTS = 1024
_POINTS_OF_A_BATCH = 64
_RECENT = 6


class Percentiles(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Percentiles of an age in seconds, over so many examples, with a relative error of 5 %."""

    p50: float
    p90: float
    p99: float
    examples: Count


class AgeHistogram:
    """Counts of examples by age, from a millisecond to 30 days."""

    def __init__(self, counts: Times | None = None) -> None:
        self.counts = np.zeros(_BINS, np.int64) if counts is None else counts

    def add(self, ages_ms: Times, counts: Times | None = None) -> None:
        """Count ages [n]; `counts` [n] examples have each of them, by default one.

        A negative age, by a clock that is behind, counts as none.
        """
        positions = np.log(np.maximum(ages_ms, 1)) / math.log(_GROWTH)
        bins = np.minimum(np.ceil(positions), _BINS - 1).astype(np.int64)
        weights = None if counts is None else counts.astype(np.float64)
        self.counts += np.bincount(bins, weights, minlength=_BINS).astype(np.int64)

    def percentiles(self) -> Percentiles | None:
        """Return the percentiles, or None if there are no examples."""
        reached = np.cumsum(self.counts)
        total = int(reached[-1])
        if not total:
            return None
        p50, p90, p99 = (
            _middle_seconds(int(np.searchsorted(reached, share * total)))
            for share in (0.5, 0.9, 0.99)
        )
        return Percentiles(p50=p50, p90=p90, p99=p99, examples=total)


def _middle_seconds(index: int) -> float:
    return round(_GROWTH ** (index - 0.5) / 1000, 4)


class Moments:
    """The times of many examples as few points, each with a count.

    When there are too many, those in the same short stretch become one at their mean.

    >>> moments = Moments()
    >>> moments.add(np.array([1000, 1000, 5000]))
    >>> moments.points(2)
    (array([1000, 5000]), array([2, 1]))
    """

    def __init__(self) -> None:
        self._times: list[Times] = []
        self._counts: list[Times] = []
        self._points = 0

    def __len__(self) -> int:
        return int(sum(counts.sum() for counts in self._counts))

    def add(self, times: Times, counts: Times | None = None) -> None:
        """Add times [n] of one example each, or of `counts` [n]."""
        if not len(times):
            return
        counts = np.ones(len(times), np.int64) if counts is None else counts
        times, counts = _compressed(times, counts, _POINTS_OF_A_BATCH)
        self._times.append(times)
        self._counts.append(counts)
        self._points += len(times)
        if self._points > 2 * _KEPT_POINTS:
            self._keep(*self.points(_KEPT_POINTS))

    def merge(self, other: Moments) -> None:
        """Add the points of another one."""
        self._times += other._times
        self._counts += other._counts
        self._points += other._points

    def points(self, most: int = _KEPT_POINTS) -> tuple[Times, Times]:
        """Return at most so many times, ascending, and the counts of the examples at each."""
        if not self._times:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        return _compressed(np.concatenate(self._times), np.concatenate(self._counts), most)

    def _keep(self, times: Times, counts: Times) -> None:
        self._times = [times]
        self._counts = [counts]
        self._points = len(times)


def _compressed(times: Times, counts: Times, most: int) -> tuple[Times, Times]:
    """Return the mean time, and the count, of each of `most` equal stretches with an example."""
    first = int(times.min())
    width = (int(times.max()) - first) // most + 1
    stretch = (times - first) // width
    examples = np.bincount(stretch, counts)
    sums = np.bincount(stretch, counts * (times - first).astype(np.float64))
    held = examples > 0
    means = np.rint(sums[held] / examples[held]).astype(np.int64)
    return first + means, examples[held].astype(np.int64)


@dataclass(slots=True)
class Unpublished:
    """The examples that were learned and are not published yet.

    `closed` are the times at which label windows closed, those that are known, and `events` the
    event times, from `oldest_event_ms` to `newest_event_ms`. The last example was learned at
    `learned_ms`. All times are epoch milliseconds.
    """

    closed: Moments = field(default_factory=Moments)
    events: Moments = field(default_factory=Moments)
    oldest_event_ms: int | None = None
    newest_event_ms: int | None = None
    learned_ms: int = 0

    def learn(self, event_times: Times, closed_at: Times, closed: Times, now_ms: int) -> None:
        """Add examples with these event times, of which `closed` [m] were closed at `closed_at`."""
        self.closed.add(closed_at, closed)
        self.events.add(event_times)
        self._extend(int(event_times.min()), int(event_times.max()))
        self.learned_ms = now_ms

    def merge(self, other: Unpublished) -> None:
        """Add what another one holds."""
        self.closed.merge(other.closed)
        self.events.merge(other.events)
        if other.oldest_event_ms is not None and other.newest_event_ms is not None:
            self._extend(other.oldest_event_ms, other.newest_event_ms)
        self.learned_ms = max(self.learned_ms, other.learned_ms)

    def _extend(self, oldest_ms: int, newest_ms: int) -> None:
        if self.oldest_event_ms is None or self.newest_event_ms is None:
            self.oldest_event_ms, self.newest_event_ms = oldest_ms, newest_ms
        self.oldest_event_ms = min(self.oldest_event_ms, oldest_ms)
        self.newest_event_ms = max(self.newest_event_ms, newest_ms)


class Freshness:
    """The ages of the examples of a run at each stage, of all and of the recent ones.

    With `past_events` the events happened long before they were read, as those of a log, so ages
    since the event are not measured. All times are epoch milliseconds of one clock.

    >>> freshness = Freshness()
    >>> freshness.close(np.array([1000, 2000]), now_ms=10_000)
    >>> freshness.learn(2, np.array([1000, 2000]), now_ms=10_500)
    >>> freshness.publish(freshness.take(), now_ms=14_000)
    >>> sorted(freshness.percentiles(whole=True)) == sorted(STAGES)
    True
    >>> freshness.percentiles(whole=True)["closed_to_published"].examples
    2
    """

    def __init__(self, *, past_events: bool = False) -> None:
        self._past_events = past_events
        self._waiting: deque[tuple[int, int]] = deque()  # time of closing, examples: not learned
        self._unpublished = Unpublished()
        self._whole = _no_ages()
        self._now = _no_ages()
        self._before: deque[npt.NDArray[np.int64]] = deque(maxlen=_RECENT - 1)

    def resume(self, examples: int) -> None:
        """Begin with so many closed examples whose times of closing are not known."""
        self._waiting.clear()
        if examples:
            self._waiting.append((UNKNOWN_MS, examples))

    def close(self, event_times: Times, now_ms: int) -> None:
        """Note that the label windows of examples closed. They are learned in this order."""
        self._waiting.append((now_ms, len(event_times)))
        self._since_event("event_to_closed", event_times, None, now_ms)

    def learn(self, examples: int, event_times: Times | None, now_ms: int) -> None:
        """Note that so many examples, the first of those that wait, went through a step.

        `event_times` are those of the examples that were learned, None if none was.
        """
        closed_at, closed = self._take_waiting(examples)
        if event_times is None or not len(event_times):
            return
        self._add("closed_to_learned", now_ms - closed_at, closed)
        self._unpublished.learn(event_times, closed_at, closed, now_ms)

    def take(self) -> Unpublished:
        """Remove and return what was learned and is not published."""
        taken = self._unpublished
        self._unpublished = Unpublished(learned_ms=taken.learned_ms)
        return taken

    def put_back(self, taken: Unpublished) -> None:
        """Take back what was not published after all."""
        self._unpublished.merge(taken)

    def publish(self, taken: Unpublished, now_ms: int) -> None:
        """Note that what was taken is published."""
        times, counts = taken.closed.points()
        self._add("closed_to_published", now_ms - times, counts)
        self._since_event("event_to_published", *taken.events.points(), now_ms)

    def percentiles(self, *, whole: bool) -> dict[str, Percentiles]:
        """Return the percentiles of each stage that has an example.

        They are those of the `whole` run, or of the time since six calls of `end_interval` ago.
        """
        counts = self._whole if whole else np.sum([self._now, *self._before], axis=0)
        found = {
            stage: AgeHistogram(row).percentiles()
            for stage, row in zip(STAGES, counts, strict=True)
        }
        return {stage: ages for stage, ages in found.items() if ages}

    def end_interval(self) -> None:
        """Begin another interval of the recent time, as each report does."""
        self._before.append(self._now)
        self._now = _no_ages()

    def _take_waiting(self, examples: int) -> tuple[Times, Times]:
        """Return the known times of closing of the first examples that wait, and their counts."""
        found: list[tuple[int, int]] = []
        while examples and self._waiting:
            at_ms, count = self._waiting.popleft()
            if count > examples:
                self._waiting.appendleft((at_ms, count - examples))
            found.append((at_ms, min(count, examples)))
            examples -= found[-1][1]
        known = np.array([each for each in found if each[0] != UNKNOWN_MS], np.int64)
        known = known.reshape(-1, 2)
        return known[:, 0], known[:, 1]

    def _since_event(self, stage: str, times: Times, counts: Times | None, now_ms: int) -> None:
        if not self._past_events:
            self._add(stage, now_ms - times, counts)

    def _add(self, stage: str, ages_ms: Times, counts: Times | None) -> None:
        if not len(ages_ms):
            return
        row = STAGES.index(stage)
        for counted in (self._whole, self._now):
            AgeHistogram(counted[row]).add(ages_ms, counts)


def _no_ages() -> npt.NDArray[np.int64]:
    return np.zeros((len(STAGES), _BINS), np.int64)
