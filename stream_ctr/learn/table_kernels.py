"""The embedding table's compiled loops on the CPU: gather, sort, and segment-reduce with the optimiser in place.

Two things make them fast. The width of the embeddings is a constant of the compiled code, so its loops become vector instructions. And
rows are asked for ahead of their use: they lie anywhere in tens of megabytes, and the processor cannot guess where.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

LINE = 16  # floats in 64 bytes
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # of Adam, here and for the dense part
_AHEAD = 16  # rows
_DIGIT = 11  # bits of a digit of the radix sort: its counts stay in the first-level cache


def used(k: int, embeddings: int, optimizer: str) -> int:
    """Floats of a row that are in use: V, w and the optimiser's state.

    >>> used(10, 1, "sgd"), used(10, 2, "adagrad"), used(10, 2, "adam")
    (11, 24, 63)
    """
    weights = embeddings * k + 1
    return weights + {"adagrad": embeddings + 1, "adam": 2 * weights, "sgd": 0}[optimizer]


@intrinsic
def prefetch(_typing, array, index):  # type: ignore[no-untyped-def]
    """Have the cache line at the beginning of array[index] on its way."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        view = context.make_array(signature.args[0])(context, builder, arguments[0])
        at = context.cast(builder, arguments[1], signature.args[1], types.intp)
        step = builder.mul(at, cgutils.unpack_tuple(builder, view.strides)[0])
        byte, number = ir.PointerType(ir.IntType(8)), ir.IntType(32)
        address = builder.inttoptr(
            builder.add(builder.ptrtoint(view.data, ir.IntType(64)), step), byte
        )
        called = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        read, keep, data = number(0), number(3), number(1)
        builder.call(
            cgutils.get_or_insert_function(builder.module, called, "llvm.prefetch.p0"),
            [address, read, keep, data],
        )
        return context.get_dummy_value()

    return types.void(array, index), generate


