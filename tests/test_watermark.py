"""Watermarks: each partition by its own log, and not beyond the event time of its clicks."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stream_ctr.events.batch import Arrivals, EventBatch, LabelledArrivals, Rejected
from stream_ctr.join.watermark import NOT_YET, Watermarks

NONE_EXCUSED = np.array([False, False])
ALL_EXCUSED = np.array([True, True])


def observe(
    marks: Watermarks, partition: int, times: list[int], clicks: bool | list[bool] = False
) -> list[int]:
    n = len(times)
    click = np.full(n, clicks) if isinstance(clicks, bool) else np.array(clicks)
    partitions = np.full(n, partition, np.int32)
    return marks.observe(partitions, np.array(times, np.int64), click).tolist()


def test_the_slowest_partition_holds_the_watermark_until_it_is_excused() -> None:
    marks = Watermarks(partitions=2, lateness_ms=10)
    assert marks.overall(excused=NONE_EXCUSED) == NOT_YET
    observe(marks, 0, [1000, 2000])
    assert marks.overall(excused=NONE_EXCUSED) == NOT_YET
    observe(marks, 1, [500])
    assert marks.overall(excused=NONE_EXCUSED) == 490
    assert marks.overall(excused=np.array([False, True])) == 1990
    assert marks.overall(excused=ALL_EXCUSED) == 1990


def test_an_excused_partition_does_not_hold_the_watermark_and_a_silent_one_does() -> None:
    marks = Watermarks(partitions=3, lateness_ms=10)
    marks.observe(np.array([0, 1]), np.array([100, 500]))
    assert marks.overall(excused=np.zeros(3, np.bool_)) <= NOT_YET
    assert marks.overall(excused=np.array([False, False, True])) == 90
    assert marks.overall(excused=np.array([True, False, True])) == 490


def test_partitions_that_are_too_far_ahead_are_named() -> None:
    marks = Watermarks(partitions=3, lateness_ms=10)
    assert marks.ahead(NOT_YET, 0) == frozenset()
    marks.observe(np.array([0, 1]), np.array([100, 500]))
    assert marks.ahead(90, 399) == frozenset({1})
    assert marks.ahead(90, 400) == frozenset()


def test_a_partition_that_wakes_with_old_data_does_not_take_its_watermark_back() -> None:
    marks = Watermarks(partitions=2, lateness_ms=10)
    assert observe(marks, 0, [1000, 3000, 1000]) == [990, 2990, 2990]


def test_a_batch_is_observed_in_order_of_arrival_over_all_kinds() -> None:
    """Arrival: impression 5000, click 100, impression 6000, example 6500, click 7000 (of 1)."""
    impressions = Arrivals.of([1, 2], [5000, 6000])
    clicks = Arrivals(
        np.array([1, 2], np.uint64), np.array([100, 7000]), np.array([0, 1], np.int32), np.arange(2)
    )
    batch = EventBatch(
        records=5,
        impressions=impressions,
        ids=np.zeros((2, 1), np.int32),
        values=np.zeros((2, 0), np.float32),
        true_probability=np.full(2, np.nan),
        clicks=clicks,
        arrival=np.array([0, 2, 1, 4, 3]),
        rejected=Rejected(np.zeros(0, np.int32), np.zeros(0, np.int64), [], [], [], []),
        with_fields=frozenset(),
        with_unknown_fields=0,
        bad_shares=None,
        examples=LabelledArrivals(
            Arrivals.of([3], [6500]),
            np.ones(1, np.uint8),
            np.zeros((1, 1), np.int32),
            np.zeros((1, 0), np.float32),
            np.full(1, np.nan),
        ),
    )
    marks = Watermarks(partitions=2, lateness_ms=0)
    impression_limit, click_limit, example_limit = marks.observe_batch(batch)
    assert impression_limit.tolist() == [5000, 6000]
    assert click_limit.tolist() == [5000, 7000]
    assert example_limit.tolist() == [6500]
    assert marks.impressions.tolist() == [2, 0]
    assert marks.clicks.tolist() == [1, 1]


# -- clicks that stop ----------------------------------------------------------------------------


def healthy(impressions: int = 2000, every: int = 10) -> tuple[list[int], list[bool]]:
    """Return an event a millisecond, every tenth a click."""
    return list(range(1, impressions + 1)), [i % every == 0 for i in range(1, impressions + 1)]


def stalled_at(marks: Watermarks) -> int:
    """Observe a healthy stream and then impressions only.

    Return the event time at which the watermark stood still.
    """
    observe(marks, 0, *healthy())
    held = observe(marks, 0, list(range(2001, 4001)))
    assert marks.stalled.tolist() == [True, False]
    assert held[-1] == held[-1000]
    return held[-1] + marks.lateness_ms


def test_far_too_many_impressions_without_a_click_hold_the_watermark() -> None:
    marks = Watermarks(partitions=2, lateness_ms=10, stall_clicks=50)
    # 200 clicks in 1,800 impressions and n more: n * 200 / (1800 + n) > 50 from n = 601 on.
    assert stalled_at(marks) == 2000 + 600
    assert marks.overall(excused=ALL_EXCUSED) == 2590, "though everything is read"
    assert marks.stalls == 1


def test_a_stalled_partition_holds_the_watermark_though_it_is_excused() -> None:
    marks = Watermarks(partitions=2, lateness_ms=10, stall_clicks=50)
    held = stalled_at(marks) - 10
    observe(marks, 1, [9000])
    assert marks.overall(excused=ALL_EXCUSED) == held
    assert marks.overall(excused=np.array([True, False])) == held


def test_delayed_clicks_move_the_watermark_with_their_time_until_they_catch_up() -> None:
    marks = Watermarks(partitions=2, lateness_ms=10, stall_clicks=50)
    held = stalled_at(marks) - 10
    assert observe(marks, 0, [2100, 2700, 3000], True) == [held, 2690, 2990]
    assert observe(marks, 0, [4001]) == [2990]
    # Within the lateness of the impressions: the partition runs again.
    assert observe(marks, 0, [3995], True) == [3991]
    assert not marks.stalled.any()
    assert observe(marks, 0, [4002]) == [3992]


def test_clicks_catch_up_at_exactly_the_lateness() -> None:
    marks = Watermarks(partitions=2, lateness_ms=10, stall_clicks=50)
    stalled_at(marks)  # the last impression is at 4000
    observe(marks, 0, [3989], True)
    assert marks.stalled[0]
    observe(marks, 0, [3990], True)
    assert not marks.stalled[0]


def test_no_partition_stalls_before_its_click_rate_is_known_or_when_stalling_is_off() -> None:
    young = Watermarks(partitions=2, lateness_ms=0, stall_clicks=50)
    observe(young, 0, *healthy(500))
    assert observe(young, 0, list(range(501, 5001)))[-1] == 5000
    off = Watermarks(partitions=2, lateness_ms=0)
    observe(off, 0, *healthy())
    assert observe(off, 0, list(range(2001, 9001)))[-1] == 9000


def test_a_partition_of_clicks_only_that_falls_silent_is_stalled_and_not_idle() -> None:
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


def test_clicks_that_are_read_before_their_impressions_are_not_overdue() -> None:
    marks = Watermarks(partitions=2, lateness_ms=0, stall_clicks=50)
    observe(marks, 1, list(range(0, 2000, 10)), True)
    observe(marks, 0, list(range(2000)))
    assert not marks.silent_clicks().any()


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.booleans()), max_size=300),
    st.lists(st.integers(0, 300), max_size=5),
)
def test_a_partitions_watermark_depends_on_its_own_log_and_never_goes_back(
    events: list[tuple[int, bool]], cuts: list[int]
) -> None:
    warm_times, warm_clicks = healthy()
    times = [*warm_times, *(time + 1000 for time, _ in events)]
    clicks = [*warm_clicks, *(click for _, click in events)]
    straight = Watermarks(partitions=2, lateness_ms=50, stall_clicks=5)
    expected = observe(straight, 0, times, clicks)
    marks = Watermarks(partitions=2, lateness_ms=50, stall_clicks=5)
    limits: list[int] = []
    inner = {len(warm_times) + cut for cut in cuts if len(warm_times) + cut < len(times)}
    bounds = sorted({0, len(times), *inner})
    for start, end in zip(bounds, bounds[1:], strict=False):
        limits += observe(marks, 0, times[start:end], clicks[start:end])
        observe(marks, 1, [7000], True)  # another partition changes nothing in this one
        state = marks.state_dict()
        marks = Watermarks(partitions=2, lateness_ms=50, stall_clicks=5)
        marks.load_state_dict(state)
    assert limits == expected == sorted(expected)


# -- inputs one after another --------------------------------------------------------------------


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 1199), min_size=1, max_size=3, unique=True),
    st.integers(300, 1100),
)
def test_one_log_after_another_is_one_log_clicks_that_are_overdue_included(
    seed: int, cuts: list[int], silent_from: int
) -> None:
    """Clicks stop after a while, and come late."""
    rng = np.random.default_rng(seed)
    time = np.cumsum(rng.integers(0, 20, 1200)) - rng.integers(0, 30, 1200)
    click = (rng.random(1200) < 0.5) & ((np.arange(1200) < silent_from) | (rng.random() < 0.5))
    whole = Watermarks(partitions=1, lateness_ms=10, stall_clicks=20)
    limits = whole.observe(np.zeros(1200, int), time, click).tolist()
    parts = Watermarks(partitions=len(cuts) + 1, lateness_ms=10, stall_clicks=20)
    found: list[int] = []
    bounds = [0, *sorted(cuts), 1200]
    for number, (first, end) in enumerate(itertools.pairwise(bounds)):
        parts = resumed(parts, len(cuts) + 1)
        parts.begin(range(number, number + 1))
        rows = slice(first, end)
        found += parts.observe(np.full(end - first, number), time[rows], click[rows]).tolist()
    assert found == limits
    ended = np.arange(len(cuts) + 1) < len(cuts)
    assert parts.overall(excused=ended) == whole.overall(excused=np.array([False]))
    assert parts.stalled.tolist() == [*[False] * len(cuts), *whole.stalled.tolist()]
    assert parts.stalls == whole.stalls


def resumed(marks: Watermarks, partitions: int) -> Watermarks:
    """Return what a run that resumes from this state has."""
    again = Watermarks(
        partitions=partitions, lateness_ms=marks.lateness_ms, stall_clicks=marks.stall_clicks
    )
    if marks.mark.max() > NOT_YET:
        again.load_state_dict(marks.state_dict())
    return again


def test_a_log_whose_clicks_are_overdue_waits_for_those_of_the_topic_that_follows() -> None:
    marks = Watermarks(partitions=3, lateness_ms=10, stall_clicks=5)
    marks.begin(range(1))
    observe(marks, 0, list(range(1000, 1200)), [True, False] * 100)
    observe(marks, 0, list(range(1200, 1300)))
    assert marks.stalled.tolist() == [True, False, False]
    held = int(marks.mark[0])
    marks.begin(range(1, 3))
    excused = np.array([True, False, False])
    observe(marks, 1, [5000])
    observe(marks, 2, [6000])
    assert marks.overall(excused=excused) == held < 1240
    observe(marks, 2, [1250], clicks=True)
    assert marks.overall(excused=excused) == 1250 - 10
    marks = resumed(marks, 3)
    observe(marks, 1, [1280], clicks=True)
    assert marks.overall(excused=excused) == 1280 - 10
    observe(marks, 1, [1289], clicks=True)  # within the lateness of the log's end
    assert not marks.stalled.any()
    assert marks.overall(excused=excused) == 5000 - 10


def test_impressions_of_a_log_do_not_count_for_a_topic_of_clicks_that_follows() -> None:
    """Its clicks are measured by the impressions of the topics that it is read with."""
    marks = Watermarks(partitions=3, lateness_ms=10, stall_clicks=5)
    marks.begin(range(1))
    observe(marks, 0, list(range(2000)))
    marks.begin(range(1, 3))
    assert not marks.all_since_click[1:].any()
    observe(marks, 1, list(range(2000, 2200)))
    observe(marks, 2, list(range(2000, 2200, 2)), clicks=True)
    observe(marks, 1, list(range(2200, 2220)))
    assert marks.silent_clicks().tolist() == [False, False, True]


def test_the_state_has_no_place_for_an_input_that_has_not_begun() -> None:
    marks = Watermarks(partitions=3, lateness_ms=10)
    marks.begin(range(1))
    observe(marks, 0, [1000])
    assert len(marks.state_dict()["mark"]) == 1
    again = resumed(marks, 2)
    assert again.present == range(1)
    assert again.mark.tolist() == [990, NOT_YET]
