"""The GPU's step and its kernels: on a CUDA GPU where there is one, else on the CPU, with Triton's interpreter and without graphs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_ctr.errors import ConfigError
from stream_ctr.learn import gpu_step, table_kernels
from stream_ctr.learn.gpu_step import GpuStep
from stream_ctr.learn.learner import NetworkLearner
from stream_ctr.learn.table import Rates, Table
from stream_ctr.models.layers import gathered_with, pairwise_inner_products

triton_kernels = pytest.importorskip(
    "stream_ctr.learn.triton_kernels", reason="Triton is for Linux only", exc_type=ImportError
)

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ATOL = 5e-3 if CUDA else 2e-5  # TF32's products against float32's
on_a_gpu = pytest.mark.skipif(not CUDA, reason="no CUDA GPU here: not measured")


# -- the kernels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("with_values", [False, True])
@pytest.mark.parametrize(
    ("k", "fields"), [(4, 3), (10, 5), (100, 20)]
)  # the last in more than one tile
@pytest.mark.parametrize("embeddings", [1, 2])
def test_gather_is_that_of_the_cpu_with_fms_sums(k, embeddings, fields, with_values):
    table = Table(bits=6, embedding_dim=k, embeddings=embeddings, initial_scale=0.5, device=DEVICE)
    k = table.width
    table.rows[:, k].normal_()
    ids = torch.from_numpy(np.random.default_rng(k).integers(0, 64, (7, fields)).astype(np.int32))
    values = torch.randn(7, fields) if with_values else None
    shapes = (7, fields), (7, fields, k), (7, k), (7,)
    w, v, scale = (
        torch.empty(shapes[0]),
        torch.empty(shapes[1]),
        torch.empty(0, 0) if values is None else values,
    )
    table_kernels.gather(k)(
        table.rows.cpu().numpy(), ids.numpy(), scale.numpy(), w.numpy(), v.numpy()
    )
    found = [torch.full(shape, torch.nan, device=DEVICE) for shape in shapes]
    triton_kernels.gather(
        table, ids.to(DEVICE), None if values is None else values.to(DEVICE), *found
    )
    assert torch.equal(found[0].cpu(), w)
    assert torch.equal(found[1].cpu(), v)
    assert torch.allclose(found[2].cpu(), v.sum(1), atol=1e-5)
    assert torch.allclose(found[3].cpu(), pairwise_inner_products(v), atol=1e-4)


def updated(
    ids: np.ndarray,
    n: int,
    k: int,
    optimizer: str,
    *,
    embeddings: int = 1,
    steps: int = 4,
    skips: Sequence[float] = (0.0,),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows of a table before the step that follows `steps`, after it with each of `skips`, and after one of the CPU."""
    rates = (
        Rates(optimizer, 0.1, 1e-8, 0.2, 1e-8)
        if optimizer == "adam"
        else Rates(optimizer, 0.1, 1.0, 0.2, 0.5)
    )
    table = Table(bits=6, embedding_dim=k, embeddings=embeddings, rates=rates, initial_scale=0.5)
    generator, width = torch.Generator().manual_seed(len(ids)), table.width
    table.rows[:, width:].uniform_(0.5, 1.0, generator=generator)
    before = table.rows.clone()
    gw, gv = (
        torch.randn(*ids.shape, *more, generator=generator) / len(ids) for more in ((), (width,))
    )
    table.rows = before.to(DEVICE, copy=True)
    update = triton_kernels.Update(table, examples=ids.shape[0], fields=ids.shape[1])
    count = torch.tensor(n, dtype=torch.int32, device=DEVICE)
    gradients = torch.from_numpy(ids).to(DEVICE), gw.to(DEVICE), gv.to(DEVICE)
    for skip in skips:
        update(
            *gradients,
            count,
            *(torch.tensor(number, device=DEVICE) for number in (skip, rates.correction(steps))),
        )
    places = n * ids.shape[1]
    keys, order, spare = (
        np.empty(places, np.int32),
        np.empty(places, np.int32),
        np.empty((2, places), np.int32),
    )
    table_kernels.sort_ids(ids[:n].ravel(), 6, keys, order, spare)
    expected, flat = before.clone(), (gw.view(-1).numpy(), gv.view(-1, width).numpy())
    step = table_kernels.update(k, embeddings, optimizer)
    step(
        expected.numpy(),
        keys,
        order,
        0,
        places,
        *flat,
        np.float32(rates.times(n)),
        *rates.floats(steps),
    )
    return before, table.rows.cpu(), expected


