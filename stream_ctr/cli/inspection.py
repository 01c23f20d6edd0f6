"""The commands that look at what a run has left behind, and set it right: its snapshots and its dead letters.

Click is used here and in `cli`. As there, a command imports what it runs.
"""

from __future__ import annotations

import base64
import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from stream_ctr.errors import ConfigError, DataError, SnapshotError
from stream_ctr.messages import printable

if TYPE_CHECKING:
    from stream_ctr.config import Config
    from stream_ctr.snapshots.snapshot import Verify

_HEADER = "__stream_ctr.errors."


def _say(line: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    click.echo(
        line.encode(encoding, "backslashreplace").decode(encoding)
    )  # a terminal that is not UTF-8 would end the program


def _note(text: str) -> None:
    click.echo(f"note: {text}", err=True)


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of cells under each other, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


# -- the broker ----------------------------------------------------------------------------------


def _broker(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "-X", "extra", multiple=True, metavar="KEY=VALUE", help="A Kafka client property."
        ),
        click.option(
            "--kafka-config", type=click.Path(path_type=Path), help="A Java client.properties file."
        ),
        click.option(
            "--config",
            "config_path",
            type=click.Path(path_type=Path),
            help="A TOML file; see configs/ and `stream-ctr config`.",
        ),
        click.option(
            "--bootstrap-servers",
            metavar="HOST:PORT,...",
            help="Kafka brokers.  [default: localhost:9092]",
        ),
    ):
        command = option(command)
    return command


def _config(
    config_path: Path | None, bootstrap_servers: str | None, topic: str | None = None
) -> Config:
    from stream_ctr import config

    given = {"bootstrap_servers": bootstrap_servers, "topic": topic}
    return config.load(
        config_path,
        overrides={"input": {name: value for name, value in given.items() if value is not None}},
    )


def _client(
    bootstrap_servers: str, kafka_config: Path | None, extra: Sequence[str]
) -> dict[str, object]:
    from stream_ctr.cli import runs

    for pair in extra:
        if "=" not in pair:
            raise click.BadParameter(f"-X takes KEY=VALUE, got {pair!r}")
    return runs.client(bootstrap_servers, kafka_config, dict(pair.split("=", 1) for pair in extra))


# -- snapshots -----------------------------------------------------------------------------------


@click.group()
def snapshots() -> None:
    """Look at the snapshots of a run, verify them, publish an older one again.

    \b
    stream-ctr snapshots ls state
    stream-ctr snapshots verify state
    stream-ctr snapshots rollback state 00000003-20250101T101500Z
    """


@snapshots.command("ls")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="A JSON object a line.")
def list_snapshots(directory: Path, as_json: bool) -> None:
    """A line for each snapshot in DIR, the newest last. Nothing is verified.

    DIR is the state directory of a run, or its snapshots folder. The metrics are those of the published model over the whole run. The
    snapshot that subscribers load is marked `published`; one that was not published is `refused`, and `show` has the reasons.

    \b
    stream-ctr snapshots ls state
    """
    folder = _folder(directory)
    served = _served(folder)
    described = [_described(path, served) for path in _held(folder)]
    if as_json:
        for one in described:
            _say(json.dumps(one))
        return
    cells = [_cells(one) for one in described if "error" not in one]
    lines = iter(list(aligned(cells)))
    for one in described:
        _say(
            f"{one['snapshot']}  {printable(one['error'], 1000)}" if "error" in one else next(lines)
        )


def _folder(directory: Path) -> Path:
    """Where the snapshots are of which `directory` is the state directory or the snapshots folder."""
    if (directory / "snapshots").is_dir():
        return directory / "snapshots"
    if any(directory.glob("*/manifest.json")):
        return directory
    raise SnapshotError(
        f"there is no snapshot in {directory}: give the state directory of a run, or its snapshots folder"
    )


def _held(folder: Path) -> list[Path]:
    from stream_ctr.snapshots import snapshot

    held = [folder / name for name in snapshot.snapshot_ids(folder)]
    if not held:
        raise SnapshotError(f"there is no snapshot in {folder} yet")
    return held


def _served(folder: Path) -> str | None:
    """The name of the published one."""
    from stream_ctr.snapshots.pointer import read_pointer

    try:
        pointer = read_pointer(folder.parent / "latest.json")
    except SnapshotError as error:
        _note(f"which one is published is not known: {error}")
        return None
    return pointer.snapshot if pointer else None


