"""The touched rows of a table are those that were learned, and those that were put back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.learners import planted_batches, planted_stream, small_learner

from stream_ctr.learn.pairs import PairHasher
from stream_ctr.learn.touched import Touched

PAIRS = {"columns": [[0, 0], [1, 1], [0, 1], [2, 3]], "table_bits": 10}


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[tuple[str, list[int]]]]:
    """A number of rows, and what happens to them."""
    bits = draw(st.integers(4, 9))
    rows = st.lists(st.integers(0, (1 << bits) - 1), max_size=40)
    actions = st.tuples(st.sampled_from(["mark", "take", "put_back"]), rows)
    return 1 << bits, draw(st.lists(actions, max_size=12))


@given(histories())
def test_marks_takes_and_rows_that_come_back_are_those_of_a_set(
    history: tuple[int, list[tuple[str, list[int]]]],
) -> None:
    rows, actions = history
    touched, expected = Touched(rows), set[int]()
    for action, given_rows in actions:
        if action == "mark":
            ids = np.array(given_rows, np.int32)
            touched.mark(ids.reshape(-1, 2) if len(ids) % 2 == 0 else ids[:, None])
            expected |= {*given_rows}
        elif action == "put_back":
            touched.put_back(np.array(given_rows, np.uint32))
            expected |= {*given_rows}
        else:
            taken = touched.take()
            assert taken.dtype == np.uint32
            assert taken.tolist() == sorted(expected)
            expected = set()
        assert len(touched) == len(expected)


def test_a_large_table_has_its_first_and_its_last_row() -> None:
    touched = Touched(1 << 26)
    rows = [0, 63, 64, (1 << 26) - 65, (1 << 26) - 1]
    touched.mark(np.array([rows], np.int32))
    assert touched.take().tolist() == rows
    assert len(touched) == 0


def test_columns_of_a_larger_array_are_marked() -> None:
    touched = Touched(64)
    touched.mark(np.arange(12, dtype=np.int32).reshape(3, 4)[:, :2])
    assert touched.take().tolist() == [0, 1, 4, 5, 8, 9]


@pytest.mark.parametrize(
    ("model", "crosses", "columns"), [("deepfm", 2, 4), ("lr_dnn", 2, 6), ("lr", 2, 4)]
)
def test_a_learner_touches_the_rows_that_it_reads(model: str, crosses: int, columns: int) -> None:
    learner = small_learner(model, crosses=crosses)
    first, second = planted_batches(2, seed=0, crosses=crosses)
    learner.learn(*first)
    learner.track_touched()
    assert len(learner.take_changes()["rows"]) == 0
    learner.learn(*second)
    expected = np.unique(second[0][:, :columns]).tolist()
    assert len(learner.touched) == len(expected)
    assert learner.take_changes()["rows"].tolist() == expected
    assert len(learner.touched) == 0


def test_lr_over_pairs_touches_the_rows_of_pairs() -> None:
    learner = small_learner("lr", pairs=PAIRS)
    ids, labels = planted_stream(50, seed=0)
    learner.track_touched()
    learner.learn(ids, labels)
    hasher = PairHasher([(0, 0), (1, 1), (0, 1), (2, 3)], table_bits=10)
    assert learner.take_changes()["rows"].tolist() == np.unique(hasher.rows(ids)).tolist()


@pytest.mark.parametrize("options", [{"model": "fm"}, {"model": "lr"}], ids=str)
def test_rows_that_are_put_back_have_their_newest_values(options: dict[str, Any]) -> None:
    learner = small_learner(**options)
    first, second = planted_batches(2, seed=0)
    second[0][:] = np.where(second[0] == 0, 1, second[0])
    learner.track_touched()
    learner.learn(*first)
    refused = learner.take_changes()
    learner.learn(*second)
    learner.touched.put_back(refused["rows"])
    changes = learner.take_changes()
    assert {0, *second[0].ravel()} == {*changes["rows"].tolist()}
    assert changes["values"][0].tolist() == refused["values"][0].tolist()  # row 0
    assert not np.array_equal(changes["values"], refused["values"])


def test_a_step_that_is_refused_touches_nothing() -> None:
    learner = small_learner("fm", value_fields=[0])
    learner.track_touched()
    ids, labels = planted_stream(10, seed=0)
    assert learner.learn(ids, labels, np.full((10, 1), np.nan, np.float32)) is None
    assert len(learner.touched) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_changes_come_from_a_gpu_too() -> None:
    learner = small_learner("deepfm", device="cuda")
    learner.track_touched()
    ids, labels = planted_batches(1, seed=0)[0]
    learner.learn(ids, labels)
    changes, weights = learner.take_changes(), learner.weights()
    assert changes["rows"].tolist() == np.unique(ids).tolist()
    assert np.array_equal(changes["values"], weights["table"][changes["rows"], :5])
    assert changes["intercept"].tolist() == [np.float32(weights["intercept"][0])]


@pytest.mark.parametrize("model", ["fm", "lr"])
def test_changes_of_a_learner_that_tracks_none_are_an_error(model: str) -> None:
    with pytest.raises(ValueError, match="call track_touched first"):
        small_learner(model).take_changes()


@pytest.mark.parametrize("model", ["fm", "lr"])
def test_a_learner_counts_the_weights_that_were_loaded(model: str) -> None:
    learner, other = small_learner(model), small_learner(model, seed=1)
    other.learn(*planted_batches(1, seed=0)[0])
    assert learner.restored == 0
    learner.load_weights(other.weights())
    learner.learn(*planted_batches(1, seed=0)[0])
    assert learner.restored == 1
    with pytest.raises(ValueError, match="missing"):
        learner.load_weights({})
    assert learner.restored == 1
