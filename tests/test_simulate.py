"""The simulated stream has the click probabilities and the laws that its module states."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from stream_ctr.errors import ConfigError
from stream_ctr.events.decoder import Decoder
from stream_ctr.logs.simulate import (
    DRIFTS,
    FIELDS,
    IMPRESSIONS_PER_DAY,
    START_MS,
    Drift,
    Simulation,
    World,
)

N = 150_000
HOUR_MS = 3_600_000


@dataclass
class Stream:
    """The impressions of a simulation, and the delay in ms of each one's click (-1: no click)."""

    time: npt.NDArray[np.int64]
    probability: npt.NDArray[np.float64]
    delay: npt.NDArray[np.int64]
    features: dict[str, npt.NDArray[np.object_]]


@pytest.fixture(scope="module")
def stream() -> Stream:
    batches = list(Simulation(N, seed=3).batches())
    events, rejects = Decoder(FIELDS).decode(pa.concat_arrays([batch.value for batch in batches]))
    assert len(rejects) == 0
    impressions, clicks = events.impressions, events.clicks
    assert impressions.impression_id.to_pylist() == [f"sim3-{i}" for i in range(N)]
    delay = np.full(N, -1)
    ids = clicks.impression_id.to_pylist()
    clicked = np.array([int(name.removeprefix("sim3-")) for name in ids])
    assert len(np.unique(clicked)) == len(clicked)
    delay[clicked] = clicks.time - impressions.time[clicked]
    features = {
        name: column.to_numpy(zero_copy_only=False) for name, column in impressions.features.items()
    }
    return Stream(impressions.time, impressions.true_probability, delay, features)


def sigmas(observed: npt.NDArray[np.bool_], probability: npt.NDArray[np.float64]) -> float:
    """Return the deviation of the observed count from its mean, in standard deviations."""
    variance = (probability * (1 - probability)).sum()
    return float((observed - probability).sum() / np.sqrt(variance))


def test_clicks_happen_with_their_true_probability(stream: Stream) -> None:
    clicked = stream.delay >= 0
    assert abs(sigmas(clicked, stream.probability)) < 4

    def largest(groups: Iterable[npt.NDArray[np.generic]]) -> float:
        return max(abs(sigmas(clicked[rows], stream.probability[rows])) for rows in groups)

    assert largest(np.argsort(stream.probability).reshape(10, -1)) < 4.5
    for name in ("category", "placement", "age"):
        values = stream.features[name]
        assert largest(values == value for value in set(values)) < 4.5


def test_about_seven_percent_of_the_impressions_are_clicked(stream: Stream) -> None:
    assert 0.06 < np.mean(stream.delay >= 0) < 0.08


@pytest.mark.parametrize("seed", range(3))
def test_the_best_logloss_is_15_to_25_percent_below_that_of_a_constant(seed: int) -> None:
    rng = np.random.default_rng(seed)
    time = START_MS + np.linspace(0, 24 * HOUR_MS, 100_000, dtype=np.int64)
    world = World(seed)
    p = world.probability(*world.draw(rng, time), time)

    def entropy(q: npt.NDArray[np.float64]) -> float:
        return float(-(q * np.log(q) + (1 - q) * np.log1p(-q)).mean())

    assert 0.15 < 1 - entropy(p) / entropy(np.array([p.mean()])) < 0.25


def test_the_median_delay_is_20_s_and_one_percent_are_over_10_minutes(stream: Stream) -> None:
    delay = stream.delay[stream.delay >= 0] / 1000
    assert delay.min() > 0
    assert np.median(delay) == pytest.approx(20, rel=0.08)  # its standard error is 1.8 %
    assert abs(sigmas(delay > 600, np.full(len(delay), 0.01))) < 4


