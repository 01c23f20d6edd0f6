"""The step of the GPU against that of the CPU.

It runs on a CUDA GPU where there is one, else on the CPU: there without graphs, and with its
kernels in Triton's interpreter.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support import interpreter
from support.learners import assert_equal_states, learner, small_network, state_of

from stream_ctr.errors import ConfigError
from stream_ctr.learn import gpu_step, online_step, triton_online
from stream_ctr.learn.gpu_online_step import GpuOnlineStep
from stream_ctr.learn.gpu_step import GpuBatchStep, GpuStep
from stream_ctr.learn.network_learner import NetworkLearner
from stream_ctr.learn.step import StepOptions

pytest.importorskip(
    "stream_ctr.learn.triton_kernels", reason="Triton is for Linux only", exc_type=ImportError
)

if interpreter.INTERPRETED:
    interpreter.prepare_language_once()

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ATOL = 5e-3 if CUDA else 2e-5  # TF32's products against float32's
on_a_gpu = pytest.mark.skipif(not CUDA, reason="no CUDA GPU here: not measured")

Examples = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8], npt.NDArray[np.float32]]


def small(model: str = "deepfm", *, device: str = DEVICE, **changes: Any) -> NetworkLearner:
    return small_network(model, device=device, **{"table_bits": 6, "batch_size": 8, **changes})


def with_gpu_step(model: str = "deepfm", **changes: Any) -> NetworkLearner:
    """Return a learner with the GPU's step, also where it runs on the CPU."""
    made = small(model, **changes)
    if not CUDA:
        step = GpuOnlineStep if made.online else GpuBatchStep
        made._make_step = partial(step, made.model, made.table, made.adam, made.intercept)
        made._step = made._prepared_step()
    return made


def batch(n: int = 8, *, seed: int = 0, values: int = 0, columns: int = 3) -> Examples:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 64, (n, columns)).astype(np.int32)
    ids[:, 0] %= 2
    labels = rng.integers(0, 2, n).astype(np.uint8)
    return ids, labels, rng.normal(size=(n, values)).astype(np.float32)


def learn(made: NetworkLearner, examples: Examples, following: Examples | None = None) -> Any:
    """Return the logits, and fail where nothing was learned."""
    logits = made.learn(*examples, following=following)
    assert logits is not None
    return logits


def feed_of(made: NetworkLearner) -> Any:
    assert isinstance(made._step, GpuStep)
    return made._step._feed


# The nine systems but LR, in each phase that they have, and each option of a step. Those that have
# no part of their own are long.
SYSTEMS = [
    pytest.param({}, id="deepfm"),
    pytest.param({"model": "fm"}, id="fm", marks=pytest.mark.long),
    pytest.param({"model": "fnn", "pretrain_examples": 16}, id="fnn"),
    pytest.param({"model": "ipnn"}, id="ipnn", marks=pytest.mark.long),
    pytest.param({"model": "opnn"}, id="opnn", marks=pytest.mark.long),
    pytest.param({"model": "pnn"}, id="pnn", marks=pytest.mark.long),
    pytest.param({"model": "lr_dnn", "crosses": 2}, id="lr_dnn", marks=pytest.mark.long),
    pytest.param({"model": "fm_dnn"}, id="fm_dnn", marks=pytest.mark.long),
    pytest.param({"value_fields": [0, 2], "dense_weight_decay": 0.1}, id="values and decay"),
    pytest.param({"precision": "bf16"}, id="bf16", marks=pytest.mark.long),
    pytest.param(
        {"dropout": 0.5},
        id="dropout",
        marks=pytest.mark.skipif(CUDA, reason="a GPU draws other numbers"),
    ),
]
ADAM = {
    "table_optimizer": "adam",
    "model": "fm_dnn",
    "table_learning_rate": 0.01,
    "linear_learning_rate": 0.01,
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", SYSTEMS)
def test_steps_by_the_online_rule_equal_those_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    for module in (online_step, triton_online):
        monkeypatch.setattr(module, "SUB_BATCH", 8)
    compare(sizes=[16, 21, 3], batch_size=32, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"model": "fnn", "pretrain_examples": 100}, {"precision": "bf16"}, ADAM],
    ids=str,
)
def test_single_steps_equal_those_on_the_cpu(changes: dict[str, Any]) -> None:
    compare(sizes=[8 - step % 3 for step in range(10)], **{"table_optimizer": "adagrad", **changes})


