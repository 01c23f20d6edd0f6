"""The joiner against a brute-force reading of its definition, whatever the order in which partitions are polled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_ctr.join import Arrivals, Examples, LabelJoiner, Ledger
from stream_ctr.watermark import NOT_YET, Watermarks

WINDOW, EARLY, LATENESS = 100, 20, 30


@dataclass(frozen=True)
class Event:
    kind: str
    id: int
    time: int


Log = Sequence[Sequence[Event]]  # by partition, in offset order


def limits(partition: Sequence[Event]) -> list[int]:
    return [max(e.time for e in partition[: at + 1]) - LATENESS for at in range(len(partition))]


def expected(log: Log) -> list[tuple[int, int, int, int, int]]:
    """(time, partition, offset, id, label) by the definition alone."""
    rows = [(e, p, o, limit) for p, events in enumerate(log) for o, (e, limit) in enumerate(zip(events, limits(events), strict=True))]
    impressions: dict[int, tuple[int, int, int]] = {}
    for e, p, o, limit in rows:
        if e.kind == "impression" and limit <= e.time + WINDOW:
            impressions[e.id] = min(impressions.get(e.id, (1 << 60, 0, 0)), (e.time, p, o))
    examples = []
    for name, (t, p, o) in impressions.items():
        label = any(
            e.kind == "click" and e.id == name and t - EARLY <= e.time <= t + WINDOW and limit <= t + WINDOW for e, _, _, limit in rows
        )
        examples.append((t, p, o, name, int(label)))
    return sorted(examples)


def joiner() -> LabelJoiner:
    return LabelJoiner(fields=1, label_window_ms=WINDOW, early_click_wait_ms=EARLY, duplicate_horizon_ms=10_000)


def push(target: LabelJoiner, marks: Watermarks, chunk: Sequence[tuple[int, int, Event]]) -> None:
    """A poll: (partition, offset, event) in order of arrival."""
    partition = np.array([p for p, _, _ in chunk], np.int32)
    offset = np.array([o for _, o, _ in chunk], np.int64)
    time = np.array([e.time for _, _, e in chunk], np.int64)
    limit = marks.observe(partition, time)
    ids = np.array([e.id for _, _, e in chunk], np.uint64)
    impression = np.array([e.kind == "impression" for _, _, e in chunk])

    def some(rows: np.ndarray) -> Arrivals:
        return Arrivals(ids[rows], time[rows], partition[rows], offset[rows], limit[rows])

    target.push_impressions(some(impression), ids[impression].astype(np.int32)[:, None])
    target.push_clicks(some(~impression))


def run(log: Log, polls: Iterator[list[tuple[int, int, Event]]], *, restart: bool = False) -> tuple[list[Examples], LabelJoiner]:
    target, marks = joiner(), Watermarks(partitions=len(log), lateness_ms=LATENESS)
    left = np.array([len(events) for events in log])
    out = []
    for chunk in polls:
        push(target, marks, chunk)
        for p, _, _ in chunk:
            left[p] -= 1
        out.append(target.advance(marks.overall(excused=left == 0)))
        if restart:
            fresh = joiner()
            fresh.load_state_dict(target.state_dict())
            target = fresh
    out.append(target.drain())
    return out, target


def rows_of(parts: Sequence[Examples]) -> list[tuple[int, int, int]]:
    whole = Examples.concat(parts)
    return list(zip(whole.time.tolist(), whole.id_hash.tolist(), whole.label.tolist(), strict=True))


@st.composite
def logs(draw: st.DrawFn) -> Log:
    event = st.builds(Event, st.sampled_from(["impression", "click"]), st.integers(1, 12), st.integers(0, 600))
    partitions = draw(st.lists(st.lists(event, max_size=25), min_size=1, max_size=3))
    ordered = draw(st.booleans())
    return [sorted(events, key=lambda e: e.time + e.id % 7 * 8) if ordered else events for events in partitions]


@st.composite
def logs_with_polls(draw: st.DrawFn) -> tuple[Log, list[list[tuple[int, int, Event]]]]:
    """A log and one way to poll it: partitions interleaved at random, in chunks of random sizes."""
    log = draw(logs())
    turns = draw(st.permutations([p for p, events in enumerate(log) for _ in events]))
    at = [0] * len(log)
    arrivals = []
    for p in turns:
        arrivals.append((p, at[p], log[p][at[p]]))
        at[p] += 1
    size = draw(st.integers(1, 9))
    return log, [arrivals[start : start + size] for start in range(0, len(arrivals), size)]


@settings(max_examples=400, deadline=None)
@given(logs_with_polls())
def test_examples_are_what_the_definition_says_for_every_interleaving_of_polls(case):
    log, polls = case
    parts, target = run(log, iter(polls))
    assert rows_of(parts) == [(t, name, label) for t, _, _, name, label in expected(log)]
    counts = target.counts()
    assert counts["clicks"] == sum(e.kind == "click" for events in log for e in events)
    assert counts["clicks"] == sum(counts[f"clicks_{fate}"] for fate in ("joined", "duplicate", "late", "unmatched"))
    assert counts["impressions"] == sum(counts[f"impressions_{fate}"] for fate in ("late", "duplicate")) + len(rows_of(parts))
    assert counts["clicks_joined"] == sum(label for _, _, label in rows_of(parts))


@settings(max_examples=150, deadline=None)
@given(logs_with_polls())
def test_a_restart_from_the_state_after_any_poll_changes_nothing(case):
    log, polls = case
    straight, a = run(log, iter(polls))
    restarted, b = run(log, iter(polls), restart=True)
    assert rows_of(straight) == rows_of(restarted)
    assert a.counts() == b.counts()
    assert np.array_equal(a.delays, b.delays)


@pytest.mark.parametrize(
    ("delay", "label", "late"),
    [(-EARLY - 1, 0, 0), (-EARLY, 1, 0), (0, 1, 0), (WINDOW - 1, 1, 0), (WINDOW, 1, 0), (WINDOW + 1, 0, 1)],
)
def test_both_ends_of_the_window_belong_to_it(delay, label, late):
    target = LabelJoiner(fields=1, label_window_ms=WINDOW, early_click_wait_ms=EARLY)
    never_late = np.array([NOT_YET])
    time = np.array([1000])
    one = np.array([7], np.uint64)
    target.push_impressions(Arrivals(one, time, np.zeros(1, np.int32), np.zeros(1, np.int64), never_late), np.zeros((1, 1), np.int32))
    target.push_clicks(Arrivals(one, time + delay, np.zeros(1, np.int32), np.ones(1, np.int64), never_late))
    assert target.advance(1000 + WINDOW).label.tolist() == []  # a click at the very end may still come
    assert target.advance(1000 + WINDOW + 1).label.tolist() == [label]
    assert target.counts()["clicks_late"] == late


def test_click_before_its_impression_still_counts():
    target = LabelJoiner(fields=1, label_window_ms=WINDOW, early_click_wait_ms=EARLY)
    target.push_clicks(Arrivals.of([7], [990]))
    target.push_impressions(Arrivals.of([7], [1000]), np.zeros((1, 1), np.int32))
    assert target.drain().label.tolist() == [1]
    assert target.counts()["clicks_early"] == 1


def test_a_second_click_and_a_second_impression_are_dropped_and_counted():
    target = joiner()
    target.push_impressions(Arrivals.of([7, 7], [0, 5]), np.array([[1], [2]], np.int32))
    target.push_clicks(Arrivals.of([7, 7], [6, 8]))
    examples = target.drain()
    assert (examples.label.tolist(), examples.ids.tolist()) == ([1], [[1]])
    counts = target.counts()
    assert (counts["impressions_duplicate"], counts["clicks_duplicate"], counts["clicks_joined"]) == (1, 1, 1)


def test_an_impression_repeated_after_it_left_is_not_trained_twice():
    target = joiner()
    target.push_impressions(Arrivals.of([7], [0]), np.zeros((1, 1), np.int32))
    assert len(target.advance(WINDOW + 1)) == 1
    again = Arrivals(np.array([7], np.uint64), np.array([200]), np.zeros(1, np.int32), np.array([9]), np.array([200]))
    target.push_impressions(again, np.zeros((1, 1), np.int32))
    assert len(target.drain()) == 0
    assert target.counts()["impressions_duplicate"] == 1


def test_an_id_comes_free_after_the_duplicate_horizon_and_its_memory_too():
    target = LabelJoiner(fields=1, label_window_ms=10, duplicate_horizon_ms=1000)
    for start in range(0, 200_000, 1000):
        ids = np.arange(start, start + 1000)
        target.push_impressions(Arrivals.of(ids.tolist(), ids.tolist()), np.zeros((1000, 1), np.int32))
        target.advance(start + 1000)
    assert target.nbytes < 1_000_000
    reused = Arrivals.of([5], [200_001])
    target.push_impressions(reused, np.zeros((1, 1), np.int32))
    assert target.counts()["impressions_duplicate"] == 0


def test_the_window_curve_says_what_each_window_would_lose():
    target = LabelJoiner(fields=1, label_window_ms=20_000, duplicate_horizon_ms=10**7)
    n = 100
    target.push_impressions(Arrivals.of(list(range(1, n + 1)), [0] * n), np.zeros((n, 1), np.int32))
    delays = np.arange(1, n + 1) * 300  # 0.3 s to 30 s: those over 20 s are late
    clicks = Arrivals(np.arange(1, n + 1).astype(np.uint64), delays, np.zeros(n, np.int32), np.arange(n), np.zeros(n, np.int64))
    target.push_clicks(clicks)
    curve = {point["window_seconds"]: point["lost_share"] for point in target.window_curve()}
    for window in (1, 2, 5, 10, 20, 30):
        assert curve[window] == pytest.approx((delays > window * 1000).mean())
    assert target.click_coverage == pytest.approx((delays <= 20_000).mean())


def test_a_pending_impression_of_39_fields_costs_about_200_bytes():
    target = LabelJoiner(fields=39, label_window_ms=10**9, duplicate_horizon_ms=10**9)
    n = 100_000
    target.push_impressions(Arrivals.of(list(range(1, n + 1)), list(range(n))), np.zeros((n, 39), np.int32))
    rows = sum(array[:1].nbytes for array in target._pending.arrays())
    assert rows <= 210
    assert target.pending == n
    assert target.nbytes / n < 300  # with the index and room to grow


def test_a_watermark_never_goes_back():
    target = joiner()
    target.advance(500)
    target.advance(100)
    assert target.watermark == 500


def test_the_ledger_is_free_of_order_and_tells_labels_apart():
    ids = np.arange(100, dtype=np.uint64)
    label = (ids % 3 == 0).astype(np.uint8)
    order = np.random.default_rng(0).permutation(100)
    parts = Ledger()
    for some in np.array_split(order, 7):
        parts = parts.add(ids[some], label[some])
    assert parts == Ledger().add(ids, label)
    assert parts.sum != Ledger().add(ids, 1 - label).sum
    assert parts.count == 100


def test_idle_partitions_do_not_hold_the_watermark_but_silent_ones_do():
    marks = Watermarks(partitions=3, lateness_ms=10)
    marks.observe(np.array([0, 1]), np.array([100, 500]))
    nobody = np.zeros(3, np.bool_)
    assert marks.overall(excused=nobody) <= NOT_YET
    assert marks.overall(excused=np.array([False, False, True])) == 90
    assert marks.overall(excused=np.array([True, False, True])) == 490
    assert marks.ahead(90, 300) == frozenset({1})


def test_a_click_waits_for_an_impression_that_is_out_of_order_but_not_late():
    target, marks = joiner(), Watermarks(partitions=1, lateness_ms=LATENESS)
    push(target, marks, [(0, 0, Event("click", 7, 1000)), (0, 1, Event("click", 8, 1000 + LATENESS + EARLY + 20))])
    target.advance(marks.overall(excused=np.array([False])))  # past click 7 and its early wait, not past the window of an impression at 990
    push(target, marks, [(0, 2, Event("impression", 7, 990))])
    assert target.drain().label.tolist() == [1]
