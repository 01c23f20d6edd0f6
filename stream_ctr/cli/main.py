"""The command line, with Click: commands nest, and help is the docstring.

Errors become messages and exit codes here.

Only what `--help` needs is imported at the top; a command imports what it runs.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from stream_ctr import __version__
from stream_ctr.cli import launched, voice
from stream_ctr.cli.compact import compact
from stream_ctr.cli.dashboard import HTTP_OPTION, TOKEN_OPTION, dashboard
from stream_ctr.cli.dlq import dlq
from stream_ctr.cli.doctor import doctor
from stream_ctr.cli.export import export
from stream_ctr.cli.init import init
from stream_ctr.cli.options import (
    ALLOW_MODEL_OPTION,
    CONFIG_OPTION,
    JSON_OPTION,
    REPLACE_RUN_OPTION,
    SPAN_OPTION,
    GivenPath,
    LogFormat,
    Settings,
    aligned,
    extra_option,
    log_options,
    print_notes,
    settings_options,
)
from stream_ctr.cli.paper import paper
from stream_ctr.cli.serve import serve
from stream_ctr.cli.serving import score, subscribe
from stream_ctr.cli.snapshots import snapshots
from stream_ctr.cli.top import top
from stream_ctr.errors import BrokerError, DataError, StreamCtrError
from stream_ctr.messages import nearest, one_line

if TYPE_CHECKING:
    from stream_ctr.logs.simulate import Drift


class _Group(click.Group):
    """Turn the errors of stream_ctr into a message and an exit code."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            known = self.list_commands(ctx)
            hint = nearest(args[0], known) or f"; the commands are {', '.join(known)}"
            raise click.UsageError(f"{error.message.rstrip('.')}{hint}", error.ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except StreamCtrError as error:
            _say_error(str(error))
            ctx.exit(error.exit_code)
        except click.ClickException as error:
            error = _without_extra_arguments(error)
            if not voice.speaks_json() and launched.speaks():
                launched.record_error(error.format_message())
                raise error from None
            _say_error(error.format_message())
            ctx.exit(error.exit_code)
        except BrokenPipeError:  # `stream-ctr ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)
        except OSError as error:
            # A path that the system refuses, which no part of the command expected: too long a
            # name, a loop of links, a disk that fails.
            if error.filename is None:
                raise
            _say_error(f"cannot use {one_line(error.filename)}: {error.strerror}")
            ctx.exit(DataError.exit_code)


def _say_error(message: str) -> None:
    """Write the message of the error that ends the command, which other processes may have too."""
    if launched.speaks():
        voice.say_error(message)
        launched.record_error(message)


def _without_extra_arguments(error: click.ClickException) -> click.ClickException:
    """Return the error without what may be the value of a -X that was written as two words."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context and context.params.get("extra") and "unexpected extra argument" in error.message:
        return click.UsageError(
            "Got unexpected extra arguments (not shown: beside -X they may hold a password; "
            "-X takes KEY=VALUE as one word)",
            context,
        )
    return error


@click.group(
    cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="stream-ctr")
@click.option(
    "-v",
    "--verbose",
    count=True,
    help="Write more to standard error: -v progress, -vv everything, that of libraries too.",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="What standard error gets: lines of text, or one JSON object a line.",
)
@click.pass_context
def main(ctx: click.Context, verbose: int, log_format: voice.Format) -> None:
    """Learn to predict clicks while they happen.

    \b
    stream-ctr demo                                   everything on this machine, in about a minute
    stream-ctr init log.csv > my.toml                 a configuration for a log of your own
    stream-ctr run --topic clicks                     learn from Kafka
    stream-ctr run --source clicks.jsonl --until-end  learn from a log, without a broker
    stream-ctr top --state state                      watch a run
    stream-ctr subscribe --state state                follow the snapshots that a run publishes
    stream-ctr serve --state state                    predict over HTTP with the newest one

    Exit codes: 0 success, 1 out of memory, 2 usage, 3 configuration, 4 broker, 5 the data policy
    stopped the run or nothing may be published, 6 no valid snapshot.
    """
    ctx.with_resource(voice.speaking(log_format, verbose=verbose))
    if launched.number("WORLD_SIZE") > 1 and ctx.invoked_subcommand != "run":
        raise click.UsageError(
            f"torchrun has started {launched.number('WORLD_SIZE')} processes of "
            f"`stream-ctr {ctx.invoked_subcommand}`, and only `run` shares its work among several: "
            "start it without torchrun"
        )
    # At exit the interpreter looks for cycles among all objects, which takes half a second after
    # the imports of a run.
    atexit.register(gc.freeze)


# -- run -----------------------------------------------------------------------------------------


@main.command()
@click.option("--topic", help="Topic with impressions and clicks.  [default: clicks]")
@click.option("--click-topic", help="A second topic that holds the clicks.")
@click.option(
    "--client",
    "reader",
    type=click.Choice(["kafka-python", "confluent"]),
    help="The library that reads from Kafka; confluent is librdkafka "
    "(pip install 'stream-ctr[confluent]').  [default: kafka-python]",
)
@click.option(
    "--source",
    "sources",
    multiple=True,
    type=GivenPath(),
    help="Read logs instead of a topic: a file, a directory, a quoted pattern, or - for standard "
    "input; given again, other logs after them.",
)
@click.option(
    "--keep-open",
    is_flag=True,
    help="At the end of the input, keep label windows open for the log or topic that follows.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME",
    help="The model to learn and publish, see `stream-ctr models`, or package.module:Class; given "
    "again, additional models on the same examples. `blend` mixes those that follow.  "
    "[default: blend]",
)
@log_options
@SPAN_OPTION
@settings_options()
@click.option(
    "--state",
    type=GivenPath(file_okay=False),
    default=Path("state"),
    show_default=True,
    help="Directory for everything that the run writes; an existing one is resumed.",
)
@click.option(
    "--from",
    "begin_from",
    type=click.Path(path_type=Path),
    metavar="SNAPSHOT",
    help="Begin a new state with the weights of a snapshot, or of the newest one in another state "
    "directory; the options may change its configuration.",
)
@click.option(
    "--until-end",
    is_flag=True,
    help="Stop at the end that the topic has now. (A --source always ends.)",
)
@click.option(
    "--take-over",
    is_flag=True,
    help="Take the directory from another run that is frozen, or whose host is gone; with a copy "
    "of a directory, leave behind what the other copy published.",
)
@REPLACE_RUN_OPTION
@click.option(
    "--device",
    metavar="[auto|cpu|cuda|cuda:N]",
    callback=lambda context, option, name: _device(name),
    help="Where the table and the network live.  [default: auto]",
)
@HTTP_OPTION
@TOKEN_OPTION
@click.option(
    "--predictions",
    type=GivenPath(file_okay=False),
    help="Write the predictions of every example to Parquet files in this directory.",
)
@click.option(
    "--profile",
    is_flag=True,
    help="Print at the end where the time of an event went, and what bounds the run.",
)
def run(
    *,
    topic: str | None,
    click_topic: str | None,
    reader: str | None,
    sources: tuple[Path, ...],
    keep_open: bool,
    models: tuple[str, ...],
    log_format: LogFormat,
    span: timedelta,
    settings: Settings,
    state: Path,
    begin_from: Path | None,
    until_end: bool,
    take_over: bool,
    replace_run: str | None,
    device: str | None,
    http_address: str | None,
    http_token_file: Path | None,
    predictions: Path | None,
    profile: bool,
) -> None:
    """Learn from impressions and clicks; report, snapshot, publish.

    \b
    stream-ctr run --topic clicks --state state
    stream-ctr run --topic impressions --click-topic clicks --config my.toml
    stream-ctr run --source day_0.tsv --format criteo --config configs/criteo.toml
    stream-ctr run --source mon.jsonl --source tue.jsonl --keep-open --state state
    stream-ctr run --topic clicks --model deepfm --model fm --model lr
    stream-ctr run --topic clicks --from state --state larger -X model.table_bits=22
    stream-ctr run --topic clicks --http 127.0.0.1:9100
    """
    from stream_ctr.cli import runs
    from stream_ctr.cli.client import connector_errors
    from stream_ctr.cli.layout import log_layout
    from stream_ctr.cli.start import Begun, Loaded, Start
    from stream_ctr.train import stage_timer

    if sources and (topic or click_topic):
        raise _logs_and_topic(sources, topic, click_topic, state)
    if replace_run and sources:
        raise click.UsageError("--replace-run is for the snapshot topic, and a --source has none")
    start = Start(
        settings,
        _keys_of_run(models, device, http_address, http_token_file),
        {"topic": topic, "click_topic": click_topic, "client": reader},
        state,
        begin_from,
        take_over,
    )

    def learn(begun: Begun, loaded: Loaded, others: runs.Others | None) -> None:
        common: dict[str, Any] = {
            "keep_open": keep_open,
            "beginning": begun.beginning,
            "predictions": predictions,
            "registry": loaded.registry,
            "others": others,
        }
        config = loaded.config
        if sources:
            logs = log_format.open_all(sources, span=span, layout=log_layout(config))
            notes = [note for log in logs for note in log.notes]
            print_notes(notes)
            report = runs.train_on_logs(logs, config, begun.lease, **common)
            print_notes([note for log in logs for note in log.notes if note not in notes])
        else:
            with connector_errors():
                report = runs.train_on_kafka(
                    loaded.client,
                    config,
                    begun.lease,
                    until_end=until_end,
                    replace_run=replace_run,
                    take_over=take_over,
                    **common,
                )
        if profile and report:
            click.echo(stage_timer.table(msgspec.to_builtins(report.profile)))
        if report:
            runs.require_published(report, kept_open=keep_open)

    if launched.by_torchrun():
        from stream_ctr.cli.ranks import run_on_ranks

        run_on_ranks(start, learn, _options_in_common())
        return
    with start.open() as begun:
        learn(begun, start.load(begun.kept), None)


def _keys_of_run(
    models: Sequence[str],
    device: str | None,
    http_address: str | None,
    http_token_file: Path | None,
) -> tuple[str, ...]:
    """Return the keys of the configuration that options of `run` set, as pairs of -X."""
    given: dict[str, object] = {}
    if models:
        given |= {"model.name": models[0], "model.beside": ",".join(models[1:])}
    if device:
        given["learn.device"] = device
    if http_address is not None:
        given["http.address"] = http_address
    if http_token_file:
        given["http.token_file"] = http_token_file
    return tuple(f"{name}={value}" for name, value in given.items())


def _options_in_common() -> dict[str, str]:
    """Return the options of the command that all ranks must share, but for the configuration's."""
    parameters = click.get_current_context().params
    apart = {"extra", "config_path", "kafka_config"}
    return {
        f"--{name.replace('_', '-')}": str(value)
        for name, value in parameters.items()
        if name not in apart
    }


def _logs_and_topic(
    sources: Sequence[Path], topic: str | None, click_topic: str | None, state: Path
) -> click.UsageError:
    """Return the error that names the two commands for logs and then a topic."""
    logs = " ".join(f"--source {shlex.quote(str(source))}" for source in sources)
    topics = f"--topic {shlex.quote(topic or 'clicks')}"
    if click_topic:
        topics += f" --click-topic {shlex.quote(click_topic)}"
    directory = f"--state {shlex.quote(str(state))}"
    return click.UsageError(
        "a run reads logs or topics. To learn from logs first and then from topics, give two "
        f"commands:\n  stream-ctr run {logs} --keep-open {directory}\n"
        f"  stream-ctr run {topics} {directory}"
    )


# -- logs and streams ----------------------------------------------------------------------------


@main.command()
@click.argument("log", type=GivenPath())
@click.option("--topic", default="clicks", show_default=True)
@click.option(
    "--partitions",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Partitions of the topic, if it has to be created.",
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
    help="One event a record as JSON, or many as Arrow.",
)
@click.option(
    "--batch",
    type=click.IntRange(1, 1 << 20),
    default=1000,
    show_default=True,
    help="Most events in an Arrow record.",
)
@log_options
@SPAN_OPTION
@settings_options()
def replay(
    *,
    log: Path,
    topic: str,
    partitions: int,
    speed: str,
    wire: str,
    batch: int,
    log_format: LogFormat,
    span: timedelta,
    settings: Settings,
) -> None:
    """Produce the events of LOG to a topic, in event-time order.

    LOG is JSON lines, Parquet or Arrow of events, or a Criteo, Avazu or Open Bandit log.

    \b
    stream-ctr replay train.tsv --format criteo --topic clicks
    stream-ctr replay events.jsonl --speed 60
    stream-ctr replay events.parquet --wire arrow
    """
    from stream_ctr.cli.client import connector_errors
    from stream_ctr.cli.layout import log_layout
    from stream_ctr.cli.replay import produce
    from stream_ctr.connectors import kafka

    factor = _speed(speed)
    config, properties = settings.load()
    client = settings.client(config, properties)
    opened = log_format.open(log, span=span, layout=log_layout(config))
    with connector_errors():
        if kafka.ensure_topic(client, topic, partitions=partitions):
            plural = "s" * (partitions > 1)
            voice.say(f"created topic {topic} with {partitions} partition{plural}")
        sink = kafka.KafkaSink(client)
        try:
            events_a_record = batch if wire == "arrow" else None
            count, seconds = produce(opened, sink, topic, factor, events_a_record=events_a_record)
        finally:
            sink.close()
    print_notes(opened.notes)
    rate = count / max(seconds, 1e-9)
    voice.say(f"{count:,} events to {topic} in {seconds:.1f} s ({rate:,.0f}/s)")


def _device(name: str | None) -> str | None:
    from stream_ctr.config import DEVICES

    if name is not None and re.fullmatch(DEVICES, name) is None:
        raise click.BadParameter(
            f"{name!r} is not auto, cpu, cuda or the number of a GPU, as cuda:1"
        )
    return name


def _speed(text: str) -> float | None:
    """Return the multiple of real time, None for "max"."""
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
    "--drift",
    type=click.Choice(["none", "weights", "rate"]),
    default="none",
    show_default=True,
    help="What changes in the middle of the stream: weights draws every effect on the click "
    "probability anew, rate lets the click rate fall to a quarter.",
)
@click.option(
    "--out",
    type=GivenPath(dir_okay=False),
    required=True,
    help="The JSON lines file to write; - writes to standard output.",
)
def simulate(*, impressions: int, seed: int, drift: Drift, out: Path) -> None:
    """Write a seeded stream whose true click probabilities are known.

    So the best possible logloss is known too.

    \b
    stream-ctr simulate --impressions 200000 --seed 1 --out clicks.jsonl
    stream-ctr simulate --impressions 200000 --drift rate --out falling.jsonl
    stream-ctr simulate --impressions 200000 --out - | gzip > clicks.jsonl.gz
    """
    from stream_ctr.logs.simulate import Simulation

    started = time.monotonic()
    try:
        simulation = Simulation(impressions, seed=seed, drift=drift)
        if str(out) == "-":
            count = simulation.write_lines(sys.stdout.buffer.write)
            sys.stdout.buffer.flush()
        else:
            count = simulation.write_jsonl(out)
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise DataError(f"cannot write {out}: {reason}") from None
    seconds = time.monotonic() - started
    voice.say(f"{count:,} events ({impressions:,} impressions) to {out} in {seconds:.1f} s")


