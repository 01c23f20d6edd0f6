"""LR that serves: its weights by row, the coordinates of an example, and the checks of its weights.

A served LR holds a weight of float32 for each row, a quarter of the memory of the pairs (z, n) that
learning needs (see `ftrl`), and takes no root. Its sums are in double precision. This module needs
no torch; `LinearLearner` learns.

>>> from stream_ctr.learn.spec import LearnerSpec
>>> spec = LearnerSpec(model="lr", fields=2, table_bits=8)
>>> weights = {"rows": np.array([1], np.int32), "pairs": np.array([[-3.0, 4.0]])}
>>> model = ServedLinear(spec, {**weights, "intercept": np.zeros(2)})
>>> model.predict(np.array([[1, 2], [2, 2]], np.int32)).round(4).tolist()
[0.0968, 0.0]
"""

from __future__ import annotations

import copy
from typing import cast

import numpy as np
import numpy.typing as npt
from msgspec import UNSET

from stream_ctr.learn.bit_kernels import Rows
from stream_ctr.learn.ftrl import FTRL, predict_served
from stream_ctr.learn.large_arrays import zeros
from stream_ctr.learn.pairs import PairHasher
from stream_ctr.learn.served_weights import (
    INTERCEPT,
    ROWS,
    VALUES,
    linear_weights,
    require_changes,
    served_linear_weights,
)
from stream_ctr.learn.shared_rows import Floats, Version
from stream_ctr.learn.spec import FtrlRates, LearnerSpec
from stream_ctr.learn.step import Ids, Values
from stream_ctr.learn.tensors import State, Tensors, require_names, require_tensor

_PAGE_BYTES = 4096
_WEIGHT_BYTES = 4


class Coordinates:
    """The rows that an example reads: those of its fields or, with `spec.pairs`, of their pairs.

    `bits` is the number of bits of such a row.
    """

    def __init__(self, spec: LearnerSpec) -> None:
        self._fields = spec.fields
        self._pairs = (
            None
            if spec.pairs is UNSET
            else PairHasher(
                spec.pairs.columns,
                table_bits=spec.pairs.table_bits,
                numbers=spec.pairs.numbers or None,
            )
        )
        self.bits = spec.table_bits if spec.pairs is UNSET else spec.pairs.table_bits

    def __call__(self, ids: Ids) -> Ids:
        """Return the rows [n, columns] of examples with `ids` [n, F + C]."""
        fields = np.ascontiguousarray(ids[:, : self._fields])
        return fields if self._pairs is None else self._pairs.rows(fields)


class ServedLinear:
    """LR that predicts with the `weights` of a snapshot, pairs or what serving reads of them.

    Rows that were not learned take no memory, so a number of rows that a manifest claims costs
    nothing. Those that were take at most a page of 4 KiB each. Raises `ValueError` if the weights
    are not those of the model, before any memory is taken for it.
    """

    def __init__(self, spec: LearnerSpec, weights: Tensors) -> None:
        self._coordinates = Coordinates(spec)
        if VALUES in weights:
            require_changes(spec, weights)
        else:
            require_linear(weights, self._coordinates.bits)
        rows, values, self._intercept = linear_weights(spec, cast(State, weights))
        size = 1 << self._coordinates.bits
        sparse = len(values) * _PAGE_BYTES < size * _WEIGHT_BYTES
        table = zeros(size, sparse=sparse)
        table[rows] = values
        self._rows = Version(table)
        self._spec = spec
        self._value_fields = np.array(spec.value_fields, np.int64)

    def predict(self, ids: Ids, values: Values | None = None) -> npt.NDArray[np.float64]:
        """Return the logits [n] of examples with `ids` [n, F + C] and `values` [n, V].

        Several threads may call it.
        """
        coordinates = self._coordinates(ids)
        table, overlay = self._rows.read()
        return predict_served(
            coordinates, values, table, overlay, self._intercept, self._value_fields
        )

    def updated(self, changes: Tensors) -> ServedLinear:
        """Return this model after `changes` (see `Predictor.updated`)."""
        require_changes(self._spec, changes)
        made = copy.copy(self)
        made._intercept = float(cast(State, changes)[INTERCEPT][0])
        made._rows = self._rows.updated(cast(Rows, changes[ROWS]), cast(Floats, changes[VALUES]))
        return made

    def absorb(self) -> bool:
        """Write what changed into the table, unless an older version is alive."""
        return self._rows.absorb()

    def served(self) -> State:
        """Return the served weights, copied (see `served_weights`)."""
        rows, values = self._rows.numbers()
        return served_linear_weights(rows, values, self._intercept)


def ftrl_of(spec: LearnerSpec, table_bits: int) -> FTRL:
    """Return an FTRL-Proximal with the rates of `spec` over 2 ** `table_bits` coordinates."""
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
