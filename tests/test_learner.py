"""Table and learner against independent computations."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.patience import PATIENCE_SECONDS

from stream_ctr.errors import ConfigError
from stream_ctr.learn import table_kernels
from stream_ctr.learn.cpu_step import parts_of
from stream_ctr.learn.learner import NetworkLearner, choose_device, choose_precision, require_shapes
from stream_ctr.learn.table import Rates, Table, columns
from stream_ctr.models import MODELS, DeepFM


def small(**changes) -> NetworkLearner:
    options = {
        "fields": 3,
        "embedding_dim": 4,
        "hidden": [8, 8],
        "table_bits": 10,
        "batch_size": 16,
        "device": "cpu",
        "initial_scale": 0.3,
    }
    return NetworkLearner(**{"model": "deepfm", **options, **changes})


def batch(
    n: int = 16, *, fields: int = 3, seed: int = 0, rows: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, rows, (n, fields)).astype(np.int32), rng.integers(0, 2, n).astype(
        np.uint8
    )


# -- the table -----------------------------------------------------------------------------------


def sorted_ids(ids: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    keys, order = np.empty_like(ids), np.empty_like(ids)
    table_kernels.sort_ids(ids, bits, keys, order, np.empty((2, len(ids)), np.int32))
    return keys, order


@pytest.mark.parametrize("bits", [3, 11, 12, 20, 24, 30])
def test_ids_are_sorted_and_equal_ones_stay_in_their_order(bits):
    ids = np.random.default_rng(bits).integers(0, 1 << bits, 5000).astype(np.int32)
    ids[::7] = ids[0]
    keys, order = sorted_ids(ids, bits)
    assert np.array_equal(order, np.argsort(ids, kind="stable"))
    assert np.array_equal(keys, np.sort(ids))


def stepped(
    table: Table,
    ids: np.ndarray,
    gradient: np.ndarray,
    *,
    steps: int = 0,
    times: float = 1.0,
    split: Sequence[int] = (),
) -> None:
    """A step with the `gradient` [n, width + 1] of what was gathered for `ids` [n], by one or by those between whom `split` is."""
    update = table_kernels.update(table.embedding_dim, table.embeddings, table.rates.optimizer)
    gw, gv = gradient[:, -1].astype(np.float32), gradient[:, :-1].astype(np.float32)
    for first, last in itertools.pairwise([0, *split, len(ids)]):
        update(
            table.rows.numpy(), *sorted_ids(ids, table.bits), first, last, gw, gv, np.float32(times), *table.rates.floats(steps)
        )  # fmt: skip


@pytest.mark.parametrize("optimizer", ["adagrad", "sgd"])
@pytest.mark.parametrize("embeddings", [1, 2])
@pytest.mark.parametrize("split", [[], [5, 6, 7]])  # by whom the rows are stepped
def test_a_table_step_equals_a_slow_one_over_the_whole_table(optimizer, embeddings, split):
    rates = Rates(optimizer, learning_rate=0.1, beta=0.5, linear_learning_rate=0.3, linear_beta=2.0)
    table = Table(
        bits=5, embedding_dim=3, embeddings=embeddings, rates=rates, initial_scale=0.5, seed=3
    )
    width = 3 * embeddings
    rng = np.random.default_rng(0)
    weights = table.rows[:, : width + 1].double().numpy().copy()
    state = np.zeros((32, embeddings + 1))
    for _ in range(20):
        ids = rng.integers(0, 32, 32).astype(np.int32)  # with repeats
        gradient = rng.normal(size=(32, width + 1)) * [*np.repeat([1.0, 5.0], 3)[:width], 1.0]
        dense = np.zeros((32, width + 1))
        np.add.at(dense, ids, 2.0 * gradient)
        if optimizer == "adagrad":
            for e in range(embeddings):
                its = slice(3 * e, 3 * e + 3)
                state[:, e] += (dense[:, its] ** 2).mean(axis=1)
                dense[:, its] /= 0.5 + np.sqrt(state[:, e, None])
            state[:, -1] += dense[:, -1] ** 2
            dense[:, -1] /= 2.0 + np.sqrt(state[:, -1])
        weights -= [*[0.1] * width, 0.3] * dense
        stepped(table, ids, gradient, times=2.0, split=split)
    w, v = np.empty((16, 2), np.float32), np.empty((16, 2, width), np.float32)
    table_kernels.gather(width)(
        table.rows.numpy(),
        np.arange(32, dtype=np.int32).reshape(16, 2),
        np.empty((0, 0), np.float32),
        w,
        v,
    )
    assert np.allclose(np.column_stack([v.reshape(32, width), w.ravel()]), weights, atol=5e-5)


class SparseAdam:
    """torch's, over the V and w of a table, which are parameters of their own: their rates may differ."""

    def __init__(self, table: Table) -> None:
        self.v, self.w = (
            torch.nn.Parameter(part.clone())
            for part in table.rows[:, : table.width + 1].split([table.width, 1], dim=1)
        )
        rates = table.rates.learning_rate, table.rates.linear_learning_rate
        groups = [
            {"params": [part], "lr": rate}
            for part, rate in zip((self.v, self.w), rates, strict=True)
        ]
        self._optimizer = torch.optim.SparseAdam(groups)

    def step(self, ids: np.ndarray, gradient: np.ndarray) -> None:
        at, g = torch.from_numpy(ids).long()[None], torch.from_numpy(gradient).float()
        for part, its in ((self.v, g[:, :-1]), (self.w, g[:, -1:])):
            part.grad = torch.sparse_coo_tensor(at, its, part.shape, check_invariants=True)
        self._optimizer.step()

    @property
    def moments(self) -> list[torch.Tensor]:
        state = [self._optimizer.state[part] for part in (self.v, self.w)]
        return [
            torch.cat([each[name] for each in state], dim=1) for name in ("exp_avg", "exp_avg_sq")
        ]


