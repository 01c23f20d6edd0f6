"""Adam over one vector, against torch's own over separate parameters."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from stream_ctr.learn.adam import FlatAdam
from stream_ctr.models.layers import MLP, Dense

WHOLE = slice(None)


def network() -> MLP:
    torch.manual_seed(0)
    return MLP(5, [70, 3])


def gradients(size: int, *, parts: int, seed: int) -> torch.Tensor:
    return torch.randn(parts, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("pieces", [1, 3])
def test_steps_are_those_of_torch(weight_decay: float, pieces: int) -> None:
    model = network()
    theirs = copy.deepcopy(model)
    adam = FlatAdam(model, learning_rate=0.01)
    adam.weight_decay = weight_decay
    reference = torch.optim.Adam(theirs.parameters(), lr=0.01, weight_decay=weight_decay)
    for step in range(5):
        found = gradients(len(adam.vector), parts=2, seed=step)
        for parameter, view in zip(
            theirs.parameters(), adam.views(found.sum(dim=0)).values(), strict=True
        ):
            parameter.grad = view.clone()
        reference.step()
        for piece in adam.pieces(pieces):
            adam.step(found, torch.tensor(float(step)), piece)
    for ours, expected in zip(model.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7, 50])
def test_pieces_cover_the_vector_once(count: int) -> None:
    adam = FlatAdam(network(), learning_rate=0.01)
    indices = np.arange(len(adam.vector))
    found = [indices[piece] for piece in adam.pieces(count)]
    assert len(found) == count
    assert np.array_equal(np.concatenate(found), indices)


def test_the_split_of_the_vector_does_not_change_a_bit() -> None:
    vectors = []
    for count in (1, 2, 5):
        adam = FlatAdam(network(), learning_rate=0.01)
        for step in range(3):
            found = gradients(len(adam.vector), parts=3, seed=step)
            for piece in adam.pieces(count):
                adam.step(found, torch.tensor(float(step)), piece)
        vectors.append(adam.vector)
    assert torch.equal(vectors[0], vectors[1])
    assert torch.equal(vectors[0], vectors[2])


def test_a_step_to_skip_changes_nothing() -> None:
    adam = FlatAdam(network(), learning_rate=0.01)
    before = adam.vector.clone()
    found = gradients(len(adam.vector), parts=1, seed=0)
    adam.step(found, torch.tensor(0.0), slice(None), skip=torch.tensor(1.0))
    assert torch.equal(adam.vector, before)
    assert not any(moment.any() for moment in adam.moments)
    adam.step(found, torch.tensor(0.0), slice(None), skip=torch.tensor(0.0))
    assert not torch.equal(adam.vector, before)


def test_every_step_renews_the_copies_of_hidden_layers_and_the_output_has_none() -> None:
    model = network()
    adam = FlatAdam(model, learning_rate=0.01, low=True)
    adam.step(gradients(len(adam.vector), parts=1, seed=0), torch.tensor(0.0), slice(None))
    *hidden, output = (layer for layer in model.modules() if isinstance(layer, Dense))
    assert len(hidden) == 2
    assert output.low is None
    for layer in hidden:
        assert layer.low is not None
        weight, bias = layer.low
        assert torch.equal(weight, layer.weight.to(torch.bfloat16))
        assert torch.equal(bias, layer.bias.to(torch.bfloat16))


def test_reset_clears_the_moments_and_keeps_the_parameters() -> None:
    adam = FlatAdam(network(), learning_rate=0.01)
    adam.step(gradients(len(adam.vector), parts=1, seed=0), torch.tensor(0.0), slice(None))
    before = adam.vector.clone()
    assert all(moment.any() for moment in adam.moments)
    adam.reset()
    assert torch.equal(adam.vector, before)
    assert not any(moment.any() for moment in adam.moments)


def test_moments_of_another_model_are_refused() -> None:
    adam = FlatAdam(network(), learning_rate=0.01)
    state = adam.state_dict()
    with pytest.raises(KeyError):
        adam.load_state_dict({})
    name = next(iter(state))
    with pytest.raises(ValueError, match="has shape"):
        adam.load_state_dict({**state, name: state[name][:-1]})


def test_copies_whose_columns_are_filled_up_give_the_same_gradients_and_steps() -> None:
    torch.manual_seed(0)
    plain, wide = MLP(13, [6, 8]), MLP(13, [6, 8])
    wide.load_state_dict(plain.state_dict())
    adams = [
        FlatAdam(model, learning_rate=0.1, low=True, align=align)
        for model, align in ((plain, 1), (wide, 8))
    ]
    layers = [layer for layer in wide.layers if isinstance(layer, Dense)]
    copies = [layer.low[0] for layer in layers if layer.low]
    assert [tuple(copy.shape) for copy in copies] == [(6, 16), (8, 8)]
    for step in range(3):
        x = torch.randn(5, 13, requires_grad=True)
        found = []
        for model, adam in zip((plain, wide), adams, strict=True):
            y = model(x)
            grad_x, *grads = torch.autograd.grad(y.sum(), (x, *model.parameters()))
            adam.step(torch.cat([each.flatten() for each in grads])[None], _number(step), WHOLE)
            found.append((y.detach(), grad_x, adam.vector.clone()))
        for first, second in zip(*found, strict=True):
            assert torch.allclose(first, second, atol=1e-2)
    assert not copies[0][:, 13:].any()
    assert torch.equal(copies[0][:, :13], layers[0].weight.bfloat16())
    with torch.no_grad():
        adams[1].vector.fill_(0.5)
    adams[1].refresh()
    assert (copies[0][:, :13] == 0.5).all()


def _number(steps: int) -> torch.Tensor:
    return torch.tensor(float(steps))
