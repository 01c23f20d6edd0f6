"""Malformed records: count each, and send it to the dead letters.

A run that reads mostly these is stopped. The records of earlier runs in the state directory count:
a run that is stopped and goes on judges a burst of malformed records as one that was not stopped.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np

from stream_ctr.errors import DataError
from stream_ctr.events.batch import EventBatch
from stream_ctr.snapshots.publisher import Publisher
from stream_ctr.train.state import TrainingState

_log = logging.getLogger("stream_ctr.train")
_ENOUGH_RECORDS = 1000  # fewer say nothing about a share


class BadRecords:
    """Set rejected records aside, and count them in the state of the run.

    A tombstone is counted and not kept: it deletes nothing here, and is no error of its producer.
    """

    def __init__(
        self,
        partitions: Sequence[tuple[str, int]],
        publisher: Publisher,
        state: TrainingState,
        *,
        max_bad_share: float,
    ) -> None:
        self._partitions = partitions
        self._publisher = publisher
        self._state = state
        self._max_bad_share = max_bad_share
        self._last = ""
        self._named: set[str] = set()  # the reasons that were logged

    def keep(self, events: EventBatch) -> None:
        """Count the records of a poll, and send what was rejected to the dead letters.

        Raises `DataError` if, after one of the records, more than `max_bad_share` of at least 1,000
        were bad.
        """
        rejected = events.rejected
        for partition, offset, event, value, reason, message in zip(
            rejected.partition.tolist(),
            rejected.offset.tolist(),
            rejected.event,
            rejected.value,
            rejected.reason,
            rejected.message,
            strict=True,
        ):
            self._state.counters[f"rejected.{reason}"] += 1
            if reason == "tombstone":
                continue
            topic, number = self._partitions[partition]
            self._publisher.dead_letter(topic, number, offset, value, reason, message, event=event)
            self._last = f"{reason}: {message}"
            if reason not in self._named:
                self._named.add(reason)
                _log.warning(
                    "malformed, the first of its kind, at offset %d of %s:%d: %s: %s "
                    "(counted and kept as a dead letter, see stream-ctr dlq)",
                    offset,
                    topic,
                    number,
                    reason,
                    message,
                )
        self._count(events)

    def _count(self, events: EventBatch) -> None:
        """Count the records one after another: where a run stops does not depend on the polls."""
        state = self._state
        before = state.counters["records"]
        state.counters["records"] += events.records
        if events.bad_shares is None:
            # The share is never higher than at the first of these records that is judged.
            self._require_good_share(state.bad_records, max(before + 1, _ENOUGH_RECORDS))
            return
        bad = state.bad_records + np.cumsum(events.bad_shares)
        records = before + np.arange(1, events.records + 1)
        state.bad_records = float(bad[-1])
        over = (records >= _ENOUGH_RECORDS) & (bad > self._max_bad_share * records)
        if over.any():
            first = int(np.argmax(over))
            self._require_good_share(float(bad[first]), int(records[first]))

    def _require_good_share(self, bad: float, records: int) -> None:
        if records <= self._state.counters["records"] and bad > self._max_bad_share * records:
            raise DataError(
                f"{bad:.0f} of {records} records read are bad, more than "
                f"input.max_bad_share = {self._max_bad_share}; the last: {self._last} - "
                "Is this the right input, and are these its fields?"
            )


def rejected_count(counters: Counter[str]) -> int:
    """Return how many records or events were rejected, tombstones not counted.

    >>> rejected_count(Counter({"rejected.json": 2, "rejected.tombstone": 5, "records": 9}))
    2
    """
    return sum(
        count
        for name, count in counters.items()
        if name.startswith("rejected.") and name != "rejected.tombstone"
    )
