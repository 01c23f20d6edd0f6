"""One run: train and test a system with its hyper-parameters and a seed, or pass over a stream.

`train` goes over the training part and scores the validation part four times per epoch. It stops
after four checks in a row without improvement and scores the test part with the weights of the best
check, so that the test part decides nothing.

`stream` makes one pass over all examples in event-time order and predicts each example before it
learns it.

Both return an outcome: a dictionary of plain numbers. Apart from its times it depends only on the
setting and the data.
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

_PREDICT_ROWS = 1 << 16
_MAX_SKIPPED_BATCHES = 8
_CHECKS_PER_EPOCH = 4
# A training stops after this many checks in a row without improvement. Fewer would stop too early:
# a repeated example is overfitted first, and interactions may be found later in the same epoch.
_PATIENCE = _CHECKS_PER_EPOCH
_WARMUP_STEPS = 4
_LOSS_BATCHES = 256
Losses = npt.NDArray[np.float64]
Logits = npt.NDArray[np.float64]
Scores = dict[str, Any]
Advance = Callable[[int], None]


_OF_SPEC = {field.name for field in msgspec.structs.fields(LearnerSpec)}


@dataclass(frozen=True, slots=True)
class Setting:
    """Everything besides the data that decides an outcome.

    `dropout` is the share dropped. `epochs` is the maximum number of epochs; 0 means one pass in
    event-time order. `share` is the part of the training part that is used. `learner` holds further
    options of `make_learner`. The fields are part of a run's key, so renaming one repeats all runs.
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
        """Return a new learner with these options."""
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

    def summary(self) -> dict[str, Any]:
        """Return the options that an outcome repeats."""
        own = MODELS[self.system].activation
        return {
            "system": self.system,
            "seed": self.seed,
            "activation": own if self.activation == "paper" else self.activation,
            "dropout": self.dropout,
            "hidden": list(self.hidden),
            "batch_size": self.batch_size,
        }


class Diverged(StreamCtrError):
    """A logit is not finite, or the loss or gradient of many batches in a row is not."""


# -- scores --------------------------------------------------------------------------------------


def auc(logits: npt.NDArray[np.floating], labels: Labels) -> float:
    """Return the share of (click, non-click) pairs in the right order, with ties as one half.

    The result is exact and NaN if there is no such pair.

    >>> auc(np.array([0.1, 0.4, 0.4, 0.9]), np.array([0, 0, 1, 1], np.uint8))
    0.875
    """
    clicked = logits[labels == 1]
    others = np.sort(logits[labels == 0])
    if not len(clicked) or not len(others):
        return float("nan")
    below = np.searchsorted(others, clicked, "left")
    not_above = np.searchsorted(others, clicked, "right")
    return float((below.sum() + not_above.sum()) / 2 / (len(clicked) * len(others)))


def scores(logits: Logits, labels: Labels) -> Scores:
    """Return `auc`, None if it is undefined, and `logloss`.

    Raises `Diverged` if a logit is not finite.
    """
    if not np.isfinite(logits).all():
        raise Diverged("a logit is not finite")
    found = auc(logits, labels)
    return {
        "auc": None if math.isnan(found) else found,
        "logloss": float(metrics.losses(logits, labels).mean()),
    }


def predict_rows(learner: Learner, data: Dataset, rows: Rows) -> tuple[Labels, Logits]:
    """Return labels and logits [n] of these examples, predicted in large batches."""
    labels = np.empty(len(rows), np.uint8)
    logits = np.empty(len(rows))
    for start in range(0, len(rows), _PREDICT_ROWS):
        part = slice(start, start + _PREDICT_ROWS)
        ids, labels[part], values = data[rows[part]]
        logits[part] = learner.predict(ids, values)
    return labels, logits


# -- epochs --------------------------------------------------------------------------------------


