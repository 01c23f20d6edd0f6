"""HyperLogLog counts distinct values within its error, and merges exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_ctr.evaluate.sketch import REGISTERS, HyperLogLog

ERROR = 1.04 / REGISTERS**0.5


def sketch_of(*parts: list[int]) -> HyperLogLog:
    sketch = HyperLogLog(1)
    for values in parts:
        sketch.add(0, np.array(values, np.int64))
    return sketch


@pytest.mark.parametrize("n", [1, 10, 1000, 3000, 10_000, 30_000, 1_000_000])
def test_the_estimate_is_within_four_standard_errors(n: int) -> None:
    sketch = HyperLogLog(2)
    sketch.add(1, np.arange(n))
    none, some = sketch.estimates().tolist()
    assert none == 0.0
    assert some == pytest.approx(n, rel=4 * ERROR, abs=0.5)


def test_the_mean_of_many_estimates_has_no_bias() -> None:
    rng = np.random.default_rng(0)
    sketch = HyperLogLog(60)
    for column in range(60):
        sketch.add(column, rng.integers(0, 1 << 62, 8000))  # where the raw estimate is biased
    ratios = sketch.estimates() / 8000
    assert abs(ratios.mean() - 1) < 3 * ERROR / 60**0.5
    assert ratios.std() == pytest.approx(ERROR, rel=0.4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 500)), st.lists(st.integers(0, 500)))
def test_a_merged_sketch_is_that_of_the_union_in_any_order(
    one: list[int], other: list[int]
) -> None:
    merged = sketch_of(one)
    merged.merge(sketch_of(other))
    assert np.array_equal(merged.registers, sketch_of(other, one, one).registers)
    assert merged.estimates()[0] == pytest.approx(len({*one, *other}), rel=0.1, abs=1)
