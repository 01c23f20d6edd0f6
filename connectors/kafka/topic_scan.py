"""The records that the first partition of a topic holds now, from any offset on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from kafka.errors import KafkaError, RetriableError

from stream_ctr.connectors.errors import KafkaReadFailed
from stream_ctr.connectors.kafka import timeouts
from stream_ctr.connectors.kafka.client import open_consumer
from stream_ctr.connectors.kafka.codecs import check_codecs
from stream_ctr.connectors.kafka.consumer_reader import assign_all, find_ends, leaders_silent
from stream_ctr.connectors.kafka.pointers import StoredRecord
from stream_ctr.connectors.kafka.record_batches import DamagedBatch

_POLL_MS = 250


class TopicScan:
    """A consumer of one topic of large records, up to the end that it has when this is made.

    Raises `KafkaUnreachable`, `KafkaTopicMissing` and `KafkaCodecMissing`.
    """

    def __init__(self, client: Mapping[str, object], topic: str) -> None:
        check_codecs()
        self._client = client
        self._topic = topic
        self._consumer = open_consumer(client, auto_offset_reset="earliest")
        try:
            self._partition, *others = assign_all(self._consumer, [topic], client)
            ends = find_ends(self._consumer, [self._partition, *others], client)
            self._end = int(ends[0])
            self._consumer.assign([self._partition])
        except BaseException:
            self._consumer.close()
            raise

    def records(self, offset: int) -> Iterator[StoredRecord]:
        """Yield the records from this offset on, or from the oldest that is there.

        Raises `KafkaUnreachable` when nothing more comes before the end, and `KafkaReadFailed`.
        """
        self._consumer.seek(self._partition, offset)
        heard_at = time.monotonic()
        while (position := self._position()) < self._end:
            for record in self._poll():
                if record.offset < self._end:
                    yield StoredRecord(
                        record.partition,
                        record.offset,
                        record.key,
                        record.value,
                        tuple(record.headers),
                    )
            if self._position() != position:
                heard_at = time.monotonic()
            elif time.monotonic() - heard_at > timeouts.ANSWER_SECONDS:
                raise leaders_silent(self._consumer, self._client, "no answer to fetching")

    def close(self) -> None:
        """Close the connection."""
        self._consumer.close()

    def _poll(self) -> list[Any]:
        try:
            polled: Mapping[Any, list[Any]] = self._consumer.poll(timeout_ms=_POLL_MS)
        except RetriableError:
            return []
        except (KafkaError, DamagedBatch) as error:
            raise KafkaReadFailed(f"reading topic {self._topic!r} failed: {error}") from error
        return polled.get(self._partition, [])

    def _position(self) -> int:
        position: int | None = self._consumer.position(self._partition, timeout_ms=0)
        return position or 0