def train(
    setting: Setting, data: Dataset, split: Split, *, advance: Advance = lambda n: None
) -> tuple[dict[str, Any], Losses]:
    """Return the outcome of a training, and the losses of the test part [test] in its order.

    `advance` is called with the number of examples of each batch. The times in the outcome are
    those of a step, without the first steps, multiplied by the steps until the best check. Raises
    `Diverged`.
    """
    pretraining: FitResult | None = None
    learner = setting.make()
    fitting = Fitting(learner, setting, data, split, advance)
    if isinstance(learner, NetworkLearner) and learner.pretraining:
        pretraining = fitting.run()
        learner.end_pretraining()
    fit = fitting.run()
    labels, logits = predict_rows(learner, data, split.rows(TEST))
    seconds_pretraining = pretraining.seconds if pretraining else 0.0
    outcome = {
        **setting.summary(),
        **scores(logits, labels),
        "epochs": fit.epochs,
        "best_epoch": fit.best_epoch,
        "train_logloss": fit.train_logloss if math.isfinite(fit.train_logloss) else None,
        "validation": fit.validation,
        "seconds": fit.seconds + seconds_pretraining,
        "seconds_pretraining": seconds_pretraining,
        "seconds_per_epoch": fit.seconds_per_epoch,
        "examples_per_second": fitting.examples / fit.seconds_per_epoch,
        "training_examples": fitting.examples,
        "device": device_of(learner),
        "parameters": parameters(learner),
    }
    if pretraining:
        outcome["validation_pretraining"] = pretraining.validation
    return outcome, metrics.losses(logits, labels)


@dataclass(frozen=True, slots=True)
class FitResult:
    """The result of `Fitting.run`.

    `epochs` counts the training in quarters, and `best_epoch` until the best check. `seconds` is
    the training time until then. `validation` has the scores of each check. `train_logloss` is that
    of the last epoch, up to where it stopped; each example is scored before it is learned, with
    dropout.
    """

    epochs: float
    best_epoch: float
    seconds: float
    seconds_per_epoch: float
    validation: list[Scores]
    train_logloss: float


