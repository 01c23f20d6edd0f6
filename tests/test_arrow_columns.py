"""Conversions of Arrow columns, whole and sliced, with nulls and empty."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from stream_ctr.events.arrow_columns import byte_spans, mask, one_array, string_buffers

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


def test_chunks_become_one_array_and_nulls_of_a_mask_become_false() -> None:
    column = pa.chunked_array([[True], [], [None, False]], pa.bool_())
    assert one_array(column).to_pylist() == [True, None, False]
    assert one_array(pa.chunked_array([], pa.int64())).to_pylist() == []
    found = mask(column)
    assert found.dtype == np.bool_
    assert found.tolist() == [True, False, False]
