"""Rows on disk: what is too much for memory goes to Arrow IPC files, and comes back a few rows at a time.

A segment is one file, written once, on disk when `write` returns, and never changed; a snapshot may hold it by a hard link. A row is
known by its place, a negative int64, so that one column can hold places on disk and rows in memory.

>>> spill = Spill()
>>> places = spill.write({"ids": np.array([[1, 2], [3, 4], [5, 6]], np.int32)}, last=1000)
>>> bool((places < 0).all()), spill.read(places[[2, 0]])["ids"].tolist()
(True, [[5, 6], [1, 2]])
>>> spill.drop(spill.ended_before(1001)), spill.files()
(None, {})
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

from stream_ctr.errors import DataError

SEGMENT_ROWS = 1 << 16  # at most; the low 16 bits of a place are the row
_OWN = "run-"

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Segment:
    path: Path
    rows: int
    last: int  # the greatest event time in it
    sha256: str


def segment_of(places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The number of the segment of each of these places."""
    return ~places >> 16


class Spill:
    """Segments in a folder of their own in `directory`; those that others left there are removed, for one at a time may use it.

    An own folder, since one that was taken for dead may wake. Without a directory it is among the system's temporary ones, and gone when
    this object is.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.segments: dict[int, Segment] = {}
        self._directory = directory
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._folder: Path | None = None
        self._next = 0
        self._compared: set[int] = set()
        for left in directory.glob(f"{_OWN}*") if directory else ():
            shutil.rmtree(left)

    def write(self, columns: Mapping[str, Array], *, last: int) -> npt.NDArray[np.int64]:
        """The places of n rows, now on disk; columns are [n] or [n, width]. Raises OSError, with nothing left behind, on a full disk."""
        rows = len(next(iter(columns.values())))
        number, self._next = self._next, self._next + 1
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
        return ~((number << 16) + np.arange(rows))

    def read(self, places: npt.NDArray[np.int64]) -> dict[str, Array]:
        """The columns of the rows at `places`, in that order. Raises DataError when a file is not as it was written."""
        numbers, rows = segment_of(places), ~places & 0xFFFF
        out: dict[str, Array] = {}
        for number in np.unique(numbers).tolist():
            mine = np.flatnonzero(numbers == number)
            for name, column in self._read(number, rows[mine]).items():
                whole = out.setdefault(
                    name, np.empty((len(places), *column.shape[1:]), column.dtype)
                )
                whole[mine] = column
        return out

    def _read(self, number: int, rows: npt.NDArray[np.int64]) -> dict[str, Array]:
        path = self.segments[number].path
        try:
            if number not in self._compared:
                _compare(path, self.segments[number].sha256)
                self._compared.add(number)
            with pa.memory_map(
                str(path)
            ) as source:  # of a segment only the pages of these rows are read
                batch = pa.ipc.open_file(source).get_batch(0)
                return {name: _decode(batch.column(name))[rows] for name in batch.schema.names}
        except (OSError, pa.ArrowInvalid, ValueError) as error:
            raise DataError(
                f"impressions that were put on disk cannot be read: {error}; the last snapshot has them"
            ) from error

    def ended_before(self, time: int) -> list[int]:
        """Numbers of segments with nothing at `time` or after it."""
        return [number for number, segment in self.segments.items() if segment.last < time]

    def drop(self, numbers: Collection[int]) -> None:
        for number in numbers:
            self.segments.pop(number).path.unlink(missing_ok=True)
            self._compared.discard(number)

    def files(self) -> dict[str, tuple[Path, str, int]]:
        """Name -> (path, SHA-256, bytes) of every segment."""
        return {
            segment.path.name: (segment.path, segment.sha256, segment.path.stat().st_size)
            for segment in self.segments.values()
        }

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Array]:
        """What is known of the files; empty without any."""
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
        """`files`, name -> (path, SHA-256), are linked, or copied from another file system. Raises ValueError, which names the file, when
        one is missing or is not what it was."""
        self.drop(list(self.segments))
        for number, rows, last in (
            zip(*(state[name].tolist() for name in ("number", "rows", "last")), strict=True)
            if state
            else ()
        ):
            path = self._path(number)
            if path.name not in files:
                raise ValueError(f"segment {path.name} is missing: {rows} impressions are in it")
            found, sha256 = files[path.name]
            _compare(found, sha256)
            _link_or_copy(found, path)
            self.segments[number] = Segment(path, rows, last, sha256)
            self._compared.add(number)
            self._next = max(self._next, number + 1)

    def _path(self, number: int) -> Path:
        if self._folder is None:
            if self._directory is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="stream-ctr-spill-")
                self._folder = Path(self._temporary.name)
            else:
                self._directory.mkdir(parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(prefix=_OWN, dir=self._directory))
        return self._folder / f"segment-{number:08d}.arrow"


def _encode(columns: Mapping[str, Array]) -> memoryview:
    arrays = {
        name: pa.array(np.ascontiguousarray(array).reshape(-1))
        for name, array in columns.items()
        if array.size
    }
    batch = pa.record_batch(
        {
            name: array
            if columns[name].ndim == 1
            else pa.FixedSizeListArray.from_arrays(array, columns[name].shape[1])
            for name, array in arrays.items()
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return memoryview(sink.getvalue())


def _decode(column: pa.Array) -> Array:
    if pa.types.is_fixed_size_list(column.type):
        return column.values.to_numpy().reshape(-1, column.type.list_size)
    return column.to_numpy()


def _compare(path: Path, sha256: str) -> None:
    try:
        with path.open("rb") as file:
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
