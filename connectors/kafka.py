"""Kafka as a source and a sink of records. The only file that imports a Kafka client.

The client is kafka-python, because it is plain Python (it installs wherever torch does and speaks to every broker since 0.10), hands
out raw bytes with position, time and headers, reads committed records only when told to, and writes idempotently. Its 3.0 line has
traps, which is why it is pinned (`>=3.0.12,<3.1`) and why this file

- never gives it a deserializer: an exception inside one loses good records and hangs the next poll. A missing codec does the same, so
  codecs are checked before anything connects (its extras `crc32c,lz4,snappy,zstd` bring them);
- decodes what was fetched by itself (`record_batches`): the client makes an object for each record, which takes many times as long;
- bounds what a compressed batch may expand to, which no option of the client does, and cuts values that are too large;
- reads without a group: with one, every poll waits for the group's coordinator. Positions belong to the caller, committing is advisory;
- finds the end of a log by fetching there, since brokers exist whose list of end offsets runs behind (Tansu 0.6 reports the start of
  the last batch plus one);
- compares positions with ends and never counts records: control records and compaction leave gaps, an empty poll is not the end;
- bounds what waits for its acknowledgement, which the client's producer does not;
- gives back what the client sets aside for a paused partition, and takes over the errors that it keeps for later, both of which it can
  forget; after an error it drops the rest of the fetch, which would keep the next poll busy for good;
- keeps passwords out of its DEBUG log.

What it takes of the client's insides stands in `kafka_inside`, why a broker lets nobody in, in `kafka_diagnosis`.
"""

from __future__ import annotations

import gzip
import io
import itertools
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import kafka.codec
import kafka.record.default_records
import kafka.record.legacy_records
import kafka.record.util
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import (
    CorruptRecordError,
    IncompatibleBrokerVersion,
    InvalidReplicationFactorError,
    KafkaConfigurationError,
    KafkaError,
    KafkaTimeoutError,
    LogTruncationError,
    OffsetOutOfRangeError,
    RetriableError,
    TopicAlreadyExistsError,
    TopicAuthorizationFailedError,
)
from kafka.structs import OffsetAndMetadata

from stream_ctr.connectors import kafka_inside as inside
from stream_ctr.connectors.errors import (
    KafkaCodecMissing,
    KafkaDeliveryFailed,
    KafkaFailure,
    KafkaOptionError,
    KafkaReadFailed,
    KafkaRefused,
    KafkaTopicMissing,
    KafkaUnreachable,
    PositionLost,
    TopicChanged,
)
from stream_ctr.connectors.kafka_diagnosis import (
    explain_silence,
    listening_to_bootstrap,
    servers,
    topic_missing,
    warn_of_plaintext,
)
from stream_ctr.connectors.kafka_options import (
    IN_FLIGHT_BYTES,
    client_options,
    parse_properties,
    read_properties,
)
from stream_ctr.connectors.kafka_topics import Doubt, KnownTopics, deleted_before, what_is_lost
from stream_ctr.connectors.record_batches import (
    GZIP,
    LZ4,
    SNAPPY,
    ZSTD,
    Codecs,
    Columns,
    DamagedBatch,
)
from stream_ctr.connectors.records import POLL_BYTES, Records

__all__ = [
    "KafkaCodecMissing",
    "KafkaDeliveryFailed",
    "KafkaFailure",
    "KafkaOptionError",
    "KafkaReadFailed",
    "KafkaRefused",
    "KafkaSink",
    "KafkaSource",
    "KafkaTopicMissing",
    "KafkaUnreachable",
    "PointerReader",
    "PositionLost",
    "StoredRecord",
    "TopicChanged",
    "client_options",
    "ensure_topic",
    "parse_properties",
    "read_properties",
    "stored_records",
    "topic_partitions",
]

log = logging.getLogger(__name__)

BOOTSTRAP_SECONDS = 5.0  # for the first answer of a broker
MAX_BATCH_BYTES = 512 << 20  # of what a compressed batch may expand to
ANSWER_SECONDS = 5.0  # for what is asked of a broker that answered before


