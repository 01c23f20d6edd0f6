"""The joiner against its definition, read by brute force, however the partitions are polled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.joins import (
    EARLY,
    LATENESS,
    WINDOW,
    Array,
    Event,
    Log,
    Poll,
    bounded,
    expected,
    features,
    interleaved,
    joiner,
    logs,
    logs_with_polls,
    push,
    push_clicks,
    push_impressions,
    release,
    restarted,
    rows_of,
    run,
)
from support.reliability import Outcome

from stream_ctr.events.batch import Arrivals, EventBatch, Rejected
from stream_ctr.join.examples import Examples
from stream_ctr.join.join_state import EMPTY, MOST_WAITING_OF_AN_ID
from stream_ctr.join.joiner import LabelJoiner
from stream_ctr.join.watermark import Watermarks


def no_features(n: int) -> Array:
    return np.zeros((n, 1), np.int32)


@pytest.mark.fault(
    13,
    injected="every disorder, interleaving and repetition that hypothesis finds, "
    "against a reading of the definition",
)
@settings(max_examples=200, deadline=None)
@given(logs_with_polls())
def test_examples_are_those_of_the_definition_however_polls_interleave(
    case: tuple[Log, list[Poll]],
) -> None:
    log, polls = case
    parts, target, _ = run(log, polls)
    rows = rows_of(parts)
    assert rows == [(t, p * 1000 + o, id_, label) for t, p, o, id_, label in expected(log)]
    counts = target.counts()
    assert counts["clicks"] == sum(e.kind == "click" for events in log for e in events)
    assert counts["clicks"] == sum(
        counts[f"clicks_{fate}"] for fate in ("joined", "duplicate", "late", "unmatched")
    )
    assert counts["impressions"] == len(rows) + sum(
        counts[f"impressions_{fate}"] for fate in ("late", "duplicate")
    )
    assert counts["clicks_joined"] == sum(label for *_, label in rows)


@pytest.mark.fault(
    13,
    injected="hostile logs of up to three partitions, each polled in two ways: clicks hours late, "
    "repeated, of no impression, within and beyond the duplicate horizon",
)
@settings(max_examples=60, deadline=None)
@given(logs(), st.integers(0, 1 << 32), st.sampled_from([WINDOW + EARLY, 150, 10_000]))
def test_every_count_and_the_whole_state_are_the_same_however_polls_interleave(
    log: Log, seed: int, horizon: int
) -> None:
    shown: set[int] = set()
    unique: list[list[Event]] = []
    for events in log:
        unique.append([])
        for event in events:
            if event.kind == "click" or event.id not in shown:
                unique[-1].append(event)
            if event.kind == "impression":
                shown.add(event.id)
    rng = np.random.default_rng(seed)
    states = []
    for _ in range(2):
        _, target, _ = run(
            unique,
            interleaved(unique, rng),
            make=lambda: joiner(duplicate_horizon_ms=horizon),
        )
        states.append(target.state_dict())
    for name, array in states[0].items():
        assert np.array_equal(array, states[1][name]), name


def test_a_click_beyond_the_horizon_is_unmatched_whatever_arrived_first() -> None:
    for click_first in (False, True):
        for closed in (False, True):
            target = joiner(duplicate_horizon_ms=150)
            click = Arrivals.of([7], [1000])
            late = np.array([1151])  # its partition is far ahead
            if click_first:
                target.push_clicks(click, limit=late)
            target.push_impressions(Arrivals.of([7], [1000]), *features(np.zeros(1, np.int64)))
            if closed:
                target.advance(1000 + WINDOW + 1)
            if not click_first:
                target.push_clicks(click, limit=late)
            target.advance(5000)
            counts = target.counts()
            assert (counts["clicks_late"], counts["clicks_unmatched"]) == (0, 1)
            assert not target.delays.any()


def test_the_delay_and_earliness_of_several_clicks_are_those_of_the_earliest() -> None:
    for times in ([1030, 990], [990, 1030]):
        target = joiner()
        target.push_impressions(Arrivals.of([7], [1000]), *features(np.zeros(1, np.int64)))
        for time in times:
            target.push_clicks(Arrivals.of([7], [time]))
        counts = target.counts()
        assert (counts["clicks_joined"], counts["clicks_duplicate"]) == (1, 1)
        assert counts["clicks_early"] == 1
        assert target.delays.sum() == 1


def test_the_click_of_an_impression_that_is_repeated_earlier_is_counted_anew() -> None:
    target = joiner()
    target.push_impressions(Arrivals.of([7], [1000]), *features(np.zeros(1, np.int64)))
    target.push_clicks(Arrivals.of([7], [995]))
    assert target.counts()["clicks_early"] == 1
    # Five milliseconds earlier: the click is no longer early. Then so much that it is late.
    for time, early, late in ((995, 0, 0), (995 - WINDOW - 1, 0, 1)):
        target.push_impressions(Arrivals.of([7], [time]), *features(np.zeros(1, np.int64)))
        counts = target.counts()
        assert (counts["clicks_early"], counts["clicks_late"]) == (early, late)
        assert counts["clicks_joined"] == 1 - late
        assert target.delays.sum(axis=1).tolist() == [1 - late, late]


@settings(max_examples=80, deadline=None)
@given(logs_with_polls())
def test_a_restart_from_the_state_after_any_poll_changes_nothing(
    case: tuple[Log, list[Poll]],
) -> None:
    log, polls = case
    straight, straight_joiner, _ = run(log, polls)
    resumed, resumed_joiner, _ = run(log, polls, restart=True)
    assert rows_of(straight) == rows_of(resumed)
    assert straight_joiner.counts() == resumed_joiner.counts()
    assert np.array_equal(straight_joiner.delays, resumed_joiner.delays)


# -- the window ----------------------------------------------------------------------------------


@pytest.mark.fault(14, injected="a click at each end of the window, and 1 ms within and beyond it")
@pytest.mark.parametrize(
    ("delay", "label", "late"),
    [
        (-EARLY - 1, 0, 0),
        (-EARLY, 1, 0),
        (0, 1, 0),
        (WINDOW - 1, 1, 0),
        (WINDOW, 1, 0),
        (WINDOW + 1, 0, 1),
    ],
)
def test_both_ends_of_the_window_belong_to_it(
    delay: int, label: int, late: int, outcome: Outcome
) -> None:
    target = LabelJoiner(fields=1, label_window_ms=WINDOW, early_click_wait_ms=EARLY)
    target.push_impressions(Arrivals.of([7], [1000]), no_features(1))
    target.push_clicks(Arrivals.of([7], [1000 + delay]))
    # A click at the very end may still come.
    assert target.advance(1000 + WINDOW).label.tolist() == []
    assert target.advance(1000 + WINDOW + 1).label.tolist() == [label]
    assert target.counts()["clicks_late"] == late
    outcome("both ends belong to the window; beyond it the click is counted as late")


def test_click_before_its_impression_still_counts() -> None:
    target = LabelJoiner(fields=1, label_window_ms=WINDOW, early_click_wait_ms=EARLY)
    target.push_clicks(Arrivals.of([7], [990]))
    target.push_impressions(Arrivals.of([7], [1000]), no_features(1))
    assert target.drain().label.tolist() == [1]
    assert target.counts()["clicks_early"] == 1


def test_the_earliest_of_several_waiting_clicks_joins_also_after_a_restart() -> None:
    target = joiner()
    clicks = Arrivals.of([7, 7], [990, 1005])
    target.push_clicks(clicks, limit=clicks.time)
    for each in (restarted(target, joiner()), target):
        impressions = Arrivals.of([7], [1000])
        each.push_impressions(impressions, *features(np.zeros(1, np.int64)), limit=impressions.time)
        counts = each.counts()
        assert counts["clicks_joined"] == 1
        assert counts["clicks_early"] == 1
        assert counts["clicks_duplicate"] == 1


def test_of_the_clicks_that_wait_for_an_id_the_earliest_are_kept_and_the_rest_counted() -> None:
    target = joiner()
    times = np.random.default_rng(0).permutation(np.arange(600 - EARLY, 600 + WINDOW))
    for block in np.array_split(times, 7):
        push_clicks(target, np.full(len(block), 7), block)
    push_clicks(target, np.array([8]), 600)
    assert target.counts()["clicks_evicted"] == EARLY + WINDOW - MOST_WAITING_OF_AN_ID
    push_impressions(target, np.array([7, 8]), 600)
    assert target.counts()["clicks_joined"] == 2
    assert target.counts()["clicks_duplicate"] == MOST_WAITING_OF_AN_ID - 1
    assert sorted(target.state_dict()["pending.delay"].tolist()) == [-EARLY, 0]


def test_clicks_that_wait_no_longer_stand_in_nobodys_way() -> None:
    target = joiner()
    for at in range(1000, 20_000, 10):
        push_clicks(target, np.array([7]), at)
        target.advance(at, at_most=10)  # drops those that no impression can want any more
    waiting = target._clicks.arrays
    row = waiting.head.max()  # the one chain that has clicks
    length = 0
    while row != EMPTY:
        length += 1
        row = waiting.next[row]
    assert waiting.sizes[0] > 100  # they would all be in the chain
    assert target._clicks.count <= length < 50


def test_a_second_click_and_a_second_impression_are_dropped_and_counted() -> None:
    target = LabelJoiner(fields=1, label_window_ms=WINDOW)
    target.push_impressions(Arrivals.of([7, 7], [0, 5]), np.array([[1], [2]], np.int32))
    target.push_clicks(Arrivals.of([7, 7], [6, 8]))
    examples = target.drain()
    assert examples.label.tolist() == [1]
    assert examples.ids.tolist() == [[1]]
    counts = target.counts()
    assert counts["impressions_duplicate"] == 1
    assert counts["clicks_duplicate"] == 1
    assert counts["clicks_joined"] == 1


def test_an_impression_repeated_after_it_left_is_not_trained_twice() -> None:
    target = LabelJoiner(fields=1, label_window_ms=WINDOW)
    target.push_impressions(Arrivals.of([7], [0]), no_features(1))
    assert len(target.advance(WINDOW + 1)) == 1
    target.push_impressions(Arrivals.of([7], [200]), no_features(1), limit=np.array([200]))
    assert len(target.drain()) == 0
    assert target.counts()["impressions_duplicate"] == 1


def test_an_id_is_free_again_after_the_duplicate_horizon_and_so_is_its_memory() -> None:
    target = LabelJoiner(fields=1, label_window_ms=10, duplicate_horizon_ms=1000)
    for start in range(0, 200_000, 1000):
        ids = np.arange(start, start + 1000)
        impressions = Arrivals.of(ids.tolist(), ids.tolist())
        target.push_impressions(impressions, no_features(1000), limit=ids)
        target.advance(start + 1000)
    assert target.nbytes < 1_000_000
    target.push_impressions(Arrivals.of([5], [200_001]), no_features(1))
    assert target.counts()["impressions_duplicate"] == 0


def test_an_impression_is_new_one_millisecond_beyond_the_duplicate_horizon() -> None:
    """The horizon counts from the event before, not from the last purge of the index."""
    for elapsed, duplicates in ((1000, 1), (1001, 0)):
        target = LabelJoiner(fields=1, label_window_ms=10, duplicate_horizon_ms=1000)
        target.push_impressions(Arrivals.of([5], [0]), no_features(1))
        target.push_impressions(Arrivals.of([5], [elapsed]), no_features(1))
        assert target.counts()["impressions_duplicate"] == duplicates
        assert target.drain().time.tolist() == ([0] if duplicates else [0, elapsed])


def test_the_window_curve_is_the_share_of_clicks_that_each_window_would_lose() -> None:
    target = LabelJoiner(fields=1, label_window_ms=20_000, duplicate_horizon_ms=10**7)
    n = 100
    ids = list(range(1, n + 1))
    target.push_impressions(Arrivals.of(ids, [0] * n), no_features(n))
    delays = np.arange(1, n + 1) * 300  # 0.3 s to 30 s: those over 20 s are late
    target.push_clicks(Arrivals.of(ids, delays.tolist()), limit=np.zeros(n, np.int64))
    curve = {point["window_seconds"]: point["lost_share"] for point in target.window_curve()}
    for window in (1, 2, 5, 10, 20, 30):
        assert curve[window] == pytest.approx((delays > window * 1000).mean())
    assert target.click_coverage == pytest.approx((delays <= 20_000).mean())
    # As many clicks again find no impression, and would find none with any window.
    target.push_clicks(Arrivals.of([1000 + n for n in ids], delays.tolist()))
    target.drain()
    curve = {point["window_seconds"]: point["lost_share"] for point in target.window_curve()}
    for window in (1, 20, 30):
        assert curve[window] == pytest.approx(0.5 + 0.5 * (delays > window * 1000).mean())


def test_the_window_curve_is_1_when_no_click_finds_its_impression() -> None:
    target = LabelJoiner(fields=1, label_window_ms=20_000)
    assert target.window_curve() == []
    target.push_clicks(Arrivals.of([5], [0]))
    target.drain()
    assert {point["lost_share"] for point in target.window_curve()} == {1.0}


def test_a_pending_impression_of_39_fields_takes_about_200_bytes() -> None:
    target = LabelJoiner(fields=39, label_window_ms=10**9, duplicate_horizon_ms=10**9)
    n = 100_000
    numbers = list(range(1, n + 1))
    target.push_impressions(Arrivals.of(numbers, numbers), np.zeros((n, 39), np.int32))
    # Without the place on the stack of free rows, four bytes each.
    columns = [*target._pending.rows.columns, *target._pending.features.columns]
    assert sum(array[:1].nbytes for array in columns) <= 215
    assert target.pending == n
    assert target.nbytes / n < 300  # with the index and room to grow


def test_a_watermark_never_goes_back() -> None:
    target = joiner()
    target.advance(500)
    target.advance(100)
    assert target.watermark == 500


def test_a_click_waits_for_an_impression_that_is_out_of_order_but_not_late() -> None:
    target = joiner()
    marks = Watermarks(partitions=1, lateness_ms=LATENESS)
    later = Event("click", 8, 1000 + LATENESS + EARLY + 20)
    push(target, marks, [(0, 0, Event("click", 7, 1000)), (0, 1, later)])
    # Past click 7 and its early wait, but not past the window of an impression at 990.
    target.advance(marks.overall(excused=np.array([False])))
    push(target, marks, [(0, 2, Event("impression", 7, 990))])
    assert target.drain().label.tolist() == [1]


@pytest.mark.parametrize(("beyond", "unmatched"), [(0, 0), (1, 1)])
def test_a_waiting_click_is_kept_until_no_impression_can_want_it(
    beyond: int, unmatched: int
) -> None:
    target = joiner()
    target.push_clicks(Arrivals.of([7], [1000]))
    watermark = 1000 + EARLY + WINDOW + beyond
    target.advance(watermark)
    assert target.counts()["clicks_unmatched"] == unmatched
    # The oldest impression that is not late has a window that ends at the watermark.
    push_impressions(target, np.array([7]), watermark - WINDOW)
    assert target.drain().label.tolist() == [1 - unmatched]


def test_a_jump_of_the_watermark_releases_examples_in_parts_and_in_order() -> None:
    n = 200_000
    target = bounded(1 << 28, label_window_ms=1000)
    push_impressions(target, np.arange(n), np.random.default_rng(0).permutation(n))
    parts = release(target.advance, n + 2000, at_most=3000)
    assert np.array_equal(Examples.concat(parts).time, np.arange(n))
    assert sorted(map(len, parts))[3] > 1000  # nearly all parts are of some size


def test_a_click_between_two_parts_of_a_jump_is_late() -> None:
    target = joiner()
    push_impressions(target, np.array([7, 8]), 0)
    assert len(target.advance(WINDOW + 1, at_most=1)) == 1
    target.push_clicks(Arrivals.of([8], [WINDOW + 1]))
    assert target.advance(WINDOW + 1, at_most=1).label.tolist() == [0]
    assert target.counts()["clicks_late"] == 1


# -- whole polls ---------------------------------------------------------------------------------


def arrivals(events: Sequence[Event]) -> Arrivals:
    columns = Arrivals.of([e.id for e in events], [e.time for e in events])
    return replace(columns, partition=np.array([e.partition for e in events], np.int32))


def batch(*events: Event) -> EventBatch:
    """Return the batch of a poll in which these events arrived in this order."""
    shown = [event for event in events if event.kind == "impression"]
    clicked = [event for event in events if event.kind == "click"]
    index = {id(event): number for number, event in enumerate([*shown, *clicked])}
    n = len(shown)
    return EventBatch(
        records=len(events),
        impressions=arrivals(shown),
        ids=no_features(n),
        values=np.zeros((n, 0), np.float32),
        true_probability=np.full(n, np.nan),
        clicks=arrivals(clicked),
        arrival=np.array([index[id(event)] for event in events], np.int64),
        rejected=Rejected(np.zeros(0, np.int32), np.zeros(0, np.int64), [], [], [], []),
        with_fields=frozenset(),
        with_unknown_fields=0,
        bad_shares=None,
    )


def late(target: LabelJoiner) -> tuple[int, int]:
    """Return the numbers of late impressions and clicks."""
    return target.counts()["impressions_late"], target.counts()["clicks_late"]


def one_second(*, fields: int = 1, value_fields: int = 0) -> LabelJoiner:
    return LabelJoiner(fields=fields, value_fields=value_fields, label_window_ms=1000)


def pushed(*events: Event, partitions: int = 1) -> LabelJoiner:
    target = one_second()
    target.push(batch(*events), Watermarks(partitions=partitions, lateness_ms=0))
    return target


def test_an_event_is_late_only_when_its_partition_passed_the_window_before_it_arrived() -> None:
    impression = Event("impression", 1, 0)
    click = Event("click", 1, 500)
    far_later = Event("impression", 2, 5000)
    assert late(pushed(impression, click, far_later)) == (0, 0)
    assert late(pushed(impression, far_later, click)) == (0, 1)
    assert late(pushed(far_later, impression)) == (1, 0)


def test_another_partition_that_is_further_makes_nothing_late() -> None:
    impression = Event("impression", 1, 0)
    clicked = pushed(
        Event("impression", 2, 5000, 1), impression, Event("click", 1, 500), partitions=2
    )
    assert late(clicked) == (0, 0)
    shown = pushed(Event("click", 9, 5000, 1), impression, Event("impression", 2, 10), partitions=2)
    assert late(shown) == (0, 0)


def test_an_event_behind_the_windows_already_closed_is_late_in_any_partition() -> None:
    """The second partition was excused as idle, so the watermark went on without it."""
    target = one_second()
    watermarks = Watermarks(partitions=2, lateness_ms=0)
    target.push(batch(Event("impression", 1, 0), Event("impression", 2, 5000)), watermarks)
    closed = target.advance(watermarks.overall(excused=np.array([False, True])))
    assert closed.time.tolist() == [0]
    behind = batch(Event("impression", 3, 100, 1), Event("impression", 4, 4500, 1))
    target.push(behind, watermarks)
    assert late(target) == (1, 0)
    assert target.drain().time.tolist() == [4500, 5000]


def test_a_click_behind_the_windows_already_closed_is_late_in_any_partition() -> None:
    target = one_second()
    watermarks = Watermarks(partitions=2, lateness_ms=0)
    target.push(batch(Event("impression", 1, 3900), Event("impression", 2, 5000)), watermarks)
    target.advance(watermarks.overall(excused=np.array([False, True])), at_most=0)
    target.push(batch(Event("click", 1, 4000, 1)), watermarks)
    assert late(target) == (0, 1)
    assert target.drain().label.tolist() == [0, 0]


def test_an_impression_keeps_its_own_ids_values_and_true_probability() -> None:
    target = one_second(fields=2, value_fields=1)
    ids = np.array([[3, 4], [5, 6]], np.int32)
    values = np.array([[0.5], [0.25]], np.float32)
    truth = np.array([0.125, 0.75])
    events = batch(Event("impression", 1, 10), Event("click", 2, 20), Event("impression", 2, 20))
    events = replace(events, ids=ids, values=values, true_probability=truth)
    target.push(events, Watermarks(partitions=1, lateness_ms=0))
    examples = target.drain()
    assert examples.ids.tolist() == ids.tolist()
    assert examples.values.tolist() == values.tolist()
    assert examples.true_probability.tolist() == truth.tolist()
    assert examples.label.tolist() == [0, 1]


# -- state ---------------------------------------------------------------------------------------


def test_a_state_without_spilling_names_no_files() -> None:
    target = joiner()
    push_impressions(target, np.array([1, 2]), 0)
    assert target.segments() == {}
    optional = ("place", "segments", "evicted")
    assert not [name for name in target.state_dict() if any(part in name for part in optional)]


def test_the_arrays_of_a_state_have_the_names_and_types_of_the_format() -> None:
    """A snapshot stores them under these names; another version of the code reads them."""
    target = joiner()
    push_impressions(target, np.array([1, 2]), np.array([0, 60]))
    target.push_clicks(Arrivals.of([9], [50]))
    target.advance(WINDOW + 1)
    assert {name: array.dtype.name for name, array in target.state_dict().items()} == {
        "pending.id_hash": "uint64",
        "pending.time": "int64",
        "pending.partition": "int32",
        "pending.offset": "int64",
        "pending.click": "int64",
        "pending.delay": "int32",
        "pending.truth": "float64",
        "pending.ids": "uint8",
        "pending.values": "float32",
        "known.key": "uint64",
        "known.time": "int64",
        "clicks.key": "uint64",
        "clicks.time": "int64",
        "clicks.limit": "int64",
        "counters": "int64",
        "delays": "int64",
        "watermark": "int64",
    }


def test_a_state_saved_before_the_bound_had_counters_loads() -> None:
    target = joiner()
    push_impressions(target, np.array([1, 2]), 0)
    state = target.state_dict()
    older = joiner()
    older.load_state_dict({**state, "counters": state["counters"][:9]})
    assert older.counts() == target.counts()
    assert rows_of(release(older.drain)) == [(0, 0, 1, 0), (0, 1, 2, 0)]
