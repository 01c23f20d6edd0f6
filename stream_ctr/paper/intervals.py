"""Differences between losses on the same examples, with their intervals.

The intervals come from a bootstrap over blocks of neighbouring examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from stream_ctr.evaluate import metrics

Floats = npt.NDArray[np.floating]
Difference = dict[str, float | int | None]
_BLOCKS = 128
_MIN_BLOCKS = 10
_DRAWS = 10_000


def paired_difference(losses: Floats, reference: Floats) -> Difference:
    """Return the mean loss of a system minus that of another one, with a 95 % interval.

    `losses` and `reference` are [S, n]: S seeds, n test examples in the same order. The interval
    covers two sources of chance. Each of 10,000 draws takes blocks of neighbouring examples with
    replacement, because the test part could have been another one. It then adds the error of a mean
    over S seeds, which has Student's t distribution with S - 1 degrees of freedom, so that few
    seeds widen the interval. With one seed the interval covers the test examples only. Below ten
    examples `low` and `high` are None.

    >>> lower, higher = np.full((3, 100), 0.25), np.full((3, 100), 0.75)
    >>> paired_difference(higher, lower)
    {'logloss_difference': 0.5, 'low': 0.5, 'high': 0.5, 'seeds': 3}
    """
    seeds, examples = losses.shape
    pairs = zip(losses, reference, strict=True)
    blocks = np.stack(
        [block_sums(a.astype(np.float64) - b.astype(np.float64)) for a, b in pairs]
    )  # [S, blocks]
    counts = np.diff(_edges(examples)).astype(np.float64)
    difference = float(blocks.sum() / examples / seeds)
    found: Difference = {
        "logloss_difference": difference,
        "low": None,
        "high": None,
        "seeds": seeds,
    }
    if len(counts) < _MIN_BLOCKS:
        return found
    draws = _draws(len(counts))
    errors = (draws @ blocks.mean(axis=0)) / (draws @ counts) - difference
    if seeds > 1:
        spread = (blocks.sum(axis=1) / examples).std(ddof=1) / math.sqrt(seeds)
        errors = errors + spread * np.random.default_rng(1).standard_t(seeds - 1, _DRAWS)
    low, high = (difference + np.quantile(errors, (0.025, 0.975))).tolist()
    return {**found, "low": low, "high": high}


def paired_block_difference(
    blocks: Sequence[float], reference: Sequence[float], examples: int
) -> Difference:
    """Return the difference between two passes over the same `examples`, with a 95 % interval.

    `blocks` and `reference` are the `block_sums` of the losses of each pass.

    >>> paired_block_difference([3.0] * 20, [1.0] * 20, 40)["logloss_difference"]
    1.0
    """
    counts = np.diff(_edges(examples, len(blocks))).astype(np.float64)
    sums = np.array(blocks) - np.array(reference)
    difference = metrics.paired_interval(np.stack([sums, counts], axis=1))
    found: Difference = msgspec.to_builtins(difference)
    return found


def block_sums(losses: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return sums over 128 blocks of neighbouring examples of nearly equal size.

    The shape is [n] -> [min(128, n)].

    >>> block_sums(np.ones(256))[:3].tolist(), block_sums(np.array([0.5, 0.25])).tolist()
    ([2.0, 2.0, 2.0], [0.5, 0.25])
    """
    sums: npt.NDArray[np.float64] = np.add.reduceat(losses, _edges(len(losses))[:-1])
    return sums


def _edges(examples: int, blocks: int = _BLOCKS) -> npt.NDArray[np.int64]:
    """Return the index at which each block begins, and the end of the last block."""
    return np.linspace(0, examples, min(blocks, examples) + 1).astype(np.int64)


@lru_cache(maxsize=2)
def _draws(blocks: int) -> npt.NDArray[np.float64]:
    """Return the number of times that each block is drawn, [draws, blocks].

    Every system is compared on the same draws.
    """
    rng = np.random.default_rng(0)
    return rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=_DRAWS).astype(np.float64)


def verdict(difference: Mapping[str, Any] | None) -> str:
    """Return `worse`, `better`, `same` if the interval holds zero, or `unknown` without interval.

    >>> verdict({"low": 0.1, "high": 0.2}), verdict(None)
    ('worse', 'unknown')
    """
    if difference is None or difference["low"] is None:
        return "unknown"
    if difference["low"] > 0:
        return "worse"
    return "better" if difference["high"] < 0 else "same"
