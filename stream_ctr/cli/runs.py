"""Runs: hold the state directory, open the source, build the trainer, resume, and run it.

The command line is the only place where the trainer meets `connectors`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import torch
from msgspec import UNSET
from rich.console import Console

from stream_ctr.cli.assembly import MakeFront, build_trainer, rotation, signing_key
from stream_ctr.cli.beginning import Beginning, kept_manifest
from stream_ctr.cli.client import connector_errors
from stream_ctr.cli.compiling import announcing_compilation
from stream_ctr.cli.display import LiveTable, final_table
from stream_ctr.cli.features_file import write_features
from stream_ctr.cli.inference import first_records, inferred_fields
from stream_ctr.cli.interrupts import signals
from stream_ctr.cli.mirroring import mirrored
from stream_ctr.cli.port import observed
from stream_ctr.cli.registry import open_schemas
from stream_ctr.cli.replay import Stream
from stream_ctr.cli.report_line import ReportLines, figures
from stream_ctr.cli.summary import summary
from stream_ctr.cli.voice import say, say_report, speaks_json
from stream_ctr.config import Config, in_milliseconds
from stream_ctr.connectors import kafka
from stream_ctr.connectors.kafka.confluent import ConfluentSource
from stream_ctr.connectors.memory import BatchSource
from stream_ctr.errors import DataError, SnapshotError, StreamCtrError
from stream_ctr.events.decoder import Decoder
from stream_ctr.events.field import Field
from stream_ctr.events.fit import NOTHING, Fitted, fit_numbers
from stream_ctr.events.times import TimeFormat
from stream_ctr.learn.device import choose_device
from stream_ctr.learn.learner import Learner
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.messages import one_line
from stream_ctr.snapshots import delta_topic, snapshot
from stream_ctr.snapshots.contract import Verify
from stream_ctr.snapshots.delta import DeltaHeader
from stream_ctr.snapshots.delta_writer import Outlet
from stream_ctr.snapshots.lease import Lease
from stream_ctr.snapshots.manifest import RunIdentity
from stream_ctr.snapshots.mirror import Mirror
from stream_ctr.snapshots.publisher import Publisher
from stream_ctr.snapshots.snapshot_topic import Sink, SnapshotTopic
from stream_ctr.train.front_lead import Faces
from stream_ctr.train.inputs import Inputs
from stream_ctr.train.report import Report, to_json_object
from stream_ctr.train.resume import continued, what_follows
from stream_ctr.train.schedule import Schedule
from stream_ctr.train.source import Source
from stream_ctr.train.trainer import Surroundings, Trainer

_LEAST_RETENTION = timedelta(hours=1)
"""The least time that a topic of deltas which is created here keeps them."""


@contextlib.contextmanager
def state_directory(state: Path, *, take_over: bool = False) -> Iterator[Lease]:
    """Hold the state directory, and remove what a crash left unfinished in it.

    An error before anything is written leaves no directory behind.
    """
    with Lease(state, take_over=take_over) as lease:
        try:
            snapshot.clean(state / "snapshots")
            yield lease
        except BaseException:
            lease.abandon()
            raise


def kept_config(state: Path, signature: Verify | None = None) -> dict[str, Any] | None:
    """Return the configuration of the earlier run in this directory, or None."""
    newest = snapshot.newest(state / "snapshots", signature=signature)
    return snapshot.verify(newest).config if newest else None


def train_on_logs(
    logs: Sequence[Stream],
    config: Config,
    lease: Lease,
    *,
    keep_open: bool = False,
    beginning: Beginning | None = None,
    predictions: Path | None = None,
    caller: Caller | None = None,
    registry: Mapping[str, str] | None = None,
    others: Others | None = None,
) -> Report | None:
    """Learn all of these logs, one after another, into the directory of the lease.

    With `keep_open`, label windows that are open at the end of the last log stay open for the input
    that follows. A new state begins with the weights of the `beginning`.

    Raises `ConfigError` if the logs cannot follow what the directory was begun with.
    """
    with connector_errors():
        return _train(
            [_log_source(log) for log in logs],
            _publisher(config, lease, caller),
            config,
            lease.directory,
            config.features.fields() or logs[0].fields,
            mirrored(config, lease),
            notes=lambda: [note for log in logs for note in log.notes],
            in_event_time=True,
            keep_open=keep_open,
            beginning=beginning,
            predictions=predictions,
            caller=caller,
            registry=registry,
            others=others,
        )


def _log_source(log: Stream) -> BatchSource:
    return BatchSource(lambda: (batch.value for batch in log.batches()), name=log.identity)


def train_on_source(
    source: Source,
    config: Config,
    lease: Lease,
    *,
    beginning: Beginning | None = None,
    predictions: Path | None = None,
    caller: Caller | None = None,
) -> Report | None:
    """Learn from a source of one's own, into the directory of the lease."""
    with connector_errors():
        return _train(
            [source],
            _publisher(config, lease, caller),
            config,
            lease.directory,
            config.features.fields() or None,
            mirrored(config, lease),
            beginning=beginning,
            predictions=predictions,
            caller=caller,
        )


