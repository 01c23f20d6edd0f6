"""Conversions of Arrow columns that the readers of events and of logs share."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Buffers = tuple[int, ...]


class ByteSpans(NamedTuple):
    """n byte strings in one buffer: string i is `data[start[i] : start[i] + size[i]]`.

    A null has size 0.
    """

    data: npt.NDArray[np.uint8]
    start: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]


class StringBuffers(NamedTuple):
    """n strings in one buffer: string i is `data[offsets[i] : offsets[i + 1]]`, if `valid[i]`."""

    data: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int32]
    valid: npt.NDArray[np.bool_]


def byte_spans(values: pa.LargeBinaryArray) -> ByteSpans:
    """Return the buffer of a binary array and the span of each value in it, without a copy.

    >>> values = pa.array([b"ab", None, b"c"], pa.large_binary())
    >>> [column.tolist() for column in byte_spans(values)]
    [[97, 98, 99], [0, 2, 2], [2, 0, 1]]
    """
    _, offsets, data = values.buffers()
    n = len(values)
    ends = (
        np.frombuffer(offsets, np.int64)[values.offset : values.offset + n + 1]
        if n
        else np.zeros(1, np.int64)
    )
    size = np.diff(ends)
    if values.null_count:
        size = np.asarray(pc.fill_null(pc.binary_length(values), 0))
    return ByteSpans(np.frombuffer(data or b"", np.uint8), ends[:-1], size)


def string_buffers(column: pa.StringArray) -> StringBuffers:
    """Return the buffers of a string array, without a copy of the text.

    >>> [buffer.tolist() for buffer in string_buffers(pa.array(["ab", None, "c"]))]
    [[97, 98, 99], [0, 2, 2, 3], [True, False, True]]
    """
    _, offsets, data = column.buffers()
    n = len(column)
    valid = np.asarray(column.is_valid()) if column.null_count else np.ones(n, np.bool_)
    ends = (
        np.frombuffer(offsets, np.int32)[column.offset : column.offset + n + 1]
        if n
        else np.zeros(1, np.int32)
    )
    return StringBuffers(np.frombuffer(data or b"", np.uint8), ends, valid)


def mask(column: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """Return booleans as a NumPy array, with False for null.

    >>> mask(pa.chunked_array([[True, None], [False]])).tolist()
    [True, False, False]
    """
    return np.asarray(pc.fill_null(column, False).to_numpy(), bool)


def one_array(column: pa.ChunkedArray) -> pa.Array:
    """Return the chunks as one array, without a copy when there is only one.

    >>> one_array(pa.chunked_array([[1], [2, 3]])).to_pylist()
    [1, 2, 3]
    """
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def buffers_of(column: pa.Array) -> Buffers:
    """Return what two arrays that share all of their memory have in common, while they live.

    >>> column = pa.array(["a", "b"])
    >>> buffers_of(column) == buffers_of(column[:]), buffers_of(column) == buffers_of(column[1:])
    (True, False)
    """
    addresses = (buffer.address if buffer else 0 for buffer in column.buffers())
    return (column.offset, len(column), *addresses)
