"""The containers of the join state: the id index and the waiting clicks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.joins import bounded, capacity, push_clicks, push_impressions

from stream_ctr.join.join_arrays import IdIndex, WaitingClicks, pending_pool
from stream_ctr.join.join_state import LEFT


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sets(st.integers(0, 300), min_size=1, max_size=60), st.integers(0, 100)),
        max_size=8,
    ),
    st.integers(0, 9),
    st.integers(0, 100),
)
@pytest.mark.slow
def test_the_index_finds_every_id_however_it_grew_and_was_purged(
    steps: list[tuple[set[int], int]], near_the_end: int, before: int
) -> None:
    """All ids belong to the last positions of the table, so that they run past its end."""
    index = IdIndex(1 << 16)
    index._clear(8)
    truth: dict[int, int] = {}
    for ids, time in steps:
        keys = {key * 1024 + 1023 - key % (near_the_end + 1) for key in ids} - truth.keys()
        truth |= dict.fromkeys(keys, time)
        index.fill(
            np.array(sorted(keys), np.uint64),
            np.full(len(keys), time),
            np.full(len(keys), LEFT, np.int32),
        )
    index._purge(before)
    truth = {key: time for key, time in truth.items() if time >= before}
    state = index.state_dict(since=0)
    assert dict(zip(state["key"].tolist(), state["time"].tolist(), strict=True)) == truth
    assert index.entries == len(truth)
    again = np.array(sorted(truth), np.uint64)
    index.fill(again, np.full(len(truth), 7), np.zeros(len(truth), np.int32))
    assert index.entries == len(truth)  # each id was found, and none is there twice


def test_the_index_forgets_the_oldest_ids_first_and_counts_them() -> None:
    with capacity(features=100, index=256):  # room for 170 ids
        target = bounded(
            1 << 20, label_window_ms=10, early_click_wait_ms=0, duplicate_horizon_ms=10**6
        )
        for start in range(0, 400, 20):
            push_impressions(target, np.arange(start, start + 20), np.arange(start, start + 20))
            target.advance(start + 31)
    forgotten = target.counts()["ids_forgotten_early"]
    assert 400 - 170 <= forgotten <= 400 - 140
    push_impressions(target, np.arange(forgotten, 400), 420)
    assert target.counts()["impressions_duplicate"] == 400 - forgotten
    push_impressions(target, np.arange(forgotten - 20, forgotten), 420)
    assert target.counts()["impressions_duplicate"] == 400 - forgotten


def full_index() -> IdIndex:
    """Return an index that has no room for more than its ten ids, of the times 0 to 9."""
    index = IdIndex(16)
    index.fill(np.arange(10, dtype=np.uint64), np.arange(10), np.full(10, LEFT, np.int32))
    return index


def test_ids_beyond_the_horizon_make_room_and_are_not_counted_as_forgotten_early() -> None:
    index = full_index()
    assert index.reserve(4, horizon_start=6) == 0
    assert index.state_dict(since=0)["time"].tolist() == [6, 7, 8, 9]


def test_ids_within_the_horizon_that_make_room_are_counted_as_forgotten_early() -> None:
    index = full_index()
    assert index.reserve(8, horizon_start=6) == 3  # of the four that the horizon has left
    assert index.state_dict(since=0)["time"].tolist() == [9]


def test_the_oldest_of_too_many_waiting_clicks_are_dropped() -> None:
    with capacity(features=100, clicks=40):
        target = bounded(1 << 20)
        push_clicks(target, np.arange(100), np.arange(100))
        push_impressions(target, np.arange(100), np.arange(100))
    dropped = target.counts()["clicks_evicted"]
    assert 60 <= dropped < 80
    assert target.drain().label.tolist() == [0] * dropped + [1] * (100 - dropped)


def test_waiting_clicks_expire_one_millisecond_before_the_bound() -> None:
    waiting = WaitingClicks(10)
    key = np.arange(3, dtype=np.uint64)
    waiting.fill({"key": key, "time": np.array([9, 10, 11]), "limit": np.zeros(3, np.int64)})
    assert waiting.expire(before=10) == 1
    assert waiting.count == 2
    assert waiting.state_dict()["time"].tolist() == [10, 11]


def test_a_released_row_is_used_again_before_the_pool_grows() -> None:
    pool = pending_pool()
    pool.reserve(3, limit=100)
    pool.arrays.sizes[0] = 3
    assert (pool.used, pool.count) == (3, 3)
    pool.release(np.array([1]))
    assert (pool.used, pool.count) == (3, 2)
    assert pool.arrays.free[0] == 1
    capacity_before = pool.capacity
    pool.reserve(capacity_before - 2, limit=capacity_before)
    assert pool.capacity == capacity_before
