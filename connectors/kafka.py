"""Kafka as a source and a sink of records. The only file that knows a Kafka client.

The client is kafka-python, because it is plain Python (it installs wherever torch does and speaks to every broker since 0.10), hands out raw
bytes with position, time and headers, reads committed records only when told to, and writes idempotently. Its 3.0 line has traps, which is why
it is pinned (`>=3.0.12,<3.1`) and why this file

- never gives it a deserializer: an exception inside one loses good records and hangs the next poll; a missing codec does the same, so codecs
  are checked before anything connects (its extras `crc32c,lz4,snappy,zstd` bring them);
- reads without a group: with one, every poll waits for the group's coordinator. Positions belong to the caller; committing them is advisory;
- finds the end of a log by fetching there, since brokers exist whose list of end offsets runs behind (Tansu 0.6 reports the *start* of the
  last batch plus one);
- compares positions with ends and never counts records: control records and compaction leave gaps, and an empty poll is not the end;
- keeps passwords out of its DEBUG log.
"""

from __future__ import annotations

import difflib
import itertools
import logging
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

import kafka.codec
import kafka.record.util
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import (
    IncompatibleBrokerVersion,
    InvalidReplicationFactorError,
    KafkaError,
    KafkaTimeoutError,
    LogTruncationError,
    OffsetOutOfRangeError,
    RetriableError,
    TopicAlreadyExistsError,
)
from kafka.structs import OffsetAndMetadata

from connectors.records import Records

log = logging.getLogger(__name__)

BOOTSTRAP_SECONDS = 5.0  # for the first answer of a broker
ANSWER_SECONDS = 5.0  # for what is asked of a broker that answered before
PROBE_SECONDS = 2.0  # for finding out why nobody answered
IN_FLIGHT_BYTES = 32 << 20  # values handed to the producer and not yet acknowledged


