"""Compiled loops of the embedding table on the CPU: gather, sort, and segment-reduce with update.

Two things make them fast. The width of the embeddings is a constant of the compiled code, so its
loops become vector instructions. And rows are prefetched: they lie at random places in tens of
megabytes, which the processor cannot predict.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

LINE = 16  # floats in a cache line of 64 bytes

# Of Adam, for the table and for the dense part.
BETA1 = 0.9
BETA2 = 0.999
EPSILON = 1e-8

_AHEAD = 16  # rows that are prefetched
_DIGIT = 11  # bits of a digit of the radix sort; its counts stay in the first-level cache


class SortedIds(NamedTuple):
    """Ids in ascending order, `keys` int32 [n], and the index that each had before, `order` [n]."""

    keys: npt.NDArray[np.int32]
    order: npt.NDArray[np.int32]


class StepRates(NamedTuple):
    """The rates of one step, in float32.

    `gradient_scale` multiplies the gradient of the mean loss. The other four are those of `Rates`.
    """

    gradient_scale: np.float32
    rate: np.float32
    beta: np.float32
    linear_rate: np.float32
    linear_beta: np.float32


def floats_in_use(k: int, embeddings: int, optimizer: str) -> int:
    """Return the number of floats of a row that hold V, w and the optimiser's state.

    >>> floats_in_use(10, 1, "online"), floats_in_use(10, 2, "online"), floats_in_use(10, 2, "adam")
    (13, 24, 63)
    """
    weights = embeddings * k + 1
    return weights + (2 * weights if optimizer == "adam" else embeddings + 1)


def row_floats(embedding_dim: int, *, embeddings: int = 1, optimizer: str = "adagrad") -> int:
    """Return the number of floats in a row.

    >>> row_floats(10), row_floats(10, embeddings=2), row_floats(10, optimizer="adam")
    (16, 32, 48)
    """
    return -(-floats_in_use(embedding_dim, embeddings, optimizer) // LINE) * LINE


@intrinsic
def prefetch(_typing, array, index):  # type: ignore[no-untyped-def]
    """Prefetch the cache line at the start of array[index]."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        view = context.make_array(signature.args[0])(context, builder, arguments[0])
        position = context.cast(builder, arguments[1], signature.args[1], types.intp)
        offset = builder.mul(position, cgutils.unpack_tuple(builder, view.strides)[0])
        byte = ir.PointerType(ir.IntType(8))
        number = ir.IntType(32)
        base = builder.ptrtoint(view.data, ir.IntType(64))
        address = builder.inttoptr(builder.add(base, offset), byte)
        signature_of_call = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        read, high_locality, data_cache = number(0), number(3), number(1)
        builder.call(
            cgutils.get_or_insert_function(builder.module, signature_of_call, "llvm.prefetch.p0"),
            [address, read, high_locality, data_cache],
        )
        return context.get_dummy_value()

    return types.void(array, index), generate


