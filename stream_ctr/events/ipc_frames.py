"""Read the frames of an Arrow IPC stream, before Arrow reads what is in them.

    ff ff ff ff | metadata size, int32 | metadata, a flatbuffer | body
    ff ff ff ff | 00 00 00 00

The first line is a message: the schema, a dictionary or a record batch. The second is the end.

https://arrow.apache.org/docs/format/Columnar.html#encapsulated-message-format

Arrow's own reader trusts the sender in four ways. It takes the end of the bytes for the end of the
stream. It allocates what a compressed buffer claims as its size. It makes columns of nulls of any
length. It joins a dictionary with each of its deltas to a new one, and every batch keeps that of
its time. Here, a stream must have an end, and its sizes are known before anything is allocated.
Arrow checks the rest.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MARKER = b"\xff\xff\xff\xff"
_MARKER_AND_SIZE = 8  # bytes

# Fields of the flatbuffers by their number, and values of their enumerations, from Arrow's
# format/Message.fbs and format/Schema.fbs.
_MESSAGE_KIND = 1
_MESSAGE_HEADER = 2
_MESSAGE_BODY_LENGTH = 3
_SCHEMA_ENDIANNESS = 0
_DICTIONARY_ID = 0
_DICTIONARY_DATA = 1
_DICTIONARY_IS_DELTA = 2
_BATCH_ROWS = 0
_BATCH_NODES = 1
_BATCH_BUFFERS = 2
_BATCH_COMPRESSION = 3
_SCHEMA = 1
_DICTIONARY = 2
_BATCH = 3
_BIG_ENDIAN = 1
_STORED_UNCOMPRESSED = -1  # in place of the size of a buffer in a compressed batch

_VALUES_A_BYTE = 8  # of the bitmap of a column's nulls
_WORD_BYTES = 24  # of a word of a dictionary as text: an integer has at most 20 digits
_VALIDATED_TO_ALLOCATED = 64  # validating takes that much less time than memory is dear


class DamagedStream(Exception):
    """Raised when bytes are not an Arrow IPC stream from its schema to its end."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The rows of all record batches, and the bytes that Arrow allocates to read the stream.

    The bytes are those of all buffers once decompressed and of a bitmap for each column, nested
    ones included. A dictionary counts 24 bytes a word more, for its words as text; with each delta
    it counts as a whole again. Each batch validates the dictionaries of its time, which counts a
    64th of their bytes.
    """

    rows: int
    bytes: int


def sizes(data: bytes | memoryview) -> Sizes:
    """Return the sizes that the stream declares.

    Raises `DamagedStream` when the frames are not valid, or the stream has big-endian numbers.

    >>> import pyarrow as pa
    >>> table = pa.table({"x": pa.array([1, 2, 3, 4, 5, 6, 7, 8], pa.int64())})
    >>> sink = pa.BufferOutputStream()
    >>> with pa.ipc.new_stream(sink, table.schema) as writer:
    ...     writer.write_table(table)
    >>> sizes(sink.getvalue().to_pybytes())
    Sizes(rows=8, bytes=65)
    """
    rows = 0
    allocated = 0
    dictionaries: dict[int, int] = {}  # the bytes of each one, by its id
    try:
        for index, (message, body) in enumerate(_frames(memoryview(data).cast("B"))):
            kind = message.number(_MESSAGE_KIND, "B")
            header = message.table(_MESSAGE_HEADER)
            if (index == 0) != (kind == _SCHEMA):
                raise DamagedStream("a stream must begin with its schema, and have only one")
            if kind == _SCHEMA:
                if header.number(_SCHEMA_ENDIANNESS, "h") == _BIG_ENDIAN:
                    raise DamagedStream("big-endian numbers are not supported")
            elif kind == _DICTIONARY:
                batch = header.table(_DICTIONARY_DATA)
                id = header.number(_DICTIONARY_ID, "q")
                held = _allocated_bytes(batch, body) + _WORD_BYTES * _rows(batch)
                if header.number(_DICTIONARY_IS_DELTA, "B"):
                    held += dictionaries.get(id, 0)
                dictionaries[id] = held
                allocated += held
            elif kind == _BATCH:
                rows += _rows(header)
                allocated += _allocated_bytes(header, body)
                allocated += sum(dictionaries.values()) // _VALIDATED_TO_ALLOCATED
            else:
                raise DamagedStream(f"a message of the unknown kind {kind}")
    except (struct.error, ValueError, OverflowError) as error:
        raise DamagedStream(f"a frame is damaged: {error}") from None
    return Sizes(rows, allocated)


@dataclass(frozen=True, slots=True)
class _Table:
    """A table of a flatbuffer, at `position` in `data`.

    A vtable gives the position of each field, by the field's number, or says that it is absent
    (https://flatbuffers.dev/internals/). Reading outside of `data` raises `struct.error`.
    """

    data: memoryview
    position: int

    def number(self, field: int, format: str) -> int:
        """Return a number, 0 when it is absent. `format` is that of `struct`."""
        position = self._position_of(field)
        return int(_read(self.data, position, format)) if position else 0

    def table(self, field: int) -> _Table:
        """Return a nested table. Raises `DamagedStream` when it is absent."""
        position = self._position_of(field)
        if not position:
            raise DamagedStream("a frame has no header")
        return _Table(self.data, position + _read(self.data, position, "I"))

    def has(self, field: int) -> bool:
        return bool(self._position_of(field))

    def pairs(self, field: int) -> npt.NDArray[np.int64]:
        """Return a vector of n structs of two int64 [n, 2], empty when it is absent."""
        position = self._position_of(field)
        if not position:
            return np.empty((0, 2), np.int64)
        vector = position + _read(self.data, position, "I")
        count = 2 * _read(self.data, vector, "I")
        return np.frombuffer(self.data, "<i8", count, vector + 4).reshape(-1, 2)

    def _position_of(self, field: int) -> int:
        """Return the position of a field, 0 when it is absent."""
        vtable = self.position - _read(self.data, self.position, "i")
        slot = 4 + 2 * field  # after the sizes of vtable and table
        if slot >= _read(self.data, vtable, "H"):
            return 0
        offset = _read(self.data, vtable + slot, "H")
        return self.position + offset if offset else 0


def _frames(data: memoryview) -> Iterator[tuple[_Table, memoryview]]:
    """Yield metadata and body of each message. The stream must end where the data ends."""
    position = 0
    while True:
        if data[position : position + len(MARKER)] != MARKER:
            raise DamagedStream(
                "the stream stops before its end"
                if position >= len(data)
                else "a frame does not begin with the marker ff ff ff ff"
            )
        size = _read(data, position + len(MARKER), "i")
        position += _MARKER_AND_SIZE
        if size == 0:
            if position != len(data):
                raise DamagedStream(f"{len(data) - position} bytes follow the end of the stream")
            return
        metadata = data[position : position + size]
        position += size
        message = _Table(metadata, _read(metadata, 0, "I"))
        length = message.number(_MESSAGE_BODY_LENGTH, "q")
        if size < 0 or length < 0 or position + length > len(data):
            raise DamagedStream("the stream stops within a message")
        yield message, data[position : position + length]
        position += length


def _rows(batch: _Table) -> int:
    rows = batch.number(_BATCH_ROWS, "q")
    if rows < 0:
        raise DamagedStream("a batch has a negative number of rows")
    return rows


def _allocated_bytes(batch: _Table, body: memoryview) -> int:
    """Return the bytes of a batch's buffers once decompressed, and of bitmaps.

    In a compressed batch, each buffer begins with its decompressed size.
    """
    values, nulls = batch.pairs(_BATCH_NODES).T
    if (values < 0).any() or (nulls < 0).any():
        raise DamagedStream("a column has a negative length")
    # Python's integers, because the sum may not fit into an int64.
    bitmaps = sum(values.tolist()) // _VALUES_A_BYTE
    buffers = batch.pairs(_BATCH_BUFFERS)
    if (buffers < 0).any() or (buffers > len(body)).any():
        raise DamagedStream("a buffer is outside of its message")
    if not batch.has(_BATCH_COMPRESSION):
        return bitmaps + int(buffers[:, 1].sum())
    total = bitmaps
    for offset, length in buffers[buffers[:, 1] > 0].tolist():
        size = _read(body, offset, "q")
        if size < _STORED_UNCOMPRESSED:
            raise DamagedStream("a buffer has a negative size")
        total += length if size == _STORED_UNCOMPRESSED else size
    return total


def _read(data: memoryview, position: int, format: str) -> int:
    if position < 0:
        raise DamagedStream("a frame points before its beginning")
    value: int = struct.unpack_from(f"<{format}", data, position)[0]
    return value
