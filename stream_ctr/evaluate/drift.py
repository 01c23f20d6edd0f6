"""Drift: a series of figures, one a window, whose level has changed. The detector is River's ADWIN.

ADWIN (Bifet and Gavalda 2007) keeps a window of the newest values that is as long as its level is
constant. It reports a change when two parts of the window have means that differ by more than a
bound, and drops the older part. It was chosen over River's other detectors for three reasons:

- It needs no reference. Its window is one, and both figures of an alarm are means of its parts.
- Its bound follows from the probability of a false alarm, 0.002, and from the measured variance.
  `PageHinkley` needs a threshold in units of the noise, and noise of heavy tails exceeds it.
- `KSWIN` compares with a random sample of its window, and needs about a hundred values.

The bound supposes values of about unit range. So the values are divided by their standard
deviation, estimated from the median absolute deviation of the first 20. It is at least `unit`,
below which a change is of no interest; and an alarm needs a change of at least two units.

The state is the values themselves, at most 512 a series: the detector is rebuilt from them. When
there are that many, the older half is dropped, in an uninterrupted run as well.

>>> watch = DriftWatch({"missing rate": Kind(unit=0.01)}, hold=6)
>>> rng = np.random.default_rng(1)
>>> for minute in range(54):
...     level = 0.02 if minute < 50 else 0.3
...     watch.add("missing rate", 60_000 * minute, level + rng.normal(0, 0.005))
>>> for drift in watch.found:
...     print(drift.name, drift.since_ms // 60_000, round(drift.before, 2), round(drift.after, 2))
missing rate 50 0.02 0.3
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stream_ctr.messages import utc_minute

DELTA = 0.002
"""The probability of a false alarm in ADWIN's bound."""
_WARM_UP = 20
_MOST = 512
_LARGEST = 50.0  # standard deviations from the middle
_NORMAL = 1.4826  # standard deviations of a normal law in its median absolute deviation


class Kind(NamedTuple):
    """The smallest standard deviation of a series, and which changes are no alarm.

    With `rises_only` a fall is none, and no change is from a level of more than `most_before`.
    """

    unit: float
    rises_only: bool = False
    most_before: float = math.inf


@dataclass(frozen=True, slots=True)
class Drift:
    """The level of the series `name` is `after` since the window that began at `since_ms`.

    Before, it was `before`.
    """

    name: str
    since_ms: int
    before: float
    after: float

    def words(self) -> str:
        """Return the change in words.

        >>> Drift("missing rate of app", 0, 0.02, 0.31).words()
        'missing rate of app: 0.31 since 1970-01-01T00:00Z, 0.02 before'
        """
        since = utc_minute(self.since_ms)
        return f"{self.name}: {self.after:.3g} since {since}, {self.before:.3g} before"


class DriftWatch:
    """Detectors on several series of known names. An alarm holds for `hold` windows."""

    def __init__(self, series: Mapping[str, Kind], *, hold: int) -> None:
        self._series = {name: _Series(name, kind, hold) for name, kind in series.items()}

    @property
    def found(self) -> list[Drift]:
        """The changes of level of the last windows, in the order of the series."""
        return [each.found for each in self._series.values() if each.found]

    def add(self, name: str, start_ms: int, value: float) -> None:
        """Add the value of the window that began at `start_ms` to a series."""
        self._series[name].add(start_ms, value)

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Return the series as arrays: S series with n values in all."""
        series = list(self._series.values())
        times = [time for each in series for time in each.times]
        values = [value for each in series for value in each.values]
        return {
            "lengths": np.array([len(each.times) for each in series], np.int64),
            "times": np.array(times, np.int64),
            "values": np.array(values, np.float64),
            "scales": np.array([(each.middle, each.scale) for each in series]).reshape(-1, 2),
            "holds": np.array([each.holds for each in series], np.int64),
            "since": np.array([each.since_ms for each in series], np.int64),
            "levels": np.array([each.levels for each in series]).reshape(len(series), 2),
        }

    def load_state_dict(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore what `state_dict` returned, of a watch with the same series."""
        ends = np.cumsum(state["lengths"]).tolist()
        for row, each in enumerate(self._series.values()):
            first = ends[row - 1] if row else 0
            each.middle, each.scale = state["scales"][row].tolist()
            each.holds = int(state["holds"][row])
            each.since_ms = int(state["since"][row])
            each.levels = state["levels"][row].tolist()
            each.restart(
                state["times"][first : ends[row]].tolist(),
                state["values"][first : ends[row]].tolist(),
            )


