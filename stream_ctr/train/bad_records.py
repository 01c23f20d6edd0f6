"""Malformed records: count each, and send it to the dead letters.

A run that reads mostly these is stopped.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from stream_ctr.errors import DataError
from stream_ctr.events.batch import EventBatch
from stream_ctr.snapshots.publisher import Publisher

_log = logging.getLogger("stream_ctr.train")
_ENOUGH_RECORDS = 1000  # fewer say nothing about a share


class BadRecords:
    """Set rejected records aside.

    A tombstone is counted and not kept: it deletes nothing here, and is no error of its producer.
    """

    def __init__(
        self,
        partitions: Sequence[tuple[str, int]],
        publisher: Publisher,
        counters: Counter[str],
        *,
        max_bad_share: float,
    ) -> None:
        self._partitions = partitions
        self._publisher = publisher
        self._counters = counters
        self._max_bad_share = max_bad_share
        self._records = 0
        self._bad = 0.0
        self._last = ""
        self._named: set[str] = set()  # the reasons that were logged

    def keep(self, events: EventBatch) -> None:
        """Send what a poll rejected to the dead letters.

        Raises `DataError` if more than `max_bad_share` of at least 1,000 records were bad.
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
            self._counters[f"rejected.{reason}"] += 1
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
        self._records += events.records
        self._bad += events.bad_records
        self._require_good_share()

    def _require_good_share(self) -> None:
        most = self._max_bad_share * self._records
        if self._records >= _ENOUGH_RECORDS and self._bad > most:
            raise DataError(
                f"{self._bad:.0f} of {self._records} records read are bad, more than "
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
