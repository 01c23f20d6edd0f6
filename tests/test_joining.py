"""What a poll brought goes into the joiner: lateness by each event's own partition, in the order of arrival over both kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stream_ctr.events.batch import Came, EventBatch, Rejected
from stream_ctr.join import joining
from stream_ctr.join.joiner import LabelJoiner
from stream_ctr.join.watermark import Watermarks

WINDOW = 1000


class Event(NamedTuple):
    kind: str
    id: int
    time: int
    partition: int = 0


def came(events: Sequence[Event]) -> Came:
    place = np.arange(len(events))
    return Came(
        np.array([e.id for e in events], np.uint64), np.array([e.time for e in events], np.int64),
        np.array([e.partition for e in events], np.int32), place,
    )  # fmt: skip


def columns(*events: Event) -> EventBatch:
    """Of these events, which arrived in this order."""
    shown, clicked = ([e for e in events if e.kind == kind] for kind in ("impression", "click"))
    n, place = len(shown), {id(e): i for i, e in enumerate([*shown, *clicked])}
    return EventBatch(
        records=len(events), impressions=came(shown), ids=np.zeros((n, 1), np.int32), values=np.zeros((n, 0), np.float32),
        true_probability=np.full(n, np.nan), clicks=came(clicked), arrival=np.array([place[id(e)] for e in events], np.int64),
        rejected=Rejected(np.zeros(0, np.int32), np.zeros(0, np.int64), [], [], [], []), with_fields=frozenset(), with_unknown_fields=0,
        bad_records=0.0,
    )  # fmt: skip


def late(joiner: LabelJoiner) -> tuple[int, int]:
    """Impressions and clicks."""
    return joiner.counts()["impressions_late"], joiner.counts()["clicks_late"]


def pushed(*events: Event, partitions: int = 1) -> LabelJoiner:
    joiner = LabelJoiner(fields=1, label_window_ms=WINDOW)
    joining.push(columns(*events), joiner, Watermarks(partitions=partitions, lateness_ms=0))
    return joiner


def test_a_click_is_late_when_its_partition_was_past_the_window_before_it_arrived_and_not_when_that_came_after() -> (
    None
):
    shown, click, far_later = (
        Event("impression", 1, 0),
        Event("click", 1, 500),
        Event("impression", 2, 5000),
    )
    assert late(pushed(shown, click, far_later)) == (0, 0)
    assert late(pushed(shown, far_later, click)) == (0, 1)
    assert late(pushed(far_later, shown)) == (1, 0)


def test_another_partition_that_is_further_makes_nothing_late() -> None:
    assert late(
        pushed(
            Event("impression", 2, 5000, 1),
            Event("impression", 1, 0),
            Event("click", 1, 500),
            partitions=2,
        )
    ) == (0, 0)
    assert late(
        pushed(
            Event("click", 9, 5000, 1),
            Event("impression", 1, 0),
            Event("impression", 2, 10),
            partitions=2,
        )
    ) == (0, 0)


def test_watermarks_are_told_what_is_a_click_by_which_they_know_that_none_come() -> None:
    watermarks = Watermarks(partitions=2, lateness_ms=0)
    events = (
        Event("click", 1, 500, 1),
        Event("impression", 1, 0),
        Event("click", 2, 600, 1),
        Event("click", 3, 700),
    )
    joining.push(columns(*events), LabelJoiner(fields=1, label_window_ms=WINDOW), watermarks)
    assert (watermarks.impressions.tolist(), watermarks.clicks.tolist()) == ([1, 0], [1, 2])


def test_what_comes_behind_all_that_has_been_closed_is_late_in_any_partition() -> None:
    """The second partition was idle, and nobody waited for it."""
    joiner, watermarks = (
        LabelJoiner(fields=1, label_window_ms=WINDOW),
        Watermarks(partitions=2, lateness_ms=0),
    )
    joining.push(
        columns(Event("impression", 1, 0), Event("impression", 2, 5000)), joiner, watermarks
    )
    assert joiner.advance(watermarks.overall(excused=np.array([False, True]))).time.tolist() == [0]
    joining.push(
        columns(Event("impression", 3, 100, 1), Event("impression", 4, 4500, 1)), joiner, watermarks
    )
    assert late(joiner) == (1, 0)
    assert joiner.drain().time.tolist() == [4500, 5000]


def test_an_impression_keeps_its_own_ids_values_and_truth() -> None:
    joiner = LabelJoiner(fields=2, value_fields=1, label_window_ms=WINDOW)
    of_two = columns(Event("impression", 1, 10), Event("click", 2, 20), Event("impression", 2, 20))
    ids, values, truth = (
        np.array([[3, 4], [5, 6]], np.int32),
        np.array([[0.5], [0.25]], np.float32),
        np.array([0.125, 0.75]),
    )
    given = {name: getattr(of_two, name) for name in EventBatch.__slots__} | {
        "ids": ids,
        "values": values,
        "true_probability": truth,
    }
    joining.push(EventBatch(**given), joiner, Watermarks(partitions=1, lateness_ms=0))
    found = joiner.drain()
    assert (found.ids.tolist(), found.values.tolist(), found.label.tolist()) == (
        ids.tolist(),
        values.tolist(),
        [0, 1],
    )
    assert found.true_probability.tolist() == truth.tolist()
