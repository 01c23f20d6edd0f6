"""What a person on call asks first of a run: its state, its alarms, how fresh its model is.

    answer (reports, snapshots)  ->  state, alarms, freshness, rate, dead letters, snapshot words

Pure: an answer in, words and numbers out. It reads the JSON objects of reports, also those of other
versions: what is missing or odd is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple

import msgspec

from stream_ctr.cli.waiting import waiting_words

Report = Mapping[str, Any]
StateName = Literal["learning", "waiting", "stalled", "silent", "ended", "stopped", "starting"]

SILENT_SECONDS = 5.0  # without an answer from any broker, before it is an alarm
_REPLAY_SECONDS = 86400.0  # event time this far behind the clock: the clock tells no age
_RATE_SECONDS = 10.0  # the least that a rate of now is taken over
_OVERDUE_SECONDS = 60.0  # the least age of a report that is overdue
_OVERDUE_GAPS = 5  # and the least, in usual gaps between two reports


@dataclass(frozen=True, slots=True)
class Answer:
    """What is known of a run: its reports but those of windows, and its snapshots, newest last."""

    run: str | None = None
    model: str | None = None
    reports: Sequence[Report] = ()
    snapshots: Sequence[Report] = ()

    @property
    def now(self) -> Report:
        """The newest report, empty if there is none."""
        return self.reports[-1] if self.reports else {}

    @property
    def ended(self) -> bool:
        """Whether the newest report is the last one of a run."""
        return self.now.get("kind") in ("final", "stopped")


class Waiting(msgspec.Struct, frozen=True):
    """What a run without an example waits for, as a report has it."""

    until: str | None
    reached: str | None
    held_by: list[str]
    ready: int
    labelled: int = 0  # an older report lacks it


class State(NamedTuple):
    """The state of a run, and a sentence about it."""

    name: StateName
    words: str


class Alarm(NamedTuple):
    """An alarm that holds, since a time of the machine's clock if that is known."""

    name: str
    since: datetime | None
    text: str


class Freshness(NamedTuple):
    """How old the published model is, in seconds, and from what to what."""

    seconds: float | None
    words: str


def state(answer: Answer) -> State:
    """Return the state of a run.

    >>> state(Answer(reports=[{"kind": "report", "examples": 1200, "stalled": ["clicks:0"]}]))
    State(name='stalled', words='learning waits: the clicks of clicks:0 are overdue')
    """
    now = answer.now
    if not now:
        return State("starting", "no report yet")
    examples = _counted(now.get("examples"), "examples")
    if now.get("kind") == "stopped":
        return State("stopped", f"{examples} learned; the same command resumes the run")
    if now.get("kind") == "final":
        return State("ended", f"all of the input is read, {examples} learned")
    if silent := _silent_words(now):
        return State("silent", silent)
    if stalled := _stalled_words(now):
        return State("stalled", stalled)
    if waiting := _waiting_words(now):
        return State("waiting", waiting)
    return State("learning", progress(now))


def headline(answer: Answer) -> State:
    """Return the state, with the progress as its words where an alarm says the rest."""
    known = state(answer)
    if known.name in {alarm.name for alarm in alarms(answer)}:
        return State(known.name, progress(answer.now))
    return known


def progress(report: Report) -> str:
    """Return how far a run has come.

    >>> progress({"examples": 1200, "event_time": "2025-01-01T00:10:00.046Z"})
    '1,200 examples learned, event time 2025-01-01 00:10:00'
    """
    examples = _counted(report.get("examples"), "examples")
    return f"{examples} learned, event time {seconds_only(report.get('event_time'))}"


def alarms(answer: Answer) -> list[Alarm]:
    """Return the alarms that hold: those of the newest report, and what it says by itself.

    >>> first = {"time": "2025-01-01T00:00:00Z", "refused": ["its logloss is worse"], "examples": 9}
    >>> [alarm] = alarms(Answer(reports=[first, {**first, "time": "2025-01-01T00:01:00Z"}]))
    >>> alarm.text, alarm.since.isoformat()
    ('snapshots are not published: its logloss is worse', '2025-01-01T00:00:00+00:00')
    """
    listed = answer.now.get("alarms")
    named = [
        Alarm(str(each.get("name", "alarm")), moment(each.get("since")), str(each.get("text", "")))
        for each in (listed if isinstance(listed, list) else [])
        if isinstance(each, Mapping)
    ]
    known = {alarm.name for alarm in named}
    derived = [
        Alarm(name, _held_since(answer.reports, words), text)
        for name, words in _CONDITIONS.items()
        if name not in known and (text := words(answer.now))
    ]
    return [*named, *derived]


