"""Record batches as brokers store them (format 2), decoded into columns by compiled code, with no Python object for a record.

The layout: https://kafka.apache.org/documentation/#recordbatch. Nothing here knows a client, a connection or a codec's library.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stream_ctr.connectors.records import Records

Bytes = npt.NDArray[np.uint8]

FORMAT = 2  # since Kafka 0.11; what is older looks different
GZIP, SNAPPY, LZ4, ZSTD = 1, 2, 3, 4

_HEADER = struct.Struct(">qiibIhiqqqhii")
_LENGTH_AT, _LENGTH = struct.calcsize(">q"), struct.Struct(">i")  # of what follows it
_FORMAT_AT = struct.calcsize(">qii")
_CHECKSUM_COVERS_FROM = struct.calcsize(">qiibI")
_CODEC, _LOG_APPEND_TIME, _TRANSACTIONAL, _CONTROL = 0x07, 0x08, 0x10, 0x20
_MARKER = struct.Struct(">hh")  # version, type: 0 ends a transaction as aborted
_GREATEST = np.iinfo(np.int64).max


class DamagedBatch(Exception):
    """A stored batch that is not what was written, or was never right: its checksum, its compression or the records in it."""


class BatchHeader(NamedTuple):
    """What stands before the records of a batch."""

    base_offset: int
    length: int  # of all that follows this field
    leader_epoch: int
    format: int
    checksum: int
    attributes: int
    last_offset_delta: int
    first_time: int  # epoch milliseconds, as the greatest
    greatest_time: int
    producer_id: int
    producer_epoch: int
    base_sequence: int
    records: int

    @property
    def last_offset(self) -> int:
        # Kept when compaction removes the last record, or all of them.
        return self.base_offset + self.last_offset_delta


def format_of(stored: bytes) -> int | None:
    """The format of the first stored batch; None when there is not that much of one.

    >>> format_of(bytes(16) + b"\\x02"), format_of(b"")
    (2, None)
    """
    return (
        int.from_bytes(stored[_FORMAT_AT : _FORMAT_AT + 1], signed=True)
        if len(stored) > _FORMAT_AT
        else None
    )


def after_batch(stored: bytes, offset: int) -> int | None:
    """The first offset after the batch that holds `offset`, from the headers of stored batches; the last one may be cut.

    >>> def batch(base, last, count):
    ...     return struct.pack(">qiibIhiqqqhii", base, 49, 0, 2, 0, 0, last, 0, 0, -1, -1, -1, count)
    >>> after_batch(batch(0, 4, 5) + batch(5, 2, 3), 2), after_batch(batch(5, 2, 3), 6), after_batch(batch(5, 900, 3), 6)
    (5, 8, None)
    """
    at, last = 0, None
    while at + _HEADER.size <= len(stored):
        header = BatchHeader._make(_HEADER.unpack_from(stored, at))
        if header.base_offset > offset:
            return header.base_offset
        # What follows is not known: the batch's own word is taken where it agrees with itself.
        agrees = header.format == FORMAT and header.records == header.last_offset_delta + 1
        last = header.last_offset + 1 if agrees else None
        at += _LENGTH_AT + _LENGTH.size + max(header.length, 0)
    return None if last is None or last <= offset else last


class Columns:
    """Records on their way out, at most `most_records`; no more are wanted once their values have `full_bytes`.

    A value of more than `most_value_bytes` is cut to that.

    >>> columns = Columns(8, full_bytes=1 << 20, most_value_bytes=3)
    >>> columns.append(0, 7, -1, b"four")
    >>> columns.append(1, 0, 5, None)
    >>> records = columns.hand_out()
    >>> records.partition.tolist(), records.offset.tolist(), records.time.tolist(), records.value.to_pylist(), columns.count
    ([0, 1], [7, 0], [-1, 5], [b'fou', None], 0)
    """

    def __init__(self, most_records: int, *, full_bytes: int, most_value_bytes: int) -> None:
        self.full_bytes = full_bytes
        self.most_value_bytes = most_value_bytes
        self.most_records = most_records
        self.count = 0
        self.partition = np.empty(most_records, np.int32)
        self.offset = np.empty(most_records, np.int64)
        self.time = np.empty(most_records, np.int64)
        self.ends = np.zeros(most_records + 1, np.int64)  # value i is data[ends[i]:ends[i + 1]]
        self.valid = np.zeros((most_records + 7) // 8, np.uint8)  # a bit each, as Arrow has it
        self.data = np.empty(1 << 16, np.uint8)

    @property
    def full(self) -> bool:
        return self.count == self.most_records or bool(self.ends[self.count] >= self.full_bytes)

    def append(self, partition: int, offset: int, time: int, value: bytes | None) -> None:
        """One more record; there must be room for it."""
        index, used, size = (
            self.count,
            int(self.ends[self.count]),
            min(len(value or b""), self.most_value_bytes),
        )
        while used + size > len(self.data):
            self.grow()
        self.partition[index], self.offset[index], self.time[index], self.ends[index + 1] = (
            partition,
            offset,
            time,
            used + size,
        )
        if value is not None:
            self.data[used : used + size] = np.frombuffer(value, np.uint8, size)
            self.valid[index >> 3] |= 1 << (index & 7)
        self.count += 1

    def grow(self) -> None:
        """Twice the room for values."""
        used = self.ends[self.count]
        grown = np.empty(2 * len(self.data), np.uint8)
        grown[:used] = self.data[:used]
        self.data = grown

    def hand_out(self) -> Records:
        """What there is, as records of their own; nothing is left."""
        n, self.count = self.count, 0
        data = pa.py_buffer(self.data[: self.ends[n]].tobytes())
        valid = pa.py_buffer(self.valid[: (n + 7) // 8].tobytes())
        ends = pa.py_buffer(self.ends[: n + 1].tobytes())
        self.valid[: (n + 7) // 8] = 0
        return Records(
            partition=self.partition[:n].copy(),
            offset=self.offset[:n].copy(),
            time=self.time[:n].copy(),
            value=pa.LargeBinaryArray.from_buffers(pa.large_binary(), n, [valid, ends, data]),
        )


@dataclass(frozen=True, slots=True)
class Codecs:
    """What bytes go through: CRC-32C of them, and by the number of a codec what it compressed, which may be too much to expand."""

    crc32c: Callable[[memoryview], int]
    expand: Mapping[int, Callable[[memoryview], bytes]]


class StoredBatches:
    """Stored batches of one partition, of which pieces are taken: the committed records from `position` on.

    `aborted` are (first offset, producer id) of the transactions among them that were aborted. The last batch may be cut, and is not
    read then; neither is what follows a batch of an older format.
    """

    def __init__(
        self,
        stored: bytes,
        position: int,
        *,
        aborted: Iterable[tuple[int, int]] = (),
        codecs: Codecs,
    ) -> None:
        self.position = position  # the next offset, after what was taken
        self.leader_epoch = -1  # of the batch that was read last
        self._asked_for = position
        self._stored = memoryview(stored).toreadonly()
        self._at = 0
        self._aborted = deque(sorted(aborted))
        self._aborted_producers: set[int] = set()
        self._codecs = codecs
        self._open: _OpenBatch | None = None
        self._open_at = 0

    @property
    def exhausted(self) -> bool:
        return self._open is None and self._next_end() is None

    def take(self, columns: Columns, partition: int, most: int) -> int:
        """Append up to `most` of the next records, as many as there is room for, as the partition's; how many they are.

        Raises `DamagedBatch` when that is what stands at `position`: of a damaged batch, no record is read.
        """
        start, before = self.position, columns.count
        limit = min(before + most, columns.most_records)
        try:
            while columns.count < limit and not columns.full:
                self._open = self._open or self._next_to_read()
                if self._open is None:
                    break
                self._read(self._open, columns, limit)
        except DamagedBatch:
            if self.position == start:
                raise
        columns.partition[before : columns.count] = partition
        return columns.count - before

    def fold(self) -> None:
        """Give up what the batch in hand was expanded to, which can be many times what is stored; expanded again when it goes on."""
        if self._open:
            self._open, self._at = None, self._open_at

    def _read(self, batch: _OpenBatch, columns: Columns, limit: int) -> None:
        if batch.append_to(columns, self.position, limit):
            self._open, self.position = None, batch.header.last_offset + 1
        else:
            self.position = int(columns.offset[columns.count - 1]) + 1

    def _next_to_read(self) -> _OpenBatch | None:
        """The next batch with records that are for readers; the position moves past those before it."""
        while (end := self._next_end()) is not None:
            header = self._header(end)
            payload = self._stored[self._at + _HEADER.size : end]
            wanted = (
                not self._is_for_nobody(header, payload)
                and header.records > 0
                and header.last_offset >= self.position
            )
            batch = _OpenBatch(header, self._expanded(header, payload)) if wanted else None
            self._open_at, self._at, self.leader_epoch = self._at, end, header.leader_epoch
            if batch:
                return batch
            self.position = max(self.position, header.last_offset + 1)
        if self._at and self.position == self._asked_for:
            # To ask again would yield the same for good.
            raise DamagedBatch(
                f"offset {self.position} was asked for, and there are only batches that end before it"
            )
        return None

    def _next_end(self) -> int | None:
        """Where the next batch says that it ends; None when there is no more, it is cut or of an older format."""
        at, stored = self._at, self._stored
        if len(stored) - at <= _FORMAT_AT:
            return None
        (length,) = _LENGTH.unpack_from(stored, at + _LENGTH_AT)
        end: int = at + _LENGTH_AT + _LENGTH.size + length
        older = (
            at > 0
            and int.from_bytes(stored[at + _FORMAT_AT : at + _FORMAT_AT + 1], signed=True) < FORMAT
        )
        return None if end > len(stored) or older else end

    def _header(self, end: int) -> BatchHeader:
        at, stored = self._at, self._stored
        if end - at < _HEADER.size:
            raise DamagedBatch(
                f"the batch at offset {self.position} is shorter than its own header"
            )
        header = BatchHeader._make(_HEADER.unpack_from(stored, at))
        if header.format != FORMAT:
            raise DamagedBatch(
                f"the batch at offset {self.position} has format {header.format}, which is not known"
            )
        if self._codecs.crc32c(stored[at + _CHECKSUM_COVERS_FROM : end]) != header.checksum:
            raise DamagedBatch(f"the batch at offset {header.base_offset} failed crc check")
        if header.records < 0 or header.last_offset_delta < 0 or header.last_offset >= _GREATEST:
            raise DamagedBatch(
                f"the batch at offset {header.base_offset} says that it ends before it begins, or has no end"
            )
        return header

    def _expanded(self, header: BatchHeader, payload: memoryview) -> Bytes:
        codec = header.attributes & _CODEC
        if not codec:
            return np.frombuffer(payload, np.uint8)
        if codec not in self._codecs.expand:
            raise DamagedBatch(
                f"the batch at offset {header.base_offset} is compressed in a way that is not known: {codec}"
            )
        try:
            return np.frombuffer(self._codecs.expand[codec](payload), np.uint8)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - the libraries of codecs have errors of their own
            raise DamagedBatch(
                f"the batch at offset {header.base_offset} cannot be decompressed: {error!r}"
            ) from error

    def _is_for_nobody(self, header: BatchHeader, payload: memoryview) -> bool:
        """Whether it tells how a transaction ended, or belongs to one that was aborted."""
        control = bool(header.attributes & _CONTROL)
        if header.producer_id < 0:
            return control
        while self._aborted and self._aborted[0][0] <= header.last_offset:
            self._aborted_producers.add(self._aborted.popleft()[1])
        if control and header.records and _is_abort_marker(header, self._expanded(header, payload)):
            self._aborted_producers.discard(header.producer_id)
        return control or bool(
            header.attributes & _TRANSACTIONAL and header.producer_id in self._aborted_producers
        )


class _OpenBatch:
    """A batch whose records are being taken. Raises `DamagedBatch` at once when one of them is not whole."""

    def __init__(self, header: BatchHeader, body: Bytes) -> None:
        if damage := _DAMAGE[_check(body, header.records, header.last_offset_delta)]:
            raise DamagedBatch(f"the batch at offset {header.base_offset} {damage}")
        self.header = header
        self._body = body
        self._at = 0

    def append_to(self, columns: Columns, position: int, limit: int) -> bool:
        """Append its records from `position` on until the columns have `limit` or are full; whether that was the last one."""
        header = self.header
        append_time = bool(header.attributes & _LOG_APPEND_TIME)
        time = header.greatest_time if append_time else header.first_time
        while True:
            self._at, columns.count = _append(
                self._body, self._at, header.base_offset, position, time, append_time, columns.most_value_bytes,
                columns.count, limit, columns.full_bytes, columns.offset, columns.time, columns.ends, columns.valid, columns.data,
            )  # fmt: skip
            if self._at == len(self._body):
                return True
            if columns.count == limit or columns.full:
                return False
            columns.grow()


def _is_abort_marker(header: BatchHeader, body: Bytes) -> bool:
    record = Record(*_record(body, 0))
    if record.after < 0 or record.key_size < _MARKER.size:
        raise DamagedBatch(
            f"the batch at offset {header.base_offset} has a malformed marker of a transaction"
        )
    return bool(_MARKER.unpack_from(body.data, record.key_at)[1] == 0)


class Record(NamedTuple):
    """Where a record's parts are in the body of its batch."""

    after: int  # the place after it; -1 when it is malformed
    offset_delta: int
    time_delta: int
    key_at: int
    key_size: int  # less than zero: null, as the value's
    value_at: int
    value_size: int


