"""The alarm that the published model no longer beats its baseline.

It judges by the newest final windows, the rolling window of the metrics. In it the published model
and each baseline predicted the same examples, each before it learned them. The baseline with the
largest difference in mean logloss counts, d = loss of the published model - loss of the baseline,
with the 95 % bootstrap interval [low, high] of `metrics.paired_interval`:

    state     enters when                                    leaves when
    -------   --------------------------------------------   --------------------
    beats     d <= 0                                         low > 0
    behind    low > 0, on at least `clicks` clicks           d <= 0

The two conditions differ so that a difference near zero does not raise the alarm again and again.
A network that is as good as a logistic regression does not pay for its cost, so that an alarm about
a tie, which chance raises at times, is no false one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stream_ctr.evaluate.summary import WindowSummary
from stream_ctr.messages import utc_minute


@dataclass(frozen=True, slots=True)
class Found:
    """The figures of a published `model` and of the `baseline` that it does not beat.

    `difference` is the mean logloss of the model minus that of the baseline on the examples of
    both, `low` and `high` its 95 % interval. The window reaches from `start_ms` to `end_ms`.
    """

    model: str
    baseline: str
    difference: float
    low: float | None
    high: float | None
    count: int
    clicks: int
    start_ms: int
    end_ms: int

    def words(self) -> str:
        """Return the text of the alarm.

        >>> found = Found("deepfm", "ftrl", 0.0123, 0.005, 0.02, 9000, 412, 0, 3_600_000)
        >>> print(found.words())  # doctest: +NORMALIZE_WHITESPACE
        deepfm no longer beats ftrl: its logloss is 0.0123 higher (95 % interval 0.0050 to 0.0200)
        on 9,000 examples with 412 clicks from 1970-01-01T00:00Z to 1970-01-01T01:00Z
        """
        interval = ""
        if self.low is not None and self.high is not None:
            interval = f" (95 % interval {self.low:.4f} to {self.high:.4f})"
        return (
            f"{self.model} no longer beats {self.baseline}: its logloss is {self.difference:.4f} "
            f"higher{interval} on {self.count:,} examples with {self.clicks:,} clicks from "
            f"{utc_minute(self.start_ms)} to {utc_minute(self.end_ms)}"
        )


class Behind:
    """Notice when the published `model` is worse than one of its `baselines`, and when no more.

    The alarm is not raised on fewer than `clicks` clicks.
    """

    def __init__(self, model: str, baselines: Sequence[str], *, clicks: int = 1000) -> None:
        self.model = model
        self.baselines = tuple(baselines)
        self.found: Found | None = None
        """The figures while the alarm holds, else None."""
        self._clicks = clicks

    def look_at(self, window: WindowSummary | None) -> None:
        """Judge by the newest final windows as one. The same window again changes nothing."""
        worst = self._worst(window) if window else None
        if worst is None:
            return
        if worst.difference <= 0:
            self.found = None
        elif self.found or (worst.low is not None and worst.low > 0):
            enough = worst.clicks >= self._clicks
            self.found = worst if self.found or enough else None

    def _worst(self, window: WindowSummary) -> Found | None:
        """Return the comparison with the baseline that did best, None without any."""
        compared = [
            Found(
                model=self.model,
                baseline=name,
                difference=pair.logloss_difference,
                low=pair.low,
                high=pair.high,
                count=pair.count,
                clicks=round((window.models[name].ctr or 0.0) * window.models[name].count),
                start_ms=window.start_ms,
                end_ms=window.end_ms,
            )
            for name in self.baselines
            if (pair := window.pairs[name]).logloss_difference is not None
        ]
        return max(compared, key=lambda found: found.difference, default=None)

    def state_dict(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return whether the alarm holds, [1] bool; the figures follow from the windows."""
        return {"holds": np.array([self.found is not None])}

    def load_state_dict(
        self, state: Mapping[str, npt.NDArray[np.generic]], window: WindowSummary | None
    ) -> None:
        """Restore what `state_dict` returned, with the figures of the newest final windows."""
        self.found = None
        worst = self._worst(window) if window and state["holds"][0] else None
        if worst and worst.difference > 0:
            self.found = worst
