"""Rows of a file: bad ones are rejected by line and reason, and the others stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_ctr.logs.rows import Rejected, Rows


def rows_of(columns: Mapping[str, Sequence[object]], first_line: int = 1) -> Rows:
    table = pa.table(dict(columns))
    return Rows(np.arange(first_line, first_line + len(table)), table, Rejected())


def integers(text: pa.Array) -> pa.Array:
    return text.cast(pa.int64())


def test_rows_that_are_kept_have_their_line_numbers() -> None:
    rows = rows_of({"label": ["1", "x", None, "0"], "id": ["a", "b", "c", "d"]}, first_line=10)
    kept = rows.labelled("label")
    assert kept.line.tolist() == [10, 13]
    assert kept.columns["id"].to_pylist() == ["a", "d"]
    assert rows.rejected.first == [
        (11, "label must be 0 or 1, got 'x'"),
        (12, "label must be 0 or 1, got nothing"),
    ]


def test_rows_without_an_id_are_rejected() -> None:
    rows = rows_of({"id": [None, "b"]})
    assert rows.identified("id").line.tolist() == [2]
    assert rows.rejected.first == [(1, "id must be present, got nothing")]


@given(st.lists(st.sampled_from(["1", "-7", "x", "1.5", None]), max_size=40))
def test_parsing_rejects_exactly_the_values_that_cannot_be_converted(
    cells: list[str | None],
) -> None:
    parsed = rows_of({"n": cells}).parsed("n", integers, "an integer")
    good = [line for line, cell in enumerate(cells, 1) if cell not in ("x", "1.5")]
    assert parsed.line.tolist() == good
    expected = [None if (cell := cells[line - 1]) is None else int(cell) for line in good]
    assert parsed.columns["n"].to_pylist() == expected
    assert parsed.rejected.count == len(cells) - len(good)


def test_the_column_name_in_a_reason_cannot_steer_a_terminal() -> None:
    rows = rows_of({"\x1b[31m": ["x"]})
    rows.keep(np.array([False]), "\x1b[31m", "a number")
    assert rows.rejected.first == [(1, r"\x1b[31m must be a number, got 'x'")]


def test_a_time_that_python_cannot_show_is_rejected_with_its_type() -> None:
    times = pa.array([2**62], pa.timestamp("s"))
    rows = Rows(np.array([1]), pa.table({"time": times}), Rejected())
    rows.keep(np.array([False]), "time", "a time")
    assert rows.rejected.first == [(1, "time must be a time, got a timestamp[s] out of range")]


@pytest.mark.parametrize("bad", [0, 2, 4])
def test_a_row_with_text_that_is_not_utf8_is_rejected(bad: int) -> None:
    cells = [b"ok"] * 5
    cells[bad] = b"\xff"
    table = pa.table({"text": pa.array(cells, pa.binary()).view(pa.string()), "n": range(5)})
    rows = Rows(np.arange(1, 6), table, Rejected())
    valid = rows.valid()
    expected = [n for n in range(5) if n != bad]
    assert valid.columns["n"].to_pylist() == expected
    assert valid.line.tolist() == [n + 1 for n in expected]
    assert rows.rejected.first == [
        (bad + 1, "the row is damaged, or has text that is not UTF-8"),
    ]


def test_a_hundred_rejected_lines_are_named_and_all_are_counted() -> None:
    rejected = Rejected()
    for line in range(1, 151):
        rejected.add(line, "no event")
    assert rejected.count == 150
    assert [line for line, _ in rejected.first] == list(range(1, 101))