@pytest.mark.parametrize("optimizer", ["adagrad", "sgd", "adam"])
@pytest.mark.parametrize(("k", "embeddings"), [(4, 1), (20, 1), (5, 3)])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_update_is_that_of_the_cpu_wherever_the_runs_of_a_row_begin_and_end(
    k, embeddings, optimizer, data
):
    batch, n, steps = 40, data.draw(st.integers(1, 40)), data.draw(st.sampled_from([0, 1, 10_000]))
    rows = data.draw(st.lists(st.integers(0, 63), min_size=1, max_size=6))
    ids = np.array(
        data.draw(st.lists(st.sampled_from(rows), min_size=3 * batch, max_size=3 * batch)), np.int32
    ).reshape(batch, 3)
    ids[n:] = 63
    before, after, expected = updated(ids, n, k, optimizer, embeddings=embeddings, steps=steps)
    assert torch.allclose(after, expected, rtol=1e-5, atol=1e-5)
    untouched = np.setdiff1d(np.arange(64), ids[:n])
    assert torch.equal(after[untouched], before[untouched])


@pytest.mark.slow
def test_a_row_that_is_in_every_example_is_summed_by_many_the_same_way_each_time():
    ids = np.random.default_rng(0).integers(0, 64, (2100, 2)).astype(np.int32)
    ids[:, 0] = 7  # over more chunks than are added at a time
    _, after, expected = updated(ids, 2100, 4, "adagrad")
    assert torch.allclose(after, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(updated(ids, 2100, 4, "adagrad")[1], after)


def test_an_update_to_be_skipped_changes_nothing():
    ids = np.arange(60, dtype=np.int32).reshape(20, 3) % 7
    _, once, _ = updated(ids, 20, 4, "adagrad")
    before, after, _ = updated(ids, 20, 4, "adagrad", skips=(1.0, 0.0, 1.0))
    assert torch.equal(after, once)
    assert not torch.equal(once, before)


@pytest.mark.slow
def test_every_kernel_compiles_for_an_h100_and_an_a100_as_it_is_launched(tmp_path):
    program = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from stream_ctr import triton_kernels
from stream_ctr.table import Rates, Table

TYPES = {torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}

def compiled(kernel, *arguments, grid, warmup, num_warps, **constants):
    names = [parameter.name for parameter in kernel.params if not parameter.is_constexpr]
    types = [TYPES[a.dtype] if isinstance(a, torch.Tensor) else {int: "i32", float: "fp32"}[type(a)] for a in arguments]
    signature = dict(zip(names, types, strict=True)) | dict.fromkeys(constants, "constexpr")
    for capability in (80, 90) if constants.get("K", constants.get("WIDTH")) < 100 else (80,):
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
        assert built.metadata.shared <= (160_000 if constants["COLUMNS"] > 1024 else 100_000), built.metadata
        assert "atom." not in built.asm["ptx"]
        print(kernel.__name__, capability, len(built.asm["cubin"]) > 0)

JITFunction.run = compiled
TABLES = (1, 10, "adagrad"), (2, 10, "adagrad"), (1, 10, "adam"), (2, 10, "adam"), (1, 512, "sgd"), (2, 512, "adam")
for embeddings, k, optimizer in TABLES:
    table = Table(bits=4, embedding_dim=k, embeddings=embeddings, rates=Rates(optimizer))
    ids, total, pairs = torch.zeros(8, 3, dtype=torch.int32), torch.zeros(8, table.width), torch.zeros(8)
    w, v = torch.zeros(8, 3), torch.zeros(8, 3, table.width)
    triton_kernels.gather(table, ids, w if k == 10 else None, w, v, total, pairs)
    update = triton_kernels.Update(table, examples=8, fields=3)
    update(ids, w, v, torch.tensor(8, dtype=torch.int32), torch.tensor(0.0), torch.tensor(1.0))
"""
    compiler = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path)
    }
    ran = subprocess.run(
        [sys.executable, "-c", program], env=compiler, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    kernels = "_gather", "_reduce", "_join"
    assert ran.stdout.splitlines() == [
        f"{kernel} {sm} True"
        for sms in ((80, 90),) * 4 + ((80,),) * 2
        for kernel in kernels
        for sm in sms
    ]


# -- the step ------------------------------------------------------------------------------------


def small(device: str = DEVICE, *, interpreted: bool = True, **changes: Any) -> NetworkLearner:
    """On the CPU with the GPU's step, unless not `interpreted`."""
    options = {
        "fields": 3,
        "embedding_dim": 4,
        "hidden": [8, 8],
        "table_bits": 6,
        "batch_size": 8,
        "initial_scale": 0.3,
        **changes,
    }
    learner = NetworkLearner(**{"model": "deepfm", "device": device, **options})
    if device == "cpu" and interpreted:
        options = {
            name: value for name, value in learner._make_step.keywords.items() if name != "threads"
        }
        learner._make_step = partial(GpuStep, *learner._make_step.args, **options)
        learner._step = learner._make_step(dropout=learner._drops)
    return learner


def batch(
    n: int = 8, *, seed: int = 0, values: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 64, (n, 3)).astype(np.int32)
    ids[:, 0] %= 2
    return (
        ids,
        rng.integers(0, 2, n).astype(np.uint8),
        rng.normal(size=(n, values)).astype(np.float32),
    )


def state(learner: NetworkLearner) -> dict[str, np.ndarray]:
    return {**learner.weights(), **learner.optimizer_state()}


def same(one: NetworkLearner, other: NetworkLearner) -> bool:
    return all(np.array_equal(array, state(other)[name]) for name, array in state(one).items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"table_optimizer": "sgd", "table_learning_rate": 0.1, "linear_learning_rate": 0.1},
        {"value_fields": [0, 2], "dense_weight_decay": 0.1},
        {"precision": "bf16"},
        {"model": "fm_dnn"},
        {
            "table_optimizer": "adam",
            "model": "fm_dnn",
            "table_learning_rate": 0.01,
            "linear_learning_rate": 0.01,
        },
        pytest.param(
            {"dropout": 0.5, "batch_size": 16},
            marks=pytest.mark.skipif(CUDA, reason="a GPU draws other numbers"),
        ),
    ],
    ids=lambda changes: (
        "-".join(str(changes.get(name, name)) for name in changes if "rate" not in name)
        or "adagrad"
    ),
)
def test_thirty_steps_equal_those_on_the_cpu(changes):
    cpu, gpu = small("cpu", interpreted=False, **changes), small(**changes)
    atol = max(ATOL, 0.02 if "precision" in changes else 0.0)
    for step in range(30):
        examples = batch(8 - step % 3, seed=step, values=len(changes.get("value_fields", ())))
        expected, found = cpu.learn(*examples), gpu.learn(*examples)
        assert torch.allclose(expected, found.cpu(), atol=atol)
    for name, array in state(cpu).items():
        assert np.allclose(array, state(gpu)[name], rtol=1e-3, atol=atol), name


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_learn_returns_what_predict_says_before_it(dropout):
    learner = small(dropout=dropout)
    for step in range(3):
        ids, labels, _ = batch(6, seed=step)
        before = learner.predict(ids)
        assert np.array_equal(learner.learn(ids, labels).cpu().numpy(), before)
        assert not np.array_equal(learner.predict(ids), before)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with NumPy
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e17])  # the last explodes in the gradient alone
def test_a_step_that_is_not_finite_or_explodes_changes_nothing_and_the_next_one_does(value):
    learner, other = (
        small(value_fields=[1], precision="bf16"),
        small(value_fields=[1], precision="bf16"),
    )
    ids, labels, values = batch(values=1)
    bad = values.copy()
    bad[3], labels[3] = value, 1  # for which the model predicts 0, if anything
    assert learner.learn(ids, labels, bad) is None
    assert same(learner, other)
    assert torch.equal(learner.learn(ids, labels, values), other.learn(ids, labels, values))
    assert same(learner, other)


