"""The states of a source of Kafka topics, with a reader that needs no broker.

`test_kafka_sources` runs sources against brokers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping

import numpy as np
import pyarrow as pa
import pytest
from support.sources import poll_nothing

from stream_ctr.connectors.errors import (
    KafkaReadFailed,
    KafkaUnreachable,
    PositionLost,
    TopicChanged,
)
from stream_ctr.connectors.kafka import timeouts
from stream_ctr.connectors.kafka.positions import UNKNOWN, Mask, Offsets
from stream_ctr.connectors.kafka.reader import Failure, FailureKind, Polled
from stream_ctr.connectors.kafka.topic_source import OnLost, TopicSource
from stream_ctr.connectors.kafka.topics import Topics
from stream_ctr.connectors.records import Records

SIZE = 30


def array(*offsets: int) -> Offsets:
    return np.array(offsets, np.int64)


class FakeNews:
    """News that come at once."""

    pending = False

    def __init__(self) -> None:
        self.id = "a1"
        self.asked = 0
        self._asked = False

    def first(self) -> Topics:
        return {"t": (self.id, frozenset({0, 1}))}

    def ask(self) -> None:
        self._asked = True
        self.asked += 1

    def forget(self) -> None:
        self._asked = False

    def answer(self) -> Topics | None:
        asked = self._asked
        self._asked = False
        return self.first() if asked else None


class FakeReader:
    """Reads 10 records of one partition a poll, from logs of 30 records in two partitions."""

    def __init__(self) -> None:
        self.partitions = (("t", 0), ("t", 1))
        self.end = array(SIZE, SIZE)
        self.news = FakeNews()
        self.first = array(0, 0)
        self.leader_epoch = array(UNKNOWN, UNKNOWN)
        self.failures: dict[tuple[int, int], Failure] = {}  # (partition, position): failure
        self.damage_ends: int | None = None
        self.silent = False
        self.wanted = np.zeros(2, np.bool_)
        self.restarted: list[tuple[int, int]] = []
        self.committed: dict[int, int] = {}
        self.closed = False

    def fail(self, kind: FailureKind, partition: int, position: int) -> None:
        cause = ZeroDivisionError("a bug")
        failure = Failure(kind, f"{kind.name} there", partition, position, cause=cause)
        self.failures[partition, position] = failure

    def beginning(self) -> Offsets:
        if self.silent:
            raise KafkaUnreachable("silent")
        return self.first

    def listed_end(self) -> Offsets:
        return self.end

    def reported_end(self) -> Offsets:
        return self.end

    def read_on(self, next_offset: Offsets, wanted: Mask, again: Collection[int]) -> None:
        self.wanted = wanted
        self.restarted += [(index, int(next_offset[index])) for index in again]

    def poll(self, next_offset: Offsets, timeout_seconds: float) -> Polled:
        position = next_offset.copy()
        offsets: list[int] = []
        read_from = 0
        for index in np.flatnonzero(self.wanted).tolist():
            failure = self.failures.get((index, int(position[index])))
            if failure:
                return Polled(records(read_from, offsets), position, failure)
            if not offsets and position[index] < SIZE:
                read_from = index
                offsets = [*range(position[index], position[index] + 10)]
                position[index] += 10
                self.leader_epoch[index] = 3
        return Polled(records(read_from, offsets), position)

    def end_of_damage(self, failure: Failure) -> int | None:
        return self.damage_ends

    def silent_seconds(self, wanted: Mask) -> float:
        return 7.0 if wanted.any() else 0.0

    def commit(self, offsets: Mapping[int, int]) -> None:
        self.committed = dict(offsets)

    def close(self) -> None:
        self.closed = True


def records(partition: int, offsets: list[int]) -> Records:
    count = len(offsets)
    return Records(
        np.full(count, partition, np.int32),
        np.array(offsets, np.int64),
        np.full(count, -1, np.int64),
        pa.array([b""] * count, pa.large_binary()),
    )


@pytest.fixture
def reader() -> FakeReader:
    return FakeReader()


def source_of(
    reader: FakeReader, *, until_end: bool = True, on_lost: OnLost = "stop"
) -> TopicSource:
    return TopicSource(reader, until_end=until_end, on_lost=on_lost, topic_check_seconds=3600.0)


def read_all(source: TopicSource) -> list[tuple[int, int]]:
    """Return (partition, offset) of all records until the source has finished."""
    found: list[tuple[int, int]] = []
    while not source.finished:
        polled = source.poll(0.0)
        found += zip(polled.partition.tolist(), polled.offset.tolist(), strict=True)
    return found


ALL = [(partition, offset) for partition in range(2) for offset in range(SIZE)]


def test_everything_is_read_once_and_then_nothing(reader: FakeReader) -> None:
    source = source_of(reader)
    assert sorted(read_all(source)) == ALL
    assert len(source.poll(0.0)) == 0
    assert not reader.wanted.any(), "what is read to its end is not fetched"


def test_a_failure_that_came_with_records_waits_until_its_partition_is_read(
    reader: FakeReader,
) -> None:
    reader.fail(FailureKind.DAMAGED, 1, 0)
    source = source_of(reader)
    assert source.poll(0.0).partition.tolist() == [0] * 10
    reader.failures.clear()
    source.pause({1})
    assert source.poll(0.0).partition.tolist() == [0] * 10
    source.pause(())
    stops = "partition 1 of topic 't' cannot be read on at offset 0: DAMAGED there"
    with pytest.raises(KafkaReadFailed, match=stops) as caught:
        source.poll(0.0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("offset", [0, 20])
def test_a_seek_forgets_the_failures(offset: int, reader: FakeReader) -> None:
    reader.fail(FailureKind.DAMAGED, 1, 0)
    source = source_of(reader)
    source.poll(0.0)
    reader.failures.clear()
    source.seek({1: offset})
    found = read_all(source)
    assert [offset for partition, offset in found if partition == 1] == [*range(offset, SIZE)]


def test_a_failure_is_forgotten_when_its_partition_has_moved(reader: FakeReader) -> None:
    reader.fail(FailureKind.DAMAGED, 1, 0)
    source = source_of(reader, on_lost="skip")
    source.poll(0.0)
    source.pause({1})
    reader.failures.clear()
    reader.fail(FailureKind.POSITION_REFUSED, 0, 10)
    reader.first = array(20, 5)
    source.poll(0.0)
    assert source.positions() == {0: 20, 1: 5}
    source.pause(())
    read_all(source)
    assert source.lost() == {0: 10, 1: 5}


def test_damage_is_skipped_and_counted_where_its_end_is_found(reader: FakeReader) -> None:
    reader.fail(FailureKind.DAMAGED, 0, 10)
    source = source_of(reader, on_lost="skip")
    with pytest.raises(KafkaReadFailed, match="cannot be read on at offset 10"):
        read_all(source)
    reader.damage_ends = 20
    found = read_all(source)
    assert [offset for partition, offset in found if partition == 0] == [*range(20, 30)]
    assert source.lost() == {0: 10, 1: 0}
    assert (0, 20) in reader.restarted


def test_a_source_that_does_not_skip_does_not_look_for_the_end_of_damage(
    reader: FakeReader,
) -> None:
    reader.fail(FailureKind.DAMAGED, 0, 10)
    reader.damage_ends = 20
    with pytest.raises(KafkaReadFailed):
        read_all(source_of(reader))


def test_a_refusal_names_the_topics_and_an_unexpected_error_is_raised_as_it_is(
    reader: FakeReader,
) -> None:
    reader.fail(FailureKind.REFUSED, 0, 0)
    with pytest.raises(KafkaReadFailed, match="reading topic 't' failed: REFUSED there"):
        source_of(reader).poll(0.0)
    reader.fail(FailureKind.UNEXPECTED, 0, 0)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        source_of(reader).poll(0.0)


def test_a_refused_position_is_explained_by_retention(reader: FakeReader) -> None:
    reader.fail(FailureKind.POSITION_REFUSED, 0, 0)
    stopping = source_of(reader)
    skipping = source_of(reader, on_lost="skip")
    reader.first = array(10, 0)
    with pytest.raises(PositionLost, match="begins at offset 10, but 0 comes next"):
        stopping.poll(0.0)
    reader.restarted.clear()
    assert len(skipping.poll(0.0)) == 0
    assert (skipping.positions(), skipping.lost()) == ({0: 10, 1: 0}, {0: 10, 1: 0})
    assert reader.restarted == [(0, 10), (1, 0)]
    assert len(read_all(skipping)) == 50


def test_nothing_is_read_while_a_refused_position_is_in_doubt(
    reader: FakeReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "TOPIC_NEWS_SECONDS", 0.2)
    reader.fail(FailureKind.POSITION_REFUSED, 0, 0)
    source = source_of(reader, on_lost="skip")
    assert len(source.poll(0.0)) == 0
    reader.failures.clear()
    with pytest.raises(PositionLost, match="POSITION_REFUSED there: was the topic created again"):
        poll_nothing(source)
    source.seek({})
    assert sorted(read_all(source)) == ALL, "a seek ends the doubt"


def test_a_topic_that_was_created_again_explains_a_doubt(reader: FakeReader) -> None:
    reader.fail(FailureKind.LOG_TRUNCATED, 0, 0)
    source = source_of(reader)
    reader.news.id = "b2"
    with pytest.raises(TopicChanged, match="its id was a1 and is b2"):
        source.poll(0.0)


def test_a_truncated_log_is_not_explained_by_retention(
    reader: FakeReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "TOPIC_NEWS_SECONDS", 0.1)
    reader.fail(FailureKind.LOG_TRUNCATED, 0, 0)
    source = source_of(reader, on_lost="skip")
    reader.first = array(10, 0)
    with pytest.raises(PositionLost, match="begins at offset 10, but 0 comes next"):
        poll_nothing(source)


def test_epochs_are_those_of_the_records_before_the_positions(reader: FakeReader) -> None:
    source = source_of(reader, on_lost="skip")
    assert source.leader_epochs() == {}
    source.poll(0.0)
    assert source.leader_epochs() == {0: 3}
    source.seek({0: 5, 1: 7})
    assert source.leader_epochs() == {}
    reader.restarted.clear()
    source.expect_epochs({1: 4})
    assert source.leader_epochs() == {1: 4}
    assert reader.restarted == [(1, 7)], "the client asks brokers when it begins to fetch"


@pytest.mark.parametrize("kind", [FailureKind.DAMAGED, FailureKind.POSITION_REFUSED])
def test_the_epoch_of_a_position_that_skips_records_is_not_known(
    kind: FailureKind, reader: FakeReader
) -> None:
    source = source_of(reader, on_lost="skip")
    source.poll(0.0)
    assert source.leader_epochs() == {0: 3}
    reader.fail(kind, 0, 10)
    reader.damage_ends = 20
    reader.first = array(20, 0)
    source.pause({1})
    source.poll(0.0)
    assert source.positions()[0] == 20
    assert source.leader_epochs() == {}


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return the function that moves the clock of the watch over topics on."""
    moved = [0.0]
    clock = time.monotonic

    def move(seconds: float) -> None:
        moved[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: clock() + moved[0])
    return move


