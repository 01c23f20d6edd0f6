"""The simulated stream at a constant rate, with a law of clicks that changes while it flows.

    logit(t) = b + cos(a(t)) (logit_A - b) + sin(a(t)) (logit_B - b)

A is the world of a seed, B the same one after the drift `weights` or `rate` of `simulate`, and b
the mean logit of A. With jumps, a(t) is 0 and pi/2 by turns, so clicks follow A, then B, then A
again. With a gradual change, a(t) grows steadily by a full turn in so many hours.

`simulate` has 12 impressions a second, half of whose clicks come within 20 s, and labels are final
after ten minutes. Here there are `rate` impressions a second, and clicks come twenty times as fast,
so that 1 % of them are later than 30 s: in five seconds something can be learned, and is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stream_ctr.events.features import Hasher
from stream_ctr.logs.log import ClickDelays, impression_batch
from stream_ctr.logs.simulate import (
    DELAY_SIGMA,
    MEDIAN_DELAY_SECONDS,
    START_MS,
    Codes,
    Drift,
    Numbers,
    Simulation,
    World,
    _features,
)

Floats = npt.NDArray[np.float64]
Times = npt.NDArray[np.int64]

FASTER_CLICKS = 20
_HOUR_MS = 3_600_000
_BLOCK_ROWS = 8192
_MEAN_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Change:
    """How the law changes: to what, and at which times (epoch ms) or in turns of so many hours."""

    drift: Drift = "none"
    at_ms: tuple[int, ...] = ()
    turn_hours: float = 0.0

    def angle(self, time: Times) -> Floats:
        """Return a(t) [n].

        >>> Change("rate", at_ms=(10, 20)).angle(np.array([9, 10, 19, 20])).round(2).tolist()
        [0.0, 1.57, 1.57, 0.0]
        """
        if self.turn_hours:
            turns = (time - START_MS).astype(np.float64) / (self.turn_hours * _HOUR_MS)
            return 2 * np.pi * turns
        passed = np.searchsorted(np.array(self.at_ms, np.int64), time, side="right")
        return np.pi / 2 * (passed % 2).astype(np.float64)


class DriftingStream(Simulation):
    """`seconds` of the stream, with `rate` impressions a second."""

    def __init__(self, change: Change, *, seconds: float, rate: float, seed: int) -> None:
        super().__init__(round(seconds * rate), seed=seed)
        self.rate = rate
        self.law = change

    @cached_property
    def other_world(self) -> World:
        """The world B."""
        return self.world.drifted(self.law.drift)

    @cached_property
    def mean_logit(self) -> float:
        """The mean logit b of A."""
        time = np.full(_MEAN_ROWS, START_MS)
        codes, numbers = self.world.draw(np.random.default_rng((self.seed, 0)), time)
        return float(_logit(self.world.probability(codes, numbers, time)).mean())

    def impressions_in_order(self) -> Iterator[pa.RecordBatch]:
        """Yield the impressions in event-time order, with the times of their clicks."""
        return self._impressions()

    def _impressions(self) -> Iterator[pa.RecordBatch]:
        arrived = 0.0
        for first in range(0, self.impressions, _BLOCK_ROWS):
            rng = np.random.default_rng((self.seed, 1, first // _BLOCK_ROWS))
            arrival = arrived + np.cumsum(rng.exponential(1000 / self.rate, _BLOCK_ROWS))
            arrived = arrival[-1]
            time = START_MS + arrival.astype(np.int64)
            block = self._block(rng, time, np.arange(first, first + _BLOCK_ROWS))
            yield block.slice(0, min(_BLOCK_ROWS, self.impressions - first))

    def _block(self, rng: np.random.Generator, time: Times, row: Times) -> pa.RecordBatch:
        codes, numbers = self.world.draw(rng, time)
        probability = self._probability(codes, numbers, time, row)
        delays = ClickDelays(rng, MEDIAN_DELAY_SECONDS / FASTER_CLICKS, DELAY_SIGMA)
        click_time = delays.click_time(time, rng.random(len(time)) < probability)
        identity = pc.binary_join_element_wise(
            f"drifting{self.seed}-", pa.array(row).cast(pa.string()), ""
        )
        features = _features(codes, numbers)
        return impression_batch(identity, time, click_time, features, probability)

    def _probability(self, codes: Codes, numbers: Numbers, time: Times, row: Times) -> Floats:
        angle = self.law.angle(time)
        own = _logit(self.world.probability(codes, numbers, time)) - self.mean_logit
        other = _logit(self.other_world.probability(codes, numbers, time)) - self.mean_logit
        logit = self.mean_logit + np.cos(angle) * own + np.sin(angle) * other
        probability: Floats = 1 / (1 + np.exp(-logit))
        return probability


@dataclass(frozen=True, slots=True)
class Examples:
    """The impressions of a stream in their order, with the labels of their windows.

    `time` int64 [n], `ids` int32 [n, F], `label` uint8 [n], `probability` float64 [n].
    """

    time: Times
    ids: npt.NDArray[np.int32]
    label: npt.NDArray[np.uint8]
    probability: Floats

    def __len__(self) -> int:
        return len(self.time)


def examples_of(stream: DriftingStream, hasher: Hasher, *, window_ms: int) -> Examples:
    """Return the examples of a stream; a click counts if it comes within the label window."""
    parts = []
    for block in stream.impressions_in_order():
        time = block["time"].to_numpy()
        click = block["click_time"].fill_null(0).to_numpy()
        clicked = (click > 0) & (click <= time + window_ms)
        features = {
            feature.name: pc.struct_field(block["features"], [index])
            for index, feature in enumerate(block["features"].type)
        }
        ids, _ = hasher.rows(features)
        parts.append((time, ids, clicked.astype(np.uint8), block["true_probability"].to_numpy()))
    return Examples(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _logit(probability: Floats) -> Floats:
    return np.log(probability) - np.log1p(-probability)
