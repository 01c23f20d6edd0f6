"""The state of a run: what a snapshot does not hold is not state.

The trainer's loop changes it, `tensors` and `describe` copy it between two batches, and `restore`
gives it back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_ctr.errors import SnapshotError
from stream_ctr.evaluate.field_health import FieldHealth
from stream_ctr.evaluate.scoreboard import Scoreboard, part
from stream_ctr.join.examples import Examples, Ledger
from stream_ctr.join.joiner import Joiner
from stream_ctr.join.watermark import Watermarks
from stream_ctr.learn.blend import Blend
from stream_ctr.learn.learner import Learner
from stream_ctr.learn.linear_learner import LinearLearner
from stream_ctr.learn.shard_writer import TableShards
from stream_ctr.learn.spec import BLEND
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.manifest import GuardState, LedgerEntry, Manifest
from stream_ctr.train.batches import BatchCutter
from stream_ctr.train.guard import Diverged, Guard, Learned, Outcome, worsened
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

    def on(self, kept: npt.NDArray[np.bool_]) -> Step:
        """Return the step on the examples that are `kept` (bool [n])."""
        assert self.batch is not None
        logits = {}
        chosen = {}
        for name, found in self.logits.items():
            mask = self.chosen.get(name)
            if mask is None:
                logits[name] = found[kept] if len(found) else found
            else:
                logits[name] = found[kept[mask]]
                chosen[name] = mask[kept]
        batch = self.batch[kept] if kept.any() else None
        return Step(batch, logits, chosen, self.ends_pretraining, self.diverged)


class TrainingState:
    """Everything that learning changes.

    All `learners` learn the same examples, each with a guard of its own. The published model is the
    `blend` of some of them or, without one, the first of them. `batch_size` returns the size of the
    batch that follows so many examples. `fields` measures the fields of what is learned.
    """

    def __init__(
        self,
        *,
        joiner: Joiner,
        watermarks: Watermarks,
        learners: Mapping[str, Learner],
        scoreboard: Scoreboard,
        batch_size: Callable[[int], int],
        blend: Blend | None = None,
        fields: FieldHealth | None = None,
        skips_before_rollback: int = 8,
    ) -> None:
        self.joiner = joiner
        self.watermarks = watermarks
        self.learners = dict(learners)
        self.scoreboard = scoreboard
        self.counters: Counter[str] = Counter()
        self.bad_records = 0.0
        """The sum of the shares of the records that were rejected."""
        self.fields = fields
        self.blend = blend
        self.published = BLEND if blend else next(iter(learners))
        """The name of the published model."""
        self.guards = {
            name: Guard(
                learner,
                self.counters,
                skips_before_rollback=skips_before_rollback,
                additional=None if name == self.published else name,
            )
            for name, learner in learners.items()
        }
        # The last batch of a blend and its logits, by which a snapshot shows that it did no harm.
        self._last: tuple[Examples, npt.NDArray[np.float64]] | None = None
        self._resumed_last_step: tuple[str, ...] = ()
        self._linear = ThreadPoolExecutor(1, thread_name_prefix="linear")
        self.batches = BatchCutter(batch_size)
        self.ledger = Ledger()
        self.served_at = 0
        """The number of examples when weights were last published in memory."""
        self.first_event_ms: int | None = None
        self.last_event_ms: int | None = None

    # -- learning --------------------------------------------------------------------------------

    @property
    def left_out(self) -> dict[str, str]:
        """The additional models that take no part any more, and why."""
        return {name: guard.left_out for name, guard in self.guards.items() if guard.left_out}

    def learning(self) -> dict[str, Learner]:
        """Return the models that still learn, by name."""
        left_out = self.left_out
        return {name: learner for name, learner in self.learners.items() if name not in left_out}

    def watermark(self, idle: npt.NDArray[np.bool_]) -> int:
        """Return the event time before which nothing more is expected.

        `idle` [P] marks the partitions that do not hold it back, unless their clicks are overdue.
        """
        return self.watermarks.overall(excused=idle & ~self.watermarks.silent_clicks())

    def learn(self, batch: Examples, timer: StageTimer) -> Step:
        """Let every model take a step on the batch.

        Examples that the published model cannot learn are left out for every model, and of a blend
        only those that no member can predict.
        """
        following = self.batches.peek()
        if self.blend:
            return self._learn_blend(self.blend, batch, following, timer)
        outcome = self.guards[self.published].learn(batch, following)
        if not isinstance(outcome, Learned):
            diverged = {self.published: outcome.reason} if isinstance(outcome, Diverged) else {}
            return Step(None, {}, {}, False, diverged)
        if outcome.kept is not None:
            batch = batch[outcome.kept]
        self._count(batch)
        step = Step(batch, {self.published: outcome.logits}, {}, outcome.ends_pretraining, {})
        for name, guard in self.guards.items():
            if name != self.published:
                with timer(f"learn.{name}"):
                    _enter(step, name, guard.learn(batch, following), len(batch))
        return step

    def _learn_blend(
        self, blend: Blend, batch: Examples, following: Examples | None, timer: StageTimer
    ) -> Step:
        n = len(batch)
        step = Step(batch, {BLEND: np.empty(0)}, {}, False, {})
        # Logistic regressions learn in one thread, and meanwhile the networks in theirs.
        waiting = {
            name: self._linear.submit(self.guards[name].learn, batch)
            for name, learner in self.learners.items()
            if isinstance(learner, LinearLearner)
        }
        outcomes: dict[str, Outcome] = {}
        for name, guard in self.guards.items():
            if name not in waiting:
                with timer(f"learn.{name}"):
                    outcomes[name] = guard.learn(batch, following)
        for name, learning in waiting.items():
            with timer(f"learn.{name}"):
                outcomes[name] = learning.result()
        for name in self.guards:
            _enter(step, name, outcomes[name], n)
        logits = np.full((len(blend.members), n), np.nan)
        for row, name in enumerate(blend.members):
            logits[row, step.chosen.get(name, slice(None))] = step.logits[name]
        with timer("learn.blend"):
            blended = blend.learn(logits, batch.label)
        kept = np.isfinite(blended)
        if not kept.all():
            self.counters["examples_skipped"] += n - int(kept.sum())
            step = step.on(kept)
            batch = batch[kept]
        step.logits[BLEND] = blended[kept]
        if len(batch):
            self._count(batch)
            self._last = batch, blended[kept]
        return step

    def check_published_step(self, *, most: int) -> tuple[str, ...] | Diverged:
        """Return what the last step did wrong to the published model, on some of its examples.

        It looks at the first `most` examples. Returns `Diverged` as `Guard.check_last_step` does.
        """
        if self.blend:
            return self.check_last_step(most=most)
        return self.guards[self.published].check_last_step(most=most)

    def check_last_step(self, *, most: int | None = None) -> tuple[str, ...]:
        """Return what the last step of the blend did wrong, empty if nothing or without a blend."""
        if self._last is None or self.blend is None:
            return self._resumed_last_step
        examples, before = self._last[0][:most], self._last[1][:most]
        after = self.blend.predict_with(self.learning(), examples.ids, examples.values)
        return worsened(before, after, examples.label)

    def _count(self, batch: Examples) -> None:
        """Enter a batch that the published model learned into the ledger."""
        self.ledger = self.ledger.add(batch.id_hash, batch.label)
        if self.first_event_ms is None:
            self.first_event_ms = int(batch.time[0])
        # Examples that came with their label are later than the impressions beside them.
        self.last_event_ms = max(int(batch.time.max()), self.last_event_ms or self.first_event_ms)

    # -- to a snapshot ---------------------------------------------------------------------------

    def tensors(self) -> Tensors:
        """Copy all arrays but those of the metrics, which are complete when all is scored."""
        watermarks = {f"watermarks.{name}": a for name, a in self.watermarks.state_dict().items()}
        return {
            **self._model_tensors(),
            "joiner": {**self.joiner.state_dict(), **watermarks},
            "examples": self.batches.state_dict(),
            **({"fields": self.fields.state_dict()} if self.fields else {}),
        }

    def _model_tensors(self) -> Tensors:
        tensors: Tensors = {}
        if self.blend:
            model, optimizer = snapshot.stems()
            tensors[model] = self.blend.weights()
            tensors[optimizer] = self.blend.optimizer_state()
        for name, learner in self.learning().items():
            model, optimizer = snapshot.stems(self.guards[name].additional)
            tensors[model] = dict(learner.weights(reuse=True))
            tensors[optimizer] = dict(learner.optimizer_state())
        return tensors

    def shards(self) -> dict[str, TableShards]:
        """Return the copies that `tensors` has just made of tables on several ranks, by stem."""
        found = {
            snapshot.stems(self.guards[name].additional)[0]: learner.shards()
            for name, learner in self.learning().items()
        }
        return {stem: shards for stem, shards in found.items() if shards}

    @property
    def sharded(self) -> bool:
        """True if the ranks of a run hold the tables of its models together."""
        return any(learner.shards() is not None for learner in self.learners.values())

    def describe(self) -> dict[str, Any]:
        """Return the fields of a manifest that come from here."""
        return {
            "examples": self.ledger.count,
            "ledger": LedgerEntry(self.ledger.count, self.ledger.sum),
            "event_time_ms": self.last_event_ms or 0,
            "first_event_ms": self.first_event_ms,
            "served_at": self.served_at,
            "counters": dict(self.counters),
            "bad_records": self.bad_records,
            "guard": guard.state() if (guard := self.guards.get(self.published)) else GuardState(),
            "guards_beside": {
                name: guard.additional_state()
                for name, guard in self.guards.items()
                if guard.additional
            },
        }

    # -- from a snapshot -------------------------------------------------------------------------

    def restore(self, path: Path, manifest: Manifest, tensors: snapshot.Tensors) -> list[str]:
        """Go back to the state in a snapshot.

        Returns the additional models that the snapshot lacks because their weights were not finite.
        Raises `SnapshotError` if the arrays do not fit this run.
        """
        if self.blend:
            self._load_blend(self.blend, tensors, path)
            self._resumed_last_step = manifest.gate.last_step
        else:
            guard = self.guards[self.published]
            guard.load_model(tensors, path, last_step=manifest.gate.last_step)
            guard.load_state(manifest.guard)
        self.watermarks.load_state_dict(part(tensors["joiner"], "watermarks."))
        if not self.watermarks.stall_clicks:  # this run does not wait for overdue clicks
            self.watermarks.stalled[:] = False
        try:
            self.joiner.load_state_dict(tensors["joiner"], snapshot.segments(path, manifest))
        except ValueError as error:
            raise SnapshotError(f"snapshot {path.name} cannot be resumed from: {error}") from None
        self.scoreboard.load_state_dict(tensors["metrics"], manifest.gate, manifest.served_verdict)
        self.batches.load_state_dict(tensors["examples"])
        if self.fields and "fields" in tensors:  # a run without them may be resumed with them
            self.fields.load_state_dict(tensors["fields"])
        self.ledger = Ledger(manifest.ledger.count, manifest.ledger.sum)
        self.counters.clear()
        self.counters.update(manifest.counters)
        self.bad_records = manifest.bad_records
        self.first_event_ms = manifest.first_event_ms
        self.served_at = manifest.served_at
        self.last_event_ms = manifest.event_time_ms or None
        missing = []
        for name, guard in self.guards.items():
            if not guard.additional:
                continue
            guard.load_state(manifest.guards_beside[name])
            if guard.left_out:
                continue
            if snapshot.stems(name)[0] in tensors:
                guard.load_model(tensors, path)
            else:
                missing.append(name)
        return missing

    @staticmethod
    def _load_blend(blend: Blend, tensors: snapshot.Tensors, path: Path) -> None:
        model, optimizer = snapshot.stems()
        try:
            blend.load_weights(tensors[model])
            blend.load_optimizer_state(tensors[optimizer])
        except (KeyError, ValueError) as error:
            raise SnapshotError(f"snapshot {path.name} does not fit the blend: {error}") from None


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
