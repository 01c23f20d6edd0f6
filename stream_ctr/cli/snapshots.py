"""The commands `snapshots`: list, show, verify and copy snapshots, and publish an older one."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from stream_ctr.cli import voice
from stream_ctr.cli.options import (
    JSON_OPTION,
    PUBLIC_KEY_OPTION,
    REPLACE_RUN_OPTION,
    GivenPath,
    Settings,
    aligned,
    settings_options,
)
from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.messages import printable

if TYPE_CHECKING:
    from stream_ctr.snapshots.contract import Verify


def echo(line: str) -> None:
    """Print a line; characters that the terminal's encoding lacks become escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    click.echo(line.encode(encoding, "backslashreplace").decode(encoding))


@click.group()
def snapshots() -> None:
    """List, show and verify the snapshots of a run, and publish an older one again.

    \b
    stream-ctr snapshots ls state
    stream-ctr snapshots verify state
    stream-ctr snapshots rollback state 00000003-20250101T101500Z
    stream-ctr snapshots mirror state s3://bucket/run
    """


# -- ls ------------------------------------------------------------------------------------------


@snapshots.command("ls")
@click.argument("directory", metavar="DIR", type=GivenPath())
@JSON_OPTION
def list_snapshots(*, directory: Path, as_json: bool) -> None:
    """Print a line for each snapshot in DIR, the newest last. Nothing is verified.

    DIR is the state directory of a run, or its snapshots folder. The metrics are those of the
    published model over the whole run. The snapshot that subscribers load is marked `published`;
    one that the gate refused is marked `refused`, and `show` prints the reasons.

    \b
    stream-ctr snapshots ls state
    """
    folder = _folder(directory)
    published = _published(folder)
    described = [_describe(path, published) for path in _paths(folder)]
    if as_json:
        for each in described:
            echo(json.dumps(each))
        return
    readable = [each for each in described if "error" not in each]
    lines = iter(aligned([_cells(each) for each in readable]))
    for each in described:
        if "error" in each:
            echo(f"{each['snapshot']}  {printable(each['error'], 1000)}")
        else:
            echo(next(lines))


def _folder(directory: Path) -> Path:
    """Return the snapshots folder of a state directory, or `directory` if it is one."""
    if (directory / "snapshots").is_dir():
        return directory / "snapshots"
    if any(directory.glob("*/manifest.json")):
        return directory
    raise SnapshotError(
        f"there is no snapshot in {directory}: give the state directory of a run, "
        "or its snapshots folder"
    )


def _paths(folder: Path) -> list[Path]:
    from stream_ctr.snapshots import snapshot

    paths = [folder / name for name in snapshot.snapshot_ids(folder)]
    if not paths:
        raise SnapshotError(f"there is no snapshot in {folder} yet")
    return paths


def _published(folder: Path) -> str | None:
    """Return the name of the published snapshot."""
    from stream_ctr.snapshots.pointer import read_pointer

    try:
        pointer = read_pointer(folder.parent / "latest.json")
    except SnapshotError as error:
        voice.say(f"note: the published snapshot is unknown: {error}")
        return None
    return pointer.snapshot if pointer else None


def _describe(path: Path, published: str | None) -> dict[str, Any]:
    from stream_ctr.snapshots import snapshot

    place = {
        "snapshot": path.name,
        "path": str(path.absolute()),
        "published": path.name == published,
    }
    try:
        manifest = snapshot.read_manifest(path)
    except SnapshotError as error:
        return {**place, "error": str(error)}
    model = manifest.published
    score = manifest.metrics.models.get(model)
    return {
        **place,
        "run": manifest.run,
        "parent": manifest.parent,
        "epoch": manifest.epoch,
        "sequence": manifest.sequence,
        "examples": manifest.examples,
        "event_time_range": list(manifest.event_time_range),
        "created_ms": manifest.created_ms,
        "refused": [*manifest.gate.reasons],
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "model": model,
        "logloss": score.logloss if score else None,
        "auc": score.auc if score else None,
    }


def _cells(described: Mapping[str, Any]) -> list[str]:
    last = described["event_time_range"][-1]
    mark = "published" if described["published"] else "refused" if described["refused"] else ""
    logloss = _number(described["logloss"], ".5f")
    auc = _number(described["auc"], ".4f")
    return [
        described["snapshot"],
        f"{described['examples']:,} examples",
        f"to {printable(last) if last else '-'}",
        f"{described['bytes'] / 2**20:,.1f} MiB",
        f"{described['model']} logloss {logloss} AUC {auc}",
        f"parent {printable(described['parent'] or '-')}",
        mark,
    ]


