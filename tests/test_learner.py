"""All nine systems as learners, and the shapes that weights must have."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from support.learners import (
    PLANTED_FIELDS,
    learner_spec,
    logloss,
    planted_batches,
    planted_stream,
    small_learner,
)

from stream_ctr.config import Model
from stream_ctr.learn.learner import require_shapes
from stream_ctr.learn.linear_learner import LinearLearner
from stream_ctr.learn.network_learner import NetworkLearner
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.models import MODELS

MODULES = [name for name, system in MODELS.items() if system.module]


def spec(name: str, **changes: Any) -> LearnerSpec:
    """Return the specification of `small_learner(name)`."""
    options = {
        "fields": PLANTED_FIELDS,
        "embedding_dim": 4,
        "hidden": [16, 16],
        "table_bits": 8,
    }
    return learner_spec(name, **{**options, **changes})


def test_lr_is_made_by_name_like_the_others() -> None:
    assert type(small_learner("lr")) is LinearLearner
    assert {type(small_learner(name)) for name in MODULES} == {NetworkLearner}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_every_system_learns_a_planted_signal(name: str, precision: str) -> None:
    learner = small_learner(
        name, precision=precision, crosses=3, pretrain_examples=128 * 60, dense_learning_rate=0.005
    )
    for ids, labels in planted_batches(200, seed=0, crosses=3):
        logits = learner.learn(ids, labels)
        assert logits is not None
        assert np.isfinite(logits.numpy()).all()
    ids, labels = planted_stream(5000, seed=1, crosses=3)
    share = labels.mean()
    constant = logloss(np.full(len(labels), np.log(share / (1 - share))), labels)
    # The interaction is a third of the signal; only LR cannot learn it.
    assert logloss(learner.predict(ids), labels) < constant - (0.08 if name == "lr" else 0.15)


@pytest.mark.parametrize("name", MODELS)
def test_ids_of_cross_products_are_used_by_lr_dnn_alone(name: str) -> None:
    ids, labels = planted_stream(128, seed=0, crosses=2)
    with_crosses = small_learner(name, crosses=2)
    without = small_learner(name)
    with_crosses.learn(ids, labels)
    without.learn(ids[:, :PLANTED_FIELDS], labels)
    found = with_crosses.predict(ids)
    expected = without.predict(ids[:, :PLANTED_FIELDS])
    assert np.array_equal(found, expected) is (name != "lr_dnn")


# -- shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_learners_own_weights_have_its_shapes(name: str) -> None:
    require_shapes(small_learner(name).weights(), spec(name))


@pytest.mark.parametrize("name", MODELS)
def test_weights_of_the_default_network_have_its_shapes(name: str) -> None:
    options = {"hidden": Model().hidden, "table_bits": 4}
    require_shapes(small_learner(name, **options).weights(), spec(name, **options))


@pytest.mark.parametrize("model", MODULES)
@pytest.mark.parametrize("optimizer", ["online", "adagrad", "adam"])
def test_the_required_shapes_are_those_of_each_optimiser(model: str, optimizer: str) -> None:
    options = {"embedding_dim": 15, "hidden": [8], "table_bits": 4}
    weights = small_learner(model, table_optimizer=optimizer, **options).weights()
    require_shapes(weights, spec(model, table_optimizer=optimizer, **options))
    other = "adagrad" if optimizer == "adam" else "adam"
    with pytest.raises(ValueError, match="'table' has shape"):
        require_shapes(weights, spec(model, table_optimizer=other, **options))


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
    ids=str,
)
def test_weights_of_other_shapes_are_refused(name: str, wrong: dict[str, Any]) -> None:
    with pytest.raises((KeyError, ValueError)):
        require_shapes(small_learner(name).weights(), spec(name, **wrong))


def test_an_fm_has_a_table_for_any_number_of_fields_and_no_network() -> None:
    weights = small_learner("fm").weights()
    require_shapes(weights, spec("fm", fields=5, hidden=[17]))
    for wrong in ({"table_bits": 9}, {"embedding_dim": 40}):
        with pytest.raises(ValueError, match="'table' has shape"):
            require_shapes(weights, spec("fm", **wrong))


def test_the_weights_of_one_system_are_not_those_of_another() -> None:
    learners = {name: small_learner(name, embedding_dim=10) for name in MODELS}
    for first, second in itertools.permutations(MODELS, 2):
        # These two have the same tensors and use them differently.
        if {first, second} != {"lr_dnn", "deepfm"}:
            with pytest.raises(ValueError, match="tensor"):
                learners[second].load_weights(learners[first].weights())
