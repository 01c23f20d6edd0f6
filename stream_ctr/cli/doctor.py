"""The command `doctor`: look at everything that a run needs, before it runs.

Only what `--help` needs is imported at the top; the command imports what it runs.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stream_ctr.cli.options import (
    JSON_OPTION,
    GivenPath,
    LogFormat,
    Settings,
    log_options,
    settings_options,
)
from stream_ctr.errors import StreamCtrError

if TYPE_CHECKING:
    from stream_ctr.cli.checks import Finding, Records
    from stream_ctr.config import Config

_MARKS = {"ok": "ok     ", "warning": "warning", "error": "ERROR  "}
_COLORS = {"ok": "green", "warning": "yellow", "error": "red"}


@click.command()
@click.option("--topic", help="The topic of a run.  [default: input.topic]")
@click.option("--click-topic", help="The topic of its clicks, if they have one of their own.")
@click.option("--source", type=GivenPath(), help="A log to look at instead of topics.")
@click.option(
    "--state",
    type=GivenPath(file_okay=False),
    default="state",
    show_default=True,
    help="The state directory of the run. It need not exist.",
)
@click.option(
    "--records",
    type=click.IntRange(1, 1_000_000),
    default=5000,
    show_default=True,
    help="How many of the newest records to look at.",
)
@log_options
@settings_options()
@JSON_OPTION
def doctor(
    *,
    topic: str | None,
    click_topic: str | None,
    source: Path | None,
    state: Path,
    records: int,
    log_format: LogFormat,
    settings: Settings,
    as_json: bool,
) -> None:
    """Look at what a run needs, say what is wrong and what to do about it.

    It reads and never writes: no record, no topic, no offset and no state.

    \b
    stream-ctr doctor --topic clicks --bootstrap-servers broker:9092
    stream-ctr doctor --topic clicks --config my.toml --state state --json
    stream-ctr doctor --source clicks.jsonl

    The exit code is 0 if a run can begin, warnings or not; otherwise it is that of the first error.
    """
    from stream_ctr.cli import runs

    if source and (topic or click_topic):
        raise click.UsageError("--source is a log, and a log has no topics")
    config, properties = settings.load(
        base=runs.kept_config(state) if state.is_dir() else None,
        topic=topic,
        click_topic=click_topic,
    )
    client = settings.client(config, properties)
    findings: list[Finding] = []
    for finding in _findings(config, client, source, state, records, log_format):
        findings.append(finding)
        _print(finding, as_json=as_json)
    errors = [finding for finding in findings if finding.level == "error"]
    if not as_json:
        click.echo(_summary(findings))
    if errors:
        raise click.exceptions.Exit(errors[0].exit_code)


def _print(finding: Finding, *, as_json: bool) -> None:
    if as_json:
        shown = {name: value for name, value in finding._asdict().items() if name != "exit_code"}
        click.echo(json.dumps(shown))
        return
    mark = click.style(_MARKS[finding.level], fg=_COLORS[finding.level])
    click.echo(f"{mark}  {finding.check}: {finding.text}")
    if finding.fix:
        click.echo(f"         -> {finding.fix}")


def _summary(findings: Sequence[Finding]) -> str:
    warnings = sum(finding.level == "warning" for finding in findings)
    errors = sum(finding.level == "error" for finding in findings)
    if errors:
        return f"{errors} error{'s' * (errors != 1)}: a run would fail, or learn nothing of use"
    if warnings:
        return f"a run can begin; {warnings} warning{'s' * (warnings != 1)}"
    return "a run can begin"


def _findings(
    config: Config,
    client: dict[str, object],
    source: Path | None,
    state: Path,
    records: int,
    log_format: LogFormat,
) -> Iterator[Finding]:
    from stream_ctr.cli import checks
    from stream_ctr.errors import DataError

    found: Records | None = None
    try:
        if source:
            found = _read_log(config, source, records, log_format)
            yield checks.ok("source", str(source))
        else:
            topics, findings = _look_at_topics(config, client)
            yield from findings
            if topics:
                found = _read_topics(client, topics, records)
    except StreamCtrError as reason:
        check = "source" if source else "broker"
        text, _, _ = str(reason).partition("\n\n")  # more than a line are ways to get a broker
        fix = "name another one" if source else "start it, or name others: --bootstrap-servers"
        yield checks.Finding(check, "error", text, fix, reason.exit_code)
    fields = config.features.fields()
    if found is not None:
        yield from checks.check_records(found, config, now_ms=int(time.time() * 1000))
        with contextlib.suppress(DataError):  # `check_records` has said it
            fields = fields or checks.fields_of(found, config)
    yield from checks.check_machine(config, state, fields)


def _look_at_topics(config: Config, client: dict[str, object]) -> tuple[list[str], list[Finding]]:
    """Return the topics of which a sample can be read, and what was found about all topics."""
    from stream_ctr.cli import checks
    from stream_ctr.cli.client import connector_errors
    from stream_ctr.connectors import kafka

    read = checks.read_topics(config)
    with connector_errors():
        facts = kafka.survey(client, [*read, *checks.written_topics(config)])
    readable = [
        topic
        for topic in read
        if topic in facts.topics and checks.may(facts.topics[topic].rights, "READ")
    ]
    return readable, list(checks.check_cluster(facts, config))


def _read_topics(client: dict[str, object], topics: Sequence[str], records: int) -> Records:
    from stream_ctr.cli.checks import Records
    from stream_ctr.cli.client import connector_errors
    from stream_ctr.connectors import kafka

    with connector_errors():
        return Records.of(kafka.newest_records(client, topics, most=records))


def _read_log(config: Config, source: Path, records: int, log_format: LogFormat) -> Records:
    """Return the first records of a log, which has no keys and no broker's time."""
    import numpy as np
    import pyarrow as pa

    from stream_ctr.cli.checks import Records
    from stream_ctr.cli.layout import log_layout

    log = log_format.open(source, layout=log_layout(config))
    parts: list[pa.LargeBinaryArray] = [pa.array([], pa.large_binary())]
    for batch in log.batches():
        parts.append(batch.value)
        if sum(map(len, parts)) >= records:
            break
    values = pa.concat_arrays(parts)[:records]
    return Records(values, np.full(len(values), -1))
