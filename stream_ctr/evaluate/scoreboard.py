"""The metrics of a run: over all of it, in event-time windows, and since the last verdict.

>>> import numpy as np
>>> windows = MetricWindows(window_ms=1000, rolling=2)
>>> board = Scoreboard(["a", "b"], windows=windows, gate=Gate(clicks=0))
>>> board.add(
...     metrics.Scored(
...         np.array([0, 1]),
...         np.array([1, 0], np.uint8),
...         np.full(2, np.nan),
...         {"a": np.array([1.0, -1.0]), "b": np.array([0.0, 0.0])},
...         {},
...     )
... )
>>> [round(score.logloss, 4) for score in board.whole.summary().models.values()]
[0.3133, 0.6931]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from stream_ctr.evaluate import metrics
from stream_ctr.evaluate.behind import Behind
from stream_ctr.evaluate.drift import Drift, DriftWatch, Kind
from stream_ctr.evaluate.gate import Gate, Judge, Verdict
from stream_ctr.evaluate.summary import WindowSummary

State = dict[str, npt.NDArray[Any]]
PROGRESSIVE = "progressive"
"""The name of the published model's progressive predictions among those that were served."""


_ENTROPY = "normalised entropy"
_CALIBRATION = "calibration"
_MODEL_SERIES = {
    _ENTROPY: Kind(unit=0.01, rises_only=True),
    _CALIBRATION: Kind(unit=0.03),
}
_FEWEST_CLICKS = 50  # of a window whose figures are part of a series


@dataclass(frozen=True, slots=True)
class MetricWindows:
    """The length of a metric window in event time, and how many of them make the rolling window."""

    window_ms: int = 600_000
    rolling: int = 6


class Scoreboard:
    """The metrics of `models`, the published one first and the `baseline`, if any, last.

    `served` names the models that are scored as served too, the published one first. Their metrics
    stand beside those of the published model's progressive predictions of the same examples. With
    `in_memory`, what is served is published apart from snapshots on disk, and has a judge of its
    own: its verdicts do not depend on when snapshots were taken. `baselines` names the models that
    the published one should beat.
    """

    def __init__(
        self,
        models: Sequence[str],
        *,
        windows: MetricWindows,
        gate: Gate,
        served: Sequence[str] = (),
        in_memory: bool = False,
        baselines: Sequence[str] = (),
    ) -> None:
        self.models = tuple(models)
        self.whole = metrics.WholeRun(models)
        self.windows = metrics.Windows(models, window_ms=windows.window_ms, rolling=windows.rolling)
        self.judge = Judge(gate, models)
        self.behind = Behind(models[0], baselines)
        self._drift = DriftWatch(
            {f"{name} of {models[0]}": kind for name, kind in _MODEL_SERIES.items()},
            hold=windows.rolling,
        )
        self.served = metrics.WholeRun([*served, PROGRESSIVE]) if served else None
        self.served_judge = Judge(gate, models) if served and in_memory else None

    def add(self, scored: metrics.Scored) -> None:
        """Measure a batch that every model predicted before it learned it."""
        self.whole.add(scored)
        self.windows.add(scored)
        for judge in self._judges():
            judge.add(scored)

    def close_windows(self, before_ms: int) -> list[WindowSummary]:
        """Return each window that ends at or before this event time, once."""
        closed = self.windows.close(before_ms)
        if closed:
            self.behind.look_at(self.windows.final_summary())
        for window in closed:
            self._watch(window)
        return closed

    @property
    def drifts(self) -> list[Drift]:
        """The figures of the published model whose level has changed in the last windows.

        These are its normalised entropy, which is its logloss relative to a constant, and its
        calibration.
        """
        return self._drift.found

    def _watch(self, window: WindowSummary) -> None:
        score = window.models[self.models[0]]
        clicks = round((score.ctr or 0.0) * score.count)
        if clicks < _FEWEST_CLICKS or score.ne is None or score.pred_over_actual is None:
            return
        for name, value in ((_ENTROPY, score.ne), (_CALIBRATION, score.pred_over_actual)):
            self._drift.add(f"{name} of {self.models[0]}", window.start_ms, value)

    def add_served(self, scored: metrics.Scored) -> None:
        """Measure a batch by the predictions that were served."""
        if self.served:
            self.served.add(scored)

    def begin_anew(self, reason: str) -> None:
        """Forget the evidence on the published model; see `Judge.begin_anew`."""
        for judge in self._judges():
            judge.begin_anew(reason)

    def go_back(self, verdict: Verdict) -> None:
        """Forget the evidence on the published model; see `Judge.go_back`."""
        for judge in self._judges():
            judge.go_back(verdict)

    def _judges(self) -> list[Judge]:
        return [self.judge, *([self.served_judge] if self.served_judge else [])]

    def state_dict(self) -> State:
        """Return all sums as arrays, for a snapshot."""
        parts = {
            "whole": self.whole.state_dict(),
            "windows": self.windows.state_dict(),
            "judge": self.judge.state_dict(),
            "behind": self.behind.state_dict(),
            "drift": self._drift.state_dict(),
            **({"served": self.served.state_dict()} if self.served else {}),
            **({"served_judge": self.served_judge.state_dict()} if self.served_judge else {}),
        }
        return {
            f"{part}.{name}": array
            for part, arrays in parts.items()
            for name, array in arrays.items()
        }

    def load_state_dict(
        self,
        state: Mapping[str, npt.NDArray[Any]],
        verdict: Verdict,
        served_verdict: Verdict = Verdict(),  # noqa: B008 - frozen
    ) -> None:
        """Restore what `state_dict` returned, and the last verdict of each judge."""
        self.whole.load_state_dict(part(state, "whole."))
        self.windows.load_state_dict(part(state, "windows."))
        self.judge.load_state_dict(part(state, "judge."), verdict)
        if behind := part(state, "behind."):  # snapshots used to be without it
            self.behind.load_state_dict(behind, self.windows.final_summary())
        if drift := part(state, "drift."):
            self._drift.load_state_dict(drift)
        # A run without it may be resumed with it.
        if self.served and (served := part(state, "served.")):
            self.served.load_state_dict(served)
        if self.served_judge and (evidence := part(state, "served_judge.")):
            self.served_judge.load_state_dict(evidence, served_verdict)


def part(state: Mapping[str, npt.NDArray[Any]], prefix: str) -> State:
    """Return the arrays whose names begin with `prefix`, named without it.

    >>> import numpy as np
    >>> part({"whole.counts": np.ones(1), "judge.sums": np.ones(2)}, "judge.")
    {'sums': array([1., 1.])}
    """
    return {
        name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)
    }
