"""Rows on disk: features that do not fit into memory go to Arrow IPC files.

A segment is one file. It is written once, is on disk when `write` returns, and never changes, so
that a snapshot may hold it by a hard link. Any rows can be read back. A row on disk is named by
its place, a negative int64: one column can hold both places on disk and rows in memory.

>>> spill = Spill()
>>> places = spill.write({"ids": np.array([[1, 2], [3, 4], [5, 6]], np.int32)}, last=1000)
>>> bool((places < 0).all())
True
>>> spill.read(places[[2, 0]])["ids"].tolist()
[[5, 6], [1, 2]]
>>> spill.drop(spill.ended_before(1001))
>>> spill.files()
{}
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stream_ctr import state_files
from stream_ctr.errors import DataError

# A place is ~(segment number << ROW_BITS | row).
ROW_BITS = 16
_ROW_MASK = (1 << ROW_BITS) - 1
SEGMENT_ROWS = 1 << ROW_BITS  # at most
_FOLDER_PREFIX = "run-"

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Segment:
    """A file of `rows` rows; `last` is the greatest event time in it."""

    path: Path
    rows: int
    last: int
    sha256: str


def segment_of(places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the segment number of each place."""
    return ~places >> ROW_BITS


def remove_folders(directory: Path) -> None:
    """Remove the folders that earlier objects have left in a directory."""
    state_files.remove_all(directory, _FOLDER_PREFIX)


def folder_of_rank(directory: Path, rank: int) -> Path:
    """Return the directory of one of several processes that spill below `directory`.

    `remove_folders` removes it as well.
    """
    return directory / f"{_FOLDER_PREFIX}rank-{rank}"