def test_a_batch_that_is_on_its_way_beforehand_is_the_batch_that_is_learned():
    ahead, plain = small(value_fields=[2]), small(value_fields=[2])
    batches = [batch(8 - step % 2, seed=step, values=1) for step in range(6)]
    staged = []
    stage = ahead._step._feed.stage
    ahead._step._feed.stage = lambda examples: staged.append(examples[0]) or stage(examples)
    for step, examples in enumerate(batches):
        following = (
            batches[step + 1] if step < 3 else batch(seed=9, values=1)
        )  # which then does not follow
        assert torch.equal(ahead.learn(*examples, following=following), plain.learn(*examples))
    assert same(ahead, plain)
    assert all(
        np.shares_memory(ids, examples[0])
        for ids, examples in zip(staged[:4], batches, strict=False)
    )
    assert len(staged) == 4 + 2 * 2 + 1


def test_a_batch_that_was_to_follow_and_comes_later_changed_is_learned_as_it_is_then():
    learner, other = small(), small()
    first, second = batch(seed=1), batch(seed=2)
    learner.learn(*first, following=second)
    learner.learn(*first)
    second[0][:] = 5
    other.learn(*first)
    other.learn(*first)
    assert torch.equal(learner.learn(*second), other.learn(*second))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_learner_restored_from_its_state_goes_on_bit_for_bit(dropout):
    straight, before, after = small(dropout=dropout), small(dropout=dropout), small(dropout=dropout)
    for step in range(3):
        straight.learn(*batch(seed=step))
        before.learn(*batch(seed=step))
    after.learn(*batch(seed=7))
    after.load_weights(before.weights())
    after.load_optimizer_state(before.optimizer_state())
    for step in range(3, 6):
        assert torch.equal(straight.learn(*batch(seed=step)), after.learn(*batch(seed=step)))
    assert same(straight, after)


