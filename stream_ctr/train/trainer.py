"""The trainer: one loop that owns all state.

    poll -> join -> batches -> learn -> score -> reports
                                  `--> copy -> write -> commit -> publish

The loop takes what ingest has polled, decoded and hashed, joins it, cuts batches of exactly the
batch size, learns them, and serves the flags of the schedule between two batches. The sequence of
examples depends on the log alone (see `join`), batches never end at the boundary of a poll, and so
the model depends on the log alone too.

Batches are scored later than they are learned, when the baseline has answered. A snapshot is copied
between two batches and written when all batches before it are scored.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from stream_ctr.errors import DataError, SnapshotError
from stream_ctr.evaluate.freshness import Freshness, Unpublished
from stream_ctr.evaluate.gate import Measured
from stream_ctr.events.batch import EventBatch
from stream_ctr.failpoint import failpoint
from stream_ctr.join.examples import Examples
from stream_ctr.learn.baseline import Marker
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.manifest import Input, RunIdentity
from stream_ctr.snapshots.publisher import Publisher
from stream_ctr.snapshots.snapshot_writer import Cut, Written
from stream_ctr.train import begin, cut
from stream_ctr.train.alarms import (
    FieldWatch,
    RunAlarms,
    stalled_partitions,
    warn_of_late_input,
)
from stream_ctr.train.alignment import Alignment
from stream_ctr.train.as_served import PASSED_OVER, AsServed, Copy
from stream_ctr.train.bad_records import BadRecords
from stream_ctr.train.delta_cycle import DeltaCycle, TakenDelta
from stream_ctr.train.guard import Diverged
from stream_ctr.train.ingest import Poll, Reading, SourceStatus
from stream_ctr.train.inputs import input_name
from stream_ctr.train.predictions import PredictionLog
from stream_ctr.train.report import (
    Kind,
    Report,
    WindowReport,
    build_report,
    to_json_object,
    window_report,
)
from stream_ctr.train.resume import require_learning_state, require_run, require_same_run
from stream_ctr.train.sampled_baseline import SampledBaseline
from stream_ctr.train.scoring import LearnedBatch, ScoringQueue
from stream_ctr.train.snapshot_cycle import SnapshotCycle, SnapshotPolicy
from stream_ctr.train.stage_timer import ELSE, StageTimer, profile
from stream_ctr.train.state import TrainingState

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.25
_CHECKED_EXAMPLES = 256  # of the last step before weights are published in memory
_NOT_FINITE = "its weights are not finite"


class Flags(Protocol):
    """The flags that the schedule raises."""

    def due(self, name: str) -> bool:
        """Return whether `name` is due, and lower its flag."""
        ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The outside of a run: a schedule, a display, notes for the last report, two clocks.

    `written` gets each report as the object that was written, those of windows too, and `beat` is
    called between two batches and after each poll. Both are called by the loop, and must not wait.
    With `past_events`, the events happened long before they are read, as those of a log.
    """

    flags: Flags | None = None
    show: Callable[[Report], None] = lambda report: None
    written: Callable[[dict[str, Any]], None] = lambda report: None
    beat: Callable[[], None] = lambda: None
    notes: Callable[[], Sequence[str]] = tuple
    past_events: bool = False
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time


