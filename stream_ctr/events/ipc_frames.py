"""The frames of an Arrow IPC stream, looked at before Arrow reads what is in them.

    ff ff ff ff | metadata size, int32 | metadata, a flatbuffer | body      of the schema, each dictionary and each record batch
    ff ff ff ff | 00 00 00 00                                               the end

https://arrow.apache.org/docs/format/Columnar.html#encapsulated-message-format. Arrow's reader takes the end of the bytes for the end of the
stream, allots what a compressed buffer says it unfolds to, and makes columns of nulls as long as they say. Here a stream must end, and
what it says of its sizes is known before anything is allotted. Whether the rest is sound is for Arrow to find out.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

MARKER = b"\xff\xff\xff\xff"
_END = MARKER + b"\0\0\0\0"
_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3
_BIG_ENDIAN = 1


class DamagedStream(Exception):
    """Bytes that are no Arrow IPC stream from its schema to its end."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Rows of all record batches, and bytes of all buffers as they are once nothing is compressed."""

    rows: int
    bytes: int


def sizes(data: bytes | memoryview) -> Sizes:
    """What the stream says of itself. Raises `DamagedStream`, also when its numbers are stored big end first.

    >>> import pyarrow as pa
    >>> table = pa.table({"x": pa.array([1, 2, 3], pa.int64())})
    >>> sink = pa.BufferOutputStream()
    >>> with pa.ipc.new_stream(sink, table.schema) as writer:
    ...     writer.write_table(table)
    >>> sizes(sink.getvalue().to_pybytes())
    Sizes(rows=3, bytes=24)
    """
    rows = unfolded = 0
    try:
        for number, (message, body) in enumerate(_frames(memoryview(data).cast("B"))):
            kind, header = message.number(1, "B"), message.table(2)
            if (number == 0) != (kind == _SCHEMA):
                raise DamagedStream("a stream begins with its schema, and has one")
            if kind == _SCHEMA:
                if header.number(0, "h") == _BIG_ENDIAN:
                    raise DamagedStream("numbers are stored big end first")
            elif kind in (_DICTIONARY, _BATCH):
                batch = header.table(1) if kind == _DICTIONARY else header
                rows += batch.number(0, "q") if kind == _BATCH else 0
                unfolded += _unfolded(batch, body)
            else:
                raise DamagedStream(f"a message of kind {kind}")
            if rows < 0 or (kind != _SCHEMA and batch.number(0, "q") < 0):
                raise DamagedStream("a batch of fewer than no rows")
    except (struct.error, ValueError, OverflowError) as error:
        raise DamagedStream(f"a frame does not hold what it should: {error}") from None
    return Sizes(rows, unfolded)


@dataclass(frozen=True, slots=True)
class _Table:
    """A table of a flatbuffer: fields by their number, each where the vtable says, which may be nowhere.

    https://flatbuffers.dev/internals/. Reading outside of `data` raises `struct.error`.
    """

    data: memoryview
    at: int

    def number(self, field: int, format: str) -> int:
        """0 where it is left out."""
        at = self._place(field)
        return int(_read(self.data, at, format)) if at else 0

    def table(self, field: int) -> _Table:
        at = self._place(field)
        if not at:
            raise DamagedStream("a frame without its header")
        return _Table(self.data, at + _read(self.data, at, "I"))

    def has(self, field: int) -> bool:
        return bool(self._place(field))

    def pairs(self, field: int) -> np.ndarray:
        """A vector of n structs of two int64, [n, 2]."""
        at = self._place(field)
        if not at:
            return np.empty((0, 2), np.int64)
        at += _read(self.data, at, "I")
        return np.frombuffer(self.data, "<i8", 2 * _read(self.data, at, "I"), at + 4).reshape(-1, 2)

    def _place(self, field: int) -> int:
        vtable = self.at - _read(self.data, self.at, "i")
        slot = 4 + 2 * field
        offset = _read(self.data, vtable + slot, "H") if slot < _read(self.data, vtable, "H") else 0
        return self.at + offset if offset else 0


def _frames(data: memoryview) -> Iterator[tuple[_Table, memoryview]]:
    """Metadata and body of each message. The stream ends with the data."""
    at = 0
    while True:
        if data[at : at + 4] != MARKER:
            raise DamagedStream(
                "it stops before its end"
                if at >= len(data)
                else "a frame does not begin with its marker"
            )
        size = _read(data, at + 4, "i")
        if size == 0:
            if at + 8 != len(data):
                raise DamagedStream(f"{len(data) - at - 8} bytes come after its end")
            return
        metadata, at = data[at + 8 : at + 8 + size], at + 8 + size
        message = _Table(metadata, _read(metadata, 0, "I"))
        length = message.number(3, "q")
        if size < 0 or length < 0 or at + length > len(data):
            raise DamagedStream("it stops within a message")
        yield message, data[at : at + length]
        at += length


def _unfolded(batch: _Table, body: memoryview) -> int:
    """Bytes of a batch's buffers. A compressed one begins with its size, -1: stored as it is."""
    buffers = batch.pairs(2)
    if (buffers < 0).any() or (buffers > len(body)).any():
        raise DamagedStream("a buffer outside of its message")
    if not batch.has(3):
        return int(buffers[:, 1].sum())
    total = 0
    for offset, length in buffers[buffers[:, 1] > 0].tolist():
        size = _read(body, offset, "q")
        if size < -1:
            raise DamagedStream("a buffer of fewer than no bytes")
        total += length if size == -1 else size
    return total


def _read(data: memoryview, at: int, format: str) -> int:
    if at < 0:
        raise DamagedStream("a frame points before its beginning")
    value: int = struct.unpack_from(f"<{format}", data, at)[0]
    return value
