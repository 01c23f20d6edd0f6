"""What numbers are fitted to: when they are, and to what."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.event_records import features, record

from stream_ctr.events.features import Hasher
from stream_ctr.events.field import Field
from stream_ctr.events.fit import NOTHING, edges_of, fit_numbers, scale_of

RNG = np.random.default_rng(0)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
# Numbers that the logarithmic buckets hardly tell apart.
POOR = {
    "shares": RNG.random(1000),
    "tiny": RNG.random(1000) * 1e-6,
    "mostly zero": np.where(RNG.random(1000) < 0.4, 0.0, RNG.random(1000)),
    "years": RNG.integers(1990, 2026, 1000).astype(float),
    "two years": RNG.integers(2025, 2027, 1000).astype(float),
    "times": 1.7e12 + RNG.random(1000) * 86_400_000,
    "negative": -1000.0 - RNG.random(1000),
    "both signs": RNG.normal(0, 0.1, 1000),
}
# Numbers with which the ids of earlier versions stay.
ORDINARY = {
    "counts": RNG.geometric(0.05, 1000).astype(float),
    "ages": RNG.integers(18, 80, 1000).astype(float),
    "hours": RNG.integers(0, 24, 1000).astype(float),
    "flags": RNG.integers(0, 2, 1000).astype(float),
    "prices": RNG.lognormal(3, 1, 1000),
    "one number": np.full(1000, 0.5),
    "few": RNG.random(31),
    "none": np.empty(0),
}


def buckets(x: npt.NDArray[np.float64], edges: tuple[float, ...]) -> int:
    """Return how many rows a table has for the numbers."""
    hasher = Hasher(
        [Field("x", "numeric")], table_bits=31, bucket_edges={"x": edges} if edges else None
    )
    return len(np.unique(hasher.rows({"x": pa.array(x)})[0]))


@pytest.mark.parametrize("name", POOR)
def test_numbers_that_the_default_hardly_tells_apart_get_edges(name: str) -> None:
    x = POOR[name]
    edges = edges_of(x)
    assert edges
    different = len(np.unique(x))
    assert buckets(x, edges) >= min(different, 10) > buckets(x, ()) / 2
    counts = np.histogram(x, [-np.inf, *edges, np.inf])[0]
    frequent = np.unique(x, return_counts=True)[1].max()
    assert counts.max() <= max(2 * len(x) / 16, frequent)


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_numbers_keep_the_logarithmic_buckets(name: str) -> None:
    assert edges_of(ORDINARY[name]) == ()


def test_a_frequent_number_has_a_bucket_of_its_own() -> None:
    edges = edges_of(POOR["mostly zero"])
    low, high = np.searchsorted(edges, [0.0, np.min(POOR["mostly zero"][POOR["mostly zero"] > 0])])
    assert low < high


def test_few_numbers_get_few_buckets() -> None:
    assert [len(edges_of(np.arange(n) / n)) + 1 for n in (32, 64, 128, 1000)] == [4, 8, 16, 16]


@given(st.lists(FINITE, min_size=32, max_size=200))
def test_edges_rise_and_do_not_depend_on_the_order(numbers: list[float]) -> None:
    edges = edges_of(np.array(numbers))
    assert edges == edges_of(np.array(sorted(numbers)))
    assert all(lower < upper for lower, upper in pairwise(edges))
    assert len(edges) != 1
    if edges:
        Hasher([Field("x", "numeric")], table_bits=4, bucket_edges={"x": edges})


@pytest.mark.parametrize(
    ("x", "encoding", "scale"),
    [
        ([0.0] * 50 + [-2.0] * 95 + [10.0] * 5, "value", 2.0),
        ([0.0] * 50 + [np.e - 1] * 100, "log_value", 1.0),
        ([0.0], "value", 1.0),
        ([], "value", 1.0),
        ([1.7e308] * 9, "value", 1.7e308),
    ],
)
def test_a_scale_is_the_95th_percentile_of_what_is_not_zero(
    x: list[float], encoding: str, scale: float
) -> None:
    found = scale_of(np.array(x), encoding)  # type: ignore[arg-type]
    assert found == pytest.approx(scale, rel=0.2)


def test_only_what_the_encoding_needs_is_fitted() -> None:
    records = pa.array(
        [features(age=i / 100) for i in range(100)] + [b"junk", record(kind="click")],
        pa.large_binary(),
    )
    fields = [Field("app", "categorical"), Field("age", "numeric"), Field("gone", "numeric")]
    assert fit_numbers([records], fields).bucket_edges.keys() == {"age"}
    assert fit_numbers([records], fields, buckets_per_octave=64) == NOTHING
    fitted = fit_numbers([records], fields, numeric_encoding="value")
    assert not fitted.bucket_edges
    assert list(fitted.value_scales) == ["age", "gone"]
    assert list(fitted.value_scales.values()) == pytest.approx([0.94, 1.0], abs=0.01)


def test_edges_survive_json() -> None:
    edges = edges_of(POOR["times"])
    assert tuple(json.loads(json.dumps(edges))) == edges


def test_only_the_first_impressions_of_each_part_count() -> None:
    fields = [Field("age", "numeric")]
    parts = [
        pa.array([features(age=(n + part) / 200) for n in range(200)], pa.large_binary())
        for part in range(2)
    ]
    fitted = fit_numbers(parts, fields, most=100)
    expected = np.concatenate([np.arange(100), np.arange(1, 101)]) / 200
    assert fitted.bucket_edges["age"] == edges_of(expected)
