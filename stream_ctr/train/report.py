"""Reports: one JSON object a line about a run, or about one window of event time.

A report is a frozen type, so that what a run says has one definition; `docs/schemas` has its JSON
Schema. `format` grows if a key changes its meaning or goes away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import UNSET, Meta, Struct, UnsetType

from stream_ctr.evaluate.freshness import Percentiles
from stream_ctr.evaluate.summary import (
    Count,
    Difference,
    FieldFigures,
    FieldSummary,
    ModelScore,
    Paired,
    Summary,
    TableFigures,
    WindowSummary,
)
from stream_ctr.join.watermark import NOT_YET
from stream_ctr.learn.baseline import DEVIATIONS
from stream_ctr.learn.blend import BlendReport
from stream_ctr.messages import rfc3339
from stream_ctr.snapshots.contract import RunId
from stream_ctr.snapshots.manifest import LedgerEntry
from stream_ctr.snapshots.pointer import Pointer
from stream_ctr.train.alarms import Raised, partition_words, stalled_partitions
from stream_ctr.train.bad_records import rejected_count
from stream_ctr.train.delta_cycle import DeltaFigures
from stream_ctr.train.ingest import SourceStatus
from stream_ctr.train.sampled_baseline import SampledBaseline
from stream_ctr.train.state import TrainingState

FORMAT = 2
Kind = Literal["report", "final", "stopped"]
Moment = Annotated[str, Meta(description="RFC 3339 in UTC, with milliseconds")]
Tail = Annotated[
    dict[str, Any],
    Meta(
        extra_json_schema={
            "description": "The metrics of the last examples of a run, and again by model.",
            "properties": {
                "from_example": {"type": "integer", "minimum": 0},
                "models": {
                    "type": "object",
                    "additionalProperties": {"$ref": "#/$defs/ModelScore"},
                },
                "constant_logloss": {"type": ["number", "null"]},
                "best_possible_logloss": {"type": ["number", "null"]},
                "paired": {"$ref": "#/$defs/Paired"},
                "pairs": {
                    "type": "object",
                    "additionalProperties": {"$ref": "#/$defs/Difference"},
                },
            },
            "required": list(Summary.__struct_fields__),
            "additionalProperties": {"$ref": "#/$defs/ModelScore"},
        }
    ),
]
_TAILS = {"last_half": 0.5, "last_quarter": 0.25}


class Window(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The metrics of a stretch of event time. A `provisional` window may still change."""

    start: Moment
    end: Moment
    start_ms: int
    end_ms: int
    models: dict[str, ModelScore]
    constant_logloss: float | None
    best_possible_logloss: float | None
    paired: Paired
    pairs: dict[str, Difference]
    provisional: bool


class WindowReport(
    Window, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="window"
):
    """The report of one window that is final. `run` is the id of the run."""

    format: Count = FORMAT
    run: RunId


