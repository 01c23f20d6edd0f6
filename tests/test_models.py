"""The systems as modules: each against its formula in loops, and its gradient.

Gradients are compared with finite differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call

from stream_ctr.models import MODELS
from stream_ctr.models.layers import ACTIVATIONS, Dense
from stream_ctr.models.products import FieldSums, field_sums

MODULES = [name for name, system in MODELS.items() if system.module]
WITH_FM_OVER_V = ["deepfm", "fm", "fnn"]
F = 4
K = 3
Vector = list[float]
Layers = Sequence[tuple[npt.NDArray[Any], npt.NDArray[Any]]]
Formula = Callable[..., float]

# -- the formulas, in loops -----------------------------------------------------------------------


def mlp(layers: Layers, a: Vector, activation: Callable[[float], float] = math.tanh) -> float:
    for depth, (weight, bias) in enumerate(layers):
        z = [bias[o] + sum(weight[o, i] * a[i] for i in range(len(a))) for o in range(len(bias))]
        a = [activation(unit) for unit in z] if depth < len(layers) - 1 else z
    (logit,) = a
    return logit


def inner(first: Vector, second: Vector) -> float:
    return sum(a * b for a, b in zip(first, second, strict=True))


def pairs(v: Sequence[Vector]) -> Vector:
    return [inner(v[i], v[j]) for i in range(len(v)) for j in range(i + 1, len(v))]


def sum_of_outer_products(v: Sequence[Vector]) -> Vector:
    """All F^2 outer products, added up."""
    k = len(v[0])
    return [sum(x[a] * y[b] for x in v for y in v) for a in range(k) for b in range(k)]


def flattened(v: Sequence[Vector]) -> Vector:
    return [coordinate for embedding in v for coordinate in embedding]


def fm(w: Vector, v: Sequence[Vector], layers: Any, bias: float = 0.0) -> float:
    return bias + sum(w) + sum(pairs(v))


def fnn(w: Vector, v: Sequence[Vector], layers: Any) -> float:
    return mlp(layers, flattened([[w[i], *v[i]] for i in range(len(w))]))


FORMULAS: dict[str, Formula] = {
    "fm": fm,
    "fnn": fm,  # it starts as one
    "ipnn": lambda w, v, layers: mlp(layers, flattened(v) + pairs(v)),
    "opnn": lambda w, v, layers: mlp(layers, flattened(v) + sum_of_outer_products(v)),
    "pnn": lambda w, v, layers: mlp(layers, flattened(v) + pairs(v) + sum_of_outer_products(v)),
    "lr_dnn": lambda w, v, layers: sum(w) + mlp(layers, flattened(v[:F])),
    "fm_dnn": lambda w, v, layers: (
        fm(w, [row[:K] for row in v], None) + mlp(layers, flattened([row[K:] for row in v]))
    ),
    "deepfm": lambda w, v, layers: fm(w, v, None) + mlp(layers, flattened(v)),
}


def module(name: str, *, activation: str = "tanh", dropout: float = 0.0) -> Any:
    """Return the module in float64, with parameters that all differ and none of which is zero."""
    torch.manual_seed(0)
    make = MODELS[name].module
    assert make is not None
    model = make(
        fields=F, embedding_dim=K, hidden=[5, 4], activation=activation, dropout=dropout
    ).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    return model


def inputs(name: str, *, examples: int = 3, crosses: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    columns = F + crosses
    width = MODELS[name].embeddings * K
    w = torch.randn(examples, columns, dtype=torch.float64, generator=generator)
    return w, torch.randn(examples, columns, width, dtype=torch.float64, generator=generator)


def layers_of(model: nn.Module) -> Layers:
    return [
        (layer.weight.detach().numpy(), layer.bias.detach().numpy())
        for layer in model.modules()
        if isinstance(layer, Dense)
    ]


def assert_formula(formula: Formula, model: nn.Module, w: Tensor, v: Tensor) -> None:
    expected = [formula(w[e].tolist(), v[e].tolist(), layers_of(model)) for e in range(len(w))]
    assert model(w, v).tolist() == pytest.approx(expected, rel=1e-12)
    assert np.ptp(expected) > 0.1, "or anything would do"


def test_all_systems_but_lr_are_modules_with_a_formula() -> None:
    assert sorted(FORMULAS) == sorted(MODULES) == sorted({*MODELS} - {"lr"})


@pytest.mark.parametrize("name", MODULES)
def test_a_system_is_its_formula_written_out(name: str) -> None:
    model = module(name)
    scalars = (
        float(value)
        for key, value in model.state_dict().items()
        if key.endswith("bias") and not value.ndim
    )
    constant = next(scalars, 0.0)
    formula = partial(fm, bias=constant) if FORMULAS[name] is fm else FORMULAS[name]
    assert_formula(formula, model, *inputs(name))


def test_fnn_is_a_network_over_weights_and_embeddings_once_the_network_has_begun() -> None:
    model = module("fnn")
    before = model(*inputs("fnn"))
    model.begin_network()
    assert_formula(fnn, model, *inputs("fnn"))
    assert not torch.allclose(model(*inputs("fnn")), before)


def test_the_wide_side_has_cross_products_and_the_network_has_not() -> None:
    model = module("lr_dnn")
    w, v = inputs("lr_dnn", crosses=2)
    assert_formula(FORMULAS["lr_dnn"], model, w, v)
    v[:, F:] = 7.0
    w[:, F:] += 1.0
    assert torch.allclose(model(w, v), model(w[:, :F], v[:, :F]) + w[:, F:].sum(dim=1))


def test_the_two_sides_of_fm_and_dnn_have_embeddings_of_their_own() -> None:
    model = module("fm_dnn")
    w, v = inputs("fm_dnn")
    y_fm = model(w, v) - model.deep(v[..., K:].flatten(1))
    v[..., K:] = 0.0
    y_dnn = model.deep(torch.zeros(1, F * K, dtype=torch.float64))
    assert torch.allclose(model(w, v) - y_dnn, y_fm)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_network_has_the_activation_that_was_asked_for(activation: str) -> None:
    functions: dict[str, Callable[[float], float]] = {
        "tanh": math.tanh,
        "relu": lambda z: max(z, 0.0),
        "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    }
    function = functions[activation]
    assert_formula(
        lambda w, v, layers: fm(w, v, None) + mlp(layers, flattened(v), function),
        module("deepfm", activation=activation),
        *inputs("deepfm"),
    )


# -- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MODULES, "fnn, the network", "lr_dnn, crosses"])
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_the_gradient_of_a_system_agrees_with_finite_differences(
    name: str, activation: str
) -> None:
    """The gradients are those of `w`, of `v` and of each parameter."""
    name, _, variant = name.partition(", ")
    model = module(name, activation=activation)
    if variant == "the network":
        model.begin_network()
    w, v = inputs(name, crosses=2 if variant == "crosses" else 0)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def logits(w: Tensor, v: Tensor, *values: Tensor) -> Any:
        return functional_call(model, dict(zip(names, values, strict=True)), (w, v))

    assert gradcheck(logits, (w.requires_grad_(), v.requires_grad_(), *parameters))


# -- the arguments that a step passes -------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_sums_that_a_step_passes_give_the_same_logits_and_gradients(name: str) -> None:
    model = module(name)
    w, v = inputs(name)
    operands = w.requires_grad_(), v.requires_grad_(), *model.parameters()
    sums = field_sums(v.detach())
    found = []
    for given in (None, sums):
        logits = model(w, v, sums=given)
        gradients = torch.autograd.grad(logits.sum(), operands, materialize_grads=True)
        found.append([logits, *gradients])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("name", MODULES)
def test_models_with_an_fm_over_all_of_v_use_the_sums_and_others_ignore_them(name: str) -> None:
    model = module(name)
    w, v = inputs(name)
    sums = field_sums(v)
    shifted = FieldSums(sums.total, sums.pairs + 2.0)
    expected = model(w, v) + (2.0 if name in WITH_FM_OVER_V else 0.0)
    assert torch.allclose(model(w, v, sums=shifted), expected, atol=1e-12)


@pytest.mark.parametrize("name", MODULES)
def test_units_are_dropped_only_with_a_generator(name: str) -> None:
    model = module(name, dropout=0.5)
    w, v = inputs(name)
    dropped = model(w, v, generator=torch.Generator().manual_seed(0))
    again = model(w, v, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dropped, again)
    drops = name not in ("fm", "fnn")  # FNN starts as an FM, which has nothing to drop
    assert torch.equal(model(w, v), dropped) is not drops
    assert torch.equal(model(w, v), module(name)(w, v))


def test_the_network_of_fnn_drops_units_too() -> None:
    model = module("fnn", dropout=0.5)
    model.begin_network()
    w, v = inputs("fnn")
    dropped = model(w, v, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(model(w, v), dropped)
