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
POOL = pa.system_memory_pool()  # which nothing else uses here
WORDS = pa.RecordBatch.from_pydict({"x": pa.array(["maps", "mail"] * 8).dictionary_encode()})


def test_the_declared_sizes_are_those_of_the_decompressed_columns_and_their_bitmaps() -> None:
    assert sizes(stream(NUMBERS)) == Sizes(1000, 8000 + 125)
    assert sizes(stream(NUMBERS, NUMBERS.slice(0, 10))) == Sizes(1010, 8080 + 126)
    for codec in ("zstd", "lz4"):
        value = stream(NUMBERS, compression=codec)
        assert len(value) < 2000
        assert sizes(value) == Sizes(1000, 8000 + 125)


def test_a_dictionary_counts_in_bytes_but_not_in_rows() -> None:
    found = sizes(stream(WORDS))
    assert found.rows == 16
    assert found.bytes >= 16 * 4 + 3 * 4 + 8  # indices, offsets and texts


def growing_dictionary(batches: int, **options: Any) -> bytes:
    """Return a stream whose dictionary grows by 100 words with each batch of one row."""
    words = pa.array([f"{number:016}" for number in range(100 * batches)])
    index = pa.array([0], pa.int32())
    return stream(
        *(
            pa.RecordBatch.from_pydict(
                {"x": pa.DictionaryArray.from_arrays(index, words[: 100 * (count + 1)])}
            )
            for count in range(batches)
        ),
        **options,
    )


@pytest.mark.parametrize("codec", [None, "zstd", "lz4"])
@pytest.mark.parametrize("deltas", [False, True])
def test_arrow_allocates_no_more_than_what_a_growing_dictionary_counts(
    codec: str | None, deltas: bool
) -> None:
    value = growing_dictionary(40, emit_dictionary_deltas=deltas, compression=codec)
    with pa.ipc.open_stream(value, memory_pool=POOL) as reader:
        batches = list(reader)
        allocated = POOL.bytes_allocated()
    text_bytes = 16 * 100 * 40 * 41 // 2  # a dictionary of its own for each batch
    if deltas or codec is not None:
        assert allocated > text_bytes
    assert text_bytes < allocated < sizes(value).bytes if deltas else sizes(value).bytes
    assert len(batches) == 40


def test_columns_without_bytes_count_their_bitmaps() -> None:
    """Joining them with others may need one: here 2 ** 30 structs without a member."""
    type = pa.list_(pa.struct([]), 1 << 28)
    column = pa.Array.from_buffers(
        type, 4, [None], children=[pa.Array.from_buffers(pa.struct([]), 1 << 30, [None])]
    )
    value = stream(pa.RecordBatch.from_pydict({"x": column}))
    assert len(value) < 1000
    assert sizes(value).bytes >= 1 << 27


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
