"""The common part of the steps of a sharded network: the examples and the rows of each rank.

    rank 0        sends every rank the examples of its parts
    every rank    sorts their ids; borrows their distinct rows, to a local table; ids become places
                  in it, so the kernels of a step in one process run unchanged

Every rank makes every call at the same time. Rank 0 alone gives the examples of a batch and gets
their logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stream_ctr.distributed.ranks import Transfers
from stream_ctr.learn import online_kernels
from stream_ctr.learn.adam import FlatAdam
from stream_ctr.learn.batch_shares import Share, most_parts, shares_of
from stream_ctr.learn.cpu_step import ROW_MULTIPLE, CpuStep, one_torch_thread
from stream_ctr.learn.online_kernels import Groups
from stream_ctr.learn.sharded_table import Borrowed, ShardedTable
from stream_ctr.learn.sliced_adam import SlicedAdam
from stream_ctr.learn.step import SUB_BATCH, Ids, Labels, StepOptions, Values

Array = npt.NDArray[Any]


class Given(NamedTuple):
    """The examples of a batch, which rank 0 has: ids [n, F], labels [n] and values [n, V].

    Without labels they are to be predicted.
    """

    ids: Ids
    labels: Labels | None
    values: Values | None


@dataclass(frozen=True, slots=True)
class Learned:
    """The verdict on a batch, the rows lent for it, and on rank 0 the logits [n]."""

    accepted: bool
    borrowed: Borrowed
    logits: Tensor | None = None


class ShardedStep(CpuStep):
    """The part of a step on a table that is sharded which does not depend on its optimiser."""

    def __init__(
        self,
        model: nn.Module,
        table: ShardedTable,
        adam: FlatAdam,
        intercept: npt.NDArray[np.float64],
        options: StepOptions,
        *,
        threads: int,
    ) -> None:
        self._sharded = table
        self._ranks = table.ranks
        super().__init__(model, table, adam, intercept, options, threads=threads)
        self._sliced_adam = SlicedAdam(self._ranks, adam, self._pool)

    def _buffered_rows(self) -> int:
        """Return the rows of the parts of this rank, and those of the tail after them."""
        batch_size = self._options.batch_size
        sizes = range(ROW_MULTIPLE, batch_size + ROW_MULTIPLE, ROW_MULTIPLE)
        most = max(
            most_parts(len(parts), self._ranks.size) * parts[0].stop
            for parts in (self._parts_for(size) for size in sizes)
        )
        return most + (SUB_BATCH if self._ranks.size > 1 else 0)

    def _most_parts(self) -> int:
        return most_parts(len(self._parts), self._ranks.size)

    @cached_property
    def _local_rows(self) -> npt.NDArray[np.float32]:
        """The local table; the padding of its rows is 0, as in the whole one."""
        columns = self._options.columns
        return np.zeros((len(self._logits) * columns + 1, self._table.rows.shape[1]), np.float32)

    @cached_property
    def _grouping(self) -> npt.NDArray[np.int32]:
        return np.empty((3, self._ids.size + 1), np.int32)

    def _readable_rows(self) -> npt.NDArray[np.float32]:
        return self._local_rows

    # -- examples ----------------------------------------------------------------------------------

    def _shares(self, n: int, *, sub_batch: int | None) -> list[Share]:
        parts = [part for part in self._parts_for(n) if part.start < n]
        return shares_of(n, parts, ranks=self._ranks.size, sub_batch=sub_batch)

    def _scatter(self, spans: Sequence[range], given: Given | None, *, labelled: bool) -> Transfers:
        """Fill the buffers with the examples of this rank's span, which rank 0 has."""
        me = self._ranks.rank
        count = len(spans[me])
        if given is not None:
            ids = np.ascontiguousarray(given.ids)
            arrays: list[Array] = [ids]
            arrays += [np.ascontiguousarray(given.labels)] if given.labels is not None else []
            arrays += [np.ascontiguousarray(given.values)] if self._has_values(given) else []
            sent = self._ranks.start(
                send=[
                    (rank, array[span.start : span.stop])
                    for rank, span in enumerate(spans)
                    if rank != me
                    for array in arrays
                ]
            )
            first = slice(spans[me].start, spans[me].stop)
            values = given.values[first] if given.values is not None else None
            self._load(ids[first], values)
            if given.labels is not None:
                self._labels[:count] = torch.from_numpy(given.labels[first])
            return sent
        labels = np.empty(count if labelled else 0, np.uint8)
        some = np.empty((count, len(self._value_fields)), np.float32)
        self._ranks.start(
            receive=[(0, array) for array in (self._ids[:count], labels, some)]
        ).wait()
        self._load(self._ids[:count], some)
        if labelled:
            self._labels[:count] = torch.from_numpy(labels)
        return self._ranks.start()

    def _has_values(self, given: Given) -> bool:
        return bool(self._value_fields) and given.values is not None

    # -- rows --------------------------------------------------------------------------------------

    def _place(
        self, n: int, *, size: int, first: int = 0, padded: bool, stepped: bool = True
    ) -> tuple[Groups, Borrowed]:
        """Borrow the rows of the first `n` examples; their ids become places in the local table.

        Return the groups of their entries in sub-batches of `size`, from example `first` on, and
        what was borrowed. Padding reads row 0 of the table.
        """
        self._sort(n)
        groups = online_kernels.group(
            self._sorted(n), (n, self._options.columns), size, self._grouping,
            row_of=self._ids[:n], first=first, row_0=padded,
        )  # fmt: skip
        only_read = int(padded and not (n and self._sorted(n).keys[0] == 0))
        borrowed = self._sharded.borrow(
            groups.rows, self._local_rows, only_read=only_read, stepped=stepped
        )
        return groups, borrowed

    def gather_moments(self) -> None:
        """Fill the moments of Adam on rank 0 with those of all slices."""
        self._sliced_adam.gather_moments()

    # -- predictions -------------------------------------------------------------------------------

    @property
    def predicted_at_once(self) -> int:
        """The number of examples that a rank predicts at once."""
        rows = self._predicted_parts[0].stop
        return len(self._logits) // rows * rows

    def predict_all(self, n: int, given: Given | None) -> npt.NDArray[np.float32]:
        """Return the logits of `n` examples on rank 0, and none elsewhere.

        The ranks predict as many parts each as they can, so any number of them gives the same
        logits.
        """
        at_once = self._ranks.size * self.predicted_at_once
        found = []
        for start in range(0, n, at_once):
            part = slice(start, start + at_once)
            some = None if given is None else Given(
                given.ids[part], None, None if given.values is None else given.values[part]
            )  # fmt: skip
            found.append(self._predict(min(at_once, n - start), some))
        return np.concatenate(found) if found else np.empty(0, np.float32)

    def _predict(self, n: int, given: Given | None) -> npt.NDArray[np.float32]:
        rows = self._predicted_parts[0].stop
        parts = [slice(start, start + rows) for start in range(0, n, rows)]
        spans = [share.examples for share in shares_of(n, parts, ranks=self._ranks.size)]
        span = spans[self._ranks.rank]
        sent = self._scatter(spans, given, labelled=False)
        count = len(span)
        self._place(count, size=max(count, 1), padded=False, stepped=False)
        with one_torch_thread():
            self._pool.run(
                [
                    partial(self._score, slice(start, start + rows))
                    for start in range(0, count, rows)
                ]
            )
        logits = self._logits[:count].numpy() + np.float32(self._intercept[0])
        sent.wait()
        return self._collect([logits], spans)[0]

    def _collect(self, arrays: Sequence[Array], spans: Sequence[range]) -> list[Array]:
        """Return the arrays of all ranks, joined, on rank 0; each rank has those of its span."""
        if self._ranks.rank:
            self._ranks.start(send=[(0, array) for array in arrays]).wait()
            return [array[:0] for array in arrays]
        joined = [np.empty(spans[-1].stop, array.dtype) for array in arrays]
        self._ranks.start(
            receive=[
                (rank, whole[span.start : span.stop])
                for rank, span in enumerate(spans)
                if rank
                for whole in joined
            ]
        ).wait()
        for whole, array in zip(joined, arrays, strict=True):
            whole[: len(array)] = array
        return joined
