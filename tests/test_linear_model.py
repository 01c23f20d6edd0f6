"""LR that is only served: the weights of the learner in single precision, in little memory."""

from __future__ import annotations

import resource

import numpy as np
import pytest
from support.learners import (
    PLANTED_FIELDS,
    learner_spec,
    planted_stream,
    served_lr,
    small_learner,
)

from stream_ctr.learn.served_weights import served_weights, serving_sha256


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_served_lr_predicts_as_the_learner_also_for_rows_it_never_saw(steps: int) -> None:
    there = small_learner("lr", value_fields=[1], table_bits=20)
    ids, labels = planted_stream(300, seed=0)
    ids *= 1000  # with rows between those that are learned
    values = np.random.default_rng(0).normal(size=(300, 1)).astype(np.float32)
    for _ in range(steps):
        there.learn(ids[:200], labels[:200], values[:200])
    here = served_lr(there.weights(), value_fields=[1], table_bits=20)
    ids[::3, 0] = 0
    ids[1::3, 2] = 2**20 - 1
    ids[2::3, 3] = 7777
    found = here.predict(ids, values)
    assert found == pytest.approx(there.predict(ids, values), abs=1e-6)
    assert len(set(found.tolist())) > 10 * (steps > 0)


def test_its_sums_are_those_of_rounded_weights_in_double_precision() -> None:
    there = small_learner("lr")
    ids, labels = planted_stream(300, seed=0)
    there.learn(ids, labels)
    here = served_lr(there.weights())
    served = here.served()
    weights = np.zeros(1 << 8)
    weights[served["rows"]] = served["values"]
    expected = weights[ids].sum(axis=1) + served["intercept"][0]
    assert here.predict(ids) == pytest.approx(expected, abs=1e-15)
    assert served["values"].dtype == np.float32


def test_a_logit_that_is_not_finite_is_nan() -> None:
    there = small_learner("lr", value_fields=[0])
    here = served_lr(there.weights(), value_fields=[0])
    ids = planted_stream(2, seed=0)[0]
    found = here.predict(ids, np.array([[np.inf], [1.0]], np.float32))
    assert np.isnan(found).tolist() == [True, False]


def test_served_lr_takes_no_memory_for_rows_that_were_not_learned() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = np.arange(0, 2**31, 2**19, dtype=np.int64).astype(np.int32)  # each on its own page
    pairs = np.ones((len(rows), 2))
    served = served_lr({"rows": rows, "pairs": pairs, "intercept": np.zeros(2)}, table_bits=31)
    last = served.predict(np.full((1, PLANTED_FIELDS), rows[-1]))
    assert last != 0.0 == served.predict(np.full((1, PLANTED_FIELDS), rows[-1] + 1))
    assert served.predict(np.full((1, PLANTED_FIELDS), 2**31 - 1)) == 0.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


@pytest.mark.parametrize("count", [0, 1, 2, 255])
def test_ids_of_rows_that_were_not_learned_have_the_weight_zero(count: int) -> None:
    rows = np.arange(count, dtype=np.int32)
    pairs, intercept = np.full((count, 2), 2.0), np.array([-1.0, 1.0])
    served = served_lr({"rows": rows, "pairs": pairs, "intercept": intercept})
    only_intercept = served_lr({"rows": rows[:0], "pairs": pairs[:0], "intercept": intercept})
    unknown = np.full((1, PLANTED_FIELDS), 255, np.int32)
    assert served.predict(unknown).tolist() == only_intercept.predict(unknown).tolist() != [0.0]


def test_served_lr_over_pairs_of_fields_predicts_as_the_learner() -> None:
    pairs = {"columns": [[0, 0], [1, 1], [0, 1], [2, 3]], "table_bits": 10}
    there = small_learner("lr", pairs=pairs)
    ids, labels = planted_stream(500, seed=0)
    there.learn(ids, labels)
    here = served_lr(there.weights(), pairs=pairs)
    assert here.predict(ids) == pytest.approx(there.predict(ids), abs=1e-6)
    assert len(set(here.predict(ids).tolist())) > 10


def test_weights_that_only_serve_are_served_as_the_pairs_that_they_came_from() -> None:
    there = small_learner("lr", value_fields=[1])
    ids, labels = planted_stream(300, seed=0)
    values = np.random.default_rng(0).normal(size=(300, 1)).astype(np.float32)
    there.learn(ids, labels, values)
    pairs = served_lr(there.weights(), value_fields=[1])
    weights = pairs.served()
    again = served_lr(weights, value_fields=[1])
    assert again.predict(ids, values).tolist() == pairs.predict(ids, values).tolist()
    spec = learner_spec("lr", fields=PLANTED_FIELDS, table_bits=8, value_fields=[1])
    assert serving_sha256(served_weights(spec, weights)) == serving_sha256(
        served_weights(spec, there.weights())
    )
    for change, message in (
        ({"rows": weights["rows"][::-1]}, "does not ascend"),
        ({"values": weights["values"].astype(np.float64)}, "is float64"),
        ({"rows": weights["rows"] + 256}, "outside a table"),
        ({"intercept": np.zeros(2)}, "expected float64"),
    ):
        with pytest.raises(ValueError, match=message):
            served_lr({**weights, **change}, value_fields=[1])
