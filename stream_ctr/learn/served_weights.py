"""The weights that serving reads of a model, their digest, and the checks of changes to it.

    a network    values [N, width + 1]    V and w of each row
                 dense.*                  the parameters of the dense part
                 intercept [1]            w_0 of the online rule, float32
    LR           rows [m], values [m]     the rows whose weight is not 0, and their weights
                 intercept [1]            the weight of the intercept, float64
    a blend      omega, u [M + 1]         as `Blend.weights`

The values are float32 and the rows uint32. State of an optimiser is no part of it. Changes have the
same arrays, with the rows that changed and all of the rest.

>>> spec = LearnerSpec(model="lr", fields=2, table_bits=8)
>>> pairs = np.array([[0.0, 2.0], [-3.0, 4.0]])
>>> weights = {"rows": np.array([1, 7], np.int32), "pairs": pairs, "intercept": np.zeros(2)}
>>> served = served_weights(spec, weights)
>>> served["rows"].tolist(), served["values"].round(4).tolist()
([7], [0.09679999947547913])
>>> serving_sha256(served)[:8]
'b1e56422'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from msgspec import UNSET

from stream_ctr.learn.array_digests import ArrayDigest, tensors_sha256
from stream_ctr.learn.bit_kernels import Rows
from stream_ctr.learn.dense_part import DENSE
from stream_ctr.learn.ftrl import served_values
from stream_ctr.learn.network_shape import network_shape
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.tensors import State, Tensors, require_names, require_tensor

ROWS = "rows"
VALUES = "values"
INTERCEPT = "intercept"


def served_weights(spec: LearnerSpec, weights: Tensors) -> State:
    """Return what serving reads of a model, from its `weights` in a snapshot.

    `weights` are those that the model accepts. Arrays may be views of them.
    """
    found = cast(State, weights)
    if spec.model == "lr":
        return served_linear_weights(*linear_weights(spec, found))
    width = network_shape(spec).width
    return {VALUES: found["table"][:, : width + 1], **served_parameters(found)}


def linear_weights(
    spec: LearnerSpec, weights: State
) -> tuple[Rows, npt.NDArray[np.float32], float]:
    """Return the rows of LR in a snapshot, their weights, and that of the intercept.

    Its `weights` there are the pairs (z, n) of each row, or, in a snapshot that only serves (see
    `snapshots.compaction`), what serving reads of them.
    """
    if VALUES in weights:
        return weights[ROWS], weights[VALUES], float(weights[INTERCEPT][0])
    values, intercept = served_values(spec, weights["pairs"], weights[INTERCEPT])
    return weights[ROWS].astype(np.uint32), values, intercept


def served_linear_weights(rows: Rows, values: npt.NDArray[np.float32], intercept: float) -> State:
    """Return the served weights of LR: those `values` [m] of `rows` [m] that are not 0."""
    kept = values != 0
    return {ROWS: rows[kept], VALUES: values[kept], INTERCEPT: np.array([intercept])}


def served_parameters(weights: Tensors) -> State:
    """Return the dense parameters among the weights of a network, and w_0 if it has one."""
    parameters = {name: array for name, array in weights.items() if name.startswith(DENSE)}
    if INTERCEPT in weights:
        parameters[INTERCEPT] = weights[INTERCEPT][:1].astype(np.float32)
    return cast(State, parameters)


def serving_sha256(served: Mapping[str, npt.NDArray[Any] | ArrayDigest]) -> str:
    """Return the SHA-256 over name, type, shape and values of served weights.

    Two digests are equal if every bit that serving reads is. An array may be given by its digest.
    """
    return tensors_sha256(served)


def require_changes(spec: LearnerSpec, changes: Tensors) -> None:
    """Raise `ValueError` unless `changes` are those of the model that `spec` describes.

    Names, types and shapes must be those of the model. The rows must ascend and lie in its table,
    and all numbers be finite. It takes no memory for a model, and raises `ConfigError` for one that
    this process does not know.

    >>> spec = LearnerSpec(model="lr", fields=2, table_bits=8)
    >>> values, intercept = np.ones(1, np.float32), np.zeros(1)
    >>> rows = np.array([256], np.uint32)
    >>> require_changes(spec, {"rows": rows, "values": values, "intercept": intercept})
    Traceback (most recent call last):
    ValueError: tensor 'rows' has rows outside a table of 2^8 rows
    """
    linear = spec.model == "lr"
    dense = {} if linear else network_shape(spec).dense
    constant = linear or spec.table_optimizer == "online"
    require_names(changes, {ROWS, VALUES, *dense, *([INTERCEPT] if constant else [])})
    bits = spec.table_bits if spec.pairs is UNSET else spec.pairs.table_bits
    require_rows(cast(Rows, changes[ROWS]), bits)
    count = len(changes[ROWS])
    shape = (count,) if linear else (count, network_shape(spec).width + 1)
    require_tensor(VALUES, changes[VALUES], np.float32, shape)
    for name, expected in dense.items():
        require_tensor(name, changes[name], np.float32, expected)
    if constant:
        dtype = np.float64 if linear else np.float32
        require_tensor(INTERCEPT, changes[INTERCEPT], dtype, (1,))


def require_rows(rows: Rows, bits: int) -> None:
    """Raise `ValueError` unless `rows` are uint32 [n], ascend and lie in a table of 2^bits rows."""
    require_tensor(ROWS, rows, np.uint32, (rows.size,))
    if (rows[1:] <= rows[:-1]).any():
        raise ValueError("tensor 'rows' does not ascend")
    if len(rows) and int(rows[-1]) >= 1 << bits:
        raise ValueError(f"tensor 'rows' has rows outside a table of 2^{bits} rows")
