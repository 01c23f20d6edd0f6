"""The learner of the modules against plain learners in double precision, and its state."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support.learners import (
    assert_equal_states,
    logloss,
    planted_batches,
    planted_stream,
    random_batch,
    small_learner,
    small_network,
    state_of,
)
from support.patience import PATIENCE_SECONDS

from stream_ctr.learn.network_learner import NetworkLearner
from stream_ctr.models import FNN, MODELS, DeepFM
from stream_ctr.models.layers import Dense

MODULES = [name for name, system in MODELS.items() if system.module]
Array = npt.NDArray[Any]

# The tolerance of a logit after 30 steps; the logits are of order 1.
TOLERANCE = {"fp32": 2e-5, "bf16": 3e-2}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_learn_returns_the_prediction_from_before_the_update(dropout: float) -> None:
    learner = small_network(dropout=dropout, table_optimizer="adagrad")
    for step in range(5):
        ids, labels = random_batch(seed=step)
        before = learner.predict(ids)
        logits = learner.learn(ids, labels)
        assert logits is not None
        assert np.array_equal(logits.numpy(), before)
        assert not np.array_equal(learner.predict(ids), before)


# -- plain learners --------------------------------------------------------------------------------


def mean_loss(logits: torch.Tensor, labels: Array) -> torch.Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(
        logits, torch.from_numpy(labels).double()
    )


class Plain:
    """A learner with autograd through the whole table in float64, and torch's Adam."""

    def __init__(
        self, learner: NetworkLearner, hidden: list[int], *, weight_decay: float = 0.0
    ) -> None:
        k = self.k = learner.table.embedding_dim
        self.rows = learner.table.rows[:, : k + 1].double()
        self.n = torch.zeros(len(self.rows), 2, dtype=torch.float64)
        self.rates = learner.table.rates
        self.value_fields = learner.value_fields
        self.model = DeepFM(fields=learner.fields, embedding_dim=k, hidden=hidden).double()
        self.model.load_state_dict(learner.model.state_dict())
        self.adam = torch.optim.Adam(self.model.parameters(), lr=0.001, weight_decay=weight_decay)

    def learn(self, ids: Array, labels: Array, values: Array) -> Array:
        k = self.k
        rates = self.rates
        table = self.rows.clone().requires_grad_()
        rows = table[torch.from_numpy(ids).long()]
        scale = torch.ones(ids.shape, dtype=torch.float64)
        scale[:, self.value_fields] = torch.from_numpy(values).double()
        rows = rows * scale[..., None]
        logits = self.model(rows[..., k], rows[..., :k])
        self.adam.zero_grad()
        mean_loss(logits, labels).backward()  # type: ignore[no-untyped-call]
        self.adam.step()
        assert table.grad is not None
        g = table.grad * len(ids)  # of the summed loss
        self.n += torch.stack([g[:, :k].square().mean(dim=1), g[:, k].square()], dim=1)
        self.rows[:, :k] -= rates.learning_rate * g[:, :k] / (rates.beta + self.n[:, :1].sqrt())
        self.rows[:, k] -= (
            rates.linear_learning_rate * g[:, k] / (rates.linear_beta + self.n[:, 1].sqrt())
        )
        found: Array = logits.detach().numpy()
        return found


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_thirty_steps_equal_those_of_a_plain_learner_in_double_precision(
    precision: str, weight_decay: float
) -> None:
    learner = small_network(
        table_optimizer="adagrad",
        table_learning_rate=0.3,
        table_beta=0.7,
        linear_learning_rate=0.6,
        linear_beta=1.5,
        value_fields=[0, 2],
        batch_size=600,
        hidden=[16, 16],
        dense_weight_decay=weight_decay,
        precision=precision,
        threads=2,
    )
    plain = Plain(learner, [16, 16], weight_decay=weight_decay)
    rng = np.random.default_rng(0)
    for step in range(30):
        n = 600 if step % 3 else 517  # 600 are two parts of 304 rows, eight of which are padding
        ids, labels = random_batch(n, seed=step)
        ids[:, 1] %= 5  # hot rows
        values = rng.uniform(-1, 1, (n, 2)).astype(np.float32)
        found = learner.learn(ids, labels, values)
        assert found is not None
        assert np.allclose(found, plain.learn(ids, labels, values), atol=TOLERANCE[precision])
    assert np.allclose(learner.table.rows[:, :5], plain.rows, atol=TOLERANCE[precision])
    for ours, theirs in zip(learner.model.parameters(), plain.model.parameters(), strict=True):
        assert np.allclose(ours.detach(), theirs.detach(), atol=TOLERANCE[precision] / 4)


