"""The private members of kafka-python: that the check knows them all, and what uses them."""

from __future__ import annotations

import ast
import inspect
import logging
import struct
import zlib
from collections.abc import Iterator
from contextlib import closing
from types import ModuleType, SimpleNamespace
from typing import Any

import kafka
import kafka.record.memory_records
import pytest
from kafka import KafkaConsumer, TopicPartition
from kafka.cluster import ClusterMetadata
from kafka.consumer.fetcher import Fetcher
from kafka.consumer.subscription_state import SubscriptionState
from kafka.record.default_records import DefaultRecordBatchBuilder
from kafka.record.legacy_records import LegacyRecordBatchBuilder
from support.altered_kafka import FETCHER_NAMES, altered_cluster, altered_fetcher, renamed
from support.sources import all_rows, numbered, values, write

from stream_ctr.connectors.kafka import (
    KafkaSource,
    client,
    client_options,
    codecs,
    ensure_topic,
    inside,
    stored_records,
)
from stream_ctr.connectors.kafka.public_reader import PublicReader
from stream_ctr.connectors.kafka.record_batches import (
    FORMAT,
    GZIP,
    LZ4,
    SNAPPY,
    ZSTD,
    Columns,
    DamagedBatch,
)


def consumer(
    fetcher: Any = Fetcher, subscription: Any = SubscriptionState, cluster: Any = ClusterMetadata
) -> Any:
    """Return the private members of a consumer that is connected to nothing."""
    connection = SimpleNamespace(_manager=SimpleNamespace(_net=None))
    return SimpleNamespace(
        _fetcher=fetcher(connection, subscription(), isolation_level="read_committed"),
        _subscription=subscription(),
        _cluster=cluster(),
    )


# -- the check -----------------------------------------------------------------------------------


def test_the_installed_release_is_known() -> None:
    assert inside.why_not_columns(consumer()) == ""
    assert inside.why_not_bounded(consumer()) == ""


CLUSTER_NAMES = {
    "_last_successful_refresh_ms": "_refreshed_ms",
    "partitions_for_topic": "numbers_of_topic",
    "request_update": "update_soon",
    "topic_id": "id_of_topic",
}
SUBSCRIPTION_NAMES = {"assignment": "assigned", "is_paused": "paused_is"}


@pytest.mark.parametrize("name", [*FETCHER_NAMES, "send_fetches"])
def test_a_fetcher_without_a_member_reads_no_columns(name: str) -> None:
    names = {name: FETCHER_NAMES.get(name, "another_name")}
    assert inside.why_not_columns(consumer(altered_fetcher(names)))


@pytest.mark.parametrize("name", CLUSTER_NAMES)
def test_cluster_metadata_without_a_member_reads_no_columns(name: str) -> None:
    cluster = altered_cluster({name: CLUSTER_NAMES[name]})
    assert name in inside.why_not_columns(consumer(cluster=cluster))


@pytest.mark.parametrize("name", SUBSCRIPTION_NAMES)
def test_a_subscription_without_a_member_reads_no_columns(name: str) -> None:
    state = renamed(kafka.consumer.subscription_state, {name: SUBSCRIPTION_NAMES[name]})
    assert inside.why_not_columns(consumer(subscription=state.SubscriptionState))


def test_a_method_with_other_arguments_is_no_member() -> None:
    class Other(Fetcher):  # type: ignore[misc]
        def _handle_fetch_response(self, response: Any) -> None: ...

    assert "_handle_fetch_response" in inside.why_not_columns(consumer(Other))


class ForgetsPositions(Fetcher):  # type: ignore[misc]
    """Returns records and stays where it is."""

    def fetched_records(self, *arguments: Any, **options: Any) -> Any:
        positions = {
            partition: state.position for partition, state in self._subscriptions.assignment.items()
        }
        fetched = super().fetched_records(*arguments, **options)
        for partition, position in positions.items():
            self._subscriptions.assignment[partition].position = position
        return fetched


class KeepsNoError(Fetcher):  # type: ignore[misc]
    """Forgets an error that it should keep for the next poll."""

    def fetched_records(self, *arguments: Any, **options: Any) -> Any:
        fetched = super().fetched_records(*arguments, **options)
        self._next_in_line_exception_metadata = None
        return fetched


class IgnoresTheParser(Fetcher):  # type: ignore[misc]
    """Looks the parser up in its class, where nobody can replace it."""

    def _parse_fetched_data(self, completed: Any) -> Any:
        self.__dict__.pop("PartitionRecords", None)
        return super()._parse_fetched_data(completed)


@pytest.mark.parametrize("fetcher", [ForgetsPositions, KeepsNoError, IgnoresTheParser])
def test_members_with_the_right_names_that_behave_otherwise_are_noticed(fetcher: Any) -> None:
    assert inside.why_not_columns(consumer(fetcher))


