"""LR: logistic regression with FTRL-Proximal, exactly Algorithm 1 of McMahan et al., "Ad Click Prediction: a View from the Trenches", 2013.

    w_i     = 0 if |z_i| <= l1, else -(z_i - sgn(z_i) l1) / ((beta + sqrt(n_i)) / alpha + l2)
    p       = sigmoid(x . w)                                                predicted before it is learned
    g_i     = (p - y) x_i
    sigma_i = (sqrt(n_i + g_i^2) - sqrt(n_i)) / alpha
    z_i    += g_i - sigma_i w_i,  n_i += g_i^2                              for all i with x_i != 0

One compiled loop over the examples in their order, so that nothing depends on how they were cut into batches. A coordinate is a row of
the table that the other models hash to, its pair (z, n) a quarter of a cache line; what is not a number in the input changes nothing.

>>> model = FTRL(table_bits=4, alpha=0.1, l2=0.0)
>>> ids, labels = np.array([[1, 2], [1, 3]], np.int32), np.array([1, 0], np.uint8)
>>> model.learn(ids, labels).round(4).tolist()  # then w_1 = 0.5 / ((1 + 0.5) / 0.1), and the intercept likewise
[0.0, 0.0667]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from stream_ctr.learn.table_kernels import prefetch

Floats = npt.NDArray[np.float64]
State = dict[str, npt.NDArray[Any]]
_LANES = 8  # of the sum over fields, whatever the width of the processor's registers: on all of them it is the same number


class FTRL:
    """Over table rows as coordinates, each with value 1 or its multiplier, and an intercept: a coordinate that is always 1.

    The intercept has no l1 and no l2: how often anybody clicks is not shrunk towards one half. Two fields of an example that share a row
    are one coordinate, whose value is their sum. The default rates were close to the best of a grid on samples of Criteo and Avazu
    and on a simulated stream. Raises `ValueError` unless `alpha` and `beta` are positive and `l1` and `l2` at least 0.
    """

    def __init__(
        self,
        *,
        table_bits: int = 20,
        value_fields: Sequence[int] = (),
        alpha: float = 0.1,
        beta: float = 1.0,
        l1: float = 0.0,
        l2: float = 1.0,
    ) -> None:
        if not (
            alpha > 0 and beta > 0
        ):  # with beta 0 a gradient so small that its square is 0 would make a weight infinite
            raise ValueError(f"alpha and beta must be positive, got {alpha} and {beta}")
        if not (l1 >= 0 and l2 >= 0):
            raise ValueError(f"l1 and l2 must be at least 0, got {l1} and {l2}")
        self._value_fields = np.array(value_fields, np.int64)
        self._rates = (1.0 / alpha, beta, l1, l2)
        self._table = np.zeros((1 << table_bits, 2))  # (z, n)
        self._intercept = np.zeros(2)
        self._copied = (
            np.empty(len(self._table), np.int32),
            np.empty_like(self._table),
        )  # a page of it is taken only when it is filled
        _copy_learned(
            self._table[:0], *self._copied
        )  # compiled now, not while learning waits for the first copy

    def learn(
        self,
        ids: npt.NDArray[np.int32],
        labels: npt.NDArray[np.uint8],
        values: npt.NDArray[np.float32] | None = None,
    ) -> Floats:
        """Predict each example, then learn it: `ids` [n, F], `labels` [n], `values` [n, V] -> logits [n] from before each update.

        An example with a value that is not finite has the logit NaN and is not learned.
        """
        logits = np.empty(len(ids))
        values = np.empty((len(ids), 0), np.float32) if values is None else values
        _learn(
            ids,
            values,
            labels,
            self._table,
            self._intercept,
            self._value_fields,
            *self._rates,
            logits,
        )
        return logits

    def predict(
        self, ids: npt.NDArray[np.int32], values: npt.NDArray[np.float32] | None = None
    ) -> Floats:
        """`ids` [n, F], `values` [n, V] -> logits [n], NaN as in `learn`; learns nothing."""
        logits = np.empty(len(ids))
        values = np.empty((len(ids), 0), np.float32) if values is None else values
        _predict(
            ids, values, self._table, self._intercept, self._value_fields, *self._rates, logits
        )
        return logits

    def state_dict(self, *, reuse: bool = False) -> State:
        """Copies of the `rows` int32 [m] that were learned, their `pairs` (z, n) [m, 2] and that of the `intercept`; with `reuse` in memory
        that the next such call uses again."""
        rows, pairs = (
            self._copied
            if reuse
            else (np.empty_like(self._copied[0]), np.empty_like(self._copied[1]))
        )
        count = _copy_learned(self._table, rows, pairs)
        return {"rows": rows[:count], "pairs": pairs[:count], "intercept": self._intercept.copy()}

    def load_state_dict(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        self._table = np.zeros(self._table.shape)  # of which memory is taken for what is filled
        self._table[state["rows"]] = state["pairs"]
        self._intercept[:] = state["intercept"]


class RiverSemantics:
    """`FTRL` with what River 0.26 does differently (see `river_ftrl`), to be compared with River to the last digits.

    A weight is refreshed before the gradient is added to z, so that predictions use the one of the update before; it stays as it was
    where |z| <= l1; the intercept is plain SGD; and of fields that share a row the last counts, as in a dict.
    """

    def __init__(
        self,
        *,
        table_bits: int = 20,
        value_fields: Sequence[int] = (),
        alpha: float = 0.05,
        beta: float = 1.0,
        l1: float = 0.0,
        l2: float = 1.0,
        intercept_learning_rate: float = 0.01,
    ) -> None:
        self._value_fields = np.array(value_fields, np.int64)
        self._rates = (1.0 / alpha, beta, l1, l2)
        self._table = np.zeros((1 << table_bits, 2))
        self._weights = np.zeros(1 << table_bits)
        self._intercept = np.zeros(1)
        self._intercept_learning_rate = intercept_learning_rate

    def learn(
        self,
        ids: npt.NDArray[np.int32],
        labels: npt.NDArray[np.uint8],
        values: npt.NDArray[np.float32] | None = None,
    ) -> Floats:
        logits = np.empty(len(ids))
        values = np.empty((len(ids), 0), np.float32) if values is None else values
        _learn_as_river(
            ids, values, labels, self._table, self._weights, self._intercept, self._value_fields, *self._rates,
            self._intercept_learning_rate, logits,
        )  # fmt: skip
        return logits


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _learn(ids, values, labels, table, intercept, value_fields, rate, beta, l1, l2, logits):  # type: ignore[no-untyped-def]
    examples, fields = ids.shape
    z, n, w, root, x = _scratch(fields)
    lanes = np.empty(_LANES)
    z0, n0 = intercept
    for e in range(examples):
        if e + 1 < examples:
            for i in range(fields):
                prefetch(table, ids[e + 1, i])
        for v in range(len(value_fields)):
            x[value_fields[v]] = values[e, v]
        shared = _gather(ids[e], table, z, n, x, True)
        _weights(z, n, w, root, rate, beta, l1, l2)
        root0 = math.sqrt(n0)
        w0 = -z0 / ((beta + root0) * rate)
        logit = _dot(w, x, lanes) + w0
        if math.isfinite(logit):
            gradient = _gradient(logit, labels[e])
            _update(z, n, w, root, x, gradient, rate)
            n0 += gradient * gradient
            z0 += gradient - (math.sqrt(n0) - root0) * rate * w0
        else:
            logit = np.nan
        _scatter(ids[e], table, z, n)
        logits[e] = logit
        if shared:
            x[:fields] = 1.0
    intercept[0], intercept[1] = z0, n0


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _predict(ids, values, table, intercept, value_fields, rate, beta, l1, l2, logits):  # type: ignore[no-untyped-def]
    examples, fields = ids.shape
    z, n, w, root, x = _scratch(fields)
    lanes = np.empty(_LANES)
    w0 = -intercept[0] / ((beta + math.sqrt(intercept[1])) * rate)
    for e in range(examples):
        if e + 1 < examples:
            for i in range(fields):
                prefetch(table, ids[e + 1, i])
        for v in range(len(value_fields)):
            x[value_fields[v]] = values[e, v]
        for i in range(fields):
            z[i], n[i] = table[ids[e, i], 0], table[ids[e, i], 1]
        _weights(z, n, w, root, rate, beta, l1, l2)
        logit = _dot(w, x, lanes) + w0
        logits[e] = logit if math.isfinite(logit) else np.nan


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _learn_as_river(  # type: ignore[no-untyped-def]
    ids,
    values,
    labels,
    table,
    weights,
    intercept,
    value_fields,
    rate,
    beta,
    l1,
    l2,
    intercept_learning_rate,
    logits,
):
    examples, fields = ids.shape
    z, n, w, root, x = _scratch(fields)
    stale, lanes = np.zeros_like(w), np.empty(_LANES)
    for e in range(examples):
        for v in range(len(value_fields)):
            x[value_fields[v]] = values[e, v]
        shared = _gather(ids[e], table, z, n, x, False)
        for i in range(fields):
            stale[i] = weights[ids[e, i]]
        logits[e] = _dot(stale, x, lanes) + intercept[0]
        gradient = _gradient(logits[e], labels[e])
        intercept[0] -= intercept_learning_rate * gradient
        _weights(z, n, w, root, rate, beta, l1, l2)
        for i in range(fields):
            if abs(z[i]) <= l1:
                w[i] = stale[i]
        _update(z, n, w, root, x, gradient, rate)
        _scatter(ids[e], table, z, n)
        for i in range(fields - 1, -1, -1):
            weights[ids[e, i]] = w[i]
        if shared:
            x[:fields] = 1.0


@numba.njit(cache=True, nogil=True)
def _scratch(fields):  # type: ignore[no-untyped-def]
    """Of one example, padded with coordinates whose value is 0 to whole lanes: no loop has a rest that is not vectorised."""
    padded = (fields + _LANES - 1) // _LANES * _LANES
    x = np.zeros(padded)
    x[:fields] = 1.0
    return np.zeros(padded), np.zeros(padded), np.zeros(padded), np.zeros(padded), x


@numba.njit(cache=True, nogil=True)
def _gather(ids, table, z, n, x, add):  # type: ignore[no-untyped-def]
    """The pairs of an example's rows. While it is learned, n of a row is -1 - the first field that has it, by which a second one knows:
    it becomes a coordinate of value 0, and its value goes to the first (is added, or replaces). Whether there was one."""
    shared = False
    for i in range(len(ids)):
        row = ids[i]
        found = table[row, 1]
        if found >= 0.0:
            z[i], n[i] = table[row, 0], found
            table[row, 1] = -1.0 - i
        else:
            first = int(-found) - 1
            x[first] = x[first] + x[i] if add else x[i]
            x[i] = z[i] = n[i] = 0.0
            shared = True
    return shared


@numba.njit(cache=True, nogil=True)
def _scatter(ids, table, z, n):  # type: ignore[no-untyped-def]
    for i in range(
        len(ids) - 1, -1, -1
    ):  # backwards: of fields that share a row the first has its pair
        row = ids[i]
        table[row, 0], table[row, 1] = z[i], n[i]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _weights(z, n, w, root, rate, beta, l1, l2):  # type: ignore[no-untyped-def]
    for i in range(len(z)):
        root[i] = math.sqrt(n[i])
        beyond = abs(z[i]) - l1
        w[i] = (
            -math.copysign(beyond, z[i]) / ((beta + root[i]) * rate + l2) if beyond > 0.0 else 0.0
        )


@numba.njit(cache=True, nogil=True)
def _dot(w, x, lanes):  # type: ignore[no-untyped-def]
    lanes[:] = 0.0
    for i in range(0, len(w), _LANES):
        for j in range(_LANES):
            lanes[j] += w[i + j] * x[i + j]
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + (
        (lanes[1] + lanes[5]) + (lanes[3] + lanes[7])
    )


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _gradient(logit, label):  # type: ignore[no-untyped-def]
    """p - y, of a coordinate whose value is 1; without a difference of numbers that are nearly equal."""
    return -1.0 / (1.0 + math.exp(logit)) if label == 1 else 1.0 / (1.0 + math.exp(-logit))


@numba.njit(cache=True, nogil=True)
def _update(z, n, w, root, x, gradient, rate):  # type: ignore[no-untyped-def]
    for i in range(len(z)):
        g = gradient * x[i]
        n[i] += g * g
        z[i] += g - (math.sqrt(n[i]) - root[i]) * rate * w[i]


@numba.njit(cache=True, nogil=True)
def _copy_learned(table, rows, pairs):  # type: ignore[no-untyped-def]
    count = 0
    for row in range(len(table)):
        z, n = table[row, 0], table[row, 1]
        rows[count], pairs[count, 0], pairs[count, 1] = (
            row,
            z,
            n,
        )  # the next one overwrites it: no branch, which nobody could predict
        count += (z != 0.0) | (n != 0.0)
    return count
