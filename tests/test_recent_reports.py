"""The newest reports are kept, in order, and a view that a reader holds never changes."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from stream_ctr.monitor.recent_reports import (
    MOST_REPORTS,
    MOST_WINDOWS,
    RecentReports,
    View,
)


def report(number: int, kind: str = "report") -> dict[str, Any]:
    return {"kind": kind, "run": "ab", "examples": number, "models": {"deepfm": {}, "ftrl": {}}}


def window(start_ms: int, count: int = 0) -> dict[str, Any]:
    return {"kind": "window", "start_ms": start_ms, "count": count}


def decoded(view: View) -> tuple[list[Any], list[Any]]:
    return [json.loads(kept.data) for kept in view.reports], [
        json.loads(kept.data) for kept in view.windows
    ]


def test_a_view_holds_the_reports_as_they_were_written() -> None:
    recent = RecentReports()
    written = [report(1), window(0), report(2, "final")]
    recent.add_all(written)
    assert decoded(recent.view) == ([written[0], written[2]], [written[1]])
    assert recent.view.latest == written[2]
    assert (recent.view.run, recent.view.model, recent.view.ended) == ("ab", "deepfm", True)


def test_a_view_that_a_reader_holds_does_not_change() -> None:
    recent = RecentReports()
    recent.add(report(1))
    held = recent.view
    recent.add_all([report(2), window(0)])
    assert decoded(held) == ([report(1)], [])
    assert held is not recent.view


def test_the_oldest_reports_go() -> None:
    recent = RecentReports()
    recent.add_all(report(number) for number in range(MOST_REPORTS + 5))
    recent.add_all(window(start) for start in range(MOST_WINDOWS + 7))
    reports, windows = decoded(recent.view)
    assert [each["examples"] for each in reports] == list(range(5, MOST_REPORTS + 5))
    assert [each["start_ms"] for each in windows] == list(range(7, MOST_WINDOWS + 7))


@given(st.lists(st.integers(0, 20)))
def test_windows_are_in_order_and_the_last_report_of_each_counts(starts: list[int]) -> None:
    recent = RecentReports()
    recent.add_all(window(start, count) for count, start in enumerate(starts))
    newest = {start: count for count, start in enumerate(starts)}
    assert [(each["start_ms"], each["count"]) for each in decoded(recent.view)[1]] == sorted(
        newest.items()
    )


def test_a_run_that_goes_on_has_not_ended() -> None:
    recent = RecentReports()
    recent.add(report(1, "stopped"))
    assert recent.view.ended
    recent.go_on()
    assert not recent.view.ended
    assert decoded(recent.view)[0] == [report(1, "stopped")]


def test_what_is_no_report_is_left_out() -> None:
    recent = RecentReports("ab")
    recent.add_all([{}, {"kind": "else"}, {"kind": "window"}, {"kind": "window", "start_ms": "x"}])
    assert decoded(recent.view) == ([], [])
    assert (recent.view.model, recent.view.latest) == ("", None)


def test_a_report_without_models_names_none() -> None:
    recent = RecentReports()
    recent.add({"kind": "report", "run": 7, "models": []})
    assert (recent.view.run, recent.view.model) == ("", "")


def test_the_age_of_the_last_beat_is_known() -> None:
    now = 10.0
    recent = RecentReports(clock=lambda: now)
    assert recent.beat_age is None
    recent.beat()
    now = 12.5
    assert recent.beat_age == 2.5