def _held_since(reports: Sequence[Report], words: Callable[[Report], str]) -> datetime | None:
    """Return the time of the first report of the unbroken row in which a condition holds."""
    first = len(reports) - 1
    while first > 0 and words(reports[first - 1]):
        first -= 1
    return moment(reports[first].get("time")) if reports else None


def _silent_words(report: Report) -> str:
    silent = number(report.get("silent_seconds"))
    if silent is None or silent < SILENT_SECONDS:
        return ""
    return f"no broker has answered for {silent:.0f} s"


def _stalled_words(report: Report) -> str:
    stalled = report.get("stalled")
    if not isinstance(stalled, list) or not stalled:
        return ""
    return f"learning waits: the clicks of {', '.join(map(str, stalled))} are overdue"


def _refused_words(report: Report) -> str:
    refused = report.get("refused")
    if not isinstance(refused, list) or not refused or not number(report.get("examples")):
        return ""
    return f"snapshots are not published: {'; '.join(map(str, refused))}"


def _left_out_words(report: Report) -> str:
    names = list(mapping(report, "left_out"))
    if not names:
        return ""
    return f"{' and '.join(names)} diverged and {'is' if len(names) == 1 else 'are'} left out"


_CONDITIONS: Mapping[str, Callable[[Report], str]] = {
    "silent": _silent_words,
    "stalled": _stalled_words,
    "refused": _refused_words,
    "left_out": _left_out_words,
}


def _waiting_words(report: Report) -> str:
    waiting = mapping(report, "waiting")
    if not waiting:
        return ""
    try:
        known = msgspec.convert(waiting, Waiting)
        return waiting_words(known, int(number(report.get("pending")) or 0))
    except (msgspec.ValidationError, ValueError):  # of another version
        return "no example yet"


def loaded_snapshot(answer: Answer) -> Report:
    """Return the snapshot that subscribers load, of the list or of the newest report."""
    named = mapping(answer.now, "published")
    return next((each for each in answer.snapshots if each.get("loaded") is True), named)


def freshness(report: Report, published: Report | None = None) -> Freshness:
    """Return how long recent examples took from the event until a model with them was published.

    It is the median that the report has. Without it, it is the time from the event of the last
    example of the `published` snapshot, by default that of the report, until it was written. The
    event time of a replay says nothing about the clock, so there it is how far, in event time, the
    learner is ahead.

    >>> freshness({"time": "2025-01-01T00:09:00Z", "event_time": "2025-01-01T00:08:00Z",
    ...            "published": {"event_time": "2025-01-01T00:05:00Z",
    ...                          "written": "2025-01-01T00:05:40Z"}})
    Freshness(seconds=40.0, words='event time to published')
    """
    published = published or mapping(report, "published")
    event, written = moment(published.get("event_time")), moment(published.get("written"))
    reached, now = moment(report.get("event_time")), moment(report.get("time"))
    if event is None:
        return Freshness(None, "nothing published")
    if reached and now and abs((now - reached).total_seconds()) > _REPLAY_SECONDS:
        return Freshness((reached - event).total_seconds(), "event time behind learner")
    median = number(mapping(mapping(report, "freshness"), "event_to_published").get("p50"))
    if median is not None:
        return Freshness(median, "event time to published, median")
    seconds = (written - event).total_seconds() if written else None
    return Freshness(seconds, "event time to published")


def rate(answer: Answer) -> float | None:
    """Return the events a second over the newest reports that span some seconds.

    If the run has ended, it is the rate of the run.

    >>> beats = [{"seconds": seconds, "events": 100 * seconds} for seconds in (1.0, 9.0, 12.0)]
    >>> rate(Answer(reports=beats))
    100.0
    """
    now = answer.now
    before = None if answer.ended else _some_seconds_before(answer.reports)
    if before is None:
        return number(now.get("events_per_second"))
    events = (number(now.get("events")) or 0) - (number(before.get("events")) or 0)
    return max(0.0, events / (now["seconds"] - before["seconds"]))


def _some_seconds_before(reports: Sequence[Report]) -> Report | None:
    """Return the newest report of the same process that is some seconds older, or its oldest."""
    if not reports or (end := number(reports[-1].get("seconds"))) is None:
        return None
    later, found = end, None
    for report in reversed(reports[:-1]):
        seconds = number(report.get("seconds"))
        if seconds is None or seconds >= later:
            break
        later, found = seconds, report
        if end - seconds >= _RATE_SECONDS:
            break
    return found