class KafkaSource:
    """All partitions of the topics as columns, from the beginning unless told otherwise by `seek`.

    `until_end` ends at the end the log had when the source was opened: later records are not seen, and `finished` becomes true. Without it the
    source goes on for good. A broker that goes away yields empty polls until it is back.

    `group` is the consumer group that `commit` writes to; nothing is ever read from it. `client` comes from `client_options`; a `group.id` in it
    is not used here.

    Raises `KafkaUnreachable`, `KafkaTopicMissing` and `KafkaCodecMissing`.
    """

    def __init__(self, topics: Sequence[str], *, client: Mapping[str, object], group: str, until_end: bool = False) -> None:
        _check_codecs()
        self.until_end = until_end
        self._client = client
        self._group = group
        self._committer: Any = None
        self._consumer = _open_consumer(client)
        try:
            self._assigned = _assign_all(self._consumer, topics, client)
            self._index = {partition: index for index, partition in enumerate(self._assigned)}
            self.partitions: tuple[tuple[str, int], ...] = tuple((topic, partition) for topic, partition in self._assigned)
            self._held: frozenset[int] = frozenset()
            self._recorded_end = _find_ends(self._consumer, self._assigned, client)
            self._position = self._offsets(self.beginning())
            self._seek(range(len(self._assigned)))
        except BaseException:
            self._consumer.close()
            raise

    def poll(self, timeout_seconds: float) -> Records:
        """The next records, in order within each partition; empty when none came in time.

        Raises `PositionLost` when retention removed what comes next, `KafkaReadFailed` for what trying again does not cure.
        """
        if self.finished:
            return Records.empty()
        try:
            polled = self._consumer.poll(timeout_ms=int(timeout_seconds * 1000))
        except RetriableError:
            return Records.empty()
        except KafkaError as error:
            raise self._read_failure(error) from error
        try:
            self._position = np.array([self._next_offset(index) for index in range(len(self._assigned))], np.int64)
        except KafkaError as error:
            raise self._read_failure(error) from error
        records = self._columns(polled)
        if self.until_end:
            self._hold_finished()
            records = _before(records, self._recorded_end)
        return records

    def positions(self) -> dict[int, int]:
        """The next offset to read of each partition, after what `poll` has returned."""
        read = np.minimum(self._position, self._recorded_end) if self.until_end else self._position
        return dict(enumerate(read.tolist()))

    def seek(self, positions: Mapping[int, int]) -> None:
        """Read on at these offsets; partitions not named stay where they are.

        Raises `PositionLost` when the log does not hold such a position.
        """
        wanted = self._position.copy()
        wanted[list(positions)] = list(positions.values())
        lost = self._what_is_lost(wanted)
        if lost:
            raise PositionLost("; ".join(lost))
        self._position = wanted
        self._seek(positions)

    def beginning(self) -> dict[int, int]:
        """The first offset that each partition's log still holds; asks the broker."""
        return self._list_offsets(self._consumer.beginning_offsets)

    def ends(self) -> dict[int, int]:
        """The offset after the last record of each partition's log; asks the broker."""
        listed = self._list_offsets(self._consumer.end_offsets)
        return {index: max(end, self._consumer.highwater(self._assigned[index]) or 0) for index, end in listed.items()}

    def pause(self, partitions: Collection[int]) -> None:
        """Exactly these partitions yield nothing from now on; all others flow."""
        self._held = frozenset(partitions)
        self._hold_finished()

    def caught_up(self) -> npt.NDArray[np.bool_]:
        """Of each partition [P], whether all was read: up to the recorded end, or else up to the last end that the broker told.

        Asks nobody. An open transaction at the end of a partition keeps it false: there are records that may not be read yet.
        """
        if self.until_end:
            return self._position >= self._recorded_end
        return self._position >= np.array([self._consumer.highwater(partition) for partition in self._assigned], np.int64)

    @property
    def finished(self) -> bool:
        """Whether all was read of a source that ends."""
        return self.until_end and bool(self.caught_up().all())

    def commit(self, positions: Mapping[int, int]) -> None:
        """Tell the group's committed offsets, for tools that show lag. Advisory: a failure is a warning in the log."""
        offsets = {self._assigned[index]: OffsetAndMetadata(offset, "", -1) for index, offset in positions.items()}
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

    def _columns(self, polled: Mapping[Any, list[Any]]) -> Records:
        records = list(itertools.chain.from_iterable(polled.values()))
        count = len(records)
        return Records(
            partition=np.repeat(np.array([self._index[partition] for partition in polled], np.int32), [len(some) for some in polled.values()]),
            offset=np.fromiter(map(attrgetter("offset"), records), np.int64, count),
            time=np.fromiter(map(attrgetter("timestamp"), records), np.int64, count),
            value=pa.array(list(map(attrgetter("value"), records)), pa.large_binary()),
        )

    def _next_offset(self, index: int) -> int:
        # Moves past control and aborted records too. With no time to wait it only reads what the client knows.
        return int(self._consumer.position(self._assigned[index], timeout_ms=0))

    def _seek(self, indexes: Collection[int]) -> None:
        for index in indexes:
            self._consumer.seek(self._assigned[index], int(self._position[index]))
        self._hold_finished()

    def _hold_finished(self) -> None:
        done = set(np.flatnonzero(self.caught_up()).tolist()) if self.until_end else set()
        still = {self._assigned[index] for index in self._held | done}
        paused = self._consumer.paused()
        self._consumer.pause(*(still - paused))
        self._consumer.resume(*(paused - still))

    def _list_offsets(self, ask: Callable[..., Mapping[Any, int]]) -> dict[int, int]:
        try:
            offsets = ask(self._assigned, timeout_ms=int(ANSWER_SECONDS * 1000))
        except KafkaError as error:
            raise _leaders_silent(self._assigned, self._client, error) from error
        return {index: offsets[partition] for index, partition in enumerate(self._assigned)}

    def _offsets(self, by_partition: Mapping[int, int]) -> npt.NDArray[np.int64]:
        return np.array([by_partition[index] for index in range(len(self._assigned))], np.int64)

    def _read_failure(self, error: KafkaError) -> KafkaFailure:
        if isinstance(error, OffsetOutOfRangeError | LogTruncationError):
            return PositionLost("; ".join(self._what_is_lost(self._position)) or str(error))
        return KafkaReadFailed(f"reading {_names(self._assigned)} failed: {error}")

    def _what_is_lost(self, wanted: npt.NDArray[np.int64]) -> list[str]:
        """Why partitions cannot be read on at the wanted offsets [P], in words."""
        beginning, ends = self.beginning(), self.ends()
        lost = []
        for index, ((topic, partition), offset) in enumerate(zip(self.partitions, wanted.tolist(), strict=True)):
            where = f"partition {partition} of topic {topic!r}"
            if offset < beginning[index]:
                lost.append(f"{where} begins at offset {beginning[index]}, but {offset} comes next: {beginning[index] - offset} were deleted")
            elif offset > ends[index]:
                lost.append(f"{where} ends at offset {ends[index]}, but {offset} comes next: was the topic deleted and created again?")
        return lost


