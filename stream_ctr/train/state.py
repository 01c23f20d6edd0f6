"""The state of a run: what a snapshot does not hold is not state.

The trainer's loop changes it, `tensors` and `describe` copy it between two batches, and `restore`
gives it back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_ctr.errors import SnapshotError
from stream_ctr.evaluate.scoreboard import Scoreboard, part
from stream_ctr.join.examples import Examples, Ledger
from stream_ctr.join.joiner import LabelJoiner
from stream_ctr.join.watermark import Watermarks
from stream_ctr.learn.learner import Learner
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.manifest import LedgerEntry, Manifest
from stream_ctr.train.batches import BatchCutter
from stream_ctr.train.guard import Diverged, Guard, Learned, Outcome
from stream_ctr.train.stage_timer import StageTimer

Tensors = dict[str, dict[str, npt.NDArray[Any]]]


@dataclass(frozen=True, slots=True)
class Step:
    """What the models made of a batch.

    `batch` holds the examples that the published model learned, None if it skipped all.
    `logits` maps each model to its logits from before the step, of the examples that
    `chosen[model]` (bool [n]) marks, or of all n. `diverged` maps models that must go back to
    their reasons.
    """

    batch: Examples | None
    logits: dict[str, npt.NDArray[np.floating]]
    chosen: dict[str, npt.NDArray[np.bool_]]
    ends_pretraining: bool
    diverged: dict[str, str]


class TrainingState:
    """Everything that learning changes.

    The first of `learners` is the published model. All of them learn the same examples, each with
    a guard of its own.
    """

    def __init__(
        self,
        *,
        joiner: LabelJoiner,
        watermarks: Watermarks,
        learners: Mapping[str, Learner],
        scoreboard: Scoreboard,
        skips_before_rollback: int = 8,
    ) -> None:
        published, *additional = learners
        self.joiner = joiner
        self.watermarks = watermarks
        self.learners = dict(learners)
        self.scoreboard = scoreboard
        self.counters: Counter[str] = Counter()
        self.guard = Guard(
            learners[published], self.counters, skips_before_rollback=skips_before_rollback
        )
        self.additional = {
            name: Guard(
                learners[name],
                self.counters,
                skips_before_rollback=skips_before_rollback,
                additional=name,
            )
            for name in additional
        }
        self.batches = BatchCutter(learners[published].batch_size)
        self.ledger = Ledger()
        self.first_event_ms: int | None = None
        self.last_event_ms: int | None = None

    @property
    def published(self) -> str:
        """The name of the published model."""
        return next(iter(self.learners))

    # -- learning --------------------------------------------------------------------------------

    def guard_of(self, name: str) -> Guard:
        """Return the guard of a model."""
        return self.guard if name == self.published else self.additional[name]

    def watermark(self, idle: npt.NDArray[np.bool_]) -> int:
        """Return the event time before which nothing more is expected.

        `idle` [P] marks the partitions that do not hold it back, unless their clicks are overdue.
        """
        return self.watermarks.overall(excused=idle & ~self.watermarks.silent_clicks())

    def learn(self, batch: Examples, timer: StageTimer) -> Step:
        """Let every model take a step on the batch.

        Examples that the published model skips are skipped for every model.
        """
        following = self.batches.peek()
        outcome = self.guard.learn(batch, following)
        if not isinstance(outcome, Learned):
            diverged = {self.published: outcome.reason} if isinstance(outcome, Diverged) else {}
            return Step(None, {}, {}, False, diverged)
        if outcome.kept is not None:
            batch = batch[outcome.kept]
        self._count(batch)
        step = Step(batch, {self.published: outcome.logits}, {}, outcome.ends_pretraining, {})
        for name, guard in self.additional.items():
            with timer(f"learn.{name}"):
                _enter(step, name, guard.learn(batch, following), len(batch))
        return step

    def _count(self, batch: Examples) -> None:
        """Enter a batch that the published model learned into the ledger."""
        self.ledger = self.ledger.add(batch.id_hash, batch.label)
        if self.first_event_ms is None:
            self.first_event_ms = int(batch.time[0])
        self.last_event_ms = int(batch.time[-1])

    # -- to a snapshot ---------------------------------------------------------------------------

    def tensors(self) -> Tensors:
        """Copy all arrays but those of the metrics, which are complete when all is scored."""
        watermarks = {f"watermarks.{name}": a for name, a in self.watermarks.state_dict().items()}
        return {
            **self._model_tensors(),
            "joiner": {**self.joiner.state_dict(), **watermarks},
            "examples": self.batches.state_dict(),
        }

    def _model_tensors(self) -> Tensors:
        tensors: Tensors = {}
        for name, learner in self.learners.items():
            guard = self.additional.get(name)
            if guard and guard.left_out:
                continue
            model, optimizer = snapshot.stems(name if guard else None)
            tensors[model] = dict(learner.weights(reuse=True))
            tensors[optimizer] = dict(learner.optimizer_state())
        return tensors

    def describe(self) -> dict[str, Any]:
        """Return the fields of a manifest that come from here."""
        return {
            "examples": self.ledger.count,
            "ledger": LedgerEntry(self.ledger.count, self.ledger.sum),
            "event_time_ms": self.last_event_ms or 0,
            "first_event_ms": self.first_event_ms,
            "counters": dict(self.counters),
            "guard": self.guard.state(),
            "guards_beside": {
                name: guard.additional_state() for name, guard in self.additional.items()
            },
        }

    # -- from a snapshot -------------------------------------------------------------------------

    def restore(self, path: Path, manifest: Manifest, tensors: snapshot.Tensors) -> list[str]:
        """Go back to the state in a snapshot.

        Returns the additional models that the snapshot lacks because their weights were not finite.
        Raises `SnapshotError` if the arrays do not fit this run.
        """
        self.guard.load_model(tensors, path, last_step=manifest.gate.last_step)
        self.guard.load_state(manifest.guard)
        self.watermarks.load_state_dict(part(tensors["joiner"], "watermarks."))
        if not self.watermarks.stall_clicks:  # this run does not wait for overdue clicks
            self.watermarks.stalled[:] = False
        try:
            self.joiner.load_state_dict(tensors["joiner"], snapshot.segments(path, manifest))
        except ValueError as error:
            raise SnapshotError(f"snapshot {path.name} cannot be resumed from: {error}") from None
        self.scoreboard.load_state_dict(tensors["metrics"], manifest.gate)
        self.batches.load_state_dict(tensors["examples"])
        self.ledger = Ledger(manifest.ledger.count, manifest.ledger.sum)
        self.counters.clear()
        self.counters.update(manifest.counters)
        self.first_event_ms = manifest.first_event_ms
        self.last_event_ms = manifest.event_time_ms or None
        missing = []
        for name, guard in self.additional.items():
            guard.load_state(manifest.guards_beside[name])
            if guard.left_out:
                continue
            if snapshot.stems(name)[0] in tensors:
                guard.load_model(tensors, path)
            else:
                missing.append(name)
        return missing


def _enter(step: Step, name: str, outcome: Outcome, n: int) -> None:
    """Enter what an additional model made of the n examples of a batch."""
    if isinstance(outcome, Diverged):
        step.diverged[name] = outcome.reason
    if isinstance(outcome, Learned):
        step.logits[name] = outcome.logits
        if outcome.kept is not None:
            step.chosen[name] = outcome.kept
    else:
        step.logits[name] = np.empty(0)
        step.chosen[name] = np.zeros(n, np.bool_)
