"""Metrics against scikit-learn and counting by hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from stream_ctr.evaluate import metrics
from stream_ctr.evaluate.metrics import Score, Scored, Tally, WholeRun, Windows, paired_interval

MODELS = ("deepfm", "ftrl", "river_ftrl")


@dataclass
class Stream:
    """Three models, the second a little worse, the third more so and only `chosen` examples its own; the truth is known."""

    time: np.ndarray
    labels: np.ndarray
    truth: np.ndarray
    logits: dict[str, np.ndarray]
    chosen: np.ndarray

    def __getitem__(self, rows: slice) -> Scored:
        logits = {model: logits[rows] for model, logits in self.logits.items()}
        logits["river_ftrl"] = logits["river_ftrl"][self.chosen[rows]]
        return Scored(
            self.time[rows],
            self.labels[rows],
            self.truth[rows],
            logits,
            {"river_ftrl": self.chosen[rows]},
        )

    def loss(self, model: str) -> np.ndarray:
        return metrics.losses(self.logits[model], self.labels)


def stream(
    n: int = 5000, *, seed: int = 0, start: int = 0, step: int = 100, share: float = 0.5
) -> Stream:
    rng = np.random.default_rng(seed)
    truth = rng.normal(-2, 1.5, n)
    labels = (rng.random(n) < metrics.probabilities(truth)).astype(np.uint8)
    logits = {
        model: truth + rng.normal(0, noise, n)
        for model, noise in zip(MODELS, (0.3, 0.6, 1.0), strict=True)
    }
    return Stream(
        start + step * np.arange(n),
        labels,
        metrics.probabilities(truth),
        logits,
        rng.random(n) < share,
    )


def test_auc_and_logloss_agree_with_scikit_learn_within_the_stated_bound():
    for seed in range(5):
        data = stream(seed=seed)
        score = Score()
        score.add(data.logits["deepfm"], data.labels)
        summary = score.summary()
        exact = roc_auc_score(data.labels, data.logits["deepfm"])
        assert abs(summary["auc"] - exact) <= summary["auc_error_bound"] + 1e-12
        assert summary["auc_error_bound"] < 0.002
        assert summary["logloss"] == pytest.approx(
            log_loss(data.labels, metrics.probabilities(data.logits["deepfm"])), rel=1e-12
        )
        ctr = data.labels.mean()
        assert summary["ne"] == pytest.approx(
            summary["logloss"] / -(ctr * np.log(ctr) + (1 - ctr) * np.log(1 - ctr))
        )
        assert summary["pred_over_actual"] == pytest.approx(
            metrics.probabilities(data.logits["deepfm"]).sum() / data.labels.sum()
        )
        assert summary["count"] == 5000


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(-40, 40), st.booleans()), min_size=1, max_size=60))
def test_the_auc_error_bound_holds_by_counting_pairs(rows):
    logits = np.array([s for s, _ in rows])
    labels = np.array([y for _, y in rows], np.uint8)
    score = Score()
    score.add(logits, labels)
    summary = score.summary()
    positive, negative = logits[labels == 1], logits[labels == 0]
    if not len(positive) or not len(negative):
        assert summary["auc"] is None
        return
    pairs = positive[:, None] - negative[None, :]
    exact = ((pairs > 0) + 0.5 * (pairs == 0)).mean()
    assert abs(summary["auc"] - exact) <= summary["auc_error_bound"] + 1e-12


def test_extreme_logits_stay_finite():
    score = Score()
    score.add(np.array([-1e4, 1e4]), np.array([1, 0], np.uint8))
    assert score.summary()["logloss"] == 1e4
    assert np.isfinite(metrics.logits(np.array([0.0, 1.0]))).all()
    assert np.allclose(
        metrics.logits(metrics.probabilities(np.array([-30.0, 0.0, 12.0]))), [-30, 0, 12]
    )


def test_scores_of_parts_add_up_to_the_score_of_the_whole():
    data = stream()
    whole, left, right = Tally(MODELS), Tally(MODELS), Tally(MODELS)
    whole.add(data[:])
    left.add(data[:1234])
    right.add(data[1234:])
    left.merge(right)
    for name, array in whole.arrays().items():
        assert np.allclose(left.arrays()[name], array, rtol=1e-12), name
    assert whole.arrays()["histogram"].sum() == 2 * 5000 + data.chosen.sum()


def test_a_run_of_a_batch_is_that_run():
    data, whole = stream(700), stream(700)[:]
    for rows in (slice(0, 700), slice(3, 50), slice(690, 700)):
        for name in ("time", "loss", "probability", "bin", "best_loss"):
            assert np.array_equal(getattr(whole[rows], name), getattr(data[rows], name)), name


def whole_run(*, sizes: list[int], n: int) -> tuple[WholeRun, Stream]:
    data = stream(n)
    run = WholeRun(MODELS)
    done = 0
    for size in (*sizes, n):
        run.add(data[done : done + size])
        done = min(n, done + size)
        if done == n:
            break
    return run, data


def test_the_whole_run_and_its_tail_are_what_a_list_of_all_examples_says():
    run, data = whole_run(sizes=[700] * 1000, n=300_000)  # enough for the blocks to double
    summary = run.summary()
    assert run.count == 300_000
    assert run.length > 64
    chosen = data.chosen
    for model in ("deepfm", "ftrl"):
        assert summary["models"][model]["logloss"] == pytest.approx(
            data.loss(model).mean(), rel=1e-12
        )
    assert summary["models"]["river_ftrl"]["count"] == chosen.sum()
    assert summary["best_possible_logloss"] == pytest.approx(
        log_loss(data.labels, data.truth), rel=1e-9
    )
    assert summary["constant_logloss"] == pytest.approx(metrics.entropy(data.labels.mean()))
    half = run.summary(last=0.5)
    start = half["from_example"]
    assert abs(start - 150_000) <= run.length / 2
    assert half["models"]["deepfm"]["logloss"] == pytest.approx(
        data.loss("deepfm")[start:].mean(), rel=1e-12
    )
    assert half["pairs"].keys() == {"ftrl", "river_ftrl"}
    assert half["paired"] == {"models": ["deepfm", "river_ftrl"], **half["pairs"]["river_ftrl"]}
    for model, both in (("ftrl", np.ones(len(chosen), bool)), ("river_ftrl", chosen)):
        difference = (data.loss("deepfm") - data.loss(model))[start:][both[start:]]
        pair = half["pairs"][model]
        assert pair["logloss_difference"] == pytest.approx(difference.mean(), rel=1e-9)
        assert pair["count"] == both[start:].sum()
        error = difference.std() / np.sqrt(len(difference))
        assert pair["high"] - pair["low"] == pytest.approx(2 * 1.96 * error, rel=0.35)
        assert pair["low"] < pair["logloss_difference"] < pair["high"] < 0


def test_models_that_are_alone_are_compared_with_nobody():
    run, batch = WholeRun(["deepfm"]), stream(500)
    run.add(Scored(batch.time, batch.labels, batch.truth, {"deepfm": batch.logits["deepfm"]}, {}))
    summary = run.summary()
    assert (
        summary["paired"]["models"],
        summary["paired"]["logloss_difference"],
        summary["pairs"],
    ) == (["deepfm"], None, {})


def test_the_paired_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        mean_of_block = rng.normal(
            0.01, 0.05, 40
        )  # neighbours are alike: blocks differ more than their examples
        blocks = np.stack([mean_of_block * 200 + rng.normal(0, 1, 40), np.full(40, 200.0)], axis=1)
        interval = paired_interval(blocks)
        covered += interval["low"] <= 0.01 <= interval["high"]
    assert 0.90 <= covered / 300 <= 0.98


def test_few_blocks_give_no_interval():
    assert paired_interval(np.ones((9, 2)))["low"] is None
    assert paired_interval(np.empty((0, 2)))["logloss_difference"] is None


def test_windows_are_of_the_impressions_event_time_provisional_until_closed_and_reported_once():
    data = stream(1000, start=0, step=100)  # 0 to 99.9 s
    windows = Windows(MODELS, window_ms=10_000, rolling=3)
    windows.add(data[0:350])
    assert windows.rolling_summary()["provisional"] is True
    final = windows.close(before_ms=34_900)
    assert [(w["start_ms"], w["end_ms"], w["provisional"]) for w in final] == [
        (0, 10_000, False), (10_000, 20_000, False), (20_000, 30_000, False),
    ]  # fmt: skip
    assert final[1]["models"]["deepfm"]["logloss"] == pytest.approx(
        data.loss("deepfm")[100:200].mean()
    )
    assert final[1]["pairs"]["ftrl"]["count"] == 100
    assert windows.close(before_ms=35_000) == []
    windows.add(data[350:1000])
    rolling = windows.rolling_summary()
    assert (rolling["start_ms"], rolling["end_ms"]) == (70_000, 100_000)
    assert rolling["models"]["deepfm"]["count"] == 300
    assert len(windows.close(before_ms=100_000)) == 7
    for start in range(100_000, 10_000_000, 100_000):  # memory does not grow with the stream
        windows.add(stream(100, start=start, step=1000)[:])
        windows.close(before_ms=start + 99_000)
    assert len(windows.tallies) <= 14
    assert len(windows.panes) <= 14 * 20


def test_windows_and_the_whole_run_go_on_from_their_state():
    data = stream(3000, step=37)
    straight = (WholeRun(MODELS), Windows(MODELS, window_ms=10_000, rolling=2))
    resumed = (WholeRun(MODELS), Windows(MODELS, window_ms=10_000, rolling=2))
    for part in straight:
        part.add(data[:])
    for part in resumed:
        part.add(data[0:1700])
    fresh = (WholeRun(MODELS), Windows(MODELS, window_ms=10_000, rolling=2))
    for part, old in zip(fresh, resumed, strict=True):
        part.load_state_dict(old.state_dict())
        part.add(data[1700:3000])
    for part, other in zip(fresh, straight, strict=True):
        state = other.state_dict()
        for name, array in part.state_dict().items():
            assert np.allclose(array, state[name], rtol=1e-12), name
    assert resumed[0].count == 1700, "what was loaded is a copy"
