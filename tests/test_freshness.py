"""Ages at each stage: percentiles against sorted ages, and examples that are counted once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_ctr.evaluate.freshness import STAGES, AgeHistogram, Freshness, Moments

MONTH_MS = 30 * 86_400_000


def times(*moments: int) -> np.ndarray:
    return np.array(moments, np.int64)


@given(st.lists(st.integers(1, MONTH_MS), min_size=1, max_size=300))
def test_percentiles_are_within_five_percent_of_those_of_the_sorted_ages(ages: list[int]) -> None:
    histogram = AgeHistogram()
    histogram.add(times(*ages))
    found = histogram.percentiles()
    assert found
    assert found.examples == len(ages)
    for share, seconds in ((0.5, found.p50), (0.9, found.p90), (0.99, found.p99)):
        exact = sorted(ages)[int(np.ceil(share * len(ages))) - 1] / 1000
        assert seconds == pytest.approx(exact, rel=0.05, abs=0.0001)


def test_an_age_counts_as_often_as_examples_have_it() -> None:
    weighted, plain = AgeHistogram(), AgeHistogram()
    weighted.add(times(10, 1000), times(3, 1))
    plain.add(times(10, 10, 10, 1000))
    assert weighted.counts.tolist() == plain.counts.tolist()


def test_ages_beyond_the_bounds_are_counted_at_the_bounds() -> None:
    histogram = AgeHistogram()
    histogram.add(times(-5, 0, 10 * MONTH_MS))
    assert histogram.counts[0] == 2
    assert histogram.counts[-1] == 1


def test_nothing_has_no_percentiles() -> None:
    assert AgeHistogram().percentiles() is None
    assert Freshness().percentiles(whole=True) == {}


@given(st.lists(st.lists(st.integers(0, 10**7), max_size=200), max_size=40), st.integers(1, 64))
def test_moments_keep_every_example_and_the_mean_of_their_times(
    batches: list[list[int]], most: int
) -> None:
    moments = Moments()
    for batch in batches:
        moments.add(times(*batch))
    at, counts = moments.points(most)
    everything = [time for batch in batches for time in batch]
    assert len(at) <= most
    assert len(moments) == counts.sum() == len(everything)
    if everything:
        assert min(everything) <= at[0] <= at[-1] <= max(everything)
        assert (at * counts).sum() / counts.sum() == pytest.approx(
            np.mean(everything), abs=2 + 1e-6 * 10**7
        )


def test_moments_take_little_memory_however_many_examples_there_are() -> None:
    moments = Moments()
    for start in range(0, 2_000_000, 1000):
        moments.add(np.arange(start, start + 1000))
    assert len(moments) == 2_000_000
    assert len(moments.points()[0]) <= 1024


def test_an_example_is_counted_once_at_each_stage() -> None:
    freshness = Freshness()
    freshness.close(times(1000, 1500, 2000), now_ms=10_000)
    freshness.close(times(2500), now_ms=11_000)
    freshness.learn(2, times(1000, 1500), now_ms=12_000)
    first = freshness.take()
    freshness.learn(2, times(2000, 2500), now_ms=13_000)
    freshness.publish(first, now_ms=15_000)
    freshness.publish(freshness.take(), now_ms=20_000)
    found = freshness.percentiles(whole=True)
    assert {stage: ages.examples for stage, ages in found.items()} == dict.fromkeys(STAGES, 4)
    assert found["closed_to_learned"].p50 == pytest.approx(2, rel=0.05)
    assert found["closed_to_published"].p50 == pytest.approx(5, rel=0.05)
    assert found["closed_to_published"].p99 == pytest.approx(10, rel=0.05)
    assert found["event_to_published"].p99 == pytest.approx(18, rel=0.05)
    assert len(freshness.take().closed) == 0


def test_what_was_not_published_is_published_with_what_follows() -> None:
    freshness = Freshness()
    freshness.close(times(1000, 5000), now_ms=10_000)
    freshness.learn(1, times(1000), now_ms=10_100)
    refused = freshness.take()
    freshness.learn(1, times(5000), now_ms=10_200)
    freshness.put_back(refused)
    taken = freshness.take()
    assert (taken.oldest_event_ms, taken.newest_event_ms) == (1000, 5000)
    assert taken.learned_ms == 10_200
    assert taken.closed.points()[1].sum() == 2


def test_examples_whose_windows_an_earlier_process_closed_have_no_age_since_then() -> None:
    freshness = Freshness()
    freshness.resume(3)
    freshness.close(times(7000), now_ms=60_000)
    freshness.learn(4, times(1000, 2000, 3000, 7000), now_ms=61_000)
    freshness.publish(freshness.take(), now_ms=62_000)
    found = freshness.percentiles(whole=True)
    assert found["closed_to_learned"].examples == 1
    assert found["closed_to_published"].examples == 1
    assert found["event_to_published"].examples == 4


def test_a_batch_that_no_model_learned_is_passed_over() -> None:
    freshness = Freshness()
    freshness.close(times(1000, 2000), now_ms=10_000)
    freshness.learn(1, None, now_ms=11_000)
    freshness.learn(1, times(2000), now_ms=12_000)
    assert freshness.percentiles(whole=True)["closed_to_learned"].examples == 1
    assert freshness.take().oldest_event_ms == 2000


def test_past_events_have_no_age_since_the_event() -> None:
    freshness = Freshness(past_events=True)
    freshness.close(times(1000), now_ms=10_000)
    freshness.learn(1, times(1000), now_ms=11_000)
    freshness.publish(freshness.take(), now_ms=12_000)
    assert set(freshness.percentiles(whole=True)) == {"closed_to_learned", "closed_to_published"}


def test_recent_ages_are_those_of_the_last_six_intervals() -> None:
    freshness = Freshness()
    freshness.close(times(1000), now_ms=2000)
    for _ in range(5):
        freshness.end_interval()
    assert freshness.percentiles(whole=False)["event_to_closed"].examples == 1
    freshness.end_interval()
    assert freshness.percentiles(whole=False) == {}
    assert freshness.percentiles(whole=True)["event_to_closed"].examples == 1
