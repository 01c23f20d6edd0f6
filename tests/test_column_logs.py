"""Logs whose columns are named: CSV, JSON, Parquet and Arrow, labelled rows, clicks and pairs."""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.sample_logs import T, labelled_csv, labelled_rows, read

from stream_ctr.errors import ConfigError, DataError
from stream_ctr.events.field import Field
from stream_ctr.events.times import TimeFormat
from stream_ctr.logs import csv_table
from stream_ctr.logs.csv_table import CsvTable, sample_rows
from stream_ctr.logs.layout import ColumnNames, Layout
from stream_ctr.logs.log import DEFAULT_START_MS
from stream_ctr.logs.open import open_log, open_logs
from stream_ctr.logs.pair_log import merged
from stream_ctr.logs.rows import Rejected

FIELDS = (Field("app", "categorical"), Field("price", "numeric"))


def file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def without_ids(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in e.items() if name != "impression_id"} for e in events]


def parquet(folder: Path, columns: dict[str, Any]) -> Path:
    pa.parquet.write_table(pa.table(columns), folder / "log.parquet")
    return folder / "log.parquet"


# -- one meaning in every format -----------------------------------------------------------------


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    "csv": lambda folder, rows: file(folder, "a", labelled_csv(len(rows))),
    "tsv": lambda folder, rows: file(folder, "a", labelled_csv(len(rows), delimiter="\t")),
    "semicolons": lambda folder, rows: file(
        folder, "a", "\ufeff" + labelled_csv(len(rows), delimiter=";", lineterminator="\n")
    ),
    "lines": lambda folder, rows: file(folder, "a", lines(rows)),
    "array": lambda folder, rows: file(folder, "a", json.dumps(rows, indent=2)),
    "nested": lambda folder, rows: file(
        folder,
        "a",
        lines(
            [
                {
                    "label": row["label"],
                    "time": row["time"],
                    "features": {name: row[name] for name in ("app", "price")},
                }
                for row in rows
            ]
        ),
    ),
    "parquet": lambda folder, rows: parquet(
        folder, {name: [row[name] for row in rows] for name in rows[0]}
    ),
}


@pytest.mark.parametrize("written", WRITERS)
def test_labelled_rows_are_the_same_examples_in_every_format(tmp_path: Path, written: str) -> None:
    rows = labelled_rows(50)
    log = open_log(WRITERS[written](tmp_path, rows), layout=Layout(fields=FIELDS))
    assert without_ids(read(log)) == [
        {
            "kind": "example",
            "time": row["time"],
            "label": row["label"],
            "features": {name: row[name] for name in ("app", "price") if row[name] is not None},
        }
        for row in rows
    ]
    assert log.rejected.count == 0