def _publisher(config: Config, lease: Lease, caller: Caller | None) -> Publisher:
    """Return a publisher into the directory of the lease, and into the caller's sink."""
    sink = caller.sink if caller else None
    snapshot_topic = None
    if sink and config.snapshots.topic:
        snapshot_topic = SnapshotTopic(
            config.snapshots.topic,
            sink=sink,
            reader=_NothingToRead(),
            name=config.snapshots.model_name,
            run=lease.run,
            signing=signing_key(config),
        )
    return Publisher(
        lease.directory,
        lease=lease,
        sink=sink,
        unavailable=(OSError,),
        metrics_topic=config.metrics.topic,
        snapshot_topic=snapshot_topic,
        model_name=config.snapshots.model_name,
        rotation=rotation(config),
        signing=signing_key(config),
        url=config.snapshots.url,
    )


class _NothingToRead:
    """The reader beside a sink of one's own, where no other run publishes."""

    def read_to_end(self) -> Iterable[tuple[str, bytes | None]]:
        return ()


def train_on_kafka(
    client: dict[str, object],
    config: Config,
    lease: Lease,
    *,
    until_end: bool,
    keep_open: bool = False,
    fields: tuple[Field, ...] | None = None,
    beginning: Beginning | None = None,
    predictions: Path | None = None,
    replace_run: str | None = None,
    take_over: bool = False,
    caller: Caller | None = None,
    registry: Mapping[str, str] | None = None,
    others: Others | None = None,
) -> Report | None:
    """Learn from the topics of the configuration, into the directory of the lease.

    `fields` is used if the configuration names none; without either they are inferred. A new state
    begins with the weights of the `beginning`. The run may replace the run `replace_run` on the
    snapshot topic, and with `take_over` it leaves a newer copy of its directory behind.

    Raises `NameHeld` if another run holds the name there.
    """
    topics = _topics(config)
    with contextlib.ExitStack() as stack:
        source = open_topics(client, config, until_end=until_end)
        stack.callback(source.close)
        sink = kafka.KafkaSink(client)
        stack.callback(_close, sink)
        _ensure_topics(client, config, topics)
        snapshot_topic = None
        if config.snapshots.topic:
            reader = kafka.PointerReader(client, config.snapshots.topic)
            stack.callback(reader.close)
            snapshot_topic = SnapshotTopic(
                config.snapshots.topic,
                sink=sink,
                reader=reader,
                name=config.snapshots.model_name,
                run=lease.run,
                replace_run=replace_run,
                signing=signing_key(config),
            )
        publisher = Publisher(
            lease.directory,
            lease=lease,
            sink=sink,
            unavailable=(kafka.KafkaFailure,),
            metrics_topic=config.metrics.topic,
            snapshot_topic=snapshot_topic,
            model_name=config.snapshots.model_name,
            rotation=rotation(config),
            signing=signing_key(config),
            url=config.snapshots.url,
        )
        publisher.require_name(take_over=take_over)
        outlets = []
        if config.snapshots.delta_every and config.snapshots.delta_topic:
            delta_sink = kafka.KafkaSink(client)  # for the thread that writes deltas
            stack.callback(_close, delta_sink)
            outlets.append(_delta_outlet(delta_sink, config))
        return _train(
            [source],
            publisher,
            config,
            lease.directory,
            config.features.fields() or fields,
            mirrored(config, lease, client),
            keep_open=keep_open,
            beginning=beginning,
            predictions=predictions,
            caller=caller,
            registry=registry,
            delta_outlets=outlets,
            others=others,
            front=others.front if others else None,
        )


