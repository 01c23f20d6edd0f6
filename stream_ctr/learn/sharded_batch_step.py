"""One step a batch on a table that is sharded, with the table optimisers "adagrad" and "adam".

    every rank    forward and backward on its parts: gradients of w, of v and of the parameters
    all           is every number finite? one answer for all ranks
    entries       (row, gradient of w, gradient of v) -> the owner of the row, which sums them for
                  each row in the order of the parts and positions, and steps the row
    every rank    Adam on its slice of the parameters

The sums are those of `BatchStep`, in the same order, so the model is the same, bit for bit, for any
number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from stream_ctr.learn.batch_shares import Share
from stream_ctr.learn.cpu_step import BatchStep, PartsOfBatch, one_torch_thread
from stream_ctr.learn.sharded_step import Given, Learned, ShardedStep
from stream_ctr.learn.sharded_table import Floats, Indices


class ShardedBatchStep(ShardedStep, BatchStep):
    """Takes one step on a batch, together with the other ranks."""

    def learn_all(self, n: int, given: Given | None, steps: int) -> Learned:
        """Learn a batch of `n` examples, which rank 0 gives.

        Every rank returns whether it was accepted, and what it has lent for it; rank 0 returns the
        logits float32 [n] too. If it is refused, nothing has changed on any rank.
        """
        shares = self._shares(n, sub_batch=None)
        share = shares[self._ranks.rank]
        spans = [each.examples for each in shares]
        parts = [len(each.parts) for each in shares]
        sent = self._scatter(spans, given, labelled=True)
        batch = self._batch_of(n, share)
        padded = bool(batch.parts) and batch.parts[-1].stop > batch.n
        with one_torch_thread():
            _, borrowed = self._place(batch.n, size=max(batch.n, 1), padded=padded, stepped=False)
            self._pool.run(
                [partial(self._learn_part, batch, at, steps) for at in range(len(batch.parts))]
            )
            sent.wait()
            if not self._ranks.all_true(bool(batch.finite.all())):
                return Learned(False, borrowed)
            gradients = self._gradients[: len(batch.parts)]
            sums = self._sliced_adam.start(gradients, parts)
            self._step_rows(batch.n, n, steps)
            sums.wait()
            self._sliced_adam.step(gradients, parts, steps)
        (logits,) = self._collect([self._logits[: batch.n].numpy()], spans)
        return Learned(True, borrowed, torch.from_numpy(logits))

    def _batch_of(self, n: int, share: Share) -> PartsOfBatch:
        rows = self._parts_for(n)[0].stop
        return PartsOfBatch(
            len(share.examples),
            [slice(rows * at, rows * (at + 1)) for at in range(len(share.parts))],
            examples=n,
            first_part=share.parts.start,
        )

    def _step_rows(self, n: int, examples: int, steps: int) -> None:
        """Step the rows of this rank on the gradients of all ranks."""
        if self._ranks.size == 1:
            self._pool.run([*self._table_updates(n, steps)])
            return
        entries = self._exchange_entries(n)
        found = self._sharded.sort(entries.rows)
        rates = self._table.rates.at_step(steps, examples=examples)
        edges = np.linspace(0, len(entries.rows), 2 * self._pool.threads + 1).astype(int).tolist()
        rows = self._table.rows.numpy()
        self._pool.run(
            [
                partial(
                    self._update, rows, found, first, last, entries.grad_w, entries.grad_v, rates
                )
                for first, last in zip(edges[:-1], edges[1:], strict=True)
            ]
        )

    def _exchange_entries(self, n: int) -> _Entries:
        """Send the gradients of `n` examples to the owners of their rows; return those that came.

        They come in the order of the ranks, and from a rank in that of the rows; those of one row
        in that of the examples.
        """
        me = self._ranks.rank
        sorted_ids = self._sorted(n)
        edges = self._sharded.shards.edges(sorted_ids.keys)
        sent = [
            self._entries(sorted_ids.keys[first:last], sorted_ids.order[first:last])
            for first, last in zip(edges[:-1], edges[1:], strict=True)
        ]
        self._sharded.rows_passed += n * self._options.columns - len(sent[me].rows)
        counts = self._ranks.counts([len(each.rows) for each in sent])
        came = _Entries.empty(sum(counts), self._table.width)
        ends = np.cumsum(counts)
        slices = [came.part(end - count, end) for count, end in zip(counts, ends, strict=True)]
        for into, own in zip(slices[me], sent[me], strict=True):
            into[:] = own
        self._ranks.start(send=_arrays(sent, but=me), receive=_arrays(slices, but=me)).wait()
        came.rows[:] -= np.int32(self._table.first_row)
        return came

    def _entries(self, rows: Indices, places: Indices) -> _Entries:
        return _Entries(
            rows,
            self._grad_w.view(-1).numpy()[places],
            self._grad_v.view(-1, self._table.width).numpy()[places],
        )


class _Entries(NamedTuple):
    """The gradients of entries (example, field): `rows` [n], `grad_w` [n], `grad_v` [n, width]."""

    rows: Indices
    grad_w: Floats
    grad_v: Floats

    @classmethod
    def empty(cls, count: int, width: int) -> _Entries:
        return cls(
            np.empty(count, np.int32),
            np.empty(count, np.float32),
            np.empty((count, width), np.float32),
        )

    def part(self, first: int, last: int) -> _Entries:
        return _Entries(self.rows[first:last], self.grad_w[first:last], self.grad_v[first:last])


def _arrays(entries: Sequence[_Entries], *, but: int) -> list[tuple[int, npt.NDArray[np.generic]]]:
    return [(rank, array) for rank, each in enumerate(entries) if rank != but for array in each]
