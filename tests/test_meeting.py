"""Ranks of one start meet, whatever earlier starts have left in the store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch._C._distributed_c10d import HashStore, Store

from stream_ctr.distributed.meeting import meeting_place

SECONDS = 30.0


def start(store: Store, size: int, *, order: Sequence[int]) -> list[Store]:
    """Let the ranks of a start meet, who come in this order."""

    def come(rank: int) -> Store:
        time.sleep(0.2 * order.index(rank))
        return meeting_place(store, rank, size, timeout_seconds=SECONDS)

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(come, range(size)))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_a_rank_finds_nothing_of_an_earlier_start(order: tuple[int, ...]) -> None:
    store = HashStore()
    for place in start(store, 3, order=(0, 1, 2)):
        place.set("address", "of a process that has ended")
    places = start(store, 3, order=order)
    assert not any(place.check(["address"]) for place in places)
    places[1].set("address", "new")
    assert [place.get("address") for place in places] == [b"new"] * 3


def test_a_start_that_never_met_and_one_of_another_size_are_passed_over() -> None:
    store = HashStore()
    store.set("stream_ctr/start", "died before anybody came")
    assert len(start(store, 2, order=(1, 0))) == 2
    assert len(start(store, 4, order=(3, 2, 1, 0))) == 4
    assert len(start(store, 1, order=(0,))) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_does_not_wait_for_ever(rank: int) -> None:
    store = HashStore()
    with pytest.raises(RuntimeError):
        meeting_place(store, rank, 2, timeout_seconds=0.3)