def open_topics(
    client: Mapping[str, object], config: Config, *, until_end: bool
) -> kafka.KafkaSource | ConfluentSource:
    """Open the topics of the configuration."""
    open_source = ConfluentSource if config.input.client == "confluent" else kafka.KafkaSource
    return open_source(
        _topics(config),
        client=client,
        group=config.input.group,
        until_end=until_end,
        max_record_bytes=config.input.max_record_bytes,
        on_lost=config.input.on_lost,
    )


def _topics(config: Config) -> list[str]:
    topics = (config.input.topic, config.input.click_topic)
    return [topic for topic in topics if topic]


def _ensure_topics(client: dict[str, object], config: Config, topics: Sequence[str]) -> None:
    for topic in topics:
        kafka.ensure_topic(client, f"{topic}.dlq")
    if config.metrics.topic:
        kafka.ensure_topic(client, config.metrics.topic)
    if config.snapshots.topic:
        kafka.ensure_topic(client, config.snapshots.topic, compacted=True)
    if config.snapshots.delta_every and config.snapshots.delta_topic:
        kept = max(_LEAST_RETENTION, config.snapshots.keep * config.schedule.snapshot_every)
        kafka.ensure_topic(client, config.snapshots.delta_topic, retention_ms=in_milliseconds(kept))


def _delta_outlet(sink: kafka.KafkaSink, config: Config) -> Outlet:
    """Return a function that sends a delta to the topic of the configuration."""
    topic = config.snapshots.delta_topic
    key = config.snapshots.model_name.encode()

    def send(header_bytes: bytes, header: DeltaHeader, payload: bytes) -> None:
        try:
            delta_topic.send(sink, topic, key, header_bytes, header, payload)
        except kafka.KafkaFailure as error:
            raise SnapshotError(f"topic {topic!r}: {error}") from None

    return send


def _close(sink: kafka.KafkaSink) -> None:
    with contextlib.suppress(kafka.KafkaFailure):  # `Publisher.flush` has judged what was lost
        sink.close()


def _train(
    sources: Sequence[Source],
    publisher: Publisher,
    config: Config,
    state: Path,
    fields: tuple[Field, ...] | None,
    mirror: AbstractContextManager[Mirror | None],
    *,
    notes: Callable[[], Sequence[str]] = tuple,
    in_event_time: bool = False,
    keep_open: bool = False,
    beginning: Beginning | None = None,
    predictions: Path | None = None,
    caller: Caller | None = None,
    registry: Mapping[str, str] | None = None,
    delta_outlets: Sequence[Outlet] = (),
    others: Others | None = None,
    front: MakeFront | None = None,
) -> Report | None:
    choose_device(config.learn.device)  # fail on a missing device before waiting for anything
    schemas = open_schemas(config, registry)
    stop = caller.stop if caller else StopRequest()

    schedule = Schedule(_intervals(config))
    with contextlib.ExitStack() as stack:
        stack.enter_context(signals(stop))
        stack.enter_context(out_of_memory(state))
        stack.enter_context(announcing_compilation())
        copy = stack.enter_context(mirror)
        recent = stack.enter_context(
            observed(
                state,
                address=config.http.address,
                token_file=config.http.token_file,
                run=publisher.run,
            )
        )

        def stopped() -> bool:
            publisher.check()
            recent.beat()
            return stop.requested or bool(others and others.ask_to_stop())

        newest, inputs = _inputs(sources, config, state)
        encoding = _encoding(
            inputs.sources[0],  # it alone decides, whatever else the command names
            config,
            state,
            beginning,
            fields,
            stopped,
            Decoder((), schemas=schemas).plain,
        )
        if not encoding:
            say("stopped before the first impressions were there; nothing was learned")
            return None
        inferred = not fields
        fields, fitted = encoding
        kept = kept_manifest(state)
        show = caller.on_report if caller else stack.enter_context(_shown())

        def beat() -> None:
            recent.beat()
            if others and others.ask_to_stop():
                stop()
            if copy:
                counters.update(copy.take_failures())

        trainer = build_trainer(
            config,
            fields=fields,
            fitted=fitted,
            earlier=beginning.manifest if beginning else kept,
            origin=beginning.origin if beginning else kept.origin if kept else UNSET,
            source=inputs,
            publisher=publisher,
            directory=state,
            surroundings=Surroundings(
                flags=schedule,
                show=show,
                notes=notes,
                written=recent.add if config.http.address else _ignore,
                beat=beat,
                past_events=in_event_time,
            ),
            in_event_time=in_event_time,
            keep_open=keep_open,
            predictions=predictions,
            schemas=schemas,
            delta_outlets=[*delta_outlets, copy.wake] if copy else delta_outlets,
            make=others.make if others else None,
            front=front,
        )
        counters = trainer.state.counters  # a cycle would keep the threads of its learners
        if trainer.baseline:
            stack.callback(trainer.baseline.close)
        if not newest:
            write_features(state, trainer.identity.schema, inferred=inferred)
        if beginning:
            _begin(trainer, beginning)
        elif newest:
            _resume(trainer, newest, config)
        stop.then(trainer.stop)
        stack.callback(stop.forget)  # the trainer holds the request: another cycle
        stack.enter_context(schedule)
        report = trainer.run()
    if caller:
        return report
    if Console().is_terminal:
        Console().print(final_table(to_json_object(report)))
    waiting = trainer.state.joiner.pending + len(trainer.state.batches)
    line = summary(report, state, kept_open=waiting if keep_open else None)
    say_report(line, figures(report))
    return report


