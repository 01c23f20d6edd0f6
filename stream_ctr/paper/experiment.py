"""One run: a system with its hyper-parameters and a seed, trained and tested; or one pass over all examples in the order of their times.

`train` goes over the training part and scores the validation part four times an epoch, until that has not been better for four checks in a
row, and scores the test part with the weights of the best check: the test part decides nothing. `stream` predicts each example before it
learns it.
Either returns an outcome, a dictionary of plain numbers, which depends on the setting and the data alone but for its times.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stream_ctr.errors import StreamCtrError
from stream_ctr.evaluate import metrics
from stream_ctr.learn.learner import Learner, make_learner
from stream_ctr.learn.network_learner import NetworkLearner
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.step import Batch, Labels
from stream_ctr.learn.tensors import State
from stream_ctr.models import MODELS
from stream_ctr.paper.dataset import TEST, TRAINING, VALIDATION, Dataset, Rows, Split, shuffled
from stream_ctr.paper.intervals import block_sums

_AT_ONCE = 1 << 16
_SKIPS = 8
# Of the validation part, an epoch; as many in a row that are no better end a training. Not fewer: what is seen for the second time is
# overfitted first, and interactions may be found later in the same epoch.
_CHECKS = 4
_FIRST_STEPS = 4
Losses = npt.NDArray[np.float64]
Advance = Callable[[int], None]


_OF_SPEC = {field.name for field in msgspec.structs.fields(LearnerSpec)}


@dataclass(frozen=True, slots=True)
class Setting:
    """Everything that decides an outcome besides the data. `learner` are options of `make_learner`; `dropout` is the share dropped.

    `epochs` is the most that are trained, 0 one pass in event-time order; `share` how much of the training part is used.
    """

    system: str
    seed: int
    activation: str
    dropout: float
    hidden: tuple[int, ...]
    batch_size: int
    epochs: int
    share: float
    device: str
    learner: dict[str, Any]

    def make(self) -> Learner:
        own = {
            "model": self.system,
            "seed": self.seed,
            "activation": self.activation,
            "dropout": self.dropout,
            "hidden": self.hidden,
            "batch_size": self.batch_size,
        }
        options = {**self.learner, **own}
        described = {name: options.pop(name) for name in list(options) if name in _OF_SPEC}
        return make_learner(msgspec.convert(described, LearnerSpec), device=self.device, **options)

    def told(self) -> dict[str, Any]:
        activation = (
            MODELS[self.system].activation if self.activation == "paper" else self.activation
        )
        told = {
            "system": self.system,
            "seed": self.seed,
            "activation": activation,
            "dropout": self.dropout,
        }
        return {**told, "hidden": list(self.hidden), "batch_size": self.batch_size}


class Diverged(StreamCtrError):
    """A loss is not finite, or the gradient again and again."""


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


Scores = dict[str, Any]


def scores(logits: npt.NDArray[np.float64], labels: Labels) -> Scores:
    """AUC, None where there is none, and logloss. Raises `Diverged` when a logit is not finite."""
    if not np.isfinite(logits).all():
        raise Diverged("a logit is not finite")
    found = auc(logits, labels)
    return {
        "auc": None if math.isnan(found) else found,
        "logloss": float(metrics.losses(logits, labels).mean()),
    }


# -- epochs --------------------------------------------------------------------------------------


def train(
    setting: Setting, data: Dataset, split: Split, *, advance: Advance = lambda n: None
) -> tuple[dict[str, Any], Losses]:
    """The outcome, and the losses of the test part [test] in its order. `advance` is told of each batch. Raises `Diverged`.

    Its times are those of a step, the first steps left out, by the steps until the best check.
    """
    pretraining: Fit | None = None
    learner = setting.make()
    fitting = Fitting(learner, setting, data, split, advance)
    if isinstance(learner, NetworkLearner) and learner.pretraining:
        pretraining = fitting.best()
        learner.end_pretraining()
    fit = fitting.best()
    labels, logits = predicted(learner, data, split.rows(TEST))
    before = pretraining.seconds if pretraining else 0.0
    outcome = {
        **setting.told(), **scores(logits, labels), "epochs": fit.epochs, "best_epoch": fit.best_epoch,
        "train_logloss": fit.train_logloss if math.isfinite(fit.train_logloss) else None,
        "validation": fit.validation, "seconds": fit.seconds + before, "seconds_pretraining": before,
        "seconds_per_epoch": fit.seconds_per_epoch, "examples_per_second": fitting.examples / fit.seconds_per_epoch,
        "training_examples": fitting.examples, "device": device_of(learner), "parameters": parameters(learner),
    }  # fmt: skip
    if pretraining:
        outcome["validation_pretraining"] = pretraining.validation
    return outcome, metrics.losses(logits, labels)


@dataclass(frozen=True, slots=True)
class Fit:
    """`epochs` that were trained, in quarters, and after which of them `validation` was best; `seconds` of training until then.
    `train_logloss` is that of the last epoch, as far as it went: of each example before it was learned, with what dropout left."""

    epochs: float
    best_epoch: float
    seconds: float
    seconds_per_epoch: float
    validation: list[Scores]
    train_logloss: float


class Fitting:
    """Epochs over the training part, until the validation part says that it is enough."""

    def __init__(
        self, learner: Learner, setting: Setting, data: Dataset, split: Split, advance: Advance
    ) -> None:
        self.learner, self.setting, self.data, self.split, self._advance = (
            learner,
            setting,
            data,
            split,
            advance,
        )
        self.examples = split.count(TRAINING, setting.share)
        self._steps = -(-self.examples // setting.batch_size)
        self._validation_rows = split.rows(VALIDATION)
        self._kept = Kept(learner, data, split, setting.share)
        self._epochs = 0  # of both, where there is pre-training: no two have the same order
        self._loss, self._skips = Loss(), 0

    def best(self) -> Fit:
        """Train until checks in a row are no better; the learner then has the weights of the best."""
        clock = Clock(self.learner, first=min(_FIRST_STEPS, self._steps - 1))
        validation: list[Scores] = []
        best, since = float("inf"), 0
        for epoch in self._checks(clock):
            labels, logits = predicted(self.learner, self.data, self._validation_rows)
            validation.append({"epoch": epoch, **scores(logits, labels)})
            if validation[-1]["logloss"] < best:
                best, since = validation[-1]["logloss"], 0
                self._kept.keep()
            elif (since := since + 1) == _CHECKS:
                break
        if since:
            self._kept.bring_back()
        at = validation[-1 - since]["epoch"]
        seconds = clock.seconds_per_step * self._steps
        return Fit(
            validation[-1]["epoch"], at, seconds * at, seconds, validation, self._loss.mean()
        )

    def _checks(self, clock: Clock) -> Iterator[float]:
        """Train, and stop at each check: how many epochs it has been by then."""
        after = {
            -(-self._steps * check // _CHECKS): check / _CHECKS for check in range(1, _CHECKS + 1)
        }
        for epoch in range(self.setting.epochs):
            self._loss = Loss()
            for step, (batch, following) in enumerate(with_following(self._batches()), start=1):
                self._learn(batch, following)
                clock.stepped()
                if step in after:
                    clock.pause()
                    yield epoch + after[step]
                    clock.go_on()

    def _learn(self, batch: Batch, following: Batch | None) -> None:
        logits = self.learner.learn(*batch, following=following)
        self._advance(len(batch[1]))
        self._skips = skipped(self._skips, logits)
        if logits is not None:
            self._loss.add(logits, batch[1])

    def _batches(self) -> Iterator[Batch]:
        seed = (self.setting.seed, self._epochs)
        self._epochs += 1
        rows = shuffled(
            self.split,
            TRAINING,
            seed=seed,
            batch_size=self.setting.batch_size,
            row_bytes=self.data.row_bytes,
            share=self.setting.share,
        )
        return (self.data[batch] for batch in rows)


def skipped(before: int, logits: Tensor | None) -> int:
    """How many batches in a row could not be learned, with this one. Raises `Diverged` when they are many."""
    if logits is not None:
        return 0
    if before + 1 >= _SKIPS:
        raise Diverged(f"no finite loss and gradient in {_SKIPS} batches in a row")
    return before + 1


class Clock:
    """How long a step takes. The `first` ones, in which code is compiled and graphs are recorded, are not measured."""

    def __init__(self, learner: Learner, *, first: int) -> None:
        self._learner, self._first = learner, first
        self._steps, self._seconds = 0, 0.0  # measured
        self._began: float | None = None
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._pretraining, self._left = self._learner.pretraining, self._first
        self.go_on()

    def stepped(self) -> None:
        if self._began is not None:
            self._steps += 1
        elif self._left:
            self._left -= 1
            self.go_on()
        if (
            self._learner.pretraining != self._pretraining
        ):  # another step, which is recorded in its turn
            self.pause()
            self._begin_anew()

    def pause(self) -> None:
        if self._began is not None:
            synchronize(self._learner)
            self._seconds += time.perf_counter() - self._began
            self._began = None

    def go_on(self) -> None:
        if not self._left:
            synchronize(self._learner)
            self._began = time.perf_counter()

    @property
    def seconds_per_step(self) -> float:
        """Until the last pause."""
        return self._seconds / max(self._steps, 1)


class Kept:
    """The weights of a learner, to be brought back. Of a table that is larger than what is learned, only the rows that are."""

    def __init__(self, learner: Learner, data: Dataset, split: Split, share: float) -> None:
        self._learner = learner
        self._rows: Tensor | None = None
        self._weights: State = {}
        self._tensors: dict[str, Tensor] = {}
        if isinstance(learner, NetworkLearner) and share * split.count(TRAINING) * data.ids.shape[
            1
        ] < len(learner.table.rows):
            rows = np.unique(data.ids[split.rows(TRAINING, share=share)]).astype(np.int64)
            self._rows = torch.from_numpy(rows).to(learner.device)

    def keep(self) -> None:
        learner = self._learner
        if self._rows is None or not isinstance(learner, NetworkLearner):
            self._weights = learner.weights(reuse=True)
        else:
            dense = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
            self._tensors = {"table": learner.table.rows[self._rows], **dense}

    def bring_back(self) -> None:
        learner = self._learner
        if self._rows is None or not isinstance(learner, NetworkLearner):
            learner.load_weights(self._weights)
        else:
            learner.table.rows[self._rows] = self._tensors.pop("table")
            learner.model.load_state_dict(self._tensors)
            learner.adam.refresh()


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
            logits, labels = (
                torch.cat(self._logits).double().cpu().numpy(),
                np.concatenate(self._labels),
            )
            self._sum += float(metrics.losses(logits, labels).sum())
            self._count += len(labels)
        self._logits, self._labels = [], []


def predicted(
    learner: Learner, data: Dataset, rows: Rows
) -> tuple[Labels, npt.NDArray[np.float64]]:
    """Labels and logits [n] of these examples, some thousands at a time."""
    labels, logits = np.empty(len(rows), np.uint8), np.empty(len(rows))
    for start in range(0, len(rows), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        ids, labels[part], values = data[rows[part]]
        logits[part] = learner.predict(ids, values)
    return labels, logits


# -- one pass ------------------------------------------------------------------------------------


def stream(setting: Setting, data: Dataset, *, advance: Advance = lambda n: None) -> dict[str, Any]:
    """The outcome of one pass in event-time order, each example predicted before it is learned. `blocks` are sums of losses of
    neighbouring examples, for intervals. Raises `Diverged`."""
    learner = setting.make()
    logits, skips = np.zeros(len(data)), 0
    came: list[tuple[slice, Tensor]] = []
    places = [
        slice(start, min(start + setting.batch_size, len(data)))
        for start in range(0, len(data), setting.batch_size)
    ]
    clock = Clock(learner, first=min(_FIRST_STEPS, len(places) - 1))
    for batch, ((ids, labels, values), following) in zip(
        places, with_following(data[place] for place in places), strict=True
    ):
        found = learner.learn(ids, labels, values, following=following)
        skips = skipped(skips, found)
        came.append(
            (batch, torch.from_numpy(learner.predict(ids, values)) if found is None else found)
        )
        advance(len(labels))
        if len(came) >= 256 or batch.stop == len(data):
            for place, some in came:
                logits[place] = some.double().cpu().numpy()
            came = []
        clock.stepped()
    clock.pause()
    seconds = clock.seconds_per_step * len(places)
    labels = np.array(data.labels)
    of_all, half = scores(logits, labels), len(data) // 2
    return {
        **setting.told(), **of_all, "last_half": scores(logits[half:], labels[half:]), "seconds": seconds,
        "examples_per_second": len(data) / seconds, "device": device_of(learner), "parameters": parameters(learner),
        "blocks": block_sums(metrics.losses(logits, labels)).tolist(),
    }  # fmt: skip


# -- of a learner --------------------------------------------------------------------------------


def device_of(learner: Learner) -> str:
    return learner.device.type if isinstance(learner, NetworkLearner) else "cpu"


def synchronize(learner: Learner) -> None:
    """Until what was begun on a GPU is done."""
    if device_of(learner) == "cuda":
        torch.cuda.synchronize()


def parameters(learner: Learner) -> int:
    """Of the dense part, the table not counted."""
    return (
        sum(parameter.numel() for parameter in learner.model.parameters())
        if isinstance(learner, NetworkLearner)
        else 1
    )


def seconds_per_example(
    setting: Setting, data: Dataset, split: Split, *, batches: int = 4
) -> float:
    """Measured on a few batches after the first ones; of a system that is pre-trained for an example of either."""
    learner = replace(setting, epochs=1).make()
    rows = split.rows(TRAINING, 0, 4 * (batches + _FIRST_STEPS) * setting.batch_size)
    parts = [rows[at : at + setting.batch_size] for at in range(0, len(rows), setting.batch_size)][
        : batches + _FIRST_STEPS
    ]
    seconds = _seconds_per_step(learner, data, parts)
    if isinstance(learner, NetworkLearner) and learner.pretraining:
        learner.end_pretraining()
        seconds += _seconds_per_step(learner, data, parts)
    return seconds / setting.batch_size


def _seconds_per_step(learner: Learner, data: Dataset, parts: list[Rows]) -> float:
    clock = Clock(learner, first=min(_FIRST_STEPS, len(parts) - 1))
    for part in parts:
        learner.learn(*data[part])
        clock.stepped()
    clock.pause()
    return clock.seconds_per_step
