"""The compiled loops: the sort against NumPy's, the update against slow ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from stream_ctr.learn import table_kernels
from stream_ctr.learn.table import Rates, Table
from stream_ctr.learn.table_kernels import SortedIds

Array = npt.NDArray[Any]


def sorted_ids(ids: Array, bits: int) -> SortedIds:
    into = SortedIds(np.empty_like(ids), np.empty_like(ids))
    table_kernels.sort_ids(ids, bits, into, np.empty((2, len(ids)), np.int32))
    return into


@pytest.mark.parametrize("bits", [3, 11, 12, 20, 24, 30])
def test_ids_are_sorted_and_equal_ones_keep_their_order(bits: int) -> None:
    ids = np.random.default_rng(bits).integers(0, 1 << bits, 5000).astype(np.int32)
    ids[::7] = ids[0]
    keys, order = sorted_ids(ids, bits)
    assert np.array_equal(order, np.argsort(ids, kind="stable"))
    assert np.array_equal(keys, np.sort(ids))


def step(
    table: Table,
    ids: Array,
    gradient: Array,
    *,
    steps: int = 0,
    examples: int = 1,
    split: Sequence[int] = (),
) -> None:
    """Update by the `gradient` [n, width + 1] of the rows at `ids` [n], in parts cut at `split`."""
    update = table_kernels.update(table.embedding_dim, table.embeddings, table.rates.optimizer)
    for first, last in itertools.pairwise([0, *split, len(ids)]):
        update(
            table.rows.numpy(),
            sorted_ids(ids, table.bits),
            first,
            last,
            gradient[:, -1].astype(np.float32),
            gradient[:, :-1].astype(np.float32),
            table.rates.at_step(steps, examples=examples),
        )


def gathered(table: Table, ids: Array) -> tuple[Array, Array]:
    w = np.empty(ids.shape, np.float32)
    v = np.empty((*ids.shape, table.width), np.float32)
    no_scale = np.empty((0, 0), np.float32)
    table_kernels.gather(table.width)(table.rows.numpy(), ids, no_scale, w, v)
    return w, v


@pytest.mark.parametrize("embeddings", [1, 2])
def test_gather_multiplies_embeddings_and_weights_by_their_values(embeddings: int) -> None:
    table = Table(bits=5, embedding_dim=3, embeddings=embeddings, initial_scale=0.5)
    table.rows[:, table.width].normal_(generator=torch.Generator().manual_seed(1))
    ids = np.random.default_rng(0).integers(0, 32, (7, 4)).astype(np.int32)
    scale = np.random.default_rng(1).normal(size=(7, 4)).astype(np.float32)
    w = np.empty((7, 4), np.float32)
    v = np.empty((7, 4, table.width), np.float32)
    table_kernels.gather(table.width)(table.rows.numpy(), ids, scale, w, v)
    rows = table.rows.numpy()[ids]
    assert np.array_equal(w, rows[..., table.width] * scale)
    assert np.array_equal(v, rows[..., : table.width] * scale[..., None])


@pytest.mark.parametrize("embeddings", [1, 2])
@pytest.mark.parametrize("split", [[], [5, 6, 7]])  # in how many parts the rows are updated
def test_an_update_equals_a_slow_one_over_the_whole_table(
    embeddings: int, split: list[int]
) -> None:
    rates = Rates("adagrad", learning_rate=0.1, beta=0.5, linear_learning_rate=0.3, linear_beta=2.0)
    table = Table(
        bits=5, embedding_dim=3, embeddings=embeddings, rates=rates, initial_scale=0.5, seed=3
    )
    width = 3 * embeddings
    rng = np.random.default_rng(0)
    weights = table.rows[:, : width + 1].double().numpy().copy()
    n = np.zeros((32, embeddings + 1))
    for _ in range(20):
        ids = rng.integers(0, 32, 32).astype(np.int32)  # with repeats
        gradient = rng.normal(size=(32, width + 1)) * [*np.repeat([1.0, 5.0], 3)[:width], 1.0]
        dense = np.zeros((32, width + 1))
        np.add.at(dense, ids, 2.0 * gradient)
        for e in range(embeddings):
            coordinates = slice(3 * e, 3 * e + 3)
            n[:, e] += (dense[:, coordinates] ** 2).mean(axis=1)
            dense[:, coordinates] /= 0.5 + np.sqrt(n[:, e, None])
        n[:, -1] += dense[:, -1] ** 2
        dense[:, -1] /= 2.0 + np.sqrt(n[:, -1])
        weights -= [*[0.1] * width, 0.3] * dense
        step(table, ids, gradient, examples=2, split=split)
    w, v = gathered(table, np.arange(32, dtype=np.int32).reshape(16, 2))
    assert np.allclose(np.column_stack([v.reshape(32, width), w.ravel()]), weights, atol=5e-5)


class SparseAdam:
    """Torch's SparseAdam over the V and w of a table, as two parameters with separate rates."""

    def __init__(self, table: Table) -> None:
        self.v, self.w = (
            torch.nn.Parameter(part.clone())
            for part in torch.split(table.rows[:, : table.width + 1], [table.width, 1], dim=1)
        )
        rates = table.rates
        self._optimizer = torch.optim.SparseAdam(
            [
                {"params": [self.v], "lr": rates.learning_rate},
                {"params": [self.w], "lr": rates.linear_learning_rate},
            ]
        )

    def step(self, ids: Array, gradient: Array) -> None:
        index = torch.from_numpy(ids).long()[None]
        g = torch.from_numpy(gradient).float()
        for part, values in ((self.v, g[:, :-1]), (self.w, g[:, -1:])):
            part.grad = torch.sparse_coo_tensor(index, values, part.shape, check_invariants=True)
        self._optimizer.step()  # type: ignore[no-untyped-call]

    @property
    def moments(self) -> list[torch.Tensor]:
        state = [self._optimizer.state[part] for part in (self.v, self.w)]
        return [
            torch.cat([each[name] for each in state], dim=1) for name in ("exp_avg", "exp_avg_sq")
        ]


@pytest.mark.parametrize("embeddings", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 1e-8])  # the latter is about as small as epsilon
def test_adam_on_the_table_is_torchs_sparse_adam(embeddings: int, scale: float) -> None:
    rates = Rates.per_field(
        "adam", fields=9, learning_rate=0.02, beta=3.0, linear_learning_rate=0.005, linear_beta=1.0
    )
    table = Table(bits=5, embedding_dim=5, embeddings=embeddings, rates=rates, initial_scale=0.5)
    before = table.rows.clone()
    theirs = SparseAdam(table)
    width = 5 * embeddings
    rng = np.random.default_rng(0)
    for steps in range(30):
        ids = (rng.zipf(1.5, 40) % 32).astype(np.int32)  # some often, some never
        gradient = scale * rng.normal(size=(40, width + 1))
        theirs.step(ids, gradient)
        step(table, ids, gradient, steps=steps, examples=40, split=[3, 30])
    ours = torch.split(table.rows[:, : 3 * (width + 1)], width + 1, dim=1)
    expected = torch.cat([theirs.v, theirs.w], dim=1), *theirs.moments
    for found, other in zip(ours, expected, strict=True):
        assert torch.allclose(found, other, rtol=2e-5, atol=1e-6 * min(scale, 1.0) ** 0.5)
    assert not torch.equal(table.rows[:, :width], before[:, :width])
