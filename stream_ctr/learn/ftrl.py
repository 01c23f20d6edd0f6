"""LR: logistic regression with FTRL-Proximal, exactly Algorithm 1 of McMahan et al.

"Ad Click Prediction: a View from the Trenches", KDD 2013:

    w_i     = 0 if |z_i| <= l1, else -(z_i - sgn(z_i) l1) / ((beta + sqrt(n_i)) / alpha + l2)
    p       = sigmoid(x . w)                            predicted before the example is learned
    g_i     = (p - y) x_i
    sigma_i = (sqrt(n_i + g_i^2) - sqrt(n_i)) / alpha
    z_i    += g_i - sigma_i w_i,  n_i += g_i^2          for all i with x_i != 0

One compiled loop takes the examples in their order, so that nothing depends on where batches end. A
coordinate is a row of the table that the other models hash to; its pair (z, n) is a quarter of a
cache line. An example with a value that is not finite changes nothing.

>>> model = FTRL(table_bits=4, alpha=0.1, l2=0.0)
>>> ids, labels = np.array([[1, 2], [1, 3]], np.int32), np.array([1, 0], np.uint8)
>>> model.learn(ids, labels).round(4).tolist()  # w_1 = intercept = 0.5 / ((1 + 0.5) / 0.1)
[0.0, 0.0667]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from stream_ctr.learn.bit_kernels import Rows, rank_of
from stream_ctr.learn.spec import FtrlRates, LearnerSpec
from stream_ctr.learn.step import Ids, Labels, Values
from stream_ctr.learn.table_kernels import prefetch

if TYPE_CHECKING:
    from stream_ctr.learn.changes import Changes  # its threads need torch, and serving does not
    from stream_ctr.learn.shared_rows import Overlay

Floats = npt.NDArray[np.float64]
State = dict[str, npt.NDArray[Any]]

# Accumulators of the sum over the fields. A fixed number gives the same sum on every processor,
# whatever the width of its vector registers.
_ACCUMULATORS = 8
_AHEAD = 16  # rows that are prefetched


class _Rates(NamedTuple):
    """The rates of the algorithm; `rate` is 1 / alpha."""

    rate: float
    beta: float
    l1: float
    l2: float


class FTRL:
    """FTRL-Proximal over table rows as coordinates, each with value 1 or its multiplier.

    The intercept is a coordinate that is always 1. It has no l1 and no l2: the click rate is not
    shrunk towards one half. Two fields of an example that share a row are one coordinate, whose
    value is their sum. The default rates were close to the best of a grid on samples of Criteo and
    Avazu and on a simulated stream.

    Raises `ValueError` unless `alpha` and `beta` are positive and `l1` and `l2` at least 0.
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
        # With beta 0, a gradient so small that its square is 0 would make a weight infinite.
        if not (alpha > 0 and beta > 0):
            raise ValueError(f"alpha and beta must be positive, got {alpha} and {beta}")
        if not (l1 >= 0 and l2 >= 0):
            raise ValueError(f"l1 and l2 must be at least 0, got {l1} and {l2}")
        self._value_fields = np.array(value_fields, np.int64)
        self._rates = _Rates(1.0 / alpha, float(beta), float(l1), float(l2))
        self._table = np.zeros((1 << table_bits, 2))  # (z, n)
        self._intercept = np.zeros(2)
        # Memory for copies of the state; the system provides a page when it is first written.
        self._copied_rows = np.empty(len(self._table), np.int32)
        self._copied_pairs = np.empty_like(self._table)
        # Compile now rather than while learning waits for the first copy.
        _copy_learned(self._table[:0], self._copied_rows, self._copied_pairs)

    def learn(self, ids: Ids, labels: Labels, values: Values | None = None) -> Floats:
        """Predict each example, then learn it, and return the logits [n].

        `ids` [n, F], `labels` [n], `values` [n, V]. Each logit is from before the update. An
        example with a value that is not finite has the logit NaN and is not learned.
        """
        logits = np.empty(len(ids))
        _learn(
            ids,
            _array_of(values, len(ids)),
            labels,
            self._table,
            self._intercept,
            self._value_fields,
            self._rates,
            logits,
        )
        return logits

    def predict(self, ids: Ids, values: Values | None = None) -> Floats:
        """Return the logits [n] of `ids` [n, F] and `values` [n, V], NaN as in `learn`."""
        logits = np.empty(len(ids))
        _predict(
            ids,
            _array_of(values, len(ids)),
            self._table,
            self._intercept,
            self._value_fields,
            self._rates,
            logits,
        )
        return logits

    def state_dict(self, *, reuse: bool = False) -> State:
        """Return copies of `rows` int32 [m], `pairs` [m, 2] and `intercept` [2].

        `rows` are the rows that were learned and `pairs` their (z, n). With `reuse` the copies lie
        in memory that the next call with `reuse` overwrites.
        """
        rows = self._copied_rows if reuse else np.empty_like(self._copied_rows)
        pairs = self._copied_pairs if reuse else np.empty_like(self._copied_pairs)
        count = _copy_learned(self._table, rows, pairs)
        return {"rows": rows[:count], "pairs": pairs[:count], "intercept": self._intercept.copy()}

    def load_state_dict(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        # A new array takes memory only for the pages that are written.
        self._table = np.zeros(self._table.shape)
        self._table[state["rows"]] = state["pairs"]
        self._intercept[:] = state["intercept"]

    def weights_of(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Return the weights of `rows` uint32 [n]."""
        weights = np.empty(len(rows), np.float32)
        _weights_of(self._table, rows, self._rates, weights)
        return weights

    @property
    def intercept_weight(self) -> float:
        """The weight of the intercept."""
        return float(_intercept_weight(self._intercept, self._rates))

    def copy_to(self, other: FTRL, changes: Changes | None, *, since: int) -> int:
        """Make the state of `other` equal to this one; see `Changes.copy`.

        Without `changes`, all rows are copied.
        """
        other._intercept[:] = self._intercept
        if changes is None:
            other._table[:] = self._table
            return 0
        return changes.copy(self._table, other._table, since=since)


class RiverSemantics:
    """`FTRL` with the differences of River 0.26 (see `river_ftrl`), for a comparison with River.

    A weight is refreshed before the gradient is added to z, so that predictions use the weight from
    before the last update. A weight stays as it is where |z| <= l1. The intercept is plain SGD. And
    of fields that share a row the last one counts, as in a dict.
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
        self._rates = _Rates(1.0 / alpha, float(beta), float(l1), float(l2))
        self._table = np.zeros((1 << table_bits, 2))
        self._weights = np.zeros(1 << table_bits)
        self._intercept = np.zeros(1)
        self._intercept_learning_rate = intercept_learning_rate

    def learn(self, ids: Ids, labels: Labels, values: Values | None = None) -> Floats:
        """Predict each example, then learn it, and return the logits [n]."""
        logits = np.empty(len(ids))
        _learn_as_river(
            ids,
            _array_of(values, len(ids)),
            labels,
            self._table,
            self._weights,
            self._intercept,
            self._value_fields,
            self._rates,
            self._intercept_learning_rate,
            logits,
        )
        return logits


def served_values(
    spec: LearnerSpec, pairs: Floats, intercept: Floats
) -> tuple[npt.NDArray[np.float32], float]:
    """Return what serving reads of `pairs` [m, 2], their weights [m], and that of the intercept.

    >>> spec = LearnerSpec(model="lr", fields=2, ftrl=FtrlRates(l2=0.0))
    >>> weights, intercept = served_values(spec, np.array([[-3.0, 4.0]]), np.array([0.0, 1.0]))
    >>> weights.tolist(), intercept == 0.0
    ([0.10000000149011612], True)
    """
    given = spec.ftrl or FtrlRates()
    rates = _Rates(1.0 / given.alpha, given.beta, given.l1, given.l2)
    weights = np.empty(len(pairs), np.float32)
    _weights_of(pairs, np.arange(len(pairs), dtype=np.uint32), rates, weights)
    return weights, float(_intercept_weight(intercept, rates))


def predict_served(
    ids: Ids,
    values: Values | None,
    weights: npt.NDArray[np.float32],
    overlay: Overlay,
    intercept: float,
    value_fields: npt.NDArray[np.int64],
) -> Floats:
    """Return the logits [n] of `ids` [n, F] by the weights [N] of rows under an overlay.

    The sums are in double precision. A logit that is not finite is NaN, as in `FTRL.predict`.
    """
    logits = np.empty(len(ids))
    _predict_served(
        ids, _array_of(values, len(ids)), weights, overlay.values, overlay.words, overlay.ranks,
        intercept, value_fields, logits,
    )  # fmt: skip
    return logits


def _array_of(values: Values | None, n: int) -> Values:
    return np.empty((n, 0), np.float32) if values is None else values


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _learn(ids, values, labels, table, intercept, value_fields, rates, logits):  # type: ignore[no-untyped-def]
    examples, fields = ids.shape
    z, n, w, root, x = _scratch(fields)
    sums = np.empty(_ACCUMULATORS)
    z0, n0 = intercept
    for e in range(examples):
        if e + 1 < examples:
            for i in range(fields):
                prefetch(table, ids[e + 1, i])
        for v in range(len(value_fields)):
            x[value_fields[v]] = values[e, v]
        shared = _gather(ids[e], table, z, n, x, True)
        _weights(z, n, w, root, rates)
        root0 = math.sqrt(n0)
        w0 = -z0 / ((rates.beta + root0) * rates.rate)
        logit = _dot(w, x, sums) + w0
        if math.isfinite(logit):
            gradient = _gradient(logit, labels[e])
            _update(z, n, w, root, x, gradient, rates.rate)
            n0 += gradient * gradient
            z0 += gradient - (math.sqrt(n0) - root0) * rates.rate * w0
        else:
            logit = np.nan
        _scatter(ids[e], table, z, n)
        logits[e] = logit
        if shared:
            x[:fields] = 1.0
    intercept[0], intercept[1] = z0, n0


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _predict(ids, values, table, intercept, value_fields, rates, logits):  # type: ignore[no-untyped-def]
    examples, fields = ids.shape
    z, n, w, root, x = _scratch(fields)
    sums = np.empty(_ACCUMULATORS)
    w0 = _intercept_weight(intercept, rates)
    for e in range(examples):
        if e + 1 < examples:
            for i in range(fields):
                prefetch(table, ids[e + 1, i])
        for v in range(len(value_fields)):
            x[value_fields[v]] = values[e, v]
        for i in range(fields):
            z[i], n[i] = table[ids[e, i], 0], table[ids[e, i], 1]
        _weights(z, n, w, root, rates)
        logit = _dot(w, x, sums) + w0
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
    rates,
    intercept_learning_rate,
    logits,
):
    examples, fields = ids.shape
    z, n, w, root, x = _scratch(fields)
    stale = np.zeros_like(w)
    sums = np.empty(_ACCUMULATORS)
    for e in range(examples):
        for v in range(len(value_fields)):
            x[value_fields[v]] = values[e, v]
        shared = _gather(ids[e], table, z, n, x, False)
        for i in range(fields):
            stale[i] = weights[ids[e, i]]
        logits[e] = _dot(stale, x, sums) + intercept[0]
        gradient = _gradient(logits[e], labels[e])
        intercept[0] -= intercept_learning_rate * gradient
        _weights(z, n, w, root, rates)
        for i in range(fields):
            if abs(z[i]) <= rates.l1:
                w[i] = stale[i]
        _update(z, n, w, root, x, gradient, rates.rate)
        _scatter(ids[e], table, z, n)
        for i in range(fields - 1, -1, -1):
            weights[ids[e, i]] = w[i]
        if shared:
            x[:fields] = 1.0


@numba.njit(cache=True, nogil=True)
def _scratch(fields):  # type: ignore[no-untyped-def]
    """Return arrays for one example, padded with coordinates of value 0.

    The padding makes the length a multiple of `_ACCUMULATORS`, so that loops vectorise completely.
    """
    padded = (fields + _ACCUMULATORS - 1) // _ACCUMULATORS * _ACCUMULATORS
    x = np.zeros(padded)
    x[:fields] = 1.0
    return np.zeros(padded), np.zeros(padded), np.zeros(padded), np.zeros(padded), x


@numba.njit(cache=True, nogil=True)
def _gather(ids, table, z, n, x, add):  # type: ignore[no-untyped-def]
    """Read the pairs of an example's rows; return True if two fields share a row.

    While an example is learned, n of its rows holds -1 - the index of the first field with that
    row, which marks the row for a second field. The second field becomes a coordinate of value 0,
    and its value is added to the first one's, or replaces it unless `add`.
    """
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
    # Backwards, because of fields that share a row the first has its pair.
    for i in range(len(ids) - 1, -1, -1):
        row = ids[i]
        table[row, 0], table[row, 1] = z[i], n[i]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _weights(z, n, w, root, rates):  # type: ignore[no-untyped-def]
    for i in range(len(z)):
        root[i] = math.sqrt(n[i])
        w[i] = _weight(z[i], root[i], rates)


@numba.njit(inline="always")
def _weight(z, root, rates):  # type: ignore[no-untyped-def]
    beyond = abs(z) - rates.l1
    return (
        -math.copysign(beyond, z) / ((rates.beta + root) * rates.rate + rates.l2)
        if beyond > 0.0
        else 0.0
    )


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _intercept_weight(intercept, rates):  # type: ignore[no-untyped-def]
    return -intercept[0] / ((rates.beta + math.sqrt(intercept[1])) * rates.rate)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _weights_of(table, rows, rates, weights):  # type: ignore[no-untyped-def]
    count = len(rows)
    for i in range(count):
        prefetch(table, np.int64(rows[min(i + _AHEAD, count - 1)]))
        row = np.int64(rows[i])
        weights[i] = _weight(table[row, 0], math.sqrt(table[row, 1]), rates)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _predict_served(  # type: ignore[no-untyped-def]
    ids, values, weights, changed, words, ranks, intercept, value_fields, logits
):
    examples, fields = ids.shape
    w, _, _, _, x = _scratch(fields)
    sums = np.empty(_ACCUMULATORS)
    for e in range(examples):
        if e + 1 < examples:
            for i in range(fields):
                prefetch(weights, ids[e + 1, i])
                if len(words):
                    prefetch(words, ids[e + 1, i] >> 6)
        for v in range(len(value_fields)):
            x[value_fields[v]] = values[e, v]
        for i in range(fields):
            row = ids[e, i]
            rank = rank_of(words, ranks, row) if len(words) else -1
            w[i] = changed[rank] if rank >= 0 else weights[row]
        logit = _dot(w, x, sums) + intercept
        logits[e] = logit if math.isfinite(logit) else np.nan


@numba.njit(cache=True, nogil=True)
def _dot(w, x, sums):  # type: ignore[no-untyped-def]
    sums[:] = 0.0
    for i in range(0, len(w), _ACCUMULATORS):
        for j in range(_ACCUMULATORS):
            sums[j] += w[i + j] * x[i + j]
    return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]))


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _gradient(logit, label):  # type: ignore[no-untyped-def]
    """Return p - y without subtracting numbers that are nearly equal."""
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
        # The next row overwrites an entry that does not count: this avoids an unpredictable branch.
        rows[count] = row
        pairs[count, 0] = z
        pairs[count, 1] = n
        count += (z != 0.0) | (n != 0.0)
    return count
