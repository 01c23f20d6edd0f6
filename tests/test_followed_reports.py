"""Reports in files are read once each, also while the files grow and are rotated."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from stream_ctr.monitor.followed_reports import FollowedReports
from stream_ctr.snapshots.report_log import ReportLog, Rotation


def line(number: int) -> str:
    return json.dumps({"kind": "report", "number": number, "time": "2025-01-01T00:00:00Z"})


def numbers(followed: FollowedReports) -> list[int]:
    return [report["number"] for report in followed.read()]


def test_reports_are_read_as_they_are_written(tmp_path: Path) -> None:
    followed = FollowedReports(tmp_path)
    log = ReportLog(tmp_path)
    assert numbers(followed) == []
    log.append(line(1))
    assert numbers(followed) == [1]
    assert numbers(followed) == []
    log.append(line(2))
    log.append(line(3))
    assert numbers(followed) == [2, 3]


@given(st.lists(st.sampled_from(["write", "read"]), max_size=40), st.integers(100, 400))
def test_no_rotation_loses_a_report_or_repeats_one(
    tmp_path_factory: object, steps: list[str], size: int
) -> None:
    folder = Path(tmp_path_factory.mktemp("log"))  # type: ignore[attr-defined]
    followed = FollowedReports(folder)
    log = ReportLog(folder, Rotation(max_bytes=size, keep=100))
    read: list[int] = []
    written = 0
    for step in [*steps, "read"]:
        if step == "write":
            log.append(line(written))
            written += 1
        else:
            read += numbers(followed)
    assert read == list(range(written))


def test_only_the_newest_reports_are_read_at_first(tmp_path: Path) -> None:
    log = ReportLog(tmp_path, Rotation(max_bytes=200, keep=100))
    for number in range(20):
        log.append(line(number))
    length = len(line(15)) + 1
    assert numbers(FollowedReports(tmp_path, first_bytes=3 * length)) == [17, 18, 19]
    assert numbers(FollowedReports(tmp_path, first_bytes=3 * length - 1)) == [18, 19]
    assert numbers(FollowedReports(tmp_path, first_bytes=10**6)) == list(range(20))


def test_a_line_that_is_half_written_waits_for_its_other_half(tmp_path: Path) -> None:
    path = tmp_path / "reports.jsonl"
    followed = FollowedReports(tmp_path)
    path.write_text(line(1) + "\n" + line(2)[:20])
    assert numbers(followed) == [1]
    with path.open("a") as file:
        file.write(line(2)[20:] + "\n")
    assert numbers(followed) == [2]


def test_lines_that_are_no_reports_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "reports.jsonl").write_bytes(
        b"\xff\n[1]\nnull\n{\n" + b"[" * 100_000 + b"\n" + line(7).encode() + b"\n"
    )
    assert numbers(FollowedReports(tmp_path)) == [7]


def test_a_directory_that_is_begun_anew_is_read_from_its_beginning(tmp_path: Path) -> None:
    followed = FollowedReports(tmp_path)
    ReportLog(tmp_path).append(line(1))
    assert numbers(followed) == [1]
    (tmp_path / "reports.jsonl").rename(tmp_path / "elsewhere")
    ReportLog(tmp_path).append(line(2))
    assert numbers(followed) == [2]


def test_a_missing_directory_has_no_report(tmp_path: Path) -> None:
    assert numbers(FollowedReports(tmp_path / "none")) == []
