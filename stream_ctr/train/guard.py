"""The guard of a model: it skips examples that are not finite, and notices divergence.

Every model of a run has a guard. `learn` returns what became of a batch; the trainer decides what
follows, finds the snapshot to go back to and calls `restore`.

    outcome of `learn`   when                                          what the trainer does
    ------------------   -------------------------------------------   -------------------------
    Learned              the step was taken, on all of the batch or    counts the examples
                         on the examples with a finite logit
    Skipped              no finite loss and gradient; fewer than       counts them as skipped
                         `skips_before_rollback` batches in a row
    Diverged             that many in a row                            restores a snapshot

    state of a model     enters by                                     leaves by
    ------------------   -------------------------------------------   -------------------------
    learning             a learned batch                               a skipped batch
    skipping             a skipped batch                               a learned batch
    diverged             `skips_before_rollback` skipped in a row,     `restore`
                         or predictions that are not finite
    recovering           `restore`                                     100 learned in a row
    ended                a fourth rollback before it recovered, or     never: the run ends; an
                         no snapshot to go back to                     additional model is left out
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from stream_ctr.errors import DataError, SnapshotError
from stream_ctr.evaluate import metrics
from stream_ctr.evaluate.gate import Verdict
from stream_ctr.join.examples import Examples
from stream_ctr.learn.learner import Learner
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.contract import Verify
from stream_ctr.snapshots.manifest import AdditionalGuardState, GuardState

_log = logging.getLogger(__name__)
_MOST_ROLLBACKS = 3  # before the model has recovered
_RECOVERED_BATCHES = 100
# How much worse a step may leave the logloss of its own batch: times, and nats more.
_WORSENED_FACTOR = 2.0
_WORSENED_NATS = 0.1


class Learned(NamedTuple):
    """A step was taken.

    `logits` [m] are those from before it, of the examples that `kept` (bool [n]) marks; None
    stands for all of them. After a step that ends the pre-training the model is another one than
    the logits are of.
    """

    logits: npt.NDArray[np.floating]
    kept: npt.NDArray[np.bool_] | None = None
    ends_pretraining: bool = False


class Skipped(NamedTuple):
    """No example of the batch was learned."""


class Diverged(NamedTuple):
    """The model must go back to a snapshot."""

    reason: str


Outcome = Learned | Skipped | Diverged


class Guard:
    """Stand between the batches and a learner.

    `counters` receives the numbers of skipped and unlearned examples, under the name of an
    `additional` model if it is not the published one.
    """

    def __init__(
        self,
        learner: Learner,
        counters: Counter[str],
        *,
        skips_before_rollback: int,
        additional: str | None = None,
    ) -> None:
        self.learner = learner
        self.additional = additional
        self.left_out = ""
        """The reason for which an additional model takes no part in the run any more."""
        self._counters = counters
        self._skips_before_rollback = skips_before_rollback
        self._skipped = 0  # batches in a row
        self._learned = 0  # batches in a row
        self._rollbacks = 0  # since the model last recovered
        # The last step, by which a snapshot shows that it did no harm.
        self._last: tuple[Examples, Learned] | None = None
        # What was wrong with the last step before the snapshot that this run resumed from.
        self._resumed_last_step: tuple[str, ...] = ()

    # -- learning --------------------------------------------------------------------------------

    def learn(self, batch: Examples, following: Examples | None = None) -> Outcome:
        """Take one step on the batch, or on its finite part.

        `following` is the next batch, if it is known.
        """
        if self.left_out:
            return Skipped()
        began_pretraining = self.learner.pretraining
        learned = self._learn(batch, following)
        skipped = len(batch) - (len(learned.logits) if learned else 0)
        if skipped:
            self._count("examples_skipped", skipped)
        if learned is None:
            self._count("batches_skipped", 1)
            self._skipped += 1
            if self._skipped >= self._skips_before_rollback:
                return Diverged(f"{self._skipped} batches in a row had no finite loss and gradient")
            return Skipped()
        self._skipped = 0
        self._learned += 1
        if self._learned == _RECOVERED_BATCHES:
            self._rollbacks = 0
        learned = learned._replace(
            ends_pretraining=began_pretraining and not self.learner.pretraining
        )
        self._last = (batch if learned.kept is None else batch[learned.kept]), learned
        return learned

    def _learn(self, batch: Examples, following: Examples | None) -> Learned | None:
        next_arrays = None
        if following is not None:
            next_arrays = (following.ids, following.label, following.values)
        found = self.learner.learn(batch.ids, batch.label, batch.values, following=next_arrays)
        if found is None:
            return self._learn_finite_part(batch)
        logits = _to_host(found)
        finite = np.isfinite(logits)
        if finite.all():
            return Learned(logits)
        # Only LR, which learns an example at a time, returns logits that are not finite.
        return Learned(logits[finite], finite) if finite.any() else None

    def _learn_finite_part(self, batch: Examples) -> Learned | None:
        """Learn the examples whose logit is finite, or return None if that fails too."""
        finite = np.isfinite(self.learner.predict(batch.ids, batch.values))
        kept = batch[finite]
        logits = None
        if 0 < len(kept) < len(batch):
            logits = self.learner.learn(kept.ids, kept.label, kept.values)
        return Learned(_to_host(logits), finite) if logits is not None else None

    def check_last_step(self, *, most: int | None = None) -> tuple[str, ...] | Diverged:
        """Return what the last step did wrong, empty if nothing.

        Metrics measure a batch before its step, so they say nothing about the last one. Returns
        `Diverged` if the model's predictions are not finite any more.
        """
        if self.left_out:
            return ()
        if self._last is None:  # no step since this run resumed
            return self._resumed_last_step
        learned = self._last[1]
        examples = self._last[0][:most]
        after = self.learner.predict(examples.ids, examples.values).astype(np.float64)
        if not np.isfinite(after).all():
            return Diverged("after its last step it predicts values that are not finite")
        return worsened(
            learned.logits[:most].astype(np.float64),
            after,
            examples.label,
            ends_pretraining=learned.ends_pretraining,
        )

    # -- going back ------------------------------------------------------------------------------

    def restore(
        self,
        path: Path | None,
        reason: str,
        *,
        trained: int,
        signature: Verify | None = None,
    ) -> Verdict | None:
        """Give the model and its optimiser the state of the snapshot at `path`.

        The stream goes on from where it is; `trained` is the number of examples trained so far.
        Returns the verdict of that snapshot if the model went back into its pre-training, which
        makes it another model for the gate, and None otherwise.

        Raises `DataError` if there is no snapshot, or if going back did not help three times.
        """
        self._rollbacks += 1
        if path is None or self._rollbacks > _MOST_ROLLBACKS:
            remedy = (
                "Lower the learning rates, or use log_value rather than value for large numbers"
            )
            tried = (
                f"going back to {path.name} did not help {_MOST_ROLLBACKS} times"
                if path
                else "there is no snapshot to go back to"
            )
            raise DataError(f"{self._name} diverged: {reason}, and {tried}. {remedy}")
        manifest, tensors = snapshot.load(
            path,
            stems=snapshot.stems(self.additional),
            signature=signature,
            stored=self.learner.shards() is not None,
        )
        pretraining = self.learner.pretraining
        self._load_model(tensors, path)
        self._skipped = 0
        self._learned = 0
        self._last = None
        self._resumed_last_step = ()
        unlearned = trained - manifest.examples
        self._count("rollbacks", 1)
        self._count("examples_unlearned", unlearned)
        _log.error(
            "%s: %s goes back to snapshot %s and forgets %d examples",
            reason,
            self._name,
            path.name,
            unlearned,
        )
        return manifest.gate if self.learner.pretraining and not pretraining else None

    def leave_out(self, error: DataError | SnapshotError) -> None:
        """Take an additional model out of the rest of the run."""
        self.left_out = str(error)
        self._count("left_out", 1)
        self._last = None
        _log.error("%s; it is left out from now on, the run goes on without it", error)

    # -- state -----------------------------------------------------------------------------------

    @property
    def recovering(self) -> bool:
        """True from a rollback until the model has recovered."""
        return self._rollbacks > 0 and not self.left_out

    def state(self) -> GuardState:
        """Return the counts of a published model's guard, for a manifest."""
        return GuardState(skipped=self._skipped, learned=self._learned, rollbacks=self._rollbacks)

    def additional_state(self) -> AdditionalGuardState:
        """Return the counts of an additional model's guard, for a manifest."""
        return AdditionalGuardState(
            skipped=self._skipped,
            learned=self._learned,
            rollbacks=self._rollbacks,
            left_out=self.left_out,
        )

    def load_state(self, state: GuardState | AdditionalGuardState) -> None:
        """Restore the counts."""
        self._skipped = state.skipped
        self._learned = state.learned
        self._rollbacks = state.rollbacks
        if isinstance(state, AdditionalGuardState):
            self.left_out = state.left_out

    def load_model(
        self, tensors: snapshot.Tensors, path: Path, *, last_step: tuple[str, ...] = ()
    ) -> None:
        """Load the model and its optimiser from a snapshot that the run resumes from.

        `last_step` is what the manifest says about the step before it. Raises `SnapshotError` if
        the tensors do not fit.
        """
        self._load_model(tensors, path)
        self._resumed_last_step = last_step

    def _load_model(self, tensors: snapshot.Tensors, path: Path) -> None:
        model, optimizer = snapshot.stems(self.additional)
        try:
            self.learner.load_weights(tensors[model])
            self.learner.load_optimizer_state(tensors[optimizer])
        except (KeyError, ValueError) as error:
            raise SnapshotError(
                f"snapshot {path.name} does not fit {self._name}: {error}"
            ) from None

    @property
    def _name(self) -> str:
        return f"the additional model {self.additional}" if self.additional else "the model"

    def _count(self, counter: str, number: int) -> None:
        key = f"{counter}.{self.additional}" if self.additional else counter
        self._counters[key] += number


def worsened(
    before: npt.NDArray[np.float64],
    after: npt.NDArray[np.float64],
    label: npt.NDArray[np.uint8],
    *,
    ends_pretraining: bool = False,
) -> tuple[str, ...]:
    """Return what a step did wrong, by the logits of its examples before and after it."""
    loss_before, loss_after = (
        float(metrics.losses(logits, label).mean()) for logits in (before, after)
    )
    if loss_after <= max(_WORSENED_FACTOR * loss_before, loss_before + _WORSENED_NATS):
        return ()
    step = "its last step"
    if ends_pretraining:
        step += " ended its pre-training, the network that took over has learned nothing yet: it"
    return (
        f"{step} took the logloss of its own examples from {loss_before:.3g} to {loss_after:.3g}",
    )


def _to_host(logits: Tensor) -> npt.NDArray[np.floating]:
    # `cpu` releases Python's lock, and waits for it, even when there is nothing to copy.
    return (logits if logits.device.type == "cpu" else logits.cpu()).numpy()
