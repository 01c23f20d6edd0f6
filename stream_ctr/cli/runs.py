"""What the commands do between their options and the trainer: open sources, hold the state directory, run, replay.

With the command line, the only place where the trainer meets `connectors`.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from rich.console import Console
from rich.progress import Progress

from stream_ctr.cli.assembly import build_trainer, signing_key
from stream_ctr.cli.display import LiveTable, final_table
from stream_ctr.config import Config
from stream_ctr.connectors import kafka
from stream_ctr.connectors.kafka.confluent import ConfluentSource
from stream_ctr.connectors.errors import PositionLost, TopicChanged
from stream_ctr.connectors.memory import BatchSource
from stream_ctr.errors import BrokerError, ConfigError, DataError, StreamCtrError
from stream_ctr.events.arrow_events import pack
from stream_ctr.events.decoder import Decoder, infer_fields
from stream_ctr.events.field import Field
from stream_ctr.learn.learner import choose_device
from stream_ctr.messages import one_line
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.lease import Lease
from stream_ctr.snapshots.publisher import Publisher
from stream_ctr.train.schedule import Schedule
from stream_ctr.train.source import Source

_INFER_RECORDS = 1000
_INFER_SECONDS = 10.0
_INFER_AT_MOST = 100_000  # records without a single impression
_LOCAL_BROKER = "localhost:9092"
_THREE_WAYS = """No Kafka broker. Three ways to get one:
  stream-ctr broker                         an embedded one, in another terminal (pip install 'stream-ctr[embedded]')
  docker compose -f deploy/compose.yaml up  Apache Kafka and a trainer
  --bootstrap-servers HOST:PORT             the one you have