class KafkaSource:
    """All partitions of the topics as columns, from the beginning unless told otherwise by `seek`.

    `until_end` ends at the end that the log had when the source was opened: later records are not seen, and `finished` becomes true.
    Without it the source goes on for good. A broker that goes away yields empty polls until it is back.

    `group` is the consumer group that `commit` writes to; nothing is ever read from it. `client` comes from `client_options`; a `group.id`
    in it is not used here.

    A value of more than `max_record_bytes` is cut to one byte more than that, so that it can be told and weighs little. Records that
    retention has deleted, or whose batch is damaged, are an error; with `on_lost="skip"` reading goes on after them and `lost` counts them.
    Every `topic_check_seconds` the source looks whether its topics are still those that it began with.

    Raises `KafkaUnreachable`, `KafkaTopicMissing` and `KafkaCodecMissing`.
    """

    def __init__(
        self,
        topics: Sequence[str],
        *,
        client: Mapping[str, object],
        group: str,
        until_end: bool = False,
        max_record_bytes: int = 1 << 20,
        on_lost: Literal["stop", "skip"] = "stop",
        topic_check_seconds: float = 30.0,
    ) -> None:
        _check_codecs()
        self.until_end = until_end
        self._skip_lost = on_lost == "skip"
        self._client = client
        self._group = group
        self._committer: Any = None
        self._consumer = _open_consumer(client)
        try:
            self._assigned = _assign_all(self._consumer, topics, client)
            self._index = {partition: index for index, partition in enumerate(self._assigned)}
            self.partitions: tuple[tuple[str, int], ...] = tuple(
                (topic, partition) for topic, partition in self._assigned
            )
            self._paused: frozenset[int] = frozenset()
            self._recorded_end = _find_ends(self._consumer, self._assigned, client)
            most_records = min(self._consumer.config["max_poll_records"], _MOST_RECORDS)
            self._columns = Columns(
                most_records, full_bytes=POLL_BYTES, most_value_bytes=max_record_bytes + 1
            )
            inside.read_into(self._columns, self._consumer, self._index, _CODECS)
            self._position = self._offsets(self.beginning())
            self._doubt: Doubt | None = None
            self._lost = np.zeros(len(self._assigned), np.int64)
            self._failed: dict[int, inside.Failure] = {}
            self._unanswered = inside.Unanswered(self._consumer, self._index)
            self._topics = _Topics(self._consumer, topics, topic_check_seconds)
            self._seek(range(len(self._assigned)))
        except BaseException:
            self._consumer.close()
            raise

    def poll(self, timeout_seconds: float) -> Records:
        """The next records, in order within each partition; empty when none came in time.

        Raises `PositionLost` when retention removed what comes next, `TopicChanged` when the topic is no longer the one that reading began
        with, and `KafkaReadFailed` for what trying again does not cure, such as a damaged batch.
        """
        if self.finished:
            return Records.empty()
        self._topics.look()
        if self._doubt:
            self._settle(self._doubt)
            return Records.empty()
        inside.hand_out_what_was_set_aside(self._consumer)
        failed = self._due_failure()
        try:
            if failed:
                raise failed.error
            self._consumer.poll(
                timeout_ms=int(timeout_seconds * 1000), max_records=self._columns.most_records
            )
        except RetriableError:
            pass  # it may come after some were read
        except Exception as error:  # noqa: BLE001 - the client has many
            failed = failed or inside.failure_at(self._consumer, error)
            if not self._columns.count:
                self._recover(failed)
                return Records.empty()
        if kept := inside.take_kept_failure(self._consumer):
            self._failed[self._index[kept.partition]] = kept
        self._position = np.array(
            [inside.next_offset(self._consumer, partition) for partition in self._assigned],
            np.int64,
        )
        records = self._columns.hand_out()
        if self.until_end:
            self._apply_pauses()
            records = records.before(self._recorded_end)
        return records

    def positions(self) -> dict[int, int]:
        """The next offset to read of each partition, after what `poll` has returned."""
        read = np.minimum(self._position, self._recorded_end) if self.until_end else self._position
        return dict(enumerate(read.tolist()))

    def seek(self, positions: Mapping[int, int], skip_lost: bool | None = None) -> None:
        """Read on at these offsets; partitions not named stay where they are.

        Where records were deleted, `skip_lost` goes on at the first that is left (as `on_lost` says unless given). Raises `PositionLost`
        otherwise, and always when the log ends before such a position: that is not the log that was read.
        """
        wanted = self._position.copy()
        wanted[list(positions)] = list(positions.values())
        if self._skip_lost if skip_lost is None else skip_lost:
            wanted = self._pass_over_deleted(wanted)
        lost = self._what_is_lost(wanted)
        if lost:
            raise PositionLost("; ".join(lost))
        moved = np.flatnonzero(wanted != self._position).tolist()
        self._position = wanted
        self._seek({*positions, *moved})

    def lost(self) -> dict[int, int]:
        """How many offsets of each partition were passed over because they were deleted or damaged; 0 unless told to skip them."""
        return dict(enumerate(self._lost.tolist()))

    def topic_ids(self) -> dict[str, str | None]:
        """The id of each topic when the source was opened: another one under the same name has another. None from brokers without ids."""
        return self._topics.ids

    def silent_seconds(self) -> float:
        """For how long the brokers have not answered for a partition that was asked for; 0 while they do, also when they have no records.

        A partition without a leader is silent too. What is not polled is not asked for.
        """
        silent = self._unanswered.seconds(~self._quiet())
        return silent if silent > _MAY_WAIT_SECONDS else 0.0

    def beginning(self) -> dict[int, int]:
        """The first offset that each partition's log still holds; asks the broker."""
        return self._list_offsets(self._consumer.beginning_offsets)

    def ends(self) -> dict[int, int]:
        """The offset after the last record of each partition's log; asks the broker."""
        listed = self._list_offsets(self._consumer.end_offsets)
        return {
            index: max(end, self._consumer.highwater(self._assigned[index]) or 0)
            for index, end in listed.items()
        }

    def pause(self, partitions: Collection[int]) -> None:
        """Exactly these partitions yield nothing from now on; all others flow."""
        self._paused = frozenset(partitions)
        self._apply_pauses()

    def caught_up(self) -> npt.NDArray[np.bool_]:
        """Of each partition [P], whether all was read: up to the recorded end, or else up to the last end that the broker told.

        Asks nobody. An open transaction at the end of a partition keeps it false: there are records that may not be read yet.
        """
        if self.until_end:
            return self._position >= self._recorded_end
        return self._position >= np.array(
            [self._consumer.highwater(partition) for partition in self._assigned], np.int64
        )

    def lag(self) -> int:
        """How many offsets of all partitions are not read yet, by the last ends that the broker told."""
        highwater = np.array(
            [self._consumer.highwater(partition) or 0 for partition in self._assigned], np.int64
        )
        return int(np.maximum(highwater - self._position, 0).sum())

    @property
    def finished(self) -> bool:
        """Whether all was read of a source that ends."""
        return self.until_end and bool(self.caught_up().all())

    def commit(self, positions: Mapping[int, int]) -> None:
        """Tell the group's committed offsets, for tools that show lag. Advisory: a failure is a warning in the log."""
        offsets = {
            self._assigned[index]: OffsetAndMetadata(offset, "", -1)
            for index, offset in positions.items()
        }
        try:
            if self._committer is None:
                self._committer = _open_consumer(self._client, group_id=self._group)
            self._committer.commit(offsets, timeout_ms=int(ANSWER_SECONDS * 1000))
        except (KafkaError, KafkaUnreachable) as error:
            log.warning("the committed offsets of group %r are behind: %s", self._group, error)

    def close(self) -> None:
        self._consumer.close()
        if self._committer is not None:
            self._committer.close()

    def _seek(self, indexes: Collection[int]) -> None:
        self._doubt = None
        for index in indexes:
            self._consumer.seek(self._assigned[index], int(self._position[index]))
        self._apply_pauses()

    def _apply_pauses(self) -> None:
        quiet = {self._assigned[index] for index in np.flatnonzero(self._quiet()).tolist()}
        before = self._consumer.paused()
        self._consumer.pause(*(quiet - before))
        self._consumer.resume(*(before - quiet))

    def _quiet(self) -> npt.NDArray[np.bool_]:
        """The partitions [P] that are not read: told to wait, or at the end."""
        quiet = self.caught_up() if self.until_end else np.zeros(len(self._assigned), np.bool_)
        quiet[list(self._paused)] = True
        return quiet

    def _list_offsets(self, ask: Callable[..., Mapping[Any, int]]) -> dict[int, int]:
        try:
            offsets = ask(self._assigned, timeout_ms=int(ANSWER_SECONDS * 1000))
        except KafkaError as error:
            raise _leaders_silent(self._consumer, self._client, error) from error
        return {index: offsets[partition] for index, partition in enumerate(self._assigned)}

    def _offsets(self, by_partition: Mapping[int, int]) -> npt.NDArray[np.int64]:
        return np.array([by_partition[index] for index in range(len(self._assigned))], np.int64)

    def _due_failure(self) -> inside.Failure | None:
        """What is known to fail when its partition is read on; it waits while that is paused, and is gone when that was sent elsewhere."""
        for index, failed in list(self._failed.items()):
            if failed.offset != self._position[index]:
                del self._failed[index]
            elif not self._quiet()[index]:
                return self._failed.pop(index)
        return None

    def _recover(self, failed: inside.Failure) -> None:
        """Go past what cannot be read, where that is wanted and possible; raises what to tell otherwise."""
        error = failed.error
        if isinstance(error, OffsetOutOfRangeError | LogTruncationError):
            self._doubt = Doubt(str(error), retention=not isinstance(error, LogTruncationError))
            self._settle(self._doubt)
        elif failed.partition is not None and not isinstance(
            error, TopicAuthorizationFailedError | MemoryError
        ):
            self._recover_damage(failed.partition, failed.offset, error)
        elif isinstance(error, KafkaError):
            raise KafkaReadFailed(f"reading {_names(self._assigned)} failed: {error}") from error
        else:
            raise error

    def _settle(self, doubt: Doubt) -> None:
        """Go on after what retention deleted, where that is wanted; raises what is known, and waits for it until then."""
        self._topics.look(wait=True)
        try:
            explained = doubt.explained(
                self._position.tolist(), self.beginning(), self.ends(), now=time.monotonic()
            )
            if not explained and not doubt.over:
                return
            wanted = (
                self._pass_over_deleted(self._position)
                if explained and self._skip_lost
                else self._position
            )
            lost = self._what_is_lost(wanted)
        except KafkaUnreachable:
            return
        if lost or wanted is self._position:
            raise PositionLost("; ".join(lost) or f"{doubt.why}: was the topic created again?")
        self._position = wanted
        self._seek(range(len(self._assigned)))

    def _pass_over_deleted(self, wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        self.ends()  # asked first: when that fails, nothing is counted twice
        gone = deleted_before(self.partitions, wanted, self.beginning())
        self._lost += gone
        return wanted + gone

    def _recover_damage(self, partition: TopicPartition, offset: int, error: Exception) -> None:
        index = self._index[partition]
        where = f"partition {partition.partition} of topic {partition.topic!r}"
        after = (
            inside.offset_after_batch(self._consumer, partition, offset, ANSWER_SECONDS)
            if self._skip_lost
            else None
        )
        if after is None:
            raise KafkaReadFailed(
                f"{where} cannot be read on at offset {offset}: {_told(error)}"
            ) from error
        log.warning(
            "%s is damaged: offsets %d to %d are left out (%s)",
            where,
            offset,
            after - 1,
            _told(error),
        )
        self._lost[index] += after - offset
        self._position[index] = after
        self._seek([index])

    def _what_is_lost(self, wanted: npt.NDArray[np.int64]) -> list[str]:
        """Why partitions cannot be read on at the wanted offsets [P], in words."""
        return what_is_lost(self.partitions, wanted.tolist(), self.beginning(), self.ends())


class _Topics:
    """Looks whether topics are still those that they were, from what the consumer hears about them anyway. Raises `TopicChanged`."""

    def __init__(self, consumer: Any, names: Sequence[str], check_seconds: float) -> None:
        self._consumer = consumer
        self._names = tuple(dict.fromkeys(names))
        self._check_seconds = check_seconds
        self._looked = time.monotonic()
        self._told_at = inside.topics_asked_at(consumer)
        # A broker that has just started may not know a topic yet.
        self._known = KnownTopics(
            inside.topics(consumer, self._names), missing_seconds=ANSWER_SECONDS
        )

    @property
    def ids(self) -> dict[str, str | None]:
        return self._known.ids

    def look(self, *, wait: bool = False) -> None:
        """Compare, when the brokers have told anything new; `wait` until they do. Silence of theirs says nothing."""
        now, told_before = time.monotonic(), inside.topics_asked_at(self._consumer)
        if wait or now - self._looked >= self._check_seconds:
            self._looked = now
            inside.ask_for_topics(self._consumer)
        while (
            wait
            and told_before == inside.topics_asked_at(self._consumer)
            and time.monotonic() < now + ANSWER_SECONDS
        ):
            time.sleep(0.02)
        if self._told_at != inside.topics_asked_at(self._consumer):
            self._told_at = inside.topics_asked_at(self._consumer)
            self._known.compare(inside.topics(self._consumer, self._names), now=now)


class KafkaSink:
    """Writes records; `compression` is none, gzip, snappy, lz4 or zstd, and `compression.type` in the client's options goes before it.

    Sending returns at once and is acknowledged later. What the broker did not take is raised by the next `send` or `flush`. No more than
    `IN_FLIGHT_BYTES` of values wait for their acknowledgement; beyond that, sending blocks.

    Raises `KafkaUnreachable` and `KafkaCodecMissing`.
    """

    def __init__(self, client: Mapping[str, object], *, compression: str | None = "lz4") -> None:
        _check_codecs()
        self._client = client
        self._compression = compression
        self._failures: deque[BaseException] = deque()
        self._in_flight: deque[tuple[Any, int]] = deque()
        self._in_flight_bytes = 0
        self._unmarked_bytes = 0
        self._partitions: dict[str, int] = {}
        self._sent_in_batches = 0
        self._producer: Any = None
        self._open()

    def send(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
        time: int | None = None,
        partition: int | None = None,
    ) -> None:
        """Send one record; `time` in epoch milliseconds is now unless given, a null value withdraws the key from a compacted topic.

        Raises `KafkaTopicMissing` and `KafkaDeliveryFailed`.
        """
        self._raise_failures()
        self._know(topic)
        self._send(topic, value, key, list(headers), time, partition)

    def send_batch(
        self,
        topic: str,
        values: pa.LargeBinaryArray,
        times: npt.NDArray[np.int64] | None = None,
        keys: pa.Array | None = None,
    ) -> None:
        """Send n values in order, with their times in epoch milliseconds [n] and keys [n]; a key settles the partition.

        Without keys the partitions take turns, record by record: so none runs ahead of the others in the time of its events.

        Raises `KafkaTopicMissing` and `KafkaDeliveryFailed`.
        """
        self._raise_failures()
        self._know(topic)
        count = len(values)
        partitions = (
            [None] * count if keys is not None else self._in_turns(count, self._partitions[topic])
        )
        all_times = [None] * count if times is None else times.tolist()
        all_keys = [None] * count if keys is None else keys.cast(pa.large_binary()).to_pylist()
        no_headers: list[tuple[str, bytes]] = []
        for value, key, time_, partition in zip(
            values.to_pylist(), all_keys, all_times, partitions, strict=True
        ):
            self._send(topic, value, key, no_headers, time_, partition)

    def flush(self, timeout_seconds: float) -> None:
        """Wait until all is acknowledged; `KafkaDeliveryFailed` when that takes longer or some was not taken."""
        if self._producer is None:
            return
        try:
            self._producer.flush(timeout_seconds)
        except KafkaTimeoutError as error:
            silent = f"{servers(self._client)} did not acknowledge all records within {timeout_seconds:g} s"
            raise KafkaDeliveryFailed(silent) from error
        finally:
            self._raise_failures()

    def close(self) -> None:
        """Deliver what is on its way, for `ANSWER_SECONDS`, and close; `KafkaDeliveryFailed` as in `flush`."""
        try:
            self.flush(ANSWER_SECONDS)
        finally:
            self._abandon()

    def _open(self) -> None:
        self._producer = _connect(
            KafkaProducer,
            self._client,
            {**_PRODUCER_DEFAULTS, "compression_type": self._compression},
        )

    def _abandon(self) -> None:
        """Close the producer without waiting for what is on its way."""
        producer, self._producer = self._producer, None
        if producer is not None:
            inside.force_close(producer)
        self._in_flight.clear()
        self._in_flight_bytes = 0

    def _send(
        self,
        topic: str,
        value: bytes | None,
        key: bytes | None,
        headers: list[tuple[str, bytes]],
        time: int | None,
        partition: int | None,
    ) -> None:
        if self._producer is None:
            self._open()
        try:
            sent = self._producer.send(topic, value, key, headers, partition, time)
        except (KafkaError, ValueError) as error:
            raise KafkaDeliveryFailed(
                f"topic {topic!r} does not take the record: {error}"
            ) from error
        sent.add_errback(self._failures.append)
        self._unmarked_bytes += len(value or b"")
        if self._unmarked_bytes > _MARK_BYTES:
            self._wait_for_room(sent)

    def _wait_for_room(self, last_sent: Any) -> None:
        self._in_flight.append((last_sent, self._unmarked_bytes))
        self._in_flight_bytes += self._unmarked_bytes
        self._unmarked_bytes = 0
        while self._in_flight and (
            self._in_flight_bytes > IN_FLIGHT_BYTES or self._in_flight[0][0].is_done
        ):
            oldest, size = self._in_flight.popleft()
            self._in_flight_bytes -= size
            # The client gives up by itself (delivery.timeout.ms) and then the failure is among the failures.
            with suppress(KafkaError):
                oldest.get()

    def _in_turns(self, count: int, partitions: int) -> list[int]:
        # The client would stay at one for a block of them, and would ask itself for each record, at a fifth of the cost of sending.
        first, self._sent_in_batches = self._sent_in_batches, self._sent_in_batches + count
        turns: list[int] = (np.arange(first, first + count) % partitions).tolist()
        return turns

    def _know(self, topic: str) -> None:
        if topic in self._partitions:
            return
        existing = _all_topics(self._client)
        if topic not in existing:
            raise topic_missing(topic, existing, self._client)
        self._partitions[topic] = existing[topic]

    def _raise_failures(self) -> None:
        if not self._failures:
            return
        # One record that the broker refuses makes the idempotent producer fail for good: the next record gets a new one.
        self._abandon()
        failures = list(self._failures)
        self._failures.clear()
        raise KafkaDeliveryFailed(
            f"{servers(self._client)} did not take {len(failures)} records; the first: {failures[0]}"
        )


class PointerReader:
    """Follows a compacted topic from its beginning: the latest value of each key, and then every new one.

    Raises `KafkaUnreachable`, `KafkaTopicMissing` and `KafkaCodecMissing`.
    """

    def __init__(self, client: Mapping[str, object], topic: str) -> None:
        _check_codecs()
        self._consumer = _open_consumer(client, auto_offset_reset="earliest")
        try:
            self._assigned = _assign_all(self._consumer, [topic], client)
            self._end = _find_ends(self._consumer, self._assigned, client)
            self._consumer.seek_to_beginning()
        except BaseException:
            self._consumer.close()
            raise
        self._caught_up = False

    def poll(self, timeout_seconds: float) -> list[tuple[str, bytes | None]]:
        """The next (key, value) pairs, in order within each partition; a null value withdraws its key.

        Records without a key are left out. Raises `KafkaReadFailed` for what trying again does not cure.
        """
        try:
            polled = self._consumer.poll(timeout_ms=int(timeout_seconds * 1000))
        except RetriableError:
            return []
        except KafkaError as error:
            raise KafkaReadFailed(f"reading {_names(self._assigned)} failed: {error}") from error
        records = itertools.chain.from_iterable(polled.values())
        return [
            (record.key.decode(errors="replace"), record.value)
            for record in records
            if record.key is not None
        ]

    @property
    def caught_up(self) -> bool:
        """Whether all that was in the topic at start has been polled."""
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
    """All records that the topic holds at the start, in order within each partition; an object each, so for small topics.

    Raises `KafkaUnreachable`, also when nothing more comes before the end, `KafkaTopicMissing`, `KafkaCodecMissing` and `KafkaReadFailed`.
    """
    _check_codecs()
    consumer = _open_consumer(client, auto_offset_reset="earliest")
    try:
        assigned = _assign_all(consumer, [topic], client)
        ends = dict(zip(assigned, _find_ends(consumer, assigned, client).tolist(), strict=True))
        consumer.seek_to_beginning()
        progress, heard = None, time.monotonic()
        while any(
            (consumer.position(partition, timeout_ms=0) or 0) < end
            for partition, end in ends.items()
        ):
            try:
                polled = consumer.poll(timeout_ms=250)
            except RetriableError:
                polled = {}
            except KafkaError as error:
                raise KafkaReadFailed(f"reading {_names(assigned)} failed: {error}") from error
            for partition, records in polled.items():
                for record in records:
                    if record.offset < ends[partition]:
                        yield StoredRecord(
                            record.partition,
                            record.offset,
                            record.key,
                            record.value,
                            tuple(record.headers),
                        )
            before, progress = (
                progress,
                [consumer.position(partition, timeout_ms=0) for partition in assigned],
            )
            if progress != before:
                heard = time.monotonic()
            elif time.monotonic() - heard > ANSWER_SECONDS:
                raise _leaders_silent(consumer, client, KafkaTimeoutError("no answer to fetching"))
    finally:
        consumer.close()


def ensure_topic(
    client: Mapping[str, object], topic: str, *, partitions: int = 1, compacted: bool = False
) -> bool:
    """Create the topic if it is missing, with the broker's default replication; true when it was created."""
    settings: dict[str, object] = {
        "num_partitions": partitions,
        "configs": {"cleanup.policy": "compact"} if compacted else {},
    }
    milliseconds = int(ANSWER_SECONDS * 1000)
    with _admin(client) as admin:
        try:
            try:
                admin.create_topics(
                    {topic: settings}, timeout_ms=milliseconds, wait_for_metadata=True
                )
            except (IncompatibleBrokerVersion, InvalidReplicationFactorError):
                admin.create_topics(
                    {topic: {**settings, "replication_factor": 1}},
                    timeout_ms=milliseconds,
                    wait_for_metadata=True,
                )
        except TopicAlreadyExistsError:
            return False
    return True


def topic_partitions(client: Mapping[str, object], topic: str) -> int | None:
    """How many partitions the topic has; None when it does not exist."""
    return _all_topics(client).get(topic)


def _all_topics(client: Mapping[str, object]) -> dict[str, int]:
    with _admin(client) as admin:
        # Asked for all topics: naming one would create it where the broker creates topics by itself.
        return {
            described["name"]: len(described["partitions"]) for described in admin.describe_topics()
        }


_MOST_RECORDS = 1 << 16  # of a poll, whatever max.poll.records says
_MAY_WAIT_SECONDS = 1.0  # that a broker takes for an answer without records
_MARK_BYTES = 256 << 10  # of values between two of the records whose acknowledgement is waited for

# Tuned by measurement on two cores; every one can be set by the user.
_CONSUMER_DEFAULTS: dict[str, object] = {
    "client_id": "stream-ctr",
    "fetch_max_wait_ms": 100,
    "max_partition_fetch_bytes": 2 << 20,  # a poll of Arrow records is what was fetched at once
    "max_poll_records": 5000,
    "metrics_enabled": False,
    "reconnect_backoff_max_ms": 1000,
}
_PRODUCER_DEFAULTS: dict[str, object] = {
    "client_id": "stream-ctr",
    "batch_size": 256 << 10,
    "linger_ms": 20,
    "max_block_ms": int(ANSWER_SECONDS * 1000),
    "metrics_enabled": False,
    "reconnect_backoff_max_ms": 1000,
}
_ADMIN_DEFAULTS: dict[str, object] = {"client_id": "stream-ctr"}

# What exactness rests on: no option of the user reaches these.
_CONSUMER_RULES: dict[str, object] = {
    "group_id": None,
    "enable_auto_commit": False,
    "auto_offset_reset": "none",
    "isolation_level": "read_committed",
    "check_crcs": True,
}


def _check_codecs() -> None:
    present = {
        "crc32c": kafka.record.util.crc32c_c is not None,
        "lz4": kafka.codec.lz4 is not None,  # others that the client knows have no bounds
        "snappy": kafka.codec.has_snappy(),
        "zstd": kafka.codec.has_zstd(),
    }
    missing = ", ".join(name for name, there in present.items() if not there)
    if missing:
        raise KafkaCodecMissing(
            f"the Kafka client lacks {missing}: pip install 'kafka-python[crc32c,lz4,snappy,zstd]'"
        )


def _open_consumer(client: Mapping[str, object], **ours: object) -> Any:
    consumer = _connect(KafkaConsumer, client, _CONSUMER_DEFAULTS, {**_CONSUMER_RULES, **ours})
    inside.never_create_topics(consumer)
    # What the client parses by itself, with keys and headers, is bounded too.
    for module in (kafka.record.default_records, kafka.record.legacy_records):
        module.gzip_decode, module.snappy_decode, module.lz4_decode = (
            _gzip_decode,
            _snappy_decode,
            _lz4_decode,
        )
    kafka.record.default_records.zstd_decode = _zstd_decode
    return consumer


def _within_bounds(pieces_of: Callable[[Any], Iterator[bytes]]) -> Callable[[Any], bytes]:
    # A codec expands a batch as far as it goes: a megabyte of zstd is up to 30 GB, of gzip 1 GB, of lz4 255 MB.
    def expand(payload: Any) -> bytes:
        pieces, size = [], 0
        for piece in pieces_of(payload):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_BATCH_BYTES:
                raise _expands_too_far()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    return expand


def _expands_too_far() -> CorruptRecordError:
    return CorruptRecordError(f"the batch expands to more than {MAX_BATCH_BYTES >> 20} MiB")


@_within_bounds
def _zstd_decode(payload: Any) -> Iterator[bytes]:
    with kafka.codec.zstd.ZstdDecompressor().stream_reader(
        payload, read_across_frames=True
    ) as reader:
        yield from iter(lambda: reader.read(_PIECE_BYTES), b"")


@_within_bounds
def _gzip_decode(payload: Any) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=io.BytesIO(payload)) as reader:
        yield from iter(lambda: reader.read(_PIECE_BYTES), b"")


