"""How far event time has come: each partition by its own log, and not beyond what its clicks have reached."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stream_ctr.join.watermark import NOT_YET, Watermarks

NOBODY, ALL = np.array([False, False]), np.array([True, True])


def observe(
    marks: Watermarks, partition: int, times: list[int], clicks: bool | list[bool] = False
) -> list[int]:
    n = len(times)
    click = np.full(n, clicks) if isinstance(clicks, bool) else np.array(clicks)
    return marks.observe(np.full(n, partition, np.int32), np.array(times, np.int64), click).tolist()


def test_the_slowest_partition_holds_the_watermark_until_it_is_excused():
    marks = Watermarks(partitions=2, lateness_ms=10)
    assert marks.overall(excused=NOBODY) == NOT_YET
    observe(marks, 0, [1000, 2000])
    assert marks.overall(excused=NOBODY) == NOT_YET
    observe(marks, 1, [500])
    assert marks.overall(excused=NOBODY) == 490
    assert marks.overall(excused=np.array([False, True])) == 1990
    assert marks.overall(excused=ALL) == 1990


def test_a_partition_that_wakes_with_old_data_does_not_take_its_watermark_back():
    marks = Watermarks(partitions=2, lateness_ms=10)
    assert observe(marks, 0, [1000, 3000, 1000]) == [990, 2990, 2990]


# -- clicks that stop ----------------------------------------------------------------------------


def healthy(impressions: int = 2000, every: int = 10) -> tuple[list[int], list[bool]]:
    """An event a millisecond, every tenth a click."""
    return list(range(1, impressions + 1)), [i % every == 0 for i in range(1, impressions + 1)]


def stalled_at(marks: Watermarks) -> int:
    """Feeds a healthy stream and then impressions only; the event time at which the watermark stood still."""
    observe(marks, 0, *healthy())
    held = observe(marks, 0, list(range(2001, 4001)))
    assert marks.stalled.tolist() == [True, False]
    assert held[-1] == held[-1000]
    return held[-1] + marks.lateness_ms


def test_far_too_many_impressions_without_a_click_hold_the_watermark():
    marks = Watermarks(partitions=2, lateness_ms=10, stall_clicks=50)
    # 200 clicks in 1,800 impressions and n more: n * 200 / (1800 + n) > 50 from n = 601 on
    assert stalled_at(marks) == 2000 + 600
    assert marks.overall(excused=ALL) == 2590, "though all is read"
    assert marks.stalls == 1


def test_delayed_clicks_move_the_watermark_with_their_own_time_until_they_have_caught_up():
    marks = Watermarks(partitions=2, lateness_ms=10, stall_clicks=50)
    held = stalled_at(marks) - 10
    assert observe(marks, 0, [2100, 2700, 3000], True) == [held, 2690, 2990]
    assert observe(marks, 0, [4001]) == [2990]
    assert observe(marks, 0, [3995], True) == [
        3991
    ]  # within the lateness of the impressions: all is as before
    assert not marks.stalled.any()
    assert observe(marks, 0, [4002]) == [3992]


def test_nothing_is_held_before_the_rate_of_clicks_is_known_nor_when_it_is_switched_off():
    young = Watermarks(partitions=2, lateness_ms=0, stall_clicks=50)
    observe(young, 0, *healthy(500))
    assert observe(young, 0, list(range(501, 5001)))[-1] == 5000
    off = Watermarks(partitions=2, lateness_ms=0)
    observe(off, 0, *healthy())
    assert observe(off, 0, list(range(2001, 9001)))[-1] == 9000


def test_a_partition_of_clicks_only_that_falls_silent_is_stalled_and_not_idle():
    marks = Watermarks(partitions=2, lateness_ms=0, stall_clicks=50)
    for start in range(0, 2000, 100):
        observe(marks, 0, list(range(start, start + 100)))
        observe(marks, 1, list(range(start, start + 100, 10)), True)
    assert not marks.silent_clicks().any()
    observe(marks, 0, list(range(2000, 4000)))
    assert marks.silent_clicks().tolist() == [False, True]
    again = Watermarks(partitions=2, lateness_ms=0, stall_clicks=50)
    again.load_state_dict(marks.state_dict())
    assert again.silent_clicks().tolist() == [False, True]
    observe(marks, 1, [3999], True)
    assert not marks.silent_clicks().any()


def test_clicks_that_are_read_before_their_impressions_are_not_missed():
    marks = Watermarks(partitions=2, lateness_ms=0, stall_clicks=50)
    observe(marks, 1, list(range(0, 2000, 10)), True)
    observe(marks, 0, list(range(2000)))
    assert not marks.silent_clicks().any()


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.booleans()), max_size=300),
    st.lists(st.integers(0, 300), max_size=5),
)
def test_what_a_partition_does_depends_on_its_own_log_alone_and_never_goes_back(events, cuts):
    warm = healthy()
    times, clicks = [*warm[0], *(t + 1000 for t, _ in events)], [*warm[1], *(c for _, c in events)]
    whole = Watermarks(partitions=2, lateness_ms=50, stall_clicks=5)
    expected = observe(whole, 0, times, clicks)
    parts = Watermarks(partitions=2, lateness_ms=50, stall_clicks=5)
    got: list[int] = []
    bounds = sorted(
        {0, len(times), *(len(warm[0]) + cut for cut in cuts if len(warm[0]) + cut < len(times))}
    )
    for start, end in zip(bounds, bounds[1:], strict=False):
        got += observe(parts, 0, times[start:end], clicks[start:end])
        observe(parts, 1, [7000], True)  # another partition is no matter of this one
        kept = parts.state_dict()
        parts = Watermarks(partitions=2, lateness_ms=50, stall_clicks=5)
        parts.load_state_dict(kept)
    assert got == expected == sorted(expected)
