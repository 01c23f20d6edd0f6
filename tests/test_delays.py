"""Delays are counted from the times that a delta or a pointer gives."""

from __future__ import annotations

from pathlib import Path

from support.delta_runs import DeltaRun

from stream_ctr.snapshots.delays import BOUNDS, DelayHistogram, Delays


def test_a_delta_without_new_examples_has_the_age_of_its_copy_only(tmp_path: Path) -> None:
    run = DeltaRun(tmp_path)
    run.learn()
    run.snapshot()
    header = run.delta(closed=()).header
    delays = Delays.of_delta(header, header.created_ms + 1500)
    assert delays == Delays(
        event_seconds=None, closed_seconds=None, learned_seconds=None, copied_seconds=1.5
    )


def test_a_snapshot_has_the_ages_of_its_event_time_and_of_its_copy(tmp_path: Path) -> None:
    run = DeltaRun(tmp_path)
    run.learn()
    pointer = run.snapshot()
    delays = Delays.of_snapshot(pointer, pointer.created_ms + 250)
    assert delays.copied_seconds == 0.25
    assert delays.event_seconds == (pointer.created_ms + 250 - pointer.event_time_ms) / 1000
    assert delays.closed_seconds is None


def test_a_delay_is_counted_under_every_bound_that_it_does_not_exceed() -> None:
    histogram = DelayHistogram()
    for seconds in (-3.0, 0.1, 5.0, 5.001, 4000.0):
        histogram.observe(seconds, 2)
    counts = dict(histogram.cumulative())
    assert list(counts) == [*map(str, BOUNDS), "+Inf"]
    assert (counts["0.1"], counts["4.0"], counts["5.0"], counts["6.0"]) == (4, 4, 6, 8)
    assert (counts["3600.0"], counts["+Inf"]) == (8, 10)
    assert histogram.total_seconds == 2 * (0 + 0.1 + 5.0 + 5.001 + 4000.0)
