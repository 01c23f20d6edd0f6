"""The reports in the files of a state directory, from the newest ones on.

`reports.jsonl` grows and is renamed now and then (see `snapshots.report_log`). A file is known by
its number on the disk, so a rename is followed, and no report is read twice.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from stream_ctr import state_files
from stream_ctr.snapshots.report_log import report_files

_FIRST_BYTES = 32 << 20  # of the newest reports: more than a view keeps


class FollowedReports:
    """Read the newest reports of a state directory, and then those that are added.

    At first only the last `first_bytes` of the files are read.
    """

    def __init__(self, directory: Path, *, first_bytes: int = _FIRST_BYTES) -> None:
        self._directory = directory
        self._first_bytes = first_bytes
        self._file: int | None = None  # its number on the disk
        self._read_bytes = 0  # of it

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the complete reports that were added since the last call, the oldest first."""
        paths = report_files(self._directory)
        numbers = [_number(path) for path in paths]
        if self._file is not None and self._file in numbers:
            start, at = numbers.index(self._file), self._read_bytes
        else:
            start, at = self._beginning(paths)
        for path in paths[start:]:
            yield from self._lines(path, at)
            at = 0

    def _beginning(self, paths: list[Path]) -> tuple[int, int]:
        """Return the index of the file to begin with, and where a line begins in it."""
        left = self._first_bytes
        for index in reversed(range(len(paths))):
            size = _size(paths[index])
            if size > left:
                return index, _next_line(paths[index], size - left)
            left -= size
        return 0, 0

    def _lines(self, path: Path, at: int) -> Iterator[dict[str, Any]]:
        with _opened(path) as file:
            if file is None:
                return
            file.seek(at)
            self._file, self._read_bytes = os.fstat(file.fileno()).st_ino, at
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read_bytes += len(line)
                with contextlib.suppress(msgspec.MsgspecError, RecursionError):
                    report = msgspec.json.decode(line)
                    if isinstance(report, dict):
                        yield report


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO | None]:
    """Yield the file, or None if it is not there any more."""
    try:
        fd = state_files.open_file(path, os.O_RDONLY)
    except FileNotFoundError:
        yield None
        return
    with os.fdopen(fd, "rb") as file:
        yield file


def _next_line(path: Path, at: int) -> int:
    """Return where the first line begins at `at` or after it."""
    with _opened(path) as file:
        if file is None:
            return 0
        file.seek(at - 1)
        return at - 1 + len(file.readline())


def _number(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
