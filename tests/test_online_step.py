"""The online rule against a plain computation in double precision, and what it leaves behind."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.learners import assert_equal_states, random_batch, small_network, state_of
from support.patience import wait_until

from stream_ctr.learn import online_kernels
from stream_ctr.learn.ftrl import FTRL
from stream_ctr.learn.network_learner import NetworkLearner
from stream_ctr.learn.step import SUB_BATCH, batch_size_after
from stream_ctr.learn.table_kernels import SortedIds, sort_ids
from stream_ctr.models import MODELS
from stream_ctr.models.layers import Tape

Array = npt.NDArray[Any]
MODULES = [name for name, system in MODELS.items() if system.module]
SIZES = (16, 48, 300, 600, 7)  # one sub-batch, parts with padding, several sub-batches


class Plain:
    """The rule as docs/learning.md states it: an example at a time, in float64, with autograd."""

    def __init__(self, learner: NetworkLearner, model: str) -> None:
        make: Any = MODELS[model].module
        self.module: Any = make(
            fields=learner.fields,
            embedding_dim=learner.table.embedding_dim,
            hidden=[8, 8],
            activation="tanh" if model == "ipnn" else "relu",
        ).double()
        self.module.load_state_dict(learner.model.state_dict())
        self.terms = self.module.terms
        self.k = learner.table.embedding_dim
        self.width = learner.table.width
        rows = learner.table.rows.double()
        self.v = rows[:, : self.width].numpy().copy()
        self.w = rows[:, self.width].numpy().copy()
        self.n_v = np.zeros((len(rows), learner.table.embeddings))
        self.n_w = np.zeros(len(rows))
        self.w0 = self.n0 = 0.0
        self.columns = learner.columns
        self.fields = learner.fields
        self.value_fields = learner.value_fields
        self.adam = torch.optim.Adam(self.module.parameters(), lr=0.001)

    def learn(self, ids: Array, labels: Array, values: Array) -> Array:
        n = len(ids)
        x = np.ones(ids.shape)
        x[:, self.value_fields] = values
        v = torch.from_numpy(self.v[ids] * x[..., None]).requires_grad_()
        w = torch.from_numpy(self.w[ids] * x).requires_grad_()
        deep = torch.zeros(n, dtype=torch.float64)
        slope_v, slope_w = np.zeros(v.shape), np.zeros(w.shape)
        if self.terms.network:
            deep = self.module.deep_logits(w, v)
            found = torch.autograd.grad(
                deep.sum(), (v, w), retain_graph=True, materialize_grads=True
            )
            slope_v, slope_w = (each.numpy() for each in found)
        before_v, before_w = v.detach().numpy(), w.detach().numpy()
        logits, g = np.empty(n), np.empty(n)
        for start in range(0, n, SUB_BATCH):
            sub_batch = range(start, min(start + SUB_BATCH, n))
            step: dict[int, list[tuple[int, int]]] = {}
            for e in sub_batch:
                logits[e] = self._logit(
                    ids[e], x[e], deep[e].item(), slope_v[e], slope_w[e], before_v[e], before_w[e]
                )
                g[e] = 1 / (1 + np.exp(-logits[e])) - labels[e]
                for f in range(self.columns):
                    step.setdefault(int(ids[e, f]), []).append((e, f))
            self._step_rows(step, ids, x, g, slope_v, slope_w)
            total = sum(g[e] for e in sub_batch)
            self.n0 += total**2
            self.w0 -= 3 / self.columns * total / (1 + np.sqrt(self.n0))
        if self.terms.network:
            self.adam.param_groups[0]["lr"] = 0.001 * np.sqrt(n / 512)
            self.adam.zero_grad()
            torch.dot(deep, torch.from_numpy(g / n)).backward()  # type: ignore[no-untyped-call]
            self.adam.step()
        return logits

    def _pairs(self, ids: Array, x: Array) -> Array:
        return self.v[ids][:, : self.k] * x[:, None]

    def _logit(
        self,
        ids: Array,
        x: Array,
        deep: float,
        slope_v: Array,
        slope_w: Array,
        before_v: Array,
        before_w: Array,
    ) -> float:
        z = self.w0 + deep
        if self.terms.linear:
            z += (self.w[ids] * x).sum()
        if self.terms.pairs:
            f = self._pairs(ids, x)
            z += sum(f[i] @ f[j] for i in range(len(f)) for j in range(i))
        z += (slope_v * (self.v[ids] * x[:, None] - before_v)).sum()
        if self.terms.network_w:
            z += (slope_w * (self.w[ids] * x - before_w)).sum()
        return float(z)

    def _step_rows(
        self,
        step: dict[int, list[tuple[int, int]]],
        ids: Array,
        x: Array,
        g: Array,
        slope_v: Array,
        slope_w: Array,
    ) -> None:
        sums = {
            e: self._pairs(ids[e], x[e]).sum(axis=0)
            for e in {e for at in step.values() for e, _ in at}
        }
        for row, places in step.items():
            total_v, total_w = np.zeros(self.width), 0.0
            for e, f in places:
                slope = slope_v[e, f].copy()
                if self.terms.pairs:
                    slope[: self.k] += sums[e] - x[e, f] * self.v[row, : self.k]
                total_v += g[e] * x[e, f] * slope
                total_w += (
                    g[e] * x[e, f] * (self.terms.linear + self.terms.network_w * slope_w[e, f])
                )
            self.n_w[row] += total_w**2
            rate = 3 / self.columns
            self.w[row] -= rate / (1 + rate + np.sqrt(self.n_w[row])) * total_w
            for c in range(self.width // self.k):
                part = slice(c * self.k, c * self.k + self.k)
                self.n_v[row, c] += (total_v[part] ** 2).mean()
                self.v[row, part] -= (
                    1 / self.fields / (1 + np.sqrt(self.n_v[row, c])) * total_v[part]
                )


@pytest.mark.parametrize("model", MODULES)
def test_steps_equal_those_of_a_plain_computation_in_double_precision(model: str) -> None:
    crosses = 2 if model == "lr_dnn" else 0
    made = small_network(
        model, batch_size=600, value_fields=[1], threads=2, crosses=crosses, pretrain_examples=0
    )
    made.table.rows[:, made.table.width] = torch.linspace(-0.3, 0.3, 1024)
    plain = Plain(made, model)
    rng = np.random.default_rng(0)
    for step, n in enumerate(SIZES):
        ids, labels = random_batch(n, fields=3 + crosses, seed=step)
        ids[:, 0] %= 5  # hot rows
        ids[:, 2] = ids[:, 0] if step == 1 else ids[:, 2]  # two fields share a row
        values = rng.uniform(-2, 2, (n, 1)).astype(np.float32)
        logits = made.learn(ids, labels, values)
        assert logits is not None
        assert np.allclose(logits, plain.learn(ids, labels, values), atol=2e-5)
    assert np.allclose(made.table.rows[:, : made.table.width], plain.v, atol=2e-5)
    assert np.allclose(made.table.rows[:, made.table.width], plain.w, atol=2e-5)
    assert np.allclose(made.intercept, [plain.w0, plain.n0], atol=1e-4)
    for ours, theirs in zip(made.model.parameters(), plain.module.parameters(), strict=True):
        assert np.allclose(ours.detach(), theirs.detach(), atol=2e-5)


def test_weights_that_step_one_at_a_time_are_those_of_exact_ftrl() -> None:
    made = small_network("fm", embedding_dim=1, initial_scale=0.0)
    rate = 3 / made.columns
    ftrl = FTRL(table_bits=10, alpha=rate, beta=1.0, l1=0.0, l2=1.0)
    ids, labels = random_batch(500, rows=40)
    for e in range(len(ids)):
        one = slice(e, e + 1)
        logits = made.learn(ids[one], labels[one])
        assert logits is not None
        # Two fields that share a row are one coordinate for FTRL, and its value is their sum.
        assert np.allclose(logits, ftrl.learn(ids[one], labels[one]), atol=1e-4)


@pytest.mark.parametrize("model", ["deepfm", "fm_dnn", "fnn"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_any_number_of_threads_gives_the_same_model(model: str, precision: str) -> None:
    learners = [
        small_network(
            model, batch_size=2048, threads=threads, precision=precision, pretrain_examples=100
        )
        for threads in (1, 2, 5)
    ]
    for step, n in enumerate((16, 2048, 1999, 520)):
        ids, labels = random_batch(n, seed=step, rows=100)
        first, *others = (made.learn(ids, labels) for made in learners)
        assert first is not None
        for other in others:
            assert other is not None
            assert np.array_equal(first.numpy(), other.numpy())
    for made in learners[1:]:
        assert_equal_states(state_of(learners[0]), state_of(made))


def test_dropout_drops_units_of_the_step_and_not_of_its_prediction() -> None:
    made = small_network(dropout=0.5, hidden=[64], batch_size=512)
    ids, labels = random_batch(100)
    before = made.predict(ids)
    logits = made.learn(ids, labels)
    assert logits is not None
    assert np.allclose(logits, before, atol=1e-5)
    kept = small_network(dropout=0.0, hidden=[64], batch_size=512)
    kept.learn(ids, labels)
    assert not np.allclose(made.adam.vector, kept.adam.vector)


@pytest.mark.parametrize("spoiled", ["a value", "a row", "a parameter", "a gradient"])
def test_a_batch_that_is_not_finite_leaves_nothing_behind(spoiled: str) -> None:
    made = small_network(batch_size=600, value_fields=[1], threads=2)
    values = np.ones((600, 1), np.float32)
    ids, labels = random_batch(600)
    made.learn(ids, labels, values)
    if spoiled == "a value":
        values[599] = np.float32(3e38)  # in the last sub-batch
    elif spoiled == "a row":
        made.table.rows[ids[599, 0], 0] = np.nan
    elif spoiled == "a gradient":
        made.table.rows[ids[599, 0], 0] = 1e19  # its square is beyond float32
    else:
        made.adam.vector[0] = np.inf
    before = state_of(made)
    assert made.learn(ids, labels, values) is None
    assert_equal_states(before, state_of(made))


def test_a_learner_resumes_exactly() -> None:
    straight, resumed = (small_network(batch_size=512) for _ in range(2))
    sizes = (16, 32, 400)
    for step, n in enumerate(sizes):
        straight.learn(*random_batch(n, seed=step))
    resumed.load_weights(straight.weights())
    resumed.load_optimizer_state(straight.optimizer_state())
    for made in (straight, resumed):
        made.learn(*random_batch(300, seed=9))
    assert_equal_states(state_of(straight), state_of(resumed))


@pytest.mark.parametrize("model", MODULES)
def test_a_prediction_between_two_batches_changes_nothing(model: str) -> None:
    asked, other = (
        small_network(model, pretrain_examples=100),
        small_network(model, pretrain_examples=100),
    )
    for step in range(3):
        ids, labels = random_batch(seed=step)
        asked.predict(ids)
        first, second = asked.learn(ids, labels), other.learn(ids, labels)
        assert first is not None
        assert second is not None
        assert torch.equal(first, second)
    assert_equal_states(state_of(asked), state_of(other))


@given(
    n=st.integers(1, 40),
    fields=st.integers(1, 4),
    size=st.integers(1, 50),
    rows=st.integers(1, 30),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_groups_hold_each_entry_once_by_sub_batch_row_and_place(
    n: int, fields: int, size: int, rows: int, seed: int
) -> None:
    ids = np.random.default_rng(seed).integers(0, rows, (n, fields)).astype(np.int32)
    count = n * fields
    found = SortedIds(np.empty(count, np.int32), np.empty(count, np.int32))
    sort_ids(ids.reshape(-1), 5, found, np.empty((2, count), np.int32))
    groups = online_kernels.group(found, (n, fields), size, np.empty((3, count), np.int32))
    assert groups.rows.tolist() == sorted(set(ids.reshape(-1).tolist()))
    assert np.array_equal(groups.rows[groups.row_of], ids)
    wanted = sorted(range(count), key=lambda at: (at // fields // size, ids.reshape(-1)[at], at))
    assert groups.entries.tolist() == wanted
    bounds = groups.bounds.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == count
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        assert len({at // fields // size for at in groups.entries[start:stop].tolist()}) == 1


def test_batches_grow_with_the_examples_seen() -> None:
    sizes = []
    seen = 0
    while seen < 300_000:
        sizes.append(batch_size_after(seen, 4096))
        seen += sizes[-1]
    assert sizes[0] == 16
    assert sizes[-1] == 4096
    assert sizes == sorted(sizes)
    assert all(size % 16 == 0 for size in sizes)
    assert sum(size < 4096 for size in sizes) < 250


def tapes() -> set[int]:
    return {id(found) for found in gc.get_objects() if isinstance(found, Tape)}


def test_a_step_leaves_its_activations_to_no_collector() -> None:
    made = small_network(batch_size=64)
    gc.collect()
    gc.disable()
    try:
        before = tapes()  # of other tests
        made.learn(*random_batch(64))
        # A thread may still return from its part of the step.
        wait_until(lambda: tapes() <= before, seconds=5)
    finally:
        gc.enable()