class Spill:
    """Segments in a folder of its own below `directory`.

    One object at a time may use a directory; folders of earlier objects are removed. Each object
    has its own folder, so that a process that was taken over and goes on cannot change the files
    of its successor. Without a directory the folder is a temporary one, and is removed together
    with this object. Its segments have the numbers f, f + s, f + 2 s and so on, where `numbers` is
    (f, s), so that objects of several processes can give their segments different numbers.
    """

    def __init__(self, directory: Path | None = None, *, numbers: tuple[int, int] = (0, 1)) -> None:
        self.segments: dict[int, Segment] = {}
        self._directory = directory
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._folder: Path | None = None
        self._first, self._step = numbers
        self._next_number = self._first
        self._verified: set[int] = set()
        if directory:
            remove_folders(directory)

    def write(self, columns: Mapping[str, Array], *, last: int) -> npt.NDArray[np.int64]:
        """Write n rows to a new segment, and return their places.

        Columns are [n] or [n, width]; `last` is the greatest event time of the rows. Raises
        `OSError` when the disk is full, and leaves no file behind.
        """
        rows = len(next(iter(columns.values())))
        number = self._next_number
        self._next_number += self._step
        path = self._path(number)
        data = _encode(columns)
        try:
            with path.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)
            raise
        self.segments[number] = Segment(path, rows, last, hashlib.sha256(data).hexdigest())
        return ~((number << ROW_BITS) + np.arange(rows))

    def read(self, places: npt.NDArray[np.int64]) -> dict[str, Array]:
        """Return the columns of the rows at `places`, in that order.

        Raises `DataError` when a file is missing or has changed.
        """
        numbers = segment_of(places)
        rows = ~places & _ROW_MASK
        columns: dict[str, Array] = {}
        for number in np.unique(numbers).tolist():
            chosen = np.flatnonzero(numbers == number)
            for name, part in self._read(number, rows[chosen]).items():
                if name not in columns:
                    columns[name] = np.empty((len(places), *part.shape[1:]), part.dtype)
                columns[name][chosen] = part
        return columns

    def _read(self, number: int, rows: npt.NDArray[np.int64]) -> dict[str, Array]:
        path = self.segments[number].path
        try:
            if number not in self._verified:
                _verify(path, self.segments[number].sha256)
                self._verified.add(number)
            # With a memory map only the pages of these rows are read.
            with pa.memory_map(str(path)) as source:
                batch = pa.ipc.open_file(source).get_batch(0)
                return {name: _decode(batch.column(name))[rows] for name in batch.schema.names}
        except (OSError, pa.ArrowInvalid, ValueError) as error:
            raise DataError(
                f"spilled impressions cannot be read: {error}; the last snapshot has them"
            ) from error

    def ended_before(self, time: int) -> list[int]:
        """Return the numbers of the segments whose rows are all older than `time`."""
        return [number for number, segment in self.segments.items() if segment.last < time]

    def drop(self, numbers: Collection[int]) -> None:
        """Delete segments."""
        for number in numbers:
            self.segments.pop(number).path.unlink(missing_ok=True)
            self._verified.discard(number)

    def files(self) -> dict[str, tuple[Path, str, int]]:
        """Return the (path, SHA-256, bytes) of every segment, by file name."""
        return {
            segment.path.name: (segment.path, segment.sha256, segment.path.stat().st_size)
            for segment in self.segments.values()
        }

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Array]:
        """Return the number, rows and last event time of each segment; nothing without segments."""
        if not self.segments:
            return {}
        segments = list(self.segments.values())
        return {
            "number": np.array(list(self.segments), np.int64),
            "rows": np.array([segment.rows for segment in segments], np.int64),
            "last": np.array([segment.last for segment in segments], np.int64),
        }

    def load_state_dict(
        self, state: Mapping[str, Array], files: Mapping[str, tuple[Path, str]]
    ) -> None:
        """Take over the segments of `state`, which are linked, or copied from another file system.

        `files` maps file names to (path, SHA-256). Segments that are written later have greater
        numbers than these, and than `state["before"]` [1] if it is there. Raises `ValueError`,
        which names the file, when a segment is missing or has changed.
        """
        self.drop(list(self.segments))
        self._number_after(int(state["before"][0]) if "before" in state else -1)
        if "number" not in state:
            return
        columns = (state[name].tolist() for name in ("number", "rows", "last"))
        for number, rows, last in zip(*columns, strict=True):
            path = self._path(number)
            if path.name not in files:
                raise ValueError(f"segment {path.name} is missing: {rows} impressions are in it")
            found, sha256 = files[path.name]
            _verify(found, sha256)
            _link_or_copy(found, path)
            self.segments[number] = Segment(path, rows, last, sha256)
            self._verified.add(number)
            self._number_after(number)

    def _number_after(self, number: int) -> None:
        """Give the next segment a greater number than this one."""
        steps = max(0, (number - self._next_number) // self._step + 1)
        self._next_number += steps * self._step

    def _path(self, number: int) -> Path:
        if self._folder is None:
            self._folder = self._make_folder()
        return self._folder / f"segment-{number:08d}.arrow"

    def _make_folder(self) -> Path:
        if self._directory is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="stream-ctr-spill-")
            return Path(self._temporary.name)
        state_files.make_folder(self._directory)
        return Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir=self._directory))


def _encode(columns: Mapping[str, Array]) -> memoryview:
    """Return an Arrow IPC file of the columns that have a width."""
    batch = pa.record_batch(
        {name: _arrow_column(array) for name, array in columns.items() if array.size}
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return memoryview(sink.getvalue())


def _arrow_column(array: Array) -> pa.Array:
    """Return [n] as an array of its type, [n, width] as lists of that size."""
    flat = pa.array(np.ascontiguousarray(array).reshape(-1))
    if array.ndim == 1:
        return flat
    return pa.FixedSizeListArray.from_arrays(flat, array.shape[1])


def _decode(column: pa.Array) -> Array:
    if pa.types.is_fixed_size_list(column.type):
        return column.values.to_numpy().reshape(-1, column.type.list_size)
    return column.to_numpy()


def _verify(path: Path, sha256: str) -> None:
    try:
        with open(state_files.open_file(path, os.O_RDONLY), "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"segment {path} cannot be read: {error.strerror}") from error
    if found != sha256:
        raise ValueError(
            f"segment {path} has SHA-256 {found}, not {sha256}: it is not the file that was written"
        )


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())
