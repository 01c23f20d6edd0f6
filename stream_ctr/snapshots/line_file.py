"""A file of lines that a crash cannot damage beyond its last line."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from stream_ctr.snapshots.files import open_regular


class LineFile:
    """A file of lines. A line that a crash cut short does not damage the next one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: str) -> None:
        """Append a line. Raises `OSError`, with the file as it was, if it cannot be written."""
        size = None
        try:
            with open(self.path, "a+b", opener=open_regular) as file:
                size = file.tell()
                if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                    file.write(b"\n")
                file.write(line.encode() + b"\n")
        except OSError:
            if size is not None:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)
            raise