class Fitting:
    """Epochs over the training part until the validation part stops improving."""

    def __init__(
        self, learner: Learner, setting: Setting, data: Dataset, split: Split, advance: Advance
    ) -> None:
        self.learner = learner
        self.setting = setting
        self.data = data
        self.split = split
        self.examples = split.count(TRAINING, setting.share)
        self._advance = advance
        self._steps = -(-self.examples // setting.batch_size)
        self._validation_rows = split.rows(VALIDATION)
        self._best_weights = BestWeights(learner, data, split, setting.share)
        self._epochs = 0  # includes those of pre-training, so that no two have the same order
        self._loss = MeanLoss()
        self._skipped = 0

    def run(self) -> FitResult:
        """Train until checks in a row do not improve, then restore the weights of the best one."""
        timer = StepTimer(self.learner, warmup=min(_WARMUP_STEPS, self._steps - 1))
        validation: list[Scores] = []
        best = float("inf")
        since_best = 0
        for epoch in self._checks(timer):
            labels, logits = predict_rows(self.learner, self.data, self._validation_rows)
            validation.append({"epoch": epoch, **scores(logits, labels)})
            if validation[-1]["logloss"] < best:
                best = validation[-1]["logloss"]
                since_best = 0
                self._best_weights.save()
            else:
                since_best += 1
                if since_best == _PATIENCE:
                    break
        if since_best:
            self._best_weights.restore()
        best_epoch = validation[-1 - since_best]["epoch"]
        seconds_per_epoch = timer.seconds_per_step * self._steps
        return FitResult(
            epochs=validation[-1]["epoch"],
            best_epoch=best_epoch,
            seconds=seconds_per_epoch * best_epoch,
            seconds_per_epoch=seconds_per_epoch,
            validation=validation,
            train_logloss=self._loss.mean(),
        )

    def _checks(self, timer: StepTimer) -> Iterator[float]:
        """Train, and yield the number of epochs at each check."""
        quarters = {
            -(-self._steps * check // _CHECKS_PER_EPOCH): check / _CHECKS_PER_EPOCH
            for check in range(1, _CHECKS_PER_EPOCH + 1)
        }  # step -> share of the epoch
        for epoch in range(self.setting.epochs):
            self._loss = MeanLoss()
            for step, (batch, following) in enumerate(with_following(self._batches()), start=1):
                self._learn(batch, following)
                timer.step_done()
                if step in quarters:
                    timer.pause()
                    yield epoch + quarters[step]
                    timer.resume()

    def _learn(self, batch: Batch, following: Batch | None) -> None:
        logits = self.learner.learn(*batch, following=following)
        self._advance(len(batch[1]))
        self._skipped = count_skipped(self._skipped, logits)
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


def count_skipped(before: int, logits: Tensor | None) -> int:
    """Return the number of batches in a row that were not learned, including this one.

    `logits` is None for such a batch. Raises `Diverged` when there are too many in a row.

    >>> count_skipped(2, None), count_skipped(2, torch.zeros(1))
    (3, 0)
    """
    if logits is not None:
        return 0
    if before + 1 >= _MAX_SKIPPED_BATCHES:
        raise Diverged(f"no finite loss and gradient in {_MAX_SKIPPED_BATCHES} batches in a row")
    return before + 1


class StepTimer:
    """The mean time of a step.

    The first `warmup` steps compile code and record graphs, and are not measured.
    """

    def __init__(self, learner: Learner, *, warmup: int) -> None:
        self._learner = learner
        self._warmup = warmup
        self._measured_steps = 0
        self._seconds = 0.0
        self._started: float | None = None
        self._start_warmup()

    def _start_warmup(self) -> None:
        self._pretraining = self._learner.pretraining
        self._warmup_left = self._warmup
        self.resume()

    def step_done(self) -> None:
        """Count a step."""
        if self._started is not None:
            self._measured_steps += 1
        elif self._warmup_left:
            self._warmup_left -= 1
            self.resume()
        if self._learner.pretraining != self._pretraining:  # the new step is recorded in its turn
            self.pause()
            self._start_warmup()

    def pause(self) -> None:
        """Stop measuring until `resume`."""
        if self._started is not None:
            synchronize(self._learner)
            self._seconds += time.perf_counter() - self._started
            self._started = None

    def resume(self) -> None:
        """Measure from now on, unless warm-up steps are left."""
        if not self._warmup_left:
            synchronize(self._learner)
            self._started = time.perf_counter()

    @property
    def seconds_per_step(self) -> float:
        """The mean time of the steps until the last pause."""
        return self._seconds / max(self._measured_steps, 1)


class BestWeights:
    """A copy of a learner's weights that can be restored.

    If the table has more rows than the training part can use, only the used rows are copied.
    """

    def __init__(self, learner: Learner, data: Dataset, split: Split, share: float) -> None:
        self._learner = learner
        self._rows: Tensor | None = None
        self._weights: State = {}
        self._tensors: dict[str, Tensor] = {}
        if not isinstance(learner, NetworkLearner):
            return
        ids = share * split.count(TRAINING) * data.ids.shape[1]
        if ids < len(learner.table.rows):
            rows = np.unique(data.ids[split.rows(TRAINING, share=share)]).astype(np.int64)
            self._rows = torch.from_numpy(rows).to(learner.device)

    def save(self) -> None:
        """Copy the weights in place of an earlier copy."""
        learner = self._learner
        if self._rows is None or not isinstance(learner, NetworkLearner):
            self._weights = learner.weights(reuse=True)
        else:
            dense = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
            self._tensors = {"table": learner.table.rows[self._rows], **dense}

    def restore(self) -> None:
        """Give the saved weights back to the learner."""
        learner = self._learner
        if self._rows is None or not isinstance(learner, NetworkLearner):
            learner.load_weights(self._weights)
        else:
            learner.table.rows[self._rows] = self._tensors.pop("table")
            learner.model.load_state_dict(self._tensors)
            learner.adam.refresh()


def with_following(batches: Iterable[Batch]) -> Iterator[tuple[Batch, Batch | None]]:
    """Yield each batch with the one after it, which a GPU copies in the meantime."""
    ahead, behind = itertools.tee(batches)
    return itertools.zip_longest(behind, itertools.islice(ahead, 1, None))


class MeanLoss:
    """The mean loss over batches whose logits may still be on their way from a device.

    Logits are copied from the device many batches at once.
    """

    def __init__(self) -> None:
        self._logits: list[Tensor] = []
        self._labels: list[Labels] = []
        self._sum = 0.0
        self._count = 0

    def add(self, logits: Tensor, labels: Labels) -> None:
        """Add the losses of a batch."""
        self._logits.append(logits)
        self._labels.append(labels)
        if len(self._logits) >= _LOSS_BATCHES:
            self._flush()

    def mean(self) -> float:
        """Return the mean over all examples added, 0 without any."""
        self._flush()
        return self._sum / max(self._count, 1)

    def _flush(self) -> None:
        if self._logits:
            logits = torch.cat(self._logits).double().cpu().numpy()
            labels = np.concatenate(self._labels)
            self._sum += float(metrics.losses(logits, labels).sum())
            self._count += len(labels)
        self._logits = []
        self._labels = []


# -- one pass ------------------------------------------------------------------------------------


def stream(setting: Setting, data: Dataset, *, advance: Advance = lambda n: None) -> dict[str, Any]:
    """Return the outcome of one pass in event-time order.

    Each example is predicted before it is learned. `last_half` has the scores of the second half,
    and `blocks` the sums of losses over neighbouring examples, for intervals. `advance` is called
    with the number of examples of each batch. Raises `Diverged`.
    """
    learner = setting.make()
    logits, seconds = _progressive_logits(learner, setting.batch_size, data, advance)
    labels = np.array(data.labels)
    half = len(data) // 2
    return {
        **setting.summary(),
        **scores(logits, labels),
        "last_half": scores(logits[half:], labels[half:]),
        "seconds": seconds,
        "examples_per_second": len(data) / seconds,
        "device": device_of(learner),
        "parameters": parameters(learner),
        "blocks": block_sums(metrics.losses(logits, labels)).tolist(),
    }


def _progressive_logits(
    learner: Learner, batch_size: int, data: Dataset, advance: Advance
) -> tuple[Logits, float]:
    """Return the logits [N] before each example was learned, and the seconds of the pass."""
    logits = np.zeros(len(data))
    skipped = 0
    places = [
        slice(start, min(start + batch_size, len(data)))
        for start in range(0, len(data), batch_size)
    ]
    batches = with_following(data[place] for place in places)
    on_device: list[tuple[slice, Tensor]] = []
    timer = StepTimer(learner, warmup=min(_WARMUP_STEPS, len(places) - 1))
    for place, ((ids, labels, values), following) in zip(places, batches, strict=True):
        learned = learner.learn(ids, labels, values, following=following)
        skipped = count_skipped(skipped, learned)
        if learned is None:
            learned = torch.from_numpy(learner.predict(ids, values))
        on_device.append((place, learned))
        advance(len(labels))
        if len(on_device) >= _LOSS_BATCHES or place.stop == len(data):
            for past, tensor in on_device:
                logits[past] = tensor.double().cpu().numpy()
            on_device = []
        timer.step_done()
    timer.pause()
    return logits, timer.seconds_per_step * len(places)


# -- properties of a learner ---------------------------------------------------------------------


def device_of(learner: Learner) -> str:
    """Return the type of the device that the learner uses."""
    return learner.device.type if isinstance(learner, NetworkLearner) else "cpu"


def synchronize(learner: Learner) -> None:
    """Wait until the work queued on a GPU is done."""
    if device_of(learner) == "cuda":
        torch.cuda.synchronize()


def parameters(learner: Learner) -> int:
    """Return the number of parameters of the dense part, without the table."""
    if not isinstance(learner, NetworkLearner):
        return 1
    return sum(parameter.numel() for parameter in learner.model.parameters())


def seconds_per_example(
    setting: Setting, data: Dataset, split: Split, *, batches: int = 4
) -> float:
    """Return the time per example, measured on a few batches after the warm-up.

    For a system with pre-training it is the time of an example of both trainings.
    """
    learner = replace(setting, epochs=1).make()
    size = setting.batch_size
    steps = batches + _WARMUP_STEPS
    rows = split.rows(TRAINING, 0, 4 * steps * size)
    parts = [rows[start : start + size] for start in range(0, len(rows), size)][:steps]
    seconds = _seconds_per_step(learner, data, parts)
    if isinstance(learner, NetworkLearner) and learner.pretraining:
        learner.end_pretraining()
        seconds += _seconds_per_step(learner, data, parts)
    return seconds / size


def _seconds_per_step(learner: Learner, data: Dataset, parts: list[Rows]) -> float:
    timer = StepTimer(learner, warmup=min(_WARMUP_STEPS, len(parts) - 1))
    for part in parts:
        learner.learn(*data[part])
        timer.step_done()
    timer.pause()
    return timer.seconds_per_step