@cache
def gather(width: int) -> Callable[..., None]:
    """Return the compiled gather for rows of `width` coordinates.

    It reads `rows` [N, floats] at `ids` [n, F], multiplies by `scale` [n, F], which is empty where
    every factor is 1, and writes `w` [n, F] and `v` [n, F, width].
    """
    lines = -(-(width + 1) // LINE)

    @numba.njit(cache=True, nogil=True)
    def compiled(rows, ids, scale, w, v):  # type: ignore[no-untyped-def]
        n, fields = ids.shape
        flat_ids = ids.reshape(-1)
        flat_scale = scale.reshape(-1)
        flat_w = w.reshape(-1)
        flat_v = v.reshape(-1, width)
        all_lines = rows.reshape(-1, LINE)
        lines_per_row = rows.shape[1] // LINE
        for i in range(n * fields):
            ahead = flat_ids[min(i + _AHEAD, n * fields - 1)] * lines_per_row
            for line in range(lines):
                prefetch(all_lines, ahead + line)
            row = flat_ids[i]
            for j in range(width):
                flat_v[i, j] = rows[row, j]
            flat_w[i] = rows[row, width]
        for i in range(len(flat_scale)):
            for j in range(width):
                flat_v[i, j] *= flat_scale[i]
            flat_w[i] *= flat_scale[i]

    return compiled


@cache
def update(k: int, embeddings: int, optimizer: str) -> Callable[..., None]:
    """Return the compiled optimiser step for rows of `embeddings` embeddings of `k` coordinates.

    It takes `rows`, `sorted_ids`, `first`, `last`, `grad_w` [n], `grad_v` [n, width] and `rates`,
    and updates the rows whose run in the sorted ids starts within [first, last). The gradients of
    one row are summed in the order of the batch, so any split of the ids gives the same table.
    """
    width = embeddings * k
    lines = -(-floats_in_use(k, embeddings, optimizer) // LINE)
    adam = optimizer == "adam"

    @numba.njit(cache=True, nogil=True)
    def compiled(rows, sorted_ids, first, last, grad_w, grad_v, rates):  # type: ignore[no-untyped-def]
        keys = sorted_ids.keys
        order = sorted_ids.order
        n = len(keys)
        all_lines = rows.reshape(-1, LINE)
        lines_per_row = rows.shape[1] // LINE
        total = np.empty(width + 1, np.float32)
        i = first
        # A run that starts before `first` belongs to the range that contains its start.
        while 0 < i < n and keys[i] == keys[i - 1]:
            i += 1
        while i < last:
            key = keys[i]
            for j in range(width + 1):
                total[j] = np.float32(0.0)
            while i < n and keys[i] == key:
                ahead = min(i + _AHEAD, n - 1)
                for line in range(lines):
                    prefetch(all_lines, keys[ahead] * lines_per_row + line)
                prefetch(grad_v, order[ahead])
                prefetch(grad_w, order[ahead])
                index = order[i]
                for j in range(width):
                    total[j] += grad_v[index, j]
                total[width] += grad_w[index]
                i += 1
            for j in range(width + 1):
                total[j] *= rates.gradient_scale
            if adam:
                _adam(rows, key, total, width, rates)
            else:
                _adagrad(rows, key, total, k, embeddings, rates)

    return compiled


@numba.njit(inline="always")
def _adagrad(rows, key, total, k, embeddings, rates):  # type: ignore[no-untyped-def]
    w = embeddings * k
    for e in range(embeddings):
        square = np.float32(0.0)
        for j in range(e * k, e * k + k):
            square += total[j] * total[j]
        rows[key, w + 1 + e] += square / np.float32(k)
        step = rates.rate / (rates.beta + np.sqrt(rows[key, w + 1 + e]))
        for j in range(e * k, e * k + k):
            rows[key, j] -= step * total[j]
    n_w = w + 1 + embeddings
    rows[key, n_w] += total[w] * total[w]
    rows[key, w] -= rates.linear_rate / (rates.linear_beta + np.sqrt(rows[key, n_w])) * total[w]


@numba.njit(inline="always")
def _adam(rows, key, total, width, rates):  # type: ignore[no-untyped-def]
    """Algorithm 1 of Kingma and Ba in the order of their section 2.

    The rates are corrected for the moments' start at 0, and epsilon is not.
    """
    m = width + 1
    v = 2 * (width + 1)
    for j in range(width + 1):
        g = total[j]
        rows[key, m + j] += (g - rows[key, m + j]) * np.float32(1.0 - BETA1)
        rows[key, v + j] += (g * g - rows[key, v + j]) * np.float32(1.0 - BETA2)
        total[j] = rows[key, m + j] / (rates.beta + np.sqrt(rows[key, v + j]))
    for j in range(width):
        rows[key, j] -= rates.rate * total[j]
    rows[key, width] -= rates.linear_rate * total[width]


def sort_ids(ids: Any, bits: int, into: SortedIds, spare: Any) -> None:
    """Sort `ids` int32 [n], each of `bits` bits, into `into`; equal ids keep their order.

    `spare` int32 [2, n] is working memory of the radix sort.

    >>> sorted_ids = SortedIds(np.empty(4, np.int32), np.empty(4, np.int32))
    >>> sort_ids(np.array([7, 3, 7, 0], np.int32), 3, sorted_ids, np.empty((2, 4), np.int32))
    >>> sorted_ids.keys.tolist(), sorted_ids.order.tolist()
    ([0, 3, 7, 7], [3, 1, 0, 2])
    """
    _sort(ids, -(-bits // _DIGIT), into.keys, into.order, spare[0], spare[1])


@numba.njit(cache=True, nogil=True)
def _sort(ids, passes, keys, order, spare_keys, spare_order):  # type: ignore[no-untyped-def]
    n = len(ids)
    mask = (1 << _DIGIT) - 1
    counts = np.zeros((passes, (1 << _DIGIT) + 1), np.int64)
    for i in range(n):
        for p in range(passes):
            counts[p, ((ids[i] >> (p * _DIGIT)) & mask) + 1] += 1
    for p in range(passes):
        for digit in range(1 << _DIGIT):
            counts[p, digit + 1] += counts[p, digit]
    from_keys, from_order, to_keys, to_order = spare_keys, spare_order, keys, order
    if passes % 2 == 0:  # so that the last pass writes `keys` and `order`
        from_keys, from_order, to_keys, to_order = keys, order, spare_keys, spare_order
    for i in range(n):
        from_keys[i] = ids[i]
        from_order[i] = i
    for p in range(passes):
        next_index = counts[p]
        shift = p * _DIGIT
        for i in range(n):
            digit = (from_keys[i] >> shift) & mask
            to = next_index[digit]
            next_index[digit] = to + 1
            to_keys[to] = from_keys[i]
            to_order[to] = from_order[i]
        from_keys, from_order, to_keys, to_order = to_keys, to_order, from_keys, from_order


@cache
def copy_rows(floats: int) -> Callable[..., None]:
    """Return the compiled copy of the first `floats` numbers of rows at random places.

    It reads `rows` [N, stride] at `places` [n], from `first` to before `last`, and writes `values`
    [n, floats].
    """
    lines = -(-floats // LINE)

    @numba.njit(cache=True, nogil=True)
    def compiled(rows, places, first, last, values):  # type: ignore[no-untyped-def]
        all_lines = rows.reshape(-1, LINE)
        lines_per_row = rows.shape[1] // LINE
        for i in range(first, last):
            ahead = np.int64(places[min(i + _AHEAD, last - 1)]) * lines_per_row
            for line in range(lines):
                prefetch(all_lines, ahead + line)
            row = np.int64(places[i])
            for j in range(floats):
                values[i, j] = rows[row, j]

    return compiled


@cache
def put_rows(floats: int) -> Callable[..., None]:
    """Return the compiled opposite of `copy_rows`, which writes `values` [n, floats] to `rows`."""
    lines = -(-floats // LINE)

    @numba.njit(cache=True, nogil=True)
    def compiled(rows, places, first, last, values):  # type: ignore[no-untyped-def]
        all_lines = rows.reshape(-1, LINE)
        lines_per_row = rows.shape[1] // LINE
        for i in range(first, last):
            ahead = np.int64(places[min(i + _AHEAD, last - 1)]) * lines_per_row
            for line in range(lines):
                prefetch(all_lines, ahead + line)
            row = np.int64(places[i])
            for j in range(floats):
                rows[row, j] = values[i, j]

    return compiled
