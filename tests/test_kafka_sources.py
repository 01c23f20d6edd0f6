"""Sources of Kafka records against running brokers: the same tests for every client.

`open_source` opens a source through kafka-python, through the public interface of a kafka-python
whose private members have other names, and through confluent-kafka.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import random
import re
import signal
import socketserver
import ssl
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from support.altered_kafka import altered_fetcher
from support.brokers import SASL_PASSWORD, SASL_USER, ApacheBroker, make_certificates
from support.patience import PATIENCE_SECONDS, wait_until
from support.reliability import Outcome
from support.sources import (
    OpenSource,
    Row,
    all_rows,
    count,
    numbered,
    offsets,
    poll_forever,
    poll_nothing,
    poll_until,
    rows,
    values,
    write,
)

from stream_ctr.connectors.kafka import (
    KafkaReadFailed,
    KafkaRefused,
    KafkaSink,
    KafkaSource,
    KafkaTopicMissing,
    KafkaUnreachable,
    LogTruncated,
    PositionLost,
    TopicChanged,
    client_options,
    codecs,
    ensure_topic,
    timeouts,
    topic_partitions,
)
from stream_ctr.connectors.kafka.public_reader import PublicReader
from stream_ctr.connectors.kafka.topic_source import TopicSource
from stream_ctr.connectors.kafka.topics import Topics

KAFKA_PYTHON = "kafka-python"
PUBLIC_INTERFACE = "public-interface"
CONFLUENT = "confluent"


@pytest.fixture(params=[KAFKA_PYTHON, PUBLIC_INTERFACE, CONFLUENT])
def client_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_source(client_name: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TopicSource]:
    """Return the class of sources of a client."""
    if client_name == CONFLUENT:
        pytest.importorskip("confluent_kafka")
        confluent = importlib.import_module("stream_ctr.connectors.kafka.confluent")
        make: Callable[..., TopicSource] = confluent.ConfluentSource
        return make
    if client_name == PUBLIC_INTERFACE:
        monkeypatch.setattr("kafka.consumer.group.Fetcher", altered_fetcher())
    return KafkaSource


@pytest.fixture
def open_source(client_name: str, make_source: Callable[..., TopicSource]) -> OpenSource:
    """Return the function that opens a source through a client."""

    @contextmanager
    def opened(
        servers: str,
        *topics: str,
        until_end: bool = True,
        options: dict[str, str] | None = None,
        **arguments: object,
    ) -> Iterator[TopicSource]:
        client = client_options(servers, options or {})
        source = make_source(
            topics, client=client, group="readers", until_end=until_end, **arguments
        )
        with closing(source):
            public = isinstance(source._reader, PublicReader)
            assert public == (client_name == PUBLIC_INTERFACE)
            yield source

    return opened


# The public interface connects as kafka-python always does.
connects = pytest.mark.parametrize("client_name", [KAFKA_PYTHON, CONFLUENT], indirect=True)


# -- reading -------------------------------------------------------------------------------------


def test_every_partition_is_read_once_in_order_as_raw_bytes_and_nulls(
    open_source: OpenSource, broker: str, topic: str
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
        assert all_rows(source) == written
        assert source.caught_up().all()
        assert len(source.poll(1.0)) == 0


def test_several_topics_keep_the_order_they_were_given_in(
    open_source: OpenSource, broker: str, topic: str
) -> None:
    write(broker, f"{topic}-b", numbered(5))
    write(broker, f"{topic}-a", numbered(3, 4))
    with open_source(broker, f"{topic}-b", f"{topic}-a") as source:
        assert source.partitions == ((f"{topic}-b", 0), (f"{topic}-a", 0), (f"{topic}-a", 1))
        found = all_rows(source)
    assert {partition: len(read) for partition, read in found.items()} == {0: 5, 1: 3, 2: 4}


def test_until_end_stops_at_the_end_of_the_start_while_a_producer_goes_on(
    open_source: OpenSource, broker: str, topic: str
) -> None:
    client = client_options(broker, {"linger.ms": "1"})
    ensure_topic(client, topic)
    begun = threading.Event()
    stop = threading.Event()
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
            found = all_rows(source)
            recorded = source.positions()[0]
            wait_until(lambda: source.ends()[0] > recorded)  # the producer goes on
            assert len(source.poll(0.2)) == 0
            assert source.positions()[0] == recorded
    finally:
        stop.set()
        producer.join()
    assert 0 < recorded <= end
    assert offsets(found) == list(range(recorded))
    assert values(found) == [b"%d" % index for index in range(recorded)]


def test_the_end_of_a_log_is_the_end_of_its_last_batch(
    open_source: OpenSource, broker: str, topic: str
) -> None:
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
        assert count(all_rows(source)) == 2003


def test_a_source_goes_on_exactly_where_it_is_sent(
    open_source: OpenSource, broker: str, topic: str
) -> None:
    sizes = [400, 1, 0, 250]
    write(broker, topic, numbered(*sizes))
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
            most_polls = draw.choice([1, 3, 99])  # the next round leaves in the middle
            polls = itertools.count(1)
            found = rows(source, lambda: source.finished or next(polls) > most_polls)  # noqa: B023
            for partition, read in found.items():
                assert read == expected[partition][: len(read)]
                assert source.positions()[partition] == positions[partition] + len(read)
            if source.finished:
                assert found == expected


def test_a_second_source_resumes_from_the_positions_of_the_first(
    open_source: OpenSource, broker: str, topic: str
) -> None:
    sizes = [500, 300]
    write(broker, topic, numbered(*sizes))
    options = {"max.poll.records": "70"}
    with open_source(broker, topic, options=options) as first:
        polls = itertools.count()
        before = rows(first, lambda: next(polls) == 4)
        positions = first.positions()
    assert 0 < count(before) < 800
    with open_source(broker, topic, options=options) as second:
        second.seek(positions)
        after = all_rows(second)
    for partition, size in enumerate(sizes):
        assert offsets(before, partition) + offsets(after, partition) == list(range(size))


def test_paused_partitions_wait_while_the_others_flow(
    open_source: OpenSource, broker: str, topic: str
) -> None:
    sizes = [300, 300, 300]
    write(broker, topic, numbered(*sizes))
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
        fourth = all_rows(source)
    for partition, size in enumerate(sizes):
        read = [offsets(part, partition) for part in (first, second, third, fourth)]
        assert list(itertools.chain.from_iterable(read)) == list(range(size))


def test_sources_of_several_processes_divide_the_partitions_and_read_each_once(
    open_source: OpenSource, broker: str, topic: str
) -> None:
    sizes = [120, 90, 40]
    write(broker, topic, numbered(*sizes))
    start = {0: 20, 1: 30, 2: 40}
    shares = [{0, 2}, {1}, set()]
    found: dict[int, list[int]] = {}
    for own in shares:
        with open_source(broker, topic, options={"max.poll.records": "50"}) as source:
            source.divide(own)
            source.seek(start)
            source.expect_epochs({0: 0, 1: 0, 2: 0})
            assert source.caught_up().tolist() == [
                index not in own or start[index] == size for index, size in enumerate(sizes)
            ]
            source.pause({0, 1})
            assert len(source.poll(0.1)) == 0
            source.pause(())
            read = all_rows(source)
            assert set(source.lost()) == own
            assert source.lag() == 0
            found |= {index: offsets(read, index) for index in read}
            positions = source.positions()
            assert {index: positions[index] for index in own} == {
                index: sizes[index] for index in own
            }
            source.commit({0: 120, 1: 90, 2: 40})  # one process commits for all
    assert found == {0: list(range(20, 120)), 1: list(range(30, 90))}


def test_a_source_whose_partitions_are_all_paused_reads_nothing(
    open_source: OpenSource, broker: str, topic: str
) -> None:
    write(broker, topic, numbered(5, 5))
    with open_source(broker, topic, until_end=False) as source:
        source.pause({0, 1})
        assert len(source.poll(0.3)) == 0
        assert source.positions() == {0: 0, 1: 0}
        source.pause(())
        assert count(rows(source, lambda: bool(source.caught_up().all()))) == 10


def test_a_live_source_catches_up_and_sees_what_comes_later(
    open_source: OpenSource, broker: str, topic: str
) -> None:
    write(broker, topic, numbered(20, 0))
    client = client_options(broker, {})
    with open_source(broker, topic, until_end=False) as source, closing(KafkaSink(client)) as sink:
        assert source.caught_up().tolist() == [False, True]
        assert source.lag() == 20
        assert count(rows(source, lambda: bool(source.caught_up().all()))) == 20
        assert source.lag() == 0
        sink.send(topic, b"later", partition=1, time=5)
        sink.flush(PATIENCE_SECONDS)
        assert rows(source, lambda: source.positions()[1] == 1) == {1: [(0, 5, b"later")]}
        assert not source.finished


def test_values_up_to_the_limit_are_whole(open_source: OpenSource, broker: str, topic: str) -> None:
    written = [b"", b"x" * 9, b"x" * 10, b"x" * 11, b"x" * 500]
    write(broker, topic, [written])
    with open_source(broker, topic, max_record_bytes=10) as source:
        assert values(all_rows(source)) == [value[:11] for value in written]


def test_committed_offsets_are_written_and_never_read(
    open_source: OpenSource, broker: str, topic: str
) -> None:
    write(broker, topic, numbered(10, 10))
    with open_source(broker, topic) as source:
        source.commit({0: 4, 1: 9})
    with closing(KafkaConsumer(bootstrap_servers=broker, group_id="readers")) as consumer:
        committed = [consumer.committed(TopicPartition(topic, partition)) for partition in range(2)]
    assert committed == [4, 9]
    with open_source(broker, topic) as source:
        assert count(all_rows(source)) == 20


@pytest.mark.fault(32, injected="offsets are committed while another thread polls a quiet topic")
def test_a_commit_does_not_wait_for_records(
    open_source: OpenSource, broker: str, topic: str, outcome: Outcome
) -> None:
    write(broker, topic, numbered(1))
    with open_source(broker, topic, until_end=False) as source:
        poll_until(source, lambda: source.positions() == {0: 1})
        source.commit({0: 0})  # connects
        polls = itertools.count()
        most = 40
        committed = threading.Event()

        def poll_until_committed() -> None:
            while not committed.is_set() and next(polls) < most:
                source.poll(0.25)

        reader = threading.Thread(target=poll_until_committed)
        reader.start()
        for offset in (0, 1) * 5:
            source.commit({0: offset})
        committed.set()
        reader.join()
    # The polls of a quarter of a second go on for as long as the commits take.
    assert next(polls) < most
    with closing(KafkaConsumer(bootstrap_servers=broker, group_id="readers")) as consumer:
        assert consumer.committed(TopicPartition(topic, 0)) == 1
    outcome("ten commits end while the reader is in a few polls", times=10)


def test_options_of_one_client_do_not_disturb_the_other(
    open_source: OpenSource, embedded_broker: str, topic: str
) -> None:
    options = {
        "client.id": "both",
        "group.id": "g",
        "fetch.min.bytes": "1",
        "max.poll.records": "10",
        "request.timeout.ms": "20000",
        "acks": "all",
        "linger.ms": "3",
        "compression.type": "gzip",
        "batch.size": "1000",
    }
    client = client_options(embedded_broker, options)
    assert client["acks"] == "all"
    assert client["compression_type"] == "gzip"
    ensure_topic(client, topic)
    with closing(KafkaSink(client)) as sink:
        sink.send_batch(topic, pa.array([b"x"] * 100, pa.large_binary()))
    with open_source(embedded_broker, topic, options=options) as source:
        assert count(rows(source, lambda: source.positions()[0] > 0)) == 10


# -- transactions --------------------------------------------------------------------------------


@pytest.mark.slow
def test_records_between_transactions_and_of_aborted_ones_are_skipped(
    open_source: OpenSource, kafka_broker: str, topic: str
) -> None:
    ensure_topic(client_options(kafka_broker, {}), topic)
    producer = KafkaProducer(bootstrap_servers=kafka_broker, transactional_id=topic)
    try:
        producer.init_transactions()
        for number in range(6):
            producer.begin_transaction()
            for index in range(3):
                producer.send(topic, b"%d %d" % (number, index))
            producer.flush()
            (producer.abort_transaction if number % 2 else producer.commit_transaction)()
        with open_source(kafka_broker, topic) as source:
            assert source.ends() == {0: 24}
            assert values(all_rows(source)) == [
                b"%d %d" % (number, index) for number in (0, 2, 4) for index in range(3)
            ]
            assert source.positions() == {0: 24}
        producer.begin_transaction()
        producer.send(topic, b"open")
        producer.flush()
        with (
            open_source(kafka_broker, topic) as source,
            open_source(kafka_broker, topic, until_end=False) as live,
        ):
            assert count(all_rows(source)) == 9
            assert count(rows(live, lambda: live.positions() == {0: 24})) == 9
            assert not live.caught_up().any()
            producer.commit_transaction()
            assert values(rows(live, lambda: bool(live.caught_up().all()))) == [b"open"]
    finally:
        producer.close()


@pytest.mark.slow
def test_two_transactional_producers_and_a_plain_one_leave_what_was_committed(
    open_source: OpenSource, client_name: str, kafka_broker: str, topic: str
) -> None:
    ensure_topic(client_options(kafka_broker, {}), topic, partitions=2)
    expected = write_in_transactions(kafka_broker, topic, steps=60)
    with open_source(kafka_broker, topic) as source:
        found = all_rows(source)
        ends = source.ends()
        epochs = source.leader_epochs()
    for partition in range(2):
        # A position after a marker has no epoch where the client does not show markers.
        after_record = ends[partition] == offsets(found, partition)[-1] + 1
        known = after_record or client_name == KAFKA_PYTHON
        assert epochs.get(partition) == (0 if known else None)
        read = [value or b"" for value in values(found, partition)]
        assert sorted(read) == sorted(expected[partition])
        assert offsets(found, partition) == sorted(set(offsets(found, partition)))
    assert sum(ends.values()) > 60, "the markers of the transactions take offsets"


def write_in_transactions(servers: str, topic: str, *, steps: int) -> dict[int, list[bytes]]:
    """Write through two transactional producers and a plain one; return the committed values."""
    draw = random.Random(5)
    committed: dict[int, list[bytes]] = {0: [], 1: []}
    uncommitted: dict[int, list[tuple[int, bytes]]] = {}
    with ExitStack() as stack:
        sink = stack.enter_context(closing(KafkaSink(client_options(servers, {}))))
        producers = []
        for number in range(2):
            producer = KafkaProducer(
                bootstrap_servers=servers, transactional_id=f"{topic}-{number}"
            )
            stack.callback(producer.close)
            producer.init_transactions()
            producers.append(producer)
        for step in range(steps):
            number = draw.randrange(3)
            partition = draw.randrange(2)
            value = b"%d" % step
            if number == 2:
                sink.send(topic, value, partition=partition)
                sink.flush(PATIENCE_SECONDS)
                committed[partition].append(value)
                continue
            producer = producers[number]
            if number not in uncommitted:
                producer.begin_transaction()
                uncommitted[number] = []
            producer.send(topic, value, partition=partition).get(PATIENCE_SECONDS)
            uncommitted[number].append((partition, value))
            if draw.random() < 0.4:
                commits = draw.random() < 0.5
                (producer.commit_transaction if commits else producer.abort_transaction)()
                for partition, value in uncommitted.pop(number):
                    if commits:
                        committed[partition].append(value)
        for number in uncommitted:
            producers[number].abort_transaction()
    return committed


# -- records that are lost or damaged ------------------------------------------------------------

SMALL_FETCHES = {"max.poll.records": "10", "max.partition.fetch.bytes": "100"}


def write_batches_of_10(servers: str, topic: str, *, batches: int) -> None:
    client = client_options(servers, {})
    ensure_topic(client, topic, partitions=2)
    with closing(KafkaSink(client)) as sink:
        for batch in range(batches):
            for index, partition in itertools.product(range(10), range(2)):
                sink.send(topic, b"%d" % (10 * batch + index), partition=partition)
            sink.flush(PATIENCE_SECONDS)


@pytest.mark.slow
def test_records_that_retention_deleted_are_an_error_with_their_number(
    open_source: OpenSource, kafka_broker: str, topic: str
) -> None:
    write(kafka_broker, topic, numbered(100, 100))
    with (
        open_source(kafka_broker, topic, options=SMALL_FETCHES) as source,
        closing(KafkaAdminClient(bootstrap_servers=kafka_broker)) as admin,
    ):
        admin.delete_records({TopicPartition(topic, 1): 60})
        begins = "partition 1 of topic .* begins at offset 60"
        with pytest.raises(PositionLost, match=f"{begins}, but 10 comes next: 50 were deleted"):
            source.seek({1: 10})
        ends = "partition 0 of topic .* ends at offset 100"
        with pytest.raises(PositionLost, match=f"{ends}, but 101 comes next"):
            source.seek({0: 101})
        with pytest.raises(PositionLost, match=f"{begins}, but 0 comes next: 60 were deleted"):
            all_rows(source)
        source.seek({1: 60})
        assert count(all_rows(source)) >= 40


@pytest.mark.slow
def test_deleted_records_are_skipped_and_counted_where_that_is_wanted(
    open_source: OpenSource, kafka_broker: str, topic: str
) -> None:
    write_batches_of_10(kafka_broker, topic, batches=10)
    with (
        closing(KafkaAdminClient(bootstrap_servers=kafka_broker)) as admin,
        open_source(kafka_broker, topic, options=SMALL_FETCHES, on_lost="skip") as skipping,
        open_source(kafka_broker, topic, options=SMALL_FETCHES) as stopping,
    ):
        first = rows(skipping, lambda: skipping.positions()[1] > 0)
        skipping.pause({1})  # confluent-kafka drops what it has fetched
        read = skipping.positions()[1]
        admin.delete_records({TopicPartition(topic, 1): 60})
        skipping.pause(())
        second = all_rows(skipping)
        assert 0 < read < 60
        assert skipping.lost() == {0: 0, 1: 60 - read}
        assert offsets(first, 1) + offsets(second, 1) == [*range(read), *range(60, 100)]
        stopping.seek({0: 5, 1: 10}, skip_lost=True)
        assert (stopping.positions(), stopping.lost()) == ({0: 5, 1: 60}, {0: 0, 1: 50})
        ends = "partition 0 of topic .* ends at offset 100"
        with pytest.raises(PositionLost, match=f"{ends}, but 101 comes next"):
            stopping.seek({0: 101}, skip_lost=True)


TRUNCATED = (
    "partition 0 of topic .* lost records that were read already: .* "
    r"\(of leader epoch 0 it holds the offsets before 20 alone\)"
)


def send_in_tens(servers: str, topic: str, start: int, end: int) -> None:
    """Send the numbers to partition 0, in batches of ten."""
    with closing(KafkaSink(client_options(servers, {}))) as sink:
        for index in range(start, end):
            sink.send(topic, b"%d" % index, partition=0)
            if index % 10 == 9:
                sink.flush(PATIENCE_SECONDS)


class BeforeTheLoss:
    """Sources of both clients that have read a topic, and what a stopped run of each has kept."""

    def __init__(self, servers: str, topic: str) -> None:
        self.servers = servers
        self.topic = topic
        send_in_tens(servers, topic, 0, 40)
        self.sources = {name: self.open(name) for name in (KAFKA_PYTHON, CONFLUENT)}
        for source in self.sources.values():
            poll_until(source, lambda source=source: source.positions() == {0: 40})  # type: ignore[misc]
        self.positions = {0: 40}
        self.epochs = {name: source.leader_epochs() for name, source in self.sources.items()}
        assert self.epochs == dict.fromkeys(self.sources, {0: 0})

    def open(self, client_name: str) -> TopicSource:
        make: Callable[..., TopicSource] = KafkaSource
        if client_name == CONFLUENT:
            make = importlib.import_module("stream_ctr.connectors.kafka.confluent").ConfluentSource
        return make([self.topic], client=client_options(self.servers, {}), group="readers")

    def close(self) -> None:
        for source in self.sources.values():
            source.close()


@pytest.fixture(scope="module")
def losses(apache: ApacheBroker) -> Iterator[tuple[BeforeTheLoss, BeforeTheLoss]]:
    """Two topics, of which the first lost its last 20 records. Then both grew by 40 records."""
    pytest.importorskip("confluent_kafka")
    servers = apache.bootstrap_servers
    with ExitStack() as stack:
        topics = [f"topic-{uuid.uuid4().hex[:12]}" for _ in range(2)]
        for topic in topics:
            ensure_topic(client_options(servers, {}), topic)
        lossy, whole = (
            stack.enter_context(closing(BeforeTheLoss(servers, topic))) for topic in topics
        )
        apache.lose_records(lossy.topic, 20)
        for topic in topics:
            send_in_tens(servers, topic, 100, 140)
        yield lossy, whole


@pytest.mark.slow
@pytest.mark.parametrize("client_name", [KAFKA_PYTHON, CONFLUENT])
@pytest.mark.parametrize("state", ["stopped", "running"])
@pytest.mark.fault(
    33,
    injected="20 of 40 records, which were read, are cut off a log that then grows past the "
    "position, while the reader is stopped, and while it reads",
)
def test_a_log_that_lost_records_that_were_read_is_an_error_even_after_it_has_grown(
    state: str,
    client_name: str,
    losses: tuple[BeforeTheLoss, BeforeTheLoss],
    kafka_version: str,
    outcome: Outcome,
) -> None:
    lossy, _ = losses
    source = lossy.sources[client_name]
    with ExitStack() as stack:
        if state == "stopped":
            source = stack.enter_context(closing(lossy.open(client_name)))
            source.seek(lossy.positions)
            source.expect_epochs(lossy.epochs[client_name])
        for _ in range(2):
            with pytest.raises(LogTruncated, match=TRUNCATED):
                poll_nothing(source)
        assert source.positions() == lossy.positions
    outcome("exit code 5 before the first record that follows", broker=kafka_version)


@pytest.mark.slow
@pytest.mark.parametrize("client_name", [KAFKA_PYTHON, CONFLUENT])
def test_another_leader_whose_log_holds_all_records_is_no_error(
    client_name: str, losses: tuple[BeforeTheLoss, BeforeTheLoss]
) -> None:
    _, whole = losses
    source = whole.sources[client_name]
    poll_until(source, lambda: source.positions() == {0: 80})
    later = source.leader_epochs()
    assert later[0] > 0
    for _ in range(5):
        source.seek(whole.positions)
        source.expect_epochs(whole.epochs[client_name])
        found = rows(source, lambda: source.positions() == {0: 80})
        assert values(found) == [b"%d" % index for index in range(100, 140)]
        assert source.leader_epochs() == later
        source.pause({0})
        source.poll(0.0)
        source.pause(())
    source.seek({0: 45})
    assert source.leader_epochs() == {}
    assert offsets(rows(source, lambda: source.positions() == {0: 80})) == [*range(45, 80)]


@pytest.fixture(scope="module")
def damaged(apache: ApacheBroker) -> str:
    """Three batches of 10 records in a topic; the second has a wrong byte on the broker's disk.

    A broker that is killed later cuts the damage off when it starts again.
    """
    topic = f"topic-{uuid.uuid4().hex[:12]}"
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
def test_a_damaged_batch_stops_reading_where_it_is_or_is_skipped(
    open_source: OpenSource, apache: ApacheBroker, damaged: str, outcome: Outcome
) -> None:
    stops = f"partition 0 of topic '{damaged}' cannot be read on at offset 10: .*failed crc"
    with open_source(apache.bootstrap_servers, damaged) as source:
        found = rows(source, lambda: source.positions()[0] == 10)
        assert values(found) == [b"value %d" % index for index in range(10)]
        for _ in range(2):  # it neither hangs nor goes on
            with pytest.raises(KafkaReadFailed, match=stops):
                poll_forever(source)
            assert source.positions()[0] == 10
    with open_source(apache.bootstrap_servers, damaged, on_lost="skip") as source:
        assert offsets(all_rows(source)) == [*range(10), *range(20, 30)]
        assert source.lost() == {0: 10, 1: 0}
        source.seek({0: 13})
        assert offsets(all_rows(source)) == [*range(20, 30)]
    outcome(
        "reading stops with partition and offset; "
        "with input.on_lost = skip its 10 offsets are passed over and counted"
    )


@pytest.mark.slow
def test_a_damaged_batch_of_a_partition_that_is_paused_meanwhile_is_reported(
    open_source: OpenSource, apache: ApacheBroker, damaged: str
) -> None:
    with open_source(apache.bootstrap_servers, damaged) as source:
        assert count(rows(source, lambda: source.positions()[0] > 0)) == 10
        source.pause({0})
        assert len(source.poll(0.3)) == 0
        source.pause(())
        with pytest.raises(KafkaReadFailed, match="cannot be read on at offset 10"):
            poll_forever(source)
    with open_source(apache.bootstrap_servers, damaged, on_lost="skip") as source:
        assert count(rows(source, lambda: source.positions()[0] > 0)) == 10
        source.pause({0})
        assert (len(source.poll(0.3)), source.lost()[0]) == (0, 0)
        source.pause(())
        assert offsets(all_rows(source)) == [*range(20, 30)]
        assert source.lost()[0] == 10


@pytest.mark.slow
def test_other_partitions_are_read_after_damage_whose_end_is_not_found(
    open_source: OpenSource, apache: ApacheBroker, damaged: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_options(apache.bootstrap_servers, {})
    with open_source(apache.bootstrap_servers, damaged, on_lost="skip", until_end=False) as source:
        monkeypatch.setattr(source._reader, "end_of_damage", lambda failure: None)
        with pytest.raises(KafkaReadFailed, match="cannot be read on at offset 10"):
            poll_forever(source)
        source.pause({0})
        before = source.positions()[1]
        with closing(KafkaSink(client)) as sink:
            sink.send(damaged, b"later", partition=1)
        found = rows(source, lambda: source.positions()[1] > before)
        assert values(found, 1)[-1] == b"later"


# -- batches that expand to much more than they are -----------------------------------------------


@connects
@pytest.mark.slow
def test_a_batch_that_expands_beyond_the_limit_is_read_in_pieces(
    open_source: OpenSource,
    client_name: str,
    kafka_broker: str,
    topic: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(codecs, "MAX_BATCH_BYTES", 1 << 20)
    if client_name == CONFLUENT:
        confluent = importlib.import_module("stream_ctr.connectors.kafka.confluent")
        monkeypatch.setitem(confluent._RULES, "receive.message.max.bytes", 4 << 20)
    client = client_options(kafka_broker, {"max.request.size": str(1 << 30)})
    ensure_topic(client, topic, partitions=4)
    for partition, compression in enumerate(("zstd", "gzip", "lz4", "snappy")):
        with closing(KafkaSink(client, compression=compression)) as sink:
            for value in (bytes(3 << 20), bytes(5 << 20), b"after"):
                sink.send(topic, value, partition=partition)
                sink.flush(PATIENCE_SECONDS)
    options = {"fetch.max.bytes": str(2 << 20)}
    with open_source(kafka_broker, topic, options=options, max_record_bytes=10) as source:
        found = all_rows(source)
        assert source.lost() == dict.fromkeys(range(4), 0)
    for partition in range(4):
        assert offsets(found, partition) == [0, 1, 2]
        assert values(found, partition) == [bytes(11), bytes(11), b"after"]


_READ_BOMB = """
import sys
from stream_ctr.connectors.kafka import KafkaSource, client_options
if sys.argv[3] == "confluent":
    from stream_ctr.connectors.kafka.confluent import ConfluentSource as KafkaSource