@_within_bounds
def _lz4_decode(payload: Any) -> Iterator[bytes]:
    # Its class for files copies what is left of the payload for every piece.
    context = kafka.codec.lz4.create_decompression_context()
    rest, ended = memoryview(payload), False
    while not ended:
        piece, read, ended = kafka.codec.lz4.decompress_chunk(
            context, rest, max_length=_PIECE_BYTES
        )
        if not piece and not read:
            raise EOFError("lz4 is cut")
        yield piece
        rest = rest[read:]


@_within_bounds
def _snappy_decode(payload: Any) -> Iterator[bytes]:
    if payload[: len(_XERIAL)] != _XERIAL:
        yield _snappy_block(payload)
        return
    at = _XERIAL_BYTES
    while at < len(payload):
        begin, at = at + 4, at + 4 + int.from_bytes(payload[at : at + 4])
        yield _snappy_block(payload[begin:at])


def _snappy_block(block: Any) -> bytes:
    size = 0  # of what it expands to: seven bits a byte, the lowest first, the last byte without the eighth
    for place, byte in enumerate(block[:5]):
        size |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            break
    if size > MAX_BATCH_BYTES:
        raise _expands_too_far()
    expanded: bytes = kafka.codec.snappy.decompress(block)
    return expanded


# What Java's library puts before its blocks of snappy; the rest of it is versions.
_XERIAL, _XERIAL_BYTES = b"\x82SNAPPY\x00", 16
_PIECE_BYTES = 1 << 18

