"""Snapshots: a directory each, with safetensors files, spilled impressions, and a manifest.

    snapshots/00000012-20250101T101500Z/model.safetensors, ..., manifest.json, manifest.sig
                                        model.onnx, ...    graphs, if they are asked for
                                        model.shard-00-of-64.safetensors, ...

The manifest holds the size and the SHA-256 of every file; `manifest.sig` is there if snapshots are
signed. A snapshot becomes visible by one rename after everything in it is on disk: a crash leaves
the earlier snapshots, or those and a complete new one. Names that start with `tmp-` belong to
unfinished or half-deleted snapshots. Segments are files of impressions that the joiner has moved to
disk. A table that the ranks of a run hold together is in shards (see `learn.shard_files`), which
are read as one array.

This module does not interpret the arrays. It never unpickles: a file holds numbers, which are read
from the same bytes whose SHA-256 was compared.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from stream_ctr import state_files
from stream_ctr.errors import SnapshotError
from stream_ctr.failpoint import failpoint
from stream_ctr.learn.array_digests import ArrayDigest, tensors_sha256
from stream_ctr.learn.shard_files import TABLE, StoredTable, held_shards, shard_of
from stream_ctr.learn.tensor_files import (
    SUFFIX,
    FileDigest,
    Piece,
    Placed,
    read_pieces,
    require_digest,
    write_tensors,
)
from stream_ctr.learn.tensor_files import file_name as file_name
from stream_ctr.messages import one_line
from stream_ctr.snapshots import files
from stream_ctr.snapshots.contract import NewerFormat, Sign, Verify, decode, encode
from stream_ctr.snapshots.files import MANIFEST, SIGNATURE, plain_name, snapshot_name
from stream_ctr.snapshots.manifest import FORMAT, FileEntry, Manifest, RunIdentity
from stream_ctr.snapshots.pointer import read_pointer, require_signature

DTYPES = frozenset(
    {
        "bool",
        *("int8", "int16", "int32", "int64"),
        *("uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64"),
    }
)

Array = np.ndarray[Any, Any]
Each = TypeVar("Each")
Tensors = dict[str, dict[str, Array]]
Segments = Mapping[str, tuple[Path, str, int]]
"""Immutable files that hold no tensors, by name: path, SHA-256, size."""

SEGMENT_SUFFIX = ".arrow"
GRAPH_SUFFIX = ".onnx"

OWN = f"{os.getpid()}-{secrets.token_hex(4)}"
"""Unique to this process, also where every process is the first of its container."""

_log = logging.getLogger(__name__)


# -- names ---------------------------------------------------------------------------------------


def new_id(sequence: int, event_time_ms: int) -> str:
    """Return a snapshot name that sorts in the order of writing and shows its event time.

    >>> new_id(12, 1_735_726_500_000)
    '00000012-20250101T101500Z'
    """
    moment = datetime(1970, 1, 1) + timedelta(milliseconds=event_time_ms)
    return f"{sequence:08d}-{moment:%Y%m%dT%H%M%S}Z"


def stems(additional: str | None = None) -> tuple[str, str]:
    """Return the file stems of the published model and of its optimiser, or of an additional one.

    >>> stems(), stems("fm"), stems("acme.nets:Wide")[0]
    (('model', 'optimizer'), ('fm.model', 'fm.optimizer'), 'acme.nets-Wide.model')
    """
    prefix = f"{additional.replace(':', '-')}." if additional else ""
    return f"{prefix}model", f"{prefix}optimizer"


def graph_name(stem: str) -> str:
    """Return the name of the file that holds the ONNX graph of the model with this stem.

    >>> graph_name("fm.model")
    'fm.model.onnx'
    """
    return f"{stem}{GRAPH_SUFFIX}"


def snapshot_ids(root: Path) -> list[str]:
    """Return the names of the snapshots in `root`, oldest first, whether they verify or not."""
    if not root.is_dir():
        return []
    with files.naming(root, "cannot list"):
        return sorted(entry.name for entry in os.scandir(root) if _is_snapshot(entry))


def _is_snapshot(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir() and bool(snapshot_name(entry.name))
    except SnapshotError:
        return False


def next_sequence(root: Path) -> int:
    """Return a number above that of every snapshot in `root`, whether it verifies or not.

    >>> next_sequence(Path("/nowhere"))
    1
    """
    found = [re.match(r"(\d{8,})-", name) for name in snapshot_ids(root)]
    return 1 + max((int(match[1]) for match in found if match), default=0)


# -- writing -------------------------------------------------------------------------------------


def write(
    root: Path,
    *,
    tensors: Mapping[str, Mapping[str, Array]],
    manifest: Manifest,
    segments: Segments | None = None,
    graphs: Mapping[str, bytes] | None = None,
    sign: Sign | None = None,
    check: Callable[[], None] = lambda: None,
    name: str | None = None,
) -> Path:
    """Write a snapshot, and return its path `root / name`; the name is that in the manifest.

    `tensors` maps file stem -> name -> array; arrays of any layout are accepted, of the types in
    `DTYPES`. Staged `segments` are moved in (see `stage`). `graphs` maps file stems to ONNX graphs.
    Another `name` than the manifest's is for a copy that is only served (see `export`). The
    manifest is written with the digests of these files. `check` is called before the snapshot
    becomes visible and may raise. Everything is on disk when this returns.

    Raises `SnapshotError`, with nothing left behind, if something cannot be stored or the disk is
    full.
    """
    segments = segments or {}
    graphs = graphs or {}
    name = snapshot_name(name or manifest.snapshot)
    for stem, named in tensors.items():
        _require_storable(stem, named)
    _encode(manifest)  # refuse one that could not be read again before anything is written
    # The temporary name is this process's own: one that was taken over may write the same id.
    final = root / name
    temporary = root / f"{files.TEMPORARY}{OWN}-{name}"
    try:
        state_files.make_folder(root)
        _require_space(
            root,
            name,
            sum(array.nbytes for named in tensors.values() for array in named.values())
            + sum(map(len, graphs.values())),
        )
        if final.exists():
            raise SnapshotError(
                f"snapshot {final} exists already: a snapshot is never written twice"
            )
        files.remove(temporary)
        temporary.mkdir()
        entries = _fill(temporary, tensors, segments, graphs)
        failpoint("snapshot.files")
        data = _encode(msgspec.structs.replace(manifest, files=entries))
        if sign:
            files.write_durably(temporary / SIGNATURE, sign(data))
        files.write_durably(temporary / MANIFEST, data)
        files.sync_directory(temporary)
        failpoint("snapshot.manifest")
        check()
        os.rename(temporary, final)
        failpoint("snapshot.rename")
        files.sync_directory(root)
    except (OSError, SafetensorError) as reason:
        free = shutil.disk_usage(root).free if root.is_dir() else 0
        raise SnapshotError(
            f"cannot write snapshot {final}: {reason}; {files.mebibytes(free)} free there now, "
            "nothing was left behind"
        ) from reason
    finally:
        if not final.exists() or temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def _fill(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Array]],
    segments: Segments,
    graphs: Mapping[str, bytes],
) -> dict[str, FileEntry]:
    """Write every file of a snapshot but the manifest."""
    entries = {
        file_name(stem): FileEntry(*write_tensors(folder / file_name(stem), named))
        for stem, named in tensors.items()
    }
    for name, (staged, digest, size) in segments.items():
        os.rename(staged, folder / plain_name(name, "segment"))
        entries[name] = FileEntry(digest, size)
    for place in {staged.parent for staged, _, _ in segments.values()}:
        place.rmdir()
    for stem, graph in graphs.items():
        name = graph_name(plain_name(stem, "file stem"))
        files.write_durably(folder / name, graph)
        entries[name] = FileEntry(hashlib.sha256(graph).hexdigest(), len(graph))
    return entries


def stage(root: Path, segments: Segments) -> Segments:
    """Link these files under `root` as they are now, so that their owner may delete them.

    `write` takes the result.
    """
    if not segments:
        return {}
    place = root / f"{files.TEMPORARY}{OWN}-segments"
    with files.naming(place, "cannot keep segments in"):
        state_files.make_folder(root)
        files.remove(place)
        place.mkdir()
        for name, (path, _, _) in segments.items():
            files.link(path, place / plain_name(name, "segment"))
    return {name: (place / name, digest, size) for name, (_, digest, size) in segments.items()}


def _encode(manifest: Manifest) -> bytes:
    """Return the bytes of `manifest.json`. Raises `SnapshotError` if `load` would refuse them.

    A frozen type does not check the values that it is made with, decoding does.
    """
    data = encode(manifest)
    if len(data) > files.LARGEST_MANIFEST_BYTES:
        raise SnapshotError(
            f"the manifest of snapshot {manifest.snapshot} has {files.mebibytes(len(data))}, and "
            f"the largest that is read has {files.mebibytes(files.LARGEST_MANIFEST_BYTES)}"
        )
    decode(data, Manifest, newest=FORMAT, name=f"the manifest of snapshot {manifest.snapshot}")
    return data


def _require_storable(stem: str, named: Mapping[str, Array]) -> None:
    plain_name(stem, "file stem")
    for name, array in named.items():
        if array.dtype.name not in DTYPES:
            raise SnapshotError(
                f"array {name!r} of {file_name(stem)} is {array.dtype}, which cannot be stored; "
                f"use {', '.join(sorted(DTYPES))}"
            )


def _require_space(root: Path, name: str, needed: int) -> None:
    if (free := shutil.disk_usage(root).free) < needed:
        raise SnapshotError(
            f"snapshot {name} needs {files.mebibytes(needed)}, {root} has {files.mebibytes(free)} "
            "free: make room, nothing was written"
        )


def published_weights(
    manifest: RunIdentity, tensors: Mapping[str, Mapping[str, Each]]
) -> dict[str, Each]:
    """Return the weights of the published model; those of a blend include its members'.

    `tensors` maps file stems to arrays, or to their digests.
    """
    members = {
        f"{name}.{tensor}": array
        for name in manifest.blend
        for tensor, array in tensors.get(stems(name)[0], {}).items()
    }
    return {**tensors[stems()[0]], **members}


def weights_sha256(tensors: Mapping[str, Array | ArrayDigest]) -> str:
    """Return the SHA-256 over name, type, shape and values of all arrays, in the order of names.

    Two digests are equal if every bit is. An array may be given by its digest.
    """
    return tensors_sha256(tensors)


# -- reading -------------------------------------------------------------------------------------


def verify(
    path: Path,
    *,
    manifest_sha256: str | None = None,
    signature: Verify | None = None,
    any_name: bool = False,
) -> Manifest:
    """Check every file of the snapshot at `path` against its manifest, and return the manifest.

    `manifest_sha256` is the digest that a pointer gives for the manifest itself. `signature`, if
    given, must accept the manifest's signature before anything else is read. The directory must
    have the name that the manifest gives, because names decide which snapshot is the newest;
    `any_name` is for a path that a person chose.

    Raises `SnapshotError` that names the file and what is wrong with it.
    """
    manifest = _verified_manifest(path, manifest_sha256, signature, any_name)
    for name, entry in manifest.files.items():
        with files.opened(path / name) as fd, os.fdopen(fd, "rb", closefd=False) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            _compare(path / name, os.fstat(fd).st_size, digest, entry)
    return manifest


def load(
    path: Path,
    *,
    stems: Collection[str] | Callable[[Manifest], Collection[str]] | None = None,
    manifest_sha256: str | None = None,
    signature: Verify | None = None,
    any_name: bool = False,
    partial: bool = False,
    stored: bool = False,
) -> tuple[Manifest, Tensors]:
    """Return the manifest and the arrays (file stem -> name -> array) of the snapshot at `path`.

    `stems` names the files to read, or is called with the manifest to name them; by default all
    are read. The presence and the size of every file are checked, and the SHA-256 of those that
    are read. With `partial`, files that are not read may be absent, as on a machine that only
    serves. The arrays may be changed by the caller. `any_name` is that of `verify`, and
    `SnapshotError` is raised as there.

    A table is one array, whether the snapshot has it in shards or not. With `stored`, tables stay
    in their files: a `StoredTable` stands for each of them, of which every rank reads its rows.
    """
    manifest = _verified_manifest(path, manifest_sha256, signature, any_name, partial)
    present = [
        name.removesuffix(SUFFIX)
        for name in manifest.files
        if name.endswith(SUFFIX) and not shard_of(name)
    ]
    wanted = present if stems is None else list(stems(manifest) if callable(stems) else stems)
    if missing := sorted(set(wanted) - set(present)):
        raise SnapshotError(
            f"snapshot {path} has no file {file_name(missing[0])}; "
            f"it has {', '.join(manifest.files) or 'none'}"
        )
    return manifest, {stem: _load(path, manifest, stem, stored=stored) for stem in wanted}


def _load(path: Path, manifest: Manifest, stem: str, *, stored: bool) -> dict[str, Array]:
    """Return the tensors with this stem, and the table that lies in shards among them."""
    file, entry = path / file_name(stem), manifest.files[file_name(stem)]
    if held_shards(stem, manifest.files):
        tensors = _read_tensors(file, entry)
        if TABLE in tensors:
            raise SnapshotError(f"{file} has a table, which is in shards beside it too")
    elif stored:
        tensors, has_table = _read_all_but_table(file, entry)
        if not has_table:
            return tensors
    else:
        return _read_tensors(file, entry)
    table = StoredTable.found(path, stem, digests(manifest))
    tensors[TABLE] = cast(Array, table) if stored else table.read()
    return tensors


def digests(manifest: Manifest) -> dict[str, tuple[str, int]]:
    """Return the SHA-256 and the size of each file of a snapshot, by name."""
    return {name: (entry.sha256, entry.bytes) for name, entry in manifest.files.items()}


def file_names(manifest: Manifest, stem: str) -> list[str]:
    """Return the names of the files that hold the tensors with this stem.

    There is one, and one for each shard of its table.
    """
    shards = held_shards(stem, manifest.files)
    return [file_name(stem), *(shard.name for shard in shards)]


def read_manifest(
    path: Path, *, signature: Verify | None = None, any_name: bool = False
) -> Manifest:
    """Return the manifest of the snapshot at `path` without reading its other files."""
    return load(path, stems=(), signature=signature, any_name=any_name)[0]


def graphs(path: Path, manifest: Manifest, stems: Iterable[str]) -> dict[str, bytes]:
    """Return the ONNX graphs of the models with these stems, of those that have one, by stem.

    Raises `SnapshotError` as `load` does.
    """
    return {
        stem: _read_file(path / graph_name(stem), manifest.files[graph_name(stem)])
        for stem in stems
        if graph_name(stem) in manifest.files
    }


def segments(path: Path, manifest: Manifest) -> dict[str, tuple[Path, str]]:
    """Return the segment files of the snapshot at `path`: name -> path and expected SHA-256."""
    return {
        name: (path / name, entry.sha256)
        for name, entry in manifest.files.items()
        if name.endswith(SEGMENT_SUFFIX)
    }


def newest(root: Path, *, signature: Verify | None = None) -> Path | None:
    """Return the newest snapshot in `root` that verifies, or None if there are no snapshots.

    A damaged snapshot is passed over with a warning, and so is a published one whose manifest is
    not that of `latest.json` beside `root`. Raises `NewerFormat` if a snapshot at least as new was
    written by a newer version, and `SnapshotError` if no snapshot verifies.
    """
    pinned = _published_digest(root.parent / "latest.json", signature)
    paths = [root / name for name in reversed(snapshot_ids(root))]
    first_reason: SnapshotError | None = None
    for path in paths:
        try:
            verify(path, manifest_sha256=pinned.get(path.name), signature=signature)
        except NewerFormat:
            raise
        except SnapshotError as reason:
            _log.warning("snapshot %s is not used: %s", path.name, reason)
            first_reason = first_reason or reason
        else:
            return path
    if first_reason is not None:
        raise SnapshotError(
            f"none of the {len(paths)} snapshots in {root} verifies; the newest: {first_reason}"
        ) from first_reason
    return None


def _published_digest(latest: Path, signature: Verify | None) -> dict[str, str]:
    """Return the name of the published snapshot and the digest of its manifest, if it is known.

    What is wrong with a pointer is for those to say who publish.
    """
    try:
        pointer = read_pointer(latest)
        if pointer and signature:
            require_signature(pointer, signature)
    except SnapshotError:
        return {}
    return {pointer.snapshot: pointer.manifest_sha256} if pointer else {}


def newest_with_model(
    root: Path, name: str | None, model: str, *, signature: Verify | None = None
) -> Path | None:
    """Return the path of the newest snapshot that holds an additional `model`, or None.

    It is the snapshot `name`, or one of its ancestors in `root`.
    """
    ids = set(snapshot_ids(root))
    while name is not None and name in ids:
        manifest = read_manifest(root / name, signature=signature)
        if file_name(stems(model)[0]) in manifest.files:
            return root / name
        name = manifest.parent
    return None


def _verified_manifest(
    path: Path,
    expected_sha256: str | None,
    signature: Verify | None,
    any_name: bool,
    partial: bool = False,
) -> Manifest:
    """Check signature, digest and form of a manifest, and that its files are there; return it.

    With `partial`, those that are there are checked.
    """
    if not files.is_directory(path):
        raise SnapshotError(f"there is no snapshot directory {str(path)!r:.300}")
    data = files.read_manifest(path)
    if signature:
        _require_signature(path, data, signature)
    found = hashlib.sha256(data).hexdigest()
    if expected_sha256 is not None and found != expected_sha256:
        raise SnapshotError(
            f"{path / MANIFEST} has SHA-256 {found}, its pointer says {expected_sha256}"
        )
    manifest = decode(data, Manifest, newest=FORMAT, name=str(path / MANIFEST))
    if not any_name and manifest.snapshot != path.resolve().name:
        raise SnapshotError(
            f"{path} is snapshot {one_line(manifest.snapshot, 80)} under another name: "
            "rename it back"
        )
    _require_entries(path, manifest.files)
    _require_files(path, manifest.files, partial=partial)
    return manifest


def _require_signature(path: Path, data: bytes, verify_signature: Verify) -> None:
    try:
        found = files.read_document(path / SIGNATURE)
    except files.Missing:
        raise SnapshotError(f"snapshot {path} is not signed, and a signature is required") from None
    try:
        verify_signature(data, found)
    except SnapshotError as reason:
        raise SnapshotError(f"{path / MANIFEST}: {reason}") from None


def _require_entries(path: Path, entries: Iterable[str]) -> None:
    for name in entries:
        if not name.endswith((SUFFIX, SEGMENT_SUFFIX, GRAPH_SUFFIX)):
            raise SnapshotError(
                f"{path / MANIFEST}: file {name!r:.200} is not named *{SUFFIX}, "
                f"*{SEGMENT_SUFFIX} or *{GRAPH_SUFFIX}"
            )
        plain_name(name, f"{path / MANIFEST}: file")
    _require_all_shards(path, set(entries))


def _require_all_shards(path: Path, names: Collection[str]) -> None:
    """Raise `SnapshotError` unless the manifest lists every shard of a table, and what it is of."""
    for stem in {shard.stem for name in names if (shard := shard_of(name))}:
        if file_name(stem) not in names:
            raise SnapshotError(
                f"{path / MANIFEST} lists shards of {file_name(stem)}, and not that file"
            )
        try:
            held_shards(stem, names)
        except ValueError as reason:
            raise SnapshotError(f"{path / MANIFEST}: {reason}") from None


def _require_files(path: Path, entries: Mapping[str, FileEntry], *, partial: bool) -> None:
    with files.naming(path, "cannot list"):
        found = {entry.name: entry for entry in os.scandir(path)}
        for name in sorted(set(found) - {MANIFEST, SIGNATURE, *entries}):
            raise SnapshotError(f"{path / name} is not in the manifest")
        if partial:
            entries = {name: entry for name, entry in entries.items() if name in found}
        for name in sorted({MANIFEST, *entries} - set(found)):
            raise SnapshotError(f"{path / name} is missing, the manifest names it")
        for name, entry in entries.items():
            if not found[name].is_file(follow_symlinks=False):
                raise SnapshotError(f"{path / name} is not a regular file")
            size = found[name].stat(follow_symlinks=False).st_size
            _compare(path / name, size, None, entry)


def _compare(path: Path, size: int, sha256: str | None, entry: FileEntry) -> None:
    require_digest(path, size, sha256, FileDigest(entry.sha256, entry.bytes))


def _read_file(path: Path, entry: FileEntry) -> bytes:
    """Return the contents of a file whose size and digest are those in the manifest."""
    with files.opened(path) as fd:
        # Compare the size first: a file that has grown is not read into memory.
        _compare(path, os.fstat(fd).st_size, None, entry)
        data = files.read_all(fd)
    _compare(path, len(data), hashlib.sha256(data).hexdigest(), entry)
    return data


def _read_tensors(path: Path, entry: FileEntry) -> dict[str, Array]:
    data = _read_file(path, entry)
    try:
        return cast(dict[str, Array], safetensors.numpy.load(data))
    except (SafetensorError, ValueError) as reason:
        raise SnapshotError(f"{path} is not a safetensors file: {reason}") from reason
    except KeyError as unknown:
        raise SnapshotError(f"{path} holds dtype {unknown}, which numpy does not have") from unknown


def _read_all_but_table(path: Path, entry: FileEntry) -> tuple[dict[str, Array], bool]:
    """Return the tensors of a file without its table, and whether it has one.

    The table takes no memory.
    """
    tensors: dict[str, Array] = {}
    has_table = False

    def wanted(placed: Mapping[str, Placed]) -> list[Piece]:
        nonlocal has_table
        has_table = TABLE in placed
        others = [(at, name) for name, at in placed.items() if name != TABLE]
        others.sort(key=lambda other: other[0].start)
        tensors.update({name: np.empty(at.shape, at.dtype) for at, name in others})
        return [Piece(at.start, tensors[name]) for at, name in others]

    read_pieces(path, FileDigest(entry.sha256, entry.bytes), wanted)
    return tensors, has_table


# -- removing ------------------------------------------------------------------------------------


def retain(root: Path, keep: int, protect: Collection[str] = ()) -> list[str]:
    """Delete all but the `keep` newest snapshots and those in `protect`.

    Returns the names of the deleted snapshots, oldest first.
    """
    if keep < 1:
        raise SnapshotError(f"at least one snapshot must be kept, got keep={keep}")
    old = [name for name in snapshot_ids(root)[:-keep] if name not in protect]
    for name in old:
        doomed = root / f"{files.TEMPORARY}{name}"
        with (
            files.naming(root / name, "cannot delete snapshot"),
            state_files.opened_folder(root),
        ):
            files.remove(doomed)
            os.rename(root / name, doomed)
            files.sync_directory(root)  # the name is gone before the first of its files is
            failpoint("retain.hidden")
            files.remove(doomed)
    return old


def clean(root: Path) -> list[str]:
    """Remove what a crash left unfinished in `root`, and return its names.

    Only the owner of the state directory may call this.
    """
    with files.naming(root, "cannot remove what is unfinished in"):
        return state_files.remove_all(root, files.TEMPORARY)