class KafkaSink:
    """Writes records; `compression` is none, gzip, snappy, lz4 or zstd, and `compression.type` in the client's options goes before it.

    Sending returns at once and is acknowledged later. What the broker did not take is raised by the next `send` or `flush`. No more than
    `IN_FLIGHT_BYTES` of values wait for their acknowledgement; beyond that, sending blocks.

    Raises `KafkaUnreachable` and `KafkaCodecMissing`.
    """

    def __init__(self, client: Mapping[str, object], *, compression: str | None = "lz4") -> None:
        _check_codecs()
        self._client = client
        self._failures: list[BaseException] = []
        self._in_flight: deque[tuple[Any, int]] = deque()
        self._in_flight_bytes = 0
        self._unmarked_bytes = 0
        self._topics: set[str] = set()
        self._producer = _connect(KafkaProducer, client, {**_PRODUCER_DEFAULTS, "compression_type": compression})

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
        """Send one record; `time` in epoch milliseconds is now unless given, a null value with a key deletes the key from a compacted topic.

        Raises `KafkaTopicMissing` and `KafkaDeliveryFailed`.
        """
        self._raise_failures()
        self._know(topic)
        self._send(topic, value, key, list(headers), time, partition)

    def send_batch(
        self, topic: str, values: pa.LargeBinaryArray, times: npt.NDArray[np.int64] | None = None, keys: pa.Array | None = None
    ) -> None:
        """Send n values in order, with their times in epoch milliseconds [n] and keys [n]; a key settles the partition.

        Raises `KafkaTopicMissing` and `KafkaDeliveryFailed`.
        """
        self._raise_failures()
        self._know(topic)
        count = len(values)
        all_times = itertools.repeat(None, count) if times is None else times.tolist()
        all_keys = itertools.repeat(None, count) if keys is None else keys.cast(pa.large_binary()).to_pylist()
        no_headers: list[tuple[str, bytes]] = []
        for value, time_, key in zip(values.to_pylist(), all_times, all_keys, strict=True):
            self._send(topic, value, key, no_headers, time_, None)

    def flush(self, timeout_seconds: float) -> None:
        """Wait until all is acknowledged; `KafkaDeliveryFailed` when that takes longer or some was not taken."""
        try:
            self._producer.flush(timeout_seconds)
        except KafkaTimeoutError as error:
            raise KafkaDeliveryFailed(f"not all records were acknowledged within {timeout_seconds:g} s by {_servers(self._client)}") from error
        finally:
            self._raise_failures()
        self._in_flight.clear()
        self._in_flight_bytes = 0

    def close(self) -> None:
        """Deliver what is on its way, for `ANSWER_SECONDS`, and close; `KafkaDeliveryFailed` as in `flush`."""
        try:
            self.flush(ANSWER_SECONDS)
        finally:
            # It flushes once more and gives up on what flush has reported already.
            with suppress(KafkaTimeoutError):
                self._producer.close(timeout=1.0)

    def _send(
        self, topic: str, value: bytes | None, key: bytes | None, headers: list[tuple[str, bytes]], time: int | None, partition: int | None
    ) -> None:
        try:
            sent = self._producer.send(topic, value, key, headers, partition, time)
        except (KafkaError, ValueError) as error:
            raise KafkaDeliveryFailed(f"topic {topic!r} does not take the record: {error}") from error
        sent.add_errback(self._failures.append)
        self._unmarked_bytes += len(value or b"")
        if self._unmarked_bytes > _MARK_BYTES:
            self._wait_for_room(sent)

    def _wait_for_room(self, last_sent: Any) -> None:
        self._in_flight.append((last_sent, self._unmarked_bytes))
        self._in_flight_bytes += self._unmarked_bytes
        self._unmarked_bytes = 0
        while self._in_flight and (self._in_flight_bytes > IN_FLIGHT_BYTES or self._in_flight[0][0].is_done):
            oldest, size = self._in_flight.popleft()
            self._in_flight_bytes -= size
            # The client gives up by itself (delivery.timeout.ms) and then the failure is among the failures.
            with suppress(KafkaError):
                oldest.get()

    def _know(self, topic: str) -> None:
        if topic in self._topics:
            return
        if topic_partitions(self._client, topic) is None:
            raise _topic_missing(topic, _topic_names(self._client), self._client)
        self._topics.add(topic)

    def _raise_failures(self) -> None:
        if self._failures:
            failures, self._failures[:] = list(self._failures), []
            raise KafkaDeliveryFailed(f"{len(failures)} records were not acknowledged by {_servers(self._client)}; the first: {failures[0]}")


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
        """The next (key, value) pairs, in order within each partition; a null value withdraws its key. A record without a key is left out."""
        try:
            polled = self._consumer.poll(timeout_ms=int(timeout_seconds * 1000))
        except RetriableError:
            return []
        except KafkaError as error:
            raise KafkaReadFailed(f"reading {_names(self._assigned)} failed: {error}") from error
        records = itertools.chain.from_iterable(polled.values())
        return [(record.key.decode(errors="replace"), record.value) for record in records if record.key is not None]

    @property
    def caught_up(self) -> bool:
        """Whether all that was in the topic at start has been polled."""
        if not self._caught_up:
            positions = [self._consumer.position(partition, timeout_ms=0) for partition in self._assigned]
            self._caught_up = all(position is not None and position >= end for position, end in zip(positions, self._end, strict=True))
        return self._caught_up

    def close(self) -> None:
        self._consumer.close()


