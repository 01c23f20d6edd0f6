"""Versions of a table: each keeps its rows, whatever is updated and absorbed beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_ctr.learn.large_arrays import zeros
from stream_ctr.learn.shared_rows import Version

ROWS = 128
ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["update", "absorb", "drop"]),
        st.integers(0, 7),
        st.lists(st.integers(0, ROWS - 1), max_size=30),
    ),
    max_size=14,
)


def version(width: int) -> Version:
    """Return rows of `width` numbers, or numbers."""
    return Version(zeros(ROWS, width) if width else zeros(ROWS))


@pytest.mark.parametrize("width", [0, 3])
@given(actions=ACTIONS)
def test_every_version_keeps_its_rows_whatever_happens_to_the_others(
    width: int, actions: list[tuple[str, int, list[int]]]
) -> None:
    alive = [version(width)]
    expected = [alive[0].values()]
    for number, (action, index, chosen) in enumerate(actions, 1):
        index %= len(alive)
        if action == "update":
            rows = np.unique(np.array(chosen, np.uint32))
            values = np.full((len(rows), width) if width else len(rows), number, np.float32)
            alive.append(alive[index].updated(rows, values))
            expected.append(expected[index].copy())
            expected[-1][rows] = number
        elif action == "absorb":
            alone = len(alive) == 1
            before = alive[index].absorbed
            assert alive[index].absorb() is (alone or before)
        elif len(alive) > 1:
            del alive[index], expected[index]
        for each, values in zip(alive, expected, strict=True):
            assert np.array_equal(each.values(), values)


def test_what_reads_a_version_keeps_it_alive() -> None:
    first = version(2)

    def reading(held: Version) -> Any:
        yield held.read()

    reader = reading(first)
    next(reader)
    rows, values = np.array([1], np.uint32), np.ones((1, 2), np.float32)
    second = first.updated(rows, values)
    del first
    assert not second.absorb()
    assert not second.absorbed
    reader.close()
    del reader
    assert second.absorb()
    assert second.absorbed


def test_numbers_are_those_that_are_not_zero_or_were_updated() -> None:
    first = version(0).updated(np.array([2, 9], np.uint32), np.array([5, 6], np.float32))
    assert first.absorb()
    second = first.updated(np.array([9, 70], np.uint32), np.array([0, 8], np.float32))
    rows, values = second.numbers()
    assert rows.tolist() == [2, 9, 70]
    assert values.tolist() == [5.0, 0.0, 8.0]