Or do without: stream-ctr run --source LOG reads a file through the same code."""


class _Batch(Protocol):
    """Events in event-time order: `time` int64 ms [n], JSON bytes `value` [n], and the impression ids as Kafka keys."""

    @property
    def time(self) -> npt.NDArray[np.int64]: ...
    @property
    def value(self) -> pa.LargeBinaryArray: ...
    @property
    def key(self) -> pa.Array: ...
    def __len__(self) -> int: ...


class Stream(Protocol):
    """History that can be read as a stream, more than once: `history.Log`, `simulate.Simulation`."""

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> str: ...
    @property
    def fields(self) -> tuple[Field, ...] | None: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    def batches(self) -> Iterator[_Batch]: ...


def say(text: str) -> None:
    """To the person at the terminal; standard output is for results."""
    print(text, file=sys.stderr, flush=True)


def client(
    bootstrap_servers: str, kafka_config: Path | None, properties: Mapping[str, str]
) -> dict[str, object]:
    """Kafka client options from a properties file and -X pairs; without any servers in them, those of a broker on this machine."""
    with connector_errors():
        given = {**(kafka.read_properties(kafka_config) if kafka_config else {}), **properties}
        if not given.keys() & {"bootstrap.servers", "metadata.broker.list"}:
            bootstrap_servers = bootstrap_servers or _LOCAL_BROKER
        return dict(kafka.client_options(bootstrap_servers, given))


@contextlib.contextmanager
def connector_errors() -> Iterator[None]:
    """What `connectors` raise, in the terms of this package: with an exit code, and a way out where there is one."""
    try:
        yield
    except TopicChanged as error:
        raise DataError(
            f"{error}. To begin anew use another --state directory; what was learned stays in this one"
        ) from None
    except PositionLost as error:
        raise DataError(
            f'{error}. input.on_lost = "skip" counts it and goes on after it; to begin anew use another --state directory, '
            "what was learned stays in this one"
        ) from None
    except kafka.KafkaReadFailed as error:
        raise BrokerError(
            f'{error}. (input.on_lost = "skip" counts a batch that is damaged and goes on after it)'
        ) from None
    except (kafka.KafkaOptionError, kafka.KafkaCodecMissing) as error:
        raise ConfigError(str(error)) from None
    except kafka.KafkaRefused as error:
        raise BrokerError(str(error)) from None
    except kafka.KafkaUnreachable as error:
        raise BrokerError(f"{error}\n\n{_THREE_WAYS}") from None
    except kafka.KafkaFailure as error:
        raise BrokerError(str(error)) from None


@contextlib.contextmanager
def state_directory(state: Path, *, take_over: bool = False) -> Iterator[Lease]:
    """The directory, there, ours alone (see `Lease`), and without what a crash left unfinished."""
    with Lease(state, take_over=take_over) as lease:
        snapshot.clean(state / "snapshots")
        yield lease


def kept_config(state: Path, signature: snapshot.Verify | None = None) -> dict[str, Any] | None:
    """What an earlier run on this directory was configured with."""
    newest = snapshot.newest(state / "snapshots", signature=signature)
    return cast("dict[str, Any]", snapshot.verify(newest)["config"]) if newest else None


def train_on_log(log: Stream, config: Config, lease: Lease) -> dict[str, Any]:
    """Learn from all of a log, into the directory of the lease. Raises `DataError` when that was begun with another one."""
    source = BatchSource(lambda: (batch.value for batch in log.batches()), name=log.identity)
    fields = config.features.fields() or log.fields
    with connector_errors():
        publisher = Publisher(lease.directory, lease=lease, model_name=config.snapshots.model_name)
        return _train(source, publisher, config, lease.directory, fields, notes=lambda: log.notes)


def train_on_kafka(
    client: dict[str, object],
    config: Config,
    lease: Lease,
    *,
    until_end: bool,
    fields: tuple[Field, ...] | None = None,
) -> dict[str, Any]:
    """`fields` where the configuration names none; without either they are inferred."""
    topics = [config.input.topic, *([config.input.click_topic] if config.input.click_topic else [])]
    with contextlib.ExitStack() as stack:
        source = (ConfluentSource if config.input.client == "confluent" else kafka.KafkaSource)(
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
        for topic in topics:
            kafka.ensure_topic(client, f"{topic}.dlq")
        if config.metrics.topic:
            kafka.ensure_topic(client, config.metrics.topic)
        if config.snapshots.topic:
            kafka.ensure_topic(client, config.snapshots.topic, compacted=True)
        publisher = Publisher(
            lease.directory,
            lease=lease,
            sink=sink,
            unavailable=(kafka.KafkaFailure,),
            metrics_topic=config.metrics.topic,
            snapshot_topic=config.snapshots.topic,
            model_name=config.snapshots.model_name,
        )
        return _train(
            source, publisher, config, lease.directory, config.features.fields() or fields
        )


def _close(sink: kafka.KafkaSink) -> None:
    with contextlib.suppress(
        kafka.KafkaFailure
    ):  # what did not arrive was judged by `Publisher.flush`
        sink.close()


def _train(
    source: Source,
    publisher: Publisher,
    config: Config,
    state: Path,
    fields: tuple[Field, ...] | None,
    *,
    notes: Callable[[], Sequence[str]] = tuple,
) -> dict[str, Any]:
    choose_device(
        config.learn.device
    )  # one that is not there is told of before anything is waited for
    stopping = Stopping()
    schedule = Schedule(
        {
            "report": config.schedule.report_every.total_seconds(),
            "snapshot": config.schedule.snapshot_every.total_seconds(),
        }
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(signals(stopping))
        stack.enter_context(_out_of_memory(state))
        fields = fields or _inferred_fields(
            source, stopping, max_record_bytes=config.input.max_record_bytes
        )
        if not fields:
            say("stopped before the first impression; nothing was learned")
            return {}
        table = stack.enter_context(LiveTable(Console()))
        trainer = build_trainer(
            config,
            fields=fields,
            source=source,
            publisher=publisher,
            directory=state,
            flags=schedule,
            show=table.update,
            notes=notes,
        )
        if trainer.baseline:
            stack.callback(trainer.baseline.close)
        key = signing_key(config)
        newest = snapshot.newest(state / "snapshots", signature=key.verify if key else None)
        if newest:
            if not key and (newest / "manifest.sig").exists():
                say(
                    f"warning: snapshot {newest.name} is signed, those of this run will not be: no snapshots.signing_key is given"
                )
            trainer.restore(newest)
            say(f"resumed from snapshot {newest.name} ({trainer.ledger.count:,} examples)")
        stopping.then(trainer.stop)
        stack.enter_context(schedule)
        report = trainer.run()
    if Console().is_terminal:
        Console().print(final_table(report))
    say(_summary(report, state))
    return report


class Stopping:
    """Whether the run was told to stop; called, it is told."""

    def __init__(self) -> None:
        self.told = False
        self._stop: Callable[[], None] = lambda: None

    def __call__(self) -> None:
        self.told = True
        self._stop()

    def then(self, stop: Callable[[], None]) -> None:
        """What else stops, also when it was told before."""
        self._stop = stop
        if self.told:
            stop()


@contextlib.contextmanager
def _out_of_memory(state: Path) -> Iterator[None]:
    """An error that says what to do, for every way in which memory runs out."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        reason: Exception = error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # torch's, on a CPU
            raise
        reason = error
    else:
        return
    raise StreamCtrError(
        f"out of memory: {str(reason).splitlines()[0] if str(reason) else type(reason).__name__}. A smaller model.table_bits, "
        f"learn.batch_size or join.max_memory needs less, --device cpu another memory; a run on {state} goes on from its newest snapshot"
    ) from reason


