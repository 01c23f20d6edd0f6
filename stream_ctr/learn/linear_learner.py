"""The learner of LR.

>>> from stream_ctr.learn.spec import LearnerSpec
>>> learner = LinearLearner(LearnerSpec(model="lr", fields=2, table_bits=8))
>>> learner.learn(np.array([[1, 2]], np.int32), np.array([1], np.uint8)).tolist()
[0.0]
>>> sorted(learner.weights())
['intercept', 'pairs', 'rows']
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stream_ctr.learn.changes import Changes
from stream_ctr.learn.linear_model import Coordinates, ftrl_of, require_linear
from stream_ctr.learn.served_weights import INTERCEPT, ROWS, VALUES
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.step import Batch, Ids, Labels, Values
from stream_ctr.learn.tensors import State, Tensors
from stream_ctr.learn.touched import Touched, require_touched


class LinearLearner:
    """LR by FTRL-Proximal, which learns one example at a time.

    With `spec.pairs` it reads pairs of fields too, in a table of their own. Batches are only the
    form in which examples arrive. It runs on the CPU, whatever the device of other learners.
    """

    pretraining = False

    def __init__(self, spec: LearnerSpec) -> None:
        self.batch_size = spec.batch_size
        self.steps = 0
        self.restored = 0
        self.touched: Touched | None = None
        self._coordinates = Coordinates(spec)
        self._lock = threading.Lock()  # the rows of an example are marked while it is learned
        self._ftrl = ftrl_of(spec, self._coordinates.bits)
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
            if self.touched is not None:
                self.touched.mark(coordinates)
            logits = self._ftrl.learn(coordinates, labels, values)
            self.steps += 1
        return torch.from_numpy(logits)

    def predict(self, ids: Ids, values: Values | None = None) -> npt.NDArray[np.floating]:
        with self._lock:
            return self._ftrl.predict(self._coordinates(ids), values)

    def weights(self, *, reuse: bool = False) -> State:
        """Return the pairs (z, n), which are weights and optimiser in one."""
        with self._lock:
            return self._ftrl.state_dict(reuse=reuse)

    def shards(self) -> None:
        return None

    def optimizer_state(self) -> State:
        return {"steps": np.array([self.steps])}

    def load_weights(self, weights: Tensors) -> None:
        require_linear(weights, self._coordinates.bits)
        with self._lock:
            self.restored += 1
            self._equal_since = 0
            if self._changes:
                self._changes.mark_all()
            self._ftrl.load_state_dict(weights)

    def track_touched(self) -> None:
        self.touched = Touched(1 << self._coordinates.bits)
        self.take_changes()  # compile now rather than while learning waits for the first ones

    def take_changes(self) -> State:
        """Return the weights of the touched rows, of fields or of pairs, and of the intercept."""
        with self._lock:
            rows = require_touched(self.touched).take()
            return {
                ROWS: rows,
                VALUES: self._ftrl.weights_of(rows),
                INTERCEPT: np.array([self._ftrl.intercept_weight]),
            }

    def track_changes(self) -> None:
        self._changes = Changes(1 << self._coordinates.bits)

    def copy_weights_to(self, other: LinearLearner) -> None:
        with self._lock, other._lock:
            since = other._equal_since
            other._equal_since = self._ftrl.copy_to(other._ftrl, self._changes, since=since)

    def load_optimizer_state(self, state: Tensors) -> None:
        self.steps = int(state["steps"][0])
