"""LR that is only served: the same bits as the learner, in the memory of its weights."""

from __future__ import annotations

import resource

import numpy as np
import pytest
from support.learners import (
    PLANTED_FIELDS,
    assert_equal_states,
    planted_stream,
    served_lr,
    small_learner,
)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_served_lr_predicts_the_same_bits_also_for_rows_it_never_saw(steps: int) -> None:
    there = small_learner("lr", value_fields=[1], table_bits=20)
    ids, labels = planted_stream(300, seed=0)
    ids *= 1000  # with rows between those that are learned
    values = np.random.default_rng(0).normal(size=(300, 1)).astype(np.float32)
    for _ in range(steps):
        there.learn(ids[:200], labels[:200], values[:200])
    here = served_lr(value_fields=[1], table_bits=20)
    here.load_weights(there.weights())
    ids[::3, 0] = 0
    ids[1::3, 2] = 2**20 - 1
    ids[2::3, 3] = 7777
    assert np.array_equal(here.predict(ids, values), there.predict(ids, values))
    assert_equal_states(here.weights(), there.weights())


def test_served_lr_takes_memory_for_its_weights_whatever_its_table_bits() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    learner = served_lr(table_bits=31)
    rows = np.arange(0, 2**31, 2**16, dtype=np.int64).astype(np.int32)  # each on its own page
    learner.load_weights({"rows": rows, "pairs": np.ones((len(rows), 2)), "intercept": np.zeros(2)})
    last = learner.predict(np.full((1, PLANTED_FIELDS), rows[-1]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10  # KiB
    assert last != 0.0 == learner.predict(np.full((1, PLANTED_FIELDS), rows[-1] + 1))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 8])
def test_the_table_of_served_lr_has_an_untouched_row_for_unknown_ids(count: int) -> None:
    learner = served_lr()
    rows = np.arange(count, dtype=np.int32)
    weights = {"rows": rows, "pairs": np.full((count, 2), 2.0), "intercept": np.array([-1.0, 1.0])}
    learner.load_weights(weights)
    # The compiled loops do not check bounds, so the row must exist.
    assert len(learner._ftrl._table) > count
    only_intercept = small_learner("lr")
    only_intercept.load_weights({**weights, "rows": rows[:0], "pairs": weights["pairs"][:0]})
    unknown = np.full((1, PLANTED_FIELDS), 200, np.int32)
    assert learner.predict(unknown).tolist() == only_intercept.predict(unknown).tolist()


def test_served_lr_over_pairs_of_fields_predicts_the_same_bits() -> None:
    pairs = {"columns": [[0, 0], [1, 1], [0, 1], [2, 3]], "table_bits": 10}
    there = small_learner("lr", pairs=pairs)
    ids, labels = planted_stream(500, seed=0)
    there.learn(ids, labels)
    here = served_lr(pairs=pairs)
    here.load_weights(there.weights())
    assert np.array_equal(here.predict(ids), there.predict(ids))
    assert len(set(here.predict(ids).tolist())) > 10
