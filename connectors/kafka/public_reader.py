"""The slow reader: kafka-python through its public interface alone.

It serves releases whose private members differ from those that `inside` knows. Records, positions,
lost offsets and errors are those of `columns_reader`. There are these differences:

- each record is a Python object of the client's, which takes several times as long;
- a compressed batch may expand without a bound (`client.open_consumer` warns of that);
- silence is noticed by a question a second while no records come, and for all leaders together;
- topics are described through an admin client, which takes a connection of its own;
- a partition that is paused is unassigned, and what was fetched of it is fetched again later: the
  client's own pause can lose an error, or keep a resumed partition silent, and only private
  members cure that;
- a position has no leader epoch when reading begins there, so a log that lost records before it
  is noticed only if it happens while it is read;
- after an error the consumer is replaced, because it may not go on after what it cannot read; and
  the partition that failed is found by reading each of them alone.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pyarrow as pa
from kafka.errors import (
    KafkaError,
    LogTruncationError,
    OffsetOutOfRangeError,
    RetriableError,
    TopicAuthorizationFailedError,
)

from stream_ctr.connectors.errors import KafkaFailure, KafkaUnreachable
from stream_ctr.connectors.kafka import inside, timeouts
from stream_ctr.connectors.kafka.client import connect_admin, in_background, open_consumer
from stream_ctr.connectors.kafka.consumer_reader import (
    ConsumerReader,
    failure_of,
    highwater,
    leaders_silent,
)
from stream_ctr.connectors.kafka.positions import UNKNOWN, Mask, Offsets, end_of_run
from stream_ctr.connectors.kafka.reader import ANSWER_DELAY_SECONDS, Failure, Polled
from stream_ctr.connectors.kafka.topics import FutureNews, Topics
from stream_ctr.connectors.records import POLL_BYTES, Records

_PIECE_RECORDS = 500  # of one poll of the client; POLL_BYTES is looked at after each
_PROBE_MS = 100
_QUESTION_SECONDS = 1.0  # between two questions that find out whether leaders answer
_QUESTION_TIMEOUT_SECONDS = 0.5


class PublicReader(ConsumerReader):
    """A `Reader` that uses no private member of kafka-python.

    The consumer that is handed in only answers questions; records come through a second one. Values
    of more than `max_record_bytes` are cut to one byte more than that. Raises `KafkaUnreachable`
    and `KafkaTopicMissing`.
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
        super().__init__(
            consumer, topics, client=client, group=group, max_record_bytes=max_record_bytes
        )
        self._poller: Any = None  # opened by the next poll
        self._reading: frozenset[int] = frozenset()  # the partitions that it is assigned
        self._wanted: frozenset[int] = frozenset()
        self._again: frozenset[int] = frozenset()
        self._ends = self.end.copy()
        self._asked_at = time.monotonic()
        self._unanswered_since: float | None = None
        self._descriptions = _Descriptions(client, topics)
        self.news = FutureNews(self._descriptions.ask, self._descriptions.read, self._silent)

    def reported_end(self) -> Offsets:
        return self._ends

    def read_on(self, next_offset: Offsets, wanted: Mask, again: Collection[int]) -> None:
        # The next poll does it: the poller may have to be opened, and brokers may be away.
        self._wanted = frozenset(np.flatnonzero(wanted).tolist())
        self._again |= frozenset(again)

    def poll(self, next_offset: Offsets, timeout_seconds: float) -> Polled:
        if not self._wanted:
            time.sleep(timeout_seconds)
            return Polled(Records.empty(), next_offset)
        rows = _Rows(self._max_record_bytes + 1)
        position = next_offset.copy()
        failure = None
        try:
            self._assign(next_offset)
            for polled in self._pieces(timeout_seconds):
                for partition, records in polled.items():
                    index = self._index[partition]
                    rows.append(index, records)
                    self.leader_epoch[index] = records[-1].leader_epoch
            self._advance(position)
        except (RetriableError, KafkaUnreachable):
            self._again = self._wanted
        except Exception as error:  # noqa: BLE001 - the client has many
            self._drop_poller()
            rows.advance(position)
            failure = self._locate(error, position)
        rows.advance(position)
        read = next_offset.copy()
        rows.advance(read)
        # Control and aborted records after the last record may be of a later epoch.
        self.leader_epoch[position > read] = UNKNOWN
        self._hear(len(rows) > 0)
        return Polled(rows.records(), position, failure)

    def end_of_damage(self, failure: Failure) -> int | None:
        index = failure.partition
        assert index is not None, "damage is somewhere"
        deadline = time.monotonic() + timeouts.ANSWER_SECONDS
        try:
            # Another batch fails with other words: the client names the offset of the batch.
            return end_of_run(
                failure.position,
                lambda offset: self._reason_at(index, offset, deadline) == failure.reason,
            )
        except (TimeoutError, KafkaUnreachable):
            return None

    def silent_seconds(self, wanted: Mask) -> float:
        if self._unanswered_since is None or not wanted.any():
            return 0.0
        silent = time.monotonic() - self._unanswered_since
        return silent if silent > ANSWER_DELAY_SECONDS else 0.0

    def close(self) -> None:
        super().close()
        self._drop_poller()
        self._descriptions.close()

    def _assign(self, next_offset: Offsets) -> None:
        """Assign the wanted partitions to the poller, at their positions [P]."""
        if self._poller is None:
            self._poller = open_consumer(self._client)
        fetched = self._reading - self._again
        if self._wanted != self._reading:
            self._poller.assign([self._assigned[index] for index in sorted(self._wanted)])
        for index in self._wanted - fetched:
            self._poller.seek(self._assigned[index], int(next_offset[index]))
        self._reading = self._wanted
        self._again = frozenset()

    def _pieces(self, timeout_seconds: float) -> Iterator[Mapping[Any, Sequence[Any]]]:
        """Yield what polls of the client return, waiting only for the first.

        The piece that reaches `POLL_BYTES` is the last.
        """
        timeout_ms = timeouts.milliseconds(timeout_seconds)
        records_left = self._most_records
        bytes_left = POLL_BYTES
        while records_left > 0 and bytes_left > 0:
            most = min(records_left, _PIECE_RECORDS)
            polled = self._poller.poll(timeout_ms=timeout_ms, max_records=most)
            if not polled:
                return
            yield polled
            timeout_ms = 0
            for records in polled.values():
                records_left -= len(records)
                bytes_left -= sum(len(record.value or b"") for record in records)

    def _advance(self, position: Offsets) -> None:
        """Move positions [P] to the poller's, past control and aborted records."""
        for index in self._reading:
            partition = self._assigned[index]
            reached = self._poller.position(partition, timeout_ms=0)
            position[index] = max(position[index], reached or 0)
            if (end := highwater(self._poller, partition)) != UNKNOWN:
                self._ends[index] = end

    def _hear(self, answered: bool) -> None:
        """Note an answer of the leaders, or ask them for one if it is time."""
        now = time.monotonic()
        if not answered and now - self._asked_at < _QUESTION_SECONDS:
            return
        self._asked_at = now
        try:
            if not answered:
                self._consumer.end_offsets(
                    [self._assigned[index] for index in self._wanted],
                    timeout_ms=timeouts.milliseconds(_QUESTION_TIMEOUT_SECONDS),
                )
            self._unanswered_since = None
        except KafkaError:
            self._unanswered_since = self._unanswered_since or now

    # -- failures ----------------------------------------------------------------------------------

    def _locate(self, error: Exception, position: Offsets) -> Failure | None:
        """Return the failure that an error is, with its partition where one fails alone too.

        None when the brokers went away meanwhile: the error comes again.
        """
        failure = failure_of(error, None, -1)
        if not _may_be_damage(error):
            return failure
        for index in sorted(self._wanted):
            offset = int(position[index])
            deadline = time.monotonic() + timeouts.ANSWER_SECONDS
            try:
                if self._reason_at(index, offset, deadline) == failure.reason:
                    return failure_of(error, index, offset)
            except TimeoutError:
                continue
            except KafkaUnreachable:
                return None
        return failure

    def _reason_at(self, index: int, offset: int, deadline: float) -> str | None:
        """Return why a partition cannot be read at this offset; None when it can.

        Raises `TimeoutError` and `KafkaUnreachable`.
        """
        partition = self._assigned[index]
        if self._poller is None:
            self._poller = open_consumer(self._client)
        self._reading = frozenset()
        self._poller.assign([partition])
        self._poller.seek(partition, offset)
        while time.monotonic() < deadline:
            try:
                polled = self._poller.poll(timeout_ms=_PROBE_MS, max_records=1)
                reached = self._poller.position(partition, timeout_ms=0) or 0
            except RetriableError:
                continue
            except Exception as error:  # noqa: BLE001 - the client has many
                self._drop_poller()
                return failure_of(error, index, offset).reason
            if polled or reached > offset or UNKNOWN < highwater(self._poller, partition) <= offset:
                return None
        raise TimeoutError

    def _drop_poller(self) -> None:
        """Close the poller; the next poll opens another one."""
        poller = self._poller
        self._poller = None
        self._reading = frozenset()
        if poller is not None:
            poller.close()

    def _silent(self, reason: str) -> KafkaUnreachable:
        return leaders_silent(self._consumer, self._client, reason)


