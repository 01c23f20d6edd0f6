"""The parts of a batch, and steps that must change nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.learners import assert_equal_states, random_batch, small_network, state_of

from stream_ctr.learn import cpu_step
from stream_ctr.learn.cpu_step import parts_of
from stream_ctr.learn.step import dropout_seed


@given(st.integers(1, 20_000))
def test_the_parts_of_a_batch_cover_its_rows_and_have_one_size(batch_size: int) -> None:
    parts = parts_of(batch_size)
    rows = [row for part in parts for row in range(part.start, part.stop)]
    assert rows[:batch_size] == list(range(batch_size))
    assert len({part.stop - part.start for part in parts}) == 1
    assert parts[-1].start < batch_size <= parts[-1].stop


def test_seeds_of_dropout_differ_by_step_and_part() -> None:
    seeds = {dropout_seed(7, step, part) for step in range(50) for part in range(4)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**64 for seed in seeds)


@pytest.mark.parametrize("odd", ["row", "weight", "value"])
def test_a_step_that_is_not_finite_or_explodes_changes_nothing(odd: str) -> None:
    learner = small_network(batch_size=600, value_fields=[0])
    values = np.ones((600, 1), np.float32)
    ids, labels = random_batch(600)
    learner.learn(ids, labels, values)
    if odd == "row":
        learner.table.rows[ids[-1, 0], 0] = float("nan")
    elif odd == "weight":
        learner.adam.vector[0] = 1e30
    else:
        values[:] = 1e25
    before = state_of(learner)
    assert learner.learn(ids, labels, values) is None
    assert_equal_states(state_of(learner), before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "options", [{}, {"table_optimizer": "adam", "model": "fm_dnn"}], ids=["adagrad", "adam"]
)
def test_any_number_of_threads_gives_the_same_model_bit_for_bit(
    precision: str, options: dict[str, str]
) -> None:
    states = []
    for threads in (1, 2, 3, 5):
        learner = small_network(
            batch_size=1500,
            hidden=[33, 17],
            dropout=0.2,
            value_fields=[1],
            precision=precision,
            threads=threads,
            **options,
        )
        for step in range(4):
            ids, labels = random_batch(1500 if step else 700, seed=step)
            learner.learn(ids, labels, (ids[:, :1] / 1024).astype(np.float32))
        states.append(state_of(learner))
    for other in states[1:]:
        assert_equal_states(states[0], other)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_examples_logit_does_not_depend_on_its_neighbours(precision: str) -> None:
    learner = small_network(batch_size=600, hidden=[40, 24], precision=precision)  # two parts
    ids, labels = random_batch(700)
    learner.learn(ids[:600], labels[:600])
    together = learner.predict(ids)
    alone = np.concatenate([learner.predict(ids[i : i + 1]) for i in range(0, 700, 9)])
    assert np.array_equal(together[::9], alone)


def test_a_short_batch_after_a_full_one_has_only_the_gradients_of_its_own_parts() -> None:
    straight, resumed = (small_network(batch_size=600) for _ in range(2))  # two parts
    straight.learn(*random_batch(600))
    resumed.load_weights(straight.weights())
    resumed.load_optimizer_state(straight.optimizer_state())
    for made in (straight, resumed):
        made.learn(*random_batch(200, seed=1))
    assert_equal_states(state_of(straight), state_of(resumed))


def test_each_part_and_each_step_drops_other_units() -> None:
    learner = small_network(batch_size=512, dropout=0.5, progressive=False)  # two parts of 256
    ids = np.ones((512, 3), np.int32)
    labels = np.zeros(512, np.uint8)
    first, second = (learner.learn(ids, labels) for _ in range(2))
    assert first is not None
    assert second is not None
    assert not np.array_equal(first[:256], first[256:])
    assert not np.array_equal(np.argsort(first.numpy()), np.argsort(second.numpy()))


def test_the_limit_of_the_gradient_is_that_of_the_summed_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_step, "LARGEST_GRADIENT", 4.0)
    ids, labels = random_batch(1)
    assert small_network(table_optimizer="adagrad").learn(ids, labels) is not None
    made = small_network(table_optimizer="adagrad")
    assert made.learn(np.repeat(ids, 16, axis=0), np.repeat(labels, 16)) is None
