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
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from stream_ctr.errors import DataError, SnapshotError
from stream_ctr.evaluate import metrics, summary
from stream_ctr.evaluate.gate import Measured
from stream_ctr.events.batch import EventBatch
from stream_ctr.failpoint import failpoint
from stream_ctr.join.examples import Examples
from stream_ctr.learn.baseline import Marker
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.manifest import Manifest, RunIdentity
from stream_ctr.snapshots.publisher import Publisher
from stream_ctr.snapshots.snapshot_writer import Cut, Written
from stream_ctr.train.alarms import MissingFields, RunAlarms, stalled_partitions
from stream_ctr.train.bad_records import BadRecords
from stream_ctr.train.guard import Diverged, Guard, Learned
from stream_ctr.train.ingest import Ingest, Poll
from stream_ctr.train.read_ahead import ReadAhead
from stream_ctr.train.report import (
    Kind,
    Report,
    build_report,
    rfc3339,
    to_json_object,
    window_report,
)
from stream_ctr.train.resume import partition_names, require_same_run
from stream_ctr.train.sampled_baseline import SampledBaseline
from stream_ctr.train.snapshot_cycle import SnapshotCycle, SnapshotPolicy
from stream_ctr.train.stage_timer import ELSE, StageTimer, profile
from stream_ctr.train.state import TrainingState

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.25
# Partitions that are ahead are paused once the joiner is this full.
_PAUSE_WHEN_FILLED = 1 / 8
_NOT_FINITE = "its weights are not finite"


