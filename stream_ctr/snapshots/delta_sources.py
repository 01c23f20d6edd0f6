"""The places where a subscriber finds deltas: a state directory, or the topic of deltas.

Neither says which delta follows which: `delta_chain` does. A source returns what it finds, in order
of arrival, and names what it refuses.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from stream_ctr.errors import SnapshotError
from stream_ctr.messages import one_line
from stream_ctr.snapshots import files
from stream_ctr.snapshots.contract import Verify
from stream_ctr.snapshots.delta import (
    LARGEST_HEADER_BYTES,
    LARGEST_PAYLOAD_BYTES,
    Delta,
    DeltaRank,
    decode_header,
    header_sha256,
    verified,
)
from stream_ctr.snapshots.delta_store import (
    FOLDER,
    INDEX,
    DeltaEntry,
    DeltaIndex,
    header_name,
    payload_name,
    read_index,
)
from stream_ctr.snapshots.delta_topic import Assembler, Record

__all__ = ["Delta", "DeltaSource", "FileDeltas", "NotReadable", "RecordReader", "TopicDeltas"]

POLL_BYTES = 64 << 20
"""A poll of files returns no further delta once it holds payloads of so many bytes."""

_FILE_POLL_SECONDS = 0.1
_RETRY_SECONDS = 1.0
_CLOCKS_DIFFER_MS = 60_000


class NotReadable(SnapshotError):
    """The place of deltas cannot be read now, or lost some of them."""


class DeltaSource(Protocol):
    """A source of deltas."""

    @property
    def counts(self) -> Counter[str]:
        """The number of deltas and records that were refused or passed over, by reason."""
        ...

    def poll(self, timeout_seconds: float) -> Sequence[Delta | SnapshotError]:
        """Return the deltas that arrived, in that order, after at most `timeout_seconds`.

        Something that is refused is the error that names it. A place that cannot be read now is
        `NotReadable`, once for as long as it lasts; the next call tries again.
        """
        ...

    def rewind(
        self, after: tuple[str, DeltaRank] | None = None, *, since_ms: int | None = None
    ) -> None:
        """Let everything that is kept come again, from the oldest.

        With `after`, a run and a rank, the deltas of that run up to this rank do not come: what a
        loaded snapshot contains need not be read. Nor need deltas that were sent before `since_ms`,
        the epoch milliseconds at which it was taken.
        """
        ...

    def close(self) -> None:
        """Close files and connections."""
        ...


class FileDeltas:
    """The deltas that `deltas/index.json` of a state directory lists.

    The directory need not exist yet. With `signature`, headers that it refuses are errors. A delta
    whose files cannot be read is named once, and tried again every second; those after it come
    meanwhile.
    """

    def __init__(self, directory: Path, *, signature: Verify | None = None) -> None:
        self.counts: Counter[str] = Counter()
        """The number of refusals: "index" or "damaged"."""
        self._folder = directory / FOLDER
        self._signature = signature
        self._seen: tuple[int, ...] | None = None
        self._index: DeltaIndex | None = None
        self._index_error = ""
        self._returned: set[str] = set()
        self._after: tuple[str, DeltaRank] | None = None
        self._named: dict[str, str] = {}
        self._due: dict[str, float] = {}

    def poll(self, timeout_seconds: float) -> list[Delta | SnapshotError]:
        """Return the next deltas, about `POLL_BYTES` of them, after at most `timeout_seconds`."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            found = [*self._look_at_index(), *self._next_deltas()]
            if found or time.monotonic() >= deadline:
                return found
            time.sleep(max(0.0, min(_FILE_POLL_SECONDS, deadline - time.monotonic())))

    def rewind(
        self, after: tuple[str, DeltaRank] | None = None, *, since_ms: int | None = None
    ) -> None:
        """Let all deltas come again, or those of a run after a rank."""
        self._returned.clear()
        self._due.clear()
        self._after = after

    def close(self) -> None:
        """Do nothing: no file stays open."""

    def _look_at_index(self) -> Iterator[SnapshotError]:
        """Read the index if it has changed; yield why it cannot be read, once."""
        path = self._folder / INDEX
        try:
            found = _identity(path)
            if found is not None and found != self._seen:
                self._index = read_index(path)
                self._seen = found
                self._index_error = ""
                self._forget()
        except (SnapshotError, OSError) as error:
            reason = one_line(error, 400)
            if reason != self._index_error:
                self._index_error = reason
                self.counts["index"] += 1
                yield NotReadable(f"no deltas are read: {reason}")

    def _forget(self) -> None:
        """Forget the deltas that the index does not list any more."""
        listed = {entry.sha256 for entry in self._index.deltas} if self._index else set()
        self._returned &= listed
        for remembered in (self._named, self._due):
            for sha256 in remembered.keys() - listed:
                del remembered[sha256]

    def _next_deltas(self) -> Iterator[Delta | SnapshotError]:
        index = self._index
        size = 0
        for entry in index.deltas if index else ():
            if size >= POLL_BYTES:
                return
            if not index or not self._wants(index.run, entry):
                continue
            try:
                delta = self._read(index.run, entry)
            except SnapshotError as error:
                if isinstance(error, files.Missing) and self._is_replaced():
                    return  # it was removed, and the new index says so
                yield from self._refused(entry, error)
            else:
                self._returned.add(entry.sha256)
                self._due.pop(entry.sha256, None)
                size += len(delta.payload)
                yield delta

    def _wants(self, run: str, entry: DeltaEntry) -> bool:
        if self._after and self._after[0] == run and entry.rank <= self._after[1]:
            return False
        if entry.sha256 in self._returned:
            return False
        return time.monotonic() >= self._due.get(entry.sha256, 0.0)

    def _refused(self, entry: DeltaEntry, error: SnapshotError) -> Iterator[SnapshotError]:
        self._due[entry.sha256] = time.monotonic() + _RETRY_SECONDS
        if self._named.get(entry.sha256) != str(error):
            self._named[entry.sha256] = str(error)
            self.counts["damaged"] += 1
            yield error

    def _read(self, run: str, entry: DeltaEntry) -> Delta:
        """Return a delta. Raises `SnapshotError` unless its files are those of the index."""
        path = self._folder / header_name(entry.rank)
        data = files.read_document(path, LARGEST_HEADER_BYTES)
        found = header_sha256(data)
        if found != entry.sha256:
            raise SnapshotError(f"{path} has SHA-256 {found}, the index says {entry.sha256}")
        header = decode_header(data, name=str(path), signature=self._signature)
        if (header.run, header.rank) != (run, entry.rank):
            raise SnapshotError(
                f"{path} is delta {header.rank.name} of run {header.run}, and the index is of run "
                f"{run}"
            )
        payload = _read_payload(self._folder / payload_name(entry.rank), header.payload_bytes)
        return verified(data, payload, name=str(path))

    def _is_replaced(self) -> bool:
        """Return whether the index is another one than that which was read."""
        try:
            return _identity(self._folder / INDEX) != self._seen
        except OSError:
            return False


