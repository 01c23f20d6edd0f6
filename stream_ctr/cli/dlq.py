"""The commands `dlq`: count and show dead letters, and put them back once their cause is mended."""

from __future__ import annotations

import base64
import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click

from stream_ctr.cli import voice
from stream_ctr.cli.options import (
    JSON_OPTION,
    Command,
    GivenPath,
    Settings,
    settings_options,
    stacked,
)
from stream_ctr.cli.snapshots import echo
from stream_ctr.errors import ConfigError, DataError
from stream_ctr.messages import nearest, printable

_HEADER = "__stream_ctr.errors."
_FLUSH_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Letter:
    """A malformed record and its reason.

    `topic` is empty, and `partition` and `offset` are -1, if unknown. `event` is the index of the
    malformed event in a record of many. If `cut`, `value` holds only the beginning.
    """

    topic: str
    partition: int
    offset: int
    event: int | None
    reason: str
    message: str
    value: bytes
    cut: bool


@dataclass(frozen=True, slots=True)
class Place:
    """Where dead letters are: a state directory, or the topic TOPIC.dlq."""

    state: Path | None
    topic: str | None
    settings: Settings

    def letters(self) -> Iterator[Letter]:
        """Yield the letters in order."""
        if self.state and self.topic:
            raise click.UsageError("--state and --topic are two places; give one")
        if self.state:
            return _letters_in_file(self.state)
        config, client = self.settings.load_client(topic=self.topic)
        return _letters_in_topic(client, f"{config.input.topic}.dlq")


def _place_options(command: Command) -> Command:
    """Add the options about the place to a command, and pass them on as `place`."""
    options = stacked(
        click.option(
            "--state",
            type=GivenPath(file_okay=False),
            help="The dead letters in this state directory.",
        ),
        click.option(
            "--topic", help="The dead letters of this topic, in TOPIC.dlq.  [default: clicks]"
        ),
        settings_options("A Kafka client property."),
    )

    @wraps(command)
    def called(
        *args: Any, state: Path | None, topic: str | None, settings: Settings, **given: Any
    ) -> Any:
        return command(*args, place=Place(state, topic, settings), **given)

    return options(called)


@click.group()
def dlq() -> None:
    """Count and show malformed records, and put them back once their cause is mended.

    They are in the topic TOPIC.dlq, or in DIR/dead_letters.jsonl if the input of a run was a log.

    \b
    stream-ctr dlq ls --topic clicks
    stream-ctr dlq show --topic clicks --reason not_json
    stream-ctr dlq replay --topic clicks --reason not_json
    """


# -- reading -------------------------------------------------------------------------------------


def _letters_in_topic(client: Mapping[str, object], topic: str) -> Iterator[Letter]:
    from stream_ctr.cli.client import connector_errors
    from stream_ctr.connectors import kafka

    with connector_errors():
        for record in kafka.stored_records(client, topic):
            fields = {
                name.removeprefix(_HEADER): (text or b"").decode("utf-8", "replace")
                for name, text in record.headers
            }
            yield _letter(fields, record.value or b"")


def _letters_in_file(state: Path) -> Iterator[Letter]:
    if not state.is_dir():
        raise ConfigError(f"there is no state directory {state}")
    path = state / "dead_letters.jsonl"
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    fields = json.loads(line)
                    value = base64.b64decode(fields["value_base64"], validate=True)
                except (ValueError, TypeError, KeyError, RecursionError):
                    # A crash can leave half a line.
                    _note(f"{path}:{number} is not a dead letter and is left out")
                else:
                    yield _letter(fields, value)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _letter(fields: Mapping[str, Any], value: bytes) -> Letter:
    partition = _decimal(fields.get("partition"))
    offset = _decimal(fields.get("offset"))
    return Letter(
        topic=str(fields.get("topic", "")),
        partition=-1 if partition is None else partition,
        offset=-1 if offset is None else offset,
        event=_decimal(fields.get("event")),
        reason=str(fields.get("reason", "unknown")),
        message=str(fields.get("message", "")),
        value=value,
        cut="cut_to" in fields,
    )


def _decimal(value: object) -> int | None:
    text = str(value)
    return int(text) if text.isdecimal() else None


