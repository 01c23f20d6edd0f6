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


# KafkaFailure
#   KafkaOptionError       an option that does not exist, cannot be read or would break exactness
#   KafkaCodecMissing      a library for compressed records is not installed
#   KafkaUnreachable       no broker answers
#     KafkaRefused         one does, but does not let us in
#   KafkaTopicMissing
#   KafkaPositionLost      the records to continue with are not in the log
#   KafkaReadFailed        the broker or the bytes say no, and trying again would not help
#   KafkaDeliveryFailed    records were not acknowledged
class KafkaFailure(Exception):
    """What went wrong with Kafka, in words for the person who runs the program."""


class KafkaOptionError(KafkaFailure):
    """A Kafka option that does not exist, cannot be read or would break exactness."""


class KafkaCodecMissing(KafkaFailure):
    """A library that compressed records need is not installed."""


class KafkaUnreachable(KafkaFailure):
    """No broker answers."""


class KafkaRefused(KafkaUnreachable):
    """Something accepts connections, but does not let us in: login, TLS, or it is no Kafka broker."""


class KafkaTopicMissing(KafkaFailure):
    """The topic does not exist."""


class KafkaPositionLost(KafkaFailure):
    """The log does not hold the records that were to be read next."""


class KafkaReadFailed(KafkaFailure):
    """Reading failed for a reason that trying again does not cure."""


class KafkaDeliveryFailed(KafkaFailure):
    """Records were not acknowledged; the message has how many and the first reason."""


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

        Raises `KafkaPositionLost` when retention removed what comes next, `KafkaReadFailed` for what trying again does not cure.
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

        Raises `KafkaPositionLost` when the log does not hold such a position.
        """
        wanted = self._position.copy()
        wanted[list(positions)] = list(positions.values())
        lost = self._what_is_lost(wanted)
        if lost:
            raise KafkaPositionLost("; ".join(lost))
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
            return KafkaPositionLost("; ".join(self._what_is_lost(self._position)) or str(error))
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


def client_options(bootstrap_servers: str, properties: Mapping[str, str]) -> dict[str, object]:
    """The options of kafka-python for a broker and for the keys of a Java `client.properties` or of librdkafka.

    `bootstrap_servers` is `host:port[,host:port]` and goes before the key `bootstrap.servers`. What only a consumer or only a producer knows is
    kept apart when the client is made. Passwords show as `***` when the result is printed.

    Raises `KafkaOptionError` for a key that does not exist (with the nearest that does), a value that cannot be read, a key that would break
    exactness, and a login that would not be used.

    >>> client_options("localhost:9092", {"security.protocol": "SASL_SSL", "sasl.mechanism": "PLAIN", "sasl.username": "u",
    ...                                   "sasl.password": "geheim", "linger.ms": "20"})  # doctest: +NORMALIZE_WHITESPACE
    {'bootstrap_servers': ['localhost:9092'], 'security_protocol': 'SASL_SSL', 'sasl_mechanism': 'PLAIN', 'sasl_plain_username': 'u',
     'sasl_plain_password': '***', 'linger_ms': 20}
    >>> client_options("localhost:9092", {"fetch.max.byte": "1000"})
    Traceback (most recent call last):
    connectors.kafka.KafkaOptionError: Kafka option 'fetch.max.byte' does not exist; did you mean 'fetch.max.bytes'?
    """
    rest = dict(properties)
    servers = bootstrap_servers or rest.get("bootstrap.servers") or rest.get("metadata.broker.list") or ""
    rest.pop("bootstrap.servers", None)
    rest.pop("metadata.broker.list", None)
    options: dict[str, object] = {"bootstrap_servers": _server_list(servers)}
    for key, value in rest.items():
        if key in _REFUSED:
            raise KafkaOptionError(f"Kafka option {key!r} cannot be set: {_REFUSED[key]}")
        if key == "sasl.jaas.config":
            options |= _jaas_login(value)
        elif key in _OPTIONS:
            name, read = _OPTIONS[key]
            options[name] = _read_value(key, value, read)
        else:
            near = difflib.get_close_matches(key, [*_OPTIONS, "sasl.jaas.config", "bootstrap.servers"], n=1)
            raise KafkaOptionError(f"Kafka option {key!r} does not exist" + (f"; did you mean {near[0]!r}?" if near else ""))
    _check_login(options)
    return options


def read_properties(path: Path) -> dict[str, str]:
    """The keys and values of a Java properties file (UTF-8); the last of a repeated key counts.

    Raises `KafkaOptionError` when the file cannot be read.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KafkaOptionError(f"cannot read the Kafka options in {path}: {error}") from error
    return parse_properties(text)