_WHOLE, _MALFORMED, _NOT_IN_ORDER, _LEFT_OVER = range(4)
_DAMAGE = {
    _WHOLE: "",
    _MALFORMED: "has a malformed record, or fewer than it says",
    _NOT_IN_ORDER: "has records that are not in order, or not within it",
    _LEFT_OVER: "has more bytes than records",
}


# Nothing checks an index in compiled code: so a place is looked at only where it lies before an end, and what would go beyond the end is
# put one after it, where it stays. With flags and places that are -1, the same takes several times as long.


@numba.njit(cache=True, nogil=True)
def _varint(body, at, end):  # type: ignore[no-untyped-def]
    """(the zigzag number, the place after it)."""
    bits, shift, byte = np.int64(0), 0, np.int64(0x80)
    while byte >= 0x80:
        if at >= end or shift > 63:
            return np.int64(0), end + 1
        byte = np.int64(body[at])
        bits |= (byte & 0x7F) << shift
        shift += 7
        at += 1
    return ((bits >> 1) & _GREATEST) ^ -(bits & 1), at


@numba.njit(cache=True, nogil=True)
def _skip(at, size, end):  # type: ignore[no-untyped-def]
    if size <= 0:  # less than none is a null
        return at
    return end + 1 if size > end - at else at + size