def _described(path: Path, served: str | None) -> dict[str, Any]:
    from stream_ctr.snapshots import snapshot

    place = {"snapshot": path.name, "path": str(path.absolute()), "published": path.name == served}
    try:
        manifest = snapshot.read_manifest(path)
    except SnapshotError as error:
        return {**place, "error": str(error)}
    model = manifest.learner.model
    score = _at(manifest.metrics, "models", model)
    return {
        **place,
        "parent": manifest.parent,
        "epoch": manifest.epoch,
        "sequence": manifest.sequence,
        "examples": manifest.examples,
        "event_time_range": list(manifest.event_time_range),
        "created_ms": manifest.created_ms,
        "refused": [*manifest.gate.refused, *manifest.gate.last_step],
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "model": model,
        "logloss": _at(score, "logloss"),
        "auc": _at(score, "auc"),
    }


def _at(tree: object, *keys: str) -> Any:
    """What stands there in nested mappings; None where nothing does."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _cells(one: Mapping[str, Any]) -> list[str]:
    times = one["event_time_range"]
    return [
        one["snapshot"],
        f"{_number(one['examples'], ',')} examples",
        f"to {printable(str(times[-1])) if isinstance(times, list) and times else '-'}",
        f"{one['bytes'] / 2**20:,.1f} MiB",
        f"{printable(str(one['model']))} logloss {_number(one['logloss'], '.5f')} AUC {_number(one['auc'], '.4f')}",
        f"parent {printable(str(one['parent'] or '-'))}",
        "published" if one["published"] else "refused" if one["refused"] else "",
    ]


def _number(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


@snapshots.command("show")
@click.argument("path", metavar="PATH|DIR", type=click.Path(path_type=Path))
@click.argument("snapshot_id", metavar="[ID]", required=False)
def show_snapshot(path: Path, snapshot_id: str | None) -> None:
    """The manifest of one snapshot without its metrics, and the dtype and shape of every tensor.

    PATH is a snapshot. Of a state directory or a snapshots folder DIR it is the newest, or the one named ID.

    \b
    stream-ctr snapshots show state 00000003-20250101T101500Z
    """
    from stream_ctr.snapshots import snapshot

    path = _one(path, snapshot_id)
    manifest = snapshot.read_manifest(path)
    told = {
        name: value
        for name, value in msgspec.to_builtins(manifest).items()
        if name not in ("metrics", "files")
    }
    for line in aligned([[printable(name), printable(text, 2000)] for name, text in _flat(told)]):
        _say(line)
    for name, entry in manifest.files.items():
        _say(f"\n{name}  {entry.bytes:,} bytes  SHA-256 {printable(entry.sha256)}")
        tensors = _tensors(path / name) if name.endswith(".safetensors") else []
        rows = [
            ["", printable(tensor), dtype, json.dumps(shape)] for tensor, dtype, shape in tensors
        ]
        for line in aligned(rows):
            _say(line)


def _one(path: Path, snapshot_id: str | None) -> Path:
    if snapshot_id is None:
        return path if (path / "manifest.json").exists() else _held(_folder(path))[-1]
    held = _held(_folder(path))
    for one in held:
        if one.name == snapshot_id:
            return one
    raise SnapshotError(
        f"there is no snapshot {snapshot_id!r} in {path}; it has {', '.join(one.name for one in held)}"
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, value as text) of all that is not a mapping itself."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)


def _tensors(path: Path) -> list[tuple[str, str, list[int]]]:
    """(name, dtype, shape) of each, from the head of the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return [(name, part.get_dtype(), part.get_shape()) for name, part in slices.items()]
    except (OSError, SafetensorError) as error:
        raise SnapshotError(f"{path} is not a safetensors file: {error}") from None


