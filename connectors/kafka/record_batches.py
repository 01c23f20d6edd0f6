"""Kafka record batches (format 2), decoded into columns by compiled code.

A broker stores and sends a partition as a sequence of batches. Header numbers are big-endian:

    byte  size  field
       0     8  base offset: the offset of the first record when it was written
       8     4  length: the number of bytes after this field
      12     4  partition leader epoch
      16     1  format ("magic"): 2 since Kafka 0.11; older formats share only these 17 bytes
      17     4  checksum: the CRC-32C of all bytes after this field
      21     2  attributes; bits 0-2: codec, 3: log append time, 4: transactional, 5: control
      23     4  last offset delta: the last offset minus the base offset
      27    16  first and greatest timestamp, epoch milliseconds
      43    14  producer id, producer epoch, base sequence
      57     4  number of records
      61        the records, compressed together if the attributes name a codec

A record is a sequence of zigzag varints and byte strings: size of the rest, attributes (one byte),
time delta, offset delta, key size, key, value size, value, number of headers, and the name and
value of each header with their sizes. The size -1 means null. With log append time, every record
has the greatest timestamp. Compaction removes records, so offsets have gaps and a batch may be
empty. A control batch holds one marker, which commits or aborts a transaction. A consumer skips
control batches and the batches of aborted transactions.

Specification: https://kafka.apache.org/documentation/#recordbatch. This module depends on no
client, connection or compression library.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stream_ctr.connectors.records import Records

Bytes = npt.NDArray[np.uint8]

FORMAT = 2
GZIP = 1
SNAPPY = 2
LZ4 = 3
ZSTD = 4

_HEADER = struct.Struct(">qiibIhiqqqhii")
_LENGTH = struct.Struct(">i")
_LENGTH_OFFSET = struct.calcsize(">q")
_AFTER_LENGTH_OFFSET = _LENGTH_OFFSET + _LENGTH.size
_FORMAT_OFFSET = struct.calcsize(">qii")
_ATTRIBUTES_OFFSET = struct.calcsize(">qiibI")  # the checksum covers the bytes from here on

_CODEC_MASK = 0x07
_LOG_APPEND_TIME = 0x08
_TRANSACTIONAL = 0x10
_CONTROL = 0x20

_CONTROL_KEY = struct.Struct(">hh")  # version, type
_ABORT = 0  # the type of the marker that aborts a transaction

_INT64_MAX = np.iinfo(np.int64).max
_INT64_MIN = np.iinfo(np.int64).min
_UINT64_MAX = np.iinfo(np.uint64).max

# A row of `Columns`. Value i is data[rows[i]["begin"] : rows[i + 1]["begin"]].
_ROW = np.dtype(
    [
        ("partition", np.int32),
        ("valid", np.bool_),  # False for null
        ("offset", np.int64),
        ("time", np.int64),
        ("begin", np.int64),
    ],
    align=True,
)

# The scalar arguments of `_append`. Numba unpacks a record faster than a named tuple.
_APPEND_ARGUMENTS = np.dtype(
    [
        ("base_offset", np.int64),
        ("base_time", np.int64),  # epoch milliseconds
        ("append_time", np.bool_),  # every record has the base time
        ("position", np.int64),  # the first offset to append
        ("limit", np.int64),  # the number of records at which the columns are full
        ("full_bytes", np.int64),
        ("most_value_bytes", np.int64),
    ],
    align=True,
)
_INITIAL_DATA_BYTES = 1 << 16


class DamagedBatch(Exception):
    """A stored batch has a wrong checksum, cannot be decompressed or holds malformed records."""


class LargeBatch(DamagedBatch):
    """A batch expands to more than may be expanded at once."""


class BatchHeader(NamedTuple):
    """The fields before the records of a batch."""

    base_offset: int
    length: int  # bytes after this field
    leader_epoch: int
    format: int
    checksum: int
    attributes: int
    last_offset_delta: int
    first_time: int  # epoch milliseconds
    greatest_time: int  # epoch milliseconds
    producer_id: int
    producer_epoch: int
    base_sequence: int
    records: int

    @property
    def last_offset(self) -> int:
        # Compaction keeps it even when it removes the last record, or all records.
        return self.base_offset + self.last_offset_delta


def format_of(stored: bytes) -> int | None:
    """Return the format of the first stored batch, or None if there are too few bytes to know.

    >>> format_of(bytes(16) + b"\\x02"), format_of(b"")
    (2, None)
    """
    return _format_at(stored, 0) if len(stored) > _FORMAT_OFFSET else None


def _format_at(stored: bytes | memoryview, start: int) -> int:
    """Return the format of the batch that begins at the byte `start`."""
    position = start + _FORMAT_OFFSET
    return int.from_bytes(stored[position : position + 1], signed=True)


def after_batch(stored: bytes, offset: int) -> int | None:
    """Return the first offset after the batch that holds `offset`, or None if it is unknown.

    Only the headers of the stored batches are read. The last batch may be cut off.

    >>> def batch(base, last, count):
    ...     fields = (base, 49, 0, 2, 0, 0, last, 0, 0, -1, -1, -1, count)
    ...     return struct.pack(">qiibIhiqqqhii", *fields)
    >>> after_batch(batch(0, 4, 5) + batch(5, 2, 3), 2)
    5
    >>> after_batch(batch(5, 2, 3), 6)
    8
    >>> after_batch(batch(5, 900, 3), 6)
    """
    start = 0
    end_offset = None
    while start + _HEADER.size <= len(stored):
        header = BatchHeader._make(_HEADER.unpack_from(stored, start))
        if header.base_offset > offset:
            return header.base_offset
        # No following batch confirms where this one ends. Its header is believed only if it is
        # consistent: as many records as offsets.
        consistent = header.format == FORMAT and header.records == header.last_offset_delta + 1
        end_offset = header.last_offset + 1 if consistent else None
        start += _AFTER_LENGTH_OFFSET + max(header.length, 0)
    return None if end_offset is None or end_offset <= offset else end_offset


class Columns:
    """Collects up to `most_records` records as columns.

    The columns are full once their values reach `full_bytes`. A value longer than
    `most_value_bytes` is cut to that length.

    >>> columns = Columns(8, full_bytes=1 << 20, most_value_bytes=3)
    >>> columns.append(0, 7, -1, b"four")
    >>> columns.append(1, 0, 5, None)
    >>> records = columns.hand_out()
    >>> records.partition.tolist(), records.offset.tolist(), records.time.tolist()
    ([0, 1], [7, 0], [-1, 5])
    >>> records.value.to_pylist(), columns.count
    ([b'fou', None], 0)
    """

    def __init__(self, most_records: int, *, full_bytes: int, most_value_bytes: int) -> None:
        self.full_bytes = full_bytes
        self.most_value_bytes = most_value_bytes
        self.most_records = most_records
        self.count = 0
        self.rows = np.zeros(most_records + 1, _ROW)
        self.data = np.empty(_INITIAL_DATA_BYTES, np.uint8)
        self.append_arguments = np.empty(1, _APPEND_ARGUMENTS)
        # Each field of the rows as an array.
        self.partition = self.rows["partition"]
        self.valid = self.rows["valid"]
        self.offset = self.rows["offset"]
        self.time = self.rows["time"]
        self.begin = self.rows["begin"]

    @property
    def full(self) -> bool:
        return self.count == self.most_records or bool(self.begin[self.count] >= self.full_bytes)

    def append(self, partition: int, offset: int, time: int, value: bytes | None) -> None:
        """Append one record. There must be room for it."""
        index = self.count
        begin = int(self.begin[index])
        size = min(len(value or b""), self.most_value_bytes)
        while begin + size > len(self.data):
            self.grow()
        self.partition[index] = partition
        self.valid[index] = value is not None
        self.offset[index] = offset
        self.time[index] = time
        self.data[begin : begin + size] = np.frombuffer(value or b"", np.uint8, size)
        self.begin[index + 1] = begin + size
        self.count += 1

    def grow(self) -> None:
        """Double the room for values."""
        used = self.begin[self.count]
        grown = np.empty(2 * len(self.data), np.uint8)
        grown[:used] = self.data[:used]
        self.data = grown

    def hand_out(self) -> Records:
        """Return the collected records as a copy, and empty the columns."""
        n = self.count
        begin = self.begin[: n + 1]
        valid = pa.py_buffer(np.packbits(self.valid[:n], bitorder="little"))
        offsets = pa.py_buffer(begin.copy())
        data = pa.py_buffer(self.data[: begin[n]].copy())
        self.count = 0
        return Records(
            partition=self.partition[:n].copy(),
            offset=self.offset[:n].copy(),
            time=self.time[:n].copy(),
            value=pa.LargeBinaryArray.from_buffers(pa.large_binary(), n, [valid, offsets, data]),
        )


@dataclass(frozen=True, slots=True)
class Codecs:
    """The functions that read stored bytes: the CRC-32C of a buffer, and for each codec number a
    decompressor, and one that yields its output in pieces.

    A decompressor may raise any exception; it raises `LargeBatch` when its output would be too
    large, and the pieces are read then.
    """

    crc32c: Callable[[memoryview], int]
    expand: Mapping[int, Callable[[memoryview], bytes]]
    pieces: Mapping[int, Callable[[memoryview], Iterator[bytes]]] = field(default_factory=dict)


class StoredBatches:
    """Reads the committed records of one partition from stored batches, from `position` on, in
    pieces.

    `aborted` lists the aborted transactions as (first offset, producer id). Reading stops
    before a last batch that is cut off, and before a batch of an older format that follows
    another batch.
    """

    def __init__(
        self,
        stored: bytes,
        position: int,
        *,
        aborted: Iterable[tuple[int, int]] = (),
        codecs: Codecs,
    ) -> None:
        self.position = position  # the next offset to read
        self.leader_epoch = -1  # of the batch read last
        self._first_position = position
        self._stored = memoryview(stored).toreadonly()
        self._cursor = 0  # the byte at which the next batch begins
        self._aborted = deque(sorted(aborted))
        self._aborted_producers: set[int] = set()
        self._codecs = codecs
        self._open: _OpenBatch | StreamedBatch | None = None
        self._open_start = 0  # the byte at which the open batch begins

    @property
    def exhausted(self) -> bool:
        return self._open is None and self._next_end() is None

    def take(self, columns: Columns, partition: int, most: int) -> int:
        """Append up to `most` of the next records, as far as there is room, and return their
        number.

        `partition` is written to the column of that name. Raises `DamagedBatch` if the batch at
        `position` is damaged. No record of a damaged batch is returned.
        """
        start = self.position
        count_before = columns.count
        limit = min(count_before + most, columns.most_records)
        try:
            while columns.count < limit and not columns.full:
                self._open = self._open or self._open_next()
                if self._open is None:
                    break
                self._read(self._open, columns, limit)
        except DamagedBatch:
            if self.position == start:
                raise
            # Return the records before the damage. The next call raises the error again.
        columns.partition[count_before : columns.count] = partition
        return columns.count - count_before

    def fold(self) -> None:
        """Release the decompressed open batch, which can be much larger than its stored form.

        The next `take` decompresses it again.
        """
        if self._open:
            self._open = None
            self._cursor = self._open_start

    def _read(self, batch: _OpenBatch | StreamedBatch, columns: Columns, limit: int) -> None:
        if batch.append_to(columns, self.position, limit):
            self._open = None
            self.position = batch.header.last_offset + 1
        else:
            self.position = int(columns.offset[columns.count - 1]) + 1

    def _open_next(self) -> _OpenBatch | StreamedBatch | None:
        """Open the next batch that has records to read, and move the position to it."""
        while (end := self._next_end()) is not None:
            header = self._header(end)
            payload = self._stored[self._cursor + _HEADER.size : end]
            batch = self._open_batch(header, payload)
            self._open_start = self._cursor
            self._cursor = end
            self.leader_epoch = header.leader_epoch
            if batch:
                return batch
            self.position = max(self.position, header.last_offset + 1)
        if self._cursor and self.position == self._first_position:
            # Fetching the same position again would return the same batches for ever.
            raise DamagedBatch(
                f"offset {self.position} was fetched, but all returned batches end before it"
            )
        return None

    def _open_batch(
        self, header: BatchHeader, payload: memoryview
    ) -> _OpenBatch | StreamedBatch | None:
        """Return the batch with its records, or None if it has none to read from the position
        on.
        """
        if self._is_skipped(header, payload):  # always called: it tracks the transactions
            return None
        if header.records == 0 or header.last_offset < self.position:
            return None
        try:
            return _OpenBatch(header, self._expanded(header, payload))
        except LargeBatch:
            pieces_of = self._codecs.pieces[header.attributes & _CODEC_MASK]
            return StreamedBatch(header, lambda: pieces_of(payload))

    def _next_end(self) -> int | None:
        """Return the byte at which the next batch ends by its own header.

        Returns None at the end, for a batch that is cut off, and before a batch of an older format.
        """
        start = self._cursor
        stored = self._stored
        if len(stored) - start <= _FORMAT_OFFSET:
            return None
        (length,) = _LENGTH.unpack_from(stored, start + _LENGTH_OFFSET)
        end: int = start + _AFTER_LENGTH_OFFSET + length
        older = start > 0 and _format_at(stored, start) < FORMAT
        return None if end > len(stored) or older else end

    def _header(self, end: int) -> BatchHeader:
        start = self._cursor
        stored = self._stored
        if end - start < _HEADER.size:
            raise DamagedBatch(
                f"the batch at offset {self.position} is shorter than its own header"
            )
        header = BatchHeader._make(_HEADER.unpack_from(stored, start))
        if header.format != FORMAT:
            raise DamagedBatch(
                f"the batch at offset {self.position} has the unknown format {header.format}"
            )
        if self._codecs.crc32c(stored[start + _ATTRIBUTES_OFFSET : end]) != header.checksum:
            raise DamagedBatch(f"the batch at offset {header.base_offset} failed crc check")
        if header.records < 0:
            raise _damaged(header, f"has a negative number of records, {header.records}")
        if header.last_offset_delta < 0 or header.last_offset >= _INT64_MAX:
            raise _damaged(header, f"has an impossible last offset, {header.last_offset}")
        return header

    def _expanded(self, header: BatchHeader, payload: memoryview) -> Bytes:
        """Return the decompressed records of a batch."""
        codec = header.attributes & _CODEC_MASK
        if not codec:
            return np.frombuffer(payload, np.uint8)
        if codec not in self._codecs.expand:
            raise _damaged(header, f"is compressed with an unknown codec, {codec}")
        try:
            return np.frombuffer(self._codecs.expand[codec](payload), np.uint8)
        except (MemoryError, LargeBatch):
            raise
        except Exception as error:  # noqa: BLE001 - each compression library has its own errors
            raise _damaged(header, f"cannot be decompressed: {error!r}") from error

    def _is_skipped(self, header: BatchHeader, payload: memoryview) -> bool:
        """Return whether a batch is a control batch or belongs to an aborted transaction.

        A transaction in `aborted` begins at its first offset and ends at the abort marker of its
        producer. Batches must be passed in order.
        """
        control = bool(header.attributes & _CONTROL)
        if header.producer_id < 0:
            return control
        while self._aborted and self._aborted[0][0] <= header.last_offset:
            self._aborted_producers.add(self._aborted.popleft()[1])
        if control and header.records and _is_abort_marker(header, self._expanded(header, payload)):
            self._aborted_producers.discard(header.producer_id)
        transactional = bool(header.attributes & _TRANSACTIONAL)
        return control or (transactional and header.producer_id in self._aborted_producers)


class _OpenBatch:
    """A batch whose records are being read. Raises `DamagedBatch` if a record is malformed."""

    def __init__(self, header: BatchHeader, body: Bytes) -> None:
        if damage := _DAMAGE[_validate(body, header.records, header.last_offset_delta)]:
            raise _damaged(header, damage)
        self.header = header
        self._body = _Body(header, body)

    def append_to(self, columns: Columns, position: int, limit: int) -> bool:
        """Append records from `position` on until the columns hold `limit` records or are full.

        Returns whether the batch has no further record.
        """
        return self._body.append_to(columns, position, limit)


class _Body:
    """Valid records of a batch in their order, with the place where reading goes on."""

    def __init__(self, header: BatchHeader, body: Bytes) -> None:
        self._base_offset = header.base_offset
        self._append_time, self._base_time = _times(header)
        self._body = body
        self._cursor = 0

    def append_to(self, columns: Columns, position: int, limit: int) -> bool:
        columns.append_arguments[0] = (
            self._base_offset,
            self._base_time,
            self._append_time,
            position,
            limit,
            columns.full_bytes,
            columns.most_value_bytes,
        )
        while True:
            self._cursor, columns.count = _append(
                self._body,
                self._cursor,
                columns.append_arguments,
                columns.rows,
                columns.data,
                columns.count,
            )
            if self._cursor == len(self._body):
                return True
            if columns.count == limit or columns.full:
                return False
            columns.grow()


def _times(header: BatchHeader) -> tuple[bool, int]:
    """Return whether all records have the time of the batch, and the time that deltas add to."""
    append_time = bool(header.attributes & _LOG_APPEND_TIME)
    return append_time, header.greatest_time if append_time else header.first_time


class StreamedBatch:
    """A batch that is too large to be expanded at once: `pieces` yields its expanded bytes.

    Its records are those of a batch that is expanded at once, and so is the damage that is found.
    It takes as much memory as two pieces and a value that is cut. `pieces` is called twice: all
    records are checked before the first one is returned. Raises `DamagedBatch`.
    """

    def __init__(self, header: BatchHeader, pieces: Callable[[], Iterator[bytes]]) -> None:
        self.header = header
        self._pieces = pieces
        self._append_time, self._base_time = _times(header)
        self._parts: Iterator[Bytes | _StreamedRecord] | None = None
        self._body: _Body | None = None
        for _ in self._read(0):
            pass

    def append_to(self, columns: Columns, position: int, limit: int) -> bool:
        """Append records from `position` on until the columns hold `limit` records or are full.

        Returns whether the batch has no further record.
        """
        self._parts = self._parts or self._read(columns.most_value_bytes)
        while columns.count < limit and not columns.full:
            if self._body:
                if self._body.append_to(columns, position, limit):
                    self._body = None
                continue
            part = next(self._parts, None)
            if part is None:
                return True
            if isinstance(part, _StreamedRecord):
                self._append(part, columns, position)
            else:
                self._body = _Body(self.header, part)
        return False

    def _append(self, record: _StreamedRecord, columns: Columns, position: int) -> None:
        offset = self.header.base_offset + record.offset_delta
        if offset >= position:
            delta = 0 if self._append_time else record.time_delta
            columns.append(0, offset, _wrapped(self._base_time + delta), record.value)

    def _read(self, most_value_bytes: int) -> Iterator[Bytes | _StreamedRecord]:
        """Yield the records: those that lie within one piece together, each other one alone."""
        header = self.header
        stream = _ByteStream(self._pieces())
        records_left = header.records
        previous = -1
        try:
            while records_left:
                window = stream.window()
                end, count, previous = _whole_records(
                    window, records_left, previous, header.last_offset_delta
                )
                if count:
                    stream.pass_over(end)
                    records_left -= count
                    yield window[:end]
                    continue
                record = _stream_record(stream, most_value_bytes)
                if not previous < record.offset_delta <= header.last_offset_delta:
                    raise _damaged(header, _DAMAGE[_NOT_IN_ORDER])
                previous = record.offset_delta
                records_left -= 1
                yield record
            left_over = not stream.ended
        except (DamagedBatch, MemoryError):
            raise
        except _Malformed:
            raise _damaged(header, _DAMAGE[_MALFORMED]) from None
        except Exception as error:  # noqa: BLE001 - each compression library has its own errors
            raise _damaged(header, f"cannot be decompressed: {error!r}") from error
        if left_over:
            raise _damaged(header, _DAMAGE[_LEFT_OVER])


class _StreamedRecord(NamedTuple):
    offset_delta: int
    time_delta: int
    value: bytes | None


class _Malformed(Exception):
    """The bytes of a batch are not its records."""


def _stream_record(stream: _ByteStream, most_value_bytes: int) -> _StreamedRecord:
    """Return the next record, its value cut; the same rules as `_parse_record` has."""
    size = stream.number()
    if size < 1:
        raise _Malformed
    end = stream.position + size
    stream.take(1, 0, end)  # the attributes, which have no meaning yet
    time_delta = stream.number()
    offset_delta = stream.number()
    stream.take(stream.number(), 0, end)  # the key
    value_size = stream.number()
    value = stream.take(value_size, most_value_bytes, end)
    headers = stream.number()
    if headers < 0:
        raise _Malformed
    for _ in range(headers):
        name_size = stream.number()
        if name_size < 0:
            raise _Malformed
        stream.take(name_size, 0, end)
        stream.take(stream.number(), 0, end)
    if stream.position != end:
        raise _Malformed
    return _StreamedRecord(offset_delta, time_delta, None if value_size < 0 else value)


class _ByteStream:
    """Bytes that come in pieces. Raises `_Malformed` where they end too early."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.position = 0
        self._pieces = pieces
        self._piece = b""
        self._cursor = 0

    @property
    def ended(self) -> bool:
        """True after the last byte."""
        while self._cursor == len(self._piece):
            piece = next(self._pieces, None)
            if piece is None:
                return True
            self._piece = piece
            self._cursor = 0
        return False

    def window(self) -> Bytes:
        """Return the bytes that come next and lie in one piece."""
        return np.frombuffer(b"" if self.ended else self._piece, np.uint8)[self._cursor :]

    def pass_over(self, size: int) -> None:
        """Pass over bytes of the window."""
        self._cursor += size
        self.position += size

    def take(self, size: int, most: int, end: int) -> bytes:
        """Pass over a byte string that must lie before `end`, and return up to `most` bytes of it.

        A size below 1 is that of an empty one.
        """
        if size > end - self.position:
            raise _Malformed
        taken = []
        while size > 0:
            if self.ended:
                raise _Malformed
            begin = self._cursor
            passed = min(size, len(self._piece) - begin)
            if most > 0:
                taken.append(self._piece[begin : begin + min(passed, most)])
                most -= passed
            size -= passed
            self.pass_over(passed)
        return b"".join(taken)

    def number(self) -> int:
        """Return the next zigzag varint."""
        bits = 0
        for shift in range(0, _VARINT_MAX_SHIFT + 1, 7):
            if self.ended:
                raise _Malformed
            byte = self._piece[self._cursor]
            self.pass_over(1)
            bits |= (byte & _VARINT_BITS) << shift
            if byte < _MORE_BYTES:
                bits &= _UINT64_MAX
                return (bits >> 1) ^ -(bits & 1)
        raise _Malformed


