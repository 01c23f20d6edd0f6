"""Logs on disk as streams of events, in every format, with every kind of damage."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.sample_logs import (
    AVAZU_HEADER,
    COLUMNS,
    OBD,
    T,
    avazu_line,
    criteo_line,
    nested,
    shared_data,
)

from stream_ctr.errors import ConfigError, DataError
from stream_ctr.events.field import Field
from stream_ctr.logs import text_log as text
from stream_ctr.logs.log import (
    DEFAULT_START_MS,
    Log,
    LogBatch,
    impression_batch,
    in_time_order,
    merge_clicks,
)
from stream_ctr.logs.open import open_log, sniff


def read(log: Log) -> list[dict[str, Any]]:
    """The events of one pass as dictionaries. Each batch must be as its columns say."""
    events = []
    for batch in log.batches():
        decoded = [json.loads(value) for value in batch.value.to_pylist()]
        assert [event["time"] for event in decoded] == batch.time.tolist()
        assert [event["impression_id"].encode() for event in decoded] == batch.key.to_pylist()
        events += decoded
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    return events


def of_kind(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["kind"] == kind]


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(
        b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines)
    )
    return path


# -- Criteo --------------------------------------------------------------------------------------


def test_criteo_rows_become_evenly_spaced_impressions_and_their_clicks(tmp_path: Path) -> None:
    path = write(
        tmp_path / "day.tsv",
        criteo_line("1"),
        criteo_line("0"),
        criteo_line("1", integers={3: "-7"}),
    )
    log = open_log(path, rate=4.0)
    events = read(log)
    impressions, clicks = of_kind(events, "impression"), of_kind(events, "click")
    assert [event["impression_id"] for event in impressions] == ["criteo-1", "criteo-2", "criteo-3"]
    assert [event["time"] - DEFAULT_START_MS for event in impressions] == [0, 250, 500]
    assert {event["impression_id"] for event in clicks} == {"criteo-1", "criteo-3"}
    assert impressions[2]["features"]["I3"] == -7
    assert impressions[0]["features"] == {f"C{i}": f"{i:08x}" for i in range(1, 27)} | {
        f"I{i}": i for i in range(1, 14)
    }
    assert log.fields is not None
    assert sum(field.kind == "numeric" for field in log.fields) == 13
    assert "100" not in log.notes[0]
    assert "4 a second" in log.notes[0]


def test_blank_criteo_cells_are_missing(tmp_path: Path) -> None:
    path = write(
        tmp_path / "day.tsv", criteo_line(integers={2: "", 13: ""}, categories={1: "", 26: ""})
    )
    (event,) = read(open_log(path))
    assert not {"I2", "I13", "C1", "C26"} & set(event["features"])
    assert len(event["features"]) == 35


BAD_CRITEO: dict[int, tuple[str | bytes, str]] = {
    2: (criteo_line("0") + "\textra", "expected 40 columns, got 41"),
    3: (criteo_line("2"), "label must be 0 or 1, got '2'"),
    4: (criteo_line(""), "label must be 0 or 1, got nothing"),
    6: (criteo_line(integers={5: "many"}), "I5 must be an integer, got 'many'"),
    7: (
        criteo_line(integers={5: "99999999999999999999"}),
        "I5 must be an integer, got '99999999999999999999'",
    ),
    8: (criteo_line(categories={1: "a\rb"}), "no text: a carriage return inside the line"),
    9: (
        criteo_line(categories={1: "@"}).encode().replace(b"@", b"\xff"),
        "no text: 'utf-8' codec can't decode",
    ),
    10: (b"0\t\xff", "no text: 'utf-8' codec can't decode"),
    11: ("0", "expected 40 columns, got 1"),
}


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("block", [1, 300, 1 << 22])
def test_bad_criteo_rows_are_named_by_line_and_cost_their_neighbours_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(text, "_BLOCK_BYTES", block)
    lines = [
        BAD_CRITEO[at][0] if at in BAD_CRITEO else "" if at == 5 else criteo_line()
        for at in range(1, 13)
    ]
    log = open_log(write(tmp_path / "day.tsv", *lines))
    assert [event["impression_id"] for event in read(log)] == ["criteo-1", "criteo-12"]
    assert log.rejected.count == len(BAD_CRITEO)
    found = dict(log.rejected.first)
    assert found.keys() == BAD_CRITEO.keys()
    assert all(found[line].startswith(reason) for line, (_, reason) in BAD_CRITEO.items())
    assert f"{log.path}:" in log.notes[-1]


def test_control_characters_in_a_bad_cell_cannot_reach_a_terminal(tmp_path: Path) -> None:
    log = open_log(
        write(tmp_path / "day.tsv", criteo_line(), criteo_line(integers={1: "\x1b[31m" * 100}))
    )
    read(log)
    assert "\x1b" not in log.rejected.first[0][1]
    assert len(log.rejected.first[0][1]) < 140


def test_real_criteo_sample_has_exact_counts() -> None:
    path = shared_data("criteo/train.csv")
    labels = [line[0] for line in path.read_text().splitlines()]
    events = read(open_log(path))
    assert (len(of_kind(events, "impression")), len(of_kind(events, "click"))) == (
        7200,
        labels.count("1"),
    )


# -- Avazu ---------------------------------------------------------------------------------------


def test_avazu_impressions_spread_over_their_hour_in_file_order(tmp_path: Path) -> None:
    rows = [avazu_line(i, hour="14102100") for i in range(3)] + [
        avazu_line(i, hour="14102113") for i in range(3, 5)
    ]
    events = read(open_log(write(tmp_path / "train.csv", AVAZU_HEADER, *rows)))
    midnight = int(datetime(2014, 10, 21, tzinfo=UTC).timestamp() * 1000)
    assert [event["impression_id"] for event in events] == ["0", "1", "2", "3", "4"]
    assert [(event["time"] - midnight) / 60_000 for event in events] == [
        10,
        30,
        50,
        13 * 60 + 15,
        13 * 60 + 45,
    ]
    assert (events[3]["features"]["hour_of_day"], events[3]["features"]["day_of_week"]) == (
        "13",
        "1",
    )
    assert "hour" not in events[0]["features"]


def test_avazu_is_read_the_same_with_and_without_its_header(tmp_path: Path) -> None:
    rows = [avazu_line(i, i % 2) for i in range(10)]
    with_header = open_log(write(tmp_path / "a.csv", AVAZU_HEADER, *rows))
    without = open_log(write(tmp_path / "b.csv", *rows))
    assert read(with_header) == read(without)
    assert with_header.fields == without.fields
    assert {field.kind for field in without.fields or ()} == {"categorical"}


def test_avazu_hours_out_of_order_are_sorted(tmp_path: Path) -> None:
    rows = [avazu_line(i, 1, hour=f"141021{hour:02}") for i, hour in enumerate([5, 3, 4, 3])]
    log = open_log(write(tmp_path / "train.csv", *rows))
    impressions = of_kind(read(log), "impression")
    assert [event["impression_id"] for event in impressions] == ["1", "3", "2", "0"]
    assert log.out_of_order == 0


def test_bad_avazu_rows_are_named(tmp_path: Path) -> None:
    rows = [
        AVAZU_HEADER,
        avazu_line(1),
        avazu_line(2, hour="14102124"),
        avazu_line(3, hour="1410210"),
        avazu_line(4, 7),
        avazu_line(""),
        avazu_line(6),
        "7,0",
    ]
    log = open_log(write(tmp_path / "train.csv", *rows))
    assert [event["impression_id"] for event in read(log)] == ["1", "6"]
    assert sorted(log.rejected.first) == [
        (3, "hour must be YYMMDDHH, got '14102124'"),
        (4, "hour must be YYMMDDHH, got '1410210'"),
        (5, "click must be 0 or 1, got '7'"),
        (6, "id must be an id, got nothing"),
        (8, "expected 24 columns, got 2"),
    ]


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (AVAZU_HEADER.encode().replace(b"site_id", b"site_\xff"), "the header is no text"),
        (AVAZU_HEADER.encode().replace(b"site_id", b"C1"), "column C1 is there twice"),
        (
            AVAZU_HEADER.encode().replace(b"site_id", b"day_of_week"),
            "column day_of_week is there twice",
        ),
        (
            OBD.read_bytes().splitlines()[0].replace(b"item_id", b"click"),
            "column click is there twice",
        ),
        (
            OBD.read_bytes().splitlines()[0].replace(b"item_id", b"policy"),
            "column policy is there twice",
        ),
    ],
)
def test_a_header_that_names_no_columns_is_refused_with_its_line(
    tmp_path: Path, header: bytes, reason: str
) -> None:
    with pytest.raises(DataError, match=rf"log\.csv:1: {reason}"):
        open_log(write(tmp_path / "log.csv", header, avazu_line(1)))


def test_avazu_without_labels_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "test.csv", AVAZU_HEADER.replace("click,", ""), avazu_line(1))
    with pytest.raises(DataError, match="has no column click"):
        open_log(path, format="avazu")


def test_real_avazu_samples_have_exact_counts() -> None:
    for name, rows in (("train.csv", 8087), ("dev.csv", 480)):
        path = shared_data(f"avazu/{name}")
        clicks = sum(line.split(",")[1] == "1" for line in path.read_text().splitlines())
        log = open_log(path)
        events = read(log)
        assert (
            len(of_kind(events, "impression")),
            len(of_kind(events, "click")),
            log.rejected.count,
        ) == (rows, clicks, 0)


# -- Open Bandit ---------------------------------------------------------------------------------


def test_open_bandit_sample_has_exact_counts_times_and_features() -> None:
    header, *rows = [line.split(",") for line in OBD.read_text().splitlines()]
    log = open_log(OBD)
    events = read(log)
    impressions, clicks = of_kind(events, "impression"), of_kind(events, "click")
    assert (len(impressions), len(clicks), log.rejected.count, log.out_of_order) == (2000, 8, 0, 0)
    moments = [datetime.fromisoformat(row[0]) - datetime(1970, 1, 1, tzinfo=UTC) for row in rows]
    assert [event["time"] for event in impressions] == [
        moment // timedelta(milliseconds=1) for moment in moments
    ]
    assert {event["impression_id"] for event in clicks} == {
        f"obd-{line}" for line, row in enumerate(rows, 2) if row[5] == "1"
    }
    kept = [
        name for name in header if name not in ("timestamp", "policy", "click", "propensity_score")
    ]
    assert list(impressions[0]["features"]) == kept
    assert log.fields is not None
    assert log.fields[-1] == Field("affinity_shown_item", "numeric")
    assert impressions[0]["features"]["item_id"] == rows[0][3]


def test_all_of_the_open_bandit_sample_has_exact_counts() -> None:
    log = open_log(shared_data("obd/impressions.csv"))
    clicks = events = 0
    for batch in log.batches():
        events += len(batch)
        clicks += sum(value.startswith(b'{"kind":"click"') for value in batch.value.to_pylist())
    assert (events - clicks, clicks, log.rejected.count) == (60_000, 287, 0)


def test_shuffled_open_bandit_log_gives_the_same_impressions_in_time_order(tmp_path: Path) -> None:
    header, *rows = OBD.read_text().splitlines()
    random.Random(3).shuffle(rows)
    log = open_log(write(tmp_path / "shuffled.csv", header, *rows))
    shuffled, original = (of_kind(read(each), "impression") for each in (log, open_log(OBD)))
    assert log.out_of_order == 0

    def without_ids(events: list[dict[str, Any]]) -> list[str]:
        return sorted(json.dumps({**event, "impression_id": ""}) for event in events)

    assert without_ids(shuffled) == without_ids(original)


def test_bad_open_bandit_rows_are_named(tmp_path: Path) -> None:
    header, first, *_ = OBD.read_text().splitlines()
    moment, rest = first.split(",", 1)
    lines = [
        header,
        first,
        "yesterday," + rest,
        moment.removesuffix("+00:00") + "," + rest,
        "," + rest,
        f"{moment},{rest}x",
        first.replace(",0.0", ",nan"),
    ]
    log = open_log(write(tmp_path / "log.csv", *lines))
    assert len(read(log)) == 1
    assert [line for line, _ in log.rejected.first] == [3, 4, 5, 6, 7]
    assert (
        log.rejected.first[0][1] == "timestamp must be a time with its zone offset, got 'yesterday'"
    )


# -- what is invented ----------------------------------------------------------------------------


def test_invented_click_delays_follow_their_law(tmp_path: Path) -> None:
    path = write(tmp_path / "day.tsv", *([criteo_line("1")] * 4000))
    events = read(open_log(path, click_delay_seconds=5.0))
    times: dict[str, dict[str, int]] = defaultdict(dict)
    for event in events:
        times[event["impression_id"]][event["kind"]] = event["time"]
    delay = np.array([pair["click"] - pair["impression"] for pair in times.values()]) / 1000
    assert len(delay) == 4000
    assert delay.min() > 0
    # The median of n log-normal delays scatters by sigma sqrt(pi / 2n) = 2.6 %, the spread of their logarithm by sigma / sqrt(2n) = 1.1 %.
    assert np.median(delay) == pytest.approx(5.0, rel=0.1)
    assert np.log(delay).std() == pytest.approx(1.3, rel=0.05)


def every_format(folder: Path) -> dict[str, Path]:
    jsonl = folder / "events.jsonl"
    open_log(OBD).write_jsonl(jsonl)
    table = pa.Table.from_pylist(
        [
            {**json.loads(line), "time": json.loads(line)["time"]}
            for line in jsonl.read_bytes().splitlines()
        ]
    )
    pa.parquet.write_table(table, folder / "events.parquet", row_group_size=500)
    with (
        pa.OSFile(str(folder / "file.arrow"), "wb") as out,
        pa.ipc.new_file(out, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=300)
    with (
        pa.OSFile(str(folder / "stream.arrow"), "wb") as out,
        pa.ipc.new_stream(out, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=300)
    gz = folder / "events.jsonl.gz"
    gz.write_bytes(gzip.compress(jsonl.read_bytes()))
    with pa.output_stream(str(folder / "day.tsv.zst"), compression="zstd") as out:
        out.write(("\n".join(criteo_line(str(i % 2)) for i in range(1000)) + "\n").encode())
    write(
        folder / "train.csv",
        AVAZU_HEADER,
        *(
            avazu_line(i, i % 3 == 0, f"141021{i // 100:02}")
            .replace("True", "1")
            .replace("False", "0")
            for i in range(1000)
        ),
    )
    names = (
        "events.jsonl",
        "events.jsonl.gz",
        "events.parquet",
        "file.arrow",
        "stream.arrow",
        "day.tsv.zst",
        "train.csv",
    )
    return {name: folder / name for name in names} | {"obd": OBD}


@pytest.mark.slow
def test_every_format_is_sniffed_and_two_passes_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats = dict(
        zip(
            every_format(tmp_path).items(),
            ("events", "events", "parquet", "arrow", "arrow", "criteo", "avazu", "obd"),
            strict=True,
        )
    )
    for (name, path), expected in formats.items():
        assert sniff(path) == expected, name
        log = open_log(path, seed=5)
        first = [
            (batch.time.tolist(), batch.key.to_pylist(), batch.value.to_pylist())
            for batch in log.batches()
        ]
        assert first == [
            (batch.time.tolist(), batch.key.to_pylist(), batch.value.to_pylist())
            for batch in log.batches()
        ], name
        assert log.progress == 1.0
        monkeypatch.setattr(text, "_BLOCK_BYTES", 5_000)
        assert read(open_log(path, seed=5)) == read(log), f"{name} in other blocks"
        monkeypatch.undo()


def test_other_seeds_invent_other_click_times(tmp_path: Path) -> None:
    path = write(tmp_path / "day.tsv", *([criteo_line("1")] * 10))
    times = [
        [event["time"] for event in of_kind(read(open_log(path, seed=seed)), "click")]
        for seed in (0, 1)
    ]
    assert times[0] != times[1]


# -- events --------------------------------------------------------------------------------------


def impression(identity: str, time: object, **features: object) -> dict[str, object]:
    return {"kind": "impression", "impression_id": identity, "time": time, "features": features}


def test_event_lines_pass_byte_for_byte_also_those_that_are_no_events(tmp_path: Path) -> None:
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
    assert [value for batch in batches for value in batch.value.to_pylist()] == [
        line.removesuffix(b"\r") for line in lines if line
    ]
    assert [time - T for batch in batches for time in batch.time.tolist()] == [
        0,
        1500,
        1500,
        1500,
        2000,
        2000,
        2000,
    ]
    assert [key for batch in batches for key in batch.key.to_pylist()] == [
        b"a",
        b"a",
        None,
        None,
        b"b",
        None,
        None,
    ]
    assert log.fields is None
    assert log.notes == ()


def test_unsorted_event_lines_come_out_in_time_order(tmp_path: Path) -> None:
    events = [impression(str(i), T + (i * 7919) % 1000) for i in range(1000)]
    log = open_log(write(tmp_path / "events.jsonl", *map(json.dumps, events)))
    assert read(log) == sorted(events, key=lambda event: event["time"])  # type: ignore[arg-type, return-value]
    assert log.out_of_order == 0


def test_events_that_stay_out_of_order_pass_and_are_counted() -> None:
    class Unsorted(Log):
        format = "unsorted"

        def _read(self) -> Iterator[LogBatch]:
            for time in ([1, 2, 5], [4, 5, 6, 3], [6]):
                value = pa.array([b"{}"] * len(time), pa.large_binary())
                yield LogBatch(np.array(time), value, value)

    log = Unsorted(None, None)
    assert [time for batch in log.batches() for time in batch.time.tolist()] == [
        1,
        2,
        5,
        4,
        5,
        6,
        3,
        6,
    ]
    assert log.out_of_order == 2
    assert log.notes == (
        "2 events are older than events before them, by more than the reorder buffer holds",
    )


def test_a_line_without_end_is_skipped_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_BLOCK_BYTES", 1000)
    monkeypatch.setattr(text, "_LONGEST_LINE_BYTES", 4000)
    good = [json.dumps(impression(str(i), T + i)) for i in range(3)]
    log = open_log(
        write(
            tmp_path / "events.jsonl",
            good[0],
            b'{"x":"' + b"x" * 20_000 + b'"}',
            *good[1:],
            criteo_line("2") * 100,
        )
    )
    assert b"".join(
        b"".join(batch.value.to_pylist()) for batch in log.batches()
    ).decode() == "".join(good)
    assert [line for line, _ in log.rejected.first] == [2, 5]


def test_a_cut_off_gzip_file_gives_what_is_whole_and_says_where_it_stops(tmp_path: Path) -> None:
    rng = random.Random(0)
    whole = gzip.compress(
        "".join(
            json.dumps(impression(str(rng.random()), T + i)) + "\n" for i in range(2000)
        ).encode()
    )
    path = tmp_path / "events.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    log = open_log(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "_BLOCK_BYTES", 10_000)
        *lines, _half = [value for batch in log.batches() for value in batch.value.to_pylist()]
    assert 500 < len(lines) < 1500
    assert [json.loads(line)["time"] - T for line in lines] == list(range(len(lines)))
    assert "what comes after is lost" in log.rejected.first[0][1]


def with_timestamps(table: pa.Table) -> pa.Table:
    return table.set_column(
        2,
        "time",
        table["time"].cast(pa.timestamp("ms", "UTC")).cast(pa.timestamp("us", "Europe/Berlin")),
    )


def with_dictionary(table: pa.Table) -> pa.Table:
    return table.set_column(3, "app", table["app"].dictionary_encode())


@pytest.mark.parametrize(
    "shape",
    [
        lambda table: table,
        nested,
        with_timestamps,
        with_dictionary,
        lambda table: nested(with_timestamps(with_dictionary(table))),
    ],
)
def test_columns_become_events_and_bad_rows_are_named(tmp_path: Path, shape: Any) -> None:
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
    assert sorted(log.rejected.first) == [
        (4, "impression_id must be an id, got nothing"),
        (5, "kind must be impression or click, got 'open'"),
        (6, log.rejected.first[1][1]),
        (7, "kind must be impression or click, got nothing"),
    ]
    assert log.rejected.first[1][1].startswith("time must be between 1973 and 2100")


def test_booleans_and_unsigned_64_bit_numbers_are_categories(tmp_path: Path) -> None:
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
    pa.parquet.write_table(
        pa.table({"kind": ["click"], "impression_id": ["a"], "time": [1.5]}), path
    )
    with pytest.raises(DataError, match="column time is double"):
        open_log(path)
    pa.parquet.write_table(
        pa.table({"kind": ["click"], "impression_id": ["a"], "time": [T], "tags": [["x"]]}), path
    )
    with pytest.raises(DataError, match="column tags is list"):
        open_log(path)


def test_every_column_format_says_the_same_as_json_lines(tmp_path: Path) -> None:
    paths = every_format(tmp_path)
    expected = read(open_log(paths["events.jsonl"]))
    for name in ("events.jsonl.gz", "events.parquet", "file.arrow", "stream.arrow"):
        assert read(open_log(paths[name])) == expected, name


def test_an_arrow_file_whose_text_points_outside_of_it_is_not_followed(tmp_path: Path) -> None:
    path = every_format(tmp_path)["stream.arrow"]
    good = path.read_bytes()
    # The ends of obd-2, obd-3, obd-4: where the offsets of the ids begin.
    first = good.index(np.array([0, 5, 10, 15], np.int32).tobytes())
    path.write_bytes(
        good[: first + 8] + np.array([2**31 - 8], np.int32).tobytes() + good[first + 12 :]
    )
    log = open_log(path)
    with pytest.raises(DataError, match=r"stream\.arrow:1: the rest cannot be read"):
        list(log.batches())


def test_an_arrow_file_that_shrinks_while_it_is_read_does_not_end_the_process(
    tmp_path: Path,
) -> None:
    path = every_format(tmp_path)["stream.arrow"]
    batches = open_log(path)._record_batches()
    next(batches)
    os.truncate(path, 4096)
    assert sum(map(len, batches)) < 2008 - 300


def test_a_damaged_parquet_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    path.write_bytes(b"PAR1" + b"\0" * 100)
    with pytest.raises(DataError, match=r"log\.parquet is no parquet file"):
        open_log(path)


# -- what cannot be read at all ------------------------------------------------------------------


def test_a_path_that_is_no_log_is_an_error_that_says_what_it_is(tmp_path: Path) -> None:
    for content, expected in (
        (b"", "is empty"),
        (b"\n\n \n", "is empty"),
        (b"a;b;c\n1;2;3\n", "no known log format"),
        (b"\x1f\x8b\x08", "cannot read"),
    ):
        path = tmp_path / "log"
        path.write_bytes(content)
        with pytest.raises(DataError, match=expected):
            open_log(path)
    with pytest.raises(DataError, match="is a directory"):
        open_log(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        open_log(tmp_path / "nothing", format="criteo")


def test_an_unknown_format_name_gets_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown log format 'critoe'; did you mean 'criteo'"):
        open_log(write(tmp_path / "day.tsv", criteo_line()), format="critoe")


@pytest.mark.parametrize(
    ("rate", "delay", "seed"), [(0, 1, 0), (1, -1, 0), (1, 1, -1), (float("nan"), 1, 0)]
)
def test_an_impossible_invention_is_refused(rate: float, delay: float, seed: int) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        open_log(OBD, rate=rate, click_delay_seconds=delay, seed=seed)


def test_a_log_without_a_single_event_is_an_error_that_names_the_first_line(tmp_path: Path) -> None:
    log = open_log(write(tmp_path / "day.tsv", criteo_line("7"), criteo_line("8")), format="criteo")
    with pytest.raises(DataError, match=r"day\.tsv:1: label must be 0 or 1, got '7'"):
        list(log.batches())


# -- order ---------------------------------------------------------------------------------------


@example(
    [(0, 1), (1, None), (0, None)], [2]
)  # the next batch begins at the very time of a waiting click
@given(
    st.lists(st.tuples(st.integers(0, 5), st.none() | st.integers(1, 12)), min_size=1, max_size=40),
    st.lists(st.integers(0, 40), max_size=4),
)
def test_clicks_merge_into_impressions_as_a_stable_sort_of_all_events(
    steps: list[tuple[int, int | None]], cuts: list[int]
) -> None:
    """`steps`: time since the impression before, and the delay of a click if there is one."""
    time = np.cumsum([T, *(step for step, _ in steps)])[1:]
    click = [
        None if delay is None else int(at) + delay
        for at, (_, delay) in zip(time, steps, strict=True)
    ]
    whole = impression_batch(
        pa.array([str(i) for i in range(len(time))]),
        time,
        pa.array(click, pa.int64()),
        {"f": pa.array(["x"] * len(time))},
    )
    edges = sorted({0, len(time), *(cut for cut in cuts if cut < len(time))})
    batches = list(
        merge_clicks(whole.slice(a, b - a) for a, b in zip(edges, edges[1:], strict=False))
    )
    merged = [
        (json.loads(value)["kind"], key.decode())
        for batch in batches
        for key, value in zip(batch.key.to_pylist(), batch.value.to_pylist(), strict=True)
    ]
    all_events = [(int(at), 0, i) for i, at in enumerate(time)] + [
        (at, 1, i) for i, at in enumerate(click) if at is not None
    ]
    assert merged == [(("impression", "click")[kind], str(i)) for _, kind, i in sorted(all_events)]
    assert [at for batch in batches for at in batch.time.tolist()] == sorted(
        at for at, _, _ in all_events
    )


@given(st.lists(st.lists(st.integers(0, 60), max_size=6), max_size=30), st.integers(2, 40))
def test_reordering_loses_nothing_and_sorts_what_is_displaced_by_less_than_half_the_buffer(
    times: list[list[int]], held: int
) -> None:
    numbered = iter(range(10_000))
    batches = [
        pa.RecordBatch.from_pydict(
            {
                "time": pa.array(part, pa.int64()),
                "row": pa.array([next(numbered) for _ in part], pa.int64()),
            }
        )
        for part in times
    ]
    out = [
        (row["time"], row["row"])
        for batch in in_time_order(batches, held_events=held)
        for row in batch.to_pylist()
    ]
    rows = [(time, row) for row, time in enumerate(sum(times, []))]
    assert sorted(out) == sorted(rows)
    in_order = sorted(rows)
    displacement = max((rows.index(pair) - at for at, pair in enumerate(in_order)), default=0)
    if displacement <= held // 2:
        assert out == in_order


def test_what_is_written_as_json_lines_reads_back_the_same(tmp_path: Path) -> None:
    for name in ("out.jsonl", "out.jsonl.gz", "out.jsonl.zst"):
        assert open_log(OBD).write_jsonl(tmp_path / name) == 2008
        assert read(open_log(tmp_path / name)) == read(open_log(OBD))
