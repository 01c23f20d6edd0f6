"""The places where a subscriber finds pointers: a state directory, or the snapshot topic."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from stream_ctr.errors import SnapshotError
from stream_ctr.snapshots.contract import NewerFormat
from stream_ctr.snapshots.pointer import Pointer, decode_pointer, read_pointer

_log = logging.getLogger(__name__)
_FILE_POLL_SECONDS = 0.1


class PointerSource(Protocol):
    """A source of pointers."""

    def poll(self, timeout_seconds: float) -> Sequence[Pointer | SnapshotError]:
        """Return the pointers that arrived, after at most `timeout_seconds`.

        A pointer that cannot be read is the error that says so.
        """
        ...


class FilePointers:
    """The pointers that appear in `latest.json` of a state directory."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "latest.json"
        self._seen: tuple[int, int] | None = None

    def poll(self, timeout_seconds: float) -> list[Pointer | SnapshotError]:
        """Return the pointer if the file changed, after at most `timeout_seconds`."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                status = self._path.stat()
            except FileNotFoundError:
                status = None
            if status and (status.st_mtime_ns, status.st_ino) != self._seen:
                self._seen = (status.st_mtime_ns, status.st_ino)
                return self._read()
            if time.monotonic() >= deadline:
                return []
            time.sleep(_FILE_POLL_SECONDS)

    def _read(self) -> list[Pointer | SnapshotError]:
        try:
            pointer = read_pointer(self._path)
        except SnapshotError as error:
            return [error]
        return [pointer] if pointer else []


class TopicPointers:
    """The pointers of one model on the snapshot topic.

    `reader.poll(seconds)` returns (key, value) pairs of a compacted topic. The value None withdraws
    a pointer.
    """

    def __init__(self, reader: Any, *, model_name: str = "default") -> None:
        self._reader = reader
        self._model_name = model_name

    def poll(self, timeout_seconds: float) -> list[Pointer | SnapshotError]:
        """Return the errors of those that cannot be read, then the pointers, the newest first.

        The newest is the one of the highest rank: a trainer that was taken over may have written a
        pointer after it. A pointer of a newer version, whose rank cannot be read, supersedes all
        that came before it.
        """
        pointers: list[Pointer] = []
        errors: list[SnapshotError] = []
        for key, value in self._reader.poll(timeout_seconds):
            if key != self._model_name:
                continue
            if value is None:
                _log.warning("the pointer of model %r was withdrawn; the loaded one stays", key)
                continue
            try:
                pointers.append(decode_pointer(value, f"pointer of model {key!r:.80}"))
            except SnapshotError as error:
                errors.append(error)
                if isinstance(error, NewerFormat):
                    pointers.clear()
        pointers.sort(key=lambda pointer: pointer.rank, reverse=True)
        return [*errors, *pointers]
