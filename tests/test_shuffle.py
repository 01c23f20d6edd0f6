"""Columns on their way between ranks: every row reaches its owner, in order and unchanged."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.thread_ranks import on_threads

from stream_ctr.distributed.ranks import Ranks
from stream_ctr.join.examples import Examples
from stream_ctr.join.shuffle import Block, Blocks, Column, exchange, gather_rows, network_bytes

ODD = Block(
    [
        Column("number", np.int64),
        Column("values", np.float32, 3),
        Column("label", np.uint8),
        Column("ids", np.uint8, 5),
    ]
)
NARROW = Block([Column("number", np.int64), Column("none", np.float32, 0)])


def rows_of(block: Block, n: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        column.name: rng.integers(0, 200, column.empty(n).shape).astype(column.type)
        for column in block.columns
    }


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(0, 1 << 32), st.integers(0, 30))
def test_every_row_reaches_its_owner_in_the_order_of_the_ranks(
    size: int, seed: int, most: int
) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, most + 1, (size, 2))
    blocks = (ODD, NARROW)
    sent = [
        [rows_of(block, n, seed + rank) for block, n in zip(blocks, row, strict=True)]
        for rank, row in enumerate(counts.tolist())
    ]
    owners = [[rng.integers(0, size, n) for n in row] for row in counts.tolist()]

    def work(ranks: Ranks) -> Any:
        return exchange(ranks, blocks, sent[ranks.rank], owners[ranks.rank])

    for rank, came in enumerate(on_threads(size, work)):
        for kind, block in enumerate(blocks):
            for column in block.columns:
                wanted = np.concatenate(
                    [
                        sent[sender][kind][column.name][owners[sender][kind] == rank]
                        for sender in range(size)
                    ]
                )
                found = came[kind][column.name]
                assert found.dtype == wanted.dtype
                assert np.array_equal(found, wanted)


def test_rows_of_all_ranks_come_to_rank_0() -> None:
    counts = [2, 0, 3]

    def work(ranks: Ranks) -> Any:
        known = counts if ranks.rank == 0 else []
        return gather_rows(ranks, ODD, rows_of(ODD, counts[ranks.rank], ranks.rank), known)

    first, *others = on_threads(3, work)
    for column in ODD.columns:
        parts = [rows_of(ODD, n, rank)[column.name] for rank, n in enumerate(counts)]
        assert np.array_equal(first[column.name], np.concatenate(parts))
        assert all(not len(each[column.name]) for each in others)


def test_a_released_example_travels_with_every_column_that_examples_have() -> None:
    released = Blocks.of(columns=2, value_fields=1, id_bits=24).released
    names = [column.name for column in released.columns]
    assert {field.name for field in fields(Examples)} <= set(names)
    assert set(names) - {field.name for field in fields(Examples)} == {"place", "partition"}


def test_the_bytes_of_a_row_are_those_of_the_formula() -> None:
    for columns, values, bits, width in ((39, 13, 20, 3), (45, 0, 30, 4)):
        blocks = Blocks.of(columns=columns, value_fields=values, id_bits=bits)
        features = 4 * values + width * columns
        assert [block.row_bytes for block in blocks] == [
            features + 44,
            36,
            features + 45,
            features + 45,
        ]
        assert network_bytes(
            columns=columns, value_fields=values, id_bits=bits, ranks=4, clicks=0.5
        ) == 0.75 * (2 * features + 44 + 45 + 18)
