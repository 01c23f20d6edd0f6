"""A table that the ranks of a run hold together, without anything that learns."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import structs

from stream_ctr.distributed.ranks import Ranks
from stream_ctr.distributed.team import Team
from stream_ctr.learn.learner import Learner, make_learner
from stream_ctr.learn.network_learner import NetworkLearner
from stream_ctr.learn.shard_files import StoredTable, read_rows, shards_of
from stream_ctr.learn.shard_writer import Rows, ShardsWritten, ShardWriter, SharedCopy
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.tensors import State, Tensors
from stream_ctr.snapshots import snapshot

SERVED = 5  # floats of a row


def rows_of(ranks: Ranks, rows: int) -> range:
    """Return the rows that a rank holds."""
    count = len(shards_of("model", rows))
    first, last = (each * count // ranks.size for each in (ranks.rank, ranks.rank + 1))
    return range(first * rows // count, last * rows // count)


def table(rows: int = 64, *, seed: int = 0) -> npt.NDArray[np.float32]:
    """Return a table [rows, 16] of which every value is another one."""
    values = np.random.default_rng(seed).permutation(rows * 16)
    return values.reshape(rows, 16).astype(np.float32)


class HeldRows:
    """The rows of a rank, as an object of a team."""

    def __init__(self, ranks: Ranks, *, rows: int, seed: int) -> None:
        self.shape = rows, 16
        self.own = rows_of(ranks, rows)
        self.rows = table(rows, seed=seed)[self.own.start : self.own.stop].copy()
        self.writer = ShardWriter(ranks)
        self._rank = ranks.rank

    def write_shards(self, *, folder: str, stem: str) -> None:
        self.writer.begin(Rows(self.rows, self.own.start, self.shape, SERVED), Path(folder), stem)

    def read_shards(self, *, folder: str, stem: str, files: dict[str, Any]) -> None:
        shape = self.shape
        read_rows(Path(folder), stem, files, shape=shape, rows=self.own, out=self.rows)

    def spoil(self, *, rank: int, how: str) -> None:
        """Make files too large or a number not finite, or mend both."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        self.rows[:] = np.nan_to_num(self.rows, nan=0.0)
        if rank != self._rank:
            return
        if how == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        elif how == "nan":
            self.rows[-1, -1] = np.nan


class HeldTable:
    """Rank 0's face of the rows of all ranks."""

    def __init__(self, team: Team, *, rows: int, seed: int = 0) -> None:
        self._team = team
        self._number, self.own = team.make("rows", rows=rows, seed=seed)
        self.copy = SharedCopy(team, self._number, self.own, self.own.writer, self.own.shape)

    def load(self, stored: StoredTable) -> None:
        assert stored.shape == self.own.shape
        arguments: dict[str, Any] = {
            "folder": str(stored.folder),
            "stem": stored.stem,
            "files": dict(stored.files),
        }
        self._team.announce(self._number, "read_shards", **arguments)
        self.own.read_shards(**arguments)

    def spoil(self, rank: int, how: str) -> None:
        """Let something go wrong on a rank from now on, or right again everywhere."""
        self._team.announce(self._number, "spoil", rank=rank, how=how)
        self.own.spoil(rank=rank, how=how)


def in_shards(path: Path, sequence: int) -> Path:
    """Write the state of a snapshot once more, with its tables in shards."""
    found, tensors = snapshot.load(path)
    segments: dict[str, tuple[Path, str, int]] = {}
    for stem, named in tensors.items():
        if "table" in named:
            folder = path.parent / f"tmp-{stem}"
            folder.mkdir()
            rows = named.pop("table")
            writer = ShardWriter(Ranks.alone())
            writer.begin(Rows(rows, 0, rows.shape, SERVED), folder, stem)
            segments |= writer.written().files
    name = snapshot.new_id(sequence, found.event_time_ms)
    described = structs.replace(found, snapshot=name, sequence=sequence, files={})
    return snapshot.write(path.parent, tensors=tensors, manifest=described, segments=segments)


class OneRankLearner(NetworkLearner):
    """A learner whose table is written to shards and read from them, as that of several ranks."""

    def __init__(self, spec: LearnerSpec, **options: Any) -> None:
        super().__init__(spec, **options)
        self._writer = ShardWriter(Ranks.alone())
        self._copied: npt.NDArray[np.float32] | None = None

    def weights(self, *, reuse: bool = False) -> State:
        weights = super().weights(reuse=reuse)
        self._copied = weights.pop("table")
        return weights

    def shards(self) -> Any:
        return self

    @property
    def shape(self) -> tuple[int, int]:
        rows, floats = self.table.rows.shape
        return rows, floats

    def begin(self, folder: Path, stem: str) -> None:
        assert self._copied is not None
        served = self.table.width + 1
        self._writer.begin(Rows(self._copied, 0, self.shape, served), folder, stem)

    def written(self) -> ShardsWritten:
        return self._writer.written()

    def load_weights(self, weights: Tensors) -> None:
        table: Any = weights["table"]
        assert isinstance(table, StoredTable)
        halves = [range(0, self.shape[0] // 2), range(self.shape[0] // 2, self.shape[0])]
        read = np.concatenate([table.read(rows) for rows in halves])
        super().load_weights({**weights, "table": read})


def make_one_rank(spec: LearnerSpec, **options: Any) -> Learner:
    """Make a learner that writes shards, or a logistic regression."""
    return make_learner(spec, **options) if spec.model == "lr" else OneRankLearner(spec, **options)
