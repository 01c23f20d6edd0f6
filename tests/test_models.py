"""The nine systems: each against its formula written out in loops, its gradient against finite differences, and in the learner."""

from __future__ import annotations

import itertools
import math
import resource
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call

from stream_ctr.config import Model
from stream_ctr.learn.learner import LinearLearner, NetworkLearner, make_learner, require_shapes
from stream_ctr.models import FM, FNN, MODELS
from stream_ctr.models.layers import (
    ACTIVATIONS,
    MLP,
    Dense,
    Dropout,
    dropout_from,
    inner_products,
    outer_product,
    pairwise_inner_products,
)

MODULES = [name for name, system in MODELS.items() if system.module]
F, K = 4, 3
Vector = list[float]

# -- the formulas, in loops -----------------------------------------------------------------------


def mlp(
    layers: Sequence[tuple[np.ndarray, np.ndarray]],
    a: Vector,
    activation: Callable[[float], float] = math.tanh,
) -> float:
    for depth, (weight, bias) in enumerate(layers):
        z = [bias[o] + sum(weight[o, i] * a[i] for i in range(len(a))) for o in range(len(bias))]
        a = [activation(one) for one in z] if depth < len(layers) - 1 else z
    (logit,) = a
    return logit


def inner(one: Vector, other: Vector) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def pairs(v: Sequence[Vector]) -> Vector:
    return [inner(v[i], v[j]) for i in range(len(v)) for j in range(i + 1, len(v))]


def superposed(v: Sequence[Vector]) -> Vector:
    """The F^2 outer products, laid over each other."""
    k = len(v[0])
    return [sum(one[a] * other[b] for one in v for other in v) for a in range(k) for b in range(k)]


def joined(v: Sequence[Vector]) -> Vector:
    return [coordinate for one in v for coordinate in one]


def fm(w: Vector, v: Sequence[Vector], layers: Any, bias: float = 0.0) -> float:
    return bias + sum(w) + sum(pairs(v))


def fnn(w: Vector, v: Sequence[Vector], layers: Any) -> float:
    return mlp(layers, joined([[w[i], *v[i]] for i in range(len(w))]))


FORMULAS: dict[str, Callable[..., float]] = {
    "fm": fm,
    "fnn": fm,  # it begins as one
    "ipnn": lambda w, v, layers: mlp(layers, joined(v) + pairs(v)),
    "opnn": lambda w, v, layers: mlp(layers, joined(v) + superposed(v)),
    "pnn": lambda w, v, layers: mlp(layers, joined(v) + pairs(v) + superposed(v)),
    "lr_dnn": lambda w, v, layers: sum(w) + mlp(layers, joined(v[:F])),
    "fm_dnn": lambda w, v, layers: (
        fm(w, [one[:K] for one in v], None) + mlp(layers, joined([one[K:] for one in v]))
    ),
    "deepfm": lambda w, v, layers: fm(w, v, None) + mlp(layers, joined(v)),
}


def module(name: str, *, activation: str = "tanh", dropout: float = 0.0) -> nn.Module:
    """In float64, with parameters that are all unlike and none zero."""
    torch.manual_seed(0)
    make = MODELS[name].module
    assert make is not None
    model = make(
        fields=F, embedding_dim=K, hidden=[5, 4], activation=activation, dropout=dropout
    ).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    return model


