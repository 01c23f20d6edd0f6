"""Compiled loops of the online rule on the CPU: the rows of a batch step in sub-batches.

The distinct rows of a batch are copied to a table of their own, which fits the cache. There they
step once for each sub-batch, on the whole logit. Only when every number is known to be finite are
they written back, so a batch that is refused leaves nothing behind.

All sums are taken in the order of the examples. They depend neither on threads nor on the way in
which a table is split.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from stream_ctr.learn.table_kernels import LINE, SortedIds, prefetch
from stream_ctr.models.terms import Terms

_AHEAD = 16  # rows that are prefetched

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int32]


class OnlineRates(NamedTuple):
    """The rates of one step, in float32, and that of the intercept, in float64."""

    rate: np.float32
    beta: np.float32
    linear_rate: np.float32
    linear_beta: np.float32
    intercept_rate: np.float64


class Groups(NamedTuple):
    """The entries (example, field) of a batch, grouped by sub-batch and row.

    `rows` int32 [U] are the distinct rows of the batch, in ascending order. `row_of` int32 [n, F]
    is the index of each entry's row among them. `entries` int32 [n F] holds the entries of the
    first sub-batch, then those of the next; within a sub-batch they are sorted by row, and for one
    row by position. `bounds` int64 [S + 1] are the bounds of the sub-batches in `entries`.
    """

    rows: Indices
    row_of: Indices
    entries: Indices
    bounds: npt.NDArray[np.int64]


def group(
    sorted_ids: SortedIds,
    shape: tuple[int, int],
    size: int,
    spare: Indices,
    *,
    row_of: Indices | None = None,
    first: int = 0,
    row_0: bool = False,
) -> Groups:
    """Group the entries of a batch of `shape` [n, F] into sub-batches of `size` examples.

    `spare` int32 [3, n F] is memory that the result lies in, apart from `row_of` where it is given.
    The sub-batches begin with example `first`; the entries of those before are in none. With
    `row_0`, for which `spare` needs one more column, the rows begin with row 0 in any case.

    >>> ids = SortedIds(np.array([3, 7, 7, 9], np.int32), np.array([2, 0, 3, 1], np.int32))
    >>> groups = group(ids, (2, 2), 1, np.empty((3, 4), np.int32))
    >>> [array.tolist() for array in groups]
    [[3, 7, 9], [[1, 2], [0, 1]], [0, 1, 2, 3], [0, 2, 4]]
    """
    n, fields = shape
    rows, places, entries = spare
    if row_of is None:
        row_of = places[: n * fields].reshape(shape)
    stepped = n - first
    bounds = np.minimum(np.arange(-(-stepped // size) + 1) * size, stepped) * fields
    distinct = _group(
        sorted_ids.keys, sorted_ids.order, fields * size, first * fields, row_0,
        bounds[:-1].copy(), rows, row_of.reshape(-1), entries,
    )  # fmt: skip
    return Groups(rows[:distinct], row_of, entries, bounds)


@numba.njit(cache=True, nogil=True)
def _group(  # type: ignore[no-untyped-def]
    keys, order, entries_per_sub_batch, first, row_0, next_index, rows, row_of, entries
):
    distinct = 0
    if row_0 and (len(keys) == 0 or keys[0] != 0):
        rows[0] = 0
        distinct = 1
    for i in range(len(keys)):
        if i == 0 or keys[i] != keys[i - 1]:
            rows[distinct] = keys[i]
            distinct += 1
        entry = order[i]
        row_of[entry] = distinct - 1
        if entry < first:
            continue
        sub_batch = (entry - first) // entries_per_sub_batch
        entries[next_index[sub_batch]] = entry
        next_index[sub_batch] += 1
    return distinct


@numba.njit(cache=True, nogil=True)
def copy_rows(table, rows, local, first, last):  # type: ignore[no-untyped-def]
    """Copy the rows with index in [first, last) from `table` [N, floats] to `local` [U, floats]."""
    lines = table.reshape(-1, LINE)
    lines_per_row = table.shape[1] // LINE
    for u in range(first, last):
        ahead = rows[min(u + _AHEAD, len(rows) - 1)] * lines_per_row
        for line in range(lines_per_row):
            prefetch(lines, ahead + line)
        for j in range(table.shape[1]):
            local[u, j] = table[rows[u], j]


@numba.njit(cache=True, nogil=True)
def write_rows(table, rows, local, first, last):  # type: ignore[no-untyped-def]
    """Copy the rows with index in [first, last) from `local` [U, floats] to `table` [N, floats]."""
    lines = table.reshape(-1, LINE)
    lines_per_row = table.shape[1] // LINE
    for u in range(first, last):
        ahead = rows[min(u + _AHEAD, len(rows) - 1)] * lines_per_row
        for line in range(lines_per_row):
            prefetch(lines, ahead + line)
        for j in range(table.shape[1]):
            table[rows[u], j] = local[u, j]


@cache
def scores(k: int, embeddings: int, terms: Terms) -> Callable[..., None]:
    """Return the compiled loop for the logits of consecutive examples.

    It takes `local`, `row_of`, `scale` [n, F] or empty, `v` [n, F, width] and `w` [n, F] as
    gathered before the batch, `deep` [n], `slope_v` [n, F, width] and `slope_w` [n, F] (the
    gradients of the network's logit `deep`), `w0`, `first` and `last`. For the examples in [first,
    last) it writes `logits` float64 [n] and, with pairs, the `sums` [n, k] of the first embeddings.

    The network's logit is that of the rows before the batch; to it comes the slope times what the
    rows have moved since.
    """
    width = embeddings * k
    linear, pairs, network, network_w = terms

    @numba.njit(cache=True, nogil=True, fastmath={"contract"})
    def compiled(  # type: ignore[no-untyped-def]
        local, row_of, scale, v, w, deep, slope_v, slope_w, w0, first, last, logits, sums
    ):
        fields = row_of.shape[1]
        total = np.empty(k, np.float32)
        square = np.empty(k, np.float32)
        moved = np.empty(width, np.float32)
        for e in range(first, last):
            for j in range(k):
                total[j] = np.float32(0.0)
                square[j] = np.float32(0.0)
            for j in range(width):
                moved[j] = np.float32(0.0)
            sum_w = np.float32(0.0)
            moved_w = np.float32(0.0)
            for f in range(fields):
                u = row_of[e, f]
                x = scale[e, f] if len(scale) else np.float32(1.0)
                if linear:
                    sum_w += x * local[u, width]
                if network_w:
                    moved_w += slope_w[e, f] * (x * local[u, width] - w[e, f])
                if network:
                    for j in range(width):
                        moved[j] += slope_v[e, f, j] * (x * local[u, j] - v[e, f, j])
                if pairs:
                    for j in range(k):
                        value = x * local[u, j]
                        total[j] += value
                        square[j] += value * value
            logit = np.float64(deep[e]) + w0 + np.float64(sum_w) + np.float64(moved_w)
            for j in range(width):
                logit += np.float64(moved[j])
            if pairs:
                product = np.float32(0.0)
                for j in range(k):
                    sums[e, j] = total[j]
                    product += total[j] * total[j] - square[j]
                logit += 0.5 * np.float64(product)
            logits[e] = logit

    return compiled


@cache
def step_rows(k: int, embeddings: int, terms: Terms) -> Callable[..., None]:
    """Return the compiled optimiser step of the rows of one sub-batch.

    It takes `local`, `row_of`, `scale`, `slope_v`, `slope_w`, `gradient` [n] (p - y), `sums`,
    `entries`, `first`, `last` and `rates`, and steps each row of the entries in [first, last) once,
    on the gradients summed in the order of the examples.
    """
    width = embeddings * k
    linear, pairs, network, network_w = terms

    @numba.njit(cache=True, nogil=True, fastmath={"contract"})
    def compiled(  # type: ignore[no-untyped-def]
        local, row_of, scale, slope_v, slope_w, gradient, sums, entries, first, last, rates
    ):
        fields = row_of.shape[1]
        flat_row = row_of.reshape(-1)
        flat_slope_v = slope_v.reshape(-1, width)
        flat_slope_w = slope_w.reshape(-1)
        flat_scale = scale.reshape(-1)
        total = np.empty(width, np.float32)
        i = first
        while i < last:
            u = flat_row[entries[i]]
            for j in range(width):
                total[j] = np.float32(0.0)
            total_w = np.float32(0.0)
            own = np.float32(0.0)
            while i < last and flat_row[entries[i]] == u:
                entry = entries[i]
                e = entry // fields
                x = flat_scale[entry] if len(flat_scale) else np.float32(1.0)
                g = gradient[e] * x
                if linear:
                    total_w += g
                if network_w:
                    total_w += g * flat_slope_w[entry]
                if network:
                    for j in range(width):
                        total[j] += g * flat_slope_v[entry, j]
                if pairs:
                    own += g * x
                    for j in range(k):
                        total[j] += g * sums[e, j]
                i += 1
            if pairs:
                for j in range(k):
                    total[j] -= own * local[u, j]
            for c in range(embeddings):
                square = np.float32(0.0)
                for j in range(c * k, c * k + k):
                    square += total[j] * total[j]
                n = local[u, width + 1 + c] + square / np.float32(k)
                local[u, width + 1 + c] = n
                rate = rates.rate / (rates.beta + np.sqrt(n))
                for j in range(c * k, c * k + k):
                    local[u, j] -= rate * total[j]
            if linear or network_w:
                n = local[u, width + 1 + embeddings] + total_w * total_w
                local[u, width + 1 + embeddings] = n
                local[u, width] -= rates.linear_rate / (rates.linear_beta + np.sqrt(n)) * total_w

    return compiled


@numba.njit(cache=True, nogil=True)
def gradients(logits, labels, first, last, gradient, intercept, rate):  # type: ignore[no-untyped-def]
    """Write p - y of the examples in [first, last), and step the `intercept` (w0, n0).

    Returns False, with nothing stepped, when a logit is not finite.
    """
    total = 0.0
    for e in range(first, last):
        if not math.isfinite(logits[e]):
            return False
        g = _sigmoid(logits[e]) - labels[e]
        gradient[e] = np.float32(g)
        total += g
    intercept[1] += total * total
    intercept[0] -= rate / (1.0 + math.sqrt(intercept[1])) * total
    return True


@numba.njit(inline="always")
def _sigmoid(logit):  # type: ignore[no-untyped-def]
    return (
        1.0 / (1.0 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1.0 + math.exp(logit))
    )


@numba.njit(cache=True, nogil=True)
def finite(rows, count):  # type: ignore[no-untyped-def]
    """Return True if the first `count` rows hold finite numbers only."""
    # Zero times a number is not zero if the number is not finite. The sum has no early exit, so
    # that the loop uses vector instructions.
    flat = rows[:count].reshape(-1)
    zero = np.float32(0.0)
    sums = np.zeros(LINE, np.float32)
    for i in range(0, len(flat), LINE):
        for j in range(LINE):
            sums[j] += flat[i + j] * zero
    return sums.sum() == zero