def _number(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


# -- show ----------------------------------------------------------------------------------------


@snapshots.command("show")
@click.argument("path", metavar="PATH|DIR", type=GivenPath())
@click.argument("snapshot_id", metavar="[ID]", required=False)
def show_snapshot(*, path: Path, snapshot_id: str | None) -> None:
    """Print the manifest of a snapshot without its metrics, and the type and shape of every tensor.

    PATH is a snapshot. In a state directory or a snapshots folder DIR it is the newest snapshot, or
    the one named ID.

    \b
    stream-ctr snapshots show state 00000003-20250101T101500Z
    """
    from stream_ctr.learn.shard_files import shard_of
    from stream_ctr.snapshots import snapshot

    path = _find(path, snapshot_id)
    manifest = snapshot.read_manifest(path, any_name=True)
    fields = msgspec.to_builtins(manifest)
    shown = {name: value for name, value in fields.items() if name not in ("metrics", "files")}
    for line in aligned([[printable(name), printable(text, 2000)] for name, text in _flat(shown)]):
        echo(line)
    shards = 0
    for name, entry in manifest.files.items():
        if shard := shard_of(name):  # one stands for all, which are alike
            shards += entry.bytes
            if shard.index < shard.count - 1:
                continue
            first = replace(shard, index=0).name
            echo(f"\n{first} ... {name}  {shards:,} bytes in {shard.count} files")
            shards = 0
        else:
            echo(f"\n{name}  {entry.bytes:,} bytes  SHA-256 {entry.sha256}")
        tensors = _tensors(path / name) if name.endswith(".safetensors") else []
        rows = [
            ["", printable(tensor), dtype, json.dumps(shape)] for tensor, dtype, shape in tensors
        ]
        for line in aligned(rows):
            echo(line)


def _find(path: Path, snapshot_id: str | None) -> Path:
    """Return a snapshot by path, by directory and name, or the newest in a directory."""
    if snapshot_id is None:
        return path if (path / "manifest.json").exists() else _paths(_folder(path))[-1]
    paths = _paths(_folder(path))
    for each in paths:
        if each.name == snapshot_id:
            return each
    names = ", ".join(each.name for each in paths)
    raise SnapshotError(f"there is no snapshot {snapshot_id!r} in {path}; it has {names}")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted name, value as text) of every leaf of nested mappings."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)


def _tensors(path: Path) -> list[tuple[str, str, list[int]]]:
    """Return (name, type, shape) of each tensor, from the head of the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            slices = {name: file.get_slice(name) for name in names}
            return [(name, part.get_dtype(), part.get_shape()) for name, part in slices.items()]
    except (OSError, SafetensorError) as error:
        raise SnapshotError(f"{path} is not a safetensors file: {error}") from None


# -- verify --------------------------------------------------------------------------------------


@snapshots.command("verify")
@click.argument("path", metavar="DIR|PATH", type=GivenPath())
@PUBLIC_KEY_OPTION
def verify_snapshots(*, path: Path, public_key: Path | None) -> None:
    """Verify every byte of every snapshot in DIR, or of the one at PATH.

    Prints `ok` or what is wrong.

    Sizes and SHA-256 are compared with the manifest, and the manifest of the published snapshot
    with its pointer. With --public-key, all of them must be signed. The exit code is 0 if all
    verify, and 6 if one does not or there is none.

    \b
    stream-ctr snapshots verify state
    """
    from stream_ctr.snapshots.signing import verifier

    signature = verifier(public_key)
    single = (path / "manifest.json").exists()
    folder = path.absolute().parent if single else _folder(path)
    pinned, wrong = _pinned(folder, signature)
    paths = [path] if single else _paths(folder)
    missing = [] if single else sorted(pinned.keys() - {each.name for each in paths})
    for name in missing:
        echo(f"{name}  is published, and is missing")
        wrong += 1
    for each in paths:
        name = each.absolute().name
        reason = _damage(each, pinned.get(name), signature, any_name=single)
        echo(f"{name}  {printable(reason, 1000) if reason else 'ok'}")
        wrong += bool(reason)
    if wrong:
        raise SnapshotError(f"{wrong} of what is in {path} does not verify")


def _pinned(folder: Path, signature: Verify | None) -> tuple[dict[str, str], int]:
    """Return the published snapshot's name and manifest digest, and 1 if the pointer is wrong."""
    from stream_ctr.snapshots.pointer import read_pointer, require_signature

    try:
        pointer = read_pointer(folder.parent / "latest.json")
        if pointer and signature:
            require_signature(pointer, signature)
    except SnapshotError as error:
        echo(f"latest.json  {printable(str(error), 1000)}")
        return {}, 1
    return ({pointer.snapshot: pointer.manifest_sha256} if pointer else {}), 0


