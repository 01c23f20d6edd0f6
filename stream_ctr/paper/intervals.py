"""Differences of losses on the same examples, with their intervals: a bootstrap over blocks of neighbouring examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_ctr.evaluate import metrics

Floats = npt.NDArray[np.floating]
Difference = dict[str, float | int | None]
_BLOCKS = 128
_BLOCKS_LEAST = 10
_DRAWS = 10_000


def paired_difference(losses: Floats, reference: Floats) -> Difference:
    """Mean loss of a system less that of another on the same test examples, and a 95 % interval for both kinds of chance.

    `losses` and `reference` are [S, n]: S seeds, n test examples in their order. Each of 10,000 draws takes blocks of neighbouring examples
    with replacement - another test part might have been drawn - and adds the error of a mean over S seeds, which has Student's t
    distribution with S - 1 degrees of freedom: three seeds are few, and the interval says so. With one seed it holds the test examples
    alone. No bounds below ten examples.

    >>> once, twice = np.full((3, 100), 0.25), np.full((3, 100), 0.75)
    >>> paired_difference(twice, once)
    {'logloss_difference': 0.5, 'low': 0.5, 'high': 0.5, 'seeds': 3}
    """
    seeds, examples = losses.shape
    each = zip(losses, reference, strict=True)
    blocks = np.stack(
        [block_sums(a.astype(np.float64) - b.astype(np.float64)) for a, b in each]
    )  # [S, blocks]
    counts = np.diff(_edges(examples)).astype(np.float64)
    difference = float(blocks.sum() / examples / seeds)
    told: Difference = {"logloss_difference": difference, "low": None, "high": None, "seeds": seeds}
    if len(counts) < _BLOCKS_LEAST:
        return told
    drawn = _draws(len(counts))
    errors = (drawn @ blocks.mean(axis=0)) / (drawn @ counts) - difference
    if seeds > 1:
        spread = (blocks.sum(axis=1) / examples).std(ddof=1) / math.sqrt(seeds)
        errors = errors + spread * np.random.default_rng(1).standard_t(seeds - 1, _DRAWS)
    low, high = (difference + np.quantile(errors, (0.025, 0.975))).tolist()
    return {**told, "low": low, "high": high}


def paired(blocks: Sequence[float], reference: Sequence[float], examples: int) -> Difference:
    """The same of two passes over the same `examples`, of whose losses only the `block_sums` were kept.

    >>> paired([3.0] * 20, [1.0] * 20, 40)["logloss_difference"]
    1.0
    """
    counts = np.diff(_edges(examples, len(blocks))).astype(np.float64)
    return metrics.paired_interval(
        np.stack([np.array(blocks) - np.array(reference), counts], axis=1)
    )


def block_sums(losses: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Of neighbouring examples, in 128 blocks as equal as may be: [n] -> [min(128, n)].

    >>> block_sums(np.ones(256))[:3].tolist(), block_sums(np.array([0.5, 0.25])).tolist()
    ([2.0, 2.0, 2.0], [0.5, 0.25])
    """
    sums: npt.NDArray[np.float64] = np.add.reduceat(losses, _edges(len(losses))[:-1])
    return sums


def _edges(examples: int, blocks: int = _BLOCKS) -> npt.NDArray[np.int64]:
    """Where each block begins, and the last one ends."""
    return np.linspace(0, examples, min(blocks, examples) + 1).astype(np.int64)


@lru_cache(maxsize=2)
def _draws(blocks: int) -> npt.NDArray[np.float64]:
    """How often each block is drawn [draws, blocks]: every system is compared on the same draws."""
    return (
        np.random.default_rng(0)
        .multinomial(blocks, np.full(blocks, 1 / blocks), size=_DRAWS)
        .astype(np.float64)
    )


def verdict(difference: Mapping[str, Any] | None) -> str:
    """`worse` than the other, `better`, `same` where the interval holds zero, `unknown` without an interval."""
    if difference is None or difference["low"] is None:
        return "unknown"
    return "worse" if difference["low"] > 0 else "better" if difference["high"] < 0 else "same"