def ensure_topic(client: Mapping[str, object], topic: str, *, partitions: int = 1, compacted: bool = False) -> bool:
    """Create the topic if it is missing, with the broker's default replication; true when it was created."""
    settings: dict[str, object] = {"num_partitions": partitions, "configs": {"cleanup.policy": "compact"} if compacted else {}}
    milliseconds = int(ANSWER_SECONDS * 1000)
    with _admin(client) as admin:
        try:
            try:
                admin.create_topics({topic: settings}, timeout_ms=milliseconds, wait_for_metadata=True)
            except (IncompatibleBrokerVersion, InvalidReplicationFactorError):
                admin.create_topics({topic: {**settings, "replication_factor": 1}}, timeout_ms=milliseconds, wait_for_metadata=True)
        except TopicAlreadyExistsError:
            return False
    return True


def topic_partitions(client: Mapping[str, object], topic: str) -> int | None:
    """How many partitions the topic has; None when it does not exist."""
    with _admin(client) as admin:
        # Asked for all topics: naming one would create it where the broker creates topics by itself.
        found = next((described for described in admin.describe_topics() if described["name"] == topic), None)
    return None if found is None else len(found["partitions"])


_MARK_BYTES = 256 << 10

# Tuned by measurement on two cores; every one can be set by the user.
_CONSUMER_DEFAULTS: dict[str, object] = {
    "client_id": "stream-ctr",
    "fetch_max_wait_ms": 100,
    "max_partition_fetch_bytes": 4 << 20,
    "max_poll_records": 5000,
    "metrics_enabled": False,
    "reconnect_backoff_max_ms": 1000,
}
_PRODUCER_DEFAULTS: dict[str, object] = {
    "client_id": "stream-ctr",
    "batch_size": 256 << 10,
    "linger_ms": 5,
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
        "lz4": kafka.codec.has_lz4(),
        "snappy": kafka.codec.has_snappy(),
        "zstd": kafka.codec.has_zstd(),
    }
    missing = ", ".join(name for name, there in present.items() if not there)
    if missing:
        raise KafkaCodecMissing(f"the Kafka client lacks {missing}: pip install 'kafka-python[crc32c,lz4,snappy,zstd]'")


def _open_consumer(client: Mapping[str, object], **ours: object) -> Any:
    return _connect(KafkaConsumer, client, _CONSUMER_DEFAULTS, {**_CONSUMER_RULES, **ours})


@contextmanager
def _admin(client: Mapping[str, object]) -> Iterator[Any]:
    admin = _connect(KafkaAdminClient, client, _ADMIN_DEFAULTS)
    try:
        yield admin
    except RetriableError as error:
        raise KafkaUnreachable(f"{_servers(client)} answered and then did not: {error}{_ADVERTISED}") from error
    except KafkaError as error:
        raise KafkaFailure(f"{_servers(client)} refused: {error}") from error
    finally:
        admin.close()


def _connect(make: Any, client: Mapping[str, object], defaults: Mapping[str, object], rules: Mapping[str, object] | None = None) -> Any:
    """A connected client of kafka-python: our defaults, then what of the user's options it knows, then our rules."""
    _silence_secrets()
    opened: list[Any] = []

    def net_client(**options: object) -> Any:
        opened.append(make.DEFAULT_CONFIG["kafka_client"](**options))
        return opened[-1]

    known = {name: value for name, value in client.items() if name in make.DEFAULT_CONFIG}
    timeout = {"bootstrap_timeout_ms": int(BOOTSTRAP_SECONDS * 1000), "kafka_client": net_client}
    started = time.monotonic()
    with _heard() as reasons:
        try:
            return make(**{**defaults, **known, **(rules or {}), **timeout})
        except KafkaTimeoutError as error:
            failure = _explain(client, time.monotonic() - started, reasons)
            raise failure from error
        except (KafkaError, ValueError, OSError) as error:
            raise KafkaOptionError(f"the Kafka client does not take its options: {error}") from error
        finally:
            pass
