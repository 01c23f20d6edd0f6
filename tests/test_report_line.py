"""The line of a report: rates, losses, and what a run without an example waits for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import UNSET
from msgspec.structs import replace
from support.commands import succeed
from support.lineage import QUICK, reports

from stream_ctr.cli.report_line import ReportLines
from stream_ctr.cli.waiting import waiting_words
from stream_ctr.train.report import Report, Waiting

WAITING = Waiting(
    until="2025-01-01T10:10:30.000Z", reached="2025-01-01T10:00:30.000Z", held_by=[], ready=0
)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the state of a run whose first label window is longer than its log."""
    folder = tmp_path_factory.mktemp("waiting")
    log = folder / "sim.jsonl"
    succeed("simulate", "--impressions", 2000, "--out", log)
    every = ("-X", "schedule.report_every=1ms", "-X", "schedule.snapshot_every=1ms")
    window = ("-X", "join.label_window=1d")
    succeed("run", "--source", log, "--state", folder / "state", *QUICK, *every, *window)
    return folder / "state"


@pytest.fixture(scope="module")
def waiting(state: Path) -> Report:
    """Return a report of that run from before it had learned anything."""
    found = next(found for found in reports(state) if found["examples"] == 0 < found["pending"])
    return msgspec.convert(found, Report)


def lines_of(*given: Report) -> list[str]:
    written: list[str] = []

    def write(text: str, figures: Mapping[str, object]) -> None:
        written.append(text)

    lines = ReportLines(write)
    for report in given:
        lines.update(report)
    return written


def moved(report: Report, seconds: float, **changes: Any) -> Report:
    return replace(report, seconds=report.seconds + seconds, **changes)


def test_a_run_without_an_example_reports_what_it_waits_for(waiting: Report) -> None:
    assert waiting.examples == 0
    assert isinstance(waiting.waiting, Waiting)
    # A day after the first impression, and 30 s for late events.
    assert str(waiting.waiting.until).startswith("2025-01-02T00:00:30.")
    (line,) = lines_of(waiting)
    assert "no example yet: 2,000 impressions wait for their clicks; the first are" in line
    assert "event time is 2025-01-02T00:00:30Z" in line


def test_a_run_that_has_learned_waits_for_nothing(state: Path) -> None:
    learned = [found for found in reports(state) if found.get("examples")]
    assert learned
    assert not any("waiting" in found for found in learned)


def test_no_snapshot_is_from_1970(state: Path) -> None:
    names = {found["snapshot"] for found in reports(state) if found.get("snapshot")}
    assert len(names) > 1  # some from before the first example, or even the first event
    days = {name.partition("-")[2][:8] for name in names}
    assert "20250101" in days
    assert "19700101" not in days


def test_the_speed_of_event_time_is_that_between_two_lines(waiting: Report) -> None:
    first = replace(waiting, waiting=WAITING)
    later = replace(WAITING, reached="2025-01-01T10:00:50.000Z")
    _, line = lines_of(first, moved(first, 10.0, waiting=later))
    assert line.endswith(
        "it is 2025-01-01T10:00:50Z, 9m40s to go, at 2.0 s a second in about 4m50s"
    )
    _, line = lines_of(first, moved(first, 10.0))
    assert line.endswith("10m to go, and it stands still")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"until": None}, "no example yet: waiting for the first impression"),
        (
            {"labelled": 7},
            "no example yet: 7 labelled examples wait for those before them; the first are learned "
            "when event time is 2025-01-01T10:10:30Z; it is 2025-01-01T10:00:30Z, 10m to go",
        ),
        ({"ready": 12}, "no example yet: 12 wait for a full batch (learn.batch_size)"),
        (
            {"held_by": [f"clicks:{n}" for n in range(5)]},
            "clicks:0, clicks:1, clicks:2 and 2 others brought no event yet, and no longer counts "
            "after join.idle_timeout without one",
        ),
    ],
)
def test_words_for_everything_that_is_waited_for(changes: dict[str, Any], expected: str) -> None:
    assert waiting_words(replace(WAITING, **changes), 7).endswith(expected)


def test_the_rate_is_that_since_the_line_before(waiting: Report) -> None:
    first = replace(waiting, events=1000, events_per_second=77.0)
    then = moved(first, 4.0, events=1200)
    assert [line.split(", ")[1] for line in lines_of(first, then)] == ["77 events/s", "50 events/s"]


def test_the_last_report_has_words_of_its_own(waiting: Report) -> None:
    assert lines_of(replace(waiting, kind="final"), replace(waiting, kind="stopped")) == []


def test_what_keeps_a_run_from_learning_or_publishing_is_in_the_line(waiting: Report) -> None:
    (line,) = lines_of(
        replace(
            waiting,
            examples=9,
            waiting=UNSET,
            stalled=["clicks:1"],
            refused=["worse"],
            left_out={"fm": "diverged"},
        )
    )
    assert line.endswith(
        "learning waits for the clicks of clicks:1, which are overdue; "
        "snapshots are not published: worse; fm diverged and is left out"
    )
