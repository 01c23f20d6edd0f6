"""Pending impressions whose features are spilled, evicted, or read back."""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.joins import (
    WINDOW,
    Log,
    Poll,
    Stream,
    bounded,
    capacity,
    features,
    joiner,
    logs_with_polls,
    push_clicks,
    push_impressions,
    release,
    restarted,
    rows_of,
    run,
    settled,
    without_spilling,
)

from stream_ctr.events.batch import Arrivals
from stream_ctr.events.features import mix64
from stream_ctr.join.examples import Examples
from stream_ctr.join.joiner import LabelJoiner


@pytest.mark.parametrize("id_bits", [1, 24, 25, 31])
def test_ids_of_any_width_are_unchanged_in_the_examples(id_bits: int) -> None:
    target = LabelJoiner(fields=3, label_window_ms=1, id_bits=id_bits)
    greatest = (1 << id_bits) - 1
    ids = np.array([[0, 1, greatest], [greatest, greatest // 3, greatest // 2]], np.int32)
    target.push_impressions(Arrivals.of([1, 2], [1, 2]), ids)
    assert np.array_equal(target.drain().ids, ids)


# -- on disk -------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(logs_with_polls(), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.booleans())
@pytest.mark.slow
def test_spilling_changes_no_example_no_label_no_order_and_no_other_counter(
    case: tuple[Log, list[Poll]], in_memory: int, segment_rows: int, at_most: int, restart: bool
) -> None:
    log, polls = case
    parts, free, seen = run(log, polls)
    with tempfile.TemporaryDirectory() as root, capacity(segment_rows, features=in_memory):
        spilled_parts, spilling, spilled_seen = run(
            log,
            polls,
            restart=restart,
            make=lambda: joiner(Path(tempfile.mkdtemp(dir=root))),
            at_most=at_most,
        )
        assert rows_of(spilled_parts) == rows_of(parts)
        assert list(map(without_spilling, spilled_seen)) == list(map(without_spilling, seen))
        assert np.array_equal(spilling.delays, free.delays)
        assert spilling.segments() == {}
        most_pending = max((counts["pending"] for counts in seen), default=0)
        if most_pending > in_memory:
            assert spilling.counts()["impressions_spilled"] > 0


def test_a_joiner_that_spills_gives_what_one_with_room_gives(tmp_path: Path) -> None:
    results = []
    for name, rows in (("free", {"features": 10**6}), ("spilling", {"features": 700})):
        with capacity(index=1 << 16, pending=1 << 15, clicks=10_000, segment_rows=500, **rows):
            target = bounded(1 << 20, tmp_path / name)
            stream = Stream(seed=5)
            parts: list[Examples] = []
            for step in range(40):
                parts += release(target.advance, stream.poll(target, 500), at_most=333)
                if step % 10 == 9:
                    target = restarted(target, bounded(1 << 20, tmp_path / f"{name}{step}"))
            parts += release(target.drain)
            results.append((rows_of(parts), settled(target, parts)))
    (free, free_counts), (spilled, spilled_counts) = results
    assert spilled == free
    assert spilled_counts["impressions_spilled"] > 5000
    assert without_spilling(spilled_counts) == without_spilling(free_counts)


def test_the_newest_impressions_are_the_ones_on_disk(tmp_path: Path) -> None:
    with capacity(features=8):
        target = joiner(tmp_path)
        push_impressions(target, np.arange(12), np.arange(12) * 5)
        state = target.state_dict()
    on_disk = state["pending.time"][state["pending.place"] < 0]
    in_memory = state["pending.time"][state["pending.place"] >= 0]
    # The last to arrive stay in memory until room is needed again.
    assert 0 < len(on_disk) < 12
    assert on_disk.min() > in_memory.min()


def test_an_earlier_impression_takes_the_place_of_one_on_disk(tmp_path: Path) -> None:
    with capacity(features=1):
        target = joiner(tmp_path)
        push_impressions(target, np.array([1, 2, 3]), np.array([10, 20, 30]))
        push_clicks(target, np.array([2]), 25)
        assert target.spilled == 2
        target.push_impressions(Arrivals.of([3], [5]), *features(np.array([77])))
        parts = release(target.drain)
    assert rows_of(parts) == [(5, 77, 3, 0), (10, 0, 1, 0), (20, 1, 2, 1)]
    assert target.counts()["impressions_duplicate"] == 1


def test_a_segment_is_deleted_once_none_of_its_impressions_is_on_disk(tmp_path: Path) -> None:
    target = joiner(tmp_path)
    push_impressions(target, np.array([1, 2]), np.array([10, 200]))
    assert target._pending.spill_newest(1) == 1
    assert len(target.segments()) == 1
    target.push_impressions(Arrivals.of([2], [190]), *features(np.array([77])))
    assert target.spilled == 0
    assert len(target.advance(10 + WINDOW + 1)) == 1
    assert target.segments() == {}
    assert rows_of(release(target.drain)) == [(190, 77, 2, 0)]


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """Let a write beyond `size` fail half way, as a disk quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_impressions_only_and_spilling_resumes_when_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Compile all code now: the compiler writes to a cache on disk, which has no room below.
    push_impressions(bounded(1 << 20, over_bound="evict"), np.arange(40_000), 0)
    target = bounded(1 << 20, tmp_path, label_window_ms=10**6)
    with no_file_longer_than(4096):
        for start in range(0, 40_000, 1000):
            numbers = np.arange(start, start + 1000)
            push_impressions(target, numbers, numbers)
        assert list(tmp_path.glob("*/*")) == []
    counts = target.counts()
    assert counts["impressions_spilled"] == 0
    assert counts["impressions_evicted"] == 40_000 - target.pending > 0
    assert sum("cannot be spilled to disk" in record.message for record in caplog.records) == 1
    push_impressions(target, np.arange(40_000, 60_000), np.arange(40_000, 60_000))
    assert target.counts()["impressions_spilled"] > 0
    settled(target, release(target.drain))


@pytest.mark.slow
def test_the_disk_does_not_fill_with_evicted_impressions(tmp_path: Path) -> None:
    target = bounded(1 << 20, tmp_path, label_window_ms=10**9)
    most = 0
    for start in range(0, 100_000, 1000):
        push_impressions(target, np.arange(start, start + 1000), np.arange(start, start + 1000))
        most = max(most, sum(size for _, _, size in target.segments().values()))
    assert target.counts()["impressions_evicted"] > 80_000
    # Twice the 8,192 that can be pending, and what has just been spilled.
    assert most < 3 << 20
    assert {path.name for path in tmp_path.glob("*/*")} == set(target.segments())


# -- evicted -------------------------------------------------------------------------------------


@pytest.mark.parametrize("over_bound", ["spill", "evict"])
def test_eviction_depends_on_neither_label_nor_time_nor_the_baselines_sample(
    over_bound: str, tmp_path: Path
) -> None:
    """Clicks come before the eviction: a choice that used them could prefer either label."""
    n = 30_000
    target = bounded(1 << 20, tmp_path, over_bound=over_bound, label_window_ms=10 * n)
    ids = mix64(np.arange(n, dtype=np.uint64))
    for rows in np.array_split(np.arange(n), 30):
        push_impressions(target, ids[rows], rows)
        clicked = rows[rows % 4 == 0]
        push_clicks(target, ids[clicked], clicked + 1)
    parts = release(target.drain)
    counts = settled(target, parts)
    kept = Examples.concat(parts)
    assert counts["impressions_evicted"] == n - len(kept) > n / 4
    assert np.array_equal(kept.label, kept.time % 4 == 0)
    assert counts["clicks_evicted"] == n / 4 - kept.label.sum()
    three_sigma = 1.5 / np.sqrt(len(kept))
    assert abs(kept.label.mean() - 1 / 4) < three_sigma
    assert abs((mix64(kept.id_hash) < 1 << 63).mean() - 1 / 2) < three_sigma
    assert kept.time[0] < n / 10
    assert kept.time[-1] > n * 9 / 10


def test_a_click_of_an_evicted_impression_is_not_late_also_after_a_restart() -> None:
    with capacity(features=10, pending=16):
        target = bounded(1 << 20, over_bound="evict")
        push_impressions(target, np.arange(30), 0)
        fresh = restarted(target, bounded(1 << 20, over_bound="evict"))
    for each in (target, fresh):
        evicted = each.counts()["impressions_evicted"]
        assert evicted == 30 - each.pending > 0
        push_clicks(each, np.arange(30), 5)
        counts = each.counts()
        assert counts["clicks_evicted"] == evicted
        assert counts["clicks_joined"] == 30 - evicted
        assert counts["clicks_late"] == 0
        push_impressions(each, np.arange(30), 6)
        assert each.counts()["impressions_duplicate"] == 30
