"""The private members of kafka-python that this package uses, all in one place, and their check.

The client has no public way to read fetched bytes, to bound what they expand to, or to tell when a
broker last answered. Every release may change its private members, so nothing here relies on a
version: `why_not_columns` and `why_not_bounded` look at the members and try them on a few batches
made by hand. If a check fails, sources read through the public interface (`public_reader`).

Nothing here imports kafka-python. Consumers are handed in; a partition is a (topic, partition).
"""

from __future__ import annotations

import inspect
import logging
import operator
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stream_ctr.connectors.kafka.codecs import CODECS
from stream_ctr.connectors.kafka.record_batches import (
    FORMAT,
    GZIP,
    LZ4,
    Codecs,
    Columns,
    DamagedBatch,
    StoredBatches,
    after_batch,
    format_of,
)
from stream_ctr.connectors.kafka.topics import Topics

Partition = Any  # kafka.TopicPartition

_BETWEEN_LOOKS_SECONDS = 0.05


# -- reading into columns ------------------------------------------------------------------------


def read_into(
    columns: Columns, consumer: Any, index: Mapping[Partition, int], codecs: Codecs
) -> None:
    """Make `consumer.poll` put what it reads into the columns, each partition under its index.

    The poll then returns a dictionary that is true if anything was read and holds no records. The
    client does everything else as before. It parses by itself the batches of formats that the
    columns' reader does not know.
    """
    fetcher = consumer._fetcher
    parse = fetcher.PartitionRecords

    def open_fetched(offset: int, partition: Partition, records: Any, **options: Any) -> Any:
        stored = records._buffer
        if (found := format_of(stored)) is not None and found < FORMAT:
            parsed = parse(offset, partition, records, **options)
            return _parsed_into(columns, index[partition], parsed)
        aborted = [
            (transaction.first_offset, transaction.producer_id)
            for transaction in options["aborted_transactions"] or ()
        ]
        batches = StoredBatches(stored, offset, aborted=aborted, codecs=codecs)
        _, epoch = position(consumer, partition)
        return _Fetched(columns, index[partition], partition, epoch, batches, options["on_drain"])

    _drop_in_hand(fetcher)
    fetcher.PartitionRecords = open_fetched  # the fetcher looks it up by name each time


class _Fetched:
    """The fetched batches of a partition, with the interface of the client's own parser."""

    def __init__(
        self,
        columns: Columns,
        index: int,
        partition: Partition,
        leader_epoch: int,
        batches: StoredBatches,
        on_drain: Callable[[_Fetched], object],
    ) -> None:
        self.topic_partition = partition
        self.next_fetch_offset = batches.position
        self.leader_epoch = leader_epoch  # of what was read last
        self.bytes_read = 0  # more than 0 makes the client fetch other partitions first
        self._columns = columns
        self._index = index
        self._batches: StoredBatches | None = batches
        self._on_drain = on_drain

    def __bool__(self) -> bool:
        return self._batches is not None

    def take(self, most: int) -> _Taken:
        assert self._batches is not None
        try:
            taken = self._batches.take(self._columns, self._index, most)
        finally:
            self.next_fetch_offset = self._batches.position
            self.leader_epoch = max(self.leader_epoch, self._batches.leader_epoch)
        self.bytes_read += taken
        if self._batches.exhausted:
            self.drain()
        return _Taken(most if self._columns.full else taken)

    def fold(self) -> None:
        """Release the batch that is being read; it is expanded again when reading goes on."""
        if self._batches:
            self._batches.fold()

    def drain(self) -> None:
        if self:
            self._batches = None
            self._on_drain(self)


def _parsed_into(columns: Columns, index: int, parsed: Any) -> Any:
    """Return the client's own parser, made to put its records into the columns."""
    take = parsed.take

    def take_into(most: int) -> _Taken:
        records = take(min(most, columns.most_records - columns.count))
        for record in records:
            time_ = -1 if record.timestamp is None else record.timestamp
            columns.append(index, record.offset, time_, record.value)
        return _Taken(most if columns.full else len(records))

    parsed.take = take_into
    parsed.fold = parsed.drain  # fetched again
    return parsed


