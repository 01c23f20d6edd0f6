"""Kafka as a source of records through librdkafka.

This is the only file that imports confluent-kafka, which is optional
(`pip install 'stream-ctr[confluent]'`). The client is confluent-kafka, because librdkafka fetches,
verifies and unpacks in threads of its own that do not hold Python's lock. It makes an object for
each record; what is done with them here is mapped in C.

The reader is a state machine. Each partition is in one state:

| state | in librdkafka | leaves it |
|---|---|---|
| fetched | assigned at its position | `read_on` without it; a failure, which restarts all |
| waiting | unassigned, its fetched records dropped | `read_on` with it: assigned at its position |

So there is one truth about where reading goes on: the positions that the source keeps. librdkafka
never moves a position by itself, and a partition that flows again is fetched again.

librdkafka has traps, which is why this file

- reads without a group, though the client demands one: partitions are assigned by hand, at
  offsets that the caller owns;
- asks for the event at the end of a partition: records alone do not show aborted records and
  control records at the end;
- finds the end of a log by fetching at the listed end, since brokers exist that list one too low;
- lets it fetch again 10 ms after its queue was full; by itself it waits for a second;
- reads a batch that librdkafka cannot read with kafka-python, so that both clients have the same
  answer: librdkafka stays before it forever, and refuses some batches of zstd by the size that they
  might have;
- commits through the admin client: a call on the consumer waits while another thread is in
  `consume`, for as long as no records come;
- takes from the client's statistics whether brokers are silent. The client reports lost
  connections, but not a broker that keeps one and does not answer.

librdkafka expands a batch of gzip at once, whatever its size, which is up to 1,032 times that of
its compressed form (`max.message.bytes` of a topic bounds that).
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stream_ctr.connectors.errors import KafkaOptionError, KafkaReadFailed, KafkaUnreachable
from stream_ctr.connectors.kafka import timeouts
from stream_ctr.connectors.kafka.diagnosis import explain_silence, topic_missing, warn_of_plaintext
from stream_ctr.connectors.kafka.options import librdkafka_options
from stream_ctr.connectors.kafka.positions import UNKNOWN, Mask, Offsets
from stream_ctr.connectors.kafka.reader import (
    ANSWER_DELAY_SECONDS,
    Failure,
    FailureKind,
    Polled,
    Reader,
    array_of,
    brokers_silent,
    log_truncated,
    news_seconds,
)
from stream_ctr.connectors.kafka.source import open_reader
from stream_ctr.connectors.kafka.topic_source import OnLost, TopicSource
from stream_ctr.connectors.kafka.topics import FutureNews, Topics
from stream_ctr.connectors.records import POLL_BYTES, Records

__all__ = ["ConfluentSource"]

log = logging.getLogger(__name__)
log_of_client = logging.getLogger("kafka.librdkafka")

Message = Any  # confluent_kafka.Message


class ConfluentSource(TopicSource):
    """All partitions of the topics as columns: `KafkaSource` with another client.

    Its arguments, `client` too, and all methods are those of `KafkaSource`.

    Raises `KafkaUnreachable`, `KafkaTopicMissing` and `KafkaOptionError`, also when confluent-kafka
    is not installed.
    """

    def __init__(
        self,
        topics: Sequence[str],
        *,
        client: Mapping[str, object],
        group: str,
        until_end: bool = False,
        max_record_bytes: int = 1 << 20,
        on_lost: OnLost = "stop",
        topic_check_seconds: float = 30.0,
    ) -> None:
        reader = ConfluentReader(
            topics, client=client, group=group, max_record_bytes=max_record_bytes
        )
        super().__init__(
            reader,
            until_end=until_end,
            on_lost=on_lost,
            topic_check_seconds=news_seconds(client, topic_check_seconds),
        )


class ConfluentReader:
    """A `Reader` through confluent-kafka.

    Values of more than `max_record_bytes` are cut to one byte more than that. Raises
    `KafkaUnreachable`, `KafkaTopicMissing` and `KafkaOptionError`.
    """

    def __init__(
        self,
        topics: Sequence[str],
        *,
        client: Mapping[str, object],
        group: str,
        max_record_bytes: int,
    ) -> None:
        self._library = _library()
        self._client = client
        self._topics = topics
        self._group = group
        self._other: Reader | None = None
        self._max_record_bytes = max_record_bytes
        self._most_records = int(str(client.get("max_poll_records", _POLL_RECORDS)))
        self._answers = _Answers()
        self._consumer = self._open(client)
        try:
            self._cluster = _Cluster(self._library, client)
            self.partitions = self._cluster.partitions(topics)
            self._index = {partition: index for index, partition in enumerate(self.partitions)}
            self._assigned = [
                self._library.TopicPartition(*partition) for partition in self.partitions
            ]
            self._reading: frozenset[int] = frozenset()
            self.leader_epoch = np.full(len(self.partitions), UNKNOWN, np.int64)
            self.news = self._cluster.news(topics)
            self.end = self._find_ends()
        except BaseException:
            self._consumer.close()
            raise

    def beginning(self) -> Offsets:
        return self._cluster.offsets(self._assigned, self._library.admin.OffsetSpec.earliest())

    def listed_end(self) -> Offsets:
        return self._cluster.offsets(self._assigned, self._library.admin.OffsetSpec.latest())

    def reported_end(self) -> Offsets:
        ends = [
            self._consumer.get_watermark_offsets(partition, cached=True)[1]
            for partition in self._assigned
        ]
        return np.maximum(np.array(ends, np.int64), UNKNOWN)

    def read_on(self, next_offset: Offsets, wanted: Mask, again: Collection[int]) -> None:
        fetched = frozenset(np.flatnonzero(wanted).tolist())
        ended = self._reading & (frozenset(again) | (self._reading - fetched))
        if ended:
            self._consumer.incremental_unassign([self._assigned[index] for index in ended])
        if begun := fetched - (self._reading - ended):
            assigned = [self._at(index, int(next_offset[index])) for index in sorted(begun)]
            self._consumer.incremental_assign(assigned)
            for partition in assigned:
                if partition.leader_epoch is not None:
                    self._ask_about_epoch(partition)
        self._reading = fetched

    def poll(self, next_offset: Offsets, timeout_seconds: float) -> Polled:
        position = next_offset.copy()
        failed: Message = None
        columns = []
        for messages in self._pieces(timeout_seconds):
            if any(map(self._library.Message.error, messages)):
                messages, failed = self._until_failure(messages, position)
            columns.append(self._columns(messages))
            if failed is not None:
                break
        records = _joined(columns)
        read = next_offset.copy()
        np.maximum.at(read, records.partition, records.offset + 1)
        np.maximum(position, read, out=position)
        # What lies between the last record and the end of a partition may be of a later epoch.
        self.leader_epoch[position > read] = UNKNOWN
        if failed is None:
            return Polled(records, position)
        failure: Failure | None = self._failure(failed, position)
        if failure and failure.kind is FailureKind.DAMAGED:
            if len(records):
                failure = None  # it comes again with the next poll
            else:
                records, failure = self._read_otherwise(failure, position)
        # What the client has fetched after the failure comes again.
        wanted = np.zeros(len(self.partitions), np.bool_)
        wanted[list(self._reading)] = True
        self.read_on(position, wanted, again=self._reading)
        return Polled(records, position, failure)

    def end_of_damage(self, failure: Failure) -> int | None:
        return self._other.end_of_damage(failure) if self._other else None

    def silent_seconds(self, wanted: Mask) -> float:
        return self._answers.silent_seconds(
            [self.partitions[index] for index in np.flatnonzero(wanted).tolist()]
        )

    def commit(self, offsets: Mapping[int, int]) -> None:
        committed = [
            self._library.TopicPartition(*self.partitions[index], offset)
            for index, offset in offsets.items()
        ]
        if reason := self._cluster.commit(self._group, committed):
            log.warning("the committed offsets of group %r are behind: %s", self._group, reason)

    def close(self) -> None:
        self._consumer.close()
        if self._other:
            self._other.close()

    # -- between librdkafka and columns -----------------------------------------------------------

    def _open(self, client: Mapping[str, object]) -> Any:
        options = {
            **_DEFAULTS,
            **librdkafka_options(client),
            **_RULES,
            "group.id": self._group,
            "stats_cb": self._answers.note,
            "error_cb": lambda error: None,
        }
        return _make(self._library, self._library.Consumer, options)

    def _ask_about_epoch(self, partition: Any) -> None:
        """Let brokers tell whether they have the record before the partition's offset.

        A seek asks them, and an assignment does not. It is refused as long as the assignment before
        is being ended, which takes about a millisecond. Rarely the client never begins to fetch
        after that; then it is given the partition once more.
        """
        deadline = time.monotonic() + _SEEKING_SECONDS
        assigned = time.monotonic()
        while True:
            try:
                self._consumer.seek(partition)
            except self._library.KafkaException as error:
                now = time.monotonic()
                if error.args[0].name() not in _ENDING or now > deadline:
                    raise KafkaReadFailed(
                        f"reading topic {partition.topic!r} failed: {error.args[0].str()}"
                    ) from error
                if now > assigned + _ASSIGNED_AGAIN_SECONDS:
                    self._consumer.incremental_unassign([partition])
                    self._consumer.incremental_assign([partition])
                    assigned = now
                time.sleep(_BETWEEN_SEEKS_SECONDS)
            else:
                return

    def _pieces(self, timeout_seconds: float) -> Iterator[list[Message]]:
        """Yield the messages that are there, or else the first that comes in time.

        They come in pieces; the piece that reaches `POLL_BYTES` is the last.
        """
        records_left = self._most_records
        bytes_left = POLL_BYTES
        # The client waits until it has as many as it is asked for. So it is asked for what is
        # there, and waits for one message at most.
        messages = self._consumer.consume(min(records_left, _PIECE_RECORDS), 0.0)
        messages = messages or self._consumer.consume(1, timeout_seconds)
        while messages:
            yield messages
            records_left -= len(messages)
            bytes_left -= sum(map(len, messages))
            if records_left <= 0 or bytes_left <= 0:
                return
            messages = self._consumer.consume(min(records_left, _PIECE_RECORDS), 0.0)

    def _until_failure(
        self, messages: Sequence[Message], position: Offsets
    ) -> tuple[list[Message], Message]:
        """Return the records before the first failure, and that failure, which may be None.

        The ends of partitions among them move the positions [P].
        """
        records = []
        for message in messages:
            error = message.error()
            if error is None:
                records.append(message)
            elif error.code() == self._library.KafkaError._PARTITION_EOF:
                index = self._index[message.topic(), message.partition()]
                position[index] = max(position[index], message.offset())
            elif not self._passes(error, message):
                return records, message
        return records, None

    def _passes(self, error: Any, message: Message) -> bool:
        """Return whether an error is over by itself.

        Errors of no partition are those of a connection, or of the group, which is not read from.
        """
        if error.fatal():
            return False
        if error.name() in _TOPIC_UNKNOWN:
            self.news.ask()
            return True
        return (
            error.retriable()
            or error.name() in _PASSING
            or (message.topic(), message.partition()) not in self._index
        )

    def _failure(self, message: Message, position: Offsets) -> Failure:
        """Return what the message says about a partition at its position in [P]."""
        error = message.error()
        reason = error.str()
        index = self._index.get((message.topic(), message.partition()))
        if index is None:
            return Failure(FailureKind.REFUSED, reason)
        offset = int(position[index])
        if error.name() in _DAMAGE:
            return Failure(FailureKind.DAMAGED, reason, index, offset)
        if found := _TRUNCATED.search(reason):
            return log_truncated(self.partitions[index], int(found["end"]), int(found["epoch"]))
        if error.name() not in _POSITION_GONE:
            return Failure(FailureKind.REFUSED, reason, index, offset)
        if message.offset() is not None and message.offset() >= 0:
            offset = message.offset()  # the partition may have been sent elsewhere since
        return Failure(FailureKind.POSITION_REFUSED, reason, index, offset)

    def _read_otherwise(
        self, failure: Failure, position: Offsets
    ) -> tuple[Records, Failure | None]:
        """Return the next records of the partition that failed, read through kafka-python.

        Moves its position in [P]. The failure is that of kafka-python; none comes while brokers are
        away.
        """
        assert failure.partition is not None, "damage is somewhere"
        try:
            self._other = self._other or open_reader(
                self._topics,
                client=self._client,
                group=self._group,
                max_record_bytes=self._max_record_bytes,
            )
        except KafkaUnreachable:
            return Records.empty(), None
        if self._other.partitions != self.partitions:
            return Records.empty(), failure  # the topic changed, which its news will tell
        index = failure.partition
        alone = np.arange(len(self.partitions)) == index
        self._other.leader_epoch[index] = self.leader_epoch[index]
        self._other.read_on(position, alone, again=[index])
        polled = self._other.poll(position, timeouts.ANSWER_SECONDS)
        position[index] = polled.next_offset[index]
        self.leader_epoch[index] = self._other.leader_epoch[index]
        return polled.records, polled.failure

    def _columns(self, messages: list[Message]) -> Records:
        message_type = self._library.Message
        count = len(messages)
        values = list(map(message_type.value, messages))
        if max(map(len, messages), default=0) > self._max_record_bytes:
            values = [value and value[: self._max_record_bytes + 1] for value in values]
        partitions = zip(
            map(message_type.topic, messages), map(message_type.partition, messages), strict=True
        )
        times = map(itemgetter(1), map(message_type.timestamp, messages))
        partition = np.fromiter(map(self._index.__getitem__, partitions), np.int32, count)
        for last in _ends_of_runs(partition):
            epoch = messages[last].leader_epoch()
            self.leader_epoch[partition[last]] = UNKNOWN if epoch is None else epoch
        return Records(
            partition=partition,
            offset=np.fromiter(map(message_type.offset, messages), np.int64, count),
            time=np.fromiter(times, np.int64, count),
            value=pa.array(values, pa.large_binary()),
        )

    def _find_ends(self) -> Offsets:
        """Return the end of each partition's log [P]: where fetching at the listed end leads to."""
        ends = self.listed_end()
        self._consumer.assign([self._at(index, end) for index, end in enumerate(ends.tolist())])
        # The end of each partition by its first answer. Where a producer goes on writing, no
        # answer says that this was everything.
        first: dict[int, int] = {}
        deadline = time.monotonic() + timeouts.ANSWER_SECONDS
        while any(ends[index] < first.get(index, _NEVER) for index in range(len(ends))):
            if time.monotonic() > deadline:
                raise self._cluster.silent("no answer to fetching")
            for message in self._consumer.consume(_PIECE_RECORDS, 0.02):
                self._note_end(message, ends, first)
        self._consumer.unassign()
        return ends

    def _note_end(self, message: Message, ends: Offsets, first: dict[int, int]) -> None:
        """Move an end in [P] past a record, or to the end of a partition.

        Raises `KafkaReadFailed`.
        """
        index = self._index.get((message.topic(), message.partition()))
        if index is None:
            return
        if not message.error():
            ends[index] = max(ends[index], message.offset() + 1)
            if index not in first:
                first[index] = int(self.reported_end()[index])
        elif message.error().code() == self._library.KafkaError._PARTITION_EOF:
            ends[index] = max(ends[index], message.offset())
            first[index] = int(ends[index])
        elif not self._passes(message.error(), message):
            raise KafkaReadFailed(
                f"reading topic {message.topic()!r} failed: {message.error().str()}"
            )

    def _at(self, index: int, offset: int) -> Any:
        """Return a partition at an offset, after a record of the epoch that is known for it."""
        epoch = int(self.leader_epoch[index])
        known = {} if epoch == UNKNOWN else {"leader_epoch": epoch}
        return self._library.TopicPartition(*self.partitions[index], offset, **known)


