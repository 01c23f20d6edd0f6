"""The memory bound: it holds after every call, and every event over it is counted."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.joins import (
    Stream,
    bounded,
    push_clicks,
    push_impressions,
    release,
    restarted,
    rows_of,
    settled,
)
from support.reliability import Outcome

from stream_ctr.config import load, size
from stream_ctr.events.features import mix64
from stream_ctr.join.capacity import Capacity, OverBound
from stream_ctr.join.examples import Examples
from stream_ctr.join.join_arrays import IdIndex, WaitingClicks, feature_pool, pending_pool
from stream_ctr.join.joiner import LabelJoiner


@pytest.mark.parametrize("over_bound", ["spill", "evict"])
@pytest.mark.parametrize("max_bytes", [1 << 20, 10**7, 1 << 30])
def test_the_rows_of_a_capacity_fill_the_bound_and_do_not_exceed_it(
    max_bytes: int, over_bound: OverBound
) -> None:
    features = feature_pool(39, 1, 3)
    rows = Capacity.of(
        max_bytes, columns=40, feature_bytes=features.row_bytes, over_bound=over_bound
    )
    assert rows.index & (rows.index - 1) == 0
    assert rows.pending <= rows.index // 2
    taken = (
        rows.index * IdIndex.ENTRY_BYTES
        + rows.pending * pending_pool().row_bytes
        + rows.features * features.row_bytes
        + rows.clicks * WaitingClicks.ROW_BYTES
    )
    assert 0.7 * max_bytes < taken <= max_bytes


@pytest.mark.parametrize("over_bound", ["spill", "evict"])
@pytest.mark.parametrize("fields", [1, 39, 2000])
def test_the_events_pushed_at_once_take_at_most_a_quarter_of_any_container(
    fields: int, over_bound: OverBound
) -> None:
    feature_bytes = feature_pool(fields, 0, 4).row_bytes
    rows = Capacity.of(12 << 20, columns=fields, feature_bytes=feature_bytes, over_bound=over_bound)
    least = min(rows.ids // 4, rows.pending, rows.features, rows.clicks)
    assert rows.at_once == least // 4 > 0


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    polls=st.lists(st.sampled_from([0, 1, 100, 2000, 6000]), min_size=6, max_size=12),
    max_bytes=st.integers(1 << 20, 3 << 20),
    over_bound=st.sampled_from(["spill", "evict"]),
    window=st.sampled_from([500, 2000, 100_000]),
    horizon=st.sampled_from([0, 100_000]),
    restart=st.booleans(),
)
@pytest.mark.slow
def test_the_bound_holds_after_every_call_and_every_event_is_accounted_for(
    seed: int,
    polls: list[int],
    max_bytes: int,
    over_bound: str,
    window: int,
    horizon: int,
    restart: bool,
) -> None:
    with tempfile.TemporaryDirectory() as root:

        def make() -> LabelJoiner:
            return bounded(
                max_bytes,
                Path(tempfile.mkdtemp(dir=root)),
                over_bound=over_bound,
                label_window_ms=window,
                duplicate_horizon_ms=horizon,
            )

        target = make()
        stream = Stream(seed)
        parts: list[Examples] = []
        for n in polls:
            watermark = stream.poll(target, n)
            assert target.nbytes <= max_bytes
            parts += release(target.advance, watermark, at_most=2000)
            assert target.nbytes <= max_bytes
            if restart:
                target = restarted(target, make())
                assert target.nbytes <= max_bytes
        parts += release(target.drain)
        counts = settled(target, parts)
        assert target.segments() == {}
        assert counts["impressions_spilled"] == 0 or over_bound == "spill"
        rows = rows_of(parts)
        assert rows == sorted(rows, key=lambda row: row[0])


def test_the_bound_holds_when_everything_is_full_and_clicks_wait_as_well(tmp_path: Path) -> None:
    bound = 1 << 20
    target = bounded(bound, tmp_path, label_window_ms=10**9)
    for start in range(0, 20_000, 100):
        ids = np.arange(start, start + 100)
        push_impressions(target, ids, start)
        push_clicks(target, ids + 10**6, start)
        assert target.nbytes <= bound
    assert target.nbytes > 0.97 * bound
    assert target._clicks.capacity <= target._capacity.clicks


def test_state_saved_under_a_wide_bound_loads_under_a_narrow_one(tmp_path: Path) -> None:
    wide = bounded(1 << 28, tmp_path / "wide", label_window_ms=10**6)
    push_impressions(wide, np.arange(50_000), np.arange(50_000))
    released = release(wide.advance, 10**6 + 20_000)
    push_clicks(wide, np.arange(100_000, 110_000), np.arange(10_000) + 50_000)
    for over_bound in ("spill", "evict"):
        directory = tmp_path / over_bound
        narrow = restarted(
            wide, bounded(1 << 20, directory, label_window_ms=10**6, over_bound=over_bound)
        )
        assert narrow.nbytes <= 1 << 20
        assert narrow.pending + narrow.counts()["impressions_evicted"] == wide.pending
        assert (narrow.spilled > 0) == (over_bound == "spill")
        assert narrow.counts()["ids_forgotten_early"] > 0
        assert narrow.counts()["clicks_evicted"] > 0
        settled(narrow, released + release(narrow.drain))


@pytest.mark.parametrize(("over_bound", "bytes_each"), [("spill", 175), ("evict", 500)])
def test_the_room_within_the_bound_is_used(
    over_bound: str, bytes_each: int, tmp_path: Path
) -> None:
    """An impression of 40 columns takes 220 bytes in memory, with most on disk 110.

    Its entry in the index takes up to 60 more.
    """
    bound = 1 << 20
    target = bounded(bound, tmp_path, over_bound=over_bound, label_window_ms=10**9)
    push_impressions(target, mix64(np.arange(50_000, dtype=np.uint64)), 0)
    assert target.pending > bound / bytes_each


def test_a_bound_too_small_to_work_in_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 MiB are needed for 40 columns"):
        bounded(1000)
    with pytest.raises(ValueError, match="at least 10.4 MiB are needed for 2000 columns"):
        LabelJoiner(fields=2000, label_window_ms=1, max_bytes=1 << 20)


@pytest.mark.fault(
    25, injected="impressions only, ten label windows, one of them 16 times the bound of 1 MiB"
)
@pytest.mark.parametrize("over_bound", ["spill", "evict"])
def test_impressions_far_over_the_bound_stay_within_it_and_are_all_counted(
    over_bound: str, tmp_path: Path, outcome: Outcome
) -> None:
    window = 60_000
    bound = 1 << 20
    target = bounded(
        bound, tmp_path, label_window_ms=window, over_bound=over_bound, duplicate_horizon_ms=0
    )
    rng = np.random.default_rng(0)
    pushed = 0
    examples = 0
    for number in range(10):
        n = 100_000 if number == 4 else 3000
        times = np.sort(rng.integers(number * window, (number + 1) * window, n))
        for part in np.array_split(times, n // 1500):
            ids = mix64(np.arange(pushed, pushed + len(part), dtype=np.uint64))
            push_impressions(target, ids, part)
            assert target.nbytes <= bound
            pushed += len(part)
            examples += sum(map(len, release(target.advance, int(part[-1]))))
    examples += sum(map(len, release(target.drain)))
    counts = target.counts()
    assert counts["impressions"] == pushed == examples + counts["impressions_evicted"]
    assert (counts["impressions_spilled"] > 0) == (over_bound == "spill")
    assert list(tmp_path.glob("*/*")) == []
    outcome(f"{over_bound}: never over the bound; each impression trained or counted as evicted")


def test_the_default_bound_has_room_for_eight_million_pending_impressions() -> None:
    """As docs/reliability.md says."""
    bound = size(load(environ={}).join.max_memory)
    capacity = Capacity.of(bound, columns=14, feature_bytes=60, over_bound="spill")
    assert bound == 1_000_000_000
    assert 8_000_000 < capacity.pending < 9_000_000
