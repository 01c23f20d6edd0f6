"""A table whose rows are spread over ranks: initial rows, memory, and the exchange of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ranks import on_ranks

from stream_ctr.distributed.ranks import Ranks
from stream_ctr.distributed.team import Team
from stream_ctr.learn.sharded_table import NOBODY, Borrowed, ShardedTable
from stream_ctr.learn.table import Rates, Table

BITS = 6
Asked = Sequence[tuple[list[int], bool]]
"""The rows that each rank asks for, and whether it only reads row 0 besides."""


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("bits", [4, 12])
@pytest.mark.parametrize("embedding_dim", [1, 3, 16])
def test_rows_start_as_those_of_a_whole_table(ranks: int, bits: int, embedding_dim: int) -> None:
    options = {"bits": bits, "embedding_dim": embedding_dim, "initial_scale": 0.1, "seed": 5}
    whole = Table(**options).rows.numpy()  # type: ignore[arg-type]
    parts = [
        ShardedTable(Ranks(rank, ranks), **options)  # type: ignore[arg-type]
        for rank in range(ranks)
    ]
    assert np.concatenate([part.rows.numpy() for part in parts]).tobytes() == whole.tobytes()
    assert [part.first_row for part in parts] == [
        part.shards.rows_of_rank(rank).start for rank, part in enumerate(parts)
    ]


def test_a_table_drawn_in_chunks_starts_as_one_drawn_at_once() -> None:
    whole = Table(bits=18, embedding_dim=3, seed=1).rows
    part = Table(bits=18, embedding_dim=3, seed=1, part=range(65_535, 200_001)).rows
    assert part.numpy().tobytes() == whole[65_535:200_001].numpy().tobytes()


@pytest.mark.parametrize("ranks", [2, 4, 16])
def test_a_rank_has_the_memory_of_its_share_of_the_rows(ranks: int) -> None:
    whole = Table(bits=12, embedding_dim=10).rows.numpy()
    for rank in range(ranks):
        held = ShardedTable(Ranks(rank, ranks), bits=12, embedding_dim=10).rows.numpy()
        assert held.nbytes * ranks == whole.nbytes


# -- the exchange ----------------------------------------------------------------------------------


class Lending:
    """The tables of a rank, as an object of a team, and what they must lend."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        rates = Rates("online")
        self._table = ShardedTable(ranks, bits=BITS, embedding_dim=4, rates=rates)
        self._whole = Table(bits=BITS, embedding_dim=4, rates=rates).rows.numpy()

    def check(self, *, asked: Asked, stepped: bool) -> str | None:
        """Borrow what each rank asks for; return the first difference that a rank finds."""
        try:
            self._check(asked, stepped)
        except AssertionError as error:
            return self._ranks.agree(str(error) or "not equal")
        return self._ranks.agree(None)

    def _check(self, asked: Asked, stepped: bool) -> None:
        me = self._ranks.rank
        rows, zero = asked[me]
        only_read = int(zero and 0 not in rows)
        wanted = np.array(([0] if only_read else []) + rows, np.int32)
        local = np.zeros((len(wanted) + 3, self._whole.shape[1]), np.float32)
        borrowed = self._table.borrow(wanted, local, only_read=only_read, stepped=stepped)
        np.testing.assert_array_equal(local[: len(wanted)], self._whole[wanted])
        assert not local[len(wanted) :].any()
        own = self._table.shards.rows_of_rank(me)
        for rank, (others, _) in enumerate(asked):
            lent = borrowed.lent[rank]
            stepping = lent.rows[lent.only_read :] + own.start
            assert stepping.tolist() == [row for row in others if row in own], rank
            if stepped:
                last = [row for row in others if row in own and not self._after(asked, row, rank)]
                assert (lent.last + own.start).tolist() == last, rank
        if stepped:
            self._check_order(asked, borrowed)

    def _check_order(self, asked: Asked, borrowed: Borrowed) -> None:
        me = self._ranks.rank
        for place, row in enumerate(borrowed.rows.tolist()):
            if place < borrowed.only_read:
                continue
            before = [rank for rank in range(me) if row in asked[rank][0]]
            after = self._after(asked, row, me)
            assert borrowed.before[place] == (before[-1] if before else NOBODY), (row, "before")
            assert borrowed.after[place] == (after[0] if after else NOBODY), (row, "after")
        for owner in range(self._ranks.size):
            back = borrowed.rows[borrowed.back_to(owner)].tolist()
            rows = self._table.shards.rows_of_rank(owner)
            assert back == [
                row for row in asked[me][0] if row in rows and not self._after(asked, row, me)
            ], owner

    def _after(self, asked: Asked, row: int, rank: int) -> list[int]:
        return [later for later in range(rank + 1, self._ranks.size) if row in asked[later][0]]


def _exchanges(ranks: Ranks) -> None:
    team = Team(ranks, {"lending": Lending})
    if ranks.rank:
        team.follow()
        return
    number, lending = team.make("lending")
    rows = st.lists(st.integers(0, (1 << BITS) - 1), unique=True, max_size=30).map(sorted)
    asked_by = st.tuples(rows, st.booleans())

    @settings(max_examples=60, deadline=None, database=None)
    @given(
        asked=st.lists(asked_by, min_size=ranks.size, max_size=ranks.size), stepped=st.booleans()
    )
    def exchange(asked: Asked, stepped: bool) -> None:
        arguments: dict[str, Any] = {"asked": asked, "stepped": stepped}
        team.announce(number, "check", **arguments)
        assert lending.check(**arguments) is None

    exchange()
    team.close()


def test_a_rank_alone_borrows_from_itself() -> None:
    _exchanges(Ranks.alone())


@pytest.mark.slow
def test_ranks_borrow_the_rows_they_ask_for_and_know_who_has_them_next() -> None:
    on_ranks(3, _exchanges)
