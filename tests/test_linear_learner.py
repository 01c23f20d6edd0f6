"""LR as a learner: its state, and the weights that it accepts."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from support.learners import (
    assert_equal_states,
    planted_batches,
    planted_stream,
    served_lr,
    small_learner,
    state_of,
)

LR_WEIGHTS = {
    "rows": np.array([3, 7], np.int32),
    "pairs": np.array([[0.5, 1.0], [-1.0, 2.0]]),
    "intercept": np.array([0.1, 0.2]),
}


def test_lr_learns_from_an_example_what_it_predicted_for_it() -> None:
    learner = small_learner("lr", value_fields=[1])
    ids, labels = planted_stream(300, seed=0)
    values = np.random.default_rng(0).normal(size=(300, 1)).astype(np.float32)
    for e in range(300):
        row = slice(e, e + 1)
        before = learner.predict(ids[row], values[row]).tolist()
        found = learner.learn(ids[row], labels[row], values[row]).tolist()
        assert found == pytest.approx(before, abs=1e-12)
    assert learner.steps == 300


def test_lr_continues_from_its_state() -> None:
    straight, before, resumed = (small_learner("lr") for _ in range(3))
    steps = planted_batches(4, seed=0)
    for ids, labels in steps:
        straight.learn(ids, labels)
    for ids, labels in steps[:2]:
        before.learn(ids, labels)
    weights, state = before.weights(), before.optimizer_state()
    before.learn(*steps[2])
    before.weights(reuse=True)  # earlier copies stay as they were
    resumed.learn(*steps[3])
    resumed.load_weights(weights)
    resumed.load_optimizer_state(state)
    for ids, labels in steps[2:]:
        resumed.learn(ids, labels)
    assert_equal_states(state_of(straight), state_of(resumed))


def test_copies_of_lrs_weights_stay_except_in_memory_that_is_reused() -> None:
    learner = small_learner("lr")
    first, second = planted_batches(2, seed=0)
    learner.learn(*first)
    reused, own = learner.weights(reuse=True), learner.weights()
    kept = {name: array.copy() for name, array in own.items()}
    learner.learn(*second)
    learner.weights()
    assert_equal_states(own, kept)
    assert_equal_states(reused, kept)
    assert not np.array_equal(learner.weights(reuse=True)["pairs"], kept["pairs"])
    assert not np.array_equal(reused["pairs"], kept["pairs"])
    assert_equal_states(own, kept)


def test_lr_that_learns_in_one_thread_predicts_finite_numbers_in_another() -> None:
    learner = small_learner("lr", table_bits=4)
    ids, labels = planted_stream(20_000, seed=0)
    ids = (ids % 16).astype(np.int32)
    enough = threading.Event()

    def learn_until_enough() -> int:
        for batches in itertools.count(1):
            learner.learn(ids, labels)
            if enough.is_set():
                return batches
        raise AssertionError

    with ThreadPoolExecutor(1) as pool:
        learning = pool.submit(learn_until_enough)
        predicted = [np.isfinite(learner.predict(ids[:2000])).all() for _ in range(30)]
        enough.set()
    assert all(predicted)
    assert learning.result() >= 1


def test_the_rates_of_ftrl_are_used_by_lr_alone() -> None:
    strict = small_learner("lr", ftrl={"l1": 50.0})
    loose = small_learner("lr")
    ids, labels = planted_stream(128, seed=0)
    for learner in (strict, loose):
        learner.learn(ids, labels)
    assert np.ptp(strict.predict(ids)) == 0.0 < np.ptp(loose.predict(ids))
    small_learner("fm", ftrl={"l1": 50.0})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": np.array([3, 256], np.int32)}, "outside a table of 2\\^8 rows"),
        ({"rows": np.array([-1, 3], np.int32)}, "outside a table of 2\\^8 rows"),
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
def test_weights_that_are_not_those_of_lr_are_refused_and_change_nothing(
    changed: dict[str, Any], message: str
) -> None:
    learner = small_learner("lr")
    learner.load_weights(LR_WEIGHTS)
    with pytest.raises(ValueError, match=message):
        learner.load_weights({**LR_WEIGHTS, **changed})
    assert_equal_states(learner.weights(), LR_WEIGHTS)
    with pytest.raises(ValueError, match=message):
        served_lr({**LR_WEIGHTS, **changed})


@pytest.mark.parametrize("name", LR_WEIGHTS)
def test_the_weights_of_lr_must_all_be_there(name: str) -> None:
    others = {key: value for key, value in LR_WEIGHTS.items() if key != name}
    with pytest.raises(ValueError, match=f"{name!r} is missing"):
        small_learner("lr").load_weights(others)


def test_lr_that_has_learned_nothing_has_weights_too() -> None:
    learner = small_learner("lr")
    learner.load_weights(small_learner("lr").weights())
    assert learner.predict(planted_stream(3, seed=0)[0]).tolist() == [0.0, 0.0, 0.0]