def test_sums_that_came_with_the_gather_are_those_of_the_model_and_its_gradient():
    v = torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True)
    y = pairwise_inner_products(v)
    with gathered_with(v, v.detach().sum(1), y.detach()):
        known, of_another = pairwise_inner_products(v), pairwise_inner_products(2 * v)
    assert torch.equal(known, y)
    assert torch.allclose(of_another, 4 * y)
    slope = torch.randn(5, dtype=torch.float64)
    assert torch.equal(*(torch.autograd.grad(output, v, slope)[0] for output in (y, known)))


# -- Triton --------------------------------------------------------------------------------------


def test_without_triton_the_gpu_step_says_what_to_do(monkeypatch):
    learner = small()
    monkeypatch.setattr(gpu_step, "triton_kernels", None)
    with pytest.raises(ConfigError, match="Triton is not installed; install torch's CUDA build"):
        GpuStep(
            learner.model, learner.table, learner.adam, fields=3, value_fields=[], batch_size=8, seed=0, dropout=False, progressive=True
        )  # fmt: skip


@pytest.mark.slow
def test_a_learner_on_the_cpu_needs_no_triton():
    program = "import sys; sys.modules['triton'] = None; import stream_ctr.learner, stream_ctr.gpu_step as g; print(g.triton_kernels)"
    assert (
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout
        == "None\n"
    )


# -- on a GPU only -------------------------------------------------------------------------------


@on_a_gpu
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropout": 0.5},
        {"precision": "bf16", "value_fields": [1]},
        {"table_optimizer": "adam", "model": "fm_dnn"},
    ],
    ids=str,
)
def test_a_graph_replayed_does_what_the_step_does(monkeypatch, changes):
    replayed = small(**changes)
    eager = small(**changes)
    monkeypatch.setattr(eager._step, "_record", lambda call: call)
    torch.set_float32_matmul_precision("high")
    try:
        for step in range(10):
            examples = batch(8 - step % 3, seed=step, values=len(changes.get("value_fields", ())))
            assert torch.equal(replayed.learn(*examples), eager.learn(*examples))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert same(replayed, eager)


@on_a_gpu
def test_a_step_waits_for_nothing_but_its_verdict():
    learner = small()
    learner.learn(*batch())
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(5):
            learner.learn(*batch(seed=step), following=batch(seed=step + 1))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
def test_the_papers_model_twice_is_one_model():
    def learned() -> NetworkLearner:
        learner = NetworkLearner(
            "deepfm", fields=39, batch_size=4096, precision="bf16", device="cuda"
        )
        rng = np.random.default_rng(0)
        for _ in range(20):
            ids = (rng.zipf(1.2, (4096, 39)) % (1 << 20)).astype(np.int32)
            learner.learn(ids, rng.integers(0, 2, 4096).astype(np.uint8))
        return learner

    assert same(learned(), learned())
