"""Triton kernels of the embedding table on the GPU: gather, and segment-reduce with update.

    gather     one program an example: its rows, multiplied by their values, -> w, v and the sums
               over the fields of v that an FM needs
    update     The ids are sorted. A program takes a chunk of them, sums the gradients of each row
               in it, and updates the rows whose ids all lie in this chunk. A row in several chunks
               gets one sum from each. A second launch has one program for each such row, which
               adds `_CHUNKS` sums at a time and updates the row.

Every sum is taken in an order that the sorted ids alone decide, and one program updates each row.
So two runs are equal bit for bit, and a hot row causes no queue, neither of atomic additions nor of
a single thread. With TRITON_INTERPRET=1 in the environment before this module is imported, all of
it runs on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stream_ctr.learn.table import Table
from stream_ctr.learn.table_kernels import BETA1, BETA2
from stream_ctr.models import FieldSums

_CHUNKS = 64  # sums that a program of `_join` adds at once
_TILE = 2048  # numbers that a program of `gather` holds at once
_MAX_CHUNK = 32  # ids
_CHUNK_FLOATS = 16384  # 64 KiB
_LEAST_PRODUCT = 16  # rows and columns of the smallest matrix product
_FLOATS_PER_WARP = 512
_MAX_WARPS = 8
_DECAY1 = tl.constexpr(1.0 - BETA1)
_DECAY2 = tl.constexpr(1.0 - BETA2)


@triton.jit
def _gather(  # type: ignore[no-untyped-def]
    rows,
    ids,
    values,
    w,
    v,
    total,
    pairs,
    fields,
    WIDTH: tl.constexpr,
    FLOATS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIELDS: tl.constexpr,
    SCALED: tl.constexpr,
):
    example = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    sums = tl.zeros([COLUMNS], tl.float32)
    squares = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, fields, FIELDS):
        field = first + tl.arange(0, FIELDS)
        inside = field < fields
        index = example * fields + field
        row = tl.load(ids + index, mask=inside, other=0).to(tl.int64)
        # The state behind the weights is read too: whole lines take the fewest loads.
        x = tl.load(
            rows + row[:, None] * FLOATS + column,
            mask=inside[:, None] & (column < FLOATS),
            other=0.0,
        )
        if SCALED:
            x *= tl.load(values + index, mask=inside, other=0.0)[:, None]
        tl.store(v + index[:, None] * WIDTH + column, x, mask=inside[:, None] & (column < WIDTH))
        tl.store(w + index[:, None] + column * 0, x, mask=inside[:, None] & (column == WIDTH))
        sums += tl.sum(x, axis=0)
        squares += tl.sum(x * x, axis=0)
    column = tl.arange(0, COLUMNS)
    tl.store(total + example * WIDTH + column, sums, mask=column < WIDTH)
    tl.store(
        pairs + example, 0.5 * tl.sum(tl.where(column < WIDTH, sums * sums - squares, 0.0), axis=0)
    )


@triton.jit
def adagrad(  # type: ignore[no-untyped-def]
    row,
    total,
    chosen,
    rate,
    beta,
    linear_rate,
    linear_beta,
    K: tl.constexpr,
    EMBEDDINGS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Update the rows that begin at the pointers `row` [n] where `chosen` [n].

    `total` [n, COLUMNS] are their gradients of the summed loss, of V and, behind it, of w.
    """
    WIDTH: tl.constexpr = EMBEDDINGS * K
    STATES: tl.constexpr = triton.next_power_of_2(EMBEDDINGS + 1)
    column = tl.arange(0, COLUMNS)[None, :]
    state = tl.arange(0, STATES)[None, :]
    owner = column // K  # of each column the embedding, and behind them w
    squares = tl.zeros([total.shape[0], STATES], tl.float32)
    for e in tl.static_range(EMBEDDINGS + 1):
        square = tl.sum(tl.where((owner == e) & (column <= WIDTH), total * total, 0.0), axis=1)
        squares = tl.where(state == e, square[:, None] / (K if e < EMBEDDINGS else 1), squares)
    inside = chosen[:, None] & (column <= WIDTH)
    address = row[:, None] + column
    n_address = row[:, None] + WIDTH + 1 + state
    n_inside = chosen[:, None] & (state <= EMBEDDINGS)
    weight = tl.load(address, mask=inside, other=0.0)
    n = tl.load(n_address, mask=n_inside, other=0.0) + squares
    rates = tl.zeros([total.shape[0], COLUMNS], tl.float32)
    for e in tl.static_range(EMBEDDINGS + 1):
        root = tl.sqrt(tl.sum(tl.where(state == e, n, 0.0), axis=1))
        if e < EMBEDDINGS:
            rates = tl.where(owner == e, (rate / (beta + root))[:, None], rates)
        else:
            rates = tl.where(owner == e, (linear_rate / (linear_beta + root))[:, None], rates)
    tl.debug_barrier()  # every warp has read n before one of them writes it
    tl.store(n_address, n, mask=n_inside)
    tl.store(address, weight - rates * total, mask=inside)


