"""A stream of impressions and clicks whose true click probability is known.

An app store shows apps to users. An impression has twelve categorical and two numeric fields:

    user_id -> segment, age, country, device -> os        a user has the same segment, age, country and device for ever
    app_id -> category, rating                            an app its category and rating (rating: missing for one app in ten)
    connection, placement, hour, last_category, days_since_visit      the context (the last two are missing at times)

Users, apps and most other values follow Zipf-Mandelbrot laws, P(rank r) ~ 1 / (r + q)^s. The label is a coin thrown with probability

    p = sigmoid(b + sum_k s_k z_k(x, t))        rounded to six decimals, carried by the event as true_probability

    z_1 = sum_f w_f[x_f] + evening              first order; w_f[v] ~ N(0, _FIRST[f]^2); evening = cos of the hour, highest at 20:00 UTC
    z_2 = sum_{f<g} <v_f[x_f], v_g[x_g]>        all pairs of fields, v_f in R^4 scaled by _LATENT[f]: what an FM can express
    z_3 = sum_j a_j[x_f] b_j[x_g] c_j[x_h]      triples of small fields (_TRIPLES), of which no pair says anything
    z_4 = rating - log(1 + days_since_visit)    centred, missing at the centre, each in units of its spread
    z_5 = sin(2 pi t / 36 h + phase[category])  tastes that drift: what was learned in the morning is wrong in the evening

v, a, b and c have mean 0 and variance 1 under the frequencies of their values, so that each order explains what no lower order can.
s_k makes the standard deviation of s_k z_k equal to _SPREAD[k], and b makes the click-through rate 7 %, both measured on impressions of
the same model.

Impressions arrive as a Poisson process with one million a day on average, from 2025-01-01T00:00:00Z, 60 % more at the evening's peak
and as many fewer in the morning. A click follows after a log-normal delay with median 20 s; 1 % take longer than ten minutes.

The same seed gives the same bytes (with the same version of NumPy), and a longer stream begins with the impressions of a shorter one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

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

START_MS = DEFAULT_START_MS
IMPRESSIONS_PER_DAY = 1_000_000
CLICK_THROUGH_RATE = 0.07
MEDIAN_DELAY_SECONDS = 20.0
DELAY_SIGMA = 1.462
"""ln(600 / 20) / 2.326: 1 % of the delays are longer than ten minutes."""

FIELDS = (
    *(
        Field(name, "categorical")
        for name in ("user_id", "segment", "age", "country", "device", "os", "app_id", "category")
    ),
    *(Field(name, "categorical") for name in ("connection", "placement", "hour", "last_category")),
    *(Field(name, "numeric") for name in ("rating", "days_since_visit")),
)

_HOUR_MS, _DAY_MS = 3_600_000, 86_400_000
_PEAK_HOUR, _SWING = 20, 0.6
_DRIFT_PERIOD_MS = 1.5 * _DAY_MS
_WIDTH = 4
_BLOCK = 8192
_CALIBRATION = 32_768
_SPREAD = np.array([0.8, 0.85, 0.55, 0.25, 0.3])

# Values of each field, and the exponent s and shift q of their frequencies.
_VALUES: Mapping[str, tuple[int, float, float]] = {
    "user_id": (50_000, 0.9, 30.0),
    "segment": (10, 0.3, 0.0),
    "age": (6, 0.2, 0.0),
    "country": (20, 0.9, 0.0),
    "device": (150, 0.8, 1.0),
    "os": (4, 0.5, 0.0),
    "app_id": (3_000, 1.05, 2.0),
    "category": (20, 0.4, 0.0),
    "connection": (4, 0.7, 0.0),
    "placement": (6, 0.5, 0.0),
    "hour": (24, 0.0, 0.0),
    "last_category": (20, 0.5, 0.0),
}
_FIRST = {"user_id": 0.2, "segment": 0.3, "age": 0.3, "country": 0.2, "device": 0.25, "os": 0.2} | {
    **{"app_id": 0.5, "category": 0.4, "connection": 0.3, "placement": 0.5, "last_category": 0.2}
}
_LATENT = {"segment": 1.0, "age": 1.0, "country": 0.3, "device": 0.2, "os": 0.5} | {
    **{"app_id": 0.3, "category": 1.0, "connection": 0.5, "placement": 0.8, "last_category": 0.8}
}
_TRIPLES = (("age", "placement", "connection"), ("os", "placement", "connection"))

_OWNER = {
    **dict.fromkeys(("segment", "age", "country", "device"), "user_id"),
    "os": "device",
    "category": "app_id",
}
_RATING, _RATING_SPREAD, _LOG_DAYS = 4.1, 0.5, 1.7
_PREFIX = {
    "user_id": "u",
    "segment": "s",
    "age": "g",
    "country": "c",
    "device": "d",
    "os": "o",
    "app_id": "a",
    "category": "k",
} | {**{"connection": "n", "placement": "p", "hour": "", "last_category": "k"}}
# The last name, of no value, is that of a missing one.
_NAMES = {
    field: pa.array([*(f"{_PREFIX[field]}{i}" for i in range(law[0])), None])
    for field, law in _VALUES.items()
}

Codes = Mapping[str, npt.NDArray[np.int64]]
"""Of each categorical field the index [n] of its value; one beyond the last: missing."""
Numbers = Mapping[str, npt.NDArray[np.float64]]


class Simulation(Log):
    """`impressions` impressions and their clicks, as a log that can be read any number of times.

    >>> simulation = Simulation(1000, seed=7)
    >>> batch = next(iter(simulation.batches()))
    >>> batch.key[0].as_py(), batch.value == next(iter(simulation.batches())).value
    (b'sim7-0', True)
    """

    format = "simulated"

    def __init__(self, impressions: int, *, seed: int = 0) -> None:
        if impressions < 1 or seed < 0:
            raise ConfigError(
                f"a simulation needs a positive number of impressions and a seed of at least 0, got {impressions} and {seed}"
            )
        drawn = f"simulated: {impressions:,} impressions from seed {seed}; the true click probability of each is known"
        super().__init__(None, FIELDS, (drawn,), name=f"simulation-{seed}")
        self.impressions = impressions
        self.seed = seed

    @cached_property
    def world(self) -> World:
        return World(self.seed)

    def _read(self) -> Iterator[LogBatch]:
        return merge_clicks(self._impressions())

    def _impressions(self) -> Iterator[pa.RecordBatch]:
        arrived = 0.0
        for first in range(0, self.impressions, _BLOCK):
            self.progress = first / self.impressions
            rng = _generator(self.seed, 2, first // _BLOCK)
            arrival = arrived + np.cumsum(rng.exponential(1.0, _BLOCK))
            arrived = arrival[-1]
            block = self._block(rng, _time_of(arrival), np.arange(first, first + _BLOCK))
            yield block.slice(0, min(_BLOCK, self.impressions - first))

    def _block(
        self, rng: np.random.Generator, time: npt.NDArray[np.int64], row: npt.NDArray[np.int64]
    ) -> pa.RecordBatch:
        codes, numbers = self.world.draw(rng, time)
        probability = self.world.probability(codes, numbers, time)
        clicked = rng.random(len(time)) < probability
        click_time = ClickDelays(rng, MEDIAN_DELAY_SECONDS, DELAY_SIGMA).click_time(time, clicked)
        identity = pc.binary_join_element_wise(
            f"sim{self.seed}-", pa.array(row).cast(pa.string()), ""
        )
        return impression_batch(identity, time, click_time, _features(codes, numbers), probability)


class World:
    """Users, apps and what makes them click: all that stays the same while impressions come and go."""

    def __init__(self, seed: int) -> None:
        rng = _generator(seed, 0)
        shares = {field: _zipf(*law) for field, law in _VALUES.items()}
        self.belongs = {
            field: _pick(rng, shares[field], len(shares[owner])) for field, owner in _OWNER.items()
        }
        for field, owner in _OWNER.items():
            shares[field] = np.bincount(
                self.belongs[field], shares[owner], len(shares[field])
            ).astype(np.float64)
        self.shares = shares
        apps = len(shares["app_id"])
        self.rating = np.round(
            np.clip(_RATING + _RATING_SPREAD * rng.standard_normal(apps), 1, 5), 1
        )
        self.rating[rng.random(apps) < 0.1] = np.nan
        self.first = {
            field: scale * rng.standard_normal(len(shares[field]))
            for field, scale in _FIRST.items()
        }
        self.first["hour"] = np.cos(2 * np.pi * (np.arange(24) - _PEAK_HOUR) / 24) / 4
        self.latent = {
            field: scale * _standardised(rng, shares[field], _WIDTH)
            for field, scale in _LATENT.items()
        }
        self.triples = [
            {field: _standardised(rng, shares[field], 1)[:, 0] for field in triple}
            for triple in _TRIPLES
        ]
        self.phase = rng.uniform(0, 2 * np.pi, len(shares["category"]))
        for effects in (self.first, self.latent):
            effects["last_category"] = np.concatenate(
                [effects["last_category"], np.zeros_like(effects["last_category"][:1])]
            )
        self._scale, self._bias = np.ones(len(_SPREAD)), 0.0
        self._calibrate(_generator(seed, 1))

    def draw(self, rng: np.random.Generator, time: npt.NDArray[np.int64]) -> tuple[Codes, Numbers]:
        """Impressions at `time` (epoch ms): codes of the categorical fields and values of the numeric ones (NaN: missing)."""
        n = len(time)
        codes = {
            field: _pick(rng, self.shares[field], n)
            for field in _VALUES
            if field not in _OWNER and field != "hour"
        }
        for field, owner in _OWNER.items():
            codes[field] = self.belongs[field][codes[owner]]
        codes["hour"] = time // _HOUR_MS % 24
        codes["last_category"][rng.random(n) < 0.1] = len(self.shares["last_category"])
        days = np.floor(np.exp(1.5 + 1.2 * rng.standard_normal(n)))
        days[rng.random(n) < 0.15] = np.nan
        return codes, {"rating": self.rating[codes["app_id"]], "days_since_visit": days}

    def probability(
        self, codes: Codes, numbers: Numbers, time: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        logit = self._bias + self.effects(codes, numbers, time) @ self._scale
        return np.clip(np.round(_sigmoid(logit), 6), 1e-6, 1 - 1e-6)

    def effects(
        self, codes: Codes, numbers: Numbers, time: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """z_1 to z_5 of the formulas above, [n, 5]."""
        effects = np.zeros((len(time), len(_SPREAD)))
        for field, weight in self.first.items():
            effects[:, 0] += weight[codes[field]]
        total, squares = np.zeros((len(time), _WIDTH)), np.zeros(len(time))
        for field, vector in self.latent.items():
            total += vector[codes[field]]  # [n, 4]
            squares += (vector * vector).sum(1)[codes[field]]
        effects[:, 1] = ((total * total).sum(1) - squares) / 2
        for triple in self.triples:
            effects[:, 2] += np.prod(
                [factor[codes[field]] for field, factor in triple.items()], axis=0
            )
        effects[:, 3] = np.nan_to_num((numbers["rating"] - _RATING) / _RATING_SPREAD)
        effects[:, 3] -= np.nan_to_num(np.log1p(numbers["days_since_visit"]) - _LOG_DAYS)
        effects[:, 4] = np.sin(
            2 * np.pi / _DRIFT_PERIOD_MS * (time - START_MS) + self.phase[codes["category"]]
        )
        return effects

    def _calibrate(self, rng: np.random.Generator) -> None:
        """Set the scale of each effect and the bias, on impressions spread over one period of the drift."""
        time = START_MS + np.linspace(0, _DRIFT_PERIOD_MS, _CALIBRATION, dtype=np.int64)
        effects = self.effects(*self.draw(rng, time), time)
        self._scale = _SPREAD / effects.std(axis=0)
        logit = effects @ self._scale
        low, high = -20.0, 20.0
        for _ in range(50):
            self._bias = (low + high) / 2
            low, high = (
                (self._bias, high)
                if _sigmoid(logit + self._bias).mean() < CLICK_THROUGH_RATE
                else (low, self._bias)
            )


def _features(codes: Codes, numbers: Numbers) -> dict[str, pa.Array]:
    texts = {
        field.name: _NAMES[field.name].take(pa.array(codes[field.name]))
        for field in FIELDS
        if field.kind == "categorical"
    }
    return {
        **texts,
        **{name: pa.array(values, from_pandas=True) for name, values in numbers.items()},
    }


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def _zipf(values: int, exponent: float, shift: float) -> npt.NDArray[np.float64]:
    """Frequencies of the ranks 1 to `values`: P(r) ~ 1 / (r + shift)^exponent."""
    weight = 1 / (np.arange(1, values + 1) + shift) ** exponent
    return weight / weight.sum()


def _pick(
    rng: np.random.Generator, shares: npt.NDArray[np.float64], n: int
) -> npt.NDArray[np.int64]:
    cumulative = np.cumsum(shares)
    return np.searchsorted(cumulative[:-1], rng.random(n) * cumulative[-1], side="right")


def _standardised(
    rng: np.random.Generator, shares: npt.NDArray[np.float64], width: int
) -> npt.NDArray[np.float64]:
    """A normal vector for each value, [values, width], with mean 0 and variance 1 under the values' frequencies."""
    vectors = rng.standard_normal((len(shares), width))
    vectors -= shares @ vectors
    return vectors / np.sqrt(shares @ vectors**2)


def _sigmoid(logit: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return 1 / (1 + np.exp(-logit))


def _time_of(arrival: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Epoch ms at which the expected number of impressions since the start reaches `arrival`."""
    day, rest = np.divmod(arrival, IMPRESSIONS_PER_DAY)
    return START_MS + ((day + np.interp(rest, _EXPECTED, _DAY_SHARE)) * _DAY_MS).astype(np.int64)


# Integral of 1 + swing cos(2 pi (t - peak)) over the day: impressions expected by each minute of it.
_DAY_SHARE = np.arange(1441) / 1440
_ANGLE = 2 * np.pi * (_DAY_SHARE - _PEAK_HOUR / 24)
_EXPECTED = IMPRESSIONS_PER_DAY * (
    _DAY_SHARE + _SWING * (np.sin(_ANGLE) - np.sin(_ANGLE[0])) / (2 * np.pi)
)
