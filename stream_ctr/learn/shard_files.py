"""The files of a table that the ranks of a run hold together.

    STEM.safetensors                     all tensors of a model but its table
    STEM.shard-00-of-64.safetensors      `table` [rows / 64, floats], the first rows of the table
    ...
    STEM.shard-63-of-64.safetensors      the last ones

A table of fewer than 64 rows has as many shards as rows. A table that one process holds is a tensor
`table` of `STEM.safetensors` instead. Rows are read in the same way from either, whole or in part,
and only from files whose sizes and digests are those that a manifest gives.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_ctr.errors import SnapshotError
from stream_ctr.learn.array_digests import in_threads, slices_of
from stream_ctr.learn.tensor_files import (
    SUFFIX,
    FileDigest,
    Piece,
    Placed,
    file_name,
    read_pieces,
    read_placed,
)

TABLE = "table"
Files = Mapping[str, tuple[str, int]]
"""The SHA-256 and the size of files, by name."""
Floats = npt.NDArray[np.float32]

_SHARD = re.compile(rf"(.+)\.shard-(\d\d)-of-(\d\d){re.escape(SUFFIX)}")


@dataclass(frozen=True, order=True, slots=True)
class Shard:
    """The shard `index` of the `count` of the table with this stem."""

    stem: str
    index: int
    count: int

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"{self.stem}.shard-{self.index:02d}-of-{self.count:02d}{SUFFIX}"


def shard_of(name: str) -> Shard | None:
    """Return the shard that a file holds by its name, None if it holds none.

    >>> shard_of("fm.model.shard-03-of-64.safetensors")
    Shard(stem='fm.model', index=3, count=64)
    >>> shard_of("fm.model.safetensors")
    """
    match = _SHARD.fullmatch(name)
    return Shard(match[1], int(match[2]), int(match[3])) if match else None


def shards_of(stem: str, rows: int) -> list[Shard]:
    """Return the shards of a table with so many rows.

    >>> [shard.name for shard in shards_of("model", 2)]
    ['model.shard-00-of-02.safetensors', 'model.shard-01-of-02.safetensors']
    """
    count = slices_of((rows, 1))
    return [Shard(stem, index, count) for index in range(count)]


def held_shards(stem: str, names: Collection[str]) -> list[Shard]:
    """Return the shards with this stem among the names of files, in their order, none if there are.

    Raises `ValueError`, which names the file, if one is missing.
    """
    found = [shard for name in names if (shard := shard_of(name)) and shard.stem == stem]
    if not found:
        return []
    count = max(shard.count for shard in found)
    expected = [Shard(stem, index, count) for index in range(count)]
    if odd := sorted({*found} ^ {*expected}):
        missing = odd[0].name not in names
        raise ValueError(f"shard {odd[0].name} is {'missing' if missing else 'one too many'}")
    return expected


def read_rows(
    folder: Path,
    stem: str,
    files: Files,
    *,
    shape: tuple[int, int],
    rows: range,
    out: Floats | None = None,
) -> Floats:
    """Return the `rows` [n, floats] of the table with this stem, in `out` if it is given.

    `files` are those of the snapshot in `folder`, from its manifest, or those with this stem. Of a
    table in shards, those that hold the rows are opened. A whole one is read through, because its
    digest is that of the whole file; memory is taken for the rows alone.

    Raises `SnapshotError`, which names the file, if one is missing, damaged, or does not hold its
    part of a table of this `shape`. Then `out` may hold anything.
    """
    found = np.empty((len(rows), shape[1]), np.float32) if out is None else out
    assert found.flags.c_contiguous
    reads = [
        partial(
            _read_part,
            folder / name,
            FileDigest(*files[name]),
            (len(held), shape[1]),
            range(wanted.start - held.start, wanted.stop - held.start),
            found[wanted.start - rows.start : wanted.stop - rows.start],
        )
        for name, held in _held(folder, stem, files, shape[0])
        if (wanted := range(max(held.start, rows.start), min(held.stop, rows.stop)))
    ]
    in_threads(lambda read: read(), reads, nbytes=found.nbytes)
    return found


def _held(folder: Path, stem: str, files: Files, rows: int) -> list[tuple[str, range]]:
    """Return the files of a table, each with the rows that it holds."""
    try:
        shards = held_shards(stem, files)
    except ValueError as reason:
        raise SnapshotError(f"{folder}: {reason}") from None
    if not shards:
        if file_name(stem) not in files:
            raise SnapshotError(f"{folder} has no file {file_name(stem)}")
        return [(file_name(stem), range(rows))]
    each, left = divmod(rows, len(shards))
    if left:
        raise SnapshotError(
            f"{folder}: a table of {rows:,} rows does not have {len(shards)} shards of one size"
        )
    return [(s.name, range(s.index * each, (s.index + 1) * each)) for s in shards]


def _read_part(
    path: Path, expected: FileDigest, shape: tuple[int, int], rows: range, out: Floats
) -> None:
    """Read some rows of a file that holds so many."""

    def wanted(placed: Mapping[str, Placed]) -> list[Piece]:
        table = _table(placed)
        if table.shape != shape:
            raise ValueError(f"tensor 'table' has shape {table.shape}, expected {shape}")
        return [Piece(table.start + rows.start * shape[1] * table.dtype.itemsize, little)]

    # On a machine that is not little-endian the bytes are read elsewhere first.
    little = out if out.dtype == np.dtype("<f4") else np.empty(out.shape, "<f4")
    read_pieces(path, expected, wanted)
    if little is not out:
        out[:] = little


def _table(placed: Mapping[str, Placed]) -> Placed:
    table = placed.get(TABLE)
    if table is None:
        raise ValueError("tensor 'table' is missing")
    if table.dtype != np.dtype("<f4") or len(table.shape) != 2:
        raise ValueError(f"tensor 'table' is {table.dtype} {table.shape}, expected float32 rows")
    return table


@dataclass(frozen=True)
class StoredTable:
    """A table that stays in the files of a snapshot until its rows are read.

    It stands for the array in what `snapshot.load` returns, and numpy makes the array of it. The
    shape is what the files say, and `read` compares it when it compares their digests.
    """

    folder: Path
    stem: str
    files: Files = field(repr=False)
    shape: tuple[int, int]

    @classmethod
    def found(cls, folder: Path, stem: str, files: Files) -> StoredTable:
        """Return the table with this stem of the snapshot in `folder` with these `files`.

        Raises `SnapshotError` if there is none.
        """
        own = {
            name: entry
            for name, entry in files.items()
            if name == file_name(stem) or ((shard := shard_of(name)) and shard.stem == stem)
        }
        held = [folder / name for name, _ in _held(folder, stem, own, 0)]
        try:
            rows, floats = _table(read_placed(held[0])).shape
        except ValueError as reason:
            raise SnapshotError(f"{held[0]}: {reason}") from None
        return cls(folder, stem, own, (rows * len(held), floats))

    @property
    def ndim(self) -> int:
        """The number of dimensions of the array."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the array."""
        return np.dtype(np.float32)

    def read(self, rows: range | None = None, *, out: Floats | None = None) -> Floats:
        """Return the `rows` [n, floats], by default all. Raises `SnapshotError` as `read_rows`."""
        rows = range(self.shape[0]) if rows is None else rows
        return read_rows(self.folder, self.stem, self.files, shape=self.shape, rows=rows, out=out)

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[Any]:
        """Return the whole table, for numpy."""
        return np.asarray(self.read(), dtype)
