"""Scoring: learned batches wait until every model has predicted them, and are scored in order.

The baseline answers from its own process, later than the models here. A snapshot or a delta waits
in the same queue, so that it is written when every batch before it is scored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stream_ctr.evaluate import metrics
from stream_ctr.evaluate.scoreboard import PROGRESSIVE, Scoreboard
from stream_ctr.evaluate.summary import WindowSummary
from stream_ctr.learn.baseline import Marker
from stream_ctr.snapshots.snapshot_writer import Cut
from stream_ctr.train.alarms import RunAlarms
from stream_ctr.train.as_served import Copy
from stream_ctr.train.delta_cycle import TakenDelta
from stream_ctr.train.sampled_baseline import SampledBaseline
from stream_ctr.train.stage_timer import StageTimer

_PRETRAINING_ENDED = (
    "its pre-training has ended, and there is no verdict yet on the network that took over"
)


@dataclass(slots=True)
class LearnedBatch:
    """A batch that waits to be scored.

    `logits` maps each model to its logits from before the update, of the examples that
    `chosen[model]` (bool [n]) marks, or of all n. `served` maps each model that is scored as
    served to logits [n], NaN where an example is not. Impressions before `closed_ms` were learned
    in this batch or before it.
    """

    id_hash: npt.NDArray[np.uint64]
    time: npt.NDArray[np.int64]
    label: npt.NDArray[np.uint8]
    true_probability: npt.NDArray[np.float64]
    logits: dict[str, npt.NDArray[np.floating]]
    chosen: dict[str, npt.NDArray[np.bool_]]
    served: dict[str, npt.NDArray[np.float32]]
    ends_pretraining: bool
    closed_ms: int


class ScoringQueue:
    """Batches and cuts in the order in which they were learned and taken.

    Windows that a scored batch closes go to `report`, and scored batches to `keep`.
    """

    def __init__(
        self,
        scoreboard: Scoreboard,
        baseline: SampledBaseline | None,
        *,
        alarms: RunAlarms,
        timer: StageTimer,
        report: Callable[[WindowSummary], None],
        keep: Callable[[LearnedBatch], None] = lambda learned: None,
    ) -> None:
        self._scoreboard = scoreboard
        self._baseline = baseline
        self._alarms = alarms
        self._timer = timer
        self._report = report
        self._keep = keep
        self._waiting: deque[LearnedBatch | Cut | Copy | TakenDelta] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, learned: LearnedBatch) -> None:
        """Append a batch that the models here have learned, and the baseline has been given."""
        self._waiting.append(learned)

    def add_cut(self, cut: Cut) -> None:
        """Append a snapshot; the baseline is asked for its state at this point."""
        self._waiting.append(cut)
        if self._baseline:
            self._baseline.process.mark()

    def add_copy(self, copy: Copy | TakenDelta) -> None:
        """Append a candidate for publication that is in memory only, or a delta."""
        self._waiting.append(copy)

    def score(self, *, wait: bool) -> Iterator[tuple[Cut | Copy | TakenDelta, Marker | None]]:
        """Score the answered batches; yield each cut when all batches before it are scored.

        With `wait`, wait for every answer. A cut comes with the baseline's state, if there is one.
        """
        while self._waiting:
            first = self._waiting[0]
            if isinstance(first, Copy | TakenDelta):
                self._waiting.popleft()
                yield first, None
                continue
            answer = self._answer(self._baseline, wait=wait) if self._baseline else None
            if self._baseline and answer is None:
                return
            head = self._waiting.popleft()
            if isinstance(head, Cut):
                assert answer is None or isinstance(answer, Marker)
                yield head, answer
            else:
                assert not isinstance(answer, Marker)
                assert isinstance(head, LearnedBatch)
                with self._timer("score"):
                    self._score(head, answer)

    def close_windows(self, before_ms: int) -> None:
        """Report the windows that end at or before this event time, once each."""
        with self._timer("report"):
            for window in self._scoreboard.close_windows(before_ms):
                self._report(window)

    def _answer(
        self, baseline: SampledBaseline, *, wait: bool
    ) -> npt.NDArray[np.float64] | Marker | None:
        if baseline.process.full:
            self._alarms.baseline_full(baseline)
        with self._timer("wait.baseline"):
            return baseline.take(wait=wait)

    def _score(self, learned: LearnedBatch, probability: npt.NDArray[np.float64] | None) -> None:
        if self._baseline and probability is not None:
            learned.logits[self._baseline.name] = metrics.logits(probability)
        self._scoreboard.add(
            metrics.Scored(
                learned.time,
                learned.label,
                learned.true_probability,
                learned.logits,
                learned.chosen,
            )
        )
        self._score_served(learned)
        self._keep(learned)
        if learned.ends_pretraining:
            self._scoreboard.begin_anew(_PRETRAINING_ENDED)
        self.close_windows(learned.closed_ms)

    def _score_served(self, learned: LearnedBatch) -> None:
        """Measure the served predictions beside the progressive ones of the same examples."""
        if not learned.served:
            return
        published = next(iter(learned.served))
        rows = np.isfinite(learned.served[published])
        if not rows.any():
            return
        logits = {name: column[rows] for name, column in learned.served.items()}
        logits[PROGRESSIVE] = learned.logits[published][rows]
        finite = {name: np.isfinite(column) for name, column in logits.items()}
        self._scoreboard.add_served(
            metrics.Scored(
                learned.time[rows],
                learned.label[rows],
                learned.true_probability[rows],
                {name: column[finite[name]] for name, column in logits.items()},
                finite,
            )
        )