_MODELS_IN_A_LINE = 3
_OF_MODELS = ("examples_skipped", "examples_unlearned")  # counted for each model beside as well
# Counters of what was not learned, and of why.
_WORTH_A_WORD = (
    "rejected", "records_lost", "impressions_late", "impressions_evicted", "clicks_late", "clicks_unmatched", "clicks_evicted",
    "ids_forgotten_early", "examples_skipped", "examples_unlearned", "publications_refused",
)  # fmt: skip


def _summary(report: Mapping[str, Any], state: Path) -> str:
    """A line, or, of more than three models, one for each after it."""
    several = len(report["models"]) > _MODELS_IN_A_LINE
    parts = [f"{report['examples']:,} examples"]
    scores = {name: score for name, score in report["models"].items() if score["auc"]}
    if not several:
        parts += [
            f"{name}: logloss {score['logloss']:.5f}, AUC {score['auc']:.4f}"
            for name, score in scores.items()
        ]
    if report.get("best_possible_logloss"):
        parts.append(f"best possible logloss {report['best_possible_logloss']:.5f}")
    paired = report["paired"]
    if paired["low"] is not None and not several:
        first, second = paired["models"]
        parts.append(f"{first} - {second} {_difference(paired)}")
    parts += _counted(report["counters"])
    if report["stalled"]:
        parts.append(
            f"{report['pending']:,} impressions wait for clicks that are overdue (join.stall_clicks = 0 does not wait)"
        )
    line = (
        f"{report['kind']}: {'; '.join(parts)}; snapshot {state / 'snapshots' / report['snapshot']}"
    )
    return "\n".join([line, *(_model_lines(report) if several else ())])


def _model_lines(report: Mapping[str, Any]) -> Iterator[str]:
    first = next(iter(report["models"]))
    width = max(map(len, report["models"]))
    for name, score in report["models"].items():
        figures = (
            f"logloss {score['logloss']:.5f}, AUC {score['auc']:.4f}" if score["auc"] else "no AUC"
        )
        paired = report["pairs"].get(name, {"low": None})
        less = f"; {first} - {name} {_difference(paired)}" if paired["low"] is not None else ""
        yield f"  {name:<{width}}  {figures}{less}"


def _difference(paired: Mapping[str, Any]) -> str:
    interval = f"[{paired['low']:+.5f}, {paired['high']:+.5f}]"
    return f"on the same {paired['count']:,}: {paired['logloss_difference']:+.5f} {interval}"


def _counted(counters: Mapping[str, int]) -> Iterator[str]:
    for name in _WORTH_A_WORD:
        if count := counters.get(name, 0):
            yield f"{count:,} {name.replace('_', ' ')}"
        for model in (
            key.removeprefix(f"{name}.")
            for key in counters
            if key.startswith(f"{name}.") and name in _OF_MODELS
        ):
            yield f"{counters[f'{name}.{model}']:,} {name.replace('_', ' ')} by {model}"
    if left_out := [
        key.removeprefix("left_out.") for key in counters if key.startswith("left_out.")
    ]:
        yield f"left out, for it diverged: {', '.join(left_out)}"