class _Series:
    """One series and its detector. `scale` is 0 until the first values are there."""

    def __init__(self, name: str, kind: Kind, hold: int) -> None:
        self.name = name
        self.times: list[int] = []
        self.values: list[float] = []
        self.middle = 0.0
        self.scale = 0.0
        self.holds = 0  # windows for which the alarm still holds
        self.since_ms = 0
        self.levels = [0.0, 0.0]  # before and after the last change
        self._kind = kind
        self._hold = hold
        self._detector = _detector()

    @property
    def found(self) -> Drift | None:
        if not self.holds:
            return None
        return Drift(self.name, self.since_ms, *self.levels)

    def add(self, start_ms: int, value: float) -> None:
        self.holds = max(self.holds - 1, 0)
        self.times.append(start_ms)
        self.values.append(value)
        if not self.scale:
            if len(self.values) == _WARM_UP:
                self._measure()
                self.restart(self.times, self.values)
            return
        if self._feed(value):
            self._split()
        elif len(self.values) >= _MOST:
            self.restart(self.times[-_MOST // 2 :], self.values[-_MOST // 2 :])

    def restart(self, times: list[int], values: list[float]) -> None:
        """Rebuild the detector from these values."""
        self.times = times
        self.values = values
        self._detector = _detector()
        if self.scale:
            for value in values:
                self._feed(value)

    def _measure(self) -> None:
        self.middle = float(np.median(self.values))
        deviation = _NORMAL * float(np.median(np.abs(np.array(self.values) - self.middle)))
        self.scale = max(deviation, self._kind.unit)

    def _feed(self, value: float) -> bool:
        scaled = (value - self.middle) / self.scale
        self._detector.update(min(max(scaled, -_LARGEST), _LARGEST))
        return bool(self._detector.drift_detected)

    def _split(self) -> None:
        """Take note of the change, and keep the values after it."""
        width = int(self._detector.width)
        # ADWIN drops whole buckets: what it keeps may begin before the change.
        at = _change(np.array(self.values))
        cut = max(at, len(self.values) - width) if at else len(self.values) - width
        before = float(np.mean(self.values[:cut]))
        after = float(np.mean(self.values[cut:]))
        change = after - before
        worth = change if self._kind.rises_only else abs(change)
        if worth >= 2 * self._kind.unit and before <= self._kind.most_before:
            self.holds = self._hold
            self.since_ms = self.times[cut]
            self.levels = [before, after]
        self.middle = after
        self.restart(self.times[cut:], self.values[cut:])


def _change(values: npt.NDArray[np.float64]) -> int:
    """Return where the level of values [n] changes: the cut with the most variance between means.

    >>> _change(np.array([0.0, 0.1, 0.0, 5.0, 5.1]))
    3
    """
    n = len(values)
    cuts = np.arange(1, n)
    sums = np.cumsum(values)[:-1]
    means_before = sums / cuts
    means_after = (values.sum() - sums) / (n - cuts)
    between = cuts * (n - cuts) * (means_after - means_before) ** 2
    return int(cuts[np.argmax(between)])


def _detector() -> Any:
    """Return a new ADWIN that looks at every value.

    River is imported here because it loads pandas, which only runs need.
    """
    from river.drift import ADWIN

    return ADWIN(delta=DELTA, clock=1, min_window_length=2, grace_period=10)
