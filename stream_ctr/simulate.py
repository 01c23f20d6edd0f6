"""A stream of impressions and clicks whose true click probability is known.

An app store shows apps to users. An impression has twelve categorical and two numeric fields:

    user_id -> segment, age, country, device -> os        a user has the same segment, age, country and device for ever
    app_id -> category, rating                            an app its category and rating (rating: missing for one app in ten)
    connection, placement, hour, last_category, days_since_visit      the context (the last two are missing at times)

Users, apps and most other values follow Zipf-Mandelbrot laws, P(rank r) ~ 1 / (r + q)^s. The label is a coin thrown with probability

    p = sigmoid(b + sum_k s_k z_k(x, t))        rounded to six decimals, carried by the event as true_probability

    z_1 = sum_f w_f[x_f] + evening              first order; w_f[v] ~ N(0, _FIRST[f]^2); evening = cos of the hour, highest at 20:00 UTC
    z_2 = sum_{f<g} <v_f[x_f], v_g[x_g]>        all pairs of fields; v_f[v] ~ N(0, _LATENT[f]^2 I_4): what an FM can express
    z_3 = sum_j a_j[x_f] b_j[x_g] c_j[x_h]      triples of small fields (_TRIPLES); a, b, c ~ N(0, 1): no pair of them says anything
    z_4 = rating - log(1 + days_since_visit)    centred, missing at the centre, each in units of its spread
    z_5 = sin(2 pi t / 36 h + phase[category])  tastes that drift: what was learned in the morning is wrong in the evening

v, a, b and c are centred under the frequencies of their values, so that each order explains what no lower order can. s_k makes the standard
deviation of s_k z_k equal to _SPREAD[k], and b makes the click-through rate 7 %, both measured on impressions of the same model.

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

from stream_ctr.config import Field
from stream_ctr.errors import ConfigError
from stream_ctr.logs import DEFAULT_START_MS, ClickDelays, EventBatch, Log, impression_batch, merge_clicks

START_MS = DEFAULT_START_MS
IMPRESSIONS_PER_DAY = 1_000_000
CLICK_THROUGH_RATE = 0.07
MEDIAN_DELAY_SECONDS = 20.0
DELAY_SIGMA = 1.462
"""ln(600 / 20) / 2.326: 1 % of the delays are longer than ten minutes."""

FIELDS = (
    *(Field(name, "categorical") for name in ("user_id", "segment", "age", "country", "device", "os", "app_id", "category")),
    *(Field(name, "categorical") for name in ("connection", "placement", "hour", "last_category")),
    *(Field(name, "numeric") for name in ("rating", "days_since_visit")),
)

_DAY_MS = 86_400_000
_PEAK_HOUR, _SWING = 20, 0.6
_DRIFT_PERIOD_MS = 1.5 * _DAY_MS
_WIDTH = 4
_BLOCK = 8192
_CALIBRATION = 32_768
_SPREAD = np.array([0.85, 0.95, 0.6, 0.25, 0.3])

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
    **{"app_id": 0.5, "category": 0.4, "connection": 0.3, "placement": 0.5, "hour": 0.0, "last_category": 0.2}
}
_LATENT = {"segment": 1.0, "age": 1.0, "country": 0.3, "device": 0.2, "os": 0.5} | {
    **{"app_id": 0.3, "category": 1.0, "connection": 0.5, "placement": 0.8, "last_category": 0.8}
}
_TRIPLES = (("age", "placement", "connection"), ("os", "placement", "connection"))

Codes = Mapping[str, npt.NDArray[np.int64]]
"""Of each categorical field the index [n] of the value; one beyond the last: missing."""


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
            raise ConfigError(f"a simulation needs a positive number of impressions and a seed of at least 0, got {impressions} and {seed}")
        drawn = f"simulated: {impressions:,} impressions from seed {seed}; the true click probability of each is known"
        super().__init__(None, FIELDS, (drawn,), name=f"simulation-{seed}")
        self.impressions = impressions
        self.seed = seed

    @cached_property
    def world(self) -> World:
        return World(self.seed)

    def _read(self) -> Iterator[EventBatch]:
        return merge_clicks(self._impressions())

    def _impressions(self) -> Iterator[pa.RecordBatch]:
        arrived = 0.0
        for first in range(0, self.impressions, _BLOCK):
            self.progress = first / self.impressions
            rng = _generator(self.seed, 2, first // _BLOCK)
            arrival = arrived + np.cumsum(rng.exponential(1.0, _BLOCK))
            arrived = arrival[-1]
            block = self._block(rng, START_MS + _time_of(arrival), np.arange(first, first + _BLOCK))
            yield block.slice(0, min(_BLOCK, self.impressions - first))

    def _block(self, rng: np.random.Generator, time: npt.NDArray[np.int64], row: npt.NDArray[np.int64]) -> pa.RecordBatch:
        codes, numbers = self.world.draw(rng, time)
        probability = self.world.probability(codes, numbers, time)
        clicked = rng.random(len(time)) < probability
        click_time = ClickDelays(rng, MEDIAN_DELAY_SECONDS, DELAY_SIGMA).click_time(time, clicked)
        identity = pa.compute.binary_join_element_wise(f"sim{self.seed}-", pa.array(row).cast(pa.string()), "")
        return impression_batch(identity, time, click_time, _features(codes, numbers), probability)


class World:
    """Users, apps and what makes them click: all that stays the same while impressions come and go."""

    def __init__(self, seed: int) -> None:
        rng = _generator(seed, 0)
        shares = {field: _zipf(*law) for field, law in _VALUES.items()}
        self._belongs = {
            field: (owner, _pick(rng, shares[field], len(shares[owner])))
            for field, owner in {**dict.fromkeys(("segment", "age", "country", "device"), "user_id"), "os": "device", "category": "app_id"}.items()
        }
        for field, (owner, value) in self._belongs.items():
            shares[field] = np.bincount(value, shares[owner], len(shares[field]))
        self._shares = shares
        rating = np.round(np.clip(4.1 + 0.5 * rng.standard_normal(len(shares["app_id"])), 1, 5), 1)
        self.rating = np.where(rng.random(len(rating)) < 0.1, np.nan, rating)
        self.first = {field: _FIRST[field] * rng.standard_normal(len(share)) for field, share in shares.items()}
        self.first["hour"] += np.cos(2 * np.pi * (np.arange(24) - _PEAK_HOUR) / 24) / 4
        self.latent = {field: scale * _centred(rng.standard_normal((len(shares[field]), _WIDTH)), shares[field]) for field, scale in _LATENT.items()}
        self.triples = [[(field, _centred(rng.standard_normal(len(shares[field])), shares[field])) for field in triple] for triple in _TRIPLES]
        self.phase = rng.uniform(0, 2 * np.pi, len(shares["category"]))
        self._scale, self._bias = np.ones(len(_SPREAD)), 0.0
        self._calibrate(_generator(seed, 1))

    def draw(self, rng: np.random.Generator, time: npt.NDArray[np.int64]) -> tuple[Codes, Mapping[str, npt.NDArray[np.float64]]]:
        """Impressions at `time` (epoch ms): codes of the categorical fields, and the numbers (NaN: missing)."""
        n = len(time)
        codes = {field: _pick(rng, self._shares[field], n) for field in ("user_id", "app_id", "connection", "placement", "last_category")}
        for field, (owner, value) in self._belongs.items():
            codes[field] = value[codes[owner]]
        codes["hour"] = (time // 3_600_000) % 24
        codes["last_category"][rng.random(n) < 0.1] = len(self._shares["last_category"])
        days = np.floor(np.exp(1.5 + 1.2 * rng.standard_normal(n)))
        return codes, {"rating": self.rating[codes["app_id"]], "days_since_visit": np.where(rng.random(n) < 0.15, np.nan, days)}

    def probability(self, codes: Codes, numbers: Mapping[str, npt.NDArray[np.float64]], time: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        return np.round(_sigmoid(self._bias + self.effects(codes, numbers, time) @ self._scale), 6)

    def effects(self, codes: Codes, numbers: Mapping[str, npt.NDArray[np.float64]], time: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """z_1 to z_5 of the module's formulas, [n, 5]."""
        first = sum(_effect(effect, codes[field]) for field, effect in self.first.items())
        vectors = [_effect(vector, codes[field]) for field, vector in self.latent.items()]
        pairs = sum((total := sum(vectors)) ** 2 ...)
        return np.stack([], axis=1)
