"""A server knows of a dense part, without torch, what the module says."""

from __future__ import annotations

from typing import Any

import pytest
from support.learners import learner_spec

from stream_ctr.learn.dense_part import PARTS, expected_shapes, layers, part_of
from stream_ctr.learn.learner import make_learner
from stream_ctr.learn.spec import SYSTEMS, LearnerSpec
from stream_ctr.models import MODELS


def spec(model: str, **changes: Any) -> LearnerSpec:
    options = {
        "fields": 5,
        "crosses": 2,
        "embedding_dim": 4,
        "hidden": [8, 6],
        "table_bits": 6,
        "batch_size": 16,
    }
    return learner_spec(model, **{**options, **changes})


def test_every_system_but_lr_has_a_dense_part() -> None:
    assert [*PARTS] == [name for name in SYSTEMS if name != "lr"]


@pytest.mark.parametrize("optimizer", ["online", "adagrad", "adam"])
@pytest.mark.parametrize("model", PARTS)
def test_the_expected_weights_are_those_of_the_learner(model: str, optimizer: str) -> None:
    described = spec(model, table_optimizer=optimizer, pretrain_examples=8)
    weights = make_learner(described, device="cpu", threads=1).weights()
    found = {name: array.shape for name, array in weights.items()}
    assert expected_shapes(described) == found


@pytest.mark.parametrize("hidden", [[], [1], [16]])
def test_networks_of_any_depth_have_the_expected_weights(hidden: list[int]) -> None:
    described = spec("pnn", hidden=hidden)
    weights = make_learner(described, device="cpu", threads=1).weights()
    assert expected_shapes(described) == {name: array.shape for name, array in weights.items()}
    assert len(layers(described)) == len(hidden) + 1


@pytest.mark.parametrize("model", PARTS)
def test_a_part_is_described_as_the_module_is(model: str) -> None:
    part, system = PARTS[model], MODELS[model]
    assert part.activation == system.activation
    assert part.embeddings == system.embeddings
    assert part.crosses == system.crosses
    if not system.pretraining:
        terms = system.module.terms  # type: ignore[union-attr]
        assert (part.linear, part.pairs, part.network) == terms[:3]


def test_an_fnn_is_an_fm_until_its_network_begins() -> None:
    for examples, network in ((8, False), (0, True)):
        described = spec("fnn", pretrain_examples=examples)
        weights = make_learner(described, device="cpu", threads=1).weights()
        assert part_of(described, weights).network is network