def peak():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM"))
client = client_options(sys.argv[1], {})
source = KafkaSource([sys.argv[2]], client=client, group="g", until_end=True)
before, lengths = peak(), []
while not source.finished:
    lengths += [value.as_buffer().size for value in source.poll(1.0).value]
print(*lengths, peak() - before)
"""


@pytest.fixture(scope="module")
def bomb(apache: ApacheBroker) -> Callable[[str, int], str]:
    """Return the function that makes a topic with a value of so many MiB, then a small one."""
    made: dict[tuple[str, int], str] = {}

    def make(compression: str, mib: int) -> str:
        topic = made.setdefault((compression, mib), f"topic-{uuid.uuid4().hex[:12]}")
        client = client_options(apache.bootstrap_servers, {"max.request.size": str(2 << 30)})
        if ensure_topic(client, topic):
            with closing(KafkaSink(client, compression=compression)) as sink:
                sink.send(topic, bytes(mib << 20))
                sink.flush(PATIENCE_SECONDS)
                sink.send(topic, b"after")
        return topic

    return make


@connects
@pytest.mark.long
@pytest.mark.parametrize(
    ("compression", "mib"),
    [
        pytest.param(
            *("gzip", 900),
            marks=pytest.mark.bad_input(
                "a value that decompresses past the limit",
                via="a batch of gzip, 0.9 MB on the wire and 900 MiB in memory",
            ),
        ),
        pytest.param(
            *("zstd", 450),
            marks=pytest.mark.bad_input(
                "a value that decompresses past the limit",
                via="a batch of zstd, 14 kB on the wire and 450 MiB in memory",
            ),
        ),
    ],
)
def test_a_bomb_is_cut_to_the_longest_record_and_the_next_record_is_read(
    bomb: Callable[[str, int], str],
    client_name: str,
    compression: str,
    mib: int,
    apache: ApacheBroker,
    outcome: Outcome,
) -> None:
    topic = bomb(compression, mib)
    command = [sys.executable, "-c", _READ_BOMB, apache.bootstrap_servers, topic, client_name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    cut, after, added_mib = map(int, done.stdout.split())
    assert (cut, after) == ((1 << 20) + 1, 5)
    if client_name == KAFKA_PYTHON:
        assert added_mib < 2.5 * (codecs.MAX_BATCH_BYTES >> 20)
    outcome(
        f"cut to 1 MiB and a byte, and the next record is read; "
        f"memory rose by {added_mib:,} MiB with {client_name}"
    )


# -- topics that change --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_topic_that_is_created_again_or_gets_partitions_is_reported(
    open_source: OpenSource, kafka_broker: str, topic: str
) -> None:
    client = client_options(kafka_broker, {})
    grows = f"{topic}-grows"
    again = f"{topic}-again"
    for name in (grows, again):
        write(kafka_broker, name, numbered(5, 5))
    live: dict[str, Any] = {"until_end": False, "topic_check_seconds": 0.3}
    with (
        closing(KafkaAdminClient(bootstrap_servers=kafka_broker)) as admin,
        open_source(kafka_broker, grows, **live) as first,
        open_source(kafka_broker, again, **live) as second,
    ):
        poll_until(first, lambda: bool(first.caught_up().all()))
        poll_until(second, lambda: bool(second.caught_up().all()))
        (before,) = second.topic_ids().values()
        admin.create_partitions({grows: 5})
        added = f"partitions 2, 3, 4 were added to topic '{grows}', which had 2"
        with pytest.raises(TopicChanged, match=added):
            poll_forever(first)
        admin.delete_topics([again])
        poll_until(second, lambda: topic_partitions(client, again) is None)
        write(kafka_broker, again, numbered(50, 50))
        with open_source(kafka_broker, again) as other:
            (now,) = other.topic_ids().values()
        assert before != now
        created = f"'{again}' was deleted and created again: its id was {before} and is {now}"
        with pytest.raises(TopicChanged, match=created):
            poll_forever(second)


_READ_UNTIL_IT_FAILS = """
import sys
from stream_ctr.connectors.kafka import KafkaSource, client_options
if sys.argv[3] == "confluent":
    from stream_ctr.connectors.kafka.confluent import ConfluentSource as KafkaSource