def _may_be_damage(error: Exception) -> bool:
    """Return whether bytes that cannot be decoded may be the cause of an error."""
    elsewhere = (
        LogTruncationError,
        MemoryError,
        OffsetOutOfRangeError,
        TopicAuthorizationFailedError,
    )
    return not isinstance(error, elsewhere)


class _Rows:
    """Records of the client's, as columns. Values are cut to `most_value_bytes`."""

    def __init__(self, most_value_bytes: int) -> None:
        self._most_value_bytes = most_value_bytes
        self._partition: list[int] = []
        self._offset: list[int] = []
        self._time: list[int] = []
        self._value: list[bytes | None] = []

    def append(self, partition: int, records: Sequence[Any]) -> None:
        """Append records of the partition with this index."""
        most = self._most_value_bytes
        self._partition += [partition] * len(records)
        self._offset += [record.offset for record in records]
        self._time += [-1 if record.timestamp is None else record.timestamp for record in records]
        self._value += [record.value and record.value[:most] for record in records]

    def __len__(self) -> int:
        return len(self._offset)

    def advance(self, position: Offsets) -> None:
        """Move positions [P] past the records."""
        np.maximum.at(position, self._partition, np.array(self._offset, np.int64) + 1)

    def records(self) -> Records:
        """Return all records that were appended."""
        return Records(
            partition=np.array(self._partition, np.int32),
            offset=np.array(self._offset, np.int64),
            time=np.array(self._time, np.int64),
            value=pa.array(self._value, pa.large_binary()),
        )