class _Taken:
    """A count of records that the client adds up for a poll; iterating it yields none.

    Once the columns are full it is the count that the client asked for, which ends the poll.
    """

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[object]:
        return iter(())


def restore_set_aside(consumer: Any) -> None:
    """Make the client return what it had set aside for partitions that are no longer paused.

    The client sets aside what it has fetched of a partition that is paused. It returns that only
    when it holds no other fetch, and counts a fetch that is used up as held: with all other
    partitions paused, a resumed one would stay silent forever.
    """
    fetcher = consumer._fetcher
    if not fetcher._next_partition_records:
        fetcher._next_partition_records = None
    # The batches of paused partitions are folded: many may wait, each with up to half a gigabyte.
    for partition, waiting in fetcher._paused_partition_records.items():
        if fetcher._subscriptions.is_paused(partition):
            waiting.fold()


def seek(consumer: Any, partition: Partition, offset: int, leader_epoch: int) -> None:
    """Read a partition on at this offset, after a record of this leader epoch; -1: unknown.

    The client's own `seek` takes no epoch, by which brokers tell that they lost that record.
    """
    consumer._subscription.seek(partition, offset)
    state = consumer._subscription.assignment[partition]
    state.seek(state.position._replace(leader_epoch=leader_epoch))


def position(consumer: Any, partition: Partition) -> tuple[int, int]:
    """Return the position of a partition, past control and aborted records, and the leader epoch
    before it, or -1.

    The client's `position()` walks over all partitions for each: 25 ms a poll with 128 of them.
    """
    reached = consumer._subscription.assignment[partition].position
    return int(reached.offset), int(reached.leader_epoch)


# -- failures ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Located:
    """An error of reading, with its partition and offset where the client knows them."""

    error: Exception
    partition: Partition | None = None
    offset: int = -1


def take_kept_failure(consumer: Any) -> Located | None:
    """Take the error that the client keeps for its next poll; None when it keeps none.

    The client forgets the error when its partition is paused before that poll, and the rest of the
    fetch then keeps a poll busy forever.
    """
    fetcher = consumer._fetcher
    kept = fetcher._next_in_line_exception_metadata
    fetcher._next_in_line_exception_metadata = None
    if kept is None:
        return None
    _drop_in_hand(fetcher)
    return Located(kept.exception, kept.partition, kept.fetched_offset)


def locate_failure(consumer: Any, error: Exception) -> Located:
    """Return where an error of `poll` happened, and drop the fetch that could not be read.

    The next poll would be busy with that fetch forever.
    """
    records = consumer._fetcher._next_partition_records
    if not records:
        return Located(error)
    located = Located(error, records.topic_partition, records.next_fetch_offset)
    _drop_in_hand(consumer._fetcher)
    return located


def _drop_in_hand(fetcher: Any) -> None:
    if fetcher._next_partition_records:
        fetcher._next_partition_records.drain()
    fetcher._next_partition_records = None


def offset_after_batch(
    consumer: Any, partition: Partition, offset: int, seconds: float
) -> int | None:
    """Return the first offset after the stored batch that holds this one.

    Fetches the batch again and reads only headers, which the checksum of a damaged batch does not
    vouch for. None when no answer comes in time.
    """
    fetcher = consumer._fetcher
    consumer.seek(partition, offset)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for fetch in list(fetcher._completed_fetches):
            asked = fetch.topic_partition == partition and fetch.fetched_offset == offset
            if asked and fetch.partition_data.records:
                return after_batch(fetch.partition_data.records, offset)
        fetcher.send_fetches()
        time.sleep(_BETWEEN_LOOKS_SECONDS)
    return None


