"""Which rows belong to which shard and rank."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stream_ctr.learn.virtual_shards import MOST_SHARDS, VirtualShards

ROWS = st.integers(4, 12).map(lambda bits: 1 << bits)
RANKS = st.integers(1, MOST_SHARDS)


@given(rows=ROWS, ranks=RANKS)
def test_each_row_belongs_to_one_shard_and_each_shard_to_one_rank(rows: int, ranks: int) -> None:
    shards = VirtualShards(rows=rows, ranks=ranks)
    owned = [shard for rank in range(ranks) for shard in shards.of_rank(rank)]
    assert owned == list(range(shards.count))
    held = [row for shard in owned for row in shards.rows_of_shard(shard)]
    assert held == list(range(rows))
    assert held == [row for rank in range(ranks) for row in shards.rows_of_rank(rank)]


@given(rows=ROWS, ranks=RANKS)
def test_ranks_have_as_many_rows_as_others_up_to_one_shard(rows: int, ranks: int) -> None:
    shards = VirtualShards(rows=rows, ranks=ranks)
    counts = [len(shards.rows_of_rank(rank)) for rank in range(ranks)]
    assert max(counts) - min(counts) <= shards.rows_each
    assert max(counts) <= -(-shards.count // ranks) * shards.rows_each


@given(rows=ROWS, one=RANKS, other=RANKS)
def test_shards_are_the_same_for_any_number_of_ranks(rows: int, one: int, other: int) -> None:
    first, second = (VirtualShards(rows=rows, ranks=ranks) for ranks in (one, other))
    assert first.count == second.count == min(64, rows)
    for shard in range(first.count):
        assert first.rows_of_shard(shard) == second.rows_of_shard(shard)


@given(rows=ROWS, ranks=RANKS, asked=st.lists(st.integers(0, 1 << 12), max_size=40))
def test_edges_split_rows_by_their_owner(rows: int, ranks: int, asked: list[int]) -> None:
    shards = VirtualShards(rows=rows, ranks=ranks)
    wanted = np.unique(np.array([row % rows for row in asked], np.int32))
    edges = shards.edges(wanted)
    assert len(edges) == ranks + 1
    for rank in range(ranks):
        own = shards.rows_of_rank(rank)
        split = wanted[edges[rank] : edges[rank + 1]].tolist()
        assert split == [row for row in wanted.tolist() if row in own]
