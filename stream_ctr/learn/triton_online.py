"""Triton kernels of the online rule on the GPU (see `online_step` for its formulas).

    compact      the distinct rows of the batch -> a table of their own
    score        one program an example of a sub-batch: its logit, and g = p - y
    step         one program a row of a sub-batch: the sum of its gradients, and its step;
                 one more program steps the intercept
    finite       are the rows of the compact table finite?
    write back   compact table -> table, unless the verdict says no

A sub-batch has 256 examples, so a row that all of them have is summed by one program in a few
turns. Sums are taken in an order that the ids alone decide, and one program steps a row, so two
runs are equal bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stream_ctr.learn.step import SUB_BATCH
from stream_ctr.learn.table import Table
from stream_ctr.learn.triton_kernels import RowShape, adagrad
from stream_ctr.models.terms import Terms

_TILE = 2048  # numbers that a program holds at once
_LINES = 32  # entries of a row that are added at once, at most


@triton.jit
def _compact(  # type: ignore[no-untyped-def]
    table,
    keys,
    order,
    number,
    local,
    keys_of,
    row_of,
    entries,
    FLOATS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LINES: tl.constexpr,
):
    index = tl.program_id(0) * LINES + tl.arange(0, LINES)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = index < entries
    key = tl.load(keys + index, mask=inside, other=0)
    above = tl.load(keys + index - 1, mask=inside & (index > 0), other=-1)
    row = tl.load(number + index, mask=inside, other=0)
    tl.store(row_of + tl.load(order + index, mask=inside, other=0), row, mask=inside)
    first = inside & (key != above)
    tl.store(keys_of + row, key, mask=first)
    mask = first[:, None] & (column < FLOATS)
    numbers = tl.load(table + key.to(tl.int64)[:, None] * FLOATS + column, mask=mask, other=0.0)
    tl.store(local + row.to(tl.int64)[:, None] * FLOATS + column, numbers, mask=mask)


@triton.jit
def _finite(  # type: ignore[no-untyped-def]
    number,
    local,
    broken,
    entries,
    FLOATS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LINES: tl.constexpr,
):
    row = tl.program_id(0) * LINES + tl.arange(0, LINES)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = row <= tl.load(number + entries - 1)
    numbers = tl.load(
        local + row.to(tl.int64)[:, None] * FLOATS + column,
        mask=inside[:, None] & (column < FLOATS),
        other=0.0,
    )
    # Zero times a number is not zero if the number is not finite.
    wrong = (numbers * 0.0 != 0.0).to(tl.int32)
    tl.store(broken + tl.program_id(0), tl.max(tl.max(wrong, axis=1), axis=0))


@triton.jit
def _write_back(  # type: ignore[no-untyped-def]
    table,
    number,
    local,
    keys_of,
    skip,
    entries,
    FLOATS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LINES: tl.constexpr,
):
    if tl.load(skip) != 0.0:
        return
    row = tl.program_id(0) * LINES + tl.arange(0, LINES)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = row <= tl.load(number + entries - 1)
    mask = inside[:, None] & (column < FLOATS)
    numbers = tl.load(local + row.to(tl.int64)[:, None] * FLOATS + column, mask=mask, other=0.0)
    key = tl.load(keys_of + row, mask=inside, other=0).to(tl.int64)
    tl.store(table + key[:, None] * FLOATS + column, numbers, mask=mask)


@triton.jit
def _score(  # type: ignore[no-untyped-def]
    local,
    row_of,
    values,
    labels,
    w,
    v,
    deep,
    slope_w,
    slope_v,
    intercept,
    example_count,
    logits,
    gradient,
    totals,
    fields,
    start,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    FLOATS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIELDS: tl.constexpr,
    SCALED: tl.constexpr,
    LINEAR: tl.constexpr,
    PAIRS: tl.constexpr,
    NETWORK: tl.constexpr,
    NETWORK_W: tl.constexpr,
):
    example = (start + tl.program_id(0)).to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    linear = column == WIDTH
    total = tl.zeros([COLUMNS], tl.float32)
    squares = tl.zeros([COLUMNS], tl.float32)
    moved = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, fields, FIELDS):
        field = first + tl.arange(0, FIELDS)
        inside = field < fields
        index = example * fields + field
        row = tl.load(row_of + index, mask=inside, other=0).to(tl.int64)
        x = tl.load(
            local + row[:, None] * FLOATS + column,
            mask=inside[:, None] & (column < FLOATS),
            other=0.0,
        )
        if SCALED:
            x *= tl.load(values + index, mask=inside, other=0.0)[:, None]
        total += tl.sum(x, axis=0)
        squares += tl.sum(x * x, axis=0)
        if NETWORK:
            address = index[:, None] * WIDTH + column
            mask = inside[:, None] & (column < WIDTH)
            slope = tl.load(slope_v + address, mask=mask, other=0.0)
            before = tl.load(v + address, mask=mask, other=0.0)
            if NETWORK_W:
                slope_of_w = tl.load(slope_w + index, mask=inside, other=0.0)[:, None]
                before_of_w = tl.load(w + index, mask=inside, other=0.0)[:, None]
                slope = tl.where(linear, slope_of_w, slope)
                before = tl.where(linear, before_of_w, before)
            moved += tl.sum(slope * tl.where(column <= WIDTH, x - before, 0.0), axis=0)
    column = tl.arange(0, COLUMNS)
    terms = moved
    if LINEAR:
        terms += tl.where(column == WIDTH, total, 0.0)
    if PAIRS:
        terms += tl.where(column < K, 0.5 * (total * total - squares), 0.0)
        tl.store(totals + example * K + column, total, mask=column < K)
    logit = tl.sum(terms.to(tl.float64), axis=0) + tl.load(intercept)
    if NETWORK:
        logit += tl.load(deep + example).to(tl.float64)
    g = 1.0 / (1.0 + tl.exp(-logit)) - tl.load(labels + example).to(tl.float64)
    learned = example < tl.load(example_count)
    tl.store(logits + example, logit)
    tl.store(gradient + example, tl.where(learned, g, 0.0).to(tl.float32))


@triton.jit
def _step_intercept(  # type: ignore[no-untyped-def]
    intercept, gradient, start, stop, rate, EXAMPLES: tl.constexpr
):
    example = start + tl.arange(0, EXAMPLES)
    g = tl.load(gradient + example, mask=example < stop, other=0.0).to(tl.float64)
    total = tl.sum(g, axis=0)
    w0 = tl.load(intercept)
    n0 = tl.load(intercept + 1) + total * total
    tl.debug_barrier()
    tl.store(intercept, w0 - rate / (1.0 + tl.sqrt(n0)) * total)
    tl.store(intercept + 1, n0)


@triton.jit
def _step_rows(  # type: ignore[no-untyped-def]
    local,
    entries,
    owners,
    values,
    slope_w,
    slope_v,
    gradient,
    totals,
    intercept,
    example_count,
    fields,
    start,
    stop,
    rate,
    beta,
    linear_rate,
    linear_beta,
    K: tl.constexpr,
    EMBEDDINGS: tl.constexpr,
    FLOATS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LINES: tl.constexpr,
    EXAMPLES: tl.constexpr,
    SCALED: tl.constexpr,
    LINEAR: tl.constexpr,
    PAIRS: tl.constexpr,
    NETWORK: tl.constexpr,
    NETWORK_W: tl.constexpr,
):
    WIDTH: tl.constexpr = EMBEDDINGS * K
    first = start * fields + tl.program_id(0)
    last = stop * fields
    if first == last:
        _step_intercept(intercept, gradient, start, stop, linear_rate, EXAMPLES)
        return
    owner = tl.load(owners + first)
    above = tl.load(owners + first - 1, mask=first > start * fields, other=-1)
    if owner == above:
        return
    examples = tl.load(example_count)
    column = tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([1, COLUMNS], tl.float32)
    own = tl.sum(tl.zeros([LINES], tl.float32), axis=0)
    more = True
    while more:
        index = first + tl.arange(0, LINES)
        same = tl.load(owners + index, mask=index < last, other=-1) == owner
        entry = tl.load(entries + index, mask=same, other=0).to(tl.int64)
        example = entry // fields
        learned = same & (example < examples)
        g = tl.load(gradient + example, mask=learned, other=0.0)
        if SCALED:
            x = tl.load(values + entry, mask=learned, other=0.0)
            g *= x
            own += tl.sum(g * x, axis=0)
        else:
            own += tl.sum(g, axis=0)
        slope = tl.zeros([LINES, COLUMNS], tl.float32)
        if NETWORK:
            slope += tl.load(
                slope_v + entry[:, None] * WIDTH + column,
                mask=learned[:, None] & (column < WIDTH),
                other=0.0,
            )
        if NETWORK_W:
            of_w = tl.load(slope_w + entry, mask=learned, other=0.0)[:, None]
            slope += tl.where(column == WIDTH, of_w, 0.0)
        if PAIRS:
            slope += tl.load(
                totals + example[:, None] * K + column,
                mask=learned[:, None] & (column < K),
                other=0.0,
            )
        if LINEAR:
            slope += tl.where(column == WIDTH, 1.0, 0.0)
        total += tl.sum(g[:, None] * slope, axis=0)[None, :]
        more = tl.min(same.to(tl.int32), axis=0) == 1
        first += LINES
    row = local + owner.to(tl.int64) * FLOATS
    if PAIRS:
        total -= own * tl.load(row + column, mask=column < K, other=0.0)
    adagrad(
        row + tl.zeros([1], tl.int32),
        total,
        tl.full([1], True, tl.int1),
        rate,
        beta,
        linear_rate,
        linear_beta,
        K=K,
        EMBEDDINGS=EMBEDDINGS,
        COLUMNS=COLUMNS,
    )


class OnlineRows:
    """The distinct rows of a batch of up to `examples` examples of `fields` ids, and their steps.

    `terms` are those of the model.
    """

    def __init__(self, table: Table, terms: Terms, *, examples: int, fields: int) -> None:
        self._table = table
        self._terms = terms
        self._fields = fields
        self._shape = RowShape.of_table(table)
        entries = examples * fields
        device = table.rows.device

        def indices(dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(entries, dtype=dtype, device=device)

        self._keys, self._order = indices(), indices(torch.int64)
        # Of each sorted entry the index of its row; entries by sub-batch and row, and their rows.
        self._number, self._entries, self._owners = indices(), indices(torch.int64), indices()
        self._keys_of, self._row_of = indices(), indices()
        self._rows = torch.zeros(entries, table.rows.shape[1], device=device)
        self._totals = torch.zeros(examples, table.embedding_dim, device=device)
        self._broken = torch.zeros(
            triton.cdiv(entries, self._copied_lines), dtype=torch.int32, device=device
        )

    @property
    def _copied_columns(self) -> int:
        columns: int = triton.next_power_of_2(self._shape.floats)
        return columns

    @property
    def _copied_lines(self) -> int:
        return max(_TILE // self._copied_columns, 1)

    def sort(self, ids: Tensor) -> None:
        """Group the entries of `ids` int32 [B, F] by sub-batch and row."""
        count = ids.numel()
        keys, order = self._keys[:count], self._order[:count]
        number, entries, owners = (
            memory[:count] for memory in (self._number, self._entries, self._owners)
        )
        torch.sort(ids.view(-1), stable=True, out=(keys, order))
        number.zero_()
        torch.ne(keys[1:], keys[:-1], out=number[1:])
        torch.cumsum(number, 0, dtype=torch.int32, out=number)
        if len(ids) <= SUB_BATCH:
            entries.copy_(order)
            owners.copy_(number)
            return
        sub_batch = (order // (SUB_BATCH * self._fields)).to(torch.int16)
        by_sub_batch = torch.sort(sub_batch, stable=True).indices
        torch.index_select(order, 0, by_sub_batch, out=entries)
        torch.index_select(number, 0, by_sub_batch, out=owners)

    def compact(self, count: int) -> None:
        """Copy the distinct rows of the first `count` sorted entries."""
        lines = self._copied_lines
        _compact[(triton.cdiv(count, lines),)](
            self._table.rows,
            self._keys,
            self._order,
            self._number,
            self._rows,
            self._keys_of,
            self._row_of,
            count,
            FLOATS=self._shape.floats,
            COLUMNS=self._copied_columns,
            LINES=lines,
            num_warps=4,
        )

    def broken(self, count: int) -> Tensor:
        """Return bool [], whether a copied row has a number that is not finite."""
        lines = self._copied_lines
        programs = triton.cdiv(count, lines)
        _finite[(programs,)](
            self._number,
            self._rows,
            self._broken,
            count,
            FLOATS=self._shape.floats,
            COLUMNS=self._copied_columns,
            LINES=lines,
            num_warps=4,
        )
        return self._broken[:programs].any()

    def write_back(self, count: int, skip: Tensor) -> None:
        """Copy the rows back to the table; with a `skip` other than zero nothing changes."""
        lines = self._copied_lines
        _write_back[(triton.cdiv(count, lines),)](
            self._table.rows,
            self._number,
            self._rows,
            self._keys_of,
            skip,
            count,
            FLOATS=self._shape.floats,
            COLUMNS=self._copied_columns,
            LINES=lines,
            num_warps=4,
        )

    def step(self, batch: OnlineBatch, intercept: Tensor) -> None:
        """Step the copied rows and `intercept` float64 [2], sub-batch by sub-batch.

        Writes the logits and gradients of `batch`.
        """
        rows = len(batch.labels)
        for start in range(0, rows, SUB_BATCH):
            stop = min(start + SUB_BATCH, rows)
            self._score(batch, intercept, start, stop)
            self._step_rows(batch, intercept, start, stop)

    def _constants(self, batch: OnlineBatch) -> dict[str, object]:
        terms = self._terms
        return {
            "K": self._table.embedding_dim,
            "FLOATS": self._shape.floats,
            "COLUMNS": self._shape.columns,
            "SCALED": batch.values is not None,
            "LINEAR": terms.linear,
            "PAIRS": terms.pairs,
            "NETWORK": terms.network,
            "NETWORK_W": terms.network_w,
        }

    def _score(self, batch: OnlineBatch, intercept: Tensor, start: int, stop: int) -> None:
        tile = min(triton.next_power_of_2(self._fields), max(_TILE // self._shape.columns, 1))
        _score[(stop - start,)](
            self._rows,
            self._row_of,
            batch.labels if batch.values is None else batch.values,
            batch.labels,
            batch.w,
            batch.v,
            batch.deep,
            batch.slope_w,
            batch.slope_v,
            intercept,
            batch.n,
            batch.logits,
            batch.gradient,
            self._totals,
            self._fields,
            start,
            WIDTH=self._table.width,
            FIELDS=tile,
            **self._constants(batch),
            num_warps=self._shape.warps(tile),
        )

    def _step_rows(self, batch: OnlineBatch, intercept: Tensor, start: int, stop: int) -> None:
        rates = self._table.rates
        lines = min(max(_TILE // self._shape.columns, 1), _LINES)
        _step_rows[((stop - start) * self._fields + 1,)](
            self._rows,
            self._entries,
            self._owners,
            batch.labels if batch.values is None else batch.values,
            batch.slope_w,
            batch.slope_v,
            batch.gradient,
            self._totals,
            intercept,
            batch.n,
            self._fields,
            start,
            stop,
            rates.learning_rate,
            rates.beta,
            rates.linear_learning_rate,
            rates.linear_beta,
            EMBEDDINGS=self._table.embeddings,
            LINES=lines,
            EXAMPLES=SUB_BATCH,
            **self._constants(batch),
            num_warps=self._shape.warps(lines),
        )


class OnlineBatch(NamedTuple):
    """The examples of a batch of B rows, on the device.

    `w` [B, F] and `v` [B, F, width] are its rows from before the batch, `deep` [B] the network's
    logits, and `slope_w`, `slope_v` their gradients. The step writes `logits` float64 [B] and
    `gradient` [B], p - y, which is 0 from example `n` on.
    """

    n: Tensor
    labels: Tensor
    values: Tensor | None
    w: Tensor
    v: Tensor
    deep: Tensor
    slope_w: Tensor
    slope_v: Tensor
    logits: Tensor
    gradient: Tensor
