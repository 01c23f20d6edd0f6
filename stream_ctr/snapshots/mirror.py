"""A copy, at a URL, of what servers need of a state directory.

    URL/snapshots/NAME/...   weights of the models that serve, ONNX graphs, manifest, signature
    URL/latest.json          the pointer, when all of its snapshot is there
    URL/deltas/...           deltas, then the index that lists them

Two threads make the place equal to the directory, one for snapshots and one for deltas, which need
not wait while a snapshot of gigabytes is on its way. They read the directory and are told nothing:
so what failed is sent the next time, what was superseded is not sent any more, and a rollback from
another process reaches the mirror too. No other thread waits for them.

Files that the directory removes are removed from the mirror. A mirror belongs to one run: one that
holds another run's pointer is not touched.

A file that cannot be sent is counted, logged and tried again, less and less often, until something
new is published. At the end of a run it is an error, as a snapshot is that did not fit on the disk.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from stream_ctr.errors import SnapshotError, StreamCtrError
from stream_ctr.messages import one_line
from stream_ctr.snapshots import files, snapshot
from stream_ctr.snapshots.base_topic import FLUSH_SECONDS, ChunkSink, send_file
from stream_ctr.snapshots.contract import NewerFormat, decode
from stream_ctr.snapshots.delta_store import (
    FOLDER,
    INDEX,
    LARGEST_INDEX_BYTES,
    DeltaEntry,
    DeltaIndex,
    decode_index,
    header_name,
    payload_name,
)
from stream_ctr.snapshots.lease import TakenOver
from stream_ctr.snapshots.manifest import FORMAT, Manifest
from stream_ctr.snapshots.places import Place, open_place
from stream_ctr.snapshots.pointer import Pointer, decode_pointer
from stream_ctr.snapshots.remote import POINTER

_log = logging.getLogger(__name__)
SNAPSHOT_SECONDS = 0.5
_DELTA_SECONDS = 0.1
_FIRST_RETRY_SECONDS = 1.0
_LAST_RETRY_SECONDS = 60.0
_PATIENCE_SECONDS = 60.0
_SNAPSHOT = re.compile(r"\d{8,}-\d{8}T\d{6}Z")
_DELTA = re.compile(r"\d{8,}-\d{8,}\.(?:json|safetensors)")


def mirrored_files(manifest: Manifest) -> list[str]:
    """Return the names of the files that servers need: weights and graphs of all models."""
    stems = dict.fromkeys(
        [snapshot.stems()[0], *(snapshot.stems(name)[0] for name in manifest.specs)]
    )
    wanted = [
        name
        for stem in stems
        for name in (*snapshot.file_names(manifest, stem), snapshot.graph_name(stem))
    ]
    return [name for name in wanted if name in manifest.files]


class Work(NamedTuple):
    """The work that a thread of a mirror does again and again, after so many seconds at most.

    It raises `SnapshotError` if something cannot be sent.
    """

    send: Callable[[], None]
    every_seconds: float


def mirror_at(
    url: str,
    directory: Path,
    *,
    run: str,
    check: Callable[[], None] = lambda: None,
    patience_seconds: float = _PATIENCE_SECONDS,
) -> Mirror:
    """Return a mirror of the state directory of a run at a URL.

    `check` is called before anything becomes visible, and raises `TakenOver` once another process
    has the directory. Raises `ConfigError` if nothing can be written at the URL.
    """
    place = open_place(url, writing=True)
    # A file system of its own: not all of them may be used by two threads.
    for_deltas = open_place(url, writing=True)
    works = {
        "snapshots": Work(SnapshotMirror(directory, place, run=run, check=check), SNAPSHOT_SECONDS),
        "deltas": Work(DeltaMirror(directory, for_deltas, run=run, check=check), _DELTA_SECONDS),
    }
    return Mirror(place.url, directory, works, patience_seconds=patience_seconds)


def mirror_once(url: str, directory: Path, pointer: Pointer) -> None:
    """Send what the place at a URL lacks of a state directory, whose published pointer is given.

    Raises `SnapshotError` if something cannot be sent, and `ConfigError` as `mirror_at` does.
    """
    place = open_place(url, writing=True)
    SnapshotMirror(directory, place, run=pointer.run)()
    DeltaMirror(directory, place, run=pointer.run)()


class Mirror:
    """Threads that send what servers need of a state directory to the place at `url`.

    As a context, it begins, and ends with `close`, which raises nothing if the block did.
    """

    def __init__(
        self,
        url: str,
        directory: Path,
        works: Mapping[str, Work],
        *,
        patience_seconds: float = _PATIENCE_SECONDS,
    ) -> None:
        self.url = url
        """The address for messages."""
        self._directory = directory
        self._patience_seconds = patience_seconds
        self._taken = 0
        self._lanes = {name: _Lane(f"{name} to {url}", work) for name, work in works.items()}

    @property
    def failures(self) -> dict[str, int]:
        """The number of attempts that failed: those to send `snapshots`, and `deltas`."""
        return {name: lane.failures for name, lane in self._lanes.items()}

    def take_failures(self) -> Counter[str]:
        """Return the failures since the last call, as a run counts them."""
        total = sum(self.failures.values())
        taken, self._taken = self._taken, total
        return Counter({"mirror_failed": total - taken} if total > taken else {})

    def wake(self, *_: object) -> None:
        """Look at the directory now. Any thread may call this, also as an outlet of deltas."""
        for lane in self._lanes.values():
            lane.wake()

    def close(self) -> None:
        """Send what is left, and stop; it takes a minute at most for what does not get on.

        Raises `SnapshotError` if something could not be sent.
        """
        deadline = time.monotonic() + self._patience_seconds
        for lane in self._lanes.values():
            lane.close()
        for name, lane in self._lanes.items():
            unfinished = not lane.join(max(0.0, deadline - time.monotonic()))
            reason = (
                f"it takes more than {self._patience_seconds:g} s" if unfinished else lane.error
            )
            if reason:
                raise SnapshotError(
                    f"the mirror at {self.url} does not have the last {name}: {reason}; the next "
                    f"run on {self._directory} sends them"
                )

    def __enter__(self) -> Self:
        for lane in self._lanes.values():
            lane.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except SnapshotError as failure:
            if error is None:
                raise
            _log.error("%s", failure)


class SnapshotMirror:
    """Calls make a place equal to a directory: the published snapshot, and its pointer."""

    def __init__(
        self,
        directory: Path,
        place: Place,
        *,
        run: str,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._directory = directory
        self._place = place
        self._run = run
        self._check = check
        self._mirrored: bytes | None = None
        self._sent: set[str] = set()

    def __call__(self) -> None:
        """Send the published snapshot if it is not there. Raises `SnapshotError`."""
        data = _contents(self._directory / POINTER, files.LARGEST_DOCUMENT_BYTES)
        if data is None or data == self._mirrored:
            return
        if self._mirrored is None and self._found() == data:
            self._mirrored = data
            return
        pointer = decode_pointer(data, str(self._directory / POINTER))
        self._send_snapshot(pointer)
        self._check()
        self._place.write(POINTER, data)
        self._mirrored = data
        self._remove_old(pointer)

    def _found(self) -> bytes | None:
        """Return the pointer that is there. Raises `SnapshotError` for that of another run."""
        data = _read(self._place, POINTER, files.LARGEST_DOCUMENT_BYTES)
        _require_run(self._place, POINTER, self._run, data, decode_pointer)
        return data

    def _send_snapshot(self, pointer: Pointer) -> None:
        path, manifest = _published(self._directory, pointer)
        for name in (*mirrored_files(manifest), *_signature(path), files.MANIFEST):
            target = f"snapshots/{pointer.snapshot}/{name}"
            if target not in self._sent:
                self._place.write(target, path / name)
                self._sent.add(target)

    def _remove_old(self, pointer: Pointer) -> None:
        """Remove the snapshots that the directory does not have any more."""
        kept = {pointer.snapshot, *snapshot.snapshot_ids(self._directory / "snapshots")}
        for name in self._place.names("snapshots"):
            if _SNAPSHOT.fullmatch(name) and name not in kept:
                self._place.remove(f"snapshots/{name}")
                self._sent = {
                    sent for sent in self._sent if not sent.startswith(f"snapshots/{name}/")
                }


class TopicMirror:
    """Calls send the published snapshot to a topic (see `base_topic`).

    The sink raises the errors `unavailable` if the broker does not take a record. No other thread
    may use it.
    """

    def __init__(
        self,
        directory: Path,
        topic: str,
        sink: ChunkSink,
        *,
        model_name: str,
        unavailable: tuple[type[Exception], ...],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._directory = directory
        self._topic = topic
        self._sink = sink
        self._model_name = model_name
        self._unavailable = unavailable
        self._check = check
        self._mirrored: bytes | None = None

    def __call__(self) -> None:
        """Send the published snapshot if it was not sent. Raises `SnapshotError`."""
        data = _contents(self._directory / POINTER, files.LARGEST_DOCUMENT_BYTES)
        if data is None or data == self._mirrored:
            return
        pointer = decode_pointer(data, str(self._directory / POINTER))
        path, manifest = _published(self._directory, pointer)
        self._check()
        try:
            for name in (*_signature(path), files.MANIFEST, *mirrored_files(manifest)):
                digest = pointer.manifest_sha256
                send_file(self._sink, self._topic, self._model_name, digest, path / name)
            self._sink.flush(FLUSH_SECONDS)
        except self._unavailable as error:
            raise SnapshotError(f"topic {self._topic!r}: {one_line(error, 400)}") from None
        self._mirrored = data


def _published(directory: Path, pointer: Pointer) -> tuple[Path, Manifest]:
    """Return path and manifest of a snapshot. Raises `SnapshotError` unless it is the pointer's."""
    path = directory / "snapshots" / pointer.snapshot
    data = files.read_manifest(path)
    if hashlib.sha256(data).hexdigest() != pointer.manifest_sha256:
        raise SnapshotError(f"{path / files.MANIFEST} is not the one of {POINTER}")
    return path, decode(data, Manifest, newest=FORMAT, name=str(path / files.MANIFEST))


