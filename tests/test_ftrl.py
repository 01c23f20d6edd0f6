"""FTRL-Proximal against numbers worked out by hand, Algorithm 1 with dicts, and River."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from river import linear_model, optim
from support.learners import assert_equal_states
from support.sample_logs import OBD, shared_data

from stream_ctr.evaluate.metrics import probabilities
from stream_ctr.events.decoder import Decoder
from stream_ctr.events.features import Hasher, hash_ids
from stream_ctr.learn.ftrl import FTRL, RiverSemantics
from stream_ctr.logs.open import open_log

INTERCEPT = -1
Array = npt.NDArray[Any]


class Literal:
    """Algorithm 1 line by line. The intercept is a coordinate without l1 and l2."""

    def __init__(
        self, *, alpha: float = 0.1, beta: float = 1.0, l1: float = 0.0, l2: float = 1.0
    ) -> None:
        self.alpha = alpha
        self.beta = beta
        self.l1 = l1
        self.l2 = l2
        self.z: dict[int, float] = defaultdict(float)
        self.n: dict[int, float] = defaultdict(float)

    def weight(self, i: int) -> float:
        l1, l2 = (0.0, 0.0) if i == INTERCEPT else (self.l1, self.l2)
        z = self.z[i]
        if abs(z) <= l1:
            return 0.0
        rate = (self.beta + math.sqrt(self.n[i])) / self.alpha + l2
        return -(z - math.copysign(l1, z)) / rate

    def learn_one(self, x: dict[int, float], y: int) -> float:
        w = {i: self.weight(i) for i in x}
        logit = math.fsum(w[i] * x[i] for i in x)
        for i in x:
            g = (1 / (1 + math.exp(-logit)) - y) * x[i]
            sigma = (math.sqrt(self.n[i] + g * g) - math.sqrt(self.n[i])) / self.alpha
            self.z[i] += g - sigma * w[i]
            self.n[i] += g * g
        return logit

    def learn(self, ids: Array, labels: Array, scales: Array) -> list[float]:
        out = []
        for row, scale, label in zip(ids.tolist(), scales.tolist(), labels.tolist(), strict=True):
            x: dict[int, float] = defaultdict(float)
            x[INTERCEPT] = 1.0
            for i, value in zip(row, scale, strict=True):
                x[i] += value
            out.append(self.learn_one(x, label))
        return out


def stream(n: int, *, fields: int = 7, rows: int = 64, seed: int = 0) -> tuple[Array, Array, Array]:
    """Return ids, labels that depend on them, and values of fields 0 and 3.

    With few rows, most examples have fields that share a row.
    """
    rng = np.random.default_rng(seed)
    ids = (rng.zipf(1.3, (n, fields)) % rows).astype(np.int32)
    labels = (rng.random(n) < 0.1 + 0.6 * (ids[:, -1] % 2)).astype(np.uint8)
    return ids, labels, rng.normal(0, 2, (n, 2)).astype(np.float32)


def scales(ids: Array, values: Array) -> Array:
    all_scales = np.ones(ids.shape)
    all_scales[:, [0, 3]] = values
    return all_scales


def pair(model: FTRL, row: int) -> list[float]:
    state = model.state_dict()
    found = state["pairs"][state["rows"] == row]
    return found[0].tolist() if len(found) else [0.0, 0.0]


def test_three_steps_worked_out_by_hand() -> None:
    model = FTRL(table_bits=4, value_fields=(2,), alpha=0.1, beta=1.0, l1=0.25, l2=1.0)
    # 1. All weights are 0, so p = 1/2, and every g = -1/2, z = -1/2, n = 1/4; field 2 has value 1.
    step = (np.array([[1, 2, 4]], np.int32), np.array([1], np.uint8), np.array([[1.0]], np.float32))
    assert model.learn(*step).tolist() == [0.0]
    for row in (1, 2, 4):
        assert pair(model, row) == [-0.5, 0.25]
    assert model.state_dict()["intercept"].tolist() == [-0.5, 0.25]
    # 2. w_1 = (0.5 - 0.25) / (1.5 / 0.1 + 1) = 1/64, the intercept is 0.5 / 15 = 1/30, row 5 is new
    # and row 3 has value 2.
    step = (np.array([[1, 5, 3]], np.int32), np.array([0], np.uint8), np.array([[2.0]], np.float32))
    assert model.learn(*step) == pytest.approx([1 / 64 + 1 / 30], rel=1e-14)
    # p = 1 / (1 + exp(-0.0489583)), sigma_1 = (sqrt(1/4 + p^2) - 1/2) / 0.1,
    # z_1 = -1/2 + p - sigma_1 / 64.
    p = 0.512237139145
    assert pair(model, 5) == pytest.approx([p, p * p], rel=1e-10)
    assert pair(model, 3) == pytest.approx([2 * p, 4 * p * p], rel=1e-10)
    assert pair(model, 1) == pytest.approx([-0.02148349320, 0.512386886720], rel=1e-9)
    # 3. |z_1| <= l1, so its weight is 0 again, w_5 = -(p - 1/4) / ((1 + p) / 0.1 + 1) and
    # w_3 = -(2p - 1/4) / ((1 + 2p) / 0.1 + 1).
    assert model.learn(*step) == pytest.approx(
        [0.00347941430867 - 0.01626541981812 + 2 * -0.03645486726777], rel=1e-11
    )


@pytest.mark.parametrize(("l1", "l2"), [(0.0, 0.0), (0.0, 1.0), (0.7, 0.3), (2.0, 5.0)])
def test_it_is_algorithm_1_also_where_fields_share_a_row(l1: float, l2: float) -> None:
    ids, labels, values = stream(3000)
    literal = Literal(l1=l1, l2=l2)
    model = FTRL(table_bits=6, value_fields=(0, 3), l1=l1, l2=l2)
    expected = literal.learn(ids, labels, scales(ids, values))
    assert np.abs(model.learn(ids, labels, values) - expected).max() < 1e-10
    state = model.state_dict()
    for row, (z, n) in zip(state["rows"].tolist(), state["pairs"].tolist(), strict=True):
        assert (z, n) == pytest.approx((literal.z[row], literal.n[row]), rel=1e-9, abs=1e-12)
    assert state["rows"].tolist() == sorted(
        row for row in literal.n if row != INTERCEPT and literal.n[row]
    )
    assert state["intercept"] == pytest.approx(
        [literal.z[INTERCEPT], literal.n[INTERCEPT]], rel=1e-9
    )


def by_river(ids: Array, labels: Array, scales: Array, **options: float) -> list[float]:
    """Return River's probabilities from before each update."""
    river = linear_model.LogisticRegression(
        optimizer=optim.FTRLProximal(**options), intercept_lr=0.02
    )
    expected = []
    for row, scale, label in zip(ids.tolist(), scales.tolist(), labels.tolist(), strict=True):
        x = dict(zip(row, scale, strict=True))
        expected.append(river.predict_proba_one(x)[True])
        river.learn_one(x, label)
    return expected


