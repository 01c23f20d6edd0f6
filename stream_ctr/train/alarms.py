"""Alarms: say once what keeps a run from going on, and once that it is over."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stream_ctr.events.batch import EventBatch
from stream_ctr.join.joiner import LabelJoiner
from stream_ctr.join.watermark import Watermarks
from stream_ctr.messages import nearest_word, one_line
from stream_ctr.snapshots.manifest import Input
from stream_ctr.train.ingest import SourceStatus
from stream_ctr.train.inputs import input_name
from stream_ctr.train.sampled_baseline import SampledBaseline

_log = logging.getLogger("stream_ctr.train")
_SILENT_SECONDS = 5.0  # without an answer from any broker
_FIELDS_EXPECTED_WITHIN = 1000  # impressions
_LONG_MS = 8 * 86_400_000
_FEWEST_IMPRESSIONS = 100  # that tell something about a field at the end of the input


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


class FieldWatch:
    """Warn about fields that teach nothing: the first impressions never had them, or had one value.

    The warning names the most similar feature that is no field, because the field may be misspelt.
    An hour or a weekday has one value for a while. So a field is said to have one value at the end
    of the input, or after more than a week of event time. A number has one value when all of its
    values are in one bucket. `value_fields` are the indices of the fields with a column of values.
    """

    def __init__(self, fields: Sequence[str], *, value_fields: Sequence[int] = ()) -> None:
        self._fields = fields
        self._seen: set[str] = set()
        self._unknown: set[str] = set()
        self._impressions = 0
        self._first_ms: int | None = None
        self._watches_missing = True
        # The fields that had one value so far, and this value: an id, and a number if it has one.
        self._constant = np.arange(len(fields))
        self._value_column = np.full(len(fields), -1)
        self._value_column[list(value_fields)] = np.arange(len(value_fields))
        self._value: npt.NDArray[np.float64] | None = None

    def observe(self, events: EventBatch) -> None:
        """Look at the fields of a poll's impressions and examples."""
        n = len(events.impressions) + len(events.examples)
        if not n or not (self._watches_missing or len(self._constant)):
            return
        self._impressions += n
        self._seen |= events.with_fields
        self._unknown |= events.unknown_features
        self._drop_varying(events)
        if self._watches_missing and self._impressions >= _FIELDS_EXPECTED_WITHIN:
            self._warn_of_missing()
        times = np.concatenate([events.impressions.time, events.examples.arrivals.time])
        if self._first_ms is None:
            self._first_ms = int(times[0])
        if int(times[-1]) - self._first_ms > _LONG_MS:
            self._warn_of_constant()

    def finish(self) -> None:
        """Warn at the end of the input, if it had enough impressions to tell."""
        if self._impressions >= _FEWEST_IMPRESSIONS:
            if self._watches_missing:
                self._warn_of_missing()
            self._warn_of_constant()

    def _drop_varying(self, events: EventBatch) -> None:
        """Keep the fields whose value is that of all impressions and examples before."""
        for ids, values in (
            (events.ids, events.values),
            (events.examples.ids, events.examples.values),
        ):
            if len(ids):
                self._drop_varying_columns(ids, values)

    def _drop_varying_columns(
        self, ids: npt.NDArray[np.int32], values: npt.NDArray[np.float32]
    ) -> None:
        columns = np.zeros((len(ids), 2, len(self._constant)))
        columns[:, 0] = ids[:, self._constant]
        has_values = self._value_column[self._constant] >= 0
        numbers = self._value_column[self._constant[has_values]]
        columns[:, 1, has_values] = values[:, numbers]
        if self._value is None:
            self._value = columns[0]
        same = (columns == self._value).all(axis=(0, 1))
        self._constant = self._constant[same]
        self._value = self._value[:, same]

    def _warn_of_missing(self) -> None:
        self._watches_missing = False
        if missing := [name for name in self._fields if name not in self._seen]:
            _log.warning(
                "in the first %d impressions these fields were always missing: %s; "
                "are they spelled as in the events?",
                self._impressions,
                self._named(missing),
            )

    def _warn_of_constant(self) -> None:
        names = [self._fields[index] for index in self._constant.tolist()]
        self._constant = self._constant[:0]
        if constant := [name for name in names if name in self._seen]:
            _log.warning(
                "in the first %d impressions these fields had one value each, which teaches "
                "nothing: %s",
                self._impressions,
                self._named(constant),
            )

    def _named(self, fields: Sequence[str]) -> str:
        return ", ".join(one_line(name, 60) + self._hint(name) for name in fields)

    def _hint(self, field: str) -> str:
        similar = nearest_word(field, sorted(self._unknown))
        if similar is None:
            return ""
        return f" (the events have {one_line(similar, 60)!r}, which is no field)"


def stalled_partitions(watermarks: Watermarks, partitions: Sequence[tuple[str, int]]) -> list[str]:
    """Return the names, "topic:partition", of the partitions whose clicks are overdue."""
    stalled = np.flatnonzero(watermarks.stalled | watermarks.silent_clicks())
    return partition_words(stalled.tolist(), partitions)


def partition_words(indices: Sequence[int], partitions: Sequence[tuple[str, int]]) -> list[str]:
    """Return the names, "topic:partition", of the partitions with these indices."""
    return [f"{partitions[index][0]}:{partitions[index][1]}" for index in indices]


def warn_of_late_input(begun: Input, late: int, *, of: int) -> None:
    """Warn if most of the first impressions of an input that follows another are late."""
    if 2 * late <= of:
        return
    remedy = "" if begun.kind == "topics" else "; give logs in the order of their times"
    _log.warning(
        "%d of the first %d impressions of %s are late: they are older than what was read before "
        "it, whose label windows are closed, and are not learned%s",
        late,
        of,
        input_name(begun.partitions),
        remedy,
    )
