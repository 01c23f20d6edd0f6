"""The sink of Kafka records, against running brokers."""

from __future__ import annotations

import os
import signal
import threading
from collections import defaultdict
from contextlib import closing

import numpy as np
import pyarrow as pa
import pytest
from kafka import KafkaAdminClient, KafkaConsumer
from kafka.errors import KafkaError, UnknownError
from support.patience import PATIENCE_SECONDS, wait_until
from support.sources import Row, all_rows, count, values

from stream_ctr.connectors import kafka
from stream_ctr.connectors.embedded import EmbeddedBroker
from stream_ctr.connectors.kafka import (
    KafkaDeliveryFailed,
    KafkaSink,
    KafkaSource,
    KafkaTopicMissing,
    client_options,
    ensure_topic,
    options,
    timeouts,
    topic_partitions,
)


def stored(servers: str, topic: str) -> dict[int, list[Row]]:
    """Return the records that each partition of a topic holds."""
    client = client_options(servers, {})
    with closing(KafkaSource([topic], client=client, group="g", until_end=True)) as source:
        return all_rows(source)


def test_keys_headers_and_times_arrive(broker: str, topic: str) -> None:
    client = client_options(broker, {})
    ensure_topic(client, topic)
    headers = [("reason", b"bad json"), ("other", b"")]
    with closing(KafkaSink(client, compression="zstd")) as sink:
        sink.send(topic, b"value", key=b"key", headers=headers, time=1_700_000_000_123)
    consumer = KafkaConsumer(
        topic,
        bootstrap_servers=broker,
        auto_offset_reset="earliest",
        consumer_timeout_ms=int(1000 * PATIENCE_SECONDS),
    )
    with closing(consumer):
        record = next(consumer)
    assert (record.key, record.value, record.timestamp) == (b"key", b"value", 1_700_000_000_123)
    assert record.headers == headers


def test_a_batch_keeps_its_order_times_and_keys(broker: str, topic: str) -> None:
    client = client_options(broker, {})
    ensure_topic(client, topic, partitions=3)
    size = 5000
    written = [b"%d" % index for index in range(size)]
    keys = [b"%d" % (index % 40) for index in range(size)]
    times = np.arange(size) + 1_600_000_000_000
    with closing(KafkaSink(client)) as sink:
        sink.send_batch(
            topic, pa.array(written, pa.large_binary()), times, pa.array(keys, pa.binary())
        )
    found = stored(broker, topic)
    read = [value or b"" for partition in found for value in values(found, partition)]
    assert sorted(read) == sorted(written)
    partitions_of_key = defaultdict(set)
    for partition, some in found.items():
        indexes = [int(value or b"") for _, _, value in some]
        assert indexes == sorted(indexes)
        assert [time for _, time, _ in some] == times[indexes].tolist()
        for index in indexes:
            partitions_of_key[keys[index]].add(partition)
    assert len(partitions_of_key) == 40
    assert all(len(partitions) == 1 for partitions in partitions_of_key.values())


def test_without_keys_the_partitions_take_turns_record_by_record(broker: str, topic: str) -> None:
    client = client_options(broker, {})
    ensure_topic(client, topic, partitions=3)
    with closing(KafkaSink(client)) as sink:
        for first in range(0, 600, 100):
            numbers = [b"%d" % index for index in range(first, first + 100)]
            sink.send_batch(topic, pa.array(numbers, pa.large_binary()))
    found = stored(broker, topic)
    for partition in range(3):
        numbers = [b"%d" % index for index in range(partition, 600, 3)]
        assert values(found, partition) == numbers


@pytest.mark.slow
def test_records_that_the_broker_does_not_take_are_an_error(kafka_broker: str, topic: str) -> None:
    small_messages = {"num_partitions": 1, "configs": {"max.message.bytes": "2000"}}
    with closing(KafkaAdminClient(bootstrap_servers=kafka_broker)) as admin:
        admin.create_topics({topic: small_messages}, wait_for_metadata=True)
    with closing(KafkaSink(client_options(kafka_broker, {}), compression=None)) as sink:
        sink.send(topic, b"small")
        sink.flush(PATIENCE_SECONDS)
        sink.send(topic, b"x" * 5000)
        refused = "did not take 1 records; the first: .*MessageSizeTooLarge"
        with pytest.raises(KafkaDeliveryFailed, match=refused):
            sink.flush(PATIENCE_SECONDS)
        sink.send(topic, b"small")
    assert values(stored(kafka_broker, topic)) == [b"small", b"small"]


