"""The training loop of the contenders in `systems.py`: options, batches, early stopping, the clock.

With --epochs, a repetition is a whole training with the next seed, and its value is the AUC of the
test part. Epochs continue until the logloss of the validation part no longer improves, and the
model of the best epoch is tested. Without --epochs, a repetition is --seconds of steps.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import examples
import numpy as np
import numpy.typing as npt
import torch
from answers import answer

Probabilities = npt.NDArray[np.float64]
TRAINING = 0
VALIDATION = 1
TEST = 2
_CHUNK = 4096
_LEAST_PROBABILITY = 1e-7


class Trainee(Protocol):
    """A model in training."""

    def batch(self, ids: npt.NDArray[np.int32], labels: npt.NDArray[np.uint8]) -> Any:
        """Return a batch as `learn` takes it. This is not timed."""
        ...

    def learn(self, batch: Any) -> object: ...

    def predict(self, batch: Any) -> Probabilities: ...

    def keep(self) -> None:
        """Keep the weights for `follow`."""
        ...

    def follow(self) -> bool:
        """Continue as the model that starts from the kept weights, as FNN does after its FM.

        Returns whether there is such a model.
        """
        ...


Make = Callable[[argparse.Namespace, list[int], int], Trainee]
"""(options, rows of each field, seed) -> an untrained model."""


@dataclass(frozen=True, slots=True)
class Data:
    """Examples: `ids` int32 [n, F], `labels` uint8 [n], and the rows of each field in `sizes`.

    `parts` uint8 [S, n] has the part of each example, for each split.
    """

    ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.uint8]
    sizes: list[int]
    parts: npt.NDArray[np.uint8]

    @classmethod
    def read(cls, directory: Path, which: str) -> Data:
        labels = np.load(directory / "labels.npy")
        parts = directory / "parts.npy"
        return cls(
            ids=np.load(directory / f"{which}.npy"),
            labels=labels,
            sizes=examples.field_sizes(directory),
            parts=np.load(parts) if parts.exists() else np.zeros((1, len(labels)), np.uint8),
        )


def options(description: str | None) -> argparse.ArgumentParser:
    parser = examples.options(description)
    parser.add_argument("--system", required=True, help="a key of stream_ctr.models.MODELS")
    parser.add_argument("--dropout", type=float, default=0.5)
    parser.add_argument(
        "--epochs",
        type=int,
        default=0,
        help="train for at most so many epochs instead of timing steps",
    )
    return parser


def run(arguments: argparse.Namespace, make: Make, *, which: str, note: str) -> None:
    """Answer as a contender.

    `which` is "ids" for a model with one table, or "local" for one with a table for each field.
    """
    data = Data.read(arguments.data, which)
    if arguments.epochs:
        # With small batches one thread is nearly as fast, and other load disturbs it less.
        torch.set_num_threads(1)
        trainings = (trained(make, arguments, data, seed) for seed in itertools.count())
        answer(lambda: next(trainings), note=note)
        return
    trainee = make(arguments, data.sizes, 0)
    while trainee.follow():
        pass
    starts = range(0, len(data.labels) - arguments.batch + 1, arguments.batch)
    batches = itertools.cycle(
        [_batch(trainee, data, slice(start, start + arguments.batch)) for start in starts]
    )
    examples.measured(lambda: trainee.learn(next(batches)), arguments, note=note)


def trained(make: Make, arguments: argparse.Namespace, data: Data, seed: int) -> dict[str, Any]:
    """Train once and return the test scores of the best epoch, and the seconds until then."""
    part = data.parts[seed % len(data.parts)]
    trainee = make(arguments, data.sizes, seed)
    orders = (np.random.default_rng((seed, epoch)) for epoch in itertools.count())
    best = _best_epoch(trainee, arguments, data, part, orders)
    while trainee.follow():
        best = _best_epoch(trainee, arguments, data, part, orders)
    return best


def _best_epoch(
    trainee: Trainee,
    arguments: argparse.Namespace,
    data: Data,
    part: npt.NDArray[np.uint8],
    orders: Iterator[np.random.Generator],
) -> dict[str, Any]:
    best: dict[str, Any] = {"validation_logloss": float("inf")}
    seconds = 0.0
    for epoch in range(1, arguments.epochs + 1):
        rows = next(orders).permutation(np.flatnonzero(part == TRAINING))
        batches = [
            _batch(trainee, data, rows[start : start + arguments.batch])
            for start in range(0, len(rows), arguments.batch)
        ]
        began = time.perf_counter()
        for batch in batches:
            trainee.learn(batch)
        seconds += time.perf_counter() - began
        validation = _scores_of(trainee, data, part == VALIDATION)["logloss"]
        if not validation < best["validation_logloss"]:
            break
        test = _scores_of(trainee, data, part == TEST)
        best = {
            "value": test["auc"],
            **test,
            "validation_logloss": validation,
            "epoch": epoch,
            "seconds": seconds,
        }
        trainee.keep()
    return best


def _batch(trainee: Trainee, data: Data, rows: Any) -> Any:
    return trainee.batch(
        np.ascontiguousarray(data.ids[rows]), np.ascontiguousarray(data.labels[rows])
    )


def _scores_of(trainee: Trainee, data: Data, chosen: npt.NDArray[np.bool_]) -> dict[str, float]:
    """Return the scores of the model on the chosen examples [n]."""
    rows = np.flatnonzero(chosen)
    chunks = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
    p = np.concatenate([trainee.predict(_batch(trainee, data, chunk)) for chunk in chunks])
    return scores(p, data.labels[rows])


def scores(p: Probabilities, labels: npt.NDArray[np.uint8]) -> dict[str, float]:
    """Return the AUC, by ranks with ties counted one half, and the mean logloss.

    >>> scores(np.array([0.1, 0.5, 0.5, 0.9]), np.array([0, 0, 1, 1], np.uint8))
    {'auc': 0.875, 'logloss': 0.3992539...}
    """
    _, index, count = np.unique(p, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[index]
    clicks = int(labels.sum())
    pairs = clicks * (len(labels) - clicks)
    likelihood = np.clip(np.where(labels == 1, p, 1 - p), _LEAST_PROBABILITY, 1.0)
    return {
        "auc": float((rank[labels == 1].sum() - clicks * (clicks + 1) / 2) / pairs),
        "logloss": float(-np.log(likelihood).mean()),
    }
