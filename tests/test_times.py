"""Times: one rule for numbers, timestamps and text, whatever their unit and zone."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from stream_ctr.events.decoder import Decoder
from stream_ctr.events.times import DETECTED, TimeFormat

T = 1_735_689_600_000


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
    assert DETECTED.epoch_ms(column).to_pylist() == [T, None]


def test_times_before_1970_are_rounded_down_too() -> None:
    assert DETECTED.epoch_ms(pa.array([-1], pa.timestamp("us"))).to_pylist() == [-1]


def test_a_text_that_is_not_a_time_is_an_error() -> None:
    with pytest.raises(pa.ArrowInvalid, match="not a time"):
        DETECTED.epoch_ms(pa.array(["noon"]))


@pytest.mark.parametrize(
    ("time", "zone", "expected"),
    [
        ("1735689600", "", T),
        ("1735689600000", "", T),
        ("1735689600000000", "", T),
        ("1735689600000000000", "", T),
        ('"2025-01-01T00:00:00Z"', "", T),
        ('"2025-01-01 01:00:00"', "Europe/Berlin", T),
        ('"2025-01-01 01:00:00"', "", None),
        ("17", "", None),
    ],
)
@pytest.mark.parametrize("space", ["", "\\u0041"])  # an escape in a name goes to the strict parser
def test_a_topic_reads_times_by_the_same_rule(
    time: str, zone: str, expected: int | None, space: str
) -> None:
    record = f'{{"kind":"click","impression_id":"a{space}","time":{time}}}'.encode()
    decoder = Decoder((), time_format=TimeFormat(zone=zone))
    events, rejections = decoder.decode(pa.array([record], pa.large_binary()))
    assert events.clicks.time.tolist() == ([] if expected is None else [expected])
    assert len(rejections) == (expected is None)
    if time.startswith('"') and expected is None:
        assert "input.time_zone" in rejections.message[0]


def test_a_given_unit_is_the_only_one() -> None:
    seconds = np.array([T // 1000])
    assert TimeFormat("s").from_integers(seconds).tolist() == [T]
    assert TimeFormat("ms").from_integers(seconds).tolist() == [T // 1000]  # out of range
    assert TimeFormat("s").from_integers(np.array([T])).tolist() == [-1]


def test_an_hour_that_comes_twice_is_the_earlier_one() -> None:
    local = pa.array(["2025-10-26 02:30:00"])
    utc = pa.array(["2025-10-26 00:30:00Z"])
    times = TimeFormat(zone="Europe/Berlin")
    assert times.from_text(local) == times.from_text(utc)
