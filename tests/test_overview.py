"""What on-call asks first, from reports: state, alarms, freshness, rate."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from stream_ctr.cli import overview
from stream_ctr.cli.overview import Answer

NOON = datetime(2025, 1, 1, 12, tzinfo=UTC)
WAITING = {
    "until": "2025-01-01T10:10:30.000Z",
    "reached": "2025-01-01T10:08:30.000Z",
    "held_by": [],
    "ready": 0,
}


def at(seconds: float) -> str:
    return (NOON + timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")


def report(after: float = 0.0, **fields: Any) -> dict[str, Any]:
    """A report so many seconds after noon, of events that are a minute old."""
    return {
        "kind": "report",
        "time": at(after),
        "examples": 1200,
        "event_time": at(after - 60),
        "stalled": [],
        "refused": [],
        "left_out": {},
        "silent_seconds": 0.0,
        **fields,
    }


@pytest.mark.parametrize(
    ("fields", "name", "words"),
    [
        ({}, "learning", "1,200 examples learned, event time 2025-01-01 11:59:00"),
        (
            {"waiting": WAITING, "pending": 7},
            "waiting",
            "no example yet: 7 impressions wait for their clicks; the first are learned when event "
            "time is 2025-01-01T10:10:30Z; it is 2025-01-01T10:08:30Z, 2m to go",
        ),
        ({"stalled": ["c:0"]}, "stalled", "learning waits: the clicks of c:0 are overdue"),
        ({"silent_seconds": 6.0}, "silent", "no broker has answered for 6 s"),
        ({"kind": "final"}, "ended", "all of the input is read, 1,200 examples learned"),
        (
            {"kind": "stopped"},
            "stopped",
            "1,200 examples learned; the same command resumes the run",
        ),
        ({"waiting": {"of": "another version"}}, "waiting", "no example yet"),
    ],
)
def test_each_state_has_its_words(fields: dict[str, Any], name: str, words: str) -> None:
    assert overview.state(Answer(reports=[report(**fields)])) == (name, words)


def test_a_silent_broker_is_said_before_overdue_clicks_and_the_end_before_both() -> None:
    both: dict[str, Any] = {"silent_seconds": 60.0, "stalled": ["c:0"]}
    assert overview.state(Answer(reports=[report(**both)])).name == "silent"
    assert overview.state(Answer(reports=[report(kind="final", **both)])).name == "ended"


def test_without_a_report_the_run_is_starting() -> None:
    assert overview.state(Answer()) == ("starting", "no report yet")
    assert overview.alarms(Answer()) == []


def test_where_an_alarm_says_why_the_headline_says_how_far_the_run_is() -> None:
    answer = Answer(reports=[report(stalled=["c:0"])])
    assert overview.headline(answer).words.startswith("1,200 examples learned")
    assert [alarm.text for alarm in overview.alarms(answer)] == [overview.state(answer).words]


def test_a_condition_holds_since_the_first_report_of_its_unbroken_row() -> None:
    stalled = [["c:0"], [], ["c:0"], ["c:0"], ["c:1"]]
    reports = [report(10.0 * place, stalled=each) for place, each in enumerate(stalled)]
    (alarm,) = overview.alarms(Answer(reports=reports))
    assert (alarm.name, alarm.since) == ("stalled", NOON + timedelta(seconds=20))
    assert alarm.text == "learning waits: the clicks of c:1 are overdue"


def test_an_alarm_that_the_report_lists_is_not_derived_once_more() -> None:
    listed = {"name": "stalled", "since": at(-90), "text": "clicks are overdue"}
    (alarm,) = overview.alarms(Answer(reports=[report(stalled=["c:0"], alarms=[listed])]))
    assert alarm == ("stalled", NOON - timedelta(seconds=90), "clicks are overdue")


def test_odd_alarms_are_shown_as_far_as_they_are_known() -> None:
    odd = [None, "x", {}, {"name": "psi", "since": "yesterday", "text": 3}]
    assert overview.alarms(Answer(reports=[report(alarms=odd)])) == [
        ("alarm", None, ""),
        ("psi", None, "3"),
    ]
    assert overview.alarms(Answer(reports=[report(alarms={"name": "psi"})])) == []


def test_a_refusal_before_the_first_example_is_no_alarm() -> None:
    assert overview.alarms(Answer(reports=[report(refused=["no example"], examples=0)])) == []
    (alarm,) = overview.alarms(Answer(reports=[report(refused=["worse"], left_out={})]))
    assert alarm.name == "refused"


def test_freshness_of_a_live_stream_is_event_time_to_publication() -> None:
    published = {"snapshot": "s", "event_time": at(-700), "written": at(-15)}
    fresh = overview.freshness(report(published=published))
    assert fresh == (685.0, "event time to published")


def test_freshness_is_the_median_age_of_recent_examples_if_the_report_has_it() -> None:
    published = {"snapshot": "s", "event_time": at(-700), "written": at(-15)}
    ages = {"event_to_published": {"p50": 64.5, "p90": 66.0, "p99": 70.0, "examples": 12}}
    fresh = overview.freshness(report(published=published, freshness=ages))
    assert fresh == (64.5, "event time to published, median")
    odd = report(published=published, freshness={"event_to_published": None})
    assert overview.freshness(odd) == (685.0, "event time to published")


def test_freshness_of_a_replay_is_measured_in_event_time() -> None:
    published = {"event_time": "2020-05-01T00:00:00Z", "written": at(-15)}
    replayed = report(event_time="2020-05-01T00:20:00Z", published=published)
    assert overview.freshness(replayed) == (1200.0, "event time behind learner")


def test_freshness_is_unknown_until_something_is_published() -> None:
    assert overview.freshness(report(published=None)) == (None, "nothing published")
    assert overview.freshness(report()).seconds is None
    loaded = {"name": "s", "event_time": at(-700), "written": at(-15), "loaded": True}
    answer = Answer(reports=[report()], snapshots=[loaded])
    assert overview.freshness(answer.now, overview.loaded_snapshot(answer)).seconds == 685.0


def test_the_rate_is_that_of_the_last_ten_seconds_and_at_the_end_that_of_the_run() -> None:
    before = report(seconds=10.0, events=1000, events_per_second=100.0)
    now = report(seconds=12.0, events=4000, events_per_second=333.3)
    older = [report(seconds=0.5, events=0), report(seconds=1.5, events=500)]
    assert overview.rate(Answer(reports=[*older, before, now])) == 3500 / 10.5
    assert overview.rate(Answer(reports=[before, now])) == 1500.0
    assert overview.rate(Answer(reports=[before, {**now, "kind": "final"}])) == 333.3
    resumed = {**now, "seconds": 2.0, "events_per_second": 7.0}
    assert overview.rate(Answer(reports=[before, resumed])) == 7.0
    assert overview.rate(Answer(reports=[before])) == 100.0


def snapshot(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "verdict": "published", "reasons": [], "loaded": False, **fields}


def test_the_snapshot_line_names_what_is_loaded_and_why_the_newest_is_not() -> None:
    loaded = snapshot("one", loaded=True, written=at(-30))
    refused = snapshot("two", verdict="refused", reasons=["its logloss is worse"])
    assert overview.published_words(Answer(snapshots=[loaded]), NOON) == (
        "published one · 30 s ago · verdict published",
        True,
    )
    assert overview.published_words(Answer(snapshots=[loaded, refused]), NOON) == (
        "published one · 30 s ago · newest two refused · its logloss is worse",
        False,
    )
    assert overview.published_words(Answer(), NOON) == ("nothing is published", False)


def test_reports_are_overdue_after_a_minute_and_five_usual_gaps() -> None:
    quick = Answer(reports=[report(seconds) for seconds in (-30, -20, -10, 0)])
    slow = Answer(reports=[report(seconds) for seconds in (-1800, -1200, -600, 0)])
    after = {
        minutes: [
            overview.is_overdue(each, NOON + timedelta(minutes=minutes)) for each in (quick, slow)
        ]
        for minutes in (0.9, 1, 49, 50)
    }
    assert after == {
        0.9: [False, False],
        1: [True, False],
        49: [True, False],
        50: [True, True],
    }
    assert not overview.is_overdue(Answer(reports=[report(-9000, kind="final")]), NOON)
    assert not overview.is_overdue(Answer(), NOON)
