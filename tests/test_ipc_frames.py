"""The frames of an Arrow IPC stream: the sizes that it declares, and damage to it."""

from __future__ import annotations

import struct
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pytest

from stream_ctr.events.ipc_frames import MARKER, DamagedStream, Sizes, sizes


def stream(*batches: pa.RecordBatch, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    write_options = pa.ipc.IpcWriteOptions(**options)
    with pa.ipc.new_stream(sink, batches[0].schema, options=write_options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return bytes(sink.getvalue())


NUMBERS = pa.RecordBatch.from_pydict({"x": pa.array([7] * 1000, pa.int64())})
WORDS = pa.RecordBatch.from_pydict({"x": pa.array(["maps", "mail"] * 8).dictionary_encode()})


def test_the_declared_sizes_are_those_of_the_decompressed_columns() -> None:
    assert sizes(stream(NUMBERS)) == Sizes(1000, 8000)
    assert sizes(stream(NUMBERS, NUMBERS.slice(0, 10))) == Sizes(1010, 8080)
    for codec in ("zstd", "lz4"):
        value = stream(NUMBERS, compression=codec)
        assert len(value) < 2000
        assert sizes(value) == Sizes(1000, 8000)


def test_a_dictionary_counts_in_bytes_but_not_in_rows() -> None:
    found = sizes(stream(WORDS))
    assert found.rows == 16
    assert found.bytes >= 16 * 4 + 3 * 4 + 8  # indices, offsets and texts


def test_a_stream_that_is_cut_off_anywhere_is_damaged() -> None:
    value = stream(WORDS)
    for length in range(len(value)):
        with pytest.raises(DamagedStream):
            sizes(value[:length])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"{}", "a frame does not begin with the marker"),
        (b"", "the stream stops before its end"),
        (stream(NUMBERS)[:-8], "the stream stops before its end"),
        (stream(NUMBERS) + b"x", "1 bytes follow the end of the stream"),
        (stream(NUMBERS)[:-8] + stream(NUMBERS), "must begin with its schema, and have only one"),
    ],
)
def test_a_damaged_stream_says_what_is_wrong(value: bytes, message: str) -> None:
    with pytest.raises(DamagedStream, match=message):
        sizes(value)


def test_big_endian_numbers_are_not_supported() -> None:
    def only_schema(endianness: int) -> bytes:
        # The position of the table, the vtable of the message, the table.
        message = struct.pack("<I5H2xiB3xI", 16, 10, 12, 0, 4, 8, 12, 1, 12)
        schema = struct.pack("<3H2xih", 6, 6, 4, 8, endianness)
        metadata = (message + schema).ljust(48, b"\0")
        return MARKER + struct.pack("<i", len(metadata)) + metadata + MARKER + bytes(4)

    assert sizes(only_schema(0)) == Sizes(0, 0)
    with pytest.raises(DamagedStream, match="big-endian numbers are not supported"):
        sizes(only_schema(1))
