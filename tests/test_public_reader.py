"""The reader through kafka-python's public interface, without any broker.

`test_kafka_sources` runs it against brokers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from kafka import TopicPartition
from kafka.errors import CorruptRecordError, KafkaTimeoutError, OffsetOutOfRangeError

from stream_ctr.connectors.errors import KafkaUnreachable
from stream_ctr.connectors.kafka import public_reader
from stream_ctr.connectors.kafka.positions import Mask, Offsets
from stream_ctr.connectors.kafka.public_reader import PublicReader
from stream_ctr.connectors.kafka.reader import FailureKind, Polled

SIZE = 20  # of each log


class Log:
    """Logs of two partitions; a poll meets an error at the offsets of damaged batches."""

    def __init__(self) -> None:
        self.damaged: dict[tuple[int, int], str] = {}  # (partition, offset): error
        self.error: Exception | None = None  # of the next poll
        self.reachable = True
        self.answering = True
        self.opened = 0
        self.seeks: list[tuple[int, int]] = []

    def damage(self, partition: int, first: int, after: int) -> None:
        for offset in range(first, after):
            self.damaged[partition, offset] = f"the batch at offset {first} failed"


class FakeConsumer:
    """The public interface of a consumer of kafka-python, on a `Log`."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.config = {"max_poll_records": 1000}
        self.positions: dict[TopicPartition, int] = {}
        self.broken = False
        self.closed = False

    def topics(self) -> set[str]:
        return {"t"}

    def partitions_for_topic(self, topic: str) -> set[int]:
        return {0, 1}

    def assign(self, partitions: Sequence[TopicPartition]) -> None:
        self.positions = {partition: self.positions.get(partition, -1) for partition in partitions}

    def seek(self, partition: TopicPartition, offset: int) -> None:
        assert partition in self.positions
        self.log.seeks.append((partition.partition, offset))
        self.positions[partition] = offset

    def position(self, partition: TopicPartition, timeout_ms: int) -> int:
        return self.positions[partition]

    def highwater(self, partition: TopicPartition) -> int:
        return SIZE

    def end_offsets(
        self, partitions: Sequence[TopicPartition], timeout_ms: int
    ) -> dict[TopicPartition, int]:
        if not self.log.answering:
            raise KafkaTimeoutError("no answer")
        return dict.fromkeys(partitions, SIZE)

    def poll(self, timeout_ms: int, max_records: int) -> dict[TopicPartition, list[Any]]:
        assert not self.broken, "after an error the consumer is not polled again"
        assert not self.closed
        error = self.log.error
        self.log.error = None
        if error:
            self.broken = True
            raise error
        for partition, offset in self.positions.items():
            assert offset >= 0, "every assigned partition has a position"
            if reason := self.log.damaged.get((partition.partition, offset)):
                self.broken = True
                raise CorruptRecordError(reason)
            if self.log.answering and offset < SIZE:
                last = min(offset + max_records, SIZE)
                last = min(
                    (o for p, o in self.log.damaged if p == partition.partition and o > offset),
                    default=last,
                )
                self.positions[partition] = last
                return {partition: [record(number) for number in range(offset, last)]}
        return {}

    def close(self) -> None:
        self.closed = True


def record(offset: int) -> Any:
    return SimpleNamespace(offset=offset, timestamp=None, value=b"%d" % offset, leader_epoch=2)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    made = Log()

    def open_consumer(client: object) -> FakeConsumer:
        if not made.reachable:
            raise KafkaUnreachable("no Kafka broker answered")
        made.opened += 1
        return FakeConsumer(made)

    monkeypatch.setattr(public_reader, "open_consumer", open_consumer)
    return made


@pytest.fixture
def reader(log: Log) -> PublicReader:
    return PublicReader(FakeConsumer(log), ["t"], client={}, group="g", max_record_bytes=1 << 20)


BOTH = np.array([True, True])


def array(*offsets: int) -> Offsets:
    return np.array(offsets, np.int64)


def poll_all(reader: PublicReader, position: Offsets, wanted: Mask = BOTH) -> list[Polled]:
    """Poll until nothing comes or something fails."""
    found = []
    while True:
        reader.read_on(position, wanted, ())
        found.append(reader.poll(position, 0.0))
        position = found[-1].next_offset
        if found[-1].failure or not len(found[-1].records):
            return found


def test_all_partitions_are_read_to_their_ends(reader: PublicReader) -> None:
    *read, last = poll_all(reader, array(0, 5))
    assert sum(len(polled.records) for polled in read) == 35
    assert last.next_offset.tolist() == reader.reported_end().tolist() == [SIZE, SIZE]
    assert read[0].records.time.tolist() == [-1] * len(read[0].records)