def compare(*, sizes: list[int], **changes: Any) -> None:
    """Assert that steps on batches of these sizes are the same on both devices."""
    cpu = small(device="cpu", **changes)
    gpu = with_gpu_step(**changes)
    values = len(changes.get("value_fields", ()))
    atol = max(ATOL, 0.02 if "precision" in changes else 0.0)
    for step, size in enumerate(sizes):
        examples = batch(size, seed=step, values=values, columns=gpu.columns)
        assert torch.allclose(learn(cpu, examples), learn(gpu, examples), atol=atol), step
        assert np.allclose(
            cpu.predict(examples[0], examples[2]), gpu.predict(examples[0], examples[2]), atol=atol
        )
    found = state_of(gpu)
    for name, array in state_of(cpu).items():
        assert np.allclose(array, found[name], rtol=1e-3, atol=atol), name


@pytest.mark.parametrize("model", ["deepfm", "fm", "fnn"])
def test_the_models_with_an_fm_use_the_sums_of_the_gather(model: str) -> None:
    made = with_gpu_step(model, pretrain_examples=1000)
    assert isinstance(made._step, GpuStep)
    step = made._step
    ids, labels, _ = batch()
    before = made.predict(ids)
    gathered = step._gathered

    def shifted(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        w, v = gathered(rows)
        step._sums.pairs.add_(2.0)
        return w, v

    step.__dict__.pop("_recorded_score", None)
    step._gathered = shifted  # type: ignore[method-assign]
    assert np.allclose(made.predict(ids), before + 2.0, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_learn_returns_the_prediction_from_before_the_update(dropout: float) -> None:
    made = with_gpu_step(dropout=dropout, batch_size=4)
    for step in range(2):
        examples = batch(3, seed=step)
        before = made.predict(examples[0])
        assert np.allclose(learn(made, examples).numpy(), before, atol=1e-6)
        assert not np.array_equal(made.predict(examples[0]), before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with NumPy
@pytest.mark.parametrize("optimizer", ["online", "adagrad"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e17])  # the last explodes in the gradient alone
def test_a_step_that_is_not_finite_or_explodes_changes_nothing_and_the_next_one_learns(
    value: float, optimizer: str
) -> None:
    options: dict[str, Any] = {
        "value_fields": [1],
        "precision": "bf16",
        "table_optimizer": optimizer,
    }
    made, other = (with_gpu_step(**options) for _ in range(2))
    for each in (made, other):
        learn(each, batch(seed=3, values=1))
    ids, labels, values = batch(values=1)
    bad = values.copy()
    bad[3] = value
    labels[3] = 1  # the model predicts 0 for it, if anything
    assert made.learn(ids, labels, bad) is None
    assert_equal_states(state_of(made), state_of(other))
    good = ids, labels, values
    assert torch.equal(learn(made, good), learn(other, good))
    assert_equal_states(state_of(made), state_of(other))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("spoiled", ["a state", "a parameter", "the intercept"])
def test_a_model_that_is_not_finite_is_not_made_worse(spoiled: str) -> None:
    made = with_gpu_step()
    ids, labels, _ = batch()
    learn(made, (ids, labels, batch()[2]))
    if spoiled == "a state":  # no logit reads it
        made.table.rows[ids[3, 1], made.table.width + 1] = np.nan
    elif spoiled == "a parameter":
        made.adam.vector[0] = np.inf
    else:
        made.intercept[0] = np.nan
    before = state_of(made)
    assert made.learn(ids, labels) is None
    assert_equal_states(before, state_of(made))


@pytest.mark.slow
def test_each_shape_of_a_batch_has_a_step_of_its_own() -> None:
    made, other = (with_gpu_step(batch_size=20) for _ in range(2))
    assert isinstance(made._step, GpuStep)
    for step, size in enumerate([16, 3, 17, 1]):
        learn(made, batch(size, seed=step))
        learn(other, batch(size, seed=step), batch(20, seed=step))
    assert sorted(made._step._recorded) == [16, 20]
    assert_equal_states(state_of(made), state_of(other))


@pytest.mark.slow
def test_a_batch_that_was_loaded_ahead_is_the_batch_that_is_learned() -> None:
    ahead, plain = (with_gpu_step(value_fields=[2], batch_size=4) for _ in range(2))
    batches = [batch(4 - step % 2, seed=step, values=1) for step in range(6)]
    copied: list[npt.NDArray[np.int32]] = []
    feed = feed_of(ahead)
    copy = feed._copy

    def counted(examples: Examples, rows: int) -> None:
        copied.append(examples[0])
        copy(examples, rows)

    feed._copy = counted
    for step, examples in enumerate(batches):
        # From the fourth step on, the batch that is announced does not follow.
        following = batches[step + 1] if step < 3 else batch(4, seed=9, values=1)
        assert torch.equal(learn(ahead, examples, following), learn(plain, examples))
    assert_equal_states(state_of(ahead), state_of(plain))
    for ids, expected in zip(copied[:4], batches, strict=False):
        assert np.shares_memory(ids, expected[0])
    assert len(copied) == 4 + 2 * 2 + 1


def test_the_host_waits_for_the_verdict_when_the_next_batch_and_the_change_are_on_their_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = with_gpu_step()
    first, second = batch(seed=1), batch(seed=2)
    learn(made, first)
    step = made._step
    assert isinstance(step, GpuStep)
    told: list[str] = []

    def telling(name: str) -> Any:
        return lambda *_: told.append(name)

    verdict = SimpleNamespace(record=telling("record"), synchronize=telling("wait"))
    calls = telling("judge"), telling("change")
    monkeypatch.setattr(step, "_recorded_step", lambda rows: calls)
    monkeypatch.setattr(step, "_verdict_copied", verdict)
    monkeypatch.setattr(step._feed, "load", telling("load"))
    monkeypatch.setattr(step._feed, "load_ahead", telling("load ahead"))
    made.learn(*first, following=second)
    assert told == ["load", "judge", "record", "change", "load ahead", "wait"]


@pytest.mark.slow
def test_a_prediction_between_two_steps_does_not_take_the_place_of_the_next_batch() -> None:
    made, other = with_gpu_step(), with_gpu_step()
    first, second = batch(seed=1), batch(seed=2)
    learn(made, first, second)
    made.predict(second[0])
    learn(other, first)
    assert torch.equal(learn(made, second), learn(other, second))


@pytest.mark.slow
def test_a_batch_loaded_ahead_that_changes_and_comes_later_is_learned_as_it_is_then() -> None:
    made, other = with_gpu_step(), with_gpu_step()
    first, second = batch(seed=1), batch(seed=2)
    learn(made, first, second)
    learn(made, first)
    second[0][:] = 5
    learn(other, first)
    learn(other, first)
    assert torch.equal(learn(made, second), learn(other, second))


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_learner_restored_from_its_state_continues_bit_for_bit(dropout: float) -> None:
    straight, before, after = (with_gpu_step(dropout=dropout, batch_size=4) for _ in range(3))
    for step in range(2):
        learn(straight, batch(4, seed=step))
        learn(before, batch(4, seed=step))
    learn(after, batch(4, seed=7))
    after.load_weights(before.weights())
    after.load_optimizer_state(before.optimizer_state())
    for step in range(2, 4):
        examples = batch(4, seed=step)
        assert torch.equal(learn(straight, examples), learn(after, examples))
    assert_equal_states(state_of(straight), state_of(after))


# -- Triton --------------------------------------------------------------------------------------


def test_without_triton_the_gpu_step_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    made = with_gpu_step()
    monkeypatch.setattr(gpu_step, "triton_kernels", None)
    with pytest.raises(ConfigError, match="Triton is not installed; install torch's CUDA build"):
        GpuBatchStep(
            made.model, made.table, made.adam, made.intercept, StepOptions(columns=3, batch_size=8)
        )


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import stream_ctr.learn.learner
import stream_ctr.learn.gpu_step
print(stream_ctr.learn.gpu_step.triton_kernels)
"""


@pytest.mark.slow
def test_a_learner_on_the_cpu_needs_no_triton() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=True
    )
    assert done.stdout == "None\n"


# -- on a GPU only -------------------------------------------------------------------------------


@on_a_gpu
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropout": 0.5},
        {"precision": "bf16", "value_fields": [1]},
        {"table_optimizer": "adam", "model": "fm_dnn"},
        {"table_optimizer": "adagrad"},
    ],
    ids=str,
)
def test_a_replayed_graph_does_the_same_as_the_step(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    replayed = with_gpu_step(**changes)
    eager = with_gpu_step(**changes)
    monkeypatch.setattr(eager._step._graphs, "record", lambda *calls: calls)  # type: ignore[union-attr]
    torch.set_float32_matmul_precision("high")
    try:
        for step in range(10):
            examples = batch(8 - step % 3, seed=step, values=len(changes.get("value_fields", ())))
            assert torch.equal(learn(replayed, examples), learn(eager, examples))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_equal_states(state_of(replayed), state_of(eager))


@on_a_gpu
def test_a_step_waits_for_nothing_but_its_verdict() -> None:
    made = with_gpu_step()
    made.learn(*batch())
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(5):
            made.learn(*batch(seed=step), following=batch(seed=step + 1))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
def test_two_runs_of_the_papers_model_are_equal() -> None:
    states = []
    for _ in range(2):
        made = learner(fields=39, batch_size=4096, precision="bf16", device="cuda")
        rng = np.random.default_rng(0)
        for _ in range(20):
            ids = (rng.zipf(1.2, (4096, 39)) % (1 << 20)).astype(np.int32)
            made.learn(ids, rng.integers(0, 2, 4096).astype(np.uint8))
        states.append(state_of(made))
    assert_equal_states(*states)