# -- brokers that do not answer -------------------------------------------------------------------


class Unanswered:
    """The time since which each partition of a consumer has been asked for without an answer.

    An answer without records is one. A partition that is paused, or that has fetched records left,
    is not asked for.
    """

    def __init__(self, consumer: Any, index: Mapping[Partition, int]) -> None:
        self._index = index
        self._since = np.full(len(index), np.nan)
        self._fetcher = consumer._fetcher
        self._create = self._fetcher._create_fetch_requests
        self._handle = self._fetcher._handle_fetch_response
        # The consumer's thread calls these, by name each time.
        self._fetcher._create_fetch_requests = self._asking
        self._fetcher._handle_fetch_response = self._answered

    def seconds(self, wanted: npt.NDArray[np.bool_]) -> float:
        """Return the longest time among the wanted partitions [P]; 0 when all were answered."""
        waiting = self._since[wanted & ~np.isnan(self._since)]
        return time.monotonic() - float(waiting.min()) if len(waiting) else 0.0

    def _asking(self) -> Any:
        requests = self._create()
        now = time.monotonic()
        for _, offsets in requests.values():
            for partition in offsets:
                if np.isnan(self._since[self._index[partition]]):
                    self._since[self._index[partition]] = now
        return requests

    def _answered(
        self, node: Any, offsets: Mapping[Partition, int], sent: float, response: Any
    ) -> None:
        failed = {
            (topic.topic, partition.partition_index)
            for topic in response.responses
            for partition in topic.partitions
            if partition.error_code
        }
        for partition in offsets:
            if tuple(partition) not in failed:
                self._since[self._index[partition]] = np.nan
        self._handle(node, offsets, sent, response)


# -- topics --------------------------------------------------------------------------------------


class HeardNews:
    """`TopicNews` from what a consumer hears about topics while it reads."""

    def __init__(self, consumer: Any, names: Sequence[str]) -> None:
        self._cluster = consumer._cluster
        self._names = tuple(dict.fromkeys(names))
        self._seen = self._heard_at()
        self._asked = False

    def first(self) -> Topics:
        return self._heard()

    def ask(self) -> None:
        self._asked = True
        self._cluster.request_update()

    def forget(self) -> None:
        self._seen = self._heard_at()

    def answer(self) -> Topics | None:
        heard_at = self._heard_at()
        if heard_at == self._seen:
            return None
        self._seen = heard_at
        self._asked = False
        return self._heard()

    @property
    def pending(self) -> bool:
        return self._asked

    def _heard_at(self) -> float:
        """Return when brokers last described topics, on a clock of the client's own."""
        return float(self._cluster._last_successful_refresh_ms)

    def _heard(self) -> Topics:
        return {
            name: (topic_id(self._cluster.topic_id(name)), frozenset(partitions))
            for name in self._names
            if (partitions := self._cluster.partitions_for_topic(name))
        }


def topic_id(id_: Any) -> str | None:
    """Return the id of a topic as text; None for brokers that have no ids.

    >>> import uuid
    >>> topic_id(uuid.UUID(int=0)), topic_id(uuid.UUID(int=10))
    (None, '00000000-0000-0000-0000-00000000000a')
    """
    return str(id_) if id_ and id_.int else None


def never_create_topics(consumer: Any) -> None:
    """Stop a consumer from creating the topics that it asks for by name.

    A broker that creates topics by itself would do so, and the client's own option does not reach
    this setting in release 3.0.12. Releases without the setting are left to that option.
    """
    with suppress(AttributeError, TypeError):
        consumer._cluster.config["allow_auto_create_topics"] = False


def advertised(consumer: Any) -> str:
    """Return the addresses that the brokers advertise."""
    try:
        return ", ".join(f"{broker.host}:{broker.port}" for broker in consumer._cluster.brokers())
    except AttributeError:
        return "advertised addresses unknown"


