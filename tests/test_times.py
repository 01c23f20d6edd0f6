"""Times: one rule for numbers, timestamps and text, whatever their unit and zone."""

from __future__ import annotations

import pyarrow as pa
import pytest

from stream_ctr.events.times import DETECTED

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
