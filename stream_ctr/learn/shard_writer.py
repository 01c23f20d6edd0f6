"""The shards of a table, written by all ranks at once, each in a thread of its own.

    loop of rank 0          announces `begin`; every rank has made a copy of its rows at the cut
    thread of each rank     one shard after another: write, sync, hash
                            after each, all ranks hear of the shards and of the problems of all
    thread of rank 0        `written`: the names, sizes and digests of all shards, or the problem

The threads exchange what they have written over connections of their own (`Ranks.another`), while
the loops of the ranks use theirs. A rank that cannot write stops all of them after the present
shard: nothing of the table is kept, and the run goes on. Rank 0 never holds a row of another one.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
from safetensors import SafetensorError

from stream_ctr.distributed.ranks import RankError, Ranks
from stream_ctr.distributed.team import Team
from stream_ctr.errors import SnapshotError
from stream_ctr.learn.array_digests import ArrayDigest, slice_sha256
from stream_ctr.learn.shard_files import TABLE, Floats, Shard, shards_of
from stream_ctr.learn.tensor_files import write_tensors


@dataclass(frozen=True, slots=True)
class ShardsWritten:
    """The shards of a table on disk. `files` maps names to path, SHA-256 and size.

    `table` is the digest of the whole table, and `served` that of what serving reads of it.
    `finite` tells whether all numbers are.
    """

    files: dict[str, tuple[Path, str, int]]
    table: ArrayDigest
    served: ArrayDigest
    finite: bool


class TableShards(Protocol):
    """A copy of a table of which every rank holds its rows, until the next copy is made."""

    @property
    def shape(self) -> tuple[int, int]:
        """The rows and the floats of the whole table."""
        ...

    def begin(self, folder: Path, stem: str) -> None:
        """Begin to write the shards to `folder`, which exists, on every rank.

        The loop of rank 0 calls this.
        """
        ...

    def written(self) -> ShardsWritten:
        """Return the shards when all of them are on disk. Any thread may call this.

        Raises `SnapshotError` if a rank could not write its shards, and `RankError` if one ended.
        """
        ...


class Rows(NamedTuple):
    """A copy of the rows of one rank, from `first` on, of a table with `shape`.

    Serving reads the first `served` floats of a row.
    """

    copy: Floats
    first: int
    shape: tuple[int, int]
    served: int


class ShardWriter:
    """Write the rows that this rank holds. Every rank has one, and makes the same calls."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._others: Ranks | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._writing: Future[ShardsWritten] | None = None

    def begin(self, rows: Rows, folder: Path, stem: str) -> None:
        """Begin to write this rank's shards. The copy must not change until `written` returns."""
        if self._writing and isinstance(error := self._writing.exception(), RankError):
            raise error
        self._others = self._others or self._ranks.another()
        self._writing = self._thread.submit(_write, self._others, rows, folder, stem)

    def written(self) -> ShardsWritten:
        """Return what all ranks wrote, as `TableShards.written` does."""
        assert self._writing
        return self._writing.result()


class SharedCopy:
    """The copy of a table on all ranks, as rank 0 has it.

    It is that of object `number` of the team, whose method `write_shards(folder=..., stem=...)`
    begins to write on its rank with a `ShardWriter`, the `writer` of this one.
    """

    def __init__(
        self, team: Team, number: int, own: Any, writer: ShardWriter, shape: tuple[int, int]
    ) -> None:
        self.shape = shape
        self._team = team
        self._number = number
        self._own = own
        self._writer = writer

    def begin(self, folder: Path, stem: str) -> None:
        """Begin to write on every rank."""
        arguments = {"folder": str(folder), "stem": stem}
        self._team.announce(self._number, "write_shards", **arguments)
        self._own.write_shards(**arguments)

    def written(self) -> ShardsWritten:
        """Return the shards when all of them are on disk."""
        return self._writer.written()


