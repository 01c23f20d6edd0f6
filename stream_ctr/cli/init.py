"""`stream-ctr init`: write a configuration for a file that it has never seen."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import click

from stream_ctr.cli import voice
from stream_ctr.cli.options import extra_option, load_config
from stream_ctr.cli.toml_text import listed, quoted
from stream_ctr.messages import one_line

if TYPE_CHECKING:
    from stream_ctr.logs.facts import Sample
    from stream_ctr.logs.files import LogFile
    from stream_ctr.logs.guess import LayoutGuess
    from stream_ctr.logs.layout import Layout
    from stream_ctr.logs.tables import Table

_SHOWN_EVENTS = 3
_SHOWN_CHARACTERS = 500
_ROLES = ("time", "id", "label", "kind", "click_time", "features")
_DEFAULT_NAMES = {"id": "impression_id"}


@click.command()
@click.argument("file")
@click.option(
    "--format",
    "format_name",
    metavar="NAME",
    help="csv, tsv, json, parquet or arrow.  [default: sniffed]",
)
@extra_option(
    "What you know better: a key of [input] or [input.columns], as input.columns.label=y."
)
def init(*, file: str, format_name: str | None, extra: tuple[str, ...]) -> None:
    """Guess the columns of FILE, and write a configuration for `run --config`.

    FILE is CSV, TSV, Parquet, Arrow, JSON lines or a JSON array, compressed or not; of a directory
    or a pattern, the first file is read. The configuration goes to standard output; what was
    guessed and why, and three decoded rows, go to standard error.

    \b
    stream-ctr init labelled.csv > my.toml
    stream-ctr init 'logs/*.parquet' -X input.columns.label=bought > my.toml
    """
    from stream_ctr.cli.layout import log_layout
    from stream_ctr.logs.facts import read_sample
    from stream_ctr.logs.files import find_files
    from stream_ctr.logs.guess import guess_layout

    config, properties = load_config(None, extra)
    if properties:
        raise click.UsageError(f"init has no use for {', '.join(properties)}")
    given = log_layout(config)
    source = find_files([file])[0]
    table, layout = _table(source, format_name, given)
    sample = read_sample(table)
    guess = guess_layout(sample, given.columns)
    layout = _guessed(layout, guess)
    for line in _account(table, sample, layout, guess):
        voice.say(line)
    for line in _first_events(source, format_name, layout):
        voice.say(line)
    click.echo("\n".join(_toml(file, format_name, table, layout, guess)))


def _table(source: LogFile, format: str | None, layout: Layout) -> tuple[Table, Layout]:
    """Return the file as a table, and the layout with the names of its columns."""
    from dataclasses import replace

    from stream_ctr.logs.csv_table import CsvTable, has_header, made_names
    from stream_ctr.logs.open import open_table

    table = open_table(source.path, format=format, layout=layout, name=source.name)
    if isinstance(table, CsvTable):
        layout = replace(layout, delimiter=table.delimiter)
        if not (layout.column_names or has_header(table)):
            layout = replace(layout, column_names=made_names(table))
            table = open_table(source.path, format=format, layout=layout, name=source.name)
    return table, layout


def _guessed(layout: Layout, guess: LayoutGuess) -> Layout:
    """Return the layout with all that was guessed."""
    from dataclasses import replace

    zone = layout.times.zone or ("UTC" if guess.needs_zone else "")
    return replace(
        layout,
        columns=guess.columns,
        fields=tuple(found.field for found in guess.fields if found.field),
        times=replace(layout.times, zone=zone),
    )


def _account(table: Table, sample: Sample, layout: Layout, guess: LayoutGuess) -> Iterator[str]:
    """Yield what was guessed and why, a line each."""
    what = table.format
    if layout.delimiter:
        what += f" with {_DELIMITER_NAMES.get(layout.delimiter, repr(layout.delimiter))}"
        what += ", no header" if layout.column_names else ""
    yield f"{table.name}: {what}; guessed from {sample.rows:,} rows"
    if sample.rejected.count:
        line, reason = min(sample.rejected.first)
        yield f"  {sample.rejected.count:,} rows cannot be read; line {line}: {reason}"
    for role in _ROLES:
        if name := getattr(guess.columns, role):
            yield f"  {role:<12} {one_line(name, 60)}: {guess.reasons[role]}"
    if not guess.columns.time:
        yield "  time         none: times are spread over --span, in the order of the rows"
    if not guess.columns.id:
        yield "  id           none: ids are made from the file and the number of the row"
    if guess.needs_zone and layout.times.zone == "UTC":
        yield "  time_zone    UTC: the times name none; set input.time_zone if it is another"
    for found in guess.fields:
        kind = found.field.kind if found.field else "left out"
        yield f"  {kind:<12} {one_line(found.name, 60)}: {found.reason}"


_DELIMITER_NAMES: Mapping[str, str] = {
    ",": "commas",
    ";": "semicolons",
    "\t": "tabs",
    "|": "bars",
}


def _first_events(source: LogFile, format: str | None, layout: Layout) -> Iterator[str]:
    """Yield the first events as the run will see them."""
    from datetime import timedelta

    from stream_ctr.logs.open import open_log

    log = open_log(source.path, format=format, layout=layout, span=timedelta(days=7))
    values: list[bytes] = []
    for batch in log.batches():
        values += batch.value[: _SHOWN_EVENTS - len(values)].to_pylist()
        if len(values) >= _SHOWN_EVENTS:
            break
    yield "The first events:"
    for value in values:
        yield f"  {one_line(value.decode(), _SHOWN_CHARACTERS)}"


def _toml(
    file: str, format: str | None, table: Table, layout: Layout, guess: LayoutGuess
) -> Iterator[str]:
    """Yield the lines of the configuration."""
    option = f" --format {format}" if format else ""
    yield f"# Guessed from {one_line(file, 80)} by `stream-ctr init`. Check it, and then:"
    yield "#"
    yield f"#   stream-ctr run --config my.toml --source {shlex.quote(one_line(file, 80))}{option}"
    yield "#"
    yield "# `stream-ctr config --example events` shows every other key."
    yield ""
    yield "[input]"
    if layout.delimiter:
        yield f"delimiter = {quoted(layout.delimiter)}"
    if layout.column_names:
        yield f"column_names = {listed(layout.column_names)}    # the file has no header"
    if layout.times.unit:
        yield f"time_unit = {quoted(layout.times.unit)}"
    if layout.times.zone:
        remark = "    # the times name no zone: is it this one?" if guess.needs_zone else ""
        yield f"time_zone = {quoted(layout.times.zone)}{remark}"
    yield ""
    yield "[input.columns]"
    for role in _ROLES:
        if name := getattr(layout.columns, role):
            yield f"{role} = {quoted(name)}    # {one_line(guess.reasons[role])}"
    yield ""
    yield "[features]"
    for kind in ("categorical", "numeric"):
        yield f"{kind} = ["
        for found in guess.fields:
            if found.field and found.field.kind == kind:
                yield f"    {quoted(found.name)},    # {one_line(found.reason)}"
        yield "]"
    left_out = [found for found in guess.fields if not found.field]
    if left_out:
        yield "# Left out:"
    for found in left_out:
        yield f"#   {one_line(found.name)}: {one_line(found.reason)}"
