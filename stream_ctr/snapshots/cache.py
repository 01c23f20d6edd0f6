"""Snapshots of other machines, on this one: what serving needs of each, in a bounded folder.

    CACHE/<SHA-256 of the manifest>/00000012-20250101T101500Z/manifest.json, model.safetensors, ...
                                    tmp-model.safetensors   a transfer that is not complete
                                    lock                    held while files arrive
                                    used                    held while a process serves it

A file appears in the folder of its snapshot by a rename, when its size and its digest are those of
the manifest, whose own digest is that of the pointer. What a crash or a broken connection leaves is
continued by the next process. Several processes may share a cache: one downloads a snapshot, and
the others wait for it. The snapshots that were used last stay, and those that a living process
serves.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from stream_ctr import state_files
from stream_ctr.errors import SnapshotError
from stream_ctr.messages import one_line
from stream_ctr.snapshots import files, snapshot
from stream_ctr.snapshots.contract import Verify
from stream_ctr.snapshots.manifest import FileEntry, Manifest
from stream_ctr.snapshots.places import Place, download, require_space
from stream_ctr.snapshots.pointer import Pointer
from stream_ctr.snapshots.snapshot import OWN

Needed = Callable[[Manifest], Collection[str]]
"""Returns the names of the files that are needed of a snapshot."""

_ENTRY = re.compile(r"[0-9a-f]{64}")
_PATIENCE_SECONDS = 60.0
_WAIT_SECONDS = 0.05


def default_cache() -> Path:
    """Return the folder for snapshots in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "stream-ctr" / "snapshots"