class _Written(msgspec.Struct, array_like=True):
    """A shard on disk: its file, the digests of its rows, and whether they are finite."""

    sha256: str
    size: int
    table: bytes
    served: bytes
    finite: bool


class _Round(msgspec.Struct, array_like=True):
    """The outcome of one round of a rank: it wrote a shard, had none to write, or has a problem."""

    written: _Written | None = None
    problem: str = ""
    number: int = -1
    """The number of the shard, -1 if none was written."""


def _write(ranks: Ranks, rows: Rows, folder: Path, stem: str) -> ShardsWritten:
    """Write the shards of this rank, in rounds that all ranks take together."""
    shards = shards_of(stem, rows.shape[0])
    size = rows.shape[0] // len(shards)
    own = shards[rows.first // size : (rows.first + len(rows.copy)) // size]
    problem = _no_room(folder, rows.copy.itemsize * math.prod(rows.shape))
    found: dict[int, tuple[int, _Written]] = {}
    for number in range(-(-len(shards) // ranks.size)):
        mine = _Round(problem=problem)
        if not problem and number < len(own):
            start = own[number].index * size - rows.first
            mine = _write_shard(folder / own[number].name, rows.copy[start : start + size], rows)
            mine.number = own[number].index
        for rank, done in enumerate(_exchange(ranks, mine)):
            if done.problem:
                raise SnapshotError(f"rank {rank}: {done.problem}")
            if done.written:
                found[done.number] = rank, done.written
    if ranks.rank == 0:
        _require_here(folder, shards, found)
    return _together(folder, shards, [found[shard.index][1] for shard in shards], rows)


def _exchange(ranks: Ranks, mine: _Round) -> list[_Round]:
    """Return what each rank did in a round."""
    came = ranks.collect(np.frombuffer(msgspec.msgpack.encode(mine), np.uint8))
    return [msgspec.msgpack.decode(each.tobytes(), type=_Round) for each in came]


def _write_shard(path: Path, part: Floats, rows: Rows) -> _Round:
    """Write a shard. An error becomes a problem that all ranks hear of."""
    try:
        file = write_tensors(path, {TABLE: part})
    except (OSError, SafetensorError, MemoryError) as error:
        return _Round(problem=f"cannot write {path.name}: {error or type(error).__name__}")
    served = slice_sha256(part[:, : rows.served])
    finite = bool(np.isfinite(part).all())
    return _Round(_Written(*file, slice_sha256(part), served, finite))


def _no_room(folder: Path, needed: int) -> str:
    """Return why a table of so many bytes cannot be written, or "" if it can."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"cannot write to {folder}, which all ranks need to reach: {error.strerror}"
    if free >= needed:
        return ""
    return (
        f"the table needs {needed / 2**20:,.1f} MiB, {folder} has {free / 2**20:,.1f} MiB free: "
        "make room"
    )


def _require_here(
    folder: Path, shards: Iterable[Shard], found: dict[int, tuple[int, _Written]]
) -> None:
    """Raise `SnapshotError` unless rank 0 sees what the others wrote."""
    for shard in shards:
        rank, written = found[shard.index]
        try:
            size = (folder / shard.name).stat().st_size
        except OSError:
            size = -1
        if size != written.size:
            raise SnapshotError(
                f"rank 0 does not find {folder / shard.name}, which rank {rank} wrote: the state "
                "directory of a run on several machines must be on a file system that all of "
                "them share, at the same path"
            )


def _together(
    folder: Path, shards: list[Shard], written: list[_Written], rows: Rows
) -> ShardsWritten:
    files = {
        shard.name: (folder / shard.name, each.sha256, each.size)
        for shard, each in zip(shards, written, strict=True)
    }
    count, floats = rows.shape
    return ShardsWritten(
        files,
        ArrayDigest("<f4", (count, floats), tuple(each.table for each in written)),
        ArrayDigest("<f4", (count, rows.served), tuple(each.served for each in written)),
        all(each.finite for each in written),
    )
