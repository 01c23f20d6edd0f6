"""Positions of a source, without any broker: what moves them, and what they refuse."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_ctr.connectors.errors import PositionLost
from stream_ctr.connectors.kafka.positions import (
    UNKNOWN,
    Doubt,
    LogBounds,
    Offsets,
    Positions,
    end_of_run,
)
from stream_ctr.connectors.records import Records


def array(*offsets: int) -> Offsets:
    return np.array(offsets, np.int64)


def positions_of(*next_offset: int, end: Offsets | None = None) -> Positions:
    partitions = [("clicks", partition) for partition in range(len(next_offset))]
    return Positions(partitions, array(*next_offset), recorded_end=end)


def bounds_of(*logs: tuple[int, int]) -> LogBounds:
    return LogBounds(array(*(log[0] for log in logs)), array(*(log[1] for log in logs)))


@dataclass(frozen=True)
class Situation:
    """Positions in P partitions and the logs at the same time."""

    next_offset: list[int]
    logs: list[tuple[int, int]]  # beginning, end

    @property
    def positions(self) -> Positions:
        return positions_of(*self.next_offset)

    @property
    def bounds(self) -> LogBounds:
        return bounds_of(*self.logs)


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    partitions = draw(st.integers(1, 4))
    logs = []
    for _ in range(partitions):
        beginning = draw(st.integers(0, 20))
        logs.append((beginning, beginning + draw(st.integers(0, 20))))
    next_offset = draw(st.lists(st.integers(0, 45), min_size=partitions, max_size=partitions))
    return Situation(next_offset, logs)


@given(situations(), st.data())
def test_a_seek_ends_within_every_log_or_changes_nothing(
    situation: Situation, data: st.DataObject
) -> None:
    positions = situation.positions
    indexes = st.integers(0, len(situation.logs) - 1)
    targets = data.draw(st.dictionaries(indexes, st.integers(0, 45)))
    skip_deleted = data.draw(st.booleans())
    before = positions.read()
    try:
        moved = positions.seek(targets, situation.bounds, skip_deleted=skip_deleted)
    except PositionLost:
        assert positions.read() == before
        assert sum(positions.lost().values()) == 0
        return
    for index, (beginning, end) in enumerate(situation.logs):
        asked = targets.get(index, before[index])
        now = positions.read()[index]
        assert beginning <= now <= end
        assert now - asked == positions.lost()[index] == max(beginning - asked, 0)
        assert (index in moved) == (index in targets or now != before[index])


@given(situations(), st.data())
def test_a_seek_without_skipping_is_refused_where_any_log_lacks_its_position(
    situation: Situation, data: st.DataObject
) -> None:
    targets = dict(enumerate(situation.next_offset))
    within = all(
        beginning <= offset <= end
        for offset, (beginning, end) in zip(situation.next_offset, situation.logs, strict=True)
    )
    positions = situation.positions
    if within:
        positions.seek(targets, situation.bounds, skip_deleted=False)
        assert positions.read() == targets
    else:
        with pytest.raises(PositionLost):
            positions.seek(targets, situation.bounds, skip_deleted=False)


def test_deleted_records_are_counted_in_total_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    positions = positions_of(3, 8)
    positions.seek({}, bounds_of((5, 9), (0, 9)), skip_deleted=True)
    positions.seek({}, bounds_of((9, 9), (0, 9)), skip_deleted=True)
    assert (positions.read(), positions.lost()) == ({0: 9, 1: 8}, {0: 6, 1: 0})
    words = "records of partition 0 of topic 'clicks' were deleted before they were read"
    assert [record.getMessage() for record in caplog.records] == [f"2 {words}", f"4 {words}"]
    assert caplog.records[0].levelno == logging.WARNING


@given(situations(), st.data())
def test_what_happens_to_partitions_of_other_processes_is_of_no_concern(
    situation: Situation, data: st.DataObject
) -> None:
    """Their logs may be gone, their positions may be given, and nothing of it is seen."""
    every = range(len(situation.logs))
    own = data.draw(st.sets(st.sampled_from(every)))
    positions = situation.positions
    positions.divide(own)
    targets = {
        index: data.draw(st.integers(*log)) if index in own else data.draw(st.integers(0, 45))
        for index, log in enumerate(situation.logs)
    }
    moved = positions.seek(targets, situation.bounds, skip_deleted=False)
    positions.report_ends(situation.bounds.end)
    assert own <= moved
    assert {index: positions.read()[index] for index in own} == {
        index: targets[index] for index in own
    }
    assert positions.lost() == dict.fromkeys(sorted(own), 0)
    behind = [situation.logs[index][1] - targets[index] for index in own]
    assert positions.lag() == sum(behind)
    wanted, caught_up = positions.wanted(), positions.caught_up()
    for index in every:
        assert wanted[index] == (index in own)
        assert caught_up[index] or index in own
    gone = bounds_of(*((0, 0) if index in own else (50, 60) for index in every))
    doubt = Doubt("refused", seconds=2.0)
    positions.next_offset = np.where(positions.own, 0, positions.next_offset)
    assert not positions.settle(doubt, gone, now=0.0, skip_deleted=True)
    assert not any(positions.lost().values())


def test_every_partition_that_cannot_be_read_is_named() -> None:
    with pytest.raises(PositionLost) as caught:
        positions_of(3, 99, 4).seek({}, bounds_of((5, 9), (0, 9), (0, 9)), skip_deleted=False)
    assert str(caught.value) == (
        "partition 0 of topic 'clicks' begins at offset 5, but 3 comes next: 2 were deleted; "
        "partition 1 of topic 'clicks' ends at offset 9, but 99 comes next: "
        "was the topic created again?"
    )


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4), st.data())
def test_a_source_that_ends_reads_exactly_to_its_recorded_ends(
    partitions: list[tuple[int, int]], data: st.DataObject
) -> None:
    end = array(*(end for _, end in partitions))
    positions = positions_of(*(offset for offset, _ in partitions), end=end)
    paused = data.draw(st.sets(st.integers(0, len(partitions) - 1)))
    positions.pause(paused)
    for index, (offset, recorded) in enumerate(partitions):
        assert positions.caught_up()[index] == (offset >= recorded)
        assert positions.wanted()[index] == (offset < recorded and index not in paused)
        assert positions.read()[index] == min(offset, recorded)
    assert positions.finished == all(offset >= recorded for offset, recorded in partitions)


def test_records_beyond_the_recorded_end_are_left_out() -> None:
    values = pa.array([b"a", b"b", b"c"], pa.large_binary())
    records = Records(np.zeros(3, np.int32), array(4, 5, 6), array(0, 0, 0), values)
    assert positions_of(7, end=array(6)).within_end(records).offset.tolist() == [4, 5]
    assert positions_of(7).within_end(records) is records


def test_a_live_source_is_caught_up_by_the_ends_that_brokers_report() -> None:
    positions = positions_of(5, 5)
    positions.report_ends(array(5, 9))
    assert (positions.caught_up().tolist(), positions.lag()) == ([True, False], 4)
    assert not positions.finished
    positions.report_ends(array(UNKNOWN, 5))
    assert (positions.caught_up().tolist(), positions.lag()) == ([True, True], 0)
    positions.report_ends(array(7, UNKNOWN))
    assert (positions.caught_up().tolist(), positions.lag()) == ([False, True], 2)
    assert positions.ends(array(6, 9)).tolist() == [7, 9]


def test_damage_is_counted_from_the_position_to_the_next_offset() -> None:
    positions = positions_of(13, 4)
    before = positions.next_offset
    positions.skip_damage(0, 20)
    assert (positions.read(), positions.lost()) == ({0: 20, 1: 4}, {0: 7, 1: 0})
    assert before.tolist() == [13, 4], "an array that was handed out stays as it is"


def test_a_doubt_that_retention_explains_is_settled_by_skipping_or_raises() -> None:
    bounds = bounds_of((5, 9), (0, 9))
    skipping = positions_of(3, 4)
    assert skipping.settle(Doubt("refused", seconds=1.0), bounds, now=0.0, skip_deleted=True)
    assert (skipping.read(), skipping.lost()) == ({0: 5, 1: 4}, {0: 2, 1: 0})
    with pytest.raises(PositionLost, match="begins at offset 5, but 3 comes next"):
        positions_of(3, 4).settle(
            Doubt("refused", seconds=1.0), bounds, now=0.0, skip_deleted=False
        )


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ((0, 9), "refused"),
        ((0, 3), "ends at offset 3, but 4 comes next"),
    ],
)
def test_a_doubt_that_nothing_explains_waits_and_then_raises(
    log: tuple[int, int], reason: str
) -> None:
    positions = positions_of(4)
    doubt = Doubt("refused", seconds=2.0)
    for now in (10.0, 11.9):
        assert not positions.settle(doubt, bounds_of(log), now=now, skip_deleted=True)
    with pytest.raises(PositionLost, match=reason):
        positions.settle(doubt, bounds_of(log), now=12.0, skip_deleted=True)
    assert (positions.read(), positions.lost()) == ({0: 4}, {0: 0})


def test_retention_explains_no_truncated_log() -> None:
    doubt = Doubt("truncated", seconds=2.0, retention=False)
    assert not doubt.explained(array(3), bounds_of((5, 9)), now=0.0)


@given(st.integers(0, 50), st.integers(1, 200))
def test_the_end_of_a_run_is_found_in_few_steps(first: int, length: int) -> None:
    asked: list[int] = []

    def within(offset: int) -> bool:
        asked.append(offset)
        return first <= offset < first + length

    assert end_of_run(first, within) == first + length
    assert len(asked) <= 2 * length.bit_length() + 1
