"""The blend against a plain computation, its bound, and its state."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.learners import assert_equal_states, logloss, random_batch, small_learner

from stream_ctr.learn.blend import STACK, Blend, BlendPredictor

Floats = npt.NDArray[np.float64]
GAMMA = 1 - 1 / 20_000


def sigmoid(z: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-z)))


def members(n: int, count: int = 3, *, seed: int = 0) -> tuple[Floats, Any]:
    """Return logits [count, n], each less informed than the one before, and labels [n]."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(-1.5, 1.5, n)
    labels = (rng.random(n) < sigmoid(truth)).astype(np.uint8)
    noise = rng.normal(0, 1, (count, n)) * np.arange(1, count + 1)[:, None]
    return truth + noise, labels


class Plain:
    """The formulas of docs/learning.md in numpy."""

    def __init__(self, count: int) -> None:
        self.omega = np.full(count + 1, 1 / (count + 1))
        self.u = np.eye(count + 1)[0]
        self.h = 50 * np.eye(count + 1)
        self.t = 0

    def learn(self, z: Floats, y: int) -> float:
        x = np.append(np.clip(np.nan_to_num(z), -12, 12), 1.0)
        p = np.append(sigmoid(z), sigmoid(self.u @ x))
        there = np.isfinite(p)
        mixed = float(self.omega[there] @ p[there] / self.omega[there].sum())
        self.t += 1
        likelihood = p if y else 1 - p
        moved = self.omega.copy()
        moved[there] *= likelihood[there] / (mixed if y else 1 - mixed)
        share = min(0.5, max(1 / self.t, 1e-5))
        self.omega = (1 - share) * moved / moved.sum() + share / len(p)
        q = p[-1]
        self.h = GAMMA * self.h + (1 - GAMMA) * 50 * np.eye(len(x))
        self.h += max(q * (1 - q), 1e-4) * np.outer(x, x)
        self.u = self.u + np.linalg.solve(self.h, x) * (y - q)
        return math.log(mixed / (1 - mixed))


@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_it_is_the_blend_of_the_formulas(missing: float) -> None:
    logits, labels = members(2000)
    logits[np.random.default_rng(1).random(logits.shape) < missing] = np.nan
    logits[0, 0] = 1.0  # no example without any
    rows = np.flatnonzero(np.isfinite(logits).any(axis=0))
    blend, plain = Blend(["a", "b", "c"]), Plain(3)
    found = blend.learn(logits, labels)
    wanted = [plain.learn(logits[:, e], int(labels[e])) for e in rows]
    assert np.allclose(found[rows], wanted, atol=1e-9)
    assert np.allclose(blend.weights()["omega"], plain.omega)
    assert np.allclose(blend.weights()["u"], plain.u)
    assert np.isnan(np.delete(found, rows)).all()


def test_it_predicts_what_it_then_learns_from() -> None:
    logits, labels = members(300)
    blend = Blend(["a", "b", "c"])
    blend.learn(logits[:, :200], labels[:200])
    for e in range(200, 300):
        one = slice(e, e + 1)
        assert np.array_equal(
            blend.predict(logits[:, one]), blend.learn(logits[:, one], labels[one])
        )


def losses(logits: Floats, labels: Any) -> Floats:
    return np.logaddexp(0, np.where(labels == 1, -logits, logits))