_CODECS = Codecs(
    kafka.record.util.calc_crc32c,
    {GZIP: _gzip_decode, SNAPPY: _snappy_decode, LZ4: _lz4_decode, ZSTD: _zstd_decode},
)


@contextmanager
def _admin(client: Mapping[str, object]) -> Iterator[Any]:
    admin = _connect(KafkaAdminClient, client, _ADMIN_DEFAULTS)
    try:
        yield admin
    except RetriableError as error:
        raise KafkaUnreachable(
            f"{servers(client)} answered, but what it advertises (advertised.listeners) does not: {error}"
        ) from error
    except KafkaError as error:
        raise KafkaFailure(f"{servers(client)} refused: {error}") from error
    finally:
        admin.close()


def _connect(
    make: Any,
    client: Mapping[str, object],
    defaults: Mapping[str, object],
    rules: Mapping[str, object] | None = None,
) -> Any:
    """A connected client of kafka-python: our defaults, then what of the user's options it knows, then our rules."""
    inside.silence_secrets()
    warn_of_plaintext(client)
    opened: list[Any] = []

    def open_network(**network: object) -> Any:
        opened.append(make.DEFAULT_CONFIG["kafka_client"](**network))
        return opened[-1]

    known = {name: value for name, value in client.items() if name in make.DEFAULT_CONFIG}
    bounds = {"bootstrap_timeout_ms": int(BOOTSTRAP_SECONDS * 1000), "kafka_client": open_network}
    options = {**defaults, **known, **(rules or {}), **bounds}
    with listening_to_bootstrap() as heard:
        try:
            # A TLS handshake with a silent peer outlasts the client's own timeout.
            return _in_time(lambda: make(**options), BOOTSTRAP_SECONDS + 0.5)
        except (KafkaTimeoutError, TimeoutError) as error:
            failure: KafkaFailure = explain_silence(client, list(heard.reasons), BOOTSTRAP_SECONDS)
            cause: BaseException = error
        except KafkaConfigurationError as error:
            failure, cause = (
                KafkaOptionError(f"the Kafka client does not take its options: {error}"),
                error,
            )
        except KafkaError as error:
            failure, cause = (
                KafkaRefused(f"{servers(client)} accepts connections, but answers: {error}"),
                error,
            )
    for network in opened:
        # A producer's network cannot be closed while the thread that was given up on is in it.
        with suppress(RuntimeError):
            network.close()
    raise failure from cause