def _note(text: str) -> None:
    voice.say(f"note: {text}")


# -- ls ------------------------------------------------------------------------------------------


@dlq.command("ls")
@_place_options
@JSON_OPTION
def list_letters(*, place: Place, as_json: bool) -> None:
    """Print the number of dead letters by reason.

    \b
    stream-ctr dlq ls --topic clicks --bootstrap-servers localhost:9092
    stream-ctr dlq ls --state state
    """
    counts = Counter(letter.reason for letter in place.letters())
    if as_json:
        for reason, count in counts.most_common():
            echo(json.dumps({"reason": reason, "letters": count}))
        return
    _print_counts(counts)


def _print_counts(counts: Counter[str]) -> None:
    rows = [("letters", "reason")]
    rows += [(f"{count:,}", reason) for reason, count in counts.most_common()]
    rows.append((f"{counts.total():,}", "in all"))
    for count_text, reason in rows:
        echo(f"{count_text:>10}  {printable(reason)}")


# -- show ----------------------------------------------------------------------------------------


@dlq.command("show")
@_place_options
@click.option("--reason", help="Only letters with this reason.")
@click.option(
    "--limit",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    help="Most letters to show.",
)
@click.option("--partition", type=click.IntRange(0), help="Only letters from this partition.")
@click.option("--offset", type=click.IntRange(0), help="Only letters from this offset.")
@click.option(
    "--event",
    type=click.IntRange(0),
    help="Only the letter of this event of an Arrow record, counted from 0.",
)
@click.option(
    "--raw",
    is_flag=True,
    help="Print the exact bytes of one letter, which --offset names, and nothing else.",
)
def show_letters(
    *,
    place: Place,
    reason: str | None,
    limit: int,
    partition: int | None,
    offset: int | None,
    event: int | None,
    raw: bool,
) -> None:
    """Show dead letters: where they stood, what is wrong with them, and how their bytes begin.

    Partition and offset are those of the original record. Control characters are printed as
    escapes; --raw prints the bytes as they are.

    \b
    stream-ctr dlq show --topic clicks --reason not_json --limit 5
    stream-ctr dlq show --topic clicks --offset 1234 --raw > record.bin
    """
    if raw and offset is None:
        raise click.UsageError("--raw writes one letter; name it with --offset")
    seen: Counter[str] = Counter()
    wanted = (
        letter
        for letter in _counted(place.letters(), seen)
        if reason in (None, letter.reason)
        and partition in (None, letter.partition)
        and offset in (None, letter.offset)
        and event in (None, letter.event)
    )
    if raw:
        click.echo(_only_value(wanted, f"offset {offset}"), nl=False)
        return
    shown = 0
    for letter in wanted:
        if shown == limit:
            _note(f"there are more than {limit}; --limit shows more, --reason chooses")
            return
        _print_letter(letter)
        shown += 1
    if not shown:
        _require_reason(reason, seen)
        _note("there is no such dead letter" if seen else "there are no dead letters")


def _require_reason(reason: str | None, seen: Counter[str]) -> None:
    """Raise a usage error if no letter has the reason, although there are letters."""
    if reason is not None and seen and reason not in seen:
        known = ", ".join(f"{printable(name)} ({count:,})" for name, count in seen.most_common())
        raise click.UsageError(
            f"no dead letter has the reason {reason!r}, they have {known}{nearest(reason, seen)}"
        )


def _print_letter(letter: Letter) -> None:
    topic = printable(letter.topic or "unknown")
    position = f"{topic}  partition {letter.partition}  offset {letter.offset}"
    if letter.event is not None:
        position += f"  event {letter.event}"
    echo(f"{position}  {printable(letter.reason)}: {printable(letter.message)}")
    echo(f"    {printable(letter.value)}")


def _only_value(letters: Iterator[Letter], name: str) -> bytes:
    """Return the bytes of the one letter; a run that resumed may have written it twice."""
    found = {(letter.topic, letter.partition, letter.value): letter.value for letter in letters}
    if not found:
        raise DataError(f"there is no dead letter from {name}")
    if len(found) > 1:
        raise click.UsageError(
            f"{len(found)} letters are from {name}; choose with --partition, --event or --reason"
        )
    return next(iter(found.values()))


