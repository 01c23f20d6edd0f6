"""Alarms: say once what keeps a run from going on, and once that it is over.

Reports list the alarms that hold, by name:

    alarm             holds while
    ---------------   ------------------------------------------------------------------------
    silent            no broker has answered for some seconds
    lost              records were deleted from the topic before they were read
    stalled           clicks are overdue, so that learning pauses
    evicted           impressions were dropped for lack of memory
    baseline          learning is no faster than the baseline, whose queue is full
    refused           the publish gate refuses the model
    rolled_back       a model that went back to a snapshot has not recovered
    left_out          an additional model no longer learns
    snapshot          the last snapshot could not be written or published
    behind_baseline   the published model is worse than a baseline
    drift             the level of a figure of the model or of a field has changed lately
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stream_ctr.errors import SnapshotError
from stream_ctr.events.batch import FieldSample
from stream_ctr.join.joiner import Joiner
from stream_ctr.join.watermark import Watermarks
from stream_ctr.messages import nearest_word, one_line
from stream_ctr.snapshots.manifest import Input
from stream_ctr.train.ingest import SourceStatus
from stream_ctr.train.inputs import input_name
from stream_ctr.train.sampled_baseline import SampledBaseline
from stream_ctr.train.state import TrainingState

_log = logging.getLogger("stream_ctr.train")
_SILENT_SECONDS = 5.0  # without an answer from any broker
_FIELDS_EXPECTED_WITHIN = 1000  # impressions
_LONG_MS = 8 * 86_400_000
_FEWEST_IMPRESSIONS = 100  # that tell something about a field at the end of the input


class Raised(NamedTuple):
    """An alarm that holds, since `since_ms` of the machine's clock (epoch milliseconds)."""

    name: str
    since_ms: int
    text: str


class Alarms:
    """Conditions by name, each logged when it begins and when it ends.

    `wall_clock` returns the machine's time in epoch seconds.

    >>> alarms = Alarms(lambda: 12.5)
    >>> alarms.set("silent", True, "no broker answers", over="a broker answers again")
    >>> alarms.raised
    (Raised(name='silent', since_ms=12500, text='no broker answers'),)
    >>> alarms.set("silent", False, "", over="a broker answers again")
    >>> alarms.raised
    ()
    """

    def __init__(self, wall_clock: Callable[[], float]) -> None:
        self._wall_clock = wall_clock
        self._raised: dict[str, Raised] = {}

    @property
    def raised(self) -> tuple[Raised, ...]:
        """The conditions that hold, in the order in which they began."""
        return tuple(self._raised.values())

    def set(self, name: str, holds: bool, text: str, *, over: str = "", log: bool = True) -> None:
        """Log `text` if the condition begins to hold, and `over` if it ceases to.

        Without `log` the log has it from elsewhere. While the condition holds, `text` replaces the
        text that reports have.
        """
        known = self._raised.get(name)
        if holds and known is None:
            self._raised[name] = Raised(name, int(self._wall_clock() * 1000), text)
            if log:
                _log.warning("%s", text)
        elif holds and known:
            self._raised[name] = known._replace(text=text)
        elif known:
            del self._raised[name]
            if log and over:
                _log.warning("%s", over)


class RunAlarms:
    """The alarms of a run over these partitions; lost records are counted in `counters`.

    `wall_clock` returns the machine's time in epoch seconds.
    """

    def __init__(
        self,
        partitions: Sequence[tuple[str, int]],
        counters: Counter[str],
        wall_clock: Callable[[], float],
    ) -> None:
        self._alarms = Alarms(wall_clock)
        self._partitions = partitions
        self._counters = counters
        self._lost = 0

    @property
    def raised(self) -> tuple[Raised, ...]:
        """The alarms that hold, in the order in which they began."""
        return self._alarms.raised

    def check(self, status: SourceStatus, joiner: Joiner, stalled: Sequence[str]) -> None:
        """Look at the status after a poll. `stalled` names partitions whose clicks are overdue."""
        if status.lost > self._lost:
            lost = status.lost - self._lost
            _log.error("%d records are lost: the topic does not hold them any more", lost)
            self._counters["records_lost"] += lost
            self._lost = status.lost
            self._alarms.set(
                "lost",
                True,
                f"{self._lost:,} records are lost: the topic does not hold them any more",
                log=False,
            )
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

    def check_models(self, state: TrainingState, failure: SnapshotError | None) -> None:
        """Look at the models and their verdicts; `failure` is that of the last snapshot."""
        board = state.scoreboard
        refused = board.judge.refused
        left_out = [f"{name}: {reason}" for name, reason in state.left_out.items()]
        recovering = [name for name, guard in state.guards.items() if guard.recovering]
        behind = board.behind.found
        quiet = (
            ("refused", f"snapshots are not published: {'; '.join(refused)}", bool(refused)),
            ("left_out", f"no longer learned: {'; '.join(left_out)}", bool(left_out)),
            (
                "rolled_back",
                f"{' and '.join(recovering)} went back to a snapshot and has not recovered",
                bool(recovering),
            ),
            ("snapshot", str(failure), failure is not None),
        )
        for name, text, holds in quiet:
            self._alarms.set(name, holds, text, log=False)
        self._alarms.set(
            "behind_baseline",
            behind is not None,
            behind.words() if behind else "",
            over=f"{board.models[0]} is no worse than its baselines again",
        )
        drifts = [*board.drifts, *(state.fields.drifts if state.fields else [])]
        self._alarms.set(
            "drift",
            bool(drifts),
            f"drift: {'; '.join(drift.words() for drift in drifts)}",
            over="no figure has drifted lately",
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

    @property
    def watches(self) -> bool:
        """Whether there is anything left to warn about."""
        return self._watches_missing or len(self._constant) > 0

    def observe(self, sample: FieldSample) -> None:
        """Look at the fields of a poll's impressions and examples."""
        if not sample.rows or not self.watches:
            return
        self._impressions += sample.rows
        self._seen |= sample.with_fields
        self._unknown |= sample.unknown_features
        if len(sample.ids):
            self._drop_varying(sample.ids, sample.values)
        if self._watches_missing and self._impressions >= _FIELDS_EXPECTED_WITHIN:
            self._warn_of_missing()
        if self._first_ms is None:
            self._first_ms = sample.first_ms
        if sample.last_ms - self._first_ms > _LONG_MS:
            self._warn_of_constant()

    def finish(self) -> None:
        """Warn at the end of the input, if it had enough impressions to tell."""
        if self._impressions >= _FEWEST_IMPRESSIONS:
            if self._watches_missing:
                self._warn_of_missing()
            self._warn_of_constant()

    def _drop_varying(self, ids: npt.NDArray[np.int32], values: npt.NDArray[np.float32]) -> None:
        """Keep the fields whose value is that of all impressions and examples before."""
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
