"""Logs of events: JSON lines pass byte for byte, and columns become the same events."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from support.sample_logs import (
    COLUMNS,
    OBD_EVENTS,
    T,
    every_format,
    impression,
    nested,
    read,
    write_lines,
)

from stream_ctr.errors import DataError
from stream_ctr.events.field import Field
from stream_ctr.logs.open import open_log, open_table
from stream_ctr.logs.rows import Rejected

# -- JSON lines ----------------------------------------------------------------------------------


def test_lines_pass_byte_for_byte_whether_they_hold_an_event_or_not(tmp_path: Path) -> None:
    lines = [
        json.dumps(impression("a", T)).encode(),
        b'{ "kind":"click" , "impression_id":"a","time":"2025-01-01T00:00:01.5Z"} ',
        b"{broken",
        b"\xff\xfe",
        json.dumps(impression("b", T + 2000)).encode() + b"\r",
        b"",
        b'{"kind":"x"} {"kind":"y"}',
        b'{"half',
    ]
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    log = open_log(path)
    batches = list(log.batches())
    values = [value for batch in batches for value in batch.value.to_pylist()]
    assert values == [line.removesuffix(b"\r") for line in lines if line]
    times = [time - T for batch in batches for time in batch.time.tolist()]
    assert times == [0, 1500, 1500, 1500, 2000, 2000, 2000]
    keys = [key for batch in batches for key in batch.key.to_pylist()]
    assert keys == [b"a", b"a", None, None, b"b", None, None]
    assert log.fields is None
    assert log.notes == ()


def test_unsorted_lines_come_out_in_time_order(tmp_path: Path) -> None:
    times = [T + (i * 7919) % 1000 for i in range(1000)]
    events = [impression(str(i), time) for i, time in enumerate(times)]
    log = open_log(write_lines(tmp_path / "events.jsonl", *map(json.dumps, events)))
    assert read(log) == [events[i] for i in np.argsort(times, kind="stable")]
    assert log.out_of_order == 0


# -- columns -------------------------------------------------------------------------------------


def unchanged(table: pa.Table) -> pa.Table:
    return table


def with_timestamps(table: pa.Table) -> pa.Table:
    utc = table["time"].cast(pa.timestamp("ms", "UTC"))
    return table.set_column(2, "time", utc.cast(pa.timestamp("us", "Europe/Berlin")))


def with_dictionary(table: pa.Table) -> pa.Table:
    return table.set_column(3, "app", table["app"].dictionary_encode())


def with_everything(table: pa.Table) -> pa.Table:
    return nested(with_timestamps(with_dictionary(table)))


@pytest.mark.parametrize(
    "shape", [unchanged, nested, with_timestamps, with_dictionary, with_everything]
)
def test_columns_become_events_and_bad_rows_are_named(
    tmp_path: Path, shape: Callable[[pa.Table], pa.Table]
) -> None:
    path = tmp_path / "log.parquet"
    pa.parquet.write_table(shape(pa.table(COLUMNS)), path)
    log = open_log(path)
    assert read(log) == [
        {**impression("a", T, app="maps", age=31), "true_probability": 0.25},
        {"kind": "click", "impression_id": "a", "time": T + 10},
        impression("b", T + 20, age=32, score=0.5),
    ]
    assert log.fields == (
        Field("app", "categorical"),
        Field("age", "numeric"),
        Field("score", "numeric"),
    )
    reasons = dict(log.rejected.first)
    assert sorted(reasons) == [4, 5, 6, 7]
    assert reasons[4] == "impression_id must be present, got nothing"
    assert reasons[5] == "kind must be impression or click, got 'open'"
    assert reasons[6] == "time must be between 1973 and 2100, got 17" or "1970" in reasons[6]
    assert reasons[7] == "kind must be impression or click, got nothing"


def test_booleans_and_unsigned_64_bit_numbers_are_categorical(tmp_path: Path) -> None:
    events = {"kind": ["impression"] * 2, "impression_id": [1, 2], "time": [T, T + 1]}
    features = {
        "user": pa.array([2**63, 7], pa.uint64()),
        "new": [True, None],
        "age": pa.array([None, 3], pa.int8()),
    }
    pa.parquet.write_table(pa.table({**events, **features}), tmp_path / "log.parquet")
    log = open_log(tmp_path / "log.parquet")
    assert read(log) == [
        impression("1", T, user=str(2**63), new=True),
        impression("2", T + 1, user="7", age=3),
    ]
    assert log.fields == (
        Field("user", "categorical"),
        Field("new", "categorical"),
        Field("age", "numeric"),
    )


def test_columns_that_hold_no_events_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    good = {"kind": ["click"], "impression_id": ["a"], "time": [T]}
    wrong: dict[str, dict[str, list[object]]] = {
        "there is no column of kinds, labels or click times": {"kind": []},
        "there is no column time": {"time": []},
        "column time is list": {"time": [[1.5]]},
        "column tags is list": {"tags": [["x"]]},
        "column features is string": {"features": ["x"]},
        "column true_probability is bool; .* must be a number": {"true_probability": [True]},
    }
    for reason, columns in wrong.items():
        table = {name: values for name, values in {**good, **columns}.items() if values}
        pa.parquet.write_table(pa.table(table), path)
        with pytest.raises(DataError, match=reason):
            open_log(path)


def test_every_column_format_yields_the_events_of_the_json_lines(tmp_path: Path) -> None:
    paths = every_format(tmp_path)
    expected = read(open_log(paths["events.jsonl"]))
    for name in ("events.jsonl.gz", "events.parquet", "file.arrow", "stream.arrow"):
        assert read(open_log(paths[name])) == expected, name


def test_arrow_text_that_points_outside_the_file_is_not_followed(tmp_path: Path) -> None:
    path = every_format(tmp_path)["stream.arrow"]
    good = path.read_bytes()
    # The offsets of the ids: obd-2, obd-3 and obd-4 end at 5, 10 and 15.
    first = good.index(np.array([0, 5, 10, 15], np.int32).tobytes())
    outside = np.array([2**31 - 8], np.int32).tobytes()
    path.write_bytes(good[: first + 8] + outside + good[first + 12 :])
    log = open_log(path)
    with pytest.raises(DataError, match=r"stream\.arrow:1: the rest cannot be read"):
        list(log.batches())


def test_an_arrow_file_that_shrinks_while_it_is_read_ends_the_log(tmp_path: Path) -> None:
    table = open_table(every_format(tmp_path)["stream.arrow"])
    rejected = Rejected()
    batches = table.batches(["time"], rejected)
    first = len(next(batches).line)
    os.truncate(table.path, 4096)
    assert sum(len(rows.line) for rows in batches) < OBD_EVENTS - first


def test_a_damaged_parquet_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    path.write_bytes(b"PAR1" + b"\0" * 100)
    with pytest.raises(DataError, match=r"log\.parquet is not a parquet file"):
        open_log(path)