def test_values_follow_power_laws(stream: Stream) -> None:
    for name, values, exponent, shift in (
        ("app_id", 3000, 1.05, 2.0),
        ("user_id", 50_000, 0.9, 30.0),
        ("last_category", 20, 0.5, 0.0),
    ):
        known = np.array([value for value in stream.features[name] if value is not None])
        weight = np.array([1 / (rank + shift) ** exponent for rank in range(1, values + 1)])
        counts = np.zeros(values)
        for value, count in zip(*np.unique(known, return_counts=True), strict=True):
            counts[int(value[1:])] = count
        expected = len(known) * weight / weight.sum()
        difference = counts - expected
        assert np.all(np.abs(difference)[:20] < 5 * np.sqrt(expected[:20])), name
        parts = np.add.reduceat(difference, [0, values // 4, values // 2])
        assert np.abs(parts).max() < 5 * np.sqrt(len(known)), name


def test_the_fields_of_a_user_and_of_an_app_are_constant(stream: Stream) -> None:
    of_user = [("user_id", name) for name in ("segment", "age", "country", "device")]
    of_app = [("app_id", name) for name in ("category", "rating")]
    for owner, field in (*of_user, ("device", "os"), *of_app):
        pairs = set(zip(stream.features[owner], map(str, stream.features[field]), strict=True))
        assert len(pairs) == len(set(stream.features[owner])), field


def test_some_values_are_missing(stream: Stream) -> None:
    for name, share in (("last_category", 0.1), ("days_since_visit", 0.15)):
        missing = np.array([value is None or value != value for value in stream.features[name]])
        assert abs(sigmas(missing, np.full(N, share))) < 4, name
    assert 0.02 < np.mean(np.isnan(stream.features["rating"].astype(float))) < 0.3


def test_arrivals_are_random_a_million_a_day_and_most_in_the_evening(stream: Stream) -> None:
    first_hour = stream.time[stream.time < START_MS + HOUR_MS] - START_MS
    per_second = np.bincount(first_hour // 1000, minlength=3600)
    # The variance of Poisson counts is their mean. Over 3,600 seconds the ratio of the two scatters
    # by sqrt(2 / 3600).
    assert per_second.var() / per_second.mean() == pytest.approx(1, abs=4 * np.sqrt(2 / 3600))
    simulation = Simulation(IMPRESSIONS_PER_DAY, seed=0)
    times = [batch["time"].to_numpy() for batch in simulation._impressions()]
    time = np.concatenate(times) - START_MS
    per_hour = np.bincount(time // HOUR_MS)
    assert time[-1] / HOUR_MS == pytest.approx(24, abs=0.2)
    assert per_hour[19:21].mean() / per_hour[7:9].mean() == pytest.approx(1.6 / 0.4, rel=0.05)
    assert np.all(np.diff(time) >= 0)


def test_tastes_for_categories_drift_and_come_back_after_36_hours() -> None:
    world = World(5)
    time = np.full(50_000, START_MS)
    codes, numbers = world.draw(np.random.default_rng(0), time)

    def logit(hours: int) -> npt.NDArray[np.float64]:
        p = world.probability(codes, numbers, time + hours * HOUR_MS)
        return np.where((p > 1e-3) & (p < 0.999), np.log(p / (1 - p)), np.nan)

    change = logit(18) - logit(0)
    category = codes["category"]
    by_category = np.array([np.nanmean(change[category == value]) for value in range(20)])
    rounding = 0.002  # p is rounded to six decimals
    assert np.nanmax(np.abs(change - by_category[category])) < rounding
    assert by_category.std() > 0.3
    assert np.nanmax(np.abs(logit(36) - logit(0))) < 1e-9
    assert np.abs(np.nanmean(logit(1) - logit(0))) < 0.1


def test_no_lower_order_explains_the_effects_of_pairs_and_triples() -> None:
    """Otherwise a logistic regression would learn pair effects, and an FM triple effects."""
    world = World(1)
    time = np.full(400_000, START_MS)
    codes, numbers = world.draw(np.random.default_rng(2), time)
    effects = world.effects(codes, numbers, time)

    def explained(effect: npt.NDArray[np.float64], key: npt.NDArray[np.int64]) -> float:
        """Return the share of the variance that the means by key explain, without overfitting."""
        counts = np.bincount(key)
        means = np.bincount(key, effect) / np.maximum(counts, 1)
        by_chance = effect.var() * np.count_nonzero(counts) / len(key)
        return float((means[key].var() - by_chance) / effect.var())

    small = ("age", "os", "connection", "placement", "segment", "category", "last_category")
    of_pairs = effects[:, 1]
    of_triples = effects[:, 2]
    assert max(explained(of_pairs, codes[name]) for name in small) < 0.03
    pairs = [100 * codes[a] + codes[b] for a, b in combinations(small, 2)]
    assert max(explained(of_triples, pair) for pair in pairs) < 0.03
    others = 100 * codes["placement"] + codes["connection"]
    triples = [10_000 * codes[name] + others for name in ("age", "os")]
    assert sum(explained(of_triples, triple) for triple in triples) == pytest.approx(1, abs=0.05)


def values(impressions: int, seed: int, drift: Drift = "none") -> list[bytes]:
    return [
        value
        for batch in Simulation(impressions, seed=seed, drift=drift).batches()
        for value in batch.value.to_pylist()
    ]


def of_kind(values: list[bytes], kind: str) -> list[bytes]:
    return [value for value in values if f'"{kind}",'.encode() in value]


def users(impressions: list[bytes]) -> set[str]:
    return {json.loads(value)["features"]["user_id"] for value in impressions}


def test_the_same_seed_gives_the_same_bytes() -> None:
    assert values(3000, seed=1) == values(3000, seed=1)
    first = users(of_kind(values(3000, seed=1), "impression"))
    assert first != users(of_kind(values(3000, seed=2), "impression"))


def test_a_longer_stream_begins_with_the_impressions_of_a_shorter_one() -> None:
    short = values(3000, seed=1)
    long = values(20_000, seed=1)
    assert of_kind(short, "impression") == of_kind(long, "impression")[:3000]
    early = {
        value
        for value in of_kind(long, "click")
        if int(json.loads(value)["impression_id"].removeprefix("sim1-")) < 3000
    }
    assert set(of_kind(short, "click")) == early


def test_events_come_in_time_order_each_click_after_its_impression() -> None:
    simulation = Simulation(30_000, seed=4)
    time = np.concatenate([batch.time for batch in simulation.batches()])
    assert np.all(np.diff(time) >= 0)
    assert (simulation.out_of_order, simulation.rejected.count, simulation.progress) == (0, 0, 1.0)


def test_json_lines_hold_the_events_of_the_stream(tmp_path: Path) -> None:
    path = tmp_path / "clicks.jsonl"
    expected = values(1000, seed=9)
    assert Simulation(1000, seed=9).write_jsonl(path) == len(expected)
    assert path.read_bytes() == b"".join(value + b"\n" for value in expected)


# -- a drift in the middle -----------------------------------------------------------------------


@dataclass
class Drawn:
    """The probabilities of a simulation, and whether each impression was clicked."""

    probability: npt.NDArray[np.float64]
    clicked: npt.NDArray[np.bool_]

    @property
    def halves(self) -> tuple[slice, slice]:
        middle = len(self.clicked) // 2
        return slice(0, middle), slice(middle, None)


def drawn(drift: Drift, impressions: int = 60_001) -> Drawn:
    batches = list(Simulation(impressions, seed=2, drift=drift)._impressions())
    probability = np.concatenate([batch["true_probability"].to_numpy() for batch in batches])
    click_time = pa.chunked_array([batch["click_time"] for batch in batches])
    return Drawn(probability, np.array(click_time.is_valid()))


@pytest.fixture(scope="module")
def undrifted() -> Drawn:
    return drawn("none")


def log_odds(p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.log(p) - np.log1p(-p)


@pytest.mark.parametrize("drift", ["weights", "rate"])
def test_before_and_after_a_drift_clicks_happen_with_their_true_probability(
    drift: Drift, undrifted: Drawn
) -> None:
    found = drawn(drift)
    for half in found.halves:
        p = found.probability[half]
        clicked = found.clicked[half]
        for rows in np.array_split(np.argsort(p), 8):
            assert abs(sigmas(clicked[rows], p[rows])) < 4.5
    # The clicks of the second half are not those of the law before the drift.
    after = found.halves[1]
    expected = undrifted.probability[after]
    tops = np.argsort(expected)[-len(expected) // 10 :]
    assert sigmas(found.clicked[after][tops], expected[tops]) < -10


def test_a_drift_of_the_weights_leaves_the_rate_and_no_trace_of_the_old_weights(
    undrifted: Drawn,
) -> None:
    before, after = undrifted.halves
    found = drawn("weights").probability
    assert np.array_equal(found[before], undrifted.probability[before])
    shared = np.corrcoef(log_odds(found[after]), log_odds(undrifted.probability[after]))[0, 1]
    assert abs(shared) < 0.25  # ratings, days since a visit and the hour keep their effects
    assert found[after].mean() == pytest.approx(undrifted.probability[after].mean(), rel=0.15)


def test_a_drift_of_the_rate_takes_it_to_a_quarter_and_leaves_the_order(undrifted: Drawn) -> None:
    before, after = undrifted.halves
    found = drawn("rate").probability
    assert np.array_equal(found[before], undrifted.probability[before])
    assert found[after].mean() / undrifted.probability[after].mean() == pytest.approx(0.25, rel=0.1)
    shift = log_odds(undrifted.probability[after]) - log_odds(found[after])
    rounded = 1e-6 / found[after]
    assert np.all(np.abs(shift - np.median(shift)) < 0.01 + 2 * rounded)


@pytest.mark.parametrize("drift", DRIFTS)
def test_the_first_half_has_the_same_events_with_any_drift(drift: Drift) -> None:
    half = of_kind(values(4000, 1, drift), "impression")[:2000]
    assert half == of_kind(values(4000, 1), "impression")[:2000]
    clicks = of_kind(values(4000, 1, drift), "click")
    plain = of_kind(values(4000, 1), "click")

    def early(clicks: list[bytes]) -> set[bytes]:
        return {
            value
            for value in clicks
            if int(json.loads(value)["impression_id"].removeprefix("sim1-")) < 2000
        }

    assert early(clicks) == early(plain)


def test_an_unknown_drift_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown drift 'rates'.*rate.*; known are none"):
        Simulation(10, drift="rates")  # type: ignore[arg-type]


@pytest.mark.parametrize(("impressions", "seed"), [(0, 0), (10, -1)])
def test_a_simulation_without_impressions_or_with_a_negative_seed_is_refused(
    impressions: int, seed: int
) -> None:
    with pytest.raises(ConfigError, match=f"got {impressions} and {seed}"):
        Simulation(impressions, seed=seed)