class PlainSparse:
    """A learner with torch's sparse embeddings: SparseAdam for rows, Adam for the module."""

    def __init__(self, learner: NetworkLearner, model: str) -> None:
        make = MODELS[model].module
        assert make is not None
        self.module = make(fields=3, embedding_dim=4, hidden=[8, 8]).double()
        self.module.load_state_dict(learner.model.state_dict())
        width = learner.table.width
        self.v, self.w = (
            torch.nn.Embedding.from_pretrained(part.double(), freeze=False, sparse=True)  # type: ignore[no-untyped-call]
            for part in torch.split(learner.table.rows[:, : width + 1], [width, 1], dim=1)
        )
        groups = [
            {"params": [self.v.weight], "lr": 0.02},
            {"params": [self.w.weight], "lr": 0.01},
        ]
        self.sparse = torch.optim.SparseAdam(groups)
        self.adam = torch.optim.Adam(self.module.parameters(), lr=0.001)

    def learn(self, ids: Array, labels: Array) -> Array:
        index = torch.from_numpy(ids)
        logits = self.module(self.w(index).squeeze(2), self.v(index))
        self.sparse.zero_grad()
        self.adam.zero_grad()
        mean_loss(logits, labels).backward()  # type: ignore[no-untyped-call]
        self.sparse.step()  # type: ignore[no-untyped-call]
        self.adam.step()
        found: Array = logits.detach().numpy()
        return found


@pytest.mark.slow
@pytest.mark.parametrize("model", ["deepfm", "fm_dnn", "fm"])
def test_thirty_steps_with_adam_are_those_of_torch_with_sparse_embeddings(model: str) -> None:
    learner = small_network(
        model,
        table_optimizer="adam",
        table_learning_rate=0.02,
        linear_learning_rate=0.01,
        batch_size=600,
    )
    plain = PlainSparse(learner, model)
    for step in range(30):
        ids, labels = random_batch(600 if step % 3 else 517, seed=step)
        ids[:, 1] %= 5  # hot rows
        found = learner.learn(ids, labels)
        assert found is not None
        assert np.allclose(found, plain.learn(ids, labels), atol=1e-4)
    weights, m, _ = learner.table.rows[:, : 3 * (learner.table.width + 1)].chunk(3, dim=1)
    expected = torch.cat([plain.v.weight, plain.w.weight], dim=1).detach()
    assert np.allclose(weights, expected, atol=1e-4)
    state = [plain.sparse.state[part.weight]["exp_avg"] for part in (plain.v, plain.w)]
    # The moments are those of the gradient of the mean loss.
    assert np.allclose(m, torch.cat(state, dim=1), rtol=1e-3, atol=1e-6)


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["lr_dnn", "deepfm"])
def test_the_rate_of_first_order_weights_is_divided_by_the_number_of_summed_ones(
    model: str,
) -> None:
    learner = small_network(model, crosses=5, table_learning_rate=0.6, linear_learning_rate=2.4)
    rates = learner.table.rates
    summed = 8 if model == "lr_dnn" else 3
    assert rates.learning_rate == pytest.approx(0.6 / 3)
    assert rates.linear_learning_rate == pytest.approx(2.4 / summed)


