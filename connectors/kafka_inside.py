"""What kafka-python knows and does not tell: its private members, all in one place, to be read again when its pin moves (3.0.12).

Nothing here imports it; a consumer, and partitions that are (topic, partition), are handed in.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_ctr.connectors.record_batches import (
    FORMAT,
    Codecs,
    Columns,
    StoredBatches,
    after_batch,
    format_of,
)

Partition = Any  # kafka.TopicPartition


class Unanswered:
    """Since when each partition of a consumer has been asked for without an answer.

    An answer without records is one. A partition that is paused, or of which there are records in hand, is not asked for.
    """

    def __init__(self, consumer: Any, index: Mapping[Partition, int]) -> None:
        self._index = index
        self._since = np.full(len(index), np.nan)
        self._fetcher = consumer._fetcher
        self._create, self._handle = (
            self._fetcher._create_fetch_requests,
            self._fetcher._handle_fetch_response,
        )
        # The consumer's thread calls these, by name each time.
        self._fetcher._create_fetch_requests, self._fetcher._handle_fetch_response = (
            self._asking,
            self._answered,
        )

    def seconds(self, wanted: npt.NDArray[np.bool_]) -> float:
        """The longest of the wanted partitions [P]; 0 when all have been answered."""
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
        told = [
            (topic.topic, partition)
            for topic in response.responses
            for partition in topic.partitions
        ]
        failed = {
            (topic, partition.partition_index) for topic, partition in told if partition.error_code
        }
        for partition in offsets:
            if tuple(partition) not in failed:
                self._since[self._index[partition]] = np.nan
        self._handle(node, offsets, sent, response)


def read_into(
    columns: Columns, consumer: Any, index: Mapping[Partition, int], codecs: Codecs
) -> None:
    """Have `consumer.poll` put what it reads into the columns, each partition under its index, and return only that there is something.

    All else the client does as ever. Batches of formats that the columns' reader does not know, the client parses by itself.
    """
    fetcher = consumer._fetcher
    parse = fetcher.PartitionRecords

    def open_fetched(offset: int, partition: Partition, records: Any, **options: Any) -> Any:
        stored = records._buffer
        if (found := format_of(stored)) is not None and found < FORMAT:
            return _parsed_into(
                columns, index[partition], parse(offset, partition, records, **options)
            )
        aborted = [
            (one.first_offset, one.producer_id) for one in options["aborted_transactions"] or ()
        ]
        batches = StoredBatches(stored, offset, aborted=aborted, codecs=codecs)
        return _Fetched(columns, index[partition], partition, batches, options["on_drain"])

    _drop_in_hand(fetcher)
    fetcher.PartitionRecords = open_fetched  # the fetcher asks for it by name each time


class _Fetched:
    """What was fetched of a partition, with the interface of the client's own parser."""

    def __init__(
        self,
        columns: Columns,
        index: int,
        partition: Partition,
        batches: StoredBatches,
        on_drain: Callable[[_Fetched], object],
    ) -> None:
        self.topic_partition = partition
        self.next_fetch_offset = batches.position
        self.leader_epoch = -1
        self.bytes_read = 0  # any at all: then other partitions are fetched first
        self._columns, self._index = columns, index
        self._batches: StoredBatches | None = batches
        self._on_drain = on_drain

    def __bool__(self) -> bool:
        return self._batches is not None

    def take(self, most: int) -> _Taken:
        assert self._batches is not None
        try:
            taken = self._batches.take(self._columns, self._index, most)
        finally:
            self.next_fetch_offset, self.leader_epoch = (
                self._batches.position,
                self._batches.leader_epoch,
            )
        self.bytes_read += taken
        if self._batches.exhausted:
            self.drain()
        return _Taken(most if self._columns.full else taken)

    def fold(self) -> None:
        if self._batches:
            self._batches.fold()

    def drain(self) -> None:
        if self:
            self._batches = None
            self._on_drain(self)


def _parsed_into(columns: Columns, index: int, parsed: Any) -> Any:
    take = parsed.take

    def take_into(most: int) -> _Taken:
        records = take(min(most, columns.most_records - columns.count))
        for record in records:
            columns.append(
                index,
                record.offset,
                -1 if record.timestamp is None else record.timestamp,
                record.value,
            )
        return _Taken(most if columns.full else len(records))

    parsed.take = take_into
    parsed.fold = parsed.drain  # fetched again
    return parsed


