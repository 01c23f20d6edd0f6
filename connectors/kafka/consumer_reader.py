"""The common part of both readers through kafka-python: assignment, logs, committed offsets."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from kafka import TopicPartition
from kafka.errors import (
    KafkaError,
    KafkaTimeoutError,
    LogTruncationError,
    OffsetOutOfRangeError,
    TopicAuthorizationFailedError,
)
from kafka.structs import OffsetAndMetadata

from stream_ctr.connectors.errors import KafkaReadFailed, KafkaUnreachable
from stream_ctr.connectors.kafka import inside, timeouts
from stream_ctr.connectors.kafka.client import in_time, open_consumer
from stream_ctr.connectors.kafka.diagnosis import topic_missing
from stream_ctr.connectors.kafka.positions import UNKNOWN, Offsets
from stream_ctr.connectors.kafka.reader import (
    Failure,
    FailureKind,
    array_of,
    brokers_silent,
    log_truncated,
)
from stream_ctr.connectors.kafka.record_batches import DamagedBatch

log = logging.getLogger(__name__)

MOST_RECORDS = 1 << 16  # of a poll, whatever max.poll.records says


class ConsumerReader:
    """A consumer of kafka-python that is assigned all partitions of some topics.

    Raises `KafkaUnreachable` and `KafkaTopicMissing`. `consumer` stays open then.
    """

    def __init__(
        self,
        consumer: Any,
        topics: Sequence[str],
        *,
        client: Mapping[str, object],
        group: str,
        max_record_bytes: int,
    ) -> None:
        self._consumer = consumer
        self._client = client
        self._group = group
        self._committer: Any = None
        self._max_record_bytes = max_record_bytes
        self._most_records = min(consumer.config["max_poll_records"], MOST_RECORDS)
        self._assigned = assign_all(consumer, topics, client)
        self._index = {partition: index for index, partition in enumerate(self._assigned)}
        self.partitions = tuple((topic, partition) for topic, partition in self._assigned)
        self.end = find_ends(consumer, self._assigned, client)
        self.leader_epoch = np.full(len(self._assigned), UNKNOWN, np.int64)

    def beginning(self) -> Offsets:
        return self._list_offsets(self._consumer.beginning_offsets)

    def listed_end(self) -> Offsets:
        return self._list_offsets(self._consumer.end_offsets)

    def commit(self, offsets: Mapping[int, int]) -> None:
        committed = {
            self._assigned[index]: OffsetAndMetadata(offset, "", -1)
            for index, offset in offsets.items()
        }
        try:
            if self._committer is None:
                self._committer = open_consumer(self._client, group_id=self._group)
            answer_ms = timeouts.milliseconds(timeouts.ANSWER_SECONDS)
            self._committer.commit(committed, timeout_ms=answer_ms)
        except (KafkaError, KafkaUnreachable) as error:
            log.warning("the committed offsets of group %r are behind: %s", self._group, error)

    def close(self) -> None:
        self._consumer.close()
        if self._committer is not None:
            self._committer.close()

    def _list_offsets(self, ask: Callable[..., Mapping[Any, int]]) -> Offsets:
        answer_ms = timeouts.milliseconds(timeouts.ANSWER_SECONDS)
        try:
            offsets = ask(self._assigned, timeout_ms=answer_ms)
        except KafkaError as error:
            raise leaders_silent(self._consumer, self._client, error) from error
        return array_of({self._index[partition]: offset for partition, offset in offsets.items()})


def assign_all(
    consumer: Any, topics: Sequence[str], client: Mapping[str, object]
) -> list[TopicPartition]:
    """Assign all partitions of the topics to a consumer, and return them in order.

    Raises `KafkaUnreachable` and `KafkaTopicMissing`.
    """
    try:
        # All topics: to ask for one by name creates it where brokers create topics by themselves.
        existing = in_time(consumer.topics, timeouts.ANSWER_SECONDS)
    except (KafkaError, TimeoutError) as error:
        raise leaders_silent(consumer, client, error) from error
    assigned = []
    for topic in dict.fromkeys(topics):
        if topic not in existing:
            raise topic_missing(topic, existing, client)
        numbers = sorted(consumer.partitions_for_topic(topic))
        assigned += [TopicPartition(topic, number) for number in numbers]
    consumer.assign(assigned)
    return assigned


def find_ends(
    consumer: Any, assigned: Sequence[TopicPartition], client: Mapping[str, object]
) -> Offsets:
    """Return the end of each partition's log [P]: where fetching at the listed end leads to.

    The consumer is left there. Raises `KafkaUnreachable` and `KafkaReadFailed`.
    """
    deadline = time.monotonic() + timeouts.ANSWER_SECONDS
    answer_ms = timeouts.milliseconds(timeouts.ANSWER_SECONDS)
    try:
        for partition, end in consumer.end_offsets(assigned, timeout_ms=answer_ms).items():
            consumer.seek(partition, end)
        # A high watermark is known as soon as the partition was fetched from.
        while any(consumer.highwater(partition) is None for partition in assigned):
            if time.monotonic() > deadline:
                raise KafkaTimeoutError("no answer to fetching")
            consumer.poll(timeout_ms=100, max_records=sys.maxsize)
        return np.array(
            [consumer.position(partition, timeout_ms=0) for partition in assigned], np.int64
        )
    except DamagedBatch as error:
        raise KafkaReadFailed(f"the end of a log cannot be read: {error}") from error
    except KafkaError as error:
        raise leaders_silent(consumer, client, error) from error


def leaders_silent(consumer: Any, client: Mapping[str, object], reason: object) -> KafkaUnreachable:
    """Return the error for brokers that answered the consumer once and then did not."""
    return brokers_silent(client, inside.advertised(consumer), reason)


def highwater(consumer: Any, partition: TopicPartition) -> int:
    """Return the end of a partition that came with the last fetch; `UNKNOWN` before the first."""
    end = consumer.highwater(partition)
    return UNKNOWN if end is None else int(end)


def failure_of(error: Exception, partition: int | None, position: int) -> Failure:
    """Return the failure that an error of the client means; the partition may be unknown."""
    if isinstance(error, LogTruncationError):
        return log_truncated(*_truncated(error))
    reason = str(error) if _explains_itself(error) else f"{type(error).__name__}: {error}"
    return Failure(_kind_of(error, partition), reason, partition, position, cause=error)


def _kind_of(error: Exception, partition: int | None) -> FailureKind:
    if isinstance(error, OffsetOutOfRangeError):
        return FailureKind.POSITION_REFUSED
    if isinstance(error, TopicAuthorizationFailedError):
        return FailureKind.REFUSED
    if partition is not None and not isinstance(error, MemoryError):
        return FailureKind.DAMAGED
    return FailureKind.REFUSED if _explains_itself(error) else FailureKind.UNEXPECTED


def _truncated(error: LogTruncationError) -> tuple[TopicPartition, int, int]:
    """Return the first partition of the error, and where its log ends in which epoch."""
    partition, end = next(iter(error.divergent_offsets.items()))
    return (partition, -1, -1) if end is None else (partition, end.offset, end.leader_epoch)


def _explains_itself(error: Exception) -> bool:
    return isinstance(error, KafkaError | DamagedBatch)