source = KafkaSource([sys.argv[2]], client=client_options(sys.argv[1], {}), group="g")
try:
    while True:
        for value in source.poll(0.1).value.to_pylist():
            print(value.decode(), flush=True)
except Exception as error:
    print(type(error).__name__, flush=True)
"""


@connects
@pytest.mark.slow
@pytest.mark.fault(
    28, injected="topic deleted, created again and filled beyond the position during a SIGSTOP"
)
def test_no_record_of_a_topic_that_was_created_again_during_a_stop_is_returned(
    client_name: str, kafka_broker: str, topic: str, kafka_version: str, outcome: Outcome
) -> None:
    write(kafka_broker, topic, [[b"old"] * 20])
    command = [sys.executable, "-c", _READ_UNTIL_IT_FAILS, kafka_broker, topic, client_name]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reading,
        closing(KafkaAdminClient(bootstrap_servers=kafka_broker)) as admin,
    ):
        try:
            assert reading.stdout
            assert [reading.stdout.readline() for _ in range(20)] == ["old\n"] * 20
            reading.send_signal(signal.SIGSTOP)
            stopped_at = time.monotonic()
            admin.delete_topics([topic])
            wait_until(lambda: topic_partitions(client_options(kafka_broker, {}), topic) is None)
            write(kafka_broker, topic, [[b"new"] * 60])
            time.sleep(max(stopped_at + 1.5 - time.monotonic(), 0.0))
            reading.send_signal(signal.SIGCONT)
            assert reading.stdout.readline() == "TopicChanged\n"
        finally:
            reading.kill()
    outcome("exit code 5 with the reason; no record of the new topic is read", broker=kafka_version)


@pytest.mark.slow
def test_a_position_beyond_a_topic_that_was_created_again_is_reported_as_that(
    open_source: OpenSource, kafka_broker: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "TOPIC_NEWS_SECONDS", PATIENCE_SECONDS)
    write(kafka_broker, topic, numbered(50))
    arguments: dict[str, Any] = {"topic_check_seconds": 1e6, "on_lost": "skip"}
    with (
        closing(KafkaAdminClient(bootstrap_servers=kafka_broker)) as admin,
        open_source(kafka_broker, topic, until_end=False, **arguments) as source,
    ):
        poll_until(source, lambda: source.positions() == {0: 50})
        source.pause({0})
        source.poll(0.5)  # no fetch is on its way now that would fail while the topic is away
        admin.delete_topics([topic])
        write(kafka_broker, topic, numbered(3))
        source.pause(())
        with pytest.raises(TopicChanged, match="was deleted and created again"):
            poll_forever(source)


class NoNews:
    """`TopicNews` of brokers that have heard of no change."""

    pending = False

    def first(self) -> Topics:
        return {}

    def ask(self) -> None: ...

    def forget(self) -> None: ...

    def answer(self) -> Topics | None:
        return None


@pytest.mark.slow
@pytest.mark.parametrize("comes", [True, False], ids=["news", "no news"])
def test_nothing_is_read_of_a_log_that_grows_past_a_position_it_did_not_hold(
    comes: bool,
    open_source: OpenSource,
    kafka_broker: str,
    topic: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if comes:
        monkeypatch.setattr(timeouts, "TOPIC_NEWS_SECONDS", PATIENCE_SECONDS)
    write(kafka_broker, topic, numbered(50))
    arguments: dict[str, Any] = {"topic_check_seconds": 1e6, "on_lost": "skip"}
    with (
        closing(KafkaAdminClient(bootstrap_servers=kafka_broker)) as admin,
        open_source(kafka_broker, topic, until_end=False, **arguments) as source,
    ):
        poll_until(source, lambda: source.positions() == {0: 50})
        source.pause({0})
        source.poll(0.5)
        with monkeypatch.context() as slow_news:
            slow_news.setattr(source._topics, "_news", NoNews())
            admin.delete_topics([topic])
            write(kafka_broker, topic, numbered(3))
            source.pause(())
            poll_until(source, lambda: source._doubt is not None)
            write(kafka_broker, topic, numbered(100))
            if not comes:
                with pytest.raises(PositionLost, match="created again"):
                    poll_nothing(source)
                return
            assert not len(source.poll(0.5))
        with pytest.raises(TopicChanged, match="was deleted and created again"):
            poll_nothing(source)


@pytest.mark.slow
def test_a_topic_that_is_deleted_is_reported_after_a_while_and_not_created(
    open_source: OpenSource,
    client_name: str,
    broker: str,
    topic: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if client_name == CONFLUENT and broker == request.getfixturevalue("embedded_broker"):
        pytest.skip("Tansu 0.6 answers with a leader and no name, and librdkafka 2.16.0 crashes")
    monkeypatch.setattr(timeouts, "TOPIC_MISSING_SECONDS", 1.0)
    write(broker, topic, numbered(5))
    with (
        closing(KafkaAdminClient(bootstrap_servers=broker)) as admin,
        open_source(broker, topic, until_end=False, topic_check_seconds=0.2) as source,
    ):
        poll_until(source, lambda: source.positions() == {0: 5})
        admin.delete_topics([topic])
        started = time.monotonic()
        with pytest.raises(TopicChanged, match=f"topic '{topic}' was deleted while it was read"):
            poll_forever(source)
        assert time.monotonic() - started > 0.9
    assert topic_partitions(client_options(broker, {}), topic) is None


@connects
def test_a_missing_topic_is_named_with_similar_ones_and_how_to_create_it(
    make_source: Callable[..., TopicSource], broker: str, topic: str
) -> None:
    client = client_options(broker, {})
    ensure_topic(client, topic)
    misspelt = topic + "s"
    expected = (
        f"topic '{misspelt}' does not exist on {broker} .*near it: {topic}"
        f".*--create --topic {misspelt}"
    )
    with pytest.raises(KafkaTopicMissing, match=expected):
        make_source([topic, misspelt], client=client, group="g")
    assert topic_partitions(client, misspelt) is None, "asking for it has created it"


# -- brokers that go away or are silent ----------------------------------------------------------


@pytest.mark.slow
def test_reading_goes_on_when_a_killed_broker_comes_back(
    open_source: OpenSource, apache: ApacheBroker, topic: str
) -> None:
    write(apache.bootstrap_servers, topic, numbered(50, 50))
    with open_source(apache.bootstrap_servers, topic, until_end=False) as source:
        before = rows(source, lambda: bool(source.caught_up().all()))
        apache.kill()
        try:
            assert [len(source.poll(0.2)) for _ in range(5)] == [0] * 5
            # Silence is noticed though the client tries to connect again and again.
            poll_until(source, lambda: source.silent_seconds() > 1.5)
        finally:
            apache.start()
        write(apache.bootstrap_servers, topic, numbered(50, 50))
        after = rows(source, lambda: source.positions() == {0: 100, 1: 100})
    for partition in range(2):
        assert offsets(before, partition) + offsets(after, partition) == list(range(100))


@pytest.mark.slow
def test_partitions_without_records_are_not_silent(
    open_source: OpenSource, broker: str, topic: str
) -> None:
    write(broker, topic, numbered(5, 0, 0))
    with open_source(broker, topic, until_end=False) as source:
        begun = time.monotonic()
        poll_until(source, lambda: time.monotonic() - begun > 1.5)
        # On a slow machine answers come late, but they come.
        poll_until(source, lambda: source.silent_seconds() == 0)
        time.sleep(1.2)
        wait_until(lambda: source.silent_seconds() == 0)  # without a poll no question is open


@pytest.mark.slow
def test_a_frozen_broker_shows_as_silence_and_a_thawed_one_does_not(
    open_source: OpenSource, apache: ApacheBroker, topic: str
) -> None:
    write(apache.bootstrap_servers, topic, numbered(5, 0))
    live: dict[str, Any] = {"until_end": False, "topic_check_seconds": 0.5}
    with open_source(apache.bootstrap_servers, topic, **live) as source:
        poll_until(source, lambda: bool(source.caught_up().all()) and source.silent_seconds() == 0)
        apache.freeze()
        try:
            started = time.monotonic()
            poll_until(source, lambda: source.silent_seconds() > 2.5)
            # An answer may have been due for a while before.
            assert time.monotonic() - started > 0.9
            source.pause({0, 1})
            assert source.silent_seconds() == 0, "no partition is wanted"
            source.pause({1})
            assert source.silent_seconds() > 2.5
        finally:
            apache.thaw()
        poll_until(source, lambda: source.silent_seconds() == 0)


# -- connections that fail -----------------------------------------------------------------------


@pytest.fixture
def refusal(
    make_source: Callable[..., TopicSource], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, dict[str, str], str], KafkaRefused]:
    """Return the function that returns the refusal of a broker, whose words must match."""

    def refused(servers: str, options: dict[str, str], expected: str) -> KafkaRefused:
        pattern = f"{servers} accepts connections, but .*{expected}"
        for seconds in (0.6, 5.0, PATIENCE_SECONDS):  # a busy broker does not explain it at once
            monkeypatch.setattr(timeouts, "BOOTSTRAP_SECONDS", seconds)
            with pytest.raises(KafkaRefused) as caught:
                make_source(["clicks"], client=client_options(servers, options), group="g")
            if re.search(pattern, str(caught.value)):
                break
        assert re.search(pattern, str(caught.value)), caught.value
        return caught.value

    return refused


@connects
def test_an_unreachable_broker_is_an_error_in_time(
    make_source: Callable[..., TopicSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "BOOTSTRAP_SECONDS", 0.3)
    expected = "no Kafka broker answered within 0.3 s .*127.0.0.1:1: connection refused"
    with pytest.raises(KafkaUnreachable, match=expected):
        make_source(["clicks"], client=client_options("127.0.0.1:1", {}), group="g")


@connects
@pytest.mark.slow
def test_a_refused_login_and_missing_tls_are_told_apart_from_silence(
    refusal: Callable[[str, dict[str, str], str], KafkaRefused], apache: ApacheBroker
) -> None:
    login = {
        "security.protocol": "SASL_PLAINTEXT",
        "sasl.mechanism": "PLAIN",
        "sasl.username": SASL_USER,
        "sasl.password": "wrong",
    }
    scram = login | {"sasl.mechanism": "SCRAM-SHA-256"}
    tls = {"security.protocol": "SSL"}
    refusal(apache.sasl_servers, login, "the login (was refused|failed), check sasl.username")
    refusal(apache.sasl_servers, scram, "the login .*sasl.mechanism")
    refusal(apache.sasl_servers, {}, "does it want TLS or a login")
    refusal(apache.bootstrap_servers, tls, "TLS failed")
    refusal(apache.bootstrap_servers, login, "this listener wants no login")


@connects
@pytest.mark.slow
def test_a_tls_client_does_not_hang_at_a_silent_peer(
    make_source: Callable[..., TopicSource], embedded_broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "BOOTSTRAP_SECONDS", 0.3)
    client = client_options(embedded_broker, {"security.protocol": "SSL"})
    with pytest.raises(KafkaRefused, match="accepts connections, but refused this client"):
        make_source(["t"], client=client, group="g")


@connects
@pytest.mark.slow
def test_a_password_logs_in_and_never_appears_in_a_log(
    make_source: Callable[..., TopicSource],
    apache: ApacheBroker,
    topic: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    jaas = (
        "org.apache.kafka.common.security.plain.PlainLoginModule required "
        f'username="{SASL_USER}" password="{SASL_PASSWORD}";'
    )
    options = {
        "security.protocol": "SASL_PLAINTEXT",
        "sasl.mechanism": "PLAIN",
        "sasl.jaas.config": jaas,
    }
    client = client_options(apache.sasl_servers, options)
    with caplog.at_level(logging.DEBUG):
        ensure_topic(client, topic)
        with closing(KafkaSink(client)) as sink:
            sink.send(topic, b"x")
        with closing(make_source([topic], client=client, group="g", until_end=True)) as source:
            assert count(all_rows(source)) == 1
            source.commit(source.positions())
    assert any(
        record.levelno == logging.DEBUG and record.name.startswith("kafka")
        for record in caplog.records
    )
    assert SASL_PASSWORD not in caplog.text
    assert SASL_PASSWORD not in repr(client) + str(client)


@connects
@pytest.mark.security(
    "TLS and login are checked",
    how="SASL_SSL with SCRAM-SHA-256: wrong password, wrong authority, wrong host name",
)
@pytest.mark.slow
def test_tls_with_a_scram_login_carries_records_and_a_refusal_names_its_cause(
    open_source: OpenSource,
    refusal: Callable[[str, dict[str, str], str], KafkaRefused],
    apache: ApacheBroker,
    topic: str,
    tmp_path: Path,
) -> None:
    good = tls_login(apache)
    write(apache.bootstrap_servers, topic, numbered(2000))
    with open_source(apache.tls_servers, topic, options=good) as source:
        assert count(all_rows(source)) == 2000
    make_certificates(tmp_path)
    by_address = apache.tls_servers.replace("localhost", "127.0.0.1")
    wrong_password = {"sasl.password": "another-" + SASL_PASSWORD}
    other_authority = {"ssl.ca.location": str(tmp_path / "ca.pem")}
    for servers, options, expected in (
        (
            apache.tls_servers,
            wrong_password,
            "the login (was refused|failed), check sasl.username",
        ),
        (
            apache.tls_servers,
            other_authority,
            "the certificate is not of an authority that is trusted here",
        ),
        (by_address, {}, "the certificate is .*another host's"),
    ):
        error = refusal(servers, good | options, expected)
        assert SASL_PASSWORD not in f"{error!r} {error.__cause__!r}"


@connects
@pytest.mark.security(
    "TLS and login are checked", how="a listener whose certificate expired an hour ago"
)
def test_an_expired_certificate_is_named(
    refusal: Callable[[str, dict[str, str], str], KafkaRefused], tmp_path: Path
) -> None:
    """The handshake refuses it, so nothing behind it has to be a broker."""
    make_certificates(tmp_path, days=-1 / 24)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")

    class Refused(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError), context.wrap_socket(self.request, server_side=True):
                pass

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Refused) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers = f"localhost:{server.server_address[1]}"
        options = {"security.protocol": "SSL", "ssl.ca.location": str(tmp_path / "ca.pem")}
        refusal(servers, options, "expired")
        server.shutdown()


def tls_login(apache: ApacheBroker) -> dict[str, str]:
    """Return the options that log in to the broker's listener with TLS."""
    return {
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "SCRAM-SHA-256",
        "sasl.username": SASL_USER,
        "sasl.password": SASL_PASSWORD,
        "ssl.ca.location": str(apache.ca),
    }