def test_ids_are_made_of_the_file_and_the_row_and_differ_between_files(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    first = file(tmp_path, "a.csv", "label,app\n1,maps\n0,mail\n")
    second = file(tmp_path / "x", "a.csv", "label,app\n1,maps\n1,mail\n")
    ids = [event["impression_id"] for log in open_logs([first, second]) for event in read(log)]
    assert len(set(ids)) == 4
    assert all(name.startswith("a.csv#") for name in ids)
    assert [name.rpartition("-")[2] for name in ids] == ["2", "3", "2", "3"]
    assert [event["impression_id"] for event in read(open_log(first))] == ids[:2]


def test_times_are_spread_over_the_span_and_files_follow_one_another(tmp_path: Path) -> None:
    paths = [file(tmp_path, f"{name}.csv", "label,app\n1,a\n0,b\n0,c\n0,d\n") for name in "ab"]
    first, second = open_logs(paths, span=timedelta(seconds=4))
    start = DEFAULT_START_MS
    # The header is row 1, so the rows have the times of rows 2 to 5 of 4.
    assert [event["time"] - start for event in read(first)] == [1000, 2000, 3000, 4000]
    assert [event["time"] - start for event in read(second)] == [5000, 6000, 7000, 8000]
    assert first.identity != second.identity
    assert "spread evenly over 4s" in first.notes[0]


def test_rows_are_impressions_with_the_times_of_their_clicks(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        "a.csv",
        "uid,shown,pressed,app\n1,1735689600,1735689601,maps\n2,1735689602,,mail\n"
        "3,1735689603,0,mail\n4,1735689604,noon,mail\n",
    )
    names = ColumnNames(id="uid", time="shown", click_time="pressed")
    log = open_log(path, layout=Layout(columns=names))
    found = [(event["kind"], event["impression_id"], event["time"] - T) for event in read(log)]
    assert found == [
        ("impression", "1", 0),
        ("click", "1", 1000),
        ("impression", "2", 2000),
        ("impression", "3", 3000),
    ]
    assert log.rejected.first[0][0] == 5
    assert "pressed must be epoch time" in log.rejected.first[0][1]


def test_a_pair_of_files_is_merged_in_event_time_order(tmp_path: Path) -> None:
    shown = file(tmp_path, "shown.csv", f"id,time,app\n1,{T},a\n2,{T + 10},b\n3,{T + 5},c\n")
    clicked = file(tmp_path, "clicked.jsonl", lines([{"id": 2, "at": T + 10}, {"id": 1, "at": T}]))
    names = ColumnNames(id="id", time="time", click_time="at")
    (log,) = open_logs([shown], clicks=[clicked], layout=Layout(columns=names))
    found = [(event["kind"], event["impression_id"], event["time"] - T) for event in read(log)]
    assert found == [
        ("impression", "1", 0),
        ("click", "1", 0),
        ("impression", "3", 5),
        ("impression", "2", 10),
        ("click", "2", 10),
    ]
    with pytest.raises(ConfigError, match="got 2 of impressions and 1 of clicks"):
        open_logs([shown, clicked], clicks=[clicked])


TIMES = st.lists(st.integers(0, 9), max_size=12).map(sorted)


@given(TIMES, TIMES, st.integers(1, 4), st.integers(1, 4))
def test_two_sorted_streams_are_merged_whatever_their_batches(
    first: list[int], second: list[int], size: int, other: int
) -> None:
    streams = [
        iter(
            pa.table({"time": pa.array(times, pa.int64()), "of": [name] * len(times)}).to_batches(
                max_chunksize=chunk
            )
        )
        for name, times, chunk in (("first", first, size), ("second", second, other))
    ]
    found = [
        (row["time"], row["of"])
        for batch in merged(*(filter(len, stream) for stream in streams))
        for row in batch.to_pylist()
    ]
    expected = sorted([(time, "first") for time in first] + [(time, "second") for time in second])
    assert [time for time, _ in found] == [time for time, _ in expected]
    assert sorted(found) == expected


# -- CSV -----------------------------------------------------------------------------------------

CELLS = st.text(st.sampled_from('a",\n é\r'), max_size=5).map(lambda cell: cell.strip("\r"))


@given(
    st.lists(st.lists(CELLS, min_size=2, max_size=3), min_size=1, max_size=8),
    st.sampled_from([3, 5, 1 << 20]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_csv_is_read_as_python_writes_it_in_blocks_of_any_size(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[list[str]],
    block: int,
    quoting: Any,
    ending: str,
    ends: bool,
) -> None:
    rows = [[cell.replace("\r", "") for cell in row] for row in rows]
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=quoting, lineterminator=ending)
    writer.writerows([["x", "y"], *rows])
    content = text.getvalue()
    content = content if ends else content.removesuffix(ending)
    path = tmp_path_factory.getbasetemp() / "random.csv"
    path.write_bytes(content.encode())
    rejected = Rejected()
    found = []
    number = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_table, "_BLOCK_BYTES", block)
        for part in CsvTable(path, delimiter=",").batches(["x", "y"], rejected):
            number += part.line.tolist()
            found += [[row["x"], row["y"]] for row in part.columns.to_pylist()]
    expected = [(i, row) for i, row in enumerate(rows, 2) if len(row) == 2]
    assert found == [[cell or None for cell in row] for _, row in expected]
    assert number == [index for index, _ in expected]
    assert [line for line, _ in rejected.first] == [
        index for index, row in enumerate(rows, 2) if len(row) == 3
    ]


def test_a_quote_that_is_not_closed_costs_its_row_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_table, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(csv_table, "_LONGEST_ROW_BYTES", 128)
    content = "label,app\n" + '1,"open\n' + "".join(f"{i % 2},app{i}\n" for i in range(100))
    log = open_log(file(tmp_path, "a.csv", content), layout=Layout(fields=FIELDS[:1]))
    assert [event["features"]["app"] for event in read(log)] == [f"app{i}" for i in range(100)]
    assert log.rejected.first == [(2, "a quote is not closed")]


def test_rows_that_are_not_text_or_of_another_width_are_named(tmp_path: Path) -> None:
    content = b"label,app\n1,a\n0,\xff\n0,b,c\n\n1,x\ry\n0,d\n"
    log = open_log(file(tmp_path, "a.csv", content))
    assert [event["features"]["app"] for event in read(log)] == ["a", "d"]
    reasons = dict(log.rejected.first)
    assert sorted(reasons) == [3, 4, 6]
    assert reasons[4] == "expected 2 columns, got 3"


def test_columns_of_a_file_without_a_header_are_named(tmp_path: Path) -> None:
    layout = Layout(column_names=("label", "app"), fields=FIELDS[:1])
    bare = open_log(file(tmp_path, "a.csv", "1,maps\n0,mail\n"), layout=layout)
    assert [event["features"]["app"] for event in read(bare)] == ["maps", "mail"]
    headed = open_log(file(tmp_path, "b.csv", "label,app\n0,mail\n"), layout=layout)
    assert [event["features"]["app"] for event in read(headed)] == ["mail"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfel\0a\0", "UTF-16"),
        (b"label,app\r1,a\r", "carriage return alone"),
        (b"a,b\n1,2\n", "no column of kinds, labels or click times.*it has a, b"),
        (b"label,app\n", "no rows"),
    ],
)
def test_a_csv_file_that_holds_no_events_says_why(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        list(open_log(file(tmp_path, "a.csv", content)).batches())


def test_the_sample_of_a_file_leaves_out_a_row_that_is_cut() -> None:
    assert list(sample_rows(b"a,b\n1,2\n3,", ",", 9)) == [["a", "b"], ["1", "2"]]
    assert list(sample_rows(b"a,b", ",", 9)) == [["a", "b"]]


# -- types ---------------------------------------------------------------------------------------

ODD = {
    "tags": [["x"], None],
    "map": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
    "raw": pa.array([b"\xff", None], pa.binary()),
}
USEFUL = {
    "day": [datetime.date(2025, 1, 1), None],
    "moment": pa.array([T, None], pa.timestamp("ms", "UTC")),
    "money": [decimal.Decimal("1.50"), None],
    "code": pa.array([2**63, 7], pa.uint64()),
    "float_id": [12.0, None],
    "yes": [True, None],
    "word": pa.array(["a", None]).dictionary_encode(),
    "number": pa.array([3, 4]).dictionary_encode(),
}


def test_useful_types_are_features_and_other_columns_are_ignored(tmp_path: Path) -> None:
    fields = tuple(
        Field(name, "numeric" if name in ("money", "number") else "categorical") for name in USEFUL
    )
    path = parquet(tmp_path, {"label": [True, False], "impression_id": [7, 8], **ODD, **USEFUL})
    first, second = read(open_log(path, layout=Layout(fields=fields)))
    assert first["impression_id"] == "7"
    assert (first["label"], second["label"]) == (1, 0)
    assert first["features"] == {
        "day": "2025-01-01",
        "moment": "2025-01-01 00:00:00.000Z",
        "money": 1.5,
        "code": str(2**63),
        "float_id": "12",
        "yes": True,
        "word": "a",
        "number": 3,
    }
    assert second["features"] == {"code": "7", "number": 4}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("kind", ["categorical", "numeric"])
def test_a_column_that_cannot_be_a_feature_says_why(tmp_path: Path, name: str, kind: Any) -> None:
    path = parquet(tmp_path, {"label": [1, 0], **ODD})
    with pytest.raises(DataError, match=rf"column {name} is .*; a {kind} field is"):
        open_log(path, layout=Layout(fields=(Field(name, kind),)))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(fields=(Field("aeg", "numeric"),)), "features.numeric names 'aeg'.*mean 'age'"),
        (Layout(columns=ColumnNames(time="tim")), "input.columns.time names 'tim'.*mean 'time'"),
        (Layout(columns=ColumnNames(label="age")), "must be 0 or 1, got 31"),
    ],
)
def test_a_wrong_name_is_an_error_with_the_nearest_one(
    tmp_path: Path, layout: Layout, message: str
) -> None:
    path = parquet(tmp_path, {"label": [1], "time": [T], "age": [31]})
    with pytest.raises((ConfigError, DataError), match=message):
        list(open_log(path, layout=layout).batches())


