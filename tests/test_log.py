"""The order of a log's events, the merge of clicks into impressions, and JSON lines of a log."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.sample_logs import OBD, OBD_EVENTS, T, criteo_line, read, write_lines

from stream_ctr.errors import DataError
from stream_ctr.logs.log import (
    ClickDelays,
    Log,
    LogBatch,
    impression_batch,
    in_time_order,
    merge_clicks,
)
from stream_ctr.logs.open import open_log


def test_a_log_without_a_single_event_is_an_error_that_names_the_first_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "day.tsv", criteo_line("7"), criteo_line("8"))
    with pytest.raises(DataError, match=r"day\.tsv:1: label must be 0 or 1, got '7'"):
        list(open_log(path, format="criteo").batches())


def test_events_that_stay_out_of_order_pass_and_are_counted() -> None:
    times = [[1, 2, 5], [4, 5, 6, 3], [6]]

    class Unsorted(Log):
        format = "unsorted"

        def _read(self) -> Iterator[LogBatch]:
            for time in times:
                value = pa.array([b"{}"] * len(time), pa.large_binary())
                yield LogBatch(np.array(time), value, value)

    log = Unsorted(None, None)
    assert [batch.time.tolist() for batch in log.batches()] == times
    assert log.out_of_order == 2
    assert log.notes == (
        "2 events are older than events before them, by more than the reorder buffer holds",
    )


def test_the_identity_is_the_name_and_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    path = write_lines(tmp_path / "day.tsv", criteo_line("0"), criteo_line("1"))
    moved = write_lines(tmp_path / "elsewhere" / "day.tsv", criteo_line("0"))
    other = write_lines(tmp_path / "elsewhere" / "day2.tsv", criteo_line("1"))
    identity = open_log(path).identity
    assert identity.startswith("day.tsv#")
    assert open_log(moved).identity == identity
    assert open_log(other).identity.partition("#")[2] != identity.partition("#")[2]


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.jsonl.zst"])
def test_a_log_written_as_json_lines_reads_back_the_same(tmp_path: Path, name: str) -> None:
    assert open_log(OBD).write_jsonl(tmp_path / name) == OBD_EVENTS
    assert read(open_log(tmp_path / name)) == read(open_log(OBD))


def test_click_delays_do_not_depend_on_the_batches() -> None:
    time = np.arange(T, T + 100)
    clicked = np.arange(100) % 3 == 0

    def delays() -> ClickDelays:
        return ClickDelays(np.random.default_rng(0), median_seconds=0.001, sigma=2.0)

    at_once = delays().click_time(time, clicked)
    in_parts = delays()
    parts = [in_parts.click_time(time[i : i + 7], clicked[i : i + 7]) for i in range(0, 100, 7)]
    assert pa.concat_arrays(parts) == at_once
    assert at_once.is_valid().to_numpy(zero_copy_only=False).tolist() == clicked.tolist()
    click_time = at_once.drop_null().to_numpy()
    assert (click_time > time[clicked]).all()


def impressions_with_clicks(
    time: npt.NDArray[np.int64], click_time: list[int | None]
) -> pa.RecordBatch:
    return impression_batch(
        pa.array([str(i) for i in range(len(time))]),
        time,
        pa.array(click_time, pa.int64()),
        {"f": pa.array(["x"] * len(time))},
    )


# In the example the second batch begins at the very time of a waiting click.
@example([(0, 1), (1, None), (0, None)], [2])
@given(
    st.lists(st.tuples(st.integers(0, 5), st.none() | st.integers(1, 12)), min_size=1, max_size=40),
    st.lists(st.integers(0, 40), max_size=4),
)
def test_merging_clicks_is_a_stable_sort_of_all_events(
    steps: list[tuple[int, int | None]], cuts: list[int]
) -> None:
    """A step is the time since the impression before it, and the delay of the click, if any."""
    time = np.cumsum([T, *(step for step, _ in steps)])[1:]
    delays = [delay for _, delay in steps]
    click_time = [
        None if delay is None else start + delay
        for start, delay in zip(time.tolist(), delays, strict=True)
    ]
    impressions = impressions_with_clicks(time, click_time)
    edges = sorted({0, len(time), *(cut for cut in cuts if cut < len(time))})
    parts = (
        impressions.slice(start, end - start) for start, end in zip(edges, edges[1:], strict=False)
    )
    batches = list(merge_clicks(parts))
    merged = [
        (json.loads(value)["kind"], key.decode())
        for batch in batches
        for key, value in zip(batch.key.to_pylist(), batch.value.to_pylist(), strict=True)
    ]
    expected = sorted(
        [(start, 0, i) for i, start in enumerate(time.tolist())]
        + [(moment, 1, i) for i, moment in enumerate(click_time) if moment is not None]
    )
    assert merged == [(("impression", "click")[kind], str(i)) for _, kind, i in expected]
    merged_time = [moment for batch in batches for moment in batch.time.tolist()]
    assert merged_time == [moment for moment, _, _ in expected]


@given(st.lists(st.lists(st.integers(0, 60), max_size=6), max_size=30), st.integers(2, 40))
def test_reordering_keeps_all_rows_and_sorts_within_half_the_buffer(
    times: list[list[int]], buffered: int
) -> None:
    numbers = iter(range(10_000))
    batches = [
        pa.RecordBatch.from_pydict(
            {
                "time": pa.array(part, pa.int64()),
                "row": pa.array([next(numbers) for _ in part], pa.int64()),
            }
        )
        for part in times
    ]
    out = [
        (row["time"], row["row"])
        for batch in in_time_order(batches, buffered_events=buffered)
        for row in batch.to_pylist()
    ]
    rows = [(time, row) for row, time in enumerate(sum(times, []))]
    in_order = sorted(rows)
    assert sorted(out) == in_order
    displacement = max((rows.index(row) - place for place, row in enumerate(in_order)), default=0)
    if displacement <= buffered // 2:
        assert out == in_order


def test_the_reorder_buffer_is_bounded_in_bytes() -> None:
    batches = [pa.RecordBatch.from_pydict({"time": pa.array([time])}) for time in (3, 1, 2, 0)]
    out = [
        row["time"]
        for batch in in_time_order(batches, buffered_bytes=16)
        for row in batch.to_pylist()
    ]
    assert out == [1, 0, 2, 3]  # the buffer holds two rows of eight bytes