def test_records_after_a_gap_are_those_of_a_topic_that_brokers_confirm(
    reader: FakeReader, later: Callable[[float], None]
) -> None:
    source = source_of(reader)
    assert len(source.poll(0.0)) == 10
    later(100.0)
    assert len(source.poll(0.0)) == 10
    later(100.0)
    reader.news.id = "b2"
    with pytest.raises(TopicChanged, match="its id was a1 and is b2"):
        source.poll(0.0)
    assert source.positions() == {0: 20, 1: 0}


def test_records_that_no_broker_confirms_are_read_again(
    reader: FakeReader, later: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(reader)
    source.poll(0.0)
    later(100.0)
    monkeypatch.setattr(reader.news, "answer", lambda: None)
    reader.restarted.clear()
    assert len(source.poll(0.0)) == 0
    assert (source.positions(), source.leader_epochs()) == ({0: 10, 1: 0}, {0: 3})
    assert reader.restarted == [(0, 10), (1, 0)]
    monkeypatch.undo()
    assert len(read_all(source)) == 50


def test_topics_are_asked_about_while_records_come(
    reader: FakeReader, later: Callable[[float], None]
) -> None:
    source = source_of(reader)
    reader.news.asked = 0
    for _ in range(4):
        later(0.6)
        source.poll(0.0)
    assert reader.news.asked == 4


def test_a_doubt_waits_for_brokers_that_are_silent(reader: FakeReader) -> None:
    source = source_of(reader, on_lost="skip")
    reader.fail(FailureKind.POSITION_REFUSED, 0, 0)
    reader.first = array(10, 0)
    reader.silent = True
    assert len(source.poll(0.0)) == 0
    assert source.positions() == {0: 0, 1: 0}
    reader.silent = False
    source.poll(0.0)
    assert source.positions() == {0: 10, 1: 0}


def test_questions_are_passed_to_the_reader(reader: FakeReader) -> None:
    source = source_of(reader, until_end=False)
    assert (source.beginning(), source.ends()) == ({0: 0, 1: 0}, {0: SIZE, 1: SIZE})
    assert (source.lag(), source.silent_seconds()) == (2 * SIZE, 7.0)
    source.pause({0, 1})
    assert source.silent_seconds() == 0
    source.commit({0: 5})
    assert reader.committed == {0: 5}
    source.close()
    assert reader.closed


def test_a_source_that_cannot_be_opened_closes_its_reader(reader: FakeReader) -> None:
    reader.silent = True
    with pytest.raises(KafkaUnreachable):
        source_of(reader)
    assert reader.closed
