"""The trainer: one loop that owns all state.

It takes what `ingest` has polled, decoded and hashed, joins it, cuts batches, learns, and between two batches serves the flags that the
schedule raised. Of the source it knows what the last thing that it took says: the snapshot's positions are those after it.
Batches are cut from the sequence of examples, exactly `batch_size` each, never at the boundary of a poll; that sequence depends on the
log alone (see `join`), and so does the model.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from stream_ctr.errors import ConfigError, DataError, SnapshotError
from stream_ctr.evaluate import metrics
from stream_ctr.evaluate.gate import Gate, Judge
from stream_ctr.events.batch import EventBatch
from stream_ctr.events.features import mix64
from stream_ctr.failpoint import failpoint
from stream_ctr.join import joining
from stream_ctr.join.joiner import Examples, LabelJoiner, Ledger
from stream_ctr.join.watermark import NOT_YET, Watermarks
from stream_ctr.learn.baseline import DEVIATIONS, BaselineProcess, Marker
from stream_ctr.learn.learner import Learner
from stream_ctr.messages import one_line
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.publisher import Publisher
from stream_ctr.snapshots.signing import SigningKey
from stream_ctr.snapshots.snapshot_writer import Cut, NotFinite, SnapshotWriter, Written
from stream_ctr.train.guard import NOT_FINITE, Guard, GuardBeside, Learned
from stream_ctr.train.ingest import Ingest, Poll, ReadAhead
from stream_ctr.train.stage_timer import ELSE, StageTimer, profile

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.25
_FIELDS_SEEN_IN = 1000  # impressions
_BAD_SHARE_RECORDS = 1000  # fewer say nothing about a share
_HOLD_WHEN_FILLED = 1 / 8
_SILENT_SECONDS = 5.0  # of all brokers, before it is worth a word
State = dict[str, npt.NDArray[Any]]


class Flags(Protocol):
    """What the schedule has raised."""

    def due(self, name: str) -> bool: ...


@dataclass(slots=True)
class _Learned:
    """A batch that the models here have learned and the baseline may still have before it.

    `logits`: model -> [m]; `chosen`: model -> bool [n], which m of the examples it learned, where not all.
    """

    examples: Examples
    logits: dict[str, npt.NDArray[np.floating]]
    chosen: dict[str, npt.NDArray[np.bool_]]
    ends_pretraining: bool


class Trainer:
    """Learns from what `ingest` reads, which it turns into examples, and tells `publisher` and `show` how it goes.

    All `learners` learn the same examples; the first is what is published, the others stand beside it in reports and snapshots.
    `identity` goes into every snapshot: what a server needs to rebuild the models (`schema`, `learner`, `beside`), and what a resumed run
    must agree with.
    """

    def __init__(
        self,
        *,
        ingest: Ingest | ReadAhead,
        publisher: Publisher,
        joiner: LabelJoiner,
        learners: Mapping[str, Learner],
        directory: Path,
        identity: Mapping[str, Any],
        baseline: BaselineProcess | None = None,
        baseline_share: float = 1.0,
        lateness_ms: int = 0,
        stall_clicks: float = 0.0,
        window_ms: int = 600_000,
        rolling_windows: int = 6,
        snapshot_examples: int = 0,
        keep_snapshots: int = 3,
        signing: SigningKey | None = None,
        gate: Gate | None = None,
        skips_before_rollback: int = 8,
        max_bad_share: float = 0.5,
        flags: Flags | None = None,
        show: Callable[[Mapping[str, Any]], None] = lambda report: None,
        notes: Callable[[], Sequence[str]] = tuple,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.ingest, self.source, self.publisher, self.joiner = (
            ingest,
            ingest.source,
            publisher,
            joiner,
        )
        self.learners, self.learner = learners, next(iter(learners.values()))
        self.directory, self.identity = directory, identity
        self.baseline, self._baseline_below = baseline, _share_threshold(baseline_share)
        self.baseline_share = baseline_share
        self.snapshot_examples, self.keep_snapshots, self.max_bad_share = (
            snapshot_examples,
            keep_snapshots,
            max_bad_share,
        )
        self._flags, self._show, self._notes, self._clock, self._wall_clock = (
            flags,
            show,
            notes,
            clock,
            wall_clock,
        )
        models = [*learners, *([baseline.name] if baseline else [])]
        self.watermarks = Watermarks(
            partitions=len(self.source.partitions),
            lateness_ms=lateness_ms,
            stall_clicks=stall_clicks,
        )
        self.judge = Judge(gate or Gate(clicks=0), models, baseline.name if baseline else None)
        self.whole = metrics.WholeRun(models)
        self.windows = metrics.Windows(models, window_ms=window_ms, rolling=rolling_windows)
        self.ledger = Ledger()
        self.counters: Counter[str] = Counter()
        self.epoch, self.sequence = publisher.epoch, 0
        self.parent: str | None = None
        self._signing = signing
        self._writer = SnapshotWriter(
            directory / "snapshots", sign=signing.sign if signing else None, check=publisher.check
        )
        for learner in learners.values():
            learner.weights(
                reuse=True
            )  # memory for the copies in snapshots is poll now, not while learning waits for the first
        self._cutting = False  # a snapshot is between its copy and the disk
        told: dict[str, Any] = {
            "skips_before_rollback": skips_before_rollback,
            "signature": signing.verify if signing else None,
        }
        self._guard = Guard(
            self.learner,
            self.counters,
            good=self._last_good,
            begins_again=self.judge.go_back,
            **told,
        )
        self._beside = {
            name: GuardBeside(
                learner, self.counters, good=partial(self._last_good_of, name), beside=name, **told
            )
            for name, learner in list(learners.items())[1:]
        }
        self._warned: set[str] = set()
        self._lost = 0  # records, as the source tells
        self.first_event_ms: int | None = None
        self.last_event_ms: int | None = None
        self._ready: list[Examples] = []  # joined, waiting to fill a batch
        self._in_flight: deque[_Learned | Cut] = deque()
        self._paused: frozenset[int] = frozenset()
        self._stopping = False
        self._started = self._clock()
        self.timer = StageTimer()
        self._status = ingest.status()  # of the source, after what was poll last
        self._last_bad = ""
        self._unwritten: SnapshotError | None = None
        self._unseen_fields = {name for name, _ in identity["schema"]["fields"]}
        self._fields_seen_in = 0
        self._fields = len(identity["schema"]["fields"])
        self._read_now = self._records_now = self._examples_at_snapshot = 0
        self._bad_now = 0.0

    # -- the loop ---------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Until the source ends or `stop` is called; the last report, of kind `final` or `stopped`.

        At the end of a source that ends, label windows still open are closed with the clicks that came.
        """
        try:
            with self.timer(ELSE):
                return self._run()
        except Exception:
            self.publisher.check()  # what goes wrong after another took over goes wrong because of that
            raise
        finally:
            self._writer.close()

    def _run(self) -> dict[str, Any]:
        self._read()
        finished = not self._stopping
        if finished:
            # A run that began at the very end has not polled: its watermark becomes that of one that came here by reading.
            self._advance(self._watermark())
            if not self._stalled():  # else their clicks are yet to come, in another run
                self._leave(self.joiner.drain)
            finished = (
                not self._stopping
            )  # told to stop meanwhile, it goes on from its snapshot: no batch is cut short
            if finished:
                self._learn_ready(partial=True)
        self._settle(wait=True)
        learned = self.ledger.count - self._examples_at_snapshot
        if (
            self._read_now or learned or self.parent is None
        ):  # else the snapshot that this run began with says it all
            self.cut()
            self._settle(wait=True)
        report = self._report("final" if finished else "stopped")
        self.publisher.flush()
        if self._unwritten:
            raise self._unwritten
        return report

    def _read(self) -> None:
        """Take until the source ends or `stop` is called."""
        self._status = self.ingest.status()
        try:
            while not self._stopping and not self._status.finished:
                with self.timer("wait.reader"):
                    poll = self.ingest.take(_POLL_SECONDS)
                self._take(poll)
        finally:
            self.ingest.close()

    def stop(self) -> None:
        """Finish the batch at hand, take a snapshot and return from `run`. Safe to call from a signal handler."""
        self._stopping = True

    def _take(self, poll: Poll) -> None:
        self._status = poll.status
        if poll.events:
            failpoint("poll.after")
            with self.timer("join"):
                self._join(poll.events)
            failpoint("join.after")
        self._advance(self._watermark())
        self._align()
        self._warn()
        if self._stopping:
            return
        self._settle(wait=False)
        self._serve_flags()

    def _advance(self, watermark: int) -> None:
        self._leave(lambda: self.joiner.advance(watermark))

    def _leave(self, leave: Callable[[], Examples]) -> None:
        """Learn from what leaves the joiner, a part at a time: a jump of the watermark may close very many windows."""
        while not self._stopping and len(examples := self._left(leave)):
            self._ready.append(examples)
            self._learn_ready()

    def _left(self, leave: Callable[[], Examples]) -> Examples:
        with self.timer("join"):
            return leave()

    def _join(self, columns: EventBatch) -> None:
        self.counters["records"] += columns.records
        if columns.with_unknown_fields:
            self.counters["fields_unknown"] += columns.with_unknown_fields
        self._reject(columns)
        self._look_for_fields(columns.with_fields, len(columns.impressions))
        joining.push(columns, self.joiner, self.watermarks)

    def _look_for_fields(self, with_fields: frozenset[str], impressions: int) -> None:
        """Warn of fields that the first impressions of a run never had: a wrong name teaches the model nothing, and says nothing."""
        if self._unseen_fields and self._fields_seen_in < _FIELDS_SEEN_IN:
            self._unseen_fields -= with_fields
            self._fields_seen_in += impressions
            if self._fields_seen_in >= _FIELDS_SEEN_IN and self._unseen_fields:
                _log.warning(
                    "in the first %d impressions these fields were always missing: %s; are they spelled as in the events?",
                    self._fields_seen_in,
                    ", ".join(one_line(name, 60) for name in sorted(self._unseen_fields)),
                )

    def _reject(self, columns: EventBatch) -> None:
        """Keep what is bad, and count it."""
        rejected = columns.rejected
        places = zip(
            rejected.partition.tolist(), rejected.offset.tolist(), rejected.event, strict=True
        )
        for (index, offset, event), value, reason, message in zip(
            places, rejected.value, rejected.reason, rejected.message, strict=True
        ):
            self.counters[f"rejected.{reason}"] += 1
            if reason == "tombstone":  # deletes nothing here, and is no error of its producer
                continue
            topic, partition = self.source.partitions[index]
            self.publisher.dead_letter(
                topic, partition, offset, value, reason, message, event=event
            )
            self._last_bad = f"{reason}: {message}"
        self._read_now += columns.events
        self._records_now += columns.records
        self._bad_now += columns.bad_records
        if (
            self._records_now >= _BAD_SHARE_RECORDS
            and self._bad_now > self.max_bad_share * self._records_now
        ):
            raise DataError(
                f"{self._bad_now:.0f} of {self._records_now} records read are bad, more than input.max_bad_share = {self.max_bad_share}; "
                f"the last: {self._last_bad}. Is this the right topic, and are these its fields?"
            )

    def _watermark(self) -> int:
        return self.watermarks.overall(excused=self._status.idle & ~self.watermarks.silent_clicks())

    def _align(self) -> None:
        """Hold partitions that are far ahead when what waits for the others has filled some of its room.

        Not before: holding one and letting it go costs fetches, which it is not worth where a poll is longer than a window.
        """
        full = self.joiner.filled >= _HOLD_WHEN_FILLED
        ahead = (
            self.watermarks.ahead(self.joiner.watermark, self.joiner.label_window_ms)
            if full
            else frozenset()
        )
        behind = [index for index in range(len(self.source.partitions)) if index not in ahead]
        if self.source.until_end and self._status.caught_up[behind].all():
            ahead = frozenset()  # those that they wait for have ended
        if ahead != self._paused:
            self.ingest.pause(ahead)
            self._paused = ahead

    def _warn(self) -> None:
        """Say once what keeps the run from going on, and once that it is over."""
        if (lost := self._status.lost) > self._lost:
            _log.error(
                "%d records are lost: the topic does not hold them any more", lost - self._lost
            )
            self.counters["records_lost"] += lost - self._lost
            self._lost = lost
        silent = self._status.silent_seconds
        self._alarm(
            "silent",
            silent >= _SILENT_SECONDS,
            f"no broker has answered for {silent:.0f} s; waiting",
            "a broker answers again",
        )
        stalled = self._stalled()
        overdue = f"clicks of {', '.join(stalled)} are overdue: learning waits, and {self.joiner.pending:,} impressions with it"
        hint = "; if none will come: join.stall_clicks = 0"
        self._alarm("stalled", bool(stalled), overdue + hint, "clicks come again: learning goes on")
        if evicted := self.joiner.counts()["impressions_evicted"]:
            self._alarm(
                "evicted",
                True,
                f"{evicted:,} impressions given up so far: join.max_memory has no room for more",
                "",
            )

    def _alarm(self, name: str, raised: bool, text: str, over: str) -> None:
        if raised and name not in self._warned:
            self._warned.add(name)
            _log.warning("%s", text)
        elif not raised and name in self._warned:
            self._warned.remove(name)
            _log.warning("%s", over)

    def _stalled(self) -> list[str]:
        """Partitions whose clicks are overdue."""
        stalled = np.flatnonzero(self.watermarks.stalled | self.watermarks.silent_clicks())
        return [":".join(map(str, self.source.partitions[index])) for index in stalled.tolist()]

    # -- learning ---------------------------------------------------------------------------------

    def _learn_ready(self, *, partial: bool = False) -> None:
        for batch in self._batches(partial=partial):
            with self.timer("learn"):
                self._learn(batch)
            self._settle(wait=False)
            self._serve_flags()
            if self._stopping and not partial:
                break

    def _batches(self, *, partial: bool) -> Iterator[Examples]:
        """Examples in runs of exactly `batch_size`; what is left over stays ready, unless `partial`."""
        size = self.learner.batch_size
        self._ready = [Examples.concat(self._ready)] if self._ready else []
        while self._ready and (len(self._ready[0]) >= size or (partial and len(self._ready[0]))):
            batch, self._ready = self._ready[0][:size], [self._ready[0][size:]]
            yield batch

    def _following(self) -> Examples | None:
        """The batch that comes next, where it is whole."""
        size = self.learner.batch_size
        return self._ready[0][:size] if self._ready and len(self._ready[0]) >= size else None

    def _learn(self, batch: Examples) -> None:
        failpoint("learn.before")
        following = self._following()
        if (learned := self._guard.learn(batch, following)) is None:
            return
        batch = batch if learned.kept is None else batch[learned.kept]
        self.ledger = self.ledger.add(batch.id_hash, batch.label)
        self.first_event_ms = (
            int(batch.time[0]) if self.first_event_ms is None else self.first_event_ms
        )
        self.last_event_ms = int(batch.time[-1])
        predicted, chosen = {self.whole.models[0]: learned.logits}, {}
        for name, guard in self._beside.items():
            with self.timer(f"learn.{name}"):
                beside = guard.learn(batch, following) or Learned(
                    np.empty(0), np.zeros(len(batch), np.bool_)
                )
            predicted[name] = beside.logits
            if beside.kept is not None:
                chosen[name] = beside.kept
        if self.baseline:
            share = batch
            if self._baseline_below:
                chosen[self.baseline.name] = mix64(batch.id_hash) < self._baseline_below
                share = batch[chosen[self.baseline.name]]
            self.baseline.submit(
                share.ids[:, : self._fields], share.values, share.label
            )  # no cross products
        self._in_flight.append(_Learned(batch, predicted, chosen, learned.ends_pretraining))
        failpoint("learn.after")

    def _last_good(self) -> tuple[Path | None, int]:
        """The snapshot that a model which diverged goes back to, and how many examples were trained so far."""
        self._settle(wait=True)
        published = self.publisher.published()
        name = published["snapshot"] if published else self.parent
        return self.directory / "snapshots" / name if name else None, self.ledger.count

    def _last_good_of(self, beside: str) -> tuple[Path | None, int]:
        """The same of a model beside: the newest snapshot of this lineage that has it."""
        self._settle(wait=True)
        name = self.parent
        root = self.directory / "snapshots"
        while name in snapshot.snapshot_ids(root):
            manifest, _ = snapshot.load(
                root / name, files=(), signature=self._signing.verify if self._signing else None
            )
            if snapshot.file_name(snapshot.stems(beside)[0]) in manifest["files"]:
                return root / name, self.ledger.count
            name = manifest.get("parent")
        return None, self.ledger.count

    def _settle(self, *, wait: bool) -> None:
        """Score the batches that every model has predicted, in order; finish the snapshots that they were waiting for."""
        while self._in_flight:
            head = self._in_flight[0]
            answer = self._answer(self.baseline, wait=wait) if self.baseline else None
            if self.baseline and answer is None:
                break
            self._in_flight.popleft()
            if isinstance(head, Cut):
                assert answer is None or isinstance(answer, Marker)
                self._begin_write(head, answer.state if answer else {})
            else:
                assert not isinstance(answer, Marker)
                with self.timer("score"):
                    self._score(head, answer)
        with self.timer("snapshot"):
            self._finish_write(wait=wait)

    def _answer(
        self, baseline: BaselineProcess, *, wait: bool
    ) -> npt.NDArray[np.float64] | Marker | None:
        """What the baseline says next; None: nothing yet. Learning waits for it when it is full."""
        if baseline.full:
            behind = f"{baseline.waiting_bytes >> 20} MiB of examples wait for {baseline.name}"
            remedy = "with baseline.sample_rate = 0.1 it learns, and is compared on, one impression in ten"
            self._alarm(
                "baseline",
                True,
                f"{behind}: from now on learning is no faster than it; {remedy}",
                "",
            )
        with self.timer("wait.baseline"):
            return baseline.take(wait=wait or baseline.full)

    def _score(self, learned: _Learned, baseline: npt.NDArray[np.float64] | None) -> None:
        examples, logits = learned.examples, learned.logits
        if baseline is not None:
            logits[BaselineProcess.name] = metrics.logits(baseline)
        scored = metrics.Scored(
            examples.time, examples.label, examples.true_probability, logits, learned.chosen
        )
        self.whole.add(scored)
        self.judge.add(scored)
        if learned.ends_pretraining:
            self.judge.begin_anew(
                "its pre-training has ended, and there is no verdict yet on the network that took over"
            )
        self.windows.add(scored)
        self._close_windows(int(examples.time[-1]))  # examples come in event-time order

    def _close_windows(self, before_ms: int) -> None:
        with self.timer("report"):
            for window in self.windows.close(before_ms):
                self.publisher.report({"kind": "window", **_readable(window)})

    # -- reports ----------------------------------------------------------------------------------

    def _serve_flags(self) -> None:
        if self._flags and self._flags.due("report"):
            self._report("report")
        learned = self.ledger.count - self._examples_at_snapshot
        counted = self.snapshot_examples and learned >= self.snapshot_examples
        # By the clock, one that is due waits for the one that is being written.
        if counted or (self._flags and not self._cutting and self._flags.due("snapshot")):
            with self.timer("snapshot"):
                self.cut()

    def _report(self, kind: str) -> dict[str, Any]:
        with self.timer("report"):
            report = self._told(kind)
            self.publisher.report(report)
            self._show(report)
        return report

    def _told(self, kind: str) -> dict[str, Any]:
        if not self._in_flight and not any(
            map(len, self._ready)
        ):  # all whose label window is closed is scored, also when nothing follows
            self._close_windows(self.joiner.watermark - self.joiner.label_window_ms)
        seconds = max(self._clock() - self._started, 1e-9)
        whole = self.whole.summary()
        report: dict[str, Any] = {
            "kind": kind,
            "examples": self.ledger.count,
            "events": self.joiner.counts()["impressions"] + self.joiner.counts()["clicks"],
            "seconds": round(seconds, 3),
            "events_per_second": round(self._read_now / seconds, 1),
            "event_time": _iso(self.last_event_ms),
            "watermark": _iso(self.joiner.watermark if self.joiner.watermark > NOT_YET else None),
            "pending": self.joiner.pending,
            "lag": self._status.lag,
            "snapshot": self.parent,
            "stalled": self._stalled(),
            "silent_seconds": round(self._status.silent_seconds, 1),
            "refused": self.judge.refused,
            "left_out": {
                name: guard.left_out for name, guard in self._beside.items() if guard.left_out
            },
            "counters": {
                **self.joiner.counts(),
                **dict(sorted(self.counters.items())),
                "rejected": self._rejected(),
            },
            "clicks_late": self.joiner.counts()["clicks_late"],
            "click_coverage": self.joiner.click_coverage,
            "ledger": {"count": self.ledger.count, "sum": self.ledger.sum},
            "profile": profile(
                self.ingest.timer.nanoseconds(), self.timer.nanoseconds(), events=self._read_now
            ),
            **whole,
        }
        if self.baseline:
            report["baseline"] = {"sample_rate": self.baseline_share, "note": DEVIATIONS}
        if rolling := self.windows.rolling_summary():
            report["rolling"] = _readable(rolling)
        if kind != "report":
            report["stalls"] = self.watermarks.stalls
            report |= {
                name: _tail(self.whole.summary(last=share))
                for name, share in (("last_half", 0.5), ("last_quarter", 0.25))
            }
            report["window_curve"] = self.joiner.window_curve()
            report["notes"] = list(self._notes())
        return report

    def _rejected(self) -> int:
        return sum(
            count
            for name, count in self.counters.items()
            if name.startswith("rejected.") and name != "rejected.tombstone"
        )

    # -- snapshots --------------------------------------------------------------------------------

    def cut(self) -> None:
        """Copy all state as it is between two batches; the snapshot is written when the baseline has answered up to here."""
        if self._cutting:  # its copy is in the memory that this one needs
            self._settle(wait=True)
        failpoint("cut.before")
        worsened = self._guard.worsened()
        for guard in self._beside.values():
            guard.worsened()  # those that predict no numbers any more go back
        self._examples_at_snapshot = self.ledger.count
        try:
            segments = snapshot.stage(self.directory / "snapshots", self.joiner.segments())
        except SnapshotError as error:
            self._not_written(error)
            return
        self._cutting = True
        self.sequence = max(self.sequence + 1, snapshot.next_sequence(self.directory / "snapshots"))
        positions = self._status.positions
        named = self._partition_names()
        ready = Examples.concat(self._ready) if self._ready else None
        tensors: dict[str, State] = {
            **self._model_tensors(),
            "joiner": {
                **self.joiner.state_dict(),
                **{f"watermarks.{n}": array for n, array in self.watermarks.state_dict().items()},
            },
            "examples": {
                name: np.ascontiguousarray(array) for name, array in ready.arrays().items()
            }
            if ready
            else {},
        }
        manifest = {
            **self.identity,
            "sequence": self.sequence,
            "epoch": self.epoch,
            "examples": self.ledger.count,
            "ledger": {"count": self.ledger.count, "sum": self.ledger.sum},
            "positions": {name: positions[index] for index, name in enumerate(named)},
            "topic_ids": self.source.topic_ids(),
            "event_time_ms": self.last_event_ms or 0,
            "event_time_range": [_iso(self.first_event_ms), _iso(self.last_event_ms)],
            "first_event_ms": self.first_event_ms,
            "counters": dict(self.counters),
            "guard": self._guard.told(),
            "guards_beside": {name: guard.told() for name, guard in self._beside.items()},
            "gate": {"last_step": worsened},
        }
        self._in_flight.append(Cut(tensors, manifest, positions, segments))
        if self.baseline:
            self.baseline.mark()
        failpoint("cut.after")

    def _model_tensors(self) -> dict[str, State]:
        tensors: dict[str, State] = {}
        for name, learner in self.learners.items():
            beside = self._beside.get(name)
            if not (beside and beside.left_out):
                model, optimizer = snapshot.stems(name if beside else None)
                tensors[model], tensors[optimizer] = (
                    dict(learner.weights(reuse=True)),
                    dict(learner.optimizer_state()),
                )
        return tensors

    def _begin_write(self, cut: Cut, baseline: Mapping[str, npt.NDArray[Any]]) -> None:
        self.judge.judge(self._published_evidence)
        measured = {
            "whole": self.whole.state_dict(),
            "windows": self.windows.state_dict(),
            "judge": self.judge.state_dict(),
        }
        cut.tensors["metrics"] = {
            f"{part}.{name}": array
            for part, state in measured.items()
            for name, array in state.items()
        }
        if self.baseline:
            cut.tensors["baseline"] = dict(baseline)
        cut.manifest |= {
            "parent": self.parent,
            "created_ms": int(self._wall_clock() * 1000),
            "metrics": self.whole.summary(),
        }
        cut.manifest["gate"] |= self.judge.told()
        self.publisher.deliver_dead_letters()
        self._writer.begin(cut)

    def _published_evidence(self) -> Mapping[str, Any] | None:
        manifest = self.publisher.published_manifest()
        return manifest["gate"]["evidence"] if manifest else None

    def _finish_write(self, *, wait: bool) -> None:
        if not self._writer.busy:
            return
        try:
            written = self._writer.take(wait=wait)
        except NotFinite as error:
            self._cutting = False
            self.counters["snapshots_failed"] += 1
            self._unwritten = error
            self._guard.roll_back(str(error))
            return
        except SnapshotError as error:
            self._cutting = False
            self._not_written(error)
            return
        if written:
            self._cutting = False
            self._unwritten = None
            self.parent = written.path.name
            for name in written.not_finite:  # before what they go back to is too old to be kept
                self._beside[name].roll_back(NOT_FINITE)
            self._tell(written)

    def _not_written(self, error: SnapshotError) -> None:
        """A full disk: learning goes on, the next try may succeed, and only the last one ends the run."""
        _log.error("%s", error)
        self.counters["snapshots_failed"] += 1
        self._unwritten = error

    def _tell(self, written: Written) -> None:
        """What follows when a snapshot is on disk; it may be done twice."""
        failpoint("commit.before")
        self.source.commit(written.positions)
        failpoint("commit.after")
        self._publish(written)
        name = written.path.name  # kept: those after it may not verify
        self._writer.after(lambda: self.publisher.retain(self.keep_snapshots, {name}))

    def _publish(self, written: Written) -> None:
        name = written.path.name
        if not written.manifest["examples"]:  # random weights serve nobody
            return
        if refused := [
            *written.manifest["gate"]["refused"],
            *written.manifest["gate"]["last_step"],
        ]:
            self.counters["publications_refused"] += 1
            _log.error("snapshot %s is not published: %s", name, "; ".join(refused))
            return
        try:
            self.publisher.publish(written.path, written.manifest)
        except (OSError, SnapshotError) as error:
            _log.error("snapshot %s is not published: %s", name, error)
            self.counters["publications_failed"] += 1
            self._unwritten = SnapshotError(
                f"snapshot {name} is written but not published: {error}"
            )

    def restore(self, path: Path) -> None:
        """Go on where the snapshot at `path` was poll. Raises `ConfigError` when it was made with another configuration."""
        manifest, tensors = snapshot.load(
            path, signature=self._signing.verify if self._signing else None
        )
        _require_same_models(manifest, self.identity, path)
        for section in ("schema", "join", "baseline"):
            _require_same(manifest[section], self.identity[section], path)
        names = self._partition_names()
        if odd := sorted(set(names) ^ set(manifest["positions"])):
            self._require_same_partitions(odd, names)
            made, given = (", ".join(sorted(of)) for of in (manifest["positions"], names))
            raise ConfigError(
                f"snapshot {path.name} was made from {made}, the input is {given}; use another --state directory for another input"
            )
        self._require_same_topics(manifest["topic_ids"])
        self._guard.load(tensors, manifest["guard"], path, last_step=manifest["gate"]["last_step"])
        self.watermarks.load_state_dict(_part(tensors["joiner"], "watermarks."))
        if not self.watermarks.stall_clicks:  # told not to wait any more
            self.watermarks.stalled[:] = False
        try:
            self.joiner.load_state_dict(tensors["joiner"], snapshot.segments(path, manifest))
        except ValueError as error:
            raise SnapshotError(f"snapshot {path.name} cannot be gone on from: {error}") from None
        self.whole.load_state_dict(_part(tensors["metrics"], "whole."))
        self.windows.load_state_dict(_part(tensors["metrics"], "windows."))
        self.judge.load_state_dict(_part(tensors["metrics"], "judge."), manifest["gate"])
        if self.baseline:
            self.baseline.load_state_dict(tensors["baseline"])
        self._ready = [Examples(**tensors["examples"])] if tensors["examples"] else []
        self.ledger = Ledger(**manifest["ledger"])
        self.counters.clear()
        self.counters.update(manifest["counters"])
        self.first_event_ms, self.last_event_ms = (
            manifest["first_event_ms"],
            manifest["event_time_ms"] or None,
        )
        published = self.publisher.published()
        self.sequence, self.parent = manifest["sequence"], path.name
        for name, guard in self._beside.items():
            guard.load(tensors, manifest["guards_beside"][name], path, last_step=[])
        self._examples_at_snapshot = self.ledger.count
        positions = {index: manifest["positions"][name] for index, name in enumerate(names)}
        self.source.seek(positions)
        self._status = self.ingest.status()
        if (
            published is None or published["epoch"] <= manifest["epoch"]
        ):  # not rolled back: its writer may have died before it told anyone
            self._tell(Written(path, manifest, positions))
        _log.info(
            "resumed from snapshot %s: %d examples, positions %s",
            path.name,
            self.ledger.count,
            manifest["positions"],
        )

    def _partition_names(self) -> list[str]:
        return [f"{topic}:{partition}" for topic, partition in self.source.partitions]

    def _require_same_partitions(self, odd: Sequence[str], names: Sequence[str]) -> None:
        """Of the same topics: what a partition more means for clicks that went elsewhere before, nobody knows."""
        if {name.rpartition(":")[0] for name in odd} <= {
            topic for topic, _ in self.source.partitions
        }:
            changed = ", ".join(
                f"partition {name} {'was added' if name in names else 'is gone'}" for name in odd
            )
            raise DataError(
                f"{changed} since the snapshot was poll. To begin anew use another --state directory"
            )

    def _require_same_topics(self, known: Mapping[str, str | None]) -> None:
        for topic, found in self.source.topic_ids().items():
            if known.get(topic) and found and known[topic] != found:
                raise DataError(
                    f"topic {topic!r} was deleted and created again (its id was {known[topic]}, now it is {found}): positions in the old "
                    "one mean nothing in it. To begin anew use another --state directory; what was learned stays in this one"
                )


