"""The reports of a run as one Arrow table, a row for each report and model.

run                     the id of the run, where the reports have one
kind                    report, final, stopped or window
event_time, watermark   of the report; a window has its end as event_time
window_start            of a window, else null
seconds                 the age of the run
examples, events        of the run so far; null for a window
events_per_second, pending, lag, snapshot
model                   the name of the model
count                   the examples that the following figures are of
auc, logloss, ne, pred_over_actual, ctr
rolling_auc, rolling_logloss    of the newest windows
served_auc, served_logloss      of the snapshot that was published (see `Report.as_served`)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from stream_ctr.errors import DataError

_MOMENT = pa.timestamp("ms", "UTC")
_FIGURES = ("auc", "logloss", "ne", "pred_over_actual", "ctr")
SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("kind", pa.string()),
        ("event_time", _MOMENT),
        ("watermark", _MOMENT),
        ("window_start", _MOMENT),
        ("seconds", pa.float64()),
        ("examples", pa.int64()),
        ("events", pa.int64()),
        ("events_per_second", pa.float64()),
        ("pending", pa.int64()),
        ("lag", pa.int64()),
        ("snapshot", pa.string()),
        ("model", pa.string()),
        ("count", pa.int64()),
        *((name, pa.float64()) for name in _FIGURES),
        ("rolling_auc", pa.float64()),
        ("rolling_logloss", pa.float64()),
        ("served_auc", pa.float64()),
        ("served_logloss", pa.float64()),
    ]
)
"""The columns of the table."""

_COPIED = ("run", "kind", "seconds", "examples", "events", "events_per_second", "pending", "lag")


def reports(state: str | Path) -> pa.Table:
    """Return the reports in a state directory, oldest first, with the columns of `SCHEMA`.

    A line that a crash cut short is left out. Raises `DataError` if there is no such directory, or
    if a whole line is not a report.
    """
    directory = Path(state)
    if not directory.is_dir():
        raise DataError(f"there is no state directory {directory}")
    rows = [
        row for path in report_files(directory) for report in _read(path) for row in _rows(report)
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def report_files(directory: Path) -> list[Path]:
    """Return the files of reports in a state directory, the oldest first."""
    found = [path for path in directory.glob("reports*.jsonl*") if path.is_file()]
    return sorted(found, key=lambda path: (path.name == "reports.jsonl", path.stat().st_mtime_ns))


def _read(path: Path) -> Iterator[Mapping[str, Any]]:
    whole, _, _ = path.read_text("utf-8").rpartition("\n")
    for number, line in enumerate(whole.splitlines(), start=1):
        if not line.endswith("}"):  # a crash cut it short, and the next run began a new line
            continue
        try:
            report = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not a report: {error}") from None
        if isinstance(report, dict) and "kind" in report:
            yield report


def _rows(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    is_window = report["kind"] == "window"
    common = {
        **{name: report.get(name) for name in _COPIED},
        "event_time": _moment(report.get("end" if is_window else "event_time")),
        "watermark": _moment(report.get("watermark")),
        "window_start": _moment(report.get("start")),
        "snapshot": report.get("snapshot"),
    }
    rolling = report.get("rolling", {}).get("models", {})
    served = report.get("as_served", {}).get("models", {})
    for model, score in report.get("models", {}).items():
        yield {
            **common,
            "model": model,
            "count": score["count"],
            **{name: score[name] for name in _FIGURES},
            "rolling_auc": rolling.get(model, {}).get("auc"),
            "rolling_logloss": rolling.get(model, {}).get("logloss"),
            "served_auc": served.get(model, {}).get("auc"),
            "served_logloss": served.get(model, {}).get("logloss"),
        }


def _moment(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
