"""The compiled gather of a served table, whose rows are V and w alone, under an overlay."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numba
import numpy as np

from stream_ctr.learn.bit_kernels import rank_of
from stream_ctr.learn.table_kernels import prefetch

_AHEAD = 16  # rows that are prefetched, and before them their bits


@cache
def gather(width: int) -> Callable[..., None]:
    """Return the compiled gather for rows of `width` coordinates and a first-order weight.

    It reads `rows` [N, width + 1], or `values` [m, width + 1] for the rows whose bits are set in
    `words`; `ranks` counts the bits before each word. Without an overlay `words` is empty. The
    other arguments, and the numbers that it writes, are those of `table_kernels.gather`.
    """
    floats = width + 1

    @numba.njit(cache=True, nogil=True)
    def compiled(rows, values, words, ranks, ids, scale, w, v):  # type: ignore[no-untyped-def]
        n, fields = ids.shape
        flat_ids = ids.reshape(-1)
        flat_scale = scale.reshape(-1)
        flat_w = w.reshape(-1)
        flat_v = v.reshape(-1, width)
        numbers = rows.reshape(-1)
        changed = values.reshape(-1)
        overlaid = len(words) > 0
        last = n * fields - 1
        for i in range(n * fields):
            ahead = np.int64(flat_ids[min(i + _AHEAD, last)])
            rank = -1
            if overlaid:
                far = flat_ids[min(i + 2 * _AHEAD, last)] >> 6
                prefetch(words, far)
                prefetch(ranks, far)
                rank = rank_of(words, ranks, ahead)
            # A row may lie in two cache lines.
            if rank >= 0:
                prefetch(changed, rank * floats)
                prefetch(changed, rank * floats + width)
            else:
                prefetch(numbers, ahead * floats)
                prefetch(numbers, ahead * floats + width)
            row = np.int64(flat_ids[i])
            rank = rank_of(words, ranks, row) if overlaid else -1
            if rank >= 0:
                for j in range(width):
                    flat_v[i, j] = values[rank, j]
                flat_w[i] = values[rank, width]
            else:
                for j in range(width):
                    flat_v[i, j] = rows[row, j]
                flat_w[i] = rows[row, width]
        for i in range(len(flat_scale)):
            for j in range(width):
                flat_v[i, j] *= flat_scale[i]
            flat_w[i] *= flat_scale[i]

    return compiled
