"""LR that predicts: its table, the coordinates of an example, and the checks of its weights.

`LinearLearner` adds learning, which needs torch. This module does without it.

>>> from stream_ctr.learn.spec import LearnerSpec
>>> model = served_linear(LearnerSpec(model="lr", fields=2, table_bits=8))
>>> weights = {"rows": np.array([1], np.int32), "pairs": np.array([[-3.0, 4.0]])}
>>> model.load_weights({**weights, "intercept": np.zeros(2)})
>>> model.predict(np.array([[1, 2], [2, 2]], np.int32)).round(4).tolist()
[0.0968, 0.0]
"""

from __future__ import annotations

import threading
from typing import cast

import numpy as np
import numpy.typing as npt
from msgspec import UNSET, structs

from stream_ctr.learn.ftrl import FTRL
from stream_ctr.learn.pairs import PairHasher
from stream_ctr.learn.spec import FtrlRates, LearnerSpec
from stream_ctr.learn.step import Ids, Values
from stream_ctr.learn.tensors import State, Tensors, require_names, require_tensor


class LinearModel:
    """LR over the rows of fields or, with `spec.pairs`, of fields and pairs of fields."""

    def __init__(self, spec: LearnerSpec) -> None:
        self.fields = spec.fields
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

    def predict(self, ids: Ids, values: Values | None = None) -> npt.NDArray[np.floating]:
        """Return the logits [n] of examples with `ids` [n, F + C] and `values` [n, V]."""
        with self._lock:
            return self._ftrl.predict(self._coordinates(ids), values)

    def weights(self, *, reuse: bool = False) -> State:
        """Return the pairs (z, n), which are weights and optimiser in one."""
        with self._lock:
            return self._ftrl.state_dict(reuse=reuse)

    def load_weights(self, weights: Tensors) -> None:
        """Load `weights`. Raises `ValueError`, with nothing loaded, if they are not those of LR."""
        require_linear(weights, self._bits)
        with self._lock:
            self._ftrl.load_state_dict(weights)

    def _coordinates(self, ids: Ids) -> Ids:
        """Return the ids of the fields, without those of cross products, or of the pairs."""
        fields = np.ascontiguousarray(ids[:, : self.fields])
        return fields if self._pairs is None else self._pairs.rows(fields)


class ServedLinear(LinearModel):
    """LR over fields that was learned elsewhere.

    Its table holds only the rows that were learned, and one for all others. The number of rows that
    a manifest claims therefore costs no memory.
    """

    def __init__(self, spec: LearnerSpec) -> None:
        super().__init__(structs.replace(spec, table_bits=0))
        self._spec = spec
        self._bits = spec.table_bits
        self._rows = np.empty(0, np.int32)

    def load_weights(self, weights: Tensors) -> None:
        require_linear(weights, self._bits)
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


def served_linear(spec: LearnerSpec) -> LinearModel:
    """Return an LR that takes no more memory than its weights do; a table of pairs is not large."""
    return ServedLinear(spec) if spec.pairs is UNSET else LinearModel(spec)


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


def require_linear(weights: Tensors, bits: int) -> None:
    """Raise `ValueError` unless `weights` are those of LR over 2 ** `bits` rows.

    >>> require_linear({"rows": np.zeros(1, np.int32)}, 4)
    Traceback (most recent call last):
    ValueError: tensor 'intercept' is missing
    """
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
