"""The fast reader: kafka-python fetches, and compiled code decodes the bytes into columns.

It uses private members of the client; `inside` holds and checks them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from kafka.errors import LogTruncationError, RetriableError

from stream_ctr.connectors.kafka import inside, timeouts
from stream_ctr.connectors.kafka.codecs import CODECS
from stream_ctr.connectors.kafka.consumer_reader import ConsumerReader, failure_of, highwater
from stream_ctr.connectors.kafka.positions import Mask, Offsets
from stream_ctr.connectors.kafka.reader import ANSWER_DELAY_SECONDS, Failure, Polled
from stream_ctr.connectors.kafka.record_batches import Columns
from stream_ctr.connectors.records import POLL_BYTES


class ColumnsReader(ConsumerReader):
    """A `Reader` that makes no Python object for a record.

    It cuts values of more than `max_record_bytes` to one byte more than that. Raises
    `KafkaUnreachable` and `KafkaTopicMissing`.
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
        self._columns = Columns(
            self._most_records, full_bytes=POLL_BYTES, most_value_bytes=max_record_bytes + 1
        )
        inside.read_into(self._columns, consumer, self._index, CODECS)
        self._unanswered = inside.Unanswered(consumer, self._index)
        self.news = inside.HeardNews(consumer, topics)

    def reported_end(self) -> Offsets:
        return np.array(
            [highwater(self._consumer, partition) for partition in self._assigned], np.int64
        )

    def read_on(self, next_offset: Offsets, wanted: Mask, again: Collection[int]) -> None:
        for index in again:
            offset, leader_epoch = int(next_offset[index]), int(self.leader_epoch[index])
            inside.seek(self._consumer, self._assigned[index], offset, leader_epoch)
        paused = {self._assigned[index] for index in np.flatnonzero(~wanted).tolist()}
        paused_before = self._consumer.paused()
        self._consumer.pause(*(paused - paused_before))
        self._consumer.resume(*(paused_before - paused))

    def poll(self, next_offset: Offsets, timeout_seconds: float) -> Polled:
        inside.restore_set_aside(self._consumer)
        failure = None
        try:
            self._consumer.poll(
                timeout_ms=timeouts.milliseconds(timeout_seconds),
                max_records=self._columns.most_records,
            )
        except RetriableError:
            pass  # it may come after some were read
        except Exception as error:  # noqa: BLE001 - the client has many
            located = inside.locate_failure(self._consumer, error)
            # After records most errors come again.
            if not self._columns.count or isinstance(error, LogTruncationError):
                failure = self._failure(located)
        if kept := inside.take_kept_failure(self._consumer):
            failure = failure or self._failure(kept)
        reached = [inside.position(self._consumer, partition) for partition in self._assigned]
        position, self.leader_epoch = np.array(reached, np.int64).T.copy()
        return Polled(self._columns.hand_out(), position, failure)

    def end_of_damage(self, failure: Failure) -> int | None:
        assert failure.partition is not None, "damage is somewhere"
        return inside.offset_after_batch(
            self._consumer,
            self._assigned[failure.partition],
            failure.position,
            timeouts.ANSWER_SECONDS,
        )

    def silent_seconds(self, wanted: Mask) -> float:
        silent = self._unanswered.seconds(wanted)
        return silent if silent > ANSWER_DELAY_SECONDS else 0.0

    def _failure(self, located: inside.Located) -> Failure | None:
        if isinstance(located.error, RetriableError):
            return None
        index = None if located.partition is None else self._index[located.partition]
        return failure_of(located.error, index, located.offset)