# -- replay --------------------------------------------------------------------------------------


@dlq.command("replay")
@_place_options
@click.option("--reason", help="The letters with this reason.")
@click.option("--all", "every", is_flag=True, help="All letters.")
@click.option(
    "--out",
    type=GivenPath(dir_okay=False),
    help="Write the values to this file, a line each, not to a topic.",
)
def replay_letters(*, place: Place, reason: str | None, every: bool, out: Path | None) -> None:
    """Put the bytes of dead letters back, unchanged, into the topic and partition they came from.

    Letters of TOPIC.dlq go to TOPIC and to no other topic, whatever their headers say. Letters of a
    --state directory go to --topic, or to the lines of --out. The letters stay where
    they are, and a record that is still malformed becomes a letter again: mend the cause first (the
    fields of a --config, input.max_record_bytes). An impression or a click whose time has passed
    meanwhile counts as late.

    \b
    stream-ctr dlq replay --topic clicks --reason too_large
    stream-ctr dlq replay --state state --all --out again.jsonl
    """
    if every == (reason is not None):
        raise click.UsageError("choose letters with --reason, or take --all")
    if place.state and bool(place.topic) == bool(out):
        raise click.UsageError(
            "letters of a state directory go to a --topic or to --out; give one of them"
        )
    source = Place(place.state, None if place.state else place.topic, place.settings)
    seen: Counter[str] = Counter()
    chosen = (
        letter
        for letter in _complete(_counted(source.letters(), seen))
        if every or letter.reason == reason
    )
    done: Counter[str] = Counter()
    if out:
        _write_lines(chosen, out, done.update)
    else:
        _send_back(chosen, place, done.update)
    if not done:
        _require_reason(reason, seen)
    _print_counts(done)


def _counted(letters: Iterator[Letter], seen: Counter[str]) -> Iterator[Letter]:
    for letter in letters:
        seen[letter.reason] += 1
        yield letter


def _complete(letters: Iterator[Letter]) -> Iterator[Letter]:
    """Yield the letters that hold all of their record's bytes."""
    for letter in letters:
        if letter.cut:
            _note(
                f"the letter from offset {letter.offset} holds only the beginning of its record "
                "and is left out"
            )
        else:
            yield letter


def _write_lines(letters: Iterator[Letter], out: Path, done: Callable[[list[str]], None]) -> None:
    try:
        with out.open("wb") as file:
            for letter in letters:
                if b"\n" in letter.value:
                    _note(
                        f"the letter from offset {letter.offset} has more than one line "
                        "and is left out"
                    )
                    continue
                file.write(letter.value + b"\n")
                done([letter.reason])
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}") from None


def _send_back(letters: Iterator[Letter], place: Place, done: Callable[[list[str]], None]) -> None:
    """Send letters to the topic of the place.

    Those of a topic go to the partition that they came from, which lateness is judged by.
    """
    from stream_ctr.cli.client import connector_errors
    from stream_ctr.connectors import kafka

    config, client = place.settings.load_client(topic=place.topic)
    topic = config.input.topic
    with contextlib.ExitStack() as stack:
        stack.enter_context(connector_errors())
        sink = kafka.KafkaSink(client)
        stack.callback(sink.close)
        if place.state:
            for letter in letters:
                sink.send(topic, letter.value)
                done([letter.reason])
        else:
            partitions = kafka.topic_partitions(client, topic) or 0
            # Anyone who may write to the dead letters writes their headers.
            for letter in _of_topic(letters, topic, partitions):
                sink.send(topic, letter.value, partition=letter.partition)
                done([letter.reason])
        sink.flush(_FLUSH_SECONDS)


def _of_topic(letters: Iterator[Letter], topic: str, partitions: int) -> Iterator[Letter]:
    """Yield the letters that name a place in this topic."""
    for letter in letters:
        if not letter.topic:
            _note("a letter does not name its topic and is left out")
        elif letter.topic != topic:
            _note(
                f"a letter names topic {printable(letter.topic)!r}, not {topic!r}, and is left out"
            )
        elif not 0 <= letter.partition < partitions:
            _note(
                f"a letter names partition {letter.partition} of {topic!r}, "
                f"which has {partitions}, and is left out"
            )
        else:
            yield letter