# -- bounded decompression -----------------------------------------------------------------------


def bound_batches(consumer: Any, codecs: Codecs) -> None:
    """Make a consumer expand compressed batches with these codecs, and no other consumer."""
    fetcher = consumer._fetcher
    parse = fetcher.PartitionRecords
    classes = _BoundedClasses(codecs)

    def parse_bounded(offset: int, partition: Partition, records: Any, **options: Any) -> Any:
        return parse(offset, partition, _BoundedRecords(records, classes), **options)

    fetcher.PartitionRecords = parse_bounded  # the fetcher looks it up by name each time


def note_codecs(consumer: Any) -> set[int]:
    """Make a consumer note the codec of each batch that it reads, in the set that is returned."""
    fetcher = consumer._fetcher
    parse = fetcher.PartitionRecords
    noted: set[int] = set()

    def parse_noting(offset: int, partition: Partition, records: Any, **options: Any) -> Any:
        return parse(offset, partition, _NotingRecords(records, noted), **options)

    fetcher.PartitionRecords = parse_noting
    return noted


class _NotingRecords:
    """The fetched batches of a partition, whose codecs are noted as the parser takes them."""

    def __init__(self, records: Any, noted: set[int]) -> None:
        self._records = records
        self._noted = noted

    def next_batch(self) -> Any:
        batch = self._records.next_batch()
        if batch is not None:
            self._noted.add(batch.compression_type)
        return batch


class _BoundedRecords:
    """The fetched batches of a partition, as the client's parser takes them one by one."""

    def __init__(self, records: Any, classes: _BoundedClasses) -> None:
        self._records = records
        self._classes = classes

    def next_batch(self) -> Any:
        batch = self._records.next_batch()
        if batch is not None and batch.compression_type:
            batch.__class__ = self._classes.of(type(batch))
        return batch


class _BoundedClasses:
    """The client's classes of batches with their decompression replaced."""

    def __init__(self, codecs: Codecs) -> None:
        self._codecs = codecs
        self._bounded: dict[type, type] = {}

    def of(self, batch_class: type) -> type:
        """Return the bounded subclass of a class of batches."""
        if batch_class not in self._bounded:
            self._bounded[batch_class] = self._subclass(batch_class)
        return self._bounded[batch_class]

    def _subclass(self, batch_class: Any) -> type:
        def maybe_uncompress(batch: Any) -> None:
            """Expand a batch of format 2 in place."""
            if not batch._decompressed:
                payload = memoryview(batch._buffer)[batch._pos :]
                batch._buffer = bytearray(self._expand(batch, payload))
                batch._pos = 0
                batch._decompressed = True

        def decompress(batch: Any, key_offset: int) -> Any:
            """Return the expanded value of a message of format 0 or 1."""
            if batch.magic == 0 and batch.compression_type == LZ4:
                # Kafka 0.8 wrote a wrong checksum, which the client mends.
                return batch_class._decompress(batch, key_offset)
            _, value = batch._read_key_value(key_offset)
            return self._expand(batch, memoryview(value or b""))

        replaced = {"_maybe_uncompress": maybe_uncompress, "_decompress": decompress}
        methods = {name: method for name, method in replaced.items() if hasattr(batch_class, name)}
        return type(f"Bounded{batch_class.__name__}", (batch_class,), {"__slots__": (), **methods})

    def _expand(self, batch: Any, payload: memoryview) -> bytes:
        name = f"the batch at offset {batch.base_offset}"
        expand = self._codecs.expand.get(batch.compression_type)
        if expand is None:
            raise DamagedBatch(f"{name} is compressed in an unknown way: {batch.compression_type}")
        try:
            return expand(payload)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - the libraries of codecs have their own errors
            raise DamagedBatch(f"{name} cannot be decompressed: {error!r}") from error


# -- whether the members are what this file takes them for ----------------------------------------