@snapshots.command("verify")
@click.argument("path", metavar="DIR|PATH", type=click.Path(path_type=Path))
@click.option(
    "--public-key",
    type=click.Path(path_type=Path),
    help="A PEM file; what its private key did not sign is wrong.",
)
def verify_snapshots(path: Path, public_key: Path | None) -> None:
    """Read every byte of every snapshot in DIR, or of the one at PATH; a line each, `ok` or what is wrong.

    Sizes and SHA-256 are those of the manifest, and the manifest's own is that of the pointer to the published one. Exit code 0 when
    all verify, 6 when one does not or there is none.

    \b
    stream-ctr snapshots verify state
    """
    from stream_ctr.snapshots.subscriber import verifier

    signature = verifier(public_key)
    single = (path / "manifest.json").exists()
    folder = path.absolute().parent if single else _folder(path)
    pinned, wrong = _pinned(folder)
    paths = [path] if single else _held(folder)
    for name in [] if single else sorted(pinned.keys() - {one.name for one in paths}):
        _say(f"{name}  is published, and is not there")
        wrong += 1
    for one in paths:
        reason = _what_is_wrong(one, pinned.get(one.absolute().name), signature)
        _say(f"{one.absolute().name}  {printable(reason, 1000) if reason else 'ok'}")
        wrong += reason is not None
    if wrong:
        raise SnapshotError(f"{wrong} of what is in {path} does not verify")


def _pinned(folder: Path) -> tuple[dict[str, str], int]:
    """The SHA-256 of the published snapshot's manifest, by name; and whether the pointer that tells it is broken."""
    from stream_ctr.snapshots.pointer import read_pointer

    try:
        pointer = read_pointer(folder.parent / "latest.json")
    except SnapshotError as error:
        _say(f"latest.json  {printable(str(error), 1000)}")
        return {}, 1
    return ({pointer.snapshot: pointer.manifest_sha256} if pointer else {}), 0


def _what_is_wrong(path: Path, manifest_sha256: str | None, signature: Verify | None) -> str | None:
    from stream_ctr.snapshots import snapshot

    try:
        snapshot.verify(path, manifest_sha256=manifest_sha256, signature=signature)
    except SnapshotError as error:
        return str(error)
    return None


@snapshots.command("rollback")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("snapshot_id", metavar="ID")
@click.option("--topic", help="Send the pointer to this snapshot topic too.")
@_broker
def roll_back(
    directory: Path, snapshot_id: str, topic: str | None, bootstrap_servers: str | None, config_path: Path | None,
    kafka_config: Path | None, extra: tuple[str, ...],
) -> None:  # fmt: skip
    """Verify snapshot ID of the state directory DIR and publish it again, so that subscribers load it in place of a newer one.

    What is served is rolled back, what is learned is not: `run` goes on from its newest snapshot, and the next that it publishes is
    served again. So stop a run that learns what it should not. A run that is active does no harm: the pointer is replaced in one step.
    Subscribers of a topic are reached with --topic only.

    \b
    stream-ctr snapshots rollback state 00000003-20250101T101500Z
    stream-ctr snapshots rollback state 00000003-20250101T101500Z --topic stream-ctr.snapshots
    """
    from stream_ctr.snapshots import snapshot
    from stream_ctr.snapshots.publisher import Publisher

    path = _one(directory, snapshot_id)
    manifest = snapshot.verify(path)
    state = path.parent.parent
    with contextlib.ExitStack() as stack:
        sink = None
        if topic:
            from stream_ctr.cli import runs
            from stream_ctr.connectors import kafka

            client = _client(
                _config(config_path, bootstrap_servers).input.bootstrap_servers, kafka_config, extra
            )
            stack.enter_context(runs.connector_errors())
            sink = kafka.KafkaSink(client)
            stack.callback(sink.close)
        publisher = Publisher(
            state, sink=sink, snapshot_topic=topic or "", model_name=manifest.model
        )
        before, pointer = _served(path.parent), publisher.roll_back(path, manifest)
    places = f"{state / 'latest.json'}{f' and topic {topic}' if topic else ''}"
    _say(
        f"{path.name} is published again, as epoch {pointer.epoch}, in {places}; before: {before or 'none'}"
    )


# -- dead letters --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Letter:
    """A record that was no event: where it stood (topic empty, partition and offset -1 where that is not known; `event`: its index in a
    record of many), its bytes (or, `cut`, only their beginning), and why."""

    topic: str
    partition: int
    offset: int
    event: int | None
    reason: str
    message: str
    value: bytes
    cut: bool


@click.group()
def dlq() -> None:
    """Look at the records that were no events, and put them back once their cause is mended.

    They are in the topic TOPIC.dlq, or in DIR/dead_letters.jsonl when the input of a run was a log.

    \b
    stream-ctr dlq ls --topic clicks
    stream-ctr dlq show --topic clicks --reason not_json
    stream-ctr dlq replay --topic clicks --reason not_json
    """


