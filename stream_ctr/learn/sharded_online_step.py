"""The online rule on a table that is sharded: the ranks share the parts of a batch.

    every rank    network forward, and backward with dL/dlogit = 1, on its parts
    in turns      step the sub-batches of the rank on its local table (see `turns`)
    every rank    dL/dW of its parts, once its examples have their g
    all           is every number finite? one answer for all ranks
    every rank    Adam on its slice of the parameters; write the rows that it owns

The sums are those of `OnlineStep`, in the same order, so the model is the same, bit for bit, for
any number of ranks. Slopes stay on their rank, apart from those of the examples of a sub-batch that
begins on the rank before (see `batch_shares`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stream_ctr.distributed.ranks import Transfers
from stream_ctr.learn import online_kernels
from stream_ctr.learn.batch_shares import Share
from stream_ctr.learn.cpu_step import one_torch_thread
from stream_ctr.learn.online_step import OnlineBatch, OnlineMemory, OnlineStep
from stream_ctr.learn.sharded_step import Given, Learned, ShardedStep
from stream_ctr.learn.sharded_table import Borrowed
from stream_ctr.learn.step import SUB_BATCH, dense_rate_scale
from stream_ctr.learn.turns import Turns


class ShardedOnlineStep(ShardedStep, OnlineStep):
    """Takes the steps of a batch by the online rule, together with the other ranks."""

    @cached_property
    def _memory(self) -> OnlineMemory:
        # The local table has its own rows, and pages that are not written take no memory.
        memory = OnlineMemory(
            len(self._logits),
            self._options.columns,
            self._table.rows.shape[1],
            self._table.embedding_dim,
        )
        memory.rows = self._local_rows
        return memory

    def learn_all(self, n: int, given: Given | None, steps: int) -> Learned:
        """Learn a batch of `n` examples, which rank 0 gives.

        Every rank returns whether it was accepted, and what it has lent for it; rank 0 returns the
        logits float64 [n] too. If it is refused, nothing has changed on any rank.
        """
        shares = self._shares(n, sub_batch=SUB_BATCH)
        share = shares[self._ranks.rank]
        spans = [range(each.examples.start, each.examples.stop + each.tail) for each in shares]
        sent = self._scatter(spans, given, labelled=True)
        batch = self._batch_of(n, share)
        parts = [len(each.parts) for each in shares]
        with one_torch_thread():
            borrowed = self._borrow(batch, share)
            turns = Turns(self._sharded, borrowed, shares, self._local_rows)
            tail = self._expect_slopes(batch, share, turns.next)
            turns.expect()
            self._pool.run(
                [partial(self._run_network, batch, at, steps) for at in range(len(batch.parts))]
            )
            head = self._send_slopes(share, turns.previous)
            tail.wait()
            self._take_turn(batch, turns)
            gradients = self._gradients[: len(batch.parts)]
            sums = self._sliced_adam.start(gradients, parts) if self._terms.network else None
            turns.finish(batch.intercept)
            for transfers in (sent, head, *([sums] if sums else [])):
                transfers.wait()
            if not self._ranks.all_true(bool(batch.finite.all() and batch.stepped)):
                return Learned(False, borrowed)
            if sums:
                self._sliced_adam.step(gradients, parts, steps, rate_scale=dense_rate_scale(n))
            self._write(batch, turns)
        self._intercept[:] = batch.intercept
        return Learned(True, borrowed, self._logits_of(batch, shares))

    def _batch_of(self, n: int, share: Share) -> OnlineBatch:
        count = len(share.examples)
        rows = self._parts_for(n)[0].stop
        return OnlineBatch(
            count,
            [slice(rows * at, rows * (at + 1)) for at in range(len(share.parts))],
            self._intercept.copy(),
            examples=n,
            first_part=share.parts.start,
            stepped=range(share.head, count + share.tail),
        )

    def _borrow(self, batch: OnlineBatch, share: Share) -> Borrowed:
        padded = bool(batch.parts) and batch.parts[-1].stop > batch.n
        batch.groups, borrowed = self._place(
            batch.last, size=SUB_BATCH, first=batch.first, padded=padded
        )
        return borrowed

    # -- slopes of a sub-batch that begins on the rank before --------------------------------------

    def _expect_slopes(self, batch: OnlineBatch, share: Share, following: int | None) -> Transfers:
        """Gather the rows of the tail, and start to receive its slopes from the next rank."""
        rows = slice(batch.n, batch.n + share.tail)
        if not share.tail or following is None:
            return self._ranks.start()
        self._gathered(rows)
        if not self._terms.network:
            self._logits[rows] = 0.0
            return self._ranks.start()
        return self._ranks.start(receive=[(following, each) for each in self._slopes(rows)])

    def _send_slopes(self, share: Share, previous: int | None) -> Transfers:
        if not share.head or previous is None or not self._terms.network:
            return self._ranks.start()
        rows = slice(0, share.head)
        return self._ranks.start(send=[(previous, each) for each in self._slopes(rows)])

    def _slopes(self, rows: slice) -> list[npt.NDArray[np.float32]]:
        arrays = [self._logits, self._grad_v, *([self._grad_w] if self._terms.network_w else [])]
        return [array[rows].numpy() for array in arrays]

    # -- the turn ----------------------------------------------------------------------------------

    def _take_turn(self, batch: OnlineBatch, turns: Turns) -> None:
        dense = [partial(self._layer_gradients, batch, at) for at in range(len(batch.parts))]
        self._pool.run([partial(self._step_in_turn, batch, turns), *dense])

    def _step_in_turn(self, batch: OnlineBatch, turns: Turns) -> None:
        gradient = self._memory.gradient
        try:
            turns.begin(batch.intercept, gradient)
            self._step_sub_batches(batch)
            turns.end(batch.intercept, gradient[batch.n : batch.last])
        finally:
            for known in batch.known:
                known.set()

    def _write(self, batch: OnlineBatch, turns: Turns) -> None:
        if self._ranks.size > 1:
            turns.write()
        else:
            self._pool.run(self._row_tasks(batch, online_kernels.write_rows))

    # -- logits ------------------------------------------------------------------------------------

    def _logits_of(self, batch: OnlineBatch, shares: Sequence[Share]) -> Tensor:
        """Return the logits of all examples on rank 0; each was computed where it was stepped."""
        logits = self._memory.logits[batch.first : batch.last]
        (found,) = self._collect([logits], [share.steps for share in shares])
        if self._plain is not None and self._options.progressive:
            moved = self._plain[: batch.n].numpy() - self._logits[: batch.n].numpy()
            found += self._collect([moved], [share.examples for share in shares])[0]
        return torch.from_numpy(found)