def inputs(name: str, *, examples: int = 3, crosses: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    shape = examples, F + crosses
    w = torch.randn(*shape, dtype=torch.float64, generator=draw)
    return w, torch.randn(*shape, MODELS[name].embeddings * K, dtype=torch.float64, generator=draw)


def layers_of(model: nn.Module) -> list[tuple[np.ndarray, np.ndarray]]:
    return [
        (d.weight.detach().numpy(), d.bias.detach().numpy())
        for d in model.modules()
        if isinstance(d, Dense)
    ]


def assert_is(
    formula: Callable[..., float], model: nn.Module, w: torch.Tensor, v: torch.Tensor
) -> None:
    expected = [formula(w[e].tolist(), v[e].tolist(), layers_of(model)) for e in range(len(w))]
    assert model(w, v).tolist() == pytest.approx(expected, rel=1e-12)
    assert np.ptp(expected) > 0.1, "or anything would do"


def test_all_but_lr_are_modules_with_a_formula():
    assert sorted(FORMULAS) == sorted(MODULES) == sorted({*MODELS} - {"lr"})


@pytest.mark.parametrize("name", MODULES)
def test_a_system_is_its_formula_written_out(name):
    model = module(name)
    constant = next(
        (
            float(value)
            for key, value in model.state_dict().items()
            if key.endswith("bias") and not value.ndim
        ),
        0.0,
    )
    formula = partial(fm, bias=constant) if FORMULAS[name] is fm else FORMULAS[name]
    assert_is(formula, model, *inputs(name))


def test_fnn_is_a_network_over_weights_and_embeddings_once_that_began():
    model = module("fnn")
    before = model(*inputs("fnn"))
    model.begin_network()
    assert_is(fnn, model, *inputs("fnn"))
    assert not torch.allclose(model(*inputs("fnn")), before)


def test_the_wide_side_has_cross_products_and_the_network_has_not():
    model, (w, v) = module("lr_dnn"), inputs("lr_dnn", crosses=2)
    assert_is(FORMULAS["lr_dnn"], model, w, v)
    v[:, F:] = 7.0
    w[:, F:] += 1.0
    assert torch.allclose(model(w, v), model(w[:, :F], v[:, :F]) + w[:, F:].sum(dim=1))


def test_the_two_sides_of_fm_and_dnn_have_embeddings_of_their_own():
    model, (w, v) = module("fm_dnn"), inputs("fm_dnn")
    y_fm = model(w, v) - model.deep(v[..., K:].flatten(1))
    v[..., K:] = 0.0
    assert torch.allclose(
        model(w, v) - model.deep(torch.zeros(1, F * K, dtype=torch.float64)), y_fm
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activation_is_the_one_that_was_asked_for(activation):
    literal = {
        "tanh": math.tanh,
        "relu": lambda z: max(z, 0.0),
        "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    }[activation]
    model = module("deepfm", activation=activation)
    assert_is(
        lambda w, v, layers: fm(w, v, None) + mlp(layers, joined(v), literal),
        model,
        *inputs("deepfm"),
    )


def test_the_paper_gives_tanh_to_ipnn_and_relu_to_all_others():
    def activations(name: str) -> set[str]:
        learner = NetworkLearner(
            name, fields=F, embedding_dim=K, hidden=[5], table_bits=4, batch_size=8, device="cpu"
        )
        return {
            layer.activation for layer in learner.model.modules() if isinstance(layer, Dense)
        } - {"none"}

    assert {name: activations(name) for name in MODULES} == {
        name: set() if name == "fm" else {"tanh" if name == "ipnn" else "relu"} for name in MODULES
    }


# -- interactions --------------------------------------------------------------------------------


def test_fm_is_the_sum_over_field_pairs_and_not_what_flattened_coordinates_give():
    v = [[1.0, 2.0], [3.0, -1.0], [0.5, 4.0]]
    by_pairs = (1 * 3 - 2 * 1) + (1 * 0.5 + 2 * 4) + (3 * 0.5 - 1 * 4)
    flat = joined(v)
    over_coordinates = 0.5 * (
        sum(flat) ** 2 - sum(one * one for one in flat)
    )  # as if each of F * K numbers were a field of its own
    assert (by_pairs, over_coordinates) == (7.0, 29.5)
    assert pairwise_inner_products(torch.tensor([v])).tolist() == [by_pairs]
    assert FM()(torch.zeros(1, 3), torch.tensor([v])).tolist() == [by_pairs]


@pytest.mark.parametrize("fields", [1, 2, 3, 7])
@pytest.mark.parametrize("k", [1, 4])
def test_products_are_those_of_each_pair_in_the_order_of_the_pairs(fields, k):
    v = torch.randn(
        5, fields, k, dtype=torch.float64, generator=torch.Generator().manual_seed(fields)
    )
    expected = [
        [float(one[i] @ one[j]) for i, j in itertools.combinations(range(fields), 2)] for one in v
    ]
    assert np.allclose(
        inner_products(v).reshape(5, -1), np.array(expected).reshape(5, -1), atol=1e-12
    )
    assert np.allclose(pairwise_inner_products(v), [sum(one) for one in expected], atol=1e-12)
    assert np.allclose(
        outer_product(v.sum(dim=1)), [superposed(one.tolist()) for one in v], atol=1e-12
    )


# -- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [1, 2, 5])
@pytest.mark.parametrize(
    "layer", [inner_products, pairwise_inner_products, lambda v: outer_product(v.sum(dim=1))]
)
def test_the_gradient_of_a_product_agrees_with_finite_differences(layer, fields):
    v = torch.randn(3, fields, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert gradcheck(layer, v.requires_grad_())
    apart = torch.randn(
        3, fields, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )[..., 2:]
    assert gradcheck(layer, apart.requires_grad_()), "where the coordinates do not lie side by side"


@pytest.mark.parametrize("name", [*MODULES, "fnn, the network", "lr_dnn, crosses"])
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_the_gradient_of_a_system_agrees_with_finite_differences(name, activation):
    """That of `w`, of `v` and of each parameter."""
    name, _, further = name.partition(", ")
    model = module(name, activation=activation)
    if further == "the network":
        model.begin_network()
    w, v = inputs(name, crosses=2 if further == "crosses" else 0)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def logits(w: torch.Tensor, v: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return functional_call(model, dict(zip(names, values, strict=True)), (w, v))

    assert gradcheck(logits, (w.requires_grad_(), v.requires_grad_(), *parameters))


# -- layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_has_one_activation_after_each_hidden_layer_and_none_at_the_end(activation):
    mlp = MLP(4, [3, 2], activation=activation)
    assert [layer.activation for layer in mlp.layers if isinstance(layer, Dense)] == [
        activation,
        activation,
        "none",
    ]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_layer_and_its_gradients_are_those_of_torch(activation):
    torch.manual_seed(0)
    layer = Dense(5, 3, activation).double()
    a = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    theirs = getattr(torch, activation)(nn.functional.linear(a, layer.weight, layer.bias))
    assert torch.equal(layer(a), theirs)
    operands, slope = (a, layer.weight, layer.bias), torch.randn(7, 3, dtype=torch.float64)
    ours = torch.autograd.grad(layer(a), operands, slope)
    assert all(
        torch.allclose(x, y, atol=1e-14)
        for x, y in zip(ours, torch.autograd.grad(theirs, operands, slope), strict=True)
    )


def test_an_activation_that_there_is_not_is_refused_where_the_layer_is_made():
    with pytest.raises(ValueError, match="one of relu, tanh, sigmoid, got 'gelu'"):
        small("deepfm", activation="gelu")


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_share_that_cannot_be_dropped_is_refused(rate):
    with pytest.raises(ValueError, match="at least 0 and less than 1"):
        small("deepfm", dropout=rate)


@pytest.mark.parametrize("rate", [0.0001, 0.1, 0.4, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_its_share_and_the_mean(rate, dtype):
    n, keep = 1_000_001, 1 - rate
    with dropout_from(torch.Generator().manual_seed(0)):
        dropped = Dropout(rate)(torch.ones(n, dtype=dtype)).float()
    kept = int((dropped != 0).sum())
    assert abs(kept - n * keep) < 5 * math.sqrt(n * keep * rate) + n / 2**16
    scale = float(dropped.max())
    assert dropped.unique().tolist() == [0.0, scale]
    assert scale == pytest.approx(
        1 / keep, rel=0.1 if keep < 0.01 else 0.005 if dtype == torch.bfloat16 else 1e-3
    )


def test_what_is_dropped_is_independent_of_its_neighbours():
    with dropout_from(torch.Generator().manual_seed(1)):
        dropped = Dropout(0.3)(torch.ones(2**20)) == 0
    for apart in (1, 2, 3, 4, 8, 400):  # four of them are of one draw
        together = float((dropped[apart:] & dropped[:-apart]).float().mean())
        assert together == pytest.approx(0.09, abs=0.002)


def test_dropout_draws_from_the_given_generator_alone_and_only_while_it_is_given():
    layer, x = Dropout(0.4), torch.ones(50, 7)

    def dropped(seed: int) -> torch.Tensor:
        with dropout_from(torch.Generator().manual_seed(seed)):
            return layer(x)

    first = dropped(1)
    torch.rand(5)
    assert torch.equal(dropped(1), first)
    assert not torch.equal(dropped(2), first)
    assert torch.equal(layer(x), x)


def test_the_gradient_of_dropout_is_what_it_kept():
    x = torch.randn(50, 7, requires_grad=True)
    with dropout_from(torch.Generator().manual_seed(0)):
        y = Dropout(0.75)(x)
    (slope,) = torch.autograd.grad(y, x, torch.full_like(x, 3.0))
    assert torch.equal(slope, torch.where(y == 0, 0.0, 12.0))
    assert torch.allclose(y, x * slope / 3.0)


# -- in the learner ------------------------------------------------------------------------------


def small(name: str, **changes: Any) -> Any:
    options = {
        "embedding_dim": 4,
        "hidden": [16, 16],
        "table_bits": 8,
        "batch_size": 128,
        "device": "cpu",
        "initial_scale": 0.05,
    }
    return make_learner(name, fields=F, **{**options, **changes})


def stream(examples: int, *, seed: int, crosses: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids of F fields with four values each and of their crosses, and clicks by main effects and by an interaction of two fields."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 4, (examples, F))
    ids = values + 4 * np.arange(F)
    logits = (
        np.array([-2.0, -1.0, 0.5, 1.5])[values[:, 0]]
        + np.array([1.0, -1.0, 0.0, 0.0])[values[:, 1]]
    )
    logits += np.where((values[:, 2] + values[:, 3]) % 2 == 0, 1.0, -1.0)
    crossed = (
        np.stack(
            [16 + 16 * c + 4 * values[:, c] + values[:, c + 1] for c in range(crosses)], axis=1
        )
        if crosses
        else ids[:, :0]
    )
    labels = rng.random(examples) < 1 / (1 + np.exp(-logits))
    return np.hstack([ids, crossed]).astype(np.int32), labels.astype(np.uint8)


def batches(
    count: int, *, seed: int, crosses: int = 0, size: int = 128
) -> list[tuple[np.ndarray, np.ndarray]]:
    ids, labels = stream(size * count, seed=seed, crosses=crosses)
    return list(zip(np.split(ids, count), np.split(labels, count), strict=True))


def logloss(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(np.logaddexp(0, np.where(labels == 1, -logits, logits)).mean())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_every_system_learns_a_planted_signal(name, precision):
    learner = small(
        name, precision=precision, crosses=3, pretrain_examples=128 * 60, dense_learning_rate=0.005
    )
    for ids, labels in batches(200, seed=0, crosses=3):
        logits = learner.learn(ids, labels)
        assert logits is not None
        assert np.isfinite(logits.numpy()).all()
    ids, labels = stream(5000, seed=1, crosses=3)
    share = labels.mean()
    constant = logloss(np.full(len(labels), np.log(share / (1 - share))), labels)
    # The interaction is a third of what there is to learn; only LR, which has none, is without it.
    assert logloss(learner.predict(ids), labels) < constant - (0.08 if name == "lr" else 0.15)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_every_system_goes_on_from_its_state_bit_for_bit_on_any_number_of_threads(name, dropout):
    options = {
        "dropout": dropout,
        "pretrain_examples": 1200,
        "batch_size": 600,
        "crosses": 2,
    }  # two parts a batch, for two lanes
    straight, before, after = (small(name, threads=threads, **options) for threads in (1, 2, 3))
    steps = batches(5, seed=0, crosses=2, size=600)
    for ids, labels in steps:
        straight.learn(ids, labels)
    for ids, labels in steps[:3]:
        before.learn(ids, labels)
    after.load_weights(before.weights())
    after.load_optimizer_state(before.optimizer_state())
    for ids, labels in steps[3:]:
        after.learn(ids, labels)
    assert_equal(
        straight.weights() | straight.optimizer_state(), after.weights() | after.optimizer_state()
    )


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert np.array_equal(array, other[name]), name


@pytest.mark.parametrize("name", MODULES)
def test_without_the_extra_pass_the_model_learns_the_same(name):
    with_pass, without = (
        small(name, dropout=0.3, progressive=progressive) for progressive in (True, False)
    )
    for ids, labels in batches(3, seed=0):
        predicted, dropped = with_pass.learn(ids, labels), without.learn(ids, labels)
    assert_equal(with_pass.weights(), without.weights())
    assert torch.equal(predicted, dropped) is (name == "fm"), "FM has nothing to drop"


def test_columns_behind_the_fields_are_for_who_wants_them():
    ids, labels = stream(128, seed=0, crosses=2)
    for name in MODELS:
        with_crosses, without = small(name, crosses=2), small(name)
        with_crosses.learn(ids, labels)
        without.learn(ids[:, :F], labels)
        assert np.array_equal(with_crosses.predict(ids), without.predict(ids[:, :F])) is (
            name != "lr_dnn"
        ), name


# -- FNN changes ---------------------------------------------------------------------------------


def test_fnn_is_an_fm_until_its_examples_are_over():
    fnn, fm = small("fnn", pretrain_examples=300), small("fm")  # three batches of 128
    changed = []
    for ids, labels in batches(5, seed=0):
        assert np.array_equal(fnn.learn(ids, labels), fm.learn(ids, labels)) is not bool(changed)
        if not fnn.pretraining:
            changed.append(fnn.steps)
    assert changed == [3, 4, 5]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_fnn_keeps_embeddings_and_begins_its_optimisers_anew(decay):
    fnn = small("fnn", pretrain_examples=256, dense_weight_decay=decay)
    first, second, third = batches(3, seed=0)
    fnn.learn(*first)
    untouched = {key: value for key, value in fnn.weights().items() if key.startswith("dense.deep")}
    fm = small("fm")
    for one in (first, second):
        fm.learn(*one)
    fnn.learn(*second)
    assert not fnn.pretraining
    assert_equal(
        untouched, {key: value for key, value in fnn.weights().items() if key in untouched}
    )
    k, table = 4, fnn.weights()["table"]
    assert np.array_equal(table[:, : k + 1], fm.weights()["table"][:, : k + 1])
    assert not table[:, k + 1 :].any()
    moments = {key: value for key, value in fnn.optimizer_state().items() if key != "steps"}
    assert moments
    assert not any(value.any() for value in moments.values())
    # Adam's first step is its rate in each direction, whatever the gradient's size.
    before = fnn.weights()["dense.deep.layers.0.bias"]
    fnn.learn(*third)
    moved = np.abs(fnn.weights()["dense.deep.layers.0.bias"] - before)
    assert moved[moved > 0] == pytest.approx(0.001, rel=1e-2)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_whoever_loads_weights_of_fnn_knows_which_it_is(steps):
    there = small("fnn", pretrain_examples=256)
    for ids, labels in batches(steps, seed=0):
        there.learn(ids, labels)
    here = small("fnn", pretrain_examples=10**9, seed=9)
    ids, _ = stream(50, seed=1)
    assert not np.array_equal(here.predict(ids), there.predict(ids))
    here.load_weights(there.weights())
    assert here.pretraining is there.pretraining is (steps < 2)
    assert np.array_equal(here.predict(ids), there.predict(ids))


def test_weights_from_before_the_change_bring_fnn_back_to_it():
    learner, (first, second) = small("fnn", pretrain_examples=256), batches(2, seed=0)
    learner.learn(*first)
    weights, state = learner.weights(), learner.optimizer_state()
    learner.learn(*second)
    once = learner.weights()
    learner.load_weights(weights)
    learner.load_optimizer_state(state)
    assert learner.pretraining
    learner.learn(*second)
    assert_equal(once, learner.weights())


def test_fnn_without_pre_training_is_a_network_at_once():
    assert not small("fnn").pretraining
    model = small("fnn").model
    assert isinstance(model, FNN)
    assert not model.pretraining


def test_the_weights_of_fnns_network_decay_once_it_has_begun():
    decaying, other = (
        small("fnn", pretrain_examples=256, dense_weight_decay=decay) for decay in (10.0, 0.0)
    )
    for step, (ids, labels) in enumerate(batches(60, seed=0)):
        decaying.learn(ids, labels)
        other.learn(ids, labels)
        sizes = [
            np.abs(learner.weights()["dense.deep.layers.0.weight"]).sum()
            for learner in (decaying, other)
        ]
        assert bool(sizes[0] == sizes[1]) is (step < 2)
    assert sizes[0] < 0.9 * sizes[1]


# -- LR in the learner ---------------------------------------------------------------------------


def test_lr_learns_from_an_example_what_it_predicted_of_it():
    learner = small("lr", value_fields=[1])
    ids, labels = stream(300, seed=0)
    values = np.random.default_rng(0).normal(size=(300, 1)).astype(np.float32)
    for e in range(300):
        one = slice(e, e + 1)
        before = learner.predict(ids[one], values[one])
        assert learner.learn(ids[one], labels[one], values[one]).tolist() == pytest.approx(
            before.tolist(), abs=1e-12
        )
    assert learner.steps == 300


def test_lr_goes_on_from_its_state():
    straight, resumed, steps = small("lr"), small("lr"), batches(4, seed=0)
    for ids, labels in steps:
        straight.learn(ids, labels)
    before = small("lr")
    for ids, labels in steps[:2]:
        before.learn(ids, labels)
    weights, state = before.weights(), before.optimizer_state()
    before.learn(*steps[2])
    before.weights(reuse=True)  # what was copied before stays as it was
    resumed.learn(*steps[3])
    resumed.load_weights(weights)
    resumed.load_optimizer_state(state)
    for ids, labels in steps[2:]:
        resumed.learn(ids, labels)
    assert_equal(
        straight.weights() | straight.optimizer_state(),
        resumed.weights() | resumed.optimizer_state(),
    )


def test_copies_of_lrs_weights_stay_as_they_were_except_in_the_memory_that_is_to_be_used_again():
    learner, (first, second) = small("lr"), batches(2, seed=0)
    learner.learn(*first)
    reused, own = learner.weights(reuse=True), learner.weights()
    kept = {name: array.copy() for name, array in own.items()}
    learner.learn(*second)
    learner.weights()
    assert_equal(own, kept)
    assert_equal(reused, kept)
    assert not np.array_equal(learner.weights(reuse=True)["pairs"], kept["pairs"])
    assert not np.array_equal(reused["pairs"], kept["pairs"])
    assert_equal(own, kept)


def test_lr_that_learns_in_one_thread_predicts_numbers_in_another():
    learner = small("lr", table_bits=4)
    ids, labels = stream(20_000, seed=0)
    ids = (ids % 16).astype(np.int32)
    with ThreadPoolExecutor(1) as other:
        learning = other.submit(lambda: [learner.learn(ids, labels) for _ in range(30)])
        predicted = [np.isfinite(learner.predict(ids[:2000])).all()]
        while not learning.done():
            predicted.append(np.isfinite(learner.predict(ids[:2000])).all())
    assert len(predicted) > 10
    assert all(predicted)
    assert len(learning.result()) == 30


@pytest.mark.parametrize("name", ["lr", "fm"])
def test_an_option_that_no_learner_has_is_an_error_whichever_it_is(name):
    with pytest.raises(TypeError, match="no option 'tabel_bits'"):
        small(name, tabel_bits=8)
    small(name, crosses=2, dense_weight_decay=0.1, threads=1, precision="fp32")


def test_rates_of_ftrl_are_for_lr_alone():
    strict, loose = small("lr", ftrl={"l1": 50.0}), small("lr")
    ids, labels = stream(128, seed=0)
    for learner in (strict, loose):
        learner.learn(ids, labels)
    assert np.ptp(strict.predict(ids)) == 0.0 < np.ptp(loose.predict(ids))
    small("fm", ftrl={"l1": 50.0})


@pytest.mark.parametrize(
    "wrong", [{"alpha": 0.0}, {"beta": float("nan")}, {"l1": -1.0}, {"l2": float("nan")}]
)
def test_rates_that_ftrl_cannot_learn_with_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*must be"):
        small("lr", ftrl=wrong)


LR_WEIGHTS = {
    "rows": np.array([3, 7], np.int32),
    "pairs": np.array([[0.5, 1.0], [-1.0, 2.0]]),
    "intercept": np.array([0.1, 0.2]),
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": np.array([3, 256], np.int32)}, "a table of 2\\^8 rows has not"),
        ({"rows": np.array([-1, 3], np.int32)}, "a table of 2\\^8 rows has not"),
        ({"rows": np.array([7, 3], np.int32)}, "'rows' does not ascend"),
        ({"rows": np.array([3, 3], np.int32)}, "'rows' does not ascend"),
        ({"rows": np.array([3, 7])}, "'rows' is int64"),
        ({"rows": np.array([[3, 7]], np.int32)}, "'rows' is int32 \\(1, 2\\), expected"),
        ({"rows": np.array(3, np.int32)}, "'rows' is int32 \\(\\), expected"),
        (
            {"rows": np.array([3], np.int32)},
            "'pairs' is float64 \\(2, 2\\), expected .* \\(1, 2\\)",
        ),
        ({"pairs": np.array([[0.5, -1.0], [1.0, 2.0]])}, "'pairs' holds a negative sum of squares"),
        (
            {"pairs": np.array([[0.5, np.inf], [1.0, 2.0]])},
            "'pairs' holds values that are not finite",
        ),
        (
            {"pairs": np.array([[np.nan, 1.0], [1.0, 2.0]])},
            "'pairs' holds values that are not finite",
        ),
        ({"pairs": np.ones((2, 2), np.float32)}, "'pairs' is float32"),
        ({"intercept": np.array([0.1, -0.2])}, "'intercept' holds a negative sum of squares"),
        ({"intercept": np.array([0.1])}, "'intercept' is float64 \\(1,\\)"),
        ({"odd": np.zeros(1)}, "'odd' is not one of this model"),
    ],
    ids=str,
)
@pytest.mark.parametrize("serving", [False, True])
def test_weights_that_are_none_of_lr_are_refused_and_change_nothing(serving, changed, message):
    learner = small("lr", serving=serving)
    learner.load_weights(LR_WEIGHTS)
    with pytest.raises(ValueError, match=message):
        learner.load_weights({**LR_WEIGHTS, **changed})
    assert_equal(learner.weights(), LR_WEIGHTS)


@pytest.mark.parametrize("name", LR_WEIGHTS)
def test_weights_of_lr_must_all_be_there(name):
    with pytest.raises(ValueError, match=f"{name!r} is missing"):
        small("lr").load_weights({key: value for key, value in LR_WEIGHTS.items() if key != name})


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_lr_predicts_the_same_bits_where_it_is_served_with_rows_that_it_never_saw_among_them(steps):
    there = small("lr", value_fields=[1], table_bits=20)
    ids, labels = stream(300, seed=0)
    ids *= 1000  # apart, so that there are rows between those that were learned
    values = np.random.default_rng(0).normal(size=(300, 1)).astype(np.float32)
    for _ in range(steps):
        there.learn(ids[:200], labels[:200], values[:200])
    here = small("lr", value_fields=[1], table_bits=20, serving=True)
    here.load_weights(there.weights())
    ids[::3, 0], ids[1::3, 2], ids[2::3, 3] = 0, 2**20 - 1, 7777
    assert np.array_equal(here.predict(ids, values), there.predict(ids, values))
    assert_equal(here.weights(), there.weights())
    with pytest.raises(TypeError, match="does not learn"):
        here.learn(ids, labels, values)


def test_lr_that_is_served_takes_memory_for_its_weights_whatever_its_table_is_said_to_be():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    learner = small("lr", serving=True, table_bits=31)
    rows = np.arange(0, 2**31, 2**16, dtype=np.int64).astype(np.int32)  # each on a page of its own
    learner.load_weights({"rows": rows, "pairs": np.ones((len(rows), 2)), "intercept": np.zeros(2)})
    far = learner.predict(np.full((1, F), rows[-1]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10  # KiB
    assert far != 0.0 == learner.predict(np.full((1, F), rows[-1] + 1))


def test_lr_that_has_learned_nothing_has_weights_too():
    learner = small("lr")
    learner.load_weights(small("lr").weights())
    assert learner.predict(stream(3, seed=0)[0]).tolist() == [0.0, 0.0, 0.0]


# -- are these the weights of it -----------------------------------------------------------------

CLAIM = {
    "fields": F, "embedding_dim": 4, "hidden": [16, 16], "activation": "paper", "dropout": 0.0, "table_bits": 8,
    "table_optimizer": "adagrad",
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_learners_own_weights_have_its_shapes(name):
    require_shapes(small(name).weights(), model=name, **CLAIM)


@pytest.mark.parametrize("name", MODELS)
def test_weights_of_the_default_network_have_its_shapes(name):
    hidden = {"hidden": Model().hidden, "table_bits": 4}
    require_shapes(small(name, **hidden).weights(), model=name, **{**CLAIM, **hidden})


@pytest.mark.parametrize("name", [name for name in MODULES if name != "fm"])
@pytest.mark.parametrize(
    "wrong",
    [
        {"table_bits": 9},
        {"embedding_dim": 40},
        {"hidden": [16]},
        {"hidden": [17, 16]},
        {"hidden": [16] * 64},
        {"fields": 5},
    ],
)
def test_weights_of_other_shapes_are_refused(name, wrong):
    with pytest.raises((KeyError, ValueError)):
        require_shapes(small(name).weights(), model=name, **{**CLAIM, **wrong})


def test_an_fm_has_a_table_for_any_number_of_fields_and_no_network():
    weights = small("fm").weights()
    require_shapes(weights, model="fm", **{**CLAIM, "fields": 5, "hidden": [17]})
    for wrong in ({"table_bits": 9}, {"embedding_dim": 40}):
        with pytest.raises(ValueError, match="'table' has shape"):
            require_shapes(weights, model="fm", **{**CLAIM, **wrong})


def test_the_weights_of_one_system_are_not_those_of_another():
    learners = {name: small(name, embedding_dim=10) for name in MODELS}
    for one, other in itertools.permutations(MODELS, 2):
        if {one, other} != {
            "lr_dnn",
            "deepfm",
        }:  # which have the same tensors and use them in another way
            with pytest.raises(ValueError, match="tensor"):
                learners[other].load_weights(learners[one].weights())


def test_lr_is_made_by_name_like_the_others():
    assert isinstance(small("lr"), LinearLearner)
    assert {type(small(name)) for name in MODULES} == {NetworkLearner}