def _share_threshold(share: float) -> np.uint64 | None:
    """Hashes below it are chosen; None chooses all."""
    return None if share >= 1 else np.uint64(int(share * 2.0**64))


def _require_same(saved: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    for name in sorted({*saved, *wanted}):
        if saved.get(name) != wanted.get(name):
            raise ConfigError(
                f"snapshot {path.name} was made with {name} = {saved.get(name)!r:.200}, not {wanted.get(name)!r:.200}; "
                "use another --state directory for another configuration"
            )


def _require_same_models(saved: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Of manifests."""
    made, asked = (
        ", ".join([of["learner"]["model"], *of.get("beside", {})]) for of in (saved, wanted)
    )
    if made != asked:
        raise ConfigError(
            f"snapshot {path.name} was made with the models {made}, not with {asked}; use another --state directory for other models"
        )
    # But for the precision: weights are float32 in either, and a run may have to go on where there is no bfloat16.
    before, now = saved["learner"]["precision"], wanted["learner"]["precision"]
    _require_same({**saved["learner"], "precision": now}, wanted["learner"], path)
    for name, options in wanted["beside"].items():
        _require_same({**saved["beside"][name], "precision": now}, options, path)
    if before != now:
        _log.warning(
            "snapshot %s was made with precision %s; from here on it is %s", path.name, before, now
        )


def _part(state: Mapping[str, npt.NDArray[Any]], prefix: str) -> State:
    return {
        name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)
    }


def _iso(milliseconds: int | None) -> str | None:
    if milliseconds is None:
        return None
    return (
        datetime.fromtimestamp(milliseconds / 1000, UTC)
        .isoformat(timespec="milliseconds")
        .replace("+00:00", "Z")
    )


def _readable(window: Mapping[str, Any]) -> dict[str, Any]:
    return {"start": _iso(window["start_ms"]), "end": _iso(window["end_ms"]), **window}


def _tail(summary: dict[str, Any]) -> dict[str, Any]:
    """The models stand at the top as well, so that `last_half.deepfm.logloss` reads like `models.deepfm.logloss`."""
    return {**summary, **summary["models"]}