def _in_time(call: Callable[[], Any], seconds: float) -> Any:
    """What the call returns or raises; `TimeoutError` when it does not come back, and then a daemon thread is left with it."""
    outcome: Future[Any] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits for the outcome
            outcome.set_exception(error)

    threading.Thread(target=work, name="kafka-connect", daemon=True).start()
    return outcome.result(seconds)


def _leaders_silent(
    consumer: Any, client: Mapping[str, object], error: KafkaError
) -> KafkaUnreachable:
    return KafkaUnreachable(
        f"the brokers of {servers(client)} ({inside.advertised(consumer)}) did not answer within {ANSWER_SECONDS:g} s: check that they "
        f"run, that what they advertise can be reached from here (advertised.listeners) and that every partition has a leader: {error}"
    )


def _assign_all(
    consumer: Any, topics: Sequence[str], client: Mapping[str, object]
) -> list[TopicPartition]:
    try:
        # Asked for all topics: naming one would create it where the broker creates topics by itself.
        existing = _in_time(consumer.topics, ANSWER_SECONDS)
    except (KafkaError, TimeoutError) as error:
        raise _leaders_silent(consumer, client, error) from error
    assigned = []
    for topic in dict.fromkeys(topics):
        if topic not in existing:
            raise topic_missing(topic, existing, client)
        assigned += [
            TopicPartition(topic, partition)
            for partition in sorted(consumer.partitions_for_topic(topic))
        ]
    consumer.assign(assigned)
    return assigned


