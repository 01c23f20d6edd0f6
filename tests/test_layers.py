"""Dense layers, dropout and the MLP against torch's own operations."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from stream_ctr.models import DeepFM, layers
from stream_ctr.models.layers import ACTIVATIONS, MLP, Dense, Dropout


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_has_an_activation_after_each_hidden_layer_and_none_at_the_end(activation: str) -> None:
    mlp = MLP(4, [3, 2], activation=activation)
    found = [layer.activation for layer in mlp.layers if isinstance(layer, Dense)]
    assert found == [activation, activation, "none"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_layer_and_its_gradients_are_those_of_torch(activation: str) -> None:
    torch.manual_seed(0)
    layer = Dense(5, 3, activation).double()
    a = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    theirs = getattr(torch, activation)(nn.functional.linear(a, layer.weight, layer.bias))
    assert torch.equal(layer(a), theirs)
    operands = a, layer.weight, layer.bias
    gradient = torch.randn(7, 3, dtype=torch.float64)
    found = torch.autograd.grad(layer(a), operands, gradient)
    expected = torch.autograd.grad(theirs, operands, gradient)
    for ours, other in zip(found, expected, strict=True):
        assert torch.allclose(ours, other, atol=1e-14)


def test_an_unknown_activation_is_refused_where_the_layer_is_made() -> None:
    with pytest.raises(ValueError, match="one of relu, tanh, sigmoid, got 'gelu'"):
        DeepFM(fields=3, embedding_dim=4, activation="gelu")


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_rate_that_cannot_be_dropped_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="at least 0 and less than 1"):
        DeepFM(fields=3, embedding_dim=4, dropout=rate)


@pytest.mark.parametrize("rate", [0.0001, 0.1, 0.4, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_its_share_and_the_mean(rate: float, dtype: torch.dtype) -> None:
    n = 1_000_001
    keep = 1 - rate
    dropped = Dropout(rate)(torch.ones(n, dtype=dtype), seeded(0)).float()
    kept = int((dropped != 0).sum())
    assert abs(kept - n * keep) < 5 * math.sqrt(n * keep * rate) + n / 2**16
    scale = float(dropped.max())
    assert dropped.unique().tolist() == [0.0, scale]
    tolerance = 0.1 if keep < 0.01 else 0.005 if dtype == torch.bfloat16 else 1e-3
    assert scale == pytest.approx(1 / keep, rel=tolerance)


def test_dropped_units_are_independent_of_their_neighbours() -> None:
    dropped = Dropout(0.3)(torch.ones(2**20), seeded(1)) == 0
    for distance in (1, 2, 3, 4, 8, 400):  # one draw gives four units
        both = float((dropped[distance:] & dropped[:-distance]).float().mean())
        assert both == pytest.approx(0.09, abs=0.002)


def test_dropout_draws_from_the_given_generator_alone_and_only_with_one() -> None:
    layer = Dropout(0.4)
    x = torch.ones(50, 7)
    first = layer(x, seeded(1))
    torch.rand(5)
    assert torch.equal(layer(x, seeded(1)), first)
    assert not torch.equal(layer(x, seeded(2)), first)
    assert torch.equal(layer(x), x)


def test_the_gradient_of_dropout_is_nonzero_where_it_kept() -> None:
    x = torch.randn(50, 7, requires_grad=True)
    y = Dropout(0.75)(x, seeded(0))
    (gradient,) = torch.autograd.grad(y, x, torch.full_like(x, 3.0))
    assert torch.equal(gradient, torch.where(y == 0, 0.0, 12.0))
    assert torch.allclose(y, x * gradient / 3.0)


def test_every_hidden_layer_of_an_mlp_draws_and_the_output_does_not() -> None:
    torch.manual_seed(0)
    mlp = MLP(4, [30, 20], dropout=0.5)
    a = torch.randn(6, 4)
    generator = seeded(3)
    first, drop_first, second, drop_second, output = mlp.layers
    x = drop_first(first(a), generator)
    x = drop_second(second(x), generator)
    expected = output(x).squeeze(1)
    assert torch.equal(mlp(a, seeded(3)), expected)
    assert not torch.equal(mlp(a), expected)


def test_threads_that_share_a_module_draw_each_from_their_own_generator() -> None:
    mlp = MLP(4, [64, 64], dropout=0.5)
    a = torch.randn(200, 4)

    def logits(seed: int) -> Tensor:
        with torch.no_grad():
            found: Tensor = mlp(a, seeded(seed))
        return found

    expected = [logits(seed) for seed in range(40)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(logits, range(40)))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_without_onednn_a_rectified_layer_is_one_operation_with_the_same_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = Dense(5, 3, "relu")
    x = torch.randn(7, 5, requires_grad=True)
    expected = layer(x)
    expected_gradient = torch.autograd.grad(expected.sum(), x)[0]
    monkeypatch.setattr(layers, "_ONEDNN", None)
    found = layer(x)
    assert torch.allclose(found, expected, atol=1e-6)
    assert (found == 0).any()
    assert torch.allclose(torch.autograd.grad(found.sum(), x)[0], expected_gradient, atol=1e-6)
