"""The reports of a state directory: `reports.jsonl`, and the files that came before it.

    reports-00000001.jsonl, reports-00000002.jsonl, ..., reports.jsonl

When `reports.jsonl` is large or old enough it gets the next number, in one rename, and the next
report begins another file. So a crash at any moment leaves every report in exactly one file. The
oldest files beyond a number are removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from stream_ctr import state_files
from stream_ctr.snapshots.line_file import LineFile

_CURRENT = "reports.jsonl"
_ROTATED = re.compile(r"reports-(\d{8,})\.jsonl")
_LOOKED_AT_BYTES = 1 << 20  # of the beginning of a file, for the time of its first report


@dataclass(frozen=True, slots=True)
class Rotation:
    """When another file of reports begins, and how many of those before stay."""

    max_bytes: int = 64 << 20
    max_seconds: float = 30 * 86400.0
    keep: int = 10


class ReportLog:
    """Append reports to `reports.jsonl` in `directory`, and rotate it."""

    def __init__(
        self,
        directory: Path,
        rotation: Rotation | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._rotation = rotation or Rotation()
        self._clock = clock
        self._file = LineFile(directory / _CURRENT)
        self._began: float | None = None

    @property
    def path(self) -> Path:
        """The file that gets the next report."""
        return self._file.path

    def append(self, line: str) -> None:
        """Append a line. Raises `OSError`, with the files as they were, if it cannot be written."""
        if self._is_due(len(line)):
            self._rotate()
        self._file.append(line)

    def sync(self) -> None:
        """Wait until all reports are on disk. Another thread may call this."""
        self._file.sync()

    def _is_due(self, more_bytes: int) -> bool:
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            self._began = None
            return False
        if not size:
            return False
        if self._began is None:
            self._began = _first_time(self.path) or self._clock()
        too_old = self._clock() - self._began >= self._rotation.max_seconds
        return too_old or size + more_bytes > self._rotation.max_bytes

    def _rotate(self) -> None:
        rotated = _rotated(self._directory)
        number = 1 + max(rotated, default=0)
        self._file.sync()
        self.path.rename(self._directory / f"reports-{number:08d}.jsonl")
        self._began = None
        for old in sorted([*rotated, number])[: -self._rotation.keep]:
            with contextlib.suppress(OSError):  # the next rotation tries again
                (self._directory / f"reports-{old:08d}.jsonl").unlink()


def report_files(directory: Path) -> list[Path]:
    """Return the files of reports in a state directory, the oldest first."""
    rotated = _rotated(directory)
    current = directory / _CURRENT
    before = [rotated[number] for number in sorted(rotated)]
    return [*before, current] if current.exists() else before


def read_reports(directory: Path) -> Iterator[dict[str, Any]]:
    """Yield the reports of a state directory, the oldest first, across all of its files.

    A line that a crash cut short is left out. A file that is rotated while it is read is read once.
    """
    seen: set[int] = set()
    while True:
        moved = False
        for path in report_files(directory):
            try:
                file = os.fdopen(state_files.open_file(path, os.O_RDONLY), "rb")
            except FileNotFoundError:
                moved = True
                continue
            with file:
                number = os.fstat(file.fileno()).st_ino
                if number not in seen:
                    seen.add(number)
                    yield from _complete(file)
                    moved = True
                    break
        if not moved:
            return


def _complete(file: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in file:
        with contextlib.suppress(ValueError):
            report = json.loads(line)
            if line.endswith(b"\n") and isinstance(report, dict):
                yield report


def _rotated(directory: Path) -> dict[int, Path]:
    """Return the files before the current one by number."""
    found = {}
    for path in directory.glob("reports-*.jsonl"):
        if match := _ROTATED.fullmatch(path.name):
            found[int(match[1])] = path
    return found


def _first_time(path: Path) -> float | None:
    """Return the time of the first report in a file that has one, in epoch seconds."""
    with os.fdopen(state_files.open_file(path, os.O_RDONLY), "rb") as file:
        for line in file.read(_LOOKED_AT_BYTES).splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                return datetime.fromisoformat(json.loads(line)["time"]).timestamp()
    return None
