"""Reports of a small finished run, and a monitor over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stream_ctr.monitor.recent_reports import RecentReports
from stream_ctr.snapshots.report_log import read_reports
from support.commands import succeed
from support.finished_runs import MALFORMED, TINY, write_log


@pytest.fixture(scope="session")
def observed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state directory of a run of several models, with dead letters and windows."""
    folder = tmp_path_factory.mktemp("observed")
    log = write_log(folder)
    with log.open("ab") as file:
        file.writelines(value + b"\n" for value in MALFORMED if b"\n" not in value)
    options = ("-X", "metrics.window=60s", "-X", "baseline.enabled=false")
    succeed("run", "--source", log, "--state", folder / "state", *TINY, *options)
    return folder / "state"


def recent_reports(state: Path) -> RecentReports:
    """Return the reports of the files, as a run that resumes shows them."""
    recent = RecentReports()
    recent.add_all(read_reports(state))
    return recent


def last_of(state: Path) -> dict[str, Any]:
    """Return the last report about the run."""
    return [report for report in read_reports(state) if report["kind"] != "window"][-1]
