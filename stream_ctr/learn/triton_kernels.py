"""The embedding table's kernels on the GPU, in Triton: gather with the FM's sums, and segment-reduce with the optimiser in place.

    gather     one program an example: its rows, multiplied by their values, -> w, v, and of v the sums that FM wants
    update     ids are sorted; a program takes a chunk of places, sums the gradients of each row in it and steps the rows that
               lie in this chunk alone. Of a row that others have a part of, each chunk leaves its sum; a second launch has one program
               for each such row, which adds the chunks' sums `_CHUNKS` at a time and steps the row.

Every sum is taken in an order that the sorted ids alone decide, and every row is stepped by one program: two runs are equal bit for
bit, and a hot row is no queue, neither of atomic additions nor of a single thread. With TRITON_INTERPRET=1 in the environment before
this module is imported, all of it runs on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stream_ctr.learn.table import Table
from stream_ctr.learn.table_kernels import BETA1, BETA2

_CHUNKS = 64
_TILE = 2048  # numbers that a program of `gather` has in hand at once
_DECAY1, _DECAY2 = tl.constexpr(1.0 - BETA1), tl.constexpr(1.0 - BETA2)


@triton.jit
def _gather(  # type: ignore[no-untyped-def]
    rows, ids, values, w, v, total, pairs, fields,
    WIDTH: tl.constexpr, FLOATS: tl.constexpr, COLUMNS: tl.constexpr, FIELDS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    example = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    sums = tl.zeros([COLUMNS], tl.float32)
    squares = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, fields, FIELDS):
        field = first + tl.arange(0, FIELDS)
        there = field < fields
        place = example * fields + field
        row = tl.load(ids + place, mask=there, other=0).to(tl.int64)
        x = tl.load(
            rows + row[:, None] * FLOATS + column,
            mask=there[:, None] & (column <= WIDTH),
            other=0.0,
        )
        if SCALED:
            x *= tl.load(values + place, mask=there, other=0.0)[:, None]
        tl.store(v + place[:, None] * WIDTH + column, x, mask=there[:, None] & (column < WIDTH))
        tl.store(w + place[:, None] + column * 0, x, mask=there[:, None] & (column == WIDTH))
        sums += tl.sum(x, axis=0)
        squares += tl.sum(x * x, axis=0)
    column = tl.arange(0, COLUMNS)
    tl.store(total + example * WIDTH + column, sums, mask=column < WIDTH)
    tl.store(
        pairs + example, 0.5 * tl.sum(tl.where(column < WIDTH, sums * sums - squares, 0.0), axis=0)
    )


@triton.jit
def _step(  # type: ignore[no-untyped-def]
    rows, key, mean, examples, chosen, correction, rate, beta, linear_rate, linear_beta,
    K: tl.constexpr, EMBEDDINGS: tl.constexpr, FLOATS: tl.constexpr, COLUMNS: tl.constexpr, OPTIMIZER: tl.constexpr,
):  # fmt: skip
    """One step of the `chosen` [n] of the rows `key` [n], whose gradients of the mean loss are `mean` [n, COLUMNS], that of w behind those
    of V."""
    WIDTH: tl.constexpr = EMBEDDINGS * K
    column = tl.arange(0, COLUMNS)[None, :]
    linear = column == WIDTH
    row = rows + key.to(tl.int64) * FLOATS
    at = row[:, None] + column
    inside = chosen[:, None] & (column <= WIDTH)
    rates = tl.where(linear, linear_rate, rate)
    if OPTIMIZER == "adam":
        m = tl.load(at + WIDTH + 1, mask=inside, other=0.0)
        v = tl.load(at + 2 * (WIDTH + 1), mask=inside, other=0.0)
        m += (mean - m) * _DECAY1
        v += (mean * mean - v) * _DECAY2
        tl.store(at + WIDTH + 1, m, mask=inside)
        tl.store(at + 2 * (WIDTH + 1), v, mask=inside)
        step = (
            rates * tl.load(correction) * (m / (tl.where(linear, linear_beta, beta) + tl.sqrt(v)))
        )
    else:
        total = mean * examples.to(tl.float32)
        if OPTIMIZER == "adagrad":
            state = row + WIDTH + 1
            n_w = tl.load(state + EMBEDDINGS, mask=chosen, other=0.0) + tl.sum(
                tl.where(linear, total * total, 0.0), axis=1
            )
            tl.store(state + EMBEDDINGS, n_w, mask=chosen)
            rates = tl.where(linear, (linear_rate / (linear_beta + tl.sqrt(n_w)))[:, None], 0.0)
            for e in tl.static_range(EMBEDDINGS):
                its = (column >= e * K) & (column < (e + 1) * K)
                n_v = (
                    tl.load(state + e, mask=chosen, other=0.0)
                    + tl.sum(tl.where(its, total * total, 0.0), axis=1) / K
                )
                tl.store(state + e, n_v, mask=chosen)
                rates = tl.where(its, (rate / (beta + tl.sqrt(n_v)))[:, None], rates)
        step = rates * total
    tl.store(at, tl.load(at, mask=inside, other=0.0) - step, mask=inside)


@triton.jit
def _reduce(  # type: ignore[no-untyped-def]
    rows, keys, order, gw, gv, led, begun, count, skip, correction, fields, rate, beta, linear_rate, linear_beta,
    K: tl.constexpr, EMBEDDINGS: tl.constexpr, FLOATS: tl.constexpr, COLUMNS: tl.constexpr, OPTIMIZER: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = EMBEDDINGS * K
    examples = tl.load(count)
    places = examples * fields
    chunk = tl.program_id(0)
    if (tl.load(skip) != 0.0) | (chunk * CHUNK >= places):
        return
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    column = tl.arange(0, COLUMNS)[None, :]
    there = place < places
    key = tl.load(keys + place, mask=there, other=-1)
    above = tl.load(keys + place - 1, mask=there & (place > 0), other=-1)
    before = tl.load(keys + chunk * CHUNK - 1, mask=chunk > 0, other=-1)
    after = tl.load(keys + (chunk + 1) * CHUNK, mask=(chunk + 1) * CHUNK < places, other=-1)
    at = tl.load(order + place, mask=there, other=0).to(tl.int64)
    gradient = tl.load(
        gv + at[:, None] * WIDTH + column, mask=there[:, None] & (column < WIDTH), other=0.0
    )
    gradient += tl.where(column == WIDTH, tl.load(gw + at, mask=there, other=0.0)[:, None], 0.0)
    same = (key[:, None] == key[None, :]).to(tl.float32)
    total = tl.dot(
        same, gradient, input_precision="ieee"
    )  # each place has the sum of its row's gradients in this chunk
    first = there & ((key != above) | (place == chunk * CHUNK))
    led_in = first & (key == before)
    goes_on = first & (key == after)
    tl.store(
        led + chunk.to(tl.int64) * COLUMNS + column + place[:, None] * 0,
        total,
        mask=led_in[:, None],
    )
    tl.store(
        begun + chunk.to(tl.int64) * COLUMNS + column + place[:, None] * 0,
        total,
        mask=goes_on[:, None],
    )
    _step(
        rows, key, total, examples, first & ~led_in & ~goes_on, correction, rate, beta, linear_rate, linear_beta,
        K=K, EMBEDDINGS=EMBEDDINGS, FLOATS=FLOATS, COLUMNS=COLUMNS, OPTIMIZER=OPTIMIZER,
    )  # fmt: skip


@triton.jit
def _join(  # type: ignore[no-untyped-def]
    rows, keys, led, begun, count, skip, correction, fields, rate, beta, linear_rate, linear_beta,
    K: tl.constexpr, EMBEDDINGS: tl.constexpr, FLOATS: tl.constexpr, COLUMNS: tl.constexpr, OPTIMIZER: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    examples = tl.load(count)
    places = examples * fields
    chunk = tl.program_id(0)
    end = (chunk + 1) * CHUNK
    if (tl.load(skip) != 0.0) | (end >= places):
        return
    key = tl.load(keys + end)
    before = tl.load(keys + chunk * CHUNK - 1, mask=chunk > 0, other=-1)
    if (tl.load(keys + end - 1) != key) | (
        before == key
    ):  # no row begins in this chunk that goes on in the next
        return
    column = tl.arange(0, COLUMNS)[None, :]
    total = tl.load(begun + chunk.to(tl.int64) * COLUMNS + column)
    following = chunk + 1
    more = True
    while more:
        others = following + tl.arange(0, CHUNKS)
        same = tl.load(keys + others * CHUNK, mask=others * CHUNK < places, other=-1) == key
        parts = tl.load(
            led + others.to(tl.int64)[:, None] * COLUMNS + column, mask=same[:, None], other=0.0
        )
        total += tl.sum(parts, axis=0)[None, :]
        more = tl.min(same.to(tl.int32), axis=0) == 1
        following += CHUNKS
    _step(
        rows, key + tl.zeros([1], tl.int32), total, examples, tl.full([1], True, tl.int1), correction, rate, beta, linear_rate, linear_beta,
        K=K, EMBEDDINGS=EMBEDDINGS, FLOATS=FLOATS, COLUMNS=COLUMNS, OPTIMIZER=OPTIMIZER,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Shape:
    """Of a row, for the compiler."""

    floats: int
    columns: int  # V and w, rounded up to a power of two, of which Triton's ranges are

    @classmethod
    def of(cls, table: Table) -> _Shape:
        return cls(table.rows.shape[1], max(triton.next_power_of_2(table.width + 1), 16))

    @property
    def chunk(self) -> int:
        """Places; a program's gradients take up to 64 KiB of the multiprocessor's shared memory (128 for two embeddings of 512)."""
        return max(min(32, 16384 // self.columns), 16)  # a product has no fewer

    def warps(self, lines: int) -> int:
        return min(max(lines * self.columns // 512, 1), 8)


def gather(
    table: Table,
    ids: Tensor,
    values: Tensor | None,
    w: Tensor,
    v: Tensor,
    total: Tensor,
    pairs: Tensor,
) -> None:
    """`ids` int32 [B, F] and, if any, `values` [B, F] -> `w` [B, F], `v` [B, F, width], their sum over the fields `total` [B, width], and
    `pairs` [B], the sum over field pairs of inner products."""
    examples, fields = ids.shape
    shape = _Shape.of(table)
    tile = min(triton.next_power_of_2(fields), max(_TILE // shape.columns, 1))
    _gather[(examples,)](
        table.rows, ids, ids if values is None else values, w, v, total, pairs, fields,
        WIDTH=table.width, FLOATS=shape.floats, COLUMNS=shape.columns, FIELDS=tile, SCALED=values is not None,
        num_warps=shape.warps(tile),
    )  # fmt: skip


class Update:
    """The optimiser's step on the rows of a batch of up to `examples` examples of `fields` fields."""

    def __init__(self, table: Table, *, examples: int, fields: int) -> None:
        self._table, self._fields = table, fields
        self._shape = _Shape.of(table)
        self._chunks = -(-examples * fields // self._shape.chunk)
        self._sums = torch.zeros(
            2, self._chunks, self._shape.columns, device=table.rows.device
        )  # of rows that go on, that begin

    def __call__(
        self, ids: Tensor, gw: Tensor, gv: Tensor, count: Tensor, skip: Tensor, correction: Tensor
    ) -> None:
        """Step by the gradients `gw` [B, F] and `gv` [B, F, width], of the mean loss, of what `gather` gave for `ids` int32 [B, F].

        `count` int32, `skip` and `correction` (that of `Rates`) are single numbers on the device. Only the first `count` examples are
        learned; the ids of the others must be the table's last row, so that they are sorted behind. With a `skip` that is not zero nothing
        is changed.
        """
        keys, order = torch.sort(ids.view(-1), stable=True)
        led, begun = self._sums
        table, shape, rates = self._table, self._shape, self._table.rates
        steps = rates.learning_rate, rates.beta, rates.linear_learning_rate, rates.linear_beta
        given = count, skip, correction, self._fields, *steps
        row = {
            "K": table.embedding_dim, "EMBEDDINGS": table.embeddings, "FLOATS": shape.floats, "COLUMNS": shape.columns,
            "OPTIMIZER": rates.optimizer, "CHUNK": shape.chunk,
        }  # fmt: skip
        _reduce[(self._chunks,)](
            table.rows,
            keys,
            order,
            gw,
            gv,
            led,
            begun,
            *given,
            **row,
            num_warps=shape.warps(shape.chunk),
        )
        _join[(self._chunks,)](
            table.rows,
            keys,
            led,
            begun,
            *given,
            **row,
            CHUNKS=_CHUNKS,
            num_warps=shape.warps(_CHUNKS),
        )
