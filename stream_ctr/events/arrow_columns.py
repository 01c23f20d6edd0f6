"""Conversions of Arrow columns that every reader of events needs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc


def epoch_ms(column: pa.Array) -> pa.Array:
    """Whole milliseconds, rounded down, of integers (taken as they are), timestamps (UTC unless they name a zone) or RFC 3339 text.

    >>> epoch_ms(pa.array(["2025-01-01T01:00:00.0019+01:00"])).to_pylist()
    [1735689600001]
    """
    if pa.types.is_integer(column.type):
        return column.cast(pa.int64())
    if not pa.types.is_timestamp(column.type):
        column = column.cast(pa.string()).cast(pa.timestamp("ns", "UTC"))
    return (
        pc.floor_temporal(column, unit="millisecond")
        .cast(pa.timestamp("ms", column.type.tz))
        .cast(pa.int64())
    )


def mask(column: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """Booleans, False where they are null."""
    return np.asarray(pc.fill_null(column, False).to_numpy(), bool)


def one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
