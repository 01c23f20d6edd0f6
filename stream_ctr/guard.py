"""What is not finite is not learned, and a model that diverges goes back to the last good snapshot."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from stream_ctr import metrics, snapshot
from stream_ctr.errors import DataError, SnapshotError
from stream_ctr.join import Examples
from stream_ctr.learner import Learner

_log = logging.getLogger(__name__)
_MOST_ROLLBACKS = 3  # with fewer than so many batches learned in between: it diverges again and again
_RECOVERED_BATCHES = 100
_WORSENED = 2.0, 0.1  # times the logloss of its own batch, and nats more, that a step may leave behind


class Guard:
    """Stands between the batches and the learner.

    `good` gives the snapshot to go back to, if there is one, and the number of examples trained so far. What is skipped and unlearned is
    counted in `counters`.
    """

    def __init__(
        self,
        learner: Learner,
        counters: Counter[str],
        *,
        good: Callable[[], tuple[Path | None, int]],
        skips_before_rollback: int,
        signature: snapshot.Verify | None = None,
    ) -> None:
        self._learner, self._counters, self._good, self._signature = learner, counters, good, signature
        self._skips_before_rollback = skips_before_rollback
        self._row = Counter(skipped=0, learned=0, rollbacks=0)  # skipped and learned in a row, rollbacks since it last recovered
        self._last: tuple[Examples, Tensor] | None = None  # by which a snapshot shows that its last step did no harm
        self._last_step: list[str] = []  # what was wrong with the one before the snapshot that this run began with

    def learn(self, batch: Examples, following: Examples | None = None) -> tuple[Examples, Tensor] | None:
        """One step; the examples that were learned and their logits from before it. None: it was skipped. `following` is the next batch,
        if it is known.

        Raises `DataError` when the model diverges again and again, or has nothing to go back to.
        """
        then = (following.ids, following.label, following.values) if following is not None else None
        logits = self._learner.learn(batch.ids, batch.label, batch.values, following=then)
        if logits is None:
            batch, logits = self._learn_what_is_finite(batch)
        if logits is None:
            self._counters["batches_skipped"] += 1
            self._row["skipped"] += 1
            if self._row["skipped"] >= self._skips_before_rollback:
                self.roll_back(f"{self._row['skipped']} batches in a row had no finite loss and gradient")
            return None
        self._row["skipped"] = 0
        self._row["learned"] += 1
        if self._row["learned"] == _RECOVERED_BATCHES:
            self._row["rollbacks"] = 0
        self._last = batch, logits
        return self._last

    def _learn_what_is_finite(self, batch: Examples) -> tuple[Examples, Tensor | None]:
        """A batch without the examples for which the model predicts no number, and their logits; None when it cannot learn the rest."""
        finite = np.isfinite(self._learner.predict(batch.ids, batch.values))
        kept, logits = batch[finite], None
        if 0 < len(kept) < len(batch):
            logits = self._learner.learn(kept.ids, kept.label, kept.values)
        self._counters["examples_skipped"] += len(batch) - (len(kept) if logits is not None else 0)
        return kept, logits

    def roll_back(self, why: str) -> None:
        """Give the model and its optimiser the state of the last good snapshot; the stream goes on from where it is."""
        path, trained = self._good()
        self._row["rollbacks"] += 1
        if path is None or self._row["rollbacks"] > _MOST_ROLLBACKS:
            good = f"going back to {path.name} did not help {_MOST_ROLLBACKS} times" if path else "there is no snapshot to go back to"
            remedy = "Lower the learning rates, or use log_value rather than value for large numbers"
            raise DataError(f"the model diverged: {why}, and {good}. {remedy}")
        manifest, tensors = snapshot.load(path, files=("model", "optimizer"), signature=self._signature)
        self._load_model(tensors, path)
        self._row["skipped"] = self._row["learned"] = 0
        self._last, self._last_step = None, []
        unlearned = trained - manifest["examples"]
        self._counters["rollbacks"] += 1
        self._counters["examples_unlearned"] += unlearned
        _log.error("%s: the model goes back to snapshot %s and forgets %d examples", why, path.name, unlearned)

    def worsened(self) -> list[str]:
        """Why the last step was a bad one: what is measured is measured before a step, and says nothing of the last.

        When the model predicts no numbers any more, it goes back to the last good snapshot.
        """
        if self._last is None:  # no step since this run resumed
            return self._last_step
        examples, logits = self._last
        before = logits.double().cpu().numpy()
        after = self._learner.predict(examples.ids, examples.values).astype(np.float64)
        if not np.isfinite(after).all():
            self.roll_back("after its last step it predicts values that are not finite")
            return []
        was, became = (float(metrics.losses(logits, examples.label).mean()) for logits in (before, after))
        worse = became > max(_WORSENED[0] * was, was + _WORSENED[1])
        return [f"its last step took the logloss of its own examples from {was:.3g} to {became:.3g}"] if worse else []

    def told(self) -> dict[str, int]:
        """For a manifest, whose gate has what `worsened` said."""
        return dict(self._row)

    def load(self, tensors: snapshot.Tensors, manifest: Mapping[str, Any], path: Path) -> None:
        """Model, optimiser and what was told of them. Raises `SnapshotError` when they do not fit."""
        self._load_model(tensors, path)
        self._row, self._last_step = Counter(manifest["guard"]), manifest["gate"]["last_step"]

    def _load_model(self, tensors: snapshot.Tensors, path: Path) -> None:
        try:
            self._learner.load_weights(tensors["model"])
            self._learner.load_optimizer_state(tensors["optimizer"])
        except (KeyError, ValueError) as error:
            raise SnapshotError(f"snapshot {path.name} does not fit this model: {error}") from None
