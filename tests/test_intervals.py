"""Tests of `stream_ctr.paper.intervals`: paired differences with their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from stream_ctr.paper import intervals


def test_a_difference_is_the_first_minus_the_reference() -> None:
    found = intervals.paired_block_difference([3.0] * 20, [1.0] * 20, 40)
    assert found == {"logloss_difference": 1.0, "low": 1.0, "high": 1.0, "count": 40, "blocks": 20}


def test_the_interval_of_one_seed_is_that_of_the_test_examples() -> None:
    noise = np.random.default_rng(3).standard_normal((1, 100_000))
    found = intervals.paired_difference(0.5 + noise, np.zeros_like(noise))
    half = 1.96 / np.sqrt(100_000)  # the standard deviation of an example is 1
    low, high = found["low"], found["high"]
    assert low is not None
    assert high is not None
    assert (high - low) / 2 == pytest.approx(half, rel=0.2)  # 128 blocks are a rough estimate


def test_the_interval_of_three_seeds_that_differ_is_students() -> None:
    """Without a spread over examples, the 97.5 % quantile for 2 degrees of freedom is 4.303."""
    losses = np.array([[0.1], [0.2], [0.3]]) * np.ones((3, 1000))
    found = intervals.paired_difference(losses, np.zeros_like(losses))
    half = 4.303 * 0.1 / np.sqrt(3)
    assert found["logloss_difference"] == pytest.approx(0.2)
    assert found["high"] == pytest.approx(0.2 + half, rel=0.1)
    assert found["low"] == pytest.approx(0.2 - half, abs=0.1 * half)


@pytest.mark.slow
def test_the_interval_of_equal_systems_excludes_zero_about_once_in_twenty_times() -> None:
    """The interval covers a spread over three seeds and one over the examples."""
    rng = np.random.default_rng(11)
    zeros = np.zeros((3, 500))
    missed = 0
    for _ in range(300):
        examples = 0.04 * rng.standard_normal((1, 500))  # the test part, the same for all seeds
        seeds = 0.002 * rng.standard_normal((3, 1))
        losses = examples + seeds + 0.01 * rng.standard_normal((3, 500))
        verdict = intervals.verdict(intervals.paired_difference(losses, zeros))
        missed += verdict != "same"
    assert 2 <= missed <= 24  # 15 on average if exact; wider intervals are honest, narrower not


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 0.2, "worse"), (-0.2, -0.1, "better"), (-0.1, 0.1, "same"), (None, None, "unknown")],
)
def test_systems_differ_only_when_the_interval_excludes_zero(
    low: float | None, high: float | None, verdict: str
) -> None:
    assert intervals.verdict({"low": low, "high": high}) == verdict
