"""Reports as a table: one row for each report and model, whatever a crash left in the files."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from stream_ctr.errors import DataError
from stream_ctr.train.report_table import SCHEMA, reports

SCORE = {
    "auc": 0.7,
    "auc_error_bound": 0.001,
    "logloss": 0.25,
    "ne": 0.9,
    "pred_over_actual": 1.1,
    "ctr": 0.05,
    "count": 90,
}
OTHER = {**SCORE, "auc": None, "logloss": 0.3}
REPORT: dict[str, Any] = {
    "kind": "report",
    "examples": 100,
    "events": 120,
    "seconds": 1.5,
    "events_per_second": 80.0,
    "event_time": "2025-01-01T10:15:00.046Z",
    "watermark": None,
    "pending": 3,
    "lag": 4,
    "snapshot": "00000001-20250101T101500Z",
    "models": {"deepfm": SCORE, "ftrl": OTHER},
    "rolling": {"models": {"deepfm": {**SCORE, "auc": 0.8}}},
    "as_served": {"models": {"deepfm": {**SCORE, "logloss": 0.2}, "progressive": SCORE}},
}
WINDOW: dict[str, Any] = {
    "kind": "window",
    "start": "2025-01-01T10:00:00.000Z",
    "end": "2025-01-01T10:10:00.000Z",
    "models": {"deepfm": SCORE},
}


def write(state: Path, name: str, *lines: str) -> None:
    (state / name).write_text("".join(lines))


def line(report: dict[str, Any]) -> str:
    return json.dumps(report) + "\n"


def test_each_report_has_a_row_for_each_model(tmp_path: Path) -> None:
    write(tmp_path, "reports.jsonl", line(WINDOW), line({**REPORT, "run": "r1"}))
    table = reports(tmp_path)
    assert table.schema == SCHEMA
    window, deepfm, ftrl = table.to_pylist()
    assert (window["kind"], window["model"], window["examples"]) == ("window", "deepfm", None)
    assert window["window_start"] == datetime(2025, 1, 1, 10, tzinfo=UTC)
    assert window["event_time"] == datetime(2025, 1, 1, 10, 10, tzinfo=UTC)
    assert deepfm == {
        "run": "r1",
        "kind": "report",
        "event_time": datetime(2025, 1, 1, 10, 15, 0, 46000, tzinfo=UTC),
        "watermark": None,
        "window_start": None,
        "seconds": 1.5,
        "examples": 100,
        "events": 120,
        "events_per_second": 80.0,
        "pending": 3,
        "lag": 4,
        "snapshot": "00000001-20250101T101500Z",
        "model": "deepfm",
        "count": 90,
        "auc": 0.7,
        "logloss": 0.25,
        "ne": 0.9,
        "pred_over_actual": 1.1,
        "ctr": 0.05,
        "rolling_auc": 0.8,
        "rolling_logloss": 0.25,
        "served_auc": 0.7,
        "served_logloss": 0.2,
    }
    assert (ftrl["model"], ftrl["auc"], ftrl["rolling_auc"], ftrl["served_auc"]) == (
        "ftrl",
        *(None, None, None),
    )


def test_lines_that_a_crash_cut_short_are_left_out(tmp_path: Path) -> None:
    cut = line(REPORT)[:50]
    write(tmp_path, "reports.jsonl", line(WINDOW), cut + "\n", line(WINDOW), cut)
    assert len(reports(str(tmp_path))) == 2


def test_files_that_were_set_aside_come_before_the_newest(tmp_path: Path) -> None:
    write(tmp_path, "reports.jsonl", line({**WINDOW, "models": {"newest": SCORE}}))
    write(tmp_path, "reports-1.jsonl", line({**WINDOW, "models": {"older": SCORE}}))
    write(tmp_path, "predictions.jsonl", "{}\n")
    assert reports(tmp_path)["model"].to_pylist() == ["older", "newest"]


def test_a_new_directory_has_no_reports_and_none_is_an_error(tmp_path: Path) -> None:
    assert reports(tmp_path).num_rows == 0
    with pytest.raises(DataError, match="there is no state directory .*absent"):
        reports(tmp_path / "absent")


def test_a_line_that_is_no_report_is_named(tmp_path: Path) -> None:
    write(tmp_path, "reports.jsonl", line(WINDOW), '{"kind": }\n')
    with pytest.raises(DataError, match="reports.jsonl, line 2 is not a report"):
        reports(tmp_path)