# -- models, configuration, broker, demo ---------------------------------------------------------


@main.command()
@ALLOW_MODEL_OPTION
@JSON_OPTION
def models(*, as_json: bool) -> None:
    """List the paper's nine systems: the name for `run --model`, and the paper's Table 1.

    Models that installed packages offer, and those of --allow-model, follow.

    \b
    stream-ctr models
    stream-ctr models --allow-model acme.nets:XDeepFM
    """
    from stream_ctr import extensions
    from stream_ctr.errors import ConfigError
    from stream_ctr.models import MODELS
    from stream_ctr.models.registered import system as find

    systems = dict(MODELS)
    for name in extensions.names():
        try:
            systems[name] = find(name)
        except ConfigError as error:
            voice.say(f"warning: {error}")
    if as_json:
        for name, system in systems.items():
            described = {
                "name": name,
                "title": system.title,
                "pretraining": system.pretraining,
                "high_order": system.high_order,
                "low_order": system.low_order,
                "engineering": system.engineering,
                "says": system.says,
            }
            click.echo(json.dumps(described))
        return
    heads = (
        "name",
        "in the paper",
        "no pre-training",
        "high-order",
        "low-order",
        "no feature engineering",
        "",
    )
    rows: list[tuple[str, ...]] = [heads]
    for name, system in systems.items():
        properties = (
            not system.pretraining,
            system.high_order,
            system.low_order,
            not system.engineering,
        )
        marks = ("yes" if has else "-" for has in properties)
        rows.append((name, system.title, *marks, system.says))
    for line in aligned(rows):
        click.echo(line)
    click.echo(
        "\nblend, the default of `run`, mixes the models of a run and logistic regressions by FTRL."
    )


