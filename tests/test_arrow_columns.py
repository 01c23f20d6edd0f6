"""Conversions of Arrow columns, whole and sliced, with nulls and empty."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from stream_ctr.events.arrow_columns import byte_spans, epoch_ms, mask, one_array, string_buffers

T = 1_735_689_600_000
TEXTS = [None, "", "zero", "é", None, "four"]
SLICES = [slice(0, 6), slice(1, 4), slice(4, 6), slice(2, 2)]


@pytest.mark.parametrize("part", SLICES)
def test_byte_spans_hold_the_bytes_of_each_value_and_none_of_a_null(part: slice) -> None:
    values = [None if text is None else text.encode() for text in TEXTS]
    data, start, size = byte_spans(pa.array(values, pa.large_binary())[part.start : part.stop])
    found = [data[first : first + n].tobytes() for first, n in zip(start, size, strict=True)]
    assert found == [value or b"" for value in values[part]]


def test_byte_spans_of_nothing_are_empty() -> None:
    spans = byte_spans(pa.array([], pa.large_binary()))
    assert [len(column) for column in spans] == [0, 0, 0]


@pytest.mark.parametrize("part", SLICES)
def test_string_buffers_hold_the_text_of_each_valid_value(part: slice) -> None:
    data, offsets, valid = string_buffers(pa.array(TEXTS, pa.string())[part.start : part.stop])
    found = [data[a:b].tobytes().decode() for a, b in zip(offsets, offsets[1:], strict=False)]
    assert [text if ok else None for text, ok in zip(found, valid, strict=True)] == TEXTS[part]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([T, None], pa.int64()),
        pa.array([T, None], pa.uint64()),
        pa.array([T, None], pa.timestamp("ms")),
        pa.array([T // 1000, None], pa.timestamp("s", "Europe/Berlin")),
        pa.array([T * 1000 + 999, None], pa.timestamp("us")),
        pa.array([T * 1_000_000 + 999_999, None], pa.timestamp("ns", "UTC")),
        pa.array(["2025-01-01T00:00:00.000999Z", None]),
        pa.array(["2024-12-31 23:00:00-01:00", None], pa.large_string()),
    ],
)
def test_times_of_every_type_become_whole_epoch_milliseconds(column: pa.Array) -> None:
    assert epoch_ms(column).to_pylist() == [T, None]


def test_times_before_1970_are_rounded_down_too() -> None:
    assert epoch_ms(pa.array([-1], pa.timestamp("us"))).to_pylist() == [-1]


def test_a_text_that_is_not_a_time_is_an_error() -> None:
    with pytest.raises(pa.ArrowInvalid, match="noon"):
        epoch_ms(pa.array(["noon"]))


def test_chunks_become_one_array_and_nulls_of_a_mask_become_false() -> None:
    column = pa.chunked_array([[True], [], [None, False]], pa.bool_())
    assert one_array(column).to_pylist() == [True, None, False]
    assert one_array(pa.chunked_array([], pa.int64())).to_pylist() == []
    found = mask(column)
    assert found.dtype == np.bool_
    assert found.tolist() == [True, False, False]