def _where(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--state",
            type=click.Path(path_type=Path, file_okay=False),
            help="The dead letters in this state directory.",
        ),
        click.option(
            "--topic", help="The dead letters of this topic, in TOPIC.dlq.  [default: clicks]"
        ),
    ):
        command = option(command)
    return _broker(command)


def _letters(
    state: Path | None, topic: str | None, bootstrap_servers: str | None, config_path: Path | None, kafka_config: Path | None,
    extra: tuple[str, ...],
) -> Iterator[_Letter]:  # fmt: skip
    if state and topic:
        raise click.UsageError("--state and --topic are two places; give one")
    if state:
        return _letters_in_file(state)
    config = _config(config_path, bootstrap_servers, topic)
    return _letters_in_topic(
        _client(config.input.bootstrap_servers, kafka_config, extra), f"{config.input.topic}.dlq"
    )


def _letters_in_topic(client: Mapping[str, object], topic: str) -> Iterator[_Letter]:
    from stream_ctr.cli import runs
    from stream_ctr.connectors import kafka

    with runs.connector_errors():
        for record in kafka.stored_records(client, topic):
            told = {
                name.removeprefix(_HEADER): (text or b"").decode("utf-8", "replace")
                for name, text in record.headers
            }
            yield _letter(told, record.value or b"")


def _letters_in_file(state: Path) -> Iterator[_Letter]:
    if not state.is_dir():
        raise ConfigError(f"there is no state directory {state}")
    path = state / "dead_letters.jsonl"
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    told = json.loads(line)
                    value = base64.b64decode(told["value_base64"], validate=True)
                except (ValueError, TypeError, KeyError, RecursionError):
                    _note(
                        f"{path}:{number} is no dead letter, it is left out"
                    )  # a crash can leave half a line
                else:
                    yield _letter(told, value)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _letter(told: Mapping[str, Any], value: bytes) -> _Letter:
    partition, offset = (
        int(text) if (text := str(told.get(name))).isdecimal() else -1
        for name in ("partition", "offset")
    )
    event = int(text) if (text := str(told.get("event"))).isdecimal() else None
    reason, message = str(told.get("reason", "unknown")), str(told.get("message", ""))
    return _Letter(
        str(told.get("topic", "")),
        partition,
        offset,
        event,
        reason,
        message,
        value,
        cut="cut_to" in told,
    )


@dlq.command("ls")
@_where
@click.option("--json", "as_json", is_flag=True, help="A JSON object a line.")
def list_letters(as_json: bool, **where: Any) -> None:
    """How many dead letters there are, by reason.

    \b
    stream-ctr dlq ls --topic clicks --bootstrap-servers localhost:9092
    stream-ctr dlq ls --state state
    """
    counts = Counter(letter.reason for letter in _letters(**where))
    if as_json:
        for reason, count in counts.most_common():
            _say(json.dumps({"reason": reason, "letters": count}))
        return
    for line in _table(counts):
        _say(line)


def _table(counts: Counter[str]) -> Iterator[str]:
    for count, reason in [
        ("letters", "reason"),
        *((f"{n:,}", name) for name, n in counts.most_common()),
        (f"{counts.total():,}", "in all"),
    ]:
        yield f"{count:>10}  {printable(reason)}"


@dlq.command("show")
@_where
@click.option("--reason", help="Only letters with this reason.")
@click.option(
    "--limit", type=click.IntRange(1), default=20, show_default=True, help="At most so many."
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
    help="The exact bytes of one letter, which --offset names, and nothing else.",
)
def show_letters(
    reason: str | None,
    limit: int,
    partition: int | None,
    offset: int | None,
    event: int | None,
    raw: bool,
    **where: Any,
) -> None:
    """Where dead letters stood, why they are no events, and how their bytes begin.

    Partition and offset are those of the original record. Control characters are written as escapes; --raw has the bytes as they are.

    \b
    stream-ctr dlq show --topic clicks --reason not_json --limit 5
    stream-ctr dlq show --topic clicks --offset 1234 --raw > record.bin
    """
    if raw and offset is None:
        raise click.UsageError("--raw writes one letter; name it with --offset")
    wanted = (
        letter
        for letter in _letters(**where)
        if reason in (None, letter.reason)
        and partition in (None, letter.partition)
        and offset in (None, letter.offset)
        and event in (None, letter.event)
    )
    if raw:
        click.echo(_only_value(wanted, f"offset {offset}"), nl=False)
        return
    for number, letter in enumerate(wanted):
        if number == limit:
            _note(f"there are more than {limit}; --limit shows more, --reason chooses")
            return
        place = f"{printable(letter.topic or 'unknown')}  partition {letter.partition}  offset {letter.offset}"
        place += f"  event {letter.event}" if letter.event is not None else ""
        _say(
            f"{place}  {printable(letter.reason)}: {printable(letter.message)}\n    {printable(letter.value)}"
        )