@pytest.mark.parametrize(("l1", "l2"), [(0.0, 1.0), (0.3, 0.5)])
def test_with_rivers_semantics_it_is_river_to_nine_digits(l1: float, l2: float) -> None:
    ids, labels, values = stream(10_000, rows=500)
    options = {"alpha": 0.5, "l1": l1, "l2": l2}
    expected = by_river(ids, labels, scales(ids, values), **options)
    model = RiverSemantics(
        table_bits=9, value_fields=(0, 3), intercept_learning_rate=0.02, **options
    )
    assert np.abs(probabilities(model.learn(ids, labels, values)) - expected).max() < 1e-9
    assert np.std(expected) > 0.1, "or there is nothing to compare"
    exact = FTRL(table_bits=9, value_fields=(0, 3), **options).learn(ids, labels, values)
    assert np.abs(probabilities(exact) - expected).max() > 0.01, "the deviations are visible"


@pytest.mark.parametrize(
    "path",
    [OBD, "obd/impressions.csv", "criteo/train.csv", "avazu/train.csv"],
    ids=["obd, a part", "obd", "criteo", "avazu"],
)
def test_with_rivers_semantics_it_is_river_on_real_logs(path: str | Path) -> None:
    """Compares the first ten thousand impressions."""
    log = open_log(path if isinstance(path, Path) else shared_data(path))
    assert log.fields
    decoder, hasher = Decoder(log.fields), Hasher(log.fields, table_bits=20)
    shown, clicked = [], []
    for batch in log.batches():
        events, _ = decoder.decode(batch.value)
        shown.append(
            (
                hash_ids(events.impressions.impression_id),
                hasher.rows(events.impressions.features)[0],
            )
        )
        clicked.append(hash_ids(events.clicks.impression_id))
    keys, ids = (np.concatenate(arrays)[:10_000] for arrays in zip(*shown, strict=True))
    labels = np.isin(keys, np.concatenate(clicked)).astype(np.uint8)
    assert labels.any()
    expected = by_river(ids, labels, np.ones(ids.shape), alpha=0.05, l2=1.0)
    logits = RiverSemantics(table_bits=20, intercept_learning_rate=0.02).learn(ids, labels)
    assert np.abs(probabilities(logits) - expected).max() < 1e-9


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 120), max_size=5), st.integers(1, 20), st.integers(0, 99))
def test_it_does_not_depend_on_where_batches_end(cuts: list[int], fields: int, seed: int) -> None:
    ids, labels, _ = stream(120, fields=fields, seed=seed)
    at_once, in_parts = FTRL(table_bits=6), FTRL(table_bits=6)
    parts = zip(np.split(ids, sorted(cuts)), np.split(labels, sorted(cuts)), strict=True)
    logits = [in_parts.learn(*part) for part in parts]
    assert np.array_equal(np.concatenate(logits), at_once.learn(ids, labels))
    assert_equal_states(at_once.state_dict(), in_parts.state_dict())