def test_the_paper_gives_tanh_to_ipnn_and_relu_to_all_others() -> None:
    def activations(name: str) -> set[str]:
        layers = small_network(name).model.modules()
        return {layer.activation for layer in layers if isinstance(layer, Dense)} - {"none"}

    expected = {name: {"relu"} for name in MODULES} | {"ipnn": {"tanh"}, "fm": set()}
    assert {name: activations(name) for name in MODULES} == expected


def test_threads_that_predict_get_each_their_own_logits() -> None:
    learner = small_network(value_fields=[1])
    parts = [(random_batch(9, seed=i)[0], np.full((9, 1), i, np.float32)) for i in range(200)]
    alone = [learner.predict(*part) for part in parts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda part: learner.predict(*part), parts))
    assert all(np.array_equal(*pair) for pair in zip(alone, together, strict=True))


def test_missing_values_are_an_error() -> None:
    learner = small_network(value_fields=[1])
    with pytest.raises(ValueError, match="the values of 1 fields are missing"):
        learner.predict(random_batch()[0])
    with pytest.raises(ValueError, match="the values of 1 fields are missing"):
        learner.learn(*random_batch())


def test_no_examples_have_no_logits() -> None:
    assert small_network().predict(np.empty((0, 3), np.int32)).shape == (0,)


SERVE_BF16 = """
import sys
import numpy as np
sys.path.insert(0, "tests")
from support.learners import random_batch, small_network
np.save(sys.argv[1], small_network(precision="bf16").predict(random_batch()[0]))
"""


@pytest.mark.slow
def test_a_model_of_bf16_serves_on_a_processor_without_it(tmp_path: Path) -> None:
    here = small_network(precision="bf16").predict(random_batch()[0])
    path = tmp_path / "logits.npy"
    narrow = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    command = [sys.executable, "-c", SERVE_BF16, str(path)]
    subprocess.run(command, env=narrow, check=True, timeout=PATIENCE_SECONDS)
    assert np.allclose(np.load(path), here, atol=0.02)


