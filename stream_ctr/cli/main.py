"""The command line. Click is used here and in `inspection`: commands nest, help is the docstring, and errors become messages at this edge.

Only what `--help` needs is imported at the top; a command imports what it runs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stream_ctr import __version__
from stream_ctr.cli.inspection import aligned, dlq, snapshots
from stream_ctr.errors import BrokerError, ConfigError, DataError, SnapshotError, StreamCtrError
from stream_ctr.messages import nearest, printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from stream_ctr.config import Config
    from stream_ctr.logs.log import Log


def _lines(text: object) -> str:
    """Lines of a message, which may quote input, that cannot steer a terminal."""
    return "\n".join(printable(line, 4000) for line in str(text).split("\n"))


class _Safe(logging.Formatter):
    """One line a message, whatever of the input it quotes."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message, 4000)
        return super().formatMessage(record)


class _Group(click.Group):
    """Errors that stream_ctr raises on purpose become a message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except StreamCtrError as error:
            click.echo(f"error: {_lines(error)}", err=True)
            ctx.exit(error.exit_code)
        except BrokenPipeError:  # `stream-ctr ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)


@click.group(
    cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="stream-ctr")
@click.option(
    "-v", "--verbose", count=True, help="Say more on standard error: -v progress, -vv everything."
)
def main(verbose: int) -> None:
    """Learn to predict clicks while they happen.

    \b
    stream-ctr demo                                   everything on this machine, in about a minute
    stream-ctr run --topic clicks                     learn from Kafka
    stream-ctr run --source clicks.jsonl --until-end  learn from a log, without a broker
    stream-ctr subscribe --state state                follow the snapshots that a run publishes

    Exit codes: 0 fine, 1 out of memory, 2 usage, 3 configuration, 4 broker, 5 the data policy stopped the run, 6 no valid snapshot.
    """
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    handler = logging.StreamHandler()
    if not verbose:
        # Both clients report each lost connection at ERROR and go on; what stops a command is told by the command itself.
        handler.addFilter(lambda record: not record.name.startswith("kafka"))
    logging.getLogger("numba").setLevel(
        logging.INFO
    )  # at DEBUG it prints every function that it compiles, bytecode and all
    handler.setFormatter(_Safe("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


# -- options that several commands share ---------------------------------------------------------


_CONFIG = click.option(
    "--config", "config_path", type=click.Path(path_type=Path), help="A TOML file; see configs/ and `stream-ctr config`."
)  # fmt: skip


def _extra(which: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(
        "-X",
        "extra",
        multiple=True,
        metavar="KEY=VALUE",
        help=f"{which} key of the configuration such as learn.batch_size.",
    )


def _settings(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        _extra("A Kafka client property, or any"),
        click.option(
            "--kafka-config", type=click.Path(path_type=Path), help="A Java client.properties file."
        ),
        _CONFIG,
        click.option(
            "--bootstrap-servers",
            metavar="HOST:PORT,...",
            help="Kafka brokers.  [default: localhost:9092]",
        ),
    ):
        command = option(command)
    return command


def _log_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--log-seed",
            type=int,
            default=0,
            show_default=True,
            help="Seed of what the log lacks and replay invents.",
        ),
        click.option(
            "--format",
            "log_format",
            metavar="NAME",
            help="events, parquet, arrow, criteo, avazu or obd.  [default: sniffed]",
        ),
    ):
        command = option(command)
    return command


_MISSPELT = 0.75  # as like as that to a key of the configuration no Kafka client property is


def _load_config(
    config_path: Path | None,
    extra: tuple[str, ...],
    *,
    base: Mapping[str, Any] | None = None,
    **inputs: str | None,
) -> tuple[Config, dict[str, str]]:
    """The configuration in force, and the Kafka client properties among `extra`."""
    from stream_ctr import config

    overrides: dict[str, dict[str, Any]] = {
        "input": {name: value for name, value in inputs.items() if value is not None}
    }
    properties: dict[str, str] = {}
    known = set(config.known_keys())
    for pair in extra:
        name, equals, value = pair.partition("=")
        if not equals:
            raise click.BadParameter(f"-X takes KEY=VALUE, got {pair!r}")
        section, _, option = name.partition(".")
        if name in known:
            overrides.setdefault(section, {})[option] = config.parse_text(section, option, value)
        elif section in config.Config.model_fields:
            raise ConfigError(f"unknown key {name!r}{nearest(name, known)}")
        elif meant := nearest(name, known, cutoff=_MISSPELT):
            raise ConfigError(f"unknown key {name!r}{meant}")
        else:
            properties[name] = value
    return config.load(config_path, overrides=overrides, base=base), properties


# -- run -----------------------------------------------------------------------------------------


@main.command()
@click.option("--topic", help="Topic with impressions and clicks.  [default: clicks]")
@click.option("--click-topic", help="A second topic that holds the clicks.")
@click.option(
    "--client",
    "reader",
    type=click.Choice(["kafka-python", "confluent"]),
    help="What reads from Kafka; confluent is librdkafka (pip install 'stream-ctr[confluent]').  [default: kafka-python]",
)
@click.option("--source", type=click.Path(path_type=Path), help="Read this log instead of Kafka.")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME",
    help="What learns and is published, see `stream-ctr models`; given again, others beside it on the same examples.  [default: deepfm]",
)
@_log_options
@_settings
@click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("state"),
    show_default=True,
    help="Everything that the run writes; an existing one is resumed.",
)
@click.option(
    "--until-end",
    is_flag=True,
    help="Stop when all that was there at the start is learned. (A --source always ends.)",
)
@click.option(
    "--take-over",
    is_flag=True,
    help="Go on though another run holds the directory: one that is frozen, or whose host is gone.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="Where the table and the network live.  [default: auto]",
)
@click.option(
    "--profile",
    is_flag=True,
    help="Print at the end where the time of an event went, and what the bound is.",
)
def run(
    topic: str | None, click_topic: str | None, reader: str | None, source: Path | None, models: tuple[str, ...], log_format: str | None,
    log_seed: int, bootstrap_servers: str | None, config_path: Path | None, kafka_config: Path | None, extra: tuple[str, ...],
    state: Path, until_end: bool, take_over: bool, device: str | None, profile: bool,
) -> None:  # fmt: skip
    """Learn from impressions and clicks; report, snapshot, publish.

    \b
    stream-ctr run --topic clicks --state state
    stream-ctr run --topic impressions --click-topic clicks --config my.toml
    stream-ctr run --source day_0.tsv --format criteo --config configs/criteo.toml
    stream-ctr run --topic clicks --model deepfm --model fm --model lr
    """
    from stream_ctr.cli import assembly, runs
    from stream_ctr.train import stage_timer

    if models:
        extra = (*extra, f"model.name={models[0]}", f"model.beside={','.join(models[1:])}")
    extra = (*extra, f"learn.device={device}") if device else extra
    with runs.state_directory(state, take_over=take_over) as lease:
        key = assembly.signing_key(_load_config(config_path, extra)[0])
        kept = runs.kept_config(state, key.verify if key else None)
        config, properties = _load_config(
            config_path,
            extra,
            base=kept,
            topic=topic,
            click_topic=click_topic,
            client=reader,
            bootstrap_servers=bootstrap_servers,
        )
        client = runs.client(
            config.input.bootstrap_servers, kafka_config, properties
        )  # a wrong property is an error with --source too
        if source:
            log = _open_log(source, log_format, log_seed)
            invented = log.notes
            _tell(invented)
            report = runs.train_on_log(log, config, lease)
            _tell([note for note in log.notes if note not in invented])  # what reading it has shown
        else:
            with runs.connector_errors():
                report = runs.train_on_kafka(client, config, lease, until_end=until_end)
    if profile and report:
        click.echo(stage_timer.table(report["profile"]))


def _tell(notes: Sequence[str]) -> None:
    for note in notes:
        click.echo(f"note: {note}", err=True)


# -- logs and streams ----------------------------------------------------------------------------


def _open_log(path: Path, log_format: str | None, seed: int) -> Log:
    from stream_ctr.logs.open import open_log

    return open_log(path, format=log_format, seed=seed)


@main.command()
@click.argument("log", type=click.Path(path_type=Path))
@click.option("--topic", default="clicks", show_default=True)
@click.option(
    "--partitions",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Of the topic, when it has to be created.",
)
@click.option(
    "--speed",
    default="max",
    show_default=True,
    metavar="max|N",
    help="As fast as possible, or N times real time.",
)
@click.option(
    "--wire",
    type=click.Choice(["json", "arrow"]),
    default="json",
    show_default=True,
    help="An event a record, or many.",
)
@click.option(
    "--batch",
    type=click.IntRange(1, 1 << 20),
    default=1000,
    show_default=True,
    help="Events in an Arrow record, at most.",
)
@_log_options
@_settings
def replay(
    log: Path, topic: str, partitions: int, speed: str, wire: str, batch: int, log_format: str | None, log_seed: int,
    bootstrap_servers: str | None, config_path: Path | None, kafka_config: Path | None, extra: tuple[str, ...],
) -> None:  # fmt: skip
    """Produce the events of LOG to a topic, in event-time order.

    LOG is JSON lines, Parquet or Arrow of events, or a Criteo, Avazu or Open Bandit log.

    \b
    stream-ctr replay train.tsv --format criteo --topic clicks
    stream-ctr replay events.jsonl --speed 60
    stream-ctr replay events.parquet --wire arrow
    """
    from stream_ctr.cli import runs
    from stream_ctr.connectors import kafka

    factor = _speed(speed)
    config, properties = _load_config(config_path, extra, bootstrap_servers=bootstrap_servers)
    client = runs.client(config.input.bootstrap_servers, kafka_config, properties)
    opened = _open_log(log, log_format, log_seed)
    with runs.connector_errors():
        if kafka.ensure_topic(client, topic, partitions=partitions):
            click.echo(
                f"created topic {topic} with {partitions} partition{'s' * (partitions > 1)}",
                err=True,
            )
        sink = kafka.KafkaSink(client)
        try:
            count, seconds = runs.produce(
                opened, sink, topic, factor, events_a_record=batch if wire == "arrow" else None
            )
        finally:
            sink.close()
    _tell(opened.notes)
    click.echo(
        f"{count:,} events to {topic} in {seconds:.1f} s ({count / max(seconds, 1e-9):,.0f}/s)",
        err=True,
    )


def _speed(text: str) -> float | None:
    if text == "max":
        return None
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if factor <= 0:
        raise click.BadParameter(f"--speed is max or a positive number, got {text!r}")
    return factor


@main.command()
@click.option("--impressions", type=click.IntRange(1), default=1_000_000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="A JSON lines file of events.",
)
def simulate(impressions: int, seed: int, out: Path) -> None:
    """Write a seeded stream whose true click probabilities are known, so that the best possible logloss is too.

    \b
    stream-ctr simulate --impressions 200000 --seed 1 --out clicks.jsonl
    """
    from stream_ctr.logs.simulate import Simulation

    started = time.monotonic()
    try:
        count = Simulation(impressions, seed=seed).write_jsonl(out)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}") from None
    click.echo(
        f"{count:,} events ({impressions:,} impressions) to {out} in {time.monotonic() - started:.1f} s",
        err=True,
    )


# -- snapshots and serving -----------------------------------------------------------------------


@main.command()
@click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    help="Follow the state directory of a run.",
)
@click.option("--topic", help="Follow a snapshot topic instead.  [default: stream-ctr.snapshots]")
@click.option(
    "--model-name", default="default", show_default=True, help="Whose pointer on the topic."
)
@click.option(
    "--model",
    metavar="NAME",
    help="One that is learned beside the published one.  [default: the published one]",
)
@click.option(
    "--once",
    is_flag=True,
    help="Load one snapshot and stop; exit code 6 when there is none in time.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="Seconds that --once waits.",
)
@click.option("--json", "as_json", is_flag=True, help="A JSON object a line.")
@click.option(
    "--public-key",
    type=click.Path(path_type=Path),
    help="A PEM file; what its private key did not sign is refused.",
)
@click.option(
    "--exec",
    "command",
    metavar="COMMAND",
    help="Run this for each snapshot; {path} stands for its directory. No shell.",
)
@_settings
def subscribe(
    state: Path | None, topic: str | None, model_name: str, model: str | None, once: bool, timeout: float, as_json: bool,
    public_key: Path | None, command: str | None, bootstrap_servers: str | None, config_path: Path | None, kafka_config: Path | None,
    extra: tuple[str, ...],
) -> None:  # fmt: skip
    """Follow published snapshots; verify and load each, print a line.

    \b
    stream-ctr subscribe --state state
    stream-ctr subscribe --bootstrap-servers localhost:9092 --json --exec 'reload-model {path}'
    """
    from stream_ctr.cli import runs
    from stream_ctr.snapshots.subscriber import Subscriber, TopicPointers

    try:
        hook = shlex.split(command or "")
    except ValueError as error:
        raise click.BadParameter(
            f"--exec {command!r} cannot be split into words: {error}"
        ) from None
    if hook and not shutil.which(hook[0]):
        raise click.BadParameter(f"--exec {command!r}: there is no program {hook[0]!r}")
    if state and topic:
        raise click.UsageError("--state and --topic are two ways to follow; give one")
    with contextlib.ExitStack() as stack:
        if state:
            subscriber = Subscriber(state, model=model, public_key=public_key)
        else:
            from stream_ctr.connectors import kafka

            config, properties = _load_config(
                config_path, extra, bootstrap_servers=bootstrap_servers
            )
            client = runs.client(config.input.bootstrap_servers, kafka_config, properties)
            stack.enter_context(runs.connector_errors())
            reader = kafka.PointerReader(client, topic or config.snapshots.topic)
            stack.callback(reader.close)
            subscriber = Subscriber(
                TopicPointers(reader, model_name=model_name), model=model, public_key=public_key
            )
        stack.enter_context(runs.signals(subscriber.close))
        _follow(subscriber, once=once, timeout=timeout, as_json=as_json, hook=hook)


def _follow(
    subscriber: Any, *, once: bool, timeout: float, as_json: bool, hook: Sequence[str]
) -> None:
    while not subscriber.closing:
        pointer = subscriber.next(timeout if once else 1.0)
        if pointer:
            delay = round(time.time() - pointer["created_ms"] / 1000, 3)
            line = json.dumps({**pointer, "verified": True, "delay_seconds": delay})
            if not as_json:
                place = printable(pointer["path"], 1000)
                line = f"{pointer['snapshot']}  {pointer['examples']:,} examples  loaded {delay:.2f} s after it was taken  {place}"
            click.echo(line)
            sys.stdout.flush()
            if hook:
                _run_hook(hook, pointer)
        if once:
            if pointer is None:
                raise SnapshotError(f"no valid snapshot was published within {timeout:g} s")
            return


def _run_hook(hook: Sequence[str], pointer: Mapping[str, Any]) -> None:
    arguments = [part.replace("{path}", pointer["path"]) for part in hook]
    environment = {
        **os.environ,
        "STREAM_CTR_SNAPSHOT": pointer["path"],
        "STREAM_CTR_SNAPSHOT_ID": pointer["snapshot"],
    }
    try:
        done = subprocess.run(arguments, env=environment, check=False)
    except OSError as error:
        raise ConfigError(f"cannot run {arguments[0]!r} of --exec: {error.strerror}") from None
    if done.returncode:
        click.echo(
            f"warning: {hook[0]!r} ended with status {done.returncode} for {pointer['snapshot']}",
            err=True,
        )


@main.command()
@click.argument("log", metavar="EVENTS", type=click.Path(path_type=Path))
@click.option(
    "--snapshot",
    "path",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="A snapshot directory, or a state directory for its newest.",
)
@click.option(
    "--model",
    metavar="NAME",
    help="One that was learned beside the published one.  [default: the published one]",
)
@click.option(
    "--public-key",
    type=click.Path(path_type=Path),
    help="A PEM file; what its private key did not sign is refused.",
)
@click.option("--json", "as_json", is_flag=True, help="A JSON object a line.")
@_log_options
def score(
    log: Path,
    path: Path,
    model: str | None,
    public_key: Path | None,
    as_json: bool,
    log_format: str | None,
    log_seed: int,
) -> None:
    """Print the click probability of each impression in EVENTS: its id, a tab, the probability.

    \b
    stream-ctr score --snapshot state/snapshots/00000003-20250101T101500Z events.jsonl
    """
    from stream_ctr.events.decoder import Decoder
    from stream_ctr.snapshots import snapshot
    from stream_ctr.snapshots.subscriber import Scorer, verifier

    signature = verifier(public_key)
    if path.is_dir() and not (path / "manifest.json").exists():
        newest = snapshot.newest(path / "snapshots", signature=signature)
        if newest is None:
            raise SnapshotError(
                f"{path} is no snapshot, for it has no manifest.json, and no run has left one in it"
            )
        path = newest
    scorer = Scorer(path, model=model, signature=signature)
    decoder = Decoder(scorer.fields)
    rejected = scored = unknown = 0
    for batch in _open_log(log, log_format, log_seed).batches():
        events, rejects = decoder.decode(batch.value)
        rejected += len(rejects)
        identities = events.impressions.impression_id.to_pylist()
        scored += len(identities)
        unknown += len(identities) * all(
            column.null_count == len(column) for column in events.impressions.features.values()
        )
        probabilities = (
            scorer.predict_columns(events.impressions.features).tolist() if identities else []
        )
        if as_json:
            lines = [
                json.dumps({"impression_id": name, "probability": p})
                for name, p in zip(identities, probabilities, strict=True)
            ]
        else:
            lines = [
                f"{printable(name, 1000)}\t{p!r}"
                for name, p in zip(identities, probabilities, strict=True)
            ]
        if lines:
            click.echo("\n".join(lines))
    if not scored:
        click.echo("warning: there is no impression to score", err=True)
    elif unknown == scored:
        click.echo(
            "warning: no impression has any of the fields that this snapshot was trained on",
            err=True,
        )
    if rejected:
        click.echo(f"warning: {rejected} records are no events and were not scored", err=True)


# -- the paper -----------------------------------------------------------------------------------


@main.command()
@click.option(
    "--data", "log_path", type=click.Path(path_type=Path), help="A log of impressions and clicks."
)
@click.option(
    "--simulate",
    "simulated",
    type=click.IntRange(1),
    metavar="N",
    help="Instead of a log, N impressions of a simulated app store.",
)
@_log_options
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Where the report goes, and all that is kept.",
)
@click.option(
    "--quick",
    is_flag=True,
    help="A sample: 20,000 impressions, two seeds, three epochs, fewer points; a minute or two.",
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Runs of each system of Table 2.",
)
@click.option(
    "--study-seeds",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Runs of each point of Figures 7 to 11.",
)
@click.option(
    "--study-rows",
    type=click.IntRange(1),
    default=1_000_000,
    show_default=True,
    help="Training rows for Figures 7 to 11, drawn by chance.",
)
@click.option(
    "--split",
    type=click.Choice(["random", "time"]),
    default="random",
    show_default=True,
    help="How a tenth becomes the test part.",
)
@click.option(
    "--dropout",
    type=click.FloatRange(0, 1, max_open=True),
    help="Share dropped, but in the streaming table.  [default: 0.5]",
)
@click.option(
    "--epochs",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="At most; an epoch that is no better ends a run.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME",
    help="Of `stream-ctr models`, once or more.  [default: all nine]",
)
@click.option(
    "--only", metavar="PART,...", help="Do only some: table2, figure6 to figure11, streaming."
)
@click.option(
    "--restart",
    is_flag=True,
    help="Begin anew: what an earlier command has left in --out is deleted.",
)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    help="A TOML file; what it does not set is the paper's.",
)
@click.option(
    "-X",
    "extra",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any key of the configuration such as model.table_bits.",
)
def paper(
    log_path: Path | None, simulated: int | None, log_format: str | None, log_seed: int, out: Path, quick: bool, seeds: int,
    study_seeds: int, study_rows: int, split: str, dropout: float | None, epochs: int,
    models: tuple[str, ...], only: str | None, restart: bool, device: str, config_path: Path | None, extra: tuple[str, ...],
) -> None:  # fmt: skip
    """Repeat the DeepFM paper's tables and figures on a log: report.html, report.md and report.json in --out.

    Nine systems, several seeds, the paper's settings. What is done is kept: the same command goes on where it was ended, and one with
    --only or --model adds to what is there. Figures need matplotlib: pip install 'stream-ctr[paper]'.

    \b
    stream-ctr paper --data train.txt --format criteo --out report --quick
    stream-ctr paper --data train.txt --format criteo --out report -X model.table_bits=24
    stream-ctr paper --simulate 1000000 --out report
    """
    from rich.console import Console

    from stream_ctr.connectors.memory import BatchSource
    from stream_ctr.learn.thread_pool import set_up_process
    from stream_ctr.models import MODELS
    from stream_ctr.paper import facts, plan, reading, report, work

    if (log_path is None) == (simulated is None):
        raise click.UsageError("give --data LOG or --simulate N")
    options = plan.Options.create(
        quick=quick,
        seeds=seeds,
        study_seeds=study_seeds,
        study_rows=study_rows,
        epochs=epochs,
        split=split,
        device=device,
        dropout=dropout,
        models=_chosen("--model", models, MODELS),
        only=frozenset(_chosen("--only", (only or "").split(","), plan.PARTS)),
    )
    config, properties = _load_config(config_path, extra)
    if properties:
        raise click.BadParameter(f"no key of the configuration: {', '.join(properties)}")
    set_up_process()
    console = Console(stderr=True)
    log = _paper_log(log_path, simulated, log_format, log_seed)
    made: plan.Plan | None = None

    def write_report() -> None:
        if made is not None and (runs := work.results(made, out)):
            typed = shlex.join(["stream-ctr", *sys.argv[1:]])
            report.write(
                out, runs, data=facts.data_facts(log, made), made=facts.run_facts(made, typed, runs)
            )
            click.echo(f"{out / 'report.html'}")

    try:
        with work.locked(out):
            if restart:
                work.remove(out)
            limit = plan.QUICK_IMPRESSIONS if quick else None
            rows = reading.expected_rows(log, limit)
            click.echo(
                work.requirements(config, options, rows, reading.expected_bytes(log, config, rows)),
                err=True,
            )
            source = BatchSource(
                lambda: (batch.value for batch in log.batches()), name=log.identity
            )
            data = reading.read(log, source, config, out / "data", limit=limit, console=console)
            _tell(data.metadata["notes"])
            made = plan.make_plan(data, config, options)
            for line in work.estimate(made, out):
                click.echo(line, err=True)
            try:
                work.run(made, out, console=console)
            finally:  # of what is done, when it was stopped
                write_report()
    except KeyboardInterrupt:
        kept = (
            f"what is done is kept in {out}, and the same command goes on from there"
            if made
            else "nothing was done yet"
        )
        click.echo(f"\nstopped; {kept}", err=True)
        raise SystemExit(130) from None
    except OSError as error:
        raise DataError(f"{error.filename or out}: {error.strerror}") from None


def _chosen(option: str, names: Sequence[str], known: Collection[str]) -> tuple[str, ...]:
    """Those of the known that are named; all of them where none is."""
    named = {name.strip() for name in names} - {""}
    if odd := sorted(named - set(known)):
        raise click.BadParameter(f"{option}: {odd[0]!r} is none of {', '.join(known)}")
    return tuple(name for name in known if not named or name in named)


def _paper_log(path: Path | None, simulated: int | None, log_format: str | None, seed: int) -> Log:
    from stream_ctr.logs.open import open_log
    from stream_ctr.logs.simulate import Simulation
    from stream_ctr.paper.reading import CLICK_DELAY_SECONDS

    if path is None:
        assert simulated is not None
        return Simulation(simulated, seed=seed)
    return open_log(path, format=log_format, seed=seed, click_delay_seconds=CLICK_DELAY_SECONDS)


# -- configuration, broker, demo -----------------------------------------------------------------


@main.command()
@click.option("--json", "as_json", is_flag=True, help="A JSON object a line.")
def models(as_json: bool) -> None:
    """List the paper's nine systems: what `run --model` and `model.name` call each, and its line in the paper's Table 1.

    \b
    stream-ctr models
    """
    from stream_ctr.models import MODELS

    if as_json:
        for name, system in MODELS.items():
            told = {
                "high_order": system.high_order,
                "low_order": system.low_order,
                "engineering": system.engineering,
            }
            click.echo(
                json.dumps(
                    {
                        "name": name,
                        "title": system.title,
                        "pretraining": system.pretraining,
                        **told,
                        "says": system.says,
                    }
                )
            )
        return
    rows: list[tuple[str, ...]] = [
        (
            "name",
            "in the paper",
            "no pre-training",
            "high-order",
            "low-order",
            "no feature engineering",
            "",
        )
    ]
    for name, system in MODELS.items():
        properties = (
            not system.pretraining,
            system.high_order,
            system.low_order,
            not system.engineering,
        )
        rows.append(
            (name, system.title, *("yes" if has else "-" for has in properties), system.says)
        )
    for line in aligned(rows):
        click.echo(line)


@main.command("config")
@_settings
def show_config(
    bootstrap_servers: str | None,
    config_path: Path | None,
    kafka_config: Path | None,
    extra: tuple[str, ...],
) -> None:
    """Print the configuration in force as JSON: flags over environment over file over defaults."""
    from stream_ctr.cli import runs

    config, properties = _load_config(config_path, extra, bootstrap_servers=bootstrap_servers)
    runs.client(
        config.input.bootstrap_servers, kafka_config, properties
    )  # wrong ones are errors here too
    click.echo(json.dumps(config.model_dump(mode="json"), indent=2))


@main.command()
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=9092,
    show_default=True,
    help="On loopback; 0 picks a free one.",
)
def broker(port: int) -> None:
    """Run the embedded Kafka-compatible broker (Tansu, in memory) until Ctrl-C. Not for production."""
    from stream_ctr.cli import runs
    from stream_ctr.connectors.embedded import EmbeddedBroker
    from stream_ctr.connectors.errors import EmbeddedUnavailable

    try:
        with EmbeddedBroker(port=port or None) as embedded:
            click.echo(
                f"listening on {embedded.bootstrap_servers}; what it holds is gone when it stops",
                err=True,
            )
            stopped: list[int] = []
            with runs.signals(lambda: stopped.append(1)):
                while not stopped:
                    time.sleep(0.2)
                    if not embedded.alive:
                        raise BrokerError("the embedded broker has ended by itself")
    except EmbeddedUnavailable as error:
        raise BrokerError(str(error)) from None


@main.command()
@click.option("--impressions", type=click.IntRange(1000), default=200_000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where to keep it.  [default: a temporary directory]",
)
@_extra("Any")
@_CONFIG
def demo(
    impressions: int,
    seed: int,
    state: Path | None,
    config_path: Path | None,
    extra: tuple[str, ...],
) -> None:
    """All of it on this machine: an embedded broker, a simulated stream, the trainer, a subscriber. About a minute on two cores."""
    import tempfile

    from stream_ctr.cli.demo import run_demo

    # A demo is short: report often enough to be watched.
    config, properties = _load_config(
        config_path, extra, base={"schedule": {"report_every": "1s", "snapshot_every": "10s"}}
    )
    if properties:
        raise click.UsageError(
            f"the demo brings a broker of its own; it has no use for {', '.join(properties)}"
        )
    state = state or Path(tempfile.mkdtemp(prefix="stream-ctr-demo-"))
    run_demo(config, impressions=impressions, seed=seed, state=state)


main.add_command(snapshots)
main.add_command(dlq)
