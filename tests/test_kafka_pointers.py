"""Whole records of small topics, against running brokers."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from typing import Any

import pytest
from support.patience import PATIENCE_SECONDS, wait_until
from support.sources import numbered, write

from stream_ctr.connectors.kafka import (
    KafkaSink,
    KafkaTopicMissing,
    PointerReader,
    RecordFollower,
    StoredRecord,
    client_options,
    ensure_topic,
    pointers,
    stored_records,
    topic_partitions,
)
from stream_ctr.connectors.kafka.client import open_consumer

Pointer = tuple[str, bytes | None]


def read_to_end(reader: PointerReader) -> list[Pointer]:
    found: list[Pointer] = []
    while not reader.caught_up:
        found += reader.poll(1.0)
    return found


def test_pointers_are_followed_from_the_beginning(broker: str, topic: str) -> None:
    client = client_options(broker, {})
    ensure_topic(client, topic, compacted=True)
    with closing(KafkaSink(client)) as sink:
        sink.send(topic, b"one", key=b"a")
        sink.send(topic, b"two", key=b"b")
        sink.send(topic, None, key=b"a")
        sink.flush(PATIENCE_SECONDS)
        with closing(PointerReader(client, topic)) as reader:
            assert not reader.caught_up
            assert read_to_end(reader) == [("a", b"one"), ("b", b"two"), ("a", None)]
            sink.send(topic, b"three", key=b"b")
            sink.flush(PATIENCE_SECONDS)
            later: list[Pointer] = []
            while not later:
                later = reader.poll(1.0)
            assert later == [("b", b"three")]
            assert reader.caught_up


def test_pointers_without_a_key_are_left_out(embedded_broker: str, topic: str) -> None:
    client = client_options(embedded_broker, {})
    ensure_topic(client, topic)
    with closing(KafkaSink(client)) as sink:
        sink.send(topic, b"without a key")
        sink.send(topic, b"one", key=b"a")
    with closing(PointerReader(client, topic)) as reader:
        assert read_to_end(reader) == [("a", b"one")]


def test_a_missing_topic_is_an_error_and_is_not_created(embedded_broker: str, topic: str) -> None:
    client = client_options(embedded_broker, {})
    with pytest.raises(KafkaTopicMissing, match=f"topic '{topic}' does not exist"):
        PointerReader(client, topic)
    with pytest.raises(KafkaTopicMissing, match=f"topic '{topic}' does not exist"):
        RecordFollower(client, topic)
    with pytest.raises(KafkaTopicMissing, match=f"topic '{topic}' does not exist"):
        list(stored_records(client, topic))
    assert topic_partitions(client, topic) is None


def test_stored_records_are_all_that_the_topic_holds_with_keys_and_headers(
    broker: str, topic: str
) -> None:
    client = client_options(broker, {})
    write(broker, topic, numbered(3, 2))
    with closing(KafkaSink(client)) as sink:
        sink.send(topic, None, key=b"key", headers=[("name", b"header")], partition=1)
    found = sorted(
        stored_records(client, topic), key=lambda record: (record.partition, record.offset)
    )
    assert found == [
        *(StoredRecord(0, index, None, b"%d" % index, ()) for index in range(3)),
        *(StoredRecord(1, index, None, b"%d" % index, ()) for index in range(2)),
        StoredRecord(1, 2, b"key", None, (("name", b"header"),)),
    ]


def follow(follower: RecordFollower, count: int) -> list[StoredRecord]:
    """Return the next records, so many."""
    found: list[StoredRecord] = []
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(found) < count:
        assert time.monotonic() < deadline, found
        found += follower.poll(0.5)
    return sorted(found, key=lambda record: (record.partition, record.offset))


def test_a_follower_returns_whole_records_as_they_come_and_again(broker: str, topic: str) -> None:
    client = client_options(broker, {})
    write(broker, topic, numbered(3, 2))
    first = [
        *(StoredRecord(0, index, None, b"%d" % index, ()) for index in range(3)),
        *(StoredRecord(1, index, None, b"%d" % index, ()) for index in range(2)),
    ]
    with closing(KafkaSink(client)) as sink, closing(RecordFollower(client, topic)) as follower:
        assert follow(follower, 5) == first
        assert follower.poll(0.1) == []
        sink.send(topic, b"x", key=b"key", headers=[("name", b"header")], partition=1)
        sink.flush(PATIENCE_SECONDS)
        last = StoredRecord(1, 2, b"key", b"x", (("name", b"header"),))
        assert follow(follower, 1) == [last]
        follower.seek_to_beginning()
        assert follow(follower, 6) == [*first, last]
        assert follower.take_losses() == []


def test_a_follower_that_is_closed_while_it_connects_leaves_no_consumer(
    embedded_broker: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_options(embedded_broker, {})
    ensure_topic(client, topic)
    follower = RecordFollower(client, topic)
    monkeypatch.setattr(pointers, "_RENEW_SECONDS", -1.0)
    gate = threading.Event()
    opened: list[Any] = []

    def connect(_: RecordFollower) -> tuple[Any, list[Any]]:
        gate.wait(PATIENCE_SECONDS)
        opened.append(open_consumer(client))
        return opened[0], []

    monkeypatch.setattr(RecordFollower, "_connect", connect)
    began = time.monotonic()
    assert follower.poll(0.1) == []
    assert time.monotonic() - began < 5
    follower.close()
    gate.set()
    wait_until(lambda: opened and opened[0]._closed)
