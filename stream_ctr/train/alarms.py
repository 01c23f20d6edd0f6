"""Alarms: say once what keeps a run from going on, and once that it is over."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np

from stream_ctr.events.batch import EventBatch
from stream_ctr.join.joiner import LabelJoiner
from stream_ctr.join.watermark import Watermarks
from stream_ctr.messages import one_line
from stream_ctr.train.ingest import SourceStatus
from stream_ctr.train.sampled_baseline import SampledBaseline

_log = logging.getLogger("stream_ctr.train")
_SILENT_SECONDS = 5.0  # without an answer from any broker
_FIELDS_EXPECTED_WITHIN = 1000  # impressions


class Alarms:
    """Conditions by name, each logged when it begins and when it ends.

    >>> alarms = Alarms()
    >>> alarms.set("silent", True, "no broker answers", over="a broker answers again")
    >>> alarms.raised
    ('silent',)
    >>> alarms.set("silent", False, "", over="a broker answers again")
    >>> alarms.raised
    ()
    """

    def __init__(self) -> None:
        self._raised: set[str] = set()

    @property
    def raised(self) -> tuple[str, ...]:
        """The names of the conditions that hold."""
        return tuple(sorted(self._raised))

    def set(self, name: str, holds: bool, text: str, *, over: str = "") -> None:
        """Log `text` if the condition begins to hold, and `over` if it ceases to."""
        if holds and name not in self._raised:
            self._raised.add(name)
            _log.warning("%s", text)
        elif not holds and name in self._raised:
            self._raised.remove(name)
            _log.warning("%s", over)


class RunAlarms:
    """The alarms of a run over these partitions; lost records are counted in `counters`."""

    def __init__(self, partitions: Sequence[tuple[str, int]], counters: Counter[str]) -> None:
        self._alarms = Alarms()
        self._partitions = partitions
        self._counters = counters
        self._lost = 0

    def check(self, status: SourceStatus, joiner: LabelJoiner, stalled: Sequence[str]) -> None:
        """Look at the status after a poll. `stalled` names partitions whose clicks are overdue."""
        if status.lost > self._lost:
            lost = status.lost - self._lost
            _log.error("%d records are lost: the topic does not hold them any more", lost)
            self._counters["records_lost"] += lost
            self._lost = status.lost
        self._alarms.set(
            "silent",
            status.silent_seconds >= _SILENT_SECONDS,
            f"no broker has answered for {status.silent_seconds:.0f} s; waiting",
            over="a broker answers again",
        )
        self._alarms.set(
            "stalled",
            bool(stalled),
            f"clicks of {', '.join(stalled)} are overdue: learning pauses so that a stalled click "
            f"stream is not learned as no clicks, and {joiner.pending:,} impressions wait; "
            "if no clicks will come: join.stall_clicks = 0",
            over="clicks come again: learning goes on",
        )
        if evicted := joiner.counts()["impressions_evicted"]:
            self._alarms.set(
                "evicted",
                True,
                f"{evicted:,} impressions evicted so far: join.max_memory has no room for more",
            )

    def baseline_full(self, baseline: SampledBaseline) -> None:
        """Say that learning waits for the baseline from now on."""
        waiting = baseline.process.waiting_bytes >> 20
        self._alarms.set(
            "baseline",
            True,
            f"{waiting} MiB of examples wait for {baseline.name}: from now on learning is no "
            "faster than it; with baseline.sample_rate = 0.1 it learns, and is compared on, one "
            "impression in ten",
        )


class MissingFields:
    """Warn about fields that the first impressions never had: a misspelt field teaches nothing."""

    def __init__(self, fields: Sequence[str]) -> None:
        self._unseen = set(fields)
        self._impressions = 0

    def observe(self, events: EventBatch) -> None:
        """Look at the fields of a poll's impressions."""
        if not self._unseen or self._impressions >= _FIELDS_EXPECTED_WITHIN:
            return
        self._unseen -= events.with_fields
        self._impressions += len(events.impressions)
        if self._impressions >= _FIELDS_EXPECTED_WITHIN and self._unseen:
            _log.warning(
                "in the first %d impressions these fields were always missing: %s; "
                "are they spelled as in the events?",
                self._impressions,
                ", ".join(one_line(name, 60) for name in sorted(self._unseen)),
            )


def stalled_partitions(watermarks: Watermarks, partitions: Sequence[tuple[str, int]]) -> list[str]:
    """Return the names, "topic:partition", of the partitions whose clicks are overdue."""
    stalled = np.flatnonzero(watermarks.stalled | watermarks.silent_clicks())
    return [f"{partitions[index][0]}:{partitions[index][1]}" for index in stalled.tolist()]