def test_it_continues_bit_for_bit_from_a_state_of_only_the_rows_it_learned() -> None:
    ids, labels, values = stream(400)
    straight, stopped, resumed = (
        FTRL(table_bits=20, value_fields=(0, 3), l1=0.1) for _ in range(3)
    )
    expected = straight.learn(ids, labels, values)[200:]
    stopped.learn(ids[:200], labels[:200], values[:200])
    state = stopped.state_dict()
    assert len(state["rows"]) == len(np.unique(ids[:200]))
    resumed.learn(ids[::-1], labels[::-1], values[::-1])  # loading replaces this
    resumed.load_state_dict(state)
    assert np.array_equal(resumed.learn(ids[200:], labels[200:], values[200:]), expected)
    assert_equal_states(straight.state_dict(), resumed.state_dict())


@pytest.mark.parametrize(("l1", "l2"), [(0.0, 1.0), (0.7, 0.3)])
def test_predict_is_algorithm_1_without_learning(l1: float, l2: float) -> None:
    ids, labels, values = stream(600)  # most examples have fields that share a row
    literal = Literal(l1=l1, l2=l2)
    model = FTRL(table_bits=6, value_fields=(0, 3), l1=l1, l2=l2)
    assert model.predict(ids, values).tolist() == [0.0] * 600
    literal.learn(ids[:400], labels[:400], scales(ids, values)[:400])
    model.learn(ids[:400], labels[:400], values[:400])
    before = {name: array.copy() for name, array in model.state_dict().items()}
    predicted = model.predict(ids[400:], values[400:])
    assert all(np.array_equal(array, before[name]) for name, array in model.state_dict().items())
    for row, scale, logit in zip(
        ids[400:].tolist(), scales(ids, values)[400:].tolist(), predicted.tolist(), strict=True
    ):
        products = (literal.weight(i) * x for i, x in zip(row, scale, strict=True))
        expected = literal.weight(INTERCEPT) + math.fsum(products)
        assert logit == pytest.approx(expected, abs=1e-10)
    first = slice(400, 401)
    assert model.learn(ids[first], labels[first], values[first]) == pytest.approx(
        predicted[:1], abs=1e-12
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 120), max_size=5), st.integers(1, 20))
def test_a_prediction_does_not_depend_on_other_examples(cuts: list[int], fields: int) -> None:
    ids, labels, _ = stream(120, fields=fields)
    model = FTRL(table_bits=6)
    model.learn(ids, labels)
    parts = [model.predict(part) for part in np.split(ids, sorted(cuts))]
    assert np.array_equal(np.concatenate(parts), model.predict(ids))


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_an_example_that_is_not_finite_has_no_prediction_and_others_have_theirs(odd: float) -> None:
    ids, labels, values = stream(40, fields=4)
    model = FTRL(table_bits=6, value_fields=(0, 3))
    model.learn(ids, labels, values)
    expected = model.predict(ids, values)
    values[7, 0] = odd
    logits = model.predict(ids, values)
    assert np.isnan(logits[7])
    assert np.array_equal(np.delete(logits, 7), np.delete(expected, 7))


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [[5, 1, 2, 3], [5, 5, 2, 5]])
def test_an_example_that_is_not_finite_is_not_learned(odd: float, row: list[int]) -> None:
    ids, labels, values = stream(300, fields=4)
    with_odd, without = (FTRL(table_bits=6, value_fields=(0, 3), l1=0.1) for _ in range(2))
    expected = without.learn(ids, labels, values)
    ids, labels, values = (
        np.insert(array, 150, inserted, axis=0)
        for array, inserted in ((ids, row), (labels, 1), (values, [odd, 1.0]))
    )
    logits = with_odd.learn(ids, labels, values)
    assert np.isnan(logits[150])
    assert np.array_equal(np.delete(logits, 150), expected)
    assert_equal_states(with_odd.state_dict(), without.state_dict())


def test_predictions_stay_finite_when_labels_are_perfectly_predictable() -> None:
    ids = np.tile(np.arange(12, dtype=np.int32), (20_000, 1))
    values = np.full((20_000, 12), 1e30, np.float32)
    model = FTRL(table_bits=4, value_fields=tuple(range(12)), alpha=10.0, l2=0.0)
    assert np.isfinite(model.learn(ids, np.ones(20_000, np.uint8), values)).all()
    assert np.isfinite(model.state_dict()["pairs"]).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beta": 0.0}, "alpha and beta must be positive, got 0.1 and 0"),
        ({"alpha": 0.0}, "alpha and beta must be positive, got 0.0 and 1"),
        ({"beta": float("nan")}, "alpha and beta must be positive"),
        ({"l1": -1.0}, "l1 and l2 must be at least 0, got -1.0 and 1"),
        ({"l2": float("nan")}, "l1 and l2 must be at least 0"),
    ],
    ids=str,
)
def test_rates_that_it_cannot_learn_with_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FTRL(**wrong)  # type: ignore[arg-type]