def dead_letters(report: Report) -> dict[str, int]:
    """Return the malformed records by reason, the most frequent first.

    >>> dead_letters({"counters": {"rejected": 5, "rejected.no_time": 2, "rejected.not_json": 3}})
    {'not_json': 3, 'no_time': 2}
    """
    counters = mapping(report, "counters")
    found = {
        name.removeprefix("rejected."): int(count)
        for name in counters
        if name.startswith("rejected.") and (count := number(counters[name])) is not None
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def published_words(answer: Answer, now: datetime) -> tuple[str, bool]:
    """Return which snapshot subscribers load and the verdict on the newest, and if it is good."""
    loaded = loaded_snapshot(answer)
    name = loaded.get("name") or loaded.get("snapshot")
    parts = [f"published {name}" if name else "nothing is published"]
    if written := moment(loaded.get("written")):
        parts.append(f"{duration(max(0.0, (now - written).total_seconds()))} ago")
    newest: Report = answer.snapshots[-1] if answer.snapshots else {}
    verdict = newest.get("verdict")
    if newest and newest.get("name") != name:
        parts.append(f"newest {newest.get('name')} {verdict}")
    elif verdict:
        parts.append(f"verdict {verdict}")
    reasons = newest.get("reasons")
    if verdict != "published" and isinstance(reasons, Sequence) and not isinstance(reasons, str):
        parts += ["; ".join(map(str, reasons))] if reasons else []
    return " · ".join(parts), bool(name) and verdict != "refused"


def report_age(answer: Answer, now: datetime) -> float | None:
    """Return the seconds since the newest report was written."""
    written = moment(answer.now.get("time"))
    return None if written is None else max(0.0, (now - written).total_seconds())


def is_overdue(answer: Answer, now: datetime) -> bool:
    """Tell whether a run that has not ended writes no reports any more.

    >>> beats = [{"time": f"2025-01-01T00:00:{second}Z"} for second in (10, 20, 30)]
    >>> [is_overdue(Answer(reports=beats), datetime.fromisoformat(f"2025-01-01T00:0{minute}:00Z"))
    ...  for minute in (1, 2)]
    [False, True]
    """
    age = report_age(answer, now)
    times = [known for each in answer.reports if (known := moment(each.get("time")))]
    gaps = sorted(
        (later - time).total_seconds() for time, later in zip(times, times[1:], strict=False)
    )
    usual = gaps[len(gaps) // 2] if gaps else 0.0
    late = max(_OVERDUE_SECONDS, _OVERDUE_GAPS * usual)
    return age is not None and not answer.ended and age >= late


# -- reading and writing values ------------------------------------------------------------------


def mapping(known: Report, key: str) -> Report:
    """Return the object under `key`, empty if there is none."""
    value = known.get(key)
    return value if isinstance(value, Mapping) else {}


def number(value: object) -> int | float | None:
    """Return a finite number, and None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def moment(value: object) -> datetime | None:
    """Return a time with its zone, written as RFC 3339, and None for anything else."""
    try:
        known = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return None
    return known if known and known.tzinfo else None


def seconds_only(value: object) -> str:
    """Return a moment of a report without its milliseconds and its T, a dash for none.

    >>> seconds_only("2025-01-01T00:10:00.046Z")
    '2025-01-01 00:10:00'
    """
    known = moment(value)
    return f"{known:%Y-%m-%d %H:%M:%S}" if known else "–"


def duration(seconds: float | None) -> str:
    """Return a length of time in its two largest units, a dash for none.

    >>> [duration(each) for each in (0.25, 12.4, 75.2, 3720, 90061, None)]
    ['0.2 s', '12 s', '1 m 15 s', '1 h 2 m', '1 d 1 h', '–']
    """
    if seconds is None:
        return "–"
    if abs(seconds) < 10 and seconds != round(seconds):
        return f"{seconds:.1f} s"
    rest = round(abs(seconds))
    parts: list[tuple[int, str]] = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        units, rest = divmod(rest, size)
        if units or parts:
            parts.append((units, unit))
    words = " ".join(f"{units} {unit}" for units, unit in parts[:2] if units)
    return f"{'-' if seconds < 0 else ''}{words or '0 s'}"


def bytes_words(count: float | None) -> str:
    """Return a number of bytes in a binary unit.

    >>> bytes_words(512), bytes_words(1_694_400)
    ('512 B', '1.6 MiB')
    """
    if count is None:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"


def _counted(value: object, noun: str) -> str:
    known = number(value)
    return f"{0 if known is None else known:,.0f} {noun}"