def test_a_parser_that_cannot_be_replaced_is_not_bounded() -> None:
    assert inside.why_not_bounded(consumer(IgnoresTheParser))
    assert inside.why_not_bounded(consumer(altered_fetcher()))


@pytest.mark.parametrize(
    ("module", "batch", "method"),
    [
        (kafka.record.default_records, "DefaultRecordBatch", "_maybe_uncompress"),
        (kafka.record.legacy_records, "LegacyRecordBatch", "_decompress"),
    ],
)
def test_batches_that_expand_in_another_way_are_not_bounded(
    module: ModuleType, batch: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = renamed(module, {method: "_expand_otherwise"})
    monkeypatch.setattr(kafka.record.memory_records, batch, getattr(other, batch))
    assert "unexpected: the bounded codec" in inside.why_not_bounded(consumer())


def test_every_private_member_that_is_used_is_in_these_tests() -> None:
    """A member that is added to `inside` must be added here, or to those that may be missing."""
    may_be_missing = {"_cluster.config", "_cluster.brokers", "producer._sender"}
    known = {
        *(f"fetcher.{name}" for name in FETCHER_NAMES),
        *(f"_cluster.{name}" for name in CLUSTER_NAMES),
        "fetcher.send_fetches",
        "consumer._fetcher",
        "consumer._subscription",
        "consumer._cluster",
    }
    used = set(members_of(inspect.getsource(inside)))
    assert used <= known | may_be_missing, used - known - may_be_missing
    assert used >= known - {"fetcher._subscriptions"}


def members_of(source: str) -> Iterator[str]:
    """Yield `owner.member` for the members of the client's objects outside of the trials."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if "Trial" not in getattr(node, "name", "")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value).removeprefix("self.").removeprefix("_fetcher.")
            owner = {"_fetcher": "fetcher", "consumer._cluster": "_cluster"}.get(owner, owner)
            if owner in {"consumer", "fetcher", "_cluster", "producer"} and node.attr not in {
                "seek",
                "close",
            }:
                yield f"{owner}.{node.attr}"


# -- what a source does with another release -----------------------------------------------------


@pytest.fixture
def another_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kafka-python that calls itself 9.9 and has other private names."""
    monkeypatch.setattr("kafka.consumer.group.Fetcher", altered_fetcher())
    monkeypatch.setattr(kafka, "__version__", "9.9")
    client._warn_of_release.cache_clear()


@pytest.mark.usefixtures("another_release")
def test_a_warning_names_the_release_once_and_says_what_is_worse(
    embedded_broker: str, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(embedded_broker, topic, numbered(5))
    options = client_options(embedded_broker, {})
    for _ in range(2):
        with closing(KafkaSource([topic], client=options, group="g", until_end=True)) as source:
            assert isinstance(source._reader, PublicReader)
            assert values(all_rows(source)) == [b"0", b"1", b"2", b"3", b"4"]
    assert [record.value for record in stored_records(options, topic)][:2] == [b"0", b"1"]
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    (text,) = [record.getMessage() for record in warnings if "kafka-python" in record.getMessage()]
    assert text.startswith("kafka-python 9.9 differs inside from the releases that are known (")
    assert "through its public interface, which is slower, and a compressed batch may" in text


def test_a_known_release_is_not_warned_of(
    embedded_broker: str, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    client._warn_of_release.cache_clear()
    write(embedded_broker, topic, numbered(5))
    options = client_options(embedded_broker, {})
    with closing(KafkaSource([topic], client=options, group="g", until_end=True)) as source:
        assert not isinstance(source._reader, PublicReader)
    assert "kafka-python" not in caplog.text


# -- bounded decompression -----------------------------------------------------------------------


def legacy(magic: int, codec: int, *records: bytes) -> bytes:
    builder = LegacyRecordBatchBuilder(magic, codec, 1 << 20)
    for offset, value in enumerate(records):
        builder.append(offset, 1000 + offset, None, value)
    return bytes(builder.build())


def modern(codec: int, *records: bytes) -> bytes:
    builder = DefaultRecordBatchBuilder(FORMAT, codec, 0, -1, -1, -1, 1 << 20)
    for offset, value in enumerate(records):
        builder.append(offset, 1000 + offset, b"key", value, [("name", b"header")])
    return bytes(builder.build())


class Reading:
    """A consumer that is connected to nothing and parses with bounded codecs."""

    def __init__(self) -> None:
        self.trial = inside._Trial(consumer())
        inside.bound_batches(self.trial, codecs.CODECS)

    def read(self, stored: bytes) -> list[Any]:
        self.trial.answer(0, stored)
        polled = self.trial.poll()
        return list(*polled.values())


@pytest.mark.parametrize("codec", [0, GZIP, SNAPPY, LZ4, ZSTD])
def test_batches_are_read_with_keys_and_headers_whatever_their_codec(codec: int) -> None:
    first, second = Reading().read(modern(codec, b"a" * 1000, b"b"))
    assert (first.key, first.value, first.headers) == (b"key", b"a" * 1000, [("name", b"header")])
    assert (second.offset, second.value) == (1, b"b")


@pytest.mark.parametrize(
    ("magic", "codec"),
    # The client mends lz4 of format 0 with a library that is not installed.
    [(0, 0), (0, GZIP), (0, SNAPPY), (1, 0), (1, GZIP), (1, SNAPPY), (1, LZ4)],
)
def test_messages_of_older_formats_are_read(magic: int, codec: int) -> None:
    found = Reading().read(legacy(magic, codec, b"a" * 1000, b"b"))
    assert [record.value for record in found] == [b"a" * 1000, b"b"]


LARGE = bytes(3 << 20)
BOMBS = [
    *(pytest.param(modern(codec, LARGE), id=f"format 2, codec {codec}") for codec in range(1, 5)),
    *(
        pytest.param(legacy(1, codec, LARGE), id=f"format 1, codec {codec}")
        for codec in range(1, 4)
    ),
]


@pytest.mark.parametrize("stored", BOMBS)
def test_a_batch_that_expands_beyond_the_limit_is_damage(
    stored: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codecs, "MAX_BATCH_BYTES", 1 << 20)
    with pytest.raises(DamagedBatch, match="at offset 0 .*expands to more than 1 MiB"):
        Reading().read(stored)


def test_a_payload_that_is_no_payload_is_damage() -> None:
    value = b"no gzip"
    checked = struct.pack(">bbqii", 1, GZIP, 0, -1, len(value)) + value
    length = struct.calcsize(">I") + len(checked)
    message = struct.pack(">qiI", 0, length, zlib.crc32(checked)) + checked
    with pytest.raises(DamagedBatch, match="the batch at offset 0 cannot be decompressed"):
        Reading().read(message)


def test_old_messages_in_columns_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "MAX_BATCH_BYTES", 1 << 20)
    reading = Reading()
    columns = Columns(9, full_bytes=1 << 20, most_value_bytes=1 << 10)
    inside.read_into(columns, reading.trial, reading.trial.index, codecs.CODECS)
    reading.trial.answer(0, legacy(1, GZIP, LARGE))
    with pytest.raises(DamagedBatch, match="expands to more than 1 MiB"):
        reading.trial.poll()


@pytest.mark.parametrize("compression", ["gzip", "snappy", "lz4", "zstd"])
def test_another_consumer_of_the_process_is_untouched(
    compression: str, embedded_broker: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It expands what it wants, with the client's own decoders."""
    modules = (kafka.record.default_records, kafka.record.legacy_records)
    decoders = ("gzip_decode", "snappy_decode", "lz4_decode", "zstd_decode")
    before = [getattr(module, name, None) for module in modules for name in decoders]
    monkeypatch.setattr(codecs, "MAX_BATCH_BYTES", 1 << 20)
    options = client_options(embedded_broker, {"compression.type": compression})
    producer = kafka.KafkaProducer(
        bootstrap_servers=embedded_broker, compression_type=compression, max_request_size=1 << 24
    )
    with closing(producer):
        ensure_topic(options, topic)
        producer.send(topic, LARGE).get(60.0)
    with closing(KafkaSource([topic], client=options, group="g", until_end=True)) as source:
        with closing(KafkaConsumer(bootstrap_servers=embedded_broker)) as other:
            other.assign([TopicPartition(topic, 0)])
            other.seek(TopicPartition(topic, 0), 0)
            polled: dict[Any, Any] = {}
            while not polled:
                polled = other.poll(timeout_ms=1000)
        assert values(all_rows(source)) == [LARGE[: (1 << 20) + 1]]
    assert [len(record.value) for record in polled[TopicPartition(topic, 0)]] == [len(LARGE)]
    assert before == [getattr(module, name, None) for module in modules for name in decoders]
    assert type(other._fetcher).PartitionRecords is other._fetcher.PartitionRecords


# -- closing and logging -------------------------------------------------------------------------


def test_a_producer_without_the_private_way_out_is_closed_by_the_public_one() -> None:
    closed: list[float] = []
    inside.force_close(SimpleNamespace(close=lambda timeout: closed.append(timeout)))
    assert closed == [1.0]


@pytest.mark.parametrize("name", ["kafka.admin.client", "kafka.net.connection"])
def test_loggers_that_would_write_secrets_lose_their_debug_level(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    inside.silence_secrets()
    with caplog.at_level(logging.DEBUG):
        logging.getLogger(name).debug("a password")
        logging.getLogger(name).info("an address")
    assert [record.getMessage() for record in caplog.records] == ["an address"]