class _Taken:
    """So many records as far as the client's count for a poll goes, all that it asked for once the columns are full; none to look at."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[object]:
        return iter(())


@dataclass(frozen=True, slots=True)
class Failure:
    """An error of reading: of which partition and at which offset, where the client knows it."""

    error: Exception
    partition: Partition | None = None
    offset: int = -1


def take_kept_failure(consumer: Any) -> Failure | None:
    """The error that the client keeps for its next poll, if any, out of its hands.

    When its partition is paused before that poll, the client forgets the error; what is left of the fetch then keeps a poll busy for good.
    """
    fetcher = consumer._fetcher
    kept, fetcher._next_in_line_exception_metadata = fetcher._next_in_line_exception_metadata, None
    if kept is None:
        return None
    _drop_in_hand(fetcher)
    return Failure(kept.exception, kept.partition, kept.fetched_offset)


def failure_at(consumer: Any, error: Exception) -> Failure:
    """Where an error that `poll` raised has happened. What could not be read is dropped: the next poll would be busy with it for good."""
    records = consumer._fetcher._next_partition_records
    if not records:
        return Failure(error)
    where = Failure(error, records.topic_partition, records.next_fetch_offset)
    _drop_in_hand(consumer._fetcher)
    return where


def _drop_in_hand(fetcher: Any) -> None:
    if fetcher._next_partition_records:
        fetcher._next_partition_records.drain()
    fetcher._next_partition_records = None


def hand_out_what_was_set_aside(consumer: Any) -> None:
    # What the client had fetched of a partition when it was paused, it gives back after the partition is resumed only when it holds no
    # other fetch. One that is used up counts as held: with all other partitions paused, the resumed one would stay silent for good.
    fetcher = consumer._fetcher
    if not fetcher._next_partition_records:
        fetcher._next_partition_records = None
    # What waits on is kept as it is stored: many partitions may wait, and each would keep a batch of up to half a gigabyte.
    for partition, waiting in fetcher._paused_partition_records.items():
        if fetcher._subscriptions.is_paused(partition):
            waiting.fold()


def next_offset(consumer: Any, partition: Partition) -> int:
    # It moves past control and aborted records too. The client's position() would do, but walks over all partitions for each: 25 ms
    # a poll with 128 of them.
    return int(consumer._subscription.assignment[partition].position.offset)


def offset_after_batch(
    consumer: Any, partition: Partition, offset: int, seconds: float
) -> int | None:
    """The first offset after the stored batch that holds this one; None when it is not found out in time.

    Fetches it again and reads no more than the headers of batches, which the checksum of a damaged batch does not vouch for.
    """
    fetcher = consumer._fetcher
    consumer.seek(partition, offset)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for fetch in list(fetcher._completed_fetches):
            if (
                fetch.topic_partition == partition
                and fetch.fetched_offset == offset
                and fetch.partition_data.records
            ):
                return after_batch(fetch.partition_data.records, offset)
        fetcher.send_fetches()
        time.sleep(0.05)
    return None


def never_create_topics(consumer: Any) -> None:
    # Asking for a topic by name creates it where the broker creates topics by itself, and the client's own option does not reach this.
    consumer._cluster.config["allow_auto_create_topics"] = False


def ask_for_topics(consumer: Any) -> None:
    """Have the client look at the topics again, some time soon; waits for nothing."""
    consumer._cluster.request_update()


def topics_asked_at(consumer: Any) -> float:
    """When the brokers last told about topics, on a clock of the client's own."""
    return float(consumer._cluster._last_successful_refresh_ms)


def topics(consumer: Any, names: Sequence[str]) -> dict[str, tuple[str | None, frozenset[int]]]:
    """(id, partitions) of those of the topics that exist, as the brokers last told; no id from brokers that give none."""
    cluster = consumer._cluster
    return {
        name: (
            str(id_) if (id_ := cluster.topic_id(name)) and id_.int else None,
            frozenset(partitions),
        )
        for name in names
        if (partitions := cluster.partitions_for_topic(name))
    }


def advertised(consumer: Any) -> str:
    """What the brokers say where they are."""
    return ", ".join(f"{broker.host}:{broker.port}" for broker in consumer._cluster.brokers())


def force_close(producer: Any) -> None:
    """Close a producer without waiting for what is on its way."""
    # Closing flushes, fails at what cannot be delivered and leaves its thread behind. There is no public way to drop it.
    producer._sender.force_close()
    producer.close(timeout=1.0)


def silence_secrets() -> None:
    # At DEBUG these write out the options of a client and the bytes of a login. They lose that level; all others keep it.
    for name in ("kafka.admin.client", "kafka.net.connection", "kafka.protocol.parser"):
        logging.getLogger(name).addFilter(_no_debug)


def _no_debug(record: logging.LogRecord) -> bool:
    return record.levelno > logging.DEBUG
