"""The columns of one poll."""

from __future__ import annotations

import numpy as np

from stream_ctr.events.batch import Arrivals, EventBatch, Rejected


def batch() -> EventBatch:
    """Return two impressions, a click, and two rejects, one of them a tombstone."""
    return EventBatch(
        records=5,
        impressions=Arrivals.of([1, 2], [10, 20]),
        ids=np.zeros((2, 3), np.int32),
        values=np.zeros((2, 1), np.float32),
        true_probability=np.full(2, np.nan),
        clicks=Arrivals.of([1], [30]),
        arrival=np.arange(3),
        rejected=Rejected(
            partition=np.zeros(2, np.int32),
            offset=np.arange(2),
            event=[None, None],
            value=[b"12345", None],
            reason=["json", "tombstone"],
            message=["", ""],
        ),
        with_fields=frozenset(),
        with_unknown_fields=0,
        bad_shares=np.ones(1),
    )


def test_the_events_of_a_batch_include_the_rejects() -> None:
    assert batch().events == 2 + 1 + 2


def test_the_bytes_of_a_batch_are_those_of_its_columns_and_of_the_rejected_records() -> None:
    arrivals = 3 * (8 + 8 + 4 + 8)
    features = 2 * (3 * 4 + 4 + 8)
    arrival = 3 * 8
    rejects = 2 * (4 + 8) + 5
    assert batch().nbytes == arrivals + features + arrival + rejects


def test_a_mask_or_a_slice_selects_whole_events() -> None:
    arrivals = Arrivals.of([7, 8, 9], [30, 20, 10])
    for part in (arrivals[1:], arrivals[np.array([False, True, True])]):
        assert len(part) == 2
        assert part.id_hash.tolist() == [8, 9]
        assert part.time.tolist() == [20, 10]
        assert part.partition.tolist() == [0, 0]
        assert part.place.tolist() == [1, 2]