def test_a_partition_that_is_not_wanted_is_not_read_and_goes_on_where_it_was(
    reader: PublicReader, log: Log
) -> None:
    reader._most_records = 3
    reader.read_on(array(0, 0), BOTH, range(2))
    first = reader.poll(array(0, 0), 0.0)
    assert first.next_offset.tolist() == [3, 0]
    log.seeks.clear()
    reader.read_on(first.next_offset, np.array([False, True]), ())
    second = reader.poll(first.next_offset, 0.0)
    assert second.next_offset.tolist() == [3, 3]
    reader.read_on(second.next_offset, np.array([True, False]), ())
    assert reader.poll(second.next_offset, 0.0).next_offset.tolist() == [6, 3]
    assert log.seeks == [(0, 3)], "the partition that stayed is not sent anywhere"


def test_nothing_is_asked_while_nothing_is_wanted(reader: PublicReader, log: Log) -> None:
    reader.read_on(array(0, 0), ~BOTH, ())
    assert len(reader.poll(array(0, 0), 0.0).records) == 0
    assert log.opened == 0


def test_a_poll_ends_when_its_values_have_many_bytes(
    reader: PublicReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(public_reader, "POLL_BYTES", 3)
    monkeypatch.setattr(public_reader, "_PIECE_RECORDS", 2)
    assert [len(polled.records) for polled in poll_all(reader, array(14, SIZE))] == [2, 2, 2, 0]


@pytest.mark.parametrize("partition", [0, 1])
def test_the_partition_of_a_failure_is_found(
    partition: int, reader: PublicReader, log: Log
) -> None:
    log.damage(partition, 10, 15)
    *_, last = poll_all(reader, array(0, 0))
    assert last.failure is not None
    assert last.failure.kind is FailureKind.DAMAGED
    assert (last.failure.partition, last.failure.position) == (partition, 10)
    assert last.failure.reason.endswith("the batch at offset 10 failed")
    assert reader.end_of_damage(last.failure) == 15


@pytest.mark.parametrize("start", [10, 12, 14])
def test_the_end_of_damage_is_found_from_every_offset_within_it(
    start: int, reader: PublicReader, log: Log
) -> None:
    log.damage(0, 10, 15)
    log.damage(0, 15, 18)
    (polled,) = poll_all(reader, array(start, SIZE))
    assert polled.failure is not None
    assert reader.end_of_damage(polled.failure) == 15, "another batch is another failure"


def test_the_end_of_damage_at_the_end_of_a_log_is_the_end_of_the_log(
    reader: PublicReader, log: Log
) -> None:
    log.damage(1, 18, SIZE)
    *_, last = poll_all(reader, array(SIZE, 0))
    assert last.failure is not None
    assert reader.end_of_damage(last.failure) == SIZE


def test_after_a_failure_reading_goes_on_with_another_consumer(
    reader: PublicReader, log: Log
) -> None:
    log.damage(0, 10, 15)
    *_, last = poll_all(reader, array(0, 0))
    (again,) = poll_all(reader, last.next_offset)
    assert again.failure is not None
    assert (again.failure.partition, again.failure.position) == (0, 10)
    *read, last = poll_all(reader, array(15, int(last.next_offset[1])))
    assert last.next_offset.tolist() == [SIZE, SIZE]
    assert log.opened > 2


def test_an_error_that_no_partition_repeats_is_a_refusal(reader: PublicReader, log: Log) -> None:
    log.error = CorruptRecordError("passing")
    (polled,) = poll_all(reader, array(0, 0))
    assert polled.failure is not None
    assert (polled.failure.kind, polled.failure.partition) == (FailureKind.REFUSED, None)


def test_a_refused_position_needs_no_search(reader: PublicReader, log: Log) -> None:
    log.error = OffsetOutOfRangeError({TopicPartition("t", 0): 99})
    (polled,) = poll_all(reader, array(0, 0))
    assert polled.failure is not None
    assert polled.failure.kind is FailureKind.POSITION_REFUSED
    assert log.opened == 1


def test_brokers_that_go_away_yield_empty_polls(reader: PublicReader, log: Log) -> None:
    log.reachable = False
    (polled,) = poll_all(reader, array(3, 4))
    assert (polled.failure, polled.next_offset.tolist()) == (None, [3, 4])
    log.reachable = True
    assert len(poll_all(reader, array(3, 4))) > 1


def test_silence_begins_with_the_first_question_that_has_no_answer(
    reader: PublicReader, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    end = array(SIZE, SIZE)
    reader.read_on(end, BOTH, range(2))
    log.answering = False
    reader.poll(end, 0.0)
    assert reader.silent_seconds(BOTH) == 0, "it was not time to ask"
    for _ in range(4):
        now += 1.0
        reader.poll(end, 0.0)
    assert reader.silent_seconds(BOTH) == 3.0
    assert reader.silent_seconds(~BOTH) == 0
    log.answering = True
    now += 1.0
    reader.poll(end, 0.0)
    assert reader.silent_seconds(BOTH) == 0