def test_a_repeated_column_is_an_error_only_when_it_is_used(tmp_path: Path) -> None:
    path = file(tmp_path, "a.csv", "label,app,x,x\n1,a,1,2\n")
    assert len(read(open_log(path, layout=Layout(fields=FIELDS[:1])))) == 1
    with pytest.raises(DataError, match="column x appears twice"):
        open_log(path, layout=Layout(fields=(Field("x", "numeric"),)))


def test_a_block_of_json_with_other_types_is_read_line_by_line(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"label": 1, "app": 7, "price": 1},
        {"label": 0, "app": "seven", "price": 1.5},
        {"label": True, "app": [1], "price": None},
        {"label": 0, "other": 1},
    ]
    content = lines(rows) + "{broken\n[1]\n" + lines([{"label": 0, "price": "x"}])
    log = open_log(file(tmp_path, "a.jsonl", content), layout=Layout(fields=FIELDS))
    assert [event["features"] for event in read(log)] == [
        {"app": "7", "price": 1},
        {"app": "seven", "price": 1.5},
        {"app": "[1]"},
        {},
    ]
    assert sorted(line for line, _ in log.rejected.first) == [5, 6, 7]


# -- times ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["csv", "json", "parquet"])
@pytest.mark.parametrize(
    ("time", "note"),
    [
        (T // 1000, "seconds"),
        (T, None),
        (T * 1000, "microseconds"),
        (T * 1_000_000, "nanoseconds"),
        ("2025-01-01T00:00:00Z", None),
        ("2025-01-01 01:00", None),
    ],
)
def test_times_are_read_alike_in_every_format(
    tmp_path: Path, written: str, time: Any, note: str | None
) -> None:
    if written == "csv":
        path = file(tmp_path, "a.csv", f"label,time,app\n1,{time},a\n")
    elif written == "json":
        path = file(tmp_path, "a.jsonl", lines([{"label": 1, "time": time, "app": "a"}]))
    else:
        path = parquet(tmp_path, {"label": [1], "time": [time], "app": ["a"]})
    layout = Layout(times=TimeFormat(zone="Europe/Berlin"))
    log = open_log(path, layout=layout)
    assert [event["time"] for event in read(log)] == [T]
    assert (note is None) or any(f"epoch {note}" in each for each in log.notes)


def test_text_without_a_zone_needs_one(tmp_path: Path) -> None:
    path = file(tmp_path, "a.csv", "label,time,app\n1,2025-01-01 00:00:00,a\n")
    with pytest.raises(DataError, match=r"input\.time_zone"):
        list(open_log(path).batches())


# -- inputs --------------------------------------------------------------------------------------


def test_sources_are_files_patterns_and_directories_in_the_order_of_their_names(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "days"
    (folder / "2").mkdir(parents=True)
    for name in ("b.csv", "a.csv", "2/c.csv", "_SUCCESS", ".hidden"):
        file(folder, name, f"label,app\n1,{name}\n")
    names = [str(log.path.relative_to(folder)) for log in open_logs([folder]) if log.path]
    assert names == ["2/c.csv", "a.csv", "b.csv"]
    names = [log.path.name for log in open_logs([f"{folder}/*.csv"]) if log.path]
    assert names == ["a.csv", "b.csv"]
    with pytest.raises(DataError, match="is named twice"):
        open_logs([folder, folder / "a.csv"])
    with pytest.raises(DataError, match="no file matches"):
        open_logs([f"{folder}/*.parquet"])
    with pytest.raises(DataError, match=r"does not exist; did you mean 'a\.csv'"):
        open_logs([folder / "aa.csv"])


def test_standard_input_is_read_twice_with_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Standard:
        buffer = io.BytesIO(b"label,app\n1,a\n0,b\n")

        @staticmethod
        def isatty() -> bool:
            return False

    monkeypatch.setattr("sys.stdin", Standard)
    (log,) = open_logs(["-"])
    assert read(log) == read(log)
    assert log.identity.startswith("-#")
    assert len(read(log)) == 2