def _intervals(config: Config) -> dict[str, float]:
    """Return the seconds between two reports, snapshots and, if there are any, deltas."""
    intervals = {
        "report": config.schedule.report_every.total_seconds(),
        "snapshot": config.schedule.snapshot_every.total_seconds(),
    }
    if every := config.snapshots.delta_every.total_seconds():
        intervals["delta"] = every
    return intervals


def _ignore(report: object) -> None:
    """Take a report that nobody can ask for."""


@contextlib.contextmanager
def _shown() -> Iterator[Callable[[Report], None]]:
    """Show each report: as a table on a terminal, and as a line where standard error is none."""
    console = Console()
    lines = ReportLines(say_report)
    with LiveTable(console) as table:

        def show(report: Report) -> None:
            table.update(to_json_object(report))
            if speaks_json() or not (console.is_terminal and sys.stderr.isatty()):
                lines.update(report)

        yield show


def _inputs(sources: Sequence[Source], config: Config, state: Path) -> tuple[Path | None, Inputs]:
    """Return the newest snapshot in the state directory, and the sources as what follows it."""
    key = signing_key(config)
    newest = snapshot.newest(state / "snapshots", signature=key.verify if key else None)
    manifest = snapshot.read_manifest(newest) if newest else None
    return newest, continued(sources, manifest, newest)


def _encoding(
    source: Source,
    config: Config,
    state: Path,
    beginning: Beginning | None,
    fields: tuple[Field, ...] | None,
    stopped: Callable[[], bool],
    plain: Callable[[pa.LargeBinaryArray], pa.LargeBinaryArray],
) -> tuple[tuple[Field, ...], Fitted] | None:
    """Return the fields, and what their numbers are fitted to; None if the run was stopped.

    A run that resumes takes the latter from its snapshot. A new one takes it from its `beginning`,
    and looks at the first records for fields that have none there.
    """
    features = config.features
    limit = config.input.max_record_bytes
    numeric = fields is None or any(field.kind == "numeric" for field in fields)
    kept = kept_fit(state) if features.fit_numbers and numeric else NOTHING
    if kept is None and fields and beginning and beginning.knows(fields, config):
        kept = beginning.fit(fields, config)
    if fields and kept is not None:
        return fields, kept
    first = first_records(
        source,
        stopped=stopped,
        say=say,
        max_record_bytes=limit,
        plain=plain,
        time_format=TimeFormat(config.input.time_unit, config.input.time_zone),
        reason="to fit the buckets of their numbers (features.fit_numbers = false does not wait)"
        if fields
        else "to infer their fields (or name them in a --config)",
        label_window_ms=in_milliseconds(config.join.label_window),
        idle_seconds=config.join.idle_timeout.total_seconds(),
    )
    if first is None:
        return None
    fields = fields or inferred_fields(first, source, say=say, max_record_bytes=limit)
    if kept is not None:
        return fields, kept
    fitted = fit_numbers(
        first.parts,
        fields,
        most=first.most,
        window_ms=in_milliseconds(config.join.label_window),
        numeric_encoding=features.numeric_encoding,
        buckets_per_octave=features.buckets_per_octave,
        max_record_bytes=limit,
    )
    if beginning:
        fitted = beginning.fit(fields, config, others=fitted)
    new = set(fitted.bucket_edges) - (beginning.numbers(config) if beginning else set())
    if new:
        names = ", ".join(one_line(name, 60) for name in fitted.bucket_edges if name in new)
        say(f"note: buckets fitted to the numbers of {names}")
    return fields, fitted