def test_a_short_batch_that_is_padded_learns_the_same_as_an_exact_one() -> None:
    padded = small_network(batch_size=16)
    exact = small_network(batch_size=5)
    ids, labels = random_batch(5)
    for _ in range(3):
        padded.learn(ids, labels)
        exact.learn(ids, labels)
    assert torch.allclose(padded.table.rows, exact.table.rows, atol=1e-6)
    for a, b in zip(padded.model.parameters(), exact.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_one_seed_gives_one_model_and_two_seeds_give_two() -> None:
    def train(seed: int) -> Array:
        # With embeddings that start at 0, chance is only in dropout and in the dense part.
        learner = small_network(seed=seed, dropout=0.3, initial_scale=0.0)
        for step in range(4):
            learner.learn(*random_batch(seed=step))
        return learner.weights()["table"]

    assert np.array_equal(train(1), train(1))
    assert np.array_equal(train(2**62), train(2**62))
    assert not np.array_equal(train(1), train(2))


def test_it_learns_an_interaction_that_no_linear_model_can() -> None:
    learner = small_network(fields=2, dense_learning_rate=0.01, batch_size=64)
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(300):
        bits = rng.integers(0, 2, (64, 2))
        labels = (bits[:, 0] ^ bits[:, 1]).astype(np.uint8)
        logits = learner.learn((bits + [[0, 2]]).astype(np.int32), labels)
        assert logits is not None
        losses.append(logloss(logits.numpy(), labels))
    assert losses[0] > 0.6
    assert np.mean(losses[-20:]) < 0.05


def test_bf16_is_close_to_fp32() -> None:
    ids, labels = random_batch()
    exact = small_network()
    rounded = small_network(precision="bf16")
    assert np.allclose(exact.predict(ids), rounded.predict(ids), atol=0.02)
    first, second = exact.learn(ids, labels), rounded.learn(ids, labels)
    assert first is not None
    assert second is not None
    assert not torch.equal(first, second)
    assert rounded.table.rows.dtype == torch.float32


@pytest.mark.parametrize("name", MODULES)
def test_without_the_extra_pass_the_model_learns_the_same(name: str) -> None:
    with_pass = small_learner(name, dropout=0.3)
    without = small_learner(name, dropout=0.3, progressive=False)
    for ids, labels in planted_batches(3, seed=0):
        predicted = with_pass.learn(ids, labels)
        dropped = without.learn(ids, labels)
    assert_equal_states(with_pass.weights(), without.weights())
    assert torch.equal(predicted, dropped) is (name == "fm"), "FM has nothing to drop"


# -- state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"dropout": 0.5}, {"table_optimizer": "adam", "model": "fm_dnn"}], ids=str
)
def test_a_learner_restored_from_its_state_continues_bit_for_bit(options: dict[str, Any]) -> None:
    straight, before, after = (small_network(**options) for _ in range(3))
    for step in range(6):
        ids, labels = random_batch(seed=step)
        straight.learn(ids, labels)
        if step < 3:
            before.learn(ids, labels)
    after.learn(*random_batch(seed=7))  # loading replaces this
    after.load_weights(before.weights())
    after.load_optimizer_state(before.optimizer_state())
    for step in range(3, 6):
        after.learn(*random_batch(seed=step))
    assert_equal_states(state_of(straight), state_of(after))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_every_system_continues_bit_for_bit_on_any_number_of_threads(
    name: str, dropout: float
) -> None:
    options = {
        "dropout": dropout,
        "pretrain_examples": 1200,
        "batch_size": 600,  # two parts a batch, for two threads
        "crosses": 2,
    }
    straight, before, after = (
        small_learner(name, threads=threads, **options) for threads in (1, 2, 3)
    )
    steps = planted_batches(5, seed=0, crosses=2, size=600)
    for ids, labels in steps:
        straight.learn(ids, labels)
    for ids, labels in steps[:3]:
        before.learn(ids, labels)
    after.load_weights(before.weights())
    after.load_optimizer_state(before.optimizer_state())
    for ids, labels in steps[3:]:
        after.learn(ids, labels)
    assert_equal_states(state_of(straight), state_of(after))


def test_copies_of_the_weights_stay_except_in_memory_that_is_reused() -> None:
    learner = small_network()
    reused = learner.weights(reuse=True)["table"]
    own = learner.weights()["table"]
    kept = own.copy()
    learner.learn(*random_batch())
    assert np.array_equal(own, kept)
    assert np.array_equal(reused, kept)
    assert not np.array_equal(learner.weights(reuse=True)["table"], kept)
    assert not np.array_equal(reused, kept)


def test_weights_of_another_shape_are_refused() -> None:
    weights = small_network().weights()
    with pytest.raises(ValueError, match=r"'table' is float32 \(1024, 16\), expected"):
        small_network(table_bits=9).load_weights(weights)
    with pytest.raises(ValueError, match=r"'dense.*expected float32"):
        small_network(hidden=[8, 7]).load_weights(weights)


@pytest.mark.parametrize("name", ["table", "dense.deep.layers.0.bias"])
def test_weights_that_are_not_finite_are_refused_and_nothing_is_loaded(name: str) -> None:
    learner = small_network()
    before = learner.weights()
    other = small_network(seed=1).weights()
    other[name] = other[name].copy()
    other[name].flat[0] = np.inf
    with pytest.raises(ValueError, match=f"{name!r} holds values that are not finite"):
        learner.load_weights(other)
    assert_equal_states(learner.weights(), before)


# -- FNN changes -----------------------------------------------------------------------------------