def _only_value(letters: Iterator[_Letter], named: str) -> bytes:
    """The bytes of the letters, which are one: a run that resumed may have written it twice."""
    found = {(letter.topic, letter.partition, letter.value): letter.value for letter in letters}
    if not found:
        raise DataError(f"there is no dead letter from {named}")
    if len(found) > 1:
        raise click.UsageError(
            f"{len(found)} letters are from {named}; choose with --partition, --event or --reason"
        )
    return next(iter(found.values()))


@dlq.command("replay")
@_where
@click.option("--reason", help="The letters with this reason.")
@click.option("--all", "every", is_flag=True, help="All letters.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the values to this file, a line each, not to a topic.",
)
def replay_letters(
    reason: str | None, every: bool, out: Path | None, state: Path | None, topic: str | None, **broker: Any
) -> None:  # fmt: skip
    """Put the bytes of dead letters back into the topic and partition that they came from, unchanged.

    Letters of a --state directory go to --topic, or to the lines of --out. The letters stay where they are, and what is still no event
    becomes a letter again: mend the cause first (the fields of a --config, input.max_record_bytes). An impression or a click whose time
    has passed meanwhile counts as late.

    \b
    stream-ctr dlq replay --topic clicks --reason too_large
    stream-ctr dlq replay --state state --all --out again.jsonl
    """
    if every == (reason is not None):
        raise click.UsageError("choose letters with --reason, or take --all")
    if state and bool(topic) == bool(out):
        raise click.UsageError(
            "letters of a state directory go to a --topic or to --out; give one of them"
        )
    letters = _letters(state, None if state else topic, **broker)
    seen: Counter[str] = Counter()
    chosen = (
        letter for letter in _whole(_counted(letters, seen)) if every or letter.reason == reason
    )
    done: Counter[str] = Counter()
    if out:
        _write_lines(chosen, out, done)
    else:
        _send_back(chosen, topic if state else None, done, **broker)
    if not done and seen:
        _note(f"the letters there are have other reasons: {', '.join(map(printable, seen))}")
    for line in _table(done):
        _say(line)


def _counted(letters: Iterator[_Letter], seen: Counter[str]) -> Iterator[_Letter]:
    for letter in letters:
        seen[letter.reason] += 1
        yield letter


def _whole(letters: Iterator[_Letter]) -> Iterator[_Letter]:
    for letter in letters:
        if letter.cut:
            _note(
                f"of the letter from offset {letter.offset} only the beginning is here, it is left out"
            )
        else:
            yield letter


def _write_lines(letters: Iterator[_Letter], out: Path, done: Counter[str]) -> None:
    try:
        with out.open("wb") as file:
            for letter in letters:
                if b"\n" in letter.value:
                    _note(
                        f"the letter from offset {letter.offset} has more than one line, it is left out"
                    )
                    continue
                file.write(letter.value + b"\n")
                done[letter.reason] += 1
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}") from None


def _send_back(
    letters: Iterator[_Letter], topic: str | None, done: Counter[str], bootstrap_servers: str | None, config_path: Path | None,
    kafka_config: Path | None, extra: tuple[str, ...],
) -> None:  # fmt: skip
    """To `topic`, or to where each came from: lateness is a matter of the partition."""
    from stream_ctr.cli import runs
    from stream_ctr.connectors import kafka

    client = _client(
        _config(config_path, bootstrap_servers).input.bootstrap_servers, kafka_config, extra
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(runs.connector_errors())
        sink = kafka.KafkaSink(client)
        stack.callback(sink.close)
        for letter in letters:
            if topic:
                sink.send(topic, letter.value)
            elif letter.topic and letter.partition >= 0:
                sink.send(letter.topic, letter.value, partition=letter.partition)
            else:
                _note("a record does not tell which topic it came from, it is left out")
                continue
            done[letter.reason] += 1
        sink.flush(30.0)