@numba.njit(cache=True, nogil=True)
def _record(body, at):  # type: ignore[no-untyped-def]
    """The fields of a `Record`, of the one at this place."""
    size, at = _varint(body, at, len(body))
    if size < 1 or size > len(body) - at:
        return -1, 0, 0, 0, 0, 0, 0
    end = at + size
    at += 1  # its attributes, which mean nothing yet
    time_delta, at = _varint(body, at, end)
    offset_delta, at = _varint(body, at, end)
    key_size, key_at = _varint(body, at, end)
    at = _skip(key_at, key_size, end)
    value_size, value_at = _varint(body, at, end)
    at = _skip(value_at, value_size, end)
    headers, at = _varint(body, at, end)
    well = headers >= 0
    for _ in range(headers):
        name_size, at = _varint(body, at, end)
        well = well and name_size >= 0
        at = _skip(at, name_size, end)
        header_size, at = _varint(body, at, end)
        at = _skip(at, header_size, end)
        if at > end:
            break
    return (
        (at if well and at == end else -1),
        offset_delta,
        time_delta,
        key_at,
        key_size,
        value_at,
        value_size,
    )


@numba.njit(cache=True, nogil=True)
def _check(body, count, last_offset_delta):  # type: ignore[no-untyped-def]
    at, before = 0, -1
    for _ in range(count):
        at, offset_delta, _time, _key_at, _key_size, _value_at, _value_size = _record(body, at)
        if at < 0:
            return _MALFORMED
        if offset_delta <= before or offset_delta > last_offset_delta:
            return _NOT_IN_ORDER
        before = offset_delta
    return _WHOLE if at == len(body) else _LEFT_OVER


@numba.njit(cache=True, nogil=True)
def _copy(source, target):  # type: ignore[no-untyped-def]
    # Indexes that start at zero become wide moves; an offset in the index, or a whole slice assigned, is ten times slower.
    for i in range(len(source)):
        target[i] = source[i]


@numba.njit(cache=True, nogil=True)
def _append(  # type: ignore[no-untyped-def]
    body, at, base, position, base_time, append_time, most_value_bytes, index, limit, full_bytes, offset, time, ends, valid, data
):  # fmt: skip
    """(the place after the last record that was appended, how many records there are now); there must have been a check before."""
    while at < len(body) and index < limit and ends[index] < full_bytes:
        after, offset_delta, time_delta, _key_at, _key_size, value_at, value_size = _record(
            body, at
        )
        if base + offset_delta >= position:
            used, size = ends[index], min(max(value_size, 0), most_value_bytes)
            if size > len(data) - used:
                break
            _copy(body[value_at : value_at + size], data[used : used + size])
            if value_size >= 0:
                valid[index >> 3] |= np.uint8(1 << (index & 7))
            offset[index] = base + offset_delta
            time[index] = base_time if append_time else base_time + time_delta
            ends[index + 1] = used + size
            index += 1
        at = after
    return at, index