@pytest.mark.parametrize("embeddings", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 1e-8])  # the latter about as small as epsilon
def test_adam_on_the_table_is_torchs_sparse_adam(embeddings, scale):
    rates = Rates.of(
        "adam", fields=9, learning_rate=0.02, beta=3.0, linear_learning_rate=0.005, linear_beta=1.0
    )
    table = Table(bits=5, embedding_dim=5, embeddings=embeddings, rates=rates, initial_scale=0.5)
    theirs, width, rng = SparseAdam(table), 5 * embeddings, np.random.default_rng(0)
    for step in range(30):
        ids = (rng.zipf(1.5, 40) % 32).astype(np.int32)  # some often, some never
        gradient = scale * rng.normal(size=(40, width + 1))
        theirs.step(ids, gradient)
        stepped(table, ids, gradient, steps=step, split=[3, 30])
    ours = table.rows[:, : 3 * (width + 1)].split(width + 1, dim=1)
    for found, expected, atol in zip(
        ours,
        (torch.cat([theirs.v, theirs.w], dim=1), *theirs.moments),
        (1e-6, 1e-6, 1e-6),
        strict=True,
    ):
        assert torch.allclose(found, expected, rtol=2e-5, atol=atol * min(scale, 1.0) ** 0.5)
    assert not torch.equal(
        table.rows[:, :width],
        Table(bits=5, embedding_dim=5, embeddings=embeddings, initial_scale=0.5).rows[:, :width],
    )


def test_one_row_is_whole_cache_lines():
    assert columns(10) * 4 == columns(13) * 4 == 64
    assert columns(14) == columns(16) == 32
    assert columns(10, embeddings=2) == 32  # 20 + 1, three n
    assert columns(10, optimizer="adam") == 48  # three times 10 + 1
    assert columns(10, embeddings=2, optimizer="adam") == 64  # three times 20 + 1
    assert columns(15, optimizer="sgd") == 16


def test_the_table_forgets_its_optimiser_and_keeps_its_weights():
    table = Table(
        bits=4, embedding_dim=3, embeddings=2, rates=Rates("adam", 0.01, 1e-8, 0.01, 1e-8)
    )
    stepped(table, np.arange(16, dtype=np.int32), np.ones((16, 7)))
    weights = table.rows[:, :7].clone()
    assert (table.rows[:, 7:21] != 0).all()
    table.forget()
    assert torch.equal(table.rows[:, :7], weights)
    assert not table.rows[:, 7:].any()


# -- the learner ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_learn_returns_the_prediction_from_before_the_update(dropout):
    learner = small(dropout=dropout)
    for step in range(5):
        ids, labels = batch(seed=step)
        before = learner.predict(ids)
        assert np.array_equal(learner.learn(ids, labels).numpy(), before)
        assert not np.array_equal(learner.predict(ids), before)


