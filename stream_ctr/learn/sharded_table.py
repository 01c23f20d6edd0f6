"""A table whose rows are spread over the ranks of a run, and the exchange of rows between them.

Each rank has the rows of its shards (see `virtual_shards`). For a batch it copies the rows that its
examples read to a table of its own, a local one, where the kernels find them at their places:

    asks      rank i -> owner    row numbers, uint32, ascending
    lends     owner -> rank i    their floats in use, and who has the row before and after

Rows that several ranks step, they step in the order of the ranks. The first one begins with what
the owner lent, and passes the row to the next one that has it. The last one gives it back to the
owner, which writes it only when every rank has found every number finite. So no row number is sent
twice. A row that is only read, for padding or for a prediction, is neither passed nor given back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from stream_ctr.distributed.ranks import Ranks
from stream_ctr.learn import online_kernels, table_kernels
from stream_ctr.learn.table import FLOAT_BYTES, Rates, Table
from stream_ctr.learn.table_kernels import SortedIds, floats_in_use
from stream_ctr.learn.virtual_shards import VirtualShards

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int32]
RankNumbers = npt.NDArray[np.uint8]

NOBODY = 255
"""In the place of a rank: none has the row before, or after."""
_ONLY_READ = np.int32(-(1 << 31))  # the row 0 with its highest bit set


@dataclass(frozen=True, slots=True)
class Lent:
    """Rows that this rank has lent to one rank.

    `rows` are their places in the table here, ascending; the first is only read if `only_read` is
    1. `after` has the rank that has each one next.
    """

    rows: Indices
    only_read: int
    after: RankNumbers

    @property
    def last(self) -> Indices:
        """The places of the rows that come back from this rank."""
        if not len(self.after):
            return self.rows
        return self.rows[self.only_read :][self.after[self.only_read :] == NOBODY]


@dataclass(frozen=True, slots=True)
class Borrowed:
    """The rows in the local table, and those that this rank has lent to each rank for it.

    `rows` are the numbers of the rows, ascending, of which those of rank r lie from `edges[r]` to
    before `edges[r + 1]`. The first is only read if `only_read` is 1. `before` and `after` have the
    ranks that have each row before and after this one.
    """

    rows: Indices
    edges: Sequence[int]
    only_read: int
    before: RankNumbers
    after: RankNumbers
    lent: Sequence[Lent]

    def from_rank(self, rank: int) -> Indices:
        """Return the places of the rows that a rank passes to this one."""
        return np.flatnonzero(self.before == rank).astype(np.int32)

    def to_rank(self, rank: int) -> Indices:
        """Return the places of the rows that this rank passes to another one."""
        return np.flatnonzero(self.after == rank).astype(np.int32)

    def back_to(self, owner: int) -> Indices:
        """Return the places of the rows of `owner` that no rank has after this one."""
        first = max(self.edges[owner], self.only_read)
        last = self.after[first : self.edges[owner + 1]] == NOBODY
        return (first + np.flatnonzero(last)).astype(np.int32)


class ShardedTable(Table):
    """The rows of this rank of a table, and the exchange of rows with the other ranks.

    The other arguments are those of `Table`.

    >>> ShardedTable(Ranks.alone(), bits=4, embedding_dim=10).rows.shape
    torch.Size([16, 16])
    """

    def __init__(
        self,
        ranks: Ranks,
        *,
        bits: int,
        embedding_dim: int,
        embeddings: int = 1,
        rates: Rates = Rates(),  # noqa: B008 - frozen
        initial_scale: float = 0.01,
        seed: int = 0,
    ) -> None:
        self.ranks = ranks
        self.shards = VirtualShards(rows=1 << bits, ranks=ranks.size)
        super().__init__(
            bits=bits,
            embedding_dim=embedding_dim,
            embeddings=embeddings,
            rates=rates,
            initial_scale=initial_scale,
            seed=seed,
            part=self.shards.rows_of_rank(ranks.rank),
        )
        self.floats = floats_in_use(embedding_dim, embeddings, rates.optimizer)
        """The number of floats of a row that are in use, and are sent."""
        self.rows_fetched = 0
        """The number of rows that were copied from other ranks."""
        self.rows_passed = 0
        """The number of rows, or of entries with gradients, that were sent to other ranks."""
        self._spare = np.empty((4, 0), np.int32)
        self.copy = table_kernels.copy_rows(self.floats)
        self.put = table_kernels.put_rows(self.floats)

    def borrow(
        self, rows: Indices, local: Floats, *, only_read: int = 0, stepped: bool = True
    ) -> Borrowed:
        """Copy `rows` int32 [U], ascending, to `local` [>= U, row], whose padding stays as it is.

        Every rank calls this at once, with the rows that it needs. With `only_read` = 1, the first
        one is row 0 and will not be stepped. Unless they are `stepped`, none will, and nobody needs
        to know who has which.
        """
        edges = self.shards.edges(rows)
        requests, flags = self._requests(rows, edges, only_read)
        befores, afters = self._order(requests, flags) if stepped else ([], [])
        before, after = self._lend(requests, befores, afters, edges, local)
        lent = [
            Lent(request, flag, afters[rank] if stepped else after[:0])
            for rank, (request, flag) in enumerate(zip(requests, flags, strict=True))
        ]
        return Borrowed(rows, edges, only_read, before, after, lent)

    # -- asking ------------------------------------------------------------------------------------

    def _requests(
        self, rows: Indices, edges: Sequence[int], only_read: int
    ) -> tuple[list[Indices], list[int]]:
        """Return the places here that each rank asks for, and whether the first is only read."""
        me = self.ranks.rank
        asked = rows
        if only_read:
            asked = rows.copy()
            asked[0] = _ONLY_READ
        parts = [asked[first:last] for first, last in zip(edges[:-1], edges[1:], strict=True)]
        counts = self.ranks.counts([len(part) for part in parts])
        requests = [np.empty(count, np.int32) for count in counts]
        requests[me] = parts[me].copy() if only_read else parts[me]
        self.ranks.start(
            send=[(rank, part) for rank, part in enumerate(parts) if rank != me],
            receive=[(rank, request) for rank, request in enumerate(requests) if rank != me],
        ).wait()
        self.rows_fetched += len(rows) - len(parts[me])
        flags = [int(len(request) > 0 and request[0] == _ONLY_READ) for request in requests]
        for request, flag in zip(requests, flags, strict=True):
            request[:flag] = 0
        if self.first_row:
            requests = [request - np.int32(self.first_row) for request in requests]
        return requests, flags

    # -- lending -----------------------------------------------------------------------------------

    def _order(
        self, requests: Sequence[Indices], flags: Sequence[int]
    ) -> tuple[list[RankNumbers], list[RankNumbers]]:
        """Return which rank has each row of each request before it, and which after it."""
        counts = [len(request) for request in requests]
        total = sum(counts)
        before = np.full(total, NOBODY, np.uint8)
        after = np.full(total, NOBODY, np.uint8)
        if self.ranks.size > 1 and total:
            keys = np.concatenate(requests)
            ends = np.cumsum(counts)
            sorted_keys = self.sort(keys)
            only_read = np.array([-1, *(ends - counts)[np.array(flags, bool)]])
            source = np.repeat(np.arange(len(counts), dtype=np.uint8), counts)
            _chain(sorted_keys.keys, sorted_keys.order, source, only_read, before, after)
        edges = np.cumsum(counts)[:-1]
        return np.split(before, edges), np.split(after, edges)

    def sort(self, keys: Indices) -> SortedIds:
        """Return row numbers in ascending order; equal ones keep their order."""
        n = len(keys)
        if len(self._spare[0]) < n:
            self._spare = np.empty((4, 2 * n), np.int32)
        found = SortedIds(self._spare[0][:n], self._spare[1][:n])
        table_kernels.sort_ids(keys, self.bits, found, self._spare[2:, :n])
        return found

    def _lend(
        self,
        requests: Sequence[Indices],
        befores: Sequence[RankNumbers],
        afters: Sequence[RankNumbers],
        edges: Sequence[int],
        local: Floats,
    ) -> tuple[RankNumbers, RankNumbers]:
        """Send every rank its rows, and fill `local`; return who has each row before and after."""
        me = self.ranks.rank
        stepped = bool(befores)
        replies = {rank: _Reply(edges[rank + 1] - edges[rank], self.floats, stepped)
                   for rank in range(self.ranks.size) if rank != me}  # fmt: skip
        lent = {}
        for rank, request in enumerate(requests):
            if rank != me:
                lent[rank] = _Reply(len(request), self.floats, stepped)
                self.copy(self.rows.numpy(), request, 0, len(request), lent[rank].values)
                if stepped:
                    lent[rank].before[:] = befores[rank]
                    lent[rank].after[:] = afters[rank]
        coming = self.ranks.start(
            send=[(rank, reply.data) for rank, reply in lent.items()],
            receive=[(rank, reply.data) for rank, reply in replies.items()],
        )
        own = local[edges[me] : edges[me + 1]]
        online_kernels.copy_rows(self.rows.numpy(), requests[me], own, 0, len(own))
        before, after = (np.full(edges[-1] if stepped else 0, NOBODY, np.uint8) for _ in range(2))
        if stepped:
            before[edges[me] : edges[me + 1]] = befores[me]
            after[edges[me] : edges[me + 1]] = afters[me]
        coming.wait()
        for rank, reply in replies.items():
            rows = slice(edges[rank], edges[rank + 1])
            local[rows, : self.floats] = reply.values
            if stepped:
                before[rows] = reply.before
                after[rows] = reply.after
        return before, after

    # -- writing -----------------------------------------------------------------------------------

    def write(self, places: Indices, values: Floats) -> None:
        """Write `values` [n, floats] to the rows at these places here."""
        self.put(self.rows.numpy(), places, 0, len(places), values)


class _Reply:
    """The bytes of a reply about `count` rows, and the arrays in them."""

    def __init__(self, count: int, floats: int, stepped: bool) -> None:
        size = FLOAT_BYTES * count * floats
        self.data = np.empty(size + (2 * count if stepped else 0), np.uint8)
        self.values = self.data[:size].view(np.float32).reshape(count, floats)
        self.before = self.data[size : size + count]
        self.after = self.data[size + count :]


@numba.njit(cache=True, nogil=True)
def _chain(keys, order, source, only_read, before, after):  # type: ignore[no-untyped-def]
    """Write which rank has the row of an entry before and after the one that asks for it.

    The entries whose numbers are among `only_read` are in no chain.
    """
    last = -1
    for i in range(len(keys)):
        entry = order[i]
        skipped = False
        for number in only_read:
            skipped |= number == entry
        if skipped:
            continue
        if last >= 0 and keys[last] == keys[i]:
            before[entry] = source[order[last]]
            after[order[last]] = source[entry]
        last = i
