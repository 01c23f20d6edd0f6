"""What is not finite is not learned, and a model that diverges goes back to the last good snapshot.

Of several models on the same examples each has a guard. Only that of the published one may end the run.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from stream_ctr.errors import DataError, SnapshotError
from stream_ctr.evaluate import metrics
from stream_ctr.join.joiner import Examples
from stream_ctr.learn.learner import Learner
from stream_ctr.snapshots import snapshot

_log = logging.getLogger(__name__)
_MOST_ROLLBACKS = (
    3  # with fewer than so many batches learned in between: it diverges again and again
)
_RECOVERED_BATCHES = 100
NOT_FINITE = "its weights are not finite"
_WORSENED = (
    2.0,
    0.1,
)  # times the logloss of its own batch, and nats more, that a step may leave behind


class Learned(NamedTuple):
    """A step: the logits [m] from before it, of the examples of the batch that `kept` (bool [n]) marks; None: of all, m = n."""

    logits: npt.NDArray[np.floating]
    kept: npt.NDArray[np.bool_] | None
    ends_pretraining: bool = False
    """After it the model is another one than the logits are of."""


class Guard:
    """Stands between the batches and the learner.

    `good` gives the snapshot to go back to, if there is one, and the number of examples trained so far. `begins_again` is given what its
    gate said where that takes the model back into its pre-training. What is skipped and unlearned is
    counted in `counters`; of a model `beside` the published one, under its name.
    """

    def __init__(
        self,
        learner: Learner,
        counters: Counter[str],
        *,
        good: Callable[[], tuple[Path | None, int]],
        skips_before_rollback: int,
        signature: snapshot.Verify | None = None,
        beside: str | None = None,
        begins_again: Callable[[Mapping[str, Any]], None] = lambda told: None,
    ) -> None:
        self._begins_again = begins_again
        self._learner, self._counters, self._good, self._signature = (
            learner,
            counters,
            good,
            signature,
        )
        self._skips_before_rollback = skips_before_rollback
        self._beside, self._stems = beside, snapshot.stems(beside)
        self._row = Counter(
            skipped=0, learned=0, rollbacks=0
        )  # skipped and learned in a row, rollbacks since it last recovered
        self._last: tuple[Examples, Learned] | None = (
            None  # by which a snapshot shows that its last step did no harm
        )
        self._last_step: list[
            str
        ] = []  # what was wrong with the one before the snapshot that this run began with

    def learn(self, batch: Examples, following: Examples | None = None) -> Learned | None:
        """One step, of all the batch or of a part. None: it was skipped. `following` is the next batch, if it is known.

        Raises `DataError` when the model diverges again and again, or has nothing to go back to.
        """
        began = self._learner.pretraining
        learned = self._learn(batch, following)
        skipped = len(batch) - (len(learned.logits) if learned else 0)
        if skipped:
            self._count("examples_skipped", skipped)
        if learned is None:
            self._count("batches_skipped", 1)
            self._row["skipped"] += 1
            if self._row["skipped"] >= self._skips_before_rollback:
                self.roll_back(
                    f"{self._row['skipped']} batches in a row had no finite loss and gradient"
                )
            return None
        self._row["skipped"] = 0
        self._row["learned"] += 1
        if self._row["learned"] == _RECOVERED_BATCHES:
            self._row["rollbacks"] = 0
        learned = learned._replace(ends_pretraining=began and not self._learner.pretraining)
        self._last = batch if learned.kept is None else batch[learned.kept], learned
        return learned

    def _learn(self, batch: Examples, following: Examples | None) -> Learned | None:
        then = (following.ids, following.label, following.values) if following is not None else None
        found = self._learner.learn(batch.ids, batch.label, batch.values, following=then)
        if found is None:
            return self._learn_what_is_finite(batch)
        logits = _host(found)
        finite = np.isfinite(logits)
        if finite.all():
            return Learned(logits, None)
        return (
            Learned(logits[finite], finite) if finite.any() else None
        )  # it learns an example at a time

    def _learn_what_is_finite(self, batch: Examples) -> Learned | None:
        """A batch without the examples for which the model predicts no number; None when it cannot learn the rest."""
        finite = np.isfinite(self._learner.predict(batch.ids, batch.values))
        kept, logits = batch[finite], None
        if 0 < len(kept) < len(batch):
            logits = self._learner.learn(kept.ids, kept.label, kept.values)
        return Learned(_host(logits), finite) if logits is not None else None

    def _count(self, what: str, number: int) -> None:
        self._counters[f"{what}.{self._beside}" if self._beside else what] += number

    def roll_back(self, why: str) -> None:
        """Give the model and its optimiser the state of the last good snapshot; the stream goes on from where it is."""
        path, trained = self._good()
        self._row["rollbacks"] += 1
        if path is None or self._row["rollbacks"] > _MOST_ROLLBACKS:
            good = (
                f"going back to {path.name} did not help {_MOST_ROLLBACKS} times"
                if path
                else "there is no snapshot to go back to"
            )
            remedy = (
                "Lower the learning rates, or use log_value rather than value for large numbers"
            )
            raise DataError(f"{self._who} diverged: {why}, and {good}. {remedy}")
        manifest, tensors = snapshot.load(path, files=self._stems, signature=self._signature)
        pretraining = self._learner.pretraining
        self._load_model(tensors, path)
        if self._learner.pretraining and not pretraining:
            self._begins_again(manifest["gate"])
        self._row["skipped"] = self._row["learned"] = 0
        self._last, self._last_step = None, []
        unlearned = trained - manifest["examples"]
        self._count("rollbacks", 1)
        self._count("examples_unlearned", unlearned)
        _log.error(
            "%s: %s goes back to snapshot %s and forgets %d examples",
            why,
            self._who,
            path.name,
            unlearned,
        )

    @property
    def _who(self) -> str:
        return (
            f"the model {self._beside}, beside the published one," if self._beside else "the model"
        )

    def worsened(self) -> list[str]:
        """Why the last step was a bad one: what is measured is measured before a step, and says nothing of the last.

        When the model predicts no numbers any more, it goes back to the last good snapshot.
        """
        if self._last is None:  # no step since this run resumed
            return self._last_step
        examples, learned = self._last
        before = learned.logits.astype(np.float64)
        after = self._learner.predict(examples.ids, examples.values).astype(np.float64)
        if not np.isfinite(after).all():
            self.roll_back("after its last step it predicts values that are not finite")
            return []
        was, became = (
            float(metrics.losses(logits, examples.label).mean()) for logits in (before, after)
        )
        if became <= max(_WORSENED[0] * was, was + _WORSENED[1]):
            return []
        step = "its last step"
        if learned.ends_pretraining:
            step += (
                " ended its pre-training, the network that took over has learned nothing yet: it"
            )
        return [f"{step} took the logloss of its own examples from {was:.3g} to {became:.3g}"]

    def told(self) -> dict[str, Any]:
        """For a manifest, whose gate has what `worsened` said."""
        return dict(self._row)

    def load(
        self,
        tensors: snapshot.Tensors,
        told: Mapping[str, Any],
        path: Path,
        *,
        last_step: list[str],
    ) -> None:
        """Model, optimiser and what was `told` of them. Raises `SnapshotError` when they do not fit."""
        self._load_model(tensors, path)
        self._row, self._last_step = Counter(told), last_step

    def _load_model(self, tensors: snapshot.Tensors, path: Path) -> None:
        model, optimizer = self._stems
        try:
            self._learner.load_weights(tensors[model])
            self._learner.load_optimizer_state(tensors[optimizer])
        except (KeyError, ValueError) as error:
            raise SnapshotError(f"snapshot {path.name} does not fit {self._who}: {error}") from None


class GuardBeside(Guard):
    """Of a model beside the published one: what would end the run leaves this model out of the rest of it."""

    left_out = ""
    """Why it is."""

    def learn(self, batch: Examples, following: Examples | None = None) -> Learned | None:
        return None if self.left_out else super().learn(batch, following)

    def worsened(self) -> list[str]:
        return [] if self.left_out else super().worsened()

    def roll_back(self, why: str) -> None:
        try:
            super().roll_back(why)
        except (DataError, SnapshotError) as error:
            self.left_out = str(error)
            self._count("left_out", 1)
            self._last = None
            _log.error("%s; it is left out from now on, the run goes on without it", error)

    def told(self) -> dict[str, Any]:
        return {**super().told(), "left_out": self.left_out}

    def load(
        self,
        tensors: snapshot.Tensors,
        told: Mapping[str, Any],
        path: Path,
        *,
        last_step: list[str],
    ) -> None:
        """Nothing of a model that is left out. One that the snapshot lacks, because it was not finite, goes back to an earlier one."""
        row = dict(told)
        self.left_out = row.pop("left_out")
        if self.left_out:
            return
        if self._stems[0] in tensors:
            super().load(tensors, row, path, last_step=last_step)
        else:
            self._row = Counter(row)
            self.roll_back(NOT_FINITE)


def _host(logits: Tensor) -> npt.NDArray[np.floating]:
    # `cpu` lets other threads have the interpreter, and waits for it, also when there is nothing to copy.
    return (logits if logits.device.type == "cpu" else logits.cpu()).numpy()