def _signature(path: Path) -> list[str]:
    return [files.SIGNATURE] if (path / files.SIGNATURE).exists() else []


class DeltaMirror:
    """Calls make a place equal to a directory: the deltas that its index lists."""

    def __init__(
        self,
        directory: Path,
        place: Place,
        *,
        run: str,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder = directory / FOLDER
        self._place = place
        self._run = run
        self._check = check
        self._mirrored: bytes | None = None
        self._sent: set[DeltaEntry] = set()

    def __call__(self) -> None:
        """Send the deltas that are not there, and the index. Raises `SnapshotError`."""
        data = _contents(self._folder / INDEX, LARGEST_INDEX_BYTES)
        if data is None or data == self._mirrored:
            return
        index = decode_index(data, str(self._folder / INDEX))
        expired = self._expired(index.deltas)
        for entry in index.deltas:
            if entry not in self._sent:
                for name in _names(entry):
                    self._place.write(f"{FOLDER}/{name}", self._folder / name)
                self._sent.add(entry)
        self._check()
        self._place.write(f"{FOLDER}/{INDEX}", data)
        self._mirrored = data
        for name in expired:
            self._place.remove(f"{FOLDER}/{name}")
        self._sent &= {*index.deltas}

    def _expired(self, listed: tuple[DeltaEntry, ...]) -> list[str]:
        """Return the names of the files to remove once the new index is there."""
        kept = {name for entry in listed for name in _names(entry)}
        if self._mirrored is None:
            name = f"{FOLDER}/{INDEX}"
            data = _read(self._place, name, LARGEST_INDEX_BYTES)
            _require_run(self._place, name, self._run, data, decode_index)
            there = [name for name in self._place.names(FOLDER) if _DELTA.fullmatch(name)]
        else:
            there = [name for entry in self._sent for name in _names(entry)]
        return sorted({*there} - kept)


class _Lane:
    """A thread that does a piece of work again and again, until it is closed."""

    def __init__(self, subject: str, work: Work) -> None:
        self._subject = subject
        self._work = work
        self._pause_seconds = work.every_seconds
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self.failures = 0
        self.error: Exception | None = None

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wake(self) -> None:
        """Do the work now."""
        self._wake.set()

    def close(self) -> None:
        """Do the work once more, and end."""
        self._closing.set()
        self._wake.set()

    def join(self, seconds: float) -> bool:
        """Wait for the end, and return whether it came in time."""
        if self._thread.ident is not None:
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        last = False
        while not last:
            last = self._closing.is_set()
            try:
                self._work.send()
            except TakenOver as error:
                _log.error("no more %s: %s", self._subject, error)
                return
            except Exception as error:  # noqa: BLE001 - the thread must not end without a word
                self._fail(error)
            else:
                self.error = None
                self._pause_seconds = self._work.every_seconds
            if not last:
                self._wake.wait(self._pause_seconds)
                self._wake.clear()

    def _fail(self, error: Exception) -> None:
        if str(error) != str(self.error):
            expected = isinstance(error, StreamCtrError)
            _log.error("could not send %s: %s", self._subject, error, exc_info=not expected)
        retried = self.error is not None
        self._pause_seconds = (
            min(2 * self._pause_seconds, _LAST_RETRY_SECONDS) if retried else _FIRST_RETRY_SECONDS
        )
        self.failures += 1
        self.error = error


def _names(entry: DeltaEntry) -> Iterator[str]:
    """Yield the names of the files of a delta; the header comes last."""
    yield payload_name(entry.rank)
    yield header_name(entry.rank)


def _contents(path: Path, most_bytes: int) -> bytes | None:
    try:
        return files.read_document(path, most_bytes)
    except files.Missing:
        return None


def _read(place: Place, name: str, most_bytes: int) -> bytes | None:
    try:
        return place.read(name, most_bytes)
    except files.Missing:
        return None


def _require_run(
    place: Place,
    name: str,
    run: str,
    data: bytes | None,
    read: Callable[[bytes, str], Pointer | DeltaIndex],
) -> None:
    """Raise `SnapshotError` if a document that is there is another run's, or a newer version's.

    A document that cannot be read is replaced.
    """
    try:
        found = read(data, f"{place.url}: {name}").run if data else run
    except NewerFormat:
        raise
    except SnapshotError as error:
        _log.warning("it is replaced: %s", error)
        return
    if found != run:
        raise SnapshotError(
            f"{place.url} holds what run {one_line(found, 40)} publishes, and this is run {run}: "
            f"give each run a URL of its own, or remove {name} there"
        )
