"""Whole records of small topics: pointers in a compacted topic, and all records that a topic holds.

The client parses these records by itself, with their keys and headers.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kafka.errors import KafkaError, RetriableError

from stream_ctr.connectors.errors import KafkaReadFailed, KafkaUnreachable
from stream_ctr.connectors.kafka import timeouts
from stream_ctr.connectors.kafka.client import open_consumer
from stream_ctr.connectors.kafka.codecs import check_codecs
from stream_ctr.connectors.kafka.consumer_reader import assign_all, find_ends, leaders_silent
from stream_ctr.connectors.kafka.record_batches import DamagedBatch

_POLL_MS = 250


class PointerReader:
    """Follows a compacted topic from its beginning: the latest value of each key, then new ones.

    Raises `KafkaUnreachable`, `KafkaTopicMissing` and `KafkaCodecMissing`.
    """

    def __init__(self, client: Mapping[str, object], topic: str) -> None:
        check_codecs()
        self._client = client
        self._topic = topic
        self._consumer = open_consumer(client, auto_offset_reset="earliest")
        try:
            self._assigned = assign_all(self._consumer, [topic], client)
            self._end = find_ends(self._consumer, self._assigned, client)
            self._consumer.seek_to_beginning()
        except BaseException:
            self._consumer.close()
            raise
        self._caught_up = False
        self._unreturned: list[tuple[str, bytes | None]] = []

    def poll(self, timeout_seconds: float) -> list[tuple[str, bytes | None]]:
        """Return the next (key, value) pairs, in order within each partition.

        A null value withdraws its key. Records without a key are left out. Raises `KafkaReadFailed`
        for failures that trying again does not cure.
        """
        polled = _poll(self._consumer, self._topic, timeouts.milliseconds(timeout_seconds))
        return [
            (record.key.decode(errors="replace"), record.value)
            for record in itertools.chain.from_iterable(polled.values())
            if record.key is not None
        ]

    def read_to_end(self) -> list[tuple[str, bytes | None]]:
        """Return the pairs that follow, as `poll` does, up to the end that the topic has now.

        What others were told is written is among them. Raises `KafkaUnreachable` if the end is not
        reached in twice `ANSWER_SECONDS`; the pairs up to there are then returned by the next call.
        """
        try:
            return self._read_to_end()
        except KafkaUnreachable:
            self._reopen()
            return self._read_to_end()

    def _reopen(self) -> None:
        """Go on with a new consumer. The old one may only know leaders of long ago."""
        positions = {partition: self._position(partition) for partition in self._assigned}
        self._consumer.close()
        self._consumer = open_consumer(self._client, auto_offset_reset="earliest")
        self._assigned = assign_all(self._consumer, [self._topic], self._client)
        for partition in self._assigned:
            self._consumer.seek(partition, positions.get(partition, 0))

    def _read_to_end(self) -> list[tuple[str, bytes | None]]:
        deadline = time.monotonic() + timeouts.ANSWER_SECONDS
        answer_ms = timeouts.milliseconds(timeouts.ANSWER_SECONDS)
        try:
            ends = self._consumer.end_offsets(self._assigned, timeout_ms=answer_ms)
        except KafkaError as error:
            raise leaders_silent(self._consumer, self._client, error) from error
        while any(self._position(partition) < end for partition, end in ends.items()):
            if time.monotonic() > deadline:
                raise leaders_silent(self._consumer, self._client, "no answer to fetching")
            self._unreturned += self.poll(_POLL_MS / 1000)
        found = self._unreturned
        self._unreturned = []
        return found

    def _position(self, partition: Any) -> int:
        position: int | None = self._consumer.position(partition, timeout_ms=0)
        return position or 0

    @property
    def caught_up(self) -> bool:
        """True once everything that was in the topic at the start has been polled."""
        if not self._caught_up:
            positions = [
                self._consumer.position(partition, timeout_ms=0) for partition in self._assigned
            ]
            self._caught_up = all(
                position is not None and position >= end
                for position, end in zip(positions, self._end, strict=True)
            )
        return self._caught_up

    def close(self) -> None:
        """Close the connection."""
        self._consumer.close()


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """One record as a topic holds it."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]


def stored_records(client: Mapping[str, object], topic: str) -> Iterator[StoredRecord]:
    """Yield all records that the topic holds at the start, in order within each partition.

    Each is an object, so this is for small topics.

    Raises `KafkaUnreachable`, also when nothing more comes before the end, `KafkaTopicMissing`,
    `KafkaCodecMissing` and `KafkaReadFailed`.
    """
    check_codecs()
    consumer = open_consumer(client, auto_offset_reset="earliest")
    try:
        assigned = assign_all(consumer, [topic], client)
        ends = dict(zip(assigned, find_ends(consumer, assigned, client).tolist(), strict=True))
        consumer.seek_to_beginning()
        positions: list[int | None] = []
        moved_at = time.monotonic()
        while any(
            (consumer.position(partition, timeout_ms=0) or 0) < end
            for partition, end in ends.items()
        ):
            for partition, records in _poll(consumer, topic, _POLL_MS).items():
                for record in records:
                    if record.offset < ends[partition]:
                        yield _stored(record)
            positions_before = positions
            positions = [consumer.position(partition, timeout_ms=0) for partition in assigned]
            if positions != positions_before:
                moved_at = time.monotonic()
            elif time.monotonic() - moved_at > timeouts.ANSWER_SECONDS:
                raise leaders_silent(consumer, client, "no answer to fetching")
    finally:
        consumer.close()


def _poll(consumer: Any, topic: str, timeout_ms: int) -> Mapping[Any, list[Any]]:
    try:
        polled: Mapping[Any, list[Any]] = consumer.poll(timeout_ms=timeout_ms)
    except RetriableError:
        return {}
    except (KafkaError, DamagedBatch) as error:
        raise KafkaReadFailed(f"reading topic {topic!r} failed: {error}") from error
    return polled


def _stored(record: Any) -> StoredRecord:
    return StoredRecord(
        record.partition, record.offset, record.key, record.value, tuple(record.headers)
    )
