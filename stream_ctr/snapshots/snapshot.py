"""A snapshot is one directory: safetensors files, segments of spilled impressions, and a manifest that vouches for every byte of them.

    snapshots/00000012-20250101T101500Z/model.safetensors, ..., manifest.json, manifest.sig (where snapshots are signed)

It becomes visible by one rename, when everything in it is on disk, so a crash leaves the snapshots that were there before or those
and a complete new one. Names that start with `tmp-` are unfinished or half deleted and are nobody's snapshot. What the arrays mean is
not known here. Nothing is ever unpickled: a file holds numbers, and those are read from the very bytes whose SHA-256 was compared.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypedDict, cast, get_type_hints

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from stream_ctr.errors import SnapshotError
from stream_ctr.failpoint import failpoint

FORMAT = 1
DTYPES = {
    "bool",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float16",
    "float32",
    "float64",
    "complex64",
}

Array = np.ndarray[Any, Any]
Tensors = dict[str, dict[str, Array]]

_MANIFEST = "manifest.json"
_SIGNATURE = "manifest.sig"
_SUFFIX = ".safetensors"
SEGMENT_SUFFIX = ".arrow"
_TEMPORARY = "tmp-"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")

_log = logging.getLogger(__name__)


# This process and no other, also where every process is the first of its container.
OWN = f"{os.getpid()}-{secrets.token_hex(4)}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()


class Pointer(TypedDict):
    """The small JSON object that says which snapshot subscribers load. Times are epoch milliseconds."""

    format: int
    model: str
    snapshot: str
    path: str
    epoch: int
    sequence: int
    manifest_sha256: str
    examples: int
    event_time_ms: int
    created_ms: int


Verify = Callable[[bytes, bytes], None]
"""(manifest, signature): raises SnapshotError unless the signature is good."""
Segments = Mapping[str, tuple[Path, str, int]]
"""Files that are no tensors, by name: where each is, its SHA-256 and its size. They are immutable."""


def new_id(sequence: int, event_time_ms: int) -> str:
    """A name whose order is the order of writing, and which tells a person how far in event time the snapshot got.

    >>> new_id(12, 1_735_726_500_000)
    '00000012-20250101T101500Z'
    """
    moment = datetime(1970, 1, 1) + timedelta(milliseconds=event_time_ms)
    return (
        f"{sequence:08d}-{moment.isoformat(timespec='seconds').replace('-', '').replace(':', '')}Z"
    )


def stems(beside: str | None = None) -> tuple[str, str]:
    """The files of the published model and of its optimiser, or of one that was learned beside it.

    >>> stems(), stems("fm")
    (('model', 'optimizer'), ('fm.model', 'fm.optimizer'))
    """
    prefix = f"{beside}." if beside else ""
    return f"{prefix}model", f"{prefix}optimizer"


def file_name(stem: str) -> str:
    """Of the tensors with this stem.

    >>> file_name("fm.model")
    'fm.model.safetensors'
    """
    return f"{stem}{_SUFFIX}"


def write(
    root: Path,
    *,
    tensors: Mapping[str, Mapping[str, Array]],
    manifest: Mapping[str, object],
    snapshot_id: str,
    segments: Segments | None = None,
    sign: Callable[[bytes], bytes] | None = None,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Write `tensors` (file stem -> name -> array) and `manifest` as `root/snapshot_id`; the path of that directory.

    Arrays of any layout are taken, of the dtypes in `DTYPES`; `segments` are moved in (see `stage`). `format`, `snapshot` and `files` are
    added to the manifest. `check` is called before the snapshot becomes visible and may raise. Everything is on disk when this returns.
    Raises SnapshotError, with nothing left behind, when something cannot be stored or the disk is full.
    """
    segments = segments or {}
    for stem, named in tensors.items():
        _require_storable(stem, named)
    described = {**manifest, "format": FORMAT, "snapshot": _snapshot_name(snapshot_id)}
    _json(described)  # a manifest that is not JSON is refused before anything is written
    # A name of this process's own: another that was taken over may be writing under the same id.
    final, temporary = root / snapshot_id, root / f"{_TEMPORARY}{OWN}-{snapshot_id}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _require_space(
            root,
            snapshot_id,
            sum(array.nbytes for named in tensors.values() for array in named.values()),
        )
        if final.exists():
            raise SnapshotError(
                f"snapshot {final} exists already: a snapshot is never written twice"
            )
        _remove(temporary)
        temporary.mkdir()
        files = {
            f"{stem}{_SUFFIX}": _write_tensors(temporary / f"{stem}{_SUFFIX}", named)
            for stem, named in tensors.items()
        }
        for name, (staged, digest, size) in segments.items():
            os.rename(staged, temporary / _plain(name, "segment"))
            files[name] = {"sha256": digest, "bytes": size}
        described["files"] = files
        failpoint("snapshot.files")
        text = _json(described)
        if sign:
            _write_bytes(temporary / _SIGNATURE, sign(text))
        _write_bytes(temporary / _MANIFEST, text)
        _sync_directory(temporary)
        failpoint("snapshot.manifest")
        check()
        os.rename(temporary, final)
        failpoint("snapshot.rename")
        _sync_directory(root)
    except (OSError, SafetensorError) as reason:
        free = shutil.disk_usage(root).free if root.is_dir() else 0
        raise SnapshotError(
            f"cannot write snapshot {final}: {reason}; {_size(free)} free there now, nothing was left behind"
        ) from reason
    finally:
        if not final.exists() or temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def stage(root: Path, segments: Segments) -> Segments:
    """A link of this moment to each of these files, under `root`, so that they may be deleted where they are; `write` takes it."""
    if not segments:
        return {}
    place = root / f"{_TEMPORARY}{OWN}-segments"
    with _named(place, "cannot keep segments in"):
        _remove(place)
        place.mkdir(parents=True)
        for name, (path, _, _) in segments.items():
            link(path, place / _plain(name, "segment"))
    return {name: (place / name, digest, size) for name, (_, digest, size) in segments.items()}