def why_not_columns(consumer: Any) -> str:
    """Return why this release cannot read into columns; empty when it can."""
    return _first_missing(consumer) or _why_failed(_try_columns, consumer)


def why_not_bounded(consumer: Any) -> str:
    """Return why this release cannot bound what batches expand to; empty when it can."""
    return _why_failed(_try_bounds, consumer)


# Members that no trial below uses, because they need a broker. A number: a method that takes as
# many arguments; None: anything.
_MEMBERS = {
    "_fetcher._create_fetch_requests": 0,
    "_fetcher._handle_fetch_response": 4,
    "_fetcher.send_fetches": 0,
    "_cluster.request_update": 0,
    "_cluster.topic_id": 1,
    "_cluster.partitions_for_topic": 1,
    "_cluster._last_successful_refresh_ms": None,
}


def _first_missing(consumer: Any) -> str:
    for path, arguments in _MEMBERS.items():
        try:
            member = operator.attrgetter(path)(consumer)
            if arguments is not None:
                inspect.signature(member).bind(*[None] * arguments)
        except (AttributeError, TypeError, ValueError) as error:
            return f"{path}: {error}"
    return ""


def _why_failed(attempt: Callable[[Any], None], consumer: Any) -> str:
    try:
        attempt(consumer)
    except Exception as error:  # noqa: BLE001 - other insides fail in any way
        return f"{type(error).__name__}: {error}"
    return ""


class _TrialPartition(NamedTuple):
    topic: str
    partition: int


class _Trial:
    """Two partitions and a fetcher of the consumer's class that is connected to nothing."""

    def __init__(self, consumer: Any) -> None:
        self.partitions = [_TrialPartition("trial", partition) for partition in range(2)]
        self.index = {partition: index for index, partition in enumerate(self.partitions)}
        self._subscription = type(consumer._subscription)()
        self._subscription.assign_from_user(self.partitions)
        for partition in self.partitions:
            self._subscription.seek(partition, 0)
        client = SimpleNamespace(_manager=SimpleNamespace(_net=None))
        self._fetcher = type(consumer._fetcher)(
            client, self._subscription, isolation_level="read_committed"
        )

    def answer(self, index: int, stored: bytes) -> None:
        """Let a broker have answered a fetch from offset 0."""
        data = SimpleNamespace(
            error_code=0,
            high_watermark=99,
            records=stored,
            diverging_epoch=None,
            preferred_read_replica=-1,
            aborted_transactions=None,
        )
        self._fetcher._completed_fetches.append(
            SimpleNamespace(
                topic_partition=self.partitions[index],
                fetched_offset=0,
                response_version=12,
                partition_data=data,
                metric_aggregator=None,
            )
        )

    def poll(self) -> Any:
        polled, _ = self._fetcher.fetched_records(100)
        return polled


def _try_columns(consumer: Any) -> None:
    """Read good and damaged batches, with a pause between. Raises when anything is unexpected."""
    trial = _Trial(consumer)
    columns = Columns(1, full_bytes=1 << 10, most_value_bytes=1 << 10)
    read_into(columns, trial, trial.index, CODECS)
    first, second = trial.partitions
    damaged = bytearray(_batch(b"a", b"b"))
    damaged[-1] ^= 0xFF

    trial.answer(0, _batch(b"a", b"b"))
    _expect(bool(trial.poll()) and columns.hand_out().value.to_pylist() == [b"a"], "first record")
    _expect(position(trial, first) == (1, 0), "position after the first record")
    trial._subscription.pause(first)
    _expect(not trial.poll(), "no record while paused")
    trial._subscription.resume(first)
    restore_set_aside(trial)
    _expect(bool(trial.poll()) and columns.hand_out().offset.tolist() == [1], "second record")
    _expect(position(trial, first) == (2, 0), "position after the second record")

    trial.answer(1, bytes(damaged))
    located = Located(ValueError("no error"))
    try:
        trial.poll()
    except DamagedBatch as error:
        located = locate_failure(trial, error)
    _expect((located.partition, located.offset) == (second, 0), "place of a failure")
    _expect(take_kept_failure(trial) is None and not trial.poll(), "end of a failure")

    seek(trial, first, 0, 7)
    _expect(position(trial, first) == (0, 7), "a position that was set")
    columns = Columns(9, full_bytes=1 << 10, most_value_bytes=1 << 10)
    read_into(columns, trial, trial.index, CODECS)
    trial.answer(0, _batch(b"a", b"b"))
    trial.answer(1, bytes(damaged))
    _expect(bool(trial.poll()) and columns.hand_out().offset.tolist() == [0, 1], "both records")
    kept = take_kept_failure(trial)
    _expect(kept is not None and (kept.partition, kept.offset) == (second, 0), "a kept failure")


