"""The reports of a state directory, across the rotation of their file."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_ctr.snapshots.report_log import ReportLog, Rotation, read_reports, report_files


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1_767_225_600.0

    def __call__(self) -> float:
        return self.now


def report(n: int, clock: Clock | None = None) -> str:
    moment = datetime.fromtimestamp(clock.now if clock else 0, UTC)
    return json.dumps({"n": n, "time": moment.isoformat().replace("+00:00", "Z")})


def numbers(directory: Path) -> list[int]:
    return [found["n"] for found in read_reports(directory)]


def names(directory: Path) -> list[str]:
    return [path.name for path in report_files(directory)]


def test_a_large_file_gets_a_number_and_readers_read_on(tmp_path: Path) -> None:
    log = ReportLog(tmp_path, Rotation(max_bytes=3 * (len(report(0)) + 1)))
    for n in range(8):
        log.append(report(n))
    assert names(tmp_path) == ["reports-00000001.jsonl", "reports-00000002.jsonl", "reports.jsonl"]
    assert [len(path.read_text().splitlines()) for path in report_files(tmp_path)] == [3, 3, 2]
    assert numbers(tmp_path) == list(range(8))


def test_an_old_file_gets_a_number_even_if_another_run_began_it(tmp_path: Path) -> None:
    clock = Clock()
    rotation = Rotation(max_seconds=100)
    for n in range(5):
        ReportLog(tmp_path, rotation, clock=clock).append(report(n, clock))
        clock.now += 40
    assert [len(path.read_text().splitlines()) for path in report_files(tmp_path)] == [3, 2]
    assert numbers(tmp_path) == list(range(5))


def test_a_file_without_a_time_is_as_old_as_the_run(tmp_path: Path) -> None:
    (tmp_path / "reports.jsonl").write_text('{"kind": "window"}\n{"n": ')
    clock = Clock()
    log = ReportLog(tmp_path, Rotation(max_seconds=100), clock=clock)
    log.append(report(1, clock))
    assert names(tmp_path) == ["reports.jsonl"]
    clock.now += 100
    log.append(report(2, clock))
    assert len(names(tmp_path)) == 2
    assert [found.get("n") for found in read_reports(tmp_path)] == [None, 1, 2]


def test_the_oldest_files_beyond_a_number_are_removed(tmp_path: Path) -> None:
    log = ReportLog(tmp_path, Rotation(max_bytes=1, keep=2))
    for n in range(6):
        log.append(report(n))
    assert names(tmp_path) == ["reports-00000004.jsonl", "reports-00000005.jsonl", "reports.jsonl"]
    assert numbers(tmp_path) == [3, 4, 5]


@given(cut=st.integers(0, 200))
def test_a_report_that_a_crash_cut_short_is_left_out_wherever_it_stands(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    directory = tmp_path_factory.mktemp("cut")
    whole = "".join(report(n) + "\n" for n in range(3))
    (directory / "reports.jsonl").write_text(whole[:cut])
    complete = whole[:cut].count("\n")
    log = ReportLog(directory, Rotation(max_bytes=max(1, cut)))
    log.append(report(7))
    log.append(report(8))
    assert numbers(directory) == [*range(complete), 7, 8]


def test_a_crash_in_a_rotation_loses_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = ReportLog(tmp_path, Rotation(max_bytes=1))
    log.append(report(0))
    rename = Path.rename

    def killed(path: Path, target: Any) -> Path:
        rename(path, target)
        raise KeyboardInterrupt  # as far as files go, kill -9 at this place

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            log.append(report(1))
    assert numbers(tmp_path) == [0]
    ReportLog(tmp_path, Rotation(max_bytes=1)).append(report(1))
    assert numbers(tmp_path) == [0, 1]


def test_a_file_that_is_rotated_while_it_is_read_is_read_once(tmp_path: Path) -> None:
    log = ReportLog(tmp_path, Rotation(max_bytes=1))
    log.append(report(0))
    log.append(report(1))
    reading = read_reports(tmp_path)
    assert next(reading)["n"] == 0
    log.append(report(2))
    log.append(report(3))
    assert [found["n"] for found in reading] == [1, 2, 3]