def _damage(
    path: Path, manifest_sha256: str | None, signature: Verify | None, *, any_name: bool
) -> str | None:
    """Return what is wrong with a snapshot, or None."""
    from stream_ctr.snapshots import snapshot

    try:
        snapshot.verify(
            path, manifest_sha256=manifest_sha256, signature=signature, any_name=any_name
        )
    except SnapshotError as error:
        return str(error)
    return None


# -- rollback ------------------------------------------------------------------------------------


@snapshots.command("rollback")
@click.argument("directory", metavar="DIR", type=GivenPath())
@click.argument("snapshot_id", metavar="ID")
@click.option("--topic", help="Send the pointer to this snapshot topic too.")
@click.option(
    "--signing-key",
    "key_path",
    type=GivenPath(),
    help="The private key of a run that signs, its snapshots.signing_key.",
)
@REPLACE_RUN_OPTION
@settings_options("A Kafka client property.")
def roll_back(
    *,
    directory: Path,
    snapshot_id: str,
    topic: str | None,
    key_path: Path | None,
    replace_run: str | None,
    settings: Settings,
) -> None:
    """Verify snapshot ID of the state directory DIR and publish it again, in place of a newer one.

    A rollback changes what is served, not what is learned: `run` goes on from its newest snapshot,
    and the next that it publishes is served again. So stop a run that learns what it should not.
    An active run does no harm: the pointer is replaced in one step. Subscribers of a topic are
    reached with --topic only, and only if no other run holds the model's name there. A run that
    signs signs its pointers too, so rolling back needs its key.

    \b
    stream-ctr snapshots rollback state 00000003-20250101T101500Z
    stream-ctr snapshots rollback state 00000003-20250101T101500Z --topic stream-ctr.snapshots
    """
    from stream_ctr.snapshots import snapshot
    from stream_ctr.snapshots.publisher import Publisher
    from stream_ctr.snapshots.signing import SigningKey
    from stream_ctr.snapshots.snapshot_topic import SnapshotTopic

    path = _find(directory, snapshot_id)
    state = path.parent.parent
    key = SigningKey(key_path) if key_path else None
    if key is None and _is_signed(path):
        raise ConfigError(
            f"snapshot {path.name} is signed, and subscribers with the public key load signed "
            "pointers only: give --signing-key"
        )
    manifest = snapshot.verify(path, signature=key.verify if key else None)
    with contextlib.ExitStack() as stack:
        snapshot_topic = None
        if topic:
            from stream_ctr.cli.client import connector_errors
            from stream_ctr.connectors import kafka

            _, client = settings.load_client()
            stack.enter_context(connector_errors())
            sink = kafka.KafkaSink(client)
            stack.callback(sink.close)
            reader = kafka.PointerReader(client, topic)
            stack.callback(reader.close)
            snapshot_topic = SnapshotTopic(
                topic,
                sink=sink,
                reader=reader,
                name=manifest.model,
                run=manifest.run,
                replace_run=replace_run,
                signing=key,
            )
        publisher = Publisher(
            state, snapshot_topic=snapshot_topic, model_name=manifest.model, signing=key
        )
        before = _published(path.parent)
        pointer = publisher.roll_back(path, manifest)
    places = f"{state / 'latest.json'}{f' and topic {topic}' if topic else ''}"
    echo(
        f"{path.name} is published again, as epoch {pointer.epoch}, in {places}; "
        f"before: {before or 'none'}"
    )


@snapshots.command("mirror")
@click.argument("directory", metavar="DIR", type=GivenPath(file_okay=False))
@click.argument("url", metavar="[URL]", required=False)
def copy_to_mirror(*, directory: Path, url: str | None) -> None:
    """Copy what servers need of the state directory DIR to URL, once.

    The default is the URL that the published pointer names. A run with snapshots.url does this
    all the time; the command is for a directory without one, and for a rollback after its end.

    \b
    stream-ctr snapshots mirror state
    stream-ctr snapshots mirror state s3://bucket/run
    """
    from stream_ctr.snapshots.mirror import mirror_once
    from stream_ctr.snapshots.places import shown
    from stream_ctr.snapshots.pointer import read_pointer

    pointer = read_pointer(directory / "latest.json")
    if pointer is None:
        raise SnapshotError(f"nothing is published in {directory}: it has no latest.json")
    target = url or pointer.url
    if not target:
        raise ConfigError(f"the pointer of {directory} names no URL: give one")
    mirror_once(target, directory, pointer)
    echo(f"{pointer.snapshot} is at {shown(target) if '://' in target else target}")


def _is_signed(path: Path) -> bool:
    """Return whether a snapshot has a signature, or the published pointer beside it."""
    from stream_ctr.snapshots.pointer import read_pointer

    if (path / "manifest.sig").exists():
        return True
    try:
        pointer = read_pointer(path.parent.parent / "latest.json")
    except SnapshotError:
        return False
    return bool(pointer and pointer.signature)
