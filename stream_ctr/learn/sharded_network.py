"""The network of a run on several ranks: its table is sharded, and every rank has the rest.

Every rank has one of these objects, and makes the same calls at the same time. What only rank 0
knows is an argument that is absent elsewhere, and what it alone wants to know is returned there.
After each call that changes weights, the parameters, the intercept and the counters are equal on
all ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stream_ctr.distributed.ranks import Ranks
from stream_ctr.errors import ConfigError, SnapshotError, StreamCtrError
from stream_ctr.learn.changes import Changes
from stream_ctr.learn.network import TABLE, Network, copied_values, new_table
from stream_ctr.learn.served_weights import ROWS, VALUES
from stream_ctr.learn.shard_files import StoredTable
from stream_ctr.learn.shard_writer import Rows, ShardWriter
from stream_ctr.learn.sharded_batch_step import ShardedBatchStep
from stream_ctr.learn.sharded_online_step import ShardedOnlineStep
from stream_ctr.learn.sharded_step import Given
from stream_ctr.learn.sharded_table import Borrowed, ShardedTable
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.tensors import State, Tensors, require_tensor
from stream_ctr.learn.thread_pool import ThreadPool
from stream_ctr.learn.touched import Touched, require_touched

Array = npt.NDArray[Any]
_PIECE_BYTES = 1 << 24  # of a table on its way


class ShardedNetwork(Network):
    """One rank's part of a network. `threads` is the number of threads of the rank.

    0 threads are one for each processor, divided among the ranks of this machine.
    """

    def __init__(
        self, ranks: Ranks, spec: LearnerSpec, *, threads: int = 0, progressive: bool = True
    ) -> None:
        self.ranks = ranks
        self.sharded = new_table(spec, lambda **options: ShardedTable(ranks, **options))
        cpu = torch.device("cpu")
        super().__init__(spec, self.sharded, device=cpu, progressive=progressive)
        self._threads = threads or _own_processors()
        self._copying = ThreadPool(self._threads)
        self._copy: npt.NDArray[np.float32] | None = None
        self._copy_is_kept = False
        self.writer = ShardWriter(ranks)
        self._begin()

    @property
    def first_row(self) -> int:
        """The number of the first row of this rank."""
        return self.sharded.first_row

    @property
    def shape(self) -> tuple[int, int]:
        """The rows and the floats of the whole table."""
        return self.sharded.shards.rows, self.sharded.rows.shape[1]

    def _renew_step(self) -> None:
        make = ShardedOnlineStep if self.online else ShardedBatchStep
        self._step: ShardedOnlineStep | ShardedBatchStep = make(
            self.model,
            self.sharded,
            self.adam,
            self.intercept,
            self._phase_options(),
            threads=self._threads,
        )

    def learn(self, n: int, given: Given | None = None) -> Tensor | None:
        """Learn a batch of `n` examples, which rank 0 gives, and return their logits there.

        Returns None, and changes nothing on any rank, if the batch is refused.
        """
        found = self._step.learn_all(n, given, self.steps - self._first_step)
        if not found.accepted:
            return None
        self._mark(found.borrowed)
        self._count(n)
        return found.logits

    def _mark(self, borrowed: Borrowed) -> None:
        for lent in borrowed.lent if self._changes or self.touched is not None else ():
            rows = lent.rows[lent.only_read :].reshape(1, -1)
            if self._changes:
                self._changes.mark(rows)
            if self.touched is not None and rows.size:
                self.touched.mark(rows)

    def predict(self, n: int, given: Given | None = None) -> npt.NDArray[np.floating]:
        """Return the logits of `n` examples, which rank 0 gives, on rank 0."""
        return self._step.predict_all(n, given)

    # -- weights -----------------------------------------------------------------------------------

    def copy_rows(self, *, reuse: bool = False) -> None:
        """Copy the rows of this rank for `write_shards`, over the last copy with `reuse`."""
        if self._copy is None or not (reuse and self._copy_is_kept):
            self._copy = np.empty(self.sharded.rows.shape, np.float32)
        self._copy[:] = self.sharded.rows.numpy()
        self._copy_is_kept = reuse

    def write_shards(self, *, folder: str, stem: str) -> None:
        """Begin to write the copy of the rows of this rank to the files of its shards."""
        assert self._copy is not None
        rows = Rows(self._copy, self.first_row, self.shape, self.sharded.width + 1)
        if not self._copy_is_kept:
            self._copy = None
        self.writer.begin(rows, Path(folder), stem)

    def other_weights(self) -> State:
        """Return the weights besides the table. Every rank has them, and calls this alone."""
        return self._other_weights()

    def gather_table(self) -> npt.NDArray[np.float32]:
        """Return the whole table on rank 0, and no rows elsewhere."""
        whole = np.empty(self.shape if self.ranks.rank == 0 else (0, self.shape[1]), np.float32)
        for rank, rows in self._pieces():
            if rank == 0 == self.ranks.rank:
                whole[rows.start : rows.stop] = self._own(rows)
            elif self.ranks.rank == 0:
                self.ranks.start(receive=[(rank, whole[rows.start : rows.stop])]).wait()
            elif self.ranks.rank == rank:
                self.ranks.start(send=[(0, self._own(rows))]).wait()
        return whole

    def require_weights(self, weights: Tensors) -> None:
        """Raise `ValueError` unless these are the weights of this model. Called alone.

        Of a table that stays in files, the values are checked where they are read.
        """
        self._require_others(weights)
        table: Any = weights[TABLE]
        if not isinstance(table, StoredTable):
            require_tensor(TABLE, table, np.float32, self.shape)
        elif table.shape != self.shape:
            raise ValueError(f"tensor {TABLE!r} has shape {table.shape}, expected {self.shape}")

    def load_weights(self, weights: Tensors | None = None) -> None:
        """Load the weights, which rank 0 gives and has checked."""
        self._scatter_table(None if weights is None else weights[TABLE])
        self._load_others(weights)

    def load_stored(
        self, weights: Tensors | None = None, *, folder: str, stem: str, files: dict[str, Any]
    ) -> None:
        """Load the rows of this rank from the `files` of a snapshot, and what rank 0 gives besides.

        Raises `SnapshotError` on rank 0 if a rank cannot read its rows, and `ValueError` if they
        are not finite. Then nothing is loaded on any rank.
        """
        shards = self.sharded.shards.rows_of_rank(self.ranks.rank)
        stored = StoredTable(Path(folder), stem, files, self.shape)
        unreadable = not_finite = None
        rows = np.empty((0, self.shape[1]), np.float32)
        try:
            rows = stored.read(shards)
        except SnapshotError as error:
            unreadable = str(error)
        if not np.isfinite(rows).all():
            not_finite = f"tensor {TABLE!r} holds values that are not finite"
        problems = self.ranks.agree(unreadable), self.ranks.agree(not_finite)
        if not any(problems):
            self.sharded.rows.numpy()[:] = rows
            self._load_others(weights)
        elif self.ranks.rank == 0:  # the others go on: rank 0 decides what comes of it
            raise SnapshotError(problems[0]) if problems[0] else ValueError(problems[1])

    def _load_others(self, weights: Tensors | None) -> None:
        """Set all weights but the table's rows to those that rank 0 gives."""
        self._note_restored()
        others: dict[str, Array] = {}
        for name, array in self._other_weights().items():
            given = array if weights is None else np.array(weights[name], array.dtype, order="C")
            others[name] = self.ranks.broadcast(np.ascontiguousarray(given).reshape(array.shape))
        self._set_others(others)

    def _scatter_table(self, table: npt.NDArray[np.generic] | None) -> None:
        """Set the rows of all ranks to those of `table` [rows, floats], which rank 0 gives."""
        for rank, rows in self._pieces():
            if table is not None:
                piece = np.ascontiguousarray(table[rows.start : rows.stop])
                if rank == 0:
                    self._own(rows)[:] = piece
                else:
                    self.ranks.start(send=[(rank, piece)]).wait()
            elif self.ranks.rank == rank:
                self.ranks.start(receive=[(0, self._own(rows))]).wait()

    def _pieces(self) -> Iterator[tuple[int, range]]:
        """Yield each rank with rows of it, some megabytes at a time."""
        step = max(_PIECE_BYTES // (4 * self.shape[1]), 1)
        for rank in range(self.ranks.size):
            rows = self.sharded.shards.rows_of_rank(rank)
            edges = [*range(rows.start, rows.stop, step), rows.stop]
            yield from ((rank, range(first, last)) for first, last in pairwise(edges))

    def _own(self, rows: range) -> npt.NDArray[np.float32]:
        first = self.first_row
        return self.sharded.rows.numpy()[rows.start - first : rows.stop - first]

    # -- state of the optimisers -------------------------------------------------------------------

    def optimizer_state(self) -> State:
        """Return the state of Adam and the counters, on rank 0; elsewhere it is not complete."""
        self._step.gather_moments()
        return {**self._counters(), **self.adam.state_dict()}

    def require_optimizer_state(self, state: Tensors) -> None:
        """Raise `KeyError` or `ValueError` unless this is state of this model. Called alone."""
        self.adam.require_state_dict(state)
        state["steps"].reshape(3)

    def load_optimizer_state(self, state: Tensors | None = None) -> None:
        """Load the state of Adam and the counters, which rank 0 gives and has checked."""
        if state is not None:
            self.adam.load_state_dict(state)
        for moment in self.adam.moments:
            self.ranks.broadcast(moment.numpy())
        given = state["steps"] if state is not None else np.zeros(3)
        self._set_counters(self.ranks.broadcast(np.array(given, np.int64)))

    # -- what changed ------------------------------------------------------------------------------

    def track_touched(self) -> None:
        """Note from now on which rows are learned."""
        self.touched = Touched(len(self.sharded.rows))
        self.take_changes()  # compile now rather than while learning waits for the first ones

    def take_touched(self) -> npt.NDArray[np.uint32]:
        """Return the rows of all ranks that were touched, ascending, on rank 0."""
        rows = require_touched(self.touched).take() + np.uint32(self.first_row)
        came = self.ranks.gather(rows)
        return np.concatenate(came) if came else rows[:0]

    def take_changes(self) -> State:
        """Return on rank 0 what `Learner.take_changes` returns."""
        places = require_touched(self.touched).take()
        values = copied_values(self.sharded, places, self._copying)
        rows = self.ranks.gather(places + np.uint32(self.first_row))
        came = self.ranks.gather(values)
        if self.ranks.rank:
            return {}
        return {
            ROWS: np.concatenate(rows),
            VALUES: np.concatenate(came),
            **self._served_parameters(),
        }

    def count_touched(self) -> int:
        """Return the number of touched rows of all ranks, on rank 0."""
        counts = self.ranks.gather(np.array([len(require_touched(self.touched))]))
        return int(sum(each[0] for each in counts))

    def put_back(self, rows: npt.NDArray[np.uint32] | None = None) -> None:
        """Have these rows be touched again; rank 0 gives them, ascending."""
        none = np.empty(0, np.uint32)
        parts = [none] * self.ranks.size
        if rows is not None:
            edges = self.sharded.shards.edges(rows)
            parts = [rows[first:last] for first, last in pairwise(edges)]
        own = self.ranks.scatter(parts, none)
        require_touched(self.touched).put_back(own - np.uint32(self.first_row))

    def track_changes(self) -> None:
        """Note from now on which rows change, for `copy_weights_to`."""
        self._changes = Changes(len(self.sharded.rows))

    def copy_weights_to(self, other: ShardedNetwork) -> None:
        """Make the weights of another network of the same model equal to these."""
        self._copy_to(other)


def network_maker(
    ranks: Ranks, *, spec: Mapping[str, Any], threads: int, progressive: bool
) -> ShardedNetwork:
    """Make the network that `spec`, of plain types, describes. It is a maker of a `Team`.

    An error that one rank has, such as a table without memory, is one of all ranks.
    """
    problem: StreamCtrError | None = None
    try:
        made = ShardedNetwork(
            ranks, msgspec.convert(spec, LearnerSpec), threads=threads, progressive=progressive
        )
    except StreamCtrError as error:
        problem = error
    others = ranks.agree(str(problem) if problem else None)
    if problem:
        raise problem
    if others:
        raise ConfigError(others)
    return made


def _own_processors() -> int:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max((os.cpu_count() or 1) // max(local, 1), 1)
