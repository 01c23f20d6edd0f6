"""What the contenders of the nine systems have in common, whoever trains: options, batches and their order, when to stop, the clock.

With --epochs a repetition is a whole training with the next seed, and its value the AUC of the test part: epochs go on until the validation
part's logloss is no longer better, and what is tested is the model of the best epoch. Without, it is --seconds of steps.
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
TRAINING, VALIDATION, TEST = range(3)
_CHUNK = 4096


class Trainee(Protocol):
    """A system in training."""

    def batch(self, ids: npt.NDArray[np.int32], labels: npt.NDArray[np.uint8]) -> Any:
        """As `learn` takes it; made while no clock runs."""
        ...

    def learn(self, batch: Any) -> object: ...

    def predict(self, batch: Any) -> Probabilities: ...

    def keep(self) -> None:
        """Remember the weights, for `follow`."""
        ...

    def follow(self) -> bool:
        """Whether another model follows this one on the weights that were kept, as in FNN; from then on it is that one."""
        ...


Make = Callable[[argparse.Namespace, list[int], int], Trainee]
"""(options, rows of each field, seed) -> a system that has learned nothing."""


@dataclass(frozen=True, slots=True)
class Data:
    """`ids` int32 [n, F], `labels` uint8 [n], the rows of each field, and for each split the part of each example, uint8 [S, n]."""

    ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.uint8]
    sizes: list[int]
    parts: npt.NDArray[np.uint8]

    @classmethod
    def read(cls, directory: Path, which: str) -> Data:
        parts = directory / "parts.npy"
        ids, labels = np.load(directory / f"{which}.npy"), np.load(directory / "labels.npy")
        return cls(
            ids,
            labels,
            examples.field_sizes(directory),
            np.load(parts) if parts.exists() else np.zeros((1, len(labels)), np.uint8),
        )


def options(description: str | None) -> argparse.ArgumentParser:
    parser = examples.options(description)
    parser.add_argument("--system", required=True, help="of stream_ctr.models.MODELS")
    parser.add_argument("--dropout", type=float, default=0.5)
    parser.add_argument(
        "--epochs",
        type=int,
        default=0,
        help="train, so many epochs at most, instead of timing steps",
    )
    return parser


def run(arguments: argparse.Namespace, make: Make, *, which: str, note: str) -> None:
    """Be a contender; `which` ids it takes, "ids" of one table or "local" ones of a table for each field."""
    data = Data.read(arguments.data, which)
    if arguments.epochs:
        torch.set_num_threads(
            1
        )  # of small batches, that is nearly as fast, and it waits for nobody
        trainings = (trained(make, arguments, data, seed) for seed in itertools.count())
        answer(lambda: next(trainings), note=note)
        return
    trainee = make(arguments, data.sizes, 0)
    while trainee.follow():
        pass
    whole = range(0, len(data.labels) - arguments.batch + 1, arguments.batch)
    batches = itertools.cycle(
        [_batch(trainee, data, slice(at, at + arguments.batch)) for at in whole]
    )
    examples.measured(lambda: trainee.learn(next(batches)), arguments, note=note)


def trained(make: Make, arguments: argparse.Namespace, data: Data, seed: int) -> dict[str, Any]:
    """One training: what the best epoch of the last model makes of the test part, and the seconds of training until then."""
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
            _batch(trainee, data, rows[at : at + arguments.batch])
            for at in range(0, len(rows), arguments.batch)
        ]
        began = time.perf_counter()
        for batch in batches:
            trainee.learn(batch)
        seconds += time.perf_counter() - began
        validation = scores(*_predicted(trainee, data, np.flatnonzero(part == VALIDATION)))[
            "logloss"
        ]
        if not validation < best["validation_logloss"]:
            break
        test = scores(*_predicted(trainee, data, np.flatnonzero(part == TEST)))
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


def _predicted(
    trainee: Trainee, data: Data, rows: npt.NDArray[np.int64]
) -> tuple[Probabilities, npt.NDArray[np.uint8]]:
    chunks = [rows[at : at + _CHUNK] for at in range(0, len(rows), _CHUNK)]
    return np.concatenate(
        [trainee.predict(_batch(trainee, data, chunk)) for chunk in chunks]
    ), data.labels[rows]


def scores(p: Probabilities, labels: npt.NDArray[np.uint8]) -> dict[str, float]:
    """AUC by ranks, ties one half, and mean logloss.

    >>> scores(np.array([0.1, 0.5, 0.5, 0.9]), np.array([0, 0, 1, 1], np.uint8))
    {'auc': 0.875, 'logloss': 0.3992539...}
    """
    _, place, count = np.unique(p, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]
    clicks = int(labels.sum())
    pairs = clicks * (len(labels) - clicks)
    sure = np.clip(np.where(labels == 1, p, 1 - p), 1e-7, 1.0)
    return {
        "auc": float((rank[labels == 1].sum() - clicks * (clicks + 1) / 2) / pairs),
        "logloss": float(-np.log(sure).mean()),
    }