def link(source: Path, target: Path) -> None:
    """A second name for a file that never changes; a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def verify(
    path: Path, *, manifest_sha256: str | None = None, signature: Verify | None = None
) -> dict[str, Any]:
    """The manifest of the snapshot at `path`, after every file was found with the size and the SHA-256 that it names.

    `manifest_sha256` is what a pointer says of the manifest itself; `signature`, when given, must accept its signature before anything else
    is looked at. Raises SnapshotError, which names the file and what is wrong.
    """
    manifest = _verified_manifest(path, manifest_sha256, signature)
    for name, entry in manifest["files"].items():
        with _reading(path / name) as fd, os.fdopen(fd, "rb", closefd=False) as file:
            _compare(
                path / name,
                os.fstat(fd).st_size,
                hashlib.file_digest(file, "sha256").hexdigest(),
                entry,
            )
    return manifest


def load(
    path: Path,
    *,
    files: Collection[str] | Callable[[Mapping[str, Any]], Collection[str]] | None = None,
    manifest_sha256: str | None = None,
    signature: Verify | None = None,
) -> tuple[dict[str, Any], Tensors]:
    """The manifest and the arrays (file stem -> name -> array, yours to change) of the snapshot at `path`.

    `files` names the stems that are wanted, or does so when it is given the manifest; without it all are read. Presence and size of every
    file are checked, and the SHA-256 of those that are read. Raises SnapshotError as `verify` does.
    """
    manifest = _verified_manifest(path, manifest_sha256, signature)
    stems = [name.removesuffix(_SUFFIX) for name in manifest["files"] if name.endswith(_SUFFIX)]
    wanted = stems if files is None else list(files(manifest) if callable(files) else files)
    if missing := sorted(set(wanted) - set(stems)):
        raise SnapshotError(
            f"snapshot {path} has no file {missing[0]}{_SUFFIX}; it has {', '.join(manifest['files']) or 'none'}"
        )
    return manifest, {
        stem: _read_tensors(path / f"{stem}{_SUFFIX}", manifest["files"][f"{stem}{_SUFFIX}"])
        for stem in wanted
    }


def segments(path: Path, manifest: Mapping[str, Any]) -> dict[str, tuple[Path, str]]:
    """The segment files of the snapshot at `path` whose manifest this is, with the SHA-256 that they must have."""
    return {
        name: (path / name, entry["sha256"])
        for name, entry in manifest["files"].items()
        if name.endswith(SEGMENT_SUFFIX)
    }


def newest(root: Path, *, signature: Verify | None = None) -> Path | None:
    """The newest snapshot in `root` that verifies, None when there is none at all.

    A snapshot that does not verify is passed over with a warning. Raises SnapshotError when there are snapshots and none verifies.
    """
    paths = [root / name for name in reversed(snapshot_ids(root))]
    first_reason: SnapshotError | None = None
    for path in paths:
        try:
            verify(path, signature=signature)
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


def next_sequence(root: Path) -> int:
    """Above that of all snapshots in `root`, whether they verify or not.

    >>> next_sequence(Path("/nowhere"))
    1
    """
    found = [re.match(r"(\d{8,})-", name) for name in snapshot_ids(root)]
    return 1 + max((int(match[1]) for match in found if match), default=0)


def snapshot_ids(root: Path) -> list[str]:
    """The names of the snapshots in `root`, oldest first, whether they verify or not."""
    if not root.is_dir():
        return []
    with _named(root, "cannot list"):
        return sorted(
            entry.name
            for entry in os.scandir(root)
            if entry.is_dir()
            and _PLAIN_NAME.fullmatch(entry.name)
            and not entry.name.startswith(_TEMPORARY)
        )


def retain(root: Path, keep: int, protect: Collection[str] = ()) -> list[str]:
    """Delete all but the `keep` newest snapshots and those named in `protect`; the names of the deleted, oldest first."""
    if keep < 1:
        raise SnapshotError(f"at least one snapshot must be kept, got keep={keep}")
    old = [name for name in snapshot_ids(root)[:-keep] if name not in protect]
    for name in old:
        doomed = root / f"{_TEMPORARY}{name}"
        with _named(root / name, "cannot delete snapshot"):
            _remove(doomed)
            os.rename(root / name, doomed)
            _sync_directory(root)  # gone from sight before the first of its files is
            failpoint("retain.hidden")
            _remove(doomed)
    return old


def clean(root: Path) -> list[str]:
    """Remove what a crash left unfinished in `root`; its names. Only the owner of the state directory may do this."""
    left = sorted(path.name for path in root.glob(f"{_TEMPORARY}*")) if root.is_dir() else []
    for name in left:
        with _named(root / name, "cannot remove"):
            _remove(root / name)
    return left


def pointer_for(path: Path, manifest: Mapping[str, Any], *, epoch: int | None = None) -> Pointer:
    """The pointer to the snapshot at `path`, whose manifest tells the model's name, epoch, sequence, examples and times.

    `epoch` is another one than the manifest's when a snapshot is published after one of a later epoch.
    """
    with _reading(path / _MANIFEST) as fd:
        digest = hashlib.sha256(_read_all(fd)).hexdigest()
    described = {
        name: manifest.get(name)
        for name in ("model", "epoch", "sequence", "examples", "event_time_ms", "created_ms")
    }
    if epoch is not None:
        described["epoch"] = epoch
    located = {
        "format": FORMAT,
        "snapshot": path.name,
        "path": str(path.absolute()),
        "manifest_sha256": digest,
    }
    return verify_pointer({**located, **described})


def write_pointer(path: Path, pointer: Mapping[str, object]) -> None:
    """Replace the file at `path` by `pointer` in one step: a reader sees the old pointer or the new one, also after a crash."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    with _named(path, "cannot write pointer"):
        _write_bytes(temporary, _json(pointer))
        failpoint("pointer.before")
        os.replace(temporary, path)
        failpoint("pointer.after")
        _sync_directory(path.parent)


