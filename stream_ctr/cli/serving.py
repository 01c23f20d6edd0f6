"""The commands `subscribe` and `score`: follow what a run publishes, and predict with it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from stream_ctr.cli import voice
from stream_ctr.cli.options import (
    ALLOW_MODEL_OPTION,
    CONFIG_OPTION,
    JSON_OPTION,
    MODEL_OPTION,
    PUBLIC_KEY_OPTION,
    RUNTIME_OPTION,
    Command,
    GivenPath,
    GivenPlace,
    LogFormat,
    Settings,
    load_config,
    log_options,
    settings_options,
    stacked,
)
from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.messages import printable

if TYPE_CHECKING:
    from stream_ctr.events.feature_rows import OnInvalid
    from stream_ctr.learn.runtimes import Runtime
    from stream_ctr.snapshots.delta_sources import DeltaSource
    from stream_ctr.snapshots.followed_deltas import AppliedDelta
    from stream_ctr.snapshots.pointer import Pointer
    from stream_ctr.snapshots.pointer_sources import PointerSource
    from stream_ctr.snapshots.remote import Downloads
    from stream_ctr.snapshots.subscriber import Follow, Subscriber

_PATH = "{path}"


@dataclass(frozen=True, slots=True)
class Following:
    """What the options say about the pointers and the run that a subscriber follows."""

    state: Path | str | None
    topic: str | None
    snapshots: Path | str | None
    model_name: str
    model: str | None
    run: str | None
    run_file: Path | None
    follow: Follow
    runtime: Runtime | None
    public_key: Path | None
    deltas: bool
    cache: Path | None

    def require_one_source(self) -> None:
        """Raise a usage error for options that contradict each other."""
        if self.state and self.topic:
            raise click.UsageError("--state and --topic are two ways to follow; give one")
        if self.state and self.snapshots:
            raise click.UsageError(
                "--snapshots is for a topic; --state has its snapshots beside it"
            )

    def subscriber(
        self, settings: Settings, stack: contextlib.ExitStack, **options: Any
    ) -> Subscriber:
        """Return the subscriber; leaving `stack` closes the clients that it reads topics with."""
        from stream_ctr.snapshots.subscriber import Subscriber

        pointers = self.state or self._topic(settings, stack)
        deltas = options.pop("deltas", True) and self.deltas
        return Subscriber(
            pointers,
            deltas=deltas if self.state else deltas and self._delta_topic(settings, stack),
            model=self.model,
            run=self.run,
            run_file=self.run_file,
            follow=self.follow,
            runtime=self.runtime,
            public_key=self.public_key,
            cache=self.cache,
            **options,
        )

    def _topic(self, settings: Settings, stack: contextlib.ExitStack) -> PointerSource:
        from stream_ctr.cli.client import connector_errors
        from stream_ctr.connectors import kafka
        from stream_ctr.snapshots.places import local_directory
        from stream_ctr.snapshots.pointer_sources import TopicPointers
        from stream_ctr.snapshots.signing import verifier

        config, properties = settings.load()
        client = settings.client(config, properties)
        stack.enter_context(connector_errors())
        reader = kafka.PointerReader(client, self.topic or config.snapshots.topic)
        stack.callback(reader.close)
        return TopicPointers(
            reader,
            model_name=self.model_name,
            snapshots=local_directory(self.snapshots) if self.snapshots else None,
            download=self._downloads(client),
            signature=verifier(self.public_key),
        )

    def _downloads(self, client: dict[str, object]) -> Downloads:
        """Return what downloads the snapshots that pointers name and this machine does not have."""
        from functools import partial

        from stream_ctr.connectors import kafka
        from stream_ctr.learn.runtimes import choose_runtime
        from stream_ctr.snapshots.cache import SnapshotCache, default_cache
        from stream_ctr.snapshots.places import open_place
        from stream_ctr.snapshots.remote import Downloads, served_files
        from stream_ctr.snapshots.signing import verifier

        cache = SnapshotCache(
            self.cache or default_cache(),
            served_files(self.model, choose_runtime(self.runtime)),
            signature=verifier(self.public_key),
        )
        place = open_place(self.snapshots) if self.snapshots else None
        return Downloads(cache, place=place, scan=partial(kafka.TopicScan, client))

    def _delta_topic(self, settings: Settings, stack: contextlib.ExitStack) -> DeltaSource | bool:
        """Return the deltas on the topic that the configuration names, False without one."""
        from stream_ctr.connectors import kafka
        from stream_ctr.connectors.errors import KafkaTopicMissing
        from stream_ctr.snapshots.delta_sources import TopicDeltas
        from stream_ctr.snapshots.signing import verifier

        config, properties = settings.load()
        topic = config.snapshots.delta_topic
        if not topic:
            return False
        try:
            reader = kafka.RecordFollower(settings.client(config, properties), topic)
        except KafkaTopicMissing:
            voice.say(f"there is no topic {topic}: only snapshots are followed")
            return False
        stack.callback(reader.close)
        return TopicDeltas(reader, model_name=self.model_name, signature=verifier(self.public_key))


def following_options(command: Command) -> Command:
    """Add the options about what is followed, and pass them on as `following`."""
    options = stacked(
        click.option(
            "--state",
            type=GivenPlace(file_okay=False),
            help="Follow the state directory of a run, or a copy of it at a URL.",
        ),
        click.option(
            "--topic", help="Follow a snapshot topic instead.  [default: stream-ctr.snapshots]"
        ),
        click.option(
            "--snapshots",
            type=GivenPlace(file_okay=False),
            help="With --topic: the folder that holds the snapshots on this machine, or the URL of "
            "a run's copy.  [default: those of the pointer]",
        ),
        click.option(
            "--model-name",
            default="default",
            show_default=True,
            help="The run's snapshots.model_name, the key of its pointers on the topic.",
        ),
        MODEL_OPTION,
        ALLOW_MODEL_OPTION,
        click.option(
            "--run", metavar="ID", help="Follow this run only.  [default: the first one loaded]"
        ),
        click.option(
            "--run-file",
            type=click.Path(path_type=Path, dir_okay=False),
            help="Keep the id of the followed run in this file, so that a restart stays on it.",
        ),
        click.option(
            "--follow",
            type=click.Choice(["never", "replace"]),
            default="never",
            show_default=True,
            help="Whether to change to a run that was told to replace the followed one.",
        ),
        RUNTIME_OPTION,
        PUBLIC_KEY_OPTION,
        click.option(
            "--deltas/--no-deltas",
            default=True,
            show_default=True,
            help="Follow the deltas between snapshots, where the run writes them.",
        ),
        click.option(
            "--cache",
            type=GivenPath(file_okay=False),
            metavar="DIR",
            help="Keep downloaded snapshots here.  [default: stream-ctr/snapshots in the user's "
            "cache directory]",
        ),
    )
    names = [field.name for field in dataclasses.fields(Following)]

    @wraps(command)
    def called(*args: Any, **given: Any) -> Any:
        following = Following(**{name: given.pop(name) for name in names})
        return command(*args, following=following, **given)

    return options(called)


@click.command()
@following_options
@click.option(
    "--once",
    is_flag=True,
    help="Load one snapshot and stop; exit code 6 if there is none in time.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="Seconds that --once waits.",
)
@JSON_OPTION
@click.option(
    "--exec",
    "command",
    metavar="COMMAND",
    help="Run this for each snapshot, without a shell; the word {path} stands for its directory. "
    "Each snapshot is then loaded, and no deltas are followed.",
)
@settings_options()
def subscribe(
    *,
    following: Following,
    once: bool,
    timeout: float,
    as_json: bool,
    command: str | None,
    settings: Settings,
) -> None:
    """Follow published snapshots and the deltas between them: verify and load, and print a line.

    A line of --json has the kind "snapshot" or "delta", and under "freshness" the seconds from the
    newest event, from the end of the label windows, from learning, and from the copy, until the
    model had it.

    \b
    stream-ctr subscribe --state state
    stream-ctr subscribe --bootstrap-servers localhost:9092 --json --exec 'reload-model {path}'
    stream-ctr subscribe --bootstrap-servers localhost:9092 --run-file served.run
    stream-ctr subscribe --bootstrap-servers localhost:9092 --snapshots /mnt/state/snapshots
    """
    from stream_ctr.cli.interrupts import signals

    hook = _hook(command)
    following.require_one_source()
    with contextlib.ExitStack() as stack:
        subscriber = following.subscriber(
            settings,
            stack,
            deltas=not hook and not once,
            on_delta=lambda applied: _print(_delta_line(applied, as_json=as_json)),
        )
        stack.enter_context(signals(subscriber.close))
        _follow(subscriber, once=once, timeout=timeout, as_json=as_json, hook=hook)


def _hook(command: str | None) -> list[str]:
    """Split the command of --exec into words, and check that it can be run safely."""
    try:
        hook = shlex.split(command or "")
    except ValueError as error:
        raise click.BadParameter(
            f"the command of --exec cannot be split into words: {error}"
        ) from None
    if hook and not shutil.which(hook[0]):
        raise click.BadParameter(f"there is no program {hook[0]!r} for --exec")
    if any(_PATH in word and word != _PATH for word in hook):
        raise click.BadParameter(
            f"{_PATH} must be a word of its own in the command of --exec: within a text that a "
            "shell or another interpreter reads, a path could be a command. There, use the "
            "environment variable STREAM_CTR_SNAPSHOT, as in "
            '--exec \'sh -c "reload \\"$STREAM_CTR_SNAPSHOT\\""\''
        )
    return hook


def _follow(
    subscriber: Subscriber, *, once: bool, timeout: float, as_json: bool, hook: Sequence[str]
) -> None:
    while not subscriber.closing:
        pointer = subscriber.next(timeout if once else 1.0)
        if pointer:
            path = str(subscriber.path)
            _print(_snapshot_line(pointer, subscriber, as_json=as_json))
            if hook:
                _run_hook(hook, pointer, path)
        if once:
            if pointer is None:
                reason = f": {subscriber.refusal}" if subscriber.refusal else ""
                raise SnapshotError(f"no valid snapshot was published within {timeout:g} s{reason}")
            return


def _print(line: str) -> None:
    click.echo(line)
    sys.stdout.flush()


def _snapshot_line(pointer: Pointer, subscriber: Subscriber, *, as_json: bool) -> str:
    path, adopted = str(subscriber.path), subscriber.adopted
    delay = round(time.time() - pointer.created_ms / 1000, 3)
    if as_json:
        document = {
            "kind": "snapshot",
            **msgspec.to_builtins(pointer),
            "path": path,
            "verified": not adopted,
            "adopted": adopted,
            "delay_seconds": delay,
            "freshness": msgspec.to_builtins(subscriber.delays),
        }
        return json.dumps(document)
    if adopted:
        return (
            f"{pointer.snapshot}  {pointer.examples:,} examples  "
            "not loaded, because deltas have led past it"
        )
    return (
        f"{pointer.snapshot}  {pointer.examples:,} examples  "
        f"loaded {delay:.2f} s after it was taken  {printable(path, 1000)}"
    )


def _delta_line(applied: AppliedDelta, *, as_json: bool) -> str:
    header, delays = applied.header, applied.delays
    rows = sum(header.rows.values())
    if as_json:
        document = {
            "kind": "delta",
            "run": header.run,
            "rank": msgspec.to_builtins(header.rank),
            "base": header.base,
            "rows": rows,
            "bytes": header.payload_bytes,
            "examples": header.examples,
            "apply_seconds": round(applied.seconds, 4),
            "freshness": msgspec.to_builtins(delays),
        }
        return json.dumps(document)
    if delays.closed_seconds is None:
        age = f"{delays.copied_seconds:.2f} s after it was taken"
    else:
        age = f"{delays.closed_seconds:.2f} s after its label windows closed"
    return (
        f"{header.rank.name}  {header.examples:,} examples  {rows:,} rows, "
        f"{header.payload_bytes / 1e6:.1f} MB  applied {age}"
    )


def _run_hook(hook: Sequence[str], pointer: Pointer, path: str) -> None:
    arguments = [path if word == _PATH else word for word in hook]
    environment = {
        **os.environ,
        "STREAM_CTR_SNAPSHOT": path,
        "STREAM_CTR_SNAPSHOT_ID": pointer.snapshot,
    }
    try:
        done = subprocess.run(arguments, env=environment, check=False)
    except OSError as error:
        raise ConfigError(f"cannot run {arguments[0]!r} of --exec: {error.strerror}") from None
    if done.returncode:
        voice.say(
            f"warning: {hook[0]!r} ended with status {done.returncode} for {pointer.snapshot}"
        )


@click.command()
@click.argument("log", metavar="EVENTS", type=GivenPath())
@click.option(
    "--snapshot",
    "path",
    type=GivenPath(file_okay=False),
    required=True,
    help="A snapshot directory, or a state directory for its newest.",
)
@MODEL_OPTION
@ALLOW_MODEL_OPTION
@PUBLIC_KEY_OPTION
@RUNTIME_OPTION
@click.option(
    "--on-invalid",
    type=click.Choice(["error", "score"]),
    default="error",
    show_default=True,
    help="Stop at features that the model does not know or training rejects, or score them as "
    "missing and count them.",
)
@JSON_OPTION
@CONFIG_OPTION
@log_options
def score(
    *,
    log: Path,
    path: Path,
    model: str | None,
    public_key: Path | None,
    runtime: Runtime | None,
    on_invalid: OnInvalid,
    as_json: bool,
    config_path: Path | None,
    log_format: LogFormat,
) -> None:
    """Print the click probability of each impression in EVENTS: its id, a tab, the probability.

    A table is read by the columns that --config names, as `run` reads it, but needs no label,
    click, time or id. Records that are not events are skipped with a warning. If none can be
    scored, the exit code is 5.

    \b
    stream-ctr score --snapshot state --config my.toml new.csv
    stream-ctr score --snapshot state/snapshots/00000003-20250101T101500Z events.jsonl
    """
    from stream_ctr.cli.export import chosen_snapshot
    from stream_ctr.cli.layout import log_layout
    from stream_ctr.cli.scores import Scores
    from stream_ctr.snapshots.scorer import Scorer
    from stream_ctr.snapshots.signing import verifier

    signature = verifier(public_key)
    scorer = Scorer(
        chosen_snapshot(path, signature),
        model=model,
        signature=signature,
        runtime=runtime,
        on_invalid=on_invalid,
    )
    config, _ = load_config(config_path, ())
    layout = dataclasses.replace(log_layout(config), fields=scorer.fields, only_scored=True)
    scores = Scores(scorer)
    for batch in log_format.open(log, layout=layout).batches():
        ids, probabilities = scores.of_records(batch.value)
        if ids:
            click.echo("\n".join(_score_lines(ids, probabilities, as_json=as_json)))
    for warning in scores.warnings():
        voice.say(f"warning: {warning}")
    scores.require_any()


def _score_lines(
    ids: Sequence[str], probabilities: Sequence[float], *, as_json: bool
) -> Iterator[str]:
    for impression_id, probability in zip(ids, probabilities, strict=True):
        if as_json:
            yield json.dumps({"impression_id": impression_id, "probability": probability})
        else:
            yield f"{printable(impression_id, 1000)}\t{probability!r}"
