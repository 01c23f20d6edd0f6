"""Criteo, Avazu and Open Bandit logs become impressions and clicks with synthetic times."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.sample_logs import (
    AVAZU_HEADER,
    OBD,
    avazu_line,
    criteo_line,
    of_kind,
    read,
    shared_data,
    write_lines,
)

from stream_ctr.errors import ConfigError, DataError
from stream_ctr.events.field import Field
from stream_ctr.logs import text_log
from stream_ctr.logs.log import DEFAULT_START_MS
from stream_ctr.logs.open import open_log

# -- Criteo --------------------------------------------------------------------------------------


def test_criteo_rows_become_evenly_spaced_impressions_and_their_clicks(tmp_path: Path) -> None:
    path = write_lines(
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
    categories = {f"C{i}": f"{i:08x}" for i in range(1, 27)}
    integers = {f"I{i}": i for i in range(1, 14)}
    assert impressions[0]["features"] == categories | integers
    assert impressions[2]["features"] == categories | integers | {"I3": -7}
    assert log.fields is not None
    assert sum(field.kind == "numeric" for field in log.fields) == 13
    assert "100" not in log.notes[0]
    assert "4 a second" in log.notes[0]


def test_blank_criteo_cells_are_missing(tmp_path: Path) -> None:
    line = criteo_line(integers={2: "", 13: ""}, categories={1: "", 26: ""})
    (event,) = read(open_log(write_lines(tmp_path / "day.tsv", line)))
    assert not {"I2", "I13", "C1", "C26"} & set(event["features"])
    assert len(event["features"]) == 35


TOO_LONG = "99999999999999999999"
BAD_CRITEO: dict[int, tuple[str | bytes, str]] = {
    2: (criteo_line("0") + "\textra", "expected 40 columns, got 41"),
    3: (criteo_line("2"), "label must be 0 or 1, got '2'"),
    4: (criteo_line(""), "label must be 0 or 1, got nothing"),
    6: (criteo_line(integers={5: "many"}), "I5 must be an integer, got 'many'"),
    7: (criteo_line(integers={5: TOO_LONG}), f"I5 must be an integer, got '{TOO_LONG}'"),
    8: (criteo_line(categories={1: "a\rb"}), "not text: a carriage return inside the line"),
    9: (
        criteo_line(categories={1: "@"}).encode().replace(b"@", b"\xff"),
        "not text: 'utf-8' codec can't decode",
    ),
    10: (b"0\t\xff", "not text: 'utf-8' codec can't decode"),
    11: ("0", "expected 40 columns, got 1"),
}


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("block", [1, 300, 1 << 22])
def test_bad_criteo_rows_are_named_by_line_and_the_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(text_log, "_BLOCK_BYTES", block)
    lines = [criteo_line()] * 12
    path = write_lines(
        tmp_path / "day.tsv",
        *(
            BAD_CRITEO[number][0] if number in BAD_CRITEO else "" if number == 5 else line
            for number, line in enumerate(lines, 1)
        ),
    )
    log = open_log(path)
    assert [event["impression_id"] for event in read(log)] == ["criteo-1", "criteo-12"]
    assert log.rejected.count == len(BAD_CRITEO)
    found = dict(log.rejected.first)
    assert found.keys() == BAD_CRITEO.keys()
    assert all(found[line].startswith(reason) for line, (_, reason) in BAD_CRITEO.items())
    assert f"{log.path}:" in log.notes[-1]


def test_control_characters_in_a_bad_cell_cannot_reach_a_terminal(tmp_path: Path) -> None:
    bad = criteo_line(integers={1: "\x1b[31m" * 100})
    log = open_log(write_lines(tmp_path / "day.tsv", criteo_line(), bad))
    read(log)
    (_, reason), *_ = log.rejected.first
    assert "\x1b" not in reason
    assert len(reason) < 140


def test_the_real_criteo_sample_has_exact_counts() -> None:
    path = shared_data("criteo/train.csv")
    labels = [line[0] for line in path.read_text().splitlines()]
    events = read(open_log(path))
    assert len(of_kind(events, "impression")) == 7200
    assert len(of_kind(events, "click")) == labels.count("1")


# -- Avazu ---------------------------------------------------------------------------------------


def test_avazu_impressions_spread_over_their_hour_in_file_order(tmp_path: Path) -> None:
    rows = [avazu_line(i, hour="14102100") for i in range(3)]
    rows += [avazu_line(i, hour="14102113") for i in range(3, 5)]
    events = read(open_log(write_lines(tmp_path / "train.csv", AVAZU_HEADER, *rows)))
    midnight = int(datetime(2014, 10, 21, tzinfo=UTC).timestamp() * 1000)
    assert [event["impression_id"] for event in events] == ["0", "1", "2", "3", "4"]
    minutes = [(event["time"] - midnight) / 60_000 for event in events]
    assert minutes == [10, 30, 50, 13 * 60 + 15, 13 * 60 + 45]
    features = events[3]["features"]
    assert (features["hour_of_day"], features["day_of_week"]) == ("13", "1")
    assert "hour" not in features


def test_avazu_is_read_the_same_with_and_without_its_header(tmp_path: Path) -> None:
    rows = [avazu_line(i, i % 2) for i in range(10)]
    with_header = open_log(write_lines(tmp_path / "a.csv", AVAZU_HEADER, *rows))
    without = open_log(write_lines(tmp_path / "b.csv", *rows))
    assert read(with_header) == read(without)
    assert with_header.fields == without.fields
    assert {field.kind for field in without.fields or ()} == {"categorical"}


def test_avazu_hours_out_of_order_are_sorted(tmp_path: Path) -> None:
    rows = [avazu_line(i, 1, hour=f"141021{hour:02}") for i, hour in enumerate([5, 3, 4, 3])]
    log = open_log(write_lines(tmp_path / "train.csv", *rows))
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
    log = open_log(write_lines(tmp_path / "train.csv", *rows))
    assert [event["impression_id"] for event in read(log)] == ["1", "6"]
    assert sorted(log.rejected.first) == [
        (3, "hour must be YYMMDDHH, got '14102124'"),
        (4, "hour must be YYMMDDHH, got '1410210'"),
        (5, "click must be 0 or 1, got '7'"),
        (6, "id must be present, got nothing"),
        (8, "expected 24 columns, got 2"),
    ]


AVAZU = AVAZU_HEADER.encode()
OPEN_BANDIT = OBD.read_bytes().splitlines()[0]


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (AVAZU.replace(b"site_id", b"site_\xff"), "the header is not text"),
        (AVAZU.replace(b"site_id", b"C1"), "column C1 appears twice"),
        (AVAZU.replace(b"site_id", b"day_of_week"), "column day_of_week appears twice"),
        (OPEN_BANDIT.replace(b"item_id", b"click"), "column click appears twice"),
        (OPEN_BANDIT.replace(b"item_id", b"policy"), "column policy appears twice"),
    ],
)
def test_a_header_that_does_not_name_its_columns_is_refused_with_its_line(
    tmp_path: Path, header: bytes, reason: str
) -> None:
    with pytest.raises(DataError, match=rf"log\.csv:1: {reason}"):
        open_log(write_lines(tmp_path / "log.csv", header, avazu_line(1)))


def test_avazu_without_labels_is_refused(tmp_path: Path) -> None:
    header = AVAZU_HEADER.replace("click,", "")
    path = write_lines(tmp_path / "test.csv", header, avazu_line(1))
    with pytest.raises(DataError, match="has no column click"):
        open_log(path, format="avazu")


@pytest.mark.parametrize(("name", "rows"), [("train.csv", 8087), ("dev.csv", 480)])
def test_the_real_avazu_samples_have_exact_counts(name: str, rows: int) -> None:
    path = shared_data(f"avazu/{name}")
    clicks = sum(line.split(",")[1] == "1" for line in path.read_text().splitlines())
    log = open_log(path)
    events = read(log)
    assert len(of_kind(events, "impression")) == rows
    assert len(of_kind(events, "click")) == clicks
    assert log.rejected.count == 0


# -- Open Bandit ---------------------------------------------------------------------------------


def test_the_open_bandit_sample_has_exact_counts_times_and_features() -> None:
    header, *rows = [line.split(",") for line in OBD.read_text().splitlines()]
    log = open_log(OBD)
    events = read(log)
    impressions, clicks = of_kind(events, "impression"), of_kind(events, "click")
    assert (len(impressions), len(clicks), log.rejected.count, log.out_of_order) == (2000, 8, 0, 0)
    since_1970 = [datetime.fromisoformat(row[0]) - datetime(1970, 1, 1, tzinfo=UTC) for row in rows]
    expected = [elapsed // timedelta(milliseconds=1) for elapsed in since_1970]
    assert [event["time"] for event in impressions] == expected
    clicked = {f"obd-{line}" for line, row in enumerate(rows, 2) if row[5] == "1"}
    assert {event["impression_id"] for event in clicks} == clicked
    no_features = ("timestamp", "policy", "click", "propensity_score")
    features = [name for name in header if name not in no_features]
    assert list(impressions[0]["features"]) == features
    assert log.fields is not None
    assert log.fields[-1] == Field("affinity_shown_item", "numeric")
    assert impressions[0]["features"]["item_id"] == rows[0][3]


def test_the_whole_open_bandit_sample_has_exact_counts() -> None:
    log = open_log(shared_data("obd/impressions.csv"))
    clicks = 0
    events = 0
    for batch in log.batches():
        events += len(batch)
        clicks += sum(value.startswith(b'{"kind":"click"') for value in batch.value.to_pylist())
    assert (events - clicks, clicks, log.rejected.count) == (60_000, 287, 0)


def test_a_shuffled_open_bandit_log_gives_the_same_impressions_in_time_order(
    tmp_path: Path,
) -> None:
    header, *rows = OBD.read_text().splitlines()
    random.Random(3).shuffle(rows)
    log = open_log(write_lines(tmp_path / "shuffled.csv", header, *rows))
    shuffled = of_kind(read(log), "impression")
    original = of_kind(read(open_log(OBD)), "impression")
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
    log = open_log(write_lines(tmp_path / "log.csv", *lines))
    assert len(read(log)) == 1
    assert [line for line, _ in log.rejected.first] == [3, 4, 5, 6, 7]
    (_, reason), *_ = log.rejected.first
    assert reason == "timestamp must be a time with its zone offset, got 'yesterday'"


# -- synthetic times -----------------------------------------------------------------------------


def test_synthetic_click_delays_follow_their_law(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "day.tsv", *([criteo_line("1")] * 4000))
    times: dict[str, dict[str, int]] = defaultdict(dict)
    for event in read(open_log(path, click_delay_seconds=5.0)):
        times[event["impression_id"]][event["kind"]] = event["time"]
    delay = np.array([pair["click"] - pair["impression"] for pair in times.values()]) / 1000
    assert len(delay) == 4000
    assert delay.min() > 0
    # The median of n log-normal delays scatters by sigma sqrt(pi / 2n) = 2.6 %, the standard
    # deviation of their logarithm by sigma / sqrt(2n) = 1.1 %.
    assert np.median(delay) == pytest.approx(5.0, rel=0.1)
    assert np.log(delay).std() == pytest.approx(1.3, rel=0.05)


def test_another_seed_gives_other_click_times(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "day.tsv", *([criteo_line("1")] * 10))
    first, second = (
        [event["time"] for event in of_kind(read(open_log(path, seed=seed)), "click")]
        for seed in (0, 1)
    )
    assert first != second


# -- a span of event time ------------------------------------------------------------------------


def test_impressions_without_times_are_spread_over_the_span(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "day.tsv", *(criteo_line("0") for _ in range(4)))
    log = open_log(path, span=timedelta(hours=1))
    for _ in range(2):  # every pass gives the same times
        times = [event["time"] - DEFAULT_START_MS for event in read(log)]
        assert times == [0, 900_000, 1_800_000, 2_700_000]
    assert "spread evenly over 1h" in log.notes[0]


def test_bad_lines_are_counted_once_though_a_span_takes_two_passes(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "day.tsv", criteo_line("0"), "x" * (17 << 20), criteo_line("1"))
    log = open_log(path, format="criteo", span=timedelta(days=1))
    assert len(of_kind(read(log), "impression")) == 2
    assert log.rejected.count == 1


def test_the_span_is_part_of_the_identity_of_a_log(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "day.tsv", criteo_line("0"))
    day, week = (open_log(path, span=timedelta(days=days)).identity for days in (1, 7))
    assert day != week
    assert open_log(OBD, span=timedelta(days=1)).identity == open_log(OBD).identity


def test_a_span_is_at_least_a_second(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "day.tsv", criteo_line("0"))
    with pytest.raises(ConfigError, match="at least 1s, got 0.5s"):
        open_log(path, span=timedelta(seconds=0.5))
