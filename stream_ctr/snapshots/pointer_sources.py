"""The places where a subscriber finds pointers: a state directory, or the snapshot topic."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from stream_ctr.errors import SnapshotError
from stream_ctr.snapshots import files
from stream_ctr.snapshots.contract import NewerFormat, Verify
from stream_ctr.snapshots.pointer import Pointer, decode_pointer, read_pointer, require_signature
from stream_ctr.snapshots.snapshot_topic import Holder

_log = logging.getLogger(__name__)
_FILE_POLL_SECONDS = 0.1


class PointerSource(Protocol):
    """A source of pointers."""

    @property
    def holder(self) -> str | None:
        """The run that is published there, as far as was polled: the one to begin with."""
        ...

    def poll(self, timeout_seconds: float) -> Sequence[Pointer | SnapshotError]:
        """Return the pointers that arrived, after at most `timeout_seconds`.

        A pointer that cannot be decoded is the error that says so. Raises any error if the source
        cannot be read now; a subscriber polls again.
        """
        ...

    def locate(self, pointer: Pointer) -> Path:
        """Return the directory of the snapshot on this machine, whether it is there or not."""
        ...


class FilePointers:
    """The pointers that appear in `latest.json` of a state directory.

    The snapshots are in the folder beside it, wherever the directory was moved or is mounted.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / "latest.json"
        self._seen: tuple[int, int] | None = None
        self.holder: str | None = None
        """The run of the pointer that was read last."""

    def poll(self, timeout_seconds: float) -> list[Pointer | SnapshotError]:
        """Return the pointer if the file changed, after at most `timeout_seconds`.

        Raises `OSError` if the file cannot be read now. It is then read by the next call.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                status = self._path.stat()
            except FileNotFoundError:
                status = None
            if status and (status.st_mtime_ns, status.st_ino) != self._seen:
                found = self._read()
                self._seen = (status.st_mtime_ns, status.st_ino)
                return found
            if time.monotonic() >= deadline:
                return []
            time.sleep(_FILE_POLL_SECONDS)

    def locate(self, pointer: Pointer) -> Path:
        """Return the directory of the snapshot, beside `latest.json`."""
        return (self._directory / "snapshots" / pointer.snapshot).absolute()

    def _read(self) -> list[Pointer | SnapshotError]:
        try:
            pointer = read_pointer(self._path)
        except SnapshotError as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            return [error]
        self.holder = pointer.run if pointer else None
        return [pointer] if pointer else []


class Download(Protocol):
    """Returns the directory of a snapshot that is not on this machine, by its pointer.

    `close` ends what is on its way.
    """

    def __call__(self, pointer: Pointer) -> Path: ...
    def close(self) -> None: ...


class TopicPointers:
    """The pointers of one name on the snapshot topic.

    `reader.poll(seconds)` returns (key, value) pairs of a compacted topic, and the value None
    withdraws a pointer. `reader.caught_up` is true once everything has been polled that was in the
    topic at the start. The snapshots are where the run wrote them, or in the folder `snapshots`. A
    snapshot that is not on this machine is one that `download` returns, by the URL that its pointer
    names. With `signature`, pointers that it refuses are errors, and hold no name.
    """

    def __init__(
        self,
        reader: Any,
        *,
        model_name: str = "default",
        snapshots: Path | None = None,
        download: Download | None = None,
        signature: Verify | None = None,
    ) -> None:
        self._reader = reader
        self._snapshots = snapshots
        self._download = download
        self._signature = signature
        self._model_name = model_name
        self._holder = Holder()
        self._pointers: list[Pointer] = []
        self._errors: list[SnapshotError] = []

    @property
    def holder(self) -> str | None:
        """The run that holds the name."""
        return self._holder.run

    def poll(self, timeout_seconds: float) -> list[Pointer | SnapshotError]:
        """Return the errors of those that cannot be read, then the pointers.

        Those of the run that holds the name come first, and among them those of the highest rank: a
        trainer that was taken over may have written a pointer after it. A pointer of a newer
        version, whose run and rank cannot be read, supersedes all that came before it. Nothing is
        returned before the reader has caught up: which run holds the name is not known until then.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            remaining_seconds = max(0.0, deadline - time.monotonic())
            for key, value in self._reader.poll(remaining_seconds):
                if key == self._model_name:
                    self._take(key, value)
            if self._reader.caught_up or time.monotonic() >= deadline:
                break
        return self._ordered() if self._reader.caught_up else []

    def locate(self, pointer: Pointer) -> Path:
        """Return the directory of the snapshot: where it was given, the run's own, or a copy of it.

        Raises `SnapshotError` if it cannot be downloaded.
        """
        if self._snapshots:
            return self._snapshots / pointer.snapshot
        path = Path(pointer.path)
        if self._download and not files.is_directory(path):
            return self._download(pointer)
        return path

    def close(self) -> None:
        """End a download. The reader stays open."""
        if self._download:
            self._download.close()

    def _take(self, key: str, value: bytes | None) -> None:
        if value is None:
            _log.warning("the pointer of model %r was withdrawn; the loaded one stays", key)
            self._holder.withdraw()
            return
        try:
            pointer = decode_pointer(value, f"pointer of model {key!r:.80}")
            if self._signature:
                require_signature(pointer, self._signature)
        except SnapshotError as error:
            self._errors.append(error)
            if isinstance(error, NewerFormat):
                self._pointers.clear()
        else:
            self._holder.take(pointer)
            self._pointers.append(pointer)

    def _ordered(self) -> list[Pointer | SnapshotError]:
        holder = self._holder.run
        pointers = sorted(
            self._pointers, key=lambda pointer: (pointer.run == holder, pointer.rank), reverse=True
        )
        errors = self._errors
        self._pointers = []
        self._errors = []
        return [*errors, *pointers]
