"""The containers of the join state: the id index and the waiting clicks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.joins import Stream, bounded, capacity, push_clicks, push_impressions, release
from support.reliability import Outcome

from stream_ctr.join import joiner
from stream_ctr.join.join_arrays import IdIndex, WaitingClicks, new_secret, pending_pool
from stream_ctr.join.join_state import EMPTY, LEFT, nth_time

# With this secret an id stands where its upper 32 bits say.
FORESEEN = np.array([0, 1, 1], np.uint64)


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
    index = IdIndex(1 << 16, FORESEEN)
    index._clear(8)
    truth: dict[int, int] = {}
    for ids, time in steps:
        ends = {key * 1024 + 1023 - key % (near_the_end + 1) for key in ids}
        keys = {end << 32 for end in ends} - truth.keys()
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


@given(
    st.lists(st.tuples(st.integers(0, 10**13), st.booleans()), min_size=1, max_size=50),
    st.integers(0, 49),
)
def test_the_nth_time_is_that_of_the_sorted_times_of_released_impressions(
    entries: list[tuple[int, bool]], n: int
) -> None:
    entries.append((5, True))
    time = np.array([time for time, _ in entries])
    slot = np.array([LEFT if left else 3 for _, left in entries], np.int32)
    times = sorted(time[slot == LEFT].tolist())
    n = min(n, len(times) - 1)
    assert nth_time(time, slot, n) == times[n]


def longest_cluster(index: IdIndex) -> int:
    """Return the longest run of taken positions: a look-up may go through all of them."""
    empty = np.flatnonzero(index.arrays.slot == EMPTY)
    return int(np.diff(empty, prepend=-1).max())


def longest_chain(waiting: WaitingClicks) -> int:
    heads = waiting.arrays.head[waiting.arrays.head != EMPTY].tolist()
    after = waiting.arrays.next.tolist()
    lengths = []
    for row in heads:
        length = 0
        while row != EMPTY:
            row, length = after[row], length + 1
        lengths.append(length)
    return max(lengths)


N = 20_000
# Ids whose hashes are alike where a table without a secret would take positions from.
CRAFTED = {
    "equal halves": np.arange(1, N + 1, dtype=np.uint64) * np.uint64((1 << 32) + 1),
    "equal low bits": np.arange(1, N + 1, dtype=np.uint64) << np.uint64(44),
    "equal high bits": np.arange(1, N + 1, dtype=np.uint64),
    "one position with another secret": np.arange(1, N + 1, dtype=np.uint64)
    * np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64)),
}


@pytest.mark.security(
    "a producer cannot slow the join by its choice of ids",
    how="20,000 impressions and 20,000 clicks of ids that are crafted to stand in one place",
)
@pytest.mark.parametrize("crafted", CRAFTED)
def test_crafted_ids_are_spread_as_others_are(crafted: str, outcome: Outcome) -> None:
    keys = CRAFTED[crafted]
    index = IdIndex(1 << 20, new_secret())
    index.fill(keys, np.zeros(N, np.int64), np.full(N, LEFT, np.int32))
    waiting = WaitingClicks(N, new_secret())
    waiting.fill({"key": keys, "time": np.zeros(N, np.int64), "limit": np.zeros(N, np.int64)})
    assert longest_cluster(index) < 300
    assert longest_chain(waiting) < 30
    outcome("a look-up goes through fewer than 300 entries, with a secret for each process")


def test_without_the_secret_the_same_ids_stand_in_one_place() -> None:
    index = IdIndex(1 << 20, FORESEEN)
    keys = CRAFTED["equal low bits"] >> np.uint64(44)  # all below 2^32
    index.fill(keys, np.zeros(N, np.int64), np.full(N, LEFT, np.int32))
    assert longest_cluster(index) > N


def test_every_joiner_has_a_secret_of_its_own() -> None:
    secrets = {tuple(new_secret().tolist()) for _ in range(10)}
    assert len(secrets) == 10
    assert all(secret[1] % 2 and secret[2] % 2 for secret in secrets)
    a, b = bounded(1 << 20), bounded(1 << 20)
    assert (a._index.arrays.secret != b._index.arrays.secret).any()


@pytest.mark.parametrize("over_bound", ["spill", "evict"])
def test_nothing_but_the_positions_depends_on_the_secret(over_bound: str, tmp_path: Path) -> None:
    with capacity(features=60, index=256, clicks=60, segment_rows=16):
        states: list[dict[str, Any]] = []
        for secret in (FORESEEN, new_secret(), new_secret()):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(joiner, "new_secret", lambda secret=secret: secret)
                target = bounded(1 << 20, tmp_path / str(len(states)), over_bound=over_bound)
            stream = Stream(seed=3)
            for _ in range(60):
                watermark = stream.poll(target, 40)
                release(target.advance, watermark)
            states.append(target.state_dict())
    counts = target.counts()
    assert counts["ids_forgotten_early"]
    assert counts["clicks_evicted"]
    assert counts["impressions_evicted"]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        for name, array in state.items():
            assert np.array_equal(array, states[0][name]), name


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
    index = IdIndex(16, new_secret())
    index.fill(np.arange(10, dtype=np.uint64), np.arange(10), np.full(10, LEFT, np.int32))
    return index


def test_ids_beyond_the_horizon_make_room_and_are_not_counted_as_forgotten_early() -> None:
    index = full_index()
    assert index.reserve(4, horizon_start=6) == 0
    assert index.state_dict(since=0)["time"].tolist() == [6, 7, 8, 9]


def test_ids_within_the_horizon_that_make_room_are_counted_as_forgotten_early() -> None:
    index = full_index()
    assert index.reserve(8, horizon_start=6) == 2  # of the four that the horizon has left
    assert index.state_dict(since=0)["time"].tolist() == [8, 9]


def test_the_oldest_of_too_many_waiting_clicks_are_dropped() -> None:
    with capacity(features=100, clicks=40):
        target = bounded(1 << 20)
        push_clicks(target, np.arange(100), np.arange(100))
        push_impressions(target, np.arange(100), np.arange(100))
    dropped = target.counts()["clicks_evicted"]
    assert 60 <= dropped < 80
    assert target.drain().label.tolist() == [0] * dropped + [1] * (100 - dropped)


def test_waiting_clicks_expire_one_millisecond_before_the_bound() -> None:
    waiting = WaitingClicks(10, new_secret())
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