@triton.jit
def _adam(  # type: ignore[no-untyped-def]
    row,
    mean,
    chosen,
    correction,
    rate,
    beta,
    linear_rate,
    linear_beta,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Update the rows that begin at the pointers `row` [n] where `chosen` [n].

    `mean` [n, COLUMNS] are their gradients of the mean loss, of V and, behind it, of w.
    """
    column = tl.arange(0, COLUMNS)[None, :]
    linear = column == WIDTH
    inside = chosen[:, None] & (column <= WIDTH)
    address = row[:, None] + column
    weight = tl.load(address, mask=inside, other=0.0)
    m = tl.load(address + WIDTH + 1, mask=inside, other=0.0)
    v = tl.load(address + 2 * (WIDTH + 1), mask=inside, other=0.0)
    m += (mean - m) * _DECAY1
    v += (mean * mean - v) * _DECAY2
    rates = tl.where(linear, linear_rate, rate) * tl.load(correction)
    step = rates * (m / (tl.where(linear, linear_beta, beta) + tl.sqrt(v)))
    tl.debug_barrier()
    tl.store(address + WIDTH + 1, m, mask=inside)
    tl.store(address + 2 * (WIDTH + 1), v, mask=inside)
    tl.store(address, weight - step, mask=inside)


@triton.jit
def _step(  # type: ignore[no-untyped-def]
    rows,
    key,
    mean,
    examples,
    chosen,
    correction,
    rate,
    beta,
    linear_rate,
    linear_beta,
    K: tl.constexpr,
    EMBEDDINGS: tl.constexpr,
    FLOATS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OPTIMIZER: tl.constexpr,
):
    """Update the rows `key` [n] that are `chosen` [n]; `mean` is that of `_adam`."""
    row = rows + key.to(tl.int64) * FLOATS
    if OPTIMIZER == "adam":
        _adam(
            row,
            mean,
            chosen,
            correction,
            rate,
            beta,
            linear_rate,
            linear_beta,
            WIDTH=EMBEDDINGS * K,
            COLUMNS=COLUMNS,
        )
    else:
        adagrad(
            row,
            mean * examples.to(tl.float32),
            chosen,
            rate,
            beta,
            linear_rate,
            linear_beta,
            K=K,
            EMBEDDINGS=EMBEDDINGS,
            COLUMNS=COLUMNS,
        )


@triton.jit
def _reduce(  # type: ignore[no-untyped-def]
    rows,
    keys,
    order,
    grad_w,
    grad_v,
    continued,
    started,
    example_count,
    skip,
    correction,
    fields,
    rate,
    beta,
    linear_rate,
    linear_beta,
    K: tl.constexpr,
    EMBEDDINGS: tl.constexpr,
    FLOATS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OPTIMIZER: tl.constexpr,
    CHUNK: tl.constexpr,
):
    WIDTH: tl.constexpr = EMBEDDINGS * K
    examples = tl.load(example_count)
    id_count = examples * fields
    chunk = tl.program_id(0)
    if (tl.load(skip) != 0.0) | (chunk * CHUNK >= id_count):
        return
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = index < id_count
    key = tl.load(keys + index, mask=inside, other=-1)
    above = tl.load(keys + index - 1, mask=inside & (index > 0), other=-1)
    before = tl.load(keys + chunk * CHUNK - 1, mask=chunk > 0, other=-1)
    after = tl.load(keys + (chunk + 1) * CHUNK, mask=(chunk + 1) * CHUNK < id_count, other=-1)
    position = tl.load(order + index, mask=inside, other=0).to(tl.int64)
    gradient = tl.load(
        grad_v + position[:, None] * WIDTH + column,
        mask=inside[:, None] & (column < WIDTH),
        other=0.0,
    )
    gradient += tl.where(
        column == WIDTH, tl.load(grad_w + position, mask=inside, other=0.0)[:, None], 0.0
    )
    same = (key[:, None] == key[None, :]).to(tl.float32)
    # Each line of `total` is the sum of its row's gradients in this chunk.
    total = tl.dot(same, gradient, input_precision="ieee")
    first = inside & ((key != above) | (index == chunk * CHUNK))
    continues_before = first & (key == before)
    continues_after = first & (key == after)
    tl.store(
        continued + chunk.to(tl.int64) * COLUMNS + column + index[:, None] * 0,
        total,
        mask=continues_before[:, None],
    )
    tl.store(
        started + chunk.to(tl.int64) * COLUMNS + column + index[:, None] * 0,
        total,
        mask=continues_after[:, None],
    )
    _step(
        rows,
        key,
        total,
        examples,
        first & ~continues_before & ~continues_after,
        correction,
        rate,
        beta,
        linear_rate,
        linear_beta,
        K=K,
        EMBEDDINGS=EMBEDDINGS,
        FLOATS=FLOATS,
        COLUMNS=COLUMNS,
        OPTIMIZER=OPTIMIZER,
    )


@triton.jit
def _join(  # type: ignore[no-untyped-def]
    rows,
    keys,
    continued,
    started,
    example_count,
    skip,
    correction,
    fields,
    rate,
    beta,
    linear_rate,
    linear_beta,
    K: tl.constexpr,
    EMBEDDINGS: tl.constexpr,
    FLOATS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OPTIMIZER: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    examples = tl.load(example_count)
    id_count = examples * fields
    chunk = tl.program_id(0)
    end = (chunk + 1) * CHUNK
    if (tl.load(skip) != 0.0) | (end >= id_count):
        return
    key = tl.load(keys + end)
    before = tl.load(keys + chunk * CHUNK - 1, mask=chunk > 0, other=-1)
    # Only a row that starts in this chunk and continues in the next is joined here.
    if (tl.load(keys + end - 1) != key) | (before == key):
        return
    column = tl.arange(0, COLUMNS)[None, :]
    total = tl.load(started + chunk.to(tl.int64) * COLUMNS + column)
    following = chunk + 1
    more = True
    while more:
        others = following + tl.arange(0, CHUNKS)
        same = tl.load(keys + others * CHUNK, mask=others * CHUNK < id_count, other=-1) == key
        parts = tl.load(
            continued + others.to(tl.int64)[:, None] * COLUMNS + column,
            mask=same[:, None],
            other=0.0,
        )
        total += tl.sum(parts, axis=0)[None, :]
        more = tl.min(same.to(tl.int32), axis=0) == 1
        following += CHUNKS
    _step(
        rows,
        key + tl.zeros([1], tl.int32),
        total,
        examples,
        tl.full([1], True, tl.int1),
        correction,
        rate,
        beta,
        linear_rate,
        linear_beta,
        K=K,
        EMBEDDINGS=EMBEDDINGS,
        FLOATS=FLOATS,
        COLUMNS=COLUMNS,
        OPTIMIZER=OPTIMIZER,
    )


@dataclass(frozen=True, slots=True)
class RowShape:
    """The shape of a row, for the compiler."""

    floats: int
    columns: int  # V and w, rounded up to a power of two, as Triton's ranges must be

    @classmethod
    def of_table(cls, table: Table) -> RowShape:
        columns = max(triton.next_power_of_2(table.width + 1), _LEAST_PRODUCT)
        return cls(table.rows.shape[1], columns)

    @property
    def chunk(self) -> int:
        """The number of ids in a chunk.

        The gradients of a program take up to 64 KiB of the multiprocessor's shared memory, or
        128 KiB for two embeddings of 512.
        """
        return max(min(_MAX_CHUNK, _CHUNK_FLOATS // self.columns), _LEAST_PRODUCT)

    def warps(self, lines: int) -> int:
        """Return the number of warps for `lines` rows of the shape's columns."""
        return min(max(lines * self.columns // _FLOATS_PER_WARP, 1), _MAX_WARPS)


def gather(
    table: Table,
    ids: Tensor,
    values: Tensor | None,
    w: Tensor,
    v: Tensor,
    sums: FieldSums,
) -> None:
    """Gather the rows at `ids` int32 [B, F] and multiply them by `values` [B, F], if any.

    Writes `w` [B, F], `v` [B, F, width] and the `sums` of `v` over the fields.
    """
    examples, fields = ids.shape
    shape = RowShape.of_table(table)
    tile = min(triton.next_power_of_2(fields), max(_TILE // shape.columns, 1))
    _gather[(examples,)](
        table.rows,
        ids,
        ids if values is None else values,
        w,
        v,
        sums.total,
        sums.pairs,
        fields,
        WIDTH=table.width,
        FLOATS=shape.floats,
        COLUMNS=shape.columns,
        FIELDS=tile,
        SCALED=values is not None,
        num_warps=shape.warps(tile),
    )


class Update:
    """The optimiser's step on the rows of a batch of up to `examples` examples of `fields` ids."""

    def __init__(self, table: Table, *, examples: int, fields: int) -> None:
        self._table = table
        self._fields = fields
        self._shape = RowShape.of_table(table)
        # The sums of rows that continue from the chunk before, and of rows that start in a chunk
        # and continue in the next.
        device = table.rows.device
        chunks = -(-examples * fields // self._shape.chunk)
        self._sums = torch.zeros(2, chunks, self._shape.columns, device=device)
        self._keys = torch.zeros(examples * fields, dtype=torch.int32, device=device)
        self._order = torch.zeros(examples * fields, dtype=torch.int64, device=device)

    def sort(self, ids: Tensor) -> None:
        """Sort the `ids` int32 [B, F] of the next call."""
        entries = ids.numel()
        into = self._keys[:entries], self._order[:entries]
        torch.sort(ids.view(-1), stable=True, out=into)

    def __call__(
        self,
        grad_w: Tensor,
        grad_v: Tensor,
        count: Tensor,
        skip: Tensor,
        correction: Tensor,
    ) -> None:
        """Update the rows at the `ids` that were sorted, by the gradients of the mean loss.

        `grad_w` [B, F] and `grad_v` [B, F, width] are the gradients of the outputs of `gather`.
        `count` int32, `skip` and `correction` (that of `Rates`) are single numbers on the device.
        Only the first `count` examples are learned; the ids of the others must be the table's last
        row, so that they are sorted behind. With a `skip` other than zero nothing changes.
        """
        entries = grad_w.numel()
        keys, order = self._keys[:entries], self._order[:entries]
        chunks = -(-entries // self._shape.chunk)
        continued, started = self._sums
        table = self._table
        shape = self._shape
        rates = table.rates
        numbers = (
            count,
            skip,
            correction,
            self._fields,
            rates.learning_rate,
            rates.beta,
            rates.linear_learning_rate,
            rates.linear_beta,
        )
        constants = {
            "K": table.embedding_dim,
            "EMBEDDINGS": table.embeddings,
            "FLOATS": shape.floats,
            "COLUMNS": shape.columns,
            "OPTIMIZER": rates.optimizer,
            "CHUNK": shape.chunk,
        }
        _reduce[(chunks,)](
            table.rows,
            keys,
            order,
            grad_w,
            grad_v,
            continued,
            started,
            *numbers,
            **constants,
            num_warps=shape.warps(shape.chunk),
        )
        _join[(chunks,)](
            table.rows,
            keys,
            continued,
            started,
            *numbers,
            **constants,
            CHUNKS=_CHUNKS,
            num_warps=shape.warps(_CHUNKS),
        )