def kept_fit(state: Path) -> Fitted | None:
    """Return what the numbers of the earlier run in this directory are fitted to, or None."""
    kept = kept_manifest(state)
    return Fitted(kept.schema.bucket_edges, kept.schema.value_scales) if kept else None


def require_published(report: Report, *, kept_open: bool = False) -> None:
    """Raise `DataError` if a run has read all of its input and published nothing.

    A run whose windows are `kept_open` may have learned nothing yet.
    """
    if kept_open and not report.examples:
        return
    if report.kind == "final" and report.withheld:
        raise DataError(f"nothing was published: {'; '.join(report.withheld)}")


def _begin(trainer: Trainer, beginning: Beginning) -> None:
    """Begin with the weights of another run, and say what was carried over."""
    for sentence in trainer.begin_from(beginning.path):
        say(f"from {beginning.path.name}: {sentence}")


def _resume(trainer: Trainer, newest: Path, config: Config) -> None:
    """Restore a snapshot, and say with what the run goes on."""
    if not signing_key(config) and (newest / "manifest.sig").exists():
        say(
            f"warning: snapshot {newest.name} is signed, those of this run will not be: "
            "no snapshots.signing_key is given"
        )
    trainer.restore(newest)
    examples = trainer.state.ledger.count
    say(f"resumed from snapshot {newest.name} ({examples:,} examples)")
    if follows := what_follows(trainer.source):
        say(follows)


class Others(Protocol):
    """The other ranks of a run, which make learners together with this one."""

    def make(self, spec: LearnerSpec) -> Learner: ...

    def front(self, identity: RunIdentity, inputs: Inputs) -> Faces | None:
        """Let all ranks read the topics and join; None where rank 0 does it alone."""
        ...

    def ask_to_stop(self) -> bool:
        """Return whether one of them asks the run to stop."""
        ...


class StopRequest:
    """A request to stop the run; calling it makes the request."""

    def __init__(self) -> None:
        self.requested = False
        self._stop: Callable[[], None] = lambda: None

    def __call__(self) -> None:
        self.requested = True
        self._stop()

    def then(self, stop: Callable[[], None]) -> None:
        """Call `stop` on a request, at once if there was one before."""
        self._stop = stop
        if self.requested:
            stop()

    def forget(self) -> None:
        """Call nothing any more."""
        self._stop = lambda: None


@dataclass(frozen=True, slots=True)
class Caller:
    """The program that a run is part of: it gets the reports, instead of the terminal.

    A `sink` gets what a run on Kafka sends to topics: reports, pointers and dead letters.
    """

    on_report: Callable[[Report], None]
    stop: StopRequest
    sink: Sink | None = None


@contextlib.contextmanager
def out_of_memory(state: Path) -> Iterator[None]:
    """Turn every way in which memory runs out into an error that says what to do."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        reason: Exception = error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # torch's message on a CPU
            raise
        reason = error
    else:
        return
    first_line = str(reason).splitlines()[0] if str(reason) else type(reason).__name__
    raise StreamCtrError(
        f"out of memory: {first_line}. A smaller model.table_bits, learn.batch_size or "
        "join.max_memory needs less, --device cpu uses other memory; "
        f"a run on {state} goes on from its newest snapshot"
    ) from reason