def parse_properties(text: str) -> dict[str, str]:
    r"""The keys and values in the text of a Java properties file: `=`, `:` or a blank separates them, `#` and `!` begin a comment.

    >>> parse_properties("# who\nacks = all\nsasl.jaas.config: Plain \\\n   required;\nssl.key.password=a\\=b")
    {'acks': 'all', 'sasl.jaas.config': 'Plain required;', 'ssl.key.password': 'a=b'}
    """
    pairs: dict[str, str] = {}
    for line in _logical_lines(text):
        split = _PROPERTY.match(line)
        assert split is not None, "the pattern matches every line"
        pairs[_unescape(split["key"])] = _unescape(split["value"])
    return pairs


class Secret(str):
    """A string that prints and logs as `***`; its characters are there for those who encode or join it.

    >>> password = Secret("geheim")
    >>> print(password, repr(password), f"{password}", "".join([password]))
    *** '***' *** geheim
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"

    def __str__(self) -> str:
        return "***"

    def __format__(self, form: str) -> str:
        return format("***", form)


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


def _text(value: str) -> object:
    return value


def _secret(value: str) -> object:
    return Secret(value)


def _whole(value: str) -> object:
    if not re.fullmatch(r"\s*-?\d+\s*", value):
        raise ValueError("a whole number")
    return int(value)


def _truth(value: str) -> object:
    if value.strip().lower() not in ("true", "false"):
        raise ValueError("true or false")
    return value.strip().lower() == "true"


def _one_of(*choices: str) -> Callable[[str], object]:
    def read(value: str) -> object:
        chosen = {choice.lower(): choice for choice in choices}.get(value.strip().lower())
        if chosen is None:
            raise ValueError(f"one of {', '.join(choices)}")
        return chosen

    return read


def _mechanism(value: str) -> object:
    if value.strip().upper() == "OAUTHBEARER":
        raise ValueError("another mechanism than OAUTHBEARER, whose tokens need code of their own")
    return _one_of("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "GSSAPI", "AWS_MSK_IAM")(value)


def _compression(value: str) -> object:
    chosen = _one_of("none", "gzip", "snappy", "lz4", "zstd")(value)
    return None if chosen == "none" else chosen


def _acks(value: str) -> object:
    chosen = _one_of("all", "-1", "0", "1")(value)
    return "all" if chosen in ("all", "-1") else int(str(chosen))


def _host_check(value: str) -> object:
    chosen = _one_of("https", "none", "")(value)
    return chosen == "https"


def _pem_file(value: str) -> object:
    try:
        content = Path(value).read_bytes()
    except OSError as error:
        raise ValueError(f"a PEM file that can be read ({error.strerror})") from error
    if b"-----BEGIN" not in content:
        raise ValueError("a PEM file, which a JKS or PKCS12 store is not: keytool -exportcert -rfc or openssl pkcs12 -nodes makes one from it")
    return value


_OPTIONS: dict[str, tuple[str, Callable[[str], object]]] = {
    # both clients
    "client.id": ("client_id", _text),
    "client.dns.lookup": ("client_dns_lookup", _one_of("use_all_dns_ips", "resolve_canonical_bootstrap_servers_only")),
    "connections.max.idle.ms": ("connections_max_idle_ms", _whole),
    "max.in.flight.requests.per.connection": ("max_in_flight_requests_per_connection", _whole),
    "metadata.max.age.ms": ("metadata_max_age_ms", _whole),
    "receive.buffer.bytes": ("receive_buffer_bytes", _whole),
    "reconnect.backoff.ms": ("reconnect_backoff_ms", _whole),
    "reconnect.backoff.max.ms": ("reconnect_backoff_max_ms", _whole),
    "request.timeout.ms": ("request_timeout_ms", _whole),
    "retry.backoff.ms": ("retry_backoff_ms", _whole),
    "send.buffer.bytes": ("send_buffer_bytes", _whole),
    "security.protocol": ("security_protocol", _one_of("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")),
    "sasl.mechanism": ("sasl_mechanism", _mechanism),
    "sasl.mechanisms": ("sasl_mechanism", _mechanism),
    "sasl.username": ("sasl_plain_username", _text),
    "sasl.password": ("sasl_plain_password", _secret),
    "sasl.kerberos.service.name": ("sasl_kerberos_service_name", _text),
    "ssl.ca.location": ("ssl_cafile", _pem_file),
    "ssl.truststore.location": ("ssl_cafile", _pem_file),
    "ssl.truststore.type": ("", _one_of("PEM")),
    "ssl.certificate.location": ("ssl_certfile", _pem_file),
    "ssl.keystore.location": ("ssl_certfile", _pem_file),
    "ssl.keystore.type": ("", _one_of("PEM")),
    "ssl.key.location": ("ssl_keyfile", _pem_file),
    "ssl.key.password": ("ssl_password", _secret),
    "ssl.crl.location": ("ssl_crlfile", _pem_file),
    "ssl.cipher.suites": ("ssl_ciphers", _text),
    "ssl.endpoint.identification.algorithm": ("ssl_check_hostname", _host_check),
    # the consumer
    "client.rack": ("client_rack", _text),
    "group.id": ("group_id", _text),
    "fetch.max.bytes": ("fetch_max_bytes", _whole),
    "fetch.max.wait.ms": ("fetch_max_wait_ms", _whole),
    "fetch.wait.max.ms": ("fetch_max_wait_ms", _whole),
    "fetch.message.max.bytes": ("max_partition_fetch_bytes", _whole),
    "fetch.min.bytes": ("fetch_min_bytes", _whole),
    "max.partition.fetch.bytes": ("max_partition_fetch_bytes", _whole),
    "max.poll.records": ("max_poll_records", _whole),
    # the producer
    "acks": ("acks", _acks),
    "request.required.acks": ("acks", _acks),
    "batch.size": ("batch_size", _whole),
    "compression.codec": ("compression_type", _compression),
    "compression.type": ("compression_type", _compression),
    "delivery.timeout.ms": ("delivery_timeout_ms", _whole),
    "enable.idempotence": ("enable_idempotence", _truth),
    "linger.ms": ("linger_ms", _whole),
    "queue.buffering.max.ms": ("linger_ms", _whole),
    "max.block.ms": ("max_block_ms", _whole),
    "max.request.size": ("max_request_size", _whole),
    "message.max.bytes": ("max_request_size", _whole),
    "message.timeout.ms": ("delivery_timeout_ms", _whole),
    "retries": ("retries", _whole),
}

_NO_GROUP = "all partitions are read by one consumer without group membership; remove the key"
_RAW_BYTES = "records are read and written as raw bytes, since a failure inside a (de)serializer loses its neighbours; remove the key"
_REFUSED: dict[str, str] = {
    "auto.offset.reset": "a new run begins at the beginning and a resumed one at its positions; a jump would lose or repeat records",
    "enable.auto.commit": "the positions in the snapshot count, and committed offsets follow them",
    "auto.commit.interval.ms": "the positions in the snapshot count, and committed offsets follow them",
    "isolation.level": "it is always read_committed, so that no record of an aborted transaction is seen",
    "check.crcs": "checksums are always verified",
    "key.deserializer": _RAW_BYTES,
    "value.deserializer": _RAW_BYTES,
    "key.serializer": _RAW_BYTES,
    "value.serializer": _RAW_BYTES,
    "group.instance.id": _NO_GROUP,
    "heartbeat.interval.ms": _NO_GROUP,
    "max.poll.interval.ms": _NO_GROUP,
    "partition.assignment.strategy": _NO_GROUP,
    "session.timeout.ms": _NO_GROUP,
    "transactional.id": "nothing is written in transactions",
    "buffer.memory": f"what waits for its acknowledgement is bounded at {IN_FLIGHT_BYTES >> 20} MiB",
    "enable.ssl.certificate.verification": "certificates are always verified; ssl.ca.location names the authority of a self-signed one",
    "ssl.keystore.password": "a PEM key takes ssl.key.password",
    "ssl.truststore.password": "a PEM file of certificates has no password",
    "sasl.client.callback.handler.class": "it names a Java class",
    "sasl.login.callback.handler.class": "it names a Java class",
}

_PROPERTY = re.compile(r"(?P<key>(?:[^\\=:\s]|\\.)*)\s*[=:]?\s*(?P<value>.*)", re.DOTALL)
_ESCAPED = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_CONTROL = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}
_JAAS_OPTION = re.compile(r"""(\w+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|'([^']*)'|([^\s;"']+))""")


def _read_value(key: str, value: str, read: Callable[[str], object]) -> object:
    try:
        return read(value)
    except ValueError as error:
        shown = "***" if read is _secret else repr(value)
        raise KafkaOptionError(f"Kafka option {key!r} must be {error}, got {shown}") from error


def _server_list(servers: str) -> list[str]:
    listed = [server.strip() for server in servers.split(",") if server.strip()]
    for server in listed:
        if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:/@\[\]]+):\d{1,5}", server):
            raise KafkaOptionError(f"a bootstrap server must be host:port, such as localhost:9092, got {server!r}")
    if not listed:
        raise KafkaOptionError("no bootstrap server is given: host:port, such as localhost:9092")
    return listed


def _jaas_login(value: str) -> dict[str, object]:
    found = {name: re.sub(r"\\(.)", r"\1", double) or single or bare for name, double, single, bare in _JAAS_OPTION.findall(value)}
    if "username" not in found or "password" not in found:
        raise KafkaOptionError('Kafka option \'sasl.jaas.config\' must hold username="..." and password="..." (the value is not shown)')
    return {"sasl_plain_username": found["username"], "sasl_plain_password": Secret(found["password"])}


def _check_login(options: dict[str, object]) -> None:
    options.pop("", None)
    protocol = str(options.get("security_protocol", "PLAINTEXT"))
    mechanism = options.get("sasl_mechanism")
    login = sorted(name for name in options if name.startswith("sasl_"))
    if login and not protocol.startswith("SASL_"):
        raise KafkaOptionError(f"a login is given, but 'security.protocol' is {protocol}: set it to SASL_SSL (or SASL_PLAINTEXT)")
    if protocol.startswith("SASL_") and mechanism is None:
        raise KafkaOptionError(f"'security.protocol' is {protocol}, so 'sasl.mechanism' is needed: PLAIN, SCRAM-SHA-256, SCRAM-SHA-512 ...")
    if str(mechanism).startswith(("PLAIN", "SCRAM")) and not {"sasl_plain_username", "sasl_plain_password"} <= options.keys():
        raise KafkaOptionError(f"'sasl.mechanism' is {mechanism}, so 'sasl.username' and 'sasl.password' (or 'sasl.jaas.config') are needed")
    if any(name.startswith("ssl_") for name in options) and not protocol.endswith("SSL"):
        raise KafkaOptionError(f"TLS options are given, but 'security.protocol' is {protocol}: set it to SSL or SASL_SSL")


def _logical_lines(text: str) -> Iterator[str]:
    begun = ""
    for line in text.split("\n"):
        line = line.removesuffix("\r").lstrip(" \t\f")
        if not begun and (not line or line[0] in "#!"):
            continue
        trailing = len(line) - len(line.rstrip("\\"))
        if trailing % 2:
            begun += line[:-1]
            continue
        yield begun + line
        begun = ""
    if begun:
        yield begun


def _unescape(text: str) -> str:
    return _ESCAPED.sub(lambda found: chr(int(found[1][1:], 16)) if len(found[1]) == 5 else _CONTROL.get(found[1], found[1]), text)


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