class Plain:
    """The learner as one would write it down: autograd through the whole table in float64, torch's Adam for the dense part."""

    def __init__(
        self, learner: NetworkLearner, hidden: list[int], *, weight_decay: float = 0.0
    ) -> None:
        k = self.k = learner.table.embedding_dim
        self.rows = learner.table.rows[:, : k + 1].double()
        self.state = torch.zeros(len(self.rows), 2, dtype=torch.float64)
        self.rates, self.value_fields = learner.table.rates, learner.value_fields
        self.model = DeepFM(fields=learner.fields, embedding_dim=k, hidden=hidden).double()
        self.model.load_state_dict(learner.model.state_dict())
        self.adam = torch.optim.Adam(self.model.parameters(), lr=0.001, weight_decay=weight_decay)

    def learn(self, ids: np.ndarray, labels: np.ndarray, values: np.ndarray) -> np.ndarray:
        k, rates = self.k, self.rates
        whole = self.rows.clone().requires_grad_()
        rows = whole[torch.from_numpy(ids).long()]
        scale = torch.ones(ids.shape, dtype=torch.float64)
        scale[:, self.value_fields] = torch.from_numpy(values).double()
        rows = rows * scale[..., None]
        logits = self.model(rows[..., k], rows[..., :k])
        self.adam.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(
            logits, torch.from_numpy(labels).double()
        ).backward()
        self.adam.step()
        g = whole.grad * len(ids)  # of the summed loss
        self.state += torch.stack([g[:, :k].square().mean(dim=1), g[:, k].square()], dim=1)
        self.rows[:, :k] -= rates.learning_rate * g[:, :k] / (rates.beta + self.state[:, :1].sqrt())
        self.rows[:, k] -= (
            rates.linear_learning_rate * g[:, k] / (rates.linear_beta + self.state[:, 1].sqrt())
        )
        return logits.detach().numpy()


TOLERANCE = {"fp32": 2e-5, "bf16": 3e-2}  # of a logit after 30 steps; the logits are of order 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_thirty_steps_equal_those_of_a_plain_learner_in_double_precision(precision, weight_decay):
    options = {
        "table_learning_rate": 0.3,
        "table_beta": 0.7,
        "linear_learning_rate": 0.6,
        "linear_beta": 1.5,
        "value_fields": [0, 2],
    }
    learner = small(
        **options,
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
        ids, labels = batch(n, seed=step)
        ids[:, 1] %= 5  # hot rows
        values = rng.uniform(-1, 1, (n, 2)).astype(np.float32)
        before, expected = (
            learner.learn(ids, labels, values).numpy(),
            plain.learn(ids, labels, values),
        )
        assert np.allclose(before, expected, atol=TOLERANCE[precision])
    assert np.allclose(learner.table.rows[:, :5], plain.rows, atol=TOLERANCE[precision])
    for ours, theirs in zip(learner.model.parameters(), plain.model.parameters(), strict=True):
        assert np.allclose(ours.detach(), theirs.detach(), atol=TOLERANCE[precision] / 4)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["deepfm", "fm_dnn", "fm"])
