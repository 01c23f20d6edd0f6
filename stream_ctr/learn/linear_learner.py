"""The learner of LR, and one that only serves it.

>>> from stream_ctr.learn.spec import LearnerSpec
>>> learner = LinearLearner(LearnerSpec(model="lr", fields=2, table_bits=8))
>>> learner.learn(np.array([[1, 2]], np.int32), np.array([1], np.uint8)).tolist()
[0.0]
>>> sorted(learner.weights())
['intercept', 'pairs', 'rows']
"""

from __future__ import annotations

import threading
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from msgspec import UNSET, structs
from torch import Tensor

from stream_ctr.learn.changes import Changes
from stream_ctr.learn.ftrl import FTRL
from stream_ctr.learn.pairs import PairHasher
from stream_ctr.learn.spec import FtrlRates, LearnerSpec
from stream_ctr.learn.step import Batch, Ids, Labels, Values
from stream_ctr.learn.tensors import State, Tensors, require_names, require_tensor


class LinearLearner:
    """LR by FTRL-Proximal, which learns one example at a time.

    With `spec.pairs` it reads pairs of fields too, in a table of their own. Batches are only the
    form in which examples arrive. It runs on the CPU, whatever the device of other learners.
    """

    pretraining = False

    def __init__(self, spec: LearnerSpec) -> None:
        self.fields = spec.fields
        self.batch_size = spec.batch_size
        self.steps = 0
        self._pairs = (
            None
            if spec.pairs is UNSET
            else PairHasher(
                spec.pairs.columns,
                table_bits=spec.pairs.table_bits,
                numbers=spec.pairs.numbers or None,
            )
        )
        self._bits = spec.table_bits if spec.pairs is UNSET else spec.pairs.table_bits
        self._lock = threading.Lock()  # the rows of an example are marked while it is learned
        self._ftrl = _ftrl(spec, self._bits)
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

    def predict(self, ids: Ids, values: Values | None = None) -> npt.NDArray[np.floating]:
        with self._lock:
            return self._ftrl.predict(self._coordinates(ids), values)

    def _coordinates(self, ids: Ids) -> Ids:
        """Return the ids of the fields, without those of cross products, or of the pairs."""
        fields = np.ascontiguousarray(ids[:, : self.fields])
        return fields if self._pairs is None else self._pairs.rows(fields)

    def weights(self, *, reuse: bool = False) -> State:
        """Return the pairs (z, n), which are weights and optimiser in one."""
        with self._lock:
            return self._ftrl.state_dict(reuse=reuse)

    def optimizer_state(self) -> State:
        return {"steps": np.array([self.steps])}

    def load_weights(self, weights: Tensors) -> None:
        _require_linear(weights, self._bits)
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


class ServedLinear(LinearLearner):
    """LR that was learned elsewhere; it predicts and does not learn.

    Its table holds only the rows that were learned, and one for all others. The number of rows that
    a manifest claims therefore costs no memory.
    """

    def __init__(self, spec: LearnerSpec) -> None:
        super().__init__(structs.replace(spec, table_bits=0))
        self._spec = spec
        self._bits = spec.table_bits
        self._rows = np.empty(0, np.int32)

    def learn(
        self,
        ids: Ids,
        labels: Labels,
        values: Values | None = None,
        *,
        following: Batch | None = None,
    ) -> Tensor | None:
        raise TypeError("this learner was made for serving and does not learn")

    def load_weights(self, weights: Tensors) -> None:
        _require_linear(weights, self._bits)
        count = len(weights["rows"])
        ftrl = _ftrl(self._spec, count.bit_length())
        ftrl.load_state_dict({**weights, "rows": np.arange(count)})
        with self._lock:
            self._rows = weights["rows"].astype(np.int32)
            self._ftrl = ftrl

    def weights(self, *, reuse: bool = False) -> State:
        with self._lock:
            state = self._ftrl.state_dict(reuse=reuse)
            return {**state, "rows": self._rows[state["rows"]]}

    def _coordinates(self, ids: Ids) -> Ids:
        """Return the index of each id among the learned rows, or their number where it is none."""
        ids = ids[:, : self.fields]
        count = len(self._rows)
        indices = np.searchsorted(self._rows, ids)
        if count:
            indices[self._rows[np.minimum(indices, count - 1)] != ids] = count
        return indices.astype(np.int32)


def _ftrl(spec: LearnerSpec, table_bits: int) -> FTRL:
    rates = spec.ftrl or FtrlRates()
    return FTRL(
        table_bits=table_bits,
        value_fields=spec.value_fields,
        alpha=rates.alpha,
        beta=rates.beta,
        l1=rates.l1,
        l2=rates.l2,
    )


def _require_linear(weights: Tensors, bits: int) -> None:
    """Raise `ValueError` unless `weights` are those of LR over 2 ** `bits` rows."""
    require_names(weights, {"rows", "pairs", "intercept"})
    rows = cast("npt.NDArray[np.int32]", weights["rows"])
    require_tensor("rows", rows, np.int32, (rows.size,))
    for name, shape in (("pairs", (len(rows), 2)), ("intercept", (2,))):
        require_tensor(name, weights[name], np.float64, shape)
        if (weights[name][..., 1] < 0).any():  # type: ignore[operator]
            raise ValueError(f"tensor {name!r} holds a negative sum of squares")
    if len(rows) and not (rows.min() >= 0 and rows.max() < 1 << bits):
        raise ValueError(f"tensor 'rows' has rows outside a table of 2^{bits} rows")
    if (rows[1:] <= rows[:-1]).any():
        raise ValueError("tensor 'rows' does not ascend")