@main.command("config")
@settings_options()
@click.option(
    "--example",
    metavar="NAME",
    help="Print an example file instead: criteo, avazu, obd, demo, or events with every key.",
)
def show_config(*, settings: Settings, example: str | None) -> None:
    """Print the configuration in force as JSON: flags over environment over file over defaults.

    \b
    stream-ctr config -X learn.batch_size=1024
    stream-ctr config --example criteo > criteo.toml
    """
    from stream_ctr import config as configuration

    if example is not None:
        click.echo(configuration.example(example), nl=False)
        return
    config, properties = settings.load()
    settings.client(config, properties)  # a wrong client property is an error here too
    click.echo(json.dumps(config.model_dump(mode="json"), indent=2))


@main.command()
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=9092,
    show_default=True,
    help="Port on loopback; 0 picks a free one.",
)
def broker(*, port: int) -> None:
    """Run the embedded Kafka-compatible broker until Ctrl-C. Not for production.

    It is Tansu, and holds its records in memory.
    """
    from stream_ctr.cli.interrupts import signals
    from stream_ctr.cli.runs import StopRequest
    from stream_ctr.connectors.embedded import EmbeddedBroker
    from stream_ctr.connectors.errors import EmbeddedUnavailable

    try:
        with EmbeddedBroker(port=port or None) as embedded:
            voice.say(
                f"listening on {embedded.bootstrap_servers}; its records are gone when it stops"
            )
            stop = StopRequest()
            with signals(stop):
                while not stop.requested:
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
    type=GivenPath(file_okay=False),
    help="Where to keep it.  [default: a temporary directory, which is removed at the end]",
)
@extra_option("Any key of the configuration such as learn.batch_size.")
@CONFIG_OPTION
def demo(
    *,
    impressions: int,
    seed: int,
    state: Path | None,
    config_path: Path | None,
    extra: tuple[str, ...],
) -> None:
    """Run the whole system on this machine, in about a minute on two cores.

    An embedded broker, a simulated stream, the trainer and a subscriber.
    """
    import tempfile

    from stream_ctr.cli.demo import run_demo

    # A demo is short: report often enough to be watched.
    often = {"schedule": {"report_every": "1s", "snapshot_every": "10s"}}
    config, properties = Settings(config_path=config_path, extra=extra).load(base=often)
    if properties:
        raise click.UsageError(
            f"the demo brings its own broker and has no use for {', '.join(properties)}"
        )
    if state:
        run_demo(config, impressions=impressions, seed=seed, state=state)
        return
    with tempfile.TemporaryDirectory(prefix="stream-ctr-demo-") as temporary:
        run_demo(config, impressions=impressions, seed=seed, state=Path(temporary), keep=False)


_COMMANDS = (
    *(init, doctor, subscribe, serve, score, export, compact, dashboard, top, paper, snapshots),
    dlq,
)
for _command in _COMMANDS:
    main.add_command(_command)
