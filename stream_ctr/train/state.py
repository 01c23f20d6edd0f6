"""The state of a run: what a snapshot does not hold is not state.

The trainer's loop changes it, `tensors` and `describe` copy it between two batches, and `restore`
gives it back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from stream_ctr.train.guard import Guard

Tensors = dict[str, dict[str, npt.NDArray[Any]]]


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

    def count_examples(self, batch: Examples) -> None:
        """Enter a batch that the published model learned into the ledger."""
        self.ledger = self.ledger.add(batch.id_hash, batch.label)
        if self.first_event_ms is None:
            self.first_event_ms = int(batch.time[0])
        self.last_event_ms = int(batch.time[-1])

    # -- to a snapshot ---------------------------------------------------------------------------

    def tensors(self) -> Tensors:
        """Copy all arrays but those of the metrics, which are complete once all batches are scored."""
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

    def restore(self, path: Path, manifest: Manifest, tensors: snapshot.Tensors) -> None:
        """Go back to the state in a snapshot; the additional models are left to the caller.

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