@contextlib.contextmanager
def signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and Ctrl-C finish cleanly; a second one ends at once."""

    def handle(number: int, _: object) -> None:
        for one in before:
            signal.signal(one, signal.SIG_DFL)
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _inferred_fields(
    source: Source, stopping: Stopping, *, max_record_bytes: int
) -> tuple[Field, ...]:
    """From the first thousand records, or those of ten seconds from the first impression on; then the source is where it was.

    Waits for impressions when there are none yet; nothing when told to stop meanwhile.
    """
    start = source.positions()
    values: list[pa.LargeBinaryArray] = []
    first: pa.LargeBinaryArray | None = None
    fields: tuple[Field, ...] = ()
    deadline = waiting_since = 0.0
    read = 0
    while not source.finished and not stopping.told:
        if fields and (sum(map(len, values)) >= _INFER_RECORDS or time.monotonic() > deadline):
            break
        records = source.poll(0.25)
        if len(records):
            read += len(records)
            sample = records.value.take(
                pa.array(range(min(len(records), 4 * _INFER_RECORDS)))
            )  # a copy: the rest need not be kept
            first = sample if first is None else first
            if values or infer_fields(sample, max_record_bytes=max_record_bytes):
                values.append(sample)
                deadline = deadline if fields else time.monotonic() + _INFER_SECONDS
                fields = infer_fields(pa.concat_arrays(values), max_record_bytes=max_record_bytes)
            elif read >= _INFER_AT_MOST:
                break
        elif not source.until_end and not waiting_since:
            waiting_since = time.monotonic()
            say(
                "waiting for the first impressions, to infer their fields (or name them in a --config)"
            )
    if stopping.told:
        return ()
    if not fields:
        where = ", ".join(sorted({topic for topic, _ in source.partitions}))
        raise DataError(
            f"no impression with features among {read:,} records of {where}: nothing to learn from{_seen(first)}"
        )
    source.seek(start)
    for kind, remark in (
        ("categorical", ""),
        ("numeric", " - numbers are taken as quantities; list ids in features.categorical"),
    ):
        if names := [field.name for field in fields if field.kind == kind]:
            say(
                f"note: no fields configured; inferred as {kind}: {', '.join(one_line(name, 60) for name in names)}{remark}"
            )
    return fields


def _seen(values: pa.LargeBinaryArray | None) -> str:
    """What records without a single impression that has features are instead.

    >>> _seen(pa.array([b'{"type":"impression"}'], pa.large_binary()))
    '. The first that is no event: kind must be impression or click, got None'
    """
    if values is None:
        return ""
    events, rejects = Decoder(()).decode(values)
    if len(rejects):
        return f". The first that is no event: {one_line(rejects.message[0])}"
    return f". Of the first {len(values):,} {len(events.impressions):,} are impressions without features, {len(events.clicks):,} are clicks"


def produce(
    log: Stream,
    sink: kafka.KafkaSink,
    topic: str,
    factor: float | None,
    *,
    events_a_record: int | None = None,
) -> tuple[int, float]:
    """All events of a log to a topic, as fast as possible or `factor` times as fast as they happened; how many, and in how many seconds.

    A JSON record each, or, in Arrow records of so many, which have no key: the broker's partitions take turns.
    """
    count, started, first = 0, time.monotonic(), None
    with Progress(
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as progress:
        task = progress.add_task(f"replaying {log.name}", total=None)
        for batch in log.batches():
            first = int(batch.time[0]) if first is None else first
            for rows in (
                _paced(batch.time - first, factor, started) if factor else (slice(0, len(batch)),)
            ):
                # No record times: with the events' own, a broker would delete a log that is older than its retention as soon as it has it.
                if events_a_record:
                    sink.send_batch(topic, pack(batch.value[rows], events_a_record=events_a_record))
                else:
                    sink.send_batch(topic, batch.value[rows], keys=batch.key[rows])
                progress.update(
                    task, description=f"replaying {log.name}: {count + rows.stop:,} events"
                )
            count += len(batch)
        sink.flush(120.0)
    return count, time.monotonic() - started


def _paced(elapsed_ms: npt.NDArray[np.int64], factor: float, started: float) -> Iterator[slice]:
    """Runs of rows, each when its time has come."""
    done = 0
    while done < len(elapsed_ms):
        due = int(
            np.searchsorted(elapsed_ms, (time.monotonic() - started) * 1000 * factor, side="right")
        )
        if due > done:
            yield slice(done, due)
            done = due
        else:
            time.sleep(
                min(
                    0.05,
                    max(
                        0.001,
                        float(elapsed_ms[done]) / 1000 / factor - (time.monotonic() - started),
                    ),
                )
            )