class Trainer:
    """Learn from what `ingest` reads; write reports, snapshots and pointers through `publisher`.

    `identity` goes into every snapshot: a server rebuilds the models from it, and a resumed run
    must agree with it. `served` scores examples as they were served, and `predictions` keeps the
    predictions of every example. With `keep_open`, label windows that are open at the end of the
    source stay open, and a batch that is not full waits, for the run that goes on.
    """

    def __init__(
        self,
        *,
        ingest: Reading,
        state: TrainingState,
        publisher: Publisher,
        identity: RunIdentity,
        snapshots: SnapshotPolicy,
        baseline: SampledBaseline | None = None,
        served: AsServed | None = None,
        predictions: PredictionLog | None = None,
        max_bad_share: float = 0.5,
        keep_open: bool = False,
        surroundings: Surroundings | None = None,
    ) -> None:
        self.ingest = ingest
        self.source = ingest.source
        self.state = state
        self.publisher = publisher
        self.identity = identity
        self.baseline = baseline
        self.served = served
        self.predictions = predictions
        self.timer = StageTimer()
        self.snapshots = SnapshotCycle(
            snapshots,
            source=self.source,
            publisher=publisher,
            counters=state.counters,
            before=predictions.write if predictions else lambda: None,
        )
        self._keep_open = keep_open
        self._around = surroundings or Surroundings()
        self._now_ms = _milliseconds(self._around.wall_clock)
        self.freshness = Freshness(past_events=self._around.past_events)
        self.deltas = self._delta_cycle()
        self._put = put = _reporter(publisher, self._around)
        self._bad_records = BadRecords(
            self.source.partitions, publisher, state, max_bad_share=max_bad_share
        )
        self._alarms = RunAlarms(self.source.partitions, state.counters, self._around.wall_clock)
        self._fields = FieldWatch(
            [field.name for field in identity.schema.fields],
            value_fields=identity.schema.value_fields,
        )
        self._alignment = Alignment(ingest)
        self._unscored = ScoringQueue(
            state.scoreboard,
            baseline,
            alarms=self._alarms,
            timer=self.timer,
            report=lambda window: put(window_report(window, publisher.run)),
            keep=predictions.add if predictions else lambda learned: None,
        )
        self._cut_copies: Sequence[Copy] = ()  # those that the snapshot in progress holds
        self._cut_delta: TakenDelta | None = None  # that of the snapshot in progress
        self._cut_news: Unpublished | None = None  # what it publishes if no delta does
        self._status = ingest.status()
        self._stopping = False
        self._started = self._around.clock()
        self._events_read = 0
        self._examples_at_snapshot = 0
        self._inputs_at_snapshot: tuple[Input, ...] = ()
        self._late_at_seam: int | None = None  # until the first impressions of the next input
        state.watermarks.begin(self._status.present)
        for learner in state.learners.values():
            # Memory for the copies in snapshots is allocated now, not while learning waits.
            learner.weights(reuse=True)
            if served and not served.of_snapshots:  # copies are frequent
                learner.track_changes()

    def _delta_cycle(self) -> DeltaCycle | None:
        policy = self.snapshots.policy
        if not policy.deltas:
            return None
        return DeltaCycle(
            policy.deltas,
            policy.directory,
            state=self.state,
            identity=self.identity,
            publisher=self.publisher,
            freshness=self.freshness,
            signing=policy.signing,
            now_ms=self._now_ms,
        )

    # -- the loop --------------------------------------------------------------------------------

    def run(self) -> Report:
        """Learn until the source ends or `stop` is called; return the last report.

        When a source ends, the label windows that are still open are closed with the clicks that
        came, unless the run keeps them open.
        """
        try:
            with self.timer(ELSE):
                return self._run()
        except Exception:
            self.publisher.check()  # after a take-over, that is the cause of any other error
            self.publisher.deliver_dead_letters()  # the next run need not send them again
            raise
        finally:
            if self.deltas:
                self.deltas.close()
            self.snapshots.close()

    def stop(self) -> None:
        """Make `run` finish its batch, take a snapshot and return. A signal handler may call it."""
        self._stopping = True

    def _run(self) -> Report:
        if self.predictions and self.snapshots.parent is None:
            self.predictions.begin(0)
        self._read()
        if not self._stopping:
            self._reach_end()
        if not self._stopping and not self._keep_open:
            self._drain()
        finished = not self._stopping
        if finished:
            self._fields.finish()
            self._learn_ready(partial=not self._keep_open)
        self._settle(wait=True)
        if finished and self._all_learned:
            self._unscored.close_windows(self.state.last_event_ms or 0)
        if self._has_changed():
            self.cut()
            self._settle(wait=True)
        report = self._report("final" if finished else "stopped")
        self.publisher.flush()
        if self.snapshots.failure:
            raise self.snapshots.failure
        return report

    def _read(self) -> None:
        """Handle polls until the source ends or `stop` is called."""
        self._status = self.ingest.status()
        try:
            while not self._stopping and not self._status.finished:
                with self.timer("wait.reader"):
                    poll = self.ingest.take(_POLL_SECONDS)
                self._handle(poll)
        finally:
            self.ingest.close()

    @property
    def _all_learned(self) -> bool:
        return not self.state.joiner.pending and not len(self.state.batches)

    def _has_changed(self) -> bool:
        """Return whether there is anything to write a last snapshot for."""
        learned = self.state.ledger.count - self._examples_at_snapshot
        went_on = self._status.inputs != self._inputs_at_snapshot  # an input may have ended
        return bool(self._events_read or learned or went_on or self.snapshots.parent is None)

    def _handle(self, poll: Poll) -> None:
        self.publisher.check()  # a process that takes over waits for this one to end
        if poll.status.present != self.state.watermarks.present:
            self._begin_next(poll.status)
            if self._stopping:
                return
        self._status = poll.status
        if poll.events:
            failpoint("poll.after")
            with self.timer("join"):
                self._join(poll.events)
            failpoint("join.after")
        watermark = self.state.watermark(self._status.idle)
        self._release(lambda: self.state.joiner.advance(watermark))
        self._alignment.update(self.state.joiner, self.state.watermarks, self._status)
        stalled = stalled_partitions(self.state.watermarks, self.source.partitions)
        self._alarms.check(self._status, self.state.joiner, stalled)
        if self._stopping:
            return
        self._settle(wait=False)
        self._serve_flags()

    def _begin_next(self, status: SourceStatus) -> None:
        """Go on with the next input, whose first poll has this status."""
        failpoint("seam.before")
        self._reach_end()
        if self._stopping:  # the poll is read again
            return
        self.state.watermarks.begin(status.present)
        self._late_at_seam = self.state.joiner.counts()["impressions_late"]
        _log.info("goes on with %s", input_name(status.inputs[-1].partitions))
        failpoint("seam.after")

    def _reach_end(self) -> None:
        """Learn what the end of the present input brings to a close.

        A run that stopped at the end, or resumed there, has not polled since: this brings its
        watermark to where a run that read on has it.
        """
        everything = np.ones(len(self.source.partitions), np.bool_)
        watermark = self.state.watermark(everything)
        self._release(lambda: self.state.joiner.advance(watermark))

    def _drain(self) -> None:
        """Close the windows that are open at the end of the source.

        If clicks are overdue, their impressions are left to the run that reads on.
        """
        if not stalled_partitions(self.state.watermarks, self.source.partitions):
            self._release(self.state.joiner.drain)

    # -- from events to learned batches ----------------------------------------------------------

    def _join(self, events: EventBatch) -> None:
        if events.with_unknown_fields:
            self.state.counters["fields_unknown"] += events.with_unknown_fields
        self._events_read += events.events
        self._bad_records.keep(events)
        if self._fields.watches:
            self._fields.observe(events.field_sample())
        self.state.joiner.push(events, self.state.watermarks)
        if self._late_at_seam is not None and (shown := events.shown):
            late = self.state.joiner.counts()["impressions_late"] - self._late_at_seam
            warn_of_late_input(self._status.inputs[-1], late, of=shown)
            self._late_at_seam = None

    def _release(self, leave: Callable[[], Examples]) -> None:
        """Learn the examples that leave the joiner, a part at a time.

        A jump of the watermark may close very many windows.
        """
        while not self._stopping:
            with self.timer("join"):
                examples = leave()
            if not len(examples):
                return
            self.state.batches.add(examples)
            self.freshness.close(examples.time, self._now_ms())
            self._learn_ready()

    def _learn_ready(self, *, partial: bool = False) -> None:
        while batch := self.state.batches.next(partial=partial):
            before_ms = self.state.last_event_ms
            with self.timer("learn"):
                self._learn(batch)
            if self.served and self.served.due(
                before_ms,
                self.state.last_event_ms,
                last=self.state.served_at,
                examples=self.state.ledger.count,
            ):
                self.state.served_at = self.state.ledger.count
                with self.timer("serve"):
                    self._publish_in_memory(self.served)
            self._settle(wait=False)
            self._serve_flags()
            if self._stopping and not partial:
                break

    def _learn(self, batch: Examples) -> None:
        failpoint("learn.before")
        if self.served and self.served.awaits_verdict(batch):
            self._settle(wait=True)
        step = self.state.learn(batch, self.timer)
        learned = None if step.batch is None else step.batch.time
        self.freshness.learn(len(batch), learned, self._now_ms())
        for name, reason in step.diverged.items():
            self._restore_model(name, reason)
        if step.batch is None:
            return
        if self.state.fields:
            with self.timer("fields"):
                self.state.fields.add(step.batch)
        if self.baseline:
            chosen = self.baseline.submit(step.batch)
            if chosen is not None:
                step.chosen[self.baseline.name] = chosen
        self._unscored.add(
            LearnedBatch(
                id_hash=step.batch.id_hash,
                time=step.batch.time,
                label=step.batch.label,
                true_probability=step.batch.true_probability,
                logits=step.logits,
                chosen=step.chosen,
                served=self._score_as_served(step.batch),
                ends_pretraining=step.ends_pretraining,
                closed_ms=int(step.batch.closed_ms[-1]),
            )
        )
        failpoint("learn.after")

    def _score_as_served(self, batch: Examples) -> dict[str, npt.NDArray[np.float32]]:
        if not self.served:
            return {}
        with self.timer("serve"):
            return self.served.score(batch, self.state.counters)

    def _freeze(self) -> Copy | None:
        """Copy the weights as they are, as a candidate for publication.

        Returns None if impressions are not scored as served, or if there is no room.
        """
        served = self.served
        if not served or not self.state.ledger.count:
            return None
        if served.full and served.undecided:
            self._settle(wait=True)
        copy = served.freeze(
            self.state.learning(),
            blend=self.state.blend,
            examples=self.state.ledger.count,
            event_ms=self.state.last_event_ms or 0,
        )
        if not copy:
            self.state.counters[PASSED_OVER] += 1
        return copy

    def _publish_in_memory(self, served: AsServed) -> None:
        """Make a candidate of the weights as they are; it is decided when all is scored."""
        last_step = self.state.check_published_step(most=_CHECKED_EXAMPLES)
        copy = self._freeze()
        if copy and last_step:
            served.decide(copy, published=False, evidence=None)
        elif copy:
            self._unscored.add_copy(copy)

    def _decide(self, copy: Copy) -> None:
        """Pass a verdict on a candidate in memory; every batch before it is scored."""
        judge = self.state.scoreboard.served_judge
        served = self.served
        assert served
        assert judge
        judge.judge(lambda: served.evidence)
        served.decide(copy, published=not judge.refused, evidence=judge.verdict().evidence)

    def _restore_model(self, name: str, reason: str) -> None:
        """Give a diverged model the state of an earlier snapshot.

        If that does not help, an additional model is left out of the run, and the published one
        ends it.
        """
        guard = self.state.guards[name]
        try:
            self._settle(wait=True)
            verdict = guard.restore(
                self.snapshots.last_good(guard.additional),
                reason,
                trained=self.state.ledger.count,
                signature=self.snapshots.policy.signature,
            )
        except (DataError, SnapshotError) as error:
            if guard.additional is None:
                raise
            guard.leave_out(error)
            if self.state.blend and len(self.state.left_out) == len(self.state.learners):
                raise DataError(f"no member of the blend is left: {error}") from None
            return
        if verdict is not None and guard.additional is None:
            self.state.scoreboard.go_back(verdict)

    # -- from learned batches to reports and snapshots -------------------------------------------

    def _settle(self, *, wait: bool) -> None:
        """Score the batches that every model predicted, and finish the snapshots behind them."""
        for taken, marker in self._unscored.score(wait=wait):
            if isinstance(taken, Copy):
                self._decide(taken)
            elif isinstance(taken, TakenDelta):
                self._judge_delta(taken)
            else:
                self._write(taken, marker)
        if self.deltas:
            self.deltas.finish(wait=wait)
        with self.timer("snapshot"):
            finished = self.snapshots.take(wait=wait)
            published = False
            if isinstance(finished, Diverged):
                self._restore_model(self.state.published, finished.reason)
            elif finished:
                for name in finished.not_finite:  # before the snapshot to go back to is removed
                    self._restore_model(name, _NOT_FINITE)
                published = self._publish(finished)
            if not self.snapshots.in_progress:
                self._decide_cut(published=published)

    def _publish(self, written: Written) -> bool:
        """Commit and publish a snapshot that is on disk; return whether it is published."""
        if self.deltas:
            self.deltas.settle_before_publication()
        published = self.snapshots.commit_and_publish(written)
        if self.deltas and published:
            self.deltas.follow(written.manifest)
        return published

    def _decide_cut(self, *, published: bool) -> None:
        """Enter whether the snapshot that was cut last is published."""
        if self.served and self.served.of_snapshots:
            self.served.decide_all(published=published)
        if not self._cut_news:
            return
        if published:
            self.freshness.publish(self._cut_news, self._now_ms())
        else:
            self.freshness.put_back(self._cut_news)
        self._cut_news = None

    def _serve_flags(self) -> None:
        self._around.beat()
        flags = self._around.flags
        if flags and flags.due("report"):
            self._report("report")
        every = self.snapshots.policy.every_examples
        counted = every and self.state.ledger.count - self._examples_at_snapshot >= every
        # A snapshot that is due by the clock waits for the one that is being written.
        if counted or (flags and not self.snapshots.in_progress and flags.due("snapshot")):
            with self.timer("snapshot"):
                self.cut()
        elif self.deltas and flags and self.deltas.ready and flags.due("delta"):
            with self.timer("delta"):
                self._take_delta(self.deltas)

    def _take_delta(self, deltas: DeltaCycle) -> None:
        """Copy what changed since the last delta; it is judged when all batches are scored."""
        reasons = self.state.scoreboard.judge.standing
        if not reasons:
            step = self.state.check_published_step(most=_CHECKED_EXAMPLES)
            reasons = (step.reason,) if isinstance(step, Diverged) else step
        taken = deltas.take(self._positions(), reasons=reasons)
        if taken:
            self._unscored.add_copy(taken)

    def _judge_delta(self, taken: TakenDelta) -> None:
        """Judge the model as it was when a delta was taken; every batch before it is scored."""
        assert self.deltas
        judge = self.state.scoreboard.judge
        judge.judge(self._published_evidence, taken.clicks)
        self._alarms.check_models(self.state, self.snapshots.failure)
        self.deltas.decide(taken, judge.verdict())

    def _positions(self) -> dict[str, int]:
        return {self.source.names[index]: at for index, at in self._status.positions.items()}

    def _report(self, kind: Kind) -> Report:
        with self.timer("report"):
            joiner = self.state.joiner
            if not len(self._unscored) and not len(self.state.batches):
                # Everything whose label window is closed is scored, even if nothing follows.
                self._unscored.close_windows(joiner.watermark - joiner.label_window_ms)
            self._alarms.check_models(self.state, self.snapshots.failure)
            report = build_report(
                kind,
                run=self.publisher.run,
                state=self.state,
                status=self._status,
                partitions=self.source.partitions,
                baseline=self.baseline,
                snapshot=self.snapshots.parent,
                published=self.publisher.last_published(),
                withheld=self.snapshots.withheld,
                seconds=max(self._around.clock() - self._started, 1e-9),
                events_read=self._events_read,
                profile=profile(
                    self.ingest.timer.nanoseconds(),
                    self.timer.nanoseconds(),
                    events=self._events_read,
                ),
                notes=self._around.notes(),
                alarms=self._alarms.raised,
                freshness=self.freshness.percentiles(whole=kind != "report"),
                deltas=self.deltas.report() if self.deltas else None,
                now_ms=self._now_ms(),
            )
            self.freshness.end_interval()
            self._put(report)
            self._around.show(report)
        return report

    def cut(self) -> None:
        """Copy all state as it is between two batches.

        The snapshot is written when every batch before it is scored.
        """
        # The copy of a snapshot is in the memory that this one needs, and a delta that is refused
        # leaves its rows to that of this snapshot.
        if self.snapshots.in_progress or (self.deltas and self.deltas.busy):
            self._settle(wait=True)
        failpoint("cut.before")
        last_step: tuple[str, ...] = ()
        for name, guard in self.state.guards.items():
            checked = guard.check_last_step()
            if isinstance(checked, Diverged):
                self._restore_model(name, checked.reason)
            elif name == self.state.published:
                last_step = checked
        if self.state.blend:
            last_step = self.state.check_last_step()
        self._examples_at_snapshot = self.state.ledger.count
        self._inputs_at_snapshot = self._status.inputs
        copies = self.served.copies() if self.served else []
        held, held_shards, linked = cut.keep_copies(
            copies,
            self.snapshots.parent_path,
            self.state.published,
            of_snapshots=bool(self.served and self.served.of_snapshots),
        )
        segments = self.snapshots.stage(lambda: {**self.state.joiner.segments(), **linked})
        if segments is None:
            return
        self._cut_copies = copies
        self._cut_delta = None
        if self.deltas:
            self._cut_delta = self.deltas.cut(self._positions(), harmful=bool(last_step))
        self._cut_news = None if self._cut_delta else self.freshness.take()
        self._unscored.add_cut(
            cut.take(
                self.state,
                self.identity,
                self.source,
                self._status,
                run=self.publisher.run,
                sequence=self.snapshots.next_sequence(),
                epoch=self.publisher.epoch,
                last_step=last_step,
                segments=segments,
                copies=held,
                shards=held_shards,
                now_ms=self._now_ms(),
            )
        )
        if self.served and self.served.of_snapshots:
            self._freeze()
        failpoint("cut.after")

    def _write(self, taken: Cut, marker: Marker | None) -> None:
        """Judge the model, complete a cut whose batches are all scored, and begin to write it."""
        if self.predictions:
            self.predictions.seal(taken.manifest.sequence)
        self.state.scoreboard.judge.judge(self._published_evidence, cut.clicks(taken))
        self._alarms.check_models(self.state, self.snapshots.failure)
        complete = cut.complete(
            taken,
            self.state.scoreboard,
            marker,
            copies=self._cut_copies,
            parent=self.snapshots.parent,
            now_ms=self._now_ms(),
        )
        if self.deltas and self._cut_delta:
            position = self.deltas.decide(self._cut_delta, complete.manifest.gate)
            complete = replace(complete, delta=position)
        self.snapshots.begin(complete)

    def _published_evidence(self) -> Measured | None:
        manifest = self.publisher.published_manifest()
        return manifest.gate.evidence if manifest else None

    def begin_from(self, path: Path) -> list[str]:
        """Begin with the weights of the snapshot at `path`; return what was carried over.

        Raises `ConfigError` if nothing carries over.
        """
        manifest, tensors = snapshot.load(
            path,
            stems=begin.stems,
            signature=self.snapshots.policy.signature,
            any_name=True,
            stored=self.state.sharded,
        )
        return begin.begin_from(manifest, tensors, self.identity, self.state, self.baseline)

    def restore(self, path: Path) -> None:
        """Resume from the snapshot at `path`.

        Raises `ConfigError` if it was made with another configuration.
        """
        manifest, tensors = snapshot.load(
            path, signature=self.snapshots.policy.signature, stored=self.state.sharded
        )
        require_learning_state(manifest, path)
        require_run(manifest, self.publisher.run, path)
        require_same_run(manifest, self.identity, self.source, path)
        missing = self.state.restore(path, manifest, tensors)
        if self.baseline:
            self.baseline.load_state_dict(tensors["baseline"])
        if self.served:
            self.served.load_state(manifest.served, tensors)
        if self.predictions:
            self.predictions.begin(manifest.examples)
        published = self.publisher.published()
        self.snapshots.sequence = manifest.sequence
        self.snapshots.parent = path.name
        for name in missing:
            self._restore_model(name, _NOT_FINITE)
        self._examples_at_snapshot = self.state.ledger.count
        self._inputs_at_snapshot = manifest.inputs
        positions = {
            index: manifest.positions[name]
            for index, name in enumerate(self.source.names)
            if name in manifest.positions
        }
        leader_epochs = {
            index: manifest.leader_epochs[name]
            for index, name in enumerate(self.source.names)
            if name in manifest.leader_epochs
        }
        self.ingest.seek(positions, leader_epochs)
        self._status = self.ingest.status()
        self.freshness.resume(len(self.state.batches))
        if published is None or published.epoch <= manifest.epoch:
            # Not rolled back. The run that wrote it may have died before it published it.
            candidate = self._freeze() if self.served and self.served.of_snapshots else None
            done = self.snapshots.commit_and_publish(Written(path, manifest, positions))
            if self.deltas and done and not missing:
                self.deltas.resume(manifest)
            if self.served and candidate:
                self.served.decide(candidate, published=done, evidence=None)
        self.snapshots.begin_run()
        _log.info(
            "resumed from snapshot %s: %d examples, positions %s",
            path.name,
            self.state.ledger.count,
            manifest.positions,
        )


def _milliseconds(clock: Callable[[], float]) -> Callable[[], int]:
    return lambda: int(clock() * 1000)


def _reporter(
    publisher: Publisher, around: Surroundings
) -> Callable[[Report | WindowReport], None]:
    """Return a function that writes a report, and hands on what was written.

    It does not hold the trainer: a cycle would keep the threads of its learners for a while.
    """

    def put(report: Report | WindowReport) -> None:
        written = to_json_object(report)
        publisher.report(written)
        around.written(written)

    return put
