"""Options that several commands share, and the configuration that they add up to.

Only what `--help` needs is imported at the top; a command imports what it runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stream_ctr.cli import voice
from stream_ctr.errors import ConfigError
from stream_ctr.messages import is_utf8, nearest, one_line

if TYPE_CHECKING:
    from stream_ctr.config import Config
    from stream_ctr.logs.log import Log

Command = Callable[..., Any]


class GivenPath(click.Path):
    """A path in UTF-8, which Arrow's files need.

    The empty text is none, although Python takes it for the working directory.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty; the working directory is '.'", param, ctx)
        if not is_utf8(os.fspath(value)):
            self.fail(f"the path {one_line(value)} is not UTF-8", param, ctx)
        return super().convert(value, param, ctx)


class GivenPlace(GivenPath):
    """A URL, which stays a text, or a path as of `GivenPath`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and "://" in value:
            return value
        return super().convert(value, param, ctx)


# A name that resembles a key of the configuration this much is a misspelt key. No Kafka client
# property does.
MISSPELT = 0.75

CONFIG_OPTION = click.option(
    "--config",
    "config_path",
    type=GivenPath(),
    help="A TOML file; `stream-ctr config --example events` prints one with every key.",
)
JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print a JSON object a line.")
PUBLIC_KEY_OPTION = click.option(
    "--public-key",
    type=GivenPath(),
    help="A PEM file; snapshots without a signature by its private key are refused.",
)
REPLACE_RUN_OPTION = click.option(
    "--replace-run",
    metavar="ID",
    callback=lambda context, option, text: _run_id(text),
    help="Replace this run on the snapshot topic, if it holds snapshots.model_name there.",
)


MODEL_OPTION = click.option(
    "--model", metavar="NAME", help="An additional model of the run.  [default: the published one]"
)
RUNTIME_OPTION = click.option(
    "--runtime",
    type=click.Choice(["torch", "onnx"]),
    help="The library that computes the network.  [default: torch where it is installed, else "
    "onnx]",
)


def _run_id(text: str | None) -> str | None:
    from stream_ctr.snapshots.lineage import require_run_id

    try:
        return require_run_id(text) if text is not None else None
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _register(context: click.Context, option: click.Parameter, paths: tuple[str, ...]) -> None:
    if paths:
        from stream_ctr.models.registered import register_model

        for path in paths:
            register_model(path)


ALLOW_MODEL_OPTION = click.option(
    "--allow-model",
    multiple=True,
    metavar="PACKAGE.MODULE:CLASS",
    expose_value=False,
    callback=_register,
    help="Import this class, and serve snapshots of it. A name in a snapshot is never imported.",
)


def extra_option(kinds: str) -> Callable[[Command], Command]:
    """Return the option -X for these `kinds` of keys."""
    return click.option("-X", "extra", multiple=True, metavar="KEY=VALUE", help=kinds)


def stacked(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Return a decorator that applies `options`, the first of which stands first in the help."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@dataclass(frozen=True, slots=True)
class Settings:
    """What the options about the configuration and the Kafka client say."""

    bootstrap_servers: str | None = None
    config_path: Path | None = None
    kafka_config: Path | None = None
    extra: tuple[str, ...] = ()

    def load(
        self,
        *,
        base: Mapping[str, Any] | None = None,
        extra: Iterable[str] = (),
        **inputs: str | None,
    ) -> tuple[Config, dict[str, str]]:
        """Return the configuration in force, and the Kafka client properties among -X.

        `base` lies below all other layers, `extra` are further -X pairs, `inputs` are keys of the
        section `input`.
        """
        given = {"bootstrap_servers": self.bootstrap_servers, **inputs}
        return load_config(self.config_path, (*self.extra, *extra), base=base, inputs=given)

    def load_client(self, **inputs: str | None) -> tuple[Config, dict[str, object]]:
        """Return the configuration and the client, where -X names client properties only."""
        given = {"bootstrap_servers": self.bootstrap_servers, **inputs}
        config, _ = load_config(self.config_path, (), inputs=given)
        return config, self.client(config, dict(key_values(self.extra)))

    def client(self, config: Config, properties: Mapping[str, str]) -> dict[str, object]:
        """Return the options of the Kafka client. Raises `ConfigError` for a wrong property."""
        from stream_ctr.cli.client import client_options

        return client_options(config.input.bootstrap_servers, self.kafka_config, properties)

    def registry(self, properties: Mapping[str, str]) -> dict[str, str]:
        """Return the client properties that are those of a schema registry."""
        from stream_ctr.cli.client import connector_errors
        from stream_ctr.cli.registry import registry_properties

        with connector_errors():
            return registry_properties(self.kafka_config, properties)


EVERY_KEY = "A Kafka client property, or any key of the configuration such as learn.batch_size."


def settings_options(kinds: str = EVERY_KEY) -> Callable[[Command], Command]:
    """Return a decorator that adds these options and passes them on as `settings`."""
    options = stacked(
        click.option(
            "--bootstrap-servers",
            metavar="HOST:PORT,...",
            help="Kafka brokers.  [default: localhost:9092]",
        ),
        CONFIG_OPTION,
        click.option(
            "--kafka-config",
            type=GivenPath(),
            help="A Java client.properties file.",
        ),
        extra_option(kinds),
    )

    def decorate(command: Command) -> Command:
        @wraps(command)
        def called(
            *args: Any,
            bootstrap_servers: str | None,
            config_path: Path | None,
            kafka_config: Path | None,
            extra: tuple[str, ...],
            **options: Any,
        ) -> Any:
            settings = Settings(bootstrap_servers, config_path, kafka_config, extra)
            return command(*args, settings=settings, **options)

        return options(called)

    return decorate


@dataclass(frozen=True, slots=True)
class LogFormat:
    """The format of logs, None to detect it, the seed of what they lack, and files of clicks."""

    name: str | None = None
    seed: int = 0
    clicks: tuple[str, ...] = ()

    def open(self, path: Path, **options: Any) -> Log:
        """Open the log that `path` names. Raises a usage error when it names several files."""
        found = self.open_all([path], **options)
        if len(found) > 1:
            raise click.UsageError(f"{path} names {len(found)} files, and this command reads one")
        return found[0]

    def open_all(self, sources: Sequence[Path | str], **options: Any) -> list[Log]:
        """Open the logs that `sources` name, in order; see `open_logs`."""
        from stream_ctr.logs.files import NoSuchLog
        from stream_ctr.logs.open import open_logs

        given = {"clicks": self.clicks, "format": self.name, "seed": self.seed, **options}
        try:
            return open_logs(sources, **given)
        except NoSuchLog as error:
            raise click.UsageError(str(error)) from None


def _span(ctx: click.Context, option: click.Parameter, text: str) -> timedelta:
    from stream_ctr.config import duration

    try:
        return duration(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


SPAN_OPTION = click.option(
    "--span",
    default="7d",
    show_default=True,
    callback=_span,
    help="The event time that impressions of a log without times are spread over.",
)


def log_options(command: Command) -> Command:
    """Add the options about logs to a command, and pass them on as `log_format`."""
    options = stacked(
        click.option(
            "--format",
            "format_name",
            metavar="NAME",
            help="events, csv, tsv, json, parquet, arrow, criteo, avazu or obd.  [default: "
            "sniffed]",
        ),
        click.option(
            "--clicks",
            multiple=True,
            metavar="FILE",
            help="The clicks on the impressions of the log, in a file of their own.",
        ),
        click.option(
            "--log-seed",
            type=int,
            default=0,
            show_default=True,
            help="Seed for what the log lacks and replay draws.",
        ),
    )

    @wraps(command)
    def called(
        *args: Any, format_name: str | None, log_seed: int, clicks: tuple[str, ...], **given: Any
    ) -> Any:
        return command(*args, log_format=LogFormat(format_name, log_seed, clicks), **given)

    return options(called)


def load_config(
    config_path: Path | None,
    extra: Sequence[str],
    *,
    base: Mapping[str, Any] | None = None,
    inputs: Mapping[str, str | None] | None = None,
) -> tuple[Config, dict[str, str]]:
    """Return the configuration in force, and the Kafka client properties among `extra`.

    `inputs` are keys of the section `input`; None leaves a key to the other layers.
    """
    from stream_ctr import config

    given = {name: value for name, value in (inputs or {}).items() if value is not None}
    overrides: dict[str, Any] = {"input": given}
    properties: dict[str, str] = {}
    known = set(config.known_keys())
    for name, value in key_values(extra):
        if name in known:
            layer = config.nested(name, config.parse_text(name, value))
            overrides = config.merged(overrides, layer)
        elif name.partition(".")[0] in config.Config.model_fields:
            raise ConfigError(f"unknown key {name!r}{nearest(name, known)}")
        elif hint := nearest(name, known, cutoff=MISSPELT):
            raise ConfigError(f"unknown key {name!r}{hint}")
        else:
            properties[name] = value
    return config.load(config_path, overrides=overrides, base=base), properties


def key_values(pairs: Sequence[str]) -> list[tuple[str, str]]:
    """Split -X pairs. Raises a usage error for one without "="."""
    split: list[tuple[str, str]] = []
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise click.BadParameter(f"-X takes KEY=VALUE, got {_shown(pair)}")
        split.append((name, value))
    return split


def _shown(pair: str) -> str:
    """Return a -X without "=" for a message, unless it may be a password."""
    from stream_ctr import config

    known = pair in config.known_keys()
    return repr(pair) if known else 'a text without "=" (not shown: it may be a secret)'


def print_notes(notes: Sequence[str]) -> None:
    """Write notes to standard error."""
    for note in notes:
        voice.say(f"note: {note}")


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of cells under each other, two spaces apart.

    >>> aligned([["name", "n"], ["fm", "12"]])
    ['name  n', 'fm    12']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
