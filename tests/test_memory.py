"""Batches of bytes as a source."""

from __future__ import annotations

import itertools

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.sources import all_rows

from stream_ctr.connectors.errors import PositionLost
from stream_ctr.connectors.memory import BatchSource


@given(st.lists(st.lists(st.binary(max_size=3) | st.none(), max_size=4), max_size=5), st.data())
def test_batches_are_read_on_from_every_offset(
    batches: list[list[bytes | None]], data: st.DataObject
) -> None:
    values = itertools.chain.from_iterable(batches)
    expected = [(offset, -1, value) for offset, value in enumerate(values)]
    source = BatchSource(
        lambda: (pa.array(batch, pa.large_binary()) for batch in batches), name="log"
    )
    assert source.partitions == (("log", 0),)
    assert source.ends() == {0: len(expected)}
    for _ in range(3):
        start = data.draw(st.integers(0, len(expected)))
        source.seek({0: start})
        assert source.positions() == {0: start}
        assert all_rows(source).get(0, []) == expected[start:]
        assert source.positions() == {0: len(expected)}
        assert source.caught_up().tolist() == [True]
    beyond = len(expected) + 1
    with pytest.raises(PositionLost, match=f"log ends at {len(expected)}, but {beyond} comes next"):
        source.seek({0: beyond})


def test_a_paused_batch_source_yields_nothing_and_is_not_finished() -> None:
    source = BatchSource(lambda: [pa.array([b"a"], pa.large_binary())])
    source.pause({0})
    assert len(source.poll(0.0)) == 0
    assert not source.finished
    source.pause(())
    assert source.poll(0.0).value.to_pylist() == [b"a"]
