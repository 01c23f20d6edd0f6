"""Kafka as a sink of records, through kafka-python."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from time import monotonic, sleep
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from kafka import KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError, UnknownError

from stream_ctr.connectors.errors import KafkaDeliveryFailed
from stream_ctr.connectors.kafka import inside, options, timeouts
from stream_ctr.connectors.kafka.admin import partition_counts
from stream_ctr.connectors.kafka.client import connect
from stream_ctr.connectors.kafka.codecs import check_codecs
from stream_ctr.connectors.kafka.diagnosis import servers, topic_missing

_MARK_BYTES = 256 << 10  # of values between two records whose acknowledgement is waited for
_BETWEEN_FLUSHES_SECONDS = 0.01

# Tuned by measurement on two cores; every one can be set by the user.
_PRODUCER_DEFAULTS: dict[str, object] = {
    "client_id": "stream-ctr",
    "batch_size": 256 << 10,
    "linger_ms": 20,
    "metrics_enabled": False,
    "reconnect_backoff_max_ms": 1000,
}


class KafkaSink:
    """Writes records to topics.

    `compression` is none, gzip, snappy, lz4 or zstd; `compression.type` in the client's options
    overrides it.

    Sending returns at once and is acknowledged later. The next `send` or `flush` raises the errors
    of records that the broker did not take. No more than `IN_FLIGHT_BYTES` of values wait for
    their acknowledgement; beyond that, sending blocks.

    Raises `KafkaUnreachable` and `KafkaCodecMissing`.
    """

    def __init__(self, client: Mapping[str, object], *, compression: str | None = "lz4") -> None:
        check_codecs()
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
        """Send one record.

        `time` is in epoch milliseconds; its default is now. A null value withdraws the key from a
        compacted topic.

        Raises `KafkaTopicMissing` and `KafkaDeliveryFailed`.
        """
        self._raise_failures()
        self._look_up(topic)
        # The client takes such a record, and fails with its next flush.
        if partition is not None and not 0 <= partition < self._partitions[topic]:
            raise KafkaDeliveryFailed(
                f"topic {topic!r} has no partition {partition}: it has {self._partitions[topic]}"
            )
        self._send(topic, value, key, list(headers), time, partition)

    def send_batch(
        self,
        topic: str,
        values: pa.LargeBinaryArray,
        times: npt.NDArray[np.int64] | None = None,
        keys: pa.Array | None = None,
    ) -> None:
        """Send n values in order, with their times in epoch milliseconds [n] and keys [n].

        A key decides the partition. Without keys the partitions take turns, record by record, so
        that none runs ahead of the others in the time of its events.

        Raises `KafkaTopicMissing` and `KafkaDeliveryFailed`.
        """
        self._raise_failures()
        self._look_up(topic)
        count = len(values)
        partitions: Sequence[int | None] = [None] * count
        all_times: Sequence[int | None] = [None] * count
        all_keys: Sequence[bytes | None] = [None] * count
        if times is not None:
            all_times = times.tolist()
        if keys is not None:
            all_keys = keys.cast(pa.large_binary()).to_pylist()
        else:
            partitions = self._take_turns(count, self._partitions[topic])
        no_headers: list[tuple[str, bytes]] = []
        for value, key, time, partition in zip(
            values.to_pylist(), all_keys, all_times, partitions, strict=True
        ):
            self._send(topic, value, key, no_headers, time, partition)

    def flush(self, timeout_seconds: float) -> None:
        """Wait until all records are acknowledged.

        Raises `KafkaDeliveryFailed` when that takes longer, or when some were not taken.
        """
        if self._producer is None:
            return
        try:
            self._flush(monotonic() + timeout_seconds)
        except KafkaTimeoutError as error:
            raise KafkaDeliveryFailed(
                f"{servers(self._client)} did not acknowledge all records "
                f"within {timeout_seconds:g} s"
            ) from error
        except KafkaError as error:
            raise KafkaDeliveryFailed(
                f"{servers(self._client)} did not acknowledge all records: {error}"
            ) from error
        finally:
            self._raise_failures()

    def _flush(self, deadline: float) -> None:
        while True:
            try:
                self._producer.flush(max(deadline - monotonic(), 0.0))
            except UnknownError as error:
                # The client splits a batch that is too large while it waits for it. The parts are
                # there for the next flush.
                if monotonic() > deadline:
                    raise KafkaTimeoutError(str(error)) from error
                sleep(_BETWEEN_FLUSHES_SECONDS)
            else:
                return

    def close(self) -> None:
        """Wait up to `ANSWER_SECONDS` for the records on their way, and close.

        Raises `KafkaDeliveryFailed` as `flush` does.
        """
        try:
            self.flush(timeouts.ANSWER_SECONDS)
        finally:
            self._abandon()

    def _open(self) -> None:
        defaults = {
            **_PRODUCER_DEFAULTS,
            "max_block_ms": timeouts.milliseconds(timeouts.ANSWER_SECONDS),
            "compression_type": self._compression,
        }
        self._producer = connect(KafkaProducer, self._client, defaults)

    def _abandon(self) -> None:
        """Close the producer without waiting for the records on their way."""
        producer = self._producer
        self._producer = None
        if producer is not None:
            with suppress(KafkaError):  # what is on its way is given up
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
            self._in_flight_bytes > options.IN_FLIGHT_BYTES or self._in_flight[0][0].is_done
        ):
            oldest, size = self._in_flight.popleft()
            self._in_flight_bytes -= size
            # The client stops by itself (delivery.timeout.ms), and `_failures` gets the failure.
            with suppress(KafkaError):
                oldest.get()

    def _take_turns(self, count: int, partitions: int) -> list[int]:
        # The client would keep one partition for a block of records, and would choose for each
        # record, which is a fifth of the cost of sending.
        first = self._sent_in_batches
        self._sent_in_batches += count
        turns: list[int] = (np.arange(first, first + count) % partitions).tolist()
        return turns

    def _look_up(self, topic: str) -> None:
        """Find out how many partitions the topic has. Raises `KafkaTopicMissing`."""
        if topic in self._partitions:
            return
        existing = partition_counts(self._client)
        if topic not in existing:
            raise topic_missing(topic, existing, self._client)
        # Of all topics: another one then needs no other connection.
        self._partitions = {**existing, **self._partitions}

    def _raise_failures(self) -> None:
        if not self._failures:
            return
        # After one refused record the idempotent producer fails forever: the next gets a new one.
        self._abandon()
        failures = list(self._failures)
        self._failures.clear()
        raise KafkaDeliveryFailed(
            f"{servers(self._client)} did not take {len(failures)} records; "
            f"the first: {failures[0]}"
        )
