"""Runs: hold the state directory, open the source, build the trainer, resume, and run it.

The command line is the only place where the trainer meets `connectors`.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from stream_ctr.cli.assembly import build_trainer, rotation, signing_key
from stream_ctr.cli.client import connector_errors
from stream_ctr.cli.compiling import announcing_compilation
from stream_ctr.cli.display import LiveTable, final_table
from stream_ctr.cli.inference import first_records, inferred_fields
from stream_ctr.cli.replay import Stream
from stream_ctr.cli.report_line import ReportLines, figures
from stream_ctr.cli.summary import summary
from stream_ctr.cli.voice import say, say_report, speaks_json
from stream_ctr.config import Config, in_milliseconds
from stream_ctr.connectors import kafka
from stream_ctr.connectors.kafka.confluent import ConfluentSource
from stream_ctr.connectors.memory import BatchSource
from stream_ctr.errors import DataError, SnapshotError, StreamCtrError
from stream_ctr.events.field import Field
from stream_ctr.events.fit import NOTHING, Fitted, fit_numbers
from stream_ctr.learn.device import choose_device
from stream_ctr.messages import one_line
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.lease import Lease
from stream_ctr.snapshots.publisher import Publisher
from stream_ctr.train.report import Report, to_json_object
from stream_ctr.train.schedule import Schedule
from stream_ctr.train.source import Source
from stream_ctr.train.trainer import Surroundings, Trainer


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


def kept_config(state: Path, signature: snapshot.Verify | None = None) -> dict[str, Any] | None:
    """Return the configuration of the earlier run in this directory, or None."""
    newest = snapshot.newest(state / "snapshots", signature=signature)
    return snapshot.verify(newest).config if newest else None


def train_on_log(
    log: Stream, config: Config, lease: Lease, *, predictions: Path | None = None
) -> Report | None:
    """Learn all of a log, into the directory of the lease.

    Raises `DataError` if the directory was begun with another log.
    """
    source = BatchSource(lambda: (batch.value for batch in log.batches()), name=log.identity)
    fields = config.features.fields() or log.fields
    with connector_errors():
        publisher = Publisher(
            lease.directory,
            lease=lease,
            model_name=config.snapshots.model_name,
            rotation=rotation(config),
        )
        return _train(
            source,
            publisher,
            config,
            lease.directory,
            fields,
            notes=lambda: log.notes,
            in_event_time=True,
            predictions=predictions,
        )


def train_on_kafka(
    client: dict[str, object],
    config: Config,
    lease: Lease,
    *,
    until_end: bool,
    fields: tuple[Field, ...] | None = None,
    predictions: Path | None = None,
) -> Report | None:
    """Learn from the topics of the configuration, into the directory of the lease.

    `fields` is used if the configuration names none; without either they are inferred.
    """
    topics = [config.input.topic]
    if config.input.click_topic:
        topics.append(config.input.click_topic)
    open_source = ConfluentSource if config.input.client == "confluent" else kafka.KafkaSource
    with contextlib.ExitStack() as stack:
        source = open_source(
            topics,
            client=client,
            group=config.input.group,
            until_end=until_end,
            max_record_bytes=config.input.max_record_bytes,
            on_lost=config.input.on_lost,
        )
        stack.callback(source.close)
        sink = kafka.KafkaSink(client)
        stack.callback(_close, sink)
        _ensure_topics(client, config, topics)
        publisher = Publisher(
            lease.directory,
            lease=lease,
            sink=sink,
            unavailable=(kafka.KafkaFailure,),
            metrics_topic=config.metrics.topic,
            snapshot_topic=config.snapshots.topic,
            model_name=config.snapshots.model_name,
            rotation=rotation(config),
        )
        return _train(
            source,
            publisher,
            config,
            lease.directory,
            config.features.fields() or fields,
            predictions=predictions,
        )


def _ensure_topics(client: dict[str, object], config: Config, topics: Sequence[str]) -> None:
    for topic in topics:
        kafka.ensure_topic(client, f"{topic}.dlq")
    if config.metrics.topic:
        kafka.ensure_topic(client, config.metrics.topic)
    if config.snapshots.topic:
        kafka.ensure_topic(client, config.snapshots.topic, compacted=True)


def _close(sink: kafka.KafkaSink) -> None:
    with contextlib.suppress(kafka.KafkaFailure):  # `Publisher.flush` has judged what was lost
        sink.close()


def _train(
    source: Source,
    publisher: Publisher,
    config: Config,
    state: Path,
    fields: tuple[Field, ...] | None,
    *,
    notes: Callable[[], Sequence[str]] = tuple,
    in_event_time: bool = False,
    predictions: Path | None = None,
) -> Report | None:
    choose_device(config.learn.device)  # fail on a missing device before waiting for anything
    stop = StopRequest()
    schedule = Schedule(
        {
            "report": config.schedule.report_every.total_seconds(),
            "snapshot": config.schedule.snapshot_every.total_seconds(),
        }
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(signals(stop))
        stack.enter_context(_out_of_memory(state))
        stack.enter_context(announcing_compilation())
        encoding = _encoding(source, config, state, fields, lambda: stop.requested)
        if not encoding:
            say("stopped before the first impressions were there; nothing was learned")
            return None
        fields, fitted = encoding
        show = stack.enter_context(_shown())
        trainer = build_trainer(
            config,
            fields=fields,
            fitted=fitted,
            source=source,
            publisher=publisher,
            directory=state,
            surroundings=Surroundings(
                flags=schedule,
                show=show,
                notes=notes,
            ),
            in_event_time=in_event_time,
            predictions=predictions,
        )
        if trainer.baseline:
            stack.callback(trainer.baseline.close)
        _resume(trainer, config, state)
        stop.then(trainer.stop)
        stack.enter_context(schedule)
        report = trainer.run()
    if Console().is_terminal:
        Console().print(final_table(to_json_object(report)))
    say_report(summary(report, state), figures(report))
    return report


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


def _encoding(
    source: Source,
    config: Config,
    state: Path,
    fields: tuple[Field, ...] | None,
    stopped: Callable[[], bool],
) -> tuple[tuple[Field, ...], Fitted] | None:
    """Return the fields, and what their numbers are fitted to; None if the run was stopped.

    A run that resumes takes the latter from its snapshot. A new one looks at the first records.
    """
    features = config.features
    limit = config.input.max_record_bytes
    numeric = fields is None or any(field.kind == "numeric" for field in fields)
    kept = kept_fit(state) if features.fit_numbers and numeric else NOTHING
    if fields and kept is not None:
        return fields, kept
    first = first_records(
        source,
        stopped=stopped,
        say=say,
        max_record_bytes=limit,
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
        numeric_encoding=features.numeric_encoding,
        buckets_per_octave=features.buckets_per_octave,
        max_record_bytes=limit,
    )
    if fitted.bucket_edges:
        names = ", ".join(one_line(name, 60) for name in fitted.bucket_edges)
        say(f"note: buckets fitted to the numbers of {names}")
    return fields, fitted


def kept_fit(state: Path) -> Fitted | None:
    """Return what the numbers of the earlier run in this directory are fitted to, if there is one.

    All snapshots of a run agree on it, so any that can be read will do.
    """
    for name in reversed(snapshot.snapshot_ids(state / "snapshots")):
        with contextlib.suppress(SnapshotError):
            schema = snapshot.read_manifest(state / "snapshots" / name).schema
            return Fitted(schema.bucket_edges, schema.value_scales)
    return None


def require_published(report: Report) -> None:
    """Raise `DataError` if a run has read all of its input and published nothing."""
    if report.kind == "final" and report.withheld:
        raise DataError(f"nothing was published: {'; '.join(report.withheld)}")


def _resume(trainer: Trainer, config: Config, state: Path) -> None:
    """Restore the newest snapshot in the state directory, if there is one."""
    key = signing_key(config)
    newest = snapshot.newest(state / "snapshots", signature=key.verify if key else None)
    if newest is None:
        return
    if not key and (newest / "manifest.sig").exists():
        say(
            f"warning: snapshot {newest.name} is signed, those of this run will not be: "
            "no snapshots.signing_key is given"
        )
    trainer.restore(newest)
    examples = trainer.state.ledger.count
    say(f"resumed from snapshot {newest.name} ({examples:,} examples)")


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


@contextlib.contextmanager
def signals(stop: Callable[[], None]) -> Iterator[None]:
    """Make SIGTERM and Ctrl-C call `stop`; a second one ends the process at once."""

    def handle(number: int, _: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _out_of_memory(state: Path) -> Iterator[None]:
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