def test_thirty_steps_with_adam_throughout_are_those_of_torch_with_sparse_embeddings(model):
    k, width = 4, 4 * MODELS[model].embeddings
    learner = small(
        model=model,
        table_optimizer="adam",
        table_learning_rate=0.02,
        linear_learning_rate=0.01,
        batch_size=600,
    )
    module = MODELS[model].module(fields=3, embedding_dim=k, hidden=[8, 8]).double()
    module.load_state_dict(learner.model.state_dict())
    v, w = (torch.nn.Embedding.from_pretrained(part.double(), freeze=False, sparse=True)
            for part in learner.table.rows[:, : width + 1].split([width, 1], dim=1))  # fmt: skip
    sparse = torch.optim.SparseAdam(
        [{"params": [v.weight], "lr": 0.02}, {"params": [w.weight], "lr": 0.01}]
    )
    optimizers = sparse, torch.optim.Adam(module.parameters(), lr=0.001)
    for step in range(30):
        ids, labels = batch(600 if step % 3 else 517, seed=step)
        ids[:, 1] %= 5  # hot rows
        places = torch.from_numpy(ids)
        logits = module(w(places).squeeze(2), v(places))
        assert np.allclose(learner.learn(ids, labels).numpy(), logits.detach(), atol=1e-4)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, torch.from_numpy(labels).double()
        )
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    assert np.allclose(
        learner.table.rows[:, : width + 1],
        torch.cat([v.weight, w.weight], dim=1).detach(),
        atol=1e-4,
    )
    moments = torch.cat(
        [sparse.state[part.weight]["exp_avg"] for part in (v, w)], dim=1
    )  # of the gradient of the mean loss
    assert np.allclose(
        learner.table.rows[:, width + 1 : 2 * (width + 1)], moments, rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("fields", [3, 30])
def test_a_rate_of_0_is_the_optimisers_own_and_that_of_adam_is_not_divided_by_the_number_of_fields(
    fields,
):
    rates = {
        optimizer: small(fields=fields, table_optimizer=optimizer).table.rates
        for optimizer in ("adagrad", "sgd", "adam")
    }
    found = {
        optimizer: (each.learning_rate, each.linear_learning_rate)
        for optimizer, each in rates.items()
    }
    assert found == {
        "adagrad": (1.0 / fields, 2.0 / fields),
        "sgd": (1.0 / fields, 2.0 / fields),
        "adam": (0.001, 0.001),
    }


@pytest.mark.parametrize("model", ["lr_dnn", "deepfm"])
def test_the_rate_of_first_order_weights_is_divided_by_as_many_as_are_summed(model):
    rates = small(
        model=model, crosses=5, table_learning_rate=0.6, linear_learning_rate=2.4
    ).table.rates
    summed = 8 if model == "lr_dnn" else 3
    assert (rates.learning_rate, rates.linear_learning_rate) == (
        pytest.approx(0.6 / 3),
        pytest.approx(2.4 / summed),
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "optimizer", [{}, {"table_optimizer": "adam", "model": "fm_dnn"}], ids=["adagrad", "adam"]
)
def test_the_model_is_the_same_bit_for_bit_with_any_number_of_threads(precision, optimizer):
    def learned(threads: int) -> dict[str, np.ndarray]:
        options = {
            "batch_size": 1500,
            "hidden": [33, 17],
            "dropout": 0.2,
            "value_fields": [1],
            "precision": precision,
            **optimizer,
        }
        learner = small(**options, threads=threads)
        for step in range(4):
            ids, labels = batch(1500 if step else 700, seed=step)
            learner.learn(ids, labels, ids[:, :1].astype(np.float32) / 1024)
        return learner.weights() | learner.optimizer_state()

    one = learned(1)
    for threads in (2, 3, 5):
        assert all(np.array_equal(one[name], array) for name, array in learned(threads).items())


@given(st.integers(1, 20_000))
def test_the_parts_of_a_batch_are_its_rows_in_parts_of_one_size(batch_size):
    parts = parts_of(batch_size)
    assert [row for part in parts for row in range(part.start, part.stop)][:batch_size] == list(
        range(batch_size)
    )
    assert len({part.stop - part.start for part in parts}) == 1
    assert parts[-1].start < batch_size <= parts[-1].stop


@pytest.mark.parametrize("odd", ["row", "weight", "value"])
def test_a_step_that_is_not_finite_or_explodes_changes_nothing(odd):
    learner, values = small(batch_size=600, value_fields=[0]), np.ones((600, 1), np.float32)
    ids, labels = batch(600)
    learner.learn(ids, labels, values)
    if odd == "row":
        learner.table.rows[ids[-1, 0], 0] = float("nan")
    elif odd == "weight":
        learner.adam.vector[0] = 1e30
    else:
        values[:] = 1e25
    before = learner.weights() | learner.optimizer_state()
    assert learner.learn(ids, labels, values) is None
    after = learner.weights() | learner.optimizer_state()
    assert all(np.array_equal(after[name], array, equal_nan=True) for name, array in before.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_examples_logit_does_not_depend_on_its_company(precision):
    learner = small(batch_size=600, hidden=[40, 24], precision=precision)  # two parts
    ids, labels = batch(700)
    learner.learn(ids[:600], labels[:600])
    together = learner.predict(ids)
    alone = np.concatenate([learner.predict(ids[i : i + 1]) for i in range(0, 700, 9)])
    assert np.array_equal(together[::9], alone)


def test_threads_that_predict_get_each_their_own():
    learner = small(value_fields=[1])
    parts = [(batch(9, seed=i)[0], np.full((9, 1), i, np.float32)) for i in range(200)]
    alone = [learner.predict(*part) for part in parts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda part: learner.predict(*part), parts))
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


def test_values_that_are_missing_are_an_error():
    learner = small(value_fields=[1])
    with pytest.raises(ValueError, match="the values of 1 fields are missing"):
        learner.predict(batch()[0])
    with pytest.raises(ValueError, match="the values of 1 fields are missing"):
        learner.learn(*batch())


@pytest.mark.slow
def test_a_model_of_bf16_serves_on_a_processor_without_it():
    learner, ids = small(precision="bf16"), batch()[0]
    there = learner.predict(ids)
    program = """if True:
        import sys, numpy as np
        from stream_ctr.learner import NetworkLearner
        sys.path.insert(0, "tests")
        from test_learner import batch, small
        np.save(sys.argv[1], small(precision="bf16").predict(batch()[0]))
    """
    with tempfile.TemporaryDirectory() as directory:
        path, narrow = (
            f"{directory}/logits.npy",
            {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
        )
        subprocess.run(
            [sys.executable, "-c", program, path], env=narrow, check=True, timeout=PATIENCE_SECONDS
        )
        assert np.allclose(np.load(path), there, atol=0.02)


def test_padding_a_short_batch_learns_what_the_short_batch_says():
    padded, exact = small(batch_size=16), small(batch_size=5)
    ids, labels = batch(5)
    for _ in range(3):
        padded.learn(ids, labels)
        exact.learn(ids, labels)
    assert torch.allclose(padded.table.rows, exact.table.rows, atol=1e-6)
    for a, b in zip(padded.model.parameters(), exact.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"dropout": 0.5}, {"table_optimizer": "adam", "model": "fm_dnn"}], ids=str
)
def test_a_learner_restored_from_its_state_goes_on_bit_for_bit(options):
    straight, before = small(**options), small(**options)
    for step in range(6):
        ids, labels = batch(seed=step)
        straight.learn(ids, labels)
        if step < 3:
            before.learn(ids, labels)
    after = small(**options)
    after.learn(*batch(seed=7))  # what it was is gone
    after.load_weights(before.weights())
    after.load_optimizer_state(before.optimizer_state())
    for step in range(3, 6):
        after.learn(*batch(seed=step))
    for name, array in straight.weights().items():
        assert np.array_equal(array, after.weights()[name]), name