def test_sending_blocks_when_too_much_waits_for_its_acknowledgement(
    monkeypatch: pytest.MonkeyPatch, topic: str
) -> None:
    monkeypatch.setattr(options, "IN_FLIGHT_BYTES", 2 << 20)
    with EmbeddedBroker() as broker:
        client = client_options(broker.bootstrap_servers, {})
        ensure_topic(client, topic)
        sent: list[int] = []
        with closing(KafkaSink(client, compression=None)) as sink:
            sink.send(topic, b"first")
            sink.flush(PATIENCE_SECONDS)

            def send() -> None:
                for number in range(80):
                    sink.send(topic, bytes(100_000))
                    sent.append(number)

            assert broker.pid is not None
            os.kill(broker.pid, signal.SIGSTOP)
            sender = threading.Thread(target=send)
            sender.start()
            wait_until(lambda: (len(sent) + 1) * 100_000 > 2 << 20)
            sender.join(0.7)
            blocked = sender.is_alive()
            reached = len(sent)
            os.kill(broker.pid, signal.SIGCONT)
            sender.join(PATIENCE_SECONDS)
        assert blocked
        assert (reached + 1) * 100_000 < 3 << 20
        assert count(stored(broker.bootstrap_servers, topic)) == 81


def test_a_missing_topic_is_an_error_and_is_not_created(embedded_broker: str, topic: str) -> None:
    client = client_options(embedded_broker, {})
    with closing(KafkaSink(client)) as sink:
        with pytest.raises(KafkaTopicMissing, match=f"topic '{topic}' does not exist"):
            sink.send(topic, b"")
        with pytest.raises(KafkaTopicMissing, match=f"topic '{topic}' does not exist"):
            sink.send_batch(topic, pa.array([b""], pa.large_binary()))
    assert topic_partitions(client, topic) is None


def test_closing_twice_or_after_a_failure_is_no_error(embedded_broker: str, topic: str) -> None:
    client = client_options(embedded_broker, {})
    sink = KafkaSink(client)
    sink.close()
    sink.flush(1.0)
    sink.close()


def test_a_sink_asks_for_topics_once_however_many_it_writes_to(
    embedded_broker: str, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = kafka.client_options(embedded_broker, {})
    topics = [f"{topic}-{n}" for n in range(3)]
    for name in topics:
        kafka.ensure_topic(client, name)
    sink = kafka.KafkaSink(client)
    with caplog.at_level("INFO", logger="kafka.net.manager"):
        for name in topics * 2:
            sink.send(name, b"report")
            sink.flush(PATIENCE_SECONDS)
    sink.close()
    opened = [record for record in caplog.records if "Attempting bootstrap" in record.message]
    assert len(opened) == 1


def test_a_partition_that_the_topic_does_not_have_is_an_error_before_anything_is_sent(
    embedded_broker: str, topic: str
) -> None:
    client = client_options(embedded_broker, {})
    ensure_topic(client, topic, partitions=2)
    with closing(KafkaSink(client)) as sink:
        for partition in (-1, 2):
            with pytest.raises(KafkaDeliveryFailed, match=f"has no partition {partition}: it has"):
                sink.send(topic, b"nowhere", partition=partition)
        sink.send(topic, b"there", partition=1)
    assert values(stored(embedded_broker, topic), 1) == [b"there"]


def test_a_flush_that_meets_a_batch_while_it_is_split_waits_for_its_parts(
    embedded_broker: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_options(embedded_broker, {})
    ensure_topic(client, topic)
    with closing(KafkaSink(client)) as sink:
        sink.send(topic, b"value")
        flush = sink._producer.flush
        failures = iter([UnknownError("Future not done")] * 2)

        def fail_at_first(timeout: float) -> None:
            if failure := next(failures, None):
                raise failure
            flush(timeout)

        monkeypatch.setattr(sink._producer, "flush", fail_at_first)
        sink.flush(PATIENCE_SECONDS)
    assert values(stored(embedded_broker, topic)) == [b"value"]


@pytest.mark.parametrize("error", [UnknownError("never done"), KafkaError("another one")])
def test_whatever_ends_a_flush_is_a_failed_delivery_and_the_sink_is_closed(
    error: KafkaError, embedded_broker: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(timeout: float) -> None:
        raise error

    monkeypatch.setattr(timeouts, "ANSWER_SECONDS", 0.1)
    client = client_options(embedded_broker, {})
    ensure_topic(client, topic)
    sink = KafkaSink(client)
    sink.send(topic, b"value")
    monkeypatch.setattr(sink._producer, "flush", fail)
    with pytest.raises(KafkaDeliveryFailed, match="did not acknowledge all records"):
        sink.close()
    assert sink._producer is None
