"""A simulated stream of impressions and clicks whose true click probabilities are known.

An app store shows apps to users. An impression has twelve categorical and two numeric fields:

    user_id -> segment, age, country, device -> os    constant for a user
    app_id -> category, rating                        constant for an app; 10 % have no rating
    connection, placement, hour, last_category,       the context of the impression;
    days_since_visit                                  the last two are missing at times

The values of a categorical field follow a Zipf-Mandelbrot law:

    P(value of rank i) ~ 1 / (i + shift)^exponent

An impression x at time t is clicked with probability p, which its event carries, rounded to six
decimals, as `true_probability`:

    p = sigmoid(b + s_1 z_1 + s_2 z_2 + s_3 z_3 + s_4 z_4 + s_5 z_5)

    z_1 = sum_f w_f[x_f] + cos(2 pi (hour - 20) / 24) / 4
    z_2 = sum_{f<g} <v_f[x_f], v_g[x_g]>
    z_3 = sum_{(f,g,h)} a_f[x_f] a_g[x_g] a_h[x_h]
    z_4 = (rating - 4.1) / 0.5 - (log(1 + days_since_visit) - 1.7)
    z_5 = sin(2 pi t / 36 h + phi[category])

| symbol   | meaning                                                                             |
|----------|-------------------------------------------------------------------------------------|
| x_f      | value of the categorical field f; a missing one contributes 0                        |
| w_f[u]   | weight of the value u: normal with mean 0, standard deviation `first_order` of f     |
| v_f[u]   | vector in R^4 of the value u, standardised, times `pairs` of f                       |
| a_f[u]   | number of the value u, standardised; each of the triples has its own                 |
| (f,g,h)  | (age, placement, connection) and (os, placement, connection)                         |
| phi[u]   | phase of the category u, uniform in [0, 2 pi)                                        |
| s_k      | makes the standard deviation of s_k z_k equal to 0.8, 0.85, 0.55, 0.25, 0.3          |
| b        | makes the mean of p equal to 7 %                                                     |

Standardised numbers have mean 0 and variance 1 under the frequencies of the values. Hence z_2
cannot be explained by single fields, nor z_3 by pairs of fields: z_1 is what a logistic regression
can learn, z_2 what a factorization machine adds, z_3 what a deep network adds. A missing rating or
days_since_visit contributes 0 to z_4. z_5 is a taste for categories that drifts: what was learned
in the morning is wrong in the evening. s_k and b are measured on 32,768 impressions of the same
model, spread over one period of z_5.

Impressions arrive as a Poisson process from 2025-01-01T00:00:00Z on, at

    (1 + 0.6 cos(2 pi (t - 20 h) / 24 h)) * 1,000,000 a day

A click follows its impression after a log-normal delay with median 20 s; 1 % of the delays are
longer than ten minutes.

With a drift, the click probabilities follow another law from the middle of the stream on, that is,
from impression number `impressions // 2` on:

| drift     | second half of the stream                                                         |
|-----------|-----------------------------------------------------------------------------------|
| `none`    | the same law                                                                       |
| `weights` | w_f, v_f, a_f and phi are drawn anew; s_k and b are measured anew                  |
| `rate`    | b makes the mean of p equal to a quarter of 7 %; all else is the same              |

Users, apps, values and arrivals do not change. Before the middle, impressions and clicks are those
of the stream without a drift.

The same seed gives the same bytes (with the same version of NumPy). Without a drift, a longer
stream begins with the impressions of a shorter one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stream_ctr.errors import ConfigError
from stream_ctr.events.field import Field
from stream_ctr.logs.log import (
    DEFAULT_START_MS,
    ClickDelays,
    Log,
    LogBatch,
    impression_batch,
    merge_clicks,
)
from stream_ctr.messages import nearest

Drift = Literal["none", "weights", "rate"]
"""What changes in the middle of the stream."""
DRIFTS: tuple[Drift, ...] = get_args(Drift)

START_MS = DEFAULT_START_MS
IMPRESSIONS_PER_DAY = 1_000_000
CLICK_THROUGH_RATE = 0.07
RATE_AFTER_DRIFT = CLICK_THROUGH_RATE / 4
MEDIAN_DELAY_SECONDS = 20.0
DELAY_SIGMA = 1.462
"""ln(600 / 20) / 2.326: 1 % of the delays are longer than ten minutes."""

_HOUR_MS = 3_600_000
_DAY_MS = 24 * _HOUR_MS
_PEAK_HOUR = 20
_SWING = 0.6
_DRIFT_PERIOD_MS = 1.5 * _DAY_MS
_BLOCK_ROWS = 8192
_CALIBRATION_ROWS = 32_768
_BISECTIONS = 50

_PAIR_WIDTH = 4
_STANDARD_DEVIATIONS = np.array([0.8, 0.85, 0.55, 0.25, 0.3])  # of s_k z_k
_EFFECTS = len(_STANDARD_DEVIATIONS)
_TRIPLES = (("age", "placement", "connection"), ("os", "placement", "connection"))

_MEAN_RATING = 4.1
_RATING_SPREAD = 0.5
_MEAN_LOG_DAYS = 1.7
_NO_RATING = 0.1
_NO_LAST_CATEGORY = 0.1
_NO_DAYS = 0.15


class _Law(NamedTuple):
    """The values of a categorical field, their frequencies and the scales of their effects."""

    prefix: str
    values: int
    exponent: float
    shift: float = 0.0
    first_order: float = 0.0
    pairs: float = 0.0
    owner: str = ""
    """The field that determines the value; empty: the value is drawn for each impression."""


_LAWS: Mapping[str, _Law] = {
    "user_id": _Law("u", 50_000, 0.9, 30.0, first_order=0.2),
    "segment": _Law("s", 10, 0.3, first_order=0.3, pairs=1.0, owner="user_id"),
    "age": _Law("g", 6, 0.2, first_order=0.3, pairs=1.0, owner="user_id"),
    "country": _Law("c", 20, 0.9, first_order=0.2, pairs=0.3, owner="user_id"),
    "device": _Law("d", 150, 0.8, 1.0, first_order=0.25, pairs=0.2, owner="user_id"),
    "os": _Law("o", 4, 0.5, first_order=0.2, pairs=0.5, owner="device"),
    "app_id": _Law("a", 3_000, 1.05, 2.0, first_order=0.5, pairs=0.3),
    "category": _Law("k", 20, 0.4, first_order=0.4, pairs=1.0, owner="app_id"),
    "connection": _Law("n", 4, 0.7, first_order=0.3, pairs=0.5),
    "placement": _Law("p", 6, 0.5, first_order=0.5, pairs=0.8),
    "hour": _Law("", 24, 0.0),
    "last_category": _Law("k", 20, 0.5, first_order=0.2, pairs=0.8),
}
_OWNER = {field: law.owner for field, law in _LAWS.items() if law.owner}

FIELDS = (
    *(Field(name, "categorical") for name in _LAWS),
    *(Field(name, "numeric") for name in ("rating", "days_since_visit")),
)

# The texts of a field's values. One more entry, null, is the missing value.
_TEXTS = {
    field: pa.array([*(f"{law.prefix}{i}" for i in range(law.values)), None])
    for field, law in _LAWS.items()
}

Codes = Mapping[str, npt.NDArray[np.int64]]
"""The index [n] of the value of each categorical field; one beyond the last is missing."""
Numbers = Mapping[str, npt.NDArray[np.float64]]
"""The values [n] of each numeric field; NaN is missing."""


class Simulation(Log):
    """A log of `impressions` impressions and their clicks.

    From impression number `change` on, clicks follow the law that `drift` gives. Without a drift
    there is no such impression.

    Raises `ConfigError` when there are no impressions, the seed is negative, or the drift unknown.

    >>> simulation = Simulation(1000, seed=7)
    >>> batch = next(iter(simulation.batches()))
    >>> batch.key[0].as_py(), batch.value == next(iter(simulation.batches())).value
    (b'sim7-0', True)
    """

    format = "simulated"

    def __init__(self, impressions: int, *, seed: int = 0, drift: Drift = "none") -> None:
        if impressions < 1 or seed < 0:
            raise ConfigError(
                "a simulation needs a positive number of impressions and a seed of at least 0, "
                f"got {impressions} and {seed}"
            )
        if drift not in DRIFTS:
            raise ConfigError(
                f"unknown drift {drift!r}{nearest(drift, DRIFTS)}; known are {', '.join(DRIFTS)}"
            )
        drifts = "" if drift == "none" else f", drift {drift}"
        note = (
            f"simulated: {impressions:,} impressions from seed {seed}{drifts}; "
            "the true click probability of each is known"
        )
        name = f"simulation-{seed}" if drift == "none" else f"simulation-{seed}-{drift}"
        super().__init__(None, FIELDS, (note,), name=name)
        self.impressions = impressions
        self.seed = seed
        self.drift: Drift = drift
        self.change = impressions if drift == "none" else impressions // 2

    @cached_property
    def world(self) -> World:
        """The world up to the change."""
        return World(self.seed)

    @cached_property
    def world_after(self) -> World:
        """The world from the change on."""
        return self.world.drifted(self.drift)

    def _read(self) -> Iterator[LogBatch]:
        return merge_clicks(self._impressions())

    def _impressions(self) -> Iterator[pa.RecordBatch]:
        # Each block has a generator of its own and is drawn completely, so that a longer stream
        # begins with the impressions of a shorter one.
        arrived = 0.0
        for first in range(0, self.impressions, _BLOCK_ROWS):
            self.progress = first / self.impressions
            rng = _generator(self.seed, 2, first // _BLOCK_ROWS)
            arrival = arrived + np.cumsum(rng.exponential(1.0, _BLOCK_ROWS))
            arrived = arrival[-1]
            rows = np.arange(first, first + _BLOCK_ROWS)
            block = self._block(rng, _time_of(arrival), rows)
            yield block.slice(0, min(_BLOCK_ROWS, self.impressions - first))

    def _block(
        self, rng: np.random.Generator, time: npt.NDArray[np.int64], row: npt.NDArray[np.int64]
    ) -> pa.RecordBatch:
        codes, numbers = self.world.draw(rng, time)
        probability = self._probability(codes, numbers, time, row)
        clicked = rng.random(len(time)) < probability
        click_time = ClickDelays(rng, MEDIAN_DELAY_SECONDS, DELAY_SIGMA).click_time(time, clicked)
        impression_id = pc.binary_join_element_wise(
            f"sim{self.seed}-", pa.array(row).cast(pa.string()), ""
        )
        features = _features(codes, numbers)
        return impression_batch(impression_id, time, click_time, features, probability)

    def _probability(
        self,
        codes: Codes,
        numbers: Numbers,
        time: npt.NDArray[np.int64],
        row: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.float64]:
        """Return the click probabilities of the impressions with these numbers, [n]."""
        before = self.world.probability(codes, numbers, time)
        if row[-1] < self.change:
            return before
        after = self.world_after.probability(codes, numbers, time)
        return np.where(row < self.change, before, after)


class World:
    """The users, the apps and the effects on the click probability, which a seed determines.

    Nothing in it changes while impressions are drawn.
    """

    def __init__(self, seed: int) -> None:
        # The order of the draws decides what a seed means: changing it changes every stream.
        rng = _generator(seed, 0)
        shares = {field: _zipf_mandelbrot(law) for field, law in _LAWS.items()}
        self._value_of_owner = {
            field: _pick(rng, shares[field], len(shares[owner])) for field, owner in _OWNER.items()
        }
        for field, owner in _OWNER.items():
            counts = np.bincount(self._value_of_owner[field], shares[owner], len(shares[field]))
            shares[field] = counts.astype(np.float64)
        self._seed = seed
        self._shares = shares
        self._rating = _ratings(rng, len(shares["app_id"]))
        self._draw_effects(rng)
        self._calibrate(CLICK_THROUGH_RATE)

    def drifted(self, drift: Drift) -> World:
        """Return the world after a drift, with the same users, apps and values."""
        after = copy(self)
        if drift == "weights":
            after._draw_effects(_generator(self._seed, 3))
        after._calibrate(RATE_AFTER_DRIFT if drift == "rate" else CLICK_THROUGH_RATE)
        return after

    def _draw_effects(self, rng: np.random.Generator) -> None:
        """Draw w_f, v_f, a_f and phi."""
        shares = self._shares
        self._first_order = {
            field: law.first_order * rng.standard_normal(law.values)
            for field, law in _LAWS.items()
            if law.first_order
        }
        hour = np.arange(24)
        self._first_order["hour"] = np.cos(2 * np.pi * (hour - _PEAK_HOUR) / 24) / 4
        self._vectors = {
            field: law.pairs * _standardised(rng, shares[field], _PAIR_WIDTH)
            for field, law in _LAWS.items()
            if law.pairs
        }
        self._triples = [
            {field: _standardised(rng, shares[field], 1)[:, 0] for field in triple}
            for triple in _TRIPLES
        ]
        self._phase = rng.uniform(0, 2 * np.pi, len(shares["category"]))
        for effects in (self._first_order, self._vectors):
            known = effects["last_category"]
            effects["last_category"] = np.concatenate([known, np.zeros_like(known[:1])])

    def draw(self, rng: np.random.Generator, time: npt.NDArray[np.int64]) -> tuple[Codes, Numbers]:
        """Return the categorical and numeric values of impressions at `time` (epoch ms, [n])."""
        n = len(time)
        codes = {
            field: _pick(rng, self._shares[field], n)
            for field in _LAWS
            if field not in _OWNER and field != "hour"
        }
        for field, owner in _OWNER.items():
            codes[field] = self._value_of_owner[field][codes[owner]]
        codes["hour"] = time // _HOUR_MS % 24
        missing = len(self._shares["last_category"])
        codes["last_category"][rng.random(n) < _NO_LAST_CATEGORY] = missing
        days = np.floor(np.exp(1.5 + 1.2 * rng.standard_normal(n)))
        days[rng.random(n) < _NO_DAYS] = np.nan
        return codes, {"rating": self._rating[codes["app_id"]], "days_since_visit": days}

    def probability(
        self, codes: Codes, numbers: Numbers, time: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """Return p of the module's formula, [n]."""
        logit = self._bias + self.effects(codes, numbers, time) @ self._scale
        return np.clip(np.round(_sigmoid(logit), 6), 1e-6, 1 - 1e-6)

    def effects(
        self, codes: Codes, numbers: Numbers, time: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """Return z_1 to z_5 of the module's formula, [n, 5]."""
        z = np.zeros((len(time), _EFFECTS))
        for field, weight in self._first_order.items():
            z[:, 0] += weight[codes[field]]
        z[:, 1] = self._pair_effect(codes)
        for triple in self._triples:
            z[:, 2] += np.prod([factor[codes[field]] for field, factor in triple.items()], axis=0)
        z[:, 3] = np.nan_to_num((numbers["rating"] - _MEAN_RATING) / _RATING_SPREAD)
        z[:, 3] -= np.nan_to_num(np.log1p(numbers["days_since_visit"]) - _MEAN_LOG_DAYS)
        angle = 2 * np.pi / _DRIFT_PERIOD_MS * (time - START_MS)
        z[:, 4] = np.sin(angle + self._phase[codes["category"]])
        return z

    def _pair_effect(self, codes: Codes) -> npt.NDArray[np.float64]:
        """Return sum_{f<g} <v_f, v_g> = (|sum_f v_f|^2 - sum_f |v_f|^2) / 2, [n]."""
        n = len(codes["hour"])
        total = np.zeros((n, _PAIR_WIDTH))
        squares = np.zeros(n)
        for field, vector in self._vectors.items():
            total += vector[codes[field]]  # [n, 4]
            squares += (vector * vector).sum(1)[codes[field]]
        return ((total * total).sum(1) - squares) / 2

    def _calibrate(self, rate: float) -> None:
        """Measure s_k, [5], and b, which makes `rate` the mean of p, over one period of z_5."""
        rng = _generator(self._seed, 1)
        time = START_MS + np.linspace(0, _DRIFT_PERIOD_MS, _CALIBRATION_ROWS, dtype=np.int64)
        effects = self.effects(*self.draw(rng, time), time)
        self._scale = _STANDARD_DEVIATIONS / effects.std(axis=0)
        logit = effects @ self._scale
        low = -20.0
        high = 20.0
        bias = 0.0
        for _ in range(_BISECTIONS):
            bias = (low + high) / 2
            if _sigmoid(logit + bias).mean() < rate:
                low = bias
            else:
                high = bias
        self._bias = bias


def _features(codes: Codes, numbers: Numbers) -> dict[str, pa.Array]:
    features = {field: _TEXTS[field].take(pa.array(codes[field])) for field in _LAWS}
    for name, values in numbers.items():
        features[name] = pa.array(values, from_pandas=True)  # NaN becomes null
    return features


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def _zipf_mandelbrot(law: _Law) -> npt.NDArray[np.float64]:
    """Return the frequencies [values] of the ranks, which sum to 1."""
    weight = 1 / (np.arange(1, law.values + 1) + law.shift) ** law.exponent
    return weight / weight.sum()


def _ratings(rng: np.random.Generator, apps: int) -> npt.NDArray[np.float64]:
    normal = _MEAN_RATING + _RATING_SPREAD * rng.standard_normal(apps)
    rating = normal.clip(1, 5).round(1)
    rating[rng.random(apps) < _NO_RATING] = np.nan
    return rating


def _pick(
    rng: np.random.Generator, shares: npt.NDArray[np.float64], n: int
) -> npt.NDArray[np.int64]:
    """Return n indices, drawn with these frequencies."""
    cumulative = np.cumsum(shares)
    return np.searchsorted(cumulative[:-1], rng.random(n) * cumulative[-1], side="right")


def _standardised(
    rng: np.random.Generator, shares: npt.NDArray[np.float64], width: int
) -> npt.NDArray[np.float64]:
    """Return a normal vector for each value, [values, width].

    Under the frequencies of the values each component has mean 0 and variance 1.
    """
    vectors = rng.standard_normal((len(shares), width))
    vectors -= shares @ vectors
    return vectors / np.sqrt(shares @ vectors**2)


def _sigmoid(logit: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return 1 / (1 + np.exp(-logit))


def _time_of(arrival: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return the epoch ms at which the expected number of impressions reaches `arrival`."""
    day, rest = np.divmod(arrival, IMPRESSIONS_PER_DAY)
    day_share = np.interp(rest, _EXPECTED_IMPRESSIONS, _DAY_SHARE)
    return START_MS + ((day + day_share) * _DAY_MS).astype(np.int64)


# The impressions expected by each minute of a day: the integral of the arrival rate.
_DAY_SHARE = np.arange(1441) / 1440
_ANGLE = 2 * np.pi * (_DAY_SHARE - _PEAK_HOUR / 24)
_EXPECTED_IMPRESSIONS = IMPRESSIONS_PER_DAY * (
    _DAY_SHARE + _SWING * (np.sin(_ANGLE) - np.sin(_ANGLE[0])) / (2 * np.pi)
)