def test_two_runs_with_one_seed_are_equal_and_with_two_seeds_are_not():
    def train(seed: int) -> np.ndarray:
        learner = small(
            seed=seed, dropout=0.3, initial_scale=0.0
        )  # so that all chance is in what is dropped, and in the dense part
        for step in range(4):
            learner.learn(*batch(seed=step))
        return learner.weights()["table"]

    assert np.array_equal(train(1), train(1))
    assert np.array_equal(train(2**62), train(2**62))
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


@pytest.mark.parametrize(
    "model", [name for name, system in MODELS.items() if system.module is not None]
)
@pytest.mark.parametrize("optimizer", ["adagrad", "sgd", "adam"])
def test_the_shapes_that_weights_must_have_are_those_that_the_learner_gives_them(model, optimizer):
    options = {
        "model": model,
        "fields": 3,
        "embedding_dim": 15,
        "hidden": [8],
        "activation": "paper",
        "dropout": 0.0,
        "table_bits": 4,
    }
    weights = NetworkLearner(**options, table_optimizer=optimizer, device="cpu").weights()
    require_shapes(weights, **options, table_optimizer=optimizer)
    with pytest.raises(ValueError, match="'table' has shape"):
        require_shapes(
            weights, **options, table_optimizer="adagrad" if optimizer == "adam" else "adam"
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_a_clear_error():
    with pytest.raises(ConfigError, match="no CUDA GPU"):
        choose_device("cuda")


@pytest.mark.parametrize("able", [True, False])
def test_bfloat16_is_chosen_where_the_processor_has_it_and_warned_of_where_not(
    able, monkeypatch, caplog
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": able})
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) == ("bf16" if able else "fp32")
    assert choose_precision("fp32", cpu) == "fp32"
    assert not caplog.records
    assert choose_precision("bf16", cpu) == "bf16"
    assert ("they take many times as long as those of fp32" in caplog.text) is not able


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_the_table_lives_there_and_learns_the_same():
    cpu, gpu = small(), small(device="cuda")
    gpu.load_weights(cpu.weights())
    for step in range(10):
        ids, labels = batch(seed=step)
        assert np.allclose(
            cpu.learn(ids, labels).numpy(), gpu.learn(ids, labels).cpu().numpy(), atol=1e-3
        )
    assert gpu.table.rows.is_cuda
