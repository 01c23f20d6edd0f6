"""Deltas on a topic: chunks of the payload, then the header.

The key of all records of a model is its name, so that all are in one partition, in order. Each
record says in its headers what it is a part of:

    __stream_ctr.delta.run             the run
    __stream_ctr.delta.epoch           the rank of the delta
    __stream_ctr.delta.sequence
    __stream_ctr.delta.payload_sha256  the digest of the whole payload
    __stream_ctr.delta.payload_bytes   its size
    __stream_ctr.delta.count           the number of chunks
    __stream_ctr.delta.index           0, 1, ... for a chunk, `count` for the header

Nothing is a delta before its header and all of its chunks are there. The record headers are a
claim: the header of the delta, which may be signed, has the digest of the payload, and decides.

`Assembler` takes the records in any order, and more than once:

    a record                                               counted as     then
    ----------------------------------------------------   ------------   -----------------------
    has no headers of a delta, or not of this form         `unreadable`   an error
    is of a delta that is assembled or was given up        `repeated`     nothing
    is of a chunk or header that is there                  `repeated`     the first one stays
    says that the payload is larger than is read           `too_large`    an error for the delta
    brings more bytes than the payload has                 `too_large`    an error for the delta
    completes a delta that does not verify                 `damaged`      an error for the delta

    a delta that is not complete                           counted as     then
    ----------------------------------------------------   ------------   -----------------------
    when one of its run with a higher rank is complete     `incomplete`   an error for the delta
    when too many are, or hold too many bytes              `crowded`      an error for the oldest
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated, NamedTuple, Protocol

import msgspec
from msgspec import Meta, Struct

from stream_ctr.errors import SnapshotError
from stream_ctr.evaluate.summary import Count
from stream_ctr.messages import one_line
from stream_ctr.snapshots.contract import Epoch, RunId, Sha256, Verify
from stream_ctr.snapshots.delta import (
    LARGEST_HEADER_BYTES,
    LARGEST_PAYLOAD_BYTES,
    Delta,
    DeltaHeader,
    DeltaRank,
    verified,
)
from stream_ctr.snapshots.snapshot_topic import Sink

CHUNK_BYTES = 900_000
"""Brokers take records of up to a megabyte by default."""
MOST_CHUNKS = 1 << 14
MOST_OPEN = 16
"""The most deltas of which some records are held."""
FLUSH_SECONDS = 30.0

_PREFIX = "__stream_ctr.delta."
_REMEMBERED = 256  # deltas that are assembled or given up
_NAMED_CHUNKS = 5  # of those that are missing, in a message

Headers = Sequence[tuple[str, bytes]]


class Label(Struct, frozen=True, forbid_unknown_fields=True):
    """The headers of a record: which part of which delta it is."""

    run: RunId
    epoch: Epoch
    sequence: Count
    payload_sha256: Sha256
    payload_bytes: Count
    count: Annotated[int, Meta(ge=0, le=MOST_CHUNKS)]
    index: Count

    def __post_init__(self) -> None:
        if self.index > self.count:
            raise ValueError(f"there is no record {self.index} of {self.count} chunks and a header")


class Record(Protocol):
    """A record as a topic holds it."""

    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Headers: ...


def send(
    sink: Sink,
    topic: str,
    key: bytes,
    header_bytes: bytes,
    header: DeltaHeader,
    payload: bytes,
    *,
    flush_seconds: float = FLUSH_SECONDS,
) -> None:
    """Send a delta, and wait until the broker has it.

    `header_bytes` are those of `header`, and `key` is the name of the model. To send a delta again,
    because it is unknown how much of it has arrived, is harmless before the next one is sent. The
    errors are those of `sink`, which no other thread uses meanwhile.
    """
    for value, headers in records(header_bytes, header, payload):
        sink.send(topic, value, key=key, headers=headers)
    sink.flush(flush_seconds)


def records(
    header_bytes: bytes, header: DeltaHeader, payload: bytes
) -> Iterator[tuple[bytes, list[tuple[str, bytes]]]]:
    """Yield value and headers of each record of a delta, the chunks first, then the header."""
    view = memoryview(payload)
    starts = range(0, len(payload), CHUNK_BYTES)
    common = [
        (f"{_PREFIX}{name}", str(value).encode())
        for name, value in (
            ("run", header.run),
            ("epoch", header.rank.epoch),
            ("sequence", header.rank.sequence),
            ("payload_sha256", header.payload_sha256),
            ("payload_bytes", len(payload)),
            ("count", len(starts)),
        )
    ]
    for index, start in enumerate(starts):
        chunk = bytes(view[start : start + CHUNK_BYTES])
        yield chunk, [*common, (f"{_PREFIX}index", b"%d" % index)]
    yield header_bytes, [*common, (f"{_PREFIX}index", b"%d" % len(starts))]


def decode_label(headers: Headers) -> Label:
    """Return what the headers of a record say. Raises `ValueError` if they are not those of one.

    >>> decode_label([("__stream_ctr.delta.run", b"0" * 32)])
    Traceback (most recent call last):
    msgspec.ValidationError: Object missing required field `epoch`
    """
    named = {
        name.removeprefix(_PREFIX): (value or b"").decode("utf-8", "backslashreplace")
        for name, value in headers
        if name.startswith(_PREFIX)
    }
    return msgspec.convert(named, Label, strict=False)


class _Name(NamedTuple):
    """A delta, as the headers of its records name it."""

    run: str
    rank: DeltaRank
    payload_sha256: str
    payload_bytes: int
    chunks: int

    @classmethod
    def of(cls, label: Label) -> _Name:
        rank = DeltaRank(label.epoch, label.sequence)
        return cls(label.run, rank, label.payload_sha256, label.payload_bytes, label.count)

    def __str__(self) -> str:
        return f"delta {self.rank.name}"


class _Open:
    """The records of a delta that have come, by their index; the header is the last."""

    def __init__(self) -> None:
        self.parts: dict[int, bytes] = {}
        self.held_bytes = 0

    def add(self, index: int, value: bytes) -> None:
        self.parts[index] = value
        self.held_bytes += len(value)

    def chunk_bytes(self, count: int) -> int:
        """Return the size of the chunks that have come."""
        return self.held_bytes - len(self.parts.get(count, b""))

    def missing(self, count: int) -> str:
        """Return in words what has not come of a delta of `count` chunks."""
        absent = [str(index) for index in range(count) if index not in self.parts]
        if not absent:
            return "its header"
        listed = ", ".join(absent[:_NAMED_CHUNKS]) + (", ..." if absent[_NAMED_CHUNKS:] else "")
        chunks = f"{len(absent)} of {count} chunks ({listed})"
        return chunks if count in self.parts else f"{chunks} and its header"


class Assembler:
    """Makes deltas of the records of one model; those with another key are left alone.

    With `signature`, a header that it refuses is damage. The records that are held take
    `most_bytes` at most, and the payload that is being put together its own size once more. A
    payload of more than `most_bytes` is refused.
    """

    def __init__(
        self,
        model_name: str,
        *,
        signature: Verify | None = None,
        most_bytes: int = LARGEST_PAYLOAD_BYTES,
    ) -> None:
        self.counts: Counter[str] = Counter()
        """The number of records and deltas that were passed over, by reason."""
        self._model_name = model_name
        self._key = model_name.encode()
        self._signature = signature
        self._most_bytes = most_bytes
        self._after: tuple[str, DeltaRank] | None = None
        self._in_middle = False
        self._open: dict[_Name, _Open] = {}
        self._ended: dict[_Name, None] = {}
        self._held_bytes = 0

    @property
    def held_bytes(self) -> int:
        """The size of the records of deltas that are not complete."""
        return self._held_bytes

    def begin(self, after: tuple[str, DeltaRank] | None = None, *, in_middle: bool = False) -> None:
        """Forget all records: the topic is read again.

        The deltas of a run up to a rank are passed over, if `after` is (run, rank). With
        `in_middle`, so is the delta in the midst of whose records reading begins.
        """
        self._after = after
        self._in_middle = in_middle
        self._open.clear()
        self._ended.clear()
        self._held_bytes = 0

    def take(self, record: Record) -> list[Delta | SnapshotError]:
        """Return the delta that a record completes, after errors for those that come no more."""
        if record.key != self._key:
            return []
        value = record.value or b""
        try:
            label = decode_label(record.headers)
            if not value:
                raise ValueError("it is empty")
        except (ValueError, msgspec.ValidationError) as reason:
            place = f"the record at offset {record.offset} of partition {record.partition}"
            return [self._refusal("unreadable", f"{place} is no part of a delta", reason)]
        name = _Name.of(label)
        if self._after and self._after[0] == name.run and name.rank <= self._after[1]:
            return []
        if self._in_middle and label.index > 0:
            self._ended[name] = None
        self._in_middle = False
        if name in self._ended:
            self.counts["repeated"] += 1
            return []
        return self._add(name, label.index, value)

    def _add(self, name: _Name, index: int, value: bytes) -> list[Delta | SnapshotError]:
        if reason := self._too_large(name, index, value):
            return [self._give_up(name, "too_large", reason)]
        delta = self._open.setdefault(name, _Open())
        if index in delta.parts:
            self.counts["repeated"] += 1
            return []
        delta.add(index, value)
        self._held_bytes += len(value)
        if len(delta.parts) == name.chunks + 1:
            return self._complete(name, delta)
        return self._make_room()

    def _too_large(self, name: _Name, index: int, value: bytes) -> str | None:
        """Return why a record is too large, or None if it is not."""
        if name.payload_bytes > self._most_bytes:
            return (
                f"its payload has {name.payload_bytes:,} bytes, and {self._most_bytes:,} are read"
            )
        if index == name.chunks:
            if len(value) > LARGEST_HEADER_BYTES:
                return f"its header has {len(value):,} bytes, and {LARGEST_HEADER_BYTES:,} are read"
            return None
        delta = self._open.get(name)
        held_bytes = delta.chunk_bytes(name.chunks) if delta and index not in delta.parts else 0
        if held_bytes + len(value) > name.payload_bytes:
            return f"chunk {index} goes beyond its payload of {name.payload_bytes:,} bytes"
        return None

    def _complete(self, name: _Name, delta: _Open) -> list[Delta | SnapshotError]:
        header = delta.parts[name.chunks]
        payload = b"".join(delta.parts[index] for index in range(name.chunks))
        self._end(name)
        try:
            found = verified(header, payload, name=str(name), signature=self._signature)
            self._require_name(found.header, name)
        except SnapshotError as error:
            self.counts["damaged"] += 1
            return [error]
        earlier = [each for each in self._open if each.run == name.run and each.rank < name.rank]
        errors = [
            self._give_up(
                each, "incomplete", f"{self._open[each].missing(each.chunks)} did not come"
            )
            for each in sorted(earlier)
        ]
        return [*errors, found]

    def _require_name(self, header: DeltaHeader, name: _Name) -> None:
        """Raise `SnapshotError` unless a header is of the delta and the model of its records."""
        if (header.run, header.rank) != (name.run, name.rank):
            raise SnapshotError(
                f"{name} of run {name.run} has the header of delta {header.rank.name} of run "
                f"{header.run}"
            )
        if header.model != self._model_name:
            raise SnapshotError(
                f"{name} of model {one_line(header.model, 80)!r} has the key of model "
                f"{one_line(self._model_name, 80)!r}"
            )

    def _make_room(self) -> list[Delta | SnapshotError]:
        errors: list[Delta | SnapshotError] = []
        while self._held_bytes > self._most_bytes + LARGEST_HEADER_BYTES or (
            len(self._open) > MOST_OPEN
        ):
            oldest = next(iter(self._open))
            missing = self._open[oldest].missing(oldest.chunks)
            reason = f"{missing} did not come before the records of others took its room"
            errors.append(self._give_up(oldest, "crowded", reason))
        return errors

    def _give_up(self, name: _Name, kind: str, reason: str) -> SnapshotError:
        self._end(name)
        return self._refusal(kind, f"{name} cannot be put together", reason)

    def _end(self, name: _Name) -> None:
        """Drop the records of a delta, and pass over those that still come."""
        delta = self._open.pop(name, None)
        if delta:
            self._held_bytes -= delta.held_bytes
        self._ended[name] = None
        if len(self._ended) > _REMEMBERED:
            del self._ended[next(iter(self._ended))]

    def _refusal(self, kind: str, subject: str, reason: object) -> SnapshotError:
        self.counts[kind] += 1
        return SnapshotError(f"{subject}: {one_line(reason, 300)}")
