"""Which examples of a batch belong to which rank."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from stream_ctr.learn.batch_shares import Share, most_parts, shares_of
from stream_ctr.learn.cpu_step import parts_of
from stream_ctr.learn.step import SUB_BATCH

BATCHES = st.integers(1, 20_000)
RANKS = st.integers(1, 24)


def shares(n: int, ranks: int, sub_batch: int | None) -> list[Share]:
    parts = [part for part in parts_of(n) if part.start < n]
    return shares_of(n, parts, ranks=ranks, sub_batch=sub_batch)


@given(n=BATCHES, ranks=RANKS)
def test_ranks_share_the_parts_and_their_examples_in_order(n: int, ranks: int) -> None:
    parts = [part for part in parts_of(n) if part.start < n]
    found = shares(n, ranks, SUB_BATCH)
    assert [part for share in found for part in share.parts] == list(range(len(parts)))
    assert [e for share in found for e in share.examples] == list(range(n))
    assert max(len(share.parts) for share in found) == most_parts(len(parts), ranks)
    for share in found:
        if share.parts:
            assert share.examples.start == parts[share.parts.start].start


@given(n=BATCHES, ranks=RANKS)
def test_each_sub_batch_is_stepped_by_the_rank_on_which_it_begins(n: int, ranks: int) -> None:
    found = shares(n, ranks, SUB_BATCH)
    assert [e for share in found for e in share.steps] == list(range(n))
    for share in found:
        if share.steps:
            assert share.steps.start % SUB_BATCH == 0
            assert share.steps.start in share.examples


@given(n=BATCHES, ranks=RANKS)
def test_the_tail_of_a_rank_is_the_head_of_the_next_one(n: int, ranks: int) -> None:
    active = [share for share in shares(n, ranks, SUB_BATCH) if share.examples]
    assert active[0].head == active[-1].tail == 0
    for share, following in pairwise(active):
        assert share.tail == following.head < SUB_BATCH
        assert following.head <= len(following.examples)


@given(n=BATCHES, ranks=RANKS)
def test_without_sub_batches_each_rank_steps_its_own_examples(n: int, ranks: int) -> None:
    for share in shares(n, ranks, None):
        assert share.steps == share.examples
        assert share.head == share.tail == 0