class SnapshotCache:
    """Copies of snapshots in the folder `directory`, of which the `keep` last used ones stay.

    `needed` names the files to download. With `signature`, only snapshots that it accepts are kept.
    """

    def __init__(
        self,
        directory: Path,
        needed: Needed,
        *,
        signature: Verify | None = None,
        keep: int = 2,
    ) -> None:
        self._directory = directory
        self._needed = needed
        self._signature = signature
        self._keep = keep
        self._held: tuple[str, int] | None = None  # entry, descriptor of its file `used`
        self._closed = threading.Event()

    def fetch(self, place: Place, pointer: Pointer) -> Path:
        """Return the folder of the snapshot with all that is needed, downloaded from the place.

        It stays until another one is fetched. Raises `SnapshotError` if something is not there,
        does not have the digest that it must have, or does not fit on the disk.
        """
        entry = self._directory / pointer.manifest_sha256
        with files.naming(entry, "cannot keep a snapshot in"):
            self._hold(entry)
            with self._locked(entry):
                path = self._complete(place, entry, pointer)
            os.utime(entry / "used")
            self._remove_old(entry)
        return path

    def close(self) -> None:
        """End a download, and let the snapshot in use be removed."""
        self._closed.set()
        self._release()

    # -- downloading -----------------------------------------------------------------------------

    def _complete(self, place: Place, entry: Path, pointer: Pointer) -> Path:
        """Download what is missing, and replace what is damaged."""
        path = entry / files.snapshot_name(pointer.snapshot)
        path.mkdir(exist_ok=True)
        manifest = self._manifest(place, path, pointer)
        wanted = {name: _entry_of(manifest, name, path) for name in self._needed(manifest)}
        missing = {name: found for name, found in wanted.items() if not _intact(path / name, found)}
        require_space(entry, sum(found.bytes for found in missing.values()))
        for name, found in missing.items():
            temporary = entry / f"{files.TEMPORARY}{name}"
            download(
                place,
                f"snapshots/{pointer.snapshot}/{name}",
                temporary,
                size=found.bytes,
                sha256=found.sha256,
                stopped=self._closed.is_set,
            )
            os.replace(temporary, path / name)
        files.sync_directory(path)
        return path

    def _manifest(self, place: Place, path: Path, pointer: Pointer) -> Manifest:
        """Return the manifest, downloaded if it is not there or not the one of the pointer."""
        try:
            return self._read_manifest(path, pointer)
        except SnapshotError:
            files.remove(path)
            path.mkdir()
        source = f"snapshots/{pointer.snapshot}"
        data = place.read(f"{source}/{files.MANIFEST}", files.LARGEST_MANIFEST_BYTES)
        found = hashlib.sha256(data).hexdigest()
        if found != pointer.manifest_sha256:
            raise SnapshotError(
                f"{place.url}: {source}/{files.MANIFEST} has SHA-256 {found}, "
                f"its pointer says {pointer.manifest_sha256}"
            )
        with contextlib.suppress(files.Missing):
            signature = place.read(f"{source}/{files.SIGNATURE}", files.LARGEST_DOCUMENT_BYTES)
            files.write_durably(path / files.SIGNATURE, signature)
        files.write_durably(path / files.MANIFEST, data)
        return self._read_manifest(path, pointer)

    def _read_manifest(self, path: Path, pointer: Pointer) -> Manifest:
        return snapshot.load(
            path,
            stems=(),
            manifest_sha256=pointer.manifest_sha256,
            signature=self._signature,
            partial=True,
        )[0]

    # -- other processes -------------------------------------------------------------------------

    def _hold(self, entry: Path) -> None:
        """Keep others from removing the entry, and let go of the one that was held."""
        if self._held and self._held[0] == entry.name and _is_open(self._held[1], entry / "used"):
            return
        while True:
            state_files.make_directories(entry)
            try:
                fd = state_files.open_file(entry / "used", os.O_RDWR | os.O_CREAT)
            except FileNotFoundError:  # it was removed meanwhile
                continue
            fcntl.flock(fd, fcntl.LOCK_SH)
            if _is_open(fd, entry / "used"):
                break
            os.close(fd)  # the same
        self._release()
        self._held = entry.name, fd

    def _release(self) -> None:
        if self._held:
            os.close(self._held[1])
            self._held = None

    @contextlib.contextmanager
    def _locked(self, entry: Path) -> Iterator[None]:
        """Be the only process that downloads this snapshot."""
        fd = state_files.open_file(entry / "lock", os.O_RDWR | os.O_CREAT)
        try:
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while not _try_lock(fd):
                if time.monotonic() > deadline or self._closed.is_set():
                    raise SnapshotError(
                        f"another process has been downloading to {entry} for "
                        f"{_PATIENCE_SECONDS:g} s"
                    )
                time.sleep(_WAIT_SECONDS)
            yield
        finally:
            os.close(fd)

    def _remove_old(self, newest: Path) -> None:
        """Remove all but the `keep` snapshots that were used last, unless they are in use."""
        found = [path for path in self._directory.iterdir() if _ENTRY.fullmatch(path.name)]
        found.sort(key=lambda path: (path.name == newest.name, _used_at(path)), reverse=True)
        for entry in found[self._keep :]:
            with contextlib.suppress(OSError):  # another process removes it, too
                _hide_unused(entry)
        with contextlib.suppress(OSError):
            state_files.remove_all(self._directory, files.TEMPORARY)


def _hide_unused(entry: Path) -> None:
    """Rename an entry that no process uses, to be removed."""
    fd = state_files.open_file(entry / "used", os.O_RDWR | os.O_CREAT)
    try:
        if _try_lock(fd) and _is_open(fd, entry / "used"):
            os.rename(entry, entry.with_name(f"{files.TEMPORARY}{OWN}-{entry.name}"))
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_open(fd: int, path: Path) -> bool:
    """Return whether `path` still leads to the file that is open."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _used_at(entry: Path) -> float:
    try:
        return (entry / "used").stat().st_mtime
    except OSError:
        return 0.0


def _entry_of(manifest: Manifest, name: str, path: Path) -> FileEntry:
    try:
        return manifest.files[name]
    except KeyError:
        raise SnapshotError(
            f"snapshot {path.name} has no file {one_line(name)}; it has "
            f"{one_line(', '.join(manifest.files) or 'none', 400)}"
        ) from None


def _intact(path: Path, entry: FileEntry) -> bool:
    """Return whether the file is there, whole, and as it was; a damaged one is removed."""
    try:
        with files.opened(path) as fd, os.fdopen(fd, "rb", closefd=False) as file:
            intact = os.fstat(fd).st_size == entry.bytes and (
                hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
            )
    except files.Missing:
        return False
    if not intact:
        path.unlink()
    return intact
