"""One run: a system with its hyper-parameters and a seed, trained and tested; or one pass over all examples in the order of their times.

`train` goes over the training part until the logloss of the validation part is no longer better (the epoch with the best one counts), and
scores the test part with the weights of that epoch: the test part decides nothing. `stream` predicts each example before it learns it.
Either returns an outcome, a dictionary of plain numbers, which depends on the setting and the data alone but for its times.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stream_ctr import metrics
from stream_ctr.cpu_step import Batch, Labels
from stream_ctr.errors import StreamCtrError
from stream_ctr.learner import Learner, NetworkLearner, State, make_learner
from stream_ctr.models import MODELS
from stream_ctr.paper.dataset import TEST, TRAINING, VALIDATION, Dataset, Rows, Split, shuffled

_AT_ONCE = 1 << 16
_BLOCKS = 128
_SKIPS = 8
_NEVER = 1 << 62  # examples
Losses = npt.NDArray[np.float64]
Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Setting:
    """Everything that decides an outcome besides the data. `learner` are options of `make_learner`; `dropout` is the share dropped.

    `epochs` is the most that are trained, 0 one pass in event-time order; `stop` the example at which training ends.
    """

    system: str
    seed: int
    activation: str
    dropout: float
    hidden: tuple[int, ...]
    batch_size: int
    epochs: int
    stop: int
    device: str
    learner: dict[str, Any]

    def make(self) -> Learner:
        own = {"activation": self.activation, "dropout": self.dropout, "hidden": list(self.hidden), "batch_size": self.batch_size}
        return make_learner(self.system, seed=self.seed, device=self.device, **{**self.learner, **own})

    def told(self) -> dict[str, Any]:
        activation = MODELS[self.system].activation if self.activation == "paper" else self.activation
        told = {"system": self.system, "seed": self.seed, "activation": activation, "dropout": self.dropout}
        return {**told, "hidden": list(self.hidden), "batch_size": self.batch_size}


class Diverged(StreamCtrError):
    """The loss or the gradient is not finite, again and again."""


def auc(logits: npt.NDArray[np.floating], labels: Labels) -> float:
    """The share of pairs of a click and a non-click that are in order, ties one half; exact, by ranks. NaN without such pairs.

    >>> auc(np.array([0.1, 0.4, 0.4, 0.9]), np.array([0, 0, 1, 1], np.uint8))
    0.875
    """
    clicked, others = logits[labels == 1], np.sort(logits[labels == 0])
    if not len(clicked) or not len(others):
        return float("nan")
    below, not_above = (np.searchsorted(others, clicked, side) for side in ("left", "right"))
    return float((below.sum() + not_above.sum()) / 2 / (len(clicked) * len(others)))


def scores(logits: npt.NDArray[np.float64], labels: Labels) -> dict[str, float]:
    return {"auc": auc(logits, labels), "logloss": float(metrics.losses(logits, labels).mean())}


# -- epochs -------------------------------------------------------------------------------------------------------------------------


def train(setting: Setting, data: Dataset, split: Split, *, advance: Advance = lambda n: None) -> tuple[dict[str, Any], Losses]:
    """The outcome, and the losses of the test part [test] in its order. `advance` is told of each batch. Raises `Diverged`."""
    pretraining = Fit(0, 0.0, 0.0, [], 0.0)
    learner = setting.make()
    fitting = Fitting(learner, setting, data, split, advance)
    if isinstance(learner, NetworkLearner) and learner.pretraining:
        pretraining = fitting.best()
        learner.end_pretraining()
    fit = fitting.best()
    labels, logits = predicted(learner, data, split.rows(TEST))
    seconds = fit.seconds + pretraining.seconds
    of_epochs = {"epochs": len(fit.validation), "best_epoch": fit.best_epoch, "train_logloss": fit.train_logloss}
    outcome = {
        **setting.told(), **of_epochs, **scores(logits, labels), "validation": fit.validation, "seconds": seconds,
        "seconds_pretraining": pretraining.seconds, "seconds_per_epoch": fit.seconds_per_epoch,
        "examples_per_second": fitting.examples / fit.seconds_per_epoch, "device": device_of(learner), "parameters": parameters(learner),
    }  # fmt: skip
    if pretraining.validation:
        outcome["validation_pretraining"] = pretraining.validation
    return outcome, metrics.losses(logits, labels)


@dataclass(frozen=True, slots=True)
class Fit:
    """`seconds` of training until the best epoch, `validation` after each epoch, `train_logloss` of the last: of each example before it
    was learned, with what dropout left."""

    best_epoch: int
    seconds: float
    seconds_per_epoch: float
    validation: list[dict[str, float]]
    train_logloss: float


class Fitting:
    """Epochs over the training part, until the validation part says that it is enough."""

    def __init__(self, learner: Learner, setting: Setting, data: Dataset, split: Split, advance: Advance) -> None:
        self.learner, self.setting, self.data, self.split, self._advance = learner, setting, data, split, advance
        self.examples = split.count(TRAINING, setting.stop)
        self._validation_rows = split.rows(VALIDATION)
        self._epochs = 0  # of both, where there is pre-training: no two have the same order

    def best(self) -> Fit:
        """Train up to one epoch after the best; the learner then has the weights of the best."""
        validation: list[dict[str, float]] = []
        seconds: list[float] = []
        weights: State = {}
        best = train_logloss = float("inf")
        while len(validation) < self.setting.epochs:
            began = time.perf_counter()
            train_logloss = self._epoch()
            synchronize(self.learner)
            seconds.append(time.perf_counter() - began)
            labels, logits = predicted(self.learner, self.data, self._validation_rows)
            validation.append(scores(logits, labels))
            if not np.isfinite(validation[-1]["logloss"]):
                raise Diverged("the logloss of the validation part is not finite")
            if validation[-1]["logloss"] >= best:
                break
            best, weights = validation[-1]["logloss"], self.learner.weights(reuse=True)
        at = int(np.argmin([epoch["logloss"] for epoch in validation])) + 1
        if at < len(validation):
            self.learner.load_weights(weights)
        return Fit(at, sum(seconds[:at]), float(np.mean(seconds)), validation, train_logloss)

    def _epoch(self) -> float:
        """The mean loss of its examples."""
        loss = Loss()
        skips = 0
        for (ids, labels, values), following in with_following(self._batches()):
            logits = self.learner.learn(ids, labels, values, following=following)
            self._advance(len(labels))
            skips = skips + 1 if logits is None else 0
            if skips >= _SKIPS:
                raise Diverged(f"no finite loss and gradient in {_SKIPS} batches in a row")
            if logits is not None:
                loss.add(logits, labels)
        self._epochs += 1
        return loss.mean()

    def _batches(self) -> Iterator[Batch]:
        seed = (self.setting.seed, self._epochs)
        rows = shuffled(
            self.split, TRAINING, seed=seed, batch_size=self.setting.batch_size, row_bytes=self.data.row_bytes, stop=self.setting.stop
        )
        return (self.data[batch] for batch in rows)


def with_following(batches: Iterable[Batch]) -> Iterator[tuple[Batch, Batch | None]]:
    """Each batch with the one after it, which a GPU has on its way meanwhile."""
    ahead, behind = itertools.tee(batches)
    return itertools.zip_longest(behind, itertools.islice(ahead, 1, None))


class Loss:
    """A mean over batches whose logits may still be on their way from a device: they are asked for some batches later, many at once."""

    def __init__(self) -> None:
        self._logits: list[Tensor] = []
        self._labels: list[Labels] = []
        self._sum, self._count = 0.0, 0

    def add(self, logits: Tensor, labels: Labels) -> None:
        self._logits.append(logits)
        self._labels.append(labels)
        if len(self._logits) >= 256:
            self._flush()

    def mean(self) -> float:
        self._flush()
        return self._sum / max(self._count, 1)

    def _flush(self) -> None:
        if self._logits:
            logits, labels = torch.cat(self._logits).double().cpu().numpy(), np.concatenate(self._labels)
            self._sum += float(metrics.losses(logits, labels).sum())
            self._count += len(labels)
        self._logits, self._labels = [], []


def predicted(learner: Learner, data: Dataset, rows: Rows) -> tuple[Labels, npt.NDArray[np.float64]]:
    """Labels and logits [n] of these examples, some thousands at a time."""
    labels, logits = np.empty(len(rows), np.uint8), np.empty(len(rows))
    for start in range(0, len(rows), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        ids, labels[part], values = data[rows[part]]
        logits[part] = learner.predict(ids, values)
    return labels, logits


# -- one pass -----------------------------------------------------------------------------------------------------------------------


def stream(setting: Setting, data: Dataset, *, advance: Advance = lambda n: None) -> dict[str, Any]:
    """The outcome of one pass in event-time order, each example predicted before it is learned. `blocks` are sums of losses of
    neighbouring examples, for intervals. Raises `Diverged`."""
    learner = setting.make()
    logits, skips = np.zeros(len(data)), 0
    came: list[tuple[slice, Tensor]] = []
    began = time.perf_counter()
    places = [slice(start, min(start + setting.batch_size, len(data))) for start in range(0, len(data), setting.batch_size)]
    for batch, ((ids, labels, values), following) in zip(places, with_following(data[place] for place in places), strict=True):
        found = learner.learn(ids, labels, values, following=following)
        skips = skips + 1 if found is None else 0
        if skips >= _SKIPS:
            raise Diverged(f"no finite loss and gradient in {_SKIPS} batches in a row")
        came.append((batch, torch.from_numpy(learner.predict(ids, values)) if found is None else found))
        advance(len(labels))
        if len(came) >= 256 or batch.stop == len(data):
            for place, some in came:
                logits[place] = some.double().cpu().numpy()
            came = []
    seconds = time.perf_counter() - began
    labels = np.array(data.labels)
    losses, half = metrics.losses(logits, labels), len(data) // 2
    edges = np.linspace(0, len(data), _BLOCKS + 1).astype(int)[:-1]
    return {
        **setting.told(), **scores(logits, labels), "last_half": scores(logits[half:], labels[half:]), "seconds": seconds,
        "examples_per_second": len(data) / seconds, "device": device_of(learner), "parameters": parameters(learner),
        "blocks": np.add.reduceat(losses, edges).tolist(),
    }  # fmt: skip


def paired(blocks: list[float], reference: list[float], examples: int) -> dict[str, float | int | None]:
    """The interval of the mean difference between two passes over the same `examples`: the first less the reference."""
    counts = np.diff(np.linspace(0, examples, len(blocks) + 1).astype(int))
    return metrics.paired_interval(np.stack([np.array(blocks) - np.array(reference), counts.astype(np.float64)], axis=1))


# -- of a learner -------------------------------------------------------------------------------------------------------------------


def device_of(learner: Learner) -> str:
    return learner.device.type if isinstance(learner, NetworkLearner) else "cpu"


def synchronize(learner: Learner) -> None:
    """Until what was begun on a GPU is done."""
    if device_of(learner) == "cuda":
        torch.cuda.synchronize()


def parameters(learner: Learner) -> int:
    """Of the dense part, the table not counted."""
    return sum(parameter.numel() for parameter in learner.model.parameters()) if isinstance(learner, NetworkLearner) else 1


def seconds_per_example(setting: Setting, data: Dataset, split: Split, *, batches: int = 4) -> float:
    """Measured on a few batches, the first left out."""
    learner = replace(setting, epochs=1).make()
    rows = split.rows(TRAINING, 0, min(len(data), (batches + 2) * setting.batch_size * 2))
    parts = [rows[at : at + setting.batch_size] for at in range(0, len(rows), setting.batch_size)][: batches + 1]
    learned, began = 0, 0.0
    for index, part in enumerate(parts):
        if index == min(1, len(parts) - 1):
            synchronize(learner)
            began = time.perf_counter()
        learner.learn(*data[part])
        learned += len(part) if began else 0
    synchronize(learner)
    return (time.perf_counter() - began) / max(learned, 1)