def read_pointer(path: Path) -> Pointer | None:
    """The pointer in the file at `path`, None as long as nothing was published there. Raises SnapshotError when it is not a pointer."""
    if not path.exists():
        return None
    with _reading(path) as fd:
        return verify_pointer(_parse(_read_all(fd), str(path)))


def verify_pointer(pointer: object) -> Pointer:
    """`pointer`, decoded JSON from anywhere, as a Pointer: every field there, of its type, and its path the place it names.

    It says nothing of the snapshot: `load(Path(pointer["path"]), manifest_sha256=pointer["manifest_sha256"])` does.
    """
    if not isinstance(pointer, Mapping):
        raise SnapshotError(f"a pointer is a JSON object, got {type(pointer).__name__}")
    _require_format(pointer.get("format"), "pointer")
    for name, kind in get_type_hints(Pointer).items():
        if type(pointer.get(name)) is not kind:
            raise SnapshotError(
                f"pointer field {name!r} must be {kind.__name__}, got {pointer.get(name)!r:.200}"
            )
        if kind is int and not 0 <= pointer[name] < 1 << 63:
            raise SnapshotError(f"pointer field {name!r} is out of range: {pointer[name]!r:.200}")
    path = Path(pointer["path"])
    if not path.is_absolute() or path.name != _snapshot_name(pointer["snapshot"]):
        found = f"{pointer['path']!r:.200}"
        raise SnapshotError(
            f"pointer path {found} must be absolute and end in the snapshot's name {pointer['snapshot']!r}"
        )
    if not _SHA256.fullmatch(pointer["manifest_sha256"]):
        raise SnapshotError(
            f"pointer field 'manifest_sha256' must be 64 hexadecimal digits, got {pointer['manifest_sha256']!r:.200}"
        )
    return cast(Pointer, dict(pointer))


