"""Which rows of a table belong to which shard, and which shards to which rank.

    virtual shards   V = min(64, rows) of consecutive rows, all of one size
    rank r of N      the shards [r V // N, (r + 1) V // N)

The shards do not depend on the number of ranks. A run that goes on with another number reads other
shards, and none has to be split.

>>> shards = VirtualShards(rows=1024, ranks=3)
>>> shards.count, shards.of_rank(1), shards.rows_of_rank(1), shards.rows_of_shard(63)
(64, range(21, 42), range(336, 672), range(1008, 1024))
>>> shards.edges(np.array([1, 335, 336, 900], np.int32))
[0, 2, 3, 4]
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt

MOST_SHARDS = 64
"""The number of shards of a table, and the largest number of ranks."""


class VirtualShards:
    """The shards of a table of `rows` rows, a power of two, among `ranks` ranks.

    Where there are more ranks than shards, some ranks have none.
    """

    def __init__(self, *, rows: int, ranks: int) -> None:
        self.rows = rows
        self.ranks = ranks
        self.count = min(MOST_SHARDS, rows)
        self.rows_each = rows // self.count

    def of_rank(self, rank: int) -> range:
        """Return the shards of a rank."""
        return range(rank * self.count // self.ranks, (rank + 1) * self.count // self.ranks)

    def rows_of_shard(self, shard: int) -> range:
        """Return the rows of a shard."""
        return range(shard * self.rows_each, (shard + 1) * self.rows_each)

    def rows_of_rank(self, rank: int) -> range:
        """Return the rows of a rank."""
        shards = self.of_rank(rank)
        return range(shards.start * self.rows_each, shards.stop * self.rows_each)

    def edges(self, rows: npt.NDArray[np.integer]) -> list[int]:
        """Return where the rows of each rank begin in ascending `rows`, and where the last end."""
        found: list[int] = np.searchsorted(rows, self._inner_bounds).tolist()
        return [0, *found, len(rows)]

    @cached_property
    def _inner_bounds(self) -> npt.NDArray[np.int64]:
        return np.array([self.rows_of_rank(rank).start for rank in range(1, self.ranks)], np.int64)
