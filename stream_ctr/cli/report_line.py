"""The line that a run writes for each report where no table is drawn.

    report: 1,234,567 examples, 93,210 events/s, lag 12,345, event time 2025-01-01T10:15:03Z;
    logloss in the rolling window: blend 0.41250, ftrl 0.41655; snapshot 00000003-...

Before the first example the line says what the run waits for, and how fast that comes nearer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import msgspec

from stream_ctr.cli.waiting import moment, waiting_words, without_milliseconds
from stream_ctr.evaluate.summary import ModelScore
from stream_ctr.train.report import Report, Waiting, Window


class ReportLines:
    """Write a line for each report. Rates are those since the line before."""

    def __init__(self, write: Callable[[str, Mapping[str, object]], None]) -> None:
        self._write = write
        self._before: Report | None = None

    def update(self, report: Report) -> None:
        """Write the line of a report; the last report of a run has words of its own."""
        if report.kind == "report":
            before = self._before
            line = f"report: {'; '.join(_parts(report, before))}"
            self._write(line, figures(report, before))
        self._before = report


def figures(report: Report, before: Report | None = None) -> dict[str, object]:
    """Return what the JSON object of a line holds: the figures of the line."""
    scores, window = _scores(report)
    known: dict[str, object] = {
        "report": report.kind,
        "examples": report.examples,
        "events_per_second": round(_rate(report, before), 1),
        "lag": report.lag,
        "pending": report.pending,
        "event_time": report.event_time,
        "logloss": {name: score.logloss for name, score in scores.items()},
        "logloss_over": window,
        "snapshot": report.snapshot,
    }
    if isinstance(report.waiting, Waiting):
        known["waiting"] = msgspec.to_builtins(report.waiting)
    return known


def _parts(report: Report, before: Report | None) -> Iterator[str]:
    progress = [
        f"{report.examples:,} examples",
        f"{_rate(report, before):,.0f} events/s",
        f"lag {report.lag:,}",
    ]
    if report.event_time:
        progress.append(f"event time {without_milliseconds(report.event_time)}")
    yield ", ".join(progress)
    if isinstance(report.waiting, Waiting):
        yield waiting_words(report.waiting, report.pending, _speed(report, before))
    scores, window = _scores(report)
    if scores:
        named = ", ".join(f"{name} {score.logloss:.5f}" for name, score in scores.items())
        yield f"logloss of {window}: {named}"
    if report.snapshot:
        yield f"snapshot {report.snapshot}"
    yield from _alarms(report)


def _alarms(report: Report) -> Iterator[str]:
    if report.stalled:
        yield f"learning waits for the clicks of {', '.join(report.stalled)}, which are overdue"
    for reason in report.refused if report.examples else ():
        yield f"snapshots are not published: {reason}"
    for name in report.left_out:
        yield f"{name} diverged and is left out"


def _scores(report: Report) -> tuple[dict[str, ModelScore], str]:
    """Return the models with a logloss, in the rolling window or else in the run."""
    if isinstance(report.rolling, Window) and (known := _with_logloss(report.rolling.models)):
        return known, "the rolling window"
    return _with_logloss(report.models), "the run"


def _with_logloss(models: Mapping[str, ModelScore]) -> dict[str, ModelScore]:
    return {name: score for name, score in models.items() if score.logloss is not None}


def _rate(report: Report, before: Report | None) -> float:
    """Return the events a second since the report before, or of the run."""
    if before is None or report.seconds <= before.seconds:
        return report.events_per_second
    return max(0.0, (report.events - before.events) / (report.seconds - before.seconds))


def _speed(report: Report, before: Report | None) -> float | None:
    """Return the seconds of event time that pass a second, if the report before tells."""
    now, then = report.waiting, before.waiting if before else None
    if not isinstance(now, Waiting) or not isinstance(then, Waiting) or before is None:
        return None
    if now.reached is None or then.reached is None or report.seconds <= before.seconds:
        return None
    moved = (moment(now.reached) - moment(then.reached)).total_seconds()
    return moved / (report.seconds - before.seconds)