def weights_sha256(tensors: Mapping[str, Array]) -> str:
    """SHA-256 over name, dtype, shape and values of all arrays in the order of their names: equal when every bit is.

    >>> weights_sha256({"a": np.zeros(2), "b": np.ones(1)}) == weights_sha256({"b": np.ones(1), "a": np.zeros(2)})
    True
    >>> weights_sha256({"a": np.zeros(2)}) == weights_sha256({"a": np.zeros((2, 1))})
    False
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = _little_endian(tensors[name])
        digest.update(json.dumps([name, array.dtype.str, array.shape]).encode() + b"\n")
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _plain(name: str, what: str) -> str:
    if not _PLAIN_NAME.fullmatch(name):
        raise SnapshotError(
            f"{what} {name!r:.200} is not a plain name: letters, digits, '_', '-' and '.', not starting with '.' or '-'"
        )
    return name


def _snapshot_name(name: str) -> str:
    if name.startswith(_TEMPORARY):
        raise SnapshotError(
            f"snapshot {name!r:.200} may not start with {_TEMPORARY!r}, which marks what is unfinished"
        )
    return _plain(name, "snapshot")


def _require_storable(stem: str, named: Mapping[str, Array]) -> None:
    _plain(stem, "file stem")
    for name, array in named.items():
        if array.dtype.name not in DTYPES:
            raise SnapshotError(
                f"array {name!r} of {stem}{_SUFFIX} is {array.dtype}, which cannot be stored; use {', '.join(sorted(DTYPES))}"
            )


def _little_endian(array: Array) -> Array:
    # safetensors writes the buffer from its first byte on whatever the strides are: a transposed array would come back wrong.
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def _require_space(root: Path, snapshot_id: str, needed: int) -> None:
    if (free := shutil.disk_usage(root).free) < needed:
        raise SnapshotError(
            f"snapshot {snapshot_id} needs {_size(needed)}, {root} has {_size(free)} free: make room, nothing was written"
        )


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _json(value: Mapping[str, object]) -> bytes:
    try:
        return json.dumps(value, indent=1, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as reason:
        raise SnapshotError(f"manifest or pointer is not JSON: {reason}") from reason


def _write_tensors(path: Path, named: Mapping[str, Array]) -> dict[str, object]:
    safetensors.numpy.save_file(
        {name: _little_endian(array) for name, array in named.items()}, path
    )
    with open(
        path, "rb+"
    ) as file:  # hashed as it stands in the page cache: no second copy of a large table in memory
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fchmod(
            file.fileno(), 0o666 & ~_UMASK
        )  # safetensors makes files that their owner alone may read
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
    failpoint("snapshot.file")
    return {"sha256": digest, "bytes": size}


def _write_bytes(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _named(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as reason:
        raise SnapshotError(f"{what} {path}: {reason.strerror or reason}") from reason


@contextmanager
def _reading(path: Path) -> Iterator[int]:
    with _named(path, "cannot read"):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            yield fd
        finally:
            os.close(fd)


def _read_all(fd: int) -> bytes:
    with os.fdopen(fd, "rb", buffering=0, closefd=False) as file:
        return file.readall()


def _parse(data: bytes, what: str) -> object:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as reason:
        raise SnapshotError(f"{what} is not JSON: {reason}") from reason


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that is too long, a folder that we may not enter
        return False


def _require_format(found: object, what: str) -> None:
    if found != FORMAT or type(found) is not int:
        raise SnapshotError(
            f"{what} has format {found!r:.200}, this version of stream-ctr reads {FORMAT}"
        )


def _verified_manifest(
    path: Path, expected_sha256: str | None, signature: Verify | None
) -> dict[str, Any]:
    """The manifest, after its signature, its own hash, its form, and the presence and size of each file it names."""
    if not _is_directory(path):
        raise SnapshotError(f"there is no snapshot directory {str(path)!r:.300}")
    with _reading(path / _MANIFEST) as fd:
        data = _read_all(fd)
    if signature:
        _require_signature(path, data, signature)
    if (
        expected_sha256 is not None
        and (found := hashlib.sha256(data).hexdigest()) != expected_sha256
    ):
        raise SnapshotError(
            f"{path / _MANIFEST} has SHA-256 {found}, its pointer says {expected_sha256}"
        )
    manifest = _parse(data, str(path / _MANIFEST))
    if not isinstance(manifest, dict):
        raise SnapshotError(
            f"{path / _MANIFEST} must be a JSON object, got {type(manifest).__name__}"
        )
    _require_format(manifest.get("format"), str(path / _MANIFEST))
    _require_entries(path, manifest.get("files"))
    _require_files(path, manifest["files"])
    return manifest


def _require_signature(path: Path, data: bytes, verify_signature: Verify) -> None:
    if not (path / _SIGNATURE).exists():
        raise SnapshotError(f"snapshot {path} is not signed, and a signature is required")
    with _reading(path / _SIGNATURE) as fd:
        found = _read_all(fd)
    try:
        verify_signature(data, found)
    except SnapshotError as reason:
        raise SnapshotError(f"{path / _MANIFEST}: {reason}") from None


def _require_entries(path: Path, files: object) -> None:
    if not isinstance(files, dict):
        raise SnapshotError(
            f"{path / _MANIFEST}: 'files' must be an object, got {type(files).__name__}"
        )
    for name, entry in files.items():
        if not name.endswith((_SUFFIX, SEGMENT_SUFFIX)):
            raise SnapshotError(
                f"{path / _MANIFEST}: file {name!r} is not named *{_SUFFIX} or *{SEGMENT_SUFFIX}"
            )
        _plain(name, f"{path / _MANIFEST}: file")
        if (
            not isinstance(entry, dict)
            or type(entry.get("bytes")) is not int
            or not isinstance(entry.get("sha256"), str)
        ):
            raise SnapshotError(
                f"{path / _MANIFEST}: file {name!r} must have 'bytes' and 'sha256', got {entry!r}"
            )


def _require_files(path: Path, files: Mapping[str, Mapping[str, object]]) -> None:
    with _named(path, "cannot list"):
        found = {entry.name: entry for entry in os.scandir(path)}
        for name in sorted({_MANIFEST, *files} - set(found)):
            raise SnapshotError(f"{path / name} is missing, the manifest names it")
        for name in sorted(set(found) - {_MANIFEST, _SIGNATURE, *files}):
            raise SnapshotError(f"{path / name} is not in the manifest")
        for name, entry in files.items():
            if not found[name].is_file(follow_symlinks=False):
                raise SnapshotError(f"{path / name} is not a regular file")
            _compare(path / name, found[name].stat(follow_symlinks=False).st_size, None, entry)


def _compare(path: Path, size: int, sha256: str | None, entry: Mapping[str, object]) -> None:
    if size != entry["bytes"]:
        raise SnapshotError(f"{path} has {size} bytes, the manifest says {entry['bytes']}")
    if sha256 is not None and sha256 != entry["sha256"]:
        raise SnapshotError(
            f"{path} has SHA-256 {sha256}, the manifest says {entry['sha256']}: the file was changed after it was written"
        )


def _read_tensors(path: Path, entry: Mapping[str, object]) -> dict[str, Array]:
    with _reading(path) as fd:
        _compare(
            path, os.fstat(fd).st_size, None, entry
        )  # before a file that has grown is read into memory
        data = _read_all(fd)
    _compare(path, len(data), hashlib.sha256(data).hexdigest(), entry)
    try:
        return cast(dict[str, Array], safetensors.numpy.load(data))
    except (SafetensorError, ValueError) as reason:
        raise SnapshotError(f"{path} is not a safetensors file: {reason}") from reason
    except KeyError as unknown:
        raise SnapshotError(f"{path} holds dtype {unknown}, which numpy does not have") from unknown
