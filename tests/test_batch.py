"""The columns of one poll."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np

from stream_ctr.events.batch import (
    Arrivals,
    CountedBatch,
    EventBatch,
    FieldSample,
    LabelledArrivals,
    Rejected,
)


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


def test_the_fields_of_a_batch_are_those_of_its_impressions_and_of_its_examples() -> None:
    examples = LabelledArrivals(
        Arrivals.of([5], [40]),
        np.ones(1, np.uint8),
        np.full((1, 3), 7, np.int32),
        np.full((1, 1), 0.5, np.float32),
        np.full(1, np.nan),
    )
    shown = batch()
    sample = replace(shown, examples=examples, with_fields=frozenset("ab")).field_sample()
    assert (sample.rows, sample.first_ms, sample.last_ms) == (3, 10, 40)
    assert sample.ids.tolist() == [[0, 0, 0], [0, 0, 0], [7, 7, 7]]
    assert sample.values.tolist() == [[0.0], [0.0], [0.5]]
    assert sample.with_fields == {"a", "b"}
    assert shown.shown == shown.field_sample().rows == 2


def test_a_counted_batch_has_the_numbers_of_events_that_are_elsewhere() -> None:
    sample = FieldSample(
        4, 1, 9, np.zeros((1, 3), np.int32), np.zeros((1, 1), np.float32), frozenset(), frozenset()
    )
    whole = batch()
    columns = {field.name: getattr(whole, field.name) for field in fields(whole)}
    counted = CountedBatch(**columns, counted=9, counted_shown=4, sample=sample)
    assert (counted.events, counted.shown) == (9, 4)
    assert counted.field_sample() is sample
