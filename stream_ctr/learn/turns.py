"""The turns that the ranks take at the sub-batches of a batch, under the online rule.

A rank waits for its turn, steps its sub-batches on its local table, and ends its turn by a message
to every other rank, float32:

    w0, n0         the intercept and its sum of squared gradients, as two float64
    g              of the head of the next rank, whose examples were stepped here
    rows           that the other rank has next
    rows           of the other rank, which nobody has after this one

Both sides know the sizes, as they know who has each row next. Meanwhile each rank computes the
gradients of its layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stream_ctr.distributed.ranks import Transfers
from stream_ctr.learn.batch_shares import Share
from stream_ctr.learn.sharded_table import Borrowed, Floats, Indices, ShardedTable

_INTERCEPT = 4  # words of float32


class Turns:
    """The messages of one batch. `shares` are those of the ranks, and `local` is the local table.

    Call `expect`, then `begin`, then `end`, then `finish`, and `write` if the batch is accepted.
    """

    def __init__(
        self, table: ShardedTable, borrowed: Borrowed, shares: Sequence[Share], local: Floats
    ) -> None:
        self._table = table
        self._borrowed = borrowed
        self._local = local
        self._me = table.ranks.rank
        self._shares = shares
        self._active = [rank for rank, share in enumerate(shares) if share.examples]
        self._expected: dict[int, tuple[npt.NDArray[np.float32], Transfers]] = {}
        self._sent = table.ranks.start()

    @property
    def previous(self) -> int | None:
        """The last rank before this one that has examples."""
        return max((rank for rank in self._active if rank < self._me), default=None)

    @property
    def next(self) -> int | None:
        """The first rank after this one that has examples."""
        return min((rank for rank in self._active if rank > self._me), default=None)

    def expect(self) -> None:
        """Start to receive what the other ranks say at the end of their turns."""
        for rank in self._active:
            if rank != self._me:
                rows = len(self._borrowed.from_rank(rank)) + len(self._borrowed.lent[rank].last)
                words = _INTERCEPT + self._head(rank) + rows * self._table.floats
                message = np.empty(words, np.float32)
                transfers = self._table.ranks.start(receive=[(rank, message)])
                self._expected[rank] = message, transfers

    def _head(self, rank: int) -> int:
        """Return how many examples of this rank another one steps."""
        return self._shares[self._me].head if rank == self.previous else 0

    def begin(self, intercept: npt.NDArray[np.float64], gradient: npt.NDArray[np.float32]) -> None:
        """Wait for the turns before; take over the intercept, the rows and `gradient` of the head.

        A rank without examples has no turn.
        """
        floats = self._table.floats
        for rank in self._active:
            if rank >= self._me or self._me not in self._active:
                continue
            message = self._message_of(rank)
            head = self._head(rank)
            gradient[:head] = message[_INTERCEPT : _INTERCEPT + head]
            places = self._borrowed.from_rank(rank)
            rows = message[_INTERCEPT + head :][: len(places) * floats]
            self._table.put(self._local, places, 0, len(places), rows.reshape(-1, floats))
            intercept[:] = message[:_INTERCEPT].view(np.float64)

    def _message_of(self, rank: int) -> npt.NDArray[np.float32]:
        message, transfers = self._expected[rank]
        transfers.wait()
        return message

    def end(self, intercept: npt.NDArray[np.float64], tail: npt.NDArray[np.float32]) -> None:
        """Pass on the intercept, the gradients of the `tail`, and the rows. Return at once."""
        if self._me in self._active:
            self._sent = self._table.ranks.start(
                send=[
                    (rank, self._message_to(rank, intercept, tail))
                    for rank in range(len(self._shares))
                    if rank != self._me
                ]
            )

    def _message_to(
        self, rank: int, intercept: npt.NDArray[np.float64], tail: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        if rank != self.next:
            tail = tail[:0]
        places = np.concatenate([self._borrowed.to_rank(rank), self._borrowed.back_to(rank)])
        self._table.rows_passed += len(places)
        head = _INTERCEPT + len(tail)
        message = np.empty(head + len(places) * self._table.floats, np.float32)
        message[:_INTERCEPT].view(np.float64)[:] = intercept
        message[_INTERCEPT:head] = tail
        rows = message[head:].reshape(-1, self._table.floats)
        self._table.copy(self._local, places, 0, len(places), rows)
        return message

    def finish(self, intercept: npt.NDArray[np.float64]) -> None:
        """Wait for the turns after this one, and take over the last intercept."""
        for rank in self._active:
            if rank != self._me:
                self._message_of(rank)
        if self._active[-1] != self._me:
            intercept[:] = self._expected[self._active[-1]][0][:_INTERCEPT].view(np.float64)
        self._sent.wait()

    def write(self) -> None:
        """Write the rows of this rank that the batch has stepped."""
        for rank, lent in enumerate(self._borrowed.lent):
            places = lent.last
            self._table.write(places, self._returned(rank, places))

    def _returned(self, rank: int, places: Indices) -> Floats:
        """Return the values of the rows that come back from a rank."""
        floats = self._table.floats
        if rank != self._me:
            message = self._expected[rank][0] if len(places) else np.empty(0, np.float32)
            return message[len(message) - len(places) * floats :].reshape(-1, floats)
        values = np.empty((len(places), floats), np.float32)
        self._table.copy(self._local, self._borrowed.back_to(self._me), 0, len(places), values)
        return values