@cache
def gather(width: int) -> Callable[..., None]:
    """The compiled gather for `width` coordinates: `rows` [N, floats], `ids` [n, F] and `scale` [n, F] of these, empty where it is 1
    throughout -> `w` [n, F] and `v` [n, F, width]."""
    lines = -(-(width + 1) // LINE)

    @numba.njit(cache=True, nogil=True)
    def compiled(rows, ids, scale, w, v):  # type: ignore[no-untyped-def]
        n, fields = ids.shape
        flat_ids, flat_scale, flat_w, flat_v = (
            ids.reshape(-1),
            scale.reshape(-1),
            w.reshape(-1),
            v.reshape(-1, width),
        )
        whole, each = rows.reshape(-1, LINE), rows.shape[1] // LINE
        for i in range(n * fields):
            ahead = flat_ids[min(i + _AHEAD, n * fields - 1)] * each
            for line in range(lines):
                prefetch(whole, ahead + line)
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
    """The compiled optimiser step for `embeddings` of `k` coordinates, on the rows whose run in `keys` begins within [first, last).

    `keys` [n] are ids in ascending order and `order` [n] says where each was; `gw` and `gv` are the gradients of what was gathered. Those
    of one row are summed in the order of the batch, whoever does it, and multiplied by `times`: any split of the rows gives the same table.
    """
    width, lines = embeddings * k, -(-used(k, embeddings, optimizer) // LINE)
    adagrad, adam = optimizer == "adagrad", optimizer == "adam"

    @numba.njit(cache=True, nogil=True)
    def compiled(  # type: ignore[no-untyped-def]
        rows, keys, order, first, last, gw, gv, times, rate, beta, linear_rate, linear_beta
    ):
        n = len(keys)
        whole, each = rows.reshape(-1, LINE), rows.shape[1] // LINE
        total = np.empty(width + 1, np.float32)
        i = first
        while 0 < i < n and keys[i] == keys[i - 1]:  # that run belongs to whoever has its begin
            i += 1
        while i < last:
            key = keys[i]
            for j in range(width + 1):
                total[j] = np.float32(0.0)
            while i < n and keys[i] == key:
                ahead = min(i + _AHEAD, n - 1)
                for line in range(lines):
                    prefetch(whole, keys[ahead] * each + line)
                prefetch(gv, order[ahead])
                prefetch(gw, order[ahead])
                at = order[i]
                for j in range(width):
                    total[j] += gv[at, j]
                total[width] += gw[at]
                i += 1
            for j in range(width + 1):
                total[j] *= times
            if adagrad:
                _adagrad(rows, key, total, k, embeddings, rate, beta, linear_rate, linear_beta)
            elif adam:
                _adam(rows, key, total, width, rate, beta, linear_rate, linear_beta)
            else:
                for j in range(width):
                    rows[key, j] -= rate * total[j]
                rows[key, width] -= linear_rate * total[width]

    return compiled


@numba.njit(inline="always")
def _adagrad(rows, key, total, k, embeddings, rate, beta, linear_rate, linear_beta):  # type: ignore[no-untyped-def]
    w = embeddings * k
    for e in range(embeddings):
        square = np.float32(0.0)
        for j in range(e * k, e * k + k):
            square += total[j] * total[j]
        rows[key, w + 1 + e] += square / np.float32(k)
        step = rate / (beta + np.sqrt(rows[key, w + 1 + e]))
        for j in range(e * k, e * k + k):
            rows[key, j] -= step * total[j]
    rows[key, w + 1 + embeddings] += total[w] * total[w]
    rows[key, w] -= linear_rate / (linear_beta + np.sqrt(rows[key, w + 1 + embeddings])) * total[w]


@numba.njit(inline="always")
def _adam(rows, key, total, width, rate, beta, linear_rate, linear_beta):  # type: ignore[no-untyped-def]
    """Algorithm 1 of Kingma and Ba in the order of their section 2: the rates are corrected, and epsilon is not."""
    first, second = width + 1, 2 * (width + 1)
    for j in range(width + 1):
        rows[key, first + j] += (total[j] - rows[key, first + j]) * np.float32(1.0 - BETA1)
        rows[key, second + j] += (total[j] * total[j] - rows[key, second + j]) * np.float32(
            1.0 - BETA2
        )
        total[j] = rows[key, first + j] / (beta + np.sqrt(rows[key, second + j]))
    for j in range(width):
        rows[key, j] -= rate * total[j]
    rows[key, width] -= linear_rate * total[width]


def sort_ids(ids: Any, bits: int, keys: Any, order: Any, spare: Any) -> None:
    """Stable radix sort of `ids` int32 [n], of `bits` bits: ascending into `keys` [n], where each was into `order` [n]; `spare` [2, n]."""
    _sort(ids, -(-bits // _DIGIT), keys, order, spare[0], spare[1])


@numba.njit(cache=True, nogil=True)
def _sort(ids, passes, keys, order, spare_keys, spare_order):  # type: ignore[no-untyped-def]
    n, mask = len(ids), (1 << _DIGIT) - 1
    counts = np.zeros((passes, (1 << _DIGIT) + 1), np.int64)
    for i in range(n):
        for p in range(passes):
            counts[p, ((ids[i] >> (p * _DIGIT)) & mask) + 1] += 1
    for p in range(passes):
        for digit in range(1 << _DIGIT):
            counts[p, digit + 1] += counts[p, digit]
    from_keys, from_order, to_keys, to_order = spare_keys, spare_order, keys, order
    if passes % 2 == 0:  # so that the last pass ends in `keys` and `order`
        from_keys, from_order, to_keys, to_order = keys, order, spare_keys, spare_order
    for i in range(n):
        from_keys[i], from_order[i] = ids[i], i
    for p in range(passes):
        at, shift = counts[p], p * _DIGIT
        for i in range(n):
            digit = (from_keys[i] >> shift) & mask
            to = at[digit]
            at[digit] = to + 1
            to_keys[to], to_order[to] = from_keys[i], from_order[i]
        from_keys, from_order, to_keys, to_order = to_keys, to_order, from_keys, from_order