def _wrapped(number: int) -> int:
    """Return the number as 64 bits with a sign hold it, which is how compiled code adds."""
    return (number - _INT64_MIN & _UINT64_MAX) + _INT64_MIN


def _damaged(header: BatchHeader, damage: str) -> DamagedBatch:
    return DamagedBatch(f"the batch at offset {header.base_offset} {damage}")


def _is_abort_marker(header: BatchHeader, body: Bytes) -> bool:
    record = _parse_record(body, 0)
    if record.end < 0 or record.key_size < _CONTROL_KEY.size:
        raise _damaged(header, "has a malformed transaction marker")
    _version, kind = _CONTROL_KEY.unpack_from(body.data, record.key_begin)
    return bool(kind == _ABORT)


# -- compiled code -------------------------------------------------------------------------------
#
# Compiled code does not check array indexes. A position is therefore read only when it is less
# than an end, and a position beyond an end becomes end + 1 and stays there. Error flags or -1
# in place of that make the same loop several times slower.


class Record(NamedTuple):
    """The positions of the parts of a record in the body of its batch."""

    end: int  # the position after the record; -1 when it is malformed
    offset_delta: int
    time_delta: int
    key_begin: int
    key_size: int  # negative for null, like value_size
    value_begin: int
    value_size: int


_SOUND = 0
_MALFORMED = 1
_NOT_IN_ORDER = 2
_LEFT_OVER = 3
_DAMAGE = {
    _SOUND: "",
    _MALFORMED: "has a malformed record, or fewer records than its header says",
    _NOT_IN_ORDER: "has records whose offsets do not increase or exceed its last offset",
    _LEFT_OVER: "has bytes after its last record",
}