def _identity(path: Path) -> tuple[int, ...] | None:
    """Return what differs between two files that stood at `path`, or None for none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _read_payload(path: Path, size: int) -> bytes:
    """Return the contents of a file of this size. Raises `SnapshotError`."""
    with files.opened(path) as fd:
        # Compare the size first: a file that has grown is not read into memory.
        found = os.fstat(fd).st_size
        if found != size:
            raise SnapshotError(f"{path} has {found:,} bytes, its header says {size:,}")
        with files.naming(path, "cannot read"):
            return files.read_all(fd)


class RecordReader(Protocol):
    """A consumer of the topic of deltas, from its beginning."""

    def poll(self, timeout_seconds: float) -> Sequence[Record]:
        """Return the next records. Raises any error if they cannot be read now."""
        ...

    def take_losses(self) -> Sequence[str]:
        """Return in words which records were lost since the last call."""
        ...

    def seek_to_beginning(self, since_ms: int | None = None) -> None:
        """Go back to the oldest record, or to the oldest of `since_ms` or later."""
        ...

    def close(self) -> None: ...


class TopicDeltas:
    """The deltas of one model on the topic of deltas.

    With `signature`, headers that it refuses are errors. Records that the reader has lost are an
    error too: the deltas after them do not follow what came before. `most_bytes` bounds a payload,
    and what is held of deltas that are not complete (see `delta_topic.Assembler`).
    """

    def __init__(
        self,
        reader: RecordReader,
        *,
        model_name: str = "default",
        signature: Verify | None = None,
        most_bytes: int = LARGEST_PAYLOAD_BYTES,
    ) -> None:
        self._reader = reader
        self._assembler = Assembler(model_name, signature=signature, most_bytes=most_bytes)
        self._unreadable = ""
        self._since_ms: int | None = None

    @property
    def counts(self) -> Counter[str]:
        """The counts of `delta_topic`, and the times that the topic was "lost" or "away"."""
        return self._assembler.counts

    def poll(self, timeout_seconds: float) -> list[Delta | SnapshotError]:
        """Return the deltas that were completed, after at most `timeout_seconds`."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            found = self._read(max(0.0, deadline - time.monotonic()))
            if found or time.monotonic() >= deadline:
                return found

    def rewind(
        self, after: tuple[str, DeltaRank] | None = None, *, since_ms: int | None = None
    ) -> None:
        """Read the topic again; see `DeltaSource.rewind`.

        With another `since_ms` than the last time, reading begins a minute before that, because
        clocks differ. If that led to a gap, the next time begins with the oldest record.
        """
        begin_ms = None
        if since_ms is not None and since_ms != self._since_ms:
            begin_ms = max(0, since_ms - _CLOCKS_DIFFER_MS)
        self._since_ms = since_ms
        self._assembler.begin(after, in_middle=begin_ms is not None)
        self._reader.seek_to_beginning(begin_ms)

    def close(self) -> None:
        """Close the connection."""
        self._reader.close()

    def _read(self, timeout_seconds: float) -> list[Delta | SnapshotError]:
        began = time.monotonic()
        try:
            records = self._reader.poll(timeout_seconds)
        except Exception as error:  # noqa: BLE001 - clients have many
            found = self._away(error)
            spent = time.monotonic() - began
            time.sleep(max(0.0, min(_RETRY_SECONDS, timeout_seconds) - spent))
            return found
        self._unreadable = ""
        found = self._losses()
        for record in records:
            found += self._assembler.take(record)
        return found

    def _away(self, error: Exception) -> list[Delta | SnapshotError]:
        """Return the error that says so, unless it has been said."""
        reason = one_line(error, 400) or type(error).__name__
        if reason == self._unreadable:
            return []
        self._unreadable = reason
        self.counts["away"] += 1
        return [NotReadable(f"deltas cannot be read now: {reason}")]

    def _losses(self) -> list[Delta | SnapshotError]:
        losses = self._reader.take_losses()
        if not losses:
            return []
        self.counts["lost"] += len(losses)
        return [NotReadable(f"deltas were lost: {'; '.join(losses)}")]