@given(
    count=st.integers(1, 5),
    kinds=st.lists(
        st.sampled_from(["good", "bad", "sure", "turns", "same"]), min_size=5, max_size=5
    ),
    rate=st.floats(0.001, 0.9),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_its_loss_is_never_above_that_of_a_member_by_more_than_the_bound(
    count: int, kinds: list[str], rate: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    n = 700
    labels = (rng.random(n) < rate).astype(np.uint8)
    sides = np.where(labels == 1, 1.0, -1.0)
    made = {
        "good": 2 * sides + rng.normal(0, 2, n),
        "bad": -5 * sides,
        "sure": np.where(rng.random(n) < 0.99, 30 * sides, -30 * sides),
        "turns": np.where(np.arange(n) < n // 2, 6 * sides, -6 * sides),
        "same": np.full(n, math.log(rate / (1 - rate))),
    }
    logits = np.array([made[kind] for kind in kinds[:count]])
    blended = losses(Blend([f"m{i}" for i in range(count)]).learn(logits, labels), labels).cumsum()
    shares = np.minimum(0.5, np.maximum(1 / np.arange(1, n + 1), 1e-5))
    bound = math.log(count + 1) - np.log1p(-shares * count / (count + 1)).cumsum()
    for member in logits:
        assert (blended - losses(member, labels).cumsum() <= bound + 1e-6).all()


def test_it_is_better_than_each_member_where_they_know_different_things() -> None:
    rng = np.random.default_rng(0)
    parts = rng.normal(0, 1.5, (2, 20_000))
    labels = (rng.random(20_000) < sigmoid(parts.sum(axis=0))).astype(np.uint8)
    blended = Blend(["a", "b"]).learn(parts, labels)
    assert logloss(blended, labels) < min(logloss(part, labels) for part in parts) - 0.02
    predicted = sigmoid(blended[10_000:]).sum() / labels[10_000:].sum()
    assert 0.97 < predicted < 1.03


def test_ten_million_examples_of_equal_members_leave_it_regular() -> None:
    blend = Blend(["a", "b"])
    rng = np.random.default_rng(0)
    for _ in range(100):
        logits = rng.normal(-3, 1, 100_000)
        labels = (rng.random(100_000) < sigmoid(logits)).astype(np.uint8)
        found = blend.learn(np.array([logits, logits]), labels)
        assert np.isfinite(found).all()
    assert logloss(found, labels) < logloss(logits, labels) + 1e-4
    assert np.linalg.cond(blend.optimizer_state()["h"]) < 1e5


def test_a_member_that_left_takes_no_part_and_the_others_keep_their_sum() -> None:
    logits, labels = members(500)
    blend, without = Blend(["a", "b", "c"]), Blend(["a", "b", "c"])
    for each in (blend, without):
        each.learn(logits[:, :250], labels[:250])
    spoiled = logits.copy()
    spoiled[0, 250:] = np.nan
    wild = logits.copy()
    wild[0, 250:] = np.inf
    assert np.array_equal(
        blend.learn(spoiled[:, 250:], labels[250:]), without.learn(wild[:, 250:], labels[250:])
    )
    assert blend.report().weights["a"] == pytest.approx(without.report().weights["a"])
    assert sum(blend.report().weights.values()) == pytest.approx(1.0)


def test_it_reports_its_regret_against_the_best() -> None:
    blend = Blend(["a", "b"])
    assert blend.report().best is None
    assert blend.report().regret_nats is None
    n = 400
    labels = (np.random.default_rng(0).random(n) < 0.2).astype(np.uint8)
    sides = np.where(labels == 1, 4.0, -4.0)
    logits = np.array([-sides, sides])
    found = blend.learn(logits, labels)
    report = blend.report()
    assert set(report.weights) == {"a", "b", STACK}
    assert report.best == "b"
    assert report.weights["b"] > 0.9
    regret = losses(found, labels).sum() - losses(logits[1], labels).sum()
    assert report.regret_nats == pytest.approx(regret)
    # An example that not all of them predicted does not count.
    blend.learn(np.array([[np.nan], [-9.0]]), np.array([1], np.uint8))
    assert blend.report().regret_nats == pytest.approx(regret)


def test_it_resumes_exactly() -> None:
    logits, labels = members(1000)
    straight, resumed = Blend(["a", "b", "c"]), Blend(["a", "b", "c"])
    straight.learn(logits[:, :600], labels[:600])
    resumed.load_weights(straight.weights())
    resumed.load_optimizer_state(straight.optimizer_state())
    rest = logits[:, 600:], labels[600:]
    assert np.array_equal(straight.learn(*rest), resumed.learn(*rest))
    assert_equal_states(straight.optimizer_state(), resumed.optimizer_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"omega": np.array([0.5, 0.5])}, "expected float64"),
        ({"omega": np.array([0.5, 0.6, 0.1])}, "sum to 1"),
        ({"omega": np.array([1.5, -0.5, 0.0])}, "sum to 1"),
        ({"u": np.array([1.0, np.nan, 0.0])}, "not finite"),
        ({"v": np.zeros(3)}, "'v' is not one of this model"),
    ],
)
def test_weights_of_another_blend_are_refused(change: dict[str, Floats], message: str) -> None:
    blend = Blend(["a", "b"])
    with pytest.raises(ValueError, match=message):
        blend.load_weights({**blend.weights(), **change})


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_members_need_distinct_names(names: list[str]) -> None:
    with pytest.raises(ValueError, match="distinct names"):
        Blend(names)


def test_a_predictor_mixes_what_its_members_predict() -> None:
    deepfm, lr = small_learner("deepfm"), small_learner("lr")
    ids, labels = random_batch(100, fields=4, rows=256)
    blend = Blend(["deepfm", "lr"])
    logits = np.array([np.asarray(made.learn(ids, labels)) for made in (deepfm, lr)])
    blend.learn(logits, labels)
    now = np.array([deepfm.predict(ids), lr.predict(ids)])
    both = BlendPredictor(blend, {"deepfm": deepfm, "lr": lr})
    assert np.array_equal(both.predict(ids), blend.predict(now))
    one = BlendPredictor(blend, {"lr": lr})
    assert np.array_equal(one.predict(ids), blend.predict(np.array([np.full(100, np.nan), now[1]])))
