"""The figures of progressive predictions, whoever made them: of parts of a run, paired, in time.

The predictions of a contender are kept as our own metrics keep them: `WholeRun`, the sums and the
histogram of each model in at most 128 blocks of neighbouring examples. The blocks of two contenders
hold the same examples if both have as many. A part of a run begins and ends at the nearest
boundary of a block.

>>> labels = np.tile(np.array([1, 0, 0, 0], np.uint8), 160)
>>> constant = predicted("constant", np.full(640, logit(0.25)), labels)
>>> figures = part_figures(constant, "constant", "first_tenth")
>>> figures["from_example"], figures["count"], round(figures["logloss"], 4)
(0, 64, 0.5623)
>>> confident = predicted("confident", np.where(labels == 1, 2.0, -2.0), labels)
>>> pair = Pair(confident, "confident", constant, "constant")
>>> round(difference(pair, "whole")["logloss_difference"], 4)
-0.4354
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from stream_ctr.evaluate.metrics import (
    CLICKS,
    COUNT,
    SUM_LOSS,
    SUM_P,
    Scored,
    Tally,
    WholeRun,
    paired_interval,
)
from stream_ctr.evaluate.scoreboard import part
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.manifest import Manifest

Floats = npt.NDArray[np.float64]

PARTS = {"whole": (0.0, 1.0), "first_tenth": (0.0, 0.1), "last_half": (0.5, 1.0)}
"""The parts of a run whose figures are compared: where they begin and end."""
ROLLING_BLOCKS = 4
CALIBRATED = (0.9, 1.1)
"""A stretch of examples is calibrated if predicted / actual clicks is between these."""


def predicted(name: str, logits: Floats, labels: npt.NDArray[np.uint8]) -> WholeRun:
    """Return the metrics of one model's logits [n] in the order of the examples."""
    run = WholeRun([name])
    unknown = np.full(len(labels), np.nan)
    run.add(Scored(np.arange(len(labels)), labels, unknown, {name: logits}, {}))
    return run


def final_snapshot(state: Path) -> tuple[Manifest, WholeRun]:
    """Return the manifest and the metrics of the newest snapshot of a state directory."""
    path = snapshot.newest(state / "snapshots")
    assert path is not None, f"no snapshot in {state}"
    manifest, tensors = snapshot.load(path, stems=("metrics",))
    run = WholeRun(list(manifest.metrics.models))
    run.load_state_dict(part(tensors["metrics"], "whole."))
    return manifest, run


def logit(p: float) -> float:
    return math.log(p) - math.log1p(-p)


# -- parts of a run ------------------------------------------------------------------------------


def part_figures(run: WholeRun, model: str, part: str) -> dict[str, Any]:
    """Return count, clicks, logloss, AUC and calibration of a model on a part of a run.

    `constant_logloss` is that of the best constant, `best_possible_logloss` that of the true
    probabilities, None where they are unknown.
    """
    blocks = _blocks(run, part)
    total = Tally(run.models)
    for block in run.blocks[blocks]:
        total.merge(block)
    score = total.scores[model].summary()
    return {
        "from_example": sum(run.counts[: blocks.start]),
        "constant_logloss": total.constant_logloss,
        "best_possible_logloss": total.best_possible_logloss,
        **msgspec.to_builtins(score),
    }


def _blocks(run: WholeRun, part: str) -> slice:
    """Return the blocks of a part; it has at least one."""
    starts = np.concatenate([[0], np.cumsum(run.counts)])
    first, last = (int(np.argmin(np.abs(starts - share * run.count))) for share in PARTS[part])
    return slice(first, max(last, first + 1))


# -- paired differences --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pair:
    """A model of one run and a model of another, which learned the same examples.

    Raises `ValueError` when the blocks of the runs do not hold the same number of examples and
    clicks, or when a model left examples out.
    """

    run: WholeRun
    model: str
    other_run: WholeRun
    other: str

    def __post_init__(self) -> None:
        ours = _sums(self.run, self.model)[:, [COUNT, CLICKS]]
        others = _sums(self.other_run, self.other)[:, [COUNT, CLICKS]]
        same_blocks = self.run.counts == self.other_run.counts
        if not same_blocks or not np.array_equal(ours, others):
            raise ValueError(f"{self.model} and {self.other} did not predict the same examples")


def difference(pair: Pair, part: str) -> dict[str, Any]:
    """Return the mean logloss of the model minus that of the other one, with a 95 % interval.

    The interval is that of our reports: a bootstrap over blocks of neighbouring examples.
    """
    blocks = _blocks(pair.run, part)
    ours = _sums(pair.run, pair.model)[blocks]
    others = _sums(pair.other_run, pair.other)[blocks]
    sums = np.stack([ours[:, SUM_LOSS] - others[:, SUM_LOSS], ours[:, COUNT]], axis=1)
    found: dict[str, Any] = msgspec.to_builtins(paired_interval(sums))
    return found


def _sums(run: WholeRun, model: str) -> Floats:
    """Return the sums of a model in each block, [blocks, 4]."""
    return np.stack([block.scores[model].sums for block in run.blocks])


# -- calibration in time -------------------------------------------------------------------------


def recovery(
    run: WholeRun, model: str, change: int, true_probability: Floats | None = None
) -> dict[str, Any]:
    """Return how a model's calibration recovers from a change at an example number.

    `examples` counts from the change to the end of the first four blocks in which predicted /
    actual clicks is in `CALIBRATED`, None if there are none. None of the blocks begins before the
    change. `worst` is the ratio of four blocks that is farthest from 1.

    Few clicks make that ratio noisy. `by_true_probability` counts up to the end of the first block
    in which predicted / expected clicks is in `CALIBRATED`; the true probabilities [n] of the
    examples give the expected clicks. It is None without them.
    """
    sums = _sums(run, model)
    ends = np.cumsum(run.counts)
    starts = ends - np.array(run.counts)
    first = int(np.searchsorted(starts, change))
    width = min(ROLLING_BLOCKS, len(sums) - first)
    rolled = np.array([sums[at : at + width].sum(0) for at in range(first, len(sums) - width + 1)])
    ratios = rolled[:, SUM_P] / np.maximum(rolled[:, CLICKS], 1)
    found = {
        "examples": _first_calibrated(ratios, ends[first + width - 1 :], change),
        "rolling": width * run.length,
        "worst": float(ratios[np.argmax(np.abs(np.log(np.maximum(ratios, 1e-9))))]),
        "by_true_probability": None,
        "resolution": run.length,
    }
    if true_probability is not None and not np.isnan(true_probability).any():
        expected = np.add.reduceat(true_probability, starts)[first:]
        exact = sums[first:, SUM_P] / expected
        found["by_true_probability"] = _first_calibrated(exact, ends[first:], change)
    return found


def _first_calibrated(ratios: Floats, ends: npt.NDArray[np.int64], change: int) -> int | None:
    """Return the end, from the change on, of the first stretch with a calibrated ratio, or None."""
    low, high = CALIBRATED
    inside = np.flatnonzero((ratios >= low) & (ratios <= high))
    return int(ends[inside[0]]) - change if len(inside) else None
