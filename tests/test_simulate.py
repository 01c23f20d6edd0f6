"""The simulated stream is what it says it is: its probabilities are the true ones, and its laws hold."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from stream_ctr.errors import ConfigError
from stream_ctr.events.decoder import Decoder
from stream_ctr.logs.simulate import FIELDS, IMPRESSIONS_PER_DAY, START_MS, Simulation, World

N = 150_000
HOUR_MS = 3_600_000


@dataclass
class Stream:
    """All impressions of a simulation, and the delay in ms of the click of each (-1: none)."""

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
    of = np.array([int(name.removeprefix("sim3-")) for name in clicks.impression_id.to_pylist()])
    assert len(np.unique(of)) == len(of)
    delay[of] = clicks.time - impressions.time[of]
    features = {
        name: column.to_numpy(zero_copy_only=False) for name, column in impressions.features.items()
    }
    return Stream(impressions.time, impressions.true_probability, delay, features)


def sigmas(observed: npt.NDArray[np.bool_], probability: npt.NDArray[np.float64]) -> float:
    return float((observed - probability).sum() / np.sqrt((probability * (1 - probability)).sum()))


def test_clicks_happen_with_their_true_probability(stream: Stream) -> None:
    clicked = stream.delay >= 0
    assert abs(sigmas(clicked, stream.probability)) < 4
    tenth = np.argsort(stream.probability).reshape(10, -1)
    assert max(abs(sigmas(clicked[rows], stream.probability[rows])) for rows in tenth) < 4.5
    for name in ("category", "placement", "age"):
        groups = [stream.features[name] == value for value in set(stream.features[name])]
        assert max(abs(sigmas(clicked[rows], stream.probability[rows])) for rows in groups) < 4.5


def test_about_seven_in_a_hundred_impressions_are_clicked(stream: Stream) -> None:
    assert 0.06 < np.mean(stream.delay >= 0) < 0.08


@pytest.mark.parametrize("seed", range(3))
def test_the_best_possible_logloss_is_15_to_25_percent_below_that_of_a_constant(seed: int) -> None:
    rng = np.random.default_rng(seed)
    time = START_MS + np.linspace(0, 24 * HOUR_MS, 100_000, dtype=np.int64)
    world = World(seed)
    p = world.probability(*world.draw(rng, time), time)

    def entropy(q: npt.NDArray[np.float64]) -> float:
        return float(-(q * np.log(q) + (1 - q) * np.log1p(-q)).mean())

    assert 0.15 < 1 - entropy(p) / entropy(np.array([p.mean()])) < 0.25


def test_clicks_follow_after_20_seconds_and_one_in_a_hundred_after_ten_minutes(
    stream: Stream,
) -> None:
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
        assert np.all(np.abs(counts - expected)[:20] < 5 * np.sqrt(expected[:20])), name
        assert np.abs(
            np.add.reduceat(counts - expected, [0, values // 4, values // 2])
        ).max() < 5 * np.sqrt(len(known)), name


def test_a_user_and_an_app_stay_what_they_are(stream: Stream) -> None:
    of_user = [("user_id", name) for name in ("segment", "age", "country", "device")]
    for owner, field in (*of_user, ("device", "os"), ("app_id", "category"), ("app_id", "rating")):
        pairs = set(zip(stream.features[owner], map(str, stream.features[field]), strict=True))
        assert len(pairs) == len(set(stream.features[owner])), field


def test_some_values_are_missing(stream: Stream) -> None:
    for name, share in (("last_category", 0.1), ("days_since_visit", 0.15)):
        missing = np.array([value is None or value != value for value in stream.features[name]])
        assert abs(sigmas(missing, np.full(N, share))) < 4, name
    assert 0.02 < np.mean(np.isnan(stream.features["rating"].astype(float))) < 0.3


def test_impressions_arrive_at_random_a_million_a_day_and_most_in_the_evening(
    stream: Stream,
) -> None:
    first_hour = stream.time[stream.time < START_MS + HOUR_MS] - START_MS
    per_second = np.bincount(first_hour // 1000, minlength=3600)
    # Of Poisson counts the variance is the mean; over 3,600 seconds their ratio scatters by sqrt(2 / 3600).
    assert per_second.var() / per_second.mean() == pytest.approx(1, abs=4 * np.sqrt(2 / 3600))
    simulation = Simulation(IMPRESSIONS_PER_DAY, seed=0)
    time = (
        np.concatenate([batch["time"].to_numpy() for batch in simulation._impressions()]) - START_MS
    )
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
    by_category = np.array(
        [np.nanmean(change[codes["category"] == category]) for category in range(20)]
    )
    assert (
        np.nanmax(np.abs(change - by_category[codes["category"]])) < 0.002
    )  # of the rounding of p
    assert by_category.std() > 0.3
    assert np.nanmax(np.abs(logit(36) - logit(0))) < 1e-9
    assert np.abs(np.nanmean(logit(1) - logit(0))) < 0.1


def test_no_lower_order_explains_the_effects_of_pairs_and_triples() -> None:
    """Else a logistic regression would learn what only an FM should, and an FM what only the deep part should."""
    world = World(1)
    time = np.full(400_000, START_MS)
    codes, numbers = world.draw(np.random.default_rng(2), time)
    effects = world.effects(codes, numbers, time)

    def explained(effect: npt.NDArray[np.float64], key: npt.NDArray[np.int64]) -> float:
        counts = np.bincount(key)
        means = np.bincount(key, effect) / np.maximum(counts, 1)
        return float(
            (means[key].var() - effect.var() * np.count_nonzero(counts) / len(key)) / effect.var()
        )

    small = ("age", "os", "connection", "placement", "segment", "category", "last_category")
    assert max(explained(effects[:, 1], codes[name]) for name in small) < 0.03
    assert (
        max(explained(effects[:, 2], 100 * codes[a] + codes[b]) for a, b in combinations(small, 2))
        < 0.03
    )
    triples = [
        codes[a] * 10_000 + codes["placement"] * 100 + codes["connection"] for a in ("age", "os")
    ]
    assert sum(explained(effects[:, 2], triple) for triple in triples) == pytest.approx(1, abs=0.05)


def values(impressions: int, seed: int) -> list[bytes]:
    return [
        value
        for batch in Simulation(impressions, seed=seed).batches()
        for value in batch.value.to_pylist()
    ]


def test_the_same_seed_gives_the_same_bytes_and_a_longer_stream_begins_like_a_shorter_one() -> None:
    short, long = values(3000, seed=1), values(20_000, seed=1)
    assert short == values(3000, seed=1)
    shown = [value for value in short if b'"impression",' in value]
    assert shown == [value for value in long if b'"impression",' in value][:3000]
    clicks = {value for value in short if b'"click",' in value}
    assert clicks == {
        value
        for value in long
        if b'"click",' in value and int(json.loads(value)["impression_id"][5:]) < 3000
    }
    assert {json.loads(value)["features"]["user_id"] for value in shown} != {
        json.loads(value)["features"]["user_id"]
        for value in values(3000, seed=2)
        if b'"impression",' in value
    }


def test_events_come_in_time_order_each_click_after_its_impression() -> None:
    simulation = Simulation(30_000, seed=4)
    time = np.concatenate([batch.time for batch in simulation.batches()])
    assert np.all(np.diff(time) >= 0)
    assert (simulation.out_of_order, simulation.rejected.count, simulation.progress) == (0, 0, 1.0)


def test_json_lines_hold_the_events_of_the_stream(tmp_path: Path) -> None:
    simulation = Simulation(1000, seed=9)
    assert simulation.write_jsonl(tmp_path / "clicks.jsonl") == len(values(1000, seed=9))
    assert (tmp_path / "clicks.jsonl").read_bytes() == b"".join(
        value + b"\n" for value in values(1000, seed=9)
    )


@pytest.mark.parametrize(("impressions", "seed"), [(0, 0), (10, -1)])
def test_a_simulation_of_nothing_or_of_a_negative_seed_is_refused(
    impressions: int, seed: int
) -> None:
    with pytest.raises(ConfigError, match=f"got {impressions} and {seed}"):
        Simulation(impressions, seed=seed)
