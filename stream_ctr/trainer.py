"""The trainer: one loop that owns all state.

It polls, decodes, hashes, joins, cuts batches, learns, and between two batches serves the flags that the schedule raised.
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
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch import Tensor

from stream_ctr import metrics, snapshot
from stream_ctr.baseline import DEVIATIONS, BaselineProcess, Marker
from stream_ctr.errors import ConfigError, DataError, SnapshotError
from stream_ctr.events import Decoder, Rejects
from stream_ctr.failpoint import failpoint
from stream_ctr.features import Hasher, hash_ids, mix64
from stream_ctr.join import Arrivals, Examples, LabelJoiner, Ledger
from stream_ctr.learner import Learner
from stream_ctr.outlet import Outlet
from stream_ctr.watermark import NOT_YET, Watermarks

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.25
_FIELDS_SEEN_IN = 1000  # impressions
_BAD_SHARE_RECORDS = 1000  # fewer say nothing about a share
State = dict[str, npt.NDArray[Any]]


class RecordColumns(Protocol):
    @property
    def partition(self) -> npt.NDArray[np.int32]: ...
    @property
    def offset(self) -> npt.NDArray[np.int64]: ...
    @property
    def time(self) -> npt.NDArray[np.int64]: ...
    @property
    def value(self) -> pa.LargeBinaryArray: ...
    def __len__(self) -> int: ...


class Source(Protocol):
    """Records of all partitions from where it was told to begin."""

    @property
    def partitions(self) -> Sequence[tuple[str, int]]: ...
    @property
    def finished(self) -> bool: ...
    @property
    def until_end(self) -> bool: ...
    def poll(self, timeout_seconds: float) -> RecordColumns: ...
    def positions(self) -> dict[int, int]: ...
    def seek(self, positions: Mapping[int, int]) -> None: ...
    def pause(self, partitions: frozenset[int]) -> None: ...
    def caught_up(self) -> npt.NDArray[np.bool_]: ...
    def commit(self, positions: Mapping[int, int]) -> None: ...


class Flags(Protocol):
    """What the schedule has raised."""

    def due(self, name: str) -> bool: ...


@dataclass(slots=True)
class _Learned:
    """A batch that the deep model has learned and the baseline may still have before it."""

    examples: Examples
    logits: Tensor
    chosen: npt.NDArray[np.bool_]


@dataclass(slots=True)
class _Cut:
    """Everything as it was between two batches; it becomes a snapshot when the baseline, too, has got there."""

    tensors: dict[str, State]
    manifest: dict[str, Any]
    positions: dict[int, int]


class Trainer:
    """Learns from `source`, whose records it turns into examples, and tells `outlet` and `show` how it goes.

    `identity` goes into every snapshot: what a server needs to rebuild the model (`schema`, `learner`), and what a resumed run must
    agree with.
    """

    def __init__(
        self,
        *,
        source: Source,
        outlet: Outlet,
        decoder: Decoder,
        hasher: Hasher,
        joiner: LabelJoiner,
        learner: Learner,
        directory: Path,
        identity: Mapping[str, Any],
        baseline: BaselineProcess | None = None,
        baseline_share: float = 1.0,
        lateness_ms: int = 0,
        idle_seconds: float = 30.0,
        window_ms: int = 600_000,
        rolling_windows: int = 6,
        snapshot_examples: int = 0,
        keep_snapshots: int = 3,
        max_bad_share: float = 0.5,
        flags: Flags | None = None,
        show: Callable[[Mapping[str, Any]], None] = lambda report: None,
        notes: Callable[[], Sequence[str]] = tuple,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.source, self.outlet, self.decoder, self.hasher, self.joiner, self.learner = source, outlet, decoder, hasher, joiner, learner
        self.directory, self.identity = directory, identity
        self.baseline, self._baseline_below = baseline, _share_threshold(baseline_share)
        self.baseline_share = baseline_share
        self.snapshot_examples, self.keep_snapshots, self.max_bad_share = snapshot_examples, keep_snapshots, max_bad_share
        self.idle_seconds = idle_seconds
        self._flags, self._show, self._notes, self._clock = flags, show, notes, clock
        models = [identity["learner"]["model"], *([baseline.name] if baseline else [])]
        self.watermarks = Watermarks(partitions=len(source.partitions), lateness_ms=lateness_ms)
        self.whole = metrics.WholeRun(models)
        self.windows = metrics.Windows(models, window_ms=window_ms, rolling=rolling_windows)
        self.ledger = Ledger()
        self.counters: Counter[str] = Counter()
        self.epoch, self.sequence = 1, 0
        self.parent: str | None = None
        self.first_event_ms: int | None = None
        self.last_event_ms: int | None = None
        self._ready: list[Examples] = []  # joined, waiting to fill a batch
        self._in_flight: deque[_Learned | _Cut] = deque()
        self._paused: frozenset[int] = frozenset()
        self._stopping = False
        self._started = self._clock()
        self._heard = np.full(len(source.partitions), self._started)
        self._unwritten: SnapshotError | None = None
        self._unseen_fields = {field.name for field in decoder.fields}
        self._fields_seen_in = 0
        self._read_now = self._bad_now = self._examples_at_snapshot = 0

    # -- the loop ---------------------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Until the source ends or `stop` is called; the last report, of kind `final` or `stopped`.

        At the end of a source that ends, label windows still open are closed with the clicks that came.
        """
        while not self._stopping and not self.source.finished:
            self._take(self.source.poll(_POLL_SECONDS))
        finished = not self._stopping
        if finished:
            # A run that began at the very end has not polled: its watermark becomes that of one that came here by reading.
            self._ready += [self.joiner.advance(self.watermarks.overall(excused=self.source.caught_up())), self.joiner.drain()]
            self._learn_ready(partial=True)
        self._settle(wait=True)
        learned = self.ledger.count - self._examples_at_snapshot
        if self._read_now or learned or self.parent is None:  # else the snapshot that this run began with says it all
            self.cut()
            self._settle(wait=True)
        report = self._report("final" if finished else "stopped")
        self.outlet.flush()
        if self._unwritten:
            raise self._unwritten
        return report

    def stop(self) -> None:
        """Finish the batch at hand, take a snapshot and return from `run`. Safe to call from a signal handler."""
        self._stopping = True

    def _take(self, records: RecordColumns) -> None:
        if len(records):
            failpoint("poll.after")
            self._join(records)
            failpoint("join.after")
        self._ready.append(self.joiner.advance(self._watermark(records)))
        self._align()
        self._learn_ready()
        if self._stopping:
            return
        self._settle(wait=False)
        self._serve_flags()

    def _join(self, records: RecordColumns) -> None:
        events, rejects = self.decoder.decode(records.value, records.time)
        self.counters["records"] += len(records)
        self._reject(records, rejects)
        impressions, clicks = events.impressions, events.clicks
        rows = np.concatenate([impressions.row, clicks.row])
        arrival = np.argsort(rows, kind="stable")
        limit = np.empty(len(rows), np.int64)
        times = np.concatenate([impressions.time, clicks.time])
        limit[arrival] = self.watermarks.observe(records.partition[rows[arrival]], times[arrival])
        # A partition that was excused and comes back may be behind what has been closed meanwhile.
        limit = np.maximum(limit, self.joiner.watermark)
        n = len(impressions)
        self._look_for_fields(impressions.features, n)
        ids, values = self.hasher.rows(impressions.features)
        arrivals = _arrivals(hash_ids(impressions.impression_id), impressions.time, records, impressions.row, limit[:n])
        self.joiner.push_impressions(arrivals, ids, values, impressions.true_probability)
        self.joiner.push_clicks(_arrivals(hash_ids(clicks.impression_id), clicks.time, records, clicks.row, limit[n:]))

    def _look_for_fields(self, features: Mapping[str, pa.Array], impressions: int) -> None:
        """Warn of fields that the first impressions of a run never had: a wrong name teaches the model nothing, and says nothing."""
        if self._unseen_fields and self._fields_seen_in < _FIELDS_SEEN_IN:
            self._unseen_fields -= {name for name, column in features.items() if column.null_count < len(column)}
            self._fields_seen_in += impressions
            if self._fields_seen_in >= _FIELDS_SEEN_IN and self._unseen_fields:
                _log.warning(
                    "in the first %d impressions these fields were always missing: %s; are they spelled as in the events?",
                    self._fields_seen_in,
                    ", ".join(sorted(self._unseen_fields)),
                )

    def _reject(self, records: RecordColumns, rejects: Rejects) -> None:
        for row, reason, message in zip(rejects.row.tolist(), rejects.reason, rejects.message, strict=True):
            self.counters[f"rejected.{reason}"] += 1
            if reason == "tombstone":  # deletes nothing here, and is no error of its producer
                continue
            topic, partition = self.source.partitions[int(records.partition[row])]
            self.outlet.dead_letter(topic, partition, int(records.offset[row]), records.value[row].as_py(), reason, message)
            self._bad_now += 1
        self._read_now += len(records)
        if self._read_now >= _BAD_SHARE_RECORDS and self._bad_now > self.max_bad_share * self._read_now:
            raise DataError(
                f"{self._bad_now} of {self._read_now} records read are bad, more than input.max_bad_share = {self.max_bad_share}; "
                f"the last: {rejects.reason[-1]}: {rejects.message[-1]}. Is this the right topic, and are these its fields?"
            )

    def _watermark(self, records: RecordColumns) -> int:
        now = self._clock()
        self._heard[np.unique(records.partition)] = now
        excused = self.source.caught_up()
        if not self.source.until_end:
            excused = excused & (now - self._heard >= self.idle_seconds)
        return self.watermarks.overall(excused=excused)

    def _align(self) -> None:
        """Hold partitions that are far ahead, so that what waits for the others stays small."""
        ahead = self.watermarks.ahead(self.joiner.watermark, self.joiner.label_window_ms)
        if ahead != self._paused:
            self.source.pause(ahead)
            self._paused = ahead

    # -- learning ---------------------------------------------------------------------------------------------------------------------

    def _learn_ready(self, *, partial: bool = False) -> None:
        for batch in self._batches(partial=partial):
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

    def _learn(self, batch: Examples) -> None:
        failpoint("learn.before")
        logits = self.learner.learn(batch.ids, batch.label, batch.values)
        self.ledger = self.ledger.add(batch.id_hash, batch.label)
        self.first_event_ms = int(batch.time[0]) if self.first_event_ms is None else self.first_event_ms
        self.last_event_ms = int(batch.time[-1])
        chosen = mix64(batch.id_hash) < self._baseline_below if self._baseline_below else np.ones(len(batch), np.bool_)
        if self.baseline:
            self.baseline.submit(batch.ids[chosen], batch.values[chosen], batch.label[chosen])
        self._in_flight.append(_Learned(batch, logits, chosen))
        failpoint("learn.after")

    def _settle(self, *, wait: bool) -> None:
        """Score the batches that every model has predicted, in order; finish the snapshots that they were waiting for."""
        while self._in_flight:
            head = self._in_flight[0]
            answer = self.baseline.take(wait=wait or self.baseline.full) if self.baseline else None
            if self.baseline and answer is None:
                return
            self._in_flight.popleft()
            if isinstance(head, _Cut):
                assert answer is None or isinstance(answer, Marker)
                self._write(head, answer.state if answer else {})
            else:
                assert not isinstance(answer, Marker)
                self._score(head, answer)

    def _score(self, learned: _Learned, baseline: npt.NDArray[np.float64] | None) -> None:
        deep, *others = self.whole.models
        examples = learned.examples
        logits = {deep: learned.logits.double().cpu().numpy()}
        chosen = {deep: np.ones(len(examples), np.bool_)}
        if baseline is not None:
            logits[others[0]], chosen[others[0]] = metrics.logits(baseline), learned.chosen
        if not np.isfinite(logits[deep]).all():
            raise DataError(
                f"the model diverged before event time {_iso(int(examples.time[0]))}: it predicts values that are not finite; the last "
                f"good snapshot is {self.parent}. Lower the learning rates, or use log_value rather than value for large numbers"
            )
        scored = metrics.Scored(examples.time, examples.label, examples.true_probability, logits, chosen)
        self.whole.add(scored)
        self.windows.add(scored)
        self._close_windows(int(examples.time[-1]))  # examples come in event-time order

    def _close_windows(self, before_ms: int) -> None:
        for window in self.windows.close(before_ms):
            self.outlet.report({"kind": "window", **_readable(window)})

    # -- reports ----------------------------------------------------------------------------------------------------------------------

    def _serve_flags(self) -> None:
        if self._flags and self._flags.due("report"):
            self._report("report")
        learned = self.ledger.count - self._examples_at_snapshot
        if (self._flags and self._flags.due("snapshot")) or (self.snapshot_examples and learned >= self.snapshot_examples):
            self.cut()

    def _report(self, kind: str) -> dict[str, Any]:
        if not self._in_flight and not any(map(len, self._ready)):  # all whose label window is closed is scored, also when nothing follows
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
            "snapshot": self.parent,
            "counters": {**self.joiner.counts(), **dict(sorted(self.counters.items())), "rejected": self._rejected()},
            "clicks_late": self.joiner.counts()["clicks_late"],
            "click_coverage": self.joiner.click_coverage,
            "ledger": {"count": self.ledger.count, "sum": self.ledger.sum},
            **whole,
        }
        if self.baseline:
            report["baseline"] = {"sample_rate": self.baseline_share, "note": DEVIATIONS}
        if rolling := self.windows.rolling_summary():
            report["rolling"] = _readable(rolling)
        if kind != "report":
            report |= {name: _tail(self.whole.summary(last=share)) for name, share in (("last_half", 0.5), ("last_quarter", 0.25))}
            report["window_curve"] = self.joiner.window_curve()
            report["notes"] = list(self._notes())
        self.outlet.report(report)
        self._show(report)
        return report

    def _rejected(self) -> int:
        return sum(count for name, count in self.counters.items() if name.startswith("rejected.") and name != "rejected.tombstone")

    # -- snapshots --------------------------------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Copy all state as it is between two batches; the snapshot is written when the baseline has answered up to here."""
        failpoint("cut.before")
        self._examples_at_snapshot = self.ledger.count
        self.sequence += 1
        positions = self.source.positions()
        named = [f"{topic}:{partition}" for topic, partition in self.source.partitions]
        joiner = {**self.joiner.state_dict(), "partition_latest": self.watermarks.latest.copy()}
        ready = Examples.concat(self._ready) if self._ready else None
        tensors: dict[str, State] = {
            "model": dict(self.learner.weights()),
            "optimizer": dict(self.learner.optimizer_state()),
            "joiner": joiner,
            "examples": {name: np.ascontiguousarray(array) for name, array in ready.arrays().items()} if ready else {},
        }
        if not all(np.isfinite(array).all() for array in tensors["model"].values()):
            raise DataError(
                f"the model's weights are not finite at event time {_iso(self.last_event_ms)}; the last good snapshot is {self.parent}"
            )
        manifest = {
            **self.identity,
            "sequence": self.sequence,
            "epoch": self.epoch,
            "examples": self.ledger.count,
            "ledger": {"count": self.ledger.count, "sum": self.ledger.sum},
            "positions": {name: positions[index] for index, name in enumerate(named)},
            "event_time_ms": self.last_event_ms or 0,
            "event_time_range": [_iso(self.first_event_ms), _iso(self.last_event_ms)],
            "first_event_ms": self.first_event_ms,
            "counters": dict(self.counters),
            "weights_sha256": snapshot.weights_sha256(tensors["model"]),
        }
        self._in_flight.append(_Cut(tensors, manifest, positions))
        if self.baseline:
            self.baseline.mark()
        failpoint("cut.after")

    def _write(self, cut: _Cut, baseline: Mapping[str, npt.NDArray[Any]]) -> None:
        cut.tensors["metrics"] = {f"whole.{name}": array for name, array in self.whole.state_dict().items()}
        cut.tensors["metrics"] |= {f"windows.{name}": array for name, array in self.windows.state_dict().items()}
        if self.baseline:
            cut.tensors["baseline"] = dict(baseline)
        manifest = {**cut.manifest, "parent": self.parent, "created_ms": int(self._clock() * 1000), "metrics": self.whole.summary()}
        root = self.directory / "snapshots"
        name = snapshot.new_id(manifest["sequence"], manifest["event_time_ms"])
        self.outlet.deliver_dead_letters()
        try:
            path = snapshot.write(root, tensors=cut.tensors, manifest=manifest, snapshot_id=name)
        except SnapshotError as error:  # a full disk: learning goes on, the next try may succeed, and only the last one ends the run
            _log.error("%s", error)
            self.counters["snapshots_failed"] += 1
            self._unwritten = error
            return
        self._unwritten = None
        self.parent = name
        self._tell(path, manifest, cut.positions)

    def _tell(self, path: Path, manifest: Mapping[str, Any], positions: Mapping[int, int]) -> None:
        """What follows when the snapshot at `path` is on disk; it may be done twice."""
        failpoint("commit.before")
        self.source.commit(positions)
        failpoint("commit.after")
        self._publish(path, manifest)
        failpoint("retain.before")
        snapshot.retain(path.parent, self.keep_snapshots, protect={path.name})  # those after it may not verify
        failpoint("retain.after")

    def _publish(self, path: Path, manifest: Mapping[str, Any]) -> None:
        if not manifest["examples"]:  # random weights serve nobody
            return
        try:
            self.outlet.publish(path, manifest)
        except (OSError, SnapshotError) as error:
            _log.error("snapshot %s is not published: %s", path.name, error)
            self.counters["publications_failed"] += 1
            self._unwritten = SnapshotError(f"snapshot {path.name} is written but not published: {error}")

    def restore(self, path: Path) -> None:
        """Go on where the snapshot at `path` was taken. Raises `ConfigError` when it was made with another configuration."""
        manifest, tensors = snapshot.load(path)
        for section in ("schema", "learner", "join", "baseline"):
            _require_same(manifest[section], self.identity[section], path)
        names = [f"{topic}:{partition}" for topic, partition in self.source.partitions]
        if set(names) != set(manifest["positions"]):
            raise ConfigError(f"snapshot {path.name} was made from {sorted(manifest['positions'])}, the input has {sorted(names)}")
        self.learner.load_weights(tensors["model"])
        self.learner.load_optimizer_state(tensors["optimizer"])
        self.watermarks.latest[:] = tensors["joiner"].pop("partition_latest")
        self.joiner.load_state_dict(tensors["joiner"])
        self.whole.load_state_dict(_part(tensors["metrics"], "whole."))
        self.windows.load_state_dict(_part(tensors["metrics"], "windows."))
        if self.baseline:
            self.baseline.load_state_dict(tensors["baseline"])
        self._ready = [Examples(**tensors["examples"])] if tensors["examples"] else []
        self.ledger = Ledger(**manifest["ledger"])
        self.counters = Counter(manifest["counters"])
        self.first_event_ms, self.last_event_ms = manifest["first_event_ms"], manifest["event_time_ms"] or None
        published = self.outlet.published()  # by a rollback, it may be of a later epoch than any snapshot
        self.epoch = max(manifest["epoch"], published["epoch"] if published else 0) + 1
        self.sequence, self.parent = manifest["sequence"], path.name
        self._examples_at_snapshot = self.ledger.count
        positions = {index: manifest["positions"][name] for index, name in enumerate(names)}
        self.source.seek(positions)
        if published is None or published["epoch"] <= manifest["epoch"]:  # not rolled back: its writer may have died before it told anyone
            self._tell(path, manifest, positions)
        _log.info("resumed from snapshot %s: %d examples, positions %s", path.name, self.ledger.count, manifest["positions"])


def _arrivals(
    id_hash: npt.NDArray[np.uint64],
    times: npt.NDArray[np.int64],
    records: RecordColumns,
    rows: npt.NDArray[np.int64],
    limit: npt.NDArray[np.int64],
) -> Arrivals:
    return Arrivals(id_hash, times, records.partition[rows], records.offset[rows], limit)


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


def _part(state: Mapping[str, npt.NDArray[Any]], prefix: str) -> State:
    return {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}


def _iso(milliseconds: int | None) -> str | None:
    if milliseconds is None:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _readable(window: Mapping[str, Any]) -> dict[str, Any]:
    return {"start": _iso(window["start_ms"]), "end": _iso(window["end_ms"]), **window}


def _tail(summary: dict[str, Any]) -> dict[str, Any]:
    """The models stand at the top as well, so that `last_half.deepfm.logloss` reads like `models.deepfm.logloss`."""
    return {**summary, **summary["models"]}
