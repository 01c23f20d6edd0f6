"""Whole records with keys and headers, as the client parses them.

`PointerReader` follows pointers in a compacted topic, `RecordFollower` the records of a topic that
retention shortens, and `stored_records` returns all records that a topic holds.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from kafka.errors import (
    CorruptRecordError,
    KafkaError,
    LogTruncationError,
    OffsetOutOfRangeError,
    RetriableError,
)

from stream_ctr.connectors.errors import KafkaReadFailed, KafkaTopicMissing, KafkaUnreachable
from stream_ctr.connectors.kafka import timeouts
from stream_ctr.connectors.kafka.client import in_background, open_consumer
from stream_ctr.connectors.kafka.codecs import check_codecs
from stream_ctr.connectors.kafka.consumer_reader import assign_all, find_ends, leaders_silent
from stream_ctr.connectors.kafka.record_batches import DamagedBatch

_POLL_MS = 250
_RENEW_SECONDS = 30.0
_FETCH_BYTES = 16 << 20  # of a topic of large records; kafka-python waits between two fetches


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


class RecordFollower:
    """Follows all records of a topic from its beginning, whatever happens to it.

    Where the next record is not there any more, because retention removed it or the topic was
    deleted and created again, reading goes on with the oldest record that is there. A batch that
    cannot be read is passed over. `take_losses` reports both. A consumer that reads nothing for
    `_RENEW_SECONDS` is replaced: it may only know leaders of long ago, or a deleted topic.

    Only one thread uses it. Raises `KafkaUnreachable`, `KafkaTopicMissing` and `KafkaCodecMissing`.
    """

    def __init__(self, client: Mapping[str, object], topic: str) -> None:
        check_codecs()
        self._client = client
        self._topic = topic
        self._next_offset: dict[Any, int] = {}  # a partition without one is read from its beginning
        self._losses: list[str] = []
        self._heard_at = time.monotonic()
        self._opening: Future[tuple[Any, list[Any]]] | None = None
        self._consumer: Any = None
        self._assigned: list[Any] = []
        self._use(*self._connect())

    def poll(self, timeout_seconds: float) -> list[StoredRecord]:
        """Return the next records, in order within each partition.

        Raises `KafkaUnreachable` when there is no consumer and no broker answers,
        `KafkaTopicMissing` once the topic is gone, and `KafkaReadFailed` for what a broker refuses.
        The next call tries again.
        """
        if not self._renewed(timeout_seconds):
            return []
        try:
            polled = self._consumer.poll(timeout_ms=timeouts.milliseconds(timeout_seconds))
        except RetriableError:
            return []
        except (LogTruncationError, OffsetOutOfRangeError) as error:
            self._begin_anew(error)
            return []
        except (KafkaError, DamagedBatch) as error:
            self._pass_over(error)
            return []
        found: list[StoredRecord] = []
        for partition, records in polled.items():
            self._next_offset[partition] = records[-1].offset + 1
            self._heard_at = time.monotonic()
            found += map(_stored, records)
        return found

    def take_losses(self) -> list[str]:
        """Return in words what was lost since the last call."""
        losses = self._losses
        self._losses = []
        return losses

    def seek_to_beginning(self, since_ms: int | None = None) -> None:
        """Let all records that the topic holds come again.

        With `since_ms`, epoch milliseconds, reading may begin with the first record of that time or
        a later one. Where brokers do not say which that is, it begins with the oldest.
        """
        self._next_offset.clear()
        if self._consumer is None:
            return
        self._consumer.seek_to_beginning()
        if since_ms is not None:
            with suppress(KafkaError):
                for partition, offset in self._offsets_since(since_ms).items():
                    self._consumer.seek(partition, offset)
                    self._next_offset[partition] = offset

    def close(self) -> None:
        """Close the connection."""
        if self._opening:
            self._opening.add_done_callback(_close_opened)
        self._opening = None
        self._drop_consumer()

    def _connect(self) -> tuple[Any, list[Any]]:
        """Return a consumer of all partitions, which is nowhere yet, and the partitions."""
        consumer = open_consumer({"max_partition_fetch_bytes": _FETCH_BYTES, **self._client})
        try:
            return consumer, assign_all(consumer, [self._topic], self._client)
        except BaseException:
            consumer.close()
            raise

    def _use(self, consumer: Any, assigned: list[Any]) -> None:
        self._drop_consumer()
        self._consumer = consumer
        self._assigned = assigned
        self._heard_at = time.monotonic()
        for partition in assigned:
            if partition in self._next_offset:
                consumer.seek(partition, self._next_offset[partition])
            else:
                consumer.seek_to_beginning(partition)

    def _offsets_since(self, since_ms: int) -> dict[Any, int]:
        """Return the offset of the first record of a time in each partition, or else its end."""
        answer_ms = timeouts.milliseconds(timeouts.ANSWER_SECONDS)
        # The ends first: what is written between the two questions must not be passed over.
        ends = self._consumer.end_offsets(self._assigned, timeout_ms=answer_ms)
        asked = dict.fromkeys(self._assigned, since_ms)
        found = self._consumer.offsets_for_times(asked, timeout_ms=answer_ms)
        return {
            partition: end if found.get(partition) is None else found[partition].offset
            for partition, end in ends.items()
        }

    def _renewed(self, timeout_seconds: float) -> bool:
        """Replace the consumer where that is due; return whether there is one.

        Brokers that are away do not stop a poll: a thread connects.
        """
        idle_seconds = time.monotonic() - self._heard_at
        if self._opening is None and (self._consumer is None or idle_seconds > _RENEW_SECONDS):
            self._opening = in_background(self._connect)
        if self._opening is None or (self._consumer is not None and not self._opening.done()):
            return True
        try:
            opened = self._opening.result(timeout_seconds)
        except TimeoutError:
            return False
        except KafkaTopicMissing:
            self._opening = None
            self._forget_topic()
            raise
        except Exception:
            self._opening = None
            self._heard_at = time.monotonic()
            raise
        self._opening = None
        self._use(*opened)
        return True

    def _forget_topic(self) -> None:
        if self._consumer is not None:
            self._losses.append(f"topic {self._topic!r} was deleted while it was followed")
        self._next_offset.clear()
        self._drop_consumer()

    def _begin_anew(self, error: KafkaError) -> None:
        """Read the partitions that an error names from their beginnings, with a new consumer."""
        lost = error.divergent_offsets if isinstance(error, LogTruncationError) else error.args[0]
        for partition in lost if isinstance(lost, Mapping) else self._assigned:
            offset = self._next_offset.pop(partition, 0)
            self._losses.append(
                f"partition {partition.partition} of topic {self._topic!r} does not hold offset "
                f"{offset} any more: retention removed it, or the topic was created again"
            )
        self._drop_consumer()

    def _pass_over(self, error: Exception) -> None:
        """Go on after the next offset of the only partition, or raise `KafkaReadFailed`."""
        failed = KafkaReadFailed(f"reading topic {self._topic!r} failed: {error}")
        if len(self._assigned) > 1 or not isinstance(error, CorruptRecordError | DamagedBatch):
            self._drop_consumer()
            raise failed from error
        (partition,) = self._assigned
        offset = self._next_offset.get(partition)
        if offset is None:
            with suppress(KafkaError):
                offset = self._consumer.position(partition, timeout_ms=0)
        self._next_offset[partition] = (offset or 0) + 1
        self._losses.append(
            f"offset {offset} of partition {partition.partition} of topic {self._topic!r} cannot "
            f"be read: {error}"
        )
        self._drop_consumer()

    def _drop_consumer(self) -> None:
        consumer = self._consumer
        self._consumer = None
        if consumer is not None:
            consumer.close()


def _close_opened(opening: Future[tuple[Any, list[Any]]]) -> None:
    if opening.exception() is None:
        opening.result()[0].close()


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
