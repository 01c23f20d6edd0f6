"""Compiled loops that read a table under an overlay (see `shared_rows`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numba
import numpy as np

from stream_ctr.learn.bit_kernels import rank_of
from stream_ctr.learn.table_kernels import LINE, prefetch

_AHEAD = 16  # rows that are prefetched, and before them their bits


@cache
def gather_overlaid(width: int) -> Callable[..., None]:
    """Return the compiled gather of `table_kernels.gather` for a table under an overlay.

    It reads `rows` [N, stride], or `values` [m, width + 1] for the rows whose bits are set in
    `words`; `ranks` counts the bits before each word. The other arguments are those of `gather`.
    """
    lines = -(-(width + 1) // LINE)

    @numba.njit(cache=True, nogil=True)
    def compiled(rows, values, words, ranks, ids, scale, w, v):  # type: ignore[no-untyped-def]
        n, fields = ids.shape
        flat_ids = ids.reshape(-1)
        flat_scale = scale.reshape(-1)
        flat_w = w.reshape(-1)
        flat_v = v.reshape(-1, width)
        flat_values = values.reshape(-1)
        all_lines = rows.reshape(-1, LINE)
        lines_per_row = rows.shape[1] // LINE
        last = n * fields - 1
        for i in range(n * fields):
            far = flat_ids[min(i + 2 * _AHEAD, last)] >> 6
            prefetch(words, far)
            prefetch(ranks, far)
            ahead = flat_ids[min(i + _AHEAD, last)]
            rank = rank_of(words, ranks, ahead)
            if rank >= 0:
                prefetch(flat_values, rank * (width + 1))
                prefetch(flat_values, rank * (width + 1) + width)
            else:
                for line in range(lines):
                    prefetch(all_lines, np.int64(ahead) * lines_per_row + line)
            row = flat_ids[i]
            rank = rank_of(words, ranks, row)
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
