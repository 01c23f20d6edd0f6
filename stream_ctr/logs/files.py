"""Find the files of a log: names, patterns, directories and standard input."""

from __future__ import annotations

import glob
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from stream_ctr.errors import DataError
from stream_ctr.messages import is_utf8, nearest, one_line

STANDARD_INPUT = "-"
_PATTERN = "*?["


class NoSuchLog(DataError):
    """A source names no file."""


@dataclass(frozen=True, slots=True)
class LogFile:
    """A file of a log, and the name that it has in messages and in the identity of the log."""

    path: Path
    name: str


def find_files(sources: Iterable[Path | str]) -> list[LogFile]:
    """Return the files that `sources` name, in order.

    A source is a file, a pattern such as `logs/*.csv` (`**` matches directories of any depth), a
    directory, or `-` for standard input, which is copied to a temporary file because a log is read
    more than once. The files of a pattern or a directory come in the order of their names. A
    directory is searched to its depth, without files whose names begin with a dot or an underscore.

    Raises `DataError` when a source names no file, or when a file is named twice.
    """
    files = [file for source in sources for file in _files_of(str(source))]
    seen: set[Path] = set()
    for file in files:
        resolved = file.path.resolve()
        if resolved in seen:
            raise DataError(f"{one_line(file.name)} is named twice; a log is read once in a run")
        seen.add(resolved)
    return files


def _files_of(source: str) -> Sequence[LogFile]:
    if source == STANDARD_INPUT:
        return [_standard_input()]
    if not source:
        raise DataError("the name of a log is empty")
    if not is_utf8(source):
        raise DataError(f"the name of the log is not UTF-8: {one_line(source)}")
    path = Path(source)
    try:
        is_directory = path.is_dir()
    except OSError as error:  # the name is too long, or leads around in a circle
        raise NoSuchLog(f"{one_line(source)} cannot be read: {error.strerror}") from None
    if is_directory:
        return _directory(path)
    if not path.exists() and any(character in source for character in _PATTERN):
        found = sorted(Path(name) for name in glob.glob(source, recursive=True))
        files = [LogFile(path, str(path)) for path in found if path.is_file()]
        if not files:
            raise NoSuchLog(f"no file matches {one_line(source)}")
        return files
    if not path.exists():
        raise NoSuchLog(f"{one_line(source)} does not exist{_neighbour(path)}")
    return [LogFile(path, source)]


def _directory(path: Path) -> Sequence[LogFile]:
    files = [
        LogFile(found, str(found))
        for found in sorted(path.rglob("*"))
        if found.is_file() and not _is_hidden(found.relative_to(path))
    ]
    if not files:
        raise DataError(f"{one_line(path)} is a directory without files")
    return files


def _is_hidden(path: Path) -> bool:
    """Return whether a part of the path begins with a dot or an underscore, as in _SUCCESS."""
    return any(part.startswith((".", "_")) for part in path.parts)


def _neighbour(path: Path) -> str:
    """Return a suggestion of a file of the same directory with a similar name, or ""."""
    if not path.parent.is_dir():
        return ""
    return nearest(path.name, [entry.name for entry in path.parent.iterdir()])


def _standard_input() -> LogFile:
    if sys.stdin is None or sys.stdin.isatty():
        raise DataError("- reads standard input, and there is only a terminal")
    return LogFile(spool([sys.stdin.buffer]), STANDARD_INPUT)


def spool(streams: Iterable[IO[bytes]]) -> Path:
    """Copy streams of bytes into a temporary file, which ends with the process; return its path."""
    file = tempfile.NamedTemporaryFile(prefix="stream-ctr-log-")  # noqa: SIM115
    _SPOOLED.append(file)
    for stream in streams:
        shutil.copyfileobj(stream, file, 1 << 20)
    file.flush()
    return Path(file.name)


_SPOOLED: list[IO[bytes]] = []  # closing a temporary file removes it
