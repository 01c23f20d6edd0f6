"""A file of lines that a crash cannot damage beyond its last line."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from stream_ctr import state_files
from stream_ctr.snapshots.files import sync_directory


class LineFile:
    """A file of lines. A line that a crash cut short does not damage the next one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._synced = False  # an earlier process may have written lines

    def append(self, line: str) -> None:
        """Append a line. Raises `OSError`, with the file as it was, if it cannot be written."""
        self._synced = False
        size = None
        try:
            fd = state_files.open_file(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            with open(fd, "a+b") as file:
                size = file.tell()
                if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                    file.write(b"\n")
                file.write(line.encode() + b"\n")
        except OSError:
            if size is not None:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)
            raise

    def sync(self) -> None:
        """Wait until all lines are on disk. Another thread than that of `append` may call this."""
        if self._synced:
            return
        self._synced = True
        try:
            fd = state_files.open_file(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return
        try:
            os.fsync(fd)
            sync_directory(self.path.parent)
        except OSError:
            self._synced = False
            raise
        finally:
            os.close(fd)