class Flags(Protocol):
    """The flags that the schedule raises."""

    def due(self, name: str) -> bool:
        """Return whether `name` is due, and lower its flag."""
        ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a run needs from outside: a schedule, a display, notes for the last report, two clocks."""

    flags: Flags | None = None
    show: Callable[[Report], None] = lambda report: None
    notes: Callable[[], Sequence[str]] = tuple
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time


@dataclass(slots=True)
class LearnedBatch:
    """A batch that waits to be scored.

    `logits` maps each model to its logits from before the update, of the examples that
    `chosen[model]` (bool [n]) marks, or of all.
    """

    time: npt.NDArray[np.int64]
    label: npt.NDArray[np.uint8]
    true_probability: npt.NDArray[np.float64]
    logits: dict[str, npt.NDArray[np.floating]]
    chosen: dict[str, npt.NDArray[np.bool_]]
    ends_pretraining: bool


class Trainer:
    """Learn from what `ingest` reads, and write reports, snapshots and pointers through `publisher`.

    `identity` goes into every snapshot: a server rebuilds the models from it, and a resumed run
    must agree with it.
    """

    def __init__(
        self,
        *,
        ingest: Ingest | ReadAhead,
        state: TrainingState,
        publisher: Publisher,
        identity: RunIdentity,
        snapshots: SnapshotPolicy,
        baseline: SampledBaseline | None = None,
        max_bad_share: float = 0.5,
        surroundings: Surroundings | None = None,
    ) -> None:
        self.ingest = ingest
        self.source = ingest.source
        self.state = state
        self.publisher = publisher
        self.identity = identity
        self.baseline = baseline
        self.timer = StageTimer()
        self.snapshots = SnapshotCycle(
            snapshots, source=self.source, publisher=publisher, counters=state.counters
        )
        self._around = surroundings or Surroundings()
        self._bad_records = BadRecords(
            self.source.partitions, publisher, state.counters, max_bad_share=max_bad_share
        )
        self._alarms = RunAlarms(self.source.partitions, state.counters)
        self._missing = MissingFields([field.name for field in identity.schema.fields])
        self._in_flight: deque[LearnedBatch | Cut] = deque()
        self._status = ingest.status()
        self._paused: frozenset[int] = frozenset()
        self._stopping = False
        self._started = self._around.clock()
        self._events_read = 0
        self._examples_at_snapshot = 0
        for learner in state.learners.values():
            # Memory for the copies in snapshots is allocated now, not while learning waits.
            learner.weights(reuse=True)

    # -- the loop --------------------------------------------------------------------------------

    def run(self) -> Report:
        """Learn until the source ends or `stop` is called; return the last report.

        When a source ends, the label windows that are still open are closed with the clicks that
        came.
        """
        try:
            with self.timer(ELSE):
                return self._run()
        except Exception:
            self.publisher.check()  # after a take-over, that is the cause of any other error
            raise
        finally:
            self.snapshots.close()

    def stop(self) -> None:
        """Make `run` finish its batch, take a snapshot and return. A signal handler may call it."""
        self._stopping = True

    def _run(self) -> Report:
        self._read()
        if not self._stopping:
            self._drain()
        finished = not self._stopping
        if finished:
            self._learn_ready(partial=True)
        self._settle(wait=True)
        learned = self.state.ledger.count - self._examples_at_snapshot
        if self._events_read or learned or self.snapshots.parent is None:
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

    def _drain(self) -> None:
        """Close the windows that are open at the end of the source.

        If clicks are overdue, their impressions are left to the run that reads on.
        """
        # A run that resumed at the very end has not polled: bring its watermark to where a run
        # that read up to here has it.
        self._release(lambda: self.state.joiner.advance(self._watermark()))
        if not self._stalled():
            self._release(self.state.joiner.drain)

    def _handle(self, poll: Poll) -> None:
        self._status = poll.status
        if poll.events:
            failpoint("poll.after")
            with self.timer("join"):
                self._join(poll.events)
            failpoint("join.after")
        watermark = self._watermark()
        self._release(lambda: self.state.joiner.advance(watermark))
        self._align_partitions()
        self._alarms.check(self._status, self.state.joiner, self._stalled())
        if self._stopping:
            return
        self._settle(wait=False)
        self._serve_flags()

    # -- joining ---------------------------------------------------------------------------------

    def _join(self, events: EventBatch) -> None:
        self.state.counters["records"] += events.records
        if events.with_unknown_fields:
            self.state.counters["fields_unknown"] += events.with_unknown_fields
        self._events_read += events.events
        self._bad_records.keep(events)
        self._missing.observe(events)
        self.state.joiner.push(events, self.state.watermarks)

    def _watermark(self) -> int:
        watermarks = self.state.watermarks
        return watermarks.overall(excused=self._status.idle & ~watermarks.silent_clicks())

    def _stalled(self) -> list[str]:
        return stalled_partitions(self.state.watermarks, self.source.partitions)

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
            self._learn_ready()

    def _align_partitions(self) -> None:
        """Pause partitions that are far ahead, once waiting impressions have filled some room.

        Not before: pausing and resuming cost fetches, which is not worth it where one poll is
        longer than a window.
        """
        joiner = self.state.joiner
        ahead: frozenset[int] = frozenset()
        if joiner.filled >= _PAUSE_WHEN_FILLED:
            ahead = self.state.watermarks.ahead(joiner.watermark, joiner.label_window_ms)
        behind = [index for index in range(len(self.source.partitions)) if index not in ahead]
        if self.source.until_end and self._status.caught_up[behind].all():
            ahead = frozenset()  # the partitions that they wait for have ended
        if ahead != self._paused:
            self.ingest.pause(ahead)
            self._paused = ahead

    # -- learning --------------------------------------------------------------------------------

    def _learn_ready(self, *, partial: bool = False) -> None:
        while batch := self.state.batches.next(partial=partial):
            with self.timer("learn"):
                self._learn(batch)
            self._settle(wait=False)
            self._serve_flags()
            if self._stopping and not partial:
                break

    def _learn(self, batch: Examples) -> None:
        failpoint("learn.before")
        following = self.state.batches.peek()
        outcome = self.state.guard.learn(batch, following)
        if isinstance(outcome, Diverged):
            self._restore(outcome.reason)
        if not isinstance(outcome, Learned):
            return
        if outcome.kept is not None:
            batch = batch[outcome.kept]
        self.state.count_examples(batch)
        learned = LearnedBatch(
            batch.time,
            batch.label,
            batch.true_probability,
            {self.state.published: outcome.logits},
            {},
            outcome.ends_pretraining,
        )
        for name in self.state.additional:
            with self.timer(f"learn.{name}"):
                self._learn_additional(name, batch, following, learned)
        if self.baseline:
            chosen = self.baseline.submit(batch)
            if chosen is not None:
                learned.chosen[self.baseline.name] = chosen
        self._in_flight.append(learned)
        failpoint("learn.after")

    def _learn_additional(
        self, name: str, batch: Examples, following: Examples | None, learned: LearnedBatch
    ) -> None:
        outcome = self.state.additional[name].learn(batch, following)
        if isinstance(outcome, Diverged):
            self._restore_additional(name, outcome.reason)
        if isinstance(outcome, Learned):
            learned.logits[name] = outcome.logits
            if outcome.kept is not None:
                learned.chosen[name] = outcome.kept
        else:
            learned.logits[name] = np.empty(0)
            learned.chosen[name] = np.zeros(len(batch), np.bool_)

    def _restore(self, reason: str) -> None:
        """Give the published model the state of the published snapshot."""
        self._settle(wait=True)
        verdict = self.state.guard.restore(
            self.snapshots.last_good(),
            reason,
            trained=self.state.ledger.count,
            signature=self.snapshots.policy.signature,
        )
        if verdict is not None:
            self.state.scoreboard.judge.go_back(verdict)

    def _restore_additional(self, name: str, reason: str) -> None:
        """Give an additional model the state of an earlier snapshot, or leave it out of the run."""
        guard = self.state.additional[name]
        try:
            self._settle(wait=True)
            guard.restore(
                self.snapshots.last_good_with(name),
                reason,
                trained=self.state.ledger.count,
                signature=self.snapshots.policy.signature,
            )
        except (DataError, SnapshotError) as error:
            guard.leave_out(error)

    # -- scoring ---------------------------------------------------------------------------------

    def _settle(self, *, wait: bool) -> None:
        """Score the batches that every model has predicted, and finish the snapshots behind them."""
        self._score_answered(wait=wait)
        with self.timer("snapshot"):
            finished = self.snapshots.take(wait=wait)
            if isinstance(finished, Diverged):
                self._restore(finished.reason)
            elif finished:
                for name in finished.not_finite:  # before the snapshot to go back to is removed
                    self._restore_additional(name, _NOT_FINITE)
                self.snapshots.commit_and_publish(finished)

    def _score_answered(self, *, wait: bool) -> None:
        while self._in_flight:
            answer = self._answer(self.baseline, wait=wait) if self.baseline else None
            if self.baseline and answer is None:
                return
            head = self._in_flight.popleft()
            if isinstance(head, Cut):
                assert answer is None or isinstance(answer, Marker)
                self._write(head, answer)
            else:
                assert not isinstance(answer, Marker)
                with self.timer("score"):
                    self._score(head, answer)

    def _answer(
        self, baseline: SampledBaseline, *, wait: bool
    ) -> npt.NDArray[np.float64] | Marker | None:
        if baseline.process.full:
            self._alarms.baseline_full(baseline)
        with self.timer("wait.baseline"):
            return baseline.take(wait=wait)

    def _score(self, learned: LearnedBatch, probability: npt.NDArray[np.float64] | None) -> None:
        if self.baseline and probability is not None:
            learned.logits[self.baseline.name] = metrics.logits(probability)
        board = self.state.scoreboard
        board.add(
            metrics.Scored(
                learned.time,
                learned.label,
                learned.true_probability,
                learned.logits,
                learned.chosen,
            )
        )
        if learned.ends_pretraining:
            board.judge.begin_anew(
                "its pre-training has ended, and there is no verdict yet on the network that took over"
            )
        self._close_windows(int(learned.time[-1]))  # examples come in event-time order

    def _close_windows(self, before_ms: int) -> None:
        with self.timer("report"):
            for window in self.state.scoreboard.windows.close(before_ms):
                self.publisher.report(to_json_object(window_report(window)))

    # -- reports and snapshots -------------------------------------------------------------------

    def _serve_flags(self) -> None:
        flags = self._around.flags
        if flags and flags.due("report"):
            self._report("report")
        every = self.snapshots.policy.every_examples
        counted = every and self.state.ledger.count - self._examples_at_snapshot >= every
        # A snapshot that is due by the clock waits for the one that is being written.
        if counted or (flags and not self.snapshots.in_progress and flags.due("snapshot")):
            with self.timer("snapshot"):
                self.cut()

    def _report(self, kind: Kind) -> Report:
        with self.timer("report"):
            joiner = self.state.joiner
            if not self._in_flight and not len(self.state.batches):
                # Everything whose label window is closed is scored, even if nothing follows.
                self._close_windows(joiner.watermark - joiner.label_window_ms)
            report = build_report(
                kind,
                state=self.state,
                status=self._status,
                partitions=self.source.partitions,
                baseline=self.baseline,
                snapshot=self.snapshots.parent,
                seconds=max(self._around.clock() - self._started, 1e-9),
                events_read=self._events_read,
                profile=profile(
                    self.ingest.timer.nanoseconds(),
                    self.timer.nanoseconds(),
                    events=self._events_read,
                ),
                notes=self._around.notes(),
            )
            self.publisher.report(to_json_object(report))
            self._around.show(report)
        return report

    def cut(self) -> None:
        """Copy all state as it is between two batches.

        The snapshot is written when every batch before it is scored.
        """
        if self.snapshots.in_progress:  # its copy is in the memory that this one needs
            self._settle(wait=True)
        failpoint("cut.before")
        last_step = self._check_last_steps()
        self._examples_at_snapshot = self.state.ledger.count
        segments = self.snapshots.stage(self.state.joiner.segments)
        if segments is None:
            return
        sequence = self.snapshots.next_sequence()
        self._in_flight.append(
            Cut(
                self.state.tensors(),
                self._manifest(sequence, last_step),
                self._status.positions,
                segments,
            )
        )
        if self.baseline:
            self.baseline.process.mark()
        failpoint("cut.after")

    def _check_last_steps(self) -> tuple[str, ...]:
        """Return what the published model's last step did wrong; restore models that diverged."""
        last_step = self.state.guard.check_last_step()
        if isinstance(last_step, Diverged):
            self._restore(last_step.reason)
            last_step = ()
        for name, guard in self.state.additional.items():
            if isinstance(checked := guard.check_last_step(), Diverged):
                self._restore_additional(name, checked.reason)
        return last_step

    def _manifest(self, sequence: int, last_step: tuple[str, ...]) -> Manifest:
        """Describe a cut. Verdict, metrics and digests are filled in when it is written."""
        state = self.state
        positions = self._status.positions
        return Manifest(
            **msgspec.structs.asdict(self.identity),
            **state.describe(),
            snapshot=snapshot.new_id(sequence, state.last_event_ms or 0),
            sequence=sequence,
            epoch=self.publisher.epoch,
            parent=None,
            created_ms=0,
            positions={
                name: positions[index] for index, name in enumerate(partition_names(self.source))
            },
            topic_ids=self.source.topic_ids(),
            event_time_range=(rfc3339(state.first_event_ms), rfc3339(state.last_event_ms)),
            gate=state.scoreboard.judge.verdict(last_step=last_step),
            metrics=summary.EMPTY,
            weights_sha256="",
        )

    def _write(self, cut: Cut, marker: Marker | None) -> None:
        """Complete a cut, all of whose batches are scored, and begin to write it."""
        board = self.state.scoreboard
        board.judge.judge(self._published_evidence)
        cut.tensors["metrics"] = board.state_dict()
        if marker:
            cut.tensors["baseline"] = dict(marker.state)
        manifest = msgspec.structs.replace(
            cut.manifest,
            parent=self.snapshots.parent,
            created_ms=int(self._around.wall_clock() * 1000),
            metrics=board.whole.summary(),
            gate=board.judge.verdict(last_step=cut.manifest.gate.last_step),
        )
        self.snapshots.begin(Cut(cut.tensors, manifest, cut.positions, cut.segments))

    def _published_evidence(self) -> Measured | None:
        manifest = self.publisher.published_manifest()
        return manifest.gate.evidence if manifest else None

    def restore(self, path: Path) -> None:
        """Resume from the snapshot at `path`.

        Raises `ConfigError` if it was made with another configuration.
        """
        signature = self.snapshots.policy.signature
        manifest, tensors = snapshot.load(path, signature=signature)
        require_same_run(manifest, self.identity, self.source, path)
        self.state.restore(path, manifest, tensors)
        if self.baseline:
            self.baseline.load_state_dict(tensors["baseline"])
        published = self.publisher.published()
        self.snapshots.sequence = manifest.sequence
        self.snapshots.parent = path.name
        for name, guard in self.state.additional.items():
            self._resume_additional(name, guard, manifest, tensors, path)
        self._examples_at_snapshot = self.state.ledger.count
        positions = {
            index: manifest.positions[name]
            for index, name in enumerate(partition_names(self.source))
        }
        self.source.seek(positions)
        self._status = self.ingest.status()
        if published is None or published.epoch <= manifest.epoch:
            # Not rolled back. The run that wrote it may have died before it published it.
            self.snapshots.commit_and_publish(Written(path, manifest, positions))
        _log.info(
            "resumed from snapshot %s: %d examples, positions %s",
            path.name,
            self.state.ledger.count,
            manifest.positions,
        )

    def _resume_additional(
        self,
        name: str,
        guard: Guard,
        manifest: Manifest,
        tensors: snapshot.Tensors,
        path: Path,
    ) -> None:
        """Resume an additional model; one that the snapshot lacks goes back to an earlier one."""
        guard.load_state(manifest.guards_beside[name])
        if guard.left_out:
            return
        if snapshot.stems(name)[0] in tensors:
            guard.load_model(tensors, path)
        else:
            self._restore_additional(name, _NOT_FINITE)
