"""The specification of a learner is checked when it is read."""

from __future__ import annotations

import msgspec
import pytest
from support.learners import learner_spec

from stream_ctr.learn.spec import FtrlRates, LearnerSpec
from stream_ctr.models import MODELS


@pytest.mark.parametrize("model", MODELS)
def test_a_spec_survives_json(model: str) -> None:
    spec = learner_spec(model, fields=3, value_fields=[1], hidden=[7, 5], dropout=0.25, seed=2**62)
    assert msgspec.json.decode(msgspec.json.encode(spec), type=LearnerSpec) == spec
    assert (spec.hidden, spec.value_fields, spec.seed) == ((7, 5), (1,), 2**62)


def test_rates_of_ftrl_are_written_only_where_they_were_given() -> None:
    without = msgspec.json.encode(learner_spec("fm", fields=3))
    given = learner_spec("lr", fields=3, ftrl={"l1": 2.0})
    assert b"ftrl" not in without
    assert given.ftrl == FtrlRates(l1=2.0)
    assert msgspec.json.decode(msgspec.json.encode(given), type=LearnerSpec) == given


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "../gbdt"),
        ("activation", "gelu"),
        ("dropout", -0.1),
        ("dropout", 1.0),
        ("fields", 0),
        ("table_bits", 3),
        ("table_bits", 32),
        ("embedding_dim", 513),
        ("hidden", [0]),
        ("hidden", [1] * 65),
        ("crosses", 257),
        ("value_fields", [-1]),
        ("batch_size", 0),
        ("table_optimizer", "ftrl"),
        ("table_learning_rate", -0.1),
        ("table_beta", -0.1),
        ("dense_learning_rate", 0.0),
        ("precision", "fp16"),
        ("seed", -1),
        ("seed", 2**63),
        ("ftrl", {"alpha": 0.0}),
        ("ftrl", {"l1": -1.0}),
        ("ftrl", {"rate": 1.0}),
    ],
    ids=str,
)
def test_a_value_outside_its_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(msgspec.ValidationError, match=rf"at `\$\.{name}|at `\$\.{name}\["):
        learner_spec(**{"fields": 3, name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("model", ["lr", "fm"])
def test_an_unknown_option_is_refused_for_every_model(model: str) -> None:
    with pytest.raises(msgspec.ValidationError, match="unknown field `tabel_bits`"):
        learner_spec(model, fields=3, tabel_bits=8)
