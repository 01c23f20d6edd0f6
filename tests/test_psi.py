"""The population stability index, against its formula and against chance."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stream_ctr.evaluate.psi import SHIFTED_MUCH_FROM, STABLE_BELOW, psi

LAW = np.random.default_rng(0).dirichlet(np.full(65, 0.5))


def test_it_is_the_sum_over_the_cells() -> None:
    p, q = (0.2, 0.3, 0.5), (0.5, 0.3, 0.2)
    by_hand = sum((a - b) * math.log(a / b) for a, b in zip(p, q, strict=True))
    n = 10_000_000
    assert psi(n * np.array(p), n * np.array(q)) == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize(("n", "m"), [(1000, 1000), (500, 50_000), (20_000, 3000)])
def test_two_samples_of_one_law_have_none_on_average(n: int, m: int) -> None:
    rng = np.random.default_rng(n)
    found = [psi(rng.multinomial(n, LAW), rng.multinomial(m, LAW)) for _ in range(400)]
    assert abs(np.mean(found)) < 0.02
    assert np.quantile(found, 0.99) < STABLE_BELOW


def test_a_field_that_takes_other_values_has_shifted_much() -> None:
    rng = np.random.default_rng(1)
    reference = rng.multinomial(5000, LAW)
    assert psi(rng.multinomial(5000, LAW[::-1]), reference) > SHIFTED_MUCH_FROM


def test_a_reference_of_weighted_counts_is_worth_less() -> None:
    counts = np.array([300, 700])
    half = psi(counts, counts / 2, size=250)
    assert half == pytest.approx(-(1 / 1000 + 1 / 250), abs=1e-4)


def test_a_side_without_values_is_an_error() -> None:
    for counts, reference in ((np.zeros(2), np.ones(2)), (np.ones(2), np.zeros(2))):
        with pytest.raises(ValueError, match="values on both sides"):
            psi(counts, reference)