def _try_bounds(consumer: Any) -> None:
    """Read compressed batches through a codec that refuses. Raises when anything is unexpected."""
    refused: list[bytes] = []

    def refuse(payload: memoryview) -> bytes:
        refused.append(bytes(payload))
        raise DamagedBatch("refused")

    def read(stored: bytes) -> list[Any]:
        trial = _Trial(consumer)
        bound_batches(trial, Codecs(CODECS.crc32c, {GZIP: refuse}))
        trial.answer(0, stored)
        (records,) = trial.poll().values()
        return [record.value for record in records]

    _expect(read(_batch(b"a", b"b")) == [b"a", b"b"], "records without compression")
    with suppress(Exception):  # the client's own codec may fail too
        read(_batch(b"new", codec=GZIP))
    _expect(len(refused) == 1, "the bounded codec for batches")
    with suppress(Exception):
        read(_message(b"old", codec=GZIP))
    _expect(len(refused) == 2, "the bounded codec for messages")


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"unexpected: {what}")


def _batch(*values: bytes, codec: int = 0) -> bytes:
    """Return a batch of format 2 with these short values from offset 0 on.

    The payload is not compressed, whichever codec the batch names.
    """
    body = b""
    for delta, value in enumerate(values):
        # attributes, differences in time and offset, no key, the value, no headers
        record = bytes([0, 0, 2 * delta, 1, 2 * len(value)]) + value + b"\0"
        body += bytes([2 * len(record)]) + record
    last = len(values) - 1
    checked = struct.pack(">hiqqqhii", codec, last, 0, 0, -1, -1, -1, len(values)) + body
    checksum = CODECS.crc32c(memoryview(checked))
    length = struct.calcsize(">ibI") + len(checked)
    return struct.pack(">qiibI", 0, length, 0, FORMAT, checksum) + checked


def _message(value: bytes, *, codec: int) -> bytes:
    """Return a message of format 1 at offset 0 with this value and no key."""
    checked = struct.pack(">bbqii", 1, codec, 0, -1, len(value)) + value
    length = struct.calcsize(">I") + len(checked)
    return struct.pack(">qiI", 0, length, zlib.crc32(checked)) + checked


# -- closing and logging --------------------------------------------------------------------------


def force_close(producer: Any) -> None:
    """Close a producer without waiting for the records on their way.

    The client's `close` flushes, fails for records that cannot be delivered and leaves its thread
    behind; it has no public way to drop them. A release without the private one takes that way.
    """
    with suppress(AttributeError):
        producer._sender.force_close()
    producer.close(timeout=1.0)


def silence_secrets() -> None:
    """Drop the DEBUG level of the loggers that would write options or the bytes of a login.

    They are named as in release 3.0.12; all other loggers keep that level.
    """
    for name in ("kafka.admin.client", "kafka.net.connection", "kafka.protocol.parser"):
        logging.getLogger(name).addFilter(_no_debug)


def _no_debug(record: logging.LogRecord) -> bool:
    return record.levelno > logging.DEBUG
