"""Model, table and learner against independent computations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from stream_ctr.errors import ConfigError
from stream_ctr.learner import Learner, choose_device
from stream_ctr.models import DeepFM
from stream_ctr.models.layers import MLP, Dropout, pairwise_inner_products
from stream_ctr.table import Table


def small(**changes) -> Learner:
    options = {"fields": 3, "embedding_dim": 4, "hidden": [8, 8], "table_bits": 10, "batch_size": 16, "device": "cpu", "initial_scale": 0.3}
    return Learner("deepfm", **{**options, **changes})


def batch(n: int = 16, *, fields: int = 3, seed: int = 0, rows: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, rows, (n, fields)).astype(np.int32), rng.integers(0, 2, n).astype(np.uint8)


# -- the model ------------------------------------------------------------------------------------------------------------------------


def test_fm_is_the_sum_over_field_pairs_of_inner_products():
    v = torch.randn(5, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pairs = [sum(float(v[b, i] @ v[b, j]) for i, j in itertools.combinations(range(7), 2)) for b in range(5)]
    assert torch.allclose(pairwise_inner_products(v), torch.tensor(pairs, dtype=torch.float64), atol=1e-12)


def test_deepfm_is_equations_1_to_4_written_out():
    torch.manual_seed(0)
    model = DeepFM(fields=3, embedding_dim=2, hidden=[4, 5], activation="tanh").double()
    w, v = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, 2, dtype=torch.float64)
    parameters = [p.detach().numpy() for p in model.parameters()]
    for row in range(6):
        a = np.concatenate([v[row, i].numpy() for i in range(3)])  # (3)
        for weight, bias in zip(parameters[0:4:2], parameters[1:4:2], strict=True):
            a = np.tanh(weight @ a + bias)  # (4)
        y_dnn = float((parameters[4] @ a + parameters[5])[0])
        y_fm = float(w[row].sum()) + sum(float(v[row, i] @ v[row, j]) for i in range(3) for j in range(i + 1, 3))  # (2)
        assert model(w, v)[row].item() == pytest.approx(y_fm + y_dnn, abs=1e-12)  # the logit of (1)


def test_the_gradient_of_deepfm_agrees_with_finite_differences():
    torch.manual_seed(1)
    model = DeepFM(fields=3, embedding_dim=2, hidden=[4], activation="tanh").double()
    w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    v = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(model, (w, v))


def test_dropout_keeps_the_mean_and_is_off_while_predicting():
    layer = Dropout(0.4)
    layer.generator = torch.Generator().manual_seed(0)
    x = torch.ones(100_000)
    dropped = layer(x)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.01)
    assert float((dropped == 0).float().mean()) == pytest.approx(0.4, abs=0.01)
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid"])
def test_mlp_has_one_activation_after_each_hidden_layer_and_none_at_the_end(activation):
    kinds = [type(layer).__name__.lower() for layer in MLP(4, [3, 2], activation=activation).layers]
    assert kinds == ["linear", activation, "dropout"] * 2 + ["linear"]


# -- the table ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adagrad", "sgd"])
def test_a_table_step_equals_a_slow_one_over_the_whole_table(optimizer):
    table = Table(
        bits=5,
        embedding_dim=3,
        optimizer=optimizer,
        learning_rate=0.1,
        beta=0.5,
        linear_learning_rate=0.3,
        linear_beta=2.0,
        initial_scale=0.5,
        seed=3,
    )
    rng = np.random.default_rng(0)
    weights = table.gather(torch.arange(32, dtype=torch.int32)[:, None])[:, 0].double().numpy().copy()  # [32, K + 1]
    state = np.zeros((32, 2))
    for _ in range(20):
        ids = rng.integers(0, 32, (8, 4)).astype(np.int32)  # with repeats, in an example and between them
        gradient = rng.normal(size=(8, 4, 4))
        dense = np.zeros((32, 4))
        np.add.at(dense, ids.ravel(), gradient.reshape(-1, 4))
        if optimizer == "adagrad":
            state[:, 0] += (dense[:, :3] ** 2).mean(axis=1)
            state[:, 1] += dense[:, 3] ** 2
            dense[:, :3] /= 0.5 + np.sqrt(state[:, :1])
            dense[:, 3] /= 2.0 + np.sqrt(state[:, 1])
        weights -= [0.1, 0.1, 0.1, 0.3] * dense
        table.update(torch.from_numpy(ids), torch.from_numpy(gradient).float())
    assert np.allclose(table.gather(torch.arange(32, dtype=torch.int32)[:, None])[:, 0].numpy(), weights, atol=2e-5)


def test_rows_that_no_example_has_stay_untouched_and_one_row_is_whole_cache_lines():
    table = Table(bits=6, embedding_dim=10)
    before = table.rows.clone()
    table.update(torch.tensor([[1, 2], [2, 5]], dtype=torch.int32), torch.ones(2, 2, 11))
    changed = (table.rows != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == [1, 2, 5]
    assert table.rows.shape[1] * 4 == 64
    assert Table(bits=4, embedding_dim=16).rows.shape[1] % 16 == 0


# -- the learner ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_learn_returns_the_prediction_from_before_the_update(dropout):
    learner = small(dropout=dropout)
    for step in range(5):
        ids, labels = batch(seed=step)
        before = learner.predict(ids)
        assert np.array_equal(learner.learn(ids, labels).numpy(), before)
        assert not np.array_equal(learner.predict(ids), before)


def test_a_step_equals_one_with_autograd_through_the_whole_table_and_torch_adam():
    learner = small(table_learning_rate=0.3, table_beta=0.7, linear_learning_rate=0.6, linear_beta=1.5)  # of 3 fields: 0.1 and 0.2 each
    ids, labels = batch(rows=50)
    k = 4
    whole = learner.table.rows[:, : k + 1].clone().requires_grad_()
    reference = DeepFM(fields=3, embedding_dim=k, hidden=[8, 8])
    reference.load_state_dict(learner.model.state_dict())
    adam = torch.optim.Adam(reference.parameters(), lr=0.001)
    rows = whole[torch.from_numpy(ids).long()]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(reference(rows[..., k], rows[..., :k]), torch.from_numpy(labels).float())
    loss.backward()
    adam.step()
    g = whole.grad * len(ids)  # of the summed loss
    step_v = 0.1 * g[:, :k] / (0.7 + g[:, :k].square().mean(dim=1, keepdim=True).sqrt())
    step_w = 0.2 * g[:, k:] / (1.5 + g[:, k:].abs())
    expected = whole.detach() - torch.cat([step_v, step_w], dim=1)
    learner.learn(ids, labels)
    assert torch.allclose(learner.table.rows[:, : k + 1], expected, atol=1e-5)
    for ours, theirs in zip(learner.model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_an_examples_logit_does_not_depend_on_its_company():
    learner = small()
    ids, labels = batch(40)
    learner.learn(ids[:16], labels[:16])
    together = learner.predict(ids)
    alone = np.concatenate([learner.predict(ids[i : i + 1]) for i in range(40)])
    assert np.array_equal(together, alone)


def test_padding_a_short_batch_learns_what_the_short_batch_says():
    padded, exact = small(batch_size=16), small(batch_size=5)
    ids, labels = batch(5)
    for _ in range(3):
        padded.learn(ids, labels)
        exact.learn(ids, labels)
    assert torch.allclose(padded.table.rows, exact.table.rows, atol=1e-6)
    for a, b in zip(padded.model.parameters(), exact.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_value_multiplies_weight_and_embedding():
    learner = small(value_fields=[2])
    ids, _ = batch(4)
    values = np.array([[0.5], [2.0], [-1.0], [0.0]], np.float32)
    rows = learner.table.gather(torch.from_numpy(ids))
    rows[:, 2] *= torch.from_numpy(values)
    with torch.no_grad():
        expected = learner.model.eval()(rows[..., 4], rows[..., :4])
    assert np.allclose(learner.predict(ids, values), expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_learner_restored_from_its_state_goes_on_bit_for_bit(dropout):
    straight, before = small(dropout=dropout), small(dropout=dropout)
    for step in range(6):
        ids, labels = batch(seed=step)
        straight.learn(ids, labels)
        if step < 3:
            before.learn(ids, labels)
    after = small(dropout=dropout, seed=99)
    after.seed = 0
    after.load_weights(before.weights())
    after.load_optimizer_state(before.optimizer_state())
    for step in range(3, 6):
        after.learn(*batch(seed=step))
    for name, array in straight.weights().items():
        assert np.array_equal(array, after.weights()[name]), name


def test_two_runs_with_one_seed_are_equal_and_with_two_seeds_are_not():
    def train(seed: int) -> np.ndarray:
        learner = small(seed=seed, dropout=0.3)
        for step in range(4):
            learner.learn(*batch(seed=step))
        return learner.weights()["table"]

    assert np.array_equal(train(1), train(1))
    assert not np.array_equal(train(1), train(2))


def test_it_learns_an_interaction_that_no_linear_model_can():
    learner = small(fields=2, dense_learning_rate=0.01, batch_size=64)
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(300):
        bits = rng.integers(0, 2, (64, 2))
        labels = (bits[:, 0] ^ bits[:, 1]).astype(np.uint8)
        logits = learner.learn((bits + [[0, 2]]).astype(np.int32), labels).numpy()
        losses.append(np.logaddexp(0, np.where(labels == 1, -logits, logits)).mean())
    assert losses[0] > 0.6
    assert np.mean(losses[-20:]) < 0.05


def test_bf16_is_close_to_fp32():
    ids, labels = batch()
    exact, rounded = small(), small(precision="bf16")
    assert np.allclose(exact.predict(ids), rounded.predict(ids), atol=0.02)
    assert not np.array_equal(exact.learn(ids, labels).numpy(), rounded.learn(ids, labels).numpy())
    assert rounded.table.rows.dtype == torch.float32


def test_weights_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"'table' is float32 \(1024, 16\), expected"):
        small(table_bits=9).load_weights(small().weights())
    with pytest.raises(ValueError, match=r"'dense.*expected float32"):
        small(hidden=[8, 7]).load_weights(small().weights())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_a_clear_error():
    with pytest.raises(ConfigError, match="no CUDA GPU"):
        choose_device("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_the_table_lives_there_and_learns_the_same():
    cpu, gpu = small(), small(device="cuda")
    gpu.load_weights(cpu.weights())
    for step in range(10):
        ids, labels = batch(seed=step)
        assert np.allclose(cpu.learn(ids, labels).numpy(), gpu.learn(ids, labels).cpu().numpy(), atol=1e-3)
    assert gpu.table.rows.is_cuda
