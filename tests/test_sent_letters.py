"""A position has one dead letter, across restarts and whatever the files have become."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from stream_ctr.snapshots.sent_letters import Position, SentLetters

LETTER = {"topic": "clicks", "partition": "2", "offset": "5", "reason": "not_json"}


def known(directory: Path, *positions: tuple[str, int, int, int | None]) -> list[bool]:
    sent = SentLetters(directory)
    return [Position(*position) in sent for position in positions]


def test_a_letter_is_known_to_the_next_run_by_record_and_event(tmp_path: Path) -> None:
    SentLetters(tmp_path).add([LETTER, {**LETTER, "offset": "7", "event": "0"}])
    assert known(
        tmp_path,
        ("clicks", 2, 5, None),
        ("clicks", 2, 7, 0),
        ("clicks", 2, 5, 0),
        ("clicks", 2, 7, None),
        ("clicks", 2, 7, 1),
        ("clicks", 1, 5, None),
        ("other", 2, 5, None),
    ) == [True, True, *[False] * 5]


def test_letters_of_the_last_two_snapshots_are_known_and_older_ones_forgotten(
    tmp_path: Path,
) -> None:
    sent = SentLetters(tmp_path)
    for offset in range(4):
        sent.add([{**LETTER, "offset": str(offset)}])
        sent.begin_file()
    sent.add([{**LETTER, "offset": "4"}])
    positions = [("clicks", 2, offset, None) for offset in range(5)]
    assert known(tmp_path, *positions) == [False, False, True, True, True]
    sent.begin_file()
    sent.begin_file()
    sent.begin_file()
    assert known(tmp_path, *positions) == [False] * 5
    assert not list(tmp_path.iterdir())


def test_letters_in_the_file_are_known_and_lines_that_are_none_passed_over(tmp_path: Path) -> None:
    lines = [
        json.dumps({**LETTER, "value_base64": "eA=="}),
        "junk",
        "[" * 100_000,
        json.dumps({**LETTER, "offset": "-1"}),
        json.dumps({**LETTER, "offset": "9" * 13}),  # beyond every offset that a place can hold
        '{"topic": "clicks", "partition": "2", "offset": "6',
    ]
    (tmp_path / "dead_letters.jsonl").write_bytes("\n".join(lines).encode() + b"\xff")
    positions = [("clicks", 2, 5, None), ("clicks", 2, 6, None)]
    assert known(tmp_path, *positions) == [True, False]


def test_a_full_disk_is_said_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "dead_letters.sent").mkdir()
    sent = SentLetters(tmp_path)
    sent.add([LETTER])
    sent.add([LETTER])
    assert caplog.text.count("dead letters may be sent twice after a restart") == 1
    assert Position("clicks", 2, 5, None) not in sent


def test_a_link_or_a_pipe_in_their_place_is_neither_followed_nor_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "target"
    target.write_text("")
    (tmp_path / "dead_letters.sent").symlink_to(target)
    SentLetters(tmp_path).add([LETTER])
    assert target.read_text() == ""
    assert "symbolic link" in caplog.text
    os.mkfifo(tmp_path / "dead_letters.sent.1")
    assert known(tmp_path, ("clicks", 2, 5, None)) == [False]
    assert "not a regular file" in caplog.text
