"""Published snapshots on a topic, for servers that reach nothing but the broker.

The files of a snapshot are sent in chunks: the signature, the manifest, then what serves. Key of a
record is `MODEL NAME/FILE/INDEX`, so that a compacted topic keeps the chunks of the last snapshot,
however long nothing new is published. Each record says in its headers what it is a part of:

    __stream_ctr.base.manifest_sha256   the snapshot
    __stream_ctr.base.file              the name of the file
    __stream_ctr.base.bytes             its size
    __stream_ctr.base.index             0, 1, ...
    __stream_ctr.base.count             the number of its chunks

All are in the first partition, and a reader takes the chunks of a file in their order. Nothing of
this is trusted: the pointer has the digest of the manifest, which has those of the files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Protocol

import msgspec
from msgspec import Meta, Struct

from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.evaluate.summary import Count
from stream_ctr.snapshots import files
from stream_ctr.snapshots.contract import Sha256
from stream_ctr.snapshots.files import Missing
from stream_ctr.snapshots.places import Transfer, Unreachable
from stream_ctr.snapshots.pointer import Pointer

SCHEME = "kafka://"
CHUNK_BYTES = 900_000
"""Brokers take records of up to a megabyte by default."""
FLUSH_SECONDS = 60.0

_PREFIX = "__stream_ctr.base."


class Label(Struct, frozen=True, forbid_unknown_fields=True):
    """The headers of a record: which part of which file it is."""

    manifest_sha256: Sha256
    file: Annotated[str, Meta(max_length=300)]
    bytes: Count
    index: Count
    count: Annotated[int, Meta(ge=1)]


class ChunkSink(Protocol):
    """A Kafka producer. It raises its own errors."""

    def send(
        self,
        topic: str,
        value: bytes,
        *,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
        partition: int | None = None,
    ) -> None: ...

    def flush(self, timeout_seconds: float) -> None: ...


class Record(Protocol):
    """A record as a topic holds it."""

    @property
    def offset(self) -> int: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Sequence[tuple[str, bytes]]: ...


class Scan(Protocol):
    """A consumer of the first partition of a topic, as it is when the consumer is made."""

    def records(self, offset: int) -> Iterator[Record]:
        """Yield the records from this offset on, up to the end."""
        ...

    def close(self) -> None: ...


def topic_of(url: str) -> str:
    """Return the topic in a URL of the form `kafka://TOPIC`, or "" for any other URL.

    >>> topic_of("kafka://stream-ctr.bases"), topic_of("s3://bucket/run")
    ('stream-ctr.bases', '')
    """
    return url.removeprefix(SCHEME).rstrip("/") if url.startswith(SCHEME) else ""


def send_file(
    sink: ChunkSink, topic: str, model_name: str, manifest_sha256: str, path: Path
) -> None:
    """Send a file of a snapshot in chunks. Raises `SnapshotError` if it cannot be read."""
    with files.opened(path) as fd, open(fd, "rb", closefd=False) as file:
        size = file.seek(0, 2)
        file.seek(0)
        count = max(1, -(-size // CHUNK_BYTES))
        for index in range(count):
            with files.naming(path, "cannot read"):
                value = file.read(CHUNK_BYTES)
            label = Label(manifest_sha256, path.name, size, index, count)
            sink.send(
                topic,
                value,
                key=f"{model_name}/{path.name}/{index:08d}".encode(),
                headers=[
                    (f"{_PREFIX}{name}", str(value).encode())
                    for name, value in msgspec.structs.asdict(label).items()
                ],
                partition=0,
            )


def decode_label(headers: Sequence[tuple[str, bytes]]) -> Label | None:
    """Return what the headers of a record say, or None if they are not those of a chunk."""
    named = {
        name.removeprefix(_PREFIX): (value or b"").decode("utf-8", "backslashreplace")
        for name, value in headers
        if name.startswith(_PREFIX)
    }
    try:
        return msgspec.convert(named, Label, strict=False)
    except msgspec.ValidationError:
        return None


class TopicPlace:
    """The files of one snapshot on a topic, as a place that can be read.

    `scan` opens a consumer. The topic is read on from where the last file ended, and again from the
    beginning for what did not come: a trainer that was killed while it sent a snapshot once more
    leaves its last chunks before its first ones.
    """

    def __init__(self, scan: Callable[[], Scan], topic: str, pointer: Pointer) -> None:
        self.url = f"{SCHEME}{topic}"
        """The address for messages."""
        self._scan = scan
        self._pointer = pointer
        self._folder = f"snapshots/{pointer.snapshot}/"
        self._next_offset = 0
        self._first_offsets: dict[str, int] = {}

    def read(self, name: str, most_bytes: int) -> bytes:
        """Return the contents of a file, as `Place.read` does."""
        with self.transfer(name) as transfer:
            if transfer.size is None or transfer.size > most_bytes:
                raise self._too_large(name, most_bytes)
            data = bytearray()
            for piece in transfer.pieces:
                data += piece
                if len(data) > most_bytes:
                    raise self._too_large(name, most_bytes)
            return bytes(data)

    @contextlib.contextmanager
    def transfer(self, name: str, start: int = 0) -> Iterator[Transfer]:
        """Read a file in pieces, as `Place.transfer` does, from the beginning of a chunk on."""
        file = self._file(name)
        if (
            file == files.SIGNATURE
            and files.MANIFEST in self._first_offsets
            and file not in self._first_offsets
        ):
            raise Missing(f"{self.url} has no {name}")
        with contextlib.closing(self._opened()) as scan:
            chunks = self._chunks(scan, file, start // CHUNK_BYTES)
            label, first = next(chunks, (None, b""))
            if label is None:
                raise Missing(f"{self.url} does not have {name}, or not yet")
            yield Transfer(
                min(label.index * CHUNK_BYTES, label.bytes), label.bytes, _values(first, chunks)
            )

    def write(self, name: str, data: bytes | Path) -> None:
        """Raise `ConfigError`: a mirror sends whole snapshots."""
        raise ConfigError(f"{self.url} is not written to by names")

    def remove(self, name: str) -> None:
        """Raise `ConfigError`: compaction removes what is old."""
        raise ConfigError(f"{self.url} is not written to by names")

    def exists(self, name: str) -> bool:
        """Return whether there is such a file."""
        with contextlib.suppress(Missing), self.transfer(name):
            return True
        return False

    def names(self, folder: str) -> list[str]:
        """Return the names of the files that were seen so far."""
        return sorted(self._first_offsets) if f"{folder}/" == self._folder else []

    def _too_large(self, name: str, most_bytes: int) -> SnapshotError:
        return SnapshotError(
            f"{self.url}: {name} is larger than {most_bytes:,} bytes, the most of its kind"
        )

    def _file(self, name: str) -> str:
        if not name.startswith(self._folder):
            raise Missing(f"{self.url} has nothing but snapshot {self._pointer.snapshot}")
        return name.removeprefix(self._folder)

    def _opened(self) -> Scan:
        try:
            return self._scan()
        except Exception as error:  # noqa: BLE001 - a client of others
            raise Unreachable(f"cannot read {self.url}: {error}") from None

    def _chunks(self, scan: Scan, file: str, index: int) -> Iterator[tuple[Label, bytes]]:
        """Yield the chunks of a file from an index on, as far as they are there."""
        offset = self._first_offsets.get(file, self._next_offset)
        last_pass = offset == 0
        while True:
            before = index
            for label, value in self._labelled(scan, offset):
                if label.file == file and label.index == index:
                    yield label, value
                    index += 1
                    if index == label.count:
                        return
            if last_pass and index == before:
                return
            offset, last_pass = 0, True

    def _labelled(self, scan: Scan, offset: int) -> Iterator[tuple[Label, bytes]]:
        """Yield the chunks of the snapshot from an offset on."""
        records = scan.records(offset)
        while True:
            try:
                record = next(records, None)
            except Exception as error:  # noqa: BLE001 - a client of others
                raise Unreachable(f"cannot read {self.url}: {error}") from None
            if record is None:
                return
            self._next_offset = max(self._next_offset, record.offset + 1)
            label = decode_label(record.headers)
            if label and label.manifest_sha256 == self._pointer.manifest_sha256:
                self._first_offsets.setdefault(label.file, record.offset)
                yield label, record.value or b""


def _values(first: bytes, chunks: Iterator[tuple[Label, bytes]]) -> Iterator[bytes]:
    yield first
    for _, value in chunks:
        yield value