class _Cluster:
    """Topics and ends of logs, as brokers describe them.

    Raises `KafkaUnreachable` when they are silent.
    """

    def __init__(self, library: Any, client: Mapping[str, object]) -> None:
        self._library = library
        self._heard: dict[str, None] = {}
        self._client = client
        warn_of_plaintext(client)
        common = {
            name: value
            for name, value in librdkafka_options(client).items()
            if name not in _OF_CONSUMERS
        }
        options = {"client.id": "stream-ctr", **common, "error_cb": self._hear}
        self._admin = _make(library, library.admin.AdminClient, options)
        self._brokers = ""

    def partitions(self, topics: Sequence[str]) -> tuple[tuple[str, int], ...]:
        """Return (topic, partition) of all partitions, topics in the order given.

        Raises also `KafkaRefused` and `KafkaTopicMissing`.
        """
        # All topics: to ask for one by name creates it where brokers create topics by themselves.
        listed = self._ask_first(
            lambda: self._admin.list_topics(timeout=timeouts.BOOTSTRAP_SECONDS)
        )
        self._brokers = ", ".join(
            f"{broker.host}:{broker.port}" for broker in listed.brokers.values()
        )
        for topic in topics:
            if topic not in listed.topics:
                raise topic_missing(topic, listed.topics, self._client)
        return tuple(
            (topic, partition)
            for topic in dict.fromkeys(topics)
            for partition in sorted(listed.topics[topic].partitions)
        )

    def offsets(self, partitions: Sequence[Any], spec: Any) -> Offsets:
        """Return the offsets [P] that a specification of librdkafka's means."""
        deadline = time.monotonic() + timeouts.ANSWER_SECONDS
        while True:
            asked = self._admin.list_offsets(
                dict.fromkeys(partitions, spec),
                isolation_level=self._library.IsolationLevel.READ_COMMITTED,
                request_timeout=max(deadline - time.monotonic(), _BETWEEN_QUESTIONS_SECONDS),
            )
            try:
                return array_of(
                    {
                        index: asked[partition].result().offset
                        for index, partition in enumerate(partitions)
                    }
                )
            except self._library.KafkaException as error:
                if error.args[0].name() not in _PASSING or time.monotonic() > deadline:
                    raise self.silent(error.args[0].str()) from error
                time.sleep(_BETWEEN_QUESTIONS_SECONDS)

    def commit(self, group: str, positions: Sequence[Any]) -> str:
        """Write the committed offsets of a group, and return why that failed; empty if it did not.

        It may be called by any thread.
        """
        altered = self._library.ConsumerGroupTopicPartitions(group, list(positions))
        try:
            asked = self._admin.alter_consumer_group_offsets(
                [altered], request_timeout=timeouts.ANSWER_SECONDS
            )
            answered = asked[group].result().topic_partitions
        except self._library.KafkaException as error:
            return str(error.args[0].str())
        return next((partition.error.str() for partition in answered if partition.error), "")

    def news(self, topics: Sequence[str]) -> FutureNews:
        """Return the news of these topics."""
        names = list(dict.fromkeys(topics))

        def describe() -> list[Future[Any]]:
            self._admin.poll(0)
            asked = self._admin.describe_topics(
                self._library.TopicCollection(names), request_timeout=timeouts.ANSWER_SECONDS
            )
            return [asked[name] for name in names]

        def read(futures: Sequence[Future[Any]]) -> Topics | None:
            return self._described(dict(zip(names, futures, strict=True)))

        return FutureNews(describe, read, self.silent)

    def silent(self, reason: str) -> KafkaUnreachable:
        """Return the error for brokers that do not answer any more."""
        return brokers_silent(self._client, self._brokers, reason)

    def _described(self, asked: Mapping[str, Future[Any]]) -> Topics | None:
        """Return the topics that exist; None when the brokers did not answer for all."""
        topics: dict[str, tuple[str | None, frozenset[int]]] = {}
        for name, future in asked.items():
            try:
                topic = future.result(0)
            except self._library.KafkaException as error:
                if error.args[0].name() not in _TOPIC_UNKNOWN:
                    return None
            else:
                partitions = frozenset(partition.id for partition in topic.partitions)
                topics[name] = (_uuid(topic.topic_id), partitions)
        return topics

    def _ask_first(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except self._library.KafkaException as error:
            self._admin.poll(0)  # calls `_hear`
            raise explain_silence(
                self._client, list(self._heard), timeouts.BOOTSTRAP_SECONDS
            ) from error

    def _hear(self, error: Any) -> None:
        if error.name() != "_ALL_BROKERS_DOWN":
            self._heard[re.sub(r" \(after \d+ms in state \w+\)", "", error.str())] = None


class _Answers:
    """The time of the last answer for each (topic, partition), by librdkafka's statistics."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._noted = self._begun
        self._by_partition: dict[tuple[str, int], float] = {}
        self._by_broker: dict[int, float] = {}

    def note(self, statistics: str) -> None:
        """Take over statistics, a JSON text."""
        noted = json.loads(statistics)
        self._noted = time.monotonic()
        for broker in noted["brokers"].values():
            if broker["state"] == "UP":
                # A broker with no request to answer is not silent. A request that is waiting now
                # was not sent before the last statistics.
                idle = broker["rxidle"] / 1e6 if broker["waitresp_cnt"] else 0.0
                node = broker["nodeid"]
                self._by_broker[node] = max(self._by_broker.get(node, 0.0), self._noted - idle)
        for topic in noted["topics"].values():
            for partition in topic["partitions"].values():
                if partition["leader"] in self._by_broker:
                    answered = self._by_broker[partition["leader"]]
                    self._by_partition[topic["topic"], partition["partition"]] = answered

    def silent_seconds(self, wanted: Sequence[tuple[str, int]]) -> float:
        """Return the longest silence among the wanted partitions.

        0 when all had been answered by the last statistics.
        """
        if not wanted:
            return 0.0
        oldest = min(self._by_partition.get(partition, self._begun) for partition in wanted)
        silent = self._noted - oldest > ANSWER_DELAY_SECONDS
        return time.monotonic() - oldest if silent else 0.0


_BETWEEN_SEEKS_SECONDS = 0.001
_ASSIGNED_AGAIN_SECONDS = 1.0
_SEEKING_SECONDS = 20.0
_BETWEEN_QUESTIONS_SECONDS = 0.05  # when a broker has no answer yet
_NEVER = np.iinfo(np.int64).max
_POLL_RECORDS = 5000
_PIECE_RECORDS = 500  # their objects should fit into a processor's cache; 5000 cost twice the time

# Tuned by measurement on two cores.
_DEFAULTS: dict[str, object] = {
    "client.id": "stream-ctr",
    "fetch.wait.max.ms": 100,
    "fetch.queue.backoff.ms": 10,
    "queued.max.messages.kbytes": 32 << 10,
    "reconnect.backoff.max.ms": 1000,
}

# Exactness rests on these, and what this file hears: no option of the user changes them.
_RULES: dict[str, object] = {
    "allow.auto.create.topics": False,
    "auto.offset.reset": "error",
    "check.crcs": True,
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "enable.partition.eof": True,
    "isolation.level": "read_committed",
    "receive.message.max.bytes": 512 << 20,  # more than `fetch.max.bytes`
    "statistics.interval.ms": 500,
}

# Options that the admin client warns of.
_OF_CONSUMERS = {
    "client.rack",
    "fetch.max.bytes",
    "fetch.min.bytes",
    "fetch.wait.max.ms",
    "max.partition.fetch.bytes",
}

# Errors by the names that librdkafka has for them.
_POSITION_GONE = {"_AUTO_OFFSET_RESET", "OFFSET_OUT_OF_RANGE"}
# Its error has the name of an offset reset.
_TRUNCATED = re.compile(
    r"log truncation detected .*end offset is (?P<end>-?\d+) "
    r"\(offset leader epoch (?P<epoch>-?\d+)\)"
)
_DAMAGE = {
    "_BAD_MSG",
    "_BAD_COMPRESSION",
    "_UNDERFLOW",
    "_NOT_IMPLEMENTED",
    "INVALID_MSG",
    "UNSUPPORTED_COMPRESSION_TYPE",
}
_TOPIC_UNKNOWN = {
    "UNKNOWN_TOPIC_OR_PART",
    "_UNKNOWN_TOPIC",
    "_UNKNOWN_PARTITION",
    "UNKNOWN_TOPIC_ID",
    "INCONSISTENT_TOPIC_ID",
}
_ENDING = {"_STATE", "_PREV_IN_PROGRESS"}
_PASSING = {
    "_TRANSPORT",
    "_ALL_BROKERS_DOWN",
    "_TIMED_OUT",
    "_RESOLVE",
    "_MAX_POLL_EXCEEDED",
    "LEADER_NOT_AVAILABLE",
    "NOT_LEADER_FOR_PARTITION",
    "FENCED_LEADER_EPOCH",
    "UNKNOWN_LEADER_EPOCH",
    "OFFSET_NOT_AVAILABLE",
}


def _library() -> Any:
    try:
        importlib.import_module("confluent_kafka.admin")
        return importlib.import_module("confluent_kafka")
    except ImportError as error:
        raise KafkaOptionError(
            "the client confluent is not installed: pip install 'stream-ctr[confluent]'"
        ) from error


def _make(library: Any, client_type: Any, options: Mapping[str, object]) -> Any:
    try:
        return client_type(dict(options), logger=log_of_client)
    except library.KafkaException as error:
        raise KafkaOptionError(
            f"the Kafka client does not take its options: {error.args[0].str()}"
        ) from error


def _uuid(id_: Any) -> str | None:
    """Return the id of a topic as kafka-python writes it; None for brokers without ids."""
    high = id_.get_most_significant_bits() % (1 << 64)
    number = high << 64 | id_.get_least_significant_bits() % (1 << 64)
    return str(uuid.UUID(int=number)) if number else None


def _ends_of_runs(partition: npt.NDArray[np.int32]) -> list[int]:
    """Return the index of the last of each run of equal numbers.

    >>> _ends_of_runs(np.array([3, 3, 1, 3], np.int32))
    [1, 2, 3]
    """
    if not len(partition):
        return []
    return [*np.flatnonzero(partition[1:] != partition[:-1]).tolist(), len(partition) - 1]


def _joined(pieces: Sequence[Records]) -> Records:
    if len(pieces) < 2:
        return pieces[0] if pieces else Records.empty()
    return Records(
        partition=np.concatenate([piece.partition for piece in pieces]),
        offset=np.concatenate([piece.offset for piece in pieces]),
        time=np.concatenate([piece.time for piece in pieces]),
        value=pa.concat_arrays([piece.value for piece in pieces]),
    )