def _find_ends(
    consumer: Any, assigned: Sequence[TopicPartition], client: Mapping[str, object]
) -> npt.NDArray[np.int64]:
    """The end of each partition's log [P]: where fetching at the listed end leads to. The consumer is left there."""
    deadline = time.monotonic() + ANSWER_SECONDS
    try:
        for partition, end in consumer.end_offsets(
            assigned, timeout_ms=int(ANSWER_SECONDS * 1000)
        ).items():
            consumer.seek(partition, end)
        # A high watermark is known as soon as the partition was fetched from.
        while any(consumer.highwater(partition) is None for partition in assigned):
            if time.monotonic() > deadline:
                raise KafkaTimeoutError("no answer to fetching")
            consumer.poll(timeout_ms=100, max_records=sys.maxsize)
        return np.array(
            [consumer.position(partition, timeout_ms=0) for partition in assigned], np.int64
        )
    except KafkaError as error:
        raise _leaders_silent(consumer, client, error) from error


def _told(error: Exception) -> str:
    return (
        str(error)
        if isinstance(error, KafkaError | DamagedBatch)
        else f"{type(error).__name__}: {error}"
    )


def _names(assigned: Sequence[TopicPartition]) -> str:
    return ", ".join(
        f"topic {topic!r}" for topic in dict.fromkeys(partition.topic for partition in assigned)
    )