_MORE_BYTES = 0x80  # set in every byte of a varint but the last
_VARINT_BITS = 0x7F
_VARINT_MAX_SHIFT = 63


@numba.njit(cache=True, nogil=True)
def _varint(body, position, end):  # type: ignore[no-untyped-def]
    """Return (number, position after it) of a zigzag varint, or (0, end + 1) if it is malformed."""
    bits = np.int64(0)
    shift = 0
    byte = np.int64(_MORE_BYTES)
    while byte >= _MORE_BYTES:
        if position >= end or shift > _VARINT_MAX_SHIFT:
            return np.int64(0), end + 1
        byte = np.int64(body[position])
        bits |= (byte & _VARINT_BITS) << shift
        shift += 7
        position += 1
    return ((bits >> 1) & _INT64_MAX) ^ -(bits & 1), position


@numba.njit(cache=True, nogil=True)
def _skip(position, size, end):  # type: ignore[no-untyped-def]
    """Return the position after a byte string of this size, or end + 1 if it does not fit."""
    if size <= 0:  # empty or null
        return position
    return end + 1 if size > end - position else position + size


@numba.njit(cache=True, nogil=True)
def _parse_record(body, position):  # type: ignore[no-untyped-def]
    """Return the `Record` at a position."""
    size, position = _varint(body, position, len(body))
    if size < 1 or size > len(body) - position:
        return Record(-1, 0, 0, 0, 0, 0, 0)
    end = position + size
    position += 1  # the attributes, which have no meaning yet
    time_delta, position = _varint(body, position, end)
    offset_delta, position = _varint(body, position, end)
    key_size, key_begin = _varint(body, position, end)
    position = _skip(key_begin, key_size, end)
    value_size, value_begin = _varint(body, position, end)
    position = _skip(value_begin, value_size, end)
    headers, position = _varint(body, position, end)
    sizes_valid = headers >= 0
    for _ in range(headers):
        name_size, position = _varint(body, position, end)
        sizes_valid = sizes_valid and name_size >= 0
        position = _skip(position, name_size, end)
        header_size, position = _varint(body, position, end)
        position = _skip(position, header_size, end)
        if position > end:
            break
    record_end = position if sizes_valid and position == end else -1
    return Record(
        record_end, offset_delta, time_delta, key_begin, key_size, value_begin, value_size
    )