class StageTime(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The time that a thread spent in a stage, and that time an event."""

    seconds: float
    ns_per_event: float


class Profile(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where the time of an event went, by thread and stage, and which part bounds the run."""

    bound: Literal["source", "ingest", "learning", "baseline"]
    reader: dict[str, StageTime]
    trainer: dict[str, StageTime]


class BaselineNote(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The share that the baseline learns, and how it differs from FTRL-Proximal."""

    sample_rate: float
    note: str


class CurvePoint(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The share of the clicks that a label window of `window_seconds` would lose.

    Clicks that never found their impression are lost with any window, and count.
    """

    window_seconds: float
    lost_share: float


class Alarm(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An alarm that holds since the time `since` of the machine's clock.

    There is at most one of each `name`. `text` is for people, and has the present figures.
    """

    name: str
    since: Moment
    text: str


class FieldsWindow(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The stretch of event time, and the number of sampled examples, of recent `fields`."""

    start: Moment
    end: Moment
    start_ms: int
    end_ms: int
    count: Count


class Waiting(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a run that has learned no example waits for.

    The first examples are learned when the events of all partitions have reached the event time
    `until`, where the first label window closes; they have reached `reached`. `held_by` names the
    partitions without an event yet, and `ready` examples wait for a full batch. Of the pending
    impressions, `labelled` are examples that came with their label, which wait for no click.
    """

    until: Moment | None
    reached: Moment | None
    held_by: list[str]
    ready: Count
    labelled: Count = 0


class Published(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The published snapshot, the event time of its newest example, and when it was written.

    The age of `event_time` is how old what subscribers know is.
    """

    snapshot: str
    event_time: Moment | None
    written: Moment | None

    @classmethod
    def of(cls, pointer: Pointer) -> Published:
        """Return what a report says of the snapshot that a pointer names."""
        return cls(
            snapshot=pointer.snapshot,
            event_time=rfc3339(pointer.event_time_ms),
            written=rfc3339(pointer.created_ms),
        )


class Report(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The state of a run. `final` and `stopped` reports end a run and hold more.

    `run` is the id of the run, which is in its snapshots and pointers too. `time` is the time of
    the machine's clock. `waiting` is there until an example was learned. `seconds` is the age of
    the run, `events_per_second` counts the events that it read. `event_time` is that of the last
    example, `watermark` the event time before which nothing more is expected. `pending` impressions
    wait for their clicks, and the join has allocated `pending_bytes` of memory for them; `lag`
    records are unread. `snapshot` is the last one on disk, `published` the one that `latest.json`
    names, which a rollback may have chosen. `stalled` names partitions whose clicks are overdue,
    `refused` says why the model is not published, `left_out` why an additional model ended.
    `withheld` says why no snapshot of this run is published; it is empty once one is. `alarms`
    lists the alarms that hold, in the order in which they began. `click_coverage` is the share of
    the clicks with a known fate that found their impression in time. `window_curve` is the share of
    them that other label windows would lose.

    The metrics of `models` are progressive: each example is predicted just before it is learned,
    after its label window. Those of `as_served` are of the snapshot that was published when the
    impression arrived, so they are what a subscriber would have seen; `progressive` among them is
    the published model's progressive prediction of the same impressions.

    `fields` has the health of each field and cross product, in the `fields_window` where it is that
    of recent examples, and `table` the use of the table's rows.

    `freshness` has the ages of recent examples at each stage of their way: from the event to the
    end of the label window, from there until they were learned, and until a delta or a snapshot
    with them was published. A replay of a log measures none since the event. `final` and `stopped`
    reports cover all examples of the process. `deltas` is there if a run writes deltas.
    """

    format: Count = FORMAT
    run: RunId
    kind: Kind
    time: Moment
    examples: Count
    events: Count
    seconds: float
    events_per_second: float
    event_time: Moment | None
    watermark: Moment | None
    pending: Count
    pending_bytes: Count
    lag: Count
    snapshot: str | None
    published: Published | None
    stalled: list[str]
    silent_seconds: float
    refused: list[str]
    withheld: list[str]
    left_out: dict[str, str]
    alarms: list[Alarm]
    counters: dict[str, Count]
    clicks_late: Count
    click_coverage: float | None
    ledger: LedgerEntry
    profile: Profile
    from_example: Count
    models: dict[str, ModelScore]
    constant_logloss: float | None
    best_possible_logloss: float | None
    paired: Paired
    pairs: dict[str, Difference]
    waiting: Waiting | UnsetType = UNSET
    blend: BlendReport | UnsetType = UNSET
    baseline: BaselineNote | UnsetType = UNSET
    rolling: Window | UnsetType = UNSET
    fields: dict[str, FieldFigures] | UnsetType = UNSET
    fields_window: FieldsWindow | UnsetType = UNSET
    table: TableFigures | UnsetType = UNSET
    stalls: Count | UnsetType = UNSET
    last_half: Tail | UnsetType = UNSET
    last_quarter: Tail | UnsetType = UNSET
    window_curve: list[CurvePoint] | UnsetType = UNSET
    notes: list[str] | UnsetType = UNSET
    as_served: Summary | UnsetType = UNSET
    as_served_last_half: Summary | UnsetType = UNSET
    freshness: dict[str, Percentiles] | UnsetType = UNSET
    deltas: DeltaFigures | UnsetType = UNSET


def build_report(
    kind: Kind,
    *,
    run: str,
    state: TrainingState,
    status: SourceStatus,
    partitions: Sequence[tuple[str, int]],
    baseline: SampledBaseline | None,
    snapshot: str | None,
    published: Pointer | None,
    withheld: Sequence[str],
    seconds: float,
    events_read: int,
    profile: Mapping[str, Any],
    notes: Sequence[str],
    alarms: Sequence[Raised],
    freshness: Mapping[str, Percentiles],
    deltas: DeltaFigures | None,
    now_ms: int,
) -> Report:
    """Build the report of a run from its state and from the status of its source."""
    joiner = state.joiner
    board = state.scoreboard
    counts = joiner.counts()
    ends = kind != "report"
    rolling = board.windows.rolling_summary()
    fields = {
        "run": run,
        "kind": kind,
        "time": rfc3339(now_ms),
        "examples": state.ledger.count,
        "events": counts["impressions"] + counts["clicks"] + counts["labelled"],
        "seconds": round(seconds, 3),
        "events_per_second": round(events_read / max(seconds, 1e-9), 1),
        "event_time": rfc3339(state.last_event_ms),
        "watermark": rfc3339(joiner.watermark if joiner.watermark > NOT_YET else None),
        "pending": joiner.pending,
        "pending_bytes": joiner.nbytes,
        "lag": status.lag,
        "snapshot": snapshot,
        "published": Published.of(published) if published else None,
        "stalled": stalled_partitions(state.watermarks, partitions),
        "silent_seconds": round(status.silent_seconds, 1),
        "refused": board.judge.refused,
        "withheld": list(withheld),
        "left_out": state.left_out,
        "alarms": [
            {"name": alarm.name, "since": rfc3339(alarm.since_ms), "text": alarm.text}
            for alarm in alarms
        ],
        "counters": {
            **counts,
            **dict(sorted(state.counters.items())),
            "rejected": rejected_count(state.counters),
        },
        "clicks_late": counts["clicks_late"],
        "click_coverage": joiner.click_coverage,
        "ledger": {"count": state.ledger.count, "sum": state.ledger.sum},
        "profile": profile,
        **msgspec.to_builtins(board.whole.summary()),
    }
    if not state.ledger.count:
        fields["waiting"] = _waiting(state, status, partitions)
    if state.blend:
        fields["blend"] = state.blend.report()
    if baseline:
        fields["baseline"] = {"sample_rate": baseline.share, "note": DEVIATIONS}
    if board.served:
        fields["as_served"] = msgspec.to_builtins(board.served.summary())
        if ends:
            tail = board.served.summary(last=_TAILS["last_half"])
            fields["as_served_last_half"] = msgspec.to_builtins(tail)
    if freshness:
        fields["freshness"] = msgspec.to_builtins(freshness)
    if deltas:
        fields["deltas"] = msgspec.to_builtins(deltas)
    if rolling:
        fields["rolling"] = readable_window(rolling)
    if state.fields and (health := state.fields.summary()):
        fields |= _field_health(health)
    if ends:
        fields["stalls"] = state.watermarks.stalls
        fields |= {name: _tail(board.whole.summary(last=share)) for name, share in _TAILS.items()}
        fields["window_curve"] = joiner.window_curve()
        fields["notes"] = list(notes)
    return msgspec.convert(fields, Report)


def _field_health(health: FieldSummary) -> dict[str, Any]:
    figures = msgspec.to_builtins(health)
    window = {name: figures[name] for name in ("start_ms", "end_ms", "count")}
    bounds = {"start": rfc3339(health.start_ms), "end": rfc3339(health.end_ms)}
    return {
        "fields": figures["fields"],
        "fields_window": {**bounds, **window},
        "table": figures["table"],
    }


def _waiting(
    state: TrainingState, status: SourceStatus, partitions: Sequence[tuple[str, int]]
) -> Waiting:
    joiner = state.joiner
    lateness_ms = state.watermarks.lateness_ms
    closes_ms = joiner.label_window_ms + lateness_ms  # after the oldest impression
    oldest_ms = joiner.oldest_pending_ms
    without_event = (state.watermarks.mark == NOT_YET) & ~status.idle
    return Waiting(
        until=rfc3339(None if oldest_ms is None else oldest_ms + closes_ms),
        reached=rfc3339(joiner.watermark + lateness_ms if joiner.watermark > NOT_YET else None),
        held_by=partition_words(np.flatnonzero(without_event).tolist(), partitions),
        ready=len(state.batches),
        labelled=joiner.pending_labelled,
    )


def window_report(summary: WindowSummary, run: str) -> WindowReport:
    """Build the report of a window of a run that is final."""
    fields = {"kind": "window", "run": run, **readable_window(summary)}
    return msgspec.convert(fields, WindowReport)


def to_json_object(report: Report | WindowReport) -> dict[str, Any]:
    """Return a report as the object that is written as JSON."""
    built: dict[str, Any] = msgspec.to_builtins(report)
    return built


def readable_window(summary: WindowSummary) -> dict[str, Any]:
    """Return the summary of a window with its bounds in RFC 3339 as well."""
    return {
        "start": rfc3339(summary.start_ms),
        "end": rfc3339(summary.end_ms),
        **msgspec.to_builtins(summary),
    }


def _tail(summary: Summary) -> dict[str, Any]:
    """Return a summary whose models stand at the top as well.

    `last_half.deepfm.logloss` then reads like `models.deepfm.logloss`.
    """
    figures = msgspec.to_builtins(summary)
    return {**figures, **figures["models"]}