class _Descriptions:
    """Descriptions of topics by an admin client, which threads of their own ask one at a time."""

    def __init__(self, client: Mapping[str, object], topics: Sequence[str]) -> None:
        self._client = client
        self._names = frozenset(topics)
        self._lock = threading.Lock()
        self._admin: Any = None

    def ask(self) -> list[Future[Any]]:
        """Start to describe the topics, and return the future descriptions."""
        return [in_background(self._describe)]

    def read(self, futures: Sequence[Future[Any]]) -> Topics | None:
        """Return the topics that were described; None when brokers did not answer."""
        (described,) = futures
        if isinstance(described.exception(), KafkaError | KafkaFailure):
            return None
        return {
            topic["name"]: (
                _topic_id(topic.get("topic_id")),
                frozenset(partition["partition_index"] for partition in topic["partitions"]),
            )
            for topic in described.result()
            if topic["name"] in self._names and topic["partitions"]
        }

    def close(self) -> None:
        if self._admin is not None:
            self._admin.close()

    def _describe(self) -> Any:
        with self._lock:
            if self._admin is None:
                self._admin = connect_admin(self._client)
            # All topics: to ask for one by name creates it where brokers create them by themselves.
            return self._admin.describe_topics()


def _topic_id(id_: object) -> str | None:
    return inside.topic_id(uuid.UUID(str(id_))) if id_ else None