@numba.njit(cache=True, nogil=True)
def _validate(body, count, last_offset_delta):  # type: ignore[no-untyped-def]
    """Return `_SOUND` if the body is exactly `count` records in order, or what is wrong."""
    position = 0
    previous = -1
    for _ in range(count):
        record = _parse_record(body, position)
        if record.end < 0:
            return _MALFORMED
        if record.offset_delta <= previous or record.offset_delta > last_offset_delta:
            return _NOT_IN_ORDER
        previous = record.offset_delta
        position = record.end
    return _SOUND if position == len(body) else _LEFT_OVER


@numba.njit(cache=True, nogil=True)
def _whole_records(body, most, previous, last_offset_delta):  # type: ignore[no-untyped-def]
    """Return (position after them, number, last offset delta) of the first records of a body.

    They are at most `most` and end before a record that is cut off or malformed.
    """
    position = 0
    count = 0
    while count < most:
        record = _parse_record(body, position)
        if record.end < 0 or not previous < record.offset_delta <= last_offset_delta:
            break
        previous = record.offset_delta
        position = record.end
        count += 1
    return position, count, previous


@numba.njit(cache=True, nogil=True)
def _copy(source, target):  # type: ignore[no-untyped-def]
    # A loop whose index begins at zero compiles to wide moves. An offset in the index, or
    # assigning a slice, is ten times slower.
    for i in range(len(source)):
        target[i] = source[i]


@numba.njit(cache=True, nogil=True)
def _append(body, cursor, packed, rows, data, count):  # type: ignore[no-untyped-def]
    """Append records of a valid body to `rows` and `data`, which hold `count` records.

    `packed` is one `_APPEND_ARGUMENTS`. Returns (position after the last record appended or
    passed over, new count). Stops early when a value does not fit into `data`.
    """
    arguments = packed[0]
    base_time = arguments["base_time"]
    while (
        cursor < len(body)
        and count < arguments["limit"]
        and rows[count]["begin"] < arguments["full_bytes"]
    ):
        record = _parse_record(body, cursor)
        offset = arguments["base_offset"] + record.offset_delta
        if offset >= arguments["position"]:
            row = rows[count]
            begin = row["begin"]
            size = min(max(record.value_size, 0), arguments["most_value_bytes"])
            if size > len(data) - begin:
                break
            value = body[record.value_begin : record.value_begin + size]
            _copy(value, data[begin : begin + size])
            row["valid"] = record.value_size >= 0
            row["offset"] = offset
            row["time"] = base_time if arguments["append_time"] else base_time + record.time_delta
            rows[count + 1]["begin"] = begin + size
            count += 1
        cursor = record.end
    return cursor, count