def test_fnn_is_an_fm_until_its_pretraining_examples_are_learned() -> None:
    fnn = small_learner("fnn", pretrain_examples=300)  # three batches of 128
    fm = small_learner("fm")
    as_network: list[int] = []
    for ids, labels in planted_batches(5, seed=0):
        equal = np.array_equal(fnn.learn(ids, labels), fm.learn(ids, labels))
        assert equal is not bool(as_network)
        if not fnn.pretraining:
            as_network.append(fnn.steps)
    assert as_network == [3, 4, 5]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_fnn_keeps_embeddings_and_starts_its_optimisers_anew(decay: float) -> None:
    fnn = small_learner("fnn", pretrain_examples=256, dense_weight_decay=decay)
    first, second, third = planted_batches(3, seed=0)
    fnn.learn(*first)
    network = {key: value for key, value in fnn.weights().items() if key.startswith("dense.deep")}
    fm = small_learner("fm")
    for batch in (first, second):
        fm.learn(*batch)
    fnn.learn(*second)
    assert not fnn.pretraining
    assert_equal_states(network, {key: fnn.weights()[key] for key in network})
    k = 4
    table = fnn.weights()["table"]
    assert np.array_equal(table[:, : k + 1], fm.weights()["table"][:, : k + 1])
    assert not table[:, k + 1 :].any()
    moments = {key: value for key, value in fnn.optimizer_state().items() if key != "steps"}
    assert moments
    assert not any(value.any() for value in moments.values())
    # Adam's first step is its rate in each direction, whatever the size of the gradient.
    before = fnn.weights()["dense.deep.layers.0.bias"]
    fnn.learn(*third)
    moved = np.abs(fnn.weights()["dense.deep.layers.0.bias"] - before)
    assert moved[moved > 0] == pytest.approx(0.001 * (128 / 512) ** 0.5, rel=1e-2)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_weights_of_fnn_carry_its_phase(steps: int) -> None:
    there = small_learner("fnn", pretrain_examples=256)
    for ids, labels in planted_batches(steps, seed=0):
        there.learn(ids, labels)
    here = small_learner("fnn", pretrain_examples=10**9, seed=9)
    ids, _ = planted_stream(50, seed=1)
    assert not np.array_equal(here.predict(ids), there.predict(ids))
    here.load_weights(there.weights())
    assert here.pretraining is there.pretraining is (steps < 2)
    assert np.array_equal(here.predict(ids), there.predict(ids))


def test_weights_from_before_the_change_take_fnn_back_to_it() -> None:
    learner = small_learner("fnn", pretrain_examples=256)
    first, second = planted_batches(2, seed=0)
    learner.learn(*first)
    weights, state = learner.weights(), learner.optimizer_state()
    learner.learn(*second)
    once = learner.weights()
    learner.load_weights(weights)
    learner.load_optimizer_state(state)
    assert learner.pretraining
    learner.learn(*second)
    assert_equal_states(once, learner.weights())


def test_fnn_without_pre_training_is_a_network_at_once() -> None:
    learner = small_learner("fnn")
    assert not learner.pretraining
    assert isinstance(learner.model, FNN)
    assert not learner.model.pretraining


def test_the_weights_of_fnns_network_decay_only_once_it_has_begun() -> None:
    decaying, other = (
        small_learner("fnn", pretrain_examples=256, dense_weight_decay=decay)
        for decay in (10.0, 0.0)
    )
    for step, (ids, labels) in enumerate(planted_batches(60, seed=0)):
        decaying.learn(ids, labels)
        other.learn(ids, labels)
        sizes = [
            np.abs(learner.weights()["dense.deep.layers.0.weight"]).sum()
            for learner in (decaying, other)
        ]
        assert bool(sizes[0] == sizes[1]) is (step < 2)
    assert sizes[0] < 0.9 * sizes[1]


# -- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_the_table_lives_there_and_learns_the_same() -> None:
    cpu = small_network()
    gpu = small_network(device="cuda")
    gpu.load_weights(cpu.weights())
    for step in range(10):
        ids, labels = random_batch(seed=step)
        expected, found = cpu.learn(ids, labels), gpu.learn(ids, labels)
        assert expected is not None
        assert found is not None
        assert np.allclose(expected.numpy(), found.cpu().numpy(), atol=1e-3)
    assert gpu.table.rows.is_cuda
