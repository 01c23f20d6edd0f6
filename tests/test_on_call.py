"""A frame of `top`: what stands first, that it fits, and that odd reports are drawn."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from support.odd_reports import altered

from stream_ctr.cli.on_call import OnCall
from stream_ctr.cli.overview import Answer

NOON = datetime(2025, 1, 1, 12, tzinfo=UTC)
SCORE = {
    "auc": 0.7612,
    "auc_error_bound": 0.0002,
    "logloss": 0.11234,
    "ne": 0.86,
    "pred_over_actual": 1.012,
    "ctr": 0.0312,
    "count": 60000,
}
MODELS = ["blend", "deepfm", "ftrl", "ftrl_scaled", "ftrl_pairs", "ftrl_pairs_slow", "river_ftrl"]
SCOPE: dict[str, Any] = {
    "models": dict.fromkeys(MODELS, SCORE),
    "constant_logloss": 0.14,
    "best_possible_logloss": 0.10,
}
REPORT: dict[str, Any] = {
    **SCOPE,
    "kind": "report",
    "time": "2025-01-01T11:59:58.000Z",
    "examples": 1234567,
    "events": 1300000,
    "seconds": 100.0,
    "events_per_second": 13000.0,
    "event_time": "2025-01-01T11:57:00.000Z",
    "pending": 12345,
    "pending_bytes": 2469000,
    "lag": 7,
    "snapshot": "00000012-20250101T115500Z",
    "published": {
        "snapshot": "00000012-20250101T115500Z",
        "event_time": "2025-01-01T11:44:00.000Z",
        "written": "2025-01-01T11:55:00.000Z",
    },
    "counters": {"rejected": 12, "rejected.not_json": 9, "rejected.no_time": 3},
    "click_coverage": 0.9987,
    "clicks_late": 63,
    "rolling": {**SCOPE, "start": "2025-01-01T11:00:00Z", "end": "2025-01-01T12:00:00Z"},
    "pairs": {
        name: {"logloss_difference": -0.003, "low": -0.004, "high": -0.002} for name in MODELS[1:]
    },
    "alarms": [{"name": "behind_baseline", "since": "2025-01-01T11:30:00Z", "text": "it is worse"}],
}


def frame(answer: Answer, width: int = 80, height: int = 24, **others: Any) -> list[str]:
    console = Console(width=width, height=height, force_terminal=False)
    drawn = OnCall(answer, "state", now=NOON, **others)
    lines = console.render_lines(drawn, console.options.update(height=None), pad=False)
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


def one(**fields: Any) -> Answer:
    return Answer(run="82e9e72ba7bd", model="blend", reports=[{**REPORT, **fields}])


def test_state_and_alarms_stand_first_then_the_key_figures_then_the_models() -> None:
    lines = frame(one(stalled=["clicks:0"]))
    assert lines[0] == "▲ stalled  1,234,567 examples learned, event time 2025-01-01 11:57:00"
    assert lines[1] == "run 82e9e72b · publishes blend · 2 s since report · state"
    assert lines[2] == "▲ behind baseline  30 m  it is worse"
    assert lines[3] == "▲ stalled  2 s  learning waits: the clicks of clicks:0 are overdue"
    figures = "\n".join(lines[4:11])
    for piece in (
        "lag 7",
        "freshness 11 m",
        "event time to published",
        "events/s 13,000",
        "1,300,000 read",
        "pending 12,345",
        "impressions, 2.4 MiB",
        "dead letters 12",
        "not_json 9, no_time 3",
        "clicks joined 99.87%",
        "63 too late",
        "published 00000012-20250101T115500Z · 5 m ago",
    ):
        assert piece in figures, piece
    models = [line.split()[0] for line in lines[12:] if line]
    assert [name for name in models if name in MODELS] == MODELS


@pytest.mark.parametrize("height", [10, 16, 24, 30, 60])
@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_frame_fits_the_terminal_and_begins_with_the_state(width: int, height: int) -> None:
    lines = frame(one(), width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("● learning")


def test_eighty_by_twenty_four_has_every_model_beside_two_alarms() -> None:
    lines = frame(one(stalled=["clicks:0"]))
    assert sum(line.startswith(tuple(MODELS)) for line in lines) == len(MODELS)
    assert not any("minus" in line for line in lines)
    assert any("minus" in line for line in frame(one(), height=60))


def test_a_frame_that_need_not_fit_has_everything() -> None:
    lines = frame(one(), height=5, fits=False)
    assert any("95 % interval" in line for line in lines)
    assert any("12 rejected" in line for line in lines)


def test_who_does_not_answer_is_said_with_the_age_of_the_figures() -> None:
    lines = frame(
        one(),
        problem="http://127.0.0.1:9100 does not answer",
        answered_at=NOON - timedelta(minutes=2),
    )
    assert lines[2] == "✕ http://127.0.0.1:9100 does not answer"
    assert lines[3] == "  the figures below are those of 2 m ago"


def test_a_run_that_writes_no_reports_is_said_to() -> None:
    answer = one(time="2025-01-01T11:50:00Z")
    assert "▲ the run writes no reports: the newest is 10 m old" in frame(answer)
    assert not any(
        "no reports" in line for line in frame(one(time="2025-01-01T11:50:00Z", kind="final"))
    )


def test_before_the_first_report_there_is_a_frame_too() -> None:
    lines = frame(Answer())
    assert lines[0] == "◐ starting  no report yet"
    assert "nothing is published" in "\n".join(lines)


def paths(value: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(value, dict):
        return [prefix]
    return [prefix, *(path for key in value for path in paths(value[key], (*prefix, key)))]


@settings(max_examples=60, deadline=None)
@given(
    lost=st.lists(st.sampled_from([path for path in paths(REPORT) if path]), max_size=4),
    put=st.sampled_from([None, "absent", float("nan"), True, "text", [], {}, -1, ["x"]]),
    width=st.integers(40, 160),
    height=st.integers(3, 60),
)
@pytest.mark.slow
def test_no_missing_or_odd_value_stops_a_frame(
    lost: list[tuple[str, ...]], put: object, width: int, height: int
) -> None:
    report = altered(REPORT, lost, put)
    lines = frame(Answer(reports=[report]), width, height)
    assert len(lines) <= height
    assert max(map(len, lines), default=0) <= width
