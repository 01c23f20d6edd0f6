"""The learner of LR.

>>> from stream_ctr.learn.spec import LearnerSpec
>>> learner = LinearLearner(LearnerSpec(model="lr", fields=2, table_bits=8))
>>> learner.learn(np.array([[1, 2]], np.int32), np.array([1], np.uint8)).tolist()
[0.0]
>>> sorted(learner.weights())
['intercept', 'pairs', 'rows']
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stream_ctr.learn.changes import Changes
from stream_ctr.learn.linear_model import LinearModel, require_linear
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.step import Batch, Ids, Labels, Values
from stream_ctr.learn.tensors import State, Tensors


class LinearLearner(LinearModel):
    """LR by FTRL-Proximal, which learns one example at a time.

    With `spec.pairs` it reads pairs of fields too, in a table of their own. Batches are only the
    form in which examples arrive. It runs on the CPU, whatever the device of other learners.
    """

    pretraining = False

    def __init__(self, spec: LearnerSpec) -> None:
        super().__init__(spec)
        self.batch_size = spec.batch_size
        self.steps = 0
        self._changes: Changes | None = None
        # By the changes of the learner that is copied to this one. Both begin with a table of
        # zeros, which takes memory only where it is written.
        self._equal_since = Changes.FIRST

    def learn(
        self,
        ids: Ids,
        labels: Labels,
        values: Values | None = None,
        *,
        following: Batch | None = None,
    ) -> Tensor | None:
        """Learn the examples with a finite logit; the logit of the others is NaN."""
        with self._lock:
            coordinates = self._coordinates(ids)
            if self._changes:
                self._changes.mark(coordinates)
            logits = self._ftrl.learn(coordinates, labels, values)
            self.steps += 1
        return torch.from_numpy(logits)

    def optimizer_state(self) -> State:
        return {"steps": np.array([self.steps])}

    def load_weights(self, weights: Tensors) -> None:
        require_linear(weights, self._bits)
        with self._lock:
            self._equal_since = 0
            if self._changes:
                self._changes.mark_all()
            self._ftrl.load_state_dict(weights)

    def track_changes(self) -> None:
        self._changes = Changes(1 << self._bits)

    def copy_weights_to(self, other: LinearLearner) -> None:
        with self._lock, other._lock:
            since = other._equal_since
            other._equal_since = self._ftrl.copy_to(other._ftrl, self._changes, since=since)

    def load_optimizer_state(self, state: Tensors) -> None:
        self.steps = int(state["steps"][0])
